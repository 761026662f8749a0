// Time for intervals and deadlines, injected so that a test never waits for a real second.
#ifndef HOLDFAST_BASE_CLOCK_H_
#define HOLDFAST_BASE_CLOCK_H_

#include "absl/time/time.h"

namespace holdfast {

// Threads: any.
class Clock {
 public:
  virtual ~Clock() = default;
  // Time since an arbitrary origin; never goes back, counts suspended time (CLOCK_BOOTTIME).
  virtual absl::Duration Elapsed() const = 0;
  // The wall clock. For people only: nothing is ordered or decided by it (P9).
  virtual absl::Time WallTime() const = 0;
};

// The operating system's clocks. Lives for ever.
const Clock& RealClock();

}  // namespace holdfast

#endif  // HOLDFAST_BASE_CLOCK_H_
