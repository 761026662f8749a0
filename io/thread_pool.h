// WorkPool on threads of its own.
#ifndef HOLDFAST_IO_THREAD_POOL_H_
#define HOLDFAST_IO_THREAD_POOL_H_

#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "base/executor.h"
#include "base/mutex.h"

namespace holdfast {

// Work begins in the order of Run(). The queue has no limit: callers keep to their own.
//
// Lifetime: `loop` outlives it. A `done` whose work had begun is still posted by the destructor.
class ThreadPool final : public WorkPool {
 public:
  // Starts `thread_count` (1 to 256) threads. Errors: kResourceExhausted.
  static absl::StatusOr<std::unique_ptr<ThreadPool>> Create(EventLoop& loop, int thread_count);
  ~ThreadPool() override;

  // `done` may be empty.
  void Run(std::function<void()> work, std::function<void()> done) override;

 private:
  struct Job {
    std::function<void()> work;
    std::function<void()> done;
  };

  explicit ThreadPool(EventLoop& loop) : loop_(loop) {}
  void RunThread();

  EventLoop& loop_;
  std::vector<std::thread> threads_;
  Mutex mutex_;
  CondVar changed_;
  std::deque<Job> jobs_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace holdfast

#endif  // HOLDFAST_IO_THREAD_POOL_H_
