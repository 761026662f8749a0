#include "converter/piece_table.h"

#include <algorithm>
#include <tuple>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "converter/rounding.h"

namespace holdfast::converter {
namespace {

std::string Show(const Shape& shape) { return "[" + absl::StrJoin(shape, ", ") + "]"; }

// Pieces [first, last) are of one tensor state and one box, contiguous in their extents. Cuts each
// wherever one of them begins or ends, so that any two are equal or have no element in common.
void CutAtCommonPlaces(const std::vector<ForeignPiece>& pieces, size_t first, size_t last,
                       uint64_t element_bytes, std::vector<ForeignPiece>& out) {
  std::vector<uint64_t> cuts;
  for (size_t i = first; i < last; ++i) {
    cuts.push_back(pieces[i].piece.begin);
    cuts.push_back(pieces[i].piece.end);
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  for (size_t i = first; i < last; ++i) {
    ForeignPiece rest = pieces[i];
    auto cut = std::upper_bound(cuts.begin(), cuts.end(), rest.piece.begin);
    for (; rest.piece.begin < pieces[i].piece.end && out.size() <= kPiecesMax; ++cut) {
      ForeignPiece part = rest;
      part.piece.end = *cut;
      out.push_back(part);
      rest.piece.begin = *cut;
      rest.offset_bytes += part.piece.ElementCount() * element_bytes;
    }
  }
}

}  // namespace

uint64_t StoredTensor::ElementCount() const {
  uint64_t count = 1;
  for (uint64_t size : shape) count *= size;
  return count;
}

absl::StatusOr<uint32_t> PieceTable::State(const std::string& tensor, const std::string& state,
                                           Dtype dtype, const Shape& shape) {
  const auto [found, made] =
      states_.emplace(std::pair(tensor, state), static_cast<uint32_t>(states_.size()));
  if (made) {
    if (states_.size() > kStatesMax) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("expected at most %d tensor states, found more", kStatesMax));
    }
    has_pieces_.push_back(false);
    return index_.AddState({.tensor = tensor, .state = state, .dtype = dtype, .shape = shape});
  }
  const TensorState& there = index_.tensor_states[found->second];
  if (there.dtype != dtype || there.shape != shape) {
    return absl::DataLossError(absl::StrFormat(
        "%s: expected one shape and dtype in all files, found %s of %s and %s of %s",
        Describe(there), Show(there.shape), std::string(DtypeName(there.dtype)), Show(shape),
        std::string(DtypeName(dtype))));
  }
  return found->second;
}

std::optional<uint32_t> PieceTable::Find(const std::string& tensor,
                                         const std::string& state) const {
  const auto found = states_.find(std::pair(tensor, state));
  if (found == states_.end()) return std::nullopt;
  return found->second;
}

bool PieceTable::HasPieces(uint32_t tensor_state) const { return has_pieces_[tensor_state]; }

uint32_t PieceTable::ExtentOf(const StoredTensor& stored) {
  if (stored.file == kInline) {
    const auto [found, made] = inline_extents_.emplace(stored.inline_bytes, 0);
    if (made) found->second = index_.AddInline(stored.inline_bytes);
    return found->second;
  }
  const auto [found, made] =
      extents_.emplace(std::pair(stored.file, stored.storage_offset_bytes), 0);
  if (made) {
    found->second = index_.AddRaw(stored.file, stored.storage_offset_bytes, stored.storage_bytes);
  }
  return found->second;
}

uint32_t PieceTable::BoxOf(const Shape& lo, const Shape& size) {
  const auto [found, made] = boxes_.emplace(std::pair(lo, size), 0);
  if (made) found->second = index_.boxes.Add(lo, size);
  return found->second;
}

absl::Status PieceTable::Add(ForeignPiece piece) {
  has_pieces_[piece.piece.tensor_state] = true;
  if (piece.piece.begin == piece.piece.end) return absl::OkStatus();
  if (index_.pieces.size() >= kPiecesMax) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("expected at most %d pieces of tensors, found more", kPiecesMax));
  }
  index_.pieces.push_back(piece);
  return absl::OkStatus();
}

absl::Status PieceTable::AddWhole(uint32_t tensor_state, const StoredTensor& stored) {
  ASSIGN_OR_RETURN(const ShardMap map, WholeShard(index_.tensor_states[tensor_state].shape));
  return AddShard(tensor_state, map, stored);
}

absl::Status PieceTable::AddShard(uint32_t tensor_state, const ShardMap& shard,
                                  const StoredTensor& stored) {
  const uint64_t count = stored.ElementCount();
  if (stored.contiguous || count <= 1) {
    return AddShardRange(tensor_state, shard, 0, stored, 0, count);
  }
  const TensorState& state = index_.tensor_states[tensor_state];
  if (count != shard.shard_elements || shard.blocks.size() != 1 ||
      shard.blocks[0].size != stored.shape) {
    return absl::UnimplementedError(absl::StrFormat(
        "%s: a strided tensor of shape %s that is no box of the whole tensor of shape %s",
        Describe(state), Show(stored.shape), Show(state.shape)));
  }
  index_.strides.push_back(stored.strides);
  return Add({.piece = {.tensor_state = tensor_state,
                        .box = BoxOf(shard.blocks[0].lo, shard.blocks[0].size),
                        .begin = 0,
                        .end = count},
              .extent = ExtentOf(stored),
              .offset_bytes = stored.offset_bytes - stored.storage_offset_bytes,
              .strides = static_cast<uint32_t>(index_.strides.size() - 1),
              .byte_order = stored.byte_order,
              .conjugate = stored.conjugate,
              .negate = stored.negate});
}

