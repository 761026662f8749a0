#include "converter/megatron_tensors.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "converter/non_tensors.h"
#include "converter/optimizer_groups.h"
#include "converter/rounding.h"

namespace holdfast::converter {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kEmbedding = "embedding.word_embeddings.weight";
constexpr std::string_view kOutput = "output_layer.weight";
constexpr std::string_view kMasters = "param";       // their key among an optimizer's states
constexpr char kOfExperts[] = "is_expert_parallel";  // of a group
constexpr uint32_t kOptimizersMax = 1024;
constexpr uint64_t kComparedElements = uint64_t{1} << 18;  // at a time

// A number of one element, as bytes.
std::optional<MegatronSteps> StepsOf(Dtype dtype, std::string_view bytes) {
  const auto as = [&]<typename T>(T) {
    T value;
    std::memcpy(&value, bytes.data(), sizeof value);
    return value;
  };
  switch (dtype) {
    case Dtype::kFloat32:
      return MegatronSteps{.value = as(float{})};
    case Dtype::kFloat64:
      return MegatronSteps{.value = as(double{})};
    case Dtype::kInt32:
      return MegatronSteps{.value = static_cast<double>(as(int32_t{})), .is_integer = true};
    case Dtype::kInt64:
      return MegatronSteps{.value = static_cast<double>(as(int64_t{})), .is_integer = true};
    default:
      return std::nullopt;
  }
}

bool IsTrue(const TorchValue& value) {
  return value.Is(TorchValue::Kind::kBool) && value.Bool().value_or(false);
}

}  // namespace

absl::StatusOr<MegatronTensors> MegatronTensors::Sort(ConversionSource& source) {
  MegatronTensors tensors(source);
  ASSIGN_OR_RETURN(tensors.state_, MegatronState::Read(source));
  ASSIGN_OR_RETURN(tensors.arguments_, ReadMegatronArguments(tensors.state_->Common("args")));
  RETURN_IF_ERROR(tensors.SortStates());
  RETURN_IF_ERROR(tensors.AddStates());
  RETURN_IF_ERROR(tensors.CheckTied());
  if (!tensors.state_->present()) {
    const ForeignIndex& index = source.index();
    tensors.left_out_ = NonTensorsWithoutPlace(
        index, [&](const Fact& fact) { return fact.name == kParamGroups || IsStep(fact, index); });
  }
  return tensors;
}

absl::Status MegatronTensors::SortStates() {
  const ForeignIndex& index = source_->index();
  bool leaves_out_random = false;
  for (uint32_t i = 0; i < index.tensor_states.size(); ++i) {
    const TensorState& state = index.tensor_states[i];
    if (state.state == "step") {
      RETURN_IF_ERROR(AddStep(i));
    } else if (IsOptimizerState(state.state)) {
      states_[state.tensor].push_back(i);
    } else if (state.state == "rng") {
      // Megatron's own are among what was kept; in fsdp_dtensor they are tensors of other names.
      if (!state_->random().present() && state_->present() && !leaves_out_random) {
        left_out_.push_back("random states");
        leaves_out_random = true;
      }
      if (state_->present()) continue;
      return absl::FailedPreconditionError(absl::StrFormat(
          "%s: Megatron has its own random states and no place for others; --drop rng",
          Describe(state)));
    } else if (state.state == "ema") {
      return absl::FailedPreconditionError(
          absl::StrFormat("%s: Megatron has no place for it; --drop ema", Describe(state)));
    } else if (!weights_.emplace(state.tensor, MegatronWeights{.tensor_state = i}).second) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "%s: the model has two tensors of this name; --drop a state, or rename one",
          Describe(state)));
    }
  }
  return absl::OkStatus();
}

absl::Status MegatronTensors::AddStep(uint32_t tensor_state) {
  const TensorState& state = source_->index().tensor_states[tensor_state];
  std::string bytes;
  if (state.ElementCount() == 1) {
    RETURN_IF_ERROR(source_->Read(tensor_state, [&](std::span<const std::byte> part) {
      bytes.append(reinterpret_cast<const char*>(part.data()), part.size());
      return absl::OkStatus();
    }));
  }
  const std::optional<MegatronSteps> steps =
      bytes.empty() ? std::nullopt : StepsOf(state.dtype, bytes);
  if (!steps.has_value()) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "%s: expected one number of float32, float64, int32 or int64", Describe(state)));
  }
  std::optional<MegatronSteps>& of = IsMegatronExpert(state.tensor) ? expert_steps_ : steps_;
  if (of.has_value() && (of->value != steps->value || of->is_integer != steps->is_integer)) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "%s: Megatron has one step for all parameters of an optimizer, found %g and %g",
        Describe(state), of->value, steps->value));
  }
  of = steps;
  return absl::OkStatus();
}

