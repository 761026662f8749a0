// INDEX: what the images of one checkpoint contain and where, in one binary file. Bytes:
// docs/FORMAT.md. Fixed-size little-endian records in 8-aligned sections, so that a reader may map
// it; the whole file is under its own CRC32C, there is no unchecked padding.
//
// Bounded: a decoded Index takes at most about 20 times the memory of its bytes, whatever they are:
// every count is checked against its section before anything is allocated.
//
// Threads: all functions here are pure.
#ifndef HOLDFAST_FORMAT_INDEX_H_
#define HOLDFAST_FORMAT_INDEX_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/ids.h"
#include "format/fingerprint.h"
#include "format/image.h"
#include "format/manifest.h"
#include "format/tensor_piece.h"

namespace holdfast {

inline constexpr uint64_t kIndexBytesMax = uint64_t{8} << 30;

// One image file of the checkpoint.
struct IndexImage {
  std::string file;  // see CheckFileName
  Rank rank{};
  uint32_t layout = 0;       // index into Index::layouts
  uint64_t bytes = 0;        // of the file; block_crc32c.size() * block_bytes
  uint64_t block_bytes = 0;  // a power of two, kBlockBytesMin to kBlockBytesMax
  std::vector<uint32_t> block_crc32c;
};

// The CRC32C over a block table in little-endian: what the manifest says of an image.
uint32_t ChecksumRoot(std::span<const uint32_t> block_crc32c);

// What is known of a tensor state as a whole. Empty: not computed.
struct TensorFacts {
  std::optional<Fingerprint> fingerprint;
  // Of no function that is defined: from before there was one. It cannot be compared with anything.
  // Not together with `fingerprint`.
  std::optional<std::array<std::byte, 16>> undefined_fingerprint;
  std::optional<uint64_t> non_finite_count;  // NaN and infinities
  std::optional<uint64_t> marks;             // bits; none is defined in format 1
  friend bool operator==(const TensorFacts&, const TensorFacts&) = default;
};

// A piece of a tensor state in an image: its elements lie one behind the other at the offset.
// Several pieces may share bytes (tied tensors).
struct IndexPiece {
  Piece piece;         // tensor_state and box refer to the Index
  uint32_t image = 0;  // index into Index::images
  uint64_t offset_bytes = 0;
};

struct IndexBlob {
  BlobScope scope = BlobScope::kGlobal;
  Rank rank{};  // that saved it, below BlobWorldSize()
  std::string name;
  uint32_t image = 0;
  uint64_t offset_bytes = 0;
  uint64_t bytes = 0;  // its length at this step
  friend bool operator==(const IndexBlob&, const IndexBlob&) = default;
};

struct Index {
  std::string job;
  std::string job_uuid;
  CheckpointId checkpoint;
  uint32_t world_size = 0;
  // Of the run that saved the blobs, where that is another one: a reshard keeps them as they are.
  // 0: world_size.
  uint32_t blob_world_size = 0;
  std::vector<std::string> layouts;        // layout documents, each once
  std::vector<IndexImage> images;          // one per rank, in order of the ranks
  std::vector<TensorState> tensor_states;  // strictly ascending by (tensor, state), bytewise
  std::vector<TensorFacts> facts;          // one per tensor state
  BoxTable boxes;
  std::vector<IndexPiece> pieces;  // ascending by (tensor_state, image, offset_bytes)
  std::vector<IndexBlob> blobs;    // strictly ascending by (scope, name, rank)

  // The size of the world whose ranks saved the blobs.
  uint32_t BlobWorldSize() const { return blob_world_size == 0 ? world_size : blob_world_size; }
  // Where the pieces of a tensor state lie in `pieces`: [first, last).
  std::pair<size_t, size_t> PiecesOf(uint32_t tensor_state) const;
  // Index into tensor_states; empty if there is none. O(log n).
  std::optional<uint32_t> FindTensorState(const std::string& tensor,
                                          const std::string& state) const;
};

// Brings tensor_states, pieces, facts and blobs into the order that Index asks for (facts may be
// empty: nothing computed) and renumbers Piece::tensor_state. For makers of an Index, whose tensor
// states come in document order.
void SortIndex(Index& index);

// OK if `index` is as its comments say, which is what DecodeIndex returns and EncodeIndex takes.
// Else kDataLoss with what is wrong, expected and found.
absl::Status CheckIndex(const Index& index);

// Deterministic. Errors: those of CheckIndex, as kInvalidArgument: a broken index is never written.
absl::StatusOr<std::vector<std::byte>> EncodeIndex(const Index& index);

// Errors: kDataLoss; the text names the section, what was expected and what was found. Does not say
// whether the pieces cover the tensors: that is the planner's to prove.
absl::StatusOr<Index> DecodeIndex(std::span<const std::byte> bytes);

// OK if both speak of the same checkpoint and the same images: job, uuid, attempt, step, world
// size; of every image file name, bytes and checksum root. Else kDataLoss with both values.
// (That INDEX has the bytes and CRC32C that the manifest says is checked on its bytes:
// CheckIndexBytes.)
absl::Status CheckConsistent(const Manifest& manifest, const Index& index);
absl::Status CheckIndexBytes(const Manifest& manifest, std::span<const std::byte> index_bytes);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_INDEX_H_
