#include "examples/tiny_lm/model.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "examples/collectives/status_macros.h"
#include "examples/tiny_lm/exact.h"

namespace tiny_lm {
namespace {

template <typename Real>
typename Layers<Real>::Vocabulary VocabularyOf(const ModelConfig& config, uint32_t tp_count,
                                               uint32_t tp) {
  const Slice own = CeilPart(config.vocabulary, 1, tp_count, tp);
  return {own.begin, own.count, CeilPart(config.vocabulary, 1, tp_count, 0).count};
}

}  // namespace

template <typename Real>
Model<Real>::Model(const ModelConfig& config, const Partition& partition, TensorGroup group,
                   size_t batch_count, size_t samples_max)
    : config_(config),
      group_(group),
      has_embedding_(partition.is_first_stage()),
      has_head_(partition.is_last_stage()),
      is_tensor_leader_(partition.at().tp == 0),
      head_count_(
          CeilPart(config.width, config.head_size(), partition.layout().mesh.tp, partition.at().tp)
              .count /
          config.head_size()),
      hidden_count_(
          CeilPart(config.hidden, kBlock, partition.layout().mesh.tp, partition.at().tp).count),
      vocabulary_(VocabularyOf<Real>(config, partition.layout().mesh.tp, partition.at().tp)) {
  tokens_ = PlaceOf(partition, "embed.tokens");
  positions_ = PlaceOf(partition, "embed.positions");
  norm_weight_ = PlaceOf(partition, "norm.weight");
  norm_bias_ = PlaceOf(partition, "norm.bias");
  head_weight_ = config.tied ? tokens_ : PlaceOf(partition, "head.weight");
  const Slice own_layers = partition.layout().LayersOf(partition.at().pp);
  for (size_t layer = own_layers.begin; layer < own_layers.begin + own_layers.count; ++layer) {
    const auto at = [&](const char* name) {
      return PlaceOf(partition, absl::StrCat("layers.", layer, ".", name));
    };
    layers_.push_back(
        {at("norm1.weight"), at("norm1.bias"), at("attention.qkv.weight"), at("attention.qkv.bias"),
         at("attention.out.weight"), at("attention.out.bias"), at("norm2.weight"), at("norm2.bias"),
         at("mlp.up.weight"), at("mlp.up.bias"), at("mlp.down.weight"), at("mlp.down.bias")});
  }
  const size_t rows = samples_max * config.context;
  for (size_t i = 0; i < batch_count; ++i) {
    batches_.push_back({std::vector<Activations>(layers_.size(), MakeActivations(samples_max)),
                        std::vector<Real>(rows * config.width),
                        std::vector<Real>(rows * config.width)});
  }
  for (std::vector<Real>* vector : {&final_mean_, &final_deviation_, &greatest_}) {
    vector->resize(rows);
  }
  final_norm_.resize(rows * config.width);
  logits_.resize(rows * vocabulary_.stride);
  scratch_.resize(rows * config.width);
  const size_t wide = std::max(3 * head_count_ * config.head_size(), hidden_count_);
  d_wide_.resize(rows * wide);
  d_local_.resize(rows * wide);
  partial_.resize(rows * config.width);
  softmax_sums_.resize(2 * rows);
  targets_.resize(rows);
  size_t parameter_max = sample_elements();
  for (const LocalParameter& local : partition.parameters()) {
    parameter_max = std::max(parameter_max, local.slot_count);
  }
  d_weight_.resize(parameter_max);
  d_bias_.resize(parameter_max);
}

template <typename Real>
typename Model<Real>::Activations Model<Real>::MakeActivations(size_t samples) const {
  const size_t rows = samples * config_.context;
  Activations a;
  for (std::vector<Real>* vector : {&a.input, &a.norm1, &a.middle, &a.norm2}) {
    vector->resize(rows * config_.width);
  }
  for (std::vector<Real>* vector : {&a.mean1, &a.deviation1, &a.mean2, &a.deviation2}) {
    vector->resize(rows);
  }
  a.heads.resize(rows * head_count_ * config_.head_size());
  a.qkv.resize(3 * a.heads.size());
  a.attention_weights.resize(head_count_ * rows * config_.context);
  a.up.resize(rows * hidden_count_);
  a.gelu.resize(rows * hidden_count_);
  return a;
}

template <typename Real>
typename Model<Real>::Place Model<Real>::PlaceOf(const Partition& partition,
                                                 const std::string& name) const {
  const LocalParameter* local = partition.Find(name);
  if (local == nullptr) return {};
  return {local->slot, local->slot_count, local->parameter->cut.has_value() || is_tensor_leader_};
}

template <typename Real>
typename Layers<Real>::Matrix Model<Real>::Qkv(const Real* weights, const Layer& layer) const {
  return {weights + layer.qkv_weight.offset, weights + layer.qkv_bias.offset,
          3 * head_count_ * config_.head_size(), config_.width};
}
template <typename Real>
typename Layers<Real>::Matrix Model<Real>::Out(const Real* weights, const Layer& layer) const {
  return {weights + layer.out_weight.offset, weights + layer.out_bias.offset, config_.width,
          head_count_ * config_.head_size()};
}
template <typename Real>
typename Layers<Real>::Matrix Model<Real>::Up(const Real* weights, const Layer& layer) const {
  return {weights + layer.up_weight.offset, weights + layer.up_bias.offset, hidden_count_,
          config_.width};
}
template <typename Real>
typename Layers<Real>::Matrix Model<Real>::Down(const Real* weights, const Layer& layer) const {
  return {weights + layer.down_weight.offset, weights + layer.down_bias.offset, config_.width,
          hidden_count_};
}

template <typename Real>
absl::Status Model<Real>::SumPartial(size_t rows, const Real* bias) {
  const std::span<int64_t> sums = partial(rows).sums;
  RETURN_IF_ERROR(group_.Sum(sums));
  L::FromPartial(sums, bias, config_.width, scratch_.data());
  return absl::OkStatus();
}

template <typename Real>
absl::Status Model<Real>::Embed(const Real* weights, const Windows& windows,
                                std::span<Real> stream) {
  const size_t width = config_.width;
  const size_t rows = windows.size() * config_.context;
  const std::span<int64_t> bits = partial(rows).sums;
  for (size_t row = 0; row < rows; ++row) {
    const size_t token = windows[row / config_.context][row % config_.context] - vocabulary_.first;
    const std::span<int64_t> row_bits = bits.subspan(row * width, width);
    std::fill(row_bits.begin(), row_bits.end(), 0);
    if (token >= vocabulary_.count) continue;  // another rank's
    const Real* vector = weights + tokens_.offset + token * width;
    std::transform(vector, vector + width, row_bits.begin(), ToBits<Real>);
  }
  RETURN_IF_ERROR(group_.Sum(bits));
  for (size_t i = 0; i < stream.size(); ++i) {
    stream[i] = FromBits<Real>(bits[i]) + weights[positions_.offset + i % sample_elements()];
  }
  return absl::OkStatus();
}

template <typename Real>
absl::Status Model<Real>::ForwardLayer(const Real* weights, const Layer& layer, Activations& a,
                                       size_t samples, std::span<Real> stream) {
  const size_t context = config_.context;
  const size_t rows = samples * context;
  const size_t width = config_.width;
  const typename L::Heads heads{head_count_, config_.head_size()};
  std::copy(stream.begin(), stream.end(), a.input.begin());
  L::NormForward(a.input.data(), weights + layer.norm1_weight.offset,
                 weights + layer.norm1_bias.offset, rows, width, a.norm1.data(), a.mean1.data(),
                 a.deviation1.data());
  L::LinearForward(Qkv(weights, layer), a.norm1.data(), rows, a.qkv.data());
  for (size_t sample = 0; sample < samples; ++sample) {
    const size_t at = sample * context * heads.count * heads.size;
    L::AttentionForward(heads, a.qkv.data() + 3 * at, context, a.heads.data() + at,
                        a.attention_weights.data() + sample * heads.count * context * context);
  }
  L::LinearForwardPartial(Out(weights, layer), a.heads.data(), rows, partial(rows));
  RETURN_IF_ERROR(SumPartial(rows, weights + layer.out_bias.offset));
  for (size_t i = 0; i < stream.size(); ++i) stream[i] += scratch_[i];

  std::copy(stream.begin(), stream.end(), a.middle.begin());
  L::NormForward(a.middle.data(), weights + layer.norm2_weight.offset,
                 weights + layer.norm2_bias.offset, rows, width, a.norm2.data(), a.mean2.data(),
                 a.deviation2.data());
  L::LinearForward(Up(weights, layer), a.norm2.data(), rows, a.up.data());
  L::GeluForward(a.up.data(), rows * hidden_count_, a.gelu.data());
  L::LinearForwardPartial(Down(weights, layer), a.gelu.data(), rows, partial(rows));
  RETURN_IF_ERROR(SumPartial(rows, weights + layer.down_bias.offset));
  for (size_t i = 0; i < stream.size(); ++i) stream[i] += scratch_[i];
  return absl::OkStatus();
}

template <typename Real>
absl::Status Model<Real>::Forward(size_t batch, std::span<const Real> weights,
                                  const Windows& windows) {
  const std::span<Real> own_stream = stream(batch, windows.size());
  if (has_embedding_) RETURN_IF_ERROR(Embed(weights.data(), windows, own_stream));
  for (size_t i = 0; i < layers_.size(); ++i) {
    RETURN_IF_ERROR(ForwardLayer(weights.data(), layers_[i], batches_[batch].layers[i],
                                 windows.size(), own_stream));
  }
  return absl::OkStatus();
}

template <typename Real>
void Model<Real>::AddSample(const Place& place, const std::vector<Real>& gradient, StepSums& sums) {
  int64_t overflow_count = 0;
  for (size_t i = 0; i < place.count; ++i) {
    sums.gradients[place.offset + i] += ToFixedPoint(gradient[i], overflow_count);
  }
  if (place.is_counted) overflow_count_ += overflow_count;
}

template <typename Real>
void Model<Real>::AddWeightGradient(const typename L::Matrix& matrix, const Place& weight,
                                    const Place& bias, const Real* x, const Real* d_y,
                                    size_t samples, StepSums& sums) {
  for (size_t sample = 0; sample < samples; ++sample) {
    const size_t row = sample * config_.context;
    std::fill_n(d_weight_.begin(), weight.count, Real{0});
    std::fill_n(d_bias_.begin(), bias.count, Real{0});
    L::LinearBackwardWeight(matrix, x + row * matrix.inputs, d_y + row * matrix.outputs,
                            config_.context,
                            {d_weight_.data(), matrix.bias == nullptr ? nullptr : d_bias_.data()});
    AddSample(weight, d_weight_, sums);
    AddSample(bias, d_bias_, sums);
  }
}

template <typename Real>
void Model<Real>::BackwardNorm(const Real* weights, const Place& weight, const Place& bias,
                               const Real* x, const Real* mean, const Real* deviation,
                               size_t samples, std::span<Real> d_stream, StepSums& sums) {
  for (size_t sample = 0; sample < samples; ++sample) {
    const size_t row = sample * config_.context;
    const size_t at = row * config_.width;
    std::fill_n(d_weight_.begin(), config_.width, Real{0});
    std::fill_n(d_bias_.begin(), config_.width, Real{0});
    L::NormBackward(x + at, weights + weight.offset, scratch_.data() + at, mean + row,
                    deviation + row, config_.context, config_.width, d_stream.data() + at,
                    d_weight_.data(), d_bias_.data());
    AddSample(weight, d_weight_, sums);
    AddSample(bias, d_bias_, sums);
  }
}

template <typename Real>
absl::Status Model<Real>::BackwardHead(const Real* weights, const Windows& windows,
                                       std::span<const Real> stream, std::span<Real> d_stream,
                                       StepSums& sums) {
  const size_t context = config_.context;
  const size_t samples = windows.size();
  const size_t rows = samples * context;
  const typename L::Matrix head{weights + head_weight_.offset, nullptr, vocabulary_.stride,
                                config_.width};
  L::NormForward(stream.data(), weights + norm_weight_.offset, weights + norm_bias_.offset, rows,
                 config_.width, final_norm_.data(), final_mean_.data(), final_deviation_.data());
  L::LinearForward(head, final_norm_.data(), rows, logits_.data());
  for (size_t row = 0; row < rows; ++row) targets_[row] = windows[row / context][row % context + 1];

  L::GreatestLogits(vocabulary_, logits_.data(), rows, greatest_.data());
  RETURN_IF_ERROR(group_.Greatest(std::span(greatest_).first(rows)));
  const std::span<int64_t> softmax = std::span(softmax_sums_).first(2 * rows);
  L::SoftmaxPartial(vocabulary_, logits_.data(), targets_.data(), rows, greatest_.data(),
                    {softmax, overflow_count_});
  RETURN_IF_ERROR(group_.Sum(softmax));
  for (size_t sample = 0; sample < samples; ++sample) {
    const size_t row = sample * context;
    const Real loss =
        L::CrossEntropy(vocabulary_, logits_.data() + row * vocabulary_.stride,
                        targets_.data() + row, context, &softmax[row], &softmax[rows + row]);
    if (is_tensor_leader_) sums.loss += ToFixedPoint(loss, overflow_count_);
  }

  AddWeightGradient(head, head_weight_, {}, final_norm_.data(), logits_.data(), samples, sums);
  L::LinearBackwardInputPartial(head, logits_.data(), rows, 1, partial(rows));
  RETURN_IF_ERROR(SumPartial(rows, nullptr));
  std::fill(d_stream.begin(), d_stream.end(), Real{0});
  BackwardNorm(weights, norm_weight_, norm_bias_, stream.data(), final_mean_.data(),
               final_deviation_.data(), samples, d_stream, sums);
  return absl::OkStatus();
}

// d_stream is the gradient of the layer's output, and of what the residual path carries.
template <typename Real>
absl::Status Model<Real>::BackwardLayer(const Real* weights, const Layer& layer,
                                        const Activations& a, size_t samples,
                                        std::span<Real> d_stream, StepSums& sums) {
  const size_t context = config_.context;
  const size_t rows = samples * context;
  const typename L::Heads heads{head_count_, config_.head_size()};
  AddWeightGradient(Down(weights, layer), layer.down_weight, layer.down_bias, a.gelu.data(),
                    d_stream.data(), samples, sums);
  L::LinearBackwardInput(Down(weights, layer), d_stream.data(), rows, d_local_.data());
  L::GeluBackward(a.up.data(), d_local_.data(), rows * hidden_count_, d_wide_.data());
  AddWeightGradient(Up(weights, layer), layer.up_weight, layer.up_bias, a.norm2.data(),
                    d_wide_.data(), samples, sums);
  L::LinearBackwardInputPartial(Up(weights, layer), d_wide_.data(), rows, kBlock, partial(rows));
  RETURN_IF_ERROR(SumPartial(rows, nullptr));
  BackwardNorm(weights, layer.norm2_weight, layer.norm2_bias, a.middle.data(), a.mean2.data(),
               a.deviation2.data(), samples, d_stream, sums);

  AddWeightGradient(Out(weights, layer), layer.out_weight, layer.out_bias, a.heads.data(),
                    d_stream.data(), samples, sums);
  L::LinearBackwardInput(Out(weights, layer), d_stream.data(), rows, d_local_.data());
  for (size_t sample = 0; sample < samples; ++sample) {
    const size_t at = sample * context * heads.count * heads.size;
    L::AttentionBackward(heads, a.qkv.data() + 3 * at,
                         a.attention_weights.data() + sample * heads.count * context * context,
                         d_local_.data() + at, context, d_wide_.data() + 3 * at);
  }
  AddWeightGradient(Qkv(weights, layer), layer.qkv_weight, layer.qkv_bias, a.norm1.data(),
                    d_wide_.data(), samples, sums);
  L::LinearBackwardInputPartial(Qkv(weights, layer), d_wide_.data(), rows, kBlock, partial(rows));
  RETURN_IF_ERROR(SumPartial(rows, nullptr));
  BackwardNorm(weights, layer.norm1_weight, layer.norm1_bias, a.input.data(), a.mean1.data(),
               a.deviation1.data(), samples, d_stream, sums);
  return absl::OkStatus();
}

template <typename Real>
void Model<Real>::BackwardEmbed(const Windows& windows, std::span<const Real> d_stream,
                                StepSums& sums) {
  const size_t width = config_.width;
  for (size_t sample = 0; sample < windows.size(); ++sample) {
    const std::span<const Real> d_rows =
        d_stream.subspan(sample * sample_elements(), sample_elements());
    std::fill_n(d_weight_.begin(), tokens_.count, Real{0});
    for (size_t row = 0; row < config_.context; ++row) {
      const size_t token = windows[sample][row] - vocabulary_.first;
      if (token >= vocabulary_.count) continue;
      for (size_t i = 0; i < width; ++i) d_weight_[token * width + i] += d_rows[row * width + i];
    }
    AddSample(tokens_, d_weight_, sums);
    std::copy(d_rows.begin(), d_rows.end(), d_weight_.begin());
    AddSample(positions_, d_weight_, sums);
  }
}

template <typename Real>
absl::Status Model<Real>::Backward(size_t batch, std::span<const Real> weights,
                                   const Windows& windows, StepSums& sums) {
  const std::span<Real> own_d_stream = d_stream(batch, windows.size());
  if (has_head_) {
    RETURN_IF_ERROR(
        BackwardHead(weights.data(), windows, stream(batch, windows.size()), own_d_stream, sums));
  }
  for (size_t i = layers_.size(); i-- > 0;) {
    RETURN_IF_ERROR(BackwardLayer(weights.data(), layers_[i], batches_[batch].layers[i],
                                  windows.size(), own_d_stream, sums));
  }
  if (has_embedding_) BackwardEmbed(windows, own_d_stream, sums);
  sums.overflow_count += std::exchange(overflow_count_, 0);
  return absl::OkStatus();
}

template class Model<float>;
template class Model<double>;

}  // namespace tiny_lm
