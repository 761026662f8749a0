#include "converter/megatron_arguments.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "base/json_reader.h"
#include "base/status_macros.h"
#include "converter/model_numbers.h"

namespace holdfast::converter {
namespace {

constexpr std::string_view kQkv = ".self_attention.linear_qkv.weight";
constexpr std::string_view kExpertFirst = ".mlp.experts.linear_fc1.weight";  // of any expert
constexpr std::string_view kExpertSecond = ".mlp.experts.linear_fc2.weight";
constexpr double kRotaryBaseMax = 1e15;

// A layer's tensors by what follows its number, those of experts without theirs: the shape in the
// first layer that has it.
struct Model {
  std::map<std::string, std::vector<uint64_t>, std::less<>> of_layer;
  std::map<std::string, std::vector<uint64_t>, std::less<>> others;
  uint64_t layers = 0;
  uint64_t experts = 0;
  bool grouped = false;              // experts' tensors are numbered, not their modules
  std::set<uint64_t> expert_layers;  // that have experts

  bool Has(std::string_view rest) const { return of_layer.contains(rest); }
  // Its size; 0 if there is none.
  uint64_t Size(std::string_view rest, size_t dimension) const {
    const auto found = of_layer.find(rest);
    return found != of_layer.end() && dimension < found->second.size() ? found->second[dimension]
                                                                       : 0;
  }
};

Model ModelOf(const ForeignIndex& index, const MegatronTensors& tensors) {
  Model model;
  for (const auto& [name, weights] : tensors.weights()) {
    const std::vector<uint64_t>& shape = index.tensor_states[weights.tensor_state].shape;
    const auto layer = ParseMegatronLayer(name);
    if (!layer.has_value()) {
      model.others.emplace(name, shape);
      continue;
    }
    model.layers = std::max(model.layers, layer->number + 1);
    std::string rest(layer->rest);
    if (const auto expert = ParseMegatronExpert(rest); expert.has_value()) {
      model.experts = std::max(model.experts, expert->number + 1);
      model.expert_layers.insert(layer->number);
      model.grouped = !expert->before.ends_with("local_experts.");
      rest =
          absl::StrReplaceAll(absl::StrCat(std::string(expert->before), std::string(expert->after)),
                              {{".local_experts..", "."}});
    }
    model.of_layer.emplace(std::move(rest), shape);
  }
  return model;
}

class Configuration {
 public:
  explicit Configuration(const JsonDocument& document) : root_(document.root()) {}

  JsonValue Find(std::initializer_list<std::string_view> keys) const {
    for (const std::string_view key : keys) {
      if (const JsonValue value = root_.Find(key); value.present()) return value;
    }
    return {};
  }
  // A setting of rotary positions, wherever the release of transformers has it.
  JsonValue FindRotary(std::string_view key) const {
    const JsonValue nested = root_.Find("rope_parameters");
    if (nested.present() && nested.type() == JsonValue::Type::kObject &&
        nested.Find(key).present()) {
      return nested.Find(key);
    }
    return root_.Find(key);
  }
  std::string Text(std::initializer_list<std::string_view> keys) const {
    const absl::StatusOr<std::string_view> text = Find(keys).String();
    return text.ok() ? std::string(*text) : "";
  }

