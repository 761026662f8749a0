// Boxes of elements: cutting a range into boxes, finding those that intersect, and turning the copy
// of a box between two strided places into runs. Inside of format/planner*.
#ifndef HOLDFAST_FORMAT_PLANNER_GEOMETRY_H_
#define HOLDFAST_FORMAT_PLANNER_GEOMETRY_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
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

// How many ops that would be.
uint64_t CountRuns(const ElementBox& box, const Affine& image, const Affine& buffer,
                   uint64_t element_bytes);

// Finds among many boxes those that intersect a given one: a tree of bounding boxes.
//
// Cost. Building is O(n log n). A search takes O(log n) steps for each box that it finds where
// boxes are compact, as cuts of a tensor are: flat shards, rows, columns, blocks. It is not bounded
// by that for boxes that are long in one dimension and thin in the others, along different
// dimensions at once: their bounding boxes overlap everywhere, and a search can look at all n. So
// searches count their steps, and who searches n times says kResourceExhausted after kStepsOfBoxMax
// x n.
//
// Threads: any, once built.
class BoxIndex {
 public:
  explicit BoxIndex(size_t dims) : dims_(dims) {}

  // With a number of the caller's; then, before anything else, Build.
  void Add(const ElementBox& box, uint32_t number);
  void Build();

  // Calls `visit` with the number of each box that intersects `box`, and the intersection, which is
  // never empty. The boxes and nodes that it looked at.
  uint64_t Visit(const ElementBox& box,
                 const std::function<void(uint32_t, const ElementBox&)>& visit) const;

  // Two numbers, the first at least `first_number`, of boxes that intersect; nothing if there are
  // none. Errors: kResourceExhausted if it takes more than the steps above to find out.
  using Overlap = std::optional<std::pair<uint32_t, uint32_t>>;
  absl::StatusOr<Overlap> FindOverlap(uint32_t first_number) const;

  static constexpr uint64_t kStepsOfBoxMax = 256;
  // Searches among fewer boxes are never too long.
  static constexpr uint64_t kStepsMin = uint64_t{1} << 16;

  size_t size() const { return numbers_.size(); }

 private:
  struct Node {
    uint32_t begin = 0;  // boxes [begin, end)
    uint32_t end = 0;
    uint32_t right = 0;  // node; the left one is the next; 0: a leaf
  };

  uint32_t BuildNode(uint32_t begin, uint32_t end);
  // In a table: lo, then size of a box.
  const uint64_t* Lo(uint32_t box) const { return values_.data() + box * 2 * dims_; }
  ElementBox BoxAt(uint32_t box) const;
  bool Intersects(const ElementBox& box, const uint64_t* other, ElementBox& both) const;

  const size_t dims_;
  std::vector<uint64_t> values_;  // of the boxes
  std::vector<uint32_t> numbers_;
  std::vector<uint32_t> order_;
  std::vector<Node> nodes_;
  std::vector<uint64_t> bounds_;  // of the nodes
};

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_PLANNER_GEOMETRY_H_
