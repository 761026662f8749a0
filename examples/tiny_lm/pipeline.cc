#include "examples/tiny_lm/pipeline.h"

#include <algorithm>
#include <utility>

#include "examples/collectives/status_macros.h"

namespace tiny_lm {
namespace {

absl::Status WaitFor(std::optional<collectives::Handle>& handle) {
  const std::optional<collectives::Handle> taken = std::exchange(handle, std::nullopt);
  return taken.has_value() ? taken->Wait() : absl::OkStatus();
}

}  // namespace

std::vector<PipelineStep> OneForwardOneBackward(size_t stage, size_t stage_count,
                                                size_t micro_batch_count) {
  const size_t warmup = std::min(stage_count - stage - 1, micro_batch_count);
  std::vector<PipelineStep> steps;
  for (size_t i = 0; i < micro_batch_count + warmup; ++i) {
    if (i < micro_batch_count) steps.push_back({Pass::kForward, i});
    if (i >= warmup) steps.push_back({Pass::kBackward, i - warmup});
  }
  return steps;
}

size_t UnderWayMax(size_t stage, size_t stage_count, size_t micro_batch_count) {
  return std::min(stage_count - stage, micro_batch_count);
}

Pipeline::Pipeline(Model<float>& model, collectives::Communicator* stages, size_t micro_batch_count,
                   AroundPass around)
    : model_(model),
      stages_(stages),
      stage_(stages == nullptr ? 0 : stages->rank()),
      stage_count_(stages == nullptr ? 1 : stages->size()),
      schedule_(OneForwardOneBackward(stage_, stage_count_, micro_batch_count)),
      around_(std::move(around)),
      sends_(UnderWayMax(stage_, stage_count_, micro_batch_count)) {}

absl::Status Pipeline::Run(std::span<const float> weights,
                           const std::vector<Windows>& micro_batches, StepSums& sums,
                           const AfterBackward& after_backward) {
  for (const PipelineStep& step : schedule_) {
    const Windows& windows = micro_batches[step.micro_batch];
    const size_t batch = step.micro_batch % sends_.size();
    const bool is_forward = step.pass == Pass::kForward;
    const auto perform = [&] {
      return is_forward ? Forward(batch, weights, windows)
                        : Backward(batch, weights, windows, sums);
    };
    if (!windows.empty()) {
      RETURN_IF_ERROR(around_ == nullptr ? perform() : around_(step.pass, perform));
    }
    if (!is_forward) RETURN_IF_ERROR(after_backward(step.micro_batch));
  }
  for (Sends& sends : sends_) {
    RETURN_IF_ERROR(WaitFor(sends.stream));
    RETURN_IF_ERROR(WaitFor(sends.d_stream));
  }
  return absl::OkStatus();
}

absl::Status Pipeline::Forward(size_t batch, std::span<const float> weights,
                               const Windows& windows) {
  const std::span<float> stream = model_.stream(batch, windows.size());
  RETURN_IF_ERROR(WaitFor(sends_[batch].stream));
  if (stage_ > 0) {
    RETURN_IF_ERROR(stages_->Receive(std::as_writable_bytes(stream), stage_ - 1).Wait());
  }
  RETURN_IF_ERROR(model_.Forward(batch, weights, windows));
  if (stage_ + 1 < stage_count_) {
    sends_[batch].stream = stages_->Send(std::as_bytes(stream), stage_ + 1);
  }
  return absl::OkStatus();
}

absl::Status Pipeline::Backward(size_t batch, std::span<const float> weights,
                                const Windows& windows, StepSums& sums) {
  const std::span<float> d_stream = model_.d_stream(batch, windows.size());
  RETURN_IF_ERROR(WaitFor(sends_[batch].d_stream));
  if (stage_ + 1 < stage_count_) {
    RETURN_IF_ERROR(stages_->Receive(std::as_writable_bytes(d_stream), stage_ + 1).Wait());
  }
  RETURN_IF_ERROR(model_.Backward(batch, weights, windows, sums));
  if (stage_ > 0) sends_[batch].d_stream = stages_->Send(std::as_bytes(d_stream), stage_ - 1);
  return absl::OkStatus();
}

}  // namespace tiny_lm
