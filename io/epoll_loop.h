// The event loop of the agent's worker: epoll for descriptors, an eventfd for what is posted, the
// injected clock for timers.
#ifndef HOLDFAST_IO_EPOLL_LOOP_H_
#define HOLDFAST_IO_EPOLL_LOOP_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <unordered_map>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "base/executor.h"
#include "base/mutex.h"
#include "io/unique_fd.h"

namespace holdfast {

// Order within one round: ready descriptors (at most 64), then due timers, then what had been
// posted when the round reached it. So nothing starves, whatever posts or is ready again at once.
//
// Threads: Post() and Stop() from any; Run() by one thread, the loop's; the rest on it, or before
//   Run().
// Lifetime: destroyed when Run() has returned and no other thread can Post(). `clock` outlives it.
class EpollLoop final : public EventLoop {
 public:
  // Errors: kResourceExhausted (descriptors).
  static absl::StatusOr<std::unique_ptr<EpollLoop>> Create(const Clock& clock);
  ~EpollLoop() override;

  // Runs until Stop(). May be called again afterwards.
  void Run();
  // Makes Run() return after the function that is running, or at once when it is called next.
  void Stop();

  void Post(std::function<void()> work) override;
  TimerId RunAfter(absl::Duration delay, std::function<void()> work) override;
  void CancelTimer(TimerId id) override;
  void Watch(int fd, FdEvents events, std::function<void()> ready) override;
  void Unwatch(int fd) override;

 private:
  struct WatchedFd {
    int fd = -1;
    // Shared, so that a function that unwatches its own descriptor is not destroyed while it runs.
    std::shared_ptr<std::function<void()>> ready;
  };

  EpollLoop(const Clock& clock, UniqueFd epoll_fd, UniqueFd wake_fd);
  void Wake();
  int WaitMilliseconds();
  void RunReady(int wait_milliseconds);
  void RunTimers();
  void RunPosted();

  const Clock& clock_;
  const UniqueFd epoll_fd_;
  const UniqueFd wake_fd_;
  std::atomic<bool> stopped_ = false;

  // The loop's thread only. Epoll reports the number of a watch, never reused, so that an event of
  // a watch that is gone is known as such even if the descriptor's number has a new owner.
  uint64_t next_watch_ = 1;
  std::unordered_map<uint64_t, WatchedFd> watches_;
  std::unordered_map<int, uint64_t> watch_of_fd_;
  TimerId next_timer_id_ = 1;
  std::map<std::pair<absl::Duration, TimerId>, std::function<void()>> timers_;
  std::unordered_map<TimerId, absl::Duration> timer_due_;

  Mutex mutex_;
  std::deque<std::function<void()>> posted_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace holdfast

#endif  // HOLDFAST_IO_EPOLL_LOOP_H_
