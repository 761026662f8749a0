// A checkpoint's tensors as Megatron's writers see them: weights, the optimizer's states of each,
// steps; sorted, and refused where Megatron has no place for them.
#ifndef HOLDFAST_CONVERTER_MEGATRON_TENSORS_H_
#define HOLDFAST_CONVERTER_MEGATRON_TENSORS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/conversion_source.h"
#include "converter/megatron_layout.h"
#include "converter/megatron_state.h"
#include "converter/torch_output.h"

namespace holdfast::converter {

// Elements of a tensor state, in the dtype in which they are written.
struct MegatronElements {
  uint32_t tensor_state = 0;
  Dtype dtype = Dtype::kFloat32;
};

// The number of steps that groups of a kind have made.
struct MegatronSteps {
  double value = 0;
  bool is_integer = false;  // as Python has it
};

struct MegatronWeights {
  uint32_t tensor_state = 0;
  // By key: "param" (masters), "exp_avg", ...; empty: not optimized. Of the weights' shape.
  std::map<std::string, MegatronElements> states = {};
};

// Threads: one. Lifetime: the source outlives it.
class MegatronTensors {
 public:
  // Errors: kFailedPrecondition that names what has no place, those of reading.
  static absl::StatusOr<MegatronTensors> Sort(ConversionSource& source);

  const MegatronState& state() const { return *state_; }
  const MegatronArguments& arguments() const { return arguments_; }
  // By name; without the copy of a tied embedding.
  const std::map<std::string, MegatronWeights>& weights() const { return weights_; }
  bool has_optimizer() const { return has_optimizer_; }
  // Steps of the groups of experts, or of the others.
  const std::optional<MegatronSteps>& steps(bool of_experts) const {
    return of_experts && expert_steps_.has_value() ? expert_steps_ : steps_;
  }
  // What has no place, in words.
  const std::vector<std::string>& left_out() const { return left_out_; }
  // What Megatron-LM looks for when it loads, and nobody but a source of its own has.
  std::vector<std::string> Notes() const;

  // Pushes what both of Megatron's forms of a chained optimizer begin with, into the open dict:
  // "optimizer" with its groups, and the scaler that was kept. Groups are a list of dicts: those of
  // Megatron's that were kept, each with its steps and without "params"; else the source's own,
  // made Megatron's two kinds: with weight decay and without.
  absl::Status PushOptimizerBegin(uint32_t optimizer, TorchDraft& draft) const;
  // The same of a job's optimizer of dense parameters (and of experts that are not parallel), or of
  // the one that parallel experts have. Where the source has groups of one kind only, those of the
  // other are as these.
  enum class Part : uint8_t { kDense, kExpert };
  absl::Status PushOptimizerOf(Part part, TorchDraft& draft) const;
  // How many chained optimizers there are groups of; at least one.
  uint32_t OptimizerCount() const;

  // What the names alone say of the model: whether its embedding is tied.
  MegatronArguments ArgumentsByNames() const;

 private:
  explicit MegatronTensors(ConversionSource& source) : source_(&source) {}

  absl::Status SortStates();
  absl::Status AddStep(uint32_t tensor_state);
  absl::Status AddStates();
  absl::Status CheckTied();
  absl::StatusOr<bool> AreEqual(const MegatronElements& a, const MegatronElements& b);
  // `part`: of which the groups are to be; none: as they are.
  absl::Status PushOptimizer(uint32_t optimizer, std::optional<Part> part, TorchDraft& draft) const;
  absl::Status PushGroups(uint32_t optimizer, std::optional<Part> part, TorchDraft& draft) const;
  absl::Status PushKeptGroup(const TorchValue& group, std::optional<Part> part,
                             TorchDraft& draft) const;
  absl::Status PushToldGroups(std::optional<Part> part, TorchDraft& draft) const;
  Part PartOf(uint32_t optimizer) const;
  void PushSteps(bool of_experts, TorchDraft& draft) const;

  ConversionSource* source_;
  std::unique_ptr<MegatronState> state_;
  MegatronArguments arguments_;
  std::map<std::string, MegatronWeights> weights_;
  std::map<std::string, std::vector<uint32_t>> states_;  // of the optimizer, by name
  std::optional<MegatronSteps> steps_;
  std::optional<MegatronSteps> expert_steps_;
  bool has_optimizer_ = false;
  std::vector<std::string> left_out_;
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MEGATRON_TENSORS_H_
