// Which piece has which element is the planner's to say (format/planner_source.h). Here elements of
// one box of one piece are brought to their places: dimensions are taken in the order of their
// strides in the source, as many as fit into one read of kSpanBytes, and the rest is a loop of such
// reads. So a transposed tensor is read in runs as long as the window is high, and a row of a
// matrix in one piece.
#include "converter/whole_tensor_reader.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "converter/rounding.h"

namespace holdfast::converter {
namespace {

constexpr uint64_t kSpanBytes = uint64_t{1} << 20;
constexpr uint64_t kGapBytes = 4096;

// Bytes of one number: complex elements are two.
size_t NumberBytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::kComplex32:
    case Dtype::kComplex64:
    case Dtype::kComplex128:
      return ElementBytes(dtype) / 2;
    default:
      return ElementBytes(dtype);
  }
}

void FlipSigns(std::span<std::byte> bytes, size_t first, size_t step, size_t number_bytes) {
  for (size_t at = first; at < bytes.size(); at += step) {
    bytes[at + number_bytes - 1] ^= std::byte{0x80};
  }
}

ElementBox WholeBox(std::span<const uint64_t> shape) {
  ElementBox box;
  box.dims = shape.size();
  std::fill_n(box.lo.begin(), shape.size(), 0);
  std::copy(shape.begin(), shape.end(), box.size.begin());
  return box;
}

BoxView BoxOf(const ForeignPiece& piece, const ForeignIndex& index, const ElementBox& whole) {
  return piece.piece.box == kWholeTensor ? whole.View() : index.boxes[piece.piece.box];
}

// Where the elements of the tensor lie in the extent, for those that the piece has.
Affine SourceOf(const ForeignPiece& piece, const ForeignIndex& index, const ElementBox& whole,
                uint64_t element_bytes) {
  const BoxView box = BoxOf(piece, index, whole);
  if (piece.strides == kContiguous) {
    return RowMajor(box, piece.piece.begin, piece.offset_bytes, element_bytes);
  }
  Affine affine;
  affine.offset = piece.offset_bytes;
  for (size_t d = 0; d < box.lo.size(); ++d) {
    affine.strides[d] = index.strides[piece.strides][d] * element_bytes;
    affine.offset -= box.lo[d] * affine.strides[d];
  }
  return affine;
}

}  // namespace

void Normalize(Dtype dtype, const ForeignPiece& piece, std::span<std::byte> bytes) {
  const size_t number_bytes = NumberBytes(dtype);
  const size_t element_bytes = ElementBytes(dtype);
  if (piece.byte_order == ByteOrder::kBig && number_bytes > 1) {
    for (size_t at = 0; at < bytes.size(); at += number_bytes) {
      std::reverse(bytes.begin() + static_cast<ptrdiff_t>(at),
                   bytes.begin() + static_cast<ptrdiff_t>(at + number_bytes));
    }
  }
  if (piece.negate) FlipSigns(bytes, 0, number_bytes, number_bytes);
  if (piece.conjugate) FlipSigns(bytes, number_bytes, element_bytes, number_bytes);
}

// The pieces of one tensor state, ready to be asked.
struct WholeTensorReader::Prepared {
  Prepared(const ForeignIndex& index, uint32_t state)
      : tensor_state(state), first(index.PiecesOf(state).first) {
    const auto [begin, end] = index.PiecesOf(state);
    stored.reserve(end - begin);
    for (size_t i = begin; i < end; ++i) {
      stored.push_back({index.pieces[i].piece, index.extents[index.pieces[i].extent].file, 0});
    }
  }

  const uint32_t tensor_state;
  const size_t first;  // number of its first piece in the index
  std::vector<StoredPiece> stored;
  std::optional<SourceView> view;
  std::optional<StateSource> source;
};

WholeTensorReader::WholeTensorReader(const ForeignFolder& folder, const ForeignIndex& index)
    : index_(index), extents_(folder, index) {}
WholeTensorReader::~WholeTensorReader() = default;

absl::Status WholeTensorReader::Prepare(uint32_t tensor_state) {
  CHECK(tensor_state < index_.tensor_states.size());
  if (prepared_ != nullptr && prepared_->tensor_state == tensor_state) return absl::OkStatus();
  auto prepared = std::make_unique<Prepared>(index_, tensor_state);
  prepared->view.emplace(SourceView{index_.tensor_states, index_.boxes, prepared->stored});
  std::vector<uint32_t> numbers(prepared->stored.size());
  std::iota(numbers.begin(), numbers.end(), 0);
  ASSIGN_OR_RETURN(prepared->source, StateSource::Create(*prepared->view, tensor_state, numbers,
                                                         StateSource::Asked::kRanges));
  prepared_ = std::move(prepared);
  return absl::OkStatus();
}

