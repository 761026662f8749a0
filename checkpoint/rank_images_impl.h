// RankImages, the real one. A slot is a small state machine whose durable part is its SlotRecord;
// every change is in the record before anybody is told. The parts are in four files:
//   rank_images_impl.cc       slots: grants, release, recycling, staging, what others ask
//   rank_images_capture.cc    following a capture: begin, stamp, checksums, seal
//   rank_images_storage.cc    flush, the second look at each block, fingerprints, durable, void
//   rank_images_recovery.cc   taking over what a former worker left, and the trainer's death
//
//   kEmpty -> kGranted -> kCapturing -> kSealed -> (released) -> kEmpty
//                 |            |           |
//                 +----------> kVoid <-----+      -> kEmpty, when nobody can write any more
//
// The file of an image goes its own way beside it (SlotRecord::File).
#ifndef HOLDFAST_CHECKPOINT_RANK_IMAGES_IMPL_H_
#define HOLDFAST_CHECKPOINT_RANK_IMAGES_IMPL_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "checkpoint/block_checksums.h"
#include "checkpoint/flush.h"
#include "checkpoint/image_record.h"
#include "checkpoint/rank_images.h"
#include "checkpoint/rank_memory.h"
#include "checkpoint/registration.h"
#include "checkpoint/save_reports.h"
#include "checkpoint/shared_slots.h"

namespace holdfast {

class RankImagesImpl final : public RankImages {
 public:
  RankImagesImpl(Parts parts, const ImageWorld& world);
  ~RankImagesImpl() override;

  // Claims the blocks of recorded images. Once, before Start.
  void Adopt(std::vector<std::string>& warnings);

  void Start(ImageObserver& observer, Trainer trainer) override;
  void Advance() override;
  void StartFlush(ImageId id, const std::string& path) override;
  void Void(ImageId id, absl::Status why) override;
  void Release(ImageId id) override;
  void TrainerGone() override;
  void StopGranting(UnusedGrant unused) override;
  void ResumeGranting() override;
  bool IsTrainerCapturing() const override;
  bool IsStarved() const override;
  absl::StatusOr<BlockView> Block(ImageId id, uint64_t block_index) const override;
  std::optional<std::vector<Fingerprint>> Fingerprints(ImageId id) const override;
  std::optional<std::vector<Fingerprint>> ReplicaSums(ImageId id) const override;
  std::vector<uint64_t> TakeStaging(size_t count) override;
  void ReturnStaging(std::span<const uint64_t> memory_offsets) override;
  std::span<std::byte> memory() const override;
  size_t held_image_count() const override;
  size_t pending_image_count() const override;
  std::vector<Counters> counters() const override;

 private:
  // What is known of a block of a slot, as bits; the last two are an image's only.
  enum BlockBit : uint8_t {
    kCaptured = 1,     // its bytes are complete
    kChecksummed = 2,  // and its checksum is recorded
    kWritten = 4,      // written to the file of this try
    kLookedAgain = 8,  // and unchanged since; its part of the fingerprints is in the sums
  };

  struct Slot final : ImageFlush::Listener {
    RankImagesImpl* images = nullptr;
    uint32_t index = 0;
    SlotRecord record;
    // The record could not be read: the slot is never used again.
    bool is_lost = false;
    // The trainer has said, or cannot but mean, that it writes no more.
    bool trainer_done = false;
    bool capture_complete = false;
    enum class Stamp { kNone, kRunning, kDone } stamp = Stamp::kNone;
    bool released = false;
    bool void_reported = false;
    std::vector<uint8_t> blocks;  // BlockBits
    uint32_t captured_count = 0;
    uint32_t checksummed_count = 0;
    uint32_t looked_again_count = 0;
    // Over the blocks looked at again: one per tensor state of the layout; empty: none yet.
    std::vector<Fingerprint> fingerprints;
    // Over the blocks that this worker has checksummed: one per replica.
    std::vector<Fingerprint> replica_sums;
    uint32_t replica_summed_count = 0;
    uint32_t first_uncaptured = 0;  // no block below is uncaptured
    // The file.
    std::string wanted_path;  // StartFlush was called
    std::unique_ptr<ImageFlush> flush;
    uint32_t try_number = 0;
    bool flushed = false;
    absl::Duration flush_time;
    bool removing_file = false;

