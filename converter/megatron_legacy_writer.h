// Writes a checkpoint in Megatron-LM's legacy format (`--ckpt-format torch`), for a job of chosen
// degrees of tensor, pipeline and expert parallelism, with DistributedOptimizer:
//
//   latest_checkpointed_iteration.txt
//   iter_0000007/mp_rank_<tp>[_<pp>][_<ep>]/model_optim_rng.pt   args, weights, groups, schedulers
//   iter_0000007/mp_rank_<tp>[_<pp>][_<ep>]/distrib_optim.pt     masters and moments, flat
//
// What each rank has is converter/megatron_shares.h's. A stage has one model, or its chunks
// "model0", "model1", ...; experts that are parallel have an optimizer of their own, and buffers.
// Buffers are laid out as a job with the same arguments lays them out: its buckets, by
// `overlap_grad_reduce` and `ddp_bucket_size`, decide how many elements lie between parameters.
// Weights are views of their buffers, as Megatron's own are.
//
// Sources: Megatron-LM training/checkpointing.py, megatron/core/optimizer/distrib_optimizer.py
// (get_parameter_state_dp_zero), optimizer.py (ChainedOptimizer), distributed/
// param_and_grad_buffer.py of 0.16.1.
#ifndef HOLDFAST_CONVERTER_MEGATRON_LEGACY_WRITER_H_
#define HOLDFAST_CONVERTER_MEGATRON_LEGACY_WRITER_H_

#include <string>

#include "absl/status/statusor.h"
#include "converter/conversion_source.h"
#include "converter/megatron_shares.h"
#include "converter/torch_output.h"

namespace holdfast::converter {

// Degrees are 1 and more, the product of tensor, pipeline and expert at most kMegatronRanksMax.
// `config`: config.json of the model, or empty; what it and the tensors tell is written as `args`
// if the source has none. Errors: kFailedPrecondition that names what has no place
// (MegatronTensors' and MegatronShares' reasons; a configuration that contradicts the tensors; an
// optimizer that is not Adam's); kInvalidArgument (the configuration is no JSON object);
// kDataLoss; those of reading.
absl::StatusOr<TorchFilesPlan> PlanMegatronLegacy(ConversionSource& source,
                                                  const MegatronDegrees& degrees,
                                                  const std::string& config);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MEGATRON_LEGACY_WRITER_H_
