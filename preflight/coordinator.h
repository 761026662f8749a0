// Rank 0's other part: waits for all nodes, has each measure itself and then the pairs, round by
// round, and decides. It measures nothing itself.
//
// A node that does not come, goes, or does not answer in time is named, and ends it for all: what
// is missing cannot be compared. Every node hears the same outcome.
#ifndef HOLDFAST_PREFLIGHT_COORDINATOR_H_
#define HOLDFAST_PREFLIGHT_COORDINATOR_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "preflight/handshake.h"
#include "preflight/measurements.h"
#include "preflight/messages.h"
#include "preflight/odd.h"

namespace holdfast::preflight {

// Above it, one process could not hold the connections of all.
inline constexpr uint32_t kNodeCountMax = 10'000;

// What a node may take alone besides its measuring: touching memory, the last transfers of its
// disk.
inline constexpr absl::Duration kAlonePatience = absl::Seconds(60);

struct CoordinatorOptions {
  uint32_t node_count = 1;
  absl::Duration measure_for;  // all measuring together
  absl::Duration join_within;
  absl::Duration alone_patience = kAlonePatience;
  double slow_ratio = kSlowRatio;
  // One line for people, now and then.
  std::function<void(const std::string&)> progress = {};
};

struct Report {
  Outcome outcome = Outcome::kFailed;
  std::string failure;            // why it could not be done
  std::vector<uint32_t> missing;  // ranks that did not come, went, or did not answer
  JobMeasurements job;            // if it could be done
  std::vector<Finding> findings;
  std::vector<Refusal> refusals;  // who was turned away at the door of rank 0
  uint32_t refusal_count = 0;
};

// Blocks until it is over; every wait has a deadline.
// Lifetime: `listener` outlives the call.
Report Coordinate(const CoordinatorOptions& options, Listener& listener);

// How long the whole may take after all have come, at most.
absl::Duration WholeWithin(absl::Duration measure_for, uint32_t node_count);

}  // namespace holdfast::preflight

#endif  // HOLDFAST_PREFLIGHT_COORDINATOR_H_
