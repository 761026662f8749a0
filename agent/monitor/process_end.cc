#include "agent/monitor/process_end.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/types.h>
#include <unistd.h>

#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "agent/process.h"
#include "io/unique_fd.h"

namespace holdfast {
namespace {

// Of <linux/pidfd.h> since Linux 6.13, in its first form; Debian 12's has none of it.
struct PidfdInfo {
  uint64_t mask;  // asked for; of the answer: what there is
  uint64_t cgroup_id;
  uint32_t numbers[11];  // of the process, its parent, its users and groups
  int32_t exit_code;     // as waitpid(2) has it
};
static_assert(sizeof(PidfdInfo) == 64);
constexpr uint64_t kPidfdInfoExit = 1u << 3;
constexpr unsigned long kPidfdGetInfo = _IOWR(0xFF, 11, PidfdInfo);

std::optional<int> StatusOfReaped(int pidfd) {
  PidfdInfo info{};
  info.mask = kPidfdInfoExit;
  // Fails with ENOTTY on kernels that do not know it, and with ESRCH on those that know it without
  // the exit code.
  if (ioctl(pidfd, kPidfdGetInfo, &info) != 0 || (info.mask & kPidfdInfoExit) == 0) {
    return std::nullopt;
  }
  return info.exit_code;
}

std::optional<int> StatusOfZombie(int pidfd) {
  const pid_t number = PidOf(pidfd);
  if (number <= 0) return std::nullopt;
  const UniqueFd directory(
      open(absl::StrCat("/proc/", number).c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!directory) return std::nullopt;
  // Who may not trace it reads a 0 for the status. Its links are guarded by the same right; that a
  // zombie has no working directory any more (ENOENT) is told to those who have it.
  char target[1];
  if (readlinkat(directory.get(), "cwd", target, sizeof(target)) < 0 && errno != ENOENT) {
    return std::nullopt;
  }
  const UniqueFd file(openat(directory.get(), "stat", O_RDONLY | O_CLOEXEC));
  char text[4096];
  const ssize_t length = file ? read(file.get(), text, sizeof(text)) : -1;
  // It has this number still, so that all of it was its own.
  if (length <= 0 || PidOf(pidfd) != number) return std::nullopt;
  const std::string_view line(text, static_cast<size_t>(length));
  const size_t end = line.rfind(')');  // of the name, which may hold anything
  if (end == std::string_view::npos || end + 2 >= line.size()) return std::nullopt;
  const std::vector<absl::string_view> fields = absl::StrSplit(
      absl::string_view(line.data() + end + 2, line.size() - end - 2), absl::ByAnyChar(" \n"));
  constexpr size_t kExitCode = 49;  // field 52 of the line (proc(5)), of which the first is field 3
  int status = 0;
  if (fields.size() <= kExitCode || fields[0] != "Z" ||
      !absl::SimpleAtoi(fields[kExitCode], &status)) {
    return std::nullopt;
  }
  return status;
}

}  // namespace

std::optional<int> WaitStatusOf(int pidfd) {
  const std::optional<int> zombies = StatusOfZombie(pidfd);
  // Its parent may have waited for it meanwhile.
  return zombies.has_value() ? zombies : StatusOfReaped(pidfd);
}

}  // namespace holdfast
