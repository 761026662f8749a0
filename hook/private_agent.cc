#include "hook/private_agent.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <string_view>
#include <vector>

#include "hook/socket.h"

extern char** environ;

namespace holdfast::hook {
namespace {

// Between looks at a lock that another rank holds, and at a child without a pidfd.
constexpr int64_t kLookNs = 5 * kNsPerMs;
// A process that was killed has ended after this long, on a machine under load too, unless a device
// holds it.
constexpr int64_t kReapNs = 1000 * kNsPerMs;
constexpr size_t kStderrBytesMax = 700;

Error CheckDirectory(const std::string& directory, mode_t forbidden) {
  struct stat info;
  if (lstat(directory.c_str(), &info) != 0) {
    return Error(HF_PERMISSION_DENIED, "runtime directory %s: %s", ShortName(directory).text(),
                 strerror(errno));
  }
  if (!S_ISDIR(info.st_mode) || info.st_uid != geteuid() || (info.st_mode & forbidden) != 0) {
    return Error(HF_PERMISSION_DENIED,
                 "runtime directory %s: expected a directory of user %u with none of the mode bits "
                 "%04o, found user %u, mode %06o",
                 ShortName(directory).text(), geteuid(), forbidden, info.st_uid, info.st_mode);
  }
  return Error();
}

Error MakeDirectory(const std::string& directory) {
  if (mkdir(directory.c_str(), 0700) == 0 || errno == EEXIST) return Error();
  return Error(HF_PERMISSION_DENIED, "runtime directory %s: mkdir: %s", ShortName(directory).text(),
               strerror(errno));
}

void Sleep(Deadline deadline) {
  const timespec at = ToTimespec(deadline.at_ns());
  clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, nullptr);
}

Result<UniqueFd> TakeLock(const std::string& directory, Deadline deadline) {
  const std::string path = directory + "/agent.lock";
  UniqueFd fd(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd.valid()) {
    return Error(HF_PERMISSION_DENIED, "%s: %s", ShortName(path).text(), strerror(errno));
  }
  while (flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK && errno != EINTR) {
      return Error(HF_INTERNAL, "%s: flock: %s", ShortName(path).text(), strerror(errno));
    }
    if (deadline.passed()) {
      return Error(HF_DEADLINE_EXCEEDED, "another rank is starting the agent: %s is locked",
                   ShortName(path).text());
    }
    Sleep(Deadline::After(kLookNs).Earlier(deadline));
  }
  return fd;
}

bool IsExecutable(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode) && access(path.c_str(), X_OK) == 0;
}

// $HOLDFASTD; beside this library, also for <prefix>/lib[/<architecture>] and <prefix>/bin; PATH.
Result<std::string> FindDaemon(const Settings& settings) {
  if (!settings.daemon_path.empty()) {
    if (IsExecutable(settings.daemon_path)) return settings.daemon_path;
    return Error(HF_UNAVAILABLE, "$HOLDFASTD: %s is not an executable file",
                 ShortName(settings.daemon_path).text());
  }
  Dl_info library;
  if (dladdr(reinterpret_cast<const void*>(&ConnectOrStartAgent), &library) != 0 &&
      library.dli_fname != nullptr) {
    const std::string file = library.dli_fname;
    const size_t slash = file.rfind('/');
    const std::string directory = slash == std::string::npos ? "." : file.substr(0, slash);
    for (const char* place : {"/holdfastd", "/../bin/holdfastd", "/../../bin/holdfastd"}) {
      if (IsExecutable(directory + place)) return directory + place;
    }
  }
  std::string_view rest = settings.search_path;
  while (!rest.empty()) {
    const size_t colon = rest.find(':');
    const std::string directory(rest.substr(0, colon));
    rest = colon == std::string_view::npos ? std::string_view() : rest.substr(colon + 1);
    if (!directory.empty() && IsExecutable(directory + "/holdfastd")) {
      return directory + "/holdfastd";
    }
  }
  return Error(
      HF_NOT_FOUND,
      "no agent at %s, and no holdfastd to start: $HOLDFASTD is not set, and there is none "
      "beside libholdfast.so or in $PATH",
      ShortName(settings.socket_path).text());
}

