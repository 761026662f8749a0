// The two places where work may run, as interfaces, so that the agent is driven by one thread in a
// simulation: the event loop of the worker, and a pool for what would block the loop.
#ifndef HOLDFAST_BASE_EXECUTOR_H_
#define HOLDFAST_BASE_EXECUTOR_H_

#include <cstdint>
#include <functional>

#include "absl/time/time.h"

namespace holdfast {

// Runs functions one after another on one thread, the loop's.
//
// Threads: Post() from any thread; everything else on the loop's thread.
// Lifetime: functions that have not run when the loop is destroyed are destroyed without running.
class EventLoop {
 public:
  using TimerId = uint64_t;
  enum class FdEvents : uint32_t { kReadable = 1, kWritable = 2, kReadableOrWritable = 3 };

  virtual ~EventLoop() = default;

  // Runs `work` on the loop's thread, after everything posted before it.
  virtual void Post(std::function<void()> work) = 0;

  // Runs `work` once, not before `delay` has passed. The id is never reused.
  virtual TimerId RunAfter(absl::Duration delay, std::function<void()> work) = 0;
  // After this `work` does not run. An id that has run or is unknown is ignored.
  virtual void CancelTimer(TimerId id) = 0;

  // Calls `ready` whenever `fd` is ready (level-triggered, hang-up and error count as readable),
  // until Unwatch. One watch per descriptor; watching it again replaces the former.
  virtual void Watch(int fd, FdEvents events, std::function<void()> ready) = 0;
  // After this the watch's function is not called. Must come before close(fd).
  virtual void Unwatch(int fd) = 0;
};

// Runs work that computes or blocks: checksums, copies, synchronous file calls, parsing.
//
// Threads: any.
// Lifetime: the destructor waits for work that has begun; work that has not is dropped with its
//   `done`.
class WorkPool {
 public:
  virtual ~WorkPool() = default;
  // Runs `work` on a thread of the pool, then `done` on the event loop that the pool was made with.
  virtual void Run(std::function<void()> work, std::function<void()> done) = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_BASE_EXECUTOR_H_
