// Turns boards into the edges of the wait-for graph.
//
// A wait state alone says too little: a receiver without data waits for its peer's GPU, for the
// peer to come at all, or for the wire, and only the other end of the same connection tells which.
// So every edge is read from both ends:
//
//   receiver waits for data; the sending end ...      then it waits for
//     has not begun this operation                    the peer: not entered
//     waits for its GPU                               the peer: no data
//     has posted, or waits for our credit             the link from peer to us
//     is further than we are                          the link; ourselves if our proxy starves
//   sender waits for credit; the receiving end ...
//     has not begun                                   the peer: not entered
//     waits for its GPU                               the peer: no credit
//     waits for data                                  the link from us to the peer
//   sender waits for completion                       the link from us to the peer
//
// Waits for the local GPU give no edge: beside one of the above they follow from it. Alone they
// mean the GPU itself, unless members of the communicator share its node: what passes between those
// is not visible, so it may as well wait for them (a node of the graph that stands for their
// NVLink). A process that cannot run (dead, stopped, silent, starved) waits for nobody, whatever
// its board shows, and a link to it is not blamed. Operations that show no connection wait, by
// their counters, for those who never enqueued them.
#ifndef HOLDFAST_MONITOR_WAIT_EDGES_H_
#define HOLDFAST_MONITOR_WAIT_EDGES_H_

#include <cstdint>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "base/ids.h"
#include "monitor/job_state.h"
#include "monitor/wait_graph.h"

namespace holdfast::monitor {

enum class WaitReason : uint8_t { kNotEntered, kNoData, kNoCredit, kWire, kBlind, kOperation };

struct ReasonedEdge {
  WaitEdge ends;
  uint64_t communicator = 0;
  WaitReason reason{};
  bool point_to_point = false;
  // How long both ends stood, each on its own clock, the awaited one since the report that came
  // with the waiter's first (Drawing::Both): below the threshold the edge shapes the graph and
  // accuses nobody.
  absl::Duration standing;
};

// Nodes from 0 are ranks; behind them come links, operations, insides of nodes, and members whose
// rank nobody told us.
struct WaitPicture {
  uint32_t rank_count = 0;
  uint32_t node_count = 0;
  std::vector<ReasonedEdge> edges;
  std::map<uint32_t, std::pair<Rank, Rank>> links;                    // by node: from, to
  std::map<uint32_t, uint64_t> operations;                            // by node: communicator
  std::map<uint32_t, uint64_t> insides;                               // by node: communicator
  std::map<uint32_t, std::pair<uint64_t, uint32_t>> unknown_members;  // communicator, index
};

WaitPicture DrawWaits(const JobState& state);

// Whether the proxy threads of the rank got so little CPU that its board is not to be believed.
bool IsStarved(const JobState& state, Rank rank);

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_WAIT_EDGES_H_
