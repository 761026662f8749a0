// The agent's log: lines for people, on standard error or in one file that cannot grow without
// bound. Formatting and levels are spdlog's (confined to log.cc); where lines go is ours, because a
// crash (CHECK, a sanitizer, the C library) writes to descriptor 2, and that must be the same file.
//
// The log is process-wide on purpose: it carries nothing that a decision depends on.
#ifndef HOLDFAST_AGENT_LOG_H_
#define HOLDFAST_AGENT_LOG_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace holdfast {

struct LogOptions {
  std::string process = "";    // "keeper" or "worker": in each line, with the pid
  std::string level = "info";  // debug, info, warning, error
  std::string path = "";       // empty: standard error as it is
  // At this size the file becomes `<path>.1` (replacing the one before) and a new one begins, so
  // both together take twice as much at most, but for what a crash adds.
  uint64_t bytes_max = uint64_t{8} << 20;
  // One process rotates (the worker); the others follow the name.
  enum class Rotation { kRotate, kFollow } rotation = Rotation::kFollow;
};

// Sends all lines, and descriptors 1 and 2, where the options say. Once, from main.
// Errors: as open(2), naming the path.
absl::Status OpenLog(const LogOptions& options);

// Threads: any.
void LogDebug(const std::string& text);
void LogInfo(const std::string& text);
void LogWarning(const std::string& text);
void LogError(const std::string& text);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_LOG_H_
