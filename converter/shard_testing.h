// For tests: shards seen element by element.
#ifndef HOLDFAST_CONVERTER_SHARD_TESTING_H_
#define HOLDFAST_CONVERTER_SHARD_TESTING_H_

#include <cstdint>
#include <vector>

#include "converter/shard_map.h"
#include "format/tensor_piece.h"

namespace holdfast::converter {

inline constexpr uint64_t kPaddingElement = UINT64_MAX;

// For every element of the shard its number in the whole tensor, by the map's own blocks (which
// shard_map_test proves against slicing).
inline std::vector<uint64_t> ElementsOf(const ShardMap& map) {
  std::vector<uint64_t> elements(map.shard_elements, kPaddingElement);
  const TensorState state{
      .tensor = "t", .state = "param", .dtype = Dtype::kInt8, .shape = map.shape};
  for (const ShardBlock& block : map.blocks) {
    BoxTable boxes;
    const Piece piece{.tensor_state = 0,
                      .box = boxes.Add(block.lo, block.size),
                      .begin = 0,
                      .end = block.ElementCount()};
    for (uint64_t i = 0; i < piece.end; ++i) {
      elements[block.shard_begin + i] = ElementInTensor(piece, boxes, state, i);
    }
  }
  return elements;
}

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_SHARD_TESTING_H_
