// The images of one registration of one session: grants free blocks to the trainer, follows the
// capture block by block, writes what the trainer does not (head, gaps), checksums each block as
// soon as it is complete, flushes it, and checks it once more after the write; that second look
// also takes the sums of its tensors' fingerprints. Everything that must outlive this process lies
// in the record memory (checkpoint/image_record.h).
//
// A slot has the blocks of an image and behind them those of its extra copies
// (checkpoint/replicas.h). All are granted, captured, checksummed, sealed, recorded and recycled
// together; only the image's are flushed.
//
// It trusts nothing in the shared memory: block tables and states are its own copies, and whatever
// the trainer writes there can at most void an image of this rank.
#ifndef HOLDFAST_CHECKPOINT_RANK_IMAGES_H_
#define HOLDFAST_CHECKPOINT_RANK_IMAGES_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "base/executor.h"
#include "base/ids.h"
#include "checkpoint/image_events.h"
#include "format/fingerprint.h"
#include "io/file_system.h"
#include "io/io_ring.h"

namespace holdfast {

class ImageRecord;
class RankMemory;
class Registration;
class SaveReports;
class SharedMapping;

// What images need of the world and of the configuration. All outlive them.
struct ImageWorld {
  FileSystem& file_system;
  IoRing& ring;
  EventLoop& loop;
  WorkPool& pool;
  const Clock& clock;
  uint32_t flush_writes_in_flight_max = 8;  // of one image
  Caching flush_caching = Caching::kDirect;
};

// Threads: the event loop's, all calls. The observer is called from the loop, never inside a call
//   made here.
// Lifetime: the observer and the world outlive it. The destructor abandons what is in flight, as a
//   crash would.
class RankImages {
 public:
  struct Parts {
    SessionId session{};
    Rank rank{};
    Attempt attempt{};
    uint64_t registration_id = 0;
    std::shared_ptr<const Registration> registration;
    std::shared_ptr<RankMemory> memory;
    std::unique_ptr<ImageRecord> record;  // new, or of a former worker
    std::shared_ptr<SharedMapping> registration_memory;
    SaveReports* reports = nullptr;  // outlives the images
  };
  // Takes over the images that the record holds (their blocks are claimed in the memory's pool; an
  // image whose blocks cannot be is dropped, with a warning). Calls nobody before Start().
  static std::unique_ptr<RankImages> Create(Parts parts, const ImageWorld& world,
                                            std::vector<std::string>& warnings);
  virtual ~RankImages() = default;

  // Begins: reports recovered images to `observer` as they stand (OnCaptureBegun, then OnSealed,
  // OnDurable or OnVoid) and grants slots. Call once. kDead: the process is known to be dead.
  enum class Trainer { kAlive, kDead };
  virtual void Start(ImageObserver& observer, Trainer trainer) = 0;

  // Looks at the slots: the doorbell rang, or a block was released. Advances everything that can
  // be.
  virtual void Advance() = 0;

  // Begins (or allows) the flush of an image into a new file; blocks are written as they complete.
  // If the file exists already, fails, or any write or sync fails, the next name is tried (retry
  // suffix, from memory) up to a small limit, then the image is void for storage (OnVoid) but stays
  // sealed in memory until Release(). Ignored if the image is void or released.
  virtual void StartFlush(ImageId id, const std::string& path) = 0;

  // Voids an image: nothing of it will be sealed or flushed any more; its unpublished file is
  // removed. Calls OnVoid. Ignored if the image is durable, void or released already.
  virtual void Void(ImageId id, absl::Status why) = 0;

  // The image is not needed any more (superseded, or durable and room is needed): its blocks are
  // free once nothing in flight and no living trainer can touch them. An image that is not durable
  // yet is voided without a report, and its file is removed. What was on its way to the observer
  // may still arrive. Ignored if it is released already.
  virtual void Release(ImageId id) = 0;

  // No trainer will write any more (dead): voids what is unfinished; sealed images go on.
  virtual void TrainerGone() = 0;

  // No new image (closed, fenced, or another registration is current). kTakeBack: the trainer is
  // known not to begin a save now, so a grant that it has not used is taken back. kLeave: it may
  // begin one; that is reported as ever, and the observer voids it.
  enum class UnusedGrant { kTakeBack, kLeave };
  virtual void StopGranting(UnusedGrant unused) = 0;
  virtual void ResumeGranting() = 0;
  // The trainer says that it is in a capture now.
  virtual bool IsTrainerCapturing() const = 0;
  // Nothing can be granted for want of blocks: releasing an image would help.
  virtual bool IsStarved() const = 0;

  // A block of the slot. kNotFound if the image is not sealed (any more). The bytes are those that
  // were checksummed unless a living trainer has written since: the reader verifies.
  struct BlockView {
    std::span<const std::byte> bytes;
    uint64_t memory_offset = 0;  // in the rank memory
    uint32_t crc32c = 0;
  };
  virtual absl::StatusOr<BlockView> Block(ImageId id, uint64_t block_index) const = 0;

  // What the image adds to the fingerprint of every tensor state of the layout, in its order. Known
  // when the image has become durable under this worker and until Release(); else nothing.
  virtual std::optional<std::vector<Fingerprint>> Fingerprints(ImageId id) const = 0;

  // The sum of every replica of the registration. Known if the whole slot was captured under this
  // worker, from the seal until Release(); else nothing.
  virtual std::optional<std::vector<Fingerprint>> ReplicaSums(ImageId id) const = 0;

  // Free blocks of this rank's memory for staging a restore, during which the trainer begins no
  // save: takes up to `count` (an unused grant is taken back for it if nothing else is free),
  // returns their offsets in the rank memory; give them back with ReturnStaging. Nothing is granted
  // while less than an image is free.
  virtual std::vector<uint64_t> TakeStaging(size_t count) = 0;
  virtual void ReturnStaging(std::span<const uint64_t> memory_offsets) = 0;
  virtual std::span<std::byte> memory() const = 0;

  // Images that hold blocks or have anything in flight, grants not counted.
  virtual size_t held_image_count() const = 0;
  // Of them, those that are not durable yet and can become so.
  virtual size_t pending_image_count() const = 0;

  struct Counters {
    ImageId id;
    CheckpointId checkpoint;
    std::string state;         // "granted", "capturing", "sealed", "durable", "void"
    uint64_t block_count = 0;  // of the slot; blocks_flushed only ever counts the image's
    uint64_t blocks_captured = 0;
    uint64_t blocks_checksummed = 0;
    uint64_t blocks_flushed = 0;
    std::string void_reason;
  };
  virtual std::vector<Counters> counters() const = 0;
};

// ImageId::generation is unique in a session: registration number in the upper half, the number of
// the grant in it in the lower.
constexpr uint64_t RegistrationOf(ImageId id) { return id.generation >> 32; }

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_RANK_IMAGES_H_
