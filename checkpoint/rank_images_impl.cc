#include "checkpoint/rank_images_impl.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/kill_point.h"

namespace holdfast {
namespace {

SlotSizes SizesOf(const RankImages::Parts& parts) {
  const RecordHeader& header = parts.record->header();
  return {parts.registration_id, header.slot_count, header.block_count, header.blob_count,
          header.block_bytes};
}

}  // namespace

std::unique_ptr<RankImages> RankImages::Create(Parts parts, const ImageWorld& world,
                                               std::vector<std::string>& warnings) {
  auto images = std::make_unique<RankImagesImpl>(std::move(parts), world);
  images->Adopt(warnings);
  return images;
}

RankImagesImpl::RankImagesImpl(Parts parts, const ImageWorld& world)
    : parts_(std::move(parts)),
      world_(world),
      registration_(parts_.registration),
      memory_(parts_.memory),
      shared_(parts_.registration_memory, SizesOf(parts_)),
      checksums_(
          memory_->mapping(), registration_, parts_.record->header().slot_count, world_.pool,
          [this](const BlockChecksums::Request& request, const BlockChecksums::Found& found) {
            ChecksumDone(request, found);
          },
          [this](uint32_t slot) { MaybeRecycle(*slots_[slot]); }) {
  const RecordHeader& header = parts_.record->header();
  CHECK(header.block_count == registration_->slot_block_count());
  CHECK(header.block_bytes == registration_->block_bytes());
  CHECK(header.block_bytes == memory_->block_bytes());
  CHECK(header.blob_count == registration_->blobs().size());
  CHECK(parts_.registration_id > 0 && parts_.registration_id <= UINT32_MAX);
  last_generation_ = parts_.registration_id << 32;
  for (uint32_t index = 0; index < header.slot_count; ++index) {
    slots_.push_back(std::make_unique<Slot>());
    slots_.back()->images = this;
    slots_.back()->index = index;
    slots_.back()->Reset(block_count());
  }
}

RankImagesImpl::~RankImagesImpl() {
  if (listener_ != 0) memory_->RemoveListener(listener_);
}

void RankImagesImpl::Slot::Reset(uint32_t block_count) {
  trainer_done = false;
  capture_complete = false;
  stamp = Stamp::kNone;
  released = false;
  void_reported = false;
  blocks.assign(block_count, 0);
  captured_count = 0;
  checksummed_count = 0;
  looked_again_count = 0;
  fingerprints.clear();
  replica_sums.clear();
  replica_summed_count = 0;
  first_uncaptured = 0;
  wanted_path.clear();
  flush.reset();
  try_number = 0;
  flushed = false;
  removing_file = false;
}

RankImagesImpl::Slot* RankImagesImpl::Find(ImageId id) {
  if (id.session != parts_.session || id.slot_index >= slots_.size()) return nullptr;
  Slot& slot = *slots_[id.slot_index];
  const bool is_image = slot.IsImage() && !slot.released;
  return is_image && slot.record.generation == id.generation ? &slot : nullptr;
}

const RankImagesImpl::Slot* RankImagesImpl::Find(ImageId id) const {
  return const_cast<RankImagesImpl*>(this)->Find(id);
}

void RankImagesImpl::Tell(std::function<void(ImageObserver&)> what) {
  world_.loop.Post([this, alive = std::weak_ptr<bool>(alive_), what = std::move(what)] {
    if (!alive.expired()) what(*observer_);
  });
}

void RankImagesImpl::ReportCounters(const Slot& slot) {
  parts_.reports->SetCounters(Step{slot.record.step}, slot.captured_count, flushed_count(slot));
}

void RankImagesImpl::Advance() {
  if (observer_ == nullptr) return;
  for (const std::unique_ptr<Slot>& slot : slots_) AdvanceSlot(*slot);
  MaybeGrant();
}

void RankImagesImpl::MaybeGrant() {
  if (!granting_ || !trainer_alive_ || observer_ == nullptr) return;
  Slot* free_slot = nullptr;
  for (const std::unique_ptr<Slot>& slot : slots_) {
    // One ahead is enough; more would only take blocks from a restore.
    if (slot->is(State::kGranted)) return;
    if (slot->is(State::kEmpty) && !slot->is_lost && free_slot == nullptr) free_slot = slot.get();
  }
  if (free_slot == nullptr) return;
  std::optional<std::vector<uint32_t>> blocks =
      memory_->pool().Take(block_count(), BlockState::kGranted);
  if (!blocks) return;

  Slot& slot = *free_slot;
  slot.Reset(block_count());
  slot.record = SlotRecord();
  slot.record.state = State::kGranted;
  slot.record.generation = ++last_generation_;
  CHECK(RegistrationOf(IdOf(slot)) == parts_.registration_id);  // 2^32 grants are not exceeded
  slot.record.step = abi::kNoStep;
  slot.record.block_table = std::move(*blocks);
  Save(slot);
  shared_.PublishGrant(slot.index, slot.record.generation, slot.record.block_table);
  parts_.reports->Wake();
}

void RankImagesImpl::StopGranting(UnusedGrant unused) {
  granting_ = false;
  if (unused == UnusedGrant::kLeave) return;
  for (const std::unique_ptr<Slot>& slot : slots_) {
    if (slot->is(State::kGranted)) TakeBackGrant(*slot);
  }
}

void RankImagesImpl::ResumeGranting() {
  granting_ = true;
  MaybeGrant();
}

// The trainer has not claimed it, so it does not write. If it has after all, the grant stays.
void RankImagesImpl::TakeBackGrant(Slot& slot) {
  if (!shared_.TakeBack(slot.index)) return;
  memory_->pool().Free(slot.record.block_table, BlockState::kGranted);
  const uint64_t generation = slot.record.generation;
  slot.record = SlotRecord();
  slot.record.generation = generation;
  Save(slot);
  memory_->NotifyBlocksFree();
}

bool RankImagesImpl::IsTrainerCapturing() const {
  return std::any_of(slots_.begin(), slots_.end(), [this](const std::unique_ptr<Slot>& slot) {
    return shared_.state(slot->index) == abi::SlotState::kCapturing;
  });
}

bool RankImagesImpl::IsStarved() const {
  if (!granting_ || !trainer_alive_ || memory_->prefault_running()) return false;
  bool has_empty = false;
  for (const std::unique_ptr<Slot>& slot : slots_) {
    if (slot->is(State::kGranted)) return false;
    has_empty |= slot->is(State::kEmpty) && !slot->is_lost;
  }
  return !has_empty || memory_->pool().count(BlockState::kFree) < block_count();
}

void RankImagesImpl::Release(ImageId id) {
  Slot* slot = Find(id);
  if (slot == nullptr) return;
  KillPoint("release.blocks");
  if (slot->is(State::kCapturing)) {
    VoidImage(*slot, absl::CancelledError("the image is not needed any more"), Report::kNo);
    return;
  }
  slot->released = true;
  checksums_.Cancel(slot->index);
  if (!slot->IsDurable()) DropFile(*slot);
  MaybeRecycle(*slot);
}

// Blocks return when nothing reads them and nobody can write them: not a job, not a transfer, and
// not a trainer that is alive and has not said that it is done.
void RankImagesImpl::MaybeRecycle(Slot& slot) {
  if (!slot.is(State::kVoid) && !slot.released) return;
  const abi::SlotState found = shared_.state(slot.index);
  if (found == abi::SlotState::kCaptured || found == abi::SlotState::kVoid) {
    slot.trainer_done = true;
  }
  if (trainer_alive_ && !slot.trainer_done) return;
  if (slot.stamp == Slot::Stamp::kRunning || checksums_.pending(slot.index) > 0) return;
  if (slot.removing_file) return;
  CHECK(slot.flush == nullptr);  // whoever gives an image up drops its file

  memory_->pool().Free(slot.record.block_table,
                       slot.is(State::kVoid) ? BlockState::kQuarantined : BlockState::kImage);
  const uint64_t generation = slot.record.generation;
  slot.record = SlotRecord();
  slot.record.generation = generation;
  Save(slot);
  shared_.SetEmpty(slot.index);
  slot.Reset(block_count());
  memory_->NotifyBlocksFree();
}

absl::StatusOr<RankImages::BlockView> RankImagesImpl::Block(ImageId id,
                                                            uint64_t block_index) const {
  const Slot* slot = Find(id);
  if (slot == nullptr || !slot->is(State::kSealed)) {
    return absl::NotFoundError(
        absl::StrFormat("image of session %d, slot %d, generation %d is not in memory (any more)",
                        static_cast<uint64_t>(id.session), id.slot_index, id.generation));
  }
  if (block_index >= block_count()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("block %d of a slot of %d blocks", block_index, block_count()));
  }
  const auto block = static_cast<uint32_t>(block_index);
  const std::optional<uint32_t> crc32c =
      parts_.record->Checksum(slot->index, block, slot->record.generation);
  CHECK(crc32c.has_value());  // sealed
  BlockView view;
  view.memory_offset = slot->record.block_table[block] * block_bytes();
  view.bytes = memory_->bytes().subspan(view.memory_offset, block_bytes());
  view.crc32c = *crc32c;
  return view;
}

