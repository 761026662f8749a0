// Who stands still and why: the sinks and rings of the wait-for graph, each looked at once more
// with what its own node says of it.
#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "monitor/candidates.h"
#include "monitor/wait_edges.h"
#include "monitor/wait_graph.h"

namespace holdfast::monitor {
namespace {

constexpr size_t kSuspectsMax = 16;

struct Patience {
  absl::Duration suspicion;
  absl::Duration verdict;
  absl::Duration busy;
  // With one or two witnesses more, who say of their own who it is.
  absl::Duration verdict_with_one = absl::InfiniteDuration();
  absl::Duration verdict_with_two = absl::InfiniteDuration();
  uint64_t communicator = 0;
};

// `witnesses`: how many of the telemetry itself name the suspect.
Patience PatienceFor(const JobState& state, uint64_t communicator, int witnesses) {
  const Thresholds& t = state.thresholds();
  const std::optional<absl::Duration> normal = state.NormalStandstill(communicator);
  // No baseline: no verdict before the configured time-out.
  if (!normal.has_value()) {
    return {.suspicion = t.hang_suspicion,
            .verdict = t.busy_timeout,
            .busy = t.busy_timeout,
            .communicator = communicator};
  }
  const absl::Duration beyond = *normal * t.standstill_factor;
  const absl::Duration agreed = std::max(t.hang_verdict, beyond);
  const absl::Duration alone = std::max(t.hang_verdict_alone, beyond);
  return {std::max(t.hang_suspicion, beyond), witnesses > 1 ? agreed : alone,
          std::max(t.busy_timeout_min, std::min(t.busy_timeout, *normal * t.busy_factor)),
          // The first witness of a standstill whose telemetry names nobody is alone.
          witnesses > 0 ? agreed : alone, agreed, communicator};
}

// Where no witness shortens the wait for a verdict: the rank is about something that may be in
// order.
Patience Unhurried(const Patience& patience, absl::Duration suspicion, absl::Duration verdict) {
  return {.suspicion = suspicion,
          .verdict = verdict,
          .busy = verdict,
          .communicator = patience.communicator};
}

// What is known of the waits that end at one node.
struct Pressure {
  absl::Duration standing;
  uint64_t communicator = 0;
  bool entered = false;  // it is inside the operation
};

class HangSearch {
 public:
  HangSearch(const JobState& state, Candidates& out)
      : state_(state), out_(out), picture_(DrawWaits(state)), mismatches_(FindMismatches(state)) {}

  void Run() {
    for (const Mismatch& mismatch : mismatches_) AddMismatch(mismatch);
    std::vector<WaitEdge> edges;
    for (const ReasonedEdge& edge : picture_.edges) {
      edges.push_back(edge.ends);
      Pressure& pressure = pressure_[edge.ends.awaited];
      if (edge.standing >= pressure.standing) {
        pressure.standing = edge.standing;
        pressure.communicator = edge.communicator;
      }
      pressure.entered |=
          edge.reason == WaitReason::kNoData || edge.reason == WaitReason::kNoCredit;
    }
    const WaitRoots roots = FindWaitRoots(picture_.node_count, picture_.rank_count, edges);
    for (const std::vector<uint32_t>& ring : roots.deadlocks) AddRing(ring);
    std::vector<WaitRoots::Sink> links, blind, operations;
    for (const WaitRoots::Sink& sink : roots.sinks) {
      if (Explained(pressure_[sink.node].communicator)) continue;
      if (picture_.links.contains(sink.node)) {
        links.push_back(sink);
      } else if (picture_.operations.contains(sink.node)) {
        operations.push_back(sink);
      } else if (picture_.unknown_members.contains(sink.node)) {
        blind.push_back(sink);
      } else if (Blind(Rank{sink.node})) {
        blind.push_back(sink);
      } else {
        AddRank(Rank{sink.node}, sink.waiters);
      }
    }
    AddLinks(links);
    // A rank without telemetry may be a victim like the others, and an operation that all have
    // entered says nothing: they are named only where nothing else is.
    if (explained_) return;
    for (const WaitRoots::Sink& sink : blind) AddBlind(sink);
    if (!blind.empty()) return;
    for (const WaitRoots::Sink& sink : operations) AddOperation(sink);
  }

