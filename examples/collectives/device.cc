#include "examples/collectives/device.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <utility>
#include <vector>

namespace collectives {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kAcquire = std::memory_order_acquire;
constexpr auto kRelease = std::memory_order_release;

uint64_t Nanoseconds(Deadline at) {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(at.time_since_epoch()).count());
}

Deadline After(absl::Duration duration) {
  return Clock::now() + absl::ToChronoNanoseconds(std::min(duration, absl::Hours(24 * 365)));
}

// How many chunks of a flow there are before its middle.
uint32_t MiddleOf(const Flow& flow) { return flow.chunk_count() / 2; }

}  // namespace

std::unique_ptr<Device> Device::Start() {
  std::unique_ptr<Device> device(new Device());
  device->thread_ = std::thread([raw = device.get()] { raw->Run(); });
  return device;
}

Device::~Device() {
  {
    MutexLock lock(mutex_);
    stop_ = true;
  }
  changed_.SignalAll();
  thread_.join();
  MutexLock lock(mutex_);
  for (const Computing& computing : computing_) {
    computing.end->Finish(absl::CancelledError("the device was destroyed"));
  }
}

Handle Device::Compute(absl::Duration duration) {
  auto end = std::make_shared<Operation>();
  {
    MutexLock lock(mutex_);
    computing_.push_back({end, duration});
    ++computes_enqueued_;
    kicked_ = true;
  }
  changed_.SignalAll();
  return Handle(std::move(end));
}

void Device::Submit(const StreamId& stream, std::shared_ptr<Operation> operation,
                    const WakeEvent* proxy) {
  MutexLock lock(mutex_);
  operation->computes_before = computes_enqueued_;
  streams_[stream].push_back({std::move(operation), proxy, false, false, {}});
}

void Device::Kick() {
  {
    MutexLock lock(mutex_);
    kicked_ = true;
  }
  changed_.SignalAll();
}

void Device::Drive(const void* owner) {
  Deadline wake_at = Deadline::max();
  bool hand_over = false;
  {
    MutexLock lock(mutex_);
    while (AdvanceStreams(owner, wake_at)) {
    }
    hand_over = std::exchange(passed_over_, false) || wake_at != Deadline::max();
    kicked_ = kicked_ || hand_over;
  }
  if (hand_over) changed_.SignalAll();
}

void Device::DropStreams(const void* owner) {
  const auto is_owners = [owner](const auto& stream) { return stream.first.owner == owner; };
  MutexLock lock(mutex_);
  ++dropping_;
  while (std::any_of(streams_.begin(), streams_.end(), [&](const auto& stream) {
    return is_owners(stream) && stream.second.front().is_advancing;
  })) {
    changed_.Wait(mutex_);
  }
  --dropping_;
  std::erase_if(streams_, is_owners);
}

void Device::HangNextOperation(absl::Duration duration) {
  MutexLock lock(mutex_);
  hang_next_ = duration;
}

void Device::StallFlush(absl::Duration duration) {
  {
    MutexLock lock(mutex_);
    flush_stalls_until_ = After(duration);
    kicked_ = true;
  }
  changed_.SignalAll();
}

void Device::GoOn() {
  {
    MutexLock lock(mutex_);
    const Deadline now = Clock::now();
    if (!computing_.empty()) computes_until_ = now;
    hang_next_ = absl::ZeroDuration();
    flush_stalls_until_ = now;
    for (auto& [id, stream] : streams_) {
      if (stream.front().hangs_until != Deadline{}) stream.front().hangs_until = now;
    }
    kicked_ = true;
  }
  changed_.SignalAll();
}

void Device::Run() {
  pthread_setname_np(pthread_self(), "device");
  MutexLock lock(mutex_);
  while (!stop_) {
    kicked_ = false;
    Deadline wake_at = Deadline::max();
    const bool computed = AdvanceComputing(wake_at);
    const bool moved = AdvanceStreams(nullptr, wake_at);
    if (computed || moved || kicked_ || stop_) continue;
    if (wake_at == Deadline::max()) {
      changed_.Wait(mutex_);
    } else {
      changed_.WaitUntil(mutex_, wake_at);
    }
  }
}

bool Device::AdvanceComputing(Deadline& wake_at) {
  if (computing_.empty()) return false;
  const Computing& first = computing_.front();
  if (computes_until_ == Deadline{}) computes_until_ = After(first.duration);
  if (Clock::now() < computes_until_) {
    wake_at = std::min(wake_at, computes_until_);
    return false;
  }
  first.end->Finish(absl::OkStatus());
  computing_.pop_front();
  computes_until_ = Deadline{};
  ++computes_done_;
  return true;
}

