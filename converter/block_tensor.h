// A tensor as an assembly of stored blocks, and what the operations of a mapping
// (converter/mapping_rules.h) do to one. No element is read: an operation moves the corners of
// blocks, cuts them, and exchanges their axes, so a fused, transposed or stacked tensor is a list
// of places in the files of its source.
//
// Operations are permutations of elements. What makes one tensor of several (GatherRows) is undone
// by its opposite (ScatterRows) with the same runs; transposing undoes itself.
#ifndef HOLDFAST_CONVERTER_BLOCK_TENSOR_H_
#define HOLDFAST_CONVERTER_BLOCK_TENSOR_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/foreign_index.h"
#include "format/dtype.h"

namespace holdfast::converter {

// Of layers, experts, heads, groups: what one operation may cut a dimension into.
inline constexpr uint64_t kMappingPartsMax = 65'536;

// Blocks in memory at a time: those of the tensors that one rule reads, and of those that it makes.
inline constexpr size_t kMappingBlocksMax = 4'000'000;
// kResourceExhausted.
absl::Status CheckBlockCount(size_t blocks);

struct BlockAxis {
  uint64_t begin = 0;  // in the tensor
  uint64_t size = 0;
  uint64_t stride = 0;  // in stored elements; 0: the same element again and again
};

struct Block {
  std::vector<BlockAxis> axes;  // by dimension of the tensor; none is empty
  // Its extent, the offset of the corner, and the flags. Its piece and its strides do not count.
  ForeignPiece stored;
};

struct BlockTensor {
  Dtype dtype = Dtype::kFloat32;
  std::vector<uint64_t> shape;
  std::vector<Block> blocks;
};

// The blocks of a tensor state of at most kTensorDimsMax dimensions. kResourceExhausted
// (kMappingBlocksMax, kTensorBytesMax), as for all below.
absl::StatusOr<BlockTensor> BlocksOf(const ForeignIndex& index, uint32_t tensor_state);

// Adds a state with these blocks (kPiecesMax in all). Finish has still to be called. The new
// number.
absl::StatusOr<uint32_t> AddBlocks(const BlockTensor& tensor, std::string name, std::string state,
                                   ForeignIndex& index);

// The last two dimensions change places. kInvalidArgument (fewer than two).
absl::StatusOr<BlockTensor> Transposed(BlockTensor tensor);

// Rows (of dimension 0) [whole_row, whole_row + count) of a tensor are rows part_row + i *
// part_step of one of its parts.
struct RowRun {
  size_t part = 0;
  uint64_t part_row = 0;
  uint64_t whole_row = 0;
  uint64_t count = 0;
  uint64_t part_step = 1;
};

// Each part is cut into `chunks` equal chunks; the whole is the first of all parts, the second of
// all parts, and so on. One chunk: the parts behind each other. CHECKs that the rows are multiples.
std::vector<RowRun> InterleaveRuns(std::span<const uint64_t> part_rows, uint64_t chunks);
// Rotary embeddings pair row i of a head with row i + rows / 2 (Hugging Face, Megatron; the whole)
// or with its neighbour (Meta; the part). CHECKs that each head has an even number of rows.
std::vector<RowRun> RotaryRuns(uint64_t rows, uint64_t heads);

// CHECKs that parts and runs fit: same dtype, same dimensions but the first.
absl::StatusOr<BlockTensor> GatherRows(std::span<const BlockTensor> parts,
                                       std::span<const RowRun> runs);
absl::StatusOr<std::vector<BlockTensor>> ScatterRows(const BlockTensor& whole,
                                                     std::span<const RowRun> runs,
                                                     std::span<const uint64_t> part_rows);

// A new dimension 0. Parts have equal dtypes and shapes.
BlockTensor Stacked(std::vector<BlockTensor> parts);
// What it was made of. kInvalidArgument (0-d), kResourceExhausted (kMappingPartsMax).
absl::StatusOr<std::vector<BlockTensor>> Unstacked(const BlockTensor& whole);

// Adds rows up to `rows` (at least those that are there, at least one): copies of the last one, or,
// with an extent that begins with an element's bytes of zeros, zeros.
enum class Padding { kLastRow, kZeros };
absl::StatusOr<BlockTensor> Padded(BlockTensor tensor, uint64_t rows, Padding padding,
                                   uint32_t zeros_extent);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_BLOCK_TENSOR_H_
