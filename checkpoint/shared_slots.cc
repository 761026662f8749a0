#include "checkpoint/shared_slots.h"

#include <atomic>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace holdfast {
namespace {

uint64_t Aligned64(uint64_t bytes) { return (bytes + 63) / 64 * 64; }

// Length of the well-formed, printable UTF-8 character that `bytes` begins with (RFC 3629), or 0.
size_t Utf8Length(std::span<const char> bytes) {
  const auto at = [&](size_t i) -> unsigned {
    return i < bytes.size() ? static_cast<unsigned char>(bytes[i]) : 0;
  };
  const auto continues = [&](size_t i, unsigned low = 0x80, unsigned high = 0xbf) {
    return at(i) >= low && at(i) <= high;
  };
  const unsigned lead = at(0);
  if (lead < 0x80) return lead >= ' ' && lead != 0x7f ? 1 : 0;
  if (lead >= 0xc2 && lead <= 0xdf) return continues(1) ? 2 : 0;
  if (lead >= 0xe0 && lead <= 0xef) {
    // No overlong forms, no surrogates.
    const bool second = continues(1, lead == 0xe0 ? 0xa0 : 0x80, lead == 0xed ? 0x9f : 0xbf);
    return second && continues(2) ? 3 : 0;
  }
  if (lead >= 0xf0 && lead <= 0xf4) {
    const bool second = continues(1, lead == 0xf0 ? 0x90 : 0x80, lead == 0xf4 ? 0x8f : 0xbf);
    return second && continues(2) && continues(3) ? 4 : 0;
  }
  return 0;
}

static_assert(sizeof(std::atomic<uint8_t>) == 1 && std::atomic<uint8_t>::is_always_lock_free);

}  // namespace

std::string PrintableText(std::span<const char> bytes) {
  std::string text;
  for (size_t i = 0; i < bytes.size() && bytes[i] != '\0';) {
    const size_t length = Utf8Length(bytes.subspan(i));
    if (length == 0) {
      text.push_back('?');
      ++i;
    } else {
      text.append(bytes.data() + i, length);
      i += length;
    }
  }
  return text;
}

SharedSlots::Offsets SharedSlots::OffsetsOf(const SlotSizes& sizes) {
  Offsets offsets;
  const uint64_t slots = sizes.slot_count;
  offsets.block_table = Aligned64(sizeof(abi::RegistrationMemory));
  offsets.block_done = Aligned64(offsets.block_table + slots * sizes.block_count * 4);
  offsets.blob_bytes = Aligned64(offsets.block_done + slots * sizes.block_count);
  offsets.end = Aligned64(offsets.blob_bytes + slots * sizes.blob_count * 8);
  return offsets;
}

uint64_t SharedSlots::MemoryBytes(const SlotSizes& sizes) { return OffsetsOf(sizes).end; }

SharedSlots::SharedSlots(std::shared_ptr<SharedMapping> memory, const SlotSizes& sizes)
    : mapping_(std::move(memory)), sizes_(sizes), offsets_(OffsetsOf(sizes)) {
  CHECK(mapping_->bytes().size() >= offsets_.end);
  CHECK(sizes.slot_count >= 1 && sizes.slot_count <= abi::kSlotsMax);
  abi::RegistrationMemory& header = this->memory();
  header.magic = abi::kRegistrationMemoryMagic;
  header.version = abi::kProtocolVersion;
  header.registration_id = sizes.registration_id;
  header.slot_count = sizes.slot_count;
  header.block_count = sizes.block_count;
  header.blob_count = sizes.blob_count;
  header.block_bytes = sizes.block_bytes;
  header.block_table_offset = offsets_.block_table;
  header.block_done_offset = offsets_.block_done;
  header.blob_bytes_offset = offsets_.blob_bytes;
}

abi::RegistrationMemory& SharedSlots::memory() const {
  return *reinterpret_cast<abi::RegistrationMemory*>(mapping_->bytes().data());
}

abi::ImageSlot& SharedSlots::Slot(uint32_t slot) const {
  CHECK(slot < sizes_.slot_count);
  return memory().slots[slot];
}

std::atomic<uint8_t>* SharedSlots::DoneBytes(uint32_t slot) const {
  return reinterpret_cast<std::atomic<uint8_t>*>(mapping_->bytes().data() + offsets_.block_done +
                                                 uint64_t{slot} * sizes_.block_count);
}

