#include "converter/shard_map.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace holdfast::converter {
namespace {

std::string Show(std::span<const uint64_t> sizes) {
  return "[" + absl::StrJoin(sizes.begin(), sizes.end(), ", ") + "]";
}

Shape RowMajorStrides(const Shape& shape) {
  Shape strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * shape[d];
  return strides;
}

// The last element that a strided piece touches, or kInvalidArgument if that is not below `limit`.
// The piece is not empty.
absl::Status CheckReach(const std::string& side, std::span<const uint64_t> shape, uint64_t offset,
                        std::span<const uint64_t> strides, uint64_t limit) {
  uint64_t last = offset;
  for (size_t d = 0; d < shape.size() && last < limit; ++d) {
    const uint64_t steps = shape[d] - 1;
    if (steps != 0 && strides[d] > (limit - 1 - last) / steps) {
      last = limit;
    } else {
      last += steps * strides[d];
    }
  }
  if (last < limit) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrFormat("affine piece of shape %s, %s offset %d, strides %s: expected it inside of "
                      "%d elements",
                      Show(shape), side, offset, Show(strides), limit));
}

// Dimensions [first, end) of an affine piece as a box of the whole tensor, if they are one that has
// its elements in row-major order there. The corner is added by the caller.
class BoxOfPiece {
 public:
  // strides: row-major, of the whole tensor.
  BoxOfPiece(const Shape& logical_shape, const Shape& strides)
      : shape_(logical_shape), strides_(strides), size_(logical_shape.size(), 1) {}

  // Adds the next dimension outwards. False if it does not fit; then nothing is changed.
  bool Add(uint64_t size, uint64_t stride) {
    if (size == 1) return true;
    for (size_t d = next_; d-- > 0;) {
      if (strides_[d] != stride || shape_[d] == 1) continue;
      if (size > shape_[d]) return false;
      size_[d] = size;
      next_ = d;
      return true;
    }
    return false;
  }
  // Whether the box fits into the tensor with its corner at `element`; fills lo.
  bool Place(uint64_t element, Shape& lo) const {
    lo.assign(shape_.size(), 0);
    for (size_t d = 0; d < shape_.size(); ++d) {
      lo[d] = element / strides_[d];
      element %= strides_[d];
      if (lo[d] + size_[d] > shape_[d]) return false;
    }
    return true;
  }
  const Shape& size() const { return size_; }

 private:
  const Shape& shape_;
  const Shape& strides_;
  Shape size_;
  size_t next_ = shape_.size();  // dimensions below are free
};

absl::Status TooManyBlocks(const Shape& shape) {
  return absl::ResourceExhaustedError(
      absl::StrFormat("a shard of a tensor of shape %s: expected at most %d contiguous blocks",
                      Show(shape), kShardBlocksMax));
}

// The same piece with a dimension that runs over several whole rows of the tensor (writers may fold
// them) as one dimension per dimension of the tensor, so that it is a box.
AffinePiece Unfolded(AffinePiece piece, const Shape& logical_shape, const Shape& strides) {
  for (size_t p = 0; p < piece.shape.size() && piece.shape.size() < 2 * kTensorDimsMax;) {
    const size_t dims = piece.shape.size();
    for (size_t d = 1; d < logical_shape.size(); ++d) {
      const uint64_t row = logical_shape[d];
      if (row < 2 || strides[d] != piece.source_strides[p] || piece.shape[p] <= row ||
          piece.shape[p] % row != 0 || piece.source_offset / strides[d] % row != 0) {
        continue;
      }
      const auto split = [p](Shape& values, uint64_t outer, uint64_t inner) {
        values[p] = inner;
        values.insert(values.begin() + static_cast<ptrdiff_t>(p), outer);
      };
      split(piece.source_strides, piece.source_strides[p] * row, piece.source_strides[p]);
      split(piece.dest_strides, piece.dest_strides[p] * row, piece.dest_strides[p]);
      split(piece.shape, piece.shape[p] / row, row);
      break;  // the outer part is looked at again: it may run over several planes
    }
    if (piece.shape.size() == dims) ++p;
  }
  return piece;
}