absl::Status MegatronTensors::AddStates() {
  const std::vector<TensorState>& all = source_->index().tensor_states;
  for (const auto& [name, numbers] : states_) {
    const auto weights = weights_.find(name);
    if (weights == weights_.end()) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "tensor \"%s\" has optimizer states and no weights: --only or --drop has left them out, "
          "or the optimizer's names are not the model's (--names FILE, --rename FILE)",
          name));
    }
    const TensorState& of = all[weights->second.tensor_state];
    std::map<std::string, MegatronElements>& states = weights->second.states;
    for (const uint32_t number : numbers) {
      const TensorState& state = all[number];
      if (state.shape != of.shape) {
        return absl::FailedPreconditionError(
            absl::StrFormat("%s: Megatron has states of their weights' shape only; --drop %s",
                            Describe(state), state.state));
      }
      const std::string key = state.state == "fp32" ? std::string(kMasters) : state.state;
      if (key.find('.') != std::string::npos) {
        return absl::FailedPreconditionError(absl::StrFormat(
            "%s: Megatron's keys end a state's name at a dot; --drop it", Describe(state)));
      }
      states[key] = {.tensor_state = number, .dtype = state.dtype};
    }
    if (!states.contains(std::string(kMasters))) {
      if (!IsCastable(of.dtype)) {
        return absl::FailedPreconditionError(absl::StrFormat(
            "%s: it is optimized, and there are no masters to be made of its dtype", Describe(of)));
      }
      states[std::string(kMasters)] = {.tensor_state = weights->second.tensor_state,
                                       .dtype = Dtype::kFloat32};
    }
    has_optimizer_ = true;
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> MegatronTensors::AreEqual(const MegatronElements& a,
                                               const MegatronElements& b) {
  const TensorState& state = source_->index().tensor_states[a.tensor_state];
  const TensorState& other = source_->index().tensor_states[b.tensor_state];
  if (state.shape != other.shape || a.dtype != b.dtype) return false;
  const auto read = [&](const MegatronElements& elements, uint64_t begin, uint64_t end,
                        std::string& bytes) {
    bytes.clear();
    return source_->ReadElements(
        elements.tensor_state, begin, end, elements.dtype, [&](std::span<const std::byte> part) {
          bytes.append(reinterpret_cast<const char*>(part.data()), part.size());
          return absl::OkStatus();
        });
  };
  std::string first;
  std::string second;
  const uint64_t count = state.ElementCount();
  for (uint64_t at = 0; at < count; at += kComparedElements) {
    const uint64_t end = std::min(count, at + kComparedElements);
    RETURN_IF_ERROR(read(a, at, end, first));
    RETURN_IF_ERROR(read(b, at, end, second));
    if (first != second) return false;
  }
  return true;
}

// A tied embedding is stored once, whichever stages have a copy.
absl::Status MegatronTensors::CheckTied() {
  const auto embedding = weights_.find(std::string(kEmbedding));
  const auto output = weights_.find(std::string(kOutput));
  if (!arguments_.tied.value_or(false) || embedding == weights_.end() || output == weights_.end()) {
    return absl::OkStatus();
  }
  const auto all = [&](const MegatronWeights& weights) {
    std::map<std::string, MegatronElements> elements = weights.states;
    elements[""] = {.tensor_state = weights.tensor_state,
                    .dtype = source_->index().tensor_states[weights.tensor_state].dtype};
    return elements;
  };
  const std::map<std::string, MegatronElements> first = all(embedding->second);
  for (const auto& [key, elements] : all(output->second)) {
    const auto other = first.find(key);
    bool equal = other != first.end();
    if (equal) {
      ASSIGN_OR_RETURN(equal, AreEqual(elements, other->second));
    }
    if (!equal) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "%s: args say that it is tied to %s, and its %s are others; --only leaves it out",
          std::string(kOutput), std::string(kEmbedding), key.empty() ? "weights" : key));
    }
  }
  weights_.erase(output);
  return absl::OkStatus();
}

MegatronArguments MegatronTensors::ArgumentsByNames() const {
  MegatronArguments arguments;
  if (weights_.contains(std::string(kEmbedding))) {
    arguments.tied = !weights_.contains(std::string(kOutput));
  }
  return arguments;
}

// ------------------------------------------------------------------ parameter groups

uint32_t MegatronTensors::OptimizerCount() const {
  uint32_t count = 0;
  while (count < kOptimizersMax && state_->Groups(count).present()) ++count;
  return std::max<uint32_t>(count, 1);
}

void MegatronTensors::PushSteps(bool of_experts, TorchDraft& draft) const {
  const std::optional<MegatronSteps>& made = steps(of_experts);
  if (!made.has_value()) return;
  draft.Key("step");
  if (made->is_integer) {
    draft.out().Int(static_cast<int64_t>(made->value));
  } else {
    draft.out().Float(made->value);
  }
}

absl::Status MegatronTensors::PushKeptGroup(const TorchValue& group, std::optional<Part> part,
                                            TorchDraft& draft) const {
  if (!group.Is(TorchValue::Kind::kDict)) return group.Mismatch("a parameter group, a dict");
  ASSIGN_OR_RETURN(const size_t count, group.EntryCount());
  draft.out().EmptyDict();
  draft.out().Mark();
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const std::string_view key, group.Key(i).String());
    if (key == "params" || key == "step") continue;
    if (key == kOfExperts && part.has_value()) continue;
    draft.Key(key);
    RETURN_IF_ERROR(PushKept(group.Entry(i), draft));
  }
  bool of_experts = IsTrue(group.Find(kOfExperts));
  if (part.has_value()) {
    of_experts = *part == Part::kExpert;
    draft.Key(kOfExperts);
    draft.out().Bool(of_experts);
  }
  PushSteps(of_experts, draft);
  draft.out().SetItems();
  return absl::OkStatus();
}

