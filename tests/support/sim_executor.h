// Event loop, work pool and clock as one deterministic object: a test drives the whole agent from
// its own thread, and time passes only when the test says so.
//
// Model: what is posted runs in order. Work of the pool runs whole, at any later moment, in any
//   order; its `done` is posted when it has run. A driven ring (SimDisk) completes operations at
//   any moment. "Any" is the choice of the seed: the same seed gives the same run; seed 0 is the
//   plain order (posted, then pool in order, then rings). Timers run once their time has come, in
//   the order of their times, then of their ids.
// Not modelled: two pieces of work running at the same instant; time that passes while work runs.
#ifndef HOLDFAST_TESTS_SUPPORT_SIM_EXECUTOR_H_
#define HOLDFAST_TESTS_SUPPORT_SIM_EXECUTOR_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "base/clock.h"
#include "base/executor.h"
#include "io/io_ring.h"

namespace holdfast {

// Threads: one.
// Lifetime: driven rings outlive it or are taken off with StopDriving(). What has not run is
//   destroyed without running.
class SimExecutor final : public EventLoop, public WorkPool, public Clock {
 public:
  explicit SimExecutor(uint64_t seed = 0) : random_(seed), seed_(seed) {}

  // EventLoop
  void Post(std::function<void()> work) override;
  TimerId RunAfter(absl::Duration delay, std::function<void()> work) override;
  void CancelTimer(TimerId id) override;
  void Watch(int fd, FdEvents events, std::function<void()> ready) override;
  void Unwatch(int fd) override;

  // WorkPool
  void Run(std::function<void()> work, std::function<void()> done) override;

  // Clock. Begins at 1000 s, wall time 2001-09-09 01:46:40 UTC.
  absl::Duration Elapsed() const override { return now_; }
  absl::Time WallTime() const override;

  // From now on RunUntilIdle also runs the completions of `ring`.
  void Drive(IoRing& ring) { rings_.push_back(&ring); }
  void StopDriving(IoRing& ring);

  // One piece of what can run now: a posted function, a due timer, a piece of pool work, or the
  // completions of a ring. False if there was nothing.
  bool RunOne();

  // Until nothing can run without time passing or a descriptor becoming ready. Returns how many
  // pieces ran; CHECKs that they are fewer than `steps_max`, so that a loop that feeds itself is
  // found.
  size_t RunUntilIdle(size_t steps_max = 10'000'000);

  // Lets time pass: stops at every timer on the way, runs it and what follows until idle.
  void AdvanceTime(absl::Duration duration);

  // When the next timer is due, as a value of Elapsed().
  std::optional<absl::Duration> next_timer_due() const;

  // The newest pool work that has not run rests until it is released: a job that takes long.
  void HoldNewestPoolWork();
  void ReleasePoolWork();

  // The watched `fd` is ready once: its function runs in order with what is posted.
  void MarkReady(int fd);
  bool is_watched(int fd) const { return watches_.count(fd) > 0; }

 private:
  struct PoolWork {
    std::function<void()> work;
    std::function<void()> done;
  };
  uint64_t Random();
  bool RunDueTimer();
  bool RunPosted();
  bool RunPoolWork();
  bool RunRing();

  absl::Duration now_ = absl::Seconds(1000);
  uint64_t random_;
  uint64_t seed_;
  std::deque<std::function<void()>> posted_;
  std::deque<PoolWork> pool_;
  std::deque<PoolWork> held_;
  std::vector<IoRing*> rings_;
  std::map<std::pair<absl::Duration, TimerId>, std::function<void()>> timers_;
  std::map<TimerId, absl::Duration> timer_due_;
  TimerId next_timer_id_ = 1;
  std::map<int, std::function<void()>> watches_;
};

}  // namespace holdfast

#endif  // HOLDFAST_TESTS_SUPPORT_SIM_EXECUTOR_H_