 private:
  bool Blind(Rank rank) const {
    const RankTrack& track = state_.ranks()[Value(rank)];
    return track.IsBlind() && !track.CannotRun() && !state_.IsSilent(rank);
  }
  // Patience begins anew when a rank comes back from a pause, in which nobody blamed it.
  void ForgivePause(Rank rank) {
    const RankTrack& track = state_.ranks()[Value(rank)];
    if (track.last_pause_us == 0 || track.InPause()) return;
    absl::Duration& standing = pressure_[Value(rank)].standing;
    standing = std::min(
        standing, absl::Microseconds(static_cast<int64_t>(track.clock_us - track.last_pause_us)));
  }
  static bool IsInside(const RankTrack& track) {
    return std::any_of(track.communicators.begin(), track.communicators.end(), [](const auto& c) {
      return c.IsOpen() && std::any_of(c.now.connections.begin(), c.now.connections.end(),
                                       [](const ConnectionReport& connection) {
                                         return connection.state != WaitState::kNone;
                                       });
    });
  }
  // FindEnded has named the cause of this and of other ends.
  bool HasDeath() const {
    return std::any_of(out_.found.begin(), out_.found.end(),
                       [](const Candidate& candidate) { return candidate.key == "ended"; });
  }
  bool Explained(uint64_t communicator) const {
    return std::any_of(mismatches_.begin(), mismatches_.end(),
                       [&](const Mismatch& m) { return m.communicator == communicator; });
  }

  // Adds a candidate if `standing` is long enough for a suspicion at least.
  void Add(std::string key, Finding finding, absl::Duration standing, const Patience& patience) {
    explained_ = true;
    if (standing < patience.suspicion) return;
    finding.grade = standing >= patience.verdict ? Grade::kVerdict : Grade::kSuspicion;
    finding.communicator = patience.communicator;
    finding.standing = standing;
    if (patience.busy > absl::ZeroDuration()) finding.timeout = patience.busy;
    out_.found.push_back({std::move(key), std::move(finding), standing, patience.verdict_with_one,
                          patience.verdict_with_two});
  }

  void AddMismatch(const Mismatch& mismatch) {
    Finding finding;
    finding.syndrome = Syndrome::kCommunicationHang;
    finding.fault = FaultClass::kMismatch;
    finding.scope = Scope::kProgram;
    for (const Rank rank : mismatch.odd) finding.suspects.push_back({rank, rank});
    finding.confidence = mismatch.tie ? 0.5 : 0.95;
    finding.sentence = absl::StrFormat(
        "The ranks of %s call different operations%s: %s; none of them can go on.",
        CommunicatorName(mismatch.communicator),
        mismatch.tie ? "" : absl::StrCat(" (odd: ", Names(mismatch.odd), ")"), mismatch.what);
    finding.evidence = {mismatch.what,
                        absl::StrCat("standing for ", SecondsText(mismatch.standing))};
    finding.changes_mind = "The operation finishing: then the program meant it so.";
    Add(absl::StrFormat("mismatch:%x", mismatch.communicator), std::move(finding),
        mismatch.standing, PatienceFor(state_, mismatch.communicator, 2));
  }

