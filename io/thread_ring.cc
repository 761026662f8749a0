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
#include "io/transfer_errors.h"
#include "io/unique_fd.h"

namespace holdfast {
namespace {

// A transfer that makes no progress this often is given up.
constexpr int kRetriesMax = 64;

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

// Calls `transfer(done_bytes)` until `length` bytes are done. It returns what a system call does.
template <typename Transfer>
absl::Status TransferAll(const char* verb, int fd, size_t length, Transfer transfer,
                         size_t& done_bytes) {
  int retries = 0;
  while (done_bytes < length) {
    const ssize_t moved = transfer(done_bytes);
    if (moved > 0) {
      done_bytes += static_cast<size_t>(moved);
      retries = 0;
    } else if (moved == 0) {
      return absl::OkStatus();  // the caller sees that it is short
    } else if ((errno != EINTR && errno != EAGAIN) || ++retries > kRetriesMax) {
      return TransferError(errno, verb, fd);
    }
  }
  return absl::OkStatus();
}

absl::Status WriteAll(const Operation& operation, size_t piece_bytes) {
  const std::span<const std::byte> data = operation.source;
  size_t done_bytes = 0;
  RETURN_IF_ERROR(TransferAll(
      "write", operation.fd, data.size(),
      [&](size_t begin) {
        return pwrite(operation.fd, data.data() + begin, std::min(data.size() - begin, piece_bytes),
                      static_cast<off_t>(operation.offset_bytes + begin));
      },
      done_bytes));
  if (done_bytes == data.size()) return absl::OkStatus();
  return absl::UnavailableError(absl::StrFormat("write %s: the kernel took %d of %d bytes",
                                                PathOfDescriptor(operation.fd), done_bytes,
                                                data.size()));
}

absl::Status ReadAll(const Operation& operation, size_t piece_bytes) {
  const std::span<std::byte> data = operation.target;
  size_t done_bytes = 0;
  absl::Status truncated;
  RETURN_IF_ERROR(TransferAll(
      "read", operation.fd, data.size(),
      [&](size_t begin) -> ssize_t {
        // A direct read behind the end of the file would be refused as unaligned: look first.
        if (begin > 0) {
          truncated = CheckNotTruncated(operation.fd, {operation.offset_bytes, data.size(), begin});
          if (!truncated.ok()) return 0;
        }
        return pread(operation.fd, data.data() + begin, std::min(data.size() - begin, piece_bytes),
                     static_cast<off_t>(operation.offset_bytes + begin));
      },
      done_bytes));
  RETURN_IF_ERROR(truncated);
  if (done_bytes == data.size()) return absl::OkStatus();
  RETURN_IF_ERROR(
      CheckNotTruncated(operation.fd, {operation.offset_bytes, data.size(), done_bytes}));
  return absl::UnavailableError(absl::StrFormat("read %s: the kernel gave %d of %d bytes",
                                                PathOfDescriptor(operation.fd), done_bytes,
                                                data.size()));
}

absl::Status Carry(const Operation& operation, size_t piece_bytes) {
  switch (operation.kind) {
    case Operation::Kind::kWrite:
      return WriteAll(operation, piece_bytes);
    case Operation::Kind::kRead:
      return ReadAll(operation, piece_bytes);
    case Operation::Kind::kSync:
      if (fsync(operation.fd) == 0) return absl::OkStatus();
      return TransferError(errno, "sync", operation.fd);
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
