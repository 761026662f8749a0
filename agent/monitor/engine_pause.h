// Whether what the checkpoint engine does for a job holds up its ranks, so that their standing
// still says nothing of them.
#ifndef HOLDFAST_AGENT_MONITOR_ENGINE_PAUSE_H_
#define HOLDFAST_AGENT_MONITOR_ENGINE_PAUSE_H_

#include <optional>

#include "absl/time/time.h"
#include "checkpoint/engine.h"

namespace holdfast {

// Threads: as a value. One for each attempt.
class EnginePause {
 public:
  // A flush that takes longer holds nobody up any more: training has gone on beside it. A capture
  // that does has no end: its rank never came to wait for it, because it hangs elsewhere.
  static constexpr absl::Duration kFlushMax = absl::Seconds(60);
  static constexpr absl::Duration kCaptureMax = absl::Seconds(60);

  // As of `now`, which does not go back. Asked again and again: an activity counts from when it was
  // first seen.
  bool Holds(const Engine::Activity& activity, absl::Duration now) {
    const bool flushes = IsWithin(activity.flushing, flushing_since_, now, kFlushMax);
    const bool captures = IsWithin(activity.capturing, capturing_since_, now, kCaptureMax);
    return activity.restoring || flushes || captures;
  }

 private:
  static bool IsWithin(bool is_active, std::optional<absl::Duration>& since, absl::Duration now,
                       absl::Duration max) {
    if (!is_active) since.reset();
    if (is_active && !since.has_value()) since = now;
    return is_active && now - *since < max;
  }

  std::optional<absl::Duration> flushing_since_;
  std::optional<absl::Duration> capturing_since_;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_ENGINE_PAUSE_H_
