#include "tests/kill/drill.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "agent/process.h"
#include "base/check.h"
#include "base/clock.h"

extern char** environ;

namespace holdfast {
namespace {

constexpr char kJob[] = "drill";

std::string ReadText(const std::string& path) {
  std::ifstream file(path);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

// The number behind the last occurrence of `text`.
std::optional<uint64_t> LastNumberIn(const std::string& all, const std::string& text) {
  const size_t at = all.rfind(text);
  if (at == std::string::npos) return std::nullopt;
  return std::strtoull(all.c_str() + at + text.size(), nullptr, 10);
}

}  // namespace

bool WaitUntil(const std::function<bool()>& holds, absl::Duration deadline) {
  const absl::Duration end = RealClock().Elapsed() + deadline;
  while (!holds()) {
    if (RealClock().Elapsed() > end) return false;
    poll(nullptr, 0, 2);
  }
  return true;
}

bool IsStopped(pid_t pid) {
  const std::string stat = ReadText(absl::StrCat("/proc/", pid, "/stat"));
  const size_t at = stat.rfind(") ");
  return at != std::string::npos && stat[at + 2] == 'T';
}

Trainer::Trainer(pid_t pid, UniqueFd pidfd, UniqueFd output)
    : pid_(pid), pidfd_(std::move(pidfd)), output_(std::move(output)) {}

Trainer::~Trainer() {
  if (exit_code_.has_value()) return;
  Kill();
  Wait(absl::Seconds(20));
}

void Trainer::ReadOutput() {
  char bytes[4096];
  for (;;) {
    const ssize_t got = read(output_.get(), bytes, sizeof(bytes));
    if (got <= 0) return;
    text_.append(bytes, static_cast<size_t>(got));
  }
}

bool Trainer::HasSaid(const std::string& line_start) const {
  return absl::StrCat("\n", text_).find("\n" + line_start) != std::string::npos;
}

std::optional<uint64_t> Trainer::LastNumber(const std::string& line_start) const {
  return LastNumberIn(absl::StrCat("\n", text_), absl::StrCat("\n", line_start, " "));
}

bool Trainer::WaitForCommit(uint64_t step, absl::Duration deadline) {
  return WaitUntil(
      [this, step] {
        ReadOutput();
        return LastNumber("committed").value_or(0) >= step;
      },
      deadline);
}

bool Trainer::WaitFor(const std::string& line_start, absl::Duration deadline) {
  return WaitUntil(
      [&] {
        ReadOutput();
        return HasSaid(line_start);
      },
      deadline);
}

int Trainer::Wait(absl::Duration deadline) {
  if (exit_code_.has_value()) return *exit_code_;
  // The pipe is emptied while waiting, so that a talkative trainer never blocks.
  const bool dead = WaitUntil(
      [this] {
        ReadOutput();
        return IsDead(pidfd_.get());
      },
      deadline);
  ReadOutput();
  if (!dead) return -1;
  int status = 0;
  CHECK(waitpid(pid_, &status, 0) == pid_);
  exit_code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return *exit_code_;
}

void Trainer::Kill() { SendSignal(pidfd_.get(), SIGKILL); }

Drill::Drill() {
  // A real file system: /tmp is often memory, which refuses O_DIRECT.
  std::string name = absl::StrCat(HOLDFAST_TEST_DIRECTORY, "/drill-XXXXXX");
  CHECK(mkdtemp(name.data()) != nullptr);
  directory_ = std::filesystem::canonical(name).string();
  root_ = absl::StrCat(directory_, "/root");
  runtime_ = absl::StrCat(directory_, "/run");
  CHECK(mkdir(runtime_.c_str(), 0700) == 0);
  environment_ = {
      {"HOLDFASTD", HOLDFAST_TEST_DAEMON},
      {"HOLDFAST_RUNTIME_DIR", runtime_},
      {"HOLDFAST_ATTEMPT_KEY", ""},
      {"HOLDFAST_HOST_MEMORY", "64MiB"},
      {"HOLDFAST_BLOCK_BYTES", "16KiB"},
      {"HOLDFAST_LINGER", "50ms"},
      {"HOLDFAST_LOG_LEVEL", "debug"},
      {"HOLDFAST_THREADS", "2"},
      {"HOME", directory_},
      {"XDG_STATE_HOME", absl::StrCat(directory_, "/state")},
  };
}

Drill::~Drill() {
  KillAgent();
  std::error_code ignored;
  std::filesystem::remove_all(directory_, ignored);
}

void Drill::Set(const std::string& variable, const std::string& value) {
  environment_[variable] = value;
}

std::unique_ptr<Trainer> Drill::StartTrainer(const TrainerOptions& options) {
  std::vector<std::string> words = {HOLDFAST_TEST_TRAINER,
                                    root_,
                                    kJob,
                                    absl::StrCat(options.rank),
                                    absl::StrCat(options.world_size),
                                    absl::StrCat(options.steps),
                                    absl::StrCat(options.every),
                                    absl::StrCat(options.step_ms)};
  std::vector<std::string> variables;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string text = *variable;
    if (!environment_.contains(text.substr(0, text.find('=')))) variables.push_back(text);
  }
  for (const auto& [name, value] : environment_) {
    variables.push_back(absl::StrCat(name, "=", value));
  }
  std::vector<char*> arguments;
  std::vector<char*> pointers;
  for (std::string& word : words) arguments.push_back(word.data());
  for (std::string& variable : variables) pointers.push_back(variable.data());
  arguments.push_back(nullptr);
  pointers.push_back(nullptr);
  int ends[2];
  CHECK(pipe2(ends, O_CLOEXEC | O_NONBLOCK) == 0);
  const pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) {
    dup2(ends[1], STDOUT_FILENO);
    execve(arguments[0], arguments.data(), pointers.data());
    _exit(127);
  }
  close(ends[1]);
  absl::StatusOr<UniqueFd> pidfd = OpenPidfd(pid);
  CHECK_OK(pidfd.status());
  return std::make_unique<Trainer>(pid, *std::move(pidfd), UniqueFd(ends[0]));
}

