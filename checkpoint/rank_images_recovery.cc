// Taking over what a former worker left, and the trainer's death. The record says what was; blocks
// without a recorded checksum are looked at anew. The stamp is written again: it is a function of
// the record, so blocks that were checksummed with it do not change.
#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "checkpoint/rank_images_impl.h"
#include "format/index.h"

namespace holdfast {

void RankImagesImpl::Adopt(std::vector<std::string>& warnings) {
  for (const std::unique_ptr<Slot>& slot : slots_) {
    const absl::StatusOr<SlotRecord>& record = parts_.record->slot(slot->index);
    const absl::Status adopted = record.ok() ? AdoptSlot(*slot, *record) : record.status();
    if (adopted.ok()) continue;
    slot->record = SlotRecord();
    slot->is_lost = true;
    // Which blocks it had is not known, and a trainer may be writing into them.
    memory_->Distrust(adopted);
    warnings.push_back(absl::StrFormat("session %d, rank %d: an image was dropped: %s",
                                       static_cast<uint64_t>(parts_.session), Value(parts_.rank),
                                       std::string(adopted.message())));
  }
}

absl::Status RankImagesImpl::AdoptSlot(Slot& slot, const SlotRecord& record) {
  const auto damaged = [&](const std::string& what) {
    return absl::DataLossError(absl::StrFormat("slot %d: %s", slot.index, what));
  };
  if (record.generation != 0 && record.generation >> 32 != parts_.registration_id) {
    return damaged(absl::StrFormat("generation %d of another registration", record.generation));
  }
  if (record.state != State::kEmpty) {
    if (record.block_table.size() != block_count()) return damaged("no block table");
    const bool has_blobs = record.state == State::kCapturing || record.state == State::kSealed;
    if (has_blobs && record.blob_bytes.size() != registration_->blobs().size()) {
      return damaged("no blob lengths");
    }
    for (size_t i = 0; has_blobs && i < record.blob_bytes.size(); ++i) {
      const RegisteredBlob& blob = registration_->blobs()[i];
      const uint64_t bytes = record.blob_bytes[i];
      if (bytes != kBlobAbsent && (!blob.image_offset_bytes || bytes > blob.capacity_bytes)) {
        return damaged(absl::StrFormat("blob \"%s\" of %d bytes", blob.name, bytes));
      }
    }
    const BlockState use = record.state == State::kGranted ? BlockState::kGranted
                           : record.state == State::kVoid  ? BlockState::kQuarantined
                                                           : BlockState::kImage;
    if (!memory_->pool().Claim(record.block_table, use)) {
      return damaged("its blocks are outside the memory or belong to another image");
    }
  }
  slot.record = record;
  last_generation_ = std::max(last_generation_, record.generation);
  return absl::OkStatus();
}

void RankImagesImpl::Start(ImageObserver& observer, Trainer trainer) {
  CHECK(observer_ == nullptr);
  observer_ = &observer;
  listener_ = memory_->AddListener([this] { MaybeGrant(); });
  // Those of use first: where a step has a void image too, it is the other that counts.
  std::vector<Slot*> of_use;
  std::vector<Slot*> given_up;
  for (const std::unique_ptr<Slot>& slot : slots_) {
    if (!slot->is_lost) (slot->is(State::kVoid) ? given_up : of_use).push_back(slot.get());
  }
  for (Slot* slot : of_use) ResumeSlot(*slot);
  for (Slot* slot : given_up) ResumeSlot(*slot);
  if (trainer == Trainer::kDead) {
    TrainerGone();
  } else {
    Advance();
  }
}

void RankImagesImpl::ResumeSlot(Slot& slot) {
  switch (slot.record.state) {
    case State::kEmpty:
      // The former worker may have died between the record and the shared word.
      if (shared_.state(slot.index) != abi::SlotState::kEmpty) shared_.SetEmpty(slot.index);
      return;
    case State::kGranted:
      if (shared_.state(slot.index) == abi::SlotState::kEmpty ||
          shared_.generation(slot.index) != slot.record.generation) {
        shared_.PublishGrant(slot.index, slot.record.generation, slot.record.block_table);
      }
      return;
    case State::kCapturing:
      ResumeCapture(slot);
      return;
    case State::kSealed:
      ResumeSealed(slot);
      return;
    case State::kVoid:
      slot.void_reported = true;
      if (slot.record.step != abi::kNoStep && !HasImageOf(slot.record.step)) {
        const absl::Status why(static_cast<absl::StatusCode>(slot.record.code), slot.record.text);
        parts_.reports->Begin(Step{slot.record.step}, block_count(),
                              absl::Nanoseconds(slot.record.begun_ns));
        parts_.reports->SetFailed(Step{slot.record.step}, why);
        Tell([id = IdOf(slot), rank = parts_.rank, checkpoint = CheckpointOf(slot),
              why](ImageObserver& told) {
          told.OnCaptureBegun(id, rank, checkpoint);
          told.OnVoid(id, rank, checkpoint, why, ImageObserver::Afterwards::kGone);
        });
      }
      DropFile(slot);
      return;
  }
}

bool RankImagesImpl::HasImageOf(uint64_t step) const {
  return std::any_of(slots_.begin(), slots_.end(), [step](const std::unique_ptr<Slot>& slot) {
    return !slot->is_lost && slot->IsImage() && slot->record.step == step;
  });
}

void RankImagesImpl::ResumeCapture(Slot& slot) {
  parts_.reports->Begin(Step{slot.record.step}, block_count(),
                        absl::Nanoseconds(slot.record.begun_ns));
  Tell([id = IdOf(slot), rank = parts_.rank, checkpoint = CheckpointOf(slot)](ImageObserver& told) {
    told.OnCaptureBegun(id, rank, checkpoint);
  });
  for (uint32_t block = 0; block < block_count(); ++block) {
    if (!parts_.record->Checksum(slot.index, block, slot.record.generation)) continue;
    slot.blocks[block] = kCaptured | kChecksummed;
    ++slot.captured_count;
    ++slot.checksummed_count;
  }
  if (slot.record.file == File::kWriting) DropFile(slot);
  StartStamp(slot);
}

absl::Status RankImagesImpl::CheckSealedRecord(const Slot& slot) const {
  for (uint32_t block = 0; block < block_count(); ++block) {
    if (!parts_.record->Checksum(slot.index, block, slot.record.generation)) {
      return absl::DataLossError(
          absl::StrFormat("the record of the image lost the checksum of block %d", block));
    }
  }
  if (const uint32_t root = ChecksumRoot(BlockChecksumsOf(slot)); root != slot.record.block_root) {
    return absl::DataLossError(
        absl::StrFormat("the record of the image is damaged: checksum root 0x%08x, expected 0x%08x",
                        root, slot.record.block_root));
  }
  return absl::OkStatus();
}

void RankImagesImpl::ResumeSealed(Slot& slot) {
  parts_.reports->Begin(Step{slot.record.step}, block_count(),
                        absl::Nanoseconds(slot.record.begun_ns));
  Tell([id = IdOf(slot), rank = parts_.rank, checkpoint = CheckpointOf(slot)](ImageObserver& told) {
    told.OnCaptureBegun(id, rank, checkpoint);
  });
  slot.stamp = Slot::Stamp::kDone;
  slot.trainer_done = true;
  slot.capture_complete = true;
  const absl::Status intact = CheckSealedRecord(slot);
  if (!intact.ok()) {
    VoidImage(slot, intact, Report::kYes);
    return;
  }
  slot.blocks.assign(block_count(), kCaptured | kChecksummed);
  slot.captured_count = block_count();
  slot.checksummed_count = block_count();
  slot.flushed = slot.IsDurable();
  ReportCounters(slot);
  parts_.reports->SetCaptured(Step{slot.record.step}, CaptureTime(slot));
  ReportSealed(slot);
  if (slot.IsDurable()) {
    Tell([id = IdOf(slot), path = slot.record.path](ImageObserver& told) {
      told.OnDurable(id, path);
    });
  } else if (slot.record.file == File::kWriting) {
    DropFile(slot);
  }
}

std::vector<uint32_t> RankImagesImpl::BlockChecksumsOf(const Slot& slot) const {
  std::vector<uint32_t> result;
  result.reserve(block_count());
  for (uint32_t block = 0; block < block_count(); ++block) {
    result.push_back(
        parts_.record->Checksum(slot.index, block, slot.record.generation).value_or(0));
  }
  return result;
}

void RankImagesImpl::TrainerGone() {
  if (!trainer_alive_) return;
  // What it did last still counts, and is looked at as if it were alive.
  for (const std::unique_ptr<Slot>& slot : slots_) AdvanceSlot(*slot);
  trainer_alive_ = false;
  for (const std::unique_ptr<Slot>& slot : slots_) {
    slot->trainer_done = true;
    if (slot->is(State::kGranted)) {
      // Nobody is left to begin.
      shared_.SetEmpty(slot->index);
      memory_->pool().Free(slot->record.block_table, BlockState::kGranted);
      const uint64_t generation = slot->record.generation;
      slot->record = SlotRecord();
      slot->record.generation = generation;
      Save(*slot);
      memory_->NotifyBlocksFree();
    } else if (slot->is(State::kCapturing) && !slot->capture_complete) {
      // It may have died waiting to be asked whether all was well.
      const bool is_whole = shared_.captured_ns(slot->index) != 0;
      if (is_whole && shared_.must_compare(slot->index)) {
        VoidImage(*slot,
                  absl::AbortedError("the training process died before it had compared the image "
                                     "with its tensors (check_source = all)"),
                  Report::kYes);
      } else if (is_whole && ScanBlocks(*slot, true).ok()) {
        slot->capture_complete = true;
        TrySeal(*slot);
      } else {
        VoidImage(*slot,
                  absl::AbortedError(absl::StrFormat(
                      "the training process died during the capture: %d of %d blocks were done",
                      slot->captured_count, block_count())),
                  Report::kYes);
      }
    }
    MaybeRecycle(*slot);
  }
}

}  // namespace holdfast
