#include "examples/tiny_lm/model.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "examples/tiny_lm/random.h"

namespace tiny_lm {

ParameterTable::ParameterTable(const ModelConfig& config) {
  const size_t width = config.width;
  const float deep = 0.08F / std::sqrt(2.0F * static_cast<float>(config.layers));
  Add("embed.tokens", {config.vocabulary, width}, 0, 0.08F);
  Add("embed.positions", {config.context, width}, 0, 0.08F);
  for (size_t layer = 0; layer < config.layers; ++layer) {
    const std::string prefix = absl::StrCat("layers.", layer, ".");
    Add(prefix + "norm1.weight", {width}, 1, 0);
    Add(prefix + "norm1.bias", {width}, 0, 0);
    Add(prefix + "attention.qkv.weight", {3 * width, width}, 0, 0.08F);
    Add(prefix + "attention.qkv.bias", {3 * width}, 0, 0);
    Add(prefix + "attention.out.weight", {width, width}, 0, deep);
    Add(prefix + "attention.out.bias", {width}, 0, 0);
    Add(prefix + "norm2.weight", {width}, 1, 0);
    Add(prefix + "norm2.bias", {width}, 0, 0);
    Add(prefix + "mlp.up.weight", {config.hidden, width}, 0, 0.08F);
    Add(prefix + "mlp.up.bias", {config.hidden}, 0, 0);
    Add(prefix + "mlp.down.weight", {width, config.hidden}, 0, deep);
    Add(prefix + "mlp.down.bias", {width}, 0, 0);
  }
  Add("norm.weight", {width}, 1, 0);
  Add("norm.bias", {width}, 0, 0);
  Add("head.weight", {config.vocabulary, width}, 0, 0.08F);
}

void ParameterTable::Add(const std::string& name, std::vector<size_t> shape, float start,
                         float deviation) {
  size_t count = 1;
  for (const size_t size : shape) count *= size;
  parameters_.push_back({name, std::move(shape), element_count_, count, start, deviation});
  element_count_ += count;
}

float ParameterTable::StartValue(uint64_t seed, const Parameter& parameter, size_t index) {
  Random random(Mix(seed) ^ Mix(index));
  // Four uniform numbers: nearly normal, and without the mathematics library.
  double sum = -2;
  for (int i = 0; i < 4; ++i) sum += random.Uniform();
  return parameter.start + parameter.deviation * static_cast<float>(sum * 1.7320508075688772);
}

size_t ParameterTable::Offset(const std::string& name) const {
  return std::find_if(parameters_.begin(), parameters_.end(),
                      [&](const Parameter& parameter) { return parameter.name == name; })
      ->offset;
}

template <typename Real>
Model<Real>::Model(const ModelConfig& config) : config_(config) {
  const ParameterTable table(config);
  tokens_ = table.Offset("embed.tokens");
  positions_ = table.Offset("embed.positions");
  norm_weight_ = table.Offset("norm.weight");
  norm_bias_ = table.Offset("norm.bias");
  head_weight_ = table.Offset("head.weight");
  const size_t rows = config.context;
  const size_t state = rows * config.width;
  for (size_t layer = 0; layer < config.layers; ++layer) {
    const auto at = [&](const char* name) {
      return table.Offset(absl::StrCat("layers.", layer, ".", name));
    };
    layers_.push_back(
        {at("norm1.weight"), at("norm1.bias"), at("attention.qkv.weight"), at("attention.qkv.bias"),
         at("attention.out.weight"), at("attention.out.bias"), at("norm2.weight"), at("norm2.bias"),
         at("mlp.up.weight"), at("mlp.up.bias"), at("mlp.down.weight"), at("mlp.down.bias")});
    Activations& a = activations_.emplace_back();
    for (std::vector<Real>* vector : {&a.input, &a.norm1, &a.heads, &a.middle, &a.norm2}) {
      vector->resize(state);
    }
    for (std::vector<Real>* vector : {&a.mean1, &a.deviation1, &a.mean2, &a.deviation2}) {
      vector->resize(rows);
    }
    a.qkv.resize(3 * state);
    a.attention_weights.resize(config.heads * rows * rows);
    a.up.resize(rows * config.hidden);
    a.gelu.resize(rows * config.hidden);
  }
  for (std::vector<Real>* vector : {&stream_, &d_stream_, &final_norm_, &scratch_}) {
    vector->resize(state);
  }
  final_mean_.resize(rows);
  final_deviation_.resize(rows);
  logits_.resize(rows * config.vocabulary);
  d_wide_.resize(std::max(3 * state, rows * config.hidden));
  d_hidden_.resize(rows * config.hidden);
  partial_.resize(state);
}

template <typename Real>
typename Layers<Real>::Matrix Model<Real>::Qkv(const Real* parameters,
                                               const LayerOffsets& at) const {
  return {parameters + at.qkv_weight, parameters + at.qkv_bias, 3 * config_.width, config_.width};
}
template <typename Real>
typename Layers<Real>::Matrix Model<Real>::Out(const Real* parameters,
                                               const LayerOffsets& at) const {
  return {parameters + at.out_weight, parameters + at.out_bias, config_.width, config_.width};
}
template <typename Real>
typename Layers<Real>::Matrix Model<Real>::Up(const Real* parameters,
                                              const LayerOffsets& at) const {
  return {parameters + at.up_weight, parameters + at.up_bias, config_.hidden, config_.width};
}
template <typename Real>
typename Layers<Real>::Matrix Model<Real>::Down(const Real* parameters,
                                                const LayerOffsets& at) const {
  return {parameters + at.down_weight, parameters + at.down_bias, config_.width, config_.hidden};
}

template <typename Real>
void Model<Real>::Embed(const Real* parameters, std::span<const uint8_t> window) {
  const size_t width = config_.width;
  for (size_t row = 0; row < config_.context; ++row) {
    const Real* token = parameters + tokens_ + window[row] * width;
    const Real* position = parameters + positions_ + row * width;
    for (size_t i = 0; i < width; ++i) stream_[row * width + i] = token[i] + position[i];
  }
}

template <typename Real>
void Model<Real>::ForwardLayer(const Real* parameters, const LayerOffsets& at, Activations& a) {
  const size_t rows = config_.context;
  const size_t width = config_.width;
  a.input = stream_;
  L::NormForward(a.input.data(), parameters + at.norm1_weight, parameters + at.norm1_bias, rows,
                 width, a.norm1.data(), a.mean1.data(), a.deviation1.data());
  L::LinearForward(Qkv(parameters, at), a.norm1.data(), rows, a.qkv.data());
  L::AttentionForward(heads(), a.qkv.data(), rows, a.heads.data(), a.attention_weights.data());
  L::LinearForwardPartial(Out(parameters, at), a.heads.data(), rows, partial());
  L::FromPartial(partial_, parameters + at.out_bias, width, scratch_.data());
  for (size_t i = 0; i < stream_.size(); ++i) stream_[i] += scratch_[i];

  a.middle = stream_;
  L::NormForward(a.middle.data(), parameters + at.norm2_weight, parameters + at.norm2_bias, rows,
                 width, a.norm2.data(), a.mean2.data(), a.deviation2.data());
  L::LinearForward(Up(parameters, at), a.norm2.data(), rows, a.up.data());
  L::GeluForward(a.up.data(), a.up.size(), a.gelu.data());
  L::LinearForwardPartial(Down(parameters, at), a.gelu.data(), rows, partial());
  L::FromPartial(partial_, parameters + at.down_bias, width, scratch_.data());
  for (size_t i = 0; i < stream_.size(); ++i) stream_[i] += scratch_[i];
}

template <typename Real>
Real Model<Real>::ForwardAndBackwardHead(const Real* parameters, std::span<const uint8_t> window,
                                         Real* gradient) {
  const size_t rows = config_.context;
  const size_t width = config_.width;
  const typename L::Matrix head{parameters + head_weight_, nullptr, config_.vocabulary, width};
  L::NormForward(stream_.data(), parameters + norm_weight_, parameters + norm_bias_, rows, width,
                 final_norm_.data(), final_mean_.data(), final_deviation_.data());
  L::LinearForward(head, final_norm_.data(), rows, logits_.data());
  const Real loss =
      L::CrossEntropy(logits_.data(), window.data() + 1, rows, config_.vocabulary, overflow_count_);
  L::LinearBackwardWeight(head, final_norm_.data(), logits_.data(), rows,
                          {gradient + head_weight_, nullptr});
  L::LinearBackwardInputPartial(head, logits_.data(), rows, 1, partial());
  L::FromPartial(partial_, nullptr, width, scratch_.data());
  std::fill(d_stream_.begin(), d_stream_.end(), Real{0});
  L::NormBackward(stream_.data(), parameters + norm_weight_, scratch_.data(), final_mean_.data(),
                  final_deviation_.data(), rows, width, d_stream_.data(), gradient + norm_weight_,
                  gradient + norm_bias_);
  return loss;
}

template <typename Real>
void Model<Real>::BackwardLayer(const Real* parameters, const LayerOffsets& at,
                                const Activations& a, Real* gradient) {
  const size_t rows = config_.context;
  const size_t width = config_.width;
  // d_stream_ is the gradient of the layer's output, and of what the residual path carries.
  L::LinearBackwardWeight(Down(parameters, at), a.gelu.data(), d_stream_.data(), rows,
                          {gradient + at.down_weight, gradient + at.down_bias});
  L::LinearBackwardInput(Down(parameters, at), d_stream_.data(), rows, d_hidden_.data());
  L::GeluBackward(a.up.data(), d_hidden_.data(), a.up.size(), d_wide_.data());
  L::LinearBackwardWeight(Up(parameters, at), a.norm2.data(), d_wide_.data(), rows,
                          {gradient + at.up_weight, gradient + at.up_bias});
  L::LinearBackwardInputPartial(Up(parameters, at), d_wide_.data(), rows, kBlock, partial());
  L::FromPartial(partial_, nullptr, width, scratch_.data());
  L::NormBackward(a.middle.data(), parameters + at.norm2_weight, scratch_.data(), a.mean2.data(),
                  a.deviation2.data(), rows, width, d_stream_.data(), gradient + at.norm2_weight,
                  gradient + at.norm2_bias);

  L::LinearBackwardWeight(Out(parameters, at), a.heads.data(), d_stream_.data(), rows,
                          {gradient + at.out_weight, gradient + at.out_bias});
  L::LinearBackwardInput(Out(parameters, at), d_stream_.data(), rows, scratch_.data());
  L::AttentionBackward(heads(), a.qkv.data(), a.attention_weights.data(), scratch_.data(), rows,
                       d_wide_.data());
  L::LinearBackwardWeight(Qkv(parameters, at), a.norm1.data(), d_wide_.data(), rows,
                          {gradient + at.qkv_weight, gradient + at.qkv_bias});
  L::LinearBackwardInputPartial(Qkv(parameters, at), d_wide_.data(), rows, kBlock, partial());
  L::FromPartial(partial_, nullptr, width, scratch_.data());
  L::NormBackward(a.input.data(), parameters + at.norm1_weight, scratch_.data(), a.mean1.data(),
                  a.deviation1.data(), rows, width, d_stream_.data(), gradient + at.norm1_weight,
                  gradient + at.norm1_bias);
}

template <typename Real>
Real Model<Real>::LossAndGradient(std::span<const Real> parameters, std::span<const uint8_t> window,
                                  std::span<Real> gradient, int64_t& overflow_count) {
  overflow_count_ = 0;
  Embed(parameters.data(), window);
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    ForwardLayer(parameters.data(), layers_[layer], activations_[layer]);
  }
  const Real loss = ForwardAndBackwardHead(parameters.data(), window, gradient.data());
  for (size_t layer = layers_.size(); layer-- > 0;) {
    BackwardLayer(parameters.data(), layers_[layer], activations_[layer], gradient.data());
  }
  const size_t width = config_.width;
  for (size_t row = 0; row < config_.context; ++row) {
    Real* token = gradient.data() + tokens_ + window[row] * width;
    Real* position = gradient.data() + positions_ + row * width;
    for (size_t i = 0; i < width; ++i) {
      token[i] += d_stream_[row * width + i];
      position[i] += d_stream_[row * width + i];
    }
  }
  overflow_count += overflow_count_;
  return loss;
}

template class Model<float>;
template class Model<double>;

}  // namespace tiny_lm
