#include "cli/process.h"

#include <malloc.h>
#include <sys/resource.h>

#include <string>
#include <string_view>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"

namespace holdfast::cli {
namespace {

constexpr char kStatusPath[] = "/proc/self/status";

// Of a line "<name>:<spaces><number> kB".
absl::StatusOr<uint64_t> BytesOf(const std::string& status, std::string_view name) {
  for (const std::string& line : std::vector<std::string>(absl::StrSplit(status, '\n'))) {
    if (line.compare(0, name.size(), name) != 0) continue;
    std::string number;
    for (const char c : line.substr(name.size())) {
      if (c >= '0' && c <= '9') number += c;
    }
    uint64_t kibibytes = 0;
    if (absl::SimpleAtoi(number, &kibibytes)) return kibibytes * 1024;
  }
  return absl::UnavailableError(absl::StrCat(kStatusPath, ": no line ", std::string(name)));
}

}  // namespace

absl::StatusOr<ProcessMemory> LookAtProcessMemory(FileSystem& file_system) {
  malloc_trim(0);
  ASSIGN_OR_RETURN(const std::string status, file_system.ReadSmallFile(kStatusPath, 1 << 16));
  ProcessMemory memory;
  ASSIGN_OR_RETURN(memory.resident_bytes, BytesOf(status, "VmRSS:"));
  ASSIGN_OR_RETURN(memory.peak_resident_bytes, BytesOf(status, "VmHWM:"));
  return memory;
}

void RaiseOpenFilesLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  // Dropped: a lower limit serves too, and a file that it stops is named.
  (void)setrlimit(RLIMIT_NOFILE, &limit);
}

}  // namespace holdfast::cli
