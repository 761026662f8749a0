#include "monitor/analyzer.h"

#include <algorithm>
#include <utility>

namespace holdfast::monitor {

Analyzer::Analyzer(const Thresholds& thresholds, JobShape shape)
    : state_(thresholds, std::move(shape)), slow_(state_), tracker_(thresholds) {}

Analysis Analyzer::Step(const Snapshot& snapshot) {
  // What stands in a pause or in a fault is no normal standstill.
  const bool paused = std::any_of(state_.ranks().begin(), state_.ranks().end(),
                                  [](const RankTrack& track) { return track.InPause(); });
  state_.Ingest(snapshot, /*learn=*/!paused && !tracker_.IsStanding());
  Candidates candidates;
  FindEnded(state_, candidates);
  FindNeverJoined(state_, candidates);
  FindHangs(state_, candidates);
  slow_.Look(state_, candidates);
  testimonies_.Take(snapshot.elapsed, snapshot.testimonies, state_.thresholds());
  testimonies_.Speak(state_, candidates);

  Analysis analysis;
  analysis.sight = Look();
  const Sight& sight = analysis.sight;
  const double blind =
      sight.ranks == 0 ? 0 : 1 - static_cast<double>(sight.ranks_with_telemetry) / sight.ranks;
  for (Candidate& candidate : candidates.found) {
    candidate.finding.confidence *= 1 - state_.thresholds().blind_penalty * blind;
  }
  analysis.findings = tracker_.Update(state_.now(), std::move(candidates.found));
  analysis.notes = std::move(candidates.notes);
  analysis.ended_amid = candidates.ended_amid;
  return analysis;
}

Sight Analyzer::Look() const {
  Sight sight;
  sight.ranks = static_cast<uint32_t>(state_.ranks().size());
  for (uint32_t r = 0; r < sight.ranks; ++r) {
    const RankTrack& track = state_.ranks()[r];
    if (!track.seen) continue;
    sight.drops += track.report.drops;
    sight.oldest_report = std::max(sight.oldest_report, state_.Age(Rank{r}));
    if (state_.Age(Rank{r}) > state_.thresholds().stale) continue;
    ++sight.ranks_reporting;
    if (!track.IsBlind()) ++sight.ranks_with_telemetry;
  }
  return sight;
}

}  // namespace holdfast::monitor
