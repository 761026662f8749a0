// Ring algorithms as data: which bytes a rank sends to its next neighbour and receives from its
// previous one, step by step. Pure functions; proxy.cc performs the steps.
//
// Invariant: what rank r sends in step s has exactly the size that rank r + 1 expects in step s, so
// empty messages can be left out on both sides.
#ifndef HOLDFAST_EXAMPLES_COLLECTIVES_RING_H_
#define HOLDFAST_EXAMPLES_COLLECTIVES_RING_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "examples/collectives/wire.h"

namespace collectives {

// Send and receive of one step run at the same time; the next step begins when both are done.
struct RingStep {
  std::span<const std::byte> send;
  std::span<std::byte> receive;
  Combine combine = Combine::kCopy;
};
using RingProgram = std::vector<RingStep>;

// A rank's place in a ring.
struct RingPlace {
  size_t rank = 0;
  size_t size = 1;
};

// Each of these is for `data` of whole elements of `element_bytes`, cut by SegmentOf().
RingProgram ReduceScatterProgram(RingPlace place, std::span<std::byte> data, size_t element_bytes,
                                 Combine sum);
RingProgram AllGatherProgram(RingPlace place, std::span<std::byte> data, size_t element_bytes);
// Reduce-scatter, then all-gather.
RingProgram AllReduceProgram(RingPlace place, std::span<std::byte> data, size_t element_bytes,
                             Combine sum);
// Passed on from neighbour to neighbour in pieces of at most `chunk_bytes`, as a pipeline.
RingProgram BroadcastProgram(RingPlace place, std::span<std::byte> data, size_t root,
                             size_t chunk_bytes);
// `token`: one byte that is sent and one that is received, of any value.
RingProgram BarrierProgram(RingPlace place, std::span<std::byte, 2> token);

}  // namespace collectives

#endif  // HOLDFAST_EXAMPLES_COLLECTIVES_RING_H_
