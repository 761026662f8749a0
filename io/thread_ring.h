// IoRing over pread, pwrite and fsync on a few threads, for where io_uring is denied: containers
// with a seccomp filter, gVisor, kernel.io_uring_disabled.
#ifndef HOLDFAST_IO_THREAD_RING_H_
#define HOLDFAST_IO_THREAD_RING_H_

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "io/io_ring.h"

namespace holdfast {

struct ThreadRingOptions {
  int thread_count = 8;  // operations under way at once, 1 to 64; more wait in order
  // The most of one system call, a multiple of every alignment; tests cut finer.
  size_t piece_bytes = size_t{1} << 30;
  std::string reason = {};  // why not io_uring, for Describe()
};

// Starts the threads. Errors: kResourceExhausted (no thread, no descriptor).
absl::StatusOr<std::unique_ptr<IoRing>> NewThreadRing(const ThreadRingOptions& options);

}  // namespace holdfast

#endif  // HOLDFAST_IO_THREAD_RING_H_