  void AddRing(const std::vector<uint32_t>& ring) {
    const std::set<uint32_t> inside(ring.begin(), ring.end());
    std::set<uint64_t> communicators;
    bool point_to_point = false;
    absl::Duration standing = absl::InfiniteDuration();
    for (const ReasonedEdge& edge : picture_.edges) {
      if (!inside.contains(edge.ends.waiter) || !inside.contains(edge.ends.awaited)) continue;
      communicators.insert(edge.communicator);
      point_to_point |= edge.point_to_point;
      standing = std::min(standing, edge.standing);
    }
    if (std::any_of(communicators.begin(), communicators.end(),
                    [&](uint64_t id) { return Explained(id); })) {
      return;
    }
    std::vector<Rank> ranks;
    for (const uint32_t node : ring) {
      if (node < picture_.rank_count) ranks.push_back(Rank{node});
    }
    Finding finding;
    finding.syndrome = Syndrome::kCommunicationHang;
    if (const std::vector<Rank> hidden = WaitInsideOnly(ring); !hidden.empty()) {
      return AddInside(hidden, *communicators.begin(), standing);
    }
    const bool program = communicators.size() > 1 || point_to_point;
    finding.fault = program ? FaultClass::kDeadlock : FaultClass::kUnknown;
    finding.scope = program ? Scope::kProgram : Scope::kCommunicator;
    for (const Rank rank : ranks) finding.suspects.push_back({rank, rank});
    finding.confidence = program ? 0.9 : 0.3;
    finding.sentence = program
                           ? absl::StrFormat(
                                 "The program waits for itself: %s wait for each other in %d "
                                 "communicators, and nobody outside holds them up.",
                                 Names(ranks), communicators.size())
                           : absl::StrFormat(
                                 "%s wait for each other inside one operation, and nothing that is "
                                 "visible says why.",
                                 Names(ranks));
    finding.evidence = {
        absl::StrCat("a ring of waits without a way out, for ", SecondsText(standing))};
    finding.changes_mind = "Any progress of one of them.";
    Add(absl::StrCat("ring:", Value(ranks.front())), std::move(finding), standing,
        PatienceFor(state_, *communicators.begin(), program ? 2 : 0));
  }

  // Those in the ring that wait for nothing but the inside of their node, where all have entered.
  // They are in it only because an inside stands for all its members; a deadlock has none of them.
  std::vector<Rank> WaitInsideOnly(const std::vector<uint32_t>& ring) const {
    std::set<uint32_t> waits_elsewhere, incomplete;
    std::map<uint32_t, uint32_t> inside_of;  // by rank
    for (const ReasonedEdge& edge : picture_.edges) {
      const bool to_inside = picture_.insides.contains(edge.ends.awaited);
      if (picture_.insides.contains(edge.ends.waiter) && edge.reason != WaitReason::kOperation) {
        incomplete.insert(edge.ends.waiter);
      } else if (to_inside) {
        inside_of[edge.ends.waiter] = edge.ends.awaited;
      } else {
        waits_elsewhere.insert(edge.ends.waiter);
      }
    }
    // Of several nodes the one that has sent least: whoever stands behind it could send a little
    // more of its own before it had to wait.
    std::map<std::pair<uint64_t, uint64_t>, std::vector<Rank>> by_progress;
    for (const uint32_t node : ring) {
      const auto inside = inside_of.find(node);
      if (node < picture_.rank_count && inside != inside_of.end() &&
          !incomplete.contains(inside->second) && !waits_elsewhere.contains(node)) {
        by_progress[SentBy(inside->second)].push_back(Rank{node});
      }
    }
    return by_progress.empty() ? std::vector<Rank>{} : by_progress.begin()->second;
  }

  // The operation and the steps that the members inside one node have sent out of it.
  std::pair<uint64_t, uint64_t> SentBy(uint32_t inside) const {
    const uint64_t communicator = picture_.insides.at(inside);
    uint64_t operation = UINT64_MAX, steps = 0;
    for (const ReasonedEdge& edge : picture_.edges) {
      if (edge.ends.waiter != inside || edge.ends.awaited >= picture_.rank_count) continue;
      const CommunicatorTrack* c = state_.ranks()[edge.ends.awaited].Find(communicator);
      if (c == nullptr) continue;
      for (const ConnectionReport& connection : c->now.connections) {
        if (connection.direction != Direction::kSend) continue;
        operation = std::min(operation, connection.operation);
        steps += connection.steps_done;
      }
    }
    return {operation, steps};
  }

