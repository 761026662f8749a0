#include "converter/torch_index.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "base/utf8.h"

namespace holdfast::converter {
namespace {

constexpr uint32_t kNone = UINT32_MAX;
constexpr int kJsonDepthMax = 8;

using Kind = TorchValue::Kind;

// Appends JSON text until it is long enough; whatever is open is then closed.
class JsonText {
 public:
  explicit JsonText(size_t bytes_max) : bytes_max_(bytes_max) {}

  void Add(const TorchValue& value, int depth) {
    switch (value.kind()) {
      case Kind::kNone:
        text_ += "null";
        return;
      case Kind::kBool:
        text_ += *value.Bool() ? "true" : "false";
        return;
      case Kind::kInteger:
        if (const absl::StatusOr<int64_t> integer = value.Int64(); integer.ok()) {
          absl::StrAppend(&text_, *integer);
        } else {
          text_ += JsonQuote("an integer of more than 64 bits");
        }
        return;
      case Kind::kFloat:
        text_ += JsonNumber(*value.Double());
        return;
      case Kind::kString:
        return AddString(*value.String());
      case Kind::kBytes:
        text_ += JsonQuote(absl::StrFormat("%d bytes", value.Bytes()->size()));
        return;
      case Kind::kDtype:
        text_ += JsonQuote(DtypeName(*value.ElementType()));
        return;
      case Kind::kTensor: {
        const TorchTensor& tensor = **value.Tensor();
        text_ += JsonQuote(absl::StrFormat("a tensor of %d dimensions, %s", tensor.shape.size(),
                                           DtypeName(tensor.dtype)));
        return;
      }
      case Kind::kList:
      case Kind::kTuple:
      case Kind::kSet:
        return AddArray(value, depth);
      case Kind::kDict:
        return AddDict(value, depth);
      case Kind::kOpaque:
        // argparse.Namespace and the like: what it holds says more than that it is one.
        if (const TorchValue attributes = value.attributes();
            attributes.present() && depth < kJsonDepthMax) {
          return AddDict(attributes, depth);
        }
        text_ += JsonQuote(value.Describe());
        return;
    }
  }

  std::string Take() { return std::move(text_); }

 private:
  bool full() const { return text_.size() >= bytes_max_; }

  void AddString(std::string_view string) {
    const size_t room = full() ? 0 : bytes_max_ - text_.size();
    text_ += string.size() <= room ? JsonQuote(string)
                                   : JsonQuote(absl::StrFormat("%s...", string.substr(0, room)));
  }
  void AddArray(const TorchValue& value, int depth) {
    if (depth >= kJsonDepthMax) {
      text_ += JsonQuote(value.Describe());
      return;
    }
    text_ += '[';
    const size_t count = *value.ArraySize();
    for (size_t i = 0; i < count; ++i) {
      if (i != 0) text_ += ',';
      if (full()) {
        text_ += JsonQuote("...");
        break;
      }
      Add(value[i], depth + 1);
    }
    text_ += ']';
  }
  void AddDict(const TorchValue& value, int depth) {
    if (depth >= kJsonDepthMax) {
      text_ += JsonQuote(value.Describe());
      return;
    }
    text_ += '{';
    const size_t count = *value.EntryCount();
    for (size_t i = 0; i < count; ++i) {
      if (i != 0) text_ += ',';
      if (full()) {
        text_ += JsonQuote("...") + ":" + JsonQuote("...");
        break;
      }
      const TorchValue key = value.Key(i);
      text_ += JsonQuote(TorchKeyText(key));
      text_ += ':';
      Add(value.Entry(i), depth + 1);
    }
    text_ += '}';
  }

  const size_t bytes_max_;
  std::string text_;
};

}  // namespace

std::string TorchText(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const size_t bytes = Utf8SequenceBytes(text);
    if (bytes == 0) {
      absl::StrAppendFormat(&out, "\\x%02x", static_cast<uint8_t>(text[0]));
    } else {
      out += text.substr(0, bytes);
    }
    text.remove_prefix(std::max(bytes, size_t{1}));
  }
  return out;
}

std::string TorchKeyText(const TorchValue& key) {
  constexpr size_t kItemsMax = 8;
  switch (key.kind()) {
    case Kind::kString:
      return TorchText(*key.String());
    case Kind::kInteger:
      return key.Int64().ok() ? absl::StrCat(*key.Int64()) : key.Describe();
    case Kind::kBool:
      return *key.Bool() ? "True" : "False";
    case Kind::kNone:
      return "None";
    case Kind::kFloat:
      return absl::StrCat(*key.Double());
    case Kind::kTuple: {
      const size_t count = *key.ArraySize();
      std::string text = "(";
      for (size_t i = 0; i < count && i < kItemsMax; ++i) {
        const TorchValue item = key[i];
        const bool quoted = item.Is(Kind::kString);
        const std::string inner = item.Is(Kind::kTuple) ? "(...)" : TorchKeyText(item);
        absl::StrAppend(&text, i == 0 ? "" : ", ", quoted ? "'" : "", inner, quoted ? "'" : "");
      }
      return absl::StrCat(text, count > kItemsMax ? ", ...)" : ")");
    }
    default:
      return key.Describe();
  }
}