absl::Status WholeTensorReader::Read(uint32_t tensor_state, const Sink& sink) {
  CHECK(tensor_state < index_.tensor_states.size());
  const TensorState& state = index_.tensor_states[tensor_state];
  const uint64_t elements = state.ElementCount();
  const uint64_t element_bytes = ElementBytes(state.dtype);
  const uint64_t step = kWindowBytes / element_bytes;
  for (uint64_t begin = 0; begin < elements; begin += step) {
    const uint64_t end = std::min(elements, begin + step);
    window_.resize((end - begin) * element_bytes);
    RETURN_IF_ERROR(ReadRange(tensor_state, begin, end, window_));
    RETURN_IF_ERROR(sink(window_));
  }
  return absl::OkStatus();
}

absl::Status WholeTensorReader::ReadRange(uint32_t tensor_state, uint64_t begin, uint64_t end,
                                          std::span<std::byte> out) {
  const TensorState& state = index_.tensor_states[tensor_state];
  const uint64_t element_bytes = ElementBytes(state.dtype);
  CHECK(begin <= end && end <= state.ElementCount());
  CHECK(out.size() == (end - begin) * element_bytes);
  if (begin == end) return absl::OkStatus();
  if (state.shape.size() > kTensorDimsMax) {  // then pieces are ranges of the whole tensor
    const auto [first, last] = index_.PiecesOf(tensor_state);
    for (size_t i = first; i < last; ++i) {
      const ForeignPiece& piece = index_.pieces[i];
      if (piece.piece.begin > begin || piece.piece.end < end) continue;
      return ReadPiece(piece, begin - piece.piece.begin, end - piece.piece.begin, out);
    }
    return absl::DataLossError(
        absl::StrFormat("%s: elements [%d, %d) are in no piece", Describe(state), begin, end));
  }
  RETURN_IF_ERROR(Prepare(tensor_state));
  const ElementBox whole = WholeBox(state.shape);
  const Affine target = RowMajor(whole.View(), begin, 0, element_bytes);
  absl::Status status;
  const auto piece_of = [&](uint32_t number) -> const ForeignPiece& {
    return index_.pieces[prepared_->first + (*prepared_->source)[number].replicas.front()];
  };
  uint64_t steps = 0;
  RETURN_IF_ERROR(prepared_->source->Cover(
      {tensor_state, kWholeTensor, begin, end}, index_.boxes,
      [&](uint32_t number, uint64_t part_begin, uint64_t part_end) {
        if (!status.ok()) return;
        // A range may have been given as a box that is one: its elements have the same order.
        const uint64_t piece_begin = (*prepared_->source)[number].piece.begin;
        status = ReadPiece(piece_of(number), part_begin - piece_begin, part_end - piece_begin,
                           out.subspan((part_begin - begin) * element_bytes,
                                       (part_end - part_begin) * element_bytes));
      },
      [&](uint32_t number, const ElementBox& box) {
        if (status.ok()) status = CopyBox(piece_of(number), box, target, out);
      },
      steps));
  return status;
}

absl::Status WholeTensorReader::ReadPiece(const ForeignPiece& piece, uint64_t begin, uint64_t end,
                                          std::span<std::byte> out) {
  const TensorState& state = index_.tensor_states[piece.piece.tensor_state];
  const uint64_t element_bytes = ElementBytes(state.dtype);
  CHECK(begin <= end && end <= piece.piece.ElementCount());
  CHECK(out.size() == (end - begin) * element_bytes);
  if (piece.strides == kContiguous) {
    if (piece.rounded) return ReadRounded(piece, begin, end, out);
    RETURN_IF_ERROR(extents_.Read(piece.extent, piece.offset_bytes + begin * element_bytes, out));
    Normalize(state.dtype, piece, out);
    return absl::OkStatus();
  }
  const ElementBox whole = WholeBox(state.shape);
  const BoxView box = BoxOf(piece, index_, whole);
  const Affine target = RowMajor(box, begin, 0, element_bytes);
  std::vector<ElementBox> parts;
  CutIntoBoxes(box, begin, end, parts);
  for (const ElementBox& part : parts) RETURN_IF_ERROR(CopyBox(piece, part, target, out));
  return absl::OkStatus();
}

absl::Status WholeTensorReader::ReadRounded(const ForeignPiece& piece, uint64_t begin, uint64_t end,
                                            std::span<std::byte> out) {
  const Dtype dtype = index_.tensor_states[piece.piece.tensor_state].dtype;
  const uint64_t element_bytes = ElementBytes(dtype);
  const uint64_t stored_bytes = ElementBytes(Dtype::kFloat32);
  const uint64_t step = kSpanBytes / stored_bytes;
  for (uint64_t at = begin; at < end; at += step) {
    const uint64_t count = std::min(step, end - at);
    span_.resize(count * stored_bytes);
    RETURN_IF_ERROR(extents_.Read(piece.extent, piece.offset_bytes + at * stored_bytes, span_));
    Normalize(Dtype::kFloat32, piece, span_);
    RoundElements(Dtype::kFloat32, dtype, span_,
                  out.subspan((at - begin) * element_bytes, count * element_bytes));
  }
  return absl::OkStatus();
}

