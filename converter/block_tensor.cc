#include "converter/block_tensor.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "format/planner_geometry.h"

namespace holdfast::converter {
namespace {

// That its bytes can be counted: padding and views that repeat an element cost none.
absl::Status CheckSize(const BlockTensor& tensor) {
  if (tensor.shape.size() > kTensorDimsMax) {
    return absl::InvalidArgumentError(absl::StrFormat("expected at most %d dimensions, found %d",
                                                      kTensorDimsMax, tensor.shape.size()));
  }
  uint64_t elements = 1;
  for (const uint64_t size : tensor.shape) {
    if (size == 0) return absl::OkStatus();
    if (size > kTensorBytesMax / ElementBytes(tensor.dtype) / elements) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("expected a tensor of at most %d bytes, found more", kTensorBytesMax));
    }
    elements *= size;
  }
  return absl::OkStatus();
}

uint64_t StoredBytes(const Block& block, Dtype dtype) {
  return ElementBytes(block.stored.rounded ? Dtype::kFloat32 : dtype);
}

// The rows of a block that are `first`, `first` + `step`, ... (`count` of them), as rows of another
// tensor from `to` on.
Block RowsOf(const Block& block, Dtype dtype, uint64_t first, uint64_t step, uint64_t count,
             uint64_t to) {
  Block rows = block;
  BlockAxis& axis = rows.axes[0];
  rows.stored.offset_bytes += (first - axis.begin) * axis.stride * StoredBytes(block, dtype);
  axis = {to, count, axis.stride * step};
  return rows;
}

bool IsRowMajor(const Block& block) {
  uint64_t expected = 1;
  for (size_t d = block.axes.size(); d-- > 0;) {
    if (block.axes[d].size != 1 && block.axes[d].stride != expected) return false;
    expected *= block.axes[d].size;
  }
  return true;
}

}  // namespace

absl::Status CheckBlockCount(size_t blocks) {
  if (blocks <= kMappingBlocksMax) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrFormat(
      "expected a mapping that cuts tensors into at most %d blocks at a time, found more",
      kMappingBlocksMax));
}

absl::StatusOr<BlockTensor> BlocksOf(const ForeignIndex& index, uint32_t tensor_state) {
  const TensorState& state = index.tensor_states[tensor_state];
  CHECK(state.shape.size() <= kTensorDimsMax);
  BlockTensor tensor{.dtype = state.dtype, .shape = state.shape, .blocks = {}};
  const std::vector<uint64_t> zeros(state.shape.size());
  const auto [first, last] = index.PiecesOf(tensor_state);
  std::vector<ElementBox> parts;
  for (size_t i = first; i < last; ++i) {
    const ForeignPiece& piece = index.pieces[i];
    if (piece.piece.ElementCount() == 0) continue;
    const BoxView box = piece.piece.box == kWholeTensor ? BoxView{zeros, state.shape}
                                                        : index.boxes[piece.piece.box];
    if (piece.strides != kContiguous) {
      Block block{.axes = {}, .stored = piece};
      for (size_t d = 0; d < box.lo.size(); ++d) {
        block.axes.push_back({box.lo[d], box.size[d], index.strides[piece.strides][d]});
      }
      tensor.blocks.push_back(std::move(block));
      continue;
    }
    const uint64_t stored_bytes = ElementBytes(StoredDtype(piece, state));
    const Affine place = RowMajor(box, piece.piece.begin, piece.offset_bytes, stored_bytes);
    parts.clear();
    CutIntoBoxes(box, piece.piece.begin, piece.piece.end, parts);
    for (const ElementBox& part : parts) {
      Block block{.axes = {}, .stored = piece};
      block.stored.offset_bytes = place.At({part.lo.data(), part.dims});
      for (size_t d = 0; d < part.dims; ++d) {
        block.axes.push_back({part.lo[d], part.size[d], place.strides[d] / stored_bytes});
      }
      tensor.blocks.push_back(std::move(block));
    }
    RETURN_IF_ERROR(CheckBlockCount(tensor.blocks.size()));
  }
  return tensor;
}

