// A rank's device: a thread that stands in for a GPU.
//
// The program enqueues work and goes on; the device comes to it later. It has two kinds of work:
// computing, which is a duration (waited, not spun: the ranks of a test share few cores), one after
// the other; and the kernels of operations, which consume received chunks and produce those to be
// sent. Operations are in streams: those of one stream run one after the other, those of different
// streams side by side, all after the computing that was enqueued before them.
//
// The work is done by the device's thread; a proxy does it in its place where that is free and the
// work is little. So nothing depends on who does it: a kernel that stands still stands still.
//
// What the proxy receives lies in its own memory, or on its way, until the device has flushed it:
// the device does that also for operations that it has not come to.
//
// Faults are made here because they cannot be made from outside: a device that stands still is no
// process that stands still.
#ifndef HOLDFAST_EXAMPLES_COLLECTIVES_DEVICE_H_
#define HOLDFAST_EXAMPLES_COLLECTIVES_DEVICE_H_

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "examples/collectives/collectives.h"
#include "examples/collectives/mutex.h"
#include "examples/collectives/operation.h"

namespace collectives {

// Threads: any.
// Lifetime: outlives all users; DropStreams() must have been called for all streams.
class Device {
 public:
  // (communicator, number of the stream in it).
  struct StreamId {
    const void* owner = nullptr;
    uint32_t number = 0;
    auto operator<=>(const StreamId&) const = default;
  };

  static std::unique_ptr<Device> Start();
  ~Device();

  // Ends when the device has computed so long, behind all computing before it.
  Handle Compute(absl::Duration duration);
  // The operation's kernel, which begins with the next Kick() or Drive(). `proxy` is signalled with
  // every progress; it must live until the owner's streams are dropped. `operation` finishes with
  // OK here.
  void Submit(const StreamId& stream, std::shared_ptr<Operation> operation, const WakeEvent* proxy);
  // Flows of the owner's operations have gone on.
  void Kick();
  // The same, and as long as the device's thread is not at them the caller does the device's work:
  // for little work a hand-over would cost more.
  void Drive(const void* owner);
  // Forgets what is in the owner's streams. Afterwards the device touches none of it.
  void DropStreams(const void* owner);

  // Faults.
  // The next operation to begin stands still in its middle for so long.
  void HangNextOperation(absl::Duration duration);
  // For so long nothing is flushed.
  void StallFlush(absl::Duration duration);
  // Ends these, and the computing that it is at, however long they were to take.
  void GoOn();

 private:
  struct Computing {
    std::shared_ptr<Operation> end;
    absl::Duration duration;
  };
  struct Kernel {
    std::shared_ptr<Operation> operation;
    const WakeEvent* proxy = nullptr;
    bool is_started = false;
    bool is_advancing = false;  // by a thread without the lock
    Deadline hangs_until{};     // in its middle
  };
  // What a kernel may do.
  struct Orders {
    bool start = false;
    bool flush = true;
    bool hang = false;
  };

  Device() = default;
  void Run();
  // True if one has ended.
  bool AdvanceComputing(Deadline& wake_at) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // All of `owner`, or of everybody.
  bool AdvanceStreams(const void* owner, Deadline& wake_at) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool AdvanceStream(const StreamId& id, Deadline& wake_at) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Without the lock. True once the operation is over. `moved`: anything happened.
  static bool Advance(Kernel& kernel, const Orders& orders, bool& moved);
  static bool AdvanceFlows(Kernel& kernel, const Orders& orders);

  mutable Mutex mutex_;
  CondVar changed_;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  bool kicked_ ABSL_GUARDED_BY(mutex_) = false;
  Deadline flush_stalls_until_ ABSL_GUARDED_BY(mutex_){};
  absl::Duration hang_next_ ABSL_GUARDED_BY(mutex_) = absl::ZeroDuration();
  std::deque<Computing> computing_ ABSL_GUARDED_BY(mutex_);
  Deadline computes_until_ ABSL_GUARDED_BY(mutex_){};  // the first; zero: not begun
  uint64_t computes_enqueued_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t computes_done_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<StreamId, std::deque<Kernel>> streams_ ABSL_GUARDED_BY(mutex_);  // none is empty
  bool passed_over_ ABSL_GUARDED_BY(mutex_) = false;  // a stream that another thread was at
  int dropping_ ABSL_GUARDED_BY(mutex_) = 0;          // threads in DropStreams()

  std::thread thread_;
};

}  // namespace collectives

#endif  // HOLDFAST_EXAMPLES_COLLECTIVES_DEVICE_H_
