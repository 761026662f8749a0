#include "agent/config_values.h"

#include <cmath>
#include <string_view>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace holdfast {
namespace {

absl::Status Expected(const char* what, const std::string& found) {
  return absl::InvalidArgumentError(absl::StrCat("expected ", what, ", found \"", found, "\""));
}

// Digits with at most one point: no sign, exponent, "inf" or "nan", which SimpleAtod would take.
bool ParsePlainNumber(const std::string& text, double* value) {
  if (text.empty() || text.find_first_not_of("0123456789.") != std::string::npos) return false;
  return absl::SimpleAtod(text, value);
}

struct Unit {
  const char* name;
  double bytes;
};
constexpr Unit kUnits[] = {
    {"", 1},         {"b", 1},    {"kib", 0x1p10}, {"mib", 0x1p20}, {"gib", 0x1p30},
    {"tib", 0x1p40}, {"kb", 1e3}, {"mb", 1e6},     {"gb", 1e9},     {"tb", 1e12},
};

}  // namespace

absl::StatusOr<uint64_t> ParseByteCount(const std::string& text) {
  constexpr char kExpected[] = "a size such as 4096, 64MiB or 1.5GiB";
  const size_t unit_at = text.find_first_not_of("0123456789.");
  double number = 0;
  if (!ParsePlainNumber(text.substr(0, unit_at), &number)) return Expected(kExpected, text);
  std::string unit_name;
  if (unit_at != std::string::npos) unit_name = text.substr(unit_at);
  absl::StripAsciiWhitespace(&unit_name);
  absl::AsciiStrToLower(&unit_name);
  for (const Unit& unit : kUnits) {
    if (unit_name != unit.name) continue;
    const double bytes = number * unit.bytes;
    if (bytes > 0x1p62 || bytes != std::floor(bytes)) return Expected(kExpected, text);
    return static_cast<uint64_t>(bytes);
  }
  return Expected(kExpected, text);
}

absl::StatusOr<uint64_t> ParseMemoryShare(const std::string& text, uint64_t whole_bytes) {
  if (text.empty() || text.back() != '%') return ParseByteCount(text);
  double percent = 0;
  if (!ParsePlainNumber(text.substr(0, text.size() - 1), &percent) || percent <= 0 ||
      percent > 100) {
    return Expected("more than 0% and at most 100%", text);
  }
  return static_cast<uint64_t>(static_cast<double>(whole_bytes) * percent / 100);
}

absl::StatusOr<absl::Duration> ParseDuration(const std::string& text) {
  constexpr char kExpected[] = "a duration such as 60, 60s, 1m30s or 500ms";
  absl::Duration duration;
  double seconds = 0;
  if (ParsePlainNumber(text, &seconds)) {
    duration = absl::Seconds(seconds);
  } else if (!absl::ParseDuration(text, &duration)) {
    return Expected(kExpected, text);
  }
  if (duration < absl::ZeroDuration() || duration > absl::Hours(24 * 3653)) {
    return Expected(kExpected, text);
  }
  return duration;
}

absl::StatusOr<uint64_t> ParseCount(const std::string& text, uint64_t min, uint64_t max) {
  uint64_t count = 0;
  if (text.empty() || text.find_first_not_of("0123456789") != std::string::npos ||
      !absl::SimpleAtoi(text, &count) || count < min || count > max) {
    return Expected(absl::StrFormat("a number from %d to %d", min, max).c_str(), text);
  }
  return count;
}

}  // namespace holdfast