absl::StatusOr<uint32_t> AddBlocks(const BlockTensor& tensor, std::string name, std::string state,
                                   ForeignIndex& index) {
  if (index.pieces.size() + tensor.blocks.size() > kPiecesMax) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("expected at most %d pieces of all tensors, found more", kPiecesMax));
  }
  RETURN_IF_ERROR(CheckSize(tensor));
  const uint32_t number =
      index.AddState({std::move(name), std::move(state), tensor.dtype, tensor.shape});
  std::vector<uint64_t> lo;
  std::vector<uint64_t> size;
  std::vector<uint64_t> strides;
  for (const Block& block : tensor.blocks) {
    lo.clear();
    size.clear();
    strides.clear();
    uint64_t count = 1;
    for (const BlockAxis& axis : block.axes) {
      lo.push_back(axis.begin);
      size.push_back(axis.size);
      strides.push_back(axis.stride);
      count *= axis.size;
    }
    ForeignPiece piece = block.stored;
    piece.piece = {.tensor_state = number, .begin = 0, .end = count};
    piece.strides = kContiguous;
    if (size != tensor.shape) piece.piece.box = index.boxes.Add(lo, size);
    if (IsRowMajor(block)) {
      piece.piece = AsRange(piece.piece, index.tensor_states[number], index.boxes);
    } else {
      if (index.strides.empty() || index.strides.back() != strides) {
        index.strides.push_back(strides);
      }
      piece.strides = static_cast<uint32_t>(index.strides.size() - 1);
    }
    index.pieces.push_back(piece);
  }
  return number;
}

absl::StatusOr<BlockTensor> Transposed(BlockTensor tensor) {
  const size_t dims = tensor.shape.size();
  if (dims < 2) {
    return absl::InvalidArgumentError(
        absl::StrFormat("transpose: expected 2 dimensions or more, found %d", dims));
  }
  std::swap(tensor.shape[dims - 2], tensor.shape[dims - 1]);
  for (Block& block : tensor.blocks) std::swap(block.axes[dims - 2], block.axes[dims - 1]);
  return tensor;
}

std::vector<RowRun> InterleaveRuns(std::span<const uint64_t> part_rows, uint64_t chunks) {
  std::vector<RowRun> runs;
  uint64_t row = 0;
  for (uint64_t chunk = 0; chunk < chunks; ++chunk) {
    for (size_t part = 0; part < part_rows.size(); ++part) {
      CHECK(part_rows[part] % chunks == 0);
      const uint64_t count = part_rows[part] / chunks;
      runs.push_back({.part = part, .part_row = chunk * count, .whole_row = row, .count = count});
      row += count;
    }
  }
  return runs;
}

std::vector<RowRun> RotaryRuns(uint64_t rows, uint64_t heads) {
  CHECK(heads > 0 && rows % (2 * heads) == 0);
  const uint64_t half = rows / heads / 2;
  std::vector<RowRun> runs;
  for (uint64_t head = 0; head < heads; ++head) {
    for (uint64_t side = 0; side < 2; ++side) {
      runs.push_back({.part = 0,
                      .part_row = head * 2 * half + side,
                      .whole_row = (head * 2 + side) * half,
                      .count = half,
                      .part_step = 2});
    }
  }
  return runs;
}

absl::StatusOr<BlockTensor> GatherRows(std::span<const BlockTensor> parts,
                                       std::span<const RowRun> runs) {
  BlockTensor whole{.dtype = parts[0].dtype, .shape = parts[0].shape, .blocks = {}};
  whole.shape[0] = 0;
  std::vector<std::vector<RowRun>> of_part(parts.size());
  for (const RowRun& run : runs) {
    if (run.count > kTensorBytesMax - whole.shape[0]) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("expected at most %d rows, found more", kTensorBytesMax));
    }
    whole.shape[0] += run.count;
    if (run.count > 0) of_part[run.part].push_back(run);
  }
  for (size_t part = 0; part < parts.size(); ++part) {
    CHECK(parts[part].dtype == whole.dtype && parts[part].shape.size() == whole.shape.size());
    // Runs of one part begin and end in the same order: rows of two of them may alternate.
    std::vector<RowRun>& sorted = of_part[part];
    std::sort(sorted.begin(), sorted.end(),
              [](const RowRun& a, const RowRun& b) { return a.part_row < b.part_row; });
    const auto last_row = [](const RowRun& run) {
      return run.part_row + (run.count - 1) * run.part_step;
    };
    for (const Block& block : parts[part].blocks) {
      const uint64_t begin = block.axes[0].begin;
      const uint64_t end = begin + block.axes[0].size;
      auto run = std::partition_point(sorted.begin(), sorted.end(),
                                      [&](const RowRun& r) { return last_row(r) < begin; });
      for (; run != sorted.end() && run->part_row < end; ++run) {
        const uint64_t step = run->part_step;
        const uint64_t from = begin > run->part_row ? (begin - run->part_row + step - 1) / step : 0;
        const uint64_t to = std::min(run->count, (end - 1 - run->part_row) / step + 1);
        if (from >= to) continue;
        whole.blocks.push_back(RowsOf(block, whole.dtype, run->part_row + from * step, step,
                                      to - from, run->whole_row + from));
      }
      RETURN_IF_ERROR(CheckBlockCount(whole.blocks.size()));
    }
  }
  return whole;
}

