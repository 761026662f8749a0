#include "hook/os.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <climits>
#include <cstring>

namespace holdfast::hook {

Result<Mapping> Mapping::Map(int fd, uint64_t bytes, Access access, const char* what) {
  Mapping mapping;
  if (bytes == 0) return mapping;
  struct stat file;
  if (fstat(fd, &file) != 0) {
    return Error(HF_INTERNAL, "fstat of the %s: %s", what, strerror(errno));
  }
  if (static_cast<uint64_t>(file.st_size) < bytes) {
    return Error(HF_INTERNAL, "the %s from the agent: expected %llu bytes, found %llu", what,
                 static_cast<unsigned long long>(bytes),
                 static_cast<unsigned long long>(file.st_size));
  }
  const int protection = access == Access::kRead ? PROT_READ : PROT_READ | PROT_WRITE;
  void* data = mmap(nullptr, bytes, protection, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) {
    return Error(HF_RESOURCE_EXHAUSTED, "mmap of the %s (%llu bytes): %s", what,
                 static_cast<unsigned long long>(bytes), strerror(errno));
  }
  mapping.data_ = static_cast<std::byte*>(data);
  mapping.bytes_ = bytes;
  if (madvise(data, bytes, MADV_DONTFORK) != 0) {
    return Error(HF_INTERNAL, "madvise(MADV_DONTFORK) of the %s: %s", what, strerror(errno));
  }
  // Where the system allows it (shmem_enabled): one entry per 2 MiB. Dropped: it is a wish.
  madvise(data, bytes, MADV_HUGEPAGE);
  return mapping;
}

Mapping::~Mapping() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

void MapPages(const std::byte* data, uint64_t bytes, Mapping::Access access) {
#ifdef MADV_POPULATE_WRITE
  const uint64_t page_bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / page_bytes * page_bytes;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + bytes;
  void* const first = reinterpret_cast<void*>(begin);
  madvise(first, end - begin,
          access == Mapping::Access::kRead ? MADV_POPULATE_READ : MADV_POPULATE_WRITE);
#else
  (void)data, (void)bytes, (void)access;
#endif
}

Result<UniqueFd> MakeSealedMemory(const char* name, std::span<const std::byte> contents) {
  UniqueFd fd(memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid()) return Error(HF_RESOURCE_EXHAUSTED, "memfd_create: %s", strerror(errno));
  size_t done = 0;
  while (done < contents.size()) {
    const ssize_t written = write(fd.get(), contents.data() + done, contents.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) {
      return Error(HF_RESOURCE_EXHAUSTED, "writing %zu bytes to a memfd: %s", contents.size(),
                   strerror(errno));
    }
    done += static_cast<size_t>(written);
  }
  constexpr int kSeals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;
  if (fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) {
    return Error(HF_INTERNAL, "sealing a memfd: %s", strerror(errno));
  }
  return fd;
}

Result<UniqueFd> MakeEventFd() {
  UniqueFd fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!fd.valid()) return Error(HF_RESOURCE_EXHAUSTED, "eventfd: %s", strerror(errno));
  return fd;
}

void RingEventFd(int fd) {
  const uint64_t one = 1;
  // EAGAIN is the full counter; nothing else can fail here.
  [[maybe_unused]] const ssize_t written = write(fd, &one, sizeof(one));
}

void DrainEventFd(int fd) {
  uint64_t count = 0;
  // EAGAIN: it was empty already.
  [[maybe_unused]] const ssize_t got = read(fd, &count, sizeof(count));
}

void FutexWait(std::atomic<uint32_t>& word, uint32_t expected, Deadline deadline,
               FutexScope scope) {
  const timespec at = ToTimespec(deadline.at_ns());
  const int operation =
      FUTEX_WAIT_BITSET | (scope == FutexScope::kPrivate ? FUTEX_PRIVATE_FLAG : 0);
  // The timeout of FUTEX_WAIT_BITSET is absolute, on CLOCK_MONOTONIC.
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, expected,
          deadline.never() ? nullptr : &at, nullptr, FUTEX_BITSET_MATCH_ANY);
}

void FutexWakeAll(std::atomic<uint32_t>& word, FutexScope scope) {
  const int operation = FUTEX_WAKE | (scope == FutexScope::kPrivate ? FUTEX_PRIVATE_FLAG : 0);
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, INT_MAX, nullptr, nullptr, 0);
}

Error Thread::Start(const char* name, void (*run)(void*), void* argument) {
  run_ = run;
  argument_ = argument;
  sigset_t all;
  sigset_t previous;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &previous);
  const int failed = pthread_create(&thread_, nullptr, &Thread::Main, this);
  pthread_sigmask(SIG_SETMASK, &previous, nullptr);
  if (failed != 0) {
    return Error(HF_RESOURCE_EXHAUSTED, "starting thread %s: %s", name, strerror(failed));
  }
  started_ = true;
  pthread_setname_np(thread_, name);
  return Error();
}

void Thread::Join() {
  if (!started_) return;
  pthread_join(thread_, nullptr);
  started_ = false;
}

void* Thread::Main(void* self) {
  Thread* thread = static_cast<Thread*>(self);
  // Of this thread. Refused only by a security policy: then it is scheduled like the others.
  const sched_param no_priority = {};
  sched_setscheduler(0, SCHED_BATCH, &no_priority);
  thread->run_(thread->argument_);
  return nullptr;
}

}  // namespace holdfast::hook
