// Which part of a tensor a rank holds under PyTorch's DTensor placements (and so under FSDP2, HSDP
// and tensor parallelism): placements are applied to the tensor from the first mesh dimension to
// the last, each to what the ones before it have left.
//
//   Replicate()           all of it
//   Shard(d)              torch.chunk: ceil(n / ranks) of dimension d each, the last ones fewer or
//                         none
//   _StridedShard(d, f)   what another mesh dimension will cut into f parts first: each of f parts
//                         is cut into as many as there are ranks, and a rank holds its piece of
//                         every part, one behind the other. FSDP2 above tensor parallelism.
//
// A rank's rows are therefore runs of rows. Source: torch 2.13,
// torch/distributed/tensor/{_utils,placement_types}.py.
#ifndef HOLDFAST_CONVERTER_DTENSOR_SHARDS_H_
#define HOLDFAST_CONVERTER_DTENSOR_SHARDS_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

namespace holdfast::converter {

// Runs of one dimension: more of them are refused. A rank has one per part of every strided shard.
inline constexpr size_t kShardRunsMax = 4096;

struct Placement {
  enum class Kind : uint8_t { kReplicate, kShard, kStridedShard };
  Kind kind = Kind::kReplicate;
  uint64_t dim = 0;           // of the tensor
  uint64_t split_factor = 1;  // kStridedShard
};

struct MeshDim {
  uint64_t ranks = 1;
  uint64_t coordinate = 0;  // of the rank in question
};

// Elements [begin, begin + size) of a dimension of the tensor. Never empty.
struct ShardRun {
  uint64_t begin = 0;
  uint64_t size = 0;
  friend bool operator==(const ShardRun&, const ShardRun&) = default;
};

// For every dimension of the tensor the runs that the rank holds, in the order in which its local
// tensor has them; no run: it holds nothing. Adjacent runs are joined. `mesh` and `placements` go
// together, one by one. Errors: kInvalidArgument (a dimension, coordinate or split factor out of
// range, different numbers of mesh dimensions and placements), kResourceExhausted (kShardRunsMax).
absl::StatusOr<std::vector<std::vector<ShardRun>>> ShardRuns(std::span<const uint64_t> shape,
                                                             std::span<const MeshDim> mesh,
                                                             std::span<const Placement> placements);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_DTENSOR_SHARDS_H_
