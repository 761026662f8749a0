#include "cli/run_agent.h"

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "cli/agent_client.h"
#include "io/errno_status.h"
#include "io/program_path.h"
#include "io/unique_fd.h"

extern char** environ;

namespace holdfast::cli {
namespace {

constexpr absl::Duration kAnswerTimeout = absl::Seconds(10);

// What it wrote on its standard error, which is a memfd.
std::string FirstLineOf(int fd) {
  std::array<char, 1024> text{};
  const ssize_t length = pread(fd, text.data(), text.size() - 1, 0);
  const std::string_view line(text.data(), length > 0 ? static_cast<size_t>(length) : 0);
  return std::string(line.substr(0, line.find('\n')));
}

// Its foreground process ends when the agent serves, or with why it does not.
absl::Status StartAgent(const RunAgent& agent) {
  const char* const named = std::getenv("HOLDFASTD");
  const std::string program =
      named != nullptr && *named != '\0' ? named : ProgramBeside("holdfastd");
  std::vector<std::string> words = {program,      "--private", "--socket",
                                    agent.socket, "--job",     agent.job};
  if (!agent.config.empty()) {
    words.push_back("--config");
    words.push_back(agent.config);
  }
  if (!agent.every.empty()) {
    words.push_back("--every");
    words.push_back(agent.every);
  }
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  const UniqueFd errors(memfd_create("holdfastd", MFD_CLOEXEC));
  if (!errors) return ErrnoStatus(errno, "memfd_create", "for holdfastd's words");

  posix_spawn_file_actions_t actions;
  posix_spawnattr_t attributes;
  posix_spawn_file_actions_init(&actions);
  posix_spawnattr_init(&attributes);
  sigset_t none;
  sigset_t all;
  sigemptyset(&none);
  sigfillset(&all);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, errors.get(), STDERR_FILENO);
  posix_spawn_file_actions_addclosefrom_np(&actions, 3);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setsigdefault(&attributes, &all);
  // A session of its own: a Ctrl-C is for this program alone.
  posix_spawnattr_setflags(&attributes,
                           POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  pid_t child = -1;
  const int failed =
      posix_spawnp(&child, program.c_str(), &actions, &attributes, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  posix_spawnattr_destroy(&attributes);
  if (failed != 0) return ErrnoStatus(failed, "start", program);
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
  if (status == 0) return absl::OkStatus();
  const std::string why = absl::StrCat(program, " did not start: ", FirstLineOf(errors.get()));
  // Its flags and configuration do not become better by themselves.
  constexpr int kUsage = 2;
  const bool is_usage = WIFEXITED(status) && WEXITSTATUS(status) == kUsage;
  return is_usage ? absl::InvalidArgumentError(why) : absl::UnavailableError(why);
}

}  // namespace

absl::Status EnsureAgent(const RunAgent& agent) {
  const absl::Status there = QueryStatus(agent.socket, kAnswerTimeout).status();
  if (there.ok() || !absl::IsUnavailable(there) || !agent.may_start) return there;
  const std::string runtime =
      std::filesystem::path(agent.socket).parent_path().parent_path().string();
  if (mkdir(runtime.c_str(), 0700) != 0 && errno != EEXIST) {
    return ErrnoStatus(errno, "create directory", runtime);
  }
  RETURN_IF_ERROR(StartAgent(agent));
  return QueryStatus(agent.socket, kAnswerTimeout).status();
}

}  // namespace holdfast::cli
