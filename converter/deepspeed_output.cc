#include "converter/deepspeed_output.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <span>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "converter/deepspeed_model.h"
#include "converter/deepspeed_ranks.h"
#include "converter/non_tensors.h"
#include "converter/optimizer_groups.h"
#include "converter/parallel_facts.h"
#include "converter/rounding.h"

namespace holdfast::converter {
namespace {

using Json = nlohmann::ordered_json;
using Sequences = TorchPickle::Sequences;
using Bytes = std::span<const std::byte>;

// What the files say they were written by, if the source does not: the format is that version's.
constexpr char kDeepSpeedVersion[] = "0.19.8";
constexpr uint64_t kSubGroupElements = 1'000'000'000;  // DeepSpeed's default
constexpr double kUniversalVersion = 0.4;
constexpr char kExpertCounts[] = "num_experts";
constexpr char kAutoExperts[] = "ds_autoep_layers";    // None beside experts of DeepSpeed's own
constexpr std::string_view kExpertGroup = "ep_size_";  // begins the names of their groups
constexpr uint64_t kComparedElements = uint64_t{1} << 20;

// Facts that have their place in the files, or are about the files that were read.
constexpr std::array<std::string_view, 21> kKnownFacts = {"lr_scheduler",
                                                          "data_sampler",
                                                          "random_ltd",
                                                          "skipped_steps",
                                                          "global_steps",
                                                          "global_samples",
                                                          "dp_world_size",
                                                          "mp_world_size",
                                                          "ds_config",
                                                          "ds_version",
                                                          "param_groups",
                                                          "loss_scaler",
                                                          "overflow",
                                                          "dynamic_loss_scale",
                                                          "clip_grad",
                                                          "zero_stage",
                                                          "partition_count",
                                                          "checkpoint_parallel_dimensions",
                                                          "sparse_tensor_module_names",
                                                          kParallelInfoFact,
                                                          kPipelineFact};

// Whether TorchJson has put words in the place of something that JSON has not.
bool HasWords(const Json& value) {
  if (value.is_string()) {
    const auto& text = value.get_ref<const std::string&>();
    return text == "..." || text.starts_with("an object of ") || text.starts_with("a tensor");
  }
  return std::any_of(value.begin(), value.end(), [](const Json& each) {
    return (each.is_structured() || each.is_string()) && HasWords(each);
  });
}

bool IsTrue(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_boolean() && found->get<bool>();
}

}  // namespace

uint64_t OptimizedParameter::ElementCount() const {
  uint64_t elements = 1;
  for (const uint64_t size : shape) elements *= size;
  return elements;
}

std::optional<uint32_t> OptimizedParameter::Find(std::string_view key) const {
  for (const auto* list : {&states, &numbers}) {
    for (const auto& [known, number] : *list) {
      if (known == key) return number;
    }
  }
  return std::nullopt;
}

bool OptimizedGroup::Has(const char* flag) const { return IsTrue(values, flag); }

absl::StatusOr<DeepSpeedOutput> DeepSpeedOutput::Create(const ForeignIndex& index,
                                                        Buffers buffers) {
  DeepSpeedOutput output(index, buffers);
  RETURN_IF_ERROR(output.CollectWeights());
  RETURN_IF_ERROR(output.CollectGroups());
  return output;
}

absl::Status DeepSpeedOutput::CollectWeights() {
  for (const Alias& alias : index_.aliases) owners_[alias.tensor_state] = alias.of;
  std::map<Dtype, uint64_t> dtypes;
  for (uint32_t i = 0; i < index_.tensor_states.size(); ++i) {
    const TensorState& state = index_.tensor_states[i];
    if (buffers_ == Buffers::kNone && ParseExpertName(state.tensor).has_value()) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "%s: experts of DeepSpeed's own mixture of experts have a place in files of ZeRO-1 and "
          "ZeRO-2 only: --format deepspeed --to zero=1 writes them",
          Describe(state)));
    }
    if (IsOptimizerState(state.state)) continue;
    if (state.state == "ema" || state.state == "rng") {
      return absl::FailedPreconditionError(
          absl::StrFormat("%s: DeepSpeed's files have no place for the state \"%s\"; --drop %s",
                          Describe(state), state.state, state.state));
    }
    if (!weight_of_.emplace(state.tensor, i).second) {
      return absl::FailedPreconditionError(
          absl::StrFormat("%s: the model has two tensors of this name; --drop a state, or rename "
                          "one",
                          Describe(state)));
    }
    weights_.push_back(i);
    ++tensor_count_;
    if (state.state != "buffer" && IsCastable(state.dtype)) ++dtypes[state.dtype];
  }
  uint64_t most = 0;
  for (const auto& [dtype, count] : dtypes) {
    if (count > most) weight_dtype_ = dtype;
    most = std::max(most, count);
  }
  return absl::OkStatus();
}