// Appends the blocks of one piece. It is not empty, and inside of tensor and shard.
absl::Status AppendAffine(const AffinePiece& folded, const Shape& strides, ShardMap& map) {
  const AffinePiece piece = Unfolded(folded, map.shape, strides);
  const size_t dims = piece.shape.size();
  // Invariant: dimensions [inner, dims) are one contiguous range of the shard, and a box.
  const auto contiguous = [&piece](size_t d, uint64_t below) {
    return piece.shape[d] == 1 || piece.dest_strides[d] == below;
  };
  const size_t blocks_before = map.blocks.size();
  // Appends the blocks with dimensions [inner, dims) in each; false if one of them is no box.
  const auto append = [&](size_t inner, const BoxOfPiece& box) {
    Shape at(inner, 0);
    const uint64_t count = Product(std::span<const uint64_t>(piece.shape.data(), inner));
    for (uint64_t n = 0; n < count; ++n) {
      uint64_t source = piece.source_offset;
      ShardBlock block;
      block.shard_begin = piece.dest_offset;
      for (size_t d = 0; d < inner; ++d) {
        source += at[d] * piece.source_strides[d];
        block.shard_begin += at[d] * piece.dest_strides[d];
      }
      block.size = box.size();
      if (!box.Place(source, block.lo)) return false;
      map.blocks.push_back(std::move(block));
      for (size_t d = inner; d-- > 0;) {
        if (++at[d] < piece.shape[d]) break;
        at[d] = 0;
      }
    }
    return true;
  };
  const auto fits = [&](size_t inner) {
    constexpr uint64_t kTooMany = kShardBlocksMax + 1;
    uint64_t count = 1;
    for (size_t d = 0; d < inner; ++d) {
      count = std::min(count * std::min(piece.shape[d], kTooMany), kTooMany);
    }
    return count + blocks_before <= kShardBlocksMax;
  };
  BoxOfPiece box(map.shape, strides);
  size_t inner = dims;
  uint64_t inner_elements = 1;
  while (inner > 0 && contiguous(inner - 1, inner_elements) &&
         box.Add(piece.shape[inner - 1], piece.source_strides[inner - 1])) {
    --inner;
    inner_elements *= piece.shape[inner];
  }
  if (!fits(inner)) return TooManyBlocks(map.shape);
  if (append(inner, box)) return absl::OkStatus();
  // A run that goes around the end of a row is no box: element by element it is.
  map.blocks.resize(blocks_before);
  if (!fits(dims)) return TooManyBlocks(map.shape);
  CHECK(append(dims, BoxOfPiece(map.shape, strides)));
  return absl::OkStatus();
}

}  // namespace

uint64_t Product(std::span<const uint64_t> sizes) {
  uint64_t product = 1;
  for (uint64_t size : sizes) product *= size;  // of a shape that ElementCount has accepted
  return product;
}

absl::StatusOr<uint64_t> ElementCount(std::span<const uint64_t> shape, const std::string& what) {
  if (shape.size() > kTensorDimsMax) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "%s: expected at most %d dimensions, found %d", what, kTensorDimsMax, shape.size()));
  }
  if (std::find(shape.begin(), shape.end(), uint64_t{0}) != shape.end()) return 0;
  constexpr uint64_t kElementsMax = kTensorBytesMax / 8;
  uint64_t count = 1;
  for (uint64_t size : shape) {
    if (count > kElementsMax / size) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "%s: expected at most %d elements, found shape %s", what, kElementsMax, Show(shape)));
    }
    count *= size;
  }
  return count;
}

uint64_t ShardBlock::ElementCount() const { return Product(size); }

absl::StatusOr<ShardMap> WholeShard(const Shape& shape) {
  ASSIGN_OR_RETURN(const uint64_t count, ElementCount(shape, "tensor"));
  ShardMap map{.shape = shape, .shard_elements = count, .blocks = {}};
  if (count > 0) {
    map.blocks.push_back({.shard_begin = 0, .lo = Shape(shape.size(), 0), .size = shape});
  }
  return map;
}

