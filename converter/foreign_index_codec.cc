// The bytes in which an index goes from the sandboxed child to its parent: base/byte_codec.h's, the
// fields in the order of the struct. Encoder and decoder walk one description.
#include <array>

#include "base/byte_codec.h"
#include "base/status_macros.h"
#include "converter/foreign_index.h"

namespace holdfast::converter {
namespace {

constexpr Envelope kEnvelope = {"foreign index", "HFFI", 1, kEncodedIndexBytesMax};

template <typename Walker>
void Walk(Walker& walker, Fact& fact) {
  walker.Text("fact", fact.name, kTextBytesMax);
  walker.Text("fact", fact.json, kTextBytesMax);
}

template <typename Walker>
void Walk(Walker& walker, FolderFile& file) {
  walker.Text("path", file.path, kPathBytesMax);
  walker.Number("bytes", file.bytes);
}

template <typename Walker>
void Walk(Walker& walker, Extent& extent) {
  walker.Number("file", extent.file);
  walker.Number("offset", extent.offset_bytes);
  walker.Number("stored bytes", extent.stored_bytes);
  walker.Enumerator("codec", extent.codec, 3);
  walker.Number("decoded bytes", extent.decoded_bytes);
}

template <typename Walker>
void Walk(Walker& walker, TensorState& state) {
  walker.Text("tensor", state.tensor, kNameBytesMax);
  walker.Text("state", state.state, kNameBytesMax);
  // Zero, which no dtype has, stands for one that is not known.
  auto dtype = static_cast<uint8_t>(state.dtype);
  walker.Number("dtype", dtype, DtypeNames().size());
  state.dtype = static_cast<Dtype>(dtype);
  walker.Length("shape", state.shape, kForeignDimsMax);
  for (uint64_t& size : state.shape) walker.Number("size", size);
}

template <typename Walker>
void Walk(Walker& walker, std::vector<uint64_t>& strides) {
  walker.Length("strides", strides, kTensorDimsMax);
  for (uint64_t& stride : strides) walker.Number("stride", stride);
}

template <typename Walker>
void Walk(Walker& walker, ForeignPiece& piece) {
  walker.Number("tensor state", piece.piece.tensor_state);
  walker.Number("box", piece.piece.box);
  walker.Number("begin", piece.piece.begin);
  walker.Number("end", piece.piece.end);
  walker.Number("extent", piece.extent);
  walker.Number("offset", piece.offset_bytes);
  walker.Number("strides", piece.strides);
  walker.Enumerator("byte order", piece.byte_order, 2);
  walker.Number("conjugate", piece.conjugate, 1);
  walker.Number("negate", piece.negate, 1);
  walker.Number("rounded", piece.rounded, 1);
}

template <typename Walker>
void Walk(Walker& walker, Alias& alias) {
  walker.Number("alias", alias.tensor_state);
  walker.Number("of", alias.of);
}

template <typename Walker>
void Walk(Walker& walker, OpaqueClass& opaque) {
  walker.Text("class", opaque.name, kTextBytesMax);
  walker.Number("count", opaque.count);
}

template <typename Walker>
void Walk(Walker& walker, Unreadable& unreadable) {
  walker.Text("unreadable", unreadable.name, kTextBytesMax);
  walker.Text("reason", unreadable.reason, kTextBytesMax);
}

template <typename Walker>
void Walk(Walker& walker, ForeignBlob& blob) {
  walker.Text("blob", blob.name, kTextBytesMax);
  walker.Number("extent", blob.extent);
}

template <typename Walker>
void Walk(Walker& walker, std::string& line) {
  walker.Text("line", line, kTextBytesMax);
}

template <typename Walker, typename T>
void WalkList(Walker& walker, std::string_view what, std::vector<T>& list, size_t max) {
  walker.Length(what, list, max);
  for (T& each : list) Walk(walker, each);
}

// A BoxTable grows by whole boxes only.
void WalkBoxes(ByteWriter& walker, BoxTable& boxes) {
  uint32_t count = boxes.size();
  walker.Number("boxes", count, kPiecesMax);
  for (uint32_t i = 0; i < count; ++i) {
    const BoxView box = boxes[i];
    size_t dims = box.lo.size();
    walker.Number("dimensions", dims, kTensorDimsMax);
    for (uint64_t lo : box.lo) walker.Number("lo", lo);
    for (uint64_t size : box.size) walker.Number("size", size);
  }
}

void WalkBoxes(ByteReader& walker, BoxTable& boxes) {
  uint32_t count = 0;
  walker.Number("boxes", count, kPiecesMax);
  std::array<uint64_t, 2 * kTensorDimsMax> values;
  for (uint32_t i = 0; i < count && walker.ok(); ++i) {
    size_t dims = 0;
    walker.Number("dimensions", dims, kTensorDimsMax);
    for (size_t d = 0; d < 2 * dims; ++d) walker.Number("lo or size", values[d]);
    boxes.Add(std::span(values).first(dims), std::span(values).subspan(dims, dims));
  }
}

template <typename Walker>
void Walk(Walker& walker, ForeignIndex& index) {
  walker.Text("format", index.format, kNameBytesMax);
  walker.Text("variant", index.variant, kTextBytesMax);
  walker.Number("has step", index.has_step, 1);
  walker.Number("step", index.step);
  WalkList(walker, "layout", index.layout, kLinesMax);
  WalkList(walker, "files", index.files, kFolderFilesMax);
  walker.Text("inline bytes", index.inline_bytes, kInlineBytesMax);
  WalkList(walker, "extents", index.extents, kPiecesMax);
  WalkList(walker, "tensor states", index.tensor_states, kStatesMax);
  WalkBoxes(walker, index.boxes);
  WalkList(walker, "strides", index.strides, kPiecesMax);
  WalkList(walker, "pieces", index.pieces, kPiecesMax);
  WalkList(walker, "aliases", index.aliases, kStatesMax);
  WalkList(walker, "scalars", index.scalars, kLinesMax);
  WalkList(walker, "blobs", index.blobs, kLinesMax);
  WalkList(walker, "opaque classes", index.opaque_classes, kLinesMax);
  WalkList(walker, "unreadable", index.unreadable, kLinesMax);
  WalkList(walker, "notes", index.notes, kLinesMax);
  WalkList(walker, "repairs", index.repairs, kLinesMax);
  WalkList(walker, "losses", index.losses, kLinesMax);
}

}  // namespace

absl::StatusOr<std::string> EncodeForeignIndex(ForeignIndex& index) {
  std::string bytes;
  OpenEnvelope(kEnvelope, bytes);
  ByteWriter writer(&bytes);
  Walk(writer, index);
  if (bytes.size() + kEnvelopeBytes > kEncodedIndexBytesMax) {
    return absl::ResourceExhaustedError(absl::StrFormat(
        "the index: expected at most %d bytes, found %d", kEncodedIndexBytesMax, bytes.size()));
  }
  SealEnvelope(kEnvelope, bytes);
  return bytes;
}

absl::StatusOr<ForeignIndex> DecodeForeignIndex(std::span<const std::byte> bytes) {
  ASSIGN_OR_RETURN(const std::span<const std::byte> fields, FieldsIn(kEnvelope, bytes));
  ForeignIndex index;
  ByteReader reader(kEnvelope.name, fields);
  Walk(reader, index);
  RETURN_IF_ERROR(reader.Finish());
  for (const TensorState& state : index.tensor_states) {
    if (!DtypeFromNumber(static_cast<uint8_t>(state.dtype)).has_value()) {
      return absl::DataLossError("foreign index: a tensor state has no dtype");
    }
  }
  RETURN_IF_ERROR(holdfast::converter::Finish(index));
  return index;
}

}  // namespace holdfast::converter