std::optional<std::vector<Fingerprint>> RankImagesImpl::Fingerprints(ImageId id) const {
  const Slot* slot = Find(id);
  if (slot == nullptr || slot->looked_again_count < image_block_count()) return std::nullopt;
  return slot->fingerprints;
}

std::optional<std::vector<Fingerprint>> RankImagesImpl::ReplicaSums(ImageId id) const {
  const Slot* slot = Find(id);
  if (slot == nullptr || slot->replica_summed_count < block_count()) return std::nullopt;
  return slot->replica_sums;
}

std::vector<uint64_t> RankImagesImpl::TakeStaging(size_t count) {
  BlockPool& pool = memory_->pool();
  if (pool.count(BlockState::kFree) == 0) {
    for (const std::unique_ptr<Slot>& slot : slots_) {
      if (slot->is(State::kGranted)) TakeBackGrant(*slot);
    }
  }
  const auto taken_count =
      static_cast<uint32_t>(std::min<size_t>(count, pool.count(BlockState::kFree)));
  std::vector<uint64_t> offsets;
  const std::vector<uint32_t> taken = pool.Take(taken_count, BlockState::kStaging).value();
  for (const uint32_t block : taken) {
    offsets.push_back(block * block_bytes());
  }
  staging_count_ += offsets.size();
  return offsets;
}

