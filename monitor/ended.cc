// Ends and absences: processes that ended, and ranks that never came. Needs no collectives, so it
// also holds while the job starts.
#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "monitor/candidates.h"

namespace holdfast::monitor {
namespace {

constexpr size_t kSuspectsMax = 16;

std::string ExitText(const RankReport& report) {
  switch (report.exit) {
    case ExitKind::kClean:
      return "ended with status 0";
    case ExitKind::kError:
      return absl::StrFormat("ended with status %d", report.exit_value);
    case ExitKind::kUnknown:
    case ExitKind::kNone:
      return "is gone, and nobody saw how";
    case ExitKind::kTerminated:
    case ExitKind::kAborted:
    case ExitKind::kKilled:
    case ExitKind::kFault:
      return absl::StrFormat("was ended by signal %d", report.exit_value);
  }
  return "ended";
}

// What ended by itself, or by force: a stop on request or a regular end is no death, unless the
// others go on and wait for it, which hang.cc sees.
bool IsDeath(const RankTrack& track) {
  return track.report.exit >= ExitKind::kAborted ||
         (track.report.exit == ExitKind::kNone && track.report.process == ProcessState::kGone);
}

ExitKind KindOf(const RankTrack& track) {
  return track.report.exit == ExitKind::kNone ? ExitKind::kUnknown : track.report.exit;
}

}  // namespace

void FindEnded(const JobState& state, Candidates& out) {
  std::vector<Rank> dead;
  absl::Duration first = absl::InfiniteDuration();
  ExitKind greatest = ExitKind::kNone;
  for (uint32_t r = 0; r < state.ranks().size(); ++r) {
    const RankTrack& track = state.ranks()[r];
    if (!track.seen || !IsDeath(track)) continue;
    dead.push_back(Rank{r});
    greatest = std::max(greatest, KindOf(track));
    first = std::min(first, track.report.exit == ExitKind::kNone ? track.arrived : track.ended_at);
  }
  if (dead.empty()) return;
  Candidate candidate;
  candidate.key = "ended";
  Finding& finding = candidate.finding;
  finding.syndrome = Syndrome::kEnded;
  finding.fault = FaultClass::kDead;
  finding.scope = Scope::kProcess;
  std::vector<std::string> names, weaker;
  for (const Rank rank : dead) {
    const RankTrack& track = state.ranks()[Value(rank)];
    const bool cause = KindOf(track) == greatest;
    if (cause && finding.suspects.size() < kSuspectsMax) {
      finding.suspects.push_back({rank, rank});
      names.push_back(RankName(state, rank));
    }
    (cause ? finding.evidence : weaker)
        .push_back(absl::StrCat(RankName(state, rank), " ", ExitText(track.report)));
  }
  const bool settled = state.now() - first >= state.thresholds().cascade_settle;
  finding.grade = settled ? Grade::kVerdict : Grade::kSuspicion;
  finding.confidence = 0.98 / static_cast<double>(finding.suspects.size());
  finding.sentence = absl::StrFormat(
      "%s %s; %s.", absl::StrJoin(names, ", "),
      ExitText(state.ranks()[Value(finding.suspects[0].rank)].report),
      weaker.empty() ? "nobody else has ended"
                     : absl::StrFormat("%d others ended more mildly, as ranks do that lost a peer",
                                       weaker.size()));
  if (weaker.size() > kSuspectsMax) weaker.resize(kSuspectsMax);
  finding.evidence.insert(finding.evidence.end(), weaker.begin(), weaker.end());
  finding.changes_mind =
      "A rank whose exit is reported later and is of a stronger kind: the order of exits proves "
      "nothing, as there is no common clock.";
  out.found.push_back(std::move(candidate));
}

void FindNeverJoined(const JobState& state, Candidates& out) {
  const absl::Duration waited = state.now() - state.first_report();
  const absl::Duration timeout = state.thresholds().join_timeout;
  if (waited < timeout / 2) return;
  const size_t world = state.ranks().size();
  for (const auto& [id, knowledge] : state.communicators()) {
    // The communicator of all is made when all have come: who is not seen is not shown to us.
    if (knowledge.size == world) return;
  }
  std::vector<Rank> absent;
  for (uint32_t r = 0; r < world; ++r) {
    if (!state.ranks()[r].seen) absent.push_back(Rank{r});
  }
  if (absent.empty() || absent.size() == world) return;
  Candidate candidate;
  candidate.key = "join";
  Finding& finding = candidate.finding;
  finding.syndrome = Syndrome::kStartUp;
  finding.fault = FaultClass::kNeverJoined;
  finding.scope = Scope::kProcess;
  finding.grade = waited >= timeout ? Grade::kVerdict : Grade::kSuspicion;
  finding.confidence = 0.9;
  std::vector<std::string> names;
  for (const Rank rank : absent) {
    if (finding.suspects.size() == kSuspectsMax) break;
    finding.suspects.push_back({rank, rank});
    names.push_back(RankName(state, rank));
  }
  finding.sentence = absl::StrFormat(
      "%d of %d ranks never joined: %s%s; the others have waited for %s.", absent.size(), world,
      absl::StrJoin(names, ", "), absent.size() > names.size() ? ", ..." : "", SecondsText(waited));
  finding.evidence = {absl::StrFormat("%d ranks report; no communicator of all %d ranks exists",
                                      world - absent.size(), world)};
  finding.changes_mind =
      "An agent that does not run on that node: then the rank may have come and is not shown.";
  out.found.push_back(std::move(candidate));
}

}  // namespace holdfast::monitor
