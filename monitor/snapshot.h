// What the analysis sees at one instant: the summaries that have arrived since the last one, and
// what is known of the job from elsewhere. Plain values; no clock but the receiver's, which only
// orders arrivals and ages reports.
#ifndef HOLDFAST_MONITOR_SNAPSHOT_H_
#define HOLDFAST_MONITOR_SNAPSHOT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "base/ids.h"
#include "monitor/summary.h"
#include "monitor/testimony.h"
#include "monitor/topology.h"

namespace holdfast::monitor {

// Where a rank stands. `stage` and `tensor_position` come from the layout; `nic_class` and `leaf`
// from a topology file. Ranks are compared only with ranks that are equal in what matters.
struct RankPlace {
  uint32_t node = 0;
  uint32_t stage = 0;
  uint32_t tensor_position = 0;
  uint32_t rail = 0;
  uint32_t nic_class = 0;
  uint32_t leaf = 0;
  uint32_t local_rank = kNoLocalRank;
  Port port;  // of the topology file, for people; without a NIC: not known
};

struct JobShape {
  std::vector<RankPlace> ranks;  // by global rank; its size is the world size
  // By number of node, for people; a node beyond them is not known by name. Empty: nodes are
  // called by their numbers.
  std::vector<std::string> node_names;
  // Whether rail, nic_class and leaf were given for every rank. If not, a connection that has been
  // slow from the start is not told from a slower kind of NIC.
  bool topology_known = false;
};

struct Snapshot {
  absl::Duration elapsed;  // on the receiver's monotonic clock
  // The longest time by which the receiver itself was late since the last snapshot.
  absl::Duration receiver_gap;
  std::vector<NodeSummary> arrived;  // in any order; a summary may come late, twice or never
  // What other witnesses have said since the last snapshot, in any order; may be empty for ever.
  std::vector<Testimony> testimonies;
};

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_SNAPSHOT_H_