absl::Status MegatronTensors::PushToldGroups(std::optional<Part> part, TorchDraft& draft) const {
  ASSIGN_OR_RETURN(std::vector<OptimizerGroup> told, OptimizerGroupsOf(source_->index()));
  std::optional<Json> decayed;
  std::optional<Json> others;
  for (const OptimizerGroup& group : told) {
    const auto decay = group.values.find("weight_decay");
    const bool decays = decay == group.values.end() || !decay->is_number() || *decay != 0.0;
    std::optional<Json>& kind = decays ? decayed : others;
    if (!kind.has_value()) kind = group.values;
  }
  // Megatron has both kinds, and looks for them by these numbers.
  if (!decayed.has_value()) decayed = others.value_or(Json::object());
  if (!others.has_value()) {
    others = *decayed;
    (*others)["weight_decay"] = 0.0;
  }
  const bool of_experts = part == Part::kExpert;
  draft.out().EmptyList();
  draft.out().Mark();
  for (const bool decays : {true, false}) {
    Json group = {{"wd_mult", decays ? 1.0 : 0.0}, {"lr_mult", 1.0}, {"is_decoupled_lr", false}};
    group.update(decays ? *decayed : *others);
    group[kOfExperts] = of_experts;
    draft.out().EmptyDict();
    draft.out().Mark();
    for (const auto& [key, value] : group.items()) {
      if (key == "step") continue;
      draft.Key(key);
      draft.pickle().Json(value, TorchPickle::Sequences::kTuples);  // betas are one
    }
    PushSteps(of_experts, draft);
    draft.out().SetItems();
  }
  draft.out().Appends();
  return absl::OkStatus();
}

MegatronTensors::Part MegatronTensors::PartOf(uint32_t optimizer) const {
  const TorchValue groups = state_->Groups(optimizer);
  const size_t count = groups.present() ? groups.ArraySize().value_or(0) : 0;
  for (size_t g = 0; g < count; ++g) {
    if (groups[g].Is(TorchValue::Kind::kDict) && IsTrue(groups[g].Find(kOfExperts))) {
      return Part::kExpert;
    }
  }
  return Part::kDense;
}

absl::Status MegatronTensors::PushOptimizerBegin(uint32_t optimizer, TorchDraft& draft) const {
  return PushOptimizer(optimizer, std::nullopt, draft);
}

absl::Status MegatronTensors::PushOptimizerOf(Part part, TorchDraft& draft) const {
  for (uint32_t optimizer = 0; optimizer < OptimizerCount(); ++optimizer) {
    if (PartOf(optimizer) == part) return PushOptimizer(optimizer, std::nullopt, draft);
  }
  return PushOptimizer(0, part, draft);
}

absl::Status MegatronTensors::PushOptimizer(uint32_t optimizer, std::optional<Part> part,
                                            TorchDraft& draft) const {
  PickleWriter& out = draft.out();
  draft.Key("optimizer");
  out.EmptyDict();
  out.Mark();
  draft.Key("param_groups");
  RETURN_IF_ERROR(PushGroups(optimizer, part, draft));
  out.SetItems();
  if (const TorchValue scaler = state_->Scaler(optimizer); scaler.present()) {
    draft.Key("grad_scaler");
    RETURN_IF_ERROR(PushKept(scaler, draft));
  }
  return absl::OkStatus();
}

absl::Status MegatronTensors::PushGroups(uint32_t optimizer, std::optional<Part> part,
                                         TorchDraft& draft) const {
  const TorchValue groups = state_->Groups(optimizer);
  if (!groups.present()) return PushToldGroups(part, draft);
  ASSIGN_OR_RETURN(const size_t count, groups.ArraySize());
  draft.out().EmptyList();
  draft.out().Mark();
  for (size_t g = 0; g < count; ++g) RETURN_IF_ERROR(PushKeptGroup(groups[g], part, draft));
  draft.out().Appends();
  return absl::OkStatus();
}

// Megatron-LM's load_checkpoint (training/checkpointing.py) takes "opt_param_scheduler", or the
// older "lr_scheduler", whenever it loads an optimizer, and ends where neither is there. Numbers
// that were made up here would be taken for the checkpoint's own with
// --use-checkpoint-opt-param-scheduler.
std::vector<std::string> MegatronTensors::Notes() const {
  if (!has_optimizer_ || state_->Common("opt_param_scheduler").present() ||
      state_->Common("lr_scheduler").present()) {
    return {};
  }
  return {
      "opt_param_scheduler: the source has no schedule of Megatron's, without which Megatron-LM "
      "loads no optimizer states: use --no-load-optim, or add it as the manual says"};
}

}  // namespace holdfast::converter
