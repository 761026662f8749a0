// In which order two checkpoints are read to be compared bit by bit, when they may be cut
// differently and only so many blocks fit into memory. Reads nothing itself (checkpoint/
// diff_bytes.cc does).
//
// One of the two leads: its pieces, one behind the other, are cut into windows of at most a few
// MiB. For each window the planner says where the other checkpoint has the same elements. A window
// needs some blocks of both; blocks stay in a fixed number of slots per checkpoint, the one that
// has not been used for longest gives way. All of this is known before anything is read, so a
// schedule is a list: which blocks are read in which order into which slots.
//
// What is compared is the same whatever leads and in whatever order windows come; how often a block
// is read is not. Equal cuts, or ranges, want the order of storage, in which each block of the
// leading checkpoint is read once; tensors that one has cut by columns and the other by rows want
// the order of the tensor's elements. Four schedules are made (each may lead, in both orders) and
// the one that reads least is taken; a first one that reads nothing twice ends the search.
#ifndef HOLDFAST_CHECKPOINT_DIFF_PLAN_H_
#define HOLDFAST_CHECKPOINT_DIFF_PLAN_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "format/index.h"
#include "format/planner.h"

namespace holdfast {

inline constexpr uint64_t kDiffWindowBytesMax = uint64_t{4} << 20;
// Slots of each checkpoint: as many as fit into its half of the memory, within these.
inline constexpr size_t kDiffSlotsMin = 4;
inline constexpr size_t kDiffSlotsMax = 4096;
// Windows of a schedule: 64 TiB in whole blocks of 4 MiB. Each takes about 40 bytes of memory (80
// while they are sorted), and 20 for each block that it touches (16 of them while it is made).
// More come only from an index of tensors that all share the same bytes.
inline constexpr uint64_t kDiffWindowsMax = uint64_t{1} << 24;

struct DiffLimits {
  uint64_t memory_bytes_max = 0;  // of the slots; see kDiffSlotsMin
  uint64_t windows_max = kDiffWindowsMax;
};

// A tensor state that both have, with equal dtype and shape: numbers in each index.
struct CommonState {
  std::array<uint32_t, 2> state;  // of checkpoint 0 and 1
};

// A piece of the leading checkpoint. Of equal ones (replicas) only the first is there.
struct LeadPiece {
  Piece piece;  // its tensor_state and box refer to the leading index
  uint32_t image = 0;
  uint64_t offset_bytes = 0;
  uint32_t common = 0;  // which CommonState
};

// Bytes [begin, end) of a leading piece; whole elements, at most kDiffWindowBytesMax.
struct DiffWindow {
  uint32_t piece = 0;  // index into pieces()
  uint64_t begin_bytes = 0;
  uint64_t end_bytes = 0;
  // Its blocks: [first_use, first_use + lead_uses) are of the leading checkpoint, then other_uses
  // of the other; each a number of a load, by (image, block).
  size_t first_use = 0;
  uint32_t lead_uses = 0;
  uint32_t other_uses = 0;
};

// Reads one block into one slot.
struct BlockLoad {
  uint32_t image = 0;
  uint32_t slot = 0;
  uint64_t block = 0;
  uint32_t checkpoint = 0;
  uint32_t use_count = 0;  // windows that use it, at least one; all before the slot's next load
};

struct DiffSchedule {
  std::vector<DiffWindow> windows;  // in the order in which they are compared
  std::vector<BlockLoad> loads;     // in the order in which windows first need them
  std::vector<uint32_t> uses;       // of all windows
  std::array<size_t, 2> slot_count{};
  uint64_t bytes = 0;           // of all loads
  uint64_t distinct_bytes = 0;  // if nothing were read twice
};

// Threads: any; immutable. Lifetime: the indices outlive it.
class DiffPlan {
 public:
  enum class Order { kStorage, kElements };

  // The plan that reads least, of those that keep to limits.windows_max. `common` are all that
  // shall be compared. CheckIndexCover holds for both. Errors: kInvalidArgument (none of them does,
  // and no retry helps), those of PlanCopy.
  static absl::StatusOr<DiffPlan> Create(const Index& a, const Index& b,
                                         std::span<const CommonState> common,
                                         const DiffLimits& limits);
  // The one where `lead` leads in this order: Create chooses among these.
  static absl::StatusOr<DiffPlan> CreateWith(const Index& a, const Index& b,
                                             std::span<const CommonState> common,
                                             const DiffLimits& limits, uint32_t lead, Order order);

  uint32_t lead() const { return lead_; }  // 0 or 1
  const Index& lead_index() const { return *lead_index_; }
  const Index& other_index() const { return *other_index_; }
  const DiffSchedule& schedule() const { return schedule_; }
  std::span<const LeadPiece> pieces() const { return pieces_; }

  // Appends where bytes [begin, end) of a leading piece lie in the other checkpoint. Each op reads
  // as if the piece were copied there: image_offset_bytes and image_stride_bytes are places in the
  // PIECE, buffer, buffer_offset_bytes and buffer_stride_bytes are image and places in the other
  // checkpoint.
  void AppendOther(uint32_t piece, uint64_t begin_bytes, uint64_t end_bytes,
                   std::vector<CopyOp>& ops) const;

 private:
  DiffPlan(const Index& lead_index, const Index& other_index, uint32_t lead)
      : lead_index_(&lead_index), other_index_(&other_index), lead_(lead) {}

  // Without a schedule.
  static absl::StatusOr<DiffPlan> WithPieces(const Index& a, const Index& b,
                                             std::span<const CommonState> common, uint32_t lead);
  void AddPieces(std::span<const CommonState> common);
  absl::Status PlanOther();

  const Index* lead_index_;
  const Index* other_index_;
  uint32_t lead_;
  std::vector<LeadPiece> pieces_;  // by (image, offset)
  std::vector<CopyOp> ops_;        // as AppendOther gives them; by (piece, place in it)
  std::vector<uint64_t> reach_;    // the greatest end in its piece up to this op
  std::vector<size_t> first_op_;   // of each piece, and the end
  DiffSchedule schedule_;
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_DIFF_PLAN_H_
