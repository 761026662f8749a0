// The vocabulary of DESIGN section 4 as types: a rank is not a node is not a step.
#ifndef HOLDFAST_BASE_IDS_H_
#define HOLDFAST_BASE_IDS_H_

#include <compare>
#include <cstdint>
#include <functional>

namespace holdfast {

// Global rank, 0-based, below the world size of its attempt.
enum class Rank : uint32_t {};
// Training iteration, as the trainer counts it.
enum class Step : uint64_t {};
// One run of a job; its number comes from the coordination store and is the fencing epoch. The
// first attempt of a job is 1; 0 marks a checkpoint that no run of the job made (reshard, convert).
enum class Attempt : uint32_t {};

constexpr uint32_t Value(Rank rank) { return static_cast<uint32_t>(rank); }
constexpr uint64_t Value(Step step) { return static_cast<uint64_t>(step); }
constexpr uint32_t Value(Attempt attempt) { return static_cast<uint32_t>(attempt); }

// Names one checkpoint of a job. Ordered as checkpoints are: by attempt, then by step; the greatest
// on a branch is the newest (P9: nothing is ordered by clocks).
struct CheckpointId {
  Attempt attempt{};
  Step step{};
  friend constexpr auto operator<=>(const CheckpointId&, const CheckpointId&) = default;
};

}  // namespace holdfast

#endif  // HOLDFAST_BASE_IDS_H_
