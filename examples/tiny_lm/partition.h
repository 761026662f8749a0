// What of the model is on one rank, and in which order data parallelism moves it.
//
// Three orders of a rank's parameters:
//   slots     what the model computes with: the parameters of the rank's stage, in the table's
//             order, each as tensor parallelism cuts it, a vocabulary with its padding;
//   exchange  what is summed and gathered over dp, without the vocabulary's padding:
//               ZeRO-0    parameter by parameter;
//               ZeRO-1,2  the same, padded at the end to a multiple of dp and cut evenly (the
//                         `pack` of a layout document);
//               ZeRO-3    the parts of dp 0, then those of dp 1, ...: each parameter is cut by rule
//                         "ceil" (the `flat` of a layout document), and every part has the room of
//                         the first;
//   own       the slice of the exchange order whose optimizer states this rank keeps.
// A Run ties them together.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_PARTITION_H_
#define HOLDFAST_EXAMPLES_TINY_LM_PARTITION_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "examples/tiny_lm/parallel.h"
#include "examples/tiny_lm/parameters.h"

namespace tiny_lm {

// The stages that hold a parameter, ascending: one, or first and last (a tied embedding).
std::vector<uint32_t> StagesOf(const JobLayout& layout, const Home& home);

// Where the elements of a part of a tensor lie in the tensor: rows of `row` elements, `stride`
// apart, the first at `shift`.
struct BoxIndex {
  size_t row = SIZE_MAX;
  size_t stride = 0;
  size_t shift = 0;
  size_t Of(size_t local) const { return local / row * stride + shift + local % row; }
};

// A parameter as it is on a rank: [begin, begin + size) of the dimension `whole` of the tensor
// [outer, whole, inner], row-major. Replicated over tp: all of it.
struct LocalParameter {
  const Parameter* parameter = nullptr;
  size_t outer = 1;
  size_t whole = 1;
  size_t inner = 1;
  size_t begin = 0;
  size_t size = 1;
  size_t slot = 0;        // first element, in slots
  size_t slot_count = 0;  // count() and padding behind it
  // Several ranks may hold the same elements. Which copy this is, not counting dp: those of one
  // number are the whole tensor.
  uint32_t copy = 0;

  size_t count() const { return outer * size * inner; }
  // Not if count() is 0.
  BoxIndex index() const { return {size * inner, whole * inner, begin * inner}; }
};

// Elements [first, first + count) of parameters()[parameter] in the exchange order.
struct Run {
  size_t parameter = 0;
  size_t first = 0;
  size_t count = 0;
  size_t exchange = 0;
};

// Threads: any; immutable.
// Lifetime: the table must outlive it.
class Partition {
 public:
  Partition(const ParameterTable& table, const JobLayout& layout, uint32_t rank);

  const ParameterTable& table() const { return table_; }
  const JobLayout& layout() const { return layout_; }
  uint32_t rank() const { return rank_; }
  const Coordinates& at() const { return at_; }
  bool is_first_stage() const { return at_.pp == 0; }
  bool is_last_stage() const { return at_.pp + 1 == layout_.mesh.pp; }

  // Those with something on this rank, in the table's order.
  const std::vector<LocalParameter>& parameters() const { return parameters_; }
  // By name; null if nothing of it is here.
  const LocalParameter* Find(const std::string& name) const;

  size_t slot_count() const { return slot_count_; }
  size_t exchange_count() const { return exchange_count_; }
  Slice own() const { return own_; }
  // All of the exchange order but its padding, and of it what is in own().
  const std::vector<Run>& runs() const { return runs_; }
  const std::vector<Run>& own_runs() const { return own_runs_; }
  // Where a run begins, in slots and in own().
  size_t SlotOf(const Run& run) const { return parameters_[run.parameter].slot + run.first; }
  size_t OwnOf(const Run& run) const { return run.exchange - own_.begin; }

 private:
  void AddParameters();
  void AddRuns();

  const ParameterTable& table_;
  const JobLayout layout_;
  const uint32_t rank_;
  const Coordinates at_;
  std::vector<LocalParameter> parameters_;
  size_t slot_count_ = 0;
  size_t exchange_count_ = 0;
  Slice own_;
  std::vector<Run> runs_;
  std::vector<Run> own_runs_;
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_PARTITION_H_
