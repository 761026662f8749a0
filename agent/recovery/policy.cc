#include "agent/recovery/policy.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "agent/recovery/choice.h"
#include "agent/recovery/machine.h"
#include "agent/recovery/text.h"
#include "base/check.h"

namespace holdfast::recovery {
namespace {

// A launch of which no rank has opened the job for so long counts as running: it never will, and
// what it does is not ours to judge.
constexpr absl::Duration kSilentStart = absl::Seconds(60);

bool IsPlanned(Cause cause) { return cause == Cause::kGrow || cause == Cause::kSlow; }

bool Contains(const std::vector<std::string>& keys, const std::string& key) {
  return std::find(keys.begin(), keys.end(), key) != keys.end();
}

absl::Duration Since(absl::Duration now, absl::Duration then) { return now - std::min(now, then); }

}  // namespace

std::vector<Action> Decide(const Settings& settings, const Event& event, History& history) {
  std::vector<Action> actions;
  Machine machine(settings, history, actions);
  machine.Absorb(event);
  machine.Advance();
  return actions;
}

void Machine::Advance() {
  // Each turn goes one phase on; there are six.
  for (int turn = 0; Step(); ++turn) CHECK(turn < 16);
  SetWakeAt();
}

bool Machine::Step() {
  switch (h_.phase) {
    case Phase::kIdle:
      SetState(State::kIdle);
      return false;
    case Phase::kAlive:
      return Alive();
    case Phase::kSaving:
      return Saving();
    case Phase::kStopping:
      return Stopping();
    case Phase::kDown:
      return Down();
    case Phase::kOver:
      SetState(h_.exit_code == 0 ? State::kDone : State::kGivenUp);
      return false;
  }
  return false;
}

// ---- While ranks live.

bool Machine::Alive() {
  NoteProgress();
  const bool ended = AllEnded(h_);
  if (ended && AllClean(h_)) return Over(0, "every rank has ended with status 0");
  const std::optional<Trouble> trouble = FindTrouble(settings_, h_);
  if (h_.end.has_value()) {
    const bool sick = trouble.has_value() && !IsPlanned(trouble->cause);
    if (ended || sick || !h_.end->save_first || !h_.running_since.has_value()) {
      return BeginStop(h_.end->why);
    }
    BeginSave(h_.end->why);
    return true;
  }
  if (!trouble.has_value()) {
    if (h_.incident.has_value()) CloseIncident(Outcome::kWithdrawn);
    DropProposal();
    const bool suspected = !h_.findings.empty();
    SetState(!h_.running_since.has_value() ? State::kStarting
             : suspected                   ? State::kSuspected
                                           : State::kRunning);
    return false;
  }
  OpenIncident(*trouble);
  if (trouble->act_at > h_.now) {
    EvidenceIsOver();  // asked for now: later there may be nothing left to see
    DropProposal();
    SetState(State::kStalled);
    return false;
  }
  if (!IsPlanned(trouble->cause) && !EvidenceIsOver()) {
    SetState(State::kCollecting);
    return false;
  }
  if (!h_.incident->diagnosed.has_value()) h_.incident->diagnosed = h_.now;
  if (ended) return EnterDown();
  switch (MayAct()) {
    case Permission::kGiven:
      break;
    case Permission::kObserve:
    case Permission::kVetoed:
      SetState(IsPlanned(trouble->cause) ? State::kRunning : State::kStalled);
      return false;
    case Permission::kHeld:
      SetState(IsPlanned(trouble->cause) ? State::kRunning : State::kHolding);
      return false;
    case Permission::kAsked:
      SetState(State::kWaitingForApproval);
      return false;
  }
  h_.permitted = true;
  if (IsPlanned(trouble->cause)) {
    BeginSave(PlanText());
    return true;
  }
  return BeginStop(PlanText());
}

void Machine::NoteProgress() {
  bool opened = true, restored = true, stepping = true, started = true, any_opened = false;
  for (const RankRecord& rank : h_.ranks) {
    const bool over =
        rank.phase == RankPhase::kEnded && rank.exit.kind == monitor::ExitKind::kClean;
    if (rank.phase == RankPhase::kEnded && !over) return;
    opened = opened && rank.phase >= RankPhase::kOpened;
    restored = restored && rank.phase >= RankPhase::kRestored;
    stepping = stepping && rank.phase >= RankPhase::kStepping;
    started = started && rank.phase >= RankPhase::kStarted;
    any_opened = any_opened || rank.phase == RankPhase::kOpened ||
                 rank.phase == RankPhase::kRestored || rank.phase == RankPhase::kStepping;
  }
  Incident* const last =
      h_.past.empty() || h_.past.back().outcome != Outcome::kOpen ? nullptr : &h_.past.back();
  if (last != nullptr) {
    if (opened && !last->opened.has_value()) last->opened = h_.now;
    if (restored && !last->restored_at.has_value()) last->restored_at = h_.now;
    if (restored) last->restored = h_.restored;
  }
  if (stepping && !h_.stepped) {
    h_.stepped = true;
    h_.start_time = Since(h_.now, h_.launched_at);
    if (last != nullptr) last->resumed = h_.now;
  }
  if (h_.running_since.has_value()) return;
  const bool silent = started && Since(h_.now, h_.launched_at) >= kSilentStart &&
                      (!any_opened || (opened && !h_.start_time.has_value()));
  if (!stepping && !silent) return;
  h_.running_since = h_.now;
  if (last != nullptr) last->outcome = Outcome::kResumed;
}

void Machine::OpenIncident(const Trouble& trouble) {
  if (!h_.incident.has_value()) {
    if (!h_.past.empty() && h_.past.back().outcome == Outcome::kOpen) {
      h_.past.back().outcome = Outcome::kReplaced;
    }
    Incident incident;
    incident.number = ++h_.incident_count;
    incident.launch = h_.launch;
    incident.attempt = h_.attempt;
    incident.cause = trouble.cause;
    incident.wall = h_.wall;
    incident.detected = h_.now;
    incident.onset = std::min(h_.now, trouble.onset);
    h_.incident = std::move(incident);
    h_.evidence = History::Evidence::kNotAsked;
    h_.permitted = false;
    h_.blamed = false;
    h_.counted = false;
  }
  Incident& incident = *h_.incident;
  // A death that follows a hang, or an Xid that explains a death, is the same incident: the cause
  // that tells more stays. One that is withdrawn leaves what is there now.
  incident.cause = trouble.cause;
  incident.onset = std::min(*incident.onset, trouble.onset);
  incident.suspects = trouble.suspects;
  incident.finding = trouble.finding;
  incident.what = CutText(trouble.what, 256);
  incident.sentence = trouble.sentence;
  incident.confidence_permille = trouble.confidence_permille;
  h_.signature = trouble.signature;
  incident.action = settings_.mode == Mode::kObserve ? "" : CutText(PlanText(), 256);
}

void Machine::CloseIncident(Outcome outcome) {
  if (outcome == Outcome::kWithdrawn) h_.incident->action.clear();
  h_.incident->outcome = outcome;
  if (h_.past.size() >= History::kIncidentsMax) h_.past.erase(h_.past.begin());
  h_.past.push_back(*std::move(h_.incident));
  h_.incident.reset();
  h_.evidence = History::Evidence::kNotAsked;
}

bool Machine::EvidenceIsOver() {
  if (h_.evidence == History::Evidence::kNotAsked) {
    h_.evidence = History::Evidence::kAsked;
    h_.evidence_deadline = h_.now + settings_.evidence_wait;
    EmitEvidence();
  }
  return h_.evidence == History::Evidence::kDone || h_.now >= h_.evidence_deadline;
}

void Machine::BeginSave(const std::string& why) {
  h_.phase = Phase::kSaving;
  h_.save_asked_at = h_.now;
  h_.save_deadline = h_.now + settings_.save_wait;
  h_.save_failed = false;
  EmitSave(why);
}

bool Machine::Saving() {
  NoteProgress();
  if (AllEnded(h_)) {
    if (AllClean(h_)) return Over(0, "every rank has ended with status 0");
    h_.phase = Phase::kAlive;  // what ended them is looked at there
    return true;
  }
  const std::optional<Trouble> trouble = FindTrouble(settings_, h_);
  const bool sick = trouble.has_value() && !IsPlanned(trouble->cause);
  if (!h_.end.has_value() && (sick || !trouble.has_value() || Held())) {
    h_.phase = Phase::kAlive;  // the plan is void, or something worse has come
    return true;
  }
  const bool over = h_.save_failed || h_.now >= h_.save_deadline || sick ||
                    (h_.end.has_value() && !h_.end->save_first);
  if (over) return BeginStop(h_.end.has_value() ? h_.end->why : PlanText());
  SetState(State::kSaving);
  return false;
}

// ---- Stopping.

bool Machine::BeginStop(const std::string& why) {
  h_.stop_why = CutText(why, 512);
  if (h_.incident.has_value() && !h_.end.has_value()) {
    h_.incident->action = CutText(PlanText(), 256);
    h_.incident->stopping = h_.now;
    Blame();
  }
  for (uint32_t r = 0; r < h_.ranks.size(); ++r) {
    // Nobody can stop it there: the next launch fences it.
    if (Contains(h_.nodes_gone, h_.placement.gpus[r].node)) WriteOff(Rank{r});
  }
  if (AllEnded(h_)) return EnterDown();
  h_.phase = Phase::kStopping;
  h_.kill_at = h_.now + settings_.stop_wait;
  EmitStop();
  return true;
}

// False: it has ended.
bool Machine::WriteOff(Rank rank) {
  RankRecord& record = h_.ranks[Value(rank)];
  if (record.phase == RankPhase::kEnded || record.phase == RankPhase::kStuck) return false;
  record.phase = RankPhase::kStuck;
  if (h_.stuck_ranks.size() < History::kRanksMax) {
    h_.stuck_ranks.push_back({h_.launch, rank, h_.placement.gpus[Value(rank)]});
  }
  return true;
}

bool Machine::Stopping() {
  // Another launcher ends its ranks in its own time, and gives none of them up.
  if (settings_.launcher == Launcher::kWe && !AllEnded(h_) &&
      h_.now >= h_.kill_at + settings_.kill_wait) {
    for (uint32_t r = 0; r < h_.ranks.size(); ++r) {
      if (!WriteOff(Rank{r})) continue;
      Say(absl::StrFormat("rank %d does not die %s after KILL: %s is not used until it does", r,
                          DurationText(settings_.kill_wait),
                          Name(h_.placement.gpus[r], HomeOf(h_))));
    }
  }
  if (AllEnded(h_)) return EnterDown();
  SetState(State::kStopping);
  return false;
}

bool Machine::NextIsFree() const {
  const Incident& incident = *h_.incident;
  return h_.next_is_free || IsPlanned(incident.cause) ||
         IsHealthyFor(h_, settings_.healthy_after, incident.detected.value_or(h_.now));
}

bool Machine::EnterDown() {
  h_.phase = Phase::kDown;
  h_.time_alive += Since(h_.now, h_.alive_since);
  h_.resume_at.reset();
  h_.capacity_deadline.reset();
  h_.approval_deadline.reset();
  if (!h_.incident.has_value()) return true;
  Incident& incident = *h_.incident;
  incident.stopped = h_.now;
  const bool healthy =
      IsHealthyFor(h_, settings_.healthy_after, incident.detected.value_or(h_.now));
  h_.next_is_free = healthy || IsPlanned(incident.cause);
  if (healthy) h_.unhealthy_in_a_row = 0;
  if (h_.end.has_value() || IsPlanned(incident.cause)) return true;
  if (incident.cause != Cause::kUsage && incident.cause != Cause::kProgram) ++h_.failures;
  // What the hardware or another rank's hang has ended is not the checkpoint's doing.
  const bool its_own = incident.cause == Cause::kProcessDead || incident.cause == Cause::kProgram ||
                       incident.cause == Cause::kHang;
  if (!h_.counted && its_own && !healthy && !h_.committed_since && h_.restored.has_value()) {
    h_.counted = true;
    for (CheckpointRecord& record : h_.checkpoints) {
      if (record.facts.id == *h_.restored) ++record.crashes;
    }
  }
  return true;
}

// ---- No rank lives.

// Only what is open when the launch is over counts against what was captured meanwhile: a finding
// that was withdrawn is no anomaly, and one that is told late is one from its onset on.
void Machine::NoteAnomalies() {
  for (CheckpointRecord& record : h_.checkpoints) {
    if (record.captured_at.has_value() && IsUnderAnomaly(h_, *record.captured_at)) {
      record.facts.under_anomaly = true;
    }
  }
}

bool Machine::Down() {
  NoteAnomalies();
  if (h_.end.has_value()) return Over(h_.end->code, h_.end->why);
  if (h_.incident.has_value()) {
    // Exits are known already; what the kernel said late may explain them.
    if (const std::optional<Trouble> trouble = FindTrouble(settings_, h_);
        trouble.has_value() && trouble->cause > h_.incident->cause) {
      OpenIncident(*trouble);
      h_.permitted = h_.blamed = h_.next_is_free = false;
      h_.next_is_free = NextIsFree();
    }
    Incident& incident = *h_.incident;
    if (incident.cause == Cause::kUsage) {
      return Over(93, absl::StrCat(incident.what, ": a restart cannot help"));
    }
    if (incident.cause == Cause::kProgram && Contains(h_.signatures, h_.signature)) {
      return Over(93, absl::StrCat("the same again: ", incident.what, ". ", incident.sentence));
    }
    if (!h_.next_is_free && h_.restarts_charged >= settings_.max_restarts) {
      return Over(1, absl::StrFormat("%s, and all %d restarts are used up", incident.what,
                                     settings_.max_restarts));
    }
    switch (h_.permitted && !Held() ? Permission::kGiven : MayAct()) {
      case Permission::kGiven:
        break;
      case Permission::kObserve:
        return Over(1, absl::StrCat(incident.what, "; mode = observe"));
      case Permission::kVetoed:
        return Over(1, absl::StrCat(incident.what, "; a person vetoed the restart"));
      case Permission::kHeld:
        SetState(State::kHolding);
        return false;
      case Permission::kAsked:
        return WaitForPerson();
    }
    h_.permitted = true;
    incident.action = CutText(PlanText(), 256);
    Blame();
  }
  const RestoreChoice restore = ChooseRestore(settings_, h_);
  if (!restore.rule.has_value()) {
    if (Ask(restore.key, restore.question) == Permission::kVetoed) {
      return Over(93, absl::StrCat("no checkpoint can be used: ", restore.passed_over));
    }
    return WaitForPerson();
  }
  const PlacementChoice choice = ChoosePlacement(settings_, h_);
  if (!choice.placement.has_value()) {
    // What earlier jobs excluded a person may use all the same, if the job says so.
    if (settings_.lemons == LemonPolicy::kAsk && h_.launches_of_run == 0) {
      std::vector<Gpu> lemons;
      for (const Gpu& gpu : h_.gpus) {
        if (h_.lemons.ExclusionOf(gpu, h_.wall) != nullptr) lemons.push_back(gpu);
      }
      if (!lemons.empty()) {
        const Permission permission =
            Ask("lemons", absl::StrCat("Use excluded GPUs? ", choice.why_not, "."));
        if (permission == Permission::kAsked) return WaitForPerson();
        if (permission == Permission::kGiven) {
          for (const Gpu& gpu : lemons) h_.lemons.Readmit(gpu);
          return true;
        }
      }
    }
    DropProposal();
    if (!h_.capacity_deadline.has_value()) {
      h_.capacity_deadline = h_.now + settings_.capacity_wait;
      Say(absl::StrCat("waiting for GPUs: ", choice.why_not));
    }
    if (h_.now >= *h_.capacity_deadline) return Over(75, choice.why_not);
    SetState(State::kWaitingForCapacity);
    return false;
  }
  h_.capacity_deadline.reset();
  DropProposal();
  if (const std::optional<absl::Duration> until = PauseEnd(); until.has_value()) {
    SetState(State::kDeciding);
    return false;
  }
  std::string why = h_.incident.has_value() ? h_.incident->what : "the run begins";
  if (!restore.passed_over.empty()) Say(absl::StrCat("passed over: ", restore.passed_over));
  if (!choice.why_smaller.empty()) {
    absl::StrAppend(&why, "; ", choice.placement->world_size(), " ranks: ", choice.why_smaller);
  }
  Start(*choice.placement, *restore.rule, why);
  return true;
}

bool Machine::WaitForPerson() {
  if (!h_.approval_deadline.has_value()) h_.approval_deadline = h_.now + settings_.approval_wait;
  if (h_.now >= *h_.approval_deadline) return Over(75, "nobody has answered");
  SetState(State::kWaitingForApproval);
  return false;
}

// The end of the pause before the next restart, or nothing: it may start now.
std::optional<absl::Duration> Machine::PauseEnd() {
  if (!h_.incident.has_value() || h_.next_is_free) return std::nullopt;
  if (settings_.launcher == Launcher::kOther) return std::nullopt;
  if (!h_.resume_at.has_value()) {
    absl::Duration pause = absl::ZeroDuration();
    if (h_.unhealthy_in_a_row > 0) {
      const uint32_t doublings = std::min<uint32_t>(h_.unhealthy_in_a_row - 1, 20);
      pause = std::min(settings_.pause_max, settings_.pause_first * (int64_t{1} << doublings));
    }
    absl::Duration until = h_.now + pause;
    std::erase_if(h_.recent_restarts,
                  [&](absl::Duration at) { return at + settings_.restart_window <= h_.now; });
    if (h_.recent_restarts.size() >= settings_.restarts_in_window && !h_.recent_restarts.empty()) {
      const size_t first =
          h_.recent_restarts.size() - std::max<size_t>(1, settings_.restarts_in_window);
      until = std::max(until, h_.recent_restarts[first] + settings_.restart_window);
      Say(absl::StrFormat("%d restarts within %s: the next one waits", h_.recent_restarts.size(),
                          DurationText(settings_.restart_window)));
    }
    h_.resume_at = until;
  }
  if (h_.now >= *h_.resume_at) return std::nullopt;
  return h_.resume_at;
}

void Machine::Start(Placement placement, RestoreRule rule, const std::string& why) {
  h_.launch = Launch{std::max(Value(h_.launch), Value(h_.launch_max)) + 1};
  h_.launch_max = h_.launch;
  if (h_.launches_of_run++ > 0) ++h_.restart_count;
  if (h_.incident.has_value()) {
    if (!h_.next_is_free) {
      ++h_.restarts_charged;
      if (h_.recent_restarts.size() >= History::kFindingsMax) {
        h_.recent_restarts.erase(h_.recent_restarts.begin());
      }
      h_.recent_restarts.push_back(h_.now);
    }
    if (!IsPlanned(h_.incident->cause)) ++h_.unhealthy_in_a_row;
    if (!h_.signature.empty() && !Contains(h_.signatures, h_.signature)) {
      if (h_.signatures.size() >= History::kKeysMax) h_.signatures.erase(h_.signatures.begin());
      h_.signatures.push_back(h_.signature);
    }
    Incident& incident = *h_.incident;
    incident.starting = h_.now;
    incident.next_launch = h_.launch;
    incident.restored = rule.checkpoint;
    const LostWork lost = LostWorkOf(h_, rule, incident.onset.value_or(h_.now));
    incident.lost_steps = lost.steps;
    incident.lost_work = lost.time;
    CloseIncident(Outcome::kOpen);
  }
  h_.phase = Phase::kAlive;
  h_.placement = std::move(placement);
  h_.restore_rule = std::move(rule);
  h_.start_why = CutText(why, 512);
  h_.ranks.assign(h_.placement.gpus.size(), RankRecord{});
  h_.attempt = Attempt{};
  h_.launched_at = h_.alive_since = h_.last_progress = h_.now;
  h_.running_since.reset();
  h_.stepped = false;
  h_.restored.reset();
  h_.committed_since = false;
  h_.gpu_faults.clear();
  h_.findings.clear();
  h_.approved.clear();
  h_.vetoed.clear();
  h_.signature.clear();
  h_.resume_at.reset();
  h_.next_is_free = false;
  h_.grow = false;
  EmitStart();
}

bool Machine::Over(int32_t code, const std::string& why) {
  if (h_.phase != Phase::kDown) h_.time_alive += Since(h_.now, h_.alive_since);
  if (h_.incident.has_value()) CloseIncident(Outcome::kEnded);
  if (!h_.past.empty() && h_.past.back().outcome == Outcome::kOpen) {
    h_.past.back().outcome = Outcome::kEnded;
  }
  DropProposal();
  h_.phase = Phase::kOver;
  h_.exit_code = code;
  h_.exit_why = CutText(why, 512);
  Emit(ExitJob{h_.exit_code, h_.exit_why});
  return true;
}

// ---- Whether it may act, and whom it blames.

bool Machine::ActsByItself(Cause cause) const {
  if (settings_.mode != Mode::kAct) return false;
  // All but replacing a slow GPU are rows of the default table.
  return cause != Cause::kSlow || settings_.slow == SlowPolicy::kReplaceAtCheckpoint;
}

bool Machine::Held() const { return h_.hold_until.has_value() && h_.now < *h_.hold_until; }

Machine::Permission Machine::MayAct() {
  const Incident& incident = *h_.incident;
  if (settings_.mode == Mode::kObserve) return Permission::kObserve;
  if (Held()) return Permission::kHeld;
  if (ActsByItself(incident.cause)) {
    DropProposal();
    return Permission::kGiven;
  }
  std::string key = absl::StrCat(Value(h_.launch), ":", std::string(Name(incident.cause)));
  for (const Gpu& gpu : WouldExclude()) absl::StrAppend(&key, ":", gpu.node, "/", gpu.index);
  std::string plan = PlanText();
  plan.front() = static_cast<char>(plan.front() - 'a' + 'A');
  return Ask(CutText(key, 256), absl::StrCat(plan, "? ", incident.sentence));
}

Machine::Permission Machine::Ask(const std::string& key, const std::string& question) {
  if (Contains(h_.approved, key)) return Permission::kGiven;
  if (Contains(h_.vetoed, key)) return Permission::kVetoed;
  if (!h_.proposal.has_value() || h_.proposal->key != key) {
    h_.proposal = Proposal{absl::StrCat("p", ++h_.proposal_count), key, CutText(question, 1024)};
    h_.approval_deadline.reset();
    Emit(recovery::Ask{h_.proposal->id, h_.proposal->question});
  }
  return Permission::kAsked;
}

void Machine::DropProposal() {
  h_.proposal.reset();
  h_.approval_deadline.reset();
}

std::vector<Gpu> Machine::WouldExclude() const {
  std::vector<Gpu> out;
  if (settings_.launcher == Launcher::kOther) return out;
  const Incident& incident = *h_.incident;
  if (incident.cause != Cause::kHangNamed && incident.cause != Cause::kSlow &&
      incident.cause != Cause::kGpuFault) {
    return out;
  }
  if (incident.suspects.empty()) return out;
  const Gpu& gpu = incident.suspects.front().gpu;
  if (h_.lemons.ExclusionOf(gpu, h_.wall) != nullptr) return out;
  if (incident.cause == Cause::kSlow || incident.cause == Cause::kGpuFault) return {gpu};
  // A stopped process, or one that gets no CPU, says nothing about its GPU.
  const std::optional<Trouble> trouble = FindTrouble(settings_, h_);
  if (!trouble.has_value() || !trouble->blames_gpu) return out;
  const absl::Time since = h_.wall - settings_.lemon_memory;
  const size_t marks = h_.lemons.MarksSince(gpu, since) + (h_.blamed ? 0 : 1);
  bool hardware = false;
  if (const Lemon* const lemon = h_.lemons.Find(gpu); lemon != nullptr) {
    hardware = std::any_of(lemon->marks.begin(), lemon->marks.end(), [&](const LemonMark& mark) {
      return mark.hardware && mark.at >= since;
    });
  }
  if (hardware) return {gpu};
  if (marks < settings_.hangs_to_exclude) return out;
  // Were it a fault of the program, one GPU after the other would be excluded.
  if (h_.exclusion_count >= settings_.exclusions_max) return out;
  return {gpu};
}

std::string Machine::PlanText() const {
  if (!h_.incident.has_value()) return "restart in place";
  const Incident& incident = *h_.incident;
  if (incident.cause == Cause::kUsage) return "end with 93: a restart cannot help";
  if (incident.cause == Cause::kProgram && Contains(h_.signatures, h_.signature)) {
    return "end with 93: the same again";
  }
  if (!NextIsFree() && h_.restarts_charged >= settings_.max_restarts) {
    return absl::StrFormat("end with 1: all %d restarts are used up", settings_.max_restarts);
  }
  std::vector<std::string> without;
  for (const Gpu& gpu : WouldExclude()) without.push_back(Name(gpu, HomeOf(h_)));
  if (without.empty()) {
    for (const Gpu& gpu : h_.placement.gpus) {
      if (without.size() < 8 && !WhyUnusable(h_, gpu).empty()) {
        without.push_back(Name(gpu, HomeOf(h_)));
      }
    }
  }
  const std::string at_checkpoint = IsPlanned(incident.cause) ? " at the next checkpoint" : "";
  if (incident.cause == Cause::kGrow) {
    return absl::StrCat("go on with ", incident.what, at_checkpoint);
  }
  if (without.empty()) return absl::StrCat("restart in place", at_checkpoint);
  return absl::StrCat("restart without ", absl::StrJoin(without, ", "), at_checkpoint);
}

void Machine::Blame() {
  if (h_.blamed || settings_.mode == Mode::kObserve) return;
  if (settings_.launcher == Launcher::kOther) return;
  const Incident& incident = *h_.incident;
  const std::vector<Gpu> excluded = WouldExclude();
  h_.blamed = true;
  if (incident.cause != Cause::kHangNamed && incident.cause != Cause::kSlow &&
      incident.cause != Cause::kGpuFault) {
    return;
  }
  const std::optional<Trouble> trouble = FindTrouble(settings_, h_);
  if (incident.suspects.empty() || !trouble.has_value() || !trouble->blames_gpu) return;
  const Gpu& gpu = incident.suspects.front().gpu;
  if (h_.lemons.ExclusionOf(gpu, h_.wall) != nullptr) return;
  h_.lemons.Mark(gpu, {h_.wall, h_.job, incident.what, incident.cause == Cause::kGpuFault});
  for (const Gpu& out : excluded) {
    h_.lemons.Exclude(out, {h_.wall, h_.wall + settings_.exclude_for, incident.what});
    ++h_.exclusion_count;
    Say(absl::StrCat(Name(out, HomeOf(h_)), ": excluded: ", incident.what));
  }
  KeepLemon(gpu);
}

// ---- What is told.

void Machine::EmitStart() {
  const uint32_t restarts = h_.restart_count;
  Emit(StartRanks{h_.launch, restarts, h_.placement, h_.restore_rule, h_.start_why});
}

void Machine::EmitStop() { Emit(StopRanks{h_.launch, ToEventClock(h_.kill_at), h_.stop_why}); }

void Machine::EmitSave(const std::string& why) {
  Emit(RequestSave{h_.launch, ToEventClock(h_.save_deadline), why});
}

void Machine::EmitEvidence() {
  CollectEvidence evidence{h_.incident->number,
                           h_.launch,
                           ToEventClock(h_.evidence_deadline),
                           {},
                           h_.incident->sentence};
  for (const Incident::Suspect& suspect : h_.incident->suspects) {
    evidence.suspects.push_back(suspect.rank);
  }
  Emit(std::move(evidence));
}

void Machine::SetState(State state) {
  if (h_.state == state) return;
  h_.state = state;
  h_.state_since = h_.now;
}

void Machine::SetWakeAt() {
  std::optional<absl::Duration> next;
  const auto at = [&](std::optional<absl::Duration> moment) {
    if (!moment.has_value() || *moment <= h_.now) return;
    next = next.has_value() ? std::min(*next, *moment) : *moment;
  };
  if (h_.phase != Phase::kIdle && h_.phase != Phase::kOver) {
    at(h_.hold_until);
    at(h_.approval_deadline);
    if (h_.evidence == History::Evidence::kAsked) at(h_.evidence_deadline);
  }
  if (h_.phase == Phase::kAlive || h_.phase == Phase::kSaving) {
    if (const auto trouble = FindTrouble(settings_, h_); trouble.has_value()) at(trouble->act_at);
    if (!h_.running_since.has_value()) {
      at(h_.launched_at + kSilentStart);
      at(h_.launched_at + settings_.start_wait);
    }
  }
  if (h_.phase == Phase::kSaving) at(h_.save_deadline);
  if (h_.phase == Phase::kStopping) {
    at(h_.kill_at);
    at(h_.kill_at + settings_.kill_wait);
  }
  if (h_.phase == Phase::kDown) {
    at(h_.resume_at);
    at(h_.capacity_deadline);
  }
  h_.wake_at.reset();
  if (next.has_value()) h_.wake_at = std::max(absl::ZeroDuration(), ToEventClock(*next));
}

}  // namespace holdfast::recovery
