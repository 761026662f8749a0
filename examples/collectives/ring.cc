#include "examples/collectives/ring.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "examples/collectives/collectives.h"

namespace collectives {
namespace {

// The place's part of the segment of the rank at `position` (taken modulo the ring's size).
std::span<std::byte> SegmentBytes(const RingPlace& place, std::span<std::byte> data,
                                  size_t element_bytes, size_t position) {
  const size_t count = data.size() / element_bytes;
  const uint32_t rank = place.order[position % place.size()];
  const Segment segment = SegmentOf(count, place.size(), rank);
  const Segment part = SegmentOf(segment.count, place.part_count, place.part);
  return data.subspan((segment.begin + part.begin) * element_bytes, part.count * element_bytes);
}

template <typename Byte>
void AppendChunks(std::span<Byte> message, size_t chunk_bytes, Chunk chunk,
                  std::vector<Chunk>& chunks) {
  chunk.message_bytes = message.size();
  size_t offset = 0;
  do {
    const std::span<Byte> piece =
        message.subspan(offset, std::min(chunk_bytes, message.size() - offset));
    if constexpr (std::is_const_v<Byte>) {
      chunk.from = piece;
    } else {
      chunk.into = piece;
    }
    chunk.offset_bytes = offset;
    chunks.push_back(chunk);
    offset += piece.size();
  } while (offset < message.size());
}

}  // namespace

Segment SegmentOf(size_t count, size_t parts, size_t part) {
  const size_t base = count / parts;
  const size_t longer = count % parts;
  return {part * base + std::min(part, longer), base + (part < longer ? 1 : 0)};
}

RingOrder StridedRing(uint32_t rank_count, uint32_t index) {
  std::vector<uint32_t> strides;
  for (uint32_t stride = 1; stride < std::max(rank_count, 2u); ++stride) {
    if (std::gcd(stride, rank_count) == 1) strides.push_back(stride);
  }
  const uint64_t stride = strides[index % strides.size()];
  RingOrder order(rank_count);
  for (uint64_t i = 0; i < rank_count; ++i) {
    order[i] = static_cast<uint32_t>(i * stride % rank_count);
  }
  return order;
}

RingProgram ReduceScatterProgram(const RingPlace& place, std::span<std::byte> data,
                                 size_t element_bytes, Combine sum) {
  RingProgram program;
  // A segment starts one place after its owner and comes home in the last step.
  for (size_t step = 0; step + 1 < place.size(); ++step) {
    const size_t home = place.position + 2 * place.size() - step;
    program.push_back({SegmentBytes(place, data, element_bytes, home - 1),
                       SegmentBytes(place, data, element_bytes, home - 2), sum});
  }
  return program;
}

RingProgram AllGatherProgram(const RingPlace& place, std::span<std::byte> data,
                             size_t element_bytes) {
  RingProgram program;
  for (size_t step = 0; step + 1 < place.size(); ++step) {
    const size_t own = place.position + 2 * place.size() - step;
    program.push_back({SegmentBytes(place, data, element_bytes, own),
                       SegmentBytes(place, data, element_bytes, own - 1), Combine::kCopy});
  }
  return program;
}

RingProgram AllReduceProgram(const RingPlace& place, std::span<std::byte> data,
                             size_t element_bytes, Combine sum) {
  RingProgram program = ReduceScatterProgram(place, data, element_bytes, sum);
  const RingProgram gather = AllGatherProgram(place, data, element_bytes);
  program.insert(program.end(), gather.begin(), gather.end());
  return program;
}

RingProgram BroadcastProgram(const RingPlace& place, std::span<std::byte> data, uint32_t root,
                             size_t chunk_bytes) {
  RingProgram program;
  const size_t size = place.size();
  if (size == 1) return program;
  const Segment part = SegmentOf(data.size(), place.part_count, place.part);
  const std::span<std::byte> own = data.subspan(part.begin, part.count);
  const size_t chunk_count = (own.size() + chunk_bytes - 1) / chunk_bytes;
  const auto root_at = std::find(place.order.begin(), place.order.end(), root);
  const size_t root_position = static_cast<size_t>(root_at - place.order.begin());
  const size_t distance = (place.position + size - root_position) % size;
  const auto chunk = [&](size_t index) {
    const size_t begin = index * chunk_bytes;
    return own.subspan(begin, std::min(chunk_bytes, own.size() - begin));
  };
  // In step t the rank at distance d sends chunk t - d and receives chunk t - d + 1, so that what
  // leaves a rank in step t arrives in step t. The last rank sends nothing.
  for (size_t step = 0; step + 2 < chunk_count + size; ++step) {
    RingStep ring_step;
    if (distance + 1 < size && step >= distance && step - distance < chunk_count) {
      ring_step.send = chunk(step - distance);
    }
    if (distance > 0 && step + 1 >= distance && step + 1 - distance < chunk_count) {
      ring_step.receive = chunk(step + 1 - distance);
    }
    program.push_back(ring_step);
  }
  return program;
}

RingProgram BarrierProgram(const RingPlace& place, std::span<std::byte, 2> token) {
  // After step s a rank knows that the s + 1 ranks before it have come.
  return RingProgram(place.size() - 1, {token.first(1), token.last(1), Combine::kCopy});
}

void AppendRingFlows(const RingPlace& place, const RingProgram& program, uint32_t channel,
                     size_t chunk_bytes, std::vector<std::unique_ptr<Flow>>& flows) {
  auto receives = std::make_unique<Flow>(channel, place.previous(), false);
  auto sends = std::make_unique<Flow>(channel, place.next(), true);
  uint32_t received_before = 0;  // receive chunks of all steps before the last one
  std::span<const std::byte> received_last;
  for (size_t step = 0; step < program.size(); ++step) {
    const RingStep& ring_step = program[step];
    const uint32_t received = receives->chunk_count();
    if (!ring_step.send.empty()) {
      const uint32_t first = sends->chunk_count();
      AppendChunks(ring_step.send, chunk_bytes, {.step = static_cast<uint16_t>(step)},
                   sends->chunks);
      // What was received in the step before is passed on chunk by chunk. Anything else (a
      // barrier's byte) waits for all of it.
      const bool passes_on = ring_step.send.data() == received_last.data() &&
                             ring_step.send.size() == received_last.size();
      for (uint32_t i = first; i < sends->chunk_count(); ++i) {
        sends->chunks[i].needs = passes_on ? received_before + (i - first) + 1 : received;
      }
    }
    received_before = received;
    received_last = ring_step.receive;
    if (!ring_step.receive.empty()) {
      AppendChunks(ring_step.receive, chunk_bytes,
                   {.combine = ring_step.combine, .step = static_cast<uint16_t>(step)},
                   receives->chunks);
    }
  }
  if (!sends->chunks.empty() && !receives->chunks.empty()) sends->after = receives.get();
  if (!receives->chunks.empty()) flows.push_back(std::move(receives));
  if (!sends->chunks.empty()) flows.push_back(std::move(sends));
}

std::unique_ptr<Flow> SendFlow(uint32_t channel, uint32_t peer, std::span<const std::byte> message,
                               size_t chunk_bytes) {
  auto flow = std::make_unique<Flow>(channel, peer, true);
  AppendChunks(message, chunk_bytes, {}, flow->chunks);
  return flow;
}

std::unique_ptr<Flow> ReceiveFlow(uint32_t channel, uint32_t peer, std::span<std::byte> message,
                                  size_t chunk_bytes) {
  auto flow = std::make_unique<Flow>(channel, peer, false);
  AppendChunks(message, chunk_bytes, {}, flow->chunks);
  return flow;
}

}  // namespace collectives
