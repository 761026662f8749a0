// What preflight measures: plain values, without how they come about (measure_*.h, pair.h) and what
// they mean (odd.h).
//
// A node is one process of preflight, and its number is the process's rank.
#ifndef HOLDFAST_PREFLIGHT_MEASUREMENTS_H_
#define HOLDFAST_PREFLIGHT_MEASUREMENTS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace holdfast::preflight {

// Of a node alone.
enum class NodeMetric {
  kMemory,       // bytes read and written per second, all CPUs copying
  kCpu,          // steps of a fixed calculation per second, all CPUs together
  kSlowestCore,  // the same of the slowest CPU
  kDiskWrite,    // bytes per second, sync included
  kDiskSync,     // seconds of a small write and its sync, median
  kDiskRead,     // bytes per second
};
inline constexpr size_t kNodeMetricCount = 6;
using NodeValues = std::array<std::optional<double>, kNodeMetricCount>;

struct NodeMeasurements {
  std::string host;     // as the node calls itself
  std::string address;  // as rank 0 sees it
  uint32_t cpu_count = 0;
  NodeValues values;       // absent: not measured
  std::string disk;        // what was measured: "ext4, O_DIRECT ..."; empty: no directory was given
  std::string disk_error;  // why it could not be
  // The wall clock's, against that of rank 0, and how wrong that may be.
  double clock_offset_seconds = 0;
  double clock_offset_error_seconds = 0;
  // By how much the wall clock was set while preflight ran (CLOCK_REALTIME against CLOCK_MONOTONIC:
  // both are slewed alike, so that only a step changes their difference).
  double clock_step_seconds = 0;
};

struct PairMeasurements {
  uint32_t a = 0;  // ranks, a < b
  uint32_t b = 0;
  uint32_t round = 0;
  std::string error;  // why the pair could not be measured; then the values mean nothing
  double round_trip_seconds = 0;
  double round_trip_p99_seconds = 0;
  // Bytes per second that arrived: [0] from a to b, [1] from b to a.
  std::array<double, 2> one_way = {};    // one after the other
  std::array<double, 2> both_ways = {};  // at once
};

struct JobMeasurements {
  std::vector<NodeMeasurements> nodes;  // by rank
  std::vector<PairMeasurements> pairs;
};

}  // namespace holdfast::preflight

#endif  // HOLDFAST_PREFLIGHT_MEASUREMENTS_H_
