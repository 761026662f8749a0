// A rank's part of a tensor: what the operations of a placement leave of it. Inside of
// format/layout*.
//
// A local tensor is an array of *places*; each holds an element of the tensor or padding. A shard
// narrows a dimension, a view regroups the dimensions, a perm reorders them, a pad appends places
// to one, a flat cut makes one dimension of all and narrows that. Most placements only narrow and
// cut flat: then the local tensor is a range of the row-major order of one box of the tensor, and
// nothing more is computed. For all others the operations are kept, with this rank's numbers, and
// any box of places is led back through them, the last one first, to boxes of the tensor whose
// elements lie at strides among the places.
#ifndef HOLDFAST_FORMAT_LOCAL_TENSOR_H_
#define HOLDFAST_FORMAT_LOCAL_TENSOR_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "format/layout_program.h"
#include "format/planner_geometry.h"

namespace holdfast {

// Of one local tensor. A placement that breaks it into more is refused: give it as a list of
// segments, or choose another view.
inline constexpr size_t kLocalPartsMax = size_t{1} << 16;

// Elements [begin, end) of the row-major order of a box of the tensor, and where they are.
struct LocalPart {
  ElementBox box;
  uint64_t begin = 0;
  uint64_t end = 0;
  uint64_t place = 0;      // contiguous: of element `begin`; else of the box's corner, begin is 0
  bool contiguous = true;  // the elements are one behind the other
  Coordinates strides;     // else: places from one element to the next in every dimension

  uint64_t ElementCount() const { return end - begin; }
};

// Threads: any, once made.
class LocalTensor {
 public:
  // The whole tensor. At most kTensorDimsMax dimensions.
  explicit LocalTensor(std::span<const uint64_t> shape);

  // Applies an operation, but no pack, for the rank at these coordinates of the mesh. Empty, or
  // what was expected and found; then this is void.
  std::string Apply(const PlacementOp& op, const Mesh& mesh, std::span<const uint32_t> coordinates);

  bool held() const { return held_; }  // false: nothing is here, and places() is 0
  uint64_t places() const;             // padding included
  // Boxes that PartsOf looks at for a few places, at most about.
  uint64_t RangeCost() const { return keeps_steps_ ? 2 * (dims_ + 1) * (steps_.size() + 1) : 1; }
  // Elements in places [begin, end).
  uint64_t ElementCount(uint64_t begin, uint64_t end) const;
  // Appends what lies in places [begin, end), in the order of the places of their corners. No part
  // is empty. False: there are more than `parts_max`. `work`, if not null, grows by the number of
  // boxes that had to be looked at.
  bool PartsOf(uint64_t begin, uint64_t end, size_t parts_max, std::vector<LocalPart>& out,
               uint64_t* work = nullptr) const;

 private:
  // One operation, led back: coordinates of what it made -> coordinates of what it was given.
  struct Range {
    uint64_t first = 0;
    uint64_t size = 0;
  };
  struct Step {
    enum class Kind { kSlice, kBlocks, kPerm, kPad, kView };
    Kind kind = Kind::kSlice;
    size_t dim = 0;                   // kSlice, kBlocks, kPad
    uint64_t first = 0;               // kSlice: where it begins
    uint64_t size = 0;                // kPad: without the padding
    std::vector<Range> ranges = {};   // kBlocks: what is left of the dimension, in order
    std::vector<uint32_t> perm = {};  // kPerm
    std::vector<uint64_t> from = {};  // kView: sizes before and after
    std::vector<uint64_t> to = {};
  };
  struct Strided {
    ElementBox box;
    uint64_t place = 0;  // of the corner
    Coordinates strides;
  };

  std::string Shard(const PlacementOp& op, const Mesh& mesh, std::span<const uint32_t> coordinates);
  std::string ShardBlocks(const PlacementOp& op, const Mesh& mesh,
                          std::span<const uint32_t> coordinates);
  std::string View(const PlacementOp& op);
  std::string Perm(const PlacementOp& op);
  std::string Pad(const PlacementOp& op);
  void KeepSteps();
  void Narrow(size_t dim, uint64_t first, uint64_t last);
  void SetSizes(std::span<const uint64_t> sizes);
  void Flatten();
  void AddFlatView();  // a step: all dimensions as one
  std::span<const uint64_t> sizes() const { return {size_.data(), dims_}; }

  static bool LeadBack(const Step& step, size_t parts_max, std::vector<Strided>& boxes,
                       uint64_t& work);
  static bool LeadViewBack(const Step& step, const Strided& box, size_t parts_max,
                           std::vector<Strided>& out, uint64_t& work);

  bool held_ = true;
  size_t dims_ = 0;
  Coordinates size_;  // of each dimension of the local tensor
  // Without steps: the box begins at lo_, and if flat_ only its elements [begin_, end_) are here.
  bool keeps_steps_ = false;
  Coordinates lo_;
  bool flat_ = false;
  uint64_t begin_ = 0;
  uint64_t end_ = 0;
  std::vector<Step> steps_;
};

// What the rank at `coordinates` has, before a pack. The placement fits the shape (it was parsed).
LocalTensor Evaluate(const LayoutProgram& program, const Placement& placement,
                     std::span<const uint64_t> shape, std::span<const uint32_t> coordinates);

// The same for a placement that may not fit: then what was expected is in `misfit`.
LocalTensor TryEvaluate(const LayoutProgram& program, const Placement& placement,
                        std::span<const uint64_t> shape, std::span<const uint32_t> coordinates,
                        std::string& misfit);

// `"tp"`, or `"dp" x "cp"`, for errors.
std::string AxesText(const Mesh& mesh, std::span<const uint32_t> axes);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_LOCAL_TENSOR_H_
