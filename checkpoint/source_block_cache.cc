#include "checkpoint/source_block_cache.h"

#include <optional>

#include "base/check.h"

namespace holdfast {

SourceBlockCache::SourceBlockCache(const BlockReader& reader, const Index& index,
                                   std::span<std::byte> memory, uint64_t slot_bytes)
    : reader_(reader),
      index_(index),
      memory_(memory),
      slot_bytes_(slot_bytes),
      table_(static_cast<uint32_t>(memory.size() / slot_bytes)),
      slots_(memory.size() / slot_bytes) {}

std::span<std::byte> SourceBlockCache::BytesOf(uint32_t slot, uint32_t image) const {
  CHECK(index_.images[image].block_bytes <= slot_bytes_);
  return memory_.subspan(slot * slot_bytes_, index_.images[image].block_bytes);
}

absl::StatusOr<SourceBlockCache::Pin> SourceBlockCache::Get(uint32_t image, uint64_t block) {
  const Key key(image, block);
  uint32_t slot = 0;
  {
    MutexLock lock(mutex_);
    for (;;) {
      if (const std::optional<uint32_t> found = table_.Find(key); found.has_value()) {
        if (slots_[*found].is_read) {
          ++slots_[*found].pins;
          return Pin(*this, *found, BytesOf(*found, image));
        }
      } else {
        // Called by Assign, under the lock that is held here, which clang cannot see.
        const auto may_go = [this](uint32_t each)
                                ABSL_NO_THREAD_SAFETY_ANALYSIS { return slots_[each].pins == 0; };
        const std::optional<uint32_t> given = table_.Assign(key, may_go);
        if (given.has_value()) {
          slot = *given;
          break;
        }
      }
      changed_.Wait(mutex_);
    }
    slots_[slot] = {.pins = 1, .is_read = false};
    bytes_read_ += index_.images[image].block_bytes;
  }
  const absl::Status read = reader_.Read(image, block, BytesOf(slot, image));
  {
    MutexLock lock(mutex_);
    slots_[slot].is_read = read.ok();
    if (!read.ok()) {
      slots_[slot].pins = 0;
      table_.Drop(key);
    }
  }
  changed_.SignalAll();
  if (!read.ok()) return read;
  return Pin(*this, slot, BytesOf(slot, image));
}

void SourceBlockCache::Unpin(uint32_t slot) {
  {
    MutexLock lock(mutex_);
    CHECK(slots_[slot].pins > 0);
    --slots_[slot].pins;
  }
  changed_.SignalAll();
}

uint64_t SourceBlockCache::bytes_read() const {
  MutexLock lock(mutex_);
  return bytes_read_;
}

}  // namespace holdfast
