// The images of one registration of one session: grants free blocks to the trainer, follows the
// capture block by block, writes what the trainer does not (head, gaps), checksums each block as
// soon as it is complete, flushes it, and checks it once more after the write. Everything that must
// outlive this process lies in the record memory (checkpoint/image_record.h).
//
// It trusts nothing in the shared memory: block tables and states are its own copies, and whatever
// the trainer writes there can at most void an image of this rank.
#ifndef HOLDFAST_CHECKPOINT_RANK_IMAGES_H_
#define HOLDFAST_CHECKPOINT_RANK_IMAGES_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/image_events.h"

namespace holdfast {

// Threads: the event loop's, all calls. Lifetime: the observer and the world outlive it.
class RankImages {
 public:
  virtual ~RankImages() = default;

  // Looks at the slots: the doorbell rang, or a block was released. Advances everything that can
  // be.
  virtual void Advance() = 0;

  // Begins (or allows) the flush of an image into a new file; blocks are written as they complete.
  // If the file exists already, fails, or any write or sync fails, the next name is tried (retry
  // suffix, from memory) up to a small limit, then the image is void for storage (OnVoid) but stays
  // sealed in memory.
  virtual void StartFlush(ImageId id, const std::string& path) = 0;

  // Voids an image: nothing of it will be sealed or flushed any more. Calls OnVoid.
  virtual void Void(ImageId id, absl::Status why) = 0;

  // The image is not needed any more (superseded, or durable and room is needed): its blocks are
  // free once nothing in flight and no living trainer can touch them.
  virtual void Release(ImageId id) = 0;

  // No trainer will write any more (dead): voids what is unfinished; sealed images go on.
  virtual void TrainerGone() = 0;

  // For restore from memory. kNotFound if it is not sealed (any more). The bytes are those that
  // were checksummed unless a living trainer has written since: the reader verifies.
  struct BlockView {
    std::span<const std::byte> bytes;
    uint64_t memory_offset = 0;  // in the rank memory
    uint32_t crc32c = 0;
  };
  virtual absl::StatusOr<BlockView> Block(ImageId id, uint64_t block_index) const = 0;

  // Free blocks of this rank's memory for staging a restore: takes up to `count`, returns their
  // offsets in the rank memory; give them back with ReturnStaging.
  virtual std::vector<uint64_t> TakeStaging(size_t count) = 0;
  virtual void ReturnStaging(std::span<const uint64_t> memory_offsets) = 0;
  virtual std::span<std::byte> memory() const = 0;

  struct Counters {
    ImageId id;
    CheckpointId checkpoint;
    std::string state;  // "granted", "capturing", "sealed", "durable", "void"
    uint64_t block_count = 0;
    uint64_t blocks_captured = 0;
    uint64_t blocks_checksummed = 0;
    uint64_t blocks_flushed = 0;
    std::string void_reason;
  };
  virtual std::vector<Counters> counters() const = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_RANK_IMAGES_H_
