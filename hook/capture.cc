#include "hook/capture.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "hook/op_pieces.h"

namespace holdfast::hook {
namespace {

using abi::CaptureOp;
using abi::ImageSlot;
using abi::SlotState;

constexpr uint64_t ClaimWord(uint32_t generation, uint32_t left) {
  return uint64_t{generation} << 32 | left;
}

}  // namespace

Result<std::unique_ptr<Capture>> Capture::Start(const Options& options, SourceReader* reader) {
  std::unique_ptr<Capture> capture(new Capture(options, reader));
  for (uint32_t i = 0; i < options.thread_count; ++i) {
    auto thread = std::make_unique<Thread>();
    char name[16];
    std::snprintf(name, sizeof(name), "holdfast-copy%u", i % 100);
    if (Error error = thread->Start(name, &Capture::Main, capture.get()); !error.ok()) return error;
    capture->threads_.push_back(std::move(thread));
  }
  return capture;
}

Capture::~Capture() {
  if (running_ && (Cancel() || seal_by_ == SealBy::kTrainer)) {
    Void(Error(HF_ABORTED, "the job was closed during the capture"));
  }
  stopping_.store(true);
  WakeCopiers();
  for (const std::unique_ptr<Thread>& thread : threads_) thread->Join();
}

// ---- The trainer's thread

void Capture::Begin(std::shared_ptr<Registration> registration, uint32_t slot_index,
                    SealBy seal_by) {
  running_ = true;
  registration_ = std::move(registration);
  slot_ = slot_index;
  generation_ += 1;
  seal_by_ = seal_by;
  begun_ns_ = MonotonicNs();
  const Registration& plan = *registration_;
  const uint32_t copied_count = static_cast<uint32_t>(plan.copied_blocks().size());
  for (uint32_t group = 0; group < kGroupCount; ++group) {
    group_blocks_left_[group].store(plan.blocks_of_group(group), std::memory_order_relaxed);
  }
  for (const uint32_t block : plan.other_blocks()) {
    plan.block_done(slot_, block).store(1, std::memory_order_relaxed);
  }
  blocks_left_.store(copied_count, std::memory_order_relaxed);
  blocks_done_.store(plan.other_blocks().size(), std::memory_order_relaxed);
  bytes_since_ring_.store(0, std::memory_order_relaxed);
  cancelled_.store(false, std::memory_order_relaxed);
  ImageSlot& slot = plan.slot(slot_);
  slot.captured_ns.store(0, std::memory_order_relaxed);
  slot.blocks_done.store(plan.other_blocks().size(), std::memory_order_relaxed);
  // Pairs with the agent's acquire: all of the slot's fields, blobs and block_done are there.
  slot.state.store(SlotState::kCapturing, std::memory_order_release);
  if (copied_count == 0) {
    FinishImage();
    return;
  }
  // Pairs with Claim's acquire: all of the capture's members are there.
  claim_.store(ClaimWord(generation_, copied_count), std::memory_order_release);
  WakeCopiers();
  if (head_start_ns_ == 0) RingEventFd(doorbell_fd_);
}

bool Capture::WaitDone(uint64_t groups, bool all_blocks, Deadline deadline) {
  for (;;) {
    const uint32_t progress = progress_.load();
    bool done = !all_blocks || finished();
    for (uint64_t rest = groups; rest != 0; rest &= rest - 1) {
      done = done && group_blocks_left_[__builtin_ctzll(rest)].load(std::memory_order_acquire) == 0;
    }
    if (done) return true;
    if (deadline.passed()) return false;
    FutexWait(progress_, progress, deadline, FutexScope::kPrivate);
  }
}

bool Capture::Cancel() {
  cancelled_.store(true);
  claim_.store(ClaimWord(generation_, 0));
  // Sequentially consistent with Run: a thread that counted itself before this look is waited for;
  // one that does so after it finds nothing left to claim.
  for (;;) {
    const uint32_t progress = progress_.load();
    if (participants_.load() == 0) break;
    FutexWait(progress_, progress, Deadline::Never(), FutexScope::kPrivate);
  }
  return !finished();
}

void Capture::Seal() {
  running_ = false;
  if (seal_by_ == SealBy::kCopier) return;
  ImageSlot& slot = registration_->slot(slot_);
  slot.state.store(SlotState::kCaptured, std::memory_order_release);
  RingEventFd(doorbell_fd_);
}

void Capture::Void(const Error& reason) {
  running_ = false;
  ImageSlot& slot = registration_->slot(slot_);
  slot.void_code.store(reason.code(), std::memory_order_relaxed);
  const size_t kept =
      Utf8PrefixBytes(reason.text(), std::strlen(reason.text()), sizeof(slot.void_text) - 1);
  std::memcpy(slot.void_text, reason.text(), kept);
  slot.void_text[kept] = '\0';
  slot.state.store(SlotState::kVoid, std::memory_order_release);
  RingEventFd(doorbell_fd_);
}

void Capture::Populate(std::shared_ptr<Registration> registration) {
  {
    MutexLock lock(populate_mutex_);
    if (populated_for_.lock() != registration) {
      populated_for_ = registration;
      populated_.assign(registration->memory().bytes() / registration->block_bytes(), false);
    }
    populate_cursor_ = 0;
    to_populate_ = std::move(registration);
  }
  WakeCopiers();
}

void Capture::PausePopulate() { populate_paused_.store(true); }

void Capture::ResumePopulate() {
  populate_paused_.store(false);
  WakeCopiers();
}

void Capture::Release() {
  MutexLock lock(populate_mutex_);
  to_populate_.reset();
  populated_for_.reset();
  populated_.clear();
  if (!running_) registration_.reset();
}

// ---- The copier threads

void Capture::Main(void* self) { static_cast<Capture*>(self)->Run(); }

void Capture::Run() {
  for (;;) {
    const uint32_t work = work_.load();
    if (stopping_.load()) return;
    participants_.fetch_add(1);
    uint32_t block = 0;
    while (Claim(&block) && CopyBlock(block)) FinishBlock(block);
    Leave();
    if (!PopulateSome()) FutexWait(work_, work, Deadline::Never(), FutexScope::kPrivate);
  }
}

void Capture::Leave() {
  // Sequentially consistent, as in Cancel: either it sees us gone, or we see that it waits.
  participants_.fetch_sub(1);
  if (cancelled_.load()) NotifyProgress();
}

bool Capture::Claim(uint32_t* block) {
  uint64_t claim = claim_.load();
  do {
    if ((claim & UINT32_MAX) == 0) return false;
  } while (!claim_.compare_exchange_weak(claim, claim - 1));
  const std::span<const uint32_t> blocks = registration_->copied_blocks();
  *block = blocks[blocks.size() - (claim & UINT32_MAX)];
  return true;
}

// Copies what the operations put into the block. False if cancelled in between.
bool Capture::CopyBlock(uint32_t block) {
  const Registration& plan = *registration_;
  const uint64_t block_begin = block * plan.block_bytes();
  const uint64_t block_end = block_begin + plan.block_bytes();
  std::byte* const data = plan.BlockData(slot_, block);
  if (data == nullptr) return false;
  for (size_t i = plan.first_op(block); i < plan.ops().size(); ++i) {
    const CaptureOp& op = plan.ops()[i];
    if (op.image_offset >= block_end) break;
    const uint64_t op_end = op.image_offset + OpBytes(op);
    const uint64_t begin = std::max(op.image_offset, block_begin);
    const uint64_t end = std::min(op_end, block_end);
    if (begin >= end) continue;
    const std::byte* const source = static_cast<const std::byte*>(plan.pointers()[op.buffer_index]);
    const bool copied = ForEachPiece(
        op, begin - op.image_offset, end - op.image_offset, kCopyPieceBytes, [&](const Piece& p) {
          reader_->Read(data + (op.image_offset + p.image_skip - block_begin),
                        source + p.buffer_offset, p.run_bytes, p.count, p.stride);
          return !cancelled_.load(std::memory_order_relaxed);
        });
    if (!copied) return false;
  }
  return true;
}

void Capture::FinishBlock(uint32_t block) {
  const Registration& plan = *registration_;
  // Pairs with the agent's acquire: the block's bytes are there.
  plan.block_done(slot_, block).store(1, std::memory_order_release);
  plan.slot(slot_).blocks_done.fetch_add(1, std::memory_order_relaxed);
  blocks_done_.fetch_add(1, std::memory_order_release);
  bool group_done = false;
  for (uint64_t rest = plan.groups_of_block(block); rest != 0; rest &= rest - 1) {
    group_done |= group_blocks_left_[__builtin_ctzll(rest)].fetch_sub(1) == 1;
  }
  const uint64_t since = bytes_since_ring_.fetch_add(plan.block_bytes()) + plan.block_bytes();
  if (blocks_left_.fetch_sub(1) == 1) {
    FinishImage();
    return;
  }
  if (group_done) NotifyProgress();
  if (since >= kDoorbellBytes && MonotonicNs() - begun_ns_ >= head_start_ns_) {
    bytes_since_ring_.store(0, std::memory_order_relaxed);
    RingEventFd(doorbell_fd_);
  }
}

void Capture::FinishImage() {
  ImageSlot& slot = registration_->slot(slot_);
  slot.captured_ns.store(MonotonicNs(), std::memory_order_release);
  if (seal_by_ == SealBy::kCopier) {
    // Pairs with the agent's acquire: it may read the whole image.
    slot.state.store(SlotState::kCaptured, std::memory_order_release);
  }
  finished_.store(generation_, std::memory_order_release);
  NotifyProgress();
  RingEventFd(doorbell_fd_);
}

void Capture::WakeCopiers() {
  work_.fetch_add(1);
  FutexWakeAll(work_, FutexScope::kPrivate);
}

void Capture::NotifyProgress() {
  progress_.fetch_add(1);
  FutexWakeAll(progress_, FutexScope::kPrivate);
}

// Finds granted blocks whose pages have not been mapped yet and that lie side by side.
bool Capture::NextToPopulate(std::byte** data, uint64_t* bytes) {
  const Registration& plan = *to_populate_;
  const uint64_t end = uint64_t{plan.slot_count()} * plan.block_count();
  *bytes = 0;
  for (; populate_cursor_ < end; ++populate_cursor_) {
    const uint32_t slot = static_cast<uint32_t>(populate_cursor_ / plan.block_count());
    const uint32_t block = static_cast<uint32_t>(populate_cursor_ % plan.block_count());
    if (plan.slot(slot).state.load(std::memory_order_acquire) != SlotState::kGranted) continue;
    std::byte* const found = plan.BlockData(slot, block);
    if (found == nullptr) continue;
    const uint64_t index = static_cast<uint64_t>(found - plan.memory().data()) / plan.block_bytes();
    if (populated_[index]) continue;
    if (*bytes > 0 && (found != *data + *bytes || *bytes >= kPopulateBytes)) break;
    if (*bytes == 0) *data = found;
    *bytes += plan.block_bytes();
    populated_[index] = true;
  }
  return *bytes > 0;
}

// False if there is nothing to do for this thread.
bool Capture::PopulateSome() {
  if (populate_paused_.load()) return false;
  std::shared_ptr<Registration> registration;
  std::byte* data = nullptr;
  uint64_t bytes = 0;
  {
    MutexLock lock(populate_mutex_);
    if (to_populate_ == nullptr || populating_) return false;
    if (!NextToPopulate(&data, &bytes)) {
      to_populate_.reset();
      return false;
    }
    registration = to_populate_;
    populating_ = true;
  }
  for (uint64_t at = 0; at < bytes; at += kPopulateBytes) {
    MapPages(data + at, std::min(kPopulateBytes, bytes - at), Mapping::Access::kReadWrite);
  }
  MutexLock lock(populate_mutex_);
  populating_ = false;
  return true;
}

}  // namespace holdfast::hook
