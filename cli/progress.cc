#include "cli/progress.h"

#include <unistd.h>

#include <cstdio>

#include "absl/strings/str_format.h"

namespace holdfast::cli {

std::string HumanBytes(uint64_t bytes) {
  if (bytes < 1024) return absl::StrFormat("%d B", bytes);
  static constexpr const char* kUnits[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  double value = static_cast<double>(bytes) / 1024;
  size_t unit = 0;
  while (value >= 1023.95 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  return absl::StrFormat("%.1f %s", value, kUnits[unit]);
}

Progress::Progress(std::string what, Display display, const Clock& clock)
    : what_(std::move(what)),
      clock_(clock),
      shown_(display == Display::kAutomatic && isatty(STDERR_FILENO) == 1),
      begun_(clock.Elapsed()) {}

Progress::~Progress() {
  if (shown_) std::fputs("\r\033[K", stderr);
}

void Progress::Update(uint64_t bytes_done, uint64_t bytes_total) {
  const absl::Duration now = clock_.Elapsed();
  if (!shown_ || now - drawn_at_ < absl::Milliseconds(100)) return;
  drawn_at_ = now;
  const double seconds = absl::ToDoubleSeconds(now - begun_);
  const double rate = seconds > 0 ? static_cast<double>(bytes_done) / seconds : 0;
  const double percent =
      bytes_total > 0 ? 100.0 * static_cast<double>(bytes_done) / static_cast<double>(bytes_total)
                      : 100.0;
  std::string left = "?";
  if (rate > 0 && bytes_total >= bytes_done) {
    left = absl::FormatDuration(absl::Trunc(
        absl::Seconds(static_cast<double>(bytes_total - bytes_done) / rate), absl::Seconds(1)));
  }
  const std::string line = absl::StrFormat("\r\033[K%s: %s of %s (%.0f%%), %s/s, %s left", what_,
                                           HumanBytes(bytes_done), HumanBytes(bytes_total), percent,
                                           HumanBytes(static_cast<uint64_t>(rate)), left);
  std::fputs(line.c_str(), stderr);
  std::fflush(stderr);
}

}  // namespace holdfast::cli
