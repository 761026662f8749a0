// The two clocks of this machine side by side. Both run at the rate that NTP gives them, so their
// difference changes only when somebody sets the wall clock.
#ifndef HOLDFAST_PREFLIGHT_CLOCKS_H_
#define HOLDFAST_PREFLIGHT_CLOCKS_H_

#include <cstdint>

namespace holdfast::preflight {

struct ClockReading {
  int64_t realtime_ns = 0;
  int64_t monotonic_ns = 0;
};

int64_t MonotonicNs();

// Both of one instant, as well as can be had: the best of a few tries.
ClockReading ReadClocks();

// Threads: one.
class ClockWatch {
 public:
  ClockWatch() : first_(ReadClocks()) {}

  // Looks at the clocks, and returns what it saw.
  ClockReading Look();
  // The difference of a look to the first one that is greatest in size: also of a clock that was
  // set and set back between two looks of which one saw it.
  int64_t step_ns() const { return step_ns_; }

 private:
  const ClockReading first_;
  int64_t step_ns_ = 0;
};

}  // namespace holdfast::preflight

#endif  // HOLDFAST_PREFLIGHT_CLOCKS_H_
