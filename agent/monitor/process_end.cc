#include "agent/monitor/process_end.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/types.h>
#include <unistd.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "agent/proc_stat.h"
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
  // What can be read of it under this number is still its own, so the directory was, too.
  const std::string line = ReadStat(pidfd);
  const std::vector<absl::string_view> fields = FieldsOfStat(line);
  constexpr size_t kExitCode = 49;  // field 52 of the line
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