// posix_spawn's attributes and file actions, released at the end.
class SpawnSetup {
 public:
  SpawnSetup() {
    posix_spawn_file_actions_init(&actions_);
    posix_spawnattr_init(&attributes_);
  }
  ~SpawnSetup() {
    posix_spawn_file_actions_destroy(&actions_);
    posix_spawnattr_destroy(&attributes_);
  }
  SpawnSetup(const SpawnSetup&) = delete;
  SpawnSetup& operator=(const SpawnSetup&) = delete;

  // Standard streams from and to nowhere, but standard error to `stderr_fd`; nothing else open;
  // no signal blocked or ignored; a session of its own.
  int Prepare(int stderr_fd) {
    sigset_t none;
    sigset_t all;
    sigemptyset(&none);
    sigfillset(&all);
    int failed = posix_spawn_file_actions_adddup2(&actions_, stderr_fd, 2);
    if (failed == 0) {
      failed = posix_spawn_file_actions_addopen(&actions_, 0, "/dev/null", O_RDONLY, 0);
    }
    if (failed == 0) {
      failed = posix_spawn_file_actions_addopen(&actions_, 1, "/dev/null", O_WRONLY, 0);
    }
    if (failed == 0) failed = posix_spawn_file_actions_addclosefrom_np(&actions_, 3);
    if (failed == 0) failed = posix_spawnattr_setsigmask(&attributes_, &none);
    if (failed == 0) failed = posix_spawnattr_setsigdefault(&attributes_, &all);
    if (failed == 0) {
      failed = posix_spawnattr_setflags(
          &attributes_, POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    }
    return failed;
  }

  posix_spawn_file_actions_t actions_;
  posix_spawnattr_t attributes_;
};

// Appends what can be read now. False at the end of the pipe.
bool ReadAvailable(int fd, std::string* text) {
  char bytes[256];
  for (;;) {
    const ssize_t got = read(fd, bytes, sizeof(bytes));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno == EAGAIN;
    if (got == 0) return false;
    const size_t room = kStderrBytesMax - std::min(kStderrBytesMax, text->size());
    text->append(bytes, std::min(room, static_cast<size_t>(got)));
  }
}

// Waits for this child only, and collects what it says. True if it has ended, and its status, or
// -1 if somebody else has reaped it (a trainer that ignores SIGCHLD, or waits for any child).
bool AwaitExit(pid_t child, int stderr_fd, Deadline deadline, std::string* text, int* status) {
  UniqueFd pid_fd(static_cast<int>(syscall(SYS_pidfd_open, child, 0)));
  bool pipe_open = true;
  for (;;) {
    const pid_t waited = waitpid(child, status, WNOHANG);
    if (waited == child || (waited < 0 && errno == ECHILD)) {
      if (waited < 0) *status = -1;
      if (pipe_open) ReadAvailable(stderr_fd, text);
      return true;
    }
    if (deadline.passed()) return false;
    pollfd ready[2] = {{pipe_open ? stderr_fd : -1, POLLIN, 0}, {pid_fd.get(), POLLIN, 0}};
    const int64_t look_ns = pid_fd.valid() ? kNsPerSecond : kLookNs;
    poll(ready, 2, Deadline::After(look_ns).Earlier(deadline).PollMs(1000));
    if (pipe_open && ready[0].revents != 0) pipe_open = ReadAvailable(stderr_fd, text);
  }
}

std::string FirstLine(const std::string& text) { return text.substr(0, text.find('\n')); }

// Starts the daemon and waits until it listens.
Error StartDaemon(const Settings& settings, const std::string& daemon, Deadline deadline) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) {
    return Error(HF_RESOURCE_EXHAUSTED, "pipe: %s", strerror(errno));
  }
  UniqueFd read_end(ends[0]);
  UniqueFd write_end(ends[1]);
  std::vector<std::string> words = {daemon,  "--private", "--socket", settings.socket_path,
                                    "--job", settings.job};
  if (!settings.root.empty()) {
    words.push_back("--root");
    words.push_back(settings.root);
  }
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);

  SpawnSetup setup;
  pid_t child = -1;
  int failed = setup.Prepare(write_end.get());
  if (failed == 0) {
    failed = posix_spawn(&child, daemon.c_str(), &setup.actions_, &setup.attributes_,
                         arguments.data(), environ);
  }
  write_end.Reset(-1);
  if (failed != 0) {
    return Error(HF_UNAVAILABLE, "starting %s: %s", ShortName(daemon).text(), strerror(failed));
  }
  std::string text;
  int status = 0;
  if (!AwaitExit(child, read_end.get(), deadline, &text, &status)) {
    // Only the foreground process, which is ours to end and to reap.
    kill(child, SIGKILL);
    AwaitExit(child, read_end.get(), Deadline::After(kReapNs), &text, &status);
    return Error(HF_DEADLINE_EXCEEDED, "%s did not listen in time: %s", ShortName(daemon).text(),
                 FirstLine(text).c_str());
  }
  if (status == -1 || (WIFEXITED(status) && WEXITSTATUS(status) == 0)) return Error();
  if (WIFSIGNALED(status)) {
    return Error(HF_UNAVAILABLE, "%s was ended by signal %d: %s", ShortName(daemon).text(),
                 WTERMSIG(status), FirstLine(text).c_str());
  }
  return Error(HF_UNAVAILABLE, "%s exited with %d: %s", ShortName(daemon).text(),
               WEXITSTATUS(status), FirstLine(text).c_str());
}

