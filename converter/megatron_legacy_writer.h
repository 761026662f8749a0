// Writes a checkpoint in Megatron-LM's legacy format (`--ckpt-format torch`), for a job of chosen
// degrees of tensor and pipeline parallelism, with DistributedOptimizer:
//
//   latest_checkpointed_iteration.txt
//   iter_0000007/mp_rank_<tp>[_<pp>]/model_optim_rng.pt   args, weights, groups, schedulers
//   iter_0000007/mp_rank_<tp>[_<pp>]/distrib_optim.pt     masters and moments, in flat buffers
//
// Stages have equal numbers of layers, one model chunk each, and all experts. Buffers are laid out
// as a job with the same arguments lays them out (converter/megatron_buffers.h): its buckets, by
// `overlap_grad_reduce` and `ddp_bucket_size`, decide how many elements lie between parameters.
// Weights are views of their buffers, as Megatron's own are.
//
// Sources: Megatron-LM training/checkpointing.py, megatron/core/optimizer/distrib_optimizer.py
// (get_parameter_state_dp_zero), distributed/param_and_grad_buffer.py of 0.16.1.
#ifndef HOLDFAST_CONVERTER_MEGATRON_LEGACY_WRITER_H_
#define HOLDFAST_CONVERTER_MEGATRON_LEGACY_WRITER_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "converter/conversion_source.h"
#include "converter/torch_output.h"

namespace holdfast::converter {

inline constexpr uint64_t kMegatronRanksMax = 4096;  // in all

struct MegatronDegrees {
  uint64_t tensor = 1;
  uint64_t pipeline = 1;
};

// Degrees are 1 and more, their product at most kMegatronRanksMax. Errors: kFailedPrecondition that
// names what has no place (MegatronTensors' reasons; a dimension, heads or layers that the degrees
// do not divide; a parameter of which nothing says how it is cut; an optimizer that is not Adam's);
// kDataLoss; those of reading.
absl::StatusOr<TorchFilesPlan> PlanMegatronLegacy(ConversionSource& source,
                                                  const MegatronDegrees& degrees);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MEGATRON_LEGACY_WRITER_H_
