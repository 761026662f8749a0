// The state of the training in this rank's memory, and how the job's layout cuts it.
//
// States of every parameter tensor: `param` (bfloat16, what the model computes with), `master`,
// `exp_avg` and `exp_avg_sq` (float32, the optimizer's). Besides them the optimizer's step (a
// tensor without dimensions) and the ballast.
//   ZeRO-0: everything is replicated.
//   ZeRO-1: `param` is replicated; master and moments of all parameters are one flat array each, in
//           the table's order, padded to a multiple of the ranks and cut evenly: DESIGN's `pack`.
//           The ballast likewise, in whole pages.
// Both put the padding at the end, so that the flat index of an element is the same in all layouts.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_STATE_H_
#define HOLDFAST_EXAMPLES_TINY_LM_STATE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "examples/tiny_lm/ballast.h"
#include "examples/tiny_lm/model.h"

namespace tiny_lm {

enum class Zero { kReplicated = 0, kOptimizer = 1 };

struct Layout {
  Zero zero = Zero::kOptimizer;
  uint32_t rank = 0;
  uint32_t world_size = 1;
  uint64_t ballast_bytes = 0;  // of the whole job; rounded up to pages
};

// This rank's part of a flat array: [begin, begin + count), of which the elements from the array's
// size on are padding.
struct Slice {
  size_t begin = 0;
  size_t count = 0;
};
// `multiple`: slices are whole multiples of so many elements.
Slice SliceOf(const Layout& layout, size_t element_count, size_t multiple);

// A buffer as it is registered.
struct StateBuffer {
  std::string name;
  void* data = nullptr;
  uint64_t bytes = 0;
  uint32_t group = 0;  // 0 parameters, 1 optimizer, 2 ballast
};

// Elements [begin, begin + count) (row-major) of a state of a tensor, in this rank's memory.
struct Piece {
  std::string tensor;
  std::string state;
  uint64_t begin = 0;
  uint64_t count = 0;
  uint32_t element_bytes = 0;
  bool replicated = false;  // the other ranks have it too
  const std::byte* data = nullptr;
};
// Sum modulo 2^64 over the elements of Mix(Mix(index in the tensor) + bits as an unsigned number):
// sums of disjoint pieces add up to that of the whole tensor, however it is cut.
uint64_t DigestOf(const Piece& piece);

// Threads: one at a time.
// Lifetime: buffers and pieces point into it; it does not move.
class TrainingState {
 public:
  TrainingState(const ParameterTable& table, const Layout& layout, uint64_t seed);
  TrainingState(const TrainingState&) = delete;
  TrainingState& operator=(const TrainingState&) = delete;

  // The optimizer states' part that is here.
  Slice own() const { return own_; }

  // The job's layout document: the same text on all ranks.
  std::string LayoutJson() const;
  // Those in which the layout places something on this rank.
  std::vector<StateBuffer> Buffers();
  // Everything that the layout places on this rank.
  std::vector<Piece> Pieces() const;

  // Padded to a multiple of the world size.
  std::vector<uint16_t> parameters;
  // own().count elements each.
  std::vector<float> master;
  std::vector<float> exp_avg;
  std::vector<float> exp_avg_sq;
  int64_t optimizer_step = 0;
  Ballast ballast;

 private:
  struct BallastTensor {
    std::string name;
    uint64_t begin = 0;  // elements, in the flat array
    uint64_t count = 0;
  };
  std::string PacksJson() const;
  std::string ParameterJson(const Parameter& parameter) const;
  std::string BallastJson(const BallastTensor& tensor) const;
  void AddPiece(std::vector<Piece>& pieces, Piece whole, size_t tensor_begin, Slice held,
                const void* data) const;

  const ParameterTable& table_;
  const Layout layout_;
  const Slice own_;
  std::vector<BallastTensor> ballast_tensors_;
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_STATE_H_