bool NobodyListens(const Error& error) {
  return error.code() == HF_NOT_FOUND || error.code() == HF_UNAVAILABLE;
}

}  // namespace

Error PrepareRuntimeDirectory(const std::string& directory) {
  const std::string parent = directory.substr(0, directory.rfind('/'));
  if (Error error = MakeDirectory(parent); !error.ok()) return error;
  if (Error error = CheckDirectory(parent, 0022); !error.ok()) return error;
  if (Error error = MakeDirectory(directory); !error.ok()) return error;
  return CheckDirectory(directory, 0077);
}

Result<UniqueFd> ConnectOrStartAgent(const Settings& settings, Deadline deadline) {
  if (settings.private_agent) {
    if (Error error = PrepareRuntimeDirectory(settings.runtime_directory); !error.ok()) {
      return error;
    }
  }
  Result<UniqueFd> connection = ConnectToAgent(settings.socket_path, deadline);
  if (connection.ok() || !NobodyListens(connection.error())) return connection;
  if (!settings.private_agent) {
    return Error(HF_UNAVAILABLE, "%s, and a private one must not be started",
                 connection.error().text());
  }
  Result<UniqueFd> lock = TakeLock(settings.runtime_directory, deadline);
  if (!lock.ok()) return lock.error();
  connection = ConnectToAgent(settings.socket_path, deadline);
  if (connection.ok() || !NobodyListens(connection.error())) return connection;
  Result<std::string> daemon = FindDaemon(settings);
  if (!daemon.ok()) return daemon.error();
  if (Error error = StartDaemon(settings, daemon.value(), deadline); !error.ok()) return error;
  connection = ConnectToAgent(settings.socket_path, deadline);
  if (connection.ok() || !NobodyListens(connection.error())) return connection;
  return Error(HF_UNAVAILABLE, "%s was started, but: %s", ShortName(daemon.value()).text(),
               connection.error().text());
}

}  // namespace holdfast::hook