absl::StatusOr<ShardMap> JoinedShard(std::span<const Shape> shard_shapes, size_t rank,
                                     size_t dimension) {
  CHECK(rank < shard_shapes.size());
  ShardMap map{.shape = shard_shapes[rank], .shard_elements = 0, .blocks = {}};
  if (dimension >= map.shape.size()) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "shards joined along dimension %d: found shape %s", dimension, Show(shard_shapes[rank])));
  }
  uint64_t joined = 0;
  uint64_t before = 0;
  for (size_t r = 0; r < shard_shapes.size(); ++r) {
    Shape shape = shard_shapes[r];
    ASSIGN_OR_RETURN(const uint64_t count, ElementCount(shape, "shard"));
    if (r == rank) {
      before = joined;
      map.shard_elements = count;
    }
    if (shape.size() == map.shape.size()) {
      joined += shape[dimension];
      shape[dimension] = shard_shapes[rank][dimension];
    }
    if (shape != shard_shapes[rank]) {
      return absl::InvalidArgumentError(
          absl::StrFormat("shards joined along dimension %d: expected shapes that are equal "
                          "elsewhere, found %s and %s",
                          dimension, Show(shard_shapes[rank]), Show(shard_shapes[r])));
    }
  }
  map.shape[dimension] = joined;
  RETURN_IF_ERROR(ElementCount(map.shape, "joined tensor").status());
  if (map.shard_elements > 0) {
    ShardBlock block{
        .shard_begin = 0, .lo = Shape(map.shape.size(), 0), .size = shard_shapes[rank]};
    block.lo[dimension] = before;
    map.blocks.push_back(std::move(block));
  }
  return map;
}

absl::StatusOr<ShardMap> SubTensorShard(const Shape& logical_shape, size_t dimension,
                                        const std::vector<Shape>& widths, size_t rank) {
  ASSIGN_OR_RETURN(const uint64_t count, ElementCount(logical_shape, "tensor"));
  if (dimension >= logical_shape.size()) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "sub-tensors along dimension %d: found shape %s", dimension, Show(logical_shape)));
  }
  uint64_t mine = 0;  // this rank's width, all sub-tensors together
  uint64_t all = 0;
  for (const Shape& of_ranks : widths) {
    if (rank >= of_ranks.size()) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "sub-tensors: expected a width for rank %d, found %d widths", rank, of_ranks.size()));
    }
    mine += of_ranks[rank];
    for (uint64_t width : of_ranks) {
      if (width > logical_shape[dimension]) all = UINT64_MAX / 2;
      all += std::min(width, logical_shape[dimension]);
      all = std::min(all, UINT64_MAX / 2);
    }
  }
  if (all != logical_shape[dimension]) {
    return absl::InvalidArgumentError(
        absl::StrFormat("sub-tensors along dimension %d of shape %s: expected widths that sum to "
                        "its size, found %d",
                        dimension, Show(logical_shape), all));
  }
  const std::span<const uint64_t> sizes(logical_shape);
  const uint64_t rows = Product(sizes.subspan(0, dimension));
  const uint64_t inner = Product(sizes.subspan(dimension + 1));
  ShardMap map{.shape = logical_shape, .shard_elements = 0, .blocks = {}};
  if (count == 0) return map;
  map.shard_elements = rows * mine * inner;
  if (rows > kShardBlocksMax / std::max<size_t>(widths.size(), 1)) {
    return TooManyBlocks(logical_shape);
  }
  uint64_t shard = 0;
  Shape row(dimension, 0);
  for (uint64_t n = 0; n < rows; ++n) {
    uint64_t sub_begin = 0;
    for (const Shape& of_ranks : widths) {
      ShardBlock block{.shard_begin = shard, .lo = row, .size = Shape(dimension, 1)};
      uint64_t before = sub_begin;
      for (size_t r = 0; r < rank; ++r) before += of_ranks[r];
      for (uint64_t width : of_ranks) sub_begin += width;
      block.lo.resize(logical_shape.size(), 0);
      block.lo[dimension] = before;
      block.size.insert(block.size.end(), logical_shape.begin() + dimension, logical_shape.end());
      block.size[dimension] = of_ranks[rank];
      if (of_ranks[rank] == 0) continue;
      shard += of_ranks[rank] * inner;
      map.blocks.push_back(std::move(block));
    }
    for (size_t d = dimension; d-- > 0;) {
      if (++row[d] < logical_shape[d]) break;
      row[d] = 0;
    }
  }
  return map;
}

