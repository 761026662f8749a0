// Buffers in the memory of a CUDA device, for programs that compute on the processor: how they are
// made, and the way to them and back. Nothing here computes on the device.
//
// The driver's API is found at run time (libcuda.so.1 as the loader finds it), so that the programs
// build without a toolkit and run without a GPU, and so that tests put a driver without a device in
// its place. Of CUDA's runtime nothing is used.
#ifndef HOLDFAST_EXAMPLES_CUDA_DEVICE_BUFFERS_H_
#define HOLDFAST_EXAMPLES_CUDA_DEVICE_BUFFERS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace cuda {

struct Driver;

// Buffers of the program, each with its counterpart on the device. All work is on one stream.
//
// Threads: one at a time, any; no context is current in it between calls.
// Lifetime: the program's buffers outlive it, and nobody uses data() or stream() after it.
class DeviceBuffers {
 public:
  // Makes the counterparts, in the primary context of device `local_rank` modulo the number of
  // devices. Their bytes are unspecified. Errors: kFailedPrecondition (no driver, no device, or a
  // driver that is too old), kResourceExhausted (device or pinned memory), kInternal (the
  // driver's).
  static absl::StatusOr<std::unique_ptr<DeviceBuffers>> Create(
      std::vector<std::span<std::byte>> host, uint32_t local_rank);
  // Waits for what is on the stream.
  ~DeviceBuffers();
  DeviceBuffers(const DeviceBuffers&) = delete;
  DeviceBuffers& operator=(const DeviceBuffers&) = delete;

  // The counterpart of buffer `index`: the processor cannot read it.
  void* data(size_t index) const;
  // A CUstream, which does not wait for the legacy default stream.
  void* stream() const { return stream_; }

  // Enqueues the copies of all buffers to the device and returns: the buffers may change at once.
  // Errors: the driver's, also of work that was enqueued before.
  absl::Status Store();
  // Copies everything back, behind the work on the stream, and waits for it. Errors: as Store.
  absl::Status Fetch();

 private:
  class Scope;

  DeviceBuffers(std::vector<std::span<std::byte>> host, std::unique_ptr<Driver> driver);
  absl::Status OpenDevice(uint32_t local_rank);
  absl::Status Allocate();

  const std::vector<std::span<std::byte>> host_;
  const std::unique_ptr<Driver> driver_;
  int device_ = 0;
  void* context_ = nullptr;
  void* stream_ = nullptr;
  std::vector<unsigned long long> pointers_;  // on the device
  // Pinned: all buffers, one behind the other. What is enqueued reads and writes here.
  std::byte* staging_ = nullptr;
};

}  // namespace cuda

#endif  // HOLDFAST_EXAMPLES_CUDA_DEVICE_BUFFERS_H_
