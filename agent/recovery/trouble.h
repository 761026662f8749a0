// What is wrong with a job, from the facts in its history: which row of the table applies, whether
// it is time to act, and what is known of the culprit. Inside of agent/recovery/.
#ifndef HOLDFAST_AGENT_RECOVERY_TROUBLE_H_
#define HOLDFAST_AGENT_RECOVERY_TROUBLE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "agent/recovery/history.h"
#include "agent/recovery/incident.h"
#include "agent/recovery/settings.h"

namespace holdfast::recovery {

struct Trouble {
  Cause cause{};
  // When to act, on the policy's clock; in the past: now.
  absl::Duration act_at;
  std::vector<Incident::Suspect> suspects;
  std::string finding;
  std::string what;
  std::string sentence;
  uint32_t confidence_permille = 0;
  std::string signature;  // of kProgram
  // The suspects' GPUs may be to blame: not for a stopped process, not for a want of CPU.
  bool blames_gpu = false;
  absl::Duration onset;
};

// The strongest of all that is wrong while the ranks live, or nothing. Suspicions and what only is
// to be reported are nothing.
std::optional<Trouble> FindTrouble(const Settings& settings, const History& history);

bool IsHealthyFor(const History& history, absl::Duration healthy_after, absl::Duration at);
// A verdict of broken hardware, or an Xid that takes the GPU away, at that moment of this launch.
bool IsUnderAnomaly(const History& history, absl::Duration at);

bool AllEnded(const History& history);  // stuck ones count
bool AllClean(const History& history);

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_TROUBLE_H_
