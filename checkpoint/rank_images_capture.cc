// Following a capture. What the trainer says is believed one step at a time: the slot must be of
// the grant that was given, and its state must go forward. Everything else voids the image.
#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/kill_point.h"
#include "checkpoint/rank_images_impl.h"
#include "format/index.h"

namespace holdfast {
namespace {

absl::Status Garbage(const std::string& text) {
  return absl::AbortedError("garbage in the memory shared with the trainer: " + text);
}

absl::Status UnexpectedState(abi::SlotState found, const char* expected) {
  return Garbage(
      absl::StrFormat("slot state: expected %s, found %d", expected, static_cast<uint32_t>(found)));
}

// Copies of what the agent writes into an image: head, and zeros. Runs on the pool.
struct StampJob {
  std::shared_ptr<SharedMapping> memory;
  std::shared_ptr<const Registration> registration;
  std::vector<uint32_t> block_table;
  CheckpointId checkpoint;
  std::vector<uint64_t> blob_bytes;

  // Calls `write(bytes, offset in the range)` for every piece of [begin, end) that lies in one
  // block.
  template <typename Write>
  void ForBlocks(ImageRange range, Write write) const {
    const uint64_t block_bytes = registration->block_bytes();
    for (uint64_t at = range.begin; at < range.end;) {
      const uint64_t block = at / block_bytes;
      const uint64_t end = std::min(range.end, (block + 1) * block_bytes);
      const uint64_t address = block_table[block] * block_bytes + at % block_bytes;
      write(memory->bytes().subspan(address, end - at), at - range.begin);
      at = end;
    }
  }

  void Zero(ImageRange range) const {
    ForBlocks(range, [](std::span<std::byte> bytes, uint64_t) {
      std::memset(bytes.data(), 0, bytes.size());
    });
  }

