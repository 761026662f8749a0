// The image of a rank: one HDF5 file whose metadata (the head) lie in front and whose tensors lie
// at known offsets behind, so that payload is written by whoever has it and libhdf5 never sees it.
// Names, attributes and types in the file: docs/FORMAT.md.
//
// A template is built once per registration (format/hdf5_template.h, the only user of libhdf5);
// each save copies its head and patches the few values that differ between saves (cells).
#ifndef HOLDFAST_FORMAT_IMAGE_H_
#define HOLDFAST_FORMAT_IMAGE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/ids.h"
#include "format/tensor_piece.h"

namespace holdfast {

inline constexpr uint64_t kBlockBytesMin = uint64_t{4} << 10;
inline constexpr uint64_t kBlockBytesMax = uint64_t{64} << 20;
inline constexpr uint64_t kImageAlignmentBytes = 64;  // of the payload of every dataset and blob
inline constexpr uint64_t kImageBytesMax = uint64_t{1} << 53;
inline constexpr uint64_t kHeadBytesMax = uint64_t{2} << 30;
// Blob length of a blob that was not given at this step.
inline constexpr uint64_t kBlobAbsent = UINT64_MAX;

// OK if a power of two in [kBlockBytesMin, kBlockBytesMax]; else kInvalidArgument.
absl::Status CheckBlockBytes(uint64_t block_bytes);

// The numbers are stored in INDEX and are those of hf_blob_scope.
enum class BlobScope : uint8_t { kGlobal = 0, kRank = 1 };
std::string_view BlobScopeName(BlobScope scope);  // "global", "rank"

struct ImageBlob {
  BlobScope scope = BlobScope::kGlobal;
  std::string name;
  uint64_t capacity_bytes = 0;
  // In an image that no rank saved (reshard): who saved the blob. Such an image may hold the blobs
  // of one name of several ranks.
  std::optional<Rank> saved_by = std::nullopt;
};

// What an image shall hold. Payload lies in it in the order of `pieces`, then of `blobs`.
struct ImageSpec {
  std::string job;
  std::string job_uuid;
  Rank rank{};
  uint32_t world_size = 0;
  uint64_t block_bytes = 0;
  // The four below must stay alive during Build only.
  std::string_view layout_json;
  std::span<const TensorState> tensor_states;
  std::span<const Piece> pieces;  // each becomes one dataset; several of one state are numbered
  const BoxTable* boxes = nullptr;
  std::vector<ImageBlob> blobs;  // those that this rank stores
};

// What differs from save to save.
struct ImageStamp {
  CheckpointId checkpoint;
  // Bytes of each blob of the spec, in its order; kBlobAbsent: not given.
  std::span<const uint64_t> blob_bytes;
};

// Threads: any; immutable once built. Lifetime: owns all it needs; movable.
class ImageTemplate {
 public:
  // Takes seconds for 100,000 pieces and holds libhdf5's global lock: call it on a WorkPool.
  // `scratch_directory` must allow sparse files; what is made there is gone afterwards, whatever
  // happens. Equal specs give equal bytes.
  // Errors: kInvalidArgument (names, pieces, duplicate blobs, sizes: named, with limits),
  // kResourceExhausted (head above kHeadBytesMax), kUnavailable or kInternal (scratch file,
  // libhdf5; with its own error text).
  static absl::StatusOr<ImageTemplate> Build(const ImageSpec& spec,
                                             const std::string& scratch_directory);

  uint64_t block_bytes() const { return block_bytes_; }
  // Of the file: a multiple of block_bytes. All bytes of an image that are neither head nor piece
  // nor blob (gaps, the end of the last block) are zero, and so is a blob's area behind its length.
  uint64_t image_bytes() const { return image_bytes_; }
  // The head is bytes [0, head_bytes) of the image, a multiple of kImageAlignmentBytes.
  uint64_t head_bytes() const { return head_.size(); }
  // Where each piece, each blob lies, in the order of the spec; head_bytes() for empty ones.
  std::span<const uint64_t> piece_offsets() const { return piece_offsets_; }
  std::span<const uint64_t> blob_offsets() const { return blob_offsets_; }

  // Writes bytes [begin, begin + out.size()) of the head as it is in the image of `stamp` to `out`.
  // CHECKs that the range lies in the head, and that there are as many blob lengths as blobs, each
  // at most its capacity or kBlobAbsent. Cost: a copy.
  void StampHead(const ImageStamp& stamp, uint64_t begin, std::span<std::byte> out) const;

 private:
  ImageTemplate() = default;

  uint64_t block_bytes_ = 0;
  uint64_t image_bytes_ = 0;
  std::vector<std::byte> head_;
  std::vector<uint64_t> piece_offsets_;
  std::vector<uint64_t> blob_offsets_;
  std::vector<uint64_t> blob_capacities_;
  // Offsets in the head of the values that each save writes, 8 bytes little-endian: attempt, step,
  // then the length of each blob.
  std::vector<uint64_t> cells_;
};

// `name` as it stands in a path of the image: `/`, `.`, `%` and bytes below 0x20 and 0x7f become
// %XX with capital digits. The rest, UTF-8 included, stays.
std::string EscapeName(std::string_view name);

// The dataset of a piece in /tensors/<state>: `number` counts the pieces of the tensor state in the
// image, in the order of their offsets.
std::string PieceDatasetName(std::string_view tensor, uint32_t number);
// That of the box if the piece is all of it, else one dimension.
std::vector<uint64_t> PieceDatasetShape(const Piece& piece, std::span<const uint64_t> tensor_shape,
                                        const BoxTable& boxes);

// The version of this software as it is written into files: "holdfast 0.1.0".
std::string_view WriterVersion();

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_IMAGE_H_
