// A job on one screen: the state, whom we suspect, what happens next, what is lost, and what YOU
// should do. For `holdfast`, `holdfast status`, and a person who was asleep a minute ago.
//
//   STALLED 4m12s. Suspect rank 27 (GPU 3), comm hang in dp, confidence 0.93. Restarting in place,
//   about 38 s left. Loses 2m10s (step 41,200). You: nothing.
//
// That is one line, the first. Its last sentence is `You: nothing.` or `You: ` and exactly one
// command, which can be copied and run.
#ifndef HOLDFAST_AGENT_RECOVERY_SCREEN_H_
#define HOLDFAST_AGENT_RECOVERY_SCREEN_H_

#include <string>
#include <vector>

#include "absl/time/time.h"
#include "agent/recovery/history.h"
#include "agent/recovery/settings.h"

namespace holdfast::recovery {

// `now`: on the clock of Event::now.
std::string FirstLine(const Settings& settings, const History& history, absl::Duration now);

// The first line; why; the attempt; the checkpoints; what the monitor sees; and the last incident
// that is over. At most 8 lines, without their ends.
std::vector<std::string> Screen(const Settings& settings, const History& history,
                                absl::Duration now);

// "nothing", or one command.
std::string HumanStep(const Settings& settings, const History& history);

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_SCREEN_H_
