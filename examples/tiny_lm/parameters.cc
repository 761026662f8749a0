#include "examples/tiny_lm/parameters.h"

#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "examples/tiny_lm/layers.h"
#include "examples/tiny_lm/random.h"

namespace tiny_lm {
namespace {

constexpr float kDeviation = 0.08F;

}  // namespace

ParameterTable::ParameterTable(const ModelConfig& config) {
  const size_t width = config.width;
  const Home first{std::nullopt, true, false};
  const Home last{std::nullopt, false, true};
  const TensorCut vocabulary{0, 1, true};
  Add({"embed.tokens",
       {config.vocabulary, width},
       {std::nullopt, true, config.tied},
       vocabulary,
       0,
       kDeviation});
  Add({"embed.positions", {config.context, width}, first, {}, 0, kDeviation});
  for (size_t layer = 0; layer < config.layers; ++layer) AddLayer(config, layer);
  Add({"norm.weight", {width}, last, {}, 1, 0});
  Add({"norm.bias", {width}, last, {}, 0, 0});
  if (!config.tied) {
    Add({"head.weight", {config.vocabulary, width}, last, vocabulary, 0, kDeviation});
  }
}

void ParameterTable::AddLayer(const ModelConfig& config, size_t layer) {
  const size_t width = config.width;
  const float deep = kDeviation / std::sqrt(2.0F * static_cast<float>(config.layers));
  const Home home{layer, false, false};
  const auto add = [&](const char* name, std::vector<size_t> shape, std::optional<TensorCut> cut,
                       float start, float deviation) {
    Add({absl::StrCat("layers.", layer, ".", name), std::move(shape), home, cut, start, deviation});
  };
  // Whole heads; a query, its key and its value stay together, as dimension 0 of qkv tells them
  // apart.
  const auto heads = [&](size_t dimension) { return TensorCut{dimension, config.head_size()}; };
  const auto hidden = [&](size_t dimension) { return TensorCut{dimension, kBlock}; };
  add("norm1.weight", {width}, {}, 1, 0);
  add("norm1.bias", {width}, {}, 0, 0);
  add("attention.qkv.weight", {3, width, width}, heads(1), 0, kDeviation);
  add("attention.qkv.bias", {3, width}, heads(1), 0, 0);
  add("attention.out.weight", {width, width}, heads(1), 0, deep);
  add("attention.out.bias", {width}, {}, 0, 0);
  add("norm2.weight", {width}, {}, 1, 0);
  add("norm2.bias", {width}, {}, 0, 0);
  add("mlp.up.weight", {config.hidden, width}, hidden(0), 0, kDeviation);
  add("mlp.up.bias", {config.hidden}, hidden(0), 0, 0);
  add("mlp.down.weight", {width, config.hidden}, hidden(1), 0, deep);
  add("mlp.down.bias", {width}, {}, 0, 0);
}

void ParameterTable::Add(Parameter parameter) {
  parameter.offset = element_count_;
  parameter.count = 1;
  for (const size_t size : parameter.shape) parameter.count *= size;
  element_count_ += parameter.count;
  parameters_.push_back(std::move(parameter));
}

float ParameterTable::StartValue(uint64_t seed, const Parameter& parameter,
                                 size_t index_in_parameter) {
  Random random(Mix(seed) ^ Mix(parameter.offset + index_in_parameter));
  // Four uniform numbers: nearly normal, and without the mathematics library.
  double sum = -2;
  for (int i = 0; i < 4; ++i) sum += random.Uniform();
  return parameter.start + parameter.deviation * static_cast<float>(sum * 1.7320508075688772);
}

}  // namespace tiny_lm