absl::Status DeepSpeedOutput::CollectGroups() {
  std::unordered_map<std::string_view, std::vector<uint32_t>> states;
  for (uint32_t i = 0; i < index_.tensor_states.size(); ++i) {
    const TensorState& state = index_.tensor_states[i];
    if (IsOptimizerState(state.state)) states[state.tensor].push_back(i);
  }
  ASSIGN_OR_RETURN(const std::vector<OptimizerGroup> groups, OptimizerGroupsOf(index_));
  for (const OptimizerGroup& group : groups) {
    OptimizedGroup made;
    made.values = group.values;
    if (made.Has(kUsesMuon) && buffers_ == Buffers::kNone) {
      return absl::FailedPreconditionError(
          "the optimizer is Muon, whose momentum has a place in files of ZeRO-1 and ZeRO-2 only: "
          "--format deepspeed --to zero=1 writes it, and --drop '*' leaves optimizer states out");
    }
    for (const std::string& name : group.parameters) {
      ASSIGN_OR_RETURN(OptimizedParameter parameter, Parameter(name, states[name]));
      if (buffers_ == Buffers::kFlat && parameter.ElementCount() == 0) {
        without_elements_.push_back(name);
        continue;
      }
      optimized_[index_.tensor_states[states[name].front()].tensor] = true;
      tensor_count_ += states[name].size();
      made.parameters.push_back(std::move(parameter));
    }
    groups_.push_back(std::move(made));
  }
  return absl::OkStatus();
}

absl::StatusOr<OptimizedParameter> DeepSpeedOutput::Parameter(
    const std::string& name, const std::vector<uint32_t>& states) const {
  OptimizedParameter parameter;
  parameter.name = name;
  const auto weight = weight_of_.find(name);
  if (weight == weight_of_.end()) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "tensor \"%s\" has optimizer states and no weights: --only or --drop has left them out, or "
        "the optimizer's names are not the model's (--names FILE, --rename FILE)",
        name));
  }
  const TensorState& of_model = index_.tensor_states[weight->second];
  parameter.shape = of_model.shape;
  parameter.weight = weight->second;
  parameter.master = weight->second;
  for (const uint32_t number : states) {
    const TensorState& state = index_.tensor_states[number];
    if (state.state == "fp32") {
      if (state.dtype != Dtype::kFloat32 || state.shape != parameter.shape) {
        return absl::FailedPreconditionError(
            absl::StrFormat("%s: expected float32 and the shape of the weights, found %s",
                            Describe(state), DtypeName(state.dtype)));
      }
      parameter.master = number;
    } else if (state.state != "step" && state.shape == parameter.shape) {
      parameter.states.emplace_back(state.state, number);
    } else if (state.ElementCount() == 1) {
      parameter.numbers.emplace_back(state.state, number);
    } else {
      return absl::FailedPreconditionError(absl::StrFormat(
          "%s: DeepSpeed's flat buffers hold states of their parameter's shape, and this one has "
          "another; --drop %s",
          Describe(state), state.state));
    }
  }
  if (!IsCastable(index_.tensor_states[parameter.master].dtype)) {
    return absl::FailedPreconditionError(
        absl::StrFormat("%s: expected a floating dtype of an optimized parameter, found %s",
                        Describe(of_model), DtypeName(of_model.dtype)));
  }
  return parameter;
}

const Fact* DeepSpeedOutput::FindFact(std::string_view name) const {
  for (const Fact& fact : index_.scalars) {
    if (fact.name == name) return &fact;
  }
  return nullptr;
}

Json DeepSpeedOutput::FactOr(std::string_view name, Json otherwise) const {
  const Fact* fact = FindFact(name);
  if (fact == nullptr) return otherwise;
  Json value = Json::parse(fact->json, nullptr, /*allow_exceptions=*/false);
  return value.is_discarded() || HasWords(value) ? otherwise : value;
}

Json DeepSpeedOutput::Configuration(uint64_t stage) const {
  Json config = FactOr("ds_config", Json::object());
  if (!config.is_object()) config = Json::object();
  if (weight_dtype_ == Dtype::kBfloat16 && !config.contains("bf16") &&
      !config.contains("bfloat16")) {
    config["bf16"] = Json::object({{"enabled", true}});
  }
  if (weight_dtype_ == Dtype::kFloat16 && !config.contains("fp16")) {
    config["fp16"] = Json::object({{"enabled", true}});
  }
  if (!config.contains("zero_optimization") || !config["zero_optimization"].is_object()) {
    config["zero_optimization"] = Json::object();
  }
  config["zero_optimization"]["stage"] = stage;
  return config;
}

