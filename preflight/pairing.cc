#include "preflight/pairing.h"

namespace holdfast::preflight {

std::vector<std::vector<Pair>> RoundsOf(uint32_t node_count) {
  if (node_count < 2) return {};
  if (node_count == 2) return {{{0, 1}}};
  std::vector<std::vector<Pair>> rounds(2);
  for (uint32_t rank = 0; rank + 1 < node_count; ++rank) {
    rounds[rank % 2].push_back({rank, rank + 1});
  }
  const Pair closing{0, node_count - 1};
  if (node_count % 2 == 0) {
    rounds[1].push_back(closing);
  } else {
    rounds.push_back({closing});
  }
  return rounds;
}

}  // namespace holdfast::preflight
