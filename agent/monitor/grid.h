// When the agent reports and analyses: at fixed moments of its monotonic clock. A report that is
// made a moment before the step that takes it is analysed at once; were both begun at any time, it
// would wait for half a second on average, and every finding with it.
#ifndef HOLDFAST_AGENT_MONITOR_GRID_H_
#define HOLDFAST_AGENT_MONITOR_GRID_H_

#include "absl/time/time.h"

namespace holdfast {

// By so much reports are ahead of whole seconds, at which steps are taken: enough for all reports
// of a node.
inline constexpr absl::Duration kReportLead = absl::Milliseconds(50);

// The first moment after `now` that is `lead` before a multiple of `every`. Expects lead < every.
inline absl::Duration NextOnGrid(absl::Duration now, absl::Duration every, absl::Duration lead) {
  return absl::Floor(now + lead, every) + every - lead;
}

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_GRID_H_
