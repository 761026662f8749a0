// Data parallelism: gradients go to those who keep the optimizer's states, parameters to those who
// compute with them. All that ZeRO changes, but for what is kept (partition.h, state.h):
//
//   ZeRO-0  gradients are summed over dp on everyone, who all make the same optimizer step;
//   ZeRO-1  every rank gets the sums of its own slice, and parameters are gathered after the step;
//   ZeRO-2  the same after every micro-batch, so that nobody accumulates gradients of others;
//   ZeRO-3  gradients as ZeRO-2; parameters are gathered before the passes, and only a rank's own
//           part of them is kept and saved.
//
// A tied embedding on the first and the last stage: its gradients of the whole step are added over
// the two, and both make the same optimizer step.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_DATA_PARALLEL_H_
#define HOLDFAST_EXAMPLES_TINY_LM_DATA_PARALLEL_H_

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "examples/collectives/collectives.h"
#include "examples/tiny_lm/optimizer.h"
#include "examples/tiny_lm/partition.h"
#include "examples/tiny_lm/state.h"

namespace tiny_lm {

// In a step: Weights(), Begin(), the passes with MicroBatchDone() after each, Reduce(), Update().
// All ranks of dp make the same calls. Errors: those of the collectives.
//
// Threads: one at a time.
// Lifetime: partition, state and communicators must outlive it.
class DataParallel {
 public:
  // `ranks`: over dp, or null if this rank is alone. `tied_stages`: first and last stage, or null
  // if this rank has no embedding that another stage has too.
  DataParallel(const Partition& partition, TrainingState& state, collectives::Communicator* ranks,
               collectives::Communicator* tied_stages);

  // The parameters as the model computes with them, in slots.
  absl::Status Weights(std::span<float> weights);
  // Forgets the sums of the step before, and clears `gradients` (as slots), to which the passes
  // add.
  void Begin(std::span<int64_t> gradients);
  // After all micro-batches of a step but the last.
  absl::Status MicroBatchDone(std::span<int64_t> gradients);
  // After the last.
  absl::Status Reduce(std::span<int64_t> gradients);
  // The optimizer's step, with the sums over `sample_count` samples.
  absl::Status Update(const AdamConfig& config, uint64_t sample_count);

 private:
  bool reduces_every_micro_batch() const { return partition_.layout().zero >= Zero::kGradients; }
  bool IsTied(const Run& run) const;
  // Adds the sums over dp to own_sums_, and clears `gradients`. `with_tied`: also of the tied
  // embedding.
  absl::Status ReduceOnce(std::span<int64_t> gradients, bool with_tied);
  absl::Status GatherParameters();

  const Partition& partition_;
  TrainingState& state_;
  collectives::Communicator* const ranks_;
  collectives::Communicator* const tied_stages_;
  std::vector<int64_t> sums_;         // exchange order
  std::vector<int64_t> own_sums_;     // as own()
  std::vector<uint16_t> parameters_;  // exchange order
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_DATA_PARALLEL_H_