    using State = SlotRecord::State;
    bool is(State state) const { return record.state == state; }
    bool IsImage() const { return is(State::kCapturing) || is(State::kSealed); }
    bool StorageFailed() const { return record.file == SlotRecord::File::kFailed; }
    bool IsDurable() const { return record.file == SlotRecord::File::kDurable; }
    void Reset(uint32_t block_count);  // everything but index, images, record

    // ImageFlush::Listener
    void OnFileNamed(const std::string& path, uint32_t number) override;
    void OnBlockWritten(uint32_t block) override;
    void OnRetry(const absl::Status& why) override;
    void OnFlushed(const std::string& path, absl::Duration time) override;
    void OnFlushFailed(const absl::Status& why) override;
  };
  using State = SlotRecord::State;
  using File = SlotRecord::File;

  uint32_t block_count() const { return registration_->slot_block_count(); }  // of a slot
  uint32_t image_block_count() const { return registration_->block_count(); }
  uint32_t flushed_count(const Slot& slot) const {
    if (slot.flush != nullptr) return slot.flush->blocks_written();
    return slot.flushed ? image_block_count() : 0;
  }
  uint64_t block_bytes() const { return registration_->block_bytes(); }
  ImageId IdOf(const Slot& slot) const {
    return {parts_.session, slot.index, slot.record.generation};
  }
  CheckpointId CheckpointOf(const Slot& slot) const {
    return {parts_.attempt, Step{slot.record.step}};
  }
  Slot* Find(ImageId id);
  const Slot* Find(ImageId id) const;
  void Save(const Slot& slot) { parts_.record->Update(slot.index, slot.record); }
  // Calls the observer from the loop.
  void Tell(std::function<void(ImageObserver&)> what);
  void ReportCounters(const Slot& slot);

  // rank_images_impl.cc
  void MaybeGrant();
  void TakeBackGrant(Slot& slot);
  void MaybeRecycle(Slot& slot);

  // rank_images_capture.cc
  void AdvanceSlot(Slot& slot);
  void BeginCapture(Slot& slot);
  void BreakGrant(Slot& slot, const absl::Status& why);
  absl::StatusOr<std::vector<uint64_t>> ReadBlobBytes(const Slot& slot) const;
  void StartStamp(Slot& slot);
  void Stamped(Slot& slot);
  void FollowCapture(Slot& slot);
  absl::Status ScanBlocks(Slot& slot, bool is_whole);
  void BlockCaptured(Slot& slot, uint32_t block);
  void RequestChecksum(Slot& slot, uint32_t block);
  void ChecksumDone(const BlockChecksums::Request& request, const BlockChecksums::Found& found);
  void BlockChecksummed(Slot& slot, uint32_t block, const BlockChecksums::Found& found);
  void TrySeal(Slot& slot);
  void ReportSealed(const Slot& slot);
  absl::Duration CaptureTime(const Slot& slot) const;

  // rank_images_storage.cc
  void BeginFlush(Slot& slot);
  void LookedAgain(Slot& slot, const BlockChecksums::Request& request,
                   const BlockChecksums::Found& found);
  void TryDurable(Slot& slot);
  void StorageGivenUp(Slot& slot, const absl::Status& why);
  enum class Report { kYes, kNo };
  void VoidImage(Slot& slot, const absl::Status& why, Report report);
  void DropFile(Slot& slot);

  // rank_images_recovery.cc
  absl::Status AdoptSlot(Slot& slot, const SlotRecord& record);
  void ResumeSlot(Slot& slot);
  bool HasImageOf(uint64_t step) const;
  void ResumeCapture(Slot& slot);
  void ResumeSealed(Slot& slot);
  absl::Status CheckSealedRecord(const Slot& slot) const;
  std::vector<uint32_t> BlockChecksumsOf(const Slot& slot) const;  // of all blocks of the slot

  Parts parts_;
  const ImageWorld world_;
  const std::shared_ptr<const Registration> registration_;
  const std::shared_ptr<RankMemory> memory_;
  SharedSlots shared_;
  BlockChecksums checksums_;
  std::vector<std::unique_ptr<Slot>> slots_;
  ImageObserver* observer_ = nullptr;
  RankMemory::ListenerId listener_ = 0;
  uint64_t last_generation_ = 0;
  bool granting_ = true;
  bool trainer_alive_ = true;
  size_t staging_count_ = 0;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_RANK_IMAGES_IMPL_H_
