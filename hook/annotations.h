// Clang's thread-safety attributes under names of our own (hook/ has no Abseil), and a mutex and a
// condition variable that carry them. g++ checks nothing; the clang build does.
#ifndef HOLDFAST_HOOK_ANNOTATIONS_H_
#define HOLDFAST_HOOK_ANNOTATIONS_H_

#include <pthread.h>

#include "hook/deadline.h"

#if defined(__clang__)
#define HOOK_ATTRIBUTE(x) __attribute__((x))
#else
#define HOOK_ATTRIBUTE(x)
#endif

#define HOOK_LOCKABLE HOOK_ATTRIBUTE(capability("mutex"))
#define HOOK_SCOPED_LOCKABLE HOOK_ATTRIBUTE(scoped_lockable)
#define HOOK_GUARDED_BY(x) HOOK_ATTRIBUTE(guarded_by(x))
#define HOOK_REQUIRES(...) HOOK_ATTRIBUTE(requires_capability(__VA_ARGS__))
#define HOOK_EXCLUDES(...) HOOK_ATTRIBUTE(locks_excluded(__VA_ARGS__))
#define HOOK_ACQUIRE(...) HOOK_ATTRIBUTE(acquire_capability(__VA_ARGS__))
#define HOOK_RELEASE(...) HOOK_ATTRIBUTE(release_capability(__VA_ARGS__))

namespace holdfast::hook {

class HOOK_LOCKABLE Mutex {
 public:
  Mutex() = default;
  Mutex(const Mutex&) = delete;
  Mutex& operator=(const Mutex&) = delete;
  void Lock() HOOK_ACQUIRE() { pthread_mutex_lock(&mutex_); }
  void Unlock() HOOK_RELEASE() { pthread_mutex_unlock(&mutex_); }

 private:
  friend class CondVar;
  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
};

class HOOK_SCOPED_LOCKABLE MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) HOOK_ACQUIRE(mutex) : mutex_(mutex) { mutex_.Lock(); }
  ~MutexLock() HOOK_RELEASE() { mutex_.Unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex& mutex_;
};

// Wait may return without a Signal: always wait in a loop on the condition.
class CondVar {
 public:
  CondVar() = default;
  CondVar(const CondVar&) = delete;
  CondVar& operator=(const CondVar&) = delete;
  void Wait(Mutex& mutex, Deadline deadline) HOOK_REQUIRES(mutex) {
    const timespec at = ToTimespec(deadline.at_ns());
    pthread_cond_clockwait(&condition_, &mutex.mutex_, CLOCK_MONOTONIC, &at);
  }
  void SignalAll() { pthread_cond_broadcast(&condition_); }

 private:
  pthread_cond_t condition_ = PTHREAD_COND_INITIALIZER;
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_ANNOTATIONS_H_
