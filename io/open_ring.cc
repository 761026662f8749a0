#include "io/open_ring.h"

#include <string>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "io/thread_ring.h"
#include "io/uring_ring.h"

namespace holdfast {

absl::StatusOr<std::unique_ptr<IoRing>> OpenRing(const RingOptions& options) {
  ThreadRingOptions threads{.thread_count = options.thread_count, .reason = "as asked"};
  if (options.kind != RingOptions::Kind::kThreads) {
    absl::StatusOr<std::unique_ptr<IoRing>> uring =
        NewUringRing({.entry_count = options.uring_entry_count});
    if (uring.ok() || options.kind == RingOptions::Kind::kUring) return uring;
    threads.reason = std::string(uring.status().message());
  }
  return NewThreadRing(threads);
}

}  // namespace holdfast
