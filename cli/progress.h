// A line on standard error that says how far a long verb is: bytes, percent, rate, time left.
// Silent where standard error is no terminal, or with --no-progress.
#ifndef HOLDFAST_CLI_PROGRESS_H_
#define HOLDFAST_CLI_PROGRESS_H_

#include <cstdint>
#include <string>

#include "absl/time/time.h"
#include "base/clock.h"

namespace holdfast::cli {

// 1536 -> "1.5 KiB"; below 1024 without a fraction: "12 B".
std::string HumanBytes(uint64_t bytes);

// Threads: one. Lifetime: the clock outlives it. The destructor clears the line.
class Progress {
 public:
  enum class Display { kAutomatic, kNever };
  Progress(std::string what, Display display, const Clock& clock);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // Draws at most ten times a second.
  void Update(uint64_t bytes_done, uint64_t bytes_total);

 private:
  const std::string what_;
  const Clock& clock_;
  const bool shown_;
  const absl::Duration begun_;
  absl::Duration drawn_at_ = -absl::InfiniteDuration();
};

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_PROGRESS_H_
