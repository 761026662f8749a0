// Writes a checkpoint as one file of torch.save, which torch.load(weights_only=True) opens.
//
// Weights alone (states param, buffer, tensor) are a state dict: {name: tensor}. With anything else
// the file is {"model": the state dict, "optimizer": as torch's optimizers write it, "ema": a state
// dict, "global_step": the step}, and tensors of other states (rng, other) by their names. The
// optimizer numbers its parameters in the order of its groups, and names them in `param_names`; a
// master weight is its state "fp32". Tied weights share a storage.
#ifndef HOLDFAST_CONVERTER_TORCH_WRITER_H_
#define HOLDFAST_CONVERTER_TORCH_WRITER_H_

#include <string>

#include "absl/status/statusor.h"
#include "converter/foreign_index.h"
#include "converter/torch_output.h"

namespace holdfast::converter {

// One file of this name. Errors: kFailedPrecondition (two tensors with one key; more dimensions
// than torch has; parameter groups that are not told), named.
absl::StatusOr<TorchFilesPlan> PlanTorch(const ForeignIndex& index, const std::string& file_name);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_TORCH_WRITER_H_
