// What others would say of the same telemetry: our own re-implementations, from what is published,
// of four ways to find a faulty rank. They are here to be compared with and for nothing else. None
// of them is the original: where a rule is not published, the choice is written beside it.
#ifndef HOLDFAST_BENCH_MONITOR_BASELINES_H_
#define HOLDFAST_BENCH_MONITOR_BASELINES_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "monitor/snapshot.h"

namespace holdfast::monitor {

struct Alarm {
  absl::Duration at;
  std::vector<Rank> suspects;  // empty: it names nobody
};

// Threads: one at a time.
class Baseline {
 public:
  virtual ~Baseline() = default;
  virtual std::string name() const = 0;
  virtual void Step(const Snapshot& snapshot) = 0;
  // The first alarm after `from`, if there is one. To be asked once, at the end.
  virtual std::optional<Alarm> First(absl::Duration from) const = 0;
};

// - watchdog 600 s: an operation that is open for 600 s (computed from its age at the end, not
// waited
//   for); names nobody.
// - counts (RAS): every 5 s the collectives enqueued per communicator; ranks behind the others, the
//   same ones in three polls without any change, are named, as `ncclras` prints them.
// - largest z: in windows of 5 s the mean time of an operation per rank; the rank with the largest
//   z-score, if it is above 2 and the same in three windows.
// - C4 rules: no progress for 10 s: the lowest count of collectives, or if equal the fewest
// finished
//   steps; slow: the delay matrix (all cells together, above 1.5 times the median) or the rank that
//   waits for its peers less than 0.75 times as long as the median, in three windows. (The paper's
//   thresholds are not published.)
std::vector<std::unique_ptr<Baseline>> MakeBaselines(const JobShape& shape);

}  // namespace holdfast::monitor

#endif  // HOLDFAST_BENCH_MONITOR_BASELINES_H_
