// Who holds what, in the terms of somebody who looks at a layout: ranks that hold the same are one
// group, and of a tensor it is said which elements lie where on whom. `holdfast layout explain`
// prints it.
//
// Threads: all functions here are pure.
#ifndef HOLDFAST_FORMAT_LAYOUT_EXPLAIN_H_
#define HOLDFAST_FORMAT_LAYOUT_EXPLAIN_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "format/layout.h"
#include "format/tensor_piece.h"

namespace holdfast {

// ExplainTensors asks ranks, in their order, as long as ranks times tensor states of the layout are
// at most this: up to twenty seconds of one core. The first rank is always asked.
inline constexpr uint64_t kExplainedRankStatesMax = 20'000'000;
// CheckRanks asks so many ranks times tensor states, or the first rank alone: up to two seconds.
inline constexpr uint64_t kCheckedRankStatesMax = 4'000'000;
// A name that is not there is compared with at most so many.
inline constexpr size_t kComparedNamesMax = 100'000;

// Ascending ranks: `0-3,8,16-28:4`, the last for 16, 20, 24, 28. At most `ranges_max` ranges, then
// ` and 7 more` (ranks). "none" if there are none.
std::string RanksText(std::span<const uint32_t> ranks, size_t ranges_max);

// What the tensors of one state come to.
struct StateTotal {
  uint64_t tensor_count = 0;
  uint64_t bytes = 0;
};
std::map<std::string, StateTotal> TotalsByState(const std::vector<TensorState>& tensor_states);

// Ranks that hold exactly the same elements.
struct RankGroup {
  std::vector<uint32_t> ranks;  // ascending
  uint64_t held_bytes = 0;      // by each of them, padding not counted
  uint64_t stored_bytes_min = 0;
  uint64_t stored_bytes_max = 0;
};

// Groups of equally many ranks that hold equally much, though each something else.
struct GroupsAlike {
  std::vector<uint32_t> ranks;  // of all these groups, ascending
  uint64_t group_count = 0;
  uint64_t held_bytes = 0;  // by each rank
  uint64_t stored_bytes_min = 0;
  uint64_t stored_bytes_max = 0;
};

// All sets of ranks that hold something together, by the number of ranks in them.
struct Sharing {
  uint64_t rank_count = 0;  // in each set
  uint64_t set_count = 0;
  uint64_t bytes = 0;  // of all these sets together, each byte counted once
  uint64_t set_bytes_min = 0;
  uint64_t set_bytes_max = 0;
  std::vector<uint32_t> first_ranks;  // the first of the sets
};

struct LayoutSummary {
  uint64_t distinct_bytes = 0;     // of all tensor states; of tied tensors each
  uint64_t held_bytes = 0;         // of all ranks together
  std::vector<RankGroup> groups;   // by their first rank; every rank is in one
  std::vector<GroupsAlike> alike;  // by their first rank; every group is in one
  std::vector<Sharing> sharing;    // by rank_count, descending
};

// `stored_bytes`: of each rank (CHECKed size).
LayoutSummary Summarize(const Layout& layout, std::span<const uint64_t> stored_bytes);

// Whether ranks could register the layout. Every rank is asked; where ranks times tensor states of
// the layout are more than rank_states_max, as few as are not, at even distances from rank 0 on.
// Returns how many were asked. Errors: those of Layout::ForRank, of the first that has one.
absl::StatusOr<uint32_t> CheckRanks(const Layout& layout,
                                    uint64_t rank_states_max = kCheckedRankStatesMax);

// Where ranks have a piece: all of these at the same place of their buffers of this name.
struct HeldPlace {
  std::vector<uint32_t> ranks;  // ascending
  std::string buffer;
  uint64_t offset_bytes = 0;
  std::vector<uint64_t> strides_bytes;  // of each dimension of the box; empty: contiguous
};

struct HeldPiece {
  Piece piece;
  std::vector<HeldPlace> places;  // by first rank
};

struct StoredPart {
  Piece piece;
  uint32_t rank = 0;  // its writer
};

// One tensor state.
struct TensorHolders {
  uint32_t tensor_state = 0;       // index into Layout::tensor_states()
  BoxTable boxes;                  // of the pieces below
  std::vector<HeldPiece> held;     // disjoint, as met from rank 0 on
  std::vector<StoredPart> stored;  // by rank
};

struct TensorsExplained {
  std::vector<TensorHolders> states;  // as asked
  uint32_t ranks_asked = 0;           // ranks [0, ranks_asked); less than all only at the limit
};

// `tensor_states`: indices, ascending. `stored` is filled if `writers` says so; then errors are
// those of WriterAssignment::ForRank. Ranks times tensor states of the layout beyond
// rank_states_max are not asked, but for rank 0.
enum class Writers { kNotAsked, kAssigned };
absl::StatusOr<TensorsExplained> ExplainTensors(const Layout& layout,
                                                std::span<const uint32_t> tensor_states,
                                                Writers writers,
                                                uint64_t rank_states_max = kExplainedRankStatesMax);

// All states of the tensors of this name; if there is none, of all that fit it as a pattern
// (format/name_pattern.h). kNotFound with a suggestion, or kInvalidArgument for a broken pattern.
absl::StatusOr<std::vector<uint32_t>> SelectTensors(const std::vector<TensorState>& tensor_states,
                                                    const std::string& name);

// `[2:4, 0:3], elements [6, 12)` for a piece that is one box of its tensor (the elements only if it
// is a range of the whole tensor), else as Describe: `elements [5, 9)`, `elements [0, 5) of the box
// [0:4, 2:4]`.
std::string PieceText(const Piece& piece, const BoxTable& boxes, std::span<const uint64_t> shape);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_LAYOUT_EXPLAIN_H_
