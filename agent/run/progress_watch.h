// What the policy is told of how far the ranks of a launch are, from what the engine says of them:
// that a rank has opened the job and restored, each once, the step that it has finished, at most
// once a second, and what is committed. A pure function: no clock, no thread.
#ifndef HOLDFAST_AGENT_RUN_PROGRESS_WATCH_H_
#define HOLDFAST_AGENT_RUN_PROGRESS_WATCH_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "absl/time/time.h"
#include "agent/recovery/events.h"
#include "base/ids.h"
#include "checkpoint/engine.h"

namespace holdfast {

// Threads: one at a time.
class ProgressWatch {
 public:
  using Told = decltype(recovery::Event::what);

  // The ranks begin anew.
  void BeginLaunch(recovery::Launch launch);

  // What is new of a rank of the launch, as of `now`, in the order in which it came about.
  std::vector<Told> Look(const Engine::RankProgress& progress, absl::Duration now);

  // Ranks that have finished a step.
  size_t stepped_count() const;
  // The last one that was told of the rank.
  std::optional<uint64_t> StepOf(uint32_t rank) const;

 private:
  struct Known {
    bool is_open = false;
    bool is_restored = false;
    std::optional<uint64_t> step;
    absl::Duration told;  // of the step
  };
  recovery::Launch launch_{};
  std::map<uint32_t, Known> known_;
  std::optional<Step> committed_;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_PROGRESS_WATCH_H_