std::string TorchJson(const TorchValue& value, size_t bytes_max) {
  if (!value.present()) return "null";
  JsonText text(bytes_max);
  text.Add(value, 0);
  return text.Take();
}

void AddTorchDescription(const TorchFile& torch_file, ForeignIndex& index) {
  std::map<std::string, uint64_t> counts;
  for (const OpaqueClass& known : index.opaque_classes) counts[known.name] = known.count;
  for (const auto& [name, count] : torch_file.OpaqueClasses()) counts[TorchText(name)] += count;
  index.opaque_classes.clear();
  for (const auto& [name, count] : counts) index.opaque_classes.push_back({name, count});
  const std::span<const std::string> warnings = torch_file.warnings();
  index.notes.insert(index.notes.end(), warnings.begin(), warnings.end());
}

TorchPieces::TorchPieces(ForeignIndex& index, uint32_t file, uint64_t begin_bytes,
                         const TorchFile& torch_file)
    : index_(index),
      file_(file),
      begin_bytes_(begin_bytes),
      torch_file_(torch_file),
      extents_(torch_file.storages().size(), kNone) {}

uint32_t TorchPieces::ExtentOf(const TorchTensor& tensor) {
  uint32_t& extent = extents_[tensor.storage];
  if (extent == kNone) {
    const TorchStorage& storage = torch_file_.storages()[tensor.storage];
    extent = index_.AddRaw(file_, begin_bytes_ + storage.offset, storage.bytes);
  }
  return extent;
}

ForeignPiece TorchPieces::PieceOf(const Piece& piece, const TorchTensor& tensor) {
  ForeignPiece foreign;
  foreign.piece = piece;
  foreign.extent = ExtentOf(tensor);
  foreign.offset_bytes = tensor.offset * ElementBytes(tensor.dtype);
  foreign.byte_order = torch_file_.big_endian() ? ByteOrder::kBig : ByteOrder::kLittle;
  foreign.conjugate = tensor.conj;
  foreign.negate = tensor.neg;
  return foreign;
}

absl::Status TorchPieces::Add(const Piece& piece, const TorchTensor& tensor) {
  const TensorState& state = index_.tensor_states[piece.tensor_state];
  if (tensor.dtype != state.dtype || tensor.ElementCount() != piece.ElementCount()) {
    return absl::DataLossError(absl::StrFormat("%s: %s: expected %d elements of %s, found %d of %s",
                                               torch_file_.name(), Describe(state),
                                               piece.ElementCount(), DtypeName(state.dtype),
                                               tensor.ElementCount(), DtypeName(tensor.dtype)));
  }
  if (piece.ElementCount() == 0) return absl::OkStatus();
  ForeignPiece foreign = PieceOf(piece, tensor);
  if (!tensor.IsContiguous()) {
    const std::span<const uint64_t> sizes = SizesOf(foreign, index_);
    uint64_t elements = 1;
    for (const uint64_t size : sizes) elements *= size;
    if (!std::equal(sizes.begin(), sizes.end(), tensor.shape.begin(), tensor.shape.end()) ||
        piece.begin != 0 || piece.end != elements) {
      return absl::UnimplementedError(absl::StrFormat(
          "%s: %s: expected a contiguous tensor, or one of the shape of its box: found strides",
          torch_file_.name(), Describe(state)));
    }
    foreign.strides = static_cast<uint32_t>(index_.strides.size());
    index_.strides.push_back(tensor.strides);
  }
  index_.pieces.push_back(foreign);
  return absl::OkStatus();
}

absl::Status TorchPieces::AddRange(const Piece& piece, const TorchTensor& tensor,
                                   uint64_t first_element) {
  const TensorState& state = index_.tensor_states[piece.tensor_state];
  const uint64_t available = tensor.ElementCount();
  if (tensor.dtype != state.dtype || first_element > available ||
      piece.ElementCount() > available - first_element) {
    return absl::DataLossError(
        absl::StrFormat("%s: %s: expected %d elements of %s at %d, found a tensor of %d of %s",
                        torch_file_.name(), Describe(state), piece.ElementCount(),
                        DtypeName(state.dtype), first_element, available, DtypeName(tensor.dtype)));
  }
  if (piece.ElementCount() == 0) return absl::OkStatus();
  if (!tensor.IsContiguous()) {
    return absl::UnimplementedError(
        absl::StrFormat("%s: %s: expected a contiguous tensor, found strides", torch_file_.name(),
                        Describe(state)));
  }
  ForeignPiece foreign = PieceOf(piece, tensor);
  foreign.offset_bytes += first_element * ElementBytes(tensor.dtype);
  index_.pieces.push_back(foreign);
  return absl::OkStatus();
}

absl::StatusOr<uint32_t> TorchPieces::AddWhole(std::string name, std::string state,
                                               const TorchTensor& tensor) {
  TensorState made;
  made.tensor = std::move(name);
  made.state = std::move(state);
  made.dtype = tensor.dtype;
  made.shape = tensor.shape;
  const uint32_t number = index_.AddState(std::move(made));
  Piece piece;
  piece.tensor_state = number;
  piece.end = tensor.ElementCount();
  RETURN_IF_ERROR(Add(piece, tensor));
  return number;
}

}  // namespace holdfast::converter
