#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/recovery/choice.h"
#include "agent/recovery/machine.h"
#include "agent/recovery/text.h"
#include "monitor/witness/xid.h"

namespace holdfast::recovery {
namespace {

using monitor::ExitKind;

constexpr absl::Duration kClockMax = absl::Hours(24 * 365 * 50);
constexpr absl::Duration kWallMax = absl::Hours(24 * 365 * 130);
constexpr uint32_t kPermilleMax = 1'000'000;
// Numbers of launches that no job comes to: what is said of them does not count.
constexpr uint32_t kLaunchMax = uint32_t{1} << 31;

absl::Duration Whole(absl::Duration duration) {
  duration = std::clamp(duration, absl::ZeroDuration(), kClockMax);
  return absl::Microseconds(absl::ToInt64Microseconds(duration));
}

std::string Text(std::string_view text) { return CutText(text, 512); }

Gpu Clean(const Gpu& gpu) {
  return {CutText(gpu.node, kGpuNodeBytesMax), gpu.index, CutText(gpu.uuid, kGpuUuidBytesMax)};
}

CheckpointRecord* FindRecord(History& history, CheckpointId id) {
  for (CheckpointRecord& record : history.checkpoints) {
    if (record.facts.id == id) return &record;
  }
  return nullptr;
}

bool IsGone(const History& history, const std::string& node) {
  return std::find(history.nodes_gone.begin(), history.nodes_gone.end(), node) !=
         history.nodes_gone.end();
}

// True: the event says the same as one that was taken before.
bool AddKey(std::vector<std::string>& keys, const std::string& key) {
  if (std::find(keys.begin(), keys.end(), key) != keys.end()) return true;
  if (keys.size() >= History::kKeysMax) keys.erase(keys.begin());
  keys.push_back(key);
  return false;
}

}  // namespace

void Machine::Absorb(const Event& event) {
  SetClock(event);
  std::visit([this](const auto& what) { Take(what); }, event.what);
}

void Machine::SetClock(const Event& event) {
  const auto* const restarted = std::get_if<AgentRestarted>(&event.what);
  const bool begins = std::holds_alternative<RunBegun>(event.what) ||
                      (restarted != nullptr && !restarted->same_clock);
  const absl::Duration now = Whole(event.now);
  // The policy's own clock goes on where it stood: what has passed between two boots is unknown.
  if (begins) h_.clock_offset_us = absl::ToInt64Microseconds(h_.now - now);
  h_.now = Whole(std::max(h_.now, now + absl::Microseconds(h_.clock_offset_us)));
  const absl::Duration wall =
      std::clamp(event.wall - absl::UnixEpoch(), absl::ZeroDuration(), kWallMax);
  h_.wall = absl::UnixEpoch() + absl::Microseconds(absl::ToInt64Microseconds(wall));
}

void Machine::Take(const RunBegun& begun) {
  h_ = Outliving(h_, CutText(begun.job, 128));
  ++h_.run_count;
  for (Incident& incident : h_.past) {
    if (incident.outcome == Outcome::kOpen) incident.outcome = Outcome::kEnded;
  }
  for (CheckpointRecord& record : h_.checkpoints) record.captured_at.reset();
  h_.world_size = std::clamp<uint32_t>(begun.world_size, 1, History::kRanksMax);
  h_.layout = Text(begun.layout);
  for (const Gpu& gpu : begun.gpus) {
    if (h_.gpus.size() < History::kRanksMax) h_.gpus.push_back(Clean(gpu));
  }
  for (const Gpu& gpu : h_.gpus) {
    const Lemon* const lemon = begun.lemons.Find(gpu);
    if (lemon == nullptr) continue;
    for (const LemonMark& mark : lemon->marks) h_.lemons.Mark(gpu, mark);
    if (lemon->excluded.has_value() && settings_.lemons != LemonPolicy::kIgnore) {
      h_.lemons.Exclude(gpu, *lemon->excluded);
    }
  }
  h_.lemons.Forget(h_.wall, settings_.lemon_memory);
  h_.phase = Phase::kDown;
  Take(CheckpointsRead{begun.checkpoints});
}

void Machine::Take(const AgentRestarted& restarted) {
  const bool has_ranks =
      h_.phase == Phase::kAlive || h_.phase == Phase::kSaving || h_.phase == Phase::kStopping;
  std::vector<bool> found(h_.ranks.size(), false);
  std::vector<Launch> strays;
  for (const AgentRestarted::Rank& rank : restarted.ranks) {
    if (has_ranks && rank.launch == h_.launch && Value(rank.rank) < h_.ranks.size()) {
      found[Value(rank.rank)] = true;
      if (rank.exit.kind == ExitKind::kNone) {
        Take(RankStarted{rank.launch, rank.rank});
      } else {
        Take(RankExited{rank.launch, rank.rank, rank.exit});
      }
      continue;
    }
    if (rank.exit.kind != ExitKind::kNone) {
      Take(RankExited{rank.launch, rank.rank, rank.exit});
      continue;
    }
    if (Value(rank.launch) < kLaunchMax) h_.launch_max = std::max(h_.launch_max, rank.launch);
    const bool stuck = std::any_of(
        h_.stuck_ranks.begin(), h_.stuck_ranks.end(),
        [&](const History::Stuck& s) { return s.launch == rank.launch && s.rank == rank.rank; });
    if (!stuck && std::find(strays.begin(), strays.end(), rank.launch) == strays.end()) {
      strays.push_back(rank.launch);
    }
  }
  // A rank that was only asked for may not have been started: StartRanks comes again, unless others
  // of the launch were started and are gone. Then it is lost as a whole.
  bool lost = false;
  for (uint32_t r = 0; has_ranks && r < h_.ranks.size(); ++r) {
    const RankPhase phase = h_.ranks[r].phase;
    lost = lost || phase == RankPhase::kEnded || (!found[r] && phase != RankPhase::kAsked);
  }
  for (uint32_t r = 0; has_ranks && r < h_.ranks.size(); ++r) {
    const bool may_come =
        h_.phase == Phase::kAlive && h_.ranks[r].phase == RankPhase::kAsked && !lost;
    if (found[r] || may_come || h_.ranks[r].phase == RankPhase::kStuck) continue;
    Take(RankExited{h_.launch, Rank{r}, {ExitKind::kUnknown, 0}});
  }
  // A stuck process that has no shim any more is dead, unless its node cannot be asked.
  std::erase_if(h_.stuck_ranks, [&](const History::Stuck& stuck) {
    const bool listed = std::any_of(restarted.ranks.begin(), restarted.ranks.end(),
                                    [&](const AgentRestarted::Rank& rank) {
                                      return rank.launch == stuck.launch && rank.rank == stuck.rank;
                                    });
    return !listed && !IsGone(h_, stuck.gpu.node);
  });
  for (const Launch launch : strays) {
    Emit(StopRanks{launch, ToEventClock(h_.now + settings_.stop_wait), "of a launch that is over"});
  }
  AskAgain();
}

void Machine::AskAgain() {
  for (const Lemon& lemon : h_.lemons.lemons()) {
    if (settings_.mode != Mode::kObserve) Emit(RecordLemon{lemon});
  }
  if (h_.evidence == History::Evidence::kAsked && h_.incident.has_value()) EmitEvidence();
  switch (h_.phase) {
    case Phase::kAlive:
      if (std::any_of(h_.ranks.begin(), h_.ranks.end(),
                      [](const RankRecord& rank) { return rank.phase == RankPhase::kAsked; })) {
        EmitStart();
      }
      break;
    case Phase::kSaving:
      EmitSave("a save was asked for before the agent was replaced");
      break;
    case Phase::kStopping:
      EmitStop();
      break;
    case Phase::kOver:
      Emit(ExitJob{h_.exit_code, h_.exit_why});
      break;
    case Phase::kIdle:
    case Phase::kDown:
      break;
  }
  if (h_.proposal.has_value()) Emit(recovery::Ask{h_.proposal->id, h_.proposal->question});
}

RankRecord* Machine::Living(Launch launch, Rank rank) {
  if (launch != h_.launch || Value(rank) >= h_.ranks.size()) return nullptr;
  RankRecord& record = h_.ranks[Value(rank)];
  const bool ended = record.phase == RankPhase::kEnded || record.phase == RankPhase::kStuck;
  return ended ? nullptr : &record;
}

void Machine::Forward(Launch launch, Rank rank, RankPhase phase) {
  RankRecord* const record = Living(launch, rank);
  if (record == nullptr || record->phase >= phase) return;
  record->phase = phase;
  h_.last_progress = h_.now;
}

void Machine::Take(const RankStarted& started) {
  Forward(started.launch, started.rank, RankPhase::kStarted);
}

void Machine::Take(const RankOpened& opened) {
  if (Living(opened.launch, opened.rank) == nullptr) return;
  h_.attempt = std::max(h_.attempt, opened.attempt);
  Forward(opened.launch, opened.rank, RankPhase::kOpened);
}

void Machine::Take(const RankRestored& restored) {
  if (Living(restored.launch, restored.rank) == nullptr) return;
  if (restored.checkpoint.has_value()) h_.restored = restored.checkpoint;
  Forward(restored.launch, restored.rank, RankPhase::kRestored);
}

void Machine::Take(const StepDone& done) {
  RankRecord* const record = Living(done.launch, done.rank);
  if (record == nullptr) return;
  Forward(done.launch, done.rank, RankPhase::kStepping);
  if (Value(done.step) > record->step) {
    record->step = Value(done.step);
    h_.last_progress = h_.now;
  }
  record->silent_since.reset();
}

void Machine::Take(const RankExited& exited) {
  // A stuck process that dies after all gives its GPU back.
  if (std::erase_if(h_.stuck_ranks, [&](const History::Stuck& stuck) {
        return stuck.launch == exited.launch && stuck.rank == exited.rank;
      }) > 0) {
    h_.grow = true;
  }
  if (exited.launch == h_.launch && Value(exited.rank) < h_.ranks.size() &&
      h_.ranks[Value(exited.rank)].phase == RankPhase::kStuck) {
    h_.ranks[Value(exited.rank)].phase = RankPhase::kEnded;
    h_.ranks[Value(exited.rank)].exit = exited.exit;
    h_.ranks[Value(exited.rank)].told_to_end = true;
    return;
  }
  RankRecord* const record = Living(exited.launch, exited.rank);
  if (record == nullptr) return;
  record->phase = RankPhase::kEnded;
  record->exit = exited.exit;
  if (record->exit.kind == ExitKind::kNone) record->exit.kind = ExitKind::kUnknown;
  record->told_to_end = h_.phase == Phase::kStopping;
  record->silent_since.reset();
}

void Machine::Take(const RankTimedOut& timed_out) {
  const absl::Duration since = h_.now - std::min(h_.now, Whole(timed_out.silent));
  const auto note = [&](Rank rank) {
    if (RankRecord* const record = Living(timed_out.launch, rank)) record->silent_since = since;
  };
  note(timed_out.rank);
  for (const Rank rank : timed_out.with) note(rank);
}

void Machine::Take(const RankBeats& beats) {
  if (RankRecord* const record = Living(beats.launch, beats.rank)) record->silent_since.reset();
}

void Machine::Take(const FindingTold& told) {
  if (told.launch != h_.launch || h_.phase == Phase::kOver || h_.phase == Phase::kIdle) return;
  OpenFinding finding;
  finding.id = CutText(told.finding.id, 64);
  finding.grade = told.finding.grade;
  finding.syndrome = told.finding.syndrome;
  finding.fault = told.finding.fault;
  finding.scope = told.finding.scope;
  for (const monitor::Suspect& suspect : told.finding.suspects) {
    if (finding.suspects.size() < History::kSuspectsMax) finding.suspects.push_back(suspect);
  }
  // A NaN is no confidence.
  const double confidence =
      told.finding.confidence > 0 ? std::min(told.finding.confidence, 1.0) : 0;
  finding.confidence_permille = static_cast<uint32_t>(confidence * 1000 + 0.5);
  finding.sources = IndependentSources(told.finding);
  finding.busy = IsBusy(told.finding);
  finding.sentence = Text(told.finding.sentence);
  finding.group = CutText(told.group, 64);
  finding.since = std::max(h_.launched_at, h_.now - std::min(h_.now, Whole(told.standing)));
  if (told.timeout.has_value()) finding.timeout = Whole(*told.timeout);
  finding.slow_permille = std::min(told.slow_permille, kPermilleMax);
  for (OpenFinding& known : h_.findings) {
    if (known.id != finding.id) continue;
    finding.since = std::min(finding.since, known.since);
    known = std::move(finding);
    return;
  }
  // Beyond the limit a suspicion makes room for a verdict, or the new one is not taken.
  if (h_.findings.size() >= History::kFindingsMax) {
    const auto weak = std::find_if(h_.findings.begin(), h_.findings.end(), [](const auto& known) {
      return known.grade == monitor::Grade::kSuspicion;
    });
    if (weak == h_.findings.end() || finding.grade == monitor::Grade::kSuspicion) return;
    h_.findings.erase(weak);
  }
  h_.findings.push_back(std::move(finding));
}

void Machine::Take(const FindingWithdrawn& withdrawn) {
  const std::string id = CutText(withdrawn.id, 64);
  std::erase_if(h_.findings, [&](const OpenFinding& finding) { return finding.id == id; });
}

void Machine::Take(const SightChanged& sight) { h_.sight = sight.sight; }

void Machine::KeepLemon(const Gpu& gpu) {
  const Lemon* const lemon = h_.lemons.Find(gpu);
  if (lemon != nullptr) Emit(RecordLemon{*lemon});
}

void Machine::Take(const XidSeen& xid) {
  const monitor::XidMeaning* const meaning = monitor::MeaningOfXid(xid.code);
  if (meaning == nullptr || (meaning->action != monitor::XidAction::kDrain &&
                             meaning->action != monitor::XidAction::kResetGpu)) {
    return;
  }
  const Gpu gpu = Clean(xid.gpu);
  const bool ours = std::any_of(h_.gpus.begin(), h_.gpus.end(),
                                [&](const Gpu& other) { return IsSame(other, gpu); });
  if (!ours || h_.phase == Phase::kIdle) return;
  const bool drain = meaning->action == monitor::XidAction::kDrain;
  const std::string reason = absl::StrCat("Xid ", xid.code, ": ", std::string(meaning->text));
  const bool used =
      h_.phase != Phase::kOver && std::any_of(h_.placement.gpus.begin(), h_.placement.gpus.end(),
                                              [&](const Gpu& other) { return IsSame(other, gpu); });
  const bool known = std::any_of(h_.gpu_faults.begin(), h_.gpu_faults.end(), [&](const auto& f) {
    return IsSame(f.gpu, gpu) && f.code == xid.code;
  });
  if (known) return;
  if (used && h_.gpu_faults.size() < History::kFindingsMax) {
    h_.gpu_faults.push_back({gpu, xid.code, drain, h_.now});
  }
  if (settings_.mode == Mode::kObserve) {
    return Say(absl::StrCat(Name(gpu, HomeOf(h_)), ": ", reason));
  }
  h_.lemons.Mark(gpu, {h_.wall, h_.job, reason, true});
  if (drain) h_.lemons.Exclude(gpu, {h_.wall, h_.wall + settings_.exclude_for, reason});
  KeepLemon(gpu);
  Say(absl::StrCat(Name(gpu, HomeOf(h_)), ": ", reason, drain ? "; excluded" : ""));
}

void Machine::Take(const NodeGone& gone) {
  const std::string node = CutText(gone.node, kGpuNodeBytesMax);
  const bool ours =
      std::any_of(h_.gpus.begin(), h_.gpus.end(), [&](const Gpu& gpu) { return gpu.node == node; });
  const bool known =
      std::find(h_.nodes_gone.begin(), h_.nodes_gone.end(), node) != h_.nodes_gone.end();
  if (ours && !known && h_.nodes_gone.size() < History::kFindingsMax) h_.nodes_gone.push_back(node);
}

void Machine::Take(const NodeBack& back) {
  const std::string node = CutText(back.node, kGpuNodeBytesMax);
  if (std::erase(h_.nodes_gone, node) == 0) return;
  h_.grow = true;
  // Whoever was written off there may live still: it is fenced, and its GPU is not used before its
  // end was seen.
  std::vector<Launch> told;
  for (const History::Stuck& stuck : h_.stuck_ranks) {
    if (stuck.gpu.node != node || std::find(told.begin(), told.end(), stuck.launch) != told.end()) {
      continue;
    }
    told.push_back(stuck.launch);
    Emit(StopRanks{stuck.launch, ToEventClock(h_.now + settings_.stop_wait), "its node is back"});
  }
}

void Machine::Take(const EvidenceCollected& collected) {
  if (h_.incident.has_value() && h_.incident->number == collected.incident &&
      h_.evidence == History::Evidence::kAsked) {
    h_.evidence = History::Evidence::kDone;
  }
}

CheckpointRecord& Machine::RecordOf(const CheckpointFacts& facts) {
  if (CheckpointRecord* const known = FindRecord(h_, facts.id)) {
    // What was once known against it stays.
    known->facts.marked_bad |= facts.marked_bad;
    known->facts.non_finite |= facts.non_finite;
    known->facts.under_anomaly |= facts.under_anomaly;
    return *known;
  }
  const auto after = std::find_if(h_.checkpoints.begin(), h_.checkpoints.end(),
                                  [&](const auto& other) { return facts.id < other.facts.id; });
  return *h_.checkpoints.insert(after, CheckpointRecord{facts, std::nullopt, 0});
}

void Machine::Take(const CheckpointCommitted& committed) {
  const absl::Duration captured_at =
      std::min(h_.now, Whole(committed.captured_at + absl::Microseconds(h_.clock_offset_us)));
  RecordOf(committed.facts).captured_at = captured_at;
  if (h_.checkpoints.size() > History::kCheckpointsMax)
    h_.checkpoints.erase(h_.checkpoints.begin());
  if (committed.launch != h_.launch) return;
  h_.committed_since = true;
  if (h_.phase == Phase::kSaving && captured_at >= h_.save_asked_at) h_.save_deadline = h_.now;
}

void Machine::Take(const SaveFailed& failed) {
  if (failed.launch == h_.launch && h_.phase == Phase::kSaving) h_.save_failed = true;
}

void Machine::Take(const CheckpointsRead& read) {
  const std::vector<CheckpointRecord> before = std::move(h_.checkpoints);
  h_.checkpoints.clear();
  for (const CheckpointFacts& facts : read.checkpoints) {
    CheckpointRecord& record = RecordOf(facts);
    for (const CheckpointRecord& known : before) {
      if (known.facts.id != facts.id) continue;
      record.captured_at = known.captured_at;
      record.crashes = known.crashes;
      record.facts.non_finite |= known.facts.non_finite;
      record.facts.under_anomaly |= known.facts.under_anomaly;
    }
    if (h_.checkpoints.size() > History::kCheckpointsMax) {
      h_.checkpoints.erase(h_.checkpoints.begin());
    }
  }
}

void Machine::Take(const Approve& approve) {
  if (!h_.proposal.has_value() || h_.proposal->id != approve.id) {
    return Say(absl::StrCat("approve ", Text(approve.id), ": there is no such question now"));
  }
  AddKey(h_.approved, h_.proposal->key);
  h_.proposal.reset();
  h_.approval_deadline.reset();
}

void Machine::Take(const Veto& veto) {
  if (!h_.proposal.has_value() || h_.proposal->id != veto.id) {
    return Say(absl::StrCat("veto ", Text(veto.id), ": there is no such question now"));
  }
  AddKey(h_.vetoed, h_.proposal->key);
  h_.proposal.reset();
  h_.approval_deadline.reset();
}

void Machine::Take(const Hold& hold) {
  if (h_.phase == Phase::kIdle || h_.phase == Phase::kOver) return;
  h_.hold_until.reset();
  h_.hold_reason = Text(hold.reason);
  if (hold.duration > absl::ZeroDuration()) {
    h_.hold_until = h_.now + std::min(Whole(hold.duration), kHoldMax);
  }
}

void Machine::Take(const Readmit& readmit) {
  const Gpu gpu = Clean(readmit.gpu);
  if (!h_.lemons.Readmit(gpu)) {
    Say(absl::StrCat("readmit: ", Name(gpu, HomeOf(h_)), " was not excluded in this job"));
  }
  Emit(ForgetLemon{gpu});
  // In use it stays what it is for this launch: the driver's word is not taken back by a person.
  h_.grow = true;
}

void Machine::Take(const Save&) {
  if (h_.phase != Phase::kAlive) return Say("save: no rank runs");
  Emit(RequestSave{h_.launch, ToEventClock(h_.now + settings_.save_wait), "a person asked"});
}

void Machine::Take(const Stop&) { End({75, "a person stopped it", true}); }

void Machine::Take(const SignalCame& signal) {
  switch (signal.signal) {
    case EndSignal::kInterrupt:
      return End({75, "interrupted", true});
    case EndSignal::kTerminate:
      return End({75, "told to end (SIGTERM)", true});
    case EndSignal::kAllocationEnds:
      return End({75, "the allocation ends", true});
  }
}

void Machine::End(EndRequest request) {
  if (h_.phase == Phase::kIdle || h_.phase == Phase::kOver) return;
  if (!h_.end.has_value()) {
    h_.end = std::move(request);
    return;
  }
  // Who asks again does not want to wait.
  if (h_.phase == Phase::kStopping && h_.kill_at > h_.now && !h_.end->save_first) {
    h_.kill_at = h_.now;
    EmitStop();
  }
  h_.end->save_first = false;
}

}  // namespace holdfast::recovery
