// What the analysis knows of a job right now, as JSON for people's tools: `holdfast monitor
// status`, `top` and `matrix`. docs/MONITOR.md lists the members.
#ifndef HOLDFAST_AGENT_MONITOR_QUERIES_H_
#define HOLDFAST_AGENT_MONITOR_QUERIES_H_

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "absl/time/time.h"
#include "monitor/analyzer.h"
#include "monitor/job_analysis.h"

namespace holdfast {

// Of every list at most so many; what is left out is counted beside it.
inline constexpr size_t kListedCommunicatorsMax = 256;
inline constexpr size_t kListedWaitsMax = 2000;
inline constexpr size_t kListedCellsMax = 100'000;
inline constexpr size_t kListedNodesMax = 4096;

// `last`: of the newest step, which was at `now`.
nlohmann::ordered_json StatusOf(const monitor::JobAnalysis& job, const monitor::Analysis& last,
                                absl::Duration now);
// Who waits for whom, the longest first, and who is at the end of the chains.
nlohmann::ordered_json WaitsOf(const monitor::JobAnalysis& job);
// The delay matrix. `communicator` 0: all.
nlohmann::ordered_json MatrixOf(const monitor::JobAnalysis& job, uint64_t communicator);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_QUERIES_H_
