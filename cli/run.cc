// `holdfast run`: hands a job to an agent, shows what its ranks print and what is done about it,
// passes signals on, and ends with the job's exit code. It holds nothing that the job needs: it may
// lose the agent and come back to it, and when it dies the agent ends the job
// (agent/run/job_supervisor.h).
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/inotify.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "agent/config_file.h"
#include "base/clock.h"
#include "base/status_macros.h"
#include "cli/agent_client.h"
#include "cli/log_follower.h"
#include "cli/output.h"
#include "cli/run_agent.h"
#include "cli/run_flags.h"
#include "cli/verb.h"
#include "hook/abi/private_agent_path.h"
#include "nlohmann/json.hpp"

extern char** environ;

namespace holdfast::cli {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(30);
// How long an agent that was lost is looked for.
constexpr absl::Duration kAwayMax = absl::Minutes(1);
constexpr int kLookMs = 200;   // at the agent, while it is away
constexpr int kLogsMs = 1000;  // at logs, if nothing says that they have grown
constexpr size_t kConfigBytesMax = size_t{1} << 20;

std::string Variable(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// CUDA_VISIBLE_DEVICES, else all that the machine has. "NoDevFiles", "-1" and "" are none.
std::vector<std::string> VisibleGpus() {
  std::vector<std::string> gpus;
  if (std::getenv("CUDA_VISIBLE_DEVICES") != nullptr) {
    for (const std::string& part :
         std::vector<std::string>(absl::StrSplit(Variable("CUDA_VISIBLE_DEVICES"), ','))) {
      uint32_t index = 0;
      // As the driver: what stands behind an invalid one does not count.
      if (!absl::SimpleAtoi(part, &index) && !part.starts_with("GPU-") &&
          !part.starts_with("MIG-")) {
        break;
      }
      gpus.push_back(part);
    }
    return gpus;
  }
  std::vector<uint32_t> indices;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/dev", error)) {
    const std::string name = entry.path().filename().string();
    uint32_t index = 0;
    if (name.starts_with("nvidia") && absl::SimpleAtoi(name.substr(6), &index)) {
      indices.push_back(index);
    }
  }
  std::sort(indices.begin(), indices.end());
  for (const uint32_t index : indices) gpus.push_back(absl::StrCat(index));
  return gpus;
}

RunContext ContextOf(std::vector<std::string> words) {
  RunContext context;
  context.words = std::move(words);
  for (char** one = environ; *one != nullptr; ++one) context.environment.emplace_back(*one);
  std::error_code error;
  context.working_directory = std::filesystem::current_path(error).string();
  context.umask = umask(022);
  umask(static_cast<mode_t>(context.umask));
  for (uint32_t resource = 0; resource < RLIM_NLIMITS; ++resource) {
    rlimit limit{};
    if (getrlimit(static_cast<__rlimit_resource>(resource), &limit) == 0) {
      context.limits.push_back({resource, limit.rlim_cur});
    }
  }
  cpu_set_t processors;
  if (sched_getaffinity(0, sizeof(processors), &processors) == 0) {
    context.processors = static_cast<uint32_t>(CPU_COUNT(&processors));
  }
  context.gpus = VisibleGpus();
  char host[256] = {};
  if (gethostname(host, sizeof(host) - 1) == 0) context.host = host;
  return context;
}

absl::StatusOr<std::string> ReadConfig(const std::string& path) {
  if (path.empty()) return std::string();
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  if (!file) return absl::NotFoundError(absl::StrCat("configuration: cannot read ", path));
  if (text.str().size() > kConfigBytesMax) {
    return absl::InvalidArgumentError(absl::StrFormat("%s: expected at most %d bytes, found %d",
                                                      path, kConfigBytesMax, text.str().size()));
  }
  return text.str();
}

// What a process that is started for this run finds; and what it is to do.
class RunCommand {
 public:
  RunCommand(RunPlan plan, RunAgent agent, bool as_json)
      : plan_(std::move(plan)), agent_(std::move(agent)), as_json_(as_json) {}

  ExitCode Run();

 private:
  bool Connect();
  void Wait();
  void OnSignal();
  void OnEvents();
  void Take(const std::string& text);
  void Follow(const nlohmann::json& state);
  void WatchLogs(const std::string& directory);
  void AdvanceLogs();

