// The language model: forward and backward pass of micro-batches through what of it is on a rank.
//
// A rank has a stage: the embedding (first stage), consecutive layers, norm and head (last stage);
// of these the part that tensor parallelism leaves it. The whole model on one rank is a special
// case. Between stages goes the residual stream, and its gradient back (pipeline.h moves them);
// between the ranks of a tensor group go sums in fixed point.
//
// The sample is the block of every sum over the batch: what a sample adds to a parameter's gradient
// is summed in floating point by one rank, rounded once, and added in int64 (exact.h). A tied
// embedding gets two such terms per sample, one from each end of the model.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_MODEL_H_
#define HOLDFAST_EXAMPLES_TINY_LM_MODEL_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "examples/tiny_lm/layers.h"
#include "examples/tiny_lm/parameters.h"
#include "examples/tiny_lm/partition.h"
#include "examples/tiny_lm/tensor_group.h"

namespace tiny_lm {

// One per sample: context + 1 tokens, of which each predicts the next.
using Windows = std::vector<std::span<const uint8_t>>;

// Fixed-point sums over samples. What several ranks of a tensor group compute alike is counted by
// the first of them; gradients are on all.
struct StepSums {
  std::vector<int64_t> gradients;  // as slots
  int64_t loss = 0;                // of the samples' means over tokens; on the last stage
  int64_t overflow_count = 0;      // sums that did not fit
};

// Real is float to train, and double to check the gradient.
//
// Threads: one at a time (it owns its activations).
// Lifetime: what the tensor group refers to must outlive it.
template <typename Real>
class Model {
 public:
  // Keeps the activations of up to `batch_count` micro-batches, of up to `samples_max` samples.
  Model(const ModelConfig& config, const Partition& partition, TensorGroup group,
        size_t batch_count, size_t samples_max);

  // Between stages, of micro-batch number `batch`: what Forward takes (but on the first stage) and
  // leaves, and what Backward takes (but on the last stage) and leaves.
  std::span<Real> stream(size_t batch, size_t samples) {
    return std::span(batches_[batch].stream).first(samples * sample_elements());
  }
  std::span<Real> d_stream(size_t batch, size_t samples) {
    return std::span(batches_[batch].d_stream).first(samples * sample_elements());
  }

  // `weights` are as slots, the same in both calls, the padding 0. Errors: those of the tensor
  // group.
  absl::Status Forward(size_t batch, std::span<const Real> weights, const Windows& windows);
  // Once after Forward. ADDS to `sums`.
  absl::Status Backward(size_t batch, std::span<const Real> weights, const Windows& windows,
                        StepSums& sums);

 private:
  using L = Layers<Real>;
  // Where a parameter is in the slots; of `count` 0 if nothing of it is here.
  struct Place {
    size_t offset = 0;
    size_t count = 0;
    bool is_counted = true;  // this rank counts the overflows of its sums
  };
  struct Layer {
    Place norm1_weight, norm1_bias, qkv_weight, qkv_bias, out_weight, out_bias;
    Place norm2_weight, norm2_bias, up_weight, up_bias, down_weight, down_bias;
  };
  struct Activations {
    std::vector<Real> input, mean1, deviation1, norm1, qkv, attention_weights, heads;
    std::vector<Real> middle, mean2, deviation2, norm2, up, gelu;
  };
  struct Batch {
    std::vector<Activations> layers;
    std::vector<Real> stream;
    std::vector<Real> d_stream;
  };

  Activations MakeActivations(size_t samples) const;
  Place PlaceOf(const Partition& partition, const std::string& name) const;
  typename L::Matrix Qkv(const Real* weights, const Layer& layer) const;
  typename L::Matrix Out(const Real* weights, const Layer& layer) const;
  typename L::Matrix Up(const Real* weights, const Layer& layer) const;
  typename L::Matrix Down(const Real* weights, const Layer& layer) const;

  absl::Status Embed(const Real* weights, const Windows& windows, std::span<Real> stream);
  absl::Status ForwardLayer(const Real* weights, const Layer& layer, Activations& a, size_t samples,
                            std::span<Real> stream);
  absl::Status BackwardHead(const Real* weights, const Windows& windows,
                            std::span<const Real> stream, std::span<Real> d_stream, StepSums& sums);
  absl::Status BackwardLayer(const Real* weights, const Layer& layer, const Activations& a,
                             size_t samples, std::span<Real> d_stream, StepSums& sums);
  void BackwardEmbed(const Windows& windows, std::span<const Real> d_stream, StepSums& sums);

  // Adds the partial sums of the other ranks, then turns them into numbers in scratch_.
  absl::Status SumPartial(size_t rows, const Real* bias);
  void AddWeightGradient(const typename L::Matrix& matrix, const Place& weight, const Place& bias,
                         const Real* x, const Real* d_y, size_t samples, StepSums& sums);
  // With the gradient of the norm's output in scratch_. Adds to d_stream.
  void BackwardNorm(const Real* weights, const Place& weight, const Place& bias, const Real* x,
                    const Real* mean, const Real* deviation, size_t samples,
                    std::span<Real> d_stream, StepSums& sums);
  void AddSample(const Place& place, const std::vector<Real>& gradient, StepSums& sums);

  size_t sample_elements() const { return config_.context * config_.width; }
  Partial partial(size_t rows) {
    return {std::span(partial_).first(rows * config_.width), overflow_count_};
  }

  const ModelConfig config_;
  TensorGroup group_;
  const bool has_embedding_;
  const bool has_head_;
  const bool is_tensor_leader_;
  const size_t head_count_;    // on this rank
  const size_t hidden_count_;  // on this rank
  const typename L::Vocabulary vocabulary_;

  std::vector<Layer> layers_;
  Place tokens_, positions_, norm_weight_, norm_bias_, head_weight_;

  std::vector<Batch> batches_;
  // Of one micro-batch.
  std::vector<Real> final_mean_, final_deviation_, final_norm_, logits_, greatest_;
  std::vector<Real> scratch_, d_wide_, d_local_;
  std::vector<int64_t> partial_;       // rows x width
  std::vector<int64_t> softmax_sums_;  // 2 x rows
  std::vector<uint8_t> targets_;
  // Of one sample.
  std::vector<Real> d_weight_, d_bias_;
  int64_t overflow_count_ = 0;
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_MODEL_H_
