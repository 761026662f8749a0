// What a save takes from a job's training, measured from outside: how much longer the steps around
// a save take than others. All that holds training up is in it, the share of the memory bandwidth
// that copies take as well as the calls, and whatever trainer tells its steps can be measured.
//
// A heartbeat may stand at a step's beginning or at its end, and hf_wait_captured comes in the step
// behind hf_save: what a save of step S takes lies between the words of S - 1 and of S + 2.
#ifndef HOLDFAST_AGENT_SAVE_COST_H_
#define HOLDFAST_AGENT_SAVE_COST_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "absl/time/time.h"

namespace holdfast {

// Threads: one at a time.
class SaveCost {
 public:
  static constexpr size_t kStepsMax = 256;   // the last ones are known
  static constexpr size_t kSavesMax = 16;    // the last ones count
  static constexpr size_t kOrdinaryMin = 8;  // steps without a save, to compare with

  // Steps begin anew. What saves have cost is kept.
  void BeginAttempt();
  // All ranks have told `step`, which is greater than the one before. Those between count as
  // evenly spread.
  void Reached(uint64_t step, absl::Duration now);
  // A save of it is on the way: the steps around it are no ordinary ones.
  void Due(uint64_t step);
  // It was captured, and can be measured.
  void Captured(uint64_t step);

  // How many were measured.
  uint32_t saves() const { return static_cast<uint32_t>(excesses_.size()); }
  // The mean of those; not below zero, however much steps vary.
  absl::Duration stall() const;
  // The median of the ordinary ones; zero: too few are known.
  absl::Duration step() const;

 private:
  enum class State { kDue, kCaptured, kOver };

  void Measure();
  // Whether the step from `step - 1` to it may hold a part of a save.
  bool IsNearSave(uint64_t step) const;

  std::map<uint64_t, absl::Duration> reached_;
  std::map<uint64_t, State> saves_;
  std::deque<absl::Duration> excesses_;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_SAVE_COST_H_
