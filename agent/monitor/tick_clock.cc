#include "agent/monitor/tick_clock.h"

#include <time.h>
#include <x86intrin.h>

#include <algorithm>

namespace holdfast {
namespace {

// After that the two readings of a point, some 100 ns apart, spoil the rate by 1e-5 at most.
constexpr uint64_t kMeasuredAfterNs = 10'000'000;
// Counters run at the processor's nominal rate, or at 1 GHz in newer ones.
constexpr uint64_t kTicksPerSecondMin = 100'000'000;
constexpr uint64_t kTicksPerSecondMax = 10'000'000'000;

uint64_t MonotonicNs() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

}  // namespace

TickClock::TickClock() : first_ticks_(__rdtsc()), first_ns_(MonotonicNs()) {}

TickInstant TickClock::Now(const abi::BoardHeader& header) const {
  const uint64_t now_ns = MonotonicNs();
  if (header.clock != abi::BoardClock::kTsc) return {now_ns, 1e-3};
  const uint64_t ticks = __rdtsc();
  const uint64_t passed_ns = now_ns - first_ns_;
  if (passed_ns < kMeasuredAfterNs || ticks <= first_ticks_) {
    const uint64_t claimed = header.ticks_per_second;
    return {ticks,
            1e6 / static_cast<double>(std::clamp(claimed, kTicksPerSecondMin, kTicksPerSecondMax))};
  }
  return {ticks, static_cast<double>(passed_ns) / 1e3 / static_cast<double>(ticks - first_ticks_)};
}

}  // namespace holdfast
