// holdfastd, the agent. What a person (or the hook library) starts decides the configuration, takes
// the socket's name and becomes the keeper, in the foreground or, with --private, detached. Keeper
// and worker start each other again with --keeper and --worker.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <deque>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "agent/config.h"
#include "agent/handover.h"
#include "agent/host_memory.h"
#include "agent/keeper.h"
#include "agent/limits.h"
#include "agent/log.h"
#include "agent/process.h"
#include "agent/runtime_directory.h"
#include "agent/service_manager.h"
#include "agent/version.h"
#include "agent/worker.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/kill_point.h"
#include "base/status_macros.h"
#include "base/suggestion.h"
#include "io/errno_status.h"

namespace holdfast {
namespace {

// docs/OPERATING.md.
constexpr int kExitFailure = 1;
constexpr int kExitUsage = 2;
constexpr int kExitRetry = 75;

// How long a second private agent waits for the first one to listen, or to be gone.
constexpr absl::Duration kOtherAgentDeadline = absl::Seconds(20);
// How long the foreground process waits for its agent.
constexpr absl::Duration kStartDeadline = absl::Seconds(120);
constexpr absl::Duration kLook = absl::Milliseconds(10);
// Of a configuration that is handed over: a topology document, escaped, and little else.
constexpr size_t kConfigBytesMax = size_t{32} << 20;

constexpr char kFooter[] =
    "The configuration's keys, file and variables: docs/CONFIGURATION.md.\n"
    "Exit codes: 0 ended as it should; 1 failure; 2 usage or configuration; 7 ended, and saves "
    "that\n"
    "were only in memory are lost (the log names them); 75 try again later.";

struct CommandLine {
  bool is_private = false;
  bool prints_config = false;
  std::string job;
  std::string config;
  std::map<std::string, std::string> flags;
};

struct KillPlans {
  std::string keeper;
  std::deque<std::string> workers;
};

int Complain(const absl::Status& status, int exit_code) {
  std::fprintf(stderr, "holdfastd: %s\n", std::string(status.message()).c_str());
  return exit_code;
}

void Sleep(absl::Duration duration) {
  const timespec time = absl::ToTimespec(duration);
  nanosleep(&time, nullptr);
}

// HOLDFAST_KILL_AT: plans separated by commas. Those of the keeper arm it; the n-th of the others
// arms the n-th worker.
absl::StatusOr<KillPlans> ReadKillPlans() {
  KillPlans plans;
  const char* const text = getenv("HOLDFAST_KILL_AT");
  if (text == nullptr) return plans;
  const std::vector<std::string> parts = absl::StrSplit(text, ',', absl::SkipEmpty());
  for (const std::string& part : parts) {
    RETURN_IF_ERROR(ParseKillPlan(part).status());
    if (part.rfind("keeper.", 0) == 0) {
      plans.keeper = part;
    } else {
      plans.workers.push_back(part);
    }
  }
  return plans;
}

absl::StatusOr<AgentConfig> MakeConfig(const CommandLine& line) {
  ConfigSources sources;
  sources.flags = line.flags;
  sources.config_flag = line.config;
  sources.environment = [](const char* name) { return getenv(name); };
  sources.user_id = geteuid();
  sources.memory_bytes = ReadHostMemory().bytes;
  ASSIGN_OR_RETURN(AgentConfig config, ResolveConfig(sources));
  RETURN_IF_ERROR(ReadTopology(config));
  config.is_private = line.is_private;
  config.job = line.job;
  if (line.is_private && config.log_file.empty()) {
    config.log_file = (std::filesystem::path(config.socket).parent_path() / "agent.log").string();
    // Also where a later worker looks for it.
    config.values["log_file"] = {config.log_file, "default of --private"};
  }
  return config;
}

LogOptions LogOptionsOf(const AgentConfig& config, const std::string& process) {
  LogOptions options;
  options.process = process;
  options.level = config.log_level;
  options.path = config.log_file;
  options.rotation =
      process == "worker" ? LogOptions::Rotation::kRotate : LogOptions::Rotation::kFollow;
  return options;
}

KeeperLimits KeeperLimitsOf(const AgentConfig& config) {
  KeeperLimits limits;
  limits.drain_deadline = config.drain_deadline;
  return limits;
}

// Takes the one of that name; none: there is none.
UniqueFd TakeFrom(std::vector<KeptDescriptor>& descriptors, const std::string& name) {
  const auto found = std::find_if(descriptors.begin(), descriptors.end(),
                                  [&](const KeptDescriptor& kept) { return kept.name == name; });
  if (found == descriptors.end()) return UniqueFd();
  UniqueFd fd = std::move(found->fd);
  descriptors.erase(found);
  return fd;
}

// ---- Processes that the agent starts itself

absl::StatusOr<AgentConfig> ConfigOf(const Handover& handover) {
  for (const KeptDescriptor& kept : handover.descriptors) {
    if (kept.name != kConfigName) continue;
    ASSIGN_OR_RETURN(const std::string text, ReadAll(kept.fd.get(), kConfigBytesMax));
    return DeserializeConfig(text);
  }
  return absl::InternalError("no configuration was handed over");
}

int RunRole(const std::string& role, int handover_fd) {
  RaiseLimits();
  absl::StatusOr<Handover> handover = TakeHandover(handover_fd);
  if (!handover.ok()) return Complain(handover.status(), kExitUsage);
  absl::StatusOr<AgentConfig> config = ConfigOf(*handover);
  if (!config.ok()) return Complain(config.status(), kExitFailure);
  if (absl::Status opened = OpenLog(LogOptionsOf(*config, role)); !opened.ok()) {
    // No reason to die: the log that was inherited goes on taking the lines.
    LogOptions inherited = LogOptionsOf(*config, role);
    inherited.path.clear();
    CHECK_OK(OpenLog(inherited));
    LogWarning(absl::StrCat("going on with the old log: ", opened.ToString()));
  }
  if (!handover->kill_plan.empty()) {
    const absl::StatusOr<KillPlan> plan = ParseKillPlan(handover->kill_plan);
    CHECK_OK(plan.status());  // the first process has parsed it
    ArmKillPoint(*plan);
  }
  if (role == "worker" && config->unit.descriptors_max > 0) {
    DieWithParent(handover->peer_pidfd.get());
  }
  if (role == "worker") return Worker(*std::move(config), *std::move(handover), RealClock()).Run();
  Keeper::Start start;
  start.descriptors = std::move(handover->descriptors);
  start.channel = std::move(handover->channel);
  start.worker_pidfd = std::move(handover->peer_pidfd);
  start.unit = config->unit;
  return Keeper(std::move(start), KeeperLimitsOf(*config), RealClock()).Run();
}

// ---- The process that a person starts

// Waits for another agent's lock to be free, or, if private, for that agent to listen (nothing: it
// does).
absl::StatusOr<std::optional<UniqueFd>> LockOrFindOther(const AgentConfig& config) {
  const absl::Duration end = RealClock().Elapsed() + kOtherAgentDeadline;
  for (;;) {
    ASSIGN_OR_RETURN(std::optional<UniqueFd> lock, TryLockSocket(config.socket));
    if (lock.has_value()) return lock;
    // A unit's last worker may still be giving back the memory that it had mapped.
    if (!config.is_private && config.unit.descriptors_max == 0) {
      return absl::UnavailableError(absl::StrCat("another agent has the socket ", config.socket));
    }
    if (config.is_private && SomebodyListens(config.socket)) return std::optional<UniqueFd>();
    if (RealClock().Elapsed() > end) {
      return absl::UnavailableError(absl::StrFormat(
          "another agent holds %s.lock and has not %s for %s", config.socket,
          config.is_private ? "listened" : "ended", absl::FormatDuration(kOtherAgentDeadline)));
    }
    Sleep(kLook);
  }
}

// The socket on which the unit's last agent has listened, so that nobody who connects meanwhile is
// turned away; else a new one.
absl::StatusOr<UniqueFd> TakeListener(const std::string& socket, ServiceStart& service) {
  UniqueFd kept = TakeFrom(service.descriptors, kListenerName);
  if (!kept) return Listen(socket);
  if (ListensOn(kept.get(), socket)) return kept;
  service.refusals.push_back(
      {kListenerName, absl::StrFormat("%s: it does not listen on %s", kListenerName, socket)});
  return Listen(socket);
}

// What systemd has kept of the unit's last agent, as a worker would have found it; changes `config`
// to go on with it. Logs what is refused, which systemd forgets.
std::vector<KeptDescriptor> TakeKept(ServiceStart service, ServiceManager& service_manager,
                                     AgentConfig& config) {
  for (const ServiceStart::Refusal& refusal : service.refusals) {
    LogError(absl::StrCat("refused of what systemd has given us: ", refusal.why));
    service_manager.Drop(refusal.name);
  }
  const UniqueFd kept_config = TakeFrom(service.descriptors, kConfigName);
  if (service.descriptors.empty()) return {};
  absl::StatusOr<std::vector<std::string>> replaced =
      absl::DataLossError("systemd has kept no configuration of the agent that began them");
  if (kept_config) {
    absl::StatusOr<std::string> text = ReadAll(kept_config.get(), kConfigBytesMax);
    if (text.ok()) {
      replaced = BindToSessions(*text, config);
    } else {
      replaced = text.status();
    }
  }
  if (!replaced.ok()) {
    LogError(absl::StrFormat(
        "refused all %d descriptors that systemd has kept; images that were only in memory are "
        "lost: %s",
        service.descriptors.size(), std::string(replaced.status().message())));
    for (const KeptDescriptor& kept : service.descriptors) service_manager.Drop(kept.name);
    return {};
  }
  for (const std::string& value : *replaced) {
    LogWarning(
        absl::StrFormat("not in effect before the unit is stopped and started: %s; sessions "
                        "that systemd has kept began with another value",
                        value));
  }
  LogInfo(absl::StrFormat("systemd has kept %d descriptors", service.descriptors.size()));
  return std::move(service.descriptors);
}

// In the process that becomes the keeper. `ready`: none in the foreground.
int RunFirstKeeper(AgentConfig config, const KillPlans& plans, UniqueFd lock, UniqueFd listener,
                   UniqueFd ready, ServiceStart service) {
  if (absl::Status opened = OpenLog(LogOptionsOf(config, "keeper")); !opened.ok()) {
    return Complain(opened, kExitFailure);
  }
  Keeper::Start start;
  start.unit = config.unit;
  ServiceManager service_manager(config.unit);
  start.descriptors = TakeKept(std::move(service), service_manager, config);
  absl::StatusOr<UniqueFd> handed_config = SealedMemfd("holdfast config", config.Serialize());
  if (!handed_config.ok()) return Complain(handed_config.status(), kExitFailure);
  // One after the other: whoever dies in between has lost what it says of all the rest.
  service_manager.Drop(kConfigName);
  service_manager.Keep(kConfigName, handed_config->get());
  if (!plans.keeper.empty()) ArmKillPoint(*ParseKillPlan(plans.keeper));
  start.descriptors.push_back({kLockName, std::move(lock)});
  start.descriptors.push_back({kListenerName, std::move(listener)});
  start.descriptors.push_back({kConfigName, *std::move(handed_config)});
  if (ready) start.descriptors.push_back({kReadyName, std::move(ready)});
  start.worker_kill_plans = plans.workers;
  return Keeper(std::move(start), KeeperLimitsOf(config), RealClock()).Run();
}

// Reads what the worker has to say. Returns the exit code of the foreground process.
int AwaitReady(int ready, const AgentConfig& config) {
  std::string text;
  const absl::Duration end = RealClock().Elapsed() + kStartDeadline;
  for (;;) {
    pollfd entry{ready, POLLIN, 0};
    const absl::Duration left = end - RealClock().Elapsed();
    if (left <= absl::ZeroDuration()) {
      return Complain(absl::UnavailableError(
                          absl::StrFormat("the agent has not started within %s; see %s",
                                          absl::FormatDuration(kStartDeadline), config.log_file)),
                      kExitRetry);
    }
    const timespec timeout = absl::ToTimespec(left);
    if (ppoll(&entry, 1, &timeout, nullptr) <= 0) continue;
    char bytes[1024];
    const ssize_t got = read(ready, bytes, sizeof(bytes));
    if (got < 0 && errno == EINTR) continue;
    if (got > 0) text.append(bytes, static_cast<size_t>(got));
    if (text == kReadyText) return 0;
    if (got > 0 && text.back() != '\n') continue;
    if (text.empty())
      text = absl::StrCat("the agent ended while it started; see ", config.log_file);
    while (!text.empty() && text.back() == '\n') text.pop_back();
    return Complain(absl::UnavailableError(text), kExitFailure);
  }
}

// Forks twice, so that the agent belongs to nobody's session and nobody has to reap it.
int RunDetached(const AgentConfig& config, const KillPlans& plans, UniqueFd lock,
                UniqueFd listener) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) {
    return Complain(ErrnoStatus(errno, "pipe", "to the agent"), kExitFailure);
  }
  UniqueFd read_end(ends[0]);
  UniqueFd write_end(ends[1]);
  const pid_t child = fork();
  if (child < 0) return Complain(ErrnoStatus(errno, "fork", "the agent"), kExitRetry);
  if (child > 0) {
    write_end.Reset();
    lock.Reset();
    listener.Reset();
    return AwaitReady(read_end.get(), config);
  }
  read_end.Reset();
  setsid();
  if (fork() != 0) _exit(0);
  const UniqueFd nowhere(open("/dev/null", O_RDWR | O_CLOEXEC));
  if (nowhere) dup2(nowhere.get(), STDIN_FILENO);
  // Not to keep a file system busy. Dropped: it only would.
  if (chdir("/") != 0) errno = 0;
  _exit(RunFirstKeeper(config, plans, std::move(lock), std::move(listener), std::move(write_end),
                       ServiceStart()));
}

