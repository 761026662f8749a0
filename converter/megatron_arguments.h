// Megatron's training arguments of a model that Megatron has not trained: what its tensors (by
// Megatron's names) and its config.json (Hugging Face's) say of it. Of those that Megatron-LM reads
// from a checkpoint (training/checkpointing.py: check_checkpoint_args, load_args_from_checkpoint)
// only such as are known; the user's command line supplies the rest. Nothing is guessed: what the
// configuration spells in a way that Megatron has no argument for is left out.
#ifndef HOLDFAST_CONVERTER_MEGATRON_ARGUMENTS_H_
#define HOLDFAST_CONVERTER_MEGATRON_ARGUMENTS_H_

#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "converter/foreign_index.h"
#include "converter/megatron_layout.h"
#include "converter/megatron_tensors.h"
#include "converter/torch_output.h"

namespace holdfast::converter {

struct DerivedArguments {
  nlohmann::ordered_json values;  // an object: "num_layers", ...; no degrees of parallelism
  MegatronArguments layout;       // what of it says how tensors are laid out
};

// Pushes a Namespace of these, and of what `more` pushes by turns: keys and values.
void PushMegatronArguments(const DerivedArguments& derived, const std::function<void()>& more,
                           TorchDraft& draft);

// Of a checkpoint without `args`. Nothing if `config` is empty or does not say how many attention
// heads there are, or if no names are Megatron's. Errors: kInvalidArgument (`config` is no JSON
// object), kFailedPrecondition (its heads do not divide the rows of queries, keys and values).
absl::StatusOr<std::optional<DerivedArguments>> DeriveMegatronArguments(
    const ForeignIndex& index, const MegatronTensors& tensors, const std::string& config);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MEGATRON_ARGUMENTS_H_
