#include "hook/capture.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
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

Result<bool> LiesAsRegistered(const DeviceTable* devices, const void* pointer, int32_t place) {
  if (devices != nullptr) return devices->LiesAt(pointer, place);
  Result<std::shared_ptr<const DeviceDriver>> driver = DeviceDriver::FindLoaded();
  if (!driver.ok()) return driver.error();
  if (driver.value() == nullptr) return true;
  Result<CuPlace> found = driver.value()->Locate(pointer);
  return found.ok() ? Result<bool>(!found.value().is_device) : found.error();
}

}  // namespace

Result<std::unique_ptr<Capture>> Capture::Start(const Options& options, SourceReader* reader) {
  std::unique_ptr<Capture> capture(new Capture(options, reader));
  for (uint32_t i = 0; i < options.thread_count; ++i) {
    capture->threads_left_.fetch_add(1);
    auto thread = std::make_unique<Thread>();
    char name[16];
    std::snprintf(name, sizeof(name), "holdfast-copy%u", i % 100);
    if (Error error = thread->Start(name, &Capture::Main, capture.get()); !error.ok()) {
      capture->threads_left_.fetch_sub(1);
      return error;
    }
    capture->threads_.push_back(std::move(thread));
  }
  return capture;
}

Capture::~Capture() { Stop(Deadline::Never()); }

bool Capture::Stop(Deadline deadline) {
  if (running_ && (Cancel() || seal_by_ == SealBy::kTrainer)) {
    Void(Error(HF_ABORTED, "the job was closed during the capture"));
  }
  stopping_.store(true);
  WakeCopiers();
  for (;;) {
    const uint32_t progress = progress_.load();
    if (threads_left_.load() == 0) break;
    if (deadline.passed()) return false;
    FutexWait(progress_, progress, deadline, FutexScope::kPrivate);
  }
  for (const std::unique_ptr<Thread>& thread : threads_) thread->Join();
  threads_.clear();
  return true;
}

// ---- The trainer's thread

void Capture::Begin(std::shared_ptr<Registration> registration, uint32_t slot_index,
                    SealBy seal_by) {
  running_ = true;
  registration_ = std::move(registration);
  slot_ = slot_index;
  generation_ = generation_ == UINT32_MAX ? 1 : generation_ + 1;  // 0 is none
  seal_by_ = seal_by;
  begun_ns_ = MonotonicNs();
  const Registration& plan = *registration_;
  const uint32_t copied_count = static_cast<uint32_t>(plan.copied_blocks().size());
  checked_groups_ = options_.check_source == CheckSource::kNone ? 0 : plan.device_groups();
  has_moved_ = false;
  for (size_t i = 0; i < plan.pointers().size() && !has_moved_; ++i) {
    has_moved_ = plan.pointers()[i] != plan.document().buffers()[i].data;
  }
  // One more for the comparison, which is done when all blocks are.
  for (uint32_t group = 0; group < kGroupCount; ++group) {
    const uint32_t comparisons = static_cast<uint32_t>(checked_groups_ >> group & 1);
    group_blocks_left_[group].store(plan.blocks_of_group(group) + comparisons,
                                    std::memory_order_relaxed);
  }
  for (const uint32_t block : plan.other_blocks()) {
    plan.block_done(slot_, block).store(1, std::memory_order_relaxed);
  }
  blocks_left_.store(copied_count + static_cast<uint32_t>(__builtin_popcountll(checked_groups_)),
                     std::memory_order_relaxed);
  blocks_done_.store(plan.other_blocks().size(), std::memory_order_relaxed);
  bytes_since_ring_.store(0, std::memory_order_relaxed);
  device_bytes_.store(0, std::memory_order_relaxed);
  unpinned_bytes_.store(0, std::memory_order_relaxed);
  device_begun_ns_.store(0, std::memory_order_relaxed);
  device_ended_ns_.store(0, std::memory_order_relaxed);
  next_copy_ns_.store(0, std::memory_order_relaxed);
  cancelled_.store(false, std::memory_order_relaxed);
  failed_.store(false, std::memory_order_relaxed);
  device_may_write_.store(false, std::memory_order_relaxed);
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
  if (options_.head_start_ns == 0) RingEventFd(options_.doorbell_fd);
}

