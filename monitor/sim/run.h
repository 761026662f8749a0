// Runs the analysis over a simulated job and keeps all that it ever said.
#ifndef HOLDFAST_MONITOR_SIM_RUN_H_
#define HOLDFAST_MONITOR_SIM_RUN_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "monitor/analyzer.h"
#include "monitor/sim/world.h"
#include "monitor/thresholds.h"

namespace holdfast::monitor::sim {

// One incident, as it was last told, and when its grades came (since the start of the job).
struct Told {
  Finding finding;
  absl::Duration first;
  std::optional<absl::Duration> verdict;
  // Grade changes to and fro, fault classes and first suspects that were told of it.
  std::vector<std::string> history;
};

struct Outcome {
  std::vector<Told> told;
  std::vector<WaitNote> notes;  // each sentence's beginning once
  Sight sight;
  uint64_t iterations = 0;
  uint64_t events = 0;
  bool faults_happened = false;
};

// `each` sees every snapshot before the analysis does, and may change it.
Outcome Observe(const WorldOptions& options, absl::Duration length,
                const Thresholds& thresholds = {},
                const std::function<void(Snapshot&)>& each = nullptr);

// "verdict gpu-hang gpu 3", for messages of tests.
std::string Describe(const Finding& finding);
std::string Describe(const Outcome& outcome);

}  // namespace holdfast::monitor::sim

#endif  // HOLDFAST_MONITOR_SIM_RUN_H_