  const RunPlan plan_;
  const RunAgent agent_;
  const bool as_json_;
  UniqueFd signals_;
  UniqueFd changes_;  // inotify, of the logs
  std::unique_ptr<AgentEvents> events_;
  absl::Duration away_since_{};
  absl::Status why_away_;
  std::vector<int> unsent_signals_;
  uint64_t last_line_ = 0;
  int64_t followed_attempt_ = -1;
  std::vector<LogFollower> followers_;
  bool is_over_ = false;
  int exit_code_ = kExitRetry;
  std::string last_state_;
};

// An agent that is there takes the run, or goes on with it.
bool RunCommand::Connect() {
  why_away_ = EnsureAgent(agent_);
  if (!why_away_.ok()) return false;
  absl::StatusOr<std::unique_ptr<AgentEvents>> events =
      AgentEvents::OpenRun(agent_.socket, EncodeRunSpec(plan_.spec), kTimeout);
  why_away_ = events.status();
  if (!events.ok()) return false;
  events_ = *std::move(events);
  Take(events_->first());
  return true;
}

ExitCode RunCommand::Run() {
  for (const int number : {SIGPIPE, SIGTTOU}) signal(number, SIG_IGN);
  sigset_t taken;
  sigemptyset(&taken);
  for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGUSR1}) sigaddset(&taken, number);
  sigprocmask(SIG_BLOCK, &taken, nullptr);
  signals_.Reset(signalfd(-1, &taken, SFD_CLOEXEC | SFD_NONBLOCK));
  changes_.Reset(inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
  away_since_ = RealClock().Elapsed();
  if (!as_json_) std::fprintf(stderr, "holdfast: job %s\n", plan_.spec.job.c_str());
  while (!is_over_) {
    if (events_ == nullptr && !Connect()) {
      const bool may_help = absl::IsUnavailable(why_away_) ||
                            absl::IsResourceExhausted(why_away_) ||
                            absl::IsDeadlineExceeded(why_away_);
      if (!may_help || RealClock().Elapsed() - away_since_ > kAwayMax) return Report(why_away_);
    }
    Wait();
  }
  for (LogFollower& follower : followers_) follower.Finish();
  if (as_json_) std::printf("%s\n", last_state_.c_str());
  return static_cast<ExitCode>(exit_code_);
}

void RunCommand::Wait() {
  if (is_over_) return;
  pollfd ready[3] = {{signals_.get(), POLLIN, 0},
                     {changes_.get(), POLLIN, 0},
                     {events_ == nullptr ? -1 : events_->fd(), POLLIN, 0}};
  poll(ready, 3, events_ == nullptr ? kLookMs : kLogsMs);
  char passed[4096];
  while (read(changes_.get(), passed, sizeof(passed)) > 0) continue;
  AdvanceLogs();
  if (ready[0].revents != 0) OnSignal();
  if (ready[2].revents != 0) OnEvents();
}

void RunCommand::OnSignal() {
  signalfd_siginfo info{};
  while (read(signals_.get(), &info, sizeof(info)) == static_cast<ssize_t>(sizeof(info))) {
    // The terminal has gone: as if somebody had said so.
    const int number =
        static_cast<int>(info.ssi_signo) == SIGHUP ? SIGTERM : static_cast<int>(info.ssi_signo);
    unsent_signals_.push_back(number);
  }
  // Without an agent there is nobody to tell: it is told when it is back.
  while (events_ != nullptr && !unsent_signals_.empty()) {
    const absl::Status sent = OrderRun(agent_.socket,
                                       {abi::RunCommandKind::kSignal, plan_.spec.job,
                                        static_cast<uint64_t>(unsent_signals_.front()), ""},
                                       kTimeout)
                                  .status();
    if (absl::IsUnavailable(sent)) return;
    unsent_signals_.erase(unsent_signals_.begin());
    if (!sent.ok()) Report(sent);
  }
}

void RunCommand::OnEvents() {
  const absl::StatusOr<std::optional<AgentEvents::Event>> event = events_->Receive();
  if (event.ok() && event->has_value()) return Take((*event)->text);
  // Its worker has died, and will be back.
  events_ = nullptr;
  away_since_ = RealClock().Elapsed();
}

void RunCommand::Take(const std::string& text) {
  const nlohmann::json state = nlohmann::json::parse(text, nullptr, false);
  if (!state.is_object()) return;
  last_state_ = text;
  Follow(state);
  for (const nlohmann::json& line : state.value("lines", nlohmann::json::array())) {
    const uint64_t number = line.value("number", uint64_t{0});
    if (number <= last_line_) continue;
    last_line_ = number;
    AdvanceLogs();
    std::fprintf(stderr, "holdfast: %s\n", Printable(line.value("text", "")).c_str());
  }
  is_over_ = state.value("over", false);
  if (is_over_ && state.contains("exit_code") && state["exit_code"].is_number_integer()) {
    exit_code_ = state["exit_code"].get<int>();
  }
  if (!unsent_signals_.empty()) OnSignal();
}

