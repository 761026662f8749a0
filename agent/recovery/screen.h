// A job on one screen: the state, whom we suspect, what happens next, what is lost, and what YOU
// should do. For `holdfast`, `holdfast status`, and a person who was asleep a minute ago.
//
//   STALLED 4m12s. Suspect rank 27 (GPU 3), comm hang in dp, confidence 0.93. Restarting in place,
//   about 38 s left. Loses 2m10s (step 41,200). You: nothing.
//
// That is one line, the first. Its last sentence is `You: nothing.` or `You: ` and exactly one
// command, which can be copied and run. The command names the job: it must not fall upon another
// one that has begun since.
#ifndef HOLDFAST_AGENT_RECOVERY_SCREEN_H_
#define HOLDFAST_AGENT_RECOVERY_SCREEN_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"
#include "agent/recovery/history.h"
#include "agent/recovery/settings.h"
#include "base/ids.h"
#include "monitor/finding.h"

namespace holdfast::recovery {

// `now`: on the clock of Event::now.
std::string FirstLine(const Settings& settings, const History& history, absl::Duration now);

// The first line; why; the attempt; the checkpoints; what the monitor sees; and the last incident
// that is over. At most 8 lines, without their ends.
std::vector<std::string> Screen(const Settings& settings, const History& history,
                                absl::Duration now);

// "nothing", or one command.
std::string HumanStep(const Settings& settings, const History& history);

// A job that another launcher has started.
struct WatchedJob {
  std::string job;
  Attempt attempt{};  // 0: no rank has opened the job
  uint32_t world_size = 0;
  uint32_t open_ranks = 0;     // on this node
  uint32_t watched_ranks = 0;  // whose telemetry the monitor has
  uint64_t step = 0;           // the greatest that a rank has told; 0: none
  std::optional<CheckpointId> newest;
  std::optional<monitor::Finding> finding;  // the strongest that is open
  // Of the sidecar (agent/run/sidecar.h), if there is one: what happens next, half a sentence; and
  // the incident that it has opened.
  std::string next;
  std::string trouble;
  bool is_handled = false;  // something is done about what is wrong
};
// "running", "suspected" (a finding is open), "stalled" (the sidecar has opened an incident) or
// "not running".
std::string_view StateOf(const WatchedJob& job);
std::vector<std::string> Screen(const WatchedJob& job, absl::Duration now);
std::string HumanStep(const WatchedJob& job);

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_SCREEN_H_
