#include "monitor/testimony_book.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace holdfast::monitor {
namespace {

constexpr size_t kSuspectsMax = 16;

// Says where ranks stand, so it is true of one moment. The others say what has happened.
bool IsOfAMoment(Claim claim) {
  return claim != Claim::kGpuFault && claim != Claim::kGpuImpaired && claim != Claim::kEnded;
}

bool IsOfTheSource(Claim claim) { return claim == Claim::kHeard || claim == Claim::kUnheard; }

// Whom it names is the one to look at; kEntered and kCompleted say where somebody is, no more.
bool Accuses(Claim claim) { return claim != Claim::kEntered && claim != Claim::kCompleted; }

bool IsStandstill(const Finding& finding) {
  return finding.syndrome == Syndrome::kCommunicationHang ||
         finding.syndrome == Syndrome::kNonCommunicationHang;
}

bool Names(const Finding& finding, Rank rank) {
  return std::any_of(finding.suspects.begin(), finding.suspects.end(),
                     [&](const Suspect& s) { return s.rank == rank || s.peer == rank; });
}

bool NamesNobody(const Finding& finding) {
  return finding.fault == FaultClass::kUnknown ||
         (finding.fault == FaultClass::kGpuHang && finding.scope == Scope::kNode);
}

// Whether what is said of a suspect is what one would see of such a fault.
bool Fits(Claim claim, FaultClass fault) {
  switch (claim) {
    case Claim::kNeverEntered:
    case Claim::kBehind:
    case Claim::kOddStack:
      return fault != FaultClass::kLink && fault != FaultClass::kSenderEnd &&
             fault != FaultClass::kReceiverEnd && fault != FaultClass::kMismatch;
    case Claim::kDiffers:
      return fault == FaultClass::kMismatch || fault == FaultClass::kNeverEntered ||
             fault == FaultClass::kDeadlock || fault == FaultClass::kUnknown;
    case Claim::kMissing:
    case Claim::kEnded:
      return fault == FaultClass::kUnknown || fault >= FaultClass::kNeverEntered;
    case Claim::kGpuFault:
      return fault != FaultClass::kLateData && fault != FaultClass::kMismatch &&
             fault != FaultClass::kDeadlock && fault != FaultClass::kStopped;
    case Claim::kGpuImpaired:
      return fault == FaultClass::kLateCompute || fault == FaultClass::kSenderEnd ||
             fault == FaultClass::kReceiverEnd || fault == FaultClass::kGpuHang;
    case Claim::kEntered:
    case Claim::kCompleted:
    case Claim::kHeard:
    case Claim::kUnheard:
      return false;
  }
  return false;
}

// What a claim means where nothing else says why.
struct Meaning {
  Syndrome syndrome{};
  FaultClass fault{};
  Scope scope{};
};
Meaning MeaningOf(Claim claim) {
  switch (claim) {
    case Claim::kNeverEntered:
    case Claim::kBehind:
      return {Syndrome::kNonCommunicationHang, FaultClass::kNeverEntered, Scope::kRankLate};
    case Claim::kDiffers:
      return {Syndrome::kCommunicationHang, FaultClass::kMismatch, Scope::kProgram};
    case Claim::kMissing:
      return {Syndrome::kNonCommunicationHang, FaultClass::kNeverEntered, Scope::kProcess};
    case Claim::kEnded:
      return {Syndrome::kEnded, FaultClass::kDead, Scope::kProcess};
    case Claim::kGpuFault:
      return {Syndrome::kEnded, FaultClass::kGpuFault, Scope::kGpu};
    case Claim::kEntered:
    case Claim::kCompleted:
    case Claim::kOddStack:
    case Claim::kGpuImpaired:
    case Claim::kHeard:
    case Claim::kUnheard:
      break;
  }
  return {Syndrome::kCommunicationHang, FaultClass::kUnknown, Scope::kCommunicator};
}

std::string Said(const Testimony& testimony) {
  return absl::StrFormat("%s: %s", Name(testimony.source), testimony.sentence);
}

std::vector<Suspect> SuspectsOf(const std::vector<Rank>& ranks) {
  std::vector<Suspect> suspects;
  for (const Rank rank : ranks) {
    if (suspects.size() < kSuspectsMax) suspects.push_back({rank, rank});
  }
  return suspects;
}

auto KeyOf(const Testimony& t) {
  return std::tie(t.source, t.group, t.claim, t.ranks, t.code, t.node);
}

// The greater says more about why.
int WeightOf(Claim claim) {
  switch (claim) {
    case Claim::kGpuFault:
      return 5;
    case Claim::kDiffers:
      return 4;
    case Claim::kNeverEntered:
    case Claim::kBehind:
      return 3;
    case Claim::kMissing:
      return 2;
    case Claim::kEntered:
      return 1;
    default:
      return 0;
  }
}

struct Heard {
  const Testimony* testimony = nullptr;
  absl::Duration standing;  // by now
};

// A finding about ranks that no telemetry shows, from what is said of them alone. Nothing if it is
// too early, or if what their processes show explains it without a fault.
std::optional<Candidate> AloneOf(const JobState& state, const std::vector<Rank>& ranks,
                                 const std::vector<Heard>& heard, Candidates& out) {
  const Thresholds& t = state.thresholds();
  const Testimony* strongest = heard.front().testimony;
  std::set<Source> sources;
  absl::Duration standing;
  std::optional<absl::Duration> normal;
  double doubt = 1;
  Candidate candidate;
  Finding& finding = candidate.finding;
  for (const Heard& one : heard) {
    const Testimony& said = *one.testimony;
    if (WeightOf(said.claim) > WeightOf(strongest->claim)) strongest = &said;
    if (said.standing > absl::ZeroDuration()) standing = std::max(standing, one.standing);
    if (said.normal.has_value()) normal = std::max(normal.value_or(*said.normal), *said.normal);
    if (sources.insert(said.source).second) doubt *= 1 - 0.7 * said.certainty;
    finding.evidence.push_back(Said(said));
  }
  const Meaning meaning = MeaningOf(strongest->claim);
  finding.syndrome = meaning.syndrome;
  finding.fault = meaning.fault;
  finding.scope = meaning.scope;
  finding.suspects = SuspectsOf(ranks);
  finding.confidence = 1 - doubt;
  finding.sentence = absl::StrCat(strongest->sentence, ".");
  finding.changes_mind = "Telemetry of these ranks, or what the same source says next.";
  // As hang.cc calls the same incident once telemetry shows it.
  candidate.key = absl::StrCat(ranks.size() == 1 ? "stop:" : "witness:", Value(ranks.front()));
  candidate.standing = standing;
  if (strongest->claim == Claim::kGpuFault) {
    finding.grade = Grade::kVerdict;
    return candidate;
  }

  const RankTrack& track = state.ranks()[Value(ranks.front())];
  absl::Duration busy = t.busy_timeout;
  if (normal.has_value()) {
    busy = std::max(t.busy_timeout_min, std::min(t.busy_timeout, *normal * t.busy_factor));
  }
  size_t witnesses = sources.size();
  bool is_busy = strongest->claim == Claim::kEntered;  // names nobody: only the time-out counts
  if (ranks.size() == 1 && track.seen) {
    const auto idle =
        absl::Microseconds(static_cast<int64_t>(track.clock_us - track.idle_since_us));
    if (track.report.process == ProcessState::kGone || track.report.exit != ExitKind::kNone) {
      return std::nullopt;  // FindEnded has it
    }
    if (track.InPause()) return std::nullopt;
    if (track.report.process == ProcessState::kStopped) {
      ++witnesses;
      finding.fault = FaultClass::kStopped;
      finding.scope = Scope::kProcess;
      finding.evidence.push_back("its process is in state T (stopped)");
    } else if (track.report.process != ProcessState::kUnknown && idle < t.hang_suspicion) {
      is_busy = true;
    } else if (track.report.process != ProcessState::kUnknown) {
      ++witnesses;
      finding.scope = Scope::kProcess;
      finding.evidence.push_back(
          absl::StrCat("its process has used no CPU for ", SecondsText(idle)));
    }
    if (is_busy && standing >= t.hang_suspicion) {
      out.notes.push_back(
          {WaitNote::Reason::kBusy, ranks.front(),
           absl::StrCat(RankName(state, ranks.front()), " is busy: ", strongest->sentence, ".")});
    }
  }
  const absl::Duration beyond = normal.value_or(absl::ZeroDuration()) * t.standstill_factor;
  absl::Duration suspicion = std::max(t.hang_suspicion, beyond), verdict = busy;
  if (is_busy) {
    if (strongest->claim != Claim::kEntered) suspicion = busy;
  } else if (normal.has_value()) {
    verdict = std::max(witnesses > 1 ? t.hang_verdict : t.hang_verdict_alone, beyond);
  } else if (witnesses > 1) {
    verdict = t.hang_verdict_alone;
  }
  if (standing < suspicion) return std::nullopt;
  finding.grade = standing >= verdict ? Grade::kVerdict : Grade::kSuspicion;
  return candidate;
}

}  // namespace

