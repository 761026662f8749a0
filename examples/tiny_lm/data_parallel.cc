#include "examples/tiny_lm/data_parallel.h"

#include <algorithm>

#include "examples/collectives/status_macros.h"
#include "examples/tiny_lm/exact.h"

namespace tiny_lm {

DataParallel::DataParallel(const Partition& partition, TrainingState& state,
                           collectives::Communicator* ranks, collectives::Communicator* tied_stages)
    : partition_(partition),
      state_(state),
      ranks_(ranks),
      tied_stages_(tied_stages),
      sums_(partition.exchange_count()),
      own_sums_(partition.own().count),
      parameters_(partition.exchange_count()) {}

bool DataParallel::IsTied(const Run& run) const {
  const Home& home = partition_.parameters()[run.parameter].parameter->home;
  return tied_stages_ != nullptr && home.first_stage && home.last_stage;
}

absl::Status DataParallel::Weights(std::span<float> weights) {
  if (partition_.layout().zero != Zero::kParameters) {
    std::transform(state_.parameters.begin(), state_.parameters.end(), weights.begin(),
                   FromBfloat16);
    return absl::OkStatus();
  }
  std::copy(state_.parameters.begin(), state_.parameters.end(),
            parameters_.begin() + static_cast<ptrdiff_t>(partition_.own().begin));
  RETURN_IF_ERROR(GatherParameters());
  for (const Run& run : partition_.runs()) {
    const auto begin = parameters_.begin() + static_cast<ptrdiff_t>(run.exchange);
    std::transform(begin, begin + static_cast<ptrdiff_t>(run.count),
                   weights.begin() + static_cast<ptrdiff_t>(partition_.SlotOf(run)), FromBfloat16);
  }
  return absl::OkStatus();
}

absl::Status DataParallel::GatherParameters() {
  return ranks_ == nullptr ? absl::OkStatus() : ranks_->AllGather(std::span(parameters_)).Wait();
}

void DataParallel::Begin(std::span<int64_t> gradients) {
  std::fill(own_sums_.begin(), own_sums_.end(), 0);
  std::fill(gradients.begin(), gradients.end(), 0);
}

absl::Status DataParallel::MicroBatchDone(std::span<int64_t> gradients) {
  return reduces_every_micro_batch() ? ReduceOnce(gradients, false) : absl::OkStatus();
}

absl::Status DataParallel::Reduce(std::span<int64_t> gradients) {
  for (const Run& run : partition_.runs()) {
    if (!IsTied(run)) continue;
    RETURN_IF_ERROR(
        tied_stages_->AllReduce(gradients.subspan(partition_.SlotOf(run), run.count)).Wait());
  }
  return ReduceOnce(gradients, true);
}

absl::Status DataParallel::ReduceOnce(std::span<int64_t> gradients, bool with_tied) {
  std::fill(sums_.begin(), sums_.end(), 0);
  for (const Run& run : partition_.runs()) {
    if (!with_tied && IsTied(run)) continue;
    const std::span<int64_t> part = gradients.subspan(partition_.SlotOf(run), run.count);
    std::copy(part.begin(), part.end(), sums_.begin() + static_cast<ptrdiff_t>(run.exchange));
    std::fill(part.begin(), part.end(), 0);
  }
  if (ranks_ != nullptr) {
    const collectives::Handle reduced = partition_.layout().zero == Zero::kReplicated
                                            ? ranks_->AllReduce(std::span(sums_))
                                            : ranks_->ReduceScatter(std::span(sums_));
    RETURN_IF_ERROR(reduced.Wait());
  }
  const size_t begin = partition_.own().begin;
  for (size_t i = 0; i < own_sums_.size(); ++i) own_sums_[i] += sums_[begin + i];
  return absl::OkStatus();
}

absl::Status DataParallel::Update(const AdamConfig& config, uint64_t sample_count) {
  const Slice own = partition_.own();
  const std::span<uint16_t> own_parameters = std::span(parameters_).subspan(own.begin, own.count);
  ++state_.optimizer_step;
  AdamStep(config, state_.optimizer_step, own_sums_, sample_count,
           {state_.master, state_.exp_avg, state_.exp_avg_sq, own_parameters});
  if (partition_.layout().zero == Zero::kParameters) {
    std::copy(own_parameters.begin(), own_parameters.end(), state_.parameters.begin());
    return absl::OkStatus();
  }
  if (partition_.layout().zero != Zero::kReplicated) RETURN_IF_ERROR(GatherParameters());
  for (const Run& run : partition_.runs()) {
    std::copy_n(parameters_.begin() + static_cast<ptrdiff_t>(run.exchange), run.count,
                state_.parameters.begin() + static_cast<ptrdiff_t>(partition_.SlotOf(run)));
  }
  return absl::OkStatus();
}

}  // namespace tiny_lm
