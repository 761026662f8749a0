#include "agent/run/job_supervisor.h"

#include <signal.h>

#include <algorithm>
#include <filesystem>
#include <utility>
#include <variant>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/log.h"
#include "agent/process.h"
#include "agent/recovery/incident.h"
#include "agent/recovery/policy.h"
#include "agent/recovery/text.h"
#include "agent/run/fields.h"
#include "agent/run/small_files.h"
#include "agent/run/state_files.h"
#include "base/check.h"
#include "base/kill_point.h"
#include "base/status_macros.h"

namespace holdfast {
namespace {

using recovery::Launch;

constexpr char kRunName[] = "run";
constexpr absl::Duration kTickEvery = absl::Seconds(1);
// Until every rank has finished a step: the phases of a restart are measured by it.
constexpr absl::Duration kPollStarting = absl::Milliseconds(20);
constexpr absl::Duration kPollRunning = absl::Seconds(1);
// A former worker's shims answer at once; one that does not counts as it was.
constexpr absl::Duration kFoundDeadline = absl::Seconds(2);

std::vector<recovery::Gpu> GpusOf(const RunSpec& spec, const std::string& node) {
  std::vector<recovery::Gpu> gpus;
  for (uint32_t i = 0; i < spec.ranks; ++i) gpus.push_back({node, i, ""});
  if (spec.gpus.empty()) return gpus;
  gpus.clear();
  for (const std::string& text : spec.gpus) {
    recovery::Gpu gpu{node, static_cast<uint32_t>(gpus.size()), ""};
    if (!absl::SimpleAtoi(text, &gpu.index)) gpu.uuid = text;
    gpus.push_back(std::move(gpu));
  }
  return gpus;
}

// What the history says of a run besides the passing of time.
struct Position {
  recovery::Phase phase{};
  recovery::State state{};
  Launch launch{};
  uint32_t incidents = 0;
  friend bool operator==(const Position&, const Position&) = default;
};
Position PositionOf(const recovery::History& history) {
  return {history.phase, history.state, history.launch, history.incident_count};
}

}  // namespace

JobSupervisor::JobSupervisor(Options options, World world, RunSpec spec,
                             recovery::Settings settings, std::function<void()> on_change)
    : options_(std::move(options)),
      world_(std::move(world)),
      spec_(std::move(spec)),
      node_(NodeOf(spec_)),
      settings_(std::move(settings)),
      on_change_(std::move(on_change)),
      silence_(monitor::Thresholds(), settings_.hang_timeout),
      collector_(world_.evidence, spec_.job),
      // Greater than those of the worker before this one.
      next_line_(static_cast<uint64_t>(absl::ToInt64Microseconds(world_.clock.Elapsed()))) {}

JobSupervisor::~JobSupervisor() {
  for (const EventLoop::TimerId timer :
       {timer_, gone_timer_, kill_timer_, poll_timer_, owner_timer_, begin_timer_}) {
    world_.loop.CancelTimer(timer);
  }
  if (owner_) world_.loop.Unwatch(owner_.get());
}

namespace {

absl::StatusOr<recovery::Settings> SettingsOf(const RunSpec& spec) {
  ASSIGN_OR_RETURN(recovery::Settings settings,
                   recovery::ParseSettings(spec.recovery_toml, "configuration of the run"));
  if (spec.max_restarts.has_value()) settings.max_restarts = *spec.max_restarts;
  if (spec.stop_wait_seconds.has_value()) {
    settings.stop_wait = absl::Seconds(*spec.stop_wait_seconds);
  }
  return settings;
}

}  // namespace

absl::StatusOr<std::unique_ptr<JobSupervisor>> JobSupervisor::Begin(
    Options options, World world, RunSpec spec, std::function<void()> on_change) {
  ASSIGN_OR_RETURN(recovery::Settings settings, SettingsOf(spec));
  absl::StatusOr<recovery::History> history = ReadHistory(options.state_directory);
  if (!history.ok()) {
    LogWarning(absl::StrFormat("job %s: what happened in earlier runs is lost: %s", spec.job,
                               history.status().ToString()));
    history = recovery::History();
  }
  // Nothing of an earlier run may be taken for one of this.
  std::error_code error;
  std::filesystem::remove_all(options.runtime_directory, error);
  RETURN_IF_ERROR(MakeDirectories(options.runtime_directory));
  spec.run_number = history->run_count + 1;
  RETURN_IF_ERROR(
      ReplaceFile(absl::StrCat(options.runtime_directory, "/", kRunName), EncodeRunSpec(spec)));
  std::unique_ptr<JobSupervisor> supervisor(new JobSupervisor(std::move(options), std::move(world),
                                                              std::move(spec), std::move(settings),
                                                              std::move(on_change)));
  supervisor->history_ = *std::move(history);
  // What was collected beside another launcher is not written over.
  supervisor->history_.incident_count =
      std::max(supervisor->history_.incident_count,
               NewestIncident(absl::StrCat(supervisor->options_.state_directory, "/incidents")));
  supervisor->told_incident_ = supervisor->history_.incident_count;
  supervisor->BeginRun();
  return supervisor;
}

absl::StatusOr<std::unique_ptr<JobSupervisor>> JobSupervisor::Recover(
    Options options, World world, std::function<void()> on_change) {
  ASSIGN_OR_RETURN(
      const std::string bytes,
      ReadFile(absl::StrCat(options.runtime_directory, "/", kRunName), Fields::kBytesMax));
  ASSIGN_OR_RETURN(RunSpec spec, DecodeRunSpec(bytes));
  if (spec.boot_id != BootId()) {
    std::error_code error;
    // Dropped: it is tried again by the next worker.
    std::filesystem::remove_all(options.runtime_directory, error);
    return absl::NotFoundError("the machine was started again since");
  }
  ASSIGN_OR_RETURN(recovery::Settings settings, SettingsOf(spec));
  ASSIGN_OR_RETURN(recovery::History history, ReadHistory(options.state_directory));
  std::unique_ptr<JobSupervisor> supervisor(new JobSupervisor(std::move(options), std::move(world),
                                                              std::move(spec), std::move(settings),
                                                              std::move(on_change)));
  JobSupervisor& self = *supervisor;
  self.history_ = std::move(history);
  const std::weak_ptr<bool> alive(self.alive_);
  self.owner_timer_ = self.world_.loop.RunAfter(kOwnerDeadline, [&self] {
    self.owner_timer_ = 0;
    if (!self.FindOwner()) self.OwnerDied();
  });
  if (self.history_.run_count < self.spec_.run_number) {
    // Nothing was decided yet. What the history says is of an earlier run.
    self.told_incident_ = self.history_.incident_count;
    self.BeginRun();
    return supervisor;
  }
  // Told by the worker before this one, but for the one that may be open.
  self.told_incident_ = self.history_.past.empty() ? 0 : self.history_.past.back().number;
  self.recovering_ = true;
  self.group_launch_ = self.history_.launch;
  self.progress_.BeginLaunch(self.group_launch_);
  self.group_ = self.MakeGroup(self.group_launch_);
  self.group_->Recover();
  if (const auto port = self.PortOf(self.LaunchDirectory(self.group_launch_)); port.ok()) {
    self.port_ = *port;
  }
  self.OrderRestore(self.history_.launch, self.history_.restore_rule);
  self.world_.loop.RunAfter(self.group_->count() == 0 ? absl::ZeroDuration() : kFoundDeadline,
                            [&self, alive] {
                              if (!alive.expired()) self.EndRecovery();
                            });
  return supervisor;
}

void JobSupervisor::EndRecovery() {
  if (!std::exchange(recovering_, false)) return;
  recovery::AgentRestarted restarted;
  for (const auto& [rank, exit] : recovered_) {
    restarted.ranks.push_back({group_launch_, Rank{rank}, exit});
  }
  recovered_.clear();
  Say(absl::StrFormat("the agent's worker is back; %d ranks were found", restarted.ranks.size()));
  Take(std::move(restarted));
  // Nobody will come back, if it has died with the agent.
  if (!owner_ && spec_.owner_pid != 0 && !OpenPidfd(static_cast<pid_t>(spec_.owner_pid)).ok()) {
    OwnerDied();
  }
  ReadCheckpoints();
  Poll();
}

// The policy is told of the run when it is known what the job has to begin from. What comes before
// that waits.
void JobSupervisor::BeginRun() {
  recovery::RunBegun begun;
  begun.job = spec_.job;
  begun.world_size = spec_.ranks;
  if (const auto lemons = ReadLemons(options_.lemons_path); lemons.ok()) begun.lemons = *lemons;
  begun.gpus = GpusOf(spec_, node_);
  begun_ = std::move(begun);
  begin_timer_ = world_.loop.RunAfter(kCatalogDeadline, [this] {
    begin_timer_ = 0;
    CatalogRead(absl::DeadlineExceededError(absl::StrFormat(
        "storage has not answered within %s", absl::FormatDuration(kCatalogDeadline))));
  });
  ReadCheckpoints();
}

// ---- Events and decisions

void JobSupervisor::Push(recovery::Event event) {
  events_.push_back(std::move(event));
  Pump();
}

void JobSupervisor::Pump() {
  if (pumping_ || writing_ || recovering_ || begun_.has_value()) return;
  pumping_ = true;
  while (!events_.empty() && !writing_) {
    const recovery::Event event = std::move(events_.front());
    events_.pop_front();
    const Position before = PositionOf(history_);
    std::vector<recovery::Action> actions = recovery::Decide(settings_, event, history_);
    if (actions.empty() && PositionOf(history_) == before) continue;
    writing_ = true;
    auto written = std::make_shared<absl::Status>();
    world_.pool.Run(
        [path = HistoryPath(options_.state_directory), bytes = recovery::Encode(history_),
         written] { *written = ReplaceFile(path, bytes); },
        [this, alive = std::weak_ptr<bool>(alive_), written, actions = std::move(actions)] {
          if (alive.expired()) return;
          writing_ = false;
          if (!written->ok()) {
            // Going on without is better for the job than standing still; a worker that comes after
            // finds less.
            LogError(absl::StrFormat("job %s: %s", spec_.job, written->ToString()));
          }
          Decided(actions);
          TellResumed();
          if (on_change_) on_change_();
          Pump();
        });
  }
  pumping_ = false;
  ArmTimer();
}

void JobSupervisor::Decided(const std::vector<recovery::Action>& actions) {
  for (const recovery::Action& action : actions) {
    LogInfo(absl::StrFormat("job %s: %s", spec_.job, recovery::Describe(action)));
    std::visit([this](const auto& one) { CarryOut(one); }, action);
  }
}

// Where the time of an incident went, once it is over.
void JobSupervisor::TellResumed() {
  for (const recovery::Incident& incident : history_.past) {
    if (incident.number <= told_incident_ || incident.outcome != recovery::Outcome::kResumed) {
      continue;
    }
    told_incident_ = incident.number;
    WriteIncident(incident);
    const recovery::Phases phases = recovery::PhasesOf(incident);
    std::string text = absl::StrFormat("incident %d is over", incident.number);
    const auto add = [&](const char* name, const std::optional<absl::Duration>& phase) {
      if (phase.has_value())
        absl::StrAppend(&text, "; ", name, " ", recovery::DurationText(*phase));
    };
    add("detect", phases.detect);
    add("diagnose", phases.diagnose);
    add("wait", phases.wait);
    add("stop", phases.stop);
    add("start", phases.start);
    add("load", phases.load);
    add("first step", phases.step);
    add("lost work", phases.lost);
    add("together", phases.total);
    Say(std::move(text));
  }
}

void JobSupervisor::ArmTimer() {
  world_.loop.CancelTimer(timer_);
  timer_ = 0;
  if (is_over_) return;
  absl::Duration wait = kTickEvery;
  if (history_.wake_at.has_value()) {
    wait =
        std::clamp(*history_.wake_at - world_.clock.Elapsed(), absl::Milliseconds(1), kTickEvery);
  }
  timer_ = world_.loop.RunAfter(wait, [this] { OnTimer(); });
}

void JobSupervisor::OnTimer() {
  timer_ = 0;
  if (writing_ || recovering_ || begun_.has_value()) return ArmTimer();
  Take(recovery::Tick{});
}

// ---- Actions

void JobSupervisor::CarryOut(const recovery::RequestSave& action) {
  const absl::StatusOr<Step> due =
      world_.engine.MakeDue(spec_.job, AttemptKeyOf(spec_, action.launch));
  if (due.ok()) {
    Say(absl::StrFormat("a save of step %d was asked for: %s", Value(*due), action.why));
    // From now on at the rate of a save.
    world_.loop.CancelTimer(poll_timer_);
    poll_timer_ = world_.loop.RunAfter(kPollStarting, [this] {
      poll_timer_ = 0;
      Poll();
    });
    return;
  }
  Say(absl::StrFormat("no save can be asked for: %s", std::string(due.status().message())));
  Take(recovery::SaveFailed{action.launch});
}

void JobSupervisor::CarryOut(const recovery::StopRanks& action) {
  if (group_ == nullptr || action.launch != group_launch_) return;
  stops_ = true;
  ReadCheckpoints();  // for the choice that follows
  group_->Signal(SIGTERM);
  KillPoint("run.ranks_stopping");
  world_.loop.CancelTimer(kill_timer_);
  const absl::Duration wait =
      std::max(action.kill_at - world_.clock.Elapsed(), absl::ZeroDuration());
  kill_timer_ = world_.loop.RunAfter(wait, [this] {
    kill_timer_ = 0;
    if (group_ != nullptr) group_->KillTrees();
  });
}

void JobSupervisor::CarryOut(const recovery::StartRanks& action) {
  if (!history_.past.empty()) WriteIncident(history_.past.back());
  if (group_ != nullptr && group_launch_ == action.launch) return StartGroup(action);
  WhenGone([this, action] { StartGroup(action); });
}

void JobSupervisor::CarryOut(const recovery::ExitJob& action) {
  if (std::exchange(finishing_, true)) return;
  exit_code_ = action.code;
  Say(absl::StrFormat("ends with %d: %s", action.code, action.why));
  WhenGone([this] { Finish(); });
}

void JobSupervisor::CarryOut(const recovery::Ask& action) {
  Say(absl::StrFormat("%s  (holdfast approve %s, holdfast veto %s)", action.question, action.id,
                      action.id));
}

void JobSupervisor::CarryOut(const recovery::Notice& action) { Say(action.text); }

// Other jobs may have changed the list: what has changed here is merged into what is there.
void JobSupervisor::ChangeLemons(const std::function<void(recovery::LemonList&)>& change) {
  absl::StatusOr<recovery::LemonList> lemons = ReadLemons(options_.lemons_path);
  if (!lemons.ok()) {
    LogWarning(absl::StrCat("the list of GPUs that made trouble begins anew: ",
                            lemons.status().ToString()));
    lemons = recovery::LemonList();
  }
  change(*lemons);
  if (absl::Status written = ReplaceFile(options_.lemons_path, lemons->Encode()); !written.ok()) {
    LogWarning(absl::StrCat("GPUs that made trouble: ", written.ToString()));
  }
}

void JobSupervisor::CarryOut(const recovery::RecordLemon& action) {
  ChangeLemons([&](recovery::LemonList& lemons) {
    for (const recovery::LemonMark& mark : action.lemon.marks) lemons.Mark(action.lemon.gpu, mark);
    if (action.lemon.excluded.has_value()) {
      lemons.Exclude(action.lemon.gpu, *action.lemon.excluded);
    }
  });
  Say(absl::StrFormat("%s is remembered for what happened on it",
                      recovery::Name(action.lemon.gpu, node_)));
}

void JobSupervisor::CarryOut(const recovery::ForgetLemon& action) {
  // What is not in the list need not be taken out.
  ChangeLemons([&](recovery::LemonList& lemons) { (void)lemons.Readmit(action.gpu); });
  Say(absl::StrFormat("%s is used again", recovery::Name(action.gpu, node_)));
}

void JobSupervisor::Finish() {
  is_over_ = true;
  collector_.Stop();
  if (!history_.past.empty()) WriteIncident(history_.past.back());
  std::error_code error;
  // Dropped: a run whose `run` stays is found again, and is over at once.
  std::filesystem::remove_all(options_.runtime_directory, error);
  world_.loop.CancelTimer(poll_timer_);
  poll_timer_ = 0;
  world_.loop.CancelTimer(owner_timer_);
  owner_timer_ = 0;
  world_.engine.SetRestoreOrder(spec_.job, std::nullopt);
  if (on_change_) on_change_();
}

// ---- How far the ranks are

absl::Duration JobSupervisor::PollEvery() const {
  // The ranks are stopped when the save is there, and train on in vain until then.
  if (history_.phase == recovery::Phase::kSaving) return kPollStarting;
  const bool all_step = progress_.stepped_count() >= history_.ranks.size();
  // Who never tells of steps is not looked at so closely for ever.
  const bool is_new = world_.clock.Elapsed() - started_ < absl::Minutes(10);
  return is_new && !all_step ? kPollStarting : kPollRunning;
}

void JobSupervisor::Poll() {
  world_.loop.CancelTimer(poll_timer_);
  poll_timer_ = 0;
  if (is_over_ || group_ == nullptr) return;
  const absl::Duration now = world_.clock.Elapsed();
  const std::vector<Engine::RankProgress> ranks =
      world_.engine.ProgressOf(spec_.job, AttemptKeyOf(spec_, group_launch_));
  for (const Engine::RankProgress& progress : ranks) TakeProgress(progress, now);
  LookForSilence(ranks, now);
  poll_timer_ = world_.loop.RunAfter(PollEvery(), [this] {
    poll_timer_ = 0;
    Poll();
  });
}

void JobSupervisor::TakeProgress(const Engine::RankProgress& progress, absl::Duration now) {
  for (ProgressWatch::Told& told : progress_.Look(progress, now)) {
    // What the attempt begins from is decided: of those before, no more will be committed.
    if (std::holds_alternative<recovery::RankRestored>(told) &&
        !std::exchange(any_restored_, true)) {
      ReadCheckpoints();
      TellIfOlder(progress.restored_from);
    }
    Take(std::move(told));
  }
}

// ---- People

void JobSupervisor::SetOwner(UniqueFd pidfd) {
  world_.loop.CancelTimer(owner_timer_);
  owner_timer_ = 0;
  if (owner_) world_.loop.Unwatch(owner_.get());
  owner_ = std::move(pidfd);
  if (!owner_) return;
  world_.loop.Watch(owner_.get(), EventLoop::FdEvents::kReadable, [this] {
    world_.loop.Unwatch(owner_.get());
    owner_.Reset();
    OwnerDied();
  });
}

// Without its word: it may be stopped (SIGSTOP), which is no death.
bool JobSupervisor::FindOwner() {
  if (spec_.owner_pid == 0) return false;
  absl::StatusOr<UniqueFd> owner = OpenPidfd(static_cast<pid_t>(spec_.owner_pid));
  if (!owner.ok()) return false;
  SetOwner(*std::move(owner));
  return true;
}

void JobSupervisor::Kill() {
  if (group_ != nullptr) group_->KillTrees();
}

void JobSupervisor::OwnerDied() {
  if (is_over_ || std::exchange(owner_lost_, true)) return;
  Say("the command that started the run has died: the job is saved and stopped");
  Take(recovery::SignalCame{recovery::EndSignal::kTerminate});
}

void JobSupervisor::Say(std::string text) {
  LogInfo(absl::StrFormat("job %s: %s", spec_.job, text));
  lines_.push_back({next_line_++, std::move(text)});
  if (lines_.size() > kLinesMax) lines_.pop_front();
  if (on_change_) on_change_();
}

JobSupervisor::View JobSupervisor::view() const {
  return {spec_, settings_, history_, lines_, port_, is_over_, exit_code_, silence_.timeouts()};
}

std::optional<Launch> JobSupervisor::LaunchOf(const std::string& attempt_key) const {
  if (group_ == nullptr || attempt_key != AttemptKeyOf(spec_, group_launch_)) return std::nullopt;
  return group_launch_;
}

}  // namespace holdfast