void TestimonyBook::Take(absl::Duration now, std::span<const Testimony> arrived,
                         const Thresholds& thresholds) {
  ++batch_;
  for (const Testimony& testimony : arrived) {
    if (IsOfTheSource(testimony.claim)) {
      TakeState(now, testimony);
      continue;
    }
    // What a source says of a moment replaces what it said of an earlier one.
    if (IsOfAMoment(testimony.claim)) {
      std::erase_if(entries_, [&](const Entry& entry) {
        return entry.batch < batch_ && IsOfAMoment(entry.testimony.claim) &&
               entry.testimony.source == testimony.source &&
               entry.testimony.node == testimony.node && entry.testimony.group == testimony.group;
      });
    }
    Entry entry{testimony, now - testimony.age, batch_};
    const auto at = std::lower_bound(
        entries_.begin(), entries_.end(), entry,
        [](const Entry& a, const Entry& b) { return KeyOf(a.testimony) < KeyOf(b.testimony); });
    if (at != entries_.end() && KeyOf(at->testimony) == KeyOf(testimony)) {
      // Of two the later observation; of the same moment either, but always the same one.
      if (std::tie(at->observed, at->testimony.sentence) <
          std::tie(entry.observed, entry.testimony.sentence)) {
        *at = std::move(entry);
      }
    } else {
      entries_.insert(at, std::move(entry));
    }
  }
  std::erase_if(entries_, [&](const Entry& entry) {
    return now - entry.observed > thresholds.witness_cause_age;
  });
  while (entries_.size() > kTestimoniesKeptMax) {
    entries_.erase(
        std::min_element(entries_.begin(), entries_.end(),
                         [](const Entry& a, const Entry& b) { return a.observed < b.observed; }));
  }
}

