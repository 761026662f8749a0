// Boxes of elements: cutting a range into boxes, finding those that intersect, and turning the copy
// of a box between two strided places into runs. Inside of format/planner*.
#ifndef HOLDFAST_FORMAT_PLANNER_GEOMETRY_H_
#define HOLDFAST_FORMAT_PLANNER_GEOMETRY_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "format/planner.h"
#include "format/tensor_piece.h"

namespace holdfast {

using Coordinates = std::array<uint64_t, kTensorDimsMax>;  // the first `dims` count

struct ElementBox {
  size_t dims = 0;
  Coordinates lo;
  Coordinates size;

  uint64_t Volume() const;
  BoxView View() const { return {{lo.data(), dims}, {size.data(), dims}}; }
};

// The box where both are; Volume() 0 if nowhere. Same dims.
ElementBox Intersect(const ElementBox& a, BoxView b);

// Appends the at most 2 * dims - 1 boxes that hold elements [begin, end) of the row-major order of
// `box`, in that order. One box if dims is 0.
void CutIntoBoxes(BoxView box, uint64_t begin, uint64_t end, std::vector<ElementBox>& out);

// Where element x of a tensor lies: offset + sum of x[d] * strides[d], modulo 2^64 (the offset is
// of element 0, which need not be there).
struct Affine {
  uint64_t offset = 0;
  Coordinates strides;
  uint64_t At(std::span<const uint64_t> x) const;
};

// Of the row-major order of `box`, when its element number `begin` lies at offset_bytes.
Affine RowMajor(BoxView box, uint64_t begin, uint64_t offset_bytes, uint64_t element_bytes);

// Appends the ops that copy `box` from `image` to `buffer`, as few as two levels of strides allow.
void AppendRuns(const ElementBox& box, const Affine& image, const Affine& buffer,
                uint64_t element_bytes, const CopyOp& numbers, std::vector<CopyOp>& out);

// Finds among many boxes those that intersect a given one: a tree of bounding boxes.
//
// Threads: any, once built.
class BoxIndex {
 public:
  // Each box with a number of the caller's.
  BoxIndex(std::vector<ElementBox> boxes, std::vector<uint32_t> numbers);

  // Calls `visit` with the number of each box that intersects `box`, and the intersection, which is
  // never empty.
  void Visit(const ElementBox& box,
             const std::function<void(uint32_t, const ElementBox&)>& visit) const;

  size_t size() const { return boxes_.size(); }

 private:
  struct Node {
    ElementBox bounds;
    uint32_t begin = 0;  // boxes [begin, end)
    uint32_t end = 0;
    uint32_t right = 0;  // node; the left one is the next; 0: a leaf
  };

  uint32_t Build(uint32_t begin, uint32_t end);

  std::vector<ElementBox> boxes_;
  std::vector<uint32_t> numbers_;
  std::vector<uint32_t> order_;
  std::vector<Node> nodes_;
};

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_PLANNER_GEOMETRY_H_