int RunAgent(const CommandLine& line) {
  ServiceStart service = TakeServiceStart();
  // The unit is its trainer's.
  if (line.is_private) service = ServiceStart();
  absl::StatusOr<AgentConfig> config = MakeConfig(line);
  if (!config.ok()) {
    // systemd tries again, and so goes on keeping what it keeps, until a person has mended it.
    return Complain(config.status(), service.descriptors.empty() ? kExitUsage : kExitRetry);
  }
  config->unit = service.unit;
  if (line.prints_config) {
    std::printf("%s", config->Print().c_str());
    return 0;
  }
  const absl::StatusOr<KillPlans> plans = ReadKillPlans();
  if (!plans.ok()) return Complain(plans.status(), kExitUsage);
  RaiseLimits();
  if (absl::Status prepared = PrepareDirectoryOf(config->socket); !prepared.ok()) {
    return Complain(prepared, kExitFailure);
  }
  absl::StatusOr<std::optional<UniqueFd>> lock = LockOrFindOther(*config);
  if (!lock.ok()) return Complain(lock.status(), kExitRetry);
  if (!lock->has_value()) return 0;  // the agent that was asked for is there
  absl::StatusOr<UniqueFd> listener = TakeListener(config->socket, service);
  if (!listener.ok()) return Complain(listener.status(), kExitFailure);
  if (config->is_private) {
    return RunDetached(*config, *plans, **std::move(lock), *std::move(listener));
  }
  return RunFirstKeeper(*std::move(config), *plans, **std::move(lock), *std::move(listener),
                        UniqueFd(), std::move(service));
}

