#include "tests/support/sim_executor.h"

#include <algorithm>
#include <iterator>

#include "base/check.h"

namespace holdfast {

uint64_t SimExecutor::Random() {  // splitmix64
  uint64_t z = (random_ += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

void SimExecutor::Post(std::function<void()> work) { posted_.push_back(std::move(work)); }

EventLoop::TimerId SimExecutor::RunAfter(absl::Duration delay, std::function<void()> work) {
  const TimerId id = next_timer_id_++;
  const absl::Duration due = now_ + std::max(delay, absl::ZeroDuration());
  timers_.emplace(std::make_pair(due, id), std::move(work));
  timer_due_.emplace(id, due);
  return id;
}

void SimExecutor::CancelTimer(TimerId id) {
  const auto due = timer_due_.find(id);
  if (due == timer_due_.end()) return;
  timers_.erase({due->second, id});
  timer_due_.erase(due);
}

void SimExecutor::Watch(int fd, FdEvents /*events*/, std::function<void()> ready) {
  CHECK(fd >= 0);
  watches_[fd] = std::move(ready);
}

void SimExecutor::Unwatch(int fd) { watches_.erase(fd); }

void SimExecutor::MarkReady(int fd) {
  Post([this, fd] {
    const auto watch = watches_.find(fd);
    if (watch == watches_.end()) return;                // unwatched meanwhile
    const std::function<void()> ready = watch->second;  // it may unwatch itself
    ready();
  });
}

void SimExecutor::Run(std::function<void()> work, std::function<void()> done) {
  pool_.push_back({std::move(work), std::move(done)});
}

void SimExecutor::HoldNewestPoolWork() {
  CHECK(!pool_.empty());
  held_.push_back(std::move(pool_.back()));
  pool_.pop_back();
}

void SimExecutor::ReleasePoolWork() {
  for (PoolWork& work : held_) pool_.push_back(std::move(work));
  held_.clear();
}

absl::Time SimExecutor::WallTime() const {
  return absl::UnixEpoch() + absl::Seconds(999'999'000) + now_;
}

void SimExecutor::StopDriving(IoRing& ring) {
  rings_.erase(std::remove(rings_.begin(), rings_.end(), &ring), rings_.end());
}

bool SimExecutor::RunDueTimer() {
  if (timers_.empty() || timers_.begin()->first.first > now_) return false;
  auto timer = timers_.extract(timers_.begin());
  timer_due_.erase(timer.key().second);
  timer.mapped()();
  return true;
}

bool SimExecutor::RunPosted() {
  if (posted_.empty()) return false;
  const std::function<void()> work = std::move(posted_.front());
  posted_.pop_front();
  work();
  return true;
}

bool SimExecutor::RunPoolWork() {
  if (pool_.empty()) return false;
  const size_t index = seed_ == 0 ? 0 : Random() % pool_.size();
  PoolWork work = std::move(pool_[index]);
  pool_.erase(pool_.begin() + static_cast<std::ptrdiff_t>(index));
  work.work();
  Post(std::move(work.done));
  return true;
}

bool SimExecutor::RunRing() {
  std::vector<IoRing*> busy;
  std::copy_if(rings_.begin(), rings_.end(), std::back_inserter(busy),
               [](IoRing* ring) { return ring->in_flight_count() > 0; });
  if (busy.empty()) return false;
  busy[seed_ == 0 ? 0 : Random() % busy.size()]->RunCompletions();
  return true;
}

bool SimExecutor::RunOne() {
  using Step = bool (SimExecutor::*)();
  constexpr Step kSteps[] = {&SimExecutor::RunPosted, &SimExecutor::RunDueTimer,
                             &SimExecutor::RunPoolWork, &SimExecutor::RunRing};
  constexpr size_t kStepCount = std::size(kSteps);
  const size_t first = seed_ == 0 ? 0 : Random() % kStepCount;
  for (size_t i = 0; i < kStepCount; ++i) {
    if ((this->*kSteps[(first + i) % kStepCount])()) return true;
  }
  return false;
}

size_t SimExecutor::RunUntilIdle(size_t steps_max) {
  size_t steps = 0;
  while (RunOne()) CHECK(++steps < steps_max);
  return steps;
}

void SimExecutor::AdvanceTime(absl::Duration duration) {
  CHECK(duration >= absl::ZeroDuration());
  const absl::Duration end = now_ + duration;
  RunUntilIdle();
  while (!timers_.empty() && timers_.begin()->first.first <= end) {
    now_ = timers_.begin()->first.first;
    RunUntilIdle();
  }
  now_ = end;
}

std::optional<absl::Duration> SimExecutor::next_timer_due() const {
  if (timers_.empty()) return std::nullopt;
  return timers_.begin()->first.first;
}

}  // namespace holdfast
