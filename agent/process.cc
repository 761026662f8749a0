#include "agent/process.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/status_macros.h"
#include "io/errno_status.h"

extern char** environ;

namespace holdfast {
namespace {

// By number: glibc 2.36 declares them in <sys/pidfd.h> without C linkage.
int PidfdOpen(pid_t pid) { return static_cast<int>(syscall(SYS_pidfd_open, pid, 0)); }
int PidfdSendSignal(int pidfd, int signal_number) {
  return static_cast<int>(syscall(SYS_pidfd_send_signal, pidfd, signal_number, nullptr, 0));
}

// The number of a pidfd's process in our pid namespace; nothing if `fd` is no pidfd.
std::optional<pid_t> PidIn(int fd) {
  const std::string path = absl::StrCat("/proc/self/fdinfo/", fd);
  UniqueFd file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) return std::nullopt;
  char text[1024];
  const ssize_t length = read(file.get(), text, sizeof(text) - 1);
  if (length <= 0) return std::nullopt;
  const std::string_view info(text, static_cast<size_t>(length));
  const size_t at = info.find("\nPid:\t");
  if (at == std::string_view::npos) return std::nullopt;
  text[length] = '\0';
  return static_cast<pid_t>(std::strtol(text + at + 6, nullptr, 10));
}

// posix_spawn's two option objects, released on every path.
class SpawnOptions {
 public:
  SpawnOptions() {
    posix_spawn_file_actions_init(&actions_);
    posix_spawnattr_init(&attributes_);
  }
  ~SpawnOptions() {
    posix_spawn_file_actions_destroy(&actions_);
    posix_spawnattr_destroy(&attributes_);
  }
  SpawnOptions(const SpawnOptions&) = delete;
  SpawnOptions& operator=(const SpawnOptions&) = delete;

  // Since POSIX.1-2017 TC (glibc 2.29) dup2 onto itself clears close-on-exec in the child.
  void Inherit(int fd) { InheritAs(fd, fd); }
  void InheritAs(int fd, int number) {
    CHECK(posix_spawn_file_actions_adddup2(&actions_, fd, number) == 0);
  }
  void OpenAs(const char* path, int flags, int number) {
    CHECK(posix_spawn_file_actions_addopen(&actions_, number, path, flags, 0) == 0);
  }
  // `blocked` are blocked in it, all have their default actions.
  void SetSignals(std::initializer_list<int> blocked, short further_flags = 0) {
    sigset_t all;
    sigset_t mask;
    sigfillset(&all);
    sigemptyset(&mask);
    for (const int number : blocked) sigaddset(&mask, number);
    CHECK(posix_spawnattr_setsigdefault(&attributes_, &all) == 0);
    CHECK(posix_spawnattr_setsigmask(&attributes_, &mask) == 0);
    const int flags = POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK | further_flags;
    CHECK(posix_spawnattr_setflags(&attributes_, static_cast<short>(flags)) == 0);
  }
  const posix_spawn_file_actions_t* actions() const { return &actions_; }
  const posix_spawnattr_t* attributes() const { return &attributes_; }

 private:
  posix_spawn_file_actions_t actions_;
  posix_spawnattr_t attributes_;
};

absl::StatusOr<Child> Spawn(const std::string& program, const std::vector<std::string>& arguments,
                            const SpawnOptions& options) {
  CHECK(!arguments.empty());
  std::vector<char*> pointers;
  for (const std::string& argument : arguments) {
    pointers.push_back(const_cast<char*>(argument.c_str()));  // posix_spawn does not write there
  }
  pointers.push_back(nullptr);
  Child child;
  const int error = posix_spawnp(&child.pid, program.c_str(), options.actions(),
                                 options.attributes(), pointers.data(), environ);
  if (error != 0) return ErrnoStatus(error, "start", arguments[0]);
  // Nobody else reaps our child, so its number is still its own here.
  ASSIGN_OR_RETURN(child.pidfd, OpenPidfd(child.pid));
  return child;
}

}  // namespace

absl::StatusOr<UniqueFd> OpenPidfd(pid_t pid) {
  UniqueFd pidfd(PidfdOpen(pid));
  if (pidfd) return pidfd;
  if (errno == ESRCH) return absl::NotFoundError(absl::StrCat("no process ", pid));
  return ErrnoStatus(errno, "pidfd_open", absl::StrCat("process ", pid));
}

bool IsDead(int pidfd) { return WaitUntilDead(pidfd, absl::ZeroDuration()); }

bool WaitUntilDead(int pidfd, absl::Duration deadline) {
  const absl::Duration end = RealClock().Elapsed() + deadline;
  for (;;) {
    pollfd entry{pidfd, POLLIN, 0};
    const absl::Duration left = std::max(end - RealClock().Elapsed(), absl::ZeroDuration());
    const timespec timeout = absl::ToTimespec(left);
    const int ready = ppoll(&entry, 1, &timeout, nullptr);
    if (ready > 0) return true;
    if (ready == 0) return false;
    CHECK(errno == EINTR);
  }
}

void SendSignal(int pidfd, int signal_number) {
  // Dropped: ESRCH says that it is dead already, which is what callers want anyway, and those we
  // signal run as the same user as we do.
  (void)PidfdSendSignal(pidfd, signal_number);
}

