// Picks the best IoRing that this machine grants.
#ifndef HOLDFAST_IO_OPEN_RING_H_
#define HOLDFAST_IO_OPEN_RING_H_

#include <memory>

#include "absl/status/statusor.h"
#include "io/io_ring.h"

namespace holdfast {

struct RingOptions {
  enum class Kind {
    kBest,     // io_uring, else threads; Describe() says why
    kUring,    // io_uring, else the error
    kThreads,  // threads
  };
  Kind kind = Kind::kBest;
  unsigned uring_entry_count = 64;
  int thread_count = 8;
};

// On the thread that will use the ring. Errors with kBest: only where not even threads start
// (kResourceExhausted).
absl::StatusOr<std::unique_ptr<IoRing>> OpenRing(const RingOptions& options = {});

}  // namespace holdfast

#endif  // HOLDFAST_IO_OPEN_RING_H_