absl::Status WholeTensorReader::CopyBox(const ForeignPiece& piece, const ElementBox& box,
                                        const Affine& target, std::span<std::byte> out) {
  const TensorState& state = index_.tensor_states[piece.piece.tensor_state];
  const uint64_t element_bytes = ElementBytes(StoredDtype(piece, state));
  const ElementBox whole = WholeBox(state.shape);
  const Affine source = SourceOf(piece, index_, whole, element_bytes);
  std::vector<size_t> order(box.dims);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return source.strides[a] < source.strides[b]; });
  // `part` is what one read brings: as much of the dimensions in this order as kSpanBytes allow.
  ElementBox part = box;
  uint64_t span_bytes = element_bytes;
  bool full = false;
  for (size_t d : order) {
    const uint64_t stride = source.strides[d];
    // Where next to nothing of a longer read would be wanted, shorter ones are better.
    full = full || (box.size[d] > 1 && stride > std::max(kGapBytes, 4 * span_bytes));
    uint64_t fits = full ? 1 : box.size[d];
    if (!full && stride > 0) fits = std::min(fits, 1 + (kSpanBytes - span_bytes) / stride);
    full = full || fits < box.size[d];
    part.size[d] = fits;
    span_bytes += (fits - 1) * stride;
  }
  // All places of `part` in the box, those of the smallest strides first.
  for (;;) {
    ElementBox here = part;
    for (size_t d = 0; d < box.dims; ++d) {
      here.size[d] = std::min(part.size[d], box.lo[d] + box.size[d] - part.lo[d]);
    }
    RETURN_IF_ERROR(CopySpan(piece, order, here, source, target, out));
    size_t next = 0;
    for (; next < order.size(); ++next) {
      const size_t d = order[next];
      part.lo[d] += part.size[d];
      if (part.lo[d] < box.lo[d] + box.size[d]) break;
      part.lo[d] = box.lo[d];
    }
    if (next == order.size()) return absl::OkStatus();
  }
}

absl::Status WholeTensorReader::CopySpan(const ForeignPiece& piece, std::span<const size_t> order,
                                         const ElementBox& box, const Affine& source,
                                         const Affine& target, std::span<std::byte> out) {
  const TensorState& state = index_.tensor_states[piece.piece.tensor_state];
  const Dtype dtype = StoredDtype(piece, state);
  const uint64_t stored_bytes = ElementBytes(dtype);
  const uint64_t element_bytes = ElementBytes(state.dtype);
  const std::span<const uint64_t> corner(box.lo.data(), box.dims);
  const uint64_t source_begin = source.At(corner);
  uint64_t span_bytes = stored_bytes;
  for (size_t d = 0; d < box.dims; ++d) span_bytes += (box.size[d] - 1) * source.strides[d];
  span_.resize(span_bytes);
  RETURN_IF_ERROR(extents_.Read(piece.extent, source_begin, span_));
  // What lies between the elements is normalized too, where the strides are whole elements; they
  // always are.
  Normalize(dtype, piece, span_);
  std::span<const std::byte> elements = span_;
  if (piece.rounded) {
    rounded_.resize(span_.size() / stored_bytes * element_bytes);
    RoundElements(dtype, state.dtype, span_, rounded_);
    elements = rounded_;
  }
  // From one element to the next in `elements`.
  const auto step = [&](size_t d) { return source.strides[d] / stored_bytes * element_bytes; };

  // Elements that lie one behind the other on both sides go in one copy.
  uint64_t run_bytes = element_bytes;
  std::vector<size_t> loops;
  for (size_t d : order) {
    if (box.size[d] == 1) continue;
    if (loops.empty() && step(d) == run_bytes && target.strides[d] == run_bytes) {
      run_bytes *= box.size[d];
    } else {
      loops.push_back(d);
    }
  }
  std::array<uint64_t, kTensorDimsMax> at{};
  uint64_t from = 0;
  uint64_t to = target.At(corner);
  for (;;) {
    std::memcpy(out.data() + to, elements.data() + from, run_bytes);
    size_t next = 0;
    for (; next < loops.size(); ++next) {
      const size_t d = loops[next];
      from += step(d);
      to += target.strides[d];
      if (++at[d] < box.size[d]) break;
      from -= box.size[d] * step(d);
      to -= box.size[d] * target.strides[d];
      at[d] = 0;
    }
    if (next == loops.size()) return absl::OkStatus();
  }
}

}  // namespace holdfast::converter
