// Which node or pair is odd, given what was measured: pure functions, and the thresholds.
//
// Nothing here knows what is good: the nodes of a job are compared with each other. A value counts
// as bad if it is worse than the job's reference by a ratio, by a number of robust deviations, and
// by an amount that anybody would care about. All is computed on logarithms, so that "half as fast"
// and "twice as long" are the same distance.
//
// The reference of a measurement of nodes is the median of the nodes. One bad node spoils two
// pairs, which may be most of a small job's, so the reference of a measurement of pairs is the
// median over all ends (nodes, as senders and as receivers) of the best value in which the end took
// part: a bad node spoils its own best value only.
//
// Who is to blame for bad pairs is the smallest number of causes that explains them, where a cause
// is an end all of whose pairs are bad, or one pair (Explain).
#ifndef HOLDFAST_PREFLIGHT_ODD_H_
#define HOLDFAST_PREFLIGHT_ODD_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "preflight/measurements.h"

namespace holdfast::preflight {

enum class PairMetric { kOneWay, kBothWays, kRoundTrip, kRoundTripP99 };
inline constexpr size_t kPairMetricCount = 4;

enum class Unit { kBytesPerSecond, kStepsPerSecond, kSeconds };

struct MetricRule {
  const char* name;  // in JSON: "disk_sync"
  const char* text;  // for people: "disk sync"
  Unit unit;
  // Bad from this ratio to the reference on, in the direction that is bad for the unit (less of a
  // rate, more of a time)...
  double ratio;
  // ... and from this difference on; for rates 0.
  double difference_min;
};
const MetricRule& RuleOf(NodeMetric metric);
const MetricRule& RuleOf(PairMetric metric);

// The least that --slow-ratio takes as bad by default; larger values raise all ratios below them,
// and the differences in proportion.
inline constexpr double kSlowRatio = 1.25;
// Robust deviations (1.4826 times the median of the absolute deviations, of logarithms), and their
// least size: without it, nodes that agree to the last digit would make any difference odd.
inline constexpr double kDeviations = 5;
inline constexpr double kDeviationMin = 0.04;
// A wall clock is set (stepped) if it moves by more than reading two clocks one after the other can
// explain, and wrong if it is so far from the median of the job's: certificates and leases begin to
// fail with that.
inline constexpr double kClockStepMaxSeconds = 0.01;
inline constexpr double kClockOffsetMaxSeconds = 0.5;

// "1.20 GB/s", "834 M/s", "0.25 ms".
std::string ValueText(Unit unit, double value);

// Why somebody is named.
struct Evidence {
  std::string metric;  // MetricRule::name, or "clock_step", "clock_offset", "disk", "connection"
  std::string text;    // one clause for people
};

struct Finding {
  enum class Subject {
    kNode,       // ranks: one
    kPair,       // ranks: two; each of them is well with its other partner
    kUndecided,  // ranks: at least one of them is odd; which one cannot be told
  };
  Subject subject = Subject::kNode;
  std::vector<uint32_t> ranks;
  std::vector<Evidence> evidence;  // not empty
};
const char* Name(Finding::Subject subject);

// One sentence, with the hosts of the ranks.
std::string Sentence(const Finding& finding, const JobMeasurements& job);

// Nodes first, then pairs, then undecided ones, each by rank; no subject twice. CHECKs that the
// ranks of pairs are below the number of nodes.
std::vector<Finding> FindOddOnes(const JobMeasurements& job, double slow_ratio);

// What explains bad edges of a graph in which every vertex has at most two edges: see above.
struct Explanation {
  std::vector<size_t> vertices;
  std::vector<size_t> edges;
  // A connected part of the bad edges that has several smallest explanations: its edges, and the
  // vertices that occur in any of them; at least one of these is bad in all.
  struct Undecided {
    std::vector<size_t> vertices;
    std::vector<size_t> edges;
  };
  std::vector<Undecided> undecided;
};
Explanation Explain(size_t vertex_count, const std::vector<std::pair<size_t, size_t>>& edges,
                    const std::vector<bool>& bad);

}  // namespace holdfast::preflight

#endif  // HOLDFAST_PREFLIGHT_ODD_H_
