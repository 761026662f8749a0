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

// What ended by itself, or by force. A stop on request and a regular end are no deaths, nor is an
// end that nobody saw: every job ends like that whose launcher tells us nothing. Who is waited for
// after such an end is dead all the same, which hang.cc sees.
bool IsDeath(const RankReport& report) {
  return report.exit == ExitKind::kAborted || report.exit > ExitKind::kUnknown;
}

bool IsGone(const RankReport& report) {
  return report.exit != ExitKind::kNone || report.process == ProcessState::kGone;
}

ExitKind KindOf(const RankReport& report) {
  return report.exit == ExitKind::kNone ? ExitKind::kUnknown : report.exit;
}

bool EndedUnseen(const RankTrack& track) {
  return track.seen && IsGone(track.report) && KindOf(track.report) == ExitKind::kUnknown;
}

absl::Duration EndOf(const RankTrack& track) {
  return track.report.exit == ExitKind::kNone ? track.arrived : track.ended_at;
}

// Where nobody has ever shown any communication, nobody shows whether somebody is missed either.
void FindGone(const JobState& state, Candidates& out) {
  const std::vector<RankTrack>& tracks = state.ranks();
  if (!state.communicators().empty() ||
      std::any_of(tracks.begin(), tracks.end(),
                  [](const RankTrack& track) { return track.report.operation_us > 0; })) {
    return;
  }
  const bool others_live = std::any_of(tracks.begin(), tracks.end(), [](const RankTrack& track) {
    return track.seen && !IsGone(track.report);
  });
  if (!others_live) return;  // the job is over
  const Thresholds& thresholds = state.thresholds();
  Candidate candidate;
  candidate.key = "ended";
  Finding& finding = candidate.finding;
  std::vector<std::string> names;
  for (uint32_t r = 0; r < tracks.size() && names.size() < kSuspectsMax; ++r) {
    if (!EndedUnseen(tracks[r])) continue;
    candidate.standing = std::max(candidate.standing, state.now() - EndOf(tracks[r]));
    finding.suspects.push_back({Rank{r}, Rank{r}});
    names.push_back(RankName(state, Rank{r}));
  }
  if (names.empty() || candidate.standing < thresholds.hang_suspicion) return;
  candidate.verdict_with_one = candidate.verdict_with_two = thresholds.hang_verdict;
  finding.grade = Grade::kSuspicion;
  finding.syndrome = Syndrome::kEnded;
  finding.fault = FaultClass::kDead;
  finding.scope = Scope::kProcess;
  finding.confidence = 0.5 / static_cast<double>(finding.suspects.size());
  finding.sentence =
      absl::StrFormat("%s %s gone, and nobody saw how; nothing shows whether the others miss %s.",
                      absl::StrJoin(names, ", "), names.size() == 1 ? "is" : "are",
                      names.size() == 1 ? "it" : "them");
  finding.evidence = {
      absl::StrCat("others of the job have lived on for ", SecondsText(candidate.standing))};
  finding.changes_mind = "The others ending too, or what a launcher says of its end.";
  out.found.push_back(std::move(candidate));
}

}  // namespace

void FindEnded(const JobState& state, Candidates& out) {
  std::vector<Rank> dead;
  absl::Duration first = absl::InfiniteDuration();
  ExitKind greatest = ExitKind::kNone;
  bool any_death = false;
  for (uint32_t r = 0; r < state.ranks().size(); ++r) {
    const RankTrack& track = state.ranks()[r];
    const bool is_death = track.seen && IsDeath(track.report);
    // Beside a death an end that nobody saw may be its cause, or its consequence.
    if (!is_death && !EndedUnseen(track)) continue;
    any_death |= is_death;
    dead.push_back(Rank{r});
    greatest = std::max(greatest, KindOf(track.report));
    first = std::min(first, EndOf(track));
  }
  if (!any_death) return FindGone(state, out);
  Candidate candidate;
  candidate.key = "ended";
  Finding& finding = candidate.finding;
  finding.syndrome = Syndrome::kEnded;
  finding.fault = FaultClass::kDead;
  finding.scope = Scope::kProcess;
  std::vector<std::string> names, weaker;
  for (const Rank rank : dead) {
    const RankTrack& track = state.ranks()[Value(rank)];
    const bool cause = KindOf(track.report) == greatest;
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
    // The communicator of all is made when all have come, and a job that trains is not starting any
    // more: who is not seen is not shown to us.
    if (knowledge.size == world || state.NormalStandstill(id).has_value()) return;
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
