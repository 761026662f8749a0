// The fake driver's inside: contexts, streams, events, memory, and the thread that executes.
#ifndef HOLDFAST_TESTS_SUPPORT_FAKE_CUDA_DEVICE_H_
#define HOLDFAST_TESTS_SUPPORT_FAKE_CUDA_DEVICE_H_

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <stop_token>
#include <string>
#include <thread>
#include <vector>

#include "hook/device_driver.h"
#include "tests/support/fake_cuda/fake_cuda.h"

namespace holdfast::fake {

using hook::CuDevicePointer;
using hook::CuResult;

struct Context {
  int device = 0;
  int retained = 0;
  CuResult failure = CuResult::kSuccess;
};

struct Event {
  Context* context = nullptr;
  uint64_t recorded = 0;
  uint64_t completed = 0;
};

struct Operation {
  enum class Kind { kCopy, kSet, kRecord, kWaitEvent, kWaitValue } kind = Kind::kCopy;
  // kCopy, kSet: rows of `width` bytes.
  std::byte* target = nullptr;
  const std::byte* source = nullptr;
  uint64_t target_pitch = 0;
  uint64_t source_pitch = 0;
  uint64_t width = 0;
  uint64_t height = 1;
  uint8_t value8 = 0;
  bool to_host = false;
  bool is_registered = false;  // the host's memory
  uint64_t done = 0;           // bytes
  // kRecord, kWaitEvent
  std::shared_ptr<Event> event;  // lives until then, also if it is destroyed before, as CUDA has it
  uint64_t sequence = 0;
  // kWaitValue
  const uint32_t* word = nullptr;
  uint32_t value = 0;
};

struct Stream {
  Context* context = nullptr;
  std::deque<Operation> operations;
  bool capturing = false;
};

struct Allocation {
  uintptr_t begin = 0;
  uint64_t bytes = 0;
  std::byte* device_view = nullptr;  // what the executing thread uses
  Context* context = nullptr;        // nullptr: of a pool
  bool managed = false;
};

class Device final : public FakeCuda {
 public:
  static constexpr int kCount = 2;

  Device();
  ~Device() override;

  void Reset(uint32_t seed) override;
  std::vector<Call> calls() override;
  Live live() override;
  void Fail(const std::string& name, int skipped, int result, bool for_good) override;
  void Before(const std::string& name, int skipped, std::function<void()> body) override;
  void FailCopy(int skipped, int result) override;
  void HoldCopies(Copies held) override;
  void PermitCopies(uint64_t count) override;
  uint64_t copies_arrived() override;
  void Stall(bool stalled) override;
  void SetCopyRate(uint64_t bytes_per_second) override;
  uint64_t copies_executed() override;

  // ---- For the entry points. All lock.

  // Records the call; not kSuccess: it shall fail with that. `unsafe_in_capture`: CUDA forbids it
  // to this thread while any stream is being captured (cuThreadExchangeStreamCaptureMode).
  CuResult Enter(Call call, Context* context, bool unsafe_in_capture);
  // What a test wants to run before this call of that name.
  std::function<void()> TakeBefore(const std::string& name);

  Context& primary(int device) { return primaries_[device]; }
  CuResult Retain(int device, Context** context);
  CuResult Release(int device);
  CuResult MakeContext(int device, Context** context);
  // Waits for what is on its streams.
  CuResult DestroyContext(Context* context);
  bool IsDestroyed(const Context* context);
  Stream* MakeStream(Context* context);
  CuResult DestroyStream(Stream* stream);
  Stream* DefaultStream(Context* context);
  Event* MakeEvent(Context* context);
  CuResult DestroyEvent(Event* event);
  CuResult Record(Event* event, Stream* stream);
  CuResult Query(Event* event);
  CuResult SetCapturing(Stream* stream, bool capturing);
  bool capturing(Stream* stream);
  CuResult Enqueue(Stream* stream, Operation operation);
  // Waits until everything that is on the stream now was executed, or its context has failed.
  CuResult Drain(Stream* stream);

