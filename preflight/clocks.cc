#include "preflight/clocks.h"

#include <time.h>

#include <cstdlib>

namespace holdfast::preflight {
namespace {

constexpr int kTries = 5;

int64_t Read(clockid_t clock) {
  timespec now{};
  clock_gettime(clock, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

}  // namespace

int64_t MonotonicNs() { return Read(CLOCK_MONOTONIC); }

ClockReading ReadClocks() {
  ClockReading best;
  int64_t best_width_ns = INT64_MAX;
  for (int i = 0; i < kTries; ++i) {
    const int64_t before_ns = MonotonicNs();
    const int64_t realtime_ns = Read(CLOCK_REALTIME);
    const int64_t width_ns = MonotonicNs() - before_ns;
    if (width_ns >= best_width_ns) continue;
    best_width_ns = width_ns;
    best = {realtime_ns, before_ns + width_ns / 2};
  }
  return best;
}

ClockReading ClockWatch::Look() {
  const ClockReading now = ReadClocks();
  const int64_t step_ns =
      (now.realtime_ns - now.monotonic_ns) - (first_.realtime_ns - first_.monotonic_ns);
  if (std::abs(step_ns) > std::abs(step_ns_)) step_ns_ = step_ns;
  return now;
}

}  // namespace holdfast::preflight
