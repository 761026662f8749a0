// IoRing over io_uring. The only user of liburing.
#ifndef HOLDFAST_IO_URING_RING_H_
#define HOLDFAST_IO_URING_RING_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "io/io_ring.h"

namespace holdfast {

struct UringOptions {
  // Operations that the kernel has at once; more wait here. A power of two, 1 to 4096.
  unsigned entry_count = 64;
  // False: without SINGLE_ISSUER and DEFER_TASKRUN, as a kernel before 6.1 does it.
  bool defer_task_run = true;
  // The most of one kernel operation and of one registered buffer, a multiple of every alignment;
  // the kernel's limit for the latter is 1 GiB. Longer ones are done in pieces; tests cut finer. A
  // piece across two registered buffers goes unregistered.
  uint64_t piece_bytes = uint64_t{1} << 30;
};

// Must be called on the thread that will use the ring, because the kernel binds a SINGLE_ISSUER
// ring to the thread that made it.
// Errors: kPermissionDenied (seccomp or kernel.io_uring_disabled), kUnimplemented (no io_uring, or
//   without the operations we need), kResourceExhausted: use a ThreadRing then (OpenRing does).
absl::StatusOr<std::unique_ptr<IoRing>> NewUringRing(const UringOptions& options);

}  // namespace holdfast

#endif  // HOLDFAST_IO_URING_RING_H_
