// How often to save, `--every auto`: the optimum of Young (1974) in the form of Daly (2006, "A
// higher order estimate of the optimum checkpoint interval"), from what was measured. A pure
// function.
//
// With d the time that a save takes from training and M the mean time between failures:
//   t = sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + d / (2M) / 9) - d     for d < 2M, else M
// d is what training stalls for, not what the flush takes: that goes on beside it. M is the mean of
// what was assumed (one failure in `failure_prior`) and what was seen.
#ifndef HOLDFAST_AGENT_RECOVERY_INTERVAL_H_
#define HOLDFAST_AGENT_RECOVERY_INTERVAL_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/time/time.h"
#include "agent/recovery/history.h"
#include "agent/recovery/settings.h"

namespace holdfast::recovery {

struct IntervalInput {
  std::optional<absl::Duration>
      stall;  // that a save takes from training; nothing: none was measured
  uint32_t failures = 0;
  absl::Duration time_alive;     // in which they happened
  absl::Duration failure_prior;  // positive
  absl::Duration restart;        // that a failure costs besides lost work; zero: not known
  absl::Duration step;           // that one takes; zero: not known
  // From a save's begin to its commit: no save begins before the last one is committed.
  absl::Duration commit;
};

struct IntervalChoice {
  absl::Duration interval;
  uint64_t steps = 0;  // at least 1; 0: a step's time is not known
  absl::Duration between_failures;
  double overhead = 0;   // share of the time that saves, lost work and restarts take
  std::string sentence;  // all of it, for `holdfast status`
};

IntervalInput IntervalInputOf(const Settings& settings, const History& history, absl::Duration now,
                              absl::Duration step, absl::Duration commit);
IntervalChoice ChooseInterval(const IntervalInput& input);

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_INTERVAL_H_
