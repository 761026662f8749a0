// What the rest of hook/ needs of Linux: descriptors, sealed memfds, mappings, futexes, threads.
// Sockets are in socket.h, processes in private_agent.h.
#ifndef HOLDFAST_HOOK_OS_H_
#define HOLDFAST_HOOK_OS_H_

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "hook/deadline.h"
#include "hook/error.h"

namespace holdfast::hook {

// Owns a file descriptor, or none (-1).
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) Reset(std::exchange(other.fd_, -1));
    return *this;
  }
  ~UniqueFd() { Reset(-1); }
  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  void Reset(int fd) {
    if (fd_ >= 0) close(fd_);
    fd_ = fd;
  }

 private:
  int fd_ = -1;
};

// Memory mapped shared, not inherited by forked children (MADV_DONTFORK).
class Mapping {
 public:
  enum class Access { kRead, kReadWrite };

  // Maps the first `bytes` of `fd`; 0 bytes give an empty mapping. Fails with HF_INTERNAL if the
  // file is shorter, because touching a page behind its end would kill the process. `what` is for
  // the error's text.
  static Result<Mapping> Map(int fd, uint64_t bytes, Access access, const char* what);

  Mapping() = default;
  Mapping(Mapping&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Mapping();

  std::byte* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
};

// Maps pages of a Mapping ahead, for this access; the first and the last one may lie in it partly.
// Best effort (Linux 5.14): without it they are mapped when they are first touched, which costs
// more.
void MapPages(const std::byte* data, uint64_t bytes, Mapping::Access access);

// A memfd with these contents, sealed against every change.
Result<UniqueFd> MakeSealedMemory(const char* name, std::span<const std::byte> contents);

// An eventfd, close-on-exec, that never blocks.
Result<UniqueFd> MakeEventFd();
// Adds 1. A full counter is as good: whoever listens has not looked yet.
void RingEventFd(int fd);
void DrainEventFd(int fd);

enum class FutexScope { kPrivate, kShared };

// Sleeps until woken, unless `*word` is not `expected`, at most until the deadline. May return
// early without a reason: always wait in a loop on the condition.
void FutexWait(std::atomic<uint32_t>& word, uint32_t expected, Deadline deadline, FutexScope scope);
void FutexWakeAll(std::atomic<uint32_t>& word, FutexScope scope);

// A thread in which every signal is blocked: the trainer's handlers are not run on our stacks. It
// is of the batch class: waking it never takes the core from the one who wakes it, which in hf_save
// is the training loop. Destroy it only after Join, or unstarted.
class Thread {
 public:
  Thread() = default;
  Thread(const Thread&) = delete;
  Thread& operator=(const Thread&) = delete;

  // `name` is at most 15 bytes. Errors: HF_RESOURCE_EXHAUSTED.
  Error Start(const char* name, void (*run)(void*), void* argument);
  void Join();

 private:
  static void* Main(void* self);

  pthread_t thread_ = {};
  bool started_ = false;
  void (*run_)(void*) = nullptr;
  void* argument_ = nullptr;
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_OS_H_
