#include "agent/witness/helper.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <list>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "base/check.h"
#include "base/clock.h"
#include "io/errno_status.h"
#include "io/program_path.h"
#include "io/unique_fd.h"

extern char** environ;

namespace holdfast {
namespace {

constexpr char kName[] = "holdfast-witness";
constexpr size_t kReadBytes = 16 << 10;

// One running process and what it has printed so far.
struct Running {
  pid_t pid = -1;
  UniqueFd output, errors;  // read ends; closed at their end
  std::string text, words;
  absl::Status trouble;  // it could not be started
  absl::Duration end;    // it is killed then
};

// Reads what is there; closes at the end.
void ReadSome(UniqueFd& fd, std::string& text) {
  char buffer[kReadBytes];
  const ssize_t got = read(fd.get(), buffer, sizeof(buffer));
  if (got > 0) {
    const size_t room = kHelperOutputBytesMax - text.size();
    text.append(buffer, std::min(static_cast<size_t>(got), room));
  } else if (got == 0 || (errno != EINTR && errno != EAGAIN)) {
    fd.Reset();
  }
}

bool MakePipe(UniqueFd& read_end, UniqueFd& write_end) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return false;
  read_end.Reset(ends[0]);
  write_end.Reset(ends[1]);
  return true;
}

Running Start(const std::string& path, const std::vector<std::string>& arguments) {
  Running running;
  UniqueFd output, errors;
  if (!MakePipe(running.output, output) || !MakePipe(running.errors, errors)) {
    running.trouble = ErrnoStatus(errno, "pipe", kName);
    return running;
  }
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, output.get(), STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, errors.get(), STDERR_FILENO);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  sigset_t all, none;
  sigfillset(&all);
  sigemptyset(&none);
  posix_spawnattr_setsigdefault(&attributes, &all);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK);
  // posix_spawn does not write to the strings.
  std::vector<char*> pointers = {const_cast<char*>(kName)};
  for (const std::string& argument : arguments) {
    pointers.push_back(const_cast<char*>(argument.c_str()));
  }
  pointers.push_back(nullptr);
  const int error =
      posix_spawnp(&running.pid, path.c_str(), &actions, &attributes, pointers.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  posix_spawnattr_destroy(&attributes);
  if (error != 0) {
    running.pid = -1;
    running.trouble = absl::UnavailableError(absl::StrFormat("%s: %s", path, strerror(error)));
    running.output.Reset();
    running.errors.Reset();
  }
  return running;
}

// Its outcome may be taken: it has closed its output, was never started, or its time is over.
bool IsOver(const Running& running, absl::Duration now) {
  return (!running.output && !running.errors) || now >= running.end;
}

// Waits until one of them says something, is over, or a signal comes, and reads what is there.
void ReadOnce(std::vector<Running*>& running, absl::Duration now) {
  std::vector<pollfd> entries;
  std::vector<std::pair<UniqueFd*, std::string*>> places;
  absl::Duration end = absl::InfiniteDuration();
  for (Running* const one : running) {
    if (one->output) places.emplace_back(&one->output, &one->text);
    if (one->errors) places.emplace_back(&one->errors, &one->words);
    end = std::min(end, one->end);
  }
  for (const auto& [fd, text] : places) entries.push_back({fd->get(), POLLIN, 0});
  const timespec timeout = absl::ToTimespec(std::max(end - now, absl::ZeroDuration()));
  if (ppoll(entries.data(), entries.size(), &timeout, nullptr) < 0) return;
  for (size_t i = 0; i < entries.size(); ++i) {
    if (entries[i].revents != 0) ReadSome(*places[i].first, *places[i].second);
  }
}

absl::StatusOr<std::string> Outcome(Running& running) {
  if (!running.trouble.ok()) return running.trouble;
  const bool late = running.output || running.errors;
  if (late) kill(running.pid, SIGKILL);
  int status = 0;
  while (waitpid(running.pid, &status, 0) < 0) CHECK(errno == EINTR);
  if (late) return absl::DeadlineExceededError(absl::StrCat(kName, ": no answer in time"));
  if (WIFSIGNALED(status)) {
    return absl::UnavailableError(
        absl::StrFormat("%s was ended by signal %d", kName, WTERMSIG(status)));
  }
  const std::string words(absl::StripTrailingAsciiWhitespace(running.words));
  switch (WEXITSTATUS(status)) {
    case 0:
      return std::move(running.text);
    case 3:
      return absl::PermissionDeniedError(words);
    case 5:
      return absl::NotFoundError(words);
    default:
      return absl::UnavailableError(words);
  }
}

}  // namespace

std::string HelperPath() { return ProgramBeside(kName); }

std::vector<absl::StatusOr<std::string>> RunHelpers(
    const std::string& path, const std::vector<std::vector<std::string>>& runs,
    const HelperDeadlines& deadlines) {
  std::vector<absl::StatusOr<std::string>> outcomes(
      runs.size(),
      absl::DeadlineExceededError(absl::StrCat(kName, ": its turn did not come in time")));
  struct Turn {
    Running running;
    size_t of = 0;
  };
  std::list<Turn> turns;
  size_t next = 0;
  absl::Duration now = RealClock().Elapsed();
  const absl::Duration end = now + deadlines.all;
  while (next < runs.size() || !turns.empty()) {
    for (auto at = turns.begin(); at != turns.end();) {
      if (IsOver(at->running, now)) {
        outcomes[at->of] = Outcome(at->running);
        at = turns.erase(at);
      } else {
        ++at;
      }
    }
    if (now >= end) next = runs.size();
    for (; next < runs.size() && turns.size() < kHelpersAtOnce; ++next) {
      turns.push_back({Start(path, runs[next]), next});
      turns.back().running.end = std::min(end, now + deadlines.each);
    }
    std::vector<Running*> running;
    for (Turn& turn : turns) running.push_back(&turn.running);
    // One that could not be started is over at once.
    const bool is_over = std::any_of(running.begin(), running.end(),
                                     [&](const Running* one) { return IsOver(*one, now); });
    if (!is_over && !running.empty()) ReadOnce(running, now);
    now = RealClock().Elapsed();
  }
  return outcomes;
}

}  // namespace holdfast
