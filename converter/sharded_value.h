// What a pickled tensor of one rank is a part of: DTensor (FSDP2, HSDP, tensor parallelism) and
// ShardedTensor (FSDP1) describe their whole inside of the pickle, so that each rank's file can be
// read without the others.
//
//   DTensor        _local_tensor, and a _spec of mesh and placements. The mesh says its sizes and
//                  the rank's own coordinate; converter/dtensor_shards.h does the rest.
//   ShardedTensor  local shards, each with its box.
//   a plain tensor is its own whole.
//
// Sources: torch 2.13, torch/distributed/{device_mesh,_mesh_layout}.py, tensor/_dtensor_spec.py,
// _shard/sharded_tensor/{api,shard,metadata}.py.
#ifndef HOLDFAST_CONVERTER_SHARDED_VALUE_H_
#define HOLDFAST_CONVERTER_SHARDED_VALUE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "converter/dtensor_shards.h"
#include "converter/torch_file.h"
#include "format/dtype.h"

namespace holdfast::converter {

struct ShardedPart {
  const TorchTensor* local = nullptr;
  std::vector<std::vector<ShardRun>> runs = {};  // of the whole, per dimension, in the local order
};

struct ShardedValue {
  enum class Kind : uint8_t { kPlain, kDTensor, kShardedTensor };
  Kind kind = Kind::kPlain;
  Dtype dtype = Dtype::kFloat32;
  std::vector<uint64_t> shape;  // of the whole
  std::vector<ShardedPart> parts;
  std::string layout;  // for people: "mesh (2, 2) dp, tp: [StridedShard(0, 2), Shard(0)]"
};

// Nothing if the value is no tensor. Lifetime: the result refers to the value's file.
// Errors: kDataLoss (what describes the whole contradicts itself, or is not there), kUnimplemented
// (a Partial placement: the sum over ranks that the value would be is nowhere), kPermissionDenied
// (a class that is not known).
absl::StatusOr<std::optional<ShardedValue>> ReadShardedValue(TorchValue value);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_SHARDED_VALUE_H_