absl::Status PieceTable::AddShardRange(uint32_t tensor_state, const ShardMap& shard, uint64_t begin,
                                       const StoredTensor& stored, uint64_t stored_begin,
                                       uint64_t count) {
  const TensorState& state = index_.tensor_states[tensor_state];
  const uint64_t elements = stored.ElementCount();
  if (!stored.contiguous && elements > 1) {
    return absl::UnimplementedError(
        absl::StrFormat("%s: a flat buffer that is strided", Describe(state)));
  }
  if (stored_begin > elements || count > elements - stored_begin || begin > shard.shard_elements ||
      count > shard.shard_elements - begin || stored.dtype != state.dtype ||
      shard.shape != state.shape) {
    return absl::DataLossError(absl::StrFormat(
        "%s, shape %s, %s: expected %d elements from %d on of a shard of %d elements, found %d "
        "from %d on of a stored tensor of shape %s, %s",
        Describe(state), Show(state.shape), std::string(DtypeName(state.dtype)), count, begin,
        shard.shard_elements, elements, stored_begin, Show(stored.shape),
        std::string(DtypeName(stored.dtype))));
  }
  has_pieces_[tensor_state] = true;
  if (count == 0) return absl::OkStatus();
  const uint32_t extent = ExtentOf(stored);
  const uint64_t element_bytes = ElementBytes(state.dtype);
  const uint64_t first_byte =
      (stored.file == kInline ? 0 : stored.offset_bytes - stored.storage_offset_bytes) +
      stored_begin * element_bytes;
  for (const BlockRange& range : RangesOf(shard, begin, begin + count)) {
    const ShardBlock& block = shard.blocks[range.block];
    Piece piece{
        .tensor_state = tensor_state, .box = kWholeTensor, .begin = range.begin, .end = range.end};
    // Rows of the whole tensor are a range of it: replicas that are cut by rows and by elements
    // then speak of the same thing.
    const auto start = ContiguousStart({.lo = block.lo, .size = block.size}, state.shape);
    if (start.has_value()) {
      piece.begin += *start;
      piece.end += *start;
    } else {
      piece.box = BoxOf(block.lo, block.size);
    }
    RETURN_IF_ERROR(Add({.piece = piece,
                         .extent = extent,
                         .offset_bytes = first_byte + (range.shard_begin - begin) * element_bytes,
                         .strides = kContiguous,
                         .byte_order = stored.byte_order,
                         .conjugate = stored.conjugate,
                         .negate = stored.negate}));
  }
  return absl::OkStatus();
}

absl::Status PieceTable::AddRounded(const std::string& tensor, const std::string& state,
                                    Dtype dtype, uint32_t of) {
  const TensorState& from = index_.tensor_states[of];
  if (!CanRound(from.dtype, dtype)) {
    return absl::UnimplementedError(
        absl::StrFormat("%s: its weights are %s, and there is no rounding to that", Describe(from),
                        std::string(DtypeName(dtype))));
  }
  const Shape shape = from.shape;
  ASSIGN_OR_RETURN(const uint32_t number, State(tensor, state, dtype, shape));
  rounded_.emplace_back(number, of);
  has_pieces_[number] = true;
  return absl::OkStatus();
}

absl::StatusOr<ForeignIndex> PieceTable::Take() {
  std::vector<ForeignPiece>& pieces = index_.pieces;
  if (!rounded_.empty()) {
    std::map<uint32_t, std::vector<size_t>> of_state;
    for (const auto& [number, of] : rounded_) of_state[of];
    for (size_t i = 0; i < pieces.size(); ++i) {
      const auto found = of_state.find(pieces[i].piece.tensor_state);
      if (found != of_state.end()) found->second.push_back(i);
    }
    for (const auto& [number, of] : rounded_) {
      for (size_t i : of_state[of]) {
        ForeignPiece piece = pieces[i];
        piece.piece.tensor_state = number;
        piece.rounded = true;
        RETURN_IF_ERROR(Add(piece));
      }
    }
  }
  std::stable_sort(pieces.begin(), pieces.end(), [](const ForeignPiece& a, const ForeignPiece& b) {
    return std::tuple(a.piece.tensor_state, a.piece.box, a.strides != kContiguous) <
           std::tuple(b.piece.tensor_state, b.piece.box, b.strides != kContiguous);
  });
  std::vector<ForeignPiece> cut;
  for (size_t first = 0; first < pieces.size();) {
    size_t last = first + 1;
    while (last < pieces.size() &&
           pieces[last].piece.tensor_state == pieces[first].piece.tensor_state &&
           pieces[last].piece.box == pieces[first].piece.box &&
           (pieces[last].strides == kContiguous) == (pieces[first].strides == kContiguous)) {
      ++last;
    }
    if (pieces[first].strides != kContiguous) {
      cut.insert(cut.end(), pieces.begin() + static_cast<ptrdiff_t>(first),
                 pieces.begin() + static_cast<ptrdiff_t>(last));
    } else {
      const Dtype dtype = index_.tensor_states[pieces[first].piece.tensor_state].dtype;
      CutAtCommonPlaces(pieces, first, last,
                        ElementBytes(pieces[first].rounded ? Dtype::kFloat32 : dtype), cut);
    }
    if (cut.size() > kPiecesMax) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("expected at most %d pieces of tensors, found more", kPiecesMax));
    }
    first = last;
  }
  pieces = std::move(cut);
  return std::move(index_);
}

}  // namespace holdfast::converter