// The logs of an attempt, as soon as it is there.
void RunCommand::Follow(const nlohmann::json& state) {
  const int64_t attempt = state.value("restart_count", int64_t{0});
  if (state.value("launch", 0) == 0 || attempt == followed_attempt_ || as_json_) return;
  for (LogFollower& follower : followers_) follower.Finish();
  followers_.clear();
  followed_attempt_ = attempt;
  RunSpec placed = plan_.spec;
  placed.log_directory = state.value("log_directory", "");
  for (uint32_t rank = 0; rank < state.value("ranks", uint32_t{0}); ++rank) {
    const std::string directory = LogDirectoryOf(placed, static_cast<uint32_t>(attempt), rank);
    const RankView view = plan_.view_of(rank);
    const auto prefix = [&](const StreamView& stream) {
      return stream.has_prefix ? absl::StrFormat("[%s%d]:", plan_.prefix, rank) : std::string();
    };
    if (view.output.is_shown) {
      followers_.emplace_back(directory + "/stdout.log", prefix(view.output), STDOUT_FILENO);
    }
    if (view.error.is_shown) {
      followers_.emplace_back(directory + "/stderr.log", prefix(view.error), STDERR_FILENO);
    }
    if (view.output.is_shown || view.error.is_shown) WatchLogs(directory);
  }
}

void RunCommand::WatchLogs(const std::string& directory) {
  // The shim makes it, too; whoever is first.
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  // Dropped: then they are looked at once a second.
  (void)inotify_add_watch(changes_.get(), directory.c_str(), IN_MODIFY | IN_CREATE | IN_MOVED_TO);
}

void RunCommand::AdvanceLogs() {
  for (LogFollower& follower : followers_) follower.Advance();
}

ExitCode RunJob(const RunFlags& flags, std::vector<std::string> words, bool as_json) {
  absl::StatusOr<RunPlan> plan = PlanRun(flags, ContextOf(std::move(words)));
  if (!plan.ok()) return Report(plan.status());
  const std::string config = FindConfigFile(
      flags.config, [](const char* name) { return static_cast<const char*>(std::getenv(name)); });
  absl::StatusOr<std::string> toml = ReadConfig(config);
  if (!toml.ok()) return Report(toml.status());
  plan->spec.recovery_toml = *std::move(toml);
  RunAgent agent;
  agent.job = plan->spec.job;
  agent.config = flags.config.empty() ? "" : std::filesystem::absolute(flags.config).string();
  agent.socket = flags.socket.empty() ? Variable("HOLDFAST_SOCKET") : flags.socket;
  if (agent.socket.empty()) {
    agent.may_start = true;
    agent.socket = absl::StrCat(abi::RuntimeDirectory(Variable("HOLDFAST_RUNTIME_DIR"),
                                                      Variable("XDG_RUNTIME_DIR"), geteuid()),
                                "/", abi::JobDirectoryName(agent.job), "/", abi::kAgentSocketName);
  }
  agent.socket = std::filesystem::absolute(agent.socket).string();
  agent.every = flags.every;
  if (!agent.every.empty() && !agent.may_start) {
    return Report(absl::InvalidArgumentError(absl::StrFormat(
        "--every: expected without an agent that is there already (%s): it has its own for all of "
        "its jobs",
        agent.socket)));
  }
  return RunCommand(*std::move(plan), std::move(agent), as_json).Run();
}

}  // namespace

void AddRun(CLI::App& app, Invocation& invocation) {
  CLI::App* verb = app.add_subcommand(
      "run", "Start the ranks of a job on this machine, and keep it going (torchrun's flags)");
  auto flags = std::make_shared<RunFlags>();
  AddRunFlags(*verb, *flags);
  verb->footer(
      "holdfast run [flags] -- CMD ...   or, as with torchrun, holdfast run [flags] script.py ...\n"
      "Exit codes: 0 the job is done, 1 it failed and no restart is left, 2 usage, 75 it was "
      "stopped "
      "and can go\non (start it again), 93 a restart cannot help.");
  verb->callback([verb, &invocation, flags] {
    invocation.run = [verb, &invocation, flags]() -> ExitCode {
      std::vector<std::string> words = verb->remaining();
      if (!words.empty() && !invocation.command.empty()) {
        // The command has begun before the "--", which is one of its own words.
        words.insert(words.end(), invocation.command.begin(), invocation.command.end());
      } else if (words.empty()) {
        words = invocation.command;
      }
      return RunJob(*flags, std::move(words), invocation.json);
    };
  });
}

}  // namespace holdfast::cli
