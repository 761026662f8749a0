#include "agent/host_memory.h"

#include <fstream>
#include <iterator>
#include <string_view>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace holdfast {
namespace {

// Files of /proc and /sys have no size to ask for; these are short.
std::string ReadText(const std::string& path) {
  std::ifstream file(path);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

uint64_t MachineBytes(const std::string& root) {
  const std::string text = ReadText(absl::StrCat(root, "/proc/meminfo"));
  constexpr std::string_view kKey = "MemTotal:";
  const size_t at = text.find(kKey);
  if (at == std::string::npos) return 0;
  const std::string line = text.substr(at + kKey.size(), text.find('\n', at) - at - kKey.size());
  const std::vector<std::string> words = absl::StrSplit(line, ' ', absl::SkipEmpty());
  uint64_t kib = 0;
  if (words.empty() || !absl::SimpleAtoi(words[0], &kib)) return 0;
  return kib * 1024;
}

// Applies the limit files of `group` and its parents, up to the mount itself.
void ApplyLimits(const std::string& mount, std::string group, const char* file_name,
                 HostMemory& memory) {
  for (;;) {
    const std::string path = absl::StrCat(mount, group == "/" ? "" : group, "/", file_name);
    std::string text = ReadText(path);
    absl::StripAsciiWhitespace(&text);
    uint64_t bytes = 0;
    // "max" (v2) is no number; v1 says "no limit" with one near 2^63.
    if (absl::SimpleAtoi(text, &bytes) && bytes > 0 &&
        (memory.bytes == 0 || bytes < memory.bytes)) {
      memory.bytes = bytes;
      memory.limit = path;
    }
    const size_t slash = group.rfind('/');
    if (group.empty() || group == "/" || slash == std::string::npos) return;
    group.resize(slash == 0 ? 1 : slash);
  }
}

}  // namespace

HostMemory ReadHostMemory(const std::string& root) {
  HostMemory memory;
  memory.bytes = MachineBytes(root);
  memory.limit = "machine";
  const std::string groups = ReadText(absl::StrCat(root, "/proc/self/cgroup"));
  const std::vector<std::string> lines = absl::StrSplit(groups, '\n', absl::SkipEmpty());
  for (const std::string& line : lines) {
    // "<id>:<controllers>:<path>"; v2 has the id 0 and no controllers.
    const std::vector<std::string> parts = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (parts.size() != 3) continue;
    if (parts[0] == "0" && parts[1].empty()) {
      ApplyLimits(absl::StrCat(root, "/sys/fs/cgroup"), parts[2], "memory.max", memory);
    }
    const std::vector<std::string> controllers = absl::StrSplit(parts[1], ',');
    for (const std::string& controller : controllers) {
      if (controller != "memory") continue;
      ApplyLimits(absl::StrCat(root, "/sys/fs/cgroup/memory"), parts[2], "memory.limit_in_bytes",
                  memory);
    }
  }
  return memory;
}

}  // namespace holdfast
