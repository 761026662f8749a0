#include "agent/recovery/text.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/utf8.h"

namespace holdfast::recovery {

std::string CutText(std::string_view text, size_t bytes_max) {
  std::string out;
  while (!text.empty()) {
    const size_t bytes = Utf8SequenceBytes(text);
    if (out.size() + std::max<size_t>(bytes, 1) > bytes_max) break;
    const bool plain = bytes > 1 || (bytes == 1 && text.front() >= ' ' && text.front() != 0x7F);
    if (plain) {
      out += text.substr(0, bytes);
    } else {
      out += '?';
    }
    text.remove_prefix(std::max<size_t>(bytes, 1));
  }
  return out;
}

std::string DurationText(absl::Duration duration) {
  if (duration < absl::ZeroDuration()) duration = absl::ZeroDuration();
  if (duration < absl::Seconds(10)) {
    return absl::StrFormat("%.2f s", absl::ToDoubleSeconds(duration));
  }
  const int64_t seconds = absl::ToInt64Seconds(duration + absl::Milliseconds(500));
  if (seconds < 60) return absl::StrFormat("%d s", seconds);
  if (seconds < 3600) return absl::StrFormat("%dm%02ds", seconds / 60, seconds % 60);
  const int64_t minutes = seconds / 60;
  if (minutes < 24 * 60) return absl::StrFormat("%dh%02dm", minutes / 60, minutes % 60);
  return absl::StrFormat("%dd%02dh", minutes / (24 * 60), minutes / 60 % 24);
}

std::string CountText(uint64_t count) {
  std::string digits = absl::StrCat(count);
  for (size_t i = digits.size(); i > 3; i -= 3) digits.insert(i - 3, ",");
  return digits;
}

}  // namespace holdfast::recovery
