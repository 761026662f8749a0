// What a foreign checkpoint holds and where its bytes lie: the one form into which every reader of
// converter/formats.cc brings its format, and from which inspect, verify, diff, view and the
// writers go on.
//
// It is plain data: a reader runs in a sandboxed child (converter/sandbox.h) that returns the
// encoded index; the parent decodes it strictly, compares its files with the folder again, and
// moves bytes by it. So whatever is in an index is checked twice, once by each process.
//
//   file  --- extents: ranges of a file, stored as they are or compressed, or bytes in the index
//   extent -- pieces: elements of a tensor state, in the extent, at an offset
//   piece --- elements [begin, end) of a box of the tensor (format/tensor_piece.h)
//
// Pieces with equal elements are replicas: verify proves that their bytes are equal. Elements of
// one piece lie one behind the other in the row-major order of its box, or at strides. Padding is
// in no piece.
#ifndef HOLDFAST_CONVERTER_FOREIGN_INDEX_H_
#define HOLDFAST_CONVERTER_FOREIGN_INDEX_H_

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "format/tensor_piece.h"

namespace holdfast::converter {

inline constexpr size_t kStatesMax = 4'000'000;
inline constexpr size_t kPiecesMax = 16'000'000;
inline constexpr size_t kLinesMax = 1'000'000;  // of notes, facts, scalars and other lists
inline constexpr size_t kTextBytesMax = size_t{64} << 20;  // of one of them
inline constexpr size_t kInlineBytesMax = size_t{64} << 20;
// Of a tensor of one whole piece only; more than kTensorDimsMax cannot be cut into boxes.
inline constexpr size_t kForeignDimsMax = 4096;
inline constexpr size_t kEncodedIndexBytesMax = size_t{1} << 30;

enum class Codec : uint8_t { kRaw, kDeflate, kZstd };  // kDeflate: raw, without zlib's frame
enum class ByteOrder : uint8_t { kLittle, kBig };

// Extent::file of bytes that stand in ForeignIndex::inline_bytes: values that a format writes as
// numbers (an optimizer's step as a Python int) and a tensor state must have as bytes.
inline constexpr uint32_t kInline = std::numeric_limits<uint32_t>::max();

// A range of bytes, all of which can be had.
struct Extent {
  uint32_t file = 0;  // index into ForeignIndex::files, or kInline
  uint64_t offset_bytes = 0;
  uint64_t stored_bytes = 0;
  Codec codec = Codec::kRaw;
  uint64_t decoded_bytes = 0;  // kRaw: equal to stored_bytes
  friend bool operator==(const Extent&, const Extent&) = default;
};

// ForeignPiece::strides of a piece whose elements lie one behind the other.
inline constexpr uint32_t kContiguous = std::numeric_limits<uint32_t>::max();

struct ForeignPiece {
  Piece piece;
  uint32_t extent = 0;
  // In the decoded extent: of element piece.begin; with strides: of the box's corner.
  uint64_t offset_bytes = 0;
  // Index into ForeignIndex::strides; then the piece is the whole of its box.
  uint32_t strides = kContiguous;
  ByteOrder byte_order = ByteOrder::kLittle;
  // What the stored numbers still lack (torch's lazy conj and neg): conjugate is for complex
  // dtypes, negate for floating and complex ones.
  bool conjugate = false;
  bool negate = false;
  // Stored as float32: the state's elements are these, rounded to its dtype (bfloat16 or float16)
  // as converter/rounding.h does it: a model's weights, where only their masters are stored.
  bool rounded = false;
};

// The dtype of a piece's stored elements.
inline Dtype StoredDtype(const ForeignPiece& piece, const TensorState& state) {
  return piece.rounded ? Dtype::kFloat32 : state.dtype;
}

// A name and a value as JSON text: what is shown, or kept beside the tensors. Numbers that JSON
// does not have are the strings "NaN", "Infinity" and "-Infinity".
struct Fact {
  std::string name;
  std::string json;
  friend bool operator==(const Fact&, const Fact&) = default;
};

// Two names for one tensor in the model (tied weights). Both are tensor states with pieces.
struct Alias {
  uint32_t tensor_state = 0;
  uint32_t of = 0;
  friend bool operator==(const Alias&, const Alias&) = default;
};

// A class that a pickle names and nobody here interprets: it is shown, and counted.
struct OpaqueClass {
  std::string name;  // module and qualified name, joined by a dot
  uint64_t count = 0;
  friend bool operator==(const OpaqueClass&, const OpaqueClass&) = default;
};

// What the checkpoint holds and the index cannot say as a tensor state: a sparse or quantised
// tensor, a dtype without a number here. Conversions refuse it by name.
struct Unreadable {
  std::string name;
  std::string reason;  // "is a sparse tensor (torch.sparse_coo)"
  friend bool operator==(const Unreadable&, const Unreadable&) = default;
};

// An object that is kept byte for byte: an RNG state, a pickled DCP item.
struct ForeignBlob {
  std::string name;
  uint32_t extent = 0;
  friend bool operator==(const ForeignBlob&, const ForeignBlob&) = default;
};

struct ForeignIndex {
  std::string format;   // "safetensors", "torch", "dcp", ...
  std::string variant;  // "ZeRO-2", "torch 2.0 metadata", ...; may be empty
  bool has_step = false;
  uint64_t step = 0;         // training iteration
  std::vector<Fact> layout;  // for display, in this order

