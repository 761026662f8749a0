#include "format/tensor_piece.h"

#include <algorithm>
#include <string_view>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "base/utf8.h"

namespace holdfast {
namespace {

constexpr size_t kShownBytesMax = 200;

std::string Shown(const std::string& name) {
  if (name.size() <= kShownBytesMax) return absl::Utf8SafeCHexEscape(name);
  size_t end = kShownBytesMax;
  while (end > 0 && (static_cast<unsigned char>(name[end]) & 0xC0) == 0x80) --end;
  return absl::StrCat(absl::Utf8SafeCHexEscape(name.substr(0, end)), "... (", name.size(),
                      " bytes)");
}

// Product of sizes, saturating above `limit`; 0 if any is 0.
uint64_t Volume(std::span<const uint64_t> sizes, uint64_t limit) {
  if (std::find(sizes.begin(), sizes.end(), uint64_t{0}) != sizes.end()) return 0;
  uint64_t volume = 1;
  for (uint64_t size : sizes) {
    if (volume > limit / size) return limit + 1;
    volume *= size;
  }
  return volume;
}

}  // namespace

uint64_t TensorState::ElementCount() const { return Volume(shape, kTensorBytesMax); }

std::string Describe(const TensorState& tensor_state) {
  return absl::StrFormat("tensor \"%s\", state \"%s\"", Shown(tensor_state.tensor),
                         Shown(tensor_state.state));
}

absl::Status CheckName(const std::string& what, const std::string& name) {
  if (name.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": expected a name, found none"));
  }
  if (name.size() > kNameBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s \"%s\": expected a name of at most %d bytes, found %d", what,
                        Shown(name), kNameBytesMax, name.size()));
  }
  if (!IsUtf8(name) || name.find('\0') != std::string::npos) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "%s \"%s\": expected a name in UTF-8 without NUL", what, absl::CHexEscape(name)));
  }
  return absl::OkStatus();
}

absl::Status CheckTensorState(const TensorState& tensor_state) {
  RETURN_IF_ERROR(CheckName("tensor", tensor_state.tensor));
  RETURN_IF_ERROR(CheckName("state", tensor_state.state));
  if (tensor_state.shape.size() > kTensorDimsMax) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: expected at most %d dimensions, found %d", Describe(tensor_state),
                        kTensorDimsMax, tensor_state.shape.size()));
  }
  const uint64_t elements_max = kTensorBytesMax / ElementBytes(tensor_state.dtype);
  if (Volume(tensor_state.shape, elements_max) > elements_max) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "%s: expected at most 2^62 bytes, found a shape with more", Describe(tensor_state)));
  }
  return absl::OkStatus();
}

uint32_t BoxTable::Add(std::span<const uint64_t> lo, std::span<const uint64_t> size) {
  CHECK(lo.size() == size.size() && lo.size() <= kTensorDimsMax);
  CHECK(begins_.size() < kWholeTensor);
  begins_.push_back(values_.size());
  values_.insert(values_.end(), lo.begin(), lo.end());
  values_.insert(values_.end(), size.begin(), size.end());
  return static_cast<uint32_t>(begins_.size() - 1);
}

BoxView BoxTable::operator[](uint32_t index) const {
  CHECK(index < begins_.size());
  const size_t begin = begins_[index];
  const size_t end = index + 1 < begins_.size() ? begins_[index + 1] : values_.size();
  const size_t dims = (end - begin) / 2;
  const std::span<const uint64_t> values(values_);
  return {values.subspan(begin, dims), values.subspan(begin + dims, dims)};
}

std::optional<uint64_t> ContiguousStart(BoxView box, std::span<const uint64_t> shape) {
  size_t partial = 0;  // one past the last dimension that the box does not span
  uint64_t start = 0;
  for (size_t d = 0; d < shape.size(); ++d) {
    if (box.size[d] != shape[d]) partial = d + 1;
    start = start * shape[d] + box.lo[d];
  }
  for (size_t d = 0; d + 1 < partial; ++d) {
    if (box.size[d] != 1) return std::nullopt;
  }
  return start;
}

