// Where the elements of one rank's shard of a tensor lie in the whole tensor: what tensor
// parallelism means, whatever language a checkpoint says it in. A shard is stored as a flat range
// (a ZeRO partition cuts it anywhere), so it is a list of blocks: contiguous ranges of the shard,
// each the elements of a box of the whole tensor in row-major order. What is in no block is
// padding.
//
// Pure arithmetic: no files. All sizes are elements. The languages are
// converter/deepspeed_parallel.h.
#ifndef HOLDFAST_CONVERTER_SHARD_MAP_H_
#define HOLDFAST_CONVERTER_SHARD_MAP_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "format/tensor_piece.h"

namespace holdfast::converter {

// Of one shard. A box takes some 100 bytes, and planning is O(m log m) in them.
inline constexpr uint64_t kShardBlocksMax = uint64_t{1} << 20;

using Shape = std::vector<uint64_t>;

// Of sizes whose product is known to fit.
uint64_t Product(std::span<const uint64_t> sizes);
// Product, or kInvalidArgument beyond kTensorBytesMax / 8; `what` begins the text.
absl::StatusOr<uint64_t> ElementCount(std::span<const uint64_t> shape, const std::string& what);

struct ShardBlock {
  uint64_t shard_begin = 0;  // where it begins in the shard's row-major order
  Shape lo, size;            // the box in the whole tensor; not empty

  uint64_t ElementCount() const;
};

struct ShardMap {
  Shape shape;                     // of the whole tensor
  uint64_t shard_elements = 0;     // of the shard, padding included
  std::vector<ShardBlock> blocks;  // ascending in the shard, disjoint there
};

// The shard is the whole tensor: replicated, or not parallel at all.
absl::StatusOr<ShardMap> WholeShard(const Shape& shape);

// Shards joined along `dimension`; shard_shapes: of every rank, equal elsewhere.
// Errors: kInvalidArgument, expected and found.
absl::StatusOr<ShardMap> JoinedShard(std::span<const Shape> shard_shapes, size_t rank,
                                     size_t dimension);

// Every rank holds a slice of each of several sub-tensors (q, k and v; the halves of a gated MLP),
// one behind the other along `dimension`; whole, the sub-tensors stand one behind the other.
// widths[sub][rank] along `dimension`; logical_shape: of the whole tensor, its size along
// `dimension` the sum of all widths. Errors: kInvalidArgument; kResourceExhausted
// (kShardBlocksMax).
absl::StatusOr<ShardMap> SubTensorShard(const Shape& logical_shape, size_t dimension,
                                        const std::vector<Shape>& widths, size_t rank);

// A strided piece, both sides as torch.as_strided takes them (DeepSpeed affine_ir_spec.md).
struct AffinePiece {
  Shape shape;
  uint64_t source_offset = 0;  // in the whole tensor
  Shape source_strides;
  uint64_t dest_offset = 0;  // in the shard
  Shape dest_strides;
};
// Errors: kInvalidArgument (a piece outside of tensor or shard, or two that overlap in the shard;
// a piece that does not write the shard in order), kResourceExhausted (kShardBlocksMax).
absl::StatusOr<ShardMap> AffineShard(const Shape& logical_shape, const Shape& shard_shape,
                                     std::span<const AffinePiece> pieces);

// The tensor has only its first `rows` rows of dimension 0; the others are padding (a vocabulary).
// kInvalidArgument if it has fewer.
absl::Status KeepRows(uint64_t rows, ShardMap& map);

// The part of a block that a range of the shard holds: elements [begin, end) of the row-major order
// of blocks[block], which lie in the shard from shard_begin on.
struct BlockRange {
  size_t block = 0;
  uint64_t begin = 0;
  uint64_t end = 0;
  uint64_t shard_begin = 0;
};
// Of elements [begin, end) of the shard, in its order. CHECKs end <= shard_elements.
std::vector<BlockRange> RangesOf(const ShardMap& map, uint64_t begin, uint64_t end);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_SHARD_MAP_H_
