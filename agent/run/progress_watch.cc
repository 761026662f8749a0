#include "agent/run/progress_watch.h"

#include <algorithm>
#include <utility>

namespace holdfast {
namespace {

constexpr absl::Duration kStepEvery = absl::Seconds(1);

}  // namespace

void ProgressWatch::BeginLaunch(recovery::Launch launch) {
  launch_ = launch;
  known_.clear();
  committed_.reset();
}

std::vector<ProgressWatch::Told> ProgressWatch::Look(const Engine::RankProgress& progress,
                                                     absl::Duration now) {
  std::vector<Told> told;
  Known& known = known_[Value(progress.rank)];
  if (!std::exchange(known.is_open, true)) {
    told.push_back(recovery::RankOpened{launch_, progress.rank, progress.attempt});
  }
  if (progress.is_restored && !std::exchange(known.is_restored, true)) {
    told.push_back(recovery::RankRestored{launch_, progress.rank, progress.restored_from});
  }
  // A heartbeat may stand at a step's beginning or at its end: with the second one a step is done.
  const bool is_new = progress.heartbeat_count > 1 && Value(progress.step) != known.step;
  if (is_new && (!known.step.has_value() || now - known.told >= kStepEvery)) {
    known.step = Value(progress.step);
    known.told = now;
    told.push_back(recovery::StepDone{launch_, progress.rank, progress.step});
  }
  if (progress.committed.has_value() && (!committed_ || *committed_ < *progress.committed)) {
    committed_ = progress.committed;
    recovery::CheckpointCommitted committed;
    committed.launch = launch_;
    committed.facts.id = {progress.attempt, *progress.committed};
    committed.captured_at = progress.committed_begun.value_or(now);
    told.push_back(std::move(committed));
  }
  return told;
}

size_t ProgressWatch::stepped_count() const {
  return static_cast<size_t>(std::count_if(
      known_.begin(), known_.end(), [](const auto& one) { return one.second.step.has_value(); }));
}

std::optional<uint64_t> ProgressWatch::StepOf(uint32_t rank) const {
  const auto found = known_.find(rank);
  return found == known_.end() ? std::nullopt : found->second.step;
}

}  // namespace holdfast
