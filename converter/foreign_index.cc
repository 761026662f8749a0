#include "converter/foreign_index.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/json_reader.h"
#include "base/status_macros.h"
#include "base/utf8.h"
#include "converter/rounding.h"

namespace holdfast::converter {
namespace {

absl::Status Wrong(const std::string& text) { return absl::DataLossError(text); }

absl::Status CheckText(std::string_view what, std::string_view text, size_t bytes_max) {
  if (text.size() > bytes_max) {
    return Wrong(
        absl::StrFormat("%s: expected at most %d bytes, found %d", what, bytes_max, text.size()));
  }
  if (!IsUtf8(text)) return Wrong(absl::StrFormat("%s: expected UTF-8", what));
  return absl::OkStatus();
}

absl::Status CheckCount(std::string_view what, size_t count, size_t max) {
  if (count <= max) return absl::OkStatus();
  return Wrong(absl::StrFormat("%s: expected at most %d, found %d", what, max, count));
}

absl::Status CheckFacts(std::string_view what, const std::vector<Fact>& facts) {
  RETURN_IF_ERROR(CheckCount(what, facts.size(), kLinesMax));
  for (const Fact& fact : facts) {
    RETURN_IF_ERROR(CheckText(absl::StrFormat("%s: a name", what), fact.name, kTextBytesMax));
    const auto parsed = JsonDocument::Parse(fact.json, {.bytes_max = kTextBytesMax});
    if (!parsed.ok()) {
      return Wrong(absl::StrFormat("%s: %s: %s", what, fact.name, parsed.status().message()));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckState(const TensorState& state) {
  RETURN_IF_ERROR(CheckText("a tensor's name", state.tensor, kNameBytesMax));
  RETURN_IF_ERROR(CheckText("a state's name", state.state, kNameBytesMax));
  RETURN_IF_ERROR(CheckCount(absl::StrCat(Describe(state), ": dimensions"), state.shape.size(),
                             kForeignDimsMax));
  uint64_t elements = 1;
  const bool empty = std::find(state.shape.begin(), state.shape.end(), 0) != state.shape.end();
  for (uint64_t size : state.shape) {
    if (empty) break;
    if (size > kTensorBytesMax / ElementBytes(state.dtype) / elements) {
      return Wrong(
          absl::StrFormat("%s: expected at most %d bytes", Describe(state), kTensorBytesMax));
    }
    elements *= size;
  }
  return absl::OkStatus();
}

absl::Status CheckStates(const ForeignIndex& index) {
  RETURN_IF_ERROR(CheckCount("tensor states", index.tensor_states.size(), kStatesMax));
  std::vector<uint32_t> order(index.tensor_states.size());
  std::iota(order.begin(), order.end(), 0);
  const auto key = [&](uint32_t i) {
    const TensorState& state = index.tensor_states[i];
    return std::pair<std::string_view, std::string_view>(state.tensor, state.state);
  };
  for (const TensorState& state : index.tensor_states) RETURN_IF_ERROR(CheckState(state));
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return key(a) < key(b); });
  for (size_t i = 1; i < order.size(); ++i) {
    if (key(order[i - 1]) == key(order[i])) {
      return Wrong(absl::StrFormat("%s is there twice", Describe(index.tensor_states[order[i]])));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckExtent(const ForeignIndex& index, const Extent& extent) {
  const bool is_inline = extent.file == kInline;
  if (!is_inline && extent.file >= index.files.size()) {
    return Wrong(absl::StrFormat("an extent is in file %d of %d", extent.file, index.files.size()));
  }
  const uint64_t bytes = is_inline ? index.inline_bytes.size() : index.files[extent.file].bytes;
  if (extent.offset_bytes > bytes || extent.stored_bytes > bytes - extent.offset_bytes) {
    return Wrong(absl::StrFormat("%s: expected bytes [%d, %d + %d), found a file of %d bytes",
                                 is_inline ? "the index" : index.files[extent.file].path,
                                 extent.offset_bytes, extent.offset_bytes, extent.stored_bytes,
                                 bytes));
  }
  if (extent.decoded_bytes > kTensorBytesMax ||
      (extent.codec == Codec::kRaw && extent.decoded_bytes != extent.stored_bytes) ||
      (is_inline && extent.codec != Codec::kRaw)) {
    return Wrong(absl::StrFormat("an extent of %d bytes decodes to %d", extent.stored_bytes,
                                 extent.decoded_bytes));
  }
  return absl::OkStatus();
}

bool IsComplex(Dtype dtype) {
  return dtype == Dtype::kComplex32 || dtype == Dtype::kComplex64 || dtype == Dtype::kComplex128;
}

bool CanNegate(Dtype dtype) {
  return IsComplex(dtype) || dtype == Dtype::kFloat16 || dtype == Dtype::kBfloat16 ||
         dtype == Dtype::kFloat32 || dtype == Dtype::kFloat64;
}

absl::Status CheckForeignPiece(const ForeignIndex& index, const ForeignPiece& piece) {
  if (piece.piece.tensor_state >= index.tensor_states.size()) {
    return Wrong(absl::StrFormat("a piece is of tensor state %d of %d", piece.piece.tensor_state,
                                 index.tensor_states.size()));
  }
  const TensorState& state = index.tensor_states[piece.piece.tensor_state];
  if (piece.piece.box != kWholeTensor || piece.strides != kContiguous) {
    RETURN_IF_ERROR(CheckCount(absl::StrCat(Describe(state), ": dimensions of a tensor in boxes"),
                               state.shape.size(), kTensorDimsMax));
  }
  if (piece.piece.box == kWholeTensor) {
    if (piece.piece.begin > piece.piece.end || piece.piece.end > state.ElementCount()) {
      return Wrong(absl::StrFormat("%s: elements [%d, %d) of %d", Describe(state),
                                   piece.piece.begin, piece.piece.end, state.ElementCount()));
    }
  } else if (const absl::Status status = CheckPiece(piece.piece, index.tensor_states, index.boxes);
             !status.ok()) {
    return Wrong(std::string(status.message()));
  }
  if ((piece.conjugate && !IsComplex(state.dtype)) || (piece.negate && !CanNegate(state.dtype))) {
    return Wrong(absl::StrFormat("%s: %s is neither conjugated nor negated", Describe(state),
                                 DtypeName(state.dtype)));
  }
  if (piece.rounded &&
      (state.dtype == Dtype::kFloat32 || !CanRound(Dtype::kFloat32, state.dtype))) {
    return Wrong(absl::StrFormat("%s: %s is not rounded from float32", Describe(state),
                                 DtypeName(state.dtype)));
  }
  if (piece.extent >= index.extents.size()) {
    return Wrong(absl::StrFormat("%s: a piece is in extent %d of %d", Describe(state), piece.extent,
                                 index.extents.size()));
  }
  ASSIGN_OR_RETURN(const uint64_t end, EndOf(piece, index));
  const Extent& extent = index.extents[piece.extent];
  if (end > extent.decoded_bytes) {
    return Wrong(absl::StrFormat(
        "%s: its elements end at byte %d of %d%s", Describe(state), end, extent.decoded_bytes,
        extent.file == kInline
            ? ""
            : absl::StrFormat(" that are stored for it in %s from offset %d",
                              index.files[extent.file].path, extent.offset_bytes)));
  }
  return absl::OkStatus();
}

absl::Status CheckLines(std::string_view what, const std::vector<std::string>& lines) {
  RETURN_IF_ERROR(CheckCount(what, lines.size(), kLinesMax));
  for (const std::string& line : lines) RETURN_IF_ERROR(CheckText(what, line, kTextBytesMax));
  return absl::OkStatus();
}

absl::Status CheckLists(const ForeignIndex& index) {
  RETURN_IF_ERROR(CheckCount("aliases", index.aliases.size(), kStatesMax));
  for (const Alias& alias : index.aliases) {
    if (alias.tensor_state >= index.tensor_states.size() ||
        alias.of >= index.tensor_states.size() || alias.tensor_state == alias.of) {
      return Wrong("an alias is of a tensor state that is not there");
    }
  }
  RETURN_IF_ERROR(CheckCount("blobs", index.blobs.size(), kLinesMax));
  for (const ForeignBlob& blob : index.blobs) {
    RETURN_IF_ERROR(CheckText("a blob's name", blob.name, kTextBytesMax));
    if (blob.extent >= index.extents.size()) return Wrong("a blob is in no extent");
  }
  RETURN_IF_ERROR(CheckCount("opaque classes", index.opaque_classes.size(), kLinesMax));
  for (const OpaqueClass& each : index.opaque_classes) {
    RETURN_IF_ERROR(CheckText("an opaque class", each.name, kTextBytesMax));
  }
  RETURN_IF_ERROR(CheckCount("unreadable tensors", index.unreadable.size(), kLinesMax));
  for (const Unreadable& each : index.unreadable) {
    RETURN_IF_ERROR(CheckText("an unreadable tensor", each.name, kTextBytesMax));
    RETURN_IF_ERROR(CheckText("an unreadable tensor", each.reason, kTextBytesMax));
  }
  RETURN_IF_ERROR(CheckLines("a note", index.notes));
  RETURN_IF_ERROR(CheckLines("a repair", index.repairs));
  return CheckLines("a loss", index.losses);
}

}  // namespace

uint32_t ForeignIndex::AddState(TensorState tensor_state) {
  tensor_states.push_back(std::move(tensor_state));
  return static_cast<uint32_t>(tensor_states.size() - 1);
}

uint32_t ForeignIndex::AddRaw(uint32_t file, uint64_t offset_bytes, uint64_t bytes) {
  extents.push_back({file, offset_bytes, bytes, Codec::kRaw, bytes});
  return static_cast<uint32_t>(extents.size() - 1);
}

uint32_t ForeignIndex::AddInline(std::string_view bytes) {
  const uint64_t offset = inline_bytes.size();
  inline_bytes += bytes;
  return AddRaw(kInline, offset, bytes.size());
}

void ForeignIndex::AddWholePiece(uint32_t tensor_state, uint32_t extent, uint64_t offset_bytes) {
  ForeignPiece piece;
  piece.piece = {tensor_state, kWholeTensor, 0, tensor_states[tensor_state].ElementCount()};
  piece.extent = extent;
  piece.offset_bytes = offset_bytes;
  pieces.push_back(piece);
}

std::pair<size_t, size_t> ForeignIndex::PiecesOf(uint32_t tensor_state) const {
  const auto [first, last] = std::equal_range(pieces.begin(), pieces.end(),
                                              ForeignPiece{.piece = {.tensor_state = tensor_state}},
                                              [](const ForeignPiece& a, const ForeignPiece& b) {
                                                return a.piece.tensor_state < b.piece.tensor_state;
                                              });
  return {first - pieces.begin(), last - pieces.begin()};
}

std::span<const uint64_t> SizesOf(const ForeignPiece& piece, const ForeignIndex& index) {
  if (piece.piece.box != kWholeTensor) return index.boxes[piece.piece.box].size;
  return index.tensor_states[piece.piece.tensor_state].shape;
}

absl::StatusOr<uint64_t> EndOf(const ForeignPiece& piece, const ForeignIndex& index) {
  const TensorState& state = index.tensor_states[piece.piece.tensor_state];
  const uint64_t element_bytes = ElementBytes(StoredDtype(piece, state));
  const auto too_far = [&] {
    return Wrong(absl::StrFormat("%s: its elements end beyond 2^62 bytes", Describe(state)));
  };
  if (piece.offset_bytes > kTensorBytesMax) return too_far();
  const uint64_t room = kTensorBytesMax - piece.offset_bytes;
  if (piece.strides == kContiguous) {
    const uint64_t elements = piece.piece.ElementCount();
    if (elements > room / element_bytes) return too_far();
    return piece.offset_bytes + elements * element_bytes;
  }
  const std::span<const uint64_t> sizes = SizesOf(piece, index);
  if (piece.strides >= index.strides.size() ||
      index.strides[piece.strides].size() != sizes.size()) {
    return Wrong(absl::StrFormat("%s: expected %d strides", Describe(state), sizes.size()));
  }
  uint64_t volume = 1;
  for (uint64_t size : sizes) volume *= size;
  if (piece.piece.begin != 0 || piece.piece.end != volume) {
    return Wrong(
        absl::StrFormat("%s: a piece with strides is not all of its box", Describe(state)));
  }
  if (volume == 0) return piece.offset_bytes;
  uint64_t last = 0;  // element
  for (size_t d = 0; d < sizes.size(); ++d) {
    const uint64_t stride = index.strides[piece.strides][d];
    if (sizes[d] > 1 && stride > (room / element_bytes - last) / (sizes[d] - 1)) return too_far();
    last += stride * (sizes[d] - 1);
  }
  if (last >= room / element_bytes) return too_far();
  return piece.offset_bytes + (last + 1) * element_bytes;
}

absl::Status Finish(ForeignIndex& index) {
  RETURN_IF_ERROR(CheckText("the format", index.format, kNameBytesMax));
  RETURN_IF_ERROR(CheckText("the variant", index.variant, kTextBytesMax));
  RETURN_IF_ERROR(CheckFacts("layout", index.layout));
  RETURN_IF_ERROR(CheckFacts("scalars", index.scalars));
  RETURN_IF_ERROR(CheckCount("files", index.files.size(), kFolderFilesMax));
  for (const FolderFile& file : index.files) {
    RETURN_IF_ERROR(CheckCount("bytes of a path", file.path.size(), kPathBytesMax));
  }
  RETURN_IF_ERROR(CheckCount("bytes in the index", index.inline_bytes.size(), kInlineBytesMax));
  RETURN_IF_ERROR(CheckCount("extents", index.extents.size(), kPiecesMax));
  for (const Extent& extent : index.extents) RETURN_IF_ERROR(CheckExtent(index, extent));
  RETURN_IF_ERROR(CheckStates(index));
  RETURN_IF_ERROR(CheckCount("strides", index.strides.size(), kPiecesMax));
  for (const std::vector<uint64_t>& each : index.strides) {
    RETURN_IF_ERROR(CheckCount("strides of a piece", each.size(), kTensorDimsMax));
  }
  RETURN_IF_ERROR(CheckCount("pieces", index.pieces.size(), kPiecesMax));
  for (const ForeignPiece& piece : index.pieces) RETURN_IF_ERROR(CheckForeignPiece(index, piece));
  const auto by_state = [](const ForeignPiece& a, const ForeignPiece& b) {
    return a.piece.tensor_state < b.piece.tensor_state;
  };
  if (!std::is_sorted(index.pieces.begin(), index.pieces.end(), by_state)) {
    std::stable_sort(index.pieces.begin(), index.pieces.end(), by_state);
  }
  return CheckLists(index);
}

absl::Status CheckFiles(const ForeignIndex& index, const ForeignFolder& folder) {
  if (index.files.size() != folder.files().size()) {
    return Wrong(absl::StrFormat("%s: expected %d files, found %d", folder.root(),
                                 index.files.size(), folder.files().size()));
  }
  for (size_t i = 0; i < index.files.size(); ++i) {
    const FolderFile& expected = index.files[i];
    const FolderFile& found = folder.files()[i];
    if (expected.path != found.path || expected.bytes != found.bytes) {
      return Wrong(absl::StrFormat("%s: expected %s of %d bytes, found %s of %d", folder.root(),
                                   expected.path, expected.bytes, found.path, found.bytes));
    }
  }
  return absl::OkStatus();
}

std::string JsonNumber(double value) {
  if (std::isnan(value)) return "\"NaN\"";
  if (std::isinf(value)) return value > 0 ? "\"Infinity\"" : "\"-Infinity\"";
  // The shortest form that reads back as the same number.
  for (int digits : {6, 9, 15, 16, 17}) {
    std::string text = absl::StrFormat("%.*g", digits, value);
    if (std::strtod(text.c_str(), nullptr) != value) continue;
    if (text.find_first_of(".e") == std::string::npos) text += ".0";
    return text;
  }
  return "0.0";  // not reached: 17 digits tell every double
}

std::string JsonQuote(std::string_view text) {
  std::string quoted = "\"";
  while (!text.empty()) {
    const size_t bytes = Utf8SequenceBytes(text);
    const auto first = static_cast<unsigned char>(text.front());
    if (bytes == 0) {
      absl::StrAppendFormat(&quoted, "\\\\x%02x", first);
    } else if (first == '"' || first == '\\') {
      quoted += {'\\', text.front()};
    } else if (first < 0x20) {
      absl::StrAppendFormat(&quoted, "\\u%04x", first);
    } else {
      quoted += text.substr(0, bytes);
    }
    text.remove_prefix(std::max<size_t>(bytes, 1));
  }
  return quoted + "\"";
}

}  // namespace holdfast::converter
