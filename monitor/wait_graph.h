// Who waits for whom, and who is at the end of the chain.
//
// Nodes are ranks, numbered from 0. An edge says that one rank cannot go on before another has done
// something. Whoever waits for nobody while others wait for it is a sink: the cause of all that
// waits for it. If those who wait form a ring that no sink ends, nobody can go on: a deadlock of
// the program.
//
// Tarjan's algorithm, without recursion, so that 10,000 ranks in one chain are no problem: O(nodes
// + edges). wait_graph_test.cc compares it with brute force on all small graphs.
#ifndef HOLDFAST_MONITOR_WAIT_GRAPH_H_
#define HOLDFAST_MONITOR_WAIT_GRAPH_H_

#include <cstdint>
#include <vector>

namespace holdfast::monitor {

struct WaitEdge {
  uint32_t waiter = 0;
  uint32_t awaited = 0;  // != waiter
};

struct WaitRoots {
  struct Sink {
    uint32_t node = 0;
    uint32_t waiters = 0;  // counted nodes that wait for it, directly or not
  };
  std::vector<Sink> sinks;  // ascending by node
  // Strongly connected components of two or more nodes that no edge leaves, each ascending;
  // ascending by their first.
  std::vector<std::vector<uint32_t>> deadlocks;
};

// Edges may repeat. Nodes without edges are in no answer. Nodes from `counted_nodes` on stand for
// something else than ranks (links, operations) and are not counted as waiters. CHECKs that every
// end is below `node_count` and that no node waits for itself.
WaitRoots FindWaitRoots(uint32_t node_count, uint32_t counted_nodes,
                        const std::vector<WaitEdge>& edges);

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_WAIT_GRAPH_H_