void TestimonyBook::TakeState(absl::Duration now, const Testimony& testimony) {
  const auto key = std::pair(testimony.source, testimony.node);
  auto found = states_.find(key);
  if (found == states_.end()) {
    if (states_.size() >= kWitnessStatesMax) return;
    found = states_.emplace(key, State{.heard = false, .why = "", .observed = now - testimony.age})
                .first;
  }
  State& state = found->second;
  const bool heard = testimony.claim == Claim::kHeard;
  const absl::Duration observed = now - testimony.age;
  // As with testimonies: of the same moment always the same one.
  if (std::tie(observed, heard, testimony.sentence) <
      std::tie(state.observed, state.heard, state.why)) {
    return;
  }
  state = {heard, testimony.sentence, observed};
}

std::vector<WitnessState> TestimonyBook::states() const {
  std::vector<WitnessState> all;
  for (const auto& [key, state] : states_) {
    all.push_back({key.first, key.second, state.heard, state.why});
  }
  return all;
}

std::vector<std::string> TestimonyBook::Unheard() const {
  struct Absence {
    size_t nodes = 0;
    std::string node, why;  // of the first of them
  };
  std::map<Source, Absence> absences;
  for (const auto& [key, state] : states_) {
    if (state.heard) continue;
    Absence& absence = absences[key.first];
    if (absence.nodes++ == 0) {
      absence.node = key.second;
      absence.why = state.why;
    }
  }
  std::vector<std::string> lines;
  for (const auto& [source, absence] : absences) {
    lines.push_back(absl::StrFormat(
        "%s was not heard%s%s: %s", Name(source),
        absence.node.empty() ? "" : absl::StrCat(" on ", absence.node),
        absence.nodes == 1 ? "" : absl::StrFormat(" and %d more nodes", absence.nodes - 1),
        absence.why));
  }
  return lines;
}