  // They wait for nobody outside: one of their GPUs, and nothing shows which.
  void AddInside(const std::vector<Rank>& ranks, uint64_t communicator, absl::Duration standing) {
    Finding finding;
    finding.syndrome = Syndrome::kCommunicationHang;
    finding.fault = FaultClass::kGpuHang;
    finding.scope = ranks.size() == 1 ? Scope::kGpu : Scope::kNode;
    for (const Rank rank : ranks) finding.suspects.push_back({rank, rank});
    finding.confidence = 0.8 / static_cast<double>(ranks.size());
    finding.sentence = absl::StrFormat(
        "The GPU of %s%s does nothing inside an operation of %s, for %s; what passes between "
        "them "
        "inside their node is not visible.",
        ranks.size() == 1 ? "" : "one of ", Names(ranks), CommunicatorName(communicator),
        SecondsText(standing));
    finding.evidence = {"they wait for nobody outside of their node, and others wait for them"};
    finding.changes_mind = "Kernel times (level full) or stacks, which show the one that differs.";
    Add(absl::StrCat("inside:", Value(ranks.front())), std::move(finding), standing,
        PatienceFor(state_, communicator, 2));
  }

  void AddRank(Rank rank, uint32_t waiters) {
    const RankTrack& track = state_.ranks()[Value(rank)];
    ForgivePause(rank);
    const Pressure& pressure = pressure_[Value(rank)];
    // It may stand in an operation that the others have left, and be missed in the next one.
    const bool entered = pressure.entered || IsInside(track);
    Finding finding;
    finding.suspects = {{rank, rank}};
    finding.confidence = 0.9;
    finding.syndrome = entered ? Syndrome::kCommunicationHang : Syndrome::kNonCommunicationHang;
    finding.evidence = {absl::StrFormat("%d ranks wait for it in %s, for %s", waiters,
                                        CommunicatorName(pressure.communicator),
                                        SecondsText(pressure.standing))};
    const std::string name = RankName(state_, rank);
    const std::string waits = absl::StrFormat("%d ranks have waited for it for %s", waiters,
                                              SecondsText(pressure.standing));
    const std::string key = absl::StrCat("stop:", Value(rank));
    Patience patience = PatienceFor(state_, pressure.communicator, 2);
    if (track.report.exit != ExitKind::kNone || track.report.process == ProcessState::kGone) {
      const bool unseen =
          track.report.exit == ExitKind::kNone || track.report.exit == ExitKind::kUnknown;
      if (unseen ? HasDeath() : track.report.exit > ExitKind::kTerminated) {
        explained_ = true;
        return;
      }
      if (unseen) finding.evidence.push_back("its process is gone, and nobody saw how");
      finding.syndrome = Syndrome::kEnded;
      finding.fault = FaultClass::kDead;
      finding.scope = Scope::kProcess;
      finding.sentence = absl::StrCat("The process of ", name, " has ended, and ", waits, ".");
      finding.changes_mind = "The others ending too: then the job was stopped.";
      patience.verdict = state_.thresholds().hang_verdict;
      return Add(key, std::move(finding), pressure.standing, patience);
    }
    if (track.report.process == ProcessState::kStopped) {
      finding.fault = FaultClass::kStopped;
      finding.scope = Scope::kProcess;
      finding.evidence.push_back("its process is in state T (stopped)");
      finding.sentence = absl::StrCat("The process of ", name,
                                      " is stopped (a signal or a debugger), and ", waits, ".");
      finding.changes_mind = "Its process state: once continued, this is withdrawn.";
      return Add(key, std::move(finding), pressure.standing, patience);
    }
    if (state_.IsSilent(rank)) return AddSilent(rank, waits, std::move(finding));
    if (IsStarved(state_, rank)) {
      finding.fault = FaultClass::kStarvedProxy;
      finding.scope = Scope::kHost;
      finding.evidence.push_back(
          absl::StrFormat("its proxy threads were ready and got no CPU for %d%% of the time",
                          static_cast<int>(track.run_delay_share * 100)));
      finding.sentence =
          absl::StrCat("The proxy threads of ", name, " get no CPU, and ", waits, ".");
      finding.changes_mind = "Its threads running again without the operation going on.";
      return Add(key, std::move(finding), pressure.standing, patience);
    }
    if (entered) {
      finding.fault = FaultClass::kGpuHang;
      finding.scope = Scope::kGpu;
      finding.evidence.push_back("its own board: it waits for nobody but its GPU");
      finding.sentence =
          absl::StrCat("The GPU of ", name, " does nothing inside an operation: ", waits,
                       ", and it waits for nobody.");
      finding.changes_mind =
          "A long kernel before this operation on the same stream: it would end by itself.";
      return Add(key, std::move(finding), pressure.standing, patience);
    }
    AddAbsent(rank, waits, std::move(finding));
  }

