// What a rank has registered, understood: layout, buffers, blobs, the slot that its saves will
// fill, and who fills which byte. A pure function of the document and of who the rank is, so that a
// restarted worker makes the same from the kept document.
//
// A slot is the image, block for block as it is in the file, and behind it the blocks of the extra
// copies (checkpoint/replicas.h), if there are any. Bytes of it are written by exactly one of two:
// by the trainer (capture plan; blobs given at the step) or by the agent (head, gaps, the rest of a
// blob's area, padding: zeros).
#ifndef HOLDFAST_CHECKPOINT_REGISTRATION_H_
#define HOLDFAST_CHECKPOINT_REGISTRATION_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "base/ids.h"
#include "checkpoint/layout_cache.h"
#include "checkpoint/replicas.h"
#include "format/image.h"
#include "format/image_fingerprints.h"
#include "format/layout.h"
#include "format/planner.h"
#include "format/tensor_piece.h"
#include "hook/abi/messages.h"

namespace holdfast {

inline constexpr uint64_t kDocumentBytesMax = uint64_t{512} << 20;
inline constexpr uint64_t kRegisteredBuffersMax = 2'000'000;
inline constexpr uint64_t kRegisteredBlobsMax = 10'000;
inline constexpr uint32_t kCaptureGroupCount = 64;
// Of a slot; one of more is refused. Tables in memory have some 20 bytes for each block, whether
// the tensors that a trainer names exist or not.
inline constexpr uint64_t kImageBlocksMax = uint64_t{1} << 26;

// For whom a document is understood.
struct RegistrationOwner {
  std::string job;
  std::string job_uuid;
  Rank rank{};
  uint32_t world_size = 0;
  uint64_t block_bytes = 0;
};

struct RegisteredBuffer {
  std::string name;
  uint64_t bytes = 0;
  uint32_t group = 0;
};

struct RegisteredBlob {
  std::string name;
  BlobScope scope = BlobScope::kGlobal;
  uint64_t capacity_bytes = 0;
  // Empty: not stored by this rank (global blobs of other ranks than 0).
  std::optional<uint64_t> image_offset_bytes;
};

// "once", "per-node", "all"
std::string_view CopiesName(abi::Copies copies);

// Bytes [begin, end) of a slot.
struct ImageRange {
  uint64_t begin = 0;
  uint64_t end = 0;
  friend bool operator==(const ImageRange&, const ImageRange&) = default;
};

// Threads: any; immutable once built. Lifetime: owns all it needs; shared.
class Registration {
 public:
  // Understands `document` (all bytes of a sealed memfd of abi::RegistrationDocument). Takes
  // seconds for 100,000 tensors: call it on a WorkPool. Errors: kInvalidArgument that names what
  // is wrong, expected and found: offsets and counts of the document, names, the layout (see
  // Layout::Parse), its world size, buffers missing, unknown or too small, names given twice,
  // overlapping tensors, blobs; errors of ImageTemplate::Build and of PlaceReplicas. `layouts`:
  // from which the layout comes; nullptr: it is made for this registration alone.
  static absl::StatusOr<std::shared_ptr<const Registration>> Build(
      std::string document, const RegistrationOwner& owner, const std::string& scratch_directory,
      LayoutCache* layouts = nullptr);

  const RegistrationOwner& owner() const { return owner_; }
  const Layout& layout() const { return *layout_->layout; }
  std::span<const RegisteredBuffer> buffers() const { return buffers_; }  // as registered
  std::span<const RegisteredBlob> blobs() const { return blobs_; }        // as registered

  // What this rank holds: the target of a restore. Buffer i of it is buffers()[
  // buffer_of_need()[i]]; a need of 0 bytes that was not registered has kNoBuffer.
  static constexpr uint32_t kNoBuffer = UINT32_MAX;
  const RankLayout& holdings() const { return holdings_; }
  std::span<const uint32_t> buffer_of_need() const { return buffer_of_need_; }

  // What this rank stores, for INDEX and restore. Piece::tensor_state refers to
  // layout().tensor_states(), Piece::box to stored_boxes().
  std::span<const PlacedPiece> stored_pieces() const { return stored_pieces_; }
  const BoxTable& stored_boxes() const { return stored_boxes_; }
  // The sums of these pieces, from any block.
  const ImageFingerprints& fingerprints() const { return *fingerprints_; }

  const ImageTemplate& image() const { return *image_; }
  uint64_t image_bytes() const { return image_->image_bytes(); }
  uint64_t block_bytes() const { return image_->block_bytes(); }
  // Of the image: these are flushed.
  uint32_t block_count() const { return static_cast<uint32_t>(image_bytes() / block_bytes()); }

  abi::Copies copies() const { return copies_; }
  // What must be compared with the other holders' copies; empty unless copies() is kAll.
  const Replicas& replicas() const { return replicas_; }
  // The sums of replicas().places, from any block of the slot.
  const ImageFingerprints& replica_sums() const { return *replica_sums_; }
  // Of the image and the extra copies: these are captured.
  uint32_t slot_block_count() const { return slot_block_count_; }
  uint64_t slot_bytes() const { return slot_block_count_ * block_bytes(); }

  // The whole capture plan, as sent to the trainer (messages.h).
  std::span<const std::byte> capture_plan() const { return capture_plan_; }
  std::span<const abi::CaptureOp> capture_ops() const;

  // Who writes into a block: capture ops; blobs but no ops; the agent alone.
  enum class Writer : uint8_t { kAgent, kBlobs, kOps };
  Writer writer_of(uint32_t block) const { return writers_[block]; }

  // Zeros that the agent writes, ascending and disjoint: everything of the slot but head, ops and
  // blob areas.
  std::span<const ImageRange> gaps() const { return gaps_; }

  // Lengths for ImageStamp (of the stored blobs only) out of lengths for all registered ones.
  std::vector<uint64_t> StoredBlobBytes(std::span<const uint64_t> blob_bytes) const;

 private:
  friend class RegistrationBuilder;
  Registration() = default;

  RegistrationOwner owner_;
  std::shared_ptr<const SharedLayout> layout_;
  std::vector<RegisteredBuffer> buffers_;
  std::vector<RegisteredBlob> blobs_;
  RankLayout holdings_;
  std::vector<uint32_t> buffer_of_need_;
  std::vector<PlacedPiece> stored_pieces_;
  BoxTable stored_boxes_;
  std::optional<ImageFingerprints> fingerprints_;
  std::optional<ImageTemplate> image_;
  abi::Copies copies_ = abi::Copies::kOnce;
  Replicas replicas_;
  std::optional<ImageFingerprints> replica_sums_;
  uint32_t slot_block_count_ = 0;
  std::vector<std::byte> capture_plan_;
  std::vector<Writer> writers_;
  std::vector<ImageRange> gaps_;
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_REGISTRATION_H_
