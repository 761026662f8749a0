// Points in time on CLOCK_MONOTONIC: "how long may I wait".
#ifndef HOLDFAST_HOOK_DEADLINE_H_
#define HOLDFAST_HOOK_DEADLINE_H_

#include <time.h>

#include <algorithm>
#include <cstdint>

namespace holdfast::hook {

inline constexpr int64_t kNsPerMs = 1'000'000;
inline constexpr int64_t kNsPerSecond = 1'000'000'000;

inline int64_t MonotonicNs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * kNsPerSecond + now.tv_nsec;
}

class Deadline {
 public:
  // `duration_ns` from now; HF_FOREVER, like anything that overflows, never passes; a negative one
  // has passed.
  static Deadline After(int64_t duration_ns) {
    const int64_t now_ns = MonotonicNs();
    if (duration_ns > INT64_MAX - now_ns) return Never();
    return At(now_ns + std::max<int64_t>(duration_ns, 0));
  }
  static Deadline At(int64_t monotonic_ns) { return Deadline(monotonic_ns); }
  static Deadline Never() { return Deadline(INT64_MAX); }

  int64_t at_ns() const { return at_ns_; }
  bool never() const { return at_ns_ == INT64_MAX; }
  bool passed() const { return !never() && MonotonicNs() >= at_ns_; }
  int64_t remaining_ns() const {
    return never() ? INT64_MAX : std::max<int64_t>(at_ns_ - MonotonicNs(), 0);
  }
  Deadline Earlier(Deadline other) const { return At(std::min(at_ns_, other.at_ns_)); }

  // For poll(2): rounded up, at most `cap_ms`.
  int PollMs(int cap_ms) const {
    const int64_t remaining = remaining_ns();
    if (remaining >= cap_ms * kNsPerMs) return cap_ms;
    return static_cast<int>((remaining + kNsPerMs - 1) / kNsPerMs);
  }

 private:
  explicit Deadline(int64_t at_ns) : at_ns_(at_ns) {}
  int64_t at_ns_;
};

inline timespec ToTimespec(int64_t ns) {
  timespec result;
  result.tv_sec = ns / kNsPerSecond;
  result.tv_nsec = ns % kNsPerSecond;
  return result;
}

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_DEADLINE_H_