  CuResult Allocate(uint64_t bytes, Context* context, bool managed, CuDevicePointer* pointer);
  CuResult Free(CuDevicePointer pointer);
  // Addresses of virtual memory, which are never used again.
  CuResult ReserveVirtual(uint64_t bytes, CuDevicePointer* pointer);
  // Memory without an address; mappings keep it, too.
  CuResult MakeHandle(uint64_t bytes, uint64_t* handle);
  CuResult ReleaseHandle(uint64_t handle);
  CuResult MapHandle(CuDevicePointer pointer, uint64_t bytes, uint64_t handle);
  // All mappings in the range.
  CuResult UnmapVirtual(CuDevicePointer pointer, uint64_t bytes);
  // The allocation that holds [pointer, pointer + bytes), and the place in it; nothing: none does.
  std::optional<Allocation> Find(CuDevicePointer pointer, uint64_t bytes, std::byte** view);
  CuResult RegisterHost(void* data, uint64_t bytes);
  CuResult UnregisterHost(void* data);
  void* AllocateHost(uint64_t bytes);
  CuResult FreeHost(void* data);
  bool IsPinned(const void* data, uint64_t bytes);

 private:
  struct Fault {
    std::string name;
    int skipped = 0;
    int result = 0;
    bool for_good = false;
    bool used = false;
  };
  struct Hook {
    std::string name;
    int skipped = 0;
    std::function<void()> body;
  };
  void Run(const std::stop_token& stop);
  // Maps `fd` at an address of the devices' and enters it.
  CuResult MapAt(uintptr_t at, uint64_t bytes, int fd, Context* context, bool managed);
  // Nothing is left to be executed: of a context, or (nullptr) of any.
  bool IsIdle(const Context* context) const;
  void Unmap(const Allocation& allocation);
  uintptr_t FreeAddress(uint64_t bytes) const;
  // A copy that is not done yet reads or writes host memory in this range.
  bool IsUsed(const void* data, uint64_t bytes) const;
  // A copy of those that are held, not begun.
  bool IsHeld(const Operation& operation) const;
  bool MayRun(const Operation& operation) const;
  void Step(Stream& stream, std::unique_lock<std::mutex>& lock);
  void StepCopy(Stream& stream, Operation& operation);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::mt19937 random_{1};
  bool records_calls_ = false;
  std::vector<Call> calls_;
  std::vector<Fault> faults_;
  std::vector<Hook> hooks_;
  int copies_until_failure_ = -1;
  CuResult copy_failure_ = CuResult::kSuccess;
  std::optional<Copies> held_;
  uint64_t copies_permitted_ = 0;
  uint64_t copies_begun_ = 0;  // of those held
  bool stalled_ = false;
  uint64_t bytes_per_second_ = 0;
  uint64_t copies_executed_ = 0;
  Context primaries_[kCount];
  std::vector<std::unique_ptr<Context>> made_;  // those that were destroyed included
  std::map<Context*, std::unique_ptr<Stream>> defaults_;
  std::map<Stream*, std::unique_ptr<Stream>> streams_;
  std::map<Event*, std::shared_ptr<Event>> events_;
  uintptr_t address_space_ = 0;  // of the devices' memory: kAddressSpaceBytes
  std::map<uintptr_t, Allocation> allocations_;
  uint64_t virtual_bytes_ = 0;       // of the upper half of the address space: reserved so far
  std::map<uint64_t, int> handles_;  // their descriptors
  uint64_t last_handle_ = 0;
  std::map<uintptr_t, uint64_t> registered_;
  std::map<uintptr_t, std::unique_ptr<std::byte[]>> host_allocations_;
  std::map<uintptr_t, uint64_t> host_bytes_;
  std::jthread thread_;
};

Device& TheDevice();

}  // namespace holdfast::fake

#endif  // HOLDFAST_TESTS_SUPPORT_FAKE_CUDA_DEVICE_H_
