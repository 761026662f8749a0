#include "examples/tiny_lm/optimizer.h"

#include <algorithm>
#include <cmath>

#include "examples/tiny_lm/exact.h"

namespace tiny_lm {

void AdamStep(const AdamConfig& config, int64_t step, std::span<const int64_t> gradient_sums,
              uint64_t sample_count, const AdamState& state) {
  const double t = static_cast<double>(step);
  const float warmup = static_cast<float>(
      std::min(1.0, t / static_cast<double>(std::max<int64_t>(config.warmup_steps, 1))));
  const float rate = config.learning_rate * warmup;
  const float correction1 = static_cast<float>(1.0 / (1.0 - std::pow(config.beta1, t)));
  const float correction2 = static_cast<float>(1.0 / (1.0 - std::pow(config.beta2, t)));
  const double mean = 1.0 / static_cast<double>(sample_count);
  for (size_t i = 0; i < gradient_sums.size(); ++i) {
    const float gradient = static_cast<float>(FromFixedPoint(gradient_sums[i]) * mean);
    const float m = config.beta1 * state.exp_avg[i] + (1.0F - config.beta1) * gradient;
    const float v =
        config.beta2 * state.exp_avg_sq[i] + (1.0F - config.beta2) * gradient * gradient;
    state.exp_avg[i] = m;
    state.exp_avg_sq[i] = v;
    state.master[i] -= rate * (m * correction1) / (std::sqrt(v * correction2) + config.epsilon);
    state.parameters[i] = ToBfloat16(state.master[i]);
  }
}

}  // namespace tiny_lm