  void AddSilent(Rank rank, const std::string& waits, Finding finding) {
    const uint32_t node = state_.shape().ranks[Value(rank)].node;
    finding.syndrome = Syndrome::kEnded;
    finding.fault = FaultClass::kNodeSilent;
    finding.scope = Scope::kNode;
    finding.suspects.clear();
    for (uint32_t r = 0; r < state_.ranks().size(); ++r) {
      if (state_.shape().ranks[r].node == node) finding.suspects.push_back({Rank{r}, Rank{r}});
    }
    const absl::Duration age = state_.Age(rank);
    finding.evidence.push_back(absl::StrCat("its agent has said nothing for ", SecondsText(age)));
    finding.sentence = absl::StrFormat("Node %s has said nothing for %s, and its peers notice: %s.",
                                       NodeName(state_, node), SecondsText(age), waits);
    finding.changes_mind = "A report from its agent that shows its ranks at work.";
    Patience patience;
    patience.suspicion = state_.thresholds().node_silent;
    patience.verdict = state_.thresholds().node_silent_verdict;
    const std::string key = absl::StrCat("node:", node);
    const bool known = std::any_of(out_.found.begin(), out_.found.end(),
                                   [&](const Candidate& c) { return c.key == key; });
    if (!known) Add(key, std::move(finding), age, patience);
  }