std::atomic<uint64_t>* SharedSlots::BlobWords(uint32_t slot) const {
  return reinterpret_cast<std::atomic<uint64_t>*>(mapping_->bytes().data() + offsets_.blob_bytes) +
         uint64_t{slot} * sizes_.blob_count;
}

void SharedSlots::PublishGrant(uint32_t slot, uint64_t generation,
                               std::span<const uint32_t> block_table) {
  CHECK(block_table.size() == sizes_.block_count);
  abi::ImageSlot& shared = Slot(slot);
  std::memcpy(
      mapping_->bytes().data() + offsets_.block_table + uint64_t{slot} * sizes_.block_count * 4,
      block_table.data(), block_table.size_bytes());
  for (uint32_t block = 0; block < sizes_.block_count; ++block) {
    DoneBytes(slot)[block].store(0, std::memory_order_relaxed);
  }
  for (uint32_t blob = 0; blob < sizes_.blob_count; ++blob) {
    BlobWords(slot)[blob].store(UINT64_MAX, std::memory_order_relaxed);
  }
  shared.void_code.store(0, std::memory_order_relaxed);
  shared.generation.store(generation, std::memory_order_relaxed);
  shared.step.store(abi::kNoStep, std::memory_order_relaxed);
  shared.save_ns.store(0, std::memory_order_relaxed);
  shared.captured_ns.store(0, std::memory_order_relaxed);
  shared.blocks_done.store(0, std::memory_order_relaxed);
  shared.must_compare.store(0, std::memory_order_relaxed);
  std::memset(shared.void_text, 0, sizeof(shared.void_text));
  // Pairs with the trainer's acquire: it sees everything above.
  shared.state.store(abi::SlotState::kGranted, std::memory_order_release);
}

bool SharedSlots::TakeBack(uint32_t slot) {
  abi::SlotState expected = abi::SlotState::kGranted;
  return Slot(slot).state.compare_exchange_strong(expected, abi::SlotState::kEmpty,
                                                  std::memory_order_acq_rel);
}

void SharedSlots::SetEmpty(uint32_t slot) {
  Slot(slot).state.store(abi::SlotState::kEmpty, std::memory_order_release);
}

abi::SlotState SharedSlots::state(uint32_t slot) const {
  return Slot(slot).state.load(std::memory_order_acquire);
}
uint64_t SharedSlots::generation(uint32_t slot) const {
  return Slot(slot).generation.load(std::memory_order_relaxed);
}
uint64_t SharedSlots::step(uint32_t slot) const {
  return Slot(slot).step.load(std::memory_order_relaxed);
}
int64_t SharedSlots::save_ns(uint32_t slot) const {
  return Slot(slot).save_ns.load(std::memory_order_relaxed);
}
int64_t SharedSlots::captured_ns(uint32_t slot) const {
  return Slot(slot).captured_ns.load(std::memory_order_acquire);
}
bool SharedSlots::must_compare(uint32_t slot) const {
  return Slot(slot).must_compare.load(std::memory_order_relaxed) != 0;
}
uint8_t SharedSlots::block_done(uint32_t slot, uint32_t block) const {
  CHECK(block < sizes_.block_count);
  // Pairs with the trainer's release behind the last byte of the block.
  return DoneBytes(slot)[block].load(std::memory_order_acquire);
}
uint64_t SharedSlots::blob_bytes(uint32_t slot, uint32_t blob) const {
  CHECK(blob < sizes_.blob_count);
  return BlobWords(slot)[blob].load(std::memory_order_relaxed);
}

absl::Status SharedSlots::VoidReason(uint32_t slot) const {
  const abi::ImageSlot& shared = Slot(slot);
  char text[sizeof(shared.void_text)];
  std::memcpy(text, shared.void_text, sizeof(text));
  const std::string reason = PrintableText(text);
  const int32_t code = shared.void_code.load(std::memory_order_relaxed);
  const bool is_error =
      code > 0 && code <= static_cast<int32_t>(absl::StatusCode::kUnauthenticated);
  return absl::Status(is_error ? static_cast<absl::StatusCode>(code) : absl::StatusCode::kAborted,
                      reason.empty() ? "given up by the trainer, without a reason" : reason);
}

}  // namespace holdfast
