// What a reshard writes and where it comes from, decided before a byte moves: the images of the
// target, for every byte of them the bytes of the source that it is copied from, and an order of
// work in which few buffers suffice.
//
// Work is cut into *units*: parts of one target image that are filled, checksummed and written as a
// whole. They are done in the order of the tensor elements with which they begin, over all images
// together, so that units that need the same source blocks come close to each other, and a source
// block is read once although only a few are kept. Where a target cuts finer than that (a source
// block has parts for more units than there is room for blocks), smaller units bring them closer.
#ifndef HOLDFAST_CHECKPOINT_RESHARD_PLAN_H_
#define HOLDFAST_CHECKPOINT_RESHARD_PLAN_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/ids.h"
#include "format/fingerprint.h"
#include "format/image.h"
#include "format/image_fingerprints.h"
#include "format/index.h"
#include "format/layout.h"
#include "format/planner.h"

namespace holdfast {

struct ReshardTarget {
  std::string job;
  std::string job_uuid;
  std::string layout_json;
  std::string scratch_directory;  // see ImageTemplate::Build
  // Offsets and lengths of what is written are multiples of it: a power of two, 4096 to 65536. If
  // the blocks of the source are smaller, of those.
  uint64_t alignment_bytes = 4096;
};

struct ReshardBlob {
  ImageBlob blob;
  Rank rank{};  // that saved it
  uint64_t bytes = 0;
  uint64_t offset_bytes = 0;  // in the image
};

struct ReshardImage {
  uint64_t image_bytes = 0;
  uint64_t head_bytes = 0;
  // head_bytes rounded down to the alignment. Bytes [0, units_begin) are written with the head;
  // units cover the rest.
  uint64_t units_begin = 0;
  // By offset. Piece::tensor_state is of the target's layout, Piece::box of ReshardPlan::boxes().
  std::vector<PlacedPiece> pieces;
  std::vector<ReshardBlob> blobs;
};

// Bytes [begin, end) of a target image.
struct ReshardUnit {
  uint32_t image = 0;
  uint64_t begin_bytes = 0;
  uint64_t end_bytes = 0;
};

// Copies from one block of the source into a unit. Offsets of `op`: image_offset_bytes from the
// beginning of the block, buffer_offset_bytes from the beginning of the unit.
struct ReshardPart {
  uint32_t image = 0;  // of the source
  uint64_t block = 0;
  CopyOp op;
};

struct ReshardSchedule {
  uint64_t unit_bytes = 0;  // of the largest unit
  uint32_t thread_count = 0;
  uint64_t slot_bytes = 0;  // of the largest source block
  uint32_t slot_count = 0;  // source blocks that are kept
  // Of the source, each block as often as it is read again, if threads keep in step.
  uint64_t read_bytes = 0;
  uint64_t distinct_read_bytes = 0;  // each block once
  std::vector<ReshardUnit> units;    // in the order of work
  uint64_t buffer_bytes() const { return thread_count * unit_bytes + slot_count * slot_bytes; }
};

// Threads: any; immutable once made. Lifetime: the source index outlives it.
class ReshardPlan {
 public:
  // Blocking, takes seconds for 100,000 pieces. Proves that the source covers each of its tensors
  // exactly once, and so does the target.
  // Errors: kDataLoss (the source's pieces), kInvalidArgument (the layout: all that Layout::Parse
  // refuses, tensor states that are not those of the source, which are named, elements that it
  // leaves out; blobs), those of ImageTemplate::Build.
  static absl::StatusOr<std::unique_ptr<const ReshardPlan>> Create(const Index& source,
                                                                   const ReshardTarget& target);

  const Index& source() const { return *source_; }
  const Layout& layout() const { return *layout_; }
  const ReshardTarget& target() const { return target_; }
  std::span<const ReshardImage> images() const { return images_; }  // one per rank
  const BoxTable& boxes() const { return boxes_; }
  uint64_t block_bytes() const { return block_bytes_; }
  uint64_t image_bytes() const;  // of all images

  // Builds the head of an image once more: heads are large, and a plan keeps none.
  absl::StatusOr<ImageTemplate> BuildImage(Rank rank) const;

  // What the unit is made of, by (image, block). Replaces `parts`.
  void PartsOf(const ReshardUnit& unit, std::vector<ReshardPart>& parts) const;

  // The best schedule whose buffers take at most `buffer_bytes`, and they and the lists of units,
  // also while the schedule is made, at most `memory_bytes`. Errors: kInvalidArgument with the
  // least that is needed.
  absl::StatusOr<ReshardSchedule> Schedule(uint64_t buffer_bytes, uint32_t thread_count_max,
                                           uint64_t memory_bytes = UINT64_MAX) const;
  uint64_t buffer_bytes_min() const;
  // The least for both.
  uint64_t memory_bytes_min() const;
  // What a writer with so many threads has beside these: sums and checksums, the ends of heads, the
  // order of the pieces. An upper bound.
  uint64_t writer_bytes(uint32_t thread_count) const;

  // The index of the target. `block_crc32c` of each image; `sums` over the elements of each of
  // layout().tensor_states(). The number of non-finite elements and the marks are the source's.
  Index MakeIndex(CheckpointId checkpoint, std::vector<std::vector<uint32_t>> block_crc32c,
                  std::span<const Fingerprint> sums) const;

 private:
  ReshardPlan(const Index& source, ReshardTarget target);
  absl::Status CheckStates() const;
  absl::Status AssignPieces();
  void AssignBlobs();
  absl::Status PlaceImages();
  absl::Status PlanCopies();
  uint64_t UnitCount(uint64_t unit_bytes) const;
  std::vector<ReshardUnit> UnitsOf(uint64_t unit_bytes) const;
  // With slot_count 0 if `buffer_bytes` are too few for such units.
  ReshardSchedule ScheduleUnits(uint64_t unit_bytes, uint64_t buffer_bytes,
                                uint32_t thread_count_max) const;
  uint64_t SimulateReads(std::span<const ReshardUnit> units, uint32_t slot_count,
                         uint64_t& distinct_bytes) const;
  std::pair<uint32_t, uint64_t> FirstElementOf(const ReshardImage& image, size_t piece,
                                               uint64_t begin_bytes) const;
  uint64_t slot_bytes() const;
  uint64_t unit_bytes_min() const;

  const Index* source_;
  const ReshardTarget target_;
  const uint64_t block_bytes_;
  const uint64_t alignment_bytes_;
  std::unique_ptr<const Layout> layout_;
  std::vector<ReshardImage> images_;
  BoxTable boxes_;
  // What is copied, by (target image, offset there). CopyOp's words the other way round: `image` is
  // the target's, `buffer` the source's image, so that ClipToImage cuts at units.
  std::vector<CopyOp> ops_;
  std::vector<uint64_t> reach_;    // the greatest end in its image up to here
  std::vector<size_t> ops_begin_;  // of each target image in ops_, and the end
};

// The tensor states of `layout` that are not, or not like this, in `source`, and the other way
// round, as a sentence that names the first few; empty if there are none.
std::string StateDifferences(const std::vector<TensorState>& source,
                             const std::vector<TensorState>& layout);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_RESHARD_PLAN_H_