  // It is outside of the operation that the others are in.
  void AddAbsent(Rank rank, const std::string& waits, Finding finding) {
    const RankTrack& track = state_.ranks()[Value(rank)];
    const Pressure& pressure = pressure_[Value(rank)];
    const Thresholds& thresholds = state_.thresholds();
    const std::string name = RankName(state_, rank);
    const std::string key = absl::StrCat("stop:", Value(rank));
    const Section* section = track.InnermostSection();
    Patience patience = PatienceFor(state_, pressure.communicator,
                                    track.report.process == ProcessState::kUnknown ? 1 : 2);
    finding.scope = Scope::kRankLate;
    if (track.InPause()) {
      out_.notes.push_back(
          {track.paused ? WaitNote::Reason::kEnginePause : WaitNote::Reason::kSection, rank,
           absl::StrFormat("%s is in a pause that is meant%s: %s.", name,
                           section == nullptr ? "" : " (" + section->name + ")", waits)});
      finding.fault = FaultClass::kPauseOverdue;
      finding.sentence = absl::StrCat(name, " does not come back from a pause: ", waits, ".");
      finding.changes_mind = "A pause that is known to take so long.";
      patience = Unhurried(patience, thresholds.section_timeout, thresholds.section_timeout);
      return Add(key, std::move(finding), pressure.standing, patience);
    }
    if (section != nullptr && section->kind == SectionKind::kData) {
      finding.fault = FaultClass::kLateData;
      finding.sentence = absl::StrCat(name, " waits for its data: ", waits, ".");
      finding.changes_mind = "Its leaving the section without the others going on.";
      patience = Unhurried(patience, patience.suspicion, patience.busy);
      return Add(key, std::move(finding), pressure.standing, patience);
    }
    const auto idle =
        absl::Microseconds(static_cast<int64_t>(track.clock_us - track.idle_since_us));
    const bool busy =
        track.report.process != ProcessState::kUnknown &&
        (idle < thresholds.hang_suspicion || track.cpu_share > thresholds.busy_cpu_share);
    finding.fault = FaultClass::kNeverEntered;
    finding.changes_mind = "Its entering the operation.";
    if (busy) {
      const std::string sentence = absl::StrCat(
          "Waiting for ", name, ", which is busy outside of the operation: ", waits, ".");
      out_.notes.push_back({WaitNote::Reason::kBusy, rank, sentence});
      finding.evidence.push_back(absl::StrFormat("it uses %.2f of a CPU, beyond the time-out of %s",
                                                 track.cpu_share, SecondsText(patience.busy)));
      finding.sentence = sentence;
      patience = Unhurried(patience, patience.busy, patience.busy);
      return Add(key, std::move(finding), pressure.standing, patience);
    }
    finding.scope = Scope::kProcess;
    finding.evidence.push_back(absl::StrCat("its process has used no CPU for ", SecondsText(idle)));
    finding.sentence =
        absl::StrCat(name, " never entered the operation and does nothing: ", waits, ".");
    Add(key, std::move(finding), pressure.standing, patience);
  }

  // Several links that share one end accuse that end.
  void AddLinks(const std::vector<WaitRoots::Sink>& sinks) {
    std::map<Rank, int> from_count, to_count;
    for (const WaitRoots::Sink& sink : sinks) {
      const auto [from, to] = picture_.links.at(sink.node);
      ++from_count[from];
      ++to_count[to];
    }
    std::set<std::string> told;
    for (const WaitRoots::Sink& sink : sinks) {
      const auto [from, to] = picture_.links.at(sink.node);
      const Pressure& pressure = pressure_[sink.node];
      Finding finding;
      finding.syndrome = Syndrome::kCommunicationHang;
      std::string key;
      const std::string pair =
          absl::StrCat("from ", RankName(state_, from), " to ", RankName(state_, to));
      if (from_count[from] > 1 && from_count[from] > to_count[to]) {
        finding.fault = FaultClass::kSenderEnd;
        finding.scope = Scope::kSenderNic;
        finding.suspects = {{from, from}};
        finding.sentence = absl::StrFormat("Nothing that %s sends arrives, to %d receivers",
                                           RankName(state_, from), from_count[from]);
        key = absl::StrCat("stop:", Value(from));
      } else if (to_count[to] > 1) {
        finding.fault = FaultClass::kReceiverEnd;
        finding.scope = Scope::kReceiverNic;
        finding.suspects = {{to, to}};
        finding.sentence = absl::StrFormat("Nothing arrives at %s, from %d senders",
                                           RankName(state_, to), to_count[to]);
        key = absl::StrCat("stop:", Value(to));
      } else {
        finding.fault = FaultClass::kLink;
        finding.scope = Scope::kConnection;
        finding.suspects = {{from, to}};
        finding.sentence = absl::StrFormat("Nothing passes %s: both are ready, and %d ranks wait",
                                           pair, sink.waiters);
        key = absl::StrCat("stop:", Value(from), ">", Value(to));
      }
      finding.confidence = 0.85;
      finding.evidence = {absl::StrFormat("posted %s and not completed for %s", pair,
                                          SecondsText(pressure.standing))};
      const std::string nics = NicsName(state_, finding.scope, finding.suspects[0]);
      if (!nics.empty()) {
        absl::StrAppend(&finding.sentence, " (", nics, ")");
        finding.evidence.push_back(PortsText(state_, finding.scope, finding.suspects[0]));
      }
      finding.sentence += '.';
      finding.changes_mind = "The library's own error for this connection, or its counters moving.";
      if (told.insert(key).second) {
        Add(key, std::move(finding), pressure.standing,
            PatienceFor(state_, pressure.communicator, 2));
      }
    }
  }