bool DeepSpeedOutput::data_before_experts() const {
  return IsTrue(Configuration(0), "use_data_before_expert_parallelism");
}

bool DeepSpeedOutput::round_robin() const {
  return IsTrue(Configuration(0)["zero_optimization"], "round_robin_gradients");
}

std::vector<uint64_t> DeepSpeedOutput::expert_counts() const {
  std::vector<uint64_t> counts;
  for (const Json& count : FactOr(kExpertCounts, Json::array())) {
    if (!count.is_number_unsigned()) return {};
    counts.push_back(count.get<uint64_t>());
  }
  return counts;
}

uint64_t DeepSpeedOutput::sub_group_elements() const {
  const Json zero = Configuration(0)["zero_optimization"];
  const auto found = zero.find("sub_group_size");
  if (found == zero.end() || !found->is_number()) return kSubGroupElements;
  const auto size = found->get<double>();
  return size >= 1 && size < 1e18 ? static_cast<uint64_t>(size) : kSubGroupElements;
}

std::string DeepSpeedOutput::version() const {
  const Json version = FactOr("ds_version", kDeepSpeedVersion);
  return version.is_string() ? version.get<std::string>() : kDeepSpeedVersion;
}

absl::Status DeepSpeedOutput::CheckWeightIsMaster(ConversionSource& source,
                                                  const OptimizedParameter& parameter) const {
  const uint32_t weight = parameter.weight;
  if (weight == parameter.master) return absl::OkStatus();
  const TensorState& state = index_.tensor_states[weight];
  const uint64_t elements = state.ElementCount();
  std::vector<std::byte> weights;
  for (uint64_t begin = 0; begin < elements; begin += kComparedElements) {
    const uint64_t end = std::min(elements, begin + kComparedElements);
    weights.clear();
    RETURN_IF_ERROR(source.ReadElements(weight, begin, end, state.dtype, [&](Bytes bytes) {
      weights.insert(weights.end(), bytes.begin(), bytes.end());
      return absl::OkStatus();
    }));
    size_t at = 0;
    bool equal = true;
    RETURN_IF_ERROR(
        source.ReadElements(parameter.master, begin, end, state.dtype, [&](Bytes bytes) {
          equal = equal && std::ranges::equal(bytes, std::span(weights).subspan(at, bytes.size()));
          at += bytes.size();
          return absl::OkStatus();
        }));
    if (!equal) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "%s: ZeRO-3 has no weights but the master weights rounded to %s, and these are something "
          "else; --to zero=1 keeps both",
          Describe(state), DtypeName(state.dtype)));
    }
  }
  return absl::OkStatus();
}

std::vector<std::string> DeepSpeedOutput::LeftOut() const {
  std::vector<std::string> left_out = NonTensorsWithoutPlace(index_, [](const Fact& fact) {
    const bool known =
        std::find(kKnownFacts.begin(), kKnownFacts.end(), fact.name) != kKnownFacts.end() ||
        fact.name == kExpertCounts || (fact.name == kAutoExperts && fact.json == "null");
    const bool has_words =
        fact.name == "lr_scheduler" && HasWords(Json::parse(fact.json, nullptr, false));
    return known && !has_words;
  });
  if (!without_elements_.empty()) {
    left_out.push_back(absl::StrFormat("optimizer states of %d parameters without elements (%s)",
                                       without_elements_.size(), without_elements_.front()));
  }
  return left_out;
}

uint32_t DeepSpeedOutput::OwnerOf(uint32_t number) const {
  const auto owner = owners_.find(number);
  if (owner == owners_.end()) return number;
  const TensorState& a = index_.tensor_states[number];
  const TensorState& b = index_.tensor_states[owner->second];
  return a.dtype == b.dtype && a.shape == b.shape ? owner->second : number;
}

bool DeepSpeedOutput::IsExpert(uint32_t weight) const {
  return ParseExpertName(index_.tensor_states[weight].tensor).has_value();
}

bool DeepSpeedOutput::IsBuffer(uint32_t weight) const {
  const TensorState& state = index_.tensor_states[weight];
  return state.state == "buffer" || !IsCastable(state.dtype);
}

