#include "examples/collectives/ring.h"

#include <algorithm>

#include "examples/collectives/collectives.h"

namespace collectives {
namespace {

// Segment of `data` number `index` (taken modulo the ring's size, and up to one turn below zero).
std::span<std::byte> SegmentBytes(RingPlace place, std::span<std::byte> data, size_t element_bytes,
                                  size_t index_plus_size) {
  const Segment segment =
      SegmentOf(data.size() / element_bytes, place.size, index_plus_size % place.size);
  return data.subspan(segment.begin * element_bytes, segment.count * element_bytes);
}

}  // namespace

Segment SegmentOf(size_t count, size_t parts, size_t part) {
  const size_t base = count / parts;
  const size_t longer = count % parts;
  return {part * base + std::min(part, longer), base + (part < longer ? 1 : 0)};
}

RingProgram ReduceScatterProgram(RingPlace place, std::span<std::byte> data, size_t element_bytes,
                                 Combine sum) {
  RingProgram program;
  // A segment starts one place after its owner and comes home in the last step.
  for (size_t step = 0; step + 1 < place.size; ++step) {
    const size_t home = place.rank + 2 * place.size - step;
    program.push_back({SegmentBytes(place, data, element_bytes, home - 1),
                       SegmentBytes(place, data, element_bytes, home - 2), sum});
  }
  return program;
}

RingProgram AllGatherProgram(RingPlace place, std::span<std::byte> data, size_t element_bytes) {
  RingProgram program;
  for (size_t step = 0; step + 1 < place.size; ++step) {
    const size_t own = place.rank + 2 * place.size - step;
    program.push_back({SegmentBytes(place, data, element_bytes, own),
                       SegmentBytes(place, data, element_bytes, own - 1), Combine::kCopy});
  }
  return program;
}

RingProgram AllReduceProgram(RingPlace place, std::span<std::byte> data, size_t element_bytes,
                             Combine sum) {
  RingProgram program = ReduceScatterProgram(place, data, element_bytes, sum);
  const RingProgram gather = AllGatherProgram(place, data, element_bytes);
  program.insert(program.end(), gather.begin(), gather.end());
  return program;
}

RingProgram BroadcastProgram(RingPlace place, std::span<std::byte> data, size_t root,
                             size_t chunk_bytes) {
  RingProgram program;
  if (place.size == 1) return program;
  const size_t chunk_count = (data.size() + chunk_bytes - 1) / chunk_bytes;
  const size_t distance = (place.rank + place.size - root) % place.size;
  const auto chunk = [&](size_t index) {
    const size_t begin = index * chunk_bytes;
    return data.subspan(begin, std::min(chunk_bytes, data.size() - begin));
  };
  // In step t the rank at distance d sends chunk t - d and receives chunk t - d + 1, so that what
  // leaves a rank in step t arrives in step t. The last rank sends nothing.
  for (size_t step = 0; step + 2 < chunk_count + place.size; ++step) {
    RingStep ring_step;
    if (distance + 1 < place.size && step >= distance && step - distance < chunk_count) {
      ring_step.send = chunk(step - distance);
    }
    if (distance > 0 && step + 1 >= distance && step + 1 - distance < chunk_count) {
      ring_step.receive = chunk(step + 1 - distance);
    }
    program.push_back(ring_step);
  }
  return program;
}

RingProgram BarrierProgram(RingPlace place, std::span<std::byte, 2> token) {
  // After step s a rank knows that the s + 1 ranks before it have come.
  return RingProgram(place.size - 1, {token.first(1), token.last(1), Combine::kCopy});
}

}  // namespace collectives
