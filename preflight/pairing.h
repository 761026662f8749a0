// Who is measured with whom: the ring of ranks, cut into rounds, so that every node is in exactly
// two pairs with different partners. A bad node then shows in both of its pairs, a bad pair in one.
//
// An even number of nodes needs two rounds. A ring of odd length cannot be cut into two: the last
// rank sits out the first round, rank 0 the second, and the pair of these two has a short third
// round for itself. Two nodes have one pair, and one node none.
#ifndef HOLDFAST_PREFLIGHT_PAIRING_H_
#define HOLDFAST_PREFLIGHT_PAIRING_H_

#include <cstdint>
#include <vector>

namespace holdfast::preflight {

struct Pair {
  uint32_t a = 0;  // ranks, a < b
  uint32_t b = 0;
  friend bool operator==(const Pair&, const Pair&) = default;
};

// The pairs of each round; within one no rank comes twice.
std::vector<std::vector<Pair>> RoundsOf(uint32_t node_count);

}  // namespace holdfast::preflight

#endif  // HOLDFAST_PREFLIGHT_PAIRING_H_