bool Capture::WaitDone(uint64_t groups, bool all_blocks, Deadline deadline) {
  for (;;) {
    const uint32_t progress = progress_.load();
    bool done = !all_blocks || finished();
    for (uint64_t rest = groups; rest != 0; rest &= rest - 1) {
      done = done && group_blocks_left_[__builtin_ctzll(rest)].load(std::memory_order_acquire) == 0;
    }
    if (done) return true;
    if (failed_.load(std::memory_order_acquire) || deadline.passed()) return false;
    FutexWait(progress_, progress, deadline, FutexScope::kPrivate);
  }
}

Error Capture::failure() const {
  if (!failed_.load(std::memory_order_acquire)) return Error();
  MutexLock lock(failure_mutex_);
  return failure_;
}

Capture::DeviceCopies Capture::device_copies() const {
  return {device_bytes_.load(std::memory_order_relaxed),
          unpinned_bytes_.load(std::memory_order_relaxed),
          device_begun_ns_.load(std::memory_order_relaxed),
          device_ended_ns_.load(std::memory_order_relaxed)};
}

bool Capture::Cancel() {
  cancelled_.store(true);
  claim_.store(ClaimWord(generation_, 0));
  // Host memory is read in bounded time; a device may never answer.
  const bool has_devices = registration_->document().devices() != nullptr;
  const Deadline deadline = has_devices ? Deadline::After(kDrainNs) : Deadline::Never();
  // Sequentially consistent with Run: a thread that counted itself before this look is waited for;
  // one that does so after it finds nothing left to claim.
  for (;;) {
    const uint32_t progress = progress_.load();
    drained_ = participants_.load() == 0;
    if (drained_ || deadline.passed()) break;
    FutexWait(progress_, progress, deadline, FutexScope::kPrivate);
  }
  return !finished();
}

void Capture::Seal() {
  running_ = false;
  if (seal_by_ == SealBy::kCopier) return;
  ImageSlot& slot = registration_->slot(slot_);
  slot.state.store(SlotState::kCaptured, std::memory_order_release);
  RingEventFd(options_.doorbell_fd);
}

void Capture::Void(const Error& reason) {
  running_ = false;
  ImageSlot& slot = registration_->slot(slot_);
  slot.void_code.store(reason.code(), std::memory_order_relaxed);
  const size_t kept =
      Utf8PrefixBytes(reason.text(), std::strlen(reason.text()), sizeof(slot.void_text) - 1);
  std::memcpy(slot.void_text, reason.text(), kept);
  slot.void_text[kept] = '\0';
  const bool abandoned = !drained_ || device_may_write_.load();
  slot.state.store(abandoned ? SlotState::kAbandoned : SlotState::kVoid, std::memory_order_release);
  RingEventFd(options_.doorbell_fd);
  if (drained_) return;
  abandoned_.store(&slot);
  // Sequentially consistent with Leave: one of the two sees that the other has been there.
  if (participants_.load() == 0) Settle();
}

// Nobody works on the capture that was given up any more.
void Capture::Settle() {
  ImageSlot* const slot = abandoned_.exchange(nullptr);
  if (slot == nullptr || device_may_write_.load()) return;
  slot->state.store(SlotState::kVoid, std::memory_order_release);
  RingEventFd(options_.doorbell_fd);
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
  if (!running_ && !draining()) registration_.reset();
}

// ---- The copier threads

void Capture::Main(void* self) { static_cast<Capture*>(self)->Run(); }

void Capture::Run() {
  for (;;) {
    const uint32_t work = work_.load();
    if (stopping_.load()) break;
    participants_.fetch_add(1);
    CopyBlocks();
    Leave();
    if (!PopulateSome()) FutexWait(work_, work, Deadline::Never(), FutexScope::kPrivate);
  }
  threads_left_.fetch_sub(1);
  NotifyProgress();
}

void Capture::Leave() {
  // Sequentially consistent, as in Cancel: either it sees us gone, or we see that it waits.
  const bool last = participants_.fetch_sub(1) == 1;
  if (!cancelled_.load()) return;
  if (last) Settle();
  NotifyProgress();
}