void RankImagesImpl::ReturnStaging(std::span<const uint64_t> memory_offsets) {
  std::vector<uint32_t> blocks;
  for (const uint64_t offset : memory_offsets) {
    CHECK(offset % block_bytes() == 0);
    blocks.push_back(static_cast<uint32_t>(offset / block_bytes()));
  }
  memory_->pool().Free(blocks, BlockState::kStaging);
  CHECK(staging_count_ >= blocks.size());
  staging_count_ -= blocks.size();
  memory_->NotifyBlocksFree();
}

std::span<std::byte> RankImagesImpl::memory() const { return memory_->bytes(); }

size_t RankImagesImpl::held_image_count() const {
  const auto is_held = [](const std::unique_ptr<Slot>& slot) {
    return !slot->is(State::kEmpty) && !slot->is(State::kGranted);
  };
  return static_cast<size_t>(std::count_if(slots_.begin(), slots_.end(), is_held)) +
         (staging_count_ > 0 ? 1 : 0);
}

size_t RankImagesImpl::pending_image_count() const {
  const auto is_pending = [](const std::unique_ptr<Slot>& slot) {
    return slot->IsImage() && !slot->released && !slot->IsDurable() && !slot->StorageFailed();
  };
  return static_cast<size_t>(std::count_if(slots_.begin(), slots_.end(), is_pending));
}

std::vector<RankImages::Counters> RankImagesImpl::counters() const {
  std::vector<Counters> result;
  for (const std::unique_ptr<Slot>& slot : slots_) {
    if (slot->is(State::kEmpty)) continue;
    Counters counters;
    counters.id = IdOf(*slot);
    counters.checkpoint = CheckpointOf(*slot);
    switch (slot->record.state) {
      case State::kEmpty:
        break;
      case State::kGranted:
        counters.state = "granted";
        break;
      case State::kCapturing:
        counters.state = "capturing";
        break;
      case State::kSealed:
        counters.state = slot->IsDurable() ? "durable" : "sealed";
        break;
      case State::kVoid:
        counters.state = "void";
        break;
    }
    counters.block_count = block_count();
    counters.blocks_captured = slot->captured_count;
    counters.blocks_checksummed = slot->checksummed_count;
    counters.blocks_flushed = flushed_count(*slot);
    counters.void_reason = slot->record.text;
    result.push_back(std::move(counters));
  }
  return result;
}

}  // namespace holdfast