// `module`: None of a pipeline, whose weights are in layer files.
void DeepSpeedOutput::PushWeights(TorchDraft& draft, const ModelFile& file) const {
  if (file.ranks.has_layer_files()) return draft.out().None();
  DeepSpeedRanks::Storages storages;
  draft.pickle().OrderedDict([&] {
    for (const uint32_t number : weights_) {
      const TensorState& state = index_.tensor_states[number];
      if (IsExpert(number)) continue;
      draft.Key(state.tensor);
      if (file.stage == 3 && !IsBuffer(number)) {
        draft.Ranges(state.dtype, std::vector<uint64_t>{0}, {});
      } else {
        file.ranks.Push(number, file.tensor_rank, draft, storages);
      }
    }
  });
}

// frozen_param_shapes and frozen_param_fragments: weights that no optimizer owns.
void DeepSpeedOutput::PushFrozen(TorchDraft& draft, const ModelFile& file) const {
  TorchPickle& pickle = draft.pickle();
  std::vector<uint32_t> frozen;
  if (!groups_.empty()) {
    for (const uint32_t number : weights_) {
      const TensorState& state = index_.tensor_states[number];
      if (!IsBuffer(number) && !IsTrained(state.tensor) && !owners_.contains(number)) {
        frozen.push_back(number);
      }
    }
  }
  draft.Key("frozen_param_shapes");
  if (file.stage == 1) {
    draft.out().None();
  } else {
    pickle.OrderedDict([&] {
      for (const uint32_t number : frozen) {
        draft.Key(index_.tensor_states[number].tensor);
        pickle.Size(file.ranks.ShapeOf(number));
      }
    });
  }
  DeepSpeedRanks::Storages storages;
  draft.Key("frozen_param_fragments");
  if (file.stage == 1) return draft.out().None();
  pickle.OrderedDict([&] {
    for (const uint32_t number : frozen) {
      const TensorState& state = index_.tensor_states[number];
      draft.Key(state.tensor);
      if (file.stage == 2) {
        file.ranks.Push(number, file.tensor_rank, draft, storages);
        continue;
      }
      const uint64_t elements = file.ranks.ElementCount(number);
      const uint64_t width = (elements + file.dp - 1) / file.dp;
      const uint64_t begin = std::min(elements, file.rank * width);
      const uint64_t end = std::min(elements, begin + width);
      std::vector<ElementRange> ranges;
      file.ranks.Append(number, number, file.tensor_rank, begin, end, ranges);
      if (end - begin < width) ranges.push_back({kZeroElements, 0, width - (end - begin)});
      draft.Ranges(state.dtype, std::vector<uint64_t>{width}, std::move(ranges));
    }
  });
}

void DeepSpeedOutput::PushModel(TorchDraft& draft, const ModelFile& file,
                                const FlatNames& flat) const {
  TorchPickle& pickle = draft.pickle();
  const auto fact = [&](const char* name, Json otherwise) {
    draft.Key(name);
    pickle.Json(FactOr(name, std::move(otherwise)), Sequences::kLists);
  };
  const auto number = [&](const char* name, uint64_t value) {
    draft.Key(name);
    draft.out().Int(static_cast<int64_t>(value));
  };
  pickle.Dict([&] {
    draft.Key("module");
    PushWeights(draft, file);
    draft.Key("buffer_names");
    pickle.List([&] {
      for (const uint32_t weight : weights_) {
        if (IsBuffer(weight) && !IsExpert(weight) && file.ranks.Has(weight, file.pipeline_stage)) {
          draft.out().String(index_.tensor_states[weight].tensor);
        }
      }
      for (const std::string& name : file.expert_buffers) draft.out().String(name);
    });
    draft.Key("optimizer");
    draft.out().None();
    draft.Key("param_shapes");
    pickle.List([&] {
      for (const auto& buffer : flat) {
        pickle.OrderedDict([&] {
          for (const auto& [name, parameter] : buffer) {
            draft.Key(name);
            pickle.Size(file.ranks.ShapeOf(parameter->weight));
          }
        });
      }
    });
    PushFrozen(draft, file);
    draft.Key("shared_params");
    pickle.Dict([&] {
      for (const Alias& alias : index_.aliases) {
        if (IsOptimizerState(index_.tensor_states[alias.tensor_state].state)) continue;
        if (IsExpert(alias.tensor_state)) continue;
        if (!file.ranks.Has(alias.tensor_state, file.pipeline_stage)) continue;
        draft.Key(index_.tensor_states[alias.tensor_state].tensor);
        draft.out().String(index_.tensor_states[alias.of].tensor);
      }
    });
    fact("lr_scheduler", nullptr);
    fact("data_sampler", nullptr);
    fact("random_ltd", nullptr);
    draft.Key("sparse_tensor_module_names");
    pickle.List([] {});
    fact("skipped_steps", 0);
    fact("global_steps", index_.has_step ? index_.step : 0);
    fact("global_samples", 0);
    number("dp_world_size", file.dp);
    number("mp_world_size", file.ranks.stages() * file.ranks.tensor_ranks());
    draft.Key("checkpoint_parallel_dimensions");
    pickle.Dict([&] {
      number("pp_degree", file.ranks.stages());
      number("tp_degree", file.ranks.tensor_ranks());
    });
    if (!file.expert_counts.empty()) {
      draft.Key(kExpertCounts);
      pickle.Ints(file.expert_counts);
      draft.Key(kAutoExperts);
      draft.out().None();
    }
    if (file.ranks.says_info()) {
      draft.Key("universal_checkpoint_info");
      file.ranks.PushInfo(draft);
    }
    if (file.universal) {
      Json info = FactOr(kParallelInfoFact, Json::object());
      info["universal_checkpoint_version"] = kUniversalVersion;
      draft.Key("universal_checkpoint_info");
      pickle.Json(info, Sequences::kLists);
    }
    PushConfiguration(draft, file.stage);
  });
}