  std::vector<FolderFile> files;  // those of the folder, by the same numbers
  std::string inline_bytes;
  std::vector<Extent> extents;

  std::vector<TensorState> tensor_states;  // (tensor, state) pairs are distinct
  BoxTable boxes;
  // Elements (not bytes) from one element to the next in every dimension of a piece's box.
  std::vector<std::vector<uint64_t>> strides;
  std::vector<ForeignPiece> pieces;  // by tensor state (Finish sorts them)
  std::vector<Alias> aliases;

  std::vector<Fact> scalars;  // small objects: hyper-parameters, arguments, metadata
  std::vector<ForeignBlob> blobs;
  std::vector<OpaqueClass> opaque_classes;
  std::vector<Unreadable> unreadable;
  std::vector<std::string> notes;
  std::vector<std::string> repairs;  // documented ones that were made: what, and of what
  std::vector<std::string> losses;   // what a framework's own bug has lost: verify gives exit 4

  // For readers. Each returns the new number.
  uint32_t AddState(TensorState tensor_state);
  uint32_t AddRaw(uint32_t file, uint64_t offset_bytes, uint64_t bytes);
  uint32_t AddInline(std::string_view bytes);
  // All elements of a state, one behind the other, little-endian.
  void AddWholePiece(uint32_t tensor_state, uint32_t extent, uint64_t offset_bytes);

  // Numbers [first, second) of the pieces of a tensor state. After Finish.
  std::pair<size_t, size_t> PiecesOf(uint32_t tensor_state) const;
};

// Sorts the pieces and validates: every number leads somewhere, every piece lies in its tensor and
// in its extent, every extent in its file, names are UTF-8 of at most kNameBytesMax bytes and
// (tensor, state) pairs distinct, JSON is JSON. An empty name, and one with NUL, are legal here.
// kDataLoss that names what is wrong: of a reader's result it speaks of the checkpoint.
absl::Status Finish(ForeignIndex& index);

// kDataLoss if a file of the index is not in the folder, or has another size there.
absl::Status CheckFiles(const ForeignIndex& index, const ForeignFolder& folder);

// The byte in the decoded extent at which the piece ends, if there is no overflow: one past the
// last byte that is read of it.
absl::StatusOr<uint64_t> EndOf(const ForeignPiece& piece, const ForeignIndex& index);

// Elements of a piece's box in every dimension.
std::span<const uint64_t> SizesOf(const ForeignPiece& piece, const ForeignIndex& index);

// JSON text for a Fact, of a double and of text that may not be UTF-8 (bytes that are not become
// \xNN).
std::string JsonNumber(double value);
std::string JsonQuote(std::string_view text);

// Of an index that passed Finish; it is not changed. kResourceExhausted above
// kEncodedIndexBytesMax.
absl::StatusOr<std::string> EncodeForeignIndex(ForeignIndex& index);
// Strict; what it returns has passed Finish and was sorted. Errors: kDataLoss, kUnimplemented
// (another version), kInvalidArgument, all of which mean that the other process is not to be
// trusted.
absl::StatusOr<ForeignIndex> DecodeForeignIndex(std::span<const std::byte> bytes);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_FOREIGN_INDEX_H_
