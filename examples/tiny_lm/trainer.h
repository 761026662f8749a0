// The training loop of one rank.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_TRAINER_H_
#define HOLDFAST_EXAMPLES_TINY_LM_TRAINER_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "examples/collectives/collectives.h"
#include "examples/tiny_lm/checkpointing.h"
#include "examples/tiny_lm/corpus.h"
#include "examples/tiny_lm/events.h"
#include "examples/tiny_lm/model.h"
#include "examples/tiny_lm/optimizer.h"
#include "examples/tiny_lm/options.h"
#include "examples/tiny_lm/random.h"
#include "examples/tiny_lm/state.h"

namespace tiny_lm {

// Threads: one at a time.
class Trainer {
 public:
  // Joins the ranks of the environment. Errors: those of the corpus and of the collectives.
  static absl::StatusOr<std::unique_ptr<Trainer>> Create(const TrainerOptions& options);

  // Restores, trains to the last step, commits it. Errors: a lost peer, a restore that failed,
  // ranks that restored different steps. They are printed as an event too.
  absl::Status Run();

 private:
  // Time from one phase to the next.
  class Phases;

  Trainer(const TrainerOptions& options, const collectives::Options& ranks, Corpus corpus);

  absl::Status Train();
  absl::Status Restore();
  absl::Status RestoreBlobs();
  // All ranks must have come to the same step.
  absl::Status AgreeOn(RestoreOutcome outcome);
  void PrintDigests(const std::string& event) const;
  // With what the process has used.
  void PrintFinished() const;
  std::string Arguments() const;
  std::vector<Blob> Blobs() const;

  absl::Status Step(uint64_t step);
  // The windows of this rank's share of the batch.
  std::vector<size_t> NextWindows();
  void ForwardBackward(const std::vector<size_t>& windows);
  void WaitForDevice(std::chrono::steady_clock::time_point began);
  absl::Status SumOverRanks();
  absl::Status OptimizerStep();
  void PrintStep(uint64_t step, uint64_t first_sample, const Phases& phases) const;

  const std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
  const TrainerOptions options_;
  const Layout layout_;
  EventLog log_;
  const Corpus corpus_;
  const ModelConfig config_;
  const ParameterTable table_;
  Model<float> model_;
  TrainingState state_;
  Sampler sampler_;
  Random jitter_;  // this rank's own
  uint64_t step_ = 0;

  std::vector<float> weights_;          // the parameters as the model computes with them
  std::vector<float> sample_gradient_;  // of one sample
  std::vector<int64_t> gradient_sums_;  // fixed point, over samples; padded as the parameters
  // Fixed-point sum of the samples' losses, and sums that did not fit.
  std::vector<int64_t> metrics_;

  // Destroyed in reverse: communicators, context, then Holdfast's part.
  std::unique_ptr<Checkpointing> checkpointing_;
  std::unique_ptr<collectives::Context> context_;
  std::unique_ptr<collectives::Communicator> data_parallel_;
  std::unique_ptr<collectives::Communicator> metrics_ranks_;
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_TRAINER_H_
