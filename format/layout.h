// A job's layout: where the elements of every tensor lie on every rank. Parsed from the JSON layout
// document (docs/layout-grammar.md), then asked rank by rank; nothing is computed for all ranks
// unless asked, so that 100,000 tensors or 1,000 ranks cost one rank milliseconds.
//
// Who stores what is format/writer_assignment.h; how bytes get from one layout to another is
// format/planner.h.
#ifndef HOLDFAST_FORMAT_LAYOUT_H_
#define HOLDFAST_FORMAT_LAYOUT_H_

#include <compare>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/ids.h"
#include "format/tensor_piece.h"

namespace holdfast {

inline constexpr size_t kLayoutTensorsMax = 2'000'000;
inline constexpr size_t kMeshAxesMax = 16;
inline constexpr uint64_t kWorldSizeMax = uint64_t{1} << 20;

// Identifies a document's text. Equal texts are equal layouts; the converse is not promised.
struct LayoutHash {
  uint64_t text_bytes = 0;
  uint32_t text_crc32c = 0;
  friend constexpr auto operator<=>(const LayoutHash&, const LayoutHash&) = default;
};

struct MeshAxis {
  std::string name;
  uint32_t size = 1;
};

// Segment::strides of a segment whose elements lie one behind the other in the buffer.
inline constexpr uint32_t kContiguous = UINT32_MAX;

// A piece of a tensor state in a buffer of a rank. Contiguous: element piece.begin lies at
// buffer_offset_bytes, the others behind it. Else element x of the piece's box (coordinates from
// the box's corner) lies at buffer_offset_bytes + sum over d of x[d] * strides[d].
struct Segment {
  Piece piece;
  uint32_t buffer = 0;             // index into RankLayout::buffers
  uint32_t strides = kContiguous;  // index into RankLayout::strides_bytes
  uint64_t buffer_offset_bytes = 0;
};

struct BufferNeed {
  std::string name;
  uint64_t bytes = 0;  // end of the last segment (packs: of the slice with its padding). A buffer
                       // with 0 needs not exist.
};

// What one rank holds. No segment is empty.
struct RankLayout {
  std::vector<BufferNeed> buffers;                   // in document order of first use
  std::vector<Segment> segments;                     // in document order
  BoxTable boxes;                                    // of the segments' pieces
  std::vector<std::vector<uint64_t>> strides_bytes;  // of each box dimension
};

// What one rank holds, cut so that each segment is held by one set of ranks as a whole: two ranks
// hold two segments of these that are equal as pieces, or share no element.
struct RankHoldings {
  RankLayout layout;
  std::vector<uint32_t> holders;                   // of each segment: index into holder_sets
  std::vector<std::vector<uint32_t>> holder_sets;  // ranks, ascending
};

// The bytes that exactly this set of ranks holds, each counted once.
struct HolderLoad {
  std::vector<uint32_t> ranks;  // ascending
  uint64_t bytes = 0;
};

struct LayoutProgram;  // format/layout_program.h: the parsed document

// Threads: any; immutable after Parse. Lifetime: owns everything it returns references to.
class Layout {
 public:
  // Errors: kInvalidArgument with the JSON path, tensor, expected and found: everything that
  // docs/layout-grammar.md refuses, for all ranks, but for what ForRank says of a rank's buffers.
  static absl::StatusOr<std::unique_ptr<const Layout>> Parse(std::string json);
  ~Layout();
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;

  const std::string& text() const;  // the document
  LayoutHash hash() const;
  const std::vector<MeshAxis>& mesh() const;  // in document order, the last axis varies fastest
  uint32_t world_size() const;                // product of the mesh
  // In document order. Piece::tensor_state of all of this layout's pieces refers to it.
  const std::vector<TensorState>& tensor_states() const;

  // CHECKs rank < world_size(). O(n log n) in the tensor states. Errors: kInvalidArgument if two
  // tensors overlap in a buffer of this rank without being tied (same bytes, same dtype), named; or
  // if its strided tensors take more than 4,194,304 copies.
  absl::StatusOr<RankLayout> ForRank(Rank rank) const;
  RankHoldings HeldByRank(Rank rank) const;

  // Of all ranks together, ordered by ranks. Without enumerating pieces where placements repeat.
  std::vector<HolderLoad> HolderLoads() const;

 private:
  explicit Layout(std::unique_ptr<const LayoutProgram> program);

  std::unique_ptr<const LayoutProgram> program_;
};

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_LAYOUT_H_
