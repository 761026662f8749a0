// The training loop of one rank.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_TRAINER_H_
#define HOLDFAST_EXAMPLES_TINY_LM_TRAINER_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "examples/collectives/collectives.h"
#include "examples/cuda/device_buffers.h"
#include "examples/tiny_lm/checkpointing.h"
#include "examples/tiny_lm/corpus.h"
#include "examples/tiny_lm/data_parallel.h"
#include "examples/tiny_lm/events.h"
#include "examples/tiny_lm/faults.h"
#include "examples/tiny_lm/model.h"
#include "examples/tiny_lm/options.h"
#include "examples/tiny_lm/parallel.h"
#include "examples/tiny_lm/parameters.h"
#include "examples/tiny_lm/partition.h"
#include "examples/tiny_lm/pipeline.h"
#include "examples/tiny_lm/random.h"
#include "examples/tiny_lm/state.h"
#include "examples/tiny_lm/traffic.h"

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

  Trainer(const TrainerOptions& options, const JobLayout& layout, uint32_t rank, Corpus corpus);

  // Meets the other ranks.
  absl::Status Join(std::unique_ptr<collectives::Context> context);
  absl::Status Train();
  // Makes the state's counterpart on the device, with --device.
  absl::Status PlaceOnDevice();
  // The buffers of the state where they are captured and restored: on the device, if there is one.
  std::vector<StateBuffer> Tensors();
  // The state as it is on the device, and to the device. Without one, nothing.
  absl::Status Fetch();
  absl::Status Store();
  absl::Status Restore();
  absl::Status RestoreBlobs();
  // Null without Holdfast.
  hf_job* job() const { return checkpointing_ == nullptr ? nullptr : checkpointing_->job(); }
  // All ranks must have come to the same step.
  absl::Status AgreeOn(RestoreOutcome outcome);
  void PrintDigests(const std::string& event) const;
  // With what the process has used.
  void PrintFinished() const;
  std::string Arguments() const;
  std::vector<Blob> Blobs() const;

  absl::Status Step(uint64_t step);
  // This rank's share of the batch. All ranks have as many micro-batches; some of them may be short
  // or empty.
  std::vector<Windows> NextMicroBatches();
  absl::Status ForwardBackward(const std::vector<Windows>& micro_batches);
  absl::Status WaitForDevice(std::chrono::steady_clock::time_point began);
  absl::Status SumOverRanks();
  // Faults of the file (faults.h), where they act. BeginFaults() reads it, and pauses.
  void BeginFaults(uint64_t step);
  const Fault* Acting(FaultKind kind) const;  // or null
  void SlowData() const;
  double ComputeFactor() const;
  absl::Status ActBeforeReduction();
  void ActBehindStep();
  // What --flip-bit asks for behind this step, on this rank.
  absl::Status FlipBits(uint64_t step);
  void PrintStep(uint64_t step, uint64_t first_sample, const Phases& phases) const;

  const std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
  const TrainerOptions options_;
  const uint32_t rank_;
  EventLog log_;
  const Corpus corpus_;
  const ParameterTable table_;
  const Partition partition_;
  TrainingState state_;
  Sampler sampler_;
  Random jitter_;  // this rank's own
  uint64_t step_ = 0;
  FaultFile faults_;
  std::vector<Fault> acting_;          // in this step, on this rank
  std::set<std::string> acted_lines_;  // in the step before

  size_t micro_batch_count_ = 1;  // of a step and rank
  std::vector<float> weights_;    // the parameters as the model computes with them
  StepSums sums_;
  // Of all ranks: fixed-point sum of the samples' losses, and sums that did not fit.
  std::vector<int64_t> metrics_;

  // Destroyed in reverse: communicators (which may still read buffers after an error), context,
  // Holdfast's part, then what has the buffers.
  std::unique_ptr<Model<float>> model_;
  std::unique_ptr<Pipeline> pipeline_;
  std::unique_ptr<DataParallel> data_parallel_;
  std::unique_ptr<cuda::DeviceBuffers> device_;  // or null: the state is in host memory only
  std::unique_ptr<Checkpointing> checkpointing_;
  std::unique_ptr<Traffic> traffic_;  // or null: none
  std::unique_ptr<collectives::Context> context_;
  std::unique_ptr<collectives::Communicator> metrics_ranks_;
  // Null where this rank would be alone in it.
  std::unique_ptr<collectives::Communicator> data_ranks_;
  std::unique_ptr<collectives::Communicator> tensor_ranks_;
  std::unique_ptr<collectives::Communicator> stages_;
  std::unique_ptr<collectives::Communicator> tied_stages_;
  std::unique_ptr<collectives::Communicator> traffic_ranks_;
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_TRAINER_H_