  void AddBlind(const WaitRoots::Sink& sink) {
    const Pressure& pressure = pressure_[sink.node];
    Finding finding;
    finding.syndrome = Syndrome::kCommunicationHang;
    finding.fault = FaultClass::kUnknown;
    finding.scope = Scope::kBehindBlindRank;
    finding.confidence = 0.3;
    std::string name;
    if (sink.node < picture_.rank_count) {
      finding.suspects = {{Rank{sink.node}, Rank{sink.node}}};
      name = RankName(state_, Rank{sink.node});
    } else {
      const auto [communicator, index] = picture_.unknown_members.at(sink.node);
      name = absl::StrFormat("member %d of %s", index, CommunicatorName(communicator));
    }
    finding.sentence = absl::StrFormat(
        "%d ranks wait for %s or for somebody that it waits for: it has no telemetry.",
        sink.waiters, name);
    finding.evidence = {absl::StrCat("standing for ", SecondsText(pressure.standing))};
    finding.changes_mind = "Telemetry of that rank.";
    Patience patience = PatienceFor(state_, pressure.communicator, 0);
    patience.verdict = absl::InfiniteDuration();
    Add(absl::StrCat("blind:", sink.node), std::move(finding), pressure.standing, patience);
  }

  void AddOperation(const WaitRoots::Sink& sink) {
    const Pressure& pressure = pressure_[sink.node];
    const uint64_t communicator = picture_.operations.at(sink.node);
    Finding finding;
    finding.syndrome = Syndrome::kCommunicationHang;
    finding.fault = FaultClass::kUnknown;
    finding.scope = Scope::kCommunicator;
    finding.confidence = 0.3;
    finding.sentence = absl::StrFormat(
        "%d ranks stand inside an operation of %s that all have entered; its "
        "transport shows nothing.",
        sink.waiters, CommunicatorName(communicator));
    finding.evidence = {absl::StrCat("standing for ", SecondsText(pressure.standing))};
    finding.changes_mind = "Telemetry of its transport.";
    for (const int64_t member : state_.communicators().at(communicator).members) {
      if (member < 0 || finding.suspects.size() == kSuspectsMax) continue;
      const Rank rank{static_cast<uint32_t>(member)};
      finding.suspects.push_back({rank, rank});
    }
    Patience patience = PatienceFor(state_, communicator, 0);
    patience.verdict = patience.busy;
    Add(absl::StrFormat("operation:%x", communicator), std::move(finding), pressure.standing,
        patience);
  }

  std::string Names(const std::vector<Rank>& ranks) const {
    constexpr size_t kNamesMax = 8;
    std::vector<std::string> names;
    for (const Rank rank : ranks) {
      if (names.size() == kNamesMax) {
        names.push_back("...");
        break;
      }
      names.push_back(RankName(state_, rank));
    }
    return absl::StrJoin(names, ", ");
  }

  const JobState& state_;
  Candidates& out_;
  const WaitPicture picture_;
  const std::vector<Mismatch> mismatches_;
  std::map<uint32_t, Pressure> pressure_;
  bool explained_ = false;
};

}  // namespace

HangTimeout HangTimeoutOf(const JobState& state, uint64_t communicator) {
  return {PatienceFor(state, communicator, 0).busy,
          state.NormalStandstill(communicator).has_value()};
}

void FindHangs(const JobState& state, Candidates& out) { HangSearch(state, out).Run(); }

}  // namespace holdfast::monitor