absl::StatusOr<ShardMap> AffineShard(const Shape& logical_shape, const Shape& shard_shape,
                                     std::span<const AffinePiece> pieces) {
  ASSIGN_OR_RETURN(const uint64_t logical_count, ElementCount(logical_shape, "logical shape"));
  ASSIGN_OR_RETURN(const uint64_t shard_count, ElementCount(shard_shape, "shard shape"));
  ShardMap map{.shape = logical_shape, .shard_elements = shard_count, .blocks = {}};
  const Shape strides = RowMajorStrides(logical_shape);
  for (const AffinePiece& piece : pieces) {
    ASSIGN_OR_RETURN(const uint64_t count, ElementCount(piece.shape, "affine piece"));
    if (piece.source_strides.size() != piece.shape.size() ||
        piece.dest_strides.size() != piece.shape.size()) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "affine piece of shape %s: expected as many strides, found source %s, dest %s",
          Show(piece.shape), Show(piece.source_strides), Show(piece.dest_strides)));
    }
    if (count == 0) continue;
    RETURN_IF_ERROR(CheckReach("source", piece.shape, piece.source_offset, piece.source_strides,
                               logical_count));
    RETURN_IF_ERROR(
        CheckReach("dest", piece.shape, piece.dest_offset, piece.dest_strides, shard_count));
    RETURN_IF_ERROR(AppendAffine(piece, strides, map));
  }
  std::sort(map.blocks.begin(), map.blocks.end(),
            [](const ShardBlock& a, const ShardBlock& b) { return a.shard_begin < b.shard_begin; });
  uint64_t end = 0;
  for (const ShardBlock& block : map.blocks) {
    if (block.shard_begin < end) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "affine map of a shard of shape %s: expected each element once, found element %d twice",
          Show(shard_shape), block.shard_begin));
    }
    end = block.shard_begin + block.ElementCount();
  }
  return map;
}

absl::Status KeepRows(uint64_t rows, ShardMap& map) {
  if (map.shape.empty() || map.shape[0] < rows) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "a tensor of %d rows without its padding: found shape %s", rows, Show(map.shape)));
  }
  map.shape[0] = rows;
  // Rows are dimension 0, so what a block loses is its end: the rest stays one range.
  for (ShardBlock& block : map.blocks) {
    const uint64_t kept = block.lo[0] < rows ? rows - block.lo[0] : 0;
    block.size[0] = std::min(block.size[0], kept);
  }
  std::erase_if(map.blocks, [](const ShardBlock& block) { return block.size[0] == 0; });
  return absl::OkStatus();
}

std::vector<BlockRange> RangesOf(const ShardMap& map, uint64_t begin, uint64_t end) {
  CHECK(begin <= end && end <= map.shard_elements);
  std::vector<BlockRange> ranges;
  auto first = std::upper_bound(
      map.blocks.begin(), map.blocks.end(), begin,
      [](uint64_t element, const ShardBlock& block) { return element < block.shard_begin; });
  if (first != map.blocks.begin()) --first;  // the one that may hold `begin`
  for (auto block = first; block != map.blocks.end() && block->shard_begin < end; ++block) {
    const uint64_t lo = std::max(begin, block->shard_begin);
    const uint64_t hi = std::min(end, block->shard_begin + block->ElementCount());
    if (lo >= hi) continue;
    ranges.push_back({.block = static_cast<size_t>(block - map.blocks.begin()),
                      .begin = lo - block->shard_begin,
                      .end = hi - block->shard_begin,
                      .shard_begin = lo});
  }
  return ranges;
}

}  // namespace holdfast::converter