absl::StatusOr<std::vector<BlockTensor>> ScatterRows(const BlockTensor& whole,
                                                     std::span<const RowRun> runs,
                                                     std::span<const uint64_t> part_rows) {
  std::vector<BlockTensor> parts(part_rows.size(),
                                 {.dtype = whole.dtype, .shape = whole.shape, .blocks = {}});
  for (size_t part = 0; part < parts.size(); ++part) parts[part].shape[0] = part_rows[part];
  std::vector<RowRun> sorted(runs.begin(), runs.end());
  std::erase_if(sorted, [](const RowRun& run) { return run.count == 0; });
  std::sort(sorted.begin(), sorted.end(),
            [](const RowRun& a, const RowRun& b) { return a.whole_row < b.whole_row; });
  size_t count = 0;
  for (const Block& block : whole.blocks) {
    const uint64_t begin = block.axes[0].begin;
    const uint64_t end = begin + block.axes[0].size;
    auto run = std::partition_point(sorted.begin(), sorted.end(), [&](const RowRun& r) {
      return r.whole_row + r.count <= begin;
    });
    for (; run != sorted.end() && run->whole_row < end; ++run) {
      const uint64_t from = std::max(begin, run->whole_row);
      const uint64_t to = std::min(end, run->whole_row + run->count);
      // What goes to every other row is no box: a block for each row then.
      const uint64_t rows = run->part_step == 1 ? to - from : 1;
      for (uint64_t row = from; row < to; row += rows) {
        const uint64_t part_row = run->part_row + (row - run->whole_row) * run->part_step;
        parts[run->part].blocks.push_back(RowsOf(block, whole.dtype, row, 1, rows, part_row));
        RETURN_IF_ERROR(CheckBlockCount(++count));
      }
    }
  }
  return parts;
}

BlockTensor Stacked(std::vector<BlockTensor> parts) {
  BlockTensor whole{.dtype = parts[0].dtype, .shape = parts[0].shape, .blocks = {}};
  whole.shape.insert(whole.shape.begin(), parts.size());
  for (uint64_t i = 0; i < parts.size(); ++i) {
    for (Block& block : parts[i].blocks) {
      block.axes.insert(block.axes.begin(), {.begin = i, .size = 1, .stride = 0});
      whole.blocks.push_back(std::move(block));
    }
  }
  return whole;
}

absl::StatusOr<std::vector<BlockTensor>> Unstacked(const BlockTensor& whole) {
  if (whole.shape.empty()) {
    return absl::InvalidArgumentError("stack: expected 1 dimension or more, found none");
  }
  if (whole.shape[0] > kMappingPartsMax) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("stack: expected at most %d, found %d", kMappingPartsMax, whole.shape[0]));
  }
  BlockTensor empty{.dtype = whole.dtype, .shape = whole.shape, .blocks = {}};
  empty.shape.erase(empty.shape.begin());
  std::vector<BlockTensor> parts(whole.shape[0], empty);
  size_t count = 0;
  for (const Block& block : whole.blocks) {
    const BlockAxis& axis = block.axes[0];
    for (uint64_t i = axis.begin; i < axis.begin + axis.size; ++i) {
      Block part = RowsOf(block, whole.dtype, i, 1, 1, 0);
      part.axes.erase(part.axes.begin());
      parts[i].blocks.push_back(std::move(part));
      RETURN_IF_ERROR(CheckBlockCount(++count));
    }
  }
  return parts;
}

absl::StatusOr<BlockTensor> Padded(BlockTensor tensor, uint64_t rows, Padding padding,
                                   uint32_t zeros_extent) {
  CHECK(!tensor.shape.empty() && tensor.shape[0] > 0 && tensor.shape[0] <= rows);
  const uint64_t there = tensor.shape[0];
  tensor.shape[0] = rows;
  if (rows == there) return tensor;
  if (padding == Padding::kZeros) {
    Block zeros{.axes = {{.begin = there, .size = rows - there, .stride = 0}}, .stored = {}};
    for (size_t d = 1; d < tensor.shape.size(); ++d) {
      if (tensor.shape[d] == 0) return tensor;
      zeros.axes.push_back({.begin = 0, .size = tensor.shape[d], .stride = 0});
    }
    zeros.stored.extent = zeros_extent;
    tensor.blocks.push_back(std::move(zeros));
    return tensor;
  }
  const size_t count = tensor.blocks.size();
  for (size_t i = 0; i < count; ++i) {
    const BlockAxis& axis = tensor.blocks[i].axes[0];
    if (axis.begin + axis.size != there) continue;
    tensor.blocks.push_back(
        RowsOf(tensor.blocks[i], tensor.dtype, there - 1, 0, rows - there, there));
  }
  RETURN_IF_ERROR(CheckBlockCount(tensor.blocks.size()));
  return tensor;
}

}  // namespace holdfast::converter