// The nearest flag to an unknown one among the arguments.
std::string FlagSuggestion(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  }
  const std::vector<std::string_view> known(names.begin(), names.end());
  for (const std::string& argument : app.remaining()) {
    std::string suggestion = DidYouMean(argument, known);
    if (!suggestion.empty()) return suggestion;
  }
  return "";
}

int Main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.size() == 3 && (arguments[0] == "--worker" || arguments[0] == "--keeper") &&
      arguments[1] == "--handover") {
    return RunRole(arguments[0].substr(2), atoi(arguments[2].c_str()));
  }
  CommandLine line;
  CLI::App app("The agent of Holdfast: holds, flushes and restores checkpoints.", "holdfastd");
  app.footer(kFooter);
  app.set_version_flag("--version", absl::StrCat("holdfastd ", kVersion));
  app.add_flag("--private", line.is_private,
               "detach; end when everything is flushed and no rank has been open for 'linger'");
  app.add_option("--job", line.job, "the job that a private agent is for");
  app.add_option("--config", line.config, "the configuration file");
  app.add_flag("--print-config", line.prints_config,
               "print every value and where it comes from, and end");
  std::map<std::string, std::string> texts;
  for (const ConfigKey& key : ConfigKeys()) app.add_option(key.flag, texts[key.name], key.help);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ExtrasError& error) {
    std::fprintf(stderr, "holdfastd: %s%s\n", error.what(), FlagSuggestion(app).c_str());
    return kExitUsage;
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kExitUsage;
  }
  for (const ConfigKey& key : ConfigKeys()) {
    if (app.get_option(key.flag)->count() > 0) line.flags[key.name] = texts[key.name];
  }
  return RunAgent(line);
}

}  // namespace
}  // namespace holdfast

int main(int argc, char** argv) { return holdfast::Main(argc, argv); }