// A block of the capture that the thread works on already, or, if it works on none (0), of any.
bool Capture::Claim(uint32_t* generation, uint32_t* block) {
  uint64_t claim = claim_.load();
  do {
    if ((claim & UINT32_MAX) == 0) return false;
    if (*generation != 0 && *generation != claim >> 32) return false;
  } while (!claim_.compare_exchange_weak(claim, claim - 1));
  *generation = static_cast<uint32_t>(claim >> 32);
  const std::span<const uint32_t> blocks = registration_->copied_blocks();
  *block = blocks[blocks.size() - (claim & UINT32_MAX)];
  return true;
}

bool Capture::given_up() const {
  return cancelled_.load(std::memory_order_relaxed) || failed_.load(std::memory_order_relaxed);
}

void Capture::Fail(const Error& why) {
  {
    MutexLock lock(failure_mutex_);
    // The first failure explains the others; a cancellation explains them all.
    if (given_up()) return;
    failure_ = why;
    failed_.store(true, std::memory_order_release);
  }
  // Nothing is begun any more. Of this generation still: without us it cannot end.
  claim_.store(ClaimWord(generation_, 0));
  NotifyProgress();
}

// Copies blocks of one capture until none is left. What this thread has in flight at its end is
// complete. Of one: the next may be of other devices, and has gates of its own to wait for.
void Capture::CopyBlocks() {
  uint32_t generation = 0;
  uint32_t block = 0;
  if (!Claim(&generation, &block)) return;
  const DeviceTable* const devices = registration_->document().devices().get();
  DeviceQueue queue(devices);
  if (devices != nullptr && !AwaitGates(*devices)) return;
  do {
    if (!AwaitTurn(queue) || !CopyBlock(block, queue)) break;
    TakeComplete(queue);
  } while (Claim(&generation, &block));
  while (!queue.empty()) {
    TakeComplete(queue);
    if (!queue.empty()) PauseBetweenLooks();
  }
}

// Waits until the caller's streams have come to the save. False if the capture was given up.
bool Capture::AwaitGates(const DeviceTable& devices) {
  for (uint32_t i = 0; i < devices.count(); ++i) {
    for (;;) {
      Error error;
      const EventState state = devices.context(i).PollGate(&error);
      if (given_up()) return false;
      if (state == EventState::kComplete) break;
      if (state == EventState::kFailed) {
        Fail(Error(error.code(), "waiting for the stream of the save: %s", error.text()));
        return false;
      }
      PauseBetweenLooks();
    }
  }
  int64_t unset = 0;
  device_begun_ns_.compare_exchange_strong(unset, MonotonicNs(), std::memory_order_relaxed);
  return true;
}

// Waits until another block may be begun. False if the capture was given up.
bool Capture::AwaitTurn(DeviceQueue& queue) {
  for (;;) {
    if (given_up()) return false;
    if (queue.has_room() && MonotonicNs() >= next_copy_ns_.load(std::memory_order_relaxed)) {
      return true;
    }
    PauseBetweenLooks();
    TakeComplete(queue);
  }
}

// Finishes the blocks whose copies are complete.
void Capture::TakeComplete(DeviceQueue& queue) {
  while (!queue.empty()) {
    DeviceQueue::Block block;
    Error error;
    const EventState state = queue.TakeOldest(&block, &error);
    if (state == EventState::kPending) return;
    if (state == EventState::kFailed) {
      device_may_write_.store(true);
      const Registration& plan = *registration_;
      const CaptureOp& op = plan.ops()[plan.first_op(block.index)];
      Fail(Error(error.code(), "copying block %u, which begins with buffer '%s': %s", block.index,
                 ShortName(plan.document().buffers()[op.buffer_index].name).text(), error.text()));
      continue;
    }
    if (!block.whole) continue;
    device_bytes_.fetch_add(block.bytes, std::memory_order_relaxed);
    device_ended_ns_.store(MonotonicNs(), std::memory_order_relaxed);
    FinishBlock(block.index);
  }
}

