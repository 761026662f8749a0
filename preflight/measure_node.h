// How fast this node is by itself: memory and CPUs, on all CPUs at once, as a job uses them: a
// single thread sees neither a missing memory channel nor a node that throttles under load.
//
// Each CPU that this process may use gets a thread that is bound to it. The time is cut into
// slices, and the best slice counts: what else runs on the node disturbs some, a slow node is slow
// in all.
#ifndef HOLDFAST_PREFLIGHT_MEASURE_NODE_H_
#define HOLDFAST_PREFLIGHT_MEASURE_NODE_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace holdfast::preflight {

// Of memory, per thread; beyond so many CPUs, threads on evenly chosen ones suffice to use it up.
inline constexpr uint64_t kMemoryBytesPerThread = uint64_t{32} << 20;
inline constexpr uint32_t kMemoryThreadsMax = 64;
inline constexpr uint32_t kCpuThreadsMax = 1024;

// CPUs that this process may use.
uint32_t CpuCount();

// Bytes read plus bytes written per second while all threads copy. Takes `duration`, and the time
// to touch the memory. Errors: kResourceExhausted (no memory, no threads).
absl::StatusOr<double> MeasureMemory(absl::Duration duration);

struct CpuSpeed {
  double steps_per_second = 0;  // of all threads together
  double slowest_steps_per_second = 0;
};
// A step is some dependent integer and floating-point operations: a fixed amount of work.
absl::StatusOr<CpuSpeed> MeasureCpus(absl::Duration duration);

}  // namespace holdfast::preflight

#endif  // HOLDFAST_PREFLIGHT_MEASURE_NODE_H_
