// Storage of an image, and its end. A block is looked at again after its write has completed,
// because a trainer could have written it since its checksum was taken: then either what is on
// storage is what was checksummed, or the image is void before anybody calls it durable. The
// fingerprints are of the bytes that this look saw.
#include <utility>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/kill_point.h"
#include "checkpoint/rank_images_impl.h"

namespace holdfast {

void RankImagesImpl::StartFlush(ImageId id, const std::string& path) {
  Slot* slot = Find(id);
  if (slot == nullptr || !slot->wanted_path.empty() || slot->IsDurable() || slot->StorageFailed()) {
    return;
  }
  // Room for the number of a retry.
  constexpr size_t kNumberBytes = 12;
  if (path.empty() || path.size() > kRecordPathBytesMax - kNumberBytes) {
    StorageGivenUp(*slot, absl::InvalidArgumentError(
                              absl::StrFormat("image path of %d bytes, expected 1 to %d",
                                              path.size(), kRecordPathBytesMax - kNumberBytes)));
    return;
  }
  slot->wanted_path = path;
  BeginFlush(*slot);
}

void RankImagesImpl::BeginFlush(Slot& slot) {
  // A former worker's file goes first: the record has room for one name.
  if (slot.wanted_path.empty() || slot.removing_file || slot.flush != nullptr) return;
  ImageFlush::Image image;
  image.memory = memory_->mapping();
  image.block_table.assign(slot.record.block_table.begin(),
                           slot.record.block_table.begin() + image_block_count());
  image.block_bytes = block_bytes();
  slot.flush =
      ImageFlush::Start(std::move(image), slot.wanted_path, slot.record.names_used, slot, world_);
  for (uint32_t block = 0; block < image_block_count(); ++block) {
    if (slot.blocks[block] & kChecksummed) slot.flush->BlockReady(block);
  }
}

void RankImagesImpl::Slot::OnFileNamed(const std::string& path, uint32_t number) {
  record.file = SlotRecord::File::kWriting;
  record.path = path;
  record.names_used = number + 1;
  images->Save(*this);
}

void RankImagesImpl::Slot::OnBlockWritten(uint32_t block) {
  blocks[block] |= kWritten;
  images->checksums_.Add({.slot = index,
                          .block = block,
                          .memory_block = record.block_table[block],
                          .look = BlockChecksums::Request::Look::kSecond,
                          .try_number = try_number});
  images->ReportCounters(*this);
}

void RankImagesImpl::Slot::OnRetry(const absl::Status& why) {
  // Looks that are still under way count for nothing: they may be older than the next write.
  ++try_number;
  for (uint8_t& block : blocks) block &= static_cast<uint8_t>(~(kWritten | kLookedAgain));
  looked_again_count = 0;
  fingerprints.clear();
  record.text = std::string(why.message());
  images->Save(*this);
}

void RankImagesImpl::Slot::OnFlushed(const std::string& path, absl::Duration time) {
  CHECK(path == record.path);
  flushed = true;
  flush_time = time;
  flush.reset();
  images->TryDurable(*this);
}

void RankImagesImpl::Slot::OnFlushFailed(const absl::Status& why) {
  flush.reset();
  images->StorageGivenUp(*this, why);
}

void RankImagesImpl::LookedAgain(Slot& slot, const BlockChecksums::Request& request,
                                 const BlockChecksums::Found& found) {
  const uint32_t block = request.block;
  const std::optional<uint32_t> expected =
      parts_.record->Checksum(slot.index, block, slot.record.generation);
  CHECK(slot.IsImage() && expected.has_value());
  if (slot.IsDurable()) return;  // of an earlier try; this try's looks are all done
  if (found.crc32c != *expected) {
    VoidImage(slot,
              absl::AbortedError(absl::StrFormat(
                  "block %d of the image changed after it was captured: CRC32C 0x%08x, then 0x%08x",
                  block, *expected, found.crc32c)),
              Report::kYes);
    return;
  }
  if (request.try_number != slot.try_number || (slot.blocks[block] & kLookedAgain)) return;
  slot.blocks[block] |= kLookedAgain;
  ++slot.looked_again_count;
  slot.fingerprints.resize(registration_->layout().tensor_states().size());
  for (const FingerprintPart& part : found.parts) slot.fingerprints[part.tensor_state] += part.sum;
  TryDurable(slot);
}

void RankImagesImpl::TryDurable(Slot& slot) {
  if (!slot.is(State::kSealed) || slot.released || slot.IsDurable() || !slot.flushed) return;
  if (slot.looked_again_count < image_block_count()) return;
  slot.record.file = File::kDurable;
  slot.record.text.clear();
  Save(slot);
  KillPoint("flush.durable");
  parts_.reports->SetFlushed(Step{slot.record.step}, slot.flush_time);
  Tell([id = IdOf(slot), path = slot.record.path](ImageObserver& observer) {
    observer.OnDurable(id, path);
  });
}

// No file is left. Told to the observer once the image is sealed: before, it may still become void
// altogether.
void RankImagesImpl::StorageGivenUp(Slot& slot, const absl::Status& why) {
  slot.record.file = File::kFailed;
  slot.record.path.clear();
  slot.record.code = static_cast<int32_t>(why.code());
  slot.record.text = std::string(why.message());
  Save(slot);
  if (!slot.is(State::kSealed) || slot.void_reported) return;
  slot.void_reported = true;
  parts_.reports->SetFailed(Step{slot.record.step}, why);
  Tell([id = IdOf(slot), rank = parts_.rank, checkpoint = CheckpointOf(slot),
        why](ImageObserver& observer) {
    observer.OnVoid(id, rank, checkpoint, why, ImageObserver::Afterwards::kInMemory);
  });
}

void RankImagesImpl::Void(ImageId id, absl::Status why) {
  CHECK(!why.ok());
  Slot* slot = Find(id);
  if (slot == nullptr || slot->IsDurable()) return;
  VoidImage(*slot, why, Report::kYes);
}

void RankImagesImpl::VoidImage(Slot& slot, const absl::Status& why, Report report) {
  CHECK(slot.IsImage() && !slot.released);
  slot.record.state = State::kVoid;
  slot.record.code = static_cast<int32_t>(why.code());
  slot.record.text = std::string(why.message());
  Save(slot);
  memory_->pool().Move(slot.record.block_table, BlockState::kImage, BlockState::kQuarantined);
  checksums_.Cancel(slot.index);
  if (report == Report::kYes && !slot.void_reported) {
    slot.void_reported = true;
    parts_.reports->SetFailed(Step{slot.record.step}, why);
    Tell([id = IdOf(slot), rank = parts_.rank, checkpoint = CheckpointOf(slot),
          why](ImageObserver& observer) {
      observer.OnVoid(id, rank, checkpoint, why, ImageObserver::Afterwards::kGone);
    });
  }
  DropFile(slot);
  MaybeRecycle(slot);
}

// Removes the unpublished file of an image, if there is one. The record keeps its name until it is
// gone.
void RankImagesImpl::DropFile(Slot& slot) {
  slot.wanted_path.clear();
  if (slot.removing_file || (slot.flush == nullptr && slot.record.file != File::kWriting)) return;
  slot.removing_file = true;
  const auto removed = [this, alive = std::weak_ptr<bool>(alive_), &slot] {
    if (alive.expired()) return;
    slot.flush.reset();
    slot.removing_file = false;
    slot.flushed = false;
    slot.record.file = File::kNone;
    slot.record.path.clear();
    Save(slot);
    BeginFlush(slot);
    MaybeRecycle(slot);
  };
  if (slot.flush != nullptr) {
    slot.flush->Abandon(removed);
  } else {
    RemoveUnpublished(world_, slot.record.path, removed);
  }
}

}  // namespace holdfast
