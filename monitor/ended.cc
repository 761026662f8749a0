// Ends and absences: processes that ended, and ranks that never came. Needs no collectives, so it
// also holds while the job starts.
#include <algorithm>
#include <map>
#include <unordered_map>
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

bool IsOver(const JobState& state) {
  return std::none_of(state.ranks().begin(), state.ranks().end(),
                      [](const RankTrack& track) { return track.seen && !IsGone(track.report); });
}

// Who was missed when the job ended: by the last that is known of everybody, ranks were inside a
// collective that it had not entered.
struct Missed {
  size_t waiters = 0;
  uint64_t communicator = 0;
};
std::map<Rank, Missed> FindMissed(const JobState& state) {
  std::unordered_map<uint64_t, std::vector<uint64_t>> stood_in;  // operations, by communicator
  for (const RankTrack& track : state.ranks()) {
    for (const CommunicatorTrack& communicator : track.communicators) {
      const OperationCounts counts = Collectives(communicator.now);
      if (counts.enqueued > counts.finished) {
        stood_in[communicator.now.id].push_back(counts.finished + 1);
      }
    }
  }
  for (auto& [id, operations] : stood_in) std::sort(operations.begin(), operations.end());
  std::map<Rank, Missed> missed;
  for (uint32_t r = 0; r < state.ranks().size(); ++r) {
    for (const CommunicatorTrack& communicator : state.ranks()[r].communicators) {
      const auto found = stood_in.find(communicator.now.id);
      if (found == stood_in.end()) continue;
      const std::vector<uint64_t>& operations = found->second;
      const auto waiters = static_cast<size_t>(
          operations.end() - std::upper_bound(operations.begin(), operations.end(),
                                              Collectives(communicator.now).enqueued));
      if (waiters > missed[Rank{r}].waiters) missed[Rank{r}] = {waiters, communicator.now.id};
    }
  }
  std::erase_if(missed, [](const auto& entry) { return entry.second.waiters == 0; });
  return missed;
}

std::string MissedText(const Missed& missed) {
  return absl::StrFormat(
      "when the job ended, %d ranks were inside an operation of %s that it had not entered",
      missed.waiters, CommunicatorName(missed.communicator));
}

// All have ended, and nobody saw how: as every job of a launcher that tells us nothing does. But a
// good end leaves nobody inside an operation that somebody has not entered. Nothing more can be
// seen, and it may have been stopped on purpose: never a verdict.
void FindEndedAmid(const JobState& state, Candidates& out) {
  if (!IsOver(state)) return;
  std::map<Rank, Missed> missed = FindMissed(state);
  std::erase_if(missed,
                [&](const auto& entry) { return !EndedUnseen(state.ranks()[Value(entry.first)]); });
  if (missed.empty()) return;
  out.ended_amid = true;
  absl::Duration last = -absl::InfiniteDuration();
  for (const RankTrack& track : state.ranks()) {
    if (track.seen) last = std::max(last, EndOf(track));
  }
  // How somebody ended may be told yet.
  if (state.now() - last < state.thresholds().cascade_settle) return;
  size_t named = 0;
  for (const auto& [rank, how] : missed) {
    if (++named > kSuspectsMax) return;
    Candidate candidate;
    candidate.key = absl::StrCat("stop:", Value(rank));  // as of whom others wait for (hang.cc)
    Finding& finding = candidate.finding;
    finding.grade = Grade::kSuspicion;
    finding.syndrome = Syndrome::kEnded;
    finding.fault = FaultClass::kDead;
    finding.scope = Scope::kProcess;
    finding.suspects = {{rank, rank}};
    finding.communicator = how.communicator;
    finding.confidence = 0.5 / static_cast<double>(missed.size());
    finding.sentence = absl::StrFormat(
        "%s is gone, and so is the whole job, and nobody saw how; %d ranks were inside an "
        "operation that it had not entered: its launcher may have ended the job because of it.",
        RankName(state, rank), how.waiters);
    finding.evidence = {MissedText(how), "its process is gone, and nobody saw how"};
    finding.changes_mind =
        "The launcher's own log, or a job that was stopped on purpose: then whoever is late is "
        "missed.";
    out.found.push_back(std::move(candidate));
  }
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
  bool all_known = true;
  size_t stopped = 0;  // were told to end
  for (uint32_t r = 0; r < state.ranks().size(); ++r) {
    const RankTrack& track = state.ranks()[r];
    all_known &= track.seen && KindOf(track.report) != ExitKind::kUnknown;
    stopped += track.report.exit == ExitKind::kTerminated ? 1 : 0;
    const bool is_death = track.seen && IsDeath(track.report);
    // Beside a death an end that nobody saw may be its cause, or its consequence.
    if (!is_death && !EndedUnseen(track)) continue;
    any_death |= is_death;
    dead.push_back(Rank{r});
    greatest = std::max(greatest, KindOf(track.report));
    first = std::min(first, EndOf(track));
  }
  if (!any_death) {
    FindGone(state, out);
    return FindEndedAmid(state, out);
  }
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
  // Once it is known of every rank how it ended, nothing stronger can come.
  const bool settled = all_known || state.now() - first >= state.thresholds().cascade_settle;
  finding.grade = settled ? Grade::kVerdict : Grade::kSuspicion;
  finding.confidence = 0.98 / static_cast<double>(finding.suspects.size());
  const bool over = IsOver(state);
  std::vector<std::string> others;
  if (!weaker.empty()) {
    others.push_back(absl::StrFormat("%d others ended more mildly, as ranks do that lost a peer",
                                     weaker.size()));
  }
  if (stopped > 0) {
    others.push_back(absl::StrFormat("%d were told to end%s", stopped,
                                     over ? ", as a launcher does that ends its job" : ""));
  }
  if (others.empty()) others.push_back("nobody else has ended");
  finding.sentence = absl::StrFormat(
      "%s %s; %s.", absl::StrJoin(names, ", "),
      ExitText(state.ranks()[Value(finding.suspects[0].rank)].report), absl::StrJoin(others, ", "));
  if (over) {
    const std::map<Rank, Missed> missed = FindMissed(state);
    for (const Suspect& suspect : finding.suspects) {
      const auto found = missed.find(suspect.rank);
      if (found == missed.end()) continue;
      finding.evidence.push_back(
          absl::StrCat(RankName(state, suspect.rank), ": ", MissedText(found->second)));
    }
  }
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
