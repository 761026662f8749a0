// Ring algorithms as data: which bytes a rank sends to its next neighbour and receives from its
// previous one, step by step, and how they become flows of chunks. Pure functions; the device and
// the proxy perform them.
//
// A communicator has one ring or several, each over all its ranks in an order of its own. Each ring
// is a channel and moves its part of everybody's data.
//
// Invariant: what the rank at position p of a ring sends in step s has exactly the size that the
// rank at p + 1 expects in step s, so empty messages can be left out on both sides.
#ifndef HOLDFAST_EXAMPLES_COLLECTIVES_RING_H_
#define HOLDFAST_EXAMPLES_COLLECTIVES_RING_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "examples/collectives/operation.h"

namespace collectives {

// Ranks of a communicator (positions in its list of ranks) in the order of a ring.
using RingOrder = std::vector<uint32_t>;

// The order of ring `index` of `rank_count` ranks where none was chosen: in strides of the
// index-th number that has no divisor in common with rank_count, over again where there are no
// more. Two different strides share no connection.
RingOrder StridedRing(uint32_t rank_count, uint32_t index);

// A rank's place in a ring, and the part of the data that the ring moves.
struct RingPlace {
  std::span<const uint32_t> order;
  size_t position = 0;
  size_t part = 0;
  size_t part_count = 1;

  size_t size() const { return order.size(); }
  uint32_t next() const { return order[(position + 1) % order.size()]; }
  uint32_t previous() const { return order[(position + order.size() - 1) % order.size()]; }
};

// What is sent in a step has been received in the step before, but for the first one.
struct RingStep {
  std::span<const std::byte> send;
  std::span<std::byte> receive;
  Combine combine = Combine::kCopy;
};
using RingProgram = std::vector<RingStep>;

// Each of these is for `data` of whole elements of `element_bytes`, cut by SegmentOf().
RingProgram ReduceScatterProgram(const RingPlace& place, std::span<std::byte> data,
                                 size_t element_bytes, Combine sum);
RingProgram AllGatherProgram(const RingPlace& place, std::span<std::byte> data,
                             size_t element_bytes);
// Reduce-scatter, then all-gather.
RingProgram AllReduceProgram(const RingPlace& place, std::span<std::byte> data,
                             size_t element_bytes, Combine sum);
// Passed on from neighbour to neighbour in pieces of at most `chunk_bytes`, as a pipeline.
RingProgram BroadcastProgram(const RingPlace& place, std::span<std::byte> data, uint32_t root,
                             size_t chunk_bytes);
// `token`: one byte that is sent and one that is received, of any value.
RingProgram BarrierProgram(const RingPlace& place, std::span<std::byte, 2> token);

// Appends the flows of a program, first what is received, as NCCL does; none for an empty one.
void AppendRingFlows(const RingPlace& place, const RingProgram& program, uint32_t channel,
                     size_t chunk_bytes, std::vector<std::unique_ptr<Flow>>& flows);

// One flow with the chunks of a message; one of zero bytes has one empty chunk.
std::unique_ptr<Flow> SendFlow(uint32_t channel, uint32_t peer, std::span<const std::byte> message,
                               size_t chunk_bytes);
std::unique_ptr<Flow> ReceiveFlow(uint32_t channel, uint32_t peer, std::span<std::byte> message,
                                  size_t chunk_bytes);

}  // namespace collectives

#endif  // HOLDFAST_EXAMPLES_COLLECTIVES_RING_H_
