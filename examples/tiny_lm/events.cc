#include "examples/tiny_lm/events.h"

#include <unistd.h>

#include <cerrno>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace tiny_lm {

std::string JsonString(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      result += '\\';
      result += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      absl::StrAppendFormat(&result, "\\u%04x", c);
    } else {
      result += c;
    }
  }
  return result + "\"";
}

void EventLog::Print(const std::string& event, const std::string& members) const {
  const std::string line =
      absl::StrFormat("{\"event\":%s,\"attempt\":%d,\"rank\":%d%s%s}\n", JsonString(event),
                      attempt_, rank_, members.empty() ? "" : ",", members);
  for (size_t done = 0; done < line.size();) {
    const ssize_t written = write(STDOUT_FILENO, line.data() + done, line.size() - done);
    // Nobody listens any more: a training goes on without its log.
    if (written < 0 && errno != EINTR) return;
    if (written > 0) done += static_cast<size_t>(written);
  }
}

}  // namespace tiny_lm
