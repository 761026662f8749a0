#include "base/clock.h"

#include <time.h>

#include "absl/time/clock.h"

namespace holdfast {
namespace {

class SystemClock final : public Clock {
 public:
  absl::Duration Elapsed() const override {
    timespec now{};
    clock_gettime(CLOCK_BOOTTIME, &now);
    return absl::DurationFromTimespec(now);
  }
  absl::Time WallTime() const override { return absl::Now(); }
};

}  // namespace

const Clock& RealClock() {
  static const SystemClock clock;
  return clock;
}

}  // namespace holdfast
