#include "agent/proc_stat.h"

#include <fcntl.h>
#include <sys/types.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "agent/process.h"
#include "io/unique_fd.h"

namespace holdfast {

std::string ReadStat(int pidfd) {
  const pid_t number = PidOf(pidfd);
  if (number <= 0) return std::string();
  const UniqueFd file(open(absl::StrCat("/proc/", number, "/stat").c_str(), O_RDONLY | O_CLOEXEC));
  char text[4096];
  const ssize_t length = file ? read(file.get(), text, sizeof(text)) : -1;
  // It has this number still, so that what was read was its own.
  if (length <= 0 || PidOf(pidfd) != number) return std::string();
  return std::string(text, static_cast<size_t>(length));
}

std::vector<absl::string_view> FieldsOfStat(std::string_view line) {
  const size_t end = line.rfind(')');  // of the name's brackets
  if (end == std::string_view::npos || end + 2 >= line.size()) return {};
  return absl::StrSplit(absl::string_view(line.data() + end + 2, line.size() - end - 2),
                        absl::ByAnyChar(" \n"));
}

}  // namespace holdfast
