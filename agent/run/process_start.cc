#include "agent/run/process_start.h"

#include <unistd.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/string_view.h"
#include "agent/proc_stat.h"

namespace holdfast {

std::optional<absl::Duration> StartOf(int pidfd) {
  const int64_t ticks_per_second = sysconf(_SC_CLK_TCK);
  if (ticks_per_second <= 0) return std::nullopt;
  const std::string line = ReadStat(pidfd);
  const std::vector<absl::string_view> fields = FieldsOfStat(line);
  constexpr size_t kStartTime = 19;  // field 22 of the line, since boot
  uint64_t ticks = 0;
  if (fields.size() <= kStartTime || !absl::SimpleAtoi(fields[kStartTime], &ticks)) {
    return std::nullopt;
  }
  constexpr uint64_t kTicksMax = uint64_t{1} << 50;
  if (ticks > kTicksMax) return std::nullopt;
  return absl::Seconds(1) * static_cast<int64_t>(ticks) / ticks_per_second;
}

}  // namespace holdfast
