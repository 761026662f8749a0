#include "agent/run/process_start.h"

#include <fcntl.h>
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

std::optional<absl::Duration> StartOf(int pidfd) {
  const pid_t number = PidOf(pidfd);
  const int64_t ticks_per_second = sysconf(_SC_CLK_TCK);
  if (number <= 0 || ticks_per_second <= 0) return std::nullopt;
  const UniqueFd file(open(absl::StrCat("/proc/", number, "/stat").c_str(), O_RDONLY | O_CLOEXEC));
  char text[1024];
  const ssize_t length = file ? read(file.get(), text, sizeof(text)) : -1;
  // It has this number still: what was read was its own.
  if (length <= 0 || PidOf(pidfd) != number) return std::nullopt;
  // The name is in brackets and may hold any: fields are counted from behind the last one.
  const std::string_view line(text, static_cast<size_t>(length));
  const size_t end = line.rfind(')');
  if (end == std::string_view::npos || end + 2 >= line.size()) return std::nullopt;
  const std::string_view rest = line.substr(end + 2);
  const std::vector<absl::string_view> fields =
      absl::StrSplit(absl::string_view(rest.data(), rest.size()), ' ');
  constexpr size_t kStartTime = 19;  // field 22 of the line (proc(5)), since boot
  uint64_t ticks = 0;
  if (fields.size() <= kStartTime || !absl::SimpleAtoi(fields[kStartTime], &ticks)) {
    return std::nullopt;
  }
  constexpr uint64_t kTicksMax = uint64_t{1} << 50;
  if (ticks > kTicksMax) return std::nullopt;
  return absl::Seconds(1) * static_cast<int64_t>(ticks) / ticks_per_second;
}

}  // namespace holdfast
