// The state of the training in this rank's memory.
//
// States of every parameter tensor: `param` (bfloat16, what the model computes with), `master`,
// `exp_avg` and `exp_avg_sq` (float32, the optimizer's). Besides them the optimizer's step (a
// tensor without dimensions) and the ballast. Which part of each is here is partition.h; how the
// whole job's layout is said to Holdfast is layout_document.h.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_STATE_H_
#define HOLDFAST_EXAMPLES_TINY_LM_STATE_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "examples/tiny_lm/ballast.h"
#include "examples/tiny_lm/partition.h"

namespace tiny_lm {

// The optimizer's float32 states, in the order of a layout document.
inline constexpr const char* kOptimizerStates[] = {"master", "exp_avg", "exp_avg_sq"};

// A buffer as it is registered.
struct StateBuffer {
  std::string name;
  void* data = nullptr;
  uint64_t bytes = 0;
  uint32_t group = 0;  // 0 parameters, 1 optimizer, 2 ballast
};

// Elements [begin, begin + count) of a state of a local part of a tensor, in this rank's memory.
struct Piece {
  std::string tensor;
  std::string state;
  uint64_t begin = 0;
  uint64_t count = 0;
  BoxIndex index;  // of begin and what follows it, in the tensor
  // Which copy of the tensor this is a piece of: the pieces of one number, of all ranks, are the
  // whole tensor, each element once.
  uint32_t replica = 0;
  uint32_t element_bytes = 0;
  const std::byte* data = nullptr;
};
// Sum modulo 2^64 over the elements of Mix(Mix(index in the tensor) + bits as an unsigned number):
// sums of disjoint pieces add up to that of the whole tensor, however it is cut.
uint64_t DigestOf(const Piece& piece);

// Threads: one at a time.
// Lifetime: the partition must outlive it; buffers and pieces point into it; it does not move.
class TrainingState {
 public:
  TrainingState(const Partition& partition, uint64_t seed);
  TrainingState(const TrainingState&) = delete;
  TrainingState& operator=(const TrainingState&) = delete;

  // Those in which the layout places something on this rank.
  std::vector<StateBuffer> Buffers();
  // Everything that the layout places on this rank.
  std::vector<Piece> Pieces() const;

  // The bytes of an element of the whole tensor; empty if it is not on this rank.
  std::span<std::byte> Find(const std::string& tensor, const std::string& state, uint64_t element);

  // ZeRO-3: as own(); else as slots. A vocabulary's padding is 0 and is never stored.
  std::vector<uint16_t> parameters;
  // As own().
  std::vector<float> master;
  std::vector<float> exp_avg;
  std::vector<float> exp_avg_sq;
  int64_t optimizer_step = 0;
  Ballast ballast;

 private:
  bool parameters_are_cut() const { return partition_.layout().zero == Zero::kParameters; }
  std::vector<std::vector<float>*> OptimizerStates() { return {&master, &exp_avg, &exp_avg_sq}; }

  const Partition& partition_;
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_STATE_H_
