#include "io/thread_pool.h"

#include <system_error>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/check.h"

namespace holdfast {

absl::StatusOr<std::unique_ptr<ThreadPool>> ThreadPool::Create(EventLoop& loop, int thread_count) {
  CHECK(thread_count >= 1 && thread_count <= 256);
  auto pool = std::unique_ptr<ThreadPool>(new ThreadPool(loop));
  for (int i = 0; i < thread_count; ++i) {
    try {
      pool->threads_.emplace_back([raw = pool.get()] { raw->RunThread(); });
    } catch (const std::system_error& error) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("start thread %d of %d: %s", i + 1, thread_count, error.what()));
    }
  }
  return pool;
}

ThreadPool::~ThreadPool() {
  std::deque<Job> dropped;
  {
    MutexLock lock(mutex_);
    dropped.swap(jobs_);
    stopping_ = true;
  }
  changed_.SignalAll();
  dropped.clear();  // without the lock: what they hold may call anything
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::Run(std::function<void()> work, std::function<void()> done) {
  {
    MutexLock lock(mutex_);
    jobs_.push_back({std::move(work), std::move(done)});
  }
  changed_.Signal();
}

void ThreadPool::RunThread() {
  while (true) {
    Job job;
    {
      MutexLock lock(mutex_);
      while (jobs_.empty() && !stopping_) changed_.Wait(mutex_);
      if (stopping_) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    job.work();
    job.work = nullptr;  // what it holds is released before anybody hears that it is done
    if (job.done) loop_.Post(std::move(job.done));
  }
}

}  // namespace holdfast
