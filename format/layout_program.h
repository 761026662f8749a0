// A parsed layout document: meshes, placements, packs, and which of them each tensor state has.
// Inside of format/layout*: everybody else asks Layout.
//
// A placement is a pipeline of operations on the local tensor (format/local_tensor.h), over the
// axes of one mesh. What depends on the whole document is resolved when it is parsed: the zero rule
// is a flat cut, a pack or nothing; a place by index is a list of coordinates. Invariant: every
// axis occurs in at most one operation of a placement, and every operation deals the places of the
// local tensor out, each to one coordinate. So pieces of unpacked tensors are equal or disjoint.
#ifndef HOLDFAST_FORMAT_LAYOUT_PROGRAM_H_
#define HOLDFAST_FORMAT_LAYOUT_PROGRAM_H_

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
  std::vector<uint64_t> ends;  // kSizes only: where the part of each coordinate ends

  friend bool operator==(const CutRule&, const CutRule&) = default;
};

// The range [first, second) of coordinate `coordinate` of `count`. The rule fits (CheckCut).
std::pair<uint64_t, uint64_t> Cut(const CutRule& rule, uint64_t elements, uint32_t count,
                                  uint32_t coordinate);
// Empty if the rule fits, else what was expected of `elements`.
std::string CheckCut(const CutRule& rule, uint64_t elements, uint32_t count);

// In PlacementOp::view: the size that follows from the others.
inline constexpr uint64_t kDerivedSize = UINT64_MAX;

struct PlacementOp {
  enum class Kind : uint8_t { kShard, kFlat, kPlace, kPack, kView, kPerm, kPad };
  Kind kind = Kind::kShard;
  // Indices into the mesh. kShard, kFlat, kPack: cut over all of them together, the last one varies
  // fastest. kPlace: one. Others: none.
  std::vector<uint32_t> axes;
  uint32_t dim = 0;                   // kShard, kPad
  CutRule rule;                       // kShard, kFlat
  std::vector<uint64_t> blocks;       // kShard: the dimension is these, each is cut by the rule
  std::vector<uint32_t> coordinates;  // kPlace: ascending
  uint32_t pack = 0;                  // kPack
  std::vector<uint64_t> view;         // kView: sizes of the new dimensions
  std::vector<uint32_t> perm;         // kPerm: new dimension i is the old dimension perm[i]
  uint64_t pad_multiple = 1;          // kPad: the size becomes a multiple of it
  uint64_t pad_size_min = 0;          // kPad: and at least this

  friend bool operator==(const PlacementOp&, const PlacementOp&) = default;
};

struct Placement {
  uint32_t mesh = 0;
  std::vector<PlacementOp> ops;

  friend bool operator==(const Placement&, const Placement&) = default;
};

// A factorisation of the ranks. 0 is the document's "mesh"; the others are in "meshes".
struct Mesh {
  std::string name;  // empty: the document's "mesh"
  std::vector<MeshAxis> axes;

  // The coordinate of every axis.
  std::vector<uint32_t> CoordinatesOf(uint32_t rank) const;
  // Of several axes together: how many there are, and which one these coordinates are.
  uint32_t SizeOf(std::span<const uint32_t> axis_numbers) const;
  uint32_t JointCoordinate(std::span<const uint32_t> axis_numbers,
                           std::span<const uint32_t> coordinates) const;
  // Sets the coordinates of these axes to combination number `combination` of SizeOf(axis_numbers):
  // the first axis varies fastest.
  void SetCombination(std::span<const uint32_t> axis_numbers, uint64_t combination,
                      std::vector<uint32_t>& coordinates) const;
};

inline constexpr uint32_t kNoPack = UINT32_MAX;

inline constexpr uint32_t kNotListed = UINT32_MAX;

// What goes with the tensor state of the same index.
struct StateProgram {
  uint32_t placement = 0;
  uint32_t listed =
      kNotListed;       // index into listed: its segments are listed, there is no placement
  uint32_t buffer = 0;  // index into buffer_names; of a pack's member the pack's
  uint32_t pack = kNoPack;
  uint32_t pack_member = 0;   // index into PackProgram::members
  uint64_t offset_bytes = 0;  // in the buffer; 0 for a pack's member
};

struct PackProgram {
  std::string name;
  uint32_t mesh = 0;           // of all members' placements
  std::vector<uint32_t> axes;  // cut over all of them together
  uint32_t buffer = 0;
  uint64_t align_elements = 1;
  uint64_t multiple_elements = 1;
  std::vector<uint32_t> members;     // tensor states, in document order; all of one dtype
  std::vector<uint32_t> other_axes;  // ascending: those in other operations of members
};

// A box of a tensor state whose place in a buffer the document itself says.
struct ListedSegment {
  std::vector<uint64_t> lo;
  std::vector<uint64_t> size;
  struct Copy {
    uint32_t rank = 0;
    uint32_t address = 0;  // index into ListedState::addresses
  };
  std::vector<Copy> copies;  // ascending by rank, each rank once
};

// Where a box lies on some ranks.
struct ListedAddress {
  uint32_t buffer = 0;  // index into buffer_names
  uint64_t offset_bytes = 0;
  std::vector<uint64_t> strides_bytes;  // empty: row-major
};

// All of a tensor state; the boxes are disjoint, and together they are the tensor.
struct ListedState {
  std::vector<ListedSegment> segments;
  std::vector<ListedAddress> addresses;
};

struct LayoutProgram {
  std::string text;
  LayoutHash hash;
  std::vector<Mesh> meshes;  // at least one; all of world_size ranks
  uint32_t world_size = 1;
  std::vector<Placement> placements;  // distinct; 0 is "replicated on all ranks"
  std::vector<PackProgram> packs;
  std::vector<std::string> buffer_names;
  std::vector<TensorState> tensor_states;
  std::vector<StateProgram> states;  // of each tensor state
  std::vector<ListedState> listed;

  const Mesh& MeshOf(const Placement& placement) const { return meshes[placement.mesh]; }
};

absl::StatusOr<std::unique_ptr<LayoutProgram>> ParseLayout(std::string json);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_LAYOUT_PROGRAM_H_
