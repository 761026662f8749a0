#include "agent/run/process_tree.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "io/unique_fd.h"

namespace holdfast {
namespace {

struct Stat {
  pid_t parent = 0;
  char state = 0;  // 0: no such process
};

Stat ReadStat(pid_t process) {
  char path[32];
  std::snprintf(path, sizeof(path), "/proc/%d/stat", static_cast<int>(process));
  const UniqueFd file(open(path, O_RDONLY | O_CLOEXEC));
  if (!file) return {};
  // "pid (name) state parent ...": the name has at most 15 bytes, which may be brackets and spaces.
  char text[256];
  const ssize_t length = read(file.get(), text, sizeof(text) - 1);
  if (length <= 0) return {};
  text[length] = '\0';
  const char* const name_end = std::strrchr(text, ')');
  Stat stat;
  int parent = 0;
  if (name_end == nullptr || std::sscanf(name_end + 1, " %c %d", &stat.state, &parent) != 2) {
    return {};
  }
  stat.parent = parent;
  return stat;
}

std::vector<pid_t> AllProcesses() {
  std::vector<pid_t> processes;
  DIR* const directory = opendir("/proc");
  if (directory == nullptr) return processes;
  while (const dirent* entry = readdir(directory)) {
    char* end = nullptr;
    const long number = std::strtol(entry->d_name, &end, 10);
    if (number > 0 && *end == '\0') processes.push_back(static_cast<pid_t>(number));
  }
  closedir(directory);
  return processes;
}

// "NAME=value" and a NUL, again and again; empty if it is another user's, or gone.
std::string ReadEnvironment(pid_t process) {
  constexpr size_t kBytesMax = size_t{8} << 20;
  char path[32];
  std::snprintf(path, sizeof(path), "/proc/%d/environ", static_cast<int>(process));
  const UniqueFd file(open(path, O_RDONLY | O_CLOEXEC));
  std::string bytes;
  char part[16 << 10];
  ssize_t got = 0;
  while (file && bytes.size() < kBytesMax && (got = read(file.get(), part, sizeof(part))) > 0) {
    bytes.append(part, static_cast<size_t>(got));
  }
  return bytes;
}

// An orphan's parent is the root, since a moment ago.
bool SignalIfBelow(pid_t process, pid_t parent, pid_t root, int signal_number) {
  // By number: glibc 2.36 declares them in <sys/pidfd.h> without C linkage.
  const UniqueFd pidfd(static_cast<int>(syscall(SYS_pidfd_open, process, 0)));
  if (!pidfd) return false;
  const Stat now = ReadStat(process);
  if (now.state == 0 || now.state == 'Z') return false;
  if (now.parent != parent && now.parent != root) return false;
  return syscall(SYS_pidfd_send_signal, pidfd.get(), signal_number, nullptr, 0) == 0;
}

}  // namespace

bool IsDescendant(pid_t process, pid_t root) {
  // Deeper than trees are; and parents that change meanwhile may lead round.
  constexpr int kDepthMax = 256;
  for (int depth = 0; depth < kDepthMax && process > 1; ++depth) {
    const Stat stat = ReadStat(process);
    if (stat.state == 0) return false;
    if (stat.parent == root) return true;
    process = stat.parent;
  }
  return false;
}

size_t SignalDescendants(pid_t root, int signal_number) {
  std::unordered_map<pid_t, std::vector<pid_t>> children;
  for (const pid_t process : AllProcesses()) {
    const Stat stat = ReadStat(process);
    if (stat.state != 0) children[stat.parent].push_back(process);
  }
  size_t signalled = 0;
  std::vector<pid_t> open = {root};
  std::unordered_set<pid_t> seen = {root};  // the picture is no snapshot: it may hold a cycle
  while (!open.empty()) {
    const pid_t parent = open.back();
    open.pop_back();
    for (const pid_t child : children[parent]) {
      if (!seen.insert(child).second) continue;
      open.push_back(child);
      if (SignalIfBelow(child, parent, root, signal_number)) ++signalled;
    }
  }
  return signalled;
}

size_t SignalByVariable(const std::string& variable, int signal_number) {
  const std::string wanted = '\0' + variable + '\0';
  size_t signalled = 0;
  for (const pid_t process : AllProcesses()) {
    if (process == getpid()) continue;
    const UniqueFd pidfd(static_cast<int>(syscall(SYS_pidfd_open, process, 0)));
    if (!pidfd || ('\0' + ReadEnvironment(process)).find(wanted) == std::string::npos) continue;
    if (syscall(SYS_pidfd_send_signal, pidfd.get(), signal_number, nullptr, 0) == 0) ++signalled;
  }
  return signalled;
}

char ProcessState(pid_t process) { return ReadStat(process).state; }

pid_t ParentOf(pid_t process) { return ReadStat(process).parent; }

}  // namespace holdfast