Piece AsRange(Piece piece, const TensorState& tensor_state, const BoxTable& boxes) {
  if (piece.box == kWholeTensor) return piece;
  const std::optional<uint64_t> start = ContiguousStart(boxes[piece.box], tensor_state.shape);
  if (!start.has_value()) return piece;
  piece.box = kWholeTensor;
  piece.begin += *start;
  piece.end += *start;
  return piece;
}

int ComparePieces(const Piece& a, const Piece& b, const BoxTable& boxes) {
  const auto order = [](auto x, auto y) { return x < y ? -1 : (y < x ? 1 : 0); };
  if ((a.box == kWholeTensor) != (b.box == kWholeTensor)) return a.box == kWholeTensor ? -1 : 1;
  if (a.box != b.box) {
    const BoxView x = boxes[a.box];
    const BoxView y = boxes[b.box];
    for (size_t d = 0; d < x.lo.size(); ++d) {
      if (const int by_lo = order(x.lo[d], y.lo[d]); by_lo != 0) return by_lo;
      if (const int by_size = order(x.size[d], y.size[d]); by_size != 0) return by_size;
    }
  }
  if (const int by_begin = order(a.begin, b.begin); by_begin != 0) return by_begin;
  return order(a.end, b.end);
}

uint64_t ElementInTensor(const Piece& piece, const BoxTable& boxes, const TensorState& tensor_state,
                         uint64_t element) {
  if (piece.box == kWholeTensor) return element;
  const BoxView box = boxes[piece.box];
  uint64_t result = 0;
  uint64_t stride = 1;
  for (size_t d = box.size.size(); d-- > 0;) {
    result += (box.lo[d] + element % box.size[d]) * stride;
    element /= box.size[d];
    stride *= tensor_state.shape[d];
  }
  return result;
}

absl::Status CheckPiece(const Piece& piece, std::span<const TensorState> tensor_states,
                        const BoxTable& boxes) {
  if (piece.tensor_state >= tensor_states.size()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("piece: expected one of %d tensor states, found number %d",
                        tensor_states.size(), piece.tensor_state));
  }
  const TensorState& tensor_state = tensor_states[piece.tensor_state];
  uint64_t elements = tensor_state.ElementCount();
  if (piece.box != kWholeTensor) {
    if (piece.box >= boxes.size()) {
      return absl::InvalidArgumentError(
          absl::StrFormat("%s: expected one of %d boxes, found number %d", Describe(tensor_state),
                          boxes.size(), piece.box));
    }
    const BoxView box = boxes[piece.box];
    if (box.lo.size() != tensor_state.shape.size()) {
      return absl::InvalidArgumentError(
          absl::StrFormat("%s: expected a box of %d dimensions, found %d", Describe(tensor_state),
                          tensor_state.shape.size(), box.lo.size()));
    }
    for (size_t d = 0; d < box.lo.size(); ++d) {
      if (box.lo[d] > tensor_state.shape[d] || box.size[d] > tensor_state.shape[d] - box.lo[d]) {
        return absl::InvalidArgumentError(absl::StrFormat(
            "%s: expected a box within %d elements of dimension %d, found [%d, %d + %d)",
            Describe(tensor_state), tensor_state.shape[d], d, box.lo[d], box.lo[d], box.size[d]));
      }
    }
    elements = Volume(box.size, kTensorBytesMax);
  }
  if (piece.begin > piece.end || piece.end > elements) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: expected a range within %d elements, found [%d, %d)",
                        Describe(tensor_state), elements, piece.begin, piece.end));
  }
  return absl::OkStatus();
}

std::string Describe(const Piece& piece, const BoxTable& boxes) {
  std::string text = absl::StrFormat("elements [%d, %d)", piece.begin, piece.end);
  if (piece.box == kWholeTensor) return text;
  const BoxView box = boxes[piece.box];
  absl::StrAppend(&text, " of the box [");
  for (size_t d = 0; d < box.lo.size(); ++d) {
    absl::StrAppend(&text, d ? ", " : "", box.lo[d], ":", box.lo[d] + box.size[d]);
  }
  return text + "]";
}

}  // namespace holdfast