std::vector<std::unique_ptr<Trainer>> Drill::StartTrainers(int world_size, uint64_t steps,
                                                           uint64_t every, uint64_t step_ms) {
  std::vector<std::unique_ptr<Trainer>> trainers;
  for (int rank = 0; rank < world_size; ++rank) {
    trainers.push_back(StartTrainer({rank, world_size, steps, every, step_ms}));
  }
  return trainers;
}

// The runtime directory of the only job here.
std::string Drill::RuntimePath(const std::string& name) const {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(runtime_, error)) {
    if (entry.is_directory()) return absl::StrCat(entry.path().string(), "/", name);
  }
  return "";
}

std::string Drill::GatePath() const { return absl::StrCat(directory_, "/gate"); }

void Drill::CloseGate() {
  std::filesystem::remove(GatePath());
  Set("HOLDFAST_DRILL_GATE", GatePath());
}

void Drill::OpenGate() const { CHECK(std::ofstream(GatePath()).good()); }

std::string Drill::Log() const { return ReadText(RuntimePath("agent.log")); }

bool Drill::WaitForLog(const std::string& text, absl::Duration deadline) const {
  return WaitUntil([&] { return Log().find(text) != std::string::npos; }, deadline);
}

pid_t Drill::WorkerPid() const {
  const pid_t pid = LoggedWorker();
  CHECK(pid > 0);
  return pid;
}

pid_t Drill::KeeperPid() const {
  const pid_t pid = LoggedKeeper();
  CHECK(pid > 0);
  return pid;
}

pid_t Drill::LoggedWorker() const {
  return static_cast<pid_t>(LastNumberIn(Log(), "started worker ").value_or(0));
}

pid_t Drill::LoggedKeeper() const {
  const std::string log = Log();
  // The process that wrote the last "started worker", unless a keeper was started after that.
  const size_t worker_at = log.rfind("started worker ");
  const size_t keeper_at = log.rfind("started keeper ");
  if (keeper_at != std::string::npos && (worker_at == std::string::npos || keeper_at > worker_at)) {
    return static_cast<pid_t>(*LastNumberIn(log, "started keeper "));
  }
  if (worker_at == std::string::npos) return 0;
  return static_cast<pid_t>(*LastNumberIn(log.substr(0, worker_at), "keeper["));
}

bool Drill::WaitAgentGone(absl::Duration deadline) const {
  const std::string path = RuntimePath("agent.sock.lock");
  if (path.empty()) return true;
  return WaitUntil(
      [&] {
        const UniqueFd lock(open(path.c_str(), O_RDWR | O_CLOEXEC));
        return !lock || flock(lock.get(), LOCK_EX | LOCK_NB) == 0;
      },
      deadline);
}

void Drill::AdoptAgents() { CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0); }

int Drill::WaitAgentCode(pid_t keeper, absl::Duration deadline) const {
  int status = 0;
  const bool ended =
      WaitUntil([&] { return waitpid(keeper, &status, WNOHANG) == keeper; }, deadline);
  if (!ended) return -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

void Drill::KillAgent() {
  // Again and again: each may have started the other meanwhile.
  WaitUntil(
      [this] {
        if (WaitAgentGone(absl::ZeroDuration())) return true;
        const pid_t keeper = LoggedKeeper();
        const pid_t worker = LoggedWorker();
        if (keeper > 0) kill(keeper, SIGKILL);
        if (worker > 0) kill(worker, SIGKILL);
        return WaitAgentGone(absl::Milliseconds(50));
      },
      absl::Seconds(10));
}

void Drill::ClearLog() {
  const std::string path = RuntimePath("agent.log");
  if (!path.empty()) unlink(path.c_str());
}

}  // namespace holdfast
