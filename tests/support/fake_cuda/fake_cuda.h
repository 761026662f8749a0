// A CUDA driver without a GPU: libcuda.so.1 that runs streams, events and copies on a thread of its
// own, injects failures, and records every call. Tests of device code run on it, and on the real
// driver where there is one: they ask for this interface by name (`fake_cuda`), and what only the
// fake can do is skipped without it.
//
// Model: one thread executes, one piece of one operation at a time, from a stream drawn at random
//   among those whose first operation may run: every order that stream semantics allow may come,
//   and copies of several streams mix in the middle. Events are complete when their last record was
//   executed. Two devices; each has its primary context and those that are made. Device memory
//   cannot be touched by the processor (PROT_NONE; the device has a mapping of its own); managed
//   memory can. Allocations lie side by side at the lowest addresses that are free, each at the
//   beginning of a page; a copy that leaves one is refused (CUDA_ERROR_INVALID_VALUE). Virtual
//   memory is reserved elsewhere; each of its mappings counts as an allocation. Copies to or from
//   host memory that is not registered return when they are done. After a failed copy every call on
//   its context fails. A context that is destroyed takes streams, events and memory with it, and
//   cannot be made current any more. While a stream is being captured into a graph, calls that are
//   unsafe then fail in threads whose mode is not RELAXED. $HOLDFAST_FAKE_CUDA: absent (there is no
//   device), pinless (no host memory is registered), mismatch (cuInit fails: kernel module and
//   library are not of one version).
// Not modelled: kernels, the legacy stream's synchronisation with blocking streams, peer access,
//   priorities (they are recorded), limits on what may be registered, access rights of mappings,
//   anything's cost.
#ifndef HOLDFAST_TESTS_SUPPORT_FAKE_CUDA_FAKE_CUDA_H_
#define HOLDFAST_TESTS_SUPPORT_FAKE_CUDA_FAKE_CUDA_H_

#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace holdfast {

class FakeCuda {
 public:
  struct Call {
    std::string name;
    std::thread::id thread;
    const void* stream = nullptr;
    const void* event = nullptr;
    uint64_t bytes = 0;
    int priority = 0;
    int result = 0;
  };
  // What was made and not given back.
  struct Live {
    int streams = 0;
    int events = 0;
    int registered = 0;
    int host_allocations = 0;
    int device_allocations = 0;
    int retained = 0;
    bool operator==(const Live&) const = default;
  };

  virtual ~FakeCuda() = default;

  // Forgets calls, faults, and contexts' failures; draws orders from `seed` and records calls from
  // now on. (A program that is no test makes too many to keep them.)
  virtual void Reset(uint32_t seed) = 0;
  virtual std::vector<Call> calls() = 0;
  virtual Live live() = 0;

  // The call of this name after `skipped` of them returns `result` instead of doing anything, and
  // so do all after it if `for_good`.
  virtual void Fail(const std::string& name, int skipped, int result, bool for_good) = 0;
  // `body` runs before the call of this name after `skipped` of them, in its thread, once. It may
  // call the driver.
  virtual void Before(const std::string& name, int skipped, std::function<void()> body) = 0;
  // The copy after `skipped` copies fails in the middle of its execution: its context is lost.
  virtual void FailCopy(int skipped, int result) = 0;
  // Copies to the host: all, or those to memory that is not registered with the driver.
  enum class Copies { kToHost, kToUnregistered };
  // From now on the device begins none of these but as many as are permitted (until Reset). What
  // was permitted before is forgotten.
  virtual void HoldCopies(Copies held) = 0;
  virtual void PermitCopies(uint64_t count) = 0;
  // Of these since Reset: begun, or the next of their stream.
  virtual uint64_t copies_arrived() = 0;
  // The device executes nothing any more, until it is told to go on.
  virtual void Stall(bool stalled) = 0;
  // 0: as fast as memory can.
  virtual void SetCopyRate(uint64_t bytes_per_second) = 0;
  virtual uint64_t copies_executed() = 0;
};

}  // namespace holdfast

// In libcuda.so.1; found with dlsym.
extern "C" holdfast::FakeCuda* fake_cuda();

#endif  // HOLDFAST_TESTS_SUPPORT_FAKE_CUDA_FAKE_CUDA_H_