void DeepSpeedOutput::PushConfiguration(TorchDraft& draft, uint64_t stage) const {
  draft.Key("ds_config");
  draft.pickle().Json(Configuration(stage), Sequences::kLists);
  draft.Key("ds_version");
  draft.out().String(version());
}

void DeepSpeedOutput::PushOptimizerFacts(TorchDraft& draft, uint64_t stage) const {
  TorchPickle& pickle = draft.pickle();
  draft.Key("zero_stage");
  draft.out().Global("deepspeed.runtime.zero.config", "ZeroStageEnum");
  draft.out().Int(static_cast<int64_t>(stage));
  draft.out().Tuple(1);
  draft.out().Reduce();
  Json scaler = FactOr("loss_scaler", nullptr);
  if (!scaler.is_object() && weight_dtype_ == Dtype::kFloat16) {
    // DeepSpeed's own defaults, as at the begin of a job.
    scaler = Json::object({{"cur_scale", 65536.0},
                           {"dynamic", true},
                           {"cur_iter", 0},
                           {"last_overflow_iter", -1},
                           {"scale_factor", 2.0},
                           {"scale_window", 1000},
                           {"min_scale", 1},
                           {"delayed_shift", 2},
                           {"cur_hysteresis", 2},
                           {"consecutive_hysteresis", false},
                           {"raise_error_at_min_scale", true},
                           {"dtype", "float16"}});
  } else if (!scaler.is_object()) {
    scaler = Json::object({{"cur_scale", 1.0}, {"dynamic", false}});
  }
  const bool dynamic = IsTrue(scaler, "dynamic");
  draft.Key("loss_scaler");
  pickle.Object("deepspeed.runtime.fp16.loss_scaler", dynamic ? "DynamicLossScaler" : "LossScaler");
  pickle.State([&] {
    for (const auto& [key, value] : scaler.items()) {
      draft.Key(key);
      if (key == "dtype" && value.is_string() &&
          DtypeFromName(value.get_ref<const std::string&>()).has_value()) {
        draft.out().Global("torch", value.get_ref<const std::string&>());
      } else {
        pickle.Json(value, Sequences::kLists);
      }
    }
  });
  draft.Key("dynamic_loss_scale");
  draft.out().Bool(dynamic);
  draft.Key("overflow");
  pickle.Json(FactOr("overflow", false), Sequences::kLists);
  if (stage != 3) {
    draft.Key("clip_grad");
    pickle.Json(FactOr("clip_grad", 0.0), Sequences::kLists);
  }
}

void DeepSpeedOutput::PushParamGroups(TorchDraft& draft,
                                      const std::vector<std::vector<uint64_t>>& numbers,
                                      uint64_t expert_ranks) const {
  TorchPickle& pickle = draft.pickle();
  draft.Key(kParamGroups);
  pickle.List([&] {
    for (size_t g = 0; g < groups_.size(); ++g) {
      pickle.Dict([&] {
        for (const auto& [key, value] : groups_[g].values.items()) {
          draft.Key(key);
          // The job that loads finds the ranks of a group of experts by this name.
          if (key == "name" && groups_[g].Has(kOfExperts) && value.is_string() &&
              value.get_ref<const std::string&>().starts_with(kExpertGroup)) {
            draft.out().String(absl::StrCat(std::string(kExpertGroup), expert_ranks));
            continue;
          }
          pickle.Json(value, Sequences::kTuples);  // betas are one
        }
        draft.Key("params");
        pickle.Ints(numbers[g]);
      });
    }
  });
}

}  // namespace holdfast::converter