bool TestimonyBook::IsAbout(const JobState& state, const Entry& entry,
                            const Candidate& candidate) const {
  if (!IsOfAMoment(entry.testimony.claim)) return true;  // Take has forgotten what is too old
  const Thresholds& thresholds = state.thresholds();
  const absl::Duration reach =
      IsStandstill(candidate.finding) ? candidate.standing : thresholds.witness_alone_age;
  return state.now() - entry.observed <= reach + thresholds.witness_slack;
}

void TestimonyBook::Speak(const JobState& state, Candidates& candidates) const {
  if (!entries_.empty()) {
    for (Candidate& candidate : candidates.found) SpeakOf(state, candidate);
    SpeakAlone(state, candidates);
  }
  if (candidates.found.empty()) return;
  const std::vector<std::string> unheard = Unheard();
  for (Candidate& candidate : candidates.found) {
    std::vector<std::string>& evidence = candidate.finding.evidence;
    evidence.insert(evidence.end(), unheard.begin(), unheard.end());
  }
}

void TestimonyBook::SpeakOf(const JobState& state, Candidate& candidate) const {
  const Thresholds& thresholds = state.thresholds();
  Finding& finding = candidate.finding;
  const bool open = NamesNobody(finding);
  const auto may_be = [&](Rank rank) {
    if (Value(rank) >= state.ranks().size()) return false;
    if (Names(finding, rank)) return true;
    return finding.scope == Scope::kBehindBlindRank && state.ranks()[Value(rank)].IsBlind();
  };
  std::set<Source> agreeing;
  double doubt = 1, trust = 1;
  const Testimony* who = nullptr;  // the surest one that names one of those who may be it
  const Testimony* fault = nullptr;
  for (const Entry& entry : entries_) {
    const Testimony& testimony = entry.testimony;
    if (testimony.ranks.empty() || !IsAbout(state, entry, candidate)) continue;
    const bool named = std::any_of(testimony.ranks.begin(), testimony.ranks.end(), may_be);
    // Others stand inside an operation: whoever has gone unseen is missed.
    if (!named && testimony.claim == Claim::kEntered && finding.syndrome == Syndrome::kEnded &&
        testimony.standing + (state.now() - entry.observed) >= thresholds.hang_suspicion &&
        candidate.verdict_with_one < absl::InfiniteDuration()) {
      agreeing.insert(testimony.source);
      doubt *= 1 - thresholds.agreement_weight * testimony.certainty;
      finding.evidence.push_back(Said(testimony));
      continue;
    }
    if (named && Accuses(testimony.claim) && Fits(testimony.claim, finding.fault)) {
      agreeing.insert(testimony.source);
      doubt *= 1 - thresholds.agreement_weight * testimony.certainty;
      finding.evidence.push_back(Said(testimony));
      if (open && (who == nullptr || testimony.certainty > who->certainty)) who = &testimony;
      if (testimony.claim == Claim::kGpuFault &&
          testimony.certainty >= thresholds.witness_verdict_certainty) {
        fault = &testimony;
      }
      continue;
    }
    // Somebody who did come is not one who never came.
    const bool did_come =
        named && testimony.claim == Claim::kEntered && finding.fault == FaultClass::kNeverEntered;
    // A fault somewhere else is no word about this one.
    const bool other = !named && Accuses(testimony.claim) && IsOfAMoment(testimony.claim) &&
                       IsStandstill(finding) && !open;
    if (!did_come && !other) continue;
    trust *= 1 - thresholds.contradiction_weight * testimony.certainty;
    finding.evidence.push_back(absl::StrCat("against it, ", Said(testimony)));
  }
  if (who != nullptr) {
    finding.suspects = SuspectsOf(who->ranks);
    const Meaning meaning = MeaningOf(who->claim);
    if (finding.fault == FaultClass::kGpuHang) {
      finding.scope = finding.suspects.size() == 1 ? Scope::kGpu : Scope::kNode;
    } else {
      finding.syndrome = meaning.syndrome;
      finding.fault = meaning.fault;
      finding.scope = meaning.fault == FaultClass::kUnknown && finding.suspects.size() == 1
                          ? Scope::kRankLate
                          : meaning.scope;
    }
    finding.confidence = std::max(finding.confidence, 0.7 * who->certainty);
    finding.sentence = absl::StrCat(finding.sentence, " ", who->sentence, ".");
  }
  // The driver's word is better than any inference about the same GPU; a process that died of it is
  // still a dead process.
  if (fault != nullptr) {
    finding.scope = Scope::kGpu;
    finding.suspects = SuspectsOf(fault->ranks);
    finding.fault = std::max(finding.fault, FaultClass::kGpuFault);
    finding.sentence = absl::StrCat(finding.sentence, " ", fault->sentence, ".");
  } else if (finding.fault == FaultClass::kLateCompute && agreeing.contains(Source::kNvml)) {
    finding.scope = Scope::kGpu;
  }
  finding.confidence = 1 - (1 - finding.confidence) * doubt;
  if (!agreeing.empty() && trust == 1) {
    const absl::Duration needed =
        agreeing.size() > 1 ? candidate.verdict_with_two : candidate.verdict_with_one;
    if (candidate.standing >= needed) finding.grade = Grade::kVerdict;
  }
  if (fault != nullptr) finding.grade = Grade::kVerdict;
  finding.confidence *= trust;
}

