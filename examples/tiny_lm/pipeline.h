// Pipeline parallelism: which pass of which micro-batch a stage does when (1F1B), and what goes
// from stage to stage.
//
// One forward, one backward (PipeDream-Flush, arXiv:2006.09503, section 2.2; as in Megatron-LM): a
// stage does as many forward passes as there are stages behind it, then a forward and a backward
// pass in turn, then the backward passes that are left. So stage s of p keeps the activations of at
// most p - s micro-batches, however many there are. Both kinds of passes are in the order of the
// micro-batches on every stage, so that messages need no tags.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_PIPELINE_H_
#define HOLDFAST_EXAMPLES_TINY_LM_PIPELINE_H_

#include <cstddef>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "examples/collectives/collectives.h"
#include "examples/tiny_lm/model.h"

namespace tiny_lm {

enum class Pass { kForward, kBackward };

struct PipelineStep {
  Pass pass = Pass::kForward;
  size_t micro_batch = 0;
  bool operator==(const PipelineStep&) const = default;
};

// What stage `stage` of `stage_count` does, in order.
std::vector<PipelineStep> OneForwardOneBackward(size_t stage, size_t stage_count,
                                                size_t micro_batch_count);
// Micro-batches whose forward pass is done and whose backward pass is not, at most.
size_t UnderWayMax(size_t stage, size_t stage_count, size_t micro_batch_count);

// One stage's part of the passes of a step.
//
// Threads: one at a time.
// Lifetime: model and communicator must outlive it. After an error of Run() messages may still be
// on their way out of the model's buffers: the communicator must be destroyed before the model.
class Pipeline {
 public:
  // `stages`: the communicator of all stages, in order, or null if there is only this one. The
  // model must keep UnderWayMax() micro-batches.
  // `around`: performs each pass that is given to it, so that the caller can do something before
  // and after; or null.
  using AroundPass =
      std::function<absl::Status(Pass pass, const std::function<absl::Status()>& perform)>;
  Pipeline(Model<float>& model, collectives::Communicator* stages, size_t micro_batch_count,
           AroundPass around = nullptr);

  // After the gradient of a micro-batch is in the sums.
  using AfterBackward = std::function<absl::Status(size_t micro_batch)>;
  // Forward and backward of all micro-batches; `micro_batches.size()` is that of the constructor,
  // and one without samples costs nothing. ADDS to `sums`. Errors: those of the collectives and of
  // `after_backward`.
  absl::Status Run(std::span<const float> weights, const std::vector<Windows>& micro_batches,
                   StepSums& sums, const AfterBackward& after_backward);

 private:
  // Messages of a micro-batch that are on their way out of the model's buffers.
  struct Sends {
    std::optional<collectives::Handle> stream;
    std::optional<collectives::Handle> d_stream;
  };
  absl::Status Forward(size_t batch, std::span<const float> weights, const Windows& windows);
  absl::Status Backward(size_t batch, std::span<const float> weights, const Windows& windows,
                        StepSums& sums);

  Model<float>& model_;
  collectives::Communicator* const stages_;
  const uint32_t stage_;
  const uint32_t stage_count_;
  const std::vector<PipelineStep> schedule_;
  const AroundPass around_;
  std::vector<Sends> sends_;  // of each micro-batch that can be under way
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_PIPELINE_H_
