// The language model: which parameters it has, and the loss and gradient of one sample.
//
// Parameters are one flat array in the order of a table of names and shapes; every distribution and
// every checkpoint is described with that table. The model itself knows nothing of ranks.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_MODEL_H_
#define HOLDFAST_EXAMPLES_TINY_LM_MODEL_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "examples/tiny_lm/corpus.h"
#include "examples/tiny_lm/layers.h"

namespace tiny_lm {

// width = heads * a multiple of kBlock.
struct ModelConfig {
  size_t context = 32;  // tokens of a sample
  size_t width = 32;
  size_t heads = 4;
  size_t layers = 2;
  size_t hidden = 128;  // of the MLP, a multiple of kBlock
  size_t vocabulary = kVocabularySize;
};

struct Parameter {
  std::string name;
  std::vector<size_t> shape;
  size_t offset = 0;  // elements, in the flat array
  size_t count = 0;
  // At the start: `start` plus random values of this deviation.
  float start = 0;
  float deviation = 0;
};

class ParameterTable {
 public:
  explicit ParameterTable(const ModelConfig& config);
  const std::vector<Parameter>& parameters() const { return parameters_; }
  size_t element_count() const { return element_count_; }
  // The first value of an element of the flat array: a function of seed and index alone, so that
  // every rank can make its own part.
  static float StartValue(uint64_t seed, const Parameter& parameter, size_t index);
  // Where a parameter begins. It must be in the table.
  size_t Offset(const std::string& name) const;

 private:
  void Add(const std::string& name, std::vector<size_t> shape, float start, float deviation);
  std::vector<Parameter> parameters_;
  size_t element_count_ = 0;
};

// Loss and gradient of one sample. Real is float to train, and double to check the gradient.
//
// Threads: one at a time (it owns its activations).
template <typename Real>
class Model {
 public:
  explicit Model(const ModelConfig& config);

  // `window` is context + 1 tokens: each predicts the next. Returns the mean loss over the tokens
  // and ADDS its gradient to `gradient`; both arrays are flat, as in the table. `overflow_count`
  // grows by the sums that did not fit fixed point.
  Real LossAndGradient(std::span<const Real> parameters, std::span<const uint8_t> window,
                       std::span<Real> gradient, int64_t& overflow_count);

 private:
  using L = Layers<Real>;
  // Offsets in the flat array.
  struct LayerOffsets {
    size_t norm1_weight, norm1_bias, qkv_weight, qkv_bias, out_weight, out_bias;
    size_t norm2_weight, norm2_bias, up_weight, up_bias, down_weight, down_bias;
  };
  struct Activations {
    std::vector<Real> input, mean1, deviation1, norm1, qkv, attention_weights, heads;
    std::vector<Real> middle, mean2, deviation2, norm2, up, gelu;
  };

  void Embed(const Real* parameters, std::span<const uint8_t> window);
  void ForwardLayer(const Real* parameters, const LayerOffsets& at, Activations& a);
  Real ForwardAndBackwardHead(const Real* parameters, std::span<const uint8_t> window,
                              Real* gradient);
  void BackwardLayer(const Real* parameters, const LayerOffsets& at, const Activations& a,
                     Real* gradient);
  typename L::Matrix Qkv(const Real* parameters, const LayerOffsets& at) const;
  typename L::Matrix Out(const Real* parameters, const LayerOffsets& at) const;
  typename L::Matrix Up(const Real* parameters, const LayerOffsets& at) const;
  typename L::Matrix Down(const Real* parameters, const LayerOffsets& at) const;
  typename L::Heads heads() const { return {config_.heads, config_.width / config_.heads}; }
  Partial partial() { return {partial_, overflow_count_}; }

  const ModelConfig config_;
  size_t tokens_ = 0;
  size_t positions_ = 0;
  std::vector<LayerOffsets> layers_;
  size_t norm_weight_ = 0;
  size_t norm_bias_ = 0;
  size_t head_weight_ = 0;

  std::vector<Activations> activations_;
  std::vector<Real> stream_;  // between layers: the residual stream
  std::vector<Real> d_stream_;
  std::vector<Real> final_mean_, final_deviation_, final_norm_, logits_;
  std::vector<Real> scratch_, d_wide_, d_hidden_;
  std::vector<int64_t> partial_;  // rows x width
  int64_t overflow_count_ = 0;
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_MODEL_H_
