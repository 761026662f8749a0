// Writes a checkpoint as a universal folder of DeepSpeed's: what `load_universal` reads into any
// number of ranks.
//
//   latest_universal                      the name of the folder
//   <tag>/mp_rank_00_model_states.pt      weights and buffers; of stage 3 zero_pp_rank_0_...
//   <tag>/zero/optimizer_state.pt         groups, loss scaler, and the step for stage 3
//   <tag>/zero/<parameter>/fp32.pt        {'param': the tensor, whole}; likewise exp_avg.pt, ...
//                                         of stages 1 and 2 with what tensor-parallel ranks need to
//                                         cut it, where the source or the user says how
//   <tag>/zero/<parameter>/step.pt        a 0-d tensor
//
// Stages 1 and 2 and the optimizers' files are the same for every stage; only the name of the
// model-state file differs, and that ZeRO-3 makes the weights of their masters.
#ifndef HOLDFAST_CONVERTER_UCP_WRITER_H_
#define HOLDFAST_CONVERTER_UCP_WRITER_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "converter/foreign_index.h"
#include "converter/torch_output.h"

namespace holdfast::converter {

struct UniversalWriteOptions {
  uint64_t stage = 1;       // of the jobs that will load it
  std::string preset = {};  // as in DeepSpeedDegrees
  std::string layout = {};
};

// Errors: kFailedPrecondition that names what the format has no place for: those of
// DeepSpeedOutput::Create; a name that is no path; a number beside step; a parameter without a step
// where others have one; one of which nothing says how it is cut, where something says it of
// others.
absl::StatusOr<TorchFilesPlan> PlanUniversal(const ForeignIndex& index,
                                             const UniversalWriteOptions& options);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_UCP_WRITER_H_
