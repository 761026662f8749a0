// What the policy is told of what the monitor says.
#ifndef HOLDFAST_AGENT_RUN_MONITOR_TOLD_H_
#define HOLDFAST_AGENT_RUN_MONITOR_TOLD_H_

#include <algorithm>

#include "absl/time/time.h"
#include "agent/recovery/events.h"
#include "monitor/analyzer.h"
#include "monitor/finding_log.h"

namespace holdfast {

// Of an open finding, as of `now` on the clock of its `since`.
inline recovery::FindingTold ToldOf(const monitor::FindingRecord& record, recovery::Launch launch,
                                    absl::Duration now) {
  recovery::FindingTold told;
  told.launch = launch;
  told.finding = record.finding;
  told.group = record.finding.group;
  told.timeout = record.finding.timeout;
  // When it was opened it had stood for a while already.
  told.standing = std::max(now - record.finding.since, record.finding.standing);
  return told;
}

inline recovery::Sight SightOf(const monitor::Sight& sight) {
  if (sight.IsWhole()) return recovery::Sight::kWhole;
  return sight.ranks_reporting == 0 ? recovery::Sight::kBlind : recovery::Sight::kPartial;
}

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_MONITOR_TOLD_H_
