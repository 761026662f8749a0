// The devices whose memory is registered: for each CUDA context one side stream for copies, one
// event that is recorded on the caller's stream at a save, and a store of events for copies.
//
// All copies of ours run on the side stream, which has the lowest priority and does not take part
// in the legacy stream's synchronisation. Order comes from the host: nothing is put onto it before
// the save's event was seen complete. So a save that is cancelled before that has nothing in
// flight, however long the caller's stream hangs.
//
// Nothing here waits in the driver. Whoever waits asks for an event's state now and then (Poll), so
// that deadlines and cancellations hold also for a device that has stopped.
#ifndef HOLDFAST_HOOK_DEVICE_CONTEXTS_H_
#define HOLDFAST_HOOK_DEVICE_CONTEXTS_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "hook/annotations.h"
#include "hook/device_driver.h"
#include "hook/error.h"
#include "hook/source_reader.h"

namespace holdfast::hook {

// Contexts of one process in which tensors may be registered together.
inline constexpr uint32_t kDeviceContextsMax = 16;
// Copies of one context that may be looked at at the same time: those of all copier threads.
inline constexpr uint32_t kDeviceEventsMax = 2048;
// Between two looks at an event.
inline constexpr int64_t kDevicePollNs = 100'000;

inline constexpr int kDeviceSpinLooks = 32;

enum class EventState { kPending, kComplete, kFailed };

// Lets kDevicePollNs pass.
void PauseBetweenLooks();

// `count` runs of `run_bytes`, `stride` apart on the device; one behind the other in host memory.
struct DeviceRuns {
  const void* device = nullptr;
  uint64_t run_bytes = 0;
  uint64_t count = 1;
  uint64_t stride = 0;
};

// Threads: any, at the same time; calls need no current context and leave none.
// Lifetime: as its table's.
class DeviceContext final {
 public:
  // `context`: nullptr for the primary context of the device, which is retained. Errors: the
  // driver's.
  static Result<std::unique_ptr<DeviceContext>> Make(std::shared_ptr<const DeviceDriver> driver,
                                                     CuDevice ordinal, CuContext context);
  // Gives everything back. Copies that are not complete go on (they read or write memory that
  // somebody else owns); the driver waits for them where it must.
  ~DeviceContext();

  const char* name() const { return name_.c_str(); }  // "device 0 (NVIDIA H100)"
  CuContext context() const { return context_; }
  CuDevice ordinal() const { return ordinal_; }
  bool is_primary() const { return is_primary_; }

  // Enqueues a copy on the side stream and returns. `host` is the image or a piece of it. Where it
  // is not registered with the driver the call returns when the copy is done.
  // The copy is cut where allocations end. `known`: the allocation that the caller has met last,
  // for as long as none is freed; it spares asking the driver again.
  Error CopyToHost(std::byte* host, const DeviceRuns& runs, CuAllocation* known) const;
  Error CopyToDevice(const DeviceRuns& runs, const std::byte* host, CuAllocation* known) const;

  // An event recorded behind everything that is on the side stream now. Give it back when it is not
  // kPending, or when nobody will look at it again.
  Result<CuEvent> RecordEvent() HOOK_EXCLUDES(mutex_);
  void ReturnEvent(CuEvent event) HOOK_EXCLUDES(mutex_);
  // kFailed: the context has failed; the driver's reason is in `error`.
  EventState Poll(CuEvent event, Error* error) const;

  // Records the save's event on `stream` of this context; nullptr: its legacy default stream.
  // Errors: HF_FAILED_PRECONDITION: the stream is being captured into a graph.
  Error RecordGate(CuStream stream);
  EventState PollGate(Error* error) const { return Poll(gate_, error); }

  // Waits until the copies enqueued so far are complete. Errors: the driver's.
  Error WaitCopies() {
    Result<CuEvent> event = RecordEvent();
    if (!event.ok()) return event.error();
    Error error;
    EventState state = Poll(event.value(), &error);
    for (int looks = 0; state == EventState::kPending; ++looks) {
      // What is waited for here is mostly small, and there in a few microseconds.
      if (looks >= kDeviceSpinLooks) PauseBetweenLooks();
      state = Poll(event.value(), &error);
    }
    ReturnEvent(event.value());
    return error;
  }

 private:
  DeviceContext(std::shared_ptr<const DeviceDriver> driver, CuDevice ordinal)
      : driver_(std::move(driver)), ordinal_(ordinal) {}
  Error MakeStreamAndGate();
  Error Failed(CuResult result, const char* call) const;
  enum class Direction { kToHost, kToDevice };
  Error Copy(Direction direction, std::byte* host, const DeviceRuns& runs,
             CuAllocation* known) const;
  Error CopyRun(Direction direction, std::byte* host, const std::byte* device, uint64_t bytes,
                CuAllocation* known) const;

  const std::shared_ptr<const DeviceDriver> driver_;
  const CuDevice ordinal_;
  std::string name_;
  CuContext context_ = nullptr;
  bool is_primary_ = false;  // retained
  CuStream stream_ = nullptr;
  CuEvent gate_ = nullptr;

  Mutex mutex_;
  std::vector<CuEvent> events_ HOOK_GUARDED_BY(mutex_);  // that nobody holds
};

// Threads: immutable after the registration has made it.
// Lifetime: shared by the document and the registrations made from it.
class DeviceTable {
 public:
  explicit DeviceTable(std::shared_ptr<const DeviceDriver> driver) : driver_(std::move(driver)) {}

  // The index of the context in which `pointer` lies, entered if it is new; -1: host memory.
  // Errors: the driver's; HF_RESOURCE_EXHAUSTED (more than kDeviceContextsMax).
  Result<int32_t> Enter(const void* pointer);
  // True if `pointer` lies where one of index `place` does.
  Result<bool> LiesAt(const void* pointer, int32_t place) const;

  uint32_t count() const { return static_cast<uint32_t>(contexts_.size()); }
  DeviceContext& context(uint32_t index) const { return *contexts_[index]; }
  const DeviceDriver& driver() const { return *driver_; }

  // Records the save's event in every context: on the stream among `streams` that is its own, else
  // on its legacy default stream. No call of it waits for the device. Errors: HF_INVALID_ARGUMENT
  // (a stream of a context in which nothing is registered), HF_FAILED_PRECONDITION, the driver's.
  Error RecordGates(std::span<void* const> streams) const;

 private:
  // Of known contexts; -1: none.
  int32_t Find(const CuPlace& place) const;

  const std::shared_ptr<const DeviceDriver> driver_;
  std::vector<std::unique_ptr<DeviceContext>> contexts_;
};

// Compares device memory with the image by copying it back to the host, piece by piece.
//
// Threads: one at a time, never the trainer's.
// Lifetime: the table and `stop` outlive it.
class DeviceComparer final : public SourceComparer {
 public:
  explicit DeviceComparer(DeviceContext& context, const std::atomic<bool>& stop)
      : context_(context), stop_(stop) {}

  // Errors: the driver's; HF_ABORTED: `stop` has become true.
  Result<bool> Equal(const std::byte* copy, const std::byte* source, uint64_t run_bytes,
                     uint64_t count, uint64_t stride) override;

 private:
  DeviceContext& context_;
  const std::atomic<bool>& stop_;
  std::vector<std::byte> piece_;
  CuAllocation known_;
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_DEVICE_CONTEXTS_H_
