#include "agent/recovery/history.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/byte_codec.h"
#include "base/status_macros.h"

namespace holdfast::recovery {
namespace {

constexpr Envelope kEnvelope = {
    .name = "history of recovery", .magic = "HFRH", .version = 1, .bytes_max = History::kBytesMax};

// Moments and durations: whole microseconds, about 140 years at most.
constexpr uint64_t kMicrosecondsMax = uint64_t{1} << 52;
constexpr size_t kGpusMax = History::kRanksMax;

// Lists and optionals walk their elements, and elements have lists and optionals.
template <typename Codec>
void Walk(Codec& codec, std::string_view what, RankRecord& value);
template <typename Codec>
void Walk(Codec& codec, std::string_view what, OpenFinding& value);
template <typename Codec>
void Walk(Codec& codec, std::string_view what, GpuFault& value);
template <typename Codec>
void Walk(Codec& codec, std::string_view what, CheckpointRecord& value);
template <typename Codec>
void Walk(Codec& codec, std::string_view what, Incident& value);
template <typename Codec>
void Walk(Codec& codec, std::string_view what, Proposal& value);
template <typename Codec>
void Walk(Codec& codec, std::string_view what, EndRequest& value);
template <typename Codec>
void Walk(Codec& codec, std::string_view what, History::Stuck& value);

template <typename Codec>
void Walk(Codec& codec, std::string_view what, absl::Duration& duration) {
  auto us = static_cast<uint64_t>(absl::ToInt64Microseconds(duration));
  codec.Number(what, us, kMicrosecondsMax);
  duration = absl::Microseconds(us);
}

template <typename Codec>
void Walk(Codec& codec, std::string_view what, absl::Time& time) {
  absl::Duration since = time - absl::UnixEpoch();
  Walk(codec, what, since);
  time = absl::UnixEpoch() + since;
}

template <typename Codec>
void Walk(Codec& codec, std::string_view what, bool& value) {
  uint8_t number = value ? 1 : 0;
  codec.Number(what, number, 1);
  value = number == 1;
}

template <typename Codec>
void Walk(Codec& codec, std::string_view what, int64_t& value) {
  uint64_t zigzag = (static_cast<uint64_t>(value) << 1) ^ static_cast<uint64_t>(value >> 63);
  codec.Number(what, zigzag);
  value = static_cast<int64_t>(zigzag >> 1) ^ -static_cast<int64_t>(zigzag & 1);
}

template <typename Codec>
void Walk(Codec& codec, std::string_view what, uint32_t& value) {
  codec.Number(what, value);
}
template <typename Codec>
void Walk(Codec& codec, std::string_view what, uint64_t& value) {
  codec.Number(what, value);
}
template <typename Codec>
void Walk(Codec& codec, std::string_view what, Rank& value) {
  codec.Number(what, value, UINT32_MAX);
}
template <typename Codec>
void Walk(Codec& codec, std::string_view what, Launch& value) {
  codec.Number(what, value, UINT32_MAX);
}
template <typename Codec>
void Walk(Codec& codec, std::string_view what, Attempt& value) {
  codec.Number(what, value, UINT32_MAX);
}
template <typename Codec>
void Walk(Codec& codec, std::string_view what, std::string& value) {
  codec.Text(what, value, History::kTextBytesMax);
}
template <typename Codec>
void Walk(Codec& codec, std::string_view what, CheckpointId& id) {
  Walk(codec, what, id.attempt);
  codec.Number(what, id.step, UINT64_MAX);
}
template <typename Codec>
void Walk(Codec& codec, std::string_view what, Sight& sight) {
  codec.Enumerator(what, sight, 3);
}

template <typename Codec>
void Walk(Codec& codec, std::string_view, Gpu& gpu) {
  codec.Text("node of a GPU", gpu.node, kGpuNodeBytesMax);
  codec.Number("number of a GPU", gpu.index);
  codec.Text("UUID of a GPU", gpu.uuid, kGpuUuidBytesMax);
}
template <typename Codec>
void Walk(Codec& codec, std::string_view, Exit& exit) {
  codec.Enumerator("kind of exit", exit.kind, monitor::kExitKinds);
  codec.Signed("value of exit", exit.value);
}
template <typename Codec>
void Walk(Codec& codec, std::string_view, monitor::Suspect& suspect) {
  Walk(codec, "suspect", suspect.rank);
  Walk(codec, "suspect", suspect.peer);
}
template <typename Codec>
void Walk(Codec& codec, std::string_view, Incident::Suspect& suspect) {
  Walk(codec, "suspect", suspect.rank);
  Walk(codec, "suspect", suspect.peer);
  Walk(codec, "suspect", suspect.gpu);
}

template <typename Codec, typename T>
void Walk(Codec& codec, std::string_view what, std::optional<T>& value) {
  bool has = value.has_value();
  Walk(codec, what, has);
  if (has && !value.has_value()) value.emplace();
  if (!has) value.reset();
  if (has) Walk(codec, what, *value);
}

template <typename Codec, typename T>
void WalkList(Codec& codec, std::string_view what, std::vector<T>& list, size_t max) {
  codec.Length(what, list, max);
  for (T& element : list) Walk(codec, what, element);
}

template <typename Codec>
void Walk(Codec& codec, std::string_view, RankRecord& rank) {
  codec.Enumerator("phase of a rank", rank.phase, kRankPhases);
  Walk(codec, "exit", rank.exit);
  Walk(codec, "told to end", rank.told_to_end);
  Walk(codec, "silent since", rank.silent_since);
  Walk(codec, "step", rank.step);
}

template <typename Codec>
void Walk(Codec& codec, std::string_view, OpenFinding& finding) {
  Walk(codec, "id of a finding", finding.id);
  codec.Enumerator("grade", finding.grade, 2);
  codec.Enumerator("syndrome", finding.syndrome, monitor::kSyndromes);
  codec.Enumerator("fault", finding.fault, monitor::kFaultClasses);
  codec.Enumerator("scope", finding.scope, monitor::kScopes);
  WalkList(codec, "suspects", finding.suspects, History::kSuspectsMax);
  codec.Number("confidence", finding.confidence_permille, 1000);
  Walk(codec, "sources", finding.sources);
  Walk(codec, "busy", finding.busy);
  Walk(codec, "sentence", finding.sentence);
  Walk(codec, "group", finding.group);
  Walk(codec, "since", finding.since);
  Walk(codec, "time-out", finding.timeout);
  Walk(codec, "slowness", finding.slow_permille);
}

template <typename Codec>
void Walk(Codec& codec, std::string_view, GpuFault& fault) {
  Walk(codec, "GPU", fault.gpu);
  codec.Signed("Xid", fault.code);
  Walk(codec, "drain", fault.drain);
  Walk(codec, "time of an Xid", fault.at);
}

template <typename Codec>
void Walk(Codec& codec, std::string_view, CheckpointRecord& record) {
  Walk(codec, "checkpoint", record.facts.id);
  Walk(codec, "marked bad", record.facts.marked_bad);
  Walk(codec, "non-finite", record.facts.non_finite);
  Walk(codec, "under anomaly", record.facts.under_anomaly);
  Walk(codec, "captured at", record.captured_at);
  Walk(codec, "crashes", record.crashes);
}

template <typename Codec>
void Walk(Codec& codec, std::string_view, Incident& incident) {
  Walk(codec, "number of an incident", incident.number);
  Walk(codec, "launch of an incident", incident.launch);
  Walk(codec, "attempt of an incident", incident.attempt);
  codec.Enumerator("cause", incident.cause, kCauses);
  codec.Enumerator("outcome", incident.outcome, kOutcomes);
  Walk(codec, "time of an incident", incident.wall);
  WalkList(codec, "suspects", incident.suspects, History::kSuspectsMax);
  for (std::string* text : {&incident.finding, &incident.what, &incident.sentence}) {
    Walk(codec, "text of an incident", *text);
  }
  codec.Number("confidence", incident.confidence_permille, 1000);
  Walk(codec, "action", incident.action);
  Walk(codec, "next launch", incident.next_launch);
  Walk(codec, "restored", incident.restored);
  for (std::optional<absl::Duration>* moment :
       {&incident.onset, &incident.detected, &incident.diagnosed, &incident.stopping,
        &incident.stopped, &incident.starting, &incident.opened, &incident.restored_at,
        &incident.resumed, &incident.lost_work}) {
    Walk(codec, "moment of an incident", *moment);
  }
  Walk(codec, "lost steps", incident.lost_steps);
}

template <typename Codec>
void Walk(Codec& codec, std::string_view, Proposal& proposal) {
  Walk(codec, "id of a proposal", proposal.id);
  Walk(codec, "key of a proposal", proposal.key);
  Walk(codec, "question", proposal.question);
}
template <typename Codec>
void Walk(Codec& codec, std::string_view, EndRequest& end) {
  codec.Signed("exit code", end.code);
  Walk(codec, "why it ends", end.why);
  Walk(codec, "save first", end.save_first);
}
template <typename Codec>
void Walk(Codec& codec, std::string_view, History::Stuck& stuck) {
  Walk(codec, "stuck", stuck.launch);
  Walk(codec, "stuck", stuck.rank);
  Walk(codec, "stuck", stuck.gpu);
}

template <typename Codec>
void WalkRun(Codec& codec, History& h) {
  Walk(codec, "job", h.job);
  Walk(codec, "runs", h.run_count);
  Walk(codec, "launches of the run", h.launches_of_run);
  codec.Number("world size", h.world_size, History::kRanksMax);
  Walk(codec, "layout", h.layout);
  WalkList(codec, "GPUs", h.gpus, kGpusMax);
  Walk(codec, "now", h.now);
  Walk(codec, "clock offset", h.clock_offset_us);
  Walk(codec, "wall", h.wall);
  codec.Enumerator("state", h.state, kStates);
  Walk(codec, "state since", h.state_since);
  codec.Enumerator("phase", h.phase, kPhases);
  Walk(codec, "wake at", h.wake_at);
  Walk(codec, "end", h.end);
  codec.Signed("exit code", h.exit_code);
  Walk(codec, "why it ended", h.exit_why);
}

template <typename Codec>
void WalkLaunch(Codec& codec, History& h) {
  Walk(codec, "launch", h.launch);
  Walk(codec, "greatest launch", h.launch_max);
  Walk(codec, "attempt", h.attempt);
  WalkList(codec, "GPUs of the placement", h.placement.gpus, kGpusMax);
  Walk(codec, "layout of the placement", h.placement.layout);
  codec.Enumerator("restore rule", h.restore_rule.kind, 3);
  Walk(codec, "checkpoint to restore", h.restore_rule.checkpoint);
  Walk(codec, "why it was started", h.start_why);
  WalkList(codec, "ranks", h.ranks, History::kRanksMax);
  Walk(codec, "launched at", h.launched_at);
  Walk(codec, "running since", h.running_since);
  Walk(codec, "stepped", h.stepped);
  Walk(codec, "last progress", h.last_progress);
  Walk(codec, "restored", h.restored);
  Walk(codec, "committed since", h.committed_since);
  WalkList(codec, "faults of GPUs", h.gpu_faults, History::kFindingsMax);
  WalkList(codec, "findings", h.findings, History::kFindingsMax);
  Walk(codec, "sight", h.sight);
  Walk(codec, "save asked at", h.save_asked_at);
  Walk(codec, "deadline of a save", h.save_deadline);
  Walk(codec, "save failed", h.save_failed);
  Walk(codec, "kill at", h.kill_at);
  Walk(codec, "why it is stopped", h.stop_why);
}

template <typename Codec>
void WalkIncidents(Codec& codec, History& h) {
  Walk(codec, "incident", h.incident);
  codec.Enumerator("evidence", h.evidence, 3);
  Walk(codec, "deadline of evidence", h.evidence_deadline);
  Walk(codec, "permitted", h.permitted);
  Walk(codec, "blamed", h.blamed);
  Walk(codec, "counted", h.counted);
  Walk(codec, "signature", h.signature);
  WalkList(codec, "incidents", h.past, History::kIncidentsMax);
  Walk(codec, "number of incidents", h.incident_count);
  Walk(codec, "proposal", h.proposal);
  WalkList(codec, "approved", h.approved, History::kKeysMax);
  WalkList(codec, "vetoed", h.vetoed, History::kKeysMax);
  Walk(codec, "number of proposals", h.proposal_count);
  Walk(codec, "deadline of approval", h.approval_deadline);
  Walk(codec, "hold until", h.hold_until);
  Walk(codec, "why it is held", h.hold_reason);
}

template <typename Codec>
void WalkMemory(Codec& codec, History& h) {
  Walk(codec, "restarts", h.restart_count);
  Walk(codec, "charged restarts", h.restarts_charged);
  Walk(codec, "unhealthy in a row", h.unhealthy_in_a_row);
  Walk(codec, "next is free", h.next_is_free);
  WalkList(codec, "recent restarts", h.recent_restarts, History::kFindingsMax);
  Walk(codec, "exclusions", h.exclusion_count);
  Walk(codec, "resume at", h.resume_at);
  Walk(codec, "deadline of capacity", h.capacity_deadline);
  WalkList(codec, "signatures", h.signatures, History::kKeysMax);
  WalkList(codec, "nodes gone", h.nodes_gone, History::kFindingsMax);
  WalkList(codec, "stuck ranks", h.stuck_ranks, kGpusMax);
  Walk(codec, "grow", h.grow);
  WalkList(codec, "checkpoints", h.checkpoints, History::kCheckpointsMax);
  uint64_t unused = 0;  // two numbers of version 1 that no decision was ever made by
  Walk(codec, "unused", unused);
  Walk(codec, "unused", unused);
  Walk(codec, "failures", h.failures);
  Walk(codec, "time alive", h.time_alive);
  Walk(codec, "alive since", h.alive_since);
  Walk(codec, "time of a start", h.start_time);
}

template <typename Codec>
void Walk(Codec& codec, History& h) {
  WalkRun(codec, h);
  WalkLaunch(codec, h);
  WalkIncidents(codec, h);
  WalkMemory(codec, h);
}

}  // namespace

std::string_view Name(State state) {
  static constexpr std::string_view kNames[kStates] = {"idle",
                                                       "starting",
                                                       "running",
                                                       "suspected",
                                                       "stalled",
                                                       "collecting evidence",
                                                       "waiting for approval",
                                                       "holding",
                                                       "saving",
                                                       "stopping",
                                                       "deciding",
                                                       "waiting for capacity",
                                                       "done",
                                                       "given up"};
  return kNames[static_cast<size_t>(state)];
}

std::string_view HomeOf(const History& history) {
  return history.gpus.empty() ? std::string_view() : std::string_view(history.gpus.front().node);
}

History Outliving(const History& history, std::string_view job) {
  History kept;
  kept.job = std::string(job);
  kept.launch_max = std::max(history.launch_max, history.launch);
  kept.now = history.now;
  kept.clock_offset_us = history.clock_offset_us;
  kept.wall = history.wall;
  kept.state_since = history.now;
  if (history.job != job) return kept;
  kept.run_count = history.run_count;
  kept.past = history.past;
  if (history.incident.has_value()) {
    if (kept.past.size() >= History::kIncidentsMax) kept.past.erase(kept.past.begin());
    kept.past.push_back(*history.incident);
  }
  kept.incident_count = history.incident_count;
  kept.proposal_count = history.proposal_count;
  kept.signatures = history.signatures;
  kept.checkpoints = history.checkpoints;
  kept.failures = history.failures;
  kept.time_alive = history.time_alive;
  return kept;
}

std::string Encode(const History& history) {
  std::string bytes;
  OpenEnvelope(kEnvelope, bytes);
  ByteWriter writer(&bytes);
  History copy = history;  // Walk takes what it could also fill
  Walk(writer, copy);
  std::string lemons = history.lemons.Encode();
  writer.Text("lemons", lemons, LemonList::kFileBytesMax);
  SealEnvelope(kEnvelope, bytes);
  return bytes;
}

absl::StatusOr<History> DecodeHistory(std::span<const std::byte> bytes) {
  ASSIGN_OR_RETURN(const auto fields, FieldsIn(kEnvelope, bytes));
  ByteReader reader(kEnvelope.name, fields);
  History history;
  Walk(reader, history);
  std::string lemons;
  reader.Text("lemons", lemons, LemonList::kFileBytesMax);
  RETURN_IF_ERROR(reader.Finish());
  ASSIGN_OR_RETURN(history.lemons, LemonList::Decode(lemons, "lemons in the history"));
  // What the policy takes for granted between fields.
  if (history.ranks.size() != history.placement.gpus.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("history of recovery: ranks: expected as many as GPUs of the placement, ",
                     history.placement.gpus.size(), ", found ", history.ranks.size()));
  }
  if (history.phase != Phase::kIdle && history.phase != Phase::kDown &&
      history.phase != Phase::kOver && history.ranks.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "history of recovery: ranks: expected some of a launch that is alive, found none"));
  }
  for (size_t i = 1; i < history.checkpoints.size(); ++i) {
    if (history.checkpoints[i].facts.id <= history.checkpoints[i - 1].facts.id) {
      return absl::InvalidArgumentError(
          absl::StrCat("history of recovery: checkpoints: expected ascending ones"));
    }
  }
  return history;
}

}  // namespace holdfast::recovery
