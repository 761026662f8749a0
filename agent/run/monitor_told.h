// What the policy is told of what the monitor says, and of silence.
#ifndef HOLDFAST_AGENT_RUN_MONITOR_TOLD_H_
#define HOLDFAST_AGENT_RUN_MONITOR_TOLD_H_

#include <algorithm>
#include <cstdint>
#include <optional>

#include "absl/time/time.h"
#include "agent/recovery/events.h"
#include "agent/run/silence_watch.h"
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

// Of the ranks of this launch.
inline decltype(recovery::Event::what) ToldOf(const SilenceWatch::Said& said,
                                              recovery::Launch launch) {
  const Rank rank{said.rank};
  if (!said.is_late) return recovery::RankBeats{launch, rank};
  recovery::RankTimedOut late{launch, rank, said.section, said.silent, said.timeout, {}};
  for (const uint32_t other : said.with) late.with.push_back(Rank{other});
  return late;
}

// How much of the job the monitor sees, as far as silence is concerned; none: nobody has said.
inline SilenceWatch::Monitor MonitorOf(const std::optional<recovery::Sight>& sight) {
  const bool sees = sight.has_value() && *sight != recovery::Sight::kBlind;
  return sees ? SilenceWatch::Monitor::kSees : SilenceWatch::Monitor::kBlind;
}

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_MONITOR_TOLD_H_
