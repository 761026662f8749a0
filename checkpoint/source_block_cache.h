// Verified blocks of a checkpoint, kept in a fixed memory as long as others do not need the room.
#ifndef HOLDFAST_CHECKPOINT_SOURCE_BLOCK_CACHE_H_
#define HOLDFAST_CHECKPOINT_SOURCE_BLOCK_CACHE_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "checkpoint/block_reader.h"
#include "checkpoint/lru_table.h"
#include "format/index.h"

namespace holdfast {

// Threads: any, at most as many at once as there are slots, each with at most one Pin: so there is
//   always a slot to wait for.
// Lifetime: what it is made with outlives it, and it outlives its pins.
class SourceBlockCache {
 public:
  // A block that stays where it is.
  //
  // Threads: one at a time. Movable.
  class Pin {
   public:
    Pin(SourceBlockCache& cache, uint32_t slot, std::span<const std::byte> bytes)
        : cache_(&cache), slot_(slot), bytes_(bytes) {}
    Pin(Pin&& other) noexcept
        : cache_(std::exchange(other.cache_, nullptr)), slot_(other.slot_), bytes_(other.bytes_) {}
    Pin& operator=(Pin&&) = delete;
    ~Pin() {
      if (cache_ != nullptr) cache_->Unpin(slot_);
    }
    std::span<const std::byte> bytes() const { return bytes_; }

   private:
    SourceBlockCache* cache_;
    uint32_t slot_;
    std::span<const std::byte> bytes_;
  };

  // `memory`: slots of `slot_bytes`, which no block of the index exceeds.
  SourceBlockCache(const BlockReader& reader, const Index& index, std::span<std::byte> memory,
                   uint64_t slot_bytes);

  // Reads the block if it is not there; waits for another thread that reads it, or for room.
  // Errors: those of BlockReader::Read; they are not kept.
  absl::StatusOr<Pin> Get(uint32_t image, uint64_t block) ABSL_LOCKS_EXCLUDED(mutex_);

  uint64_t bytes_read() const ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  using Key = std::pair<uint32_t, uint64_t>;
  struct Slot {
    uint32_t pins = 0;  // whoever reads it included
    bool is_read = false;
  };

  void Unpin(uint32_t slot) ABSL_LOCKS_EXCLUDED(mutex_);
  std::span<std::byte> BytesOf(uint32_t slot, uint32_t image) const;

  const BlockReader& reader_;
  const Index& index_;
  const std::span<std::byte> memory_;
  const uint64_t slot_bytes_;
  mutable Mutex mutex_;
  CondVar changed_;
  LruTable<Key> table_ ABSL_GUARDED_BY(mutex_);
  std::vector<Slot> slots_ ABSL_GUARDED_BY(mutex_);
  uint64_t bytes_read_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_SOURCE_BLOCK_CACHE_H_