  void Run() const {
    const std::vector<uint64_t> stored = registration->StoredBlobBytes(blob_bytes);
    const ImageStamp stamp = {checkpoint, stored};
    ForBlocks({0, registration->image().head_bytes()},
              [&](std::span<std::byte> bytes, uint64_t offset) {
                registration->image().StampHead(stamp, offset, bytes);
              });
    for (const ImageRange& gap : registration->gaps()) Zero(gap);
    for (size_t i = 0; i < blob_bytes.size(); ++i) {
      const RegisteredBlob& blob = registration->blobs()[i];
      if (!blob.image_offset_bytes) continue;
      const uint64_t given = blob_bytes[i] == kBlobAbsent ? 0 : blob_bytes[i];
      Zero({*blob.image_offset_bytes + given, *blob.image_offset_bytes + blob.capacity_bytes});
    }
  }
};

}  // namespace

void RankImagesImpl::AdvanceSlot(Slot& slot) {
  if (slot.is_lost) return;
  const abi::SlotState found = shared_.state(slot.index);
  switch (slot.record.state) {
    case State::kEmpty:
      return;
    case State::kGranted:
      if (found == abi::SlotState::kGranted || found == abi::SlotState::kClaimed) return;
      if (found != abi::SlotState::kCapturing && found != abi::SlotState::kCaptured &&
          found != abi::SlotState::kVoid && found != abi::SlotState::kAbandoned) {
        BreakGrant(slot, UnexpectedState(found, "granted (1), claimed (5) or capturing (2)"));
        return;
      }
      BeginCapture(slot);
      return;
    case State::kCapturing:
      FollowCapture(slot);
      return;
    case State::kSealed:
      // The trainer has compared with the source after all, and found a difference.
      if (found == abi::SlotState::kVoid && !slot.IsDurable() && !slot.released) {
        VoidImage(slot, shared_.VoidReason(slot.index), Report::kYes);
      }
      return;
    case State::kVoid:
      MaybeRecycle(slot);
      return;
  }
}

// A grant that no save can come of. Nobody was told of an image, so nobody is told that it is void.
void RankImagesImpl::BreakGrant(Slot& slot, const absl::Status& why) {
  slot.record.state = State::kVoid;
  slot.record.code = static_cast<int32_t>(why.code());
  slot.record.text = std::string(why.message());
  Save(slot);
  memory_->pool().Move(slot.record.block_table, BlockState::kGranted, BlockState::kQuarantined);
  slot.void_reported = true;
  MaybeRecycle(slot);
}

absl::StatusOr<std::vector<uint64_t>> RankImagesImpl::ReadBlobBytes(const Slot& slot) const {
  std::vector<uint64_t> result;
  for (uint32_t i = 0; i < registration_->blobs().size(); ++i) {
    const RegisteredBlob& blob = registration_->blobs()[i];
    const uint64_t bytes = shared_.blob_bytes(slot.index, i);
    if (!blob.image_offset_bytes) {
      result.push_back(kBlobAbsent);  // not stored by this rank, whatever it says
    } else if (bytes == kBlobAbsent || bytes <= blob.capacity_bytes) {
      result.push_back(bytes);
    } else {
      return Garbage(absl::StrFormat("blob \"%s\": expected at most %d bytes, found %d", blob.name,
                                     blob.capacity_bytes, bytes));
    }
  }
  return result;
}

void RankImagesImpl::BeginCapture(Slot& slot) {
  const uint64_t step = shared_.step(slot.index);
  if (step == abi::kNoStep) {
    BreakGrant(slot, Garbage("a capture without a step"));
    return;
  }
  absl::Status valid;
  const uint64_t generation = shared_.generation(slot.index);
  if (generation != slot.record.generation) {
    valid = Garbage(absl::StrFormat("slot generation: expected %d, found %d",
                                    slot.record.generation, generation));
  }
  absl::StatusOr<std::vector<uint64_t>> blob_bytes = ReadBlobBytes(slot);
  if (valid.ok()) valid = blob_bytes.status();

  const absl::Duration now = world_.clock.Elapsed();
  slot.record.state = State::kCapturing;
  slot.record.step = step;
  slot.record.begun_ns = absl::ToInt64Nanoseconds(now);
  slot.record.blob_bytes = blob_bytes.ok()
                               ? *std::move(blob_bytes)
                               : std::vector<uint64_t>(registration_->blobs().size(), kBlobAbsent);
  Save(slot);
  memory_->pool().Move(slot.record.block_table, BlockState::kGranted, BlockState::kImage);
  KillPoint("capture.begun");

  parts_.reports->Begin(Step{step}, block_count(), now);
  Tell([id = IdOf(slot), rank = parts_.rank, checkpoint = CheckpointOf(slot)](
           ImageObserver& observer) { observer.OnCaptureBegun(id, rank, checkpoint); });
  if (!valid.ok()) {
    VoidImage(slot, valid, Report::kYes);
    return;
  }
  StartStamp(slot);
  FollowCapture(slot);
}

void RankImagesImpl::StartStamp(Slot& slot) {
  slot.stamp = Slot::Stamp::kRunning;
  auto job = std::make_shared<StampJob>();
  job->memory = memory_->mapping();
  job->registration = registration_;
  job->block_table = slot.record.block_table;
  job->checkpoint = CheckpointOf(slot);
  job->blob_bytes = slot.record.blob_bytes;
  world_.pool.Run([job] { job->Run(); },
                  [this, alive = std::weak_ptr<bool>(alive_), &slot] {
                    if (!alive.expired()) Stamped(slot);
                  });
}

void RankImagesImpl::Stamped(Slot& slot) {
  // The slot was not recycled meanwhile: that waits for the stamp.
  slot.stamp = Slot::Stamp::kDone;
  if (!slot.is(State::kCapturing)) {
    MaybeRecycle(slot);
    return;
  }
  for (uint32_t block = 0; block < block_count(); ++block) {
    if (slot.blocks[block] & kCaptured) {
      if (!(slot.blocks[block] & kChecksummed)) RequestChecksum(slot, block);
    } else if (registration_->writer_of(block) == Registration::Writer::kAgent) {
      BlockCaptured(slot, block);
    }
  }
  ReportCounters(slot);
  TrySeal(slot);
}

void RankImagesImpl::FollowCapture(Slot& slot) {
  const abi::SlotState found = shared_.state(slot.index);
  if (found == abi::SlotState::kVoid || found == abi::SlotState::kAbandoned) {
    // While a device of the trainer's may still write them, the blocks are not free.
    slot.trainer_done = found == abi::SlotState::kVoid;
    VoidImage(slot, shared_.VoidReason(slot.index), Report::kYes);
    return;
  }
  if (found != abi::SlotState::kCapturing && found != abi::SlotState::kCaptured) {
    VoidImage(slot, UnexpectedState(found, "capturing (2), captured (3) or void (4)"),
              Report::kYes);
    return;
  }
  const uint64_t generation = shared_.generation(slot.index);
  if (generation != slot.record.generation) {
    VoidImage(slot,
              Garbage(absl::StrFormat("slot generation: expected %d, found %d",
                                      slot.record.generation, generation)),
              Report::kYes);
    return;
  }
  const bool is_whole = found == abi::SlotState::kCaptured;
  if (is_whole) slot.trainer_done = true;
  if (absl::Status scanned = ScanBlocks(slot, is_whole); !scanned.ok()) {
    VoidImage(slot, scanned, Report::kYes);
    return;
  }
  ReportCounters(slot);
  if (is_whole) {
    slot.capture_complete = true;
    TrySeal(slot);
  }
}

// Notes which blocks are complete. With `is_whole` all must be, but that blocks without tensors may
// go without their mark.
absl::Status RankImagesImpl::ScanBlocks(Slot& slot, bool is_whole) {
  for (uint32_t block = slot.first_uncaptured; block < block_count(); ++block) {
    if (slot.blocks[block] & kCaptured) continue;
    const uint8_t done = shared_.block_done(slot.index, block);
    if (done > 1) {
      return Garbage(
          absl::StrFormat("block_done of block %d: expected 0 or 1, found %d", block, done));
    }
    const bool needs_mark = registration_->writer_of(block) == Registration::Writer::kOps;
    if (done == 0 && is_whole && needs_mark) {
      return Garbage(absl::StrFormat("slot is captured, but block %d of %d is not done", block,
                                     block_count()));
    }
    if (done == 1 || is_whole) BlockCaptured(slot, block);
  }
  while (slot.first_uncaptured < block_count() &&
         (slot.blocks[slot.first_uncaptured] & kCaptured)) {
    ++slot.first_uncaptured;
  }
  return absl::OkStatus();
}

void RankImagesImpl::BlockCaptured(Slot& slot, uint32_t block) {
  slot.blocks[block] |= kCaptured;
  ++slot.captured_count;
  // Before the stamp its bytes are not complete.
  if (slot.stamp == Slot::Stamp::kDone) RequestChecksum(slot, block);
}

void RankImagesImpl::RequestChecksum(Slot& slot, uint32_t block) {
  checksums_.Add({.slot = slot.index,
                  .block = block,
                  .memory_block = slot.record.block_table[block],
                  .look = BlockChecksums::Request::Look::kFirst});
}

void RankImagesImpl::ChecksumDone(const BlockChecksums::Request& request,
                                  const BlockChecksums::Found& found) {
  Slot& slot = *slots_[request.slot];
  if (request.look == BlockChecksums::Request::Look::kFirst) {
    BlockChecksummed(slot, request.block, found);
  } else {
    LookedAgain(slot, request, found);
  }
}

void RankImagesImpl::BlockChecksummed(Slot& slot, uint32_t block,
                                      const BlockChecksums::Found& found) {
  CHECK(slot.is(State::kCapturing));  // else the request was cancelled
  parts_.record->SetChecksum(slot.index, block, slot.record.generation, found.crc32c);
  KillPoint("capture.block_checksummed");
  slot.blocks[block] |= kChecksummed;
  ++slot.checksummed_count;
  const Replicas& replicas = registration_->replicas();
  slot.replica_sums.resize(replicas.replicas.size());
  ++slot.replica_summed_count;
  for (const FingerprintPart& part : found.parts) {
    slot.replica_sums[replicas.replica_of_place[part.piece]] += part.sum;
  }
  if (slot.flush != nullptr && block < image_block_count()) slot.flush->BlockReady(block);
  TrySeal(slot);
}

void RankImagesImpl::TrySeal(Slot& slot) {
  if (!slot.is(State::kCapturing) || !slot.capture_complete) return;
  if (slot.stamp != Slot::Stamp::kDone || slot.checksummed_count < block_count()) return;
  CHECK(slot.captured_count == block_count());
  KillPoint("capture.sealing");
  slot.record.block_root = ChecksumRoot(BlockChecksumsOf(slot));
  slot.record.state = State::kSealed;
  Save(slot);
  KillPoint("capture.sealed");
  parts_.reports->SetCaptured(Step{slot.record.step}, CaptureTime(slot));
  ReportSealed(slot);
  TryDurable(slot);
}

void RankImagesImpl::ReportSealed(const Slot& slot) {
  SealedImage image;
  image.id = IdOf(slot);
  image.rank = parts_.rank;
  image.checkpoint = CheckpointOf(slot);
  image.image_bytes = registration_->image_bytes();
  image.block_bytes = block_bytes();
  image.block_crc32c = BlockChecksumsOf(slot);
  image.block_crc32c.resize(image_block_count());
  image.blob_bytes = slot.record.blob_bytes;
  Tell([image = std::move(image)](ImageObserver& observer) { observer.OnSealed(image); });
  if (slot.StorageFailed()) {
    const absl::Status why(static_cast<absl::StatusCode>(slot.record.code), slot.record.text);
    StorageGivenUp(*slots_[slot.index], why);
  }
}

// For people; the trainer's own clock, so it can only mislead itself.
absl::Duration RankImagesImpl::CaptureTime(const Slot& slot) const {
  const int64_t begin = shared_.save_ns(slot.index);
  const int64_t end = shared_.captured_ns(slot.index);
  if (begin <= 0 || end <= begin) return absl::ZeroDuration();
  return absl::Nanoseconds(end - begin);
}

}  // namespace holdfast
