#include "agent/recovery/interval.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/recovery/text.h"

namespace holdfast::recovery {
namespace {

// Until a save was measured.
constexpr absl::Duration kStallAssumed = absl::Seconds(1);
// What costs nothing could be done all the time; the storage would not like it.
constexpr absl::Duration kIntervalMin = absl::Seconds(1);

double DalySeconds(double d, double m) {
  if (d >= 2 * m) return m;
  const double x = d / (2 * m);
  return std::sqrt(2 * d * m) * (1 + std::sqrt(x) / 3 + x / 9) - d;
}

}  // namespace

IntervalInput IntervalInputOf(const Settings& settings, const History& history, absl::Duration now,
                              absl::Duration step, absl::Duration commit) {
  IntervalInput input;
  input.failures = history.failures;
  input.time_alive = history.time_alive;
  if (history.phase == Phase::kAlive || history.phase == Phase::kSaving) {
    const absl::Duration own = now + absl::Microseconds(history.clock_offset_us);
    input.time_alive += std::max(absl::ZeroDuration(), own - history.alive_since);
  }
  input.failure_prior = settings.failure_prior;
  input.restart = history.start_time.value_or(absl::ZeroDuration());
  input.step = step;
  input.commit = commit;
  return input;
}

IntervalChoice ChooseInterval(const IntervalInput& input) {
  IntervalChoice choice;
  const absl::Duration stall = input.stall.value_or(kStallAssumed);
  const absl::Duration prior = std::max(input.failure_prior, absl::Seconds(1));
  choice.between_failures = (prior + input.time_alive) / (int64_t{1} + input.failures);
  const double d = absl::ToDoubleSeconds(stall);
  const double m = absl::ToDoubleSeconds(choice.between_failures);
  choice.interval = absl::Seconds(DalySeconds(d, m));
  const char* bound = "";
  if (choice.interval < kIntervalMin) choice.interval = kIntervalMin;
  if (choice.interval < input.commit) {
    choice.interval = input.commit;
    bound = ", which is as fast as the storage commits";
  }
  if (input.step > absl::ZeroDuration()) {
    choice.steps = static_cast<uint64_t>(
        std::max(1.0, std::round(absl::FDivDuration(choice.interval, input.step))));
    choice.interval = input.step * static_cast<double>(choice.steps);
  }
  const double t = absl::ToDoubleSeconds(choice.interval);
  choice.overhead = std::min(1.0, d / t + t / (2 * m) + absl::ToDoubleSeconds(input.restart) / m);
  const std::string every = choice.steps == 0
                                ? absl::StrCat("every ", DurationText(choice.interval))
                                : absl::StrFormat("every %s steps (%s)", CountText(choice.steps),
                                                  DurationText(choice.interval));
  const std::string cost =
      !input.stall.has_value()
          ? absl::StrFormat("a save is assumed to take %s from training until one was measured",
                            DurationText(stall))
          : absl::StrFormat("a save takes %s from training", DurationText(stall));
  choice.sentence = absl::StrFormat(
      "every = auto: a save %s%s: %s, and a failure is expected every %s (%d in %s, and one in %s "
      "assumed); together they take %.1f%% of the time.",
      every, bound, cost, DurationText(choice.between_failures), input.failures,
      DurationText(input.time_alive), DurationText(prior), choice.overhead * 100);
  return choice;
}

}  // namespace holdfast::recovery