// Where telemetry is blind: by ranks, what is said of them.
void TestimonyBook::SpeakAlone(const JobState& state, Candidates& candidates) const {
  const Thresholds& thresholds = state.thresholds();
  const auto blind = [&](Rank rank) {
    if (Value(rank) >= state.ranks().size()) return false;
    const RankTrack& track = state.ranks()[Value(rank)];
    return track.IsBlind() || track.communicators.empty();
  };
  const bool standing = std::any_of(candidates.found.begin(), candidates.found.end(),
                                    [](const Candidate& c) { return IsStandstill(c.finding); });
  std::map<std::vector<Rank>, std::vector<Heard>> by_ranks;
  for (const Entry& entry : entries_) {
    const Testimony& testimony = entry.testimony;
    if (testimony.ranks.empty() || Value(testimony.ranks.back()) >= state.ranks().size()) continue;
    const bool known = std::any_of(
        candidates.found.begin(), candidates.found.end(), [&](const Candidate& candidate) {
          return std::any_of(testimony.ranks.begin(), testimony.ranks.end(),
                             [&](Rank rank) { return Names(candidate.finding, rank); });
        });
    if (known) continue;
    if (testimony.claim == Claim::kGpuFault) {
      if (testimony.certainty < thresholds.witness_verdict_certainty) continue;
    } else {
      const bool counts = testimony.claim == Claim::kOddStack || WeightOf(testimony.claim) > 0;
      if (!counts || standing || state.now() - entry.observed > thresholds.witness_alone_age ||
          !std::all_of(testimony.ranks.begin(), testimony.ranks.end(), blind)) {
        continue;
      }
    }
    by_ranks[testimony.ranks].push_back(
        {&testimony, testimony.standing + (state.now() - entry.observed)});
  }
  // Stacks alone say nothing, and who came is only told where nobody is said not to have come.
  const auto weight = [](const auto& group) {
    int most = 0;
    for (const Heard& heard : group.second) most = std::max(most, WeightOf(heard.testimony->claim));
    return most;
  };
  int most = 0;
  for (const auto& group : by_ranks) most = std::max(most, weight(group));
  for (const auto& group : by_ranks) {
    const int own = weight(group);
    if (own == 0 || (own == WeightOf(Claim::kEntered) && most > own)) continue;
    std::optional<Candidate> candidate = AloneOf(state, group.first, group.second, candidates);
    if (candidate.has_value()) candidates.found.push_back(*std::move(candidate));
  }
}

}  // namespace holdfast::monitor
