// JobSupervisor: launches. Ranks are started, found to have started, found to have ended.
#include <signal.h>
#include <string.h>
#include <sys/wait.h>

#include <filesystem>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/log.h"
#include "agent/run/job_supervisor.h"
#include "agent/run/process_tree.h"
#include "agent/run/small_files.h"
#include "base/kill_point.h"
#include "base/status_macros.h"

namespace holdfast {
namespace {

using recovery::Launch;

constexpr char kPortName[] = "port";

recovery::Exit ExitOf(const RankEnd& end, bool stopped) {
  RankExit exit;
  exit.wait_status = end.wait_status;
  exit.stopped = stopped;
  const ExitOutcome outcome = OutcomeOf(exit);
  return {outcome.kind, outcome.value};
}

}  // namespace

std::string JobSupervisor::LaunchDirectory(Launch launch) const {
  return absl::StrCat(options_.runtime_directory, "/launch-", Value(launch));
}

std::unique_ptr<RankGroup> JobSupervisor::MakeGroup(Launch launch) {
  RankGroup::Callbacks callbacks;
  callbacks.started = [this, launch](uint32_t rank, int32_t process_id) {
    RankStarted(launch, rank, process_id);
  };
  callbacks.ended = [this, launch](uint32_t rank, const RankEnd& end) {
    RankEnded(launch, rank, end);
  };
  callbacks.all_gone = [this] { GroupGone(); };
  return std::make_unique<RankGroup>(LaunchDirectory(launch), options_.shim_program, world_.loop,
                                     std::move(callbacks));
}

void JobSupervisor::WhenGone(std::function<void()> then) {
  when_gone_ = std::move(then);
  if (group_ == nullptr || group_->all_gone()) return GroupGone();
  group_->KillTrees();
  gone_timer_ = world_.loop.RunAfter(kGoneDeadline, [this] {
    gone_timer_ = 0;
    Say(
        absl::StrFormat("processes of the ranks are still there %s after KILL; going on without "
                        "them",
                        absl::FormatDuration(kGoneDeadline)));
    ReleaseGroup();
    std::exchange(when_gone_, nullptr)();
  });
}

void JobSupervisor::GroupGone() {
  if (!when_gone_) return;
  world_.loop.CancelTimer(gone_timer_);
  gone_timer_ = 0;
  ReleaseGroup();
  std::exchange(when_gone_, nullptr)();
}

// Every exit was told: what is left of the launch is its log.
void JobSupervisor::ReleaseGroup() {
  world_.loop.CancelTimer(kill_timer_);
  kill_timer_ = 0;
  if (group_ == nullptr) return;
  if (group_->lost_a_shim()) {
    SignalByVariable(absl::StrCat("HOLDFAST_ATTEMPT_KEY=", AttemptKeyOf(spec_, group_launch_)),
                     SIGKILL);
  }
  group_->Release();
  group_ = nullptr;
  std::error_code error;
  // Dropped: what stays is removed with the next run.
  std::filesystem::remove_all(LaunchDirectory(group_launch_), error);
}

absl::StatusOr<uint32_t> JobSupervisor::PortOf(const std::string& launch_directory) const {
  const std::string path = absl::StrCat(launch_directory, "/", kPortName);
  if (const absl::StatusOr<std::string> text = ReadFile(path, 64); text.ok()) {
    uint32_t port = 0;
    if (absl::SimpleAtoi(*text, &port)) return port;
  }
  uint32_t port = spec_.master_port;
  if (port == 0) {
    ASSIGN_OR_RETURN(port, FindPort(spec_.master_address));
  }
  RETURN_IF_ERROR(MakeDirectories(launch_directory));
  RETURN_IF_ERROR(ReplaceFile(path, absl::StrCat(port)));
  return port;
}

void JobSupervisor::StartGroup(const recovery::StartRanks& action) {
  if (group_ == nullptr || group_launch_ != action.launch) {
    group_ = MakeGroup(action.launch);
    group_launch_ = action.launch;
    progress_.BeginLaunch(action.launch);
    started_processes_.clear();
    processes_.clear();
    any_restored_ = false;
    silence_.BeginLaunch();
    engine_pause_ = EnginePause();
    sight_.reset();
    stops_ = false;
    started_ = world_.clock.Elapsed();
  }
  KillPoint("run.launch_starting");
  OrderRestore(action.launch, action.restore);
  ReadCheckpoints();
  absl::StatusOr<uint32_t> port = PortOf(LaunchDirectory(action.launch));
  absl::Status started = port.status();
  if (port.ok()) port_ = *port;
  const uint32_t world_size = action.placement.world_size();
  for (uint32_t rank = 0; rank < world_size && started.ok(); ++rank) {
    ShimSpec shim;
    shim.rank = rank;
    shim.log_directory = LogDirectoryOf(spec_, action.restart_count, rank);
    shim.log_bytes_max = spec_.log_bytes_max;
    shim.working_directory = spec_.working_directory;
    shim.umask = spec_.umask;
    shim.limits = spec_.limits;
    shim.command = spec_.command;
    shim.environment =
        EnvironmentOf({spec_, action, rank, port_, options_.socket, settings_.max_restarts});
    started = group_->Start(std::move(shim));
    KillPoint("run.rank_started");
  }
  if (started.ok()) {
    Say(absl::StrFormat("attempt %d: %d ranks, port %d, logs in %s", action.restart_count,
                        world_size, port_, LogDirectoryOf(spec_, action.restart_count, 0)));
    return Poll();
  }
  // As if they had died at once: the policy counts that, and knows when it is enough.
  Say(absl::StrFormat("cannot start all ranks: %s", started.ToString()));
  for (uint32_t rank = 0; rank < world_size; ++rank) {
    if (group_->has(rank)) continue;
    Take(recovery::RankExited{action.launch, Rank{rank}, {monitor::ExitKind::kError, 1}});
  }
}

std::string JobSupervisor::Describe(const RankEnd& end) const {
  if (end.start_error != 0)
    return absl::StrCat("could not be started: ", strerror(end.start_error));
  if (end.shim_lost) return "was killed with its shim";
  if (WIFSIGNALED(end.wait_status)) {
    const char* const name = sigabbrev_np(WTERMSIG(end.wait_status));
    return absl::StrFormat("was killed by signal %d (SIG%s)", WTERMSIG(end.wait_status),
                           name == nullptr ? "?" : name);
  }
  return absl::StrCat("ended with status ", WEXITSTATUS(end.wait_status));
}

void JobSupervisor::RankStarted(Launch launch, uint32_t rank, int32_t process_id) {
  LogInfo(absl::StrFormat("job %s: rank %d of launch %d is process %d", spec_.job, rank,
                          Value(launch), process_id));
  started_processes_[rank] = process_id;
  if (recovering_) {
    recovered_.try_emplace(rank);
    processes_[rank] = process_id;
    if (recovered_.size() == group_->count()) EndRecovery();
    return;
  }
  processes_[rank] = process_id;
  Take(recovery::RankStarted{launch, Rank{rank}});
}

void JobSupervisor::RankEnded(Launch launch, uint32_t rank, const RankEnd& end) {
  // The last of it, for the policy's eyes: a rank that finished a step did so before it ended.
  if (launch == group_launch_ && !recovering_) Poll();
  processes_.erase(rank);
  const bool stopped = stops_ || history_.phase == recovery::Phase::kStopping;
  if (!stopped && end.wait_status != 0) Say(absl::StrFormat("rank %d %s", rank, Describe(end)));
  TellMonitor(rank, end);
  const recovery::Exit exit = ExitOf(end, stopped);
  if (recovering_) {
    recovered_[rank] = exit;
    if (recovered_.size() == group_->count()) EndRecovery();
    return;
  }
  Take(recovery::RankExited{launch, Rank{rank}, exit});
}

void JobSupervisor::TellMonitor(uint32_t rank, const RankEnd& end) {
  if (!world_.take_exit) return;
  RankExit exit;
  exit.job = spec_.job;
  exit.attempt_key = AttemptKeyOf(spec_, group_launch_);
  exit.node = node_;
  exit.rank = rank;
  exit.world_size = history_.placement.world_size();
  exit.process_id = static_cast<uint32_t>(end.process_id);
  exit.wait_status = end.wait_status;
  exit.stopped = stops_;
  world_.take_exit(std::move(exit));
}

}  // namespace holdfast
