// A parsed layout document, and what one rank's local tensor is according to it. Inside of
// format/layout*: everybody else asks Layout.
//
// A placement is a pipeline of operations on the local tensor, which begins as the whole tensor: a
// shard narrows one dimension of a box; a flat cut turns the box into a range of its row-major
// order; a place says which coordinates of an axis hold it at all; a pack, always last, appends it
// to a pack. Invariant: every axis occurs in at most one operation of a placement, so that pieces
// of unpacked tensors are equal or disjoint.
#ifndef HOLDFAST_FORMAT_LAYOUT_PROGRAM_H_
#define HOLDFAST_FORMAT_LAYOUT_PROGRAM_H_

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "format/layout.h"
#include "format/tensor_piece.h"

namespace holdfast {

// How `elements` are cut into one range per coordinate. No cut falls inside a grain: all cuts are
// multiples of `grain` (the last grain may be partial, except under kEven).
struct CutRule {
  enum class Kind : uint8_t { kEven, kCeil, kBalanced, kSizes };
  Kind kind = Kind::kEven;
  uint64_t grain = 1;
  std::vector<uint64_t> sizes;  // kSizes only: one per coordinate

  friend bool operator==(const CutRule&, const CutRule&) = default;
};

// The range [first, second) of coordinate `coordinate` of `count`. The rule fits (CheckCut).
std::pair<uint64_t, uint64_t> Cut(const CutRule& rule, uint64_t elements, uint32_t count,
                                  uint32_t coordinate);
// Empty if the rule fits, else what was expected of `elements`.
std::string CheckCut(const CutRule& rule, uint64_t elements, uint32_t count);

struct PlacementOp {
  enum class Kind : uint8_t { kShard, kFlat, kPlace, kPack };
  Kind kind = Kind::kShard;
  uint32_t axis = 0;                  // index into the mesh; kPack: of the pack
  uint32_t dim = 0;                   // kShard
  CutRule rule;                       // kShard, kFlat
  std::vector<uint32_t> coordinates;  // kPlace: ascending
  uint32_t pack = 0;                  // kPack
};

using Placement = std::vector<PlacementOp>;

inline constexpr uint32_t kNoPack = UINT32_MAX;

// What goes with the tensor state of the same index.
struct StateProgram {
  uint32_t placement = 0;
  uint32_t buffer = 0;  // index into buffer_names; of a pack's member the pack's
  uint32_t pack = kNoPack;
  uint32_t pack_member = 0;   // index into PackProgram::members
  uint64_t offset_bytes = 0;  // in the buffer; 0 for a pack's member
};

struct PackProgram {
  std::string name;
  uint32_t axis = 0;
  uint32_t buffer = 0;
  uint64_t align_elements = 1;
  uint64_t multiple_elements = 1;
  std::vector<uint32_t> members;     // tensor states, in document order; all of one dtype
  std::vector<uint32_t> other_axes;  // ascending: those in other operations of members
};

struct LayoutProgram {
  std::string text;
  LayoutHash hash;
  std::vector<MeshAxis> mesh;
  uint32_t world_size = 1;
  std::vector<Placement> placements;  // distinct; 0 is "replicated on all ranks"
  std::vector<PackProgram> packs;
  std::vector<std::string> buffer_names;
  std::vector<TensorState> tensor_states;
  std::vector<StateProgram> states;  // of each tensor state

  std::vector<uint32_t> CoordinatesOf(uint32_t rank) const;
};

absl::StatusOr<std::unique_ptr<LayoutProgram>> ParseLayout(std::string json);

// A rank's part of a tensor: elements [begin, end) of the row-major order of a box.
struct LocalTensor {
  bool held = true;  // false: the rank has nothing of it
  size_t dims = 0;
  std::array<uint64_t, kTensorDimsMax> lo;
  std::array<uint64_t, kTensorDimsMax> size;
  uint64_t begin = 0;
  uint64_t end = 0;
};

// The local tensor before a pack. `coordinates`: one per axis of the mesh; only those of axes in
// the placement's shard, flat and place operations count.
LocalTensor Evaluate(const std::vector<MeshAxis>& mesh, const Placement& placement,
                     std::span<const uint64_t> shape, std::span<const uint32_t> coordinates);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_LAYOUT_PROGRAM_H_
