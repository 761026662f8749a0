// The stored pieces of one tensor state, made ready to answer: who has these elements? Inside of
// format/planner*.
//
// Invariant after Create: pieces are pairwise disjoint; equal ones are one piece with replicas. So
// elements found in different pieces are different elements, and covering is a sum of volumes.
#ifndef HOLDFAST_FORMAT_PLANNER_SOURCE_H_
#define HOLDFAST_FORMAT_PLANNER_SOURCE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "format/planner.h"
#include "format/planner_geometry.h"

namespace holdfast {

// One distinct piece.
struct SourcePiece {
  Piece piece;                     // a box that is a range of its tensor is given as that range
  std::vector<uint32_t> replicas;  // indices into SourceView::pieces, by image; at least one
};

// Lifetime: refers to the view.
class StateSource {
 public:
  enum class Asked { kRanges, kBoxes };

  // `pieces`: indices of all stored pieces of the state. `asked`: whether Cover will be asked for
  // pieces that are no ranges of the whole tensor. Errors: kDataLoss if a piece lies outside of its
  // tensor or two overlap without being equal; kResourceExhausted if they are too many boxes, or
  // lie so that this takes too long to see (BoxIndex).
  static absl::StatusOr<StateSource> Create(const SourceView& source, uint32_t tensor_state,
                                            std::span<const uint32_t> pieces, Asked asked);

  const SourcePiece& operator[](uint32_t index) const { return pieces_[index]; }

  // Calls `visit` for every part of `piece`, which is of this tensor, that a source piece has: a
  // box in coordinates of the tensor. Parts of one source piece may come in several boxes.
  using BoxVisitor = std::function<void(uint32_t index, const ElementBox& box)>;
  // The same for a range of the whole tensor that a range of the whole tensor has.
  using RangeVisitor = std::function<void(uint32_t index, uint64_t begin, uint64_t end)>;
  // Errors: kDataLoss, naming the first missing element in row-major order, if not all of `piece`
  // is there. `boxes`: of `piece`. `steps` grows by what BoxIndex::Visit counts.
  absl::Status Cover(const Piece& piece, const BoxTable& boxes, const RangeVisitor& visit_range,
                     const BoxVisitor& visit_box, uint64_t& steps) const;

 private:
  StateSource(const SourceView& source, uint32_t tensor_state)
      : source_(&source), tensor_state_(&source.tensor_states[tensor_state]) {}

  absl::Status AddDistinct(std::span<const uint32_t> pieces);
  absl::Status CheckDisjoint() const;
  absl::Status Overlap(uint32_t a, uint32_t b) const;
  absl::Status Missing(uint64_t begin, uint64_t end) const;
  absl::Status MissingIn(ElementBox region) const;
  // Boxes of tensor coordinates that hold the elements of a piece.
  std::vector<ElementBox> BoxesOf(const Piece& piece, const BoxTable& boxes) const;
  uint64_t VolumeIn(const ElementBox& region) const;

  const SourceView* source_;
  const TensorState* tensor_state_;
  std::vector<SourcePiece> pieces_;  // ranges of the whole tensor first, by begin; then the others
  uint32_t range_count_ = 0;
  // All of pieces_ as boxes; null if all are ranges and only those are asked for: then they are
  // found by bisection.
  std::unique_ptr<BoxIndex> index_;
};

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_PLANNER_SOURCE_H_
