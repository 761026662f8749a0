// Elements of a tensor-parallel shard as ranges of the whole tensor (converter/shard_map.h): what a
// writer puts into a storage for one rank.
#ifndef HOLDFAST_CONVERTER_SHARD_RANGES_H_
#define HOLDFAST_CONVERTER_SHARD_RANGES_H_

#include <cstdint>
#include <vector>

#include "converter/shard_map.h"
#include "converter/torch_output.h"

namespace holdfast::converter {

// Appends elements [begin, end) of the shard, in its order: ranges of `tensor_state`, which has the
// shape of the whole tensor, and kZeroElements where the shard has padding. CHECKs end <=
// map.shard_elements.
void AppendShard(const ShardMap& map, uint32_t tensor_state, uint64_t begin, uint64_t end,
                 std::vector<ElementRange>& ranges);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_SHARD_RANGES_H_
