// Adam, element by element: an element's new value depends on nothing but its own sum of gradients
// and states, so that any cut over ranks gives the same bits.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_OPTIMIZER_H_
#define HOLDFAST_EXAMPLES_TINY_LM_OPTIMIZER_H_

#include <cstdint>
#include <span>

namespace tiny_lm {

struct AdamConfig {
  float learning_rate = 3e-3F;
  int64_t warmup_steps = 20;
  float beta1 = 0.9F;
  float beta2 = 0.99F;
  float epsilon = 1e-8F;
};

// Of the same elements; all have the same size.
struct AdamState {
  std::span<float> master;
  std::span<float> exp_avg;
  std::span<float> exp_avg_sq;
  std::span<uint16_t> parameters;  // gets master, rounded to bfloat16
};

// Step number `step` (from 1). `gradient_sums`: fixed-point sums over `sample_count` samples.
void AdamStep(const AdamConfig& config, int64_t step, std::span<const int64_t> gradient_sums,
              uint64_t sample_count, const AdamState& state);

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_OPTIMIZER_H_
