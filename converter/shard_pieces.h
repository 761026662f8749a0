// Brings a tensor of a torch file into a ForeignIndex as the part of a tensor state that it is: a
// box of it (a DCP chunk, a shard), several boxes (a strided shard), or a range of its row-major
// order (a slice of a flat parameter). Of tensors that are whole converter/torch_index.h has more;
// this one also knows torch files that are compressed as a whole.
#ifndef HOLDFAST_CONVERTER_SHARD_PIECES_H_
#define HOLDFAST_CONVERTER_SHARD_PIECES_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "converter/dtensor_shards.h"
#include "converter/foreign_index.h"
#include "converter/torch_file.h"

namespace holdfast::converter {

// Where the bytes of a torch file are.
struct TorchPlace {
  uint32_t file = 0;
  uint64_t begin_bytes = 0;  // of the torch file within it (an item of a DCP file)
  // The torch file is the decoded form of this extent; file and begin_bytes do not count.
  std::optional<uint32_t> extent = {};
};

// The runs of a box [offsets, offsets + sizes), for AddShard.
std::vector<std::vector<ShardRun>> RunsOfBox(std::span<const uint64_t> offsets,
                                             std::span<const uint64_t> sizes);

// Adds that `tensor` of `torch` has the elements of state number `tensor_state` that are in these
// runs of its dimensions, in the order of the runs. Nothing is added if there are none.
// Errors, naming the state: kDataLoss (another dtype or shape than the runs give),
// kResourceExhausted (too many boxes).
absl::Status AddShard(const TorchFile& torch, const TorchTensor& tensor, const TorchPlace& place,
                      std::span<const std::vector<ShardRun>> runs, uint32_t tensor_state,
                      ForeignIndex& index);

// The same of a state that has this tensor's shape.
absl::Status AddWholeShard(const TorchFile& torch, const TorchTensor& tensor,
                           const TorchPlace& place, uint32_t tensor_state, ForeignIndex& index);

// Elements [from, from + count) of a contiguous tensor are elements [begin, begin + count) of the
// row-major order of the state. Nothing is checked of either shape; Finish checks the ranges.
absl::Status AddFlatRange(const TorchFile& torch, const TorchTensor& tensor,
                          const TorchPlace& place, uint64_t from, uint32_t tensor_state,
                          uint64_t begin, uint64_t count, ForeignIndex& index);

// kDataLoss if a state has more than kTensorBytesMax bytes: arithmetic on its elements would
// overflow.
absl::Status CheckShape(std::string_view where, const TensorState& state);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_SHARD_PIECES_H_
