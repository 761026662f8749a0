// What the analysis says of a recording (monitor/recording.h): `monitor replay`, `incident show`.
#ifndef HOLDFAST_CLI_MONITOR_REPLAY_H_
#define HOLDFAST_CLI_MONITOR_REPLAY_H_

#include <cstdint>
#include <set>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "monitor/finding_log.h"

namespace holdfast::cli {

struct Replayed {
  monitor::FindingLog log;
  std::set<std::string> jobs;
  uint64_t steps = 0;
  uint64_t lost = 0;
  bool ended = false;   // the recording was ended on purpose
  absl::Status damage;  // what came before it counts
};

// `job` empty: all. `topology`: a document (monitor/topology.h) that was parsed before, in the
// place of what was recorded; empty: as recorded. Errors: kDataLoss (no recording), kUnimplemented
// (another version).
absl::StatusOr<Replayed> Replay(std::string_view file, const std::string& job,
                                const std::string& topology = "");

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_MONITOR_REPLAY_H_
