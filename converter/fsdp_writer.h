// Writes a checkpoint as the rank files of a job with FSDP2 (torch.distributed.fsdp.fully_shard),
// under the names that verl gives them:
//
//   model_world_size_<W>_rank_<R>.pt   {name: DTensor}, buffers as plain tensors
//   optim_world_size_<W>_rank_<R>.pt   {"state": {name: {key: DTensor}}, "param_groups": [...]}
//
// Every parameter is Shard(0) of a mesh of one axis, "fsdp", cut as torch.chunk cuts; its states
// too, single numbers are plain tensors. The optimizer's dict has names instead of numbers, which
// Optimizer.load_state_dict and set_optimizer_state_dict take alike. torch.load(weights_only=True)
// opens both once torch.distributed.tensor is imported. Source: torch/distributed/tensor/_api.py,
// _dtensor_spec.py, torch/distributed/device_mesh.py of torch 2.13.
#ifndef HOLDFAST_CONVERTER_FSDP_WRITER_H_
#define HOLDFAST_CONVERTER_FSDP_WRITER_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "converter/foreign_index.h"
#include "converter/torch_output.h"

namespace holdfast::converter {

inline constexpr uint64_t kFsdpRanksMax = 65'536;

// For `ranks` ranks, 1 to kFsdpRanksMax. Errors: kFailedPrecondition that names what has no place:
// states that are none of a model or an optimizer, two weights of one name, a parameter without
// dimensions, groups that are not told.
absl::StatusOr<TorchFilesPlan> PlanFsdp(const ForeignIndex& index, uint64_t ranks);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_FSDP_WRITER_H_
