#include "hook/device_queue.h"

namespace holdfast::hook {

Error DeviceQueue::Flush() {
  if (pending_.runs.run_bytes == 0) return Error();
  const DeviceRuns runs = pending_.runs;
  pending_.runs = DeviceRuns();
  pending_.contexts |= uint32_t{1} << pending_.context;
  return table_->context(pending_.context).CopyToHost(pending_.target, runs, &known_);
}

Error DeviceQueue::Add(uint32_t context, std::byte* target, const DeviceRuns& runs) {
  const uint64_t bytes = runs.run_bytes * runs.count;
  pending_.bytes += bytes;
  const bool is_one_run = runs.count == 1 || runs.stride == runs.run_bytes;
  DeviceRuns& last = pending_.runs;
  if (is_one_run && last.run_bytes > 0 && last.count == 1 && pending_.context == context &&
      static_cast<const std::byte*>(last.device) + last.run_bytes == runs.device &&
      pending_.target + last.run_bytes == target) {
    if (!known_.Holds(last.device, 1)) {
      known_ = table_->driver().FindAllocation(last.device, last.run_bytes);
    }
    if (known_.Holds(last.device, last.run_bytes + bytes)) {
      last.run_bytes += bytes;
      return Error();
    }
  }
  Error error = Flush();
  pending_.context = context;
  pending_.target = target;
  last = is_one_run ? DeviceRuns{runs.device, bytes, 1, bytes} : runs;
  return error;
}

Error DeviceQueue::EndBlock(uint32_t index, bool whole) {
  Error error = Flush();
  InFlight& entry = ring_[(first_ + count_) % kBlocksInFlightMax];
  entry.block = {index, pending_.bytes, whole && error.ok()};
  entry.contexts = 0;
  entry.failed = false;
  for (uint32_t rest = pending_.contexts; rest != 0; rest &= rest - 1) {
    const uint32_t context = static_cast<uint32_t>(__builtin_ctz(rest));
    Result<CuEvent> event = table_->context(context).RecordEvent();
    if (event.ok()) {
      entry.events[context] = event.value();
      entry.contexts |= uint32_t{1} << context;
    } else {
      entry.failed = true;
      error_ = event.error();
    }
  }
  pending_ = Pending();
  ++count_;
  bytes_ += entry.block.bytes;
  return error;
}

EventState DeviceQueue::TakeOldest(Block* block, Error* error) {
  InFlight& entry = ring_[first_];
  for (uint32_t rest = entry.contexts; rest != 0; rest &= rest - 1) {
    const uint32_t context = static_cast<uint32_t>(__builtin_ctz(rest));
    DeviceContext& device = table_->context(context);
    Error failure;
    const EventState state = device.Poll(entry.events[context], &failure);
    if (state == EventState::kPending) return EventState::kPending;
    if (state == EventState::kFailed) {
      entry.failed = true;
      error_ = failure;
    }
    device.ReturnEvent(entry.events[context]);
    entry.contexts &= ~(uint32_t{1} << context);
  }
  *block = entry.block;
  bytes_ -= entry.block.bytes;
  first_ = (first_ + 1) % kBlocksInFlightMax;
  --count_;
  if (!entry.failed) return EventState::kComplete;
  *error = error_;
  return EventState::kFailed;
}

}  // namespace holdfast::hook
