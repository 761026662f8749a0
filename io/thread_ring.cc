#include "io/thread_ring.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <deque>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/mutex.h"
#include "base/status_macros.h"
#include "io/errno_status.h"
#include "io/transfer.h"
#include "io/unique_fd.h"

namespace holdfast {
namespace {

struct Operation {
  enum class Kind { kWrite, kRead, kSync };
  Kind kind = Kind::kSync;
  int fd = -1;
  uint64_t offset_bytes = 0;
  std::span<const std::byte> source = {};
  std::span<std::byte> target = {};
  IoRing::Done done = {};
  absl::Status status = {};
};

absl::Status Carry(const Operation& operation, size_t piece_bytes) {
  switch (operation.kind) {
    case Operation::Kind::kWrite:
      return WriteAll(operation.fd, operation.offset_bytes, operation.source, piece_bytes);
    case Operation::Kind::kRead:
      return ReadAll(operation.fd, operation.offset_bytes, operation.target, piece_bytes);
    case Operation::Kind::kSync:
      return SyncAll(operation.fd);
  }
  CHECK(false);
}

class ThreadRing final : public IoRing {
 public:
  ThreadRing(UniqueFd event_fd, const ThreadRingOptions& options)
      : event_fd_(std::move(event_fd)), piece_bytes_(options.piece_bytes), reason_(options.reason) {
    CHECK(piece_bytes_ > 0);
  }

  ~ThreadRing() override {
    std::deque<Operation> dropped;  // nobody is told of them any more
    {
      MutexLock lock(mutex_);
      dropped.swap(waiting_);
      stopping_ = true;
    }
    changed_.SignalAll();
    dropped.clear();  // without the lock: what they hold may call anything
    for (std::thread& thread : threads_) thread.join();
  }

  absl::Status Start(int thread_count) {
    CHECK(thread_count >= 1 && thread_count <= 64);
    for (int i = 0; i < thread_count; ++i) {
      try {
        threads_.emplace_back([this] { RunThread(); });
      } catch (const std::system_error& error) {
        return absl::ResourceExhaustedError(
            absl::StrFormat("start I/O thread %d of %d: %s", i + 1, thread_count, error.what()));
      }
    }
    return absl::OkStatus();
  }

  void Write(IoFile& file, uint64_t offset_bytes, std::span<const std::byte> data,
             Done done) override {
    Submit({.kind = Operation::Kind::kWrite,
            .fd = file.handle(),
            .offset_bytes = offset_bytes,
            .source = data,
            .done = std::move(done)});
  }
  void Read(IoFile& file, uint64_t offset_bytes, std::span<std::byte> data, Done done) override {
    Submit({.kind = Operation::Kind::kRead,
            .fd = file.handle(),
            .offset_bytes = offset_bytes,
            .target = data,
            .done = std::move(done)});
  }
  void Sync(IoFile& file, Done done) override {
    Submit({.kind = Operation::Kind::kSync, .fd = file.handle(), .done = std::move(done)});
  }

  bool RegisterMemory(std::span<std::byte> /*memory*/) override { return false; }
  void UnregisterMemory(std::span<std::byte> /*memory*/) override {}
  int event_fd() const override { return event_fd_.get(); }

  void RunCompletions() override {
    uint64_t count;
    // Emptied before the list is taken: what is added later makes it readable again. Fails if it
    // was not readable, which is fine.
    if (read(event_fd_.get(), &count, sizeof(count)) < 0) CHECK(errno == EAGAIN || errno == EINTR);
    std::vector<Operation> finished;
    {
      MutexLock lock(mutex_);
      finished.swap(finished_);
    }
    for (Operation& operation : finished) {
      --in_flight_count_;
      // Moved out, so that what it holds is released before the next one runs.
      const Done done = std::move(operation.done);
      done(std::move(operation.status));
    }
  }

  size_t in_flight_count() const override { return in_flight_count_; }

  std::string Describe() const override {
    return reason_.empty() ? absl::StrFormat("%d threads", threads_.size())
                           : absl::StrFormat("%d threads (%s)", threads_.size(), reason_);
  }

 private:
  void Submit(Operation operation) {
    ++in_flight_count_;
    {
      MutexLock lock(mutex_);
      waiting_.push_back(std::move(operation));
    }
    changed_.Signal();
  }

  void RunThread() {
    while (true) {
      Operation operation;
      {
        MutexLock lock(mutex_);
        while (waiting_.empty() && !stopping_) changed_.Wait(mutex_);
        if (stopping_) return;
        operation = std::move(waiting_.front());
        waiting_.pop_front();
      }
      operation.status = Carry(operation, piece_bytes_);
      {
        MutexLock lock(mutex_);
        finished_.push_back(std::move(operation));
      }
      const uint64_t one = 1;
      CHECK(write(event_fd_.get(), &one, sizeof(one)) == sizeof(one));
    }
  }

  const UniqueFd event_fd_;
  const size_t piece_bytes_;
  const std::string reason_;
  std::vector<std::thread> threads_;
  size_t in_flight_count_ = 0;  // the loop's thread only

  Mutex mutex_;
  CondVar changed_;
  std::deque<Operation> waiting_ ABSL_GUARDED_BY(mutex_);
  std::vector<Operation> finished_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace

absl::StatusOr<std::unique_ptr<IoRing>> NewThreadRing(const ThreadRingOptions& options) {
  UniqueFd event_fd(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!event_fd) return ErrnoStatus(errno, "create", "eventfd of the I/O threads");
  auto ring = std::make_unique<ThreadRing>(std::move(event_fd), options);
  RETURN_IF_ERROR(ring->Start(options.thread_count));
  return ring;
}

}  // namespace holdfast