std::string Reap(int pidfd) {
  siginfo_t info{};
  int result = 0;
  do {
    result = waitid(P_PIDFD, static_cast<id_t>(pidfd), &info, WEXITED | WNOHANG);
  } while (result != 0 && errno == EINTR);
  if (result != 0 || info.si_pid == 0) return "not our child";
  return absl::StrCat(info.si_code == CLD_EXITED ? "exit code " : "signal ", info.si_status);
}

pid_t PidOf(int pidfd) { return PidIn(pidfd).value_or(0); }

bool IsPidfd(int fd) { return PidIn(fd).has_value(); }

void DieWithParent(int parent_pidfd) {
  CHECK(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
  // Died before that: its children belong to somebody else by now.
  if (getppid() != PidOf(parent_pidfd)) raise(SIGKILL);
}

UniqueFd Duplicate(int fd) {
  UniqueFd copy(fcntl(fd, F_DUPFD_CLOEXEC, 3));
  CHECK(copy || errno == EMFILE);
  return copy;
}

absl::StatusOr<UniqueFd> SealedMemfd(const std::string& name, std::string_view text) {
  UniqueFd memory(memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!memory) return ErrnoStatus(errno, "memfd_create", name);
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t written =
        pwrite(memory.get(), text.data() + done, text.size() - done, static_cast<off_t>(done));
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return ErrnoStatus(written < 0 ? errno : EIO, "write", name);
    done += static_cast<size_t>(written);
  }
  if (fcntl(memory.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL) !=
      0) {
    return ErrnoStatus(errno, "seal", name);
  }
  return memory;
}

absl::StatusOr<std::string> ReadAll(int fd, size_t bytes_max) {
  struct stat info {};
  if (fstat(fd, &info) != 0) return ErrnoStatus(errno, "fstat", absl::StrCat("descriptor ", fd));
  if (!S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(
        absl::StrFormat("descriptor %d: expected a regular file or memfd, found mode %o", fd,
                        static_cast<unsigned>(info.st_mode)));
  }
  if (static_cast<size_t>(info.st_size) > bytes_max) {
    return absl::ResourceExhaustedError(absl::StrFormat(
        "descriptor %d: expected at most %d bytes, found %d", fd, bytes_max, info.st_size));
  }
  std::string text(static_cast<size_t>(info.st_size), '\0');
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t got = pread(fd, text.data() + done, text.size() - done, static_cast<off_t>(done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      return ErrnoStatus(got < 0 ? errno : EIO, "read", absl::StrCat("descriptor ", fd));
    }
    done += static_cast<size_t>(got);
  }
  return text;
}

absl::StatusOr<Child> SpawnSelf(const std::vector<std::string>& arguments,
                                std::span<const int> inherited) {
  SpawnOptions options;
  options.SetSignals({SIGTERM, SIGINT});
  for (const int fd : inherited) options.Inherit(fd);
  return Spawn("/proc/self/exe", arguments, options);
}

absl::StatusOr<Child> SpawnDetached(const std::string& program,
                                    const std::vector<std::string>& arguments,
                                    std::span<const int> inherited) {
  SpawnOptions options;
  options.SetSignals({}, POSIX_SPAWN_SETSID);
  options.OpenAs("/dev/null", O_RDONLY, STDIN_FILENO);
  options.OpenAs("/dev/null", O_WRONLY, STDOUT_FILENO);
  options.OpenAs("/dev/null", O_WRONLY, STDERR_FILENO);
  for (const int fd : inherited) options.Inherit(fd);
  return Spawn(program, arguments, options);
}

absl::StatusOr<Child> SpawnShell(const std::string& command,
                                 const std::vector<std::string>& variables, int standard_input) {
  SpawnOptions options;
  // A group of its own, so that it is killed with all that it has started.
  options.SetSignals({}, POSIX_SPAWN_SETPGROUP);
  options.InheritAs(standard_input, STDIN_FILENO);
  const std::vector<const char*> arguments = {"sh", "-c", command.c_str(), nullptr};
  std::vector<const char*> environment;
  for (const std::string& variable : variables) environment.push_back(variable.c_str());
  for (char** one = environ; *one != nullptr; ++one) {
    const std::string_view mine(*one);
    const std::string_view name = mine.substr(0, mine.find('=') + 1);
    // Of two with one name shells take the last.
    const bool replaced =
        std::any_of(variables.begin(), variables.end(),
                    [&](const std::string& variable) { return variable.starts_with(name); });
    if (!replaced) environment.push_back(*one);
  }
  environment.push_back(nullptr);
  Child child;
  // posix_spawn does not write to either.
  const int error =
      posix_spawn(&child.pid, "/bin/sh", options.actions(), options.attributes(),
                  const_cast<char**>(arguments.data()), const_cast<char**>(environment.data()));
  if (error != 0) return ErrnoStatus(error, "start", "/bin/sh");
  absl::StatusOr<UniqueFd> pidfd = OpenPidfd(child.pid);
  if (!pidfd.ok()) {
    // Nobody could watch it: it must not go on.
    kill(-child.pid, SIGKILL);
    waitpid(child.pid, nullptr, 0);
    return pidfd.status();
  }
  child.pidfd = *std::move(pidfd);
  return child;
}

}  // namespace holdfast