 private:
  JsonValue root_;
};

using Values = nlohmann::ordered_json;

void SetNumber(Values& values, const char* name, const JsonValue& value) {
  if (const absl::StatusOr<uint64_t> number = value.Uint64(); number.ok()) values[name] = *number;
}

// A float even where the configuration has an integer.
void SetReal(Values& values, const char* name, const JsonValue& value) {
  if (const absl::StatusOr<double> number = value.Double(); number.ok()) values[name] = *number;
}

void AddPositions(const Model& model, const Configuration& config, Values& values) {
  const auto learned = model.others.find("embedding.position_embeddings.weight");
  values["add_position_embedding"] = true;
  if (learned != model.others.end() && !learned->second.empty()) {
    values["position_embedding_type"] = "learned_absolute";
    values["max_position_embeddings"] = learned->second[0];
    return;
  }
  SetNumber(values, "max_position_embeddings",
            config.Find({"max_position_embeddings", "n_positions"}));
  const absl::StatusOr<double> base = config.FindRotary("rope_theta").Double();
  if (!base.ok() || *base < 1 || *base > kRotaryBaseMax) return;
  values["position_embedding_type"] = "rope";
  values["rotary_interleaved"] = false;
  values["rotary_base"] = static_cast<int64_t>(*base);  // Megatron's is an integer
  SetReal(values, "rotary_percent", config.FindRotary("partial_rotary_factor"));
  if (!values.contains("rotary_percent")) values["rotary_percent"] = 1.0;
}

void AddNorms(const Model& model, const Configuration& config, Values& values) {
  const bool has_bias = model.others.contains("decoder.final_layernorm.bias");
  values["normalization"] = has_bias ? "LayerNorm" : "RMSNorm";
  SetReal(values, "norm_epsilon",
          config.Find({"rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps"}));
}

void AddLayers(const Model& model, const Configuration& config, Values& values) {
  const std::string_view first = model.experts > 0 ? kExpertFirst : ".mlp.linear_fc1.weight";
  const std::string_view second = model.experts > 0 ? kExpertSecond : ".mlp.linear_fc2.weight";
  const uint64_t units = model.Size(second, 1);
  if (units > 0) {
    const uint64_t dense_units = model.Size(".mlp.linear_fc2.weight", 1);
    values["ffn_hidden_size"] = dense_units > 0 ? dense_units : units;
    const bool gated = model.Size(first, 0) == 2 * units;
    const std::string activation = config.Text({"hidden_act", "activation_function"});
    if (!gated || activation == "silu" || activation == "swish") values["swiglu"] = gated;
    if (!gated && activation == "relu2") values["squared_relu"] = true;
  }
  const bool has_bias = model.Has(".self_attention.linear_proj.bias");
  values["add_bias_linear"] = has_bias;
  values["add_qkv_bias"] = !has_bias && model.Has(".self_attention.linear_qkv.bias");
  if (model.experts == 0) return;
  values["num_experts"] = model.experts;
  values["moe_ffn_hidden_size"] = units;
  values["moe_grouped_gemm"] = model.grouped;
  SetNumber(values, "moe_router_topk", config.Find({"num_experts_per_tok"}));
  if (model.expert_layers.size() == model.layers) {
    values["moe_layer_freq"] = 1;
  } else {
    for (uint64_t layer = 0; layer < model.layers; ++layer) {
      values["moe_layer_freq"].push_back(model.expert_layers.contains(layer) ? 1 : 0);
    }
  }
}

}  // namespace

void PushMegatronArguments(const DerivedArguments& derived, const std::function<void()>& more,
                           TorchDraft& draft) {
  draft.pickle().Object("argparse", "Namespace");
  draft.pickle().State([&] {
    for (const auto& [key, value] : derived.values.items()) {
      draft.Key(key);
      draft.pickle().Json(value, TorchPickle::Sequences::kLists);
    }
    more();
  });
}

absl::StatusOr<std::optional<DerivedArguments>> DeriveMegatronArguments(
    const ForeignIndex& index, const MegatronTensors& tensors, const std::string& config_json) {
  if (config_json.empty() || tensors.state().Common("args").present()) return std::nullopt;
  ASSIGN_OR_RETURN(ModelNumbers numbers, ModelNumbers::Create({.config = config_json}));
  ASSIGN_OR_RETURN(const std::unique_ptr<JsonDocument> document,
                   JsonDocument::Parse(config_json, {.duplicates = JsonDuplicates::kKeep}));
  const Configuration config(*document);
  ASSIGN_OR_RETURN(const std::optional<uint64_t> heads, numbers.Find({.name = "heads"}));
  ASSIGN_OR_RETURN(const std::optional<uint64_t> groups, numbers.Find({.name = "groups"}));
  const Model model = ModelOf(index, tensors);
  const auto words = model.others.find("embedding.word_embeddings.weight");
  const uint64_t rows = model.Size(kQkv, 0);
  if (!heads.has_value() || !groups.has_value() || words == model.others.end() ||
      words->second.size() != 2 || rows == 0) {
    return std::nullopt;
  }
  const uint64_t parts = *heads + 2 * *groups;
  if (*heads % *groups != 0 || rows % parts != 0) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "config.json: expected heads and groups of them that divide the %d rows of linear_qkv, "
        "found %d heads in %d groups",
        rows, *heads, *groups));
  }
  DerivedArguments derived;
  Values& values = derived.values;
  values = Values::object();
  values["num_layers"] = model.layers;
  values["hidden_size"] = words->second[1];
  values["num_attention_heads"] = *heads;
  values["group_query_attention"] = *groups < *heads;
  values["num_query_groups"] = *groups < *heads ? *groups : 1;
  values["kv_channels"] = rows / parts;
  values["padded_vocab_size"] = words->second[0];
  const bool tied = tensors.ArgumentsByNames().tied.value_or(false);
  values["untie_embeddings_and_output_weights"] = !tied;
  AddPositions(model, config, values);
  AddNorms(model, config, values);
  AddLayers(model, config, values);
  const bool local_modules = model.Has(".input_layernorm.weight");
  values["transformer_impl"] = local_modules ? "local" : "transformer_engine";
  values["use_distributed_optimizer"] = tensors.has_optimizer();
  values["no_save_optim"] = !tensors.has_optimizer();
  values["no_save_rng"] = true;
  derived.layout.layers = model.layers;
  derived.layout.query_groups = *groups;
  derived.layout.tied = tied;
  derived.layout.local_modules = local_modules;
  derived.layout.grouped_experts = model.grouped;
  derived.layout.distributed_optimizer = tensors.has_optimizer();
  if (values.contains("swiglu")) derived.layout.gated = values["swiglu"].get<bool>();
  return derived;
}

}  // namespace holdfast::converter
