// Writes a checkpoint as DeepSpeed's engine does (save_checkpoint), for numbers of data-parallel,
// tensor-parallel and pipeline ranks that the source need not have had:
//
//   latest                                         the name of the folder
//   <tag>/mp_rank_<mp>_model_states.pt             weights and buffers (stages 1 and 2)
//   <tag>/zero_pp_rank_<d>_mp_rank_<mp>_model_states.pt   buffers, and no weights (stage 3)
//   <tag>/[bf16_]zero_pp_rank_<d>_mp_rank_<mp>_optim_states.pt
//   <tag>/layer_<n>[-model_<t>]-model_states.pt    of a pipeline: its weights
//   <tag>/layer_<l>_expert_<n>_mp_rank_00_model_states.pt   converter/deepspeed_experts.h
//
// <mp> is the pipeline stage times the number of tensor-parallel ranks, plus the rank among those.
// Which of them has what: converter/deepspeed_ranks.h.
//
// Flat buffers have the order of the optimizer's groups; with `round_robin_gradients` in ds_config,
// stages 1 and 2 deal it to the ranks as DeepSpeed does. Which element lies where:
// converter/zero_layout.h.
#ifndef HOLDFAST_CONVERTER_DEEPSPEED_WRITER_H_
#define HOLDFAST_CONVERTER_DEEPSPEED_WRITER_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/conversion_source.h"
#include "converter/deepspeed_ranks.h"
#include "converter/torch_output.h"

namespace holdfast::converter {

struct DeepSpeedWriteOptions {
  uint64_t stage = 1;  // 1 to 3
  uint64_t dp = 1;     // 1 to kZeroRanksMax
  uint64_t ep = 1;     // expert-parallel ranks: a divisor of dp
  // DeepSpeed's pipelines are of stage 1. The product of these two is at most kModelRanksMax.
  DeepSpeedDegrees degrees = {};
};
inline constexpr uint64_t kModelRanksMax = 4096;

// Reads the single numbers of parameters (their steps), and nothing else. Errors:
// kFailedPrecondition that names what the format has no place for: those of
// DeepSpeedOutput::Create, DeepSpeedRanks::Create and DeepSpeedExperts::Create; parameters of one
// flat buffer whose steps differ, or of which some have a state that others have not; those of
// reading.
absl::StatusOr<TorchFilesPlan> PlanDeepSpeed(ConversionSource& source,
                                             const DeepSpeedWriteOptions& options);

// Stage 3 and universal folders for it have no weights but the masters, rounded.
// kFailedPrecondition that names a parameter whose weights are something else. Reads all weights
// and masters.
absl::Status CheckWeightsAreMasters(ConversionSource& source);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_DEEPSPEED_WRITER_H_