// Copies what the operations put into the block, or enqueues it. False if the capture was given up
// in between.
bool Capture::CopyBlock(uint32_t block, DeviceQueue& queue) {
  const Registration& plan = *registration_;
  const uint64_t block_begin = block * plan.block_bytes();
  const uint64_t block_end = block_begin + plan.block_bytes();
  std::byte* const data = plan.BlockData(slot_, block);
  Error error;
  if (data == nullptr) error = Error(HF_INTERNAL, "the agent's block table changed under capture");
  for (size_t i = plan.first_op(block); error.ok() && i < plan.ops().size(); ++i) {
    const CaptureOp& op = plan.ops()[i];
    if (op.image_offset >= block_end || given_up()) break;
    const uint64_t op_end = op.image_offset + OpBytes(op);
    const uint64_t begin = std::max(op.image_offset, block_begin);
    const uint64_t end = std::min(op_end, block_end);
    if (begin >= end) continue;
    error = CopyRange(op, begin - op.image_offset, end - op.image_offset, block_begin, data, queue);
    if (!error.ok()) {
      const Document::Buffer& buffer = plan.document().buffers()[op.buffer_index];
      error = Error(error.code(), "buffer '%s': %s", ShortName(buffer.name).text(), error.text());
    }
  }
  const bool whole = error.ok() && !given_up();
  if (!error.ok()) Fail(error);
  if (!queue.block_has_copies()) {
    if (whole) FinishBlock(block);
    return whole;
  }
  const uint64_t bytes = queue.block_bytes();
  if (Error failed = queue.EndBlock(block, whole); !failed.ok()) {
    const CaptureOp& op = plan.ops()[plan.first_op(block)];
    Fail(Error(failed.code(), "buffer '%s', or one behind it in block %u: %s",
               ShortName(plan.document().buffers()[op.buffer_index].name).text(), block,
               failed.text()));
    return false;
  }
  if (options_.device_bytes_per_second_max > 0) {
    const double seconds =
        static_cast<double>(bytes) / static_cast<double>(options_.device_bytes_per_second_max);
    const int64_t cost_ns = static_cast<int64_t>(seconds * static_cast<double>(kNsPerSecond));
    // A copy that came late because its thread overslept is made up for; never is the mean from the
    // first one on above the limit.
    const int64_t now_ns = MonotonicNs();
    int64_t next_ns = next_copy_ns_.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t due_ns = next_ns == 0 ? now_ns : std::max(next_ns, now_ns - kPaceLateNs);
      if (next_copy_ns_.compare_exchange_weak(next_ns, due_ns + cost_ns,
                                              std::memory_order_relaxed)) {
        break;
      }
    }
  }
  return whole;
}

// Copies bytes [begin, end) of the operation's to the block at `data`, which begins at
// `block_begin` of the image.
Error Capture::CopyRange(const CaptureOp& op, uint64_t begin, uint64_t end, uint64_t block_begin,
                         std::byte* data, DeviceQueue& queue) {
  const Registration& plan = *registration_;
  const int32_t place = plan.document().buffers()[op.buffer_index].place;
  const std::byte* const source = static_cast<const std::byte*>(plan.pointers()[op.buffer_index]);
  if (has_moved_) {
    if (Error error = CheckPlace(op.buffer_index); !error.ok()) return error;
  }
  if (place == kHostPlace) {
    ForEachPiece(op, begin, end, kCopyPieceBytes, [&](const Piece& p) {
      reader_->Read(data + (op.image_offset + p.image_skip - block_begin), source + p.buffer_offset,
                    p.run_bytes, p.count, p.stride);
      return !cancelled_.load(std::memory_order_relaxed);
    });
    return Error();
  }
  if (!plan.pins()->Pin(data)) {
    unpinned_bytes_.fetch_add(end - begin, std::memory_order_relaxed);
  }
  Error error;
  ForEachPiece(op, begin, end, plan.block_bytes(), [&](const Piece& p) {
    error = queue.Add(static_cast<uint32_t>(place),
                      data + (op.image_offset + p.image_skip - block_begin),
                      {source + p.buffer_offset, p.run_bytes, p.count, p.stride});
    return error.ok();
  });
  return error;
}