bool Device::AdvanceStreams(const void* owner, Deadline& wake_at) {
  bool moved = false;
  // Streams may come and go while the lock is not held.
  auto at = owner == nullptr ? streams_.begin() : streams_.lower_bound({owner, 0});
  while (at != streams_.end() && (owner == nullptr || at->first.owner == owner)) {
    const StreamId id = at->first;
    moved = AdvanceStream(id, wake_at) || moved;
    at = streams_.upper_bound(id);
  }
  return moved;
}

bool Device::AdvanceStream(const StreamId& id, Deadline& wake_at) {
  std::deque<Kernel>& stream = streams_.find(id)->second;
  Kernel& kernel = stream.front();
  if (kernel.is_advancing) {
    passed_over_ = true;
    return false;
  }
  Orders orders;
  if (flush_stalls_until_ != Deadline{}) {
    orders.flush = Clock::now() >= flush_stalls_until_;
    if (!orders.flush) wake_at = std::min(wake_at, flush_stalls_until_);
  }
  orders.start = kernel.is_started || kernel.operation->computes_before <= computes_done_;
  if (orders.start && !kernel.is_started && !kernel.operation->flows.empty() &&
      hang_next_ > absl::ZeroDuration()) {
    kernel.hangs_until = After(std::exchange(hang_next_, absl::ZeroDuration()));
  }
  if (kernel.hangs_until != Deadline{}) {
    orders.hang = Clock::now() < kernel.hangs_until;
    if (orders.hang) wake_at = std::min(wake_at, kernel.hangs_until);
  }
  kernel.is_advancing = true;
  mutex_.Unlock();
  bool moved = false;
  const bool over = Advance(kernel, orders, moved);
  mutex_.Lock();
  kernel.is_advancing = false;
  if (over) stream.pop_front();
  if (stream.empty()) streams_.erase(id);
  if (dropping_ > 0) changed_.SignalAll();
  return moved || over;
}

bool Device::Advance(Kernel& kernel, const Orders& orders, bool& moved) {
  Operation& operation = *kernel.operation;
  if (orders.start && !kernel.is_started) {
    kernel.is_started = true;
    operation.kernel_started_ns.store(Nanoseconds(Clock::now()), kRelease);
    if (operation.tells_kernels) kernel.proxy->Signal();
    moved = true;
  }
  while (AdvanceFlows(kernel, orders)) moved = true;
  if (!kernel.is_started || orders.hang) return false;
  const bool over = std::all_of(
      operation.flows.begin(), operation.flows.end(), [](const std::unique_ptr<Flow>& flow) {
        const std::atomic<uint32_t>& last = flow->is_send ? flow->written : flow->consumed;
        return last.load(kAcquire) == flow->chunk_count();
      });
  if (!over) return false;
  operation.kernel_stopped_ns.store(Nanoseconds(Clock::now()), kRelease);
  kernel.proxy->Signal();
  operation.Finish(absl::OkStatus());
  return true;
}

bool Device::AdvanceFlows(Kernel& kernel, const Orders& orders) {
  bool moved = false;
  for (const std::unique_ptr<Flow>& flow : kernel.operation->flows) {
    const uint32_t limit = orders.hang ? MiddleOf(*flow) : flow->chunk_count();
    if (flow->is_send) {
      if (!kernel.is_started) continue;
      const uint32_t before = flow->produced.load();
      uint32_t produced = before;
      const uint32_t room = flow->completed.load() + kCredits;  // see SendConnection::Complete
      const uint32_t consumed = flow->after == nullptr ? 0 : flow->after->consumed.load();
      while (produced < std::min(limit, room) && flow->chunks[produced].needs <= consumed) {
        ++produced;
      }
      if (produced == before) continue;
      flow->produced.store(produced);
    } else {
      const uint32_t arrived = flow->arrived.load(kAcquire);
      const uint32_t consumed = flow->consumed.load();
      if (orders.flush && flow->flushed.load() < arrived) {
        flow->flushed.store(arrived, kRelease);
      } else if (!kernel.is_started || consumed >= std::min(limit, flow->flushed.load())) {
        continue;
      }
      if (kernel.is_started && consumed < std::min(limit, flow->flushed.load())) {
        const std::byte* const staged = flow->staged[consumed % kCredits];
        const Chunk& chunk = flow->chunks[consumed];
        if (staged != nullptr) CombineBytes(chunk.combine, chunk.into, {staged, chunk.into.size()});
        flow->consumed.store(consumed + 1, kRelease);
      }
    }
    kernel.proxy->Signal();
    moved = true;
  }
  return moved;
}

}  // namespace collectives
