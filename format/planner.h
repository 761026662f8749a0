// Plans how the stored pieces of a checkpoint fill the buffers of one rank of any layout, and
// proves before anything moves that every element is there exactly once. Moves no bytes itself.
//
// Restore, reshard, views and conversions are all this planner: source pieces (images) on one side,
// segments (buffers) on the other.
#ifndef HOLDFAST_FORMAT_PLANNER_H_
#define HOLDFAST_FORMAT_PLANNER_H_

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "format/layout.h"
#include "format/tensor_piece.h"

namespace holdfast {

// A piece in an image: its elements lie one behind the other from image_offset_bytes.
struct StoredPiece {
  Piece piece;
  uint32_t image = 0;
  uint64_t image_offset_bytes = 0;
};

// The stored pieces of a checkpoint, as INDEX lists them, in any order. Equal pieces are replicas
// (their bytes are equal: that is the writer's promise, held by fingerprints). Pieces may be empty.
//
// Lifetime: a view; what it refers to outlives the call it is given to.
struct SourceView {
  const std::vector<TensorState>& tensor_states;  // (tensor, state) pairs are distinct
  const BoxTable& boxes;
  std::span<const StoredPiece> pieces;
};

// Copies `count` runs of `run_bytes`: run i from image_offset_bytes + i * image_stride_bytes to
// buffer_offset_bytes + i * buffer_stride_bytes. With count 1 both strides are 0.
struct CopyOp {
  uint32_t image = 0;
  uint32_t buffer = 0;
  uint64_t image_offset_bytes = 0;
  uint64_t buffer_offset_bytes = 0;
  uint64_t run_bytes = 0;
  uint64_t count = 1;
  uint64_t image_stride_bytes = 0;
  uint64_t buffer_stride_bytes = 0;

  uint64_t Bytes() const { return run_bytes * count; }
  // One past the last byte that it reads of the image.
  uint64_t ImageEnd() const {
    return image_offset_bytes + (count - 1) * image_stride_bytes + run_bytes;
  }
};

struct CopyPlan {
  std::vector<CopyOp> ops;  // by (image, image offset); each byte of a segment is written once
  uint64_t bytes = 0;       // written in all
};

// OK if every tensor state is there completely, each element exactly once (equal pieces count as
// one). Otherwise kDataLoss that names tensor, state, elements and images: the first element that
// is missing, or two pieces that overlap without being equal, or a piece that is outside its
// tensor. O(m log m) for m pieces that are ranges or compact boxes; kResourceExhausted for pieces
// of which it would take much longer to see, because they are thin along different dimensions, and
// for too many of one tensor (format/planner_geometry.h, format/planner_source.cc).
absl::Status CheckCover(const SourceView& source);

// The plan that fills all segments of `target` (indices of `target_states`), from the same tensor
// states of `source`. Of replicas it takes those in the image from which it reads least so far.
// Errors, naming tensor and state: kFailedPrecondition (not in the source, or of another shape or
// dtype: expected and found; never kNotFound, which says that there is no checkpoint), kDataLoss
// (as CheckCover, in what is needed), kResourceExhausted (too many pieces of one tensor; more than
// 4,000,000 ops + 16 per piece and segment, or 1,000,000 steps + 256 per piece, segment and op).
// O((m + n) log(m + n)) for m pieces of these tensor states and n segments, plus the plan's size.
absl::StatusOr<CopyPlan> PlanCopy(const SourceView& source,
                                  const std::vector<TensorState>& target_states,
                                  const RankLayout& target);

// The ops that copy one segment between its buffer and `image_offset_bytes`, where its elements lie
// one behind the other: one op if the segment is contiguous. For capture.
std::vector<CopyOp> PlanSegment(const std::vector<TensorState>& tensor_states,
                                const RankLayout& layout, const Segment& segment, uint32_t image,
                                uint64_t image_offset_bytes);

// Appends to `out` the part of `op` whose image bytes lie in [begin, end): at most three ops, in
// order. For moving a plan block by block.
void ClipToImage(const CopyOp& op, uint64_t image_begin_bytes, uint64_t image_end_bytes,
                 std::vector<CopyOp>& out);

// Indices of the source's tensor states that `target_states` does not name: what a restore would
// leave behind.
std::vector<uint32_t> StatesNotIn(const std::vector<TensorState>& source_states,
                                  const std::vector<TensorState>& target_states);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_PLANNER_H_