// That the buffer lies where it was registered: what is in device memory must not be read here, and
// was not waited for if it was not there at the registration.
Error Capture::CheckPlace(uint32_t buffer_index) {
  const Registration& plan = *registration_;
  const void* const pointer = plan.pointers()[buffer_index];
  const Document::Buffer& buffer = plan.document().buffers()[buffer_index];
  if (pointer == buffer.data) return Error();
  Result<bool> as_registered = true;
  try {
    as_registered = LiesAsRegistered(plan.document().devices().get(), pointer, buffer.place);
  } catch (const std::exception&) {
    return Error(HF_RESOURCE_EXHAUSTED, "out of memory in the training process");
  }
  if (!as_registered.ok()) return as_registered.error();
  if (as_registered.value()) return Error();
  return Error(HF_INVALID_ARGUMENT,
               "the pointer given to this save lies in other memory (host, or which CUDA context) "
               "than the one registered: register the tensors anew");
}

// Compares the group's bytes in device memory with the image. False: they differ, or the capture
// was given up.
bool Capture::CheckDeviceGroup(uint32_t group) {
  const Registration& plan = *registration_;
  const DeviceTable& devices = *plan.document().devices();
  Error error;
  try {
    std::unique_ptr<DeviceComparer> comparers[kDeviceContextsMax];
    MutexLock lock(check_mutex_);
    error =
        device_checker_.Check(plan, slot_, Registration::Memory::kDevice, uint64_t{1} << group,
                              [&](int32_t place) -> SourceComparer& {
                                std::unique_ptr<DeviceComparer>& comparer = comparers[place];
                                if (comparer == nullptr) {
                                  comparer = std::make_unique<DeviceComparer>(
                                      devices.context(static_cast<uint32_t>(place)), cancelled_);
                                }
                                return *comparer;
                              });
  } catch (const std::exception&) {
    error = Error(HF_RESOURCE_EXHAUSTED, "out of memory in the training process");
  }
  if (!error.ok()) Fail(error);
  return error.ok();
}

void Capture::FinishBlock(uint32_t block) {
  const Registration& plan = *registration_;
  const uint64_t groups = plan.groups_of_block(block);
  // Pairs with the agent's acquire: the block's bytes are there.
  plan.block_done(slot_, block).store(1, std::memory_order_release);
  plan.slot(slot_).blocks_done.fetch_add(1, std::memory_order_relaxed);
  blocks_done_.fetch_add(1, std::memory_order_release);
  bool group_done = false;
  for (uint64_t rest = groups; rest != 0; rest &= rest - 1) {
    const uint32_t group = static_cast<uint32_t>(__builtin_ctzll(rest));
    const uint32_t left = group_blocks_left_[group].fetch_sub(1) - 1;
    if (left == 1 && (checked_groups_ >> group & 1) != 0) {
      // Only the comparison is left. It is nobody else's, and without it the capture does not end.
      if (!CheckDeviceGroup(group)) continue;
      group_blocks_left_[group].fetch_sub(1);
      blocks_left_.fetch_sub(1);
      group_done = true;
    }
    group_done |= left == 0;
  }
  const uint64_t since = bytes_since_ring_.fetch_add(plan.block_bytes()) + plan.block_bytes();
  // The block comes last: whoever takes it to nothing is behind every comparison.
  if (blocks_left_.fetch_sub(1) == 1) {
    FinishImage();
    return;
  }
  if (group_done) NotifyProgress();
  if (since >= kDoorbellBytes && MonotonicNs() - begun_ns_ >= options_.head_start_ns) {
    bytes_since_ring_.store(0, std::memory_order_relaxed);
    RingEventFd(options_.doorbell_fd);
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
  RingEventFd(options_.doorbell_fd);
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
    // Where devices copy to, the driver makes them present.
    if (registration->pins() != nullptr && registration->pins()->Pin(data + at)) continue;
    MapPages(data + at, std::min(kPopulateBytes, bytes - at), Mapping::Access::kReadWrite);
  }
  MutexLock lock(populate_mutex_);
  populating_ = false;
  return true;
}

}  // namespace holdfast::hook
