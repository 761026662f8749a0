#include "converter/shard_pieces.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"

namespace holdfast::converter {
namespace {

// Boxes that one tensor may be cut into by its strided shards.
constexpr size_t kBoxesMax = 65'536;

uint64_t SizeOf(const std::vector<ShardRun>& runs) {
  uint64_t size = 0;
  for (const ShardRun& run : runs) size += run.size;
  return size;
}

absl::Status CheckTensor(const TorchFile& torch, const TorchTensor& tensor,
                         std::span<const std::vector<ShardRun>> runs, const TensorState& state) {
  if (tensor.dtype != state.dtype) {
    return absl::DataLossError(absl::StrFormat("%s: %s: expected dtype %s, found %s", torch.name(),
                                               Describe(state), DtypeName(state.dtype),
                                               DtypeName(tensor.dtype)));
  }
  std::vector<uint64_t> expected;
  for (const std::vector<ShardRun>& of_dim : runs) expected.push_back(SizeOf(of_dim));
  if (expected == tensor.shape) return absl::OkStatus();
  return absl::DataLossError(absl::StrFormat(
      "%s: %s: expected a part of shape [%s], found [%s]", torch.name(), Describe(state),
      absl::StrJoin(expected, ", "), absl::StrJoin(tensor.shape, ", ")));
}

struct Bytes {
  uint32_t extent = 0;
  uint64_t offset = 0;  // of the tensor's first element, in the decoded extent
};

absl::StatusOr<Bytes> BytesOf(const TorchFile& torch, const TorchTensor& tensor,
                              const TorchPlace& place, const TensorState& state,
                              ForeignIndex& index) {
  const TorchStorage& storage = torch.storages()[tensor.storage];
  if (!storage.written) {
    return absl::DataLossError(
        absl::StrFormat("%s: %s: its bytes were never written", torch.name(), Describe(state)));
  }
  Bytes bytes{.offset = tensor.offset * ElementBytes(tensor.dtype)};
  if (place.extent.has_value()) {
    bytes.extent = *place.extent;
    bytes.offset += storage.offset;
  } else {
    bytes.extent = index.AddRaw(place.file, place.begin_bytes + storage.offset, storage.bytes);
  }
  return bytes;
}

void AddPiece(const TorchFile& torch, const TorchTensor& tensor, ForeignPiece piece,
              ForeignIndex& index) {
  piece.byte_order = torch.big_endian() ? ByteOrder::kBig : ByteOrder::kLittle;
  piece.conjugate = tensor.conj;
  piece.negate = tensor.neg;
  index.pieces.push_back(piece);
}

// Whether these strides of a box of these sizes say that its elements lie one behind the other.
bool IsRowMajor(std::span<const uint64_t> sizes, std::span<const uint64_t> strides) {
  uint64_t expected = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

}  // namespace

std::vector<std::vector<ShardRun>> RunsOfBox(std::span<const uint64_t> offsets,
                                             std::span<const uint64_t> sizes) {
  std::vector<std::vector<ShardRun>> runs(offsets.size());
  for (size_t d = 0; d < offsets.size(); ++d) {
    if (sizes[d] > 0) runs[d].push_back({offsets[d], sizes[d]});
  }
  return runs;
}

absl::Status AddShard(const TorchFile& torch, const TorchTensor& tensor, const TorchPlace& place,
                      std::span<const std::vector<ShardRun>> runs, uint32_t tensor_state,
                      ForeignIndex& index) {
  const TensorState& state = index.tensor_states[tensor_state];
  RETURN_IF_ERROR(CheckTensor(torch, tensor, runs, state));
  const size_t dims = runs.size();
  if (dims > kTensorDimsMax && tensor.shape != state.shape) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("%s: %s: expected at most %d dimensions of a part, found %d", torch.name(),
                        Describe(state), kTensorDimsMax, dims));
  }
  size_t boxes = 1;
  for (const std::vector<ShardRun>& of_dim : runs) {
    boxes *= of_dim.size();
    if (boxes == 0) return absl::OkStatus();
    if (boxes > kBoxesMax) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("%s: %s: expected at most %d boxes, found more", torch.name(),
                          Describe(state), kBoxesMax));
    }
  }
  ASSIGN_OR_RETURN(const Bytes bytes, BytesOf(torch, tensor, place, state, index));
  std::vector<uint64_t> lo(dims);
  std::vector<uint64_t> size(dims);
  std::vector<size_t> run(dims);
  for (size_t box = 0; box < boxes; ++box) {
    // Box number `box` in the row-major order of the runs; where it begins in the local tensor.
    size_t rest = box;
    uint64_t local = 0;
    uint64_t count = 1;
    for (size_t d = dims; d-- > 0;) {
      run[d] = rest % runs[d].size();
      rest /= runs[d].size();
      lo[d] = runs[d][run[d]].begin;
      size[d] = runs[d][run[d]].size;
      count *= size[d];
      for (size_t before = 0; before < run[d]; ++before) {
        local += runs[d][before].size * tensor.strides[d];
      }
    }
    ForeignPiece piece;
    piece.piece = {.tensor_state = tensor_state, .begin = 0, .end = count};
    if (size != index.tensor_states[tensor_state].shape)
      piece.piece.box = index.boxes.Add(lo, size);
    piece.extent = bytes.extent;
    piece.offset_bytes = bytes.offset + local * ElementBytes(tensor.dtype);
    if (IsRowMajor(size, tensor.strides)) {
      piece.piece = AsRange(piece.piece, index.tensor_states[tensor_state], index.boxes);
    } else {
      if (index.strides.empty() || index.strides.back() != tensor.strides) {
        index.strides.push_back(tensor.strides);
      }
      piece.strides = static_cast<uint32_t>(index.strides.size() - 1);
    }
    AddPiece(torch, tensor, piece, index);
  }
  return absl::OkStatus();
}

absl::Status AddFlatRange(const TorchFile& torch, const TorchTensor& tensor,
                          const TorchPlace& place, uint64_t from, uint32_t tensor_state,
                          uint64_t begin, uint64_t count, ForeignIndex& index) {
  ASSIGN_OR_RETURN(const Bytes bytes,
                   BytesOf(torch, tensor, place, index.tensor_states[tensor_state], index));
  ForeignPiece piece;
  piece.piece = {.tensor_state = tensor_state, .begin = begin, .end = begin + count};
  piece.extent = bytes.extent;
  piece.offset_bytes = bytes.offset + from * ElementBytes(tensor.dtype);
  AddPiece(torch, tensor, piece, index);
  return absl::OkStatus();
}

absl::Status CheckShape(std::string_view where, const TensorState& state) {
  if (std::ranges::find(state.shape, 0) != state.shape.end()) return absl::OkStatus();
  uint64_t bytes = ElementBytes(state.dtype);
  for (const uint64_t size : state.shape) {
    if (__builtin_mul_overflow(bytes, size, &bytes) || bytes > kTensorBytesMax) {
      return absl::DataLossError(absl::StrFormat("%s: %s: expected at most %d bytes, found [%s]",
                                                 where, Describe(state), kTensorBytesMax,
                                                 absl::StrJoin(state.shape, ", ")));
    }
  }
  return absl::OkStatus();
}

absl::Status AddWholeShard(const TorchFile& torch, const TorchTensor& tensor,
                           const TorchPlace& place, uint32_t tensor_state, ForeignIndex& index) {
  const std::vector<uint64_t> zeros(tensor.shape.size());
  return AddShard(torch, tensor, place, RunsOfBox(zeros, tensor.shape), tensor_state, index);
}

}  // namespace holdfast::converter
