#include "converter/safetensors.h"

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <numeric>
#include <unordered_map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/json_reader.h"
#include "base/status_macros.h"

namespace holdfast::converter {
namespace {

constexpr uint64_t kLengthBytes = 8;

struct Type {
  std::string_view name;
  uint32_t bits;
  std::optional<Dtype> dtype;
};

constexpr std::array<Type, 22> kTypes = {{
    {"BOOL", 8, Dtype::kBool},
    {"F4", 4, Dtype::kFloat4E2m1fnX2},
    {"F6_E2M3", 6, std::nullopt},
    {"F6_E3M2", 6, std::nullopt},
    {"U8", 8, Dtype::kUint8},
    {"I8", 8, Dtype::kInt8},
    {"F8_E5M2", 8, Dtype::kFloat8E5m2},
    {"F8_E4M3", 8, Dtype::kFloat8E4m3fn},
    {"F8_E8M0", 8, Dtype::kFloat8E8m0fnu},
    {"F8_E4M3FNUZ", 8, Dtype::kFloat8E4m3fnuz},
    {"F8_E5M2FNUZ", 8, Dtype::kFloat8E5m2fnuz},
    {"I16", 16, Dtype::kInt16},
    {"U16", 16, Dtype::kUint16},
    {"F16", 16, Dtype::kFloat16},
    {"BF16", 16, Dtype::kBfloat16},
    {"I32", 32, Dtype::kInt32},
    {"U32", 32, Dtype::kUint32},
    {"F32", 32, Dtype::kFloat32},
    {"C64", 64, Dtype::kComplex64},
    {"F64", 64, Dtype::kFloat64},
    {"I64", 64, Dtype::kInt64},
    {"U64", 64, Dtype::kUint64},
}};

const Type* FindType(std::string_view name) {
  for (const Type& type : kTypes) {
    if (type.name == name) return &type;
  }
  return nullptr;
}

absl::Status Damaged(std::string_view file, std::string_view text) {
  return absl::DataLossError(absl::StrFormat("%s: %s", file, text));
}

// Reads one header. Errors are texts behind the file's name.
class HeaderParser {
 public:
  HeaderParser(std::string_view name, uint64_t data_offset, uint64_t file_bytes)
      : name_(name), data_offset_(data_offset), file_bytes_(file_bytes) {}

  absl::StatusOr<SafetensorsHeader> Parse(const JsonValue& root) {
    const auto keys = root.Keys();
    if (!keys.ok()) return Wrong(keys.status());
    bool metadata_seen = false;
    for (size_t i = 0; i < keys->size(); ++i) {
      if ((*keys)[i] == "__metadata__") {
        if (metadata_seen) return Damaged(name_, "the header has __metadata__ twice");
        metadata_seen = true;
        RETURN_IF_ERROR(ReadMetadata(root.Member(i)));
      } else {
        RETURN_IF_ERROR(ReadTensor((*keys)[i], root.Member(i)));
      }
    }
    RETURN_IF_ERROR(CheckNames());
    RETURN_IF_ERROR(CheckOffsets());
    return std::move(header_);
  }

 private:
  absl::Status Wrong(const absl::Status& status) const {
    return Damaged(name_, absl::StrCat("header: ", status.message()));
  }

  absl::Status ReadMetadata(const JsonValue& value) {
    if (value.type() == JsonValue::Type::kNull) return absl::OkStatus();
    const auto keys = value.Keys();
    if (!keys.ok()) return Wrong(keys.status());
    header_.has_metadata = true;
    std::unordered_map<std::string_view, size_t> places;
    for (size_t i = 0; i < keys->size(); ++i) {
      const auto text = value.Member(i).String();
      if (!text.ok()) return Wrong(text.status());
      // Of a key that is there twice the last one counts, as in the library.
      const auto [place, is_new] = places.emplace((*keys)[i], header_.metadata.size());
      if (is_new) {
        header_.metadata.emplace_back((*keys)[i], *text);
      } else {
        header_.metadata[place->second].second = *text;
      }
    }
    return absl::OkStatus();
  }

  absl::Status ReadTensor(std::string_view tensor_name, const JsonValue& value) {
    JsonValue dtype;
    JsonValue shape;
    JsonValue offsets;
    if (value.type() == JsonValue::Type::kArray) {  // the library takes a struct as a list, too
      ASSIGN_OR_RETURN(const size_t size, value.ArraySize());
      if (size != 3) return Wrong(value.Mismatch("dtype, shape and data_offsets"));
      dtype = value[0];
      shape = value[1];
      offsets = value[2];
    } else {
      const auto keys = value.Keys();
      if (!keys.ok()) return Wrong(keys.status());
      for (size_t i = 0; i < keys->size(); ++i) {
        JsonValue* const field = (*keys)[i] == "dtype"          ? &dtype
                                 : (*keys)[i] == "shape"        ? &shape
                                 : (*keys)[i] == "data_offsets" ? &offsets
                                                                : nullptr;
        if (field == nullptr) continue;
        if (field->present()) {
          return Damaged(name_, absl::StrFormat("tensor %s has the field %s twice",
                                                JsonQuote(tensor_name), (*keys)[i]));
        }
        *field = value.Member(i);
      }
      for (const auto& [field, what] :
           {std::pair{&dtype, "dtype"}, {&shape, "shape"}, {&offsets, "data_offsets"}}) {
        if (!field->present()) {
          return Damaged(name_, absl::StrFormat("tensor %s: expected the field %s, found none",
                                                JsonQuote(tensor_name), what));
        }
      }
    }
    return AddTensor(tensor_name, dtype, shape, offsets);
  }

  absl::Status AddTensor(std::string_view tensor_name, const JsonValue& dtype,
                         const JsonValue& shape, const JsonValue& offsets) {
    SafetensorsTensor tensor;
    tensor.name = tensor_name;
    const auto dtype_name = dtype.String();
    if (!dtype_name.ok()) return Wrong(dtype_name.status());
    const Type* const type = FindType(*dtype_name);
    if (type == nullptr) {
      return Damaged(name_, absl::StrFormat("tensor %s: expected a dtype of safetensors, found %s",
                                            JsonQuote(tensor_name), JsonQuote(*dtype_name)));
    }
    tensor.dtype = *dtype_name;
    const auto dims = shape.ArraySize();
    if (!dims.ok()) return Wrong(dims.status());
    tensor.shape.reserve(*dims);
    // One after the other, as the library multiplies: a zero before what is too much makes it 0.
    uint64_t bits = 1;
    bool fits = true;
    for (size_t d = 0; d < *dims; ++d) {
      const auto size = shape[d].Uint64();
      if (!size.ok()) return Wrong(size.status());
      tensor.shape.push_back(*size);
      fits = fits && !__builtin_mul_overflow(bits, *size, &bits);
    }
    fits = fits && !__builtin_mul_overflow(bits, uint64_t{type->bits}, &bits);
    if (!fits) {
      return Damaged(name_, absl::StrFormat("tensor %s: shape [%s] of %s has more than 2^64 bits",
                                            JsonQuote(tensor_name),
                                            absl::StrJoin(tensor.shape, ", "), tensor.dtype));
    }
    if (bits % 8 != 0) {
      return Damaged(name_, absl::StrFormat("tensor %s: shape [%s] of %s ends inside a byte",
                                            JsonQuote(tensor_name),
                                            absl::StrJoin(tensor.shape, ", "), tensor.dtype));
    }
    tensor.bytes = bits / 8;
    const auto count = offsets.ArraySize();
    if (!count.ok()) return Wrong(count.status());
    if (*count != 2) return Wrong(offsets.Mismatch("two offsets"));
    const auto begin = offsets[0].Uint64();
    if (!begin.ok()) return Wrong(begin.status());
    const auto end = offsets[1].Uint64();
    if (!end.ok()) return Wrong(end.status());
    if (*begin > *end || *end - *begin != tensor.bytes) {
      return Damaged(
          name_, absl::StrFormat("tensor %s: expected %d bytes for shape [%s] of %s, found the "
                                 "offsets [%d, %d)",
                                 JsonQuote(tensor_name), tensor.bytes,
                                 absl::StrJoin(tensor.shape, ", "), tensor.dtype, *begin, *end));
    }
    tensor.offset_bytes = *begin;  // of the data until CheckOffsets
    header_.tensors.push_back(std::move(tensor));
    return absl::OkStatus();
  }

  // The specification disallows them; the library takes the last, others the first.
  absl::Status CheckNames() const {
    std::vector<std::string_view> names;
    names.reserve(header_.tensors.size());
    for (const SafetensorsTensor& tensor : header_.tensors) names.push_back(tensor.name);
    std::sort(names.begin(), names.end());
    const auto twice = std::adjacent_find(names.begin(), names.end());
    if (twice == names.end()) return absl::OkStatus();
    return Damaged(name_, absl::StrFormat("the header has the tensor %s twice; the specification "
                                          "disallows it, and readers disagree which one counts",
                                          JsonQuote(*twice)));
  }

  absl::Status CheckOffsets() {
    std::sort(header_.tensors.begin(), header_.tensors.end(),
              [](const SafetensorsTensor& a, const SafetensorsTensor& b) {
                return std::pair(a.offset_bytes, a.bytes) < std::pair(b.offset_bytes, b.bytes);
              });
    uint64_t end = 0;
    for (SafetensorsTensor& tensor : header_.tensors) {
      if (tensor.offset_bytes != end) {
        return Damaged(name_, absl::StrFormat("tensor %s: expected it to begin at offset %d, where "
                                              "the one before it ends, found %d",
                                              JsonQuote(tensor.name), end, tensor.offset_bytes));
      }
      if (tensor.bytes > file_bytes_ - data_offset_ - end) {
        return Damaged(name_, absl::StrFormat("tensor %s: expected its %d bytes from offset %d on, "
                                              "found %d bytes of data",
                                              JsonQuote(tensor.name), tensor.bytes, end,
                                              file_bytes_ - data_offset_));
      }
      tensor.offset_bytes += data_offset_;
      end += tensor.bytes;
    }
    if (end == file_bytes_ - data_offset_) return absl::OkStatus();
    return Damaged(name_, absl::StrFormat("expected %d bytes of data, as its tensors have, found "
                                          "%d",
                                          end, file_bytes_ - data_offset_));
  }

  const std::string_view name_;
  const uint64_t data_offset_;
  const uint64_t file_bytes_;
  SafetensorsHeader header_;
};

uint64_t Load(std::string_view bytes) {
  uint64_t value = 0;
  for (size_t i = bytes.size(); i-- > 0;) value = value << 8 | static_cast<uint8_t>(bytes[i]);
  return value;
}

// The library's save_model writes only one name of tied weights and says in the metadata which:
// {dropped: kept}. Beside other text, so only what fits counts.
void AddTied(const SafetensorsHeader& header, ForeignIndex& index) {
  const auto has = [&](std::string_view key, std::string_view value) {
    return std::find(header.metadata.begin(), header.metadata.end(),
                     std::pair<std::string, std::string>(key, value)) != header.metadata.end();
  };
  if (!has("format", "pt")) return;
  std::unordered_map<std::string_view, uint32_t> states;
  const size_t count = index.tensor_states.size();
  index.tensor_states.reserve(count + header.metadata.size());  // the views stay good
  for (uint32_t i = 0; i < count; ++i) states.emplace(index.tensor_states[i].tensor, i);
  for (const auto& [dropped, kept] : header.metadata) {
    const auto of = states.find(kept);
    if (of == states.end() || states.contains(dropped) || dropped == "format") continue;
    TensorState state = index.tensor_states[of->second];
    state.tensor = dropped;
    const uint32_t alias = index.AddState(std::move(state));
    ForeignPiece piece = index.pieces[of->second];  // every state has one, at its own number
    piece.piece.tensor_state = alias;
    index.pieces.push_back(piece);
    states.emplace(dropped, alias);
    index.aliases.push_back({alias, of->second});
  }
}

}  // namespace

absl::StatusOr<bool> LooksLikeSafetensors(const ForeignFolder& folder, uint32_t file) {
  ASSIGN_OR_RETURN(const std::string head, folder.ReadHead(file, 64));
  if (head.size() < kLengthBytes + 2) return false;
  const uint64_t header_bytes = Load(std::string_view(head).substr(0, kLengthBytes));
  if (header_bytes > folder.files()[file].bytes - kLengthBytes) return false;
  const size_t first = head.find_first_not_of(" \t\r\n", kLengthBytes);
  return first != std::string::npos && head[first] == '{';
}

absl::StatusOr<SafetensorsHeader> ReadSafetensorsHeader(const ForeignFolder& folder,
                                                        uint32_t file) {
  const FolderFile& info = folder.files()[file];
  if (info.bytes < kLengthBytes) {
    return Damaged(info.path, absl::StrFormat("expected at least 8 bytes, found %d", info.bytes));
  }
  ASSIGN_OR_RETURN(const std::string length, folder.ReadHead(file, kLengthBytes));
  const uint64_t header_bytes = Load(length);
  if (header_bytes > kSafetensorsHeaderBytesMax) {
    return Damaged(info.path, absl::StrFormat("expected a header of at most %d bytes, found %d",
                                              kSafetensorsHeaderBytesMax, header_bytes));
  }
  if (header_bytes > info.bytes - kLengthBytes) {
    return Damaged(info.path, absl::StrFormat("expected a header of %d bytes, found %d bytes "
                                              "behind its length",
                                              header_bytes, info.bytes - kLengthBytes));
  }
  std::string text(header_bytes, '\0');
  RETURN_IF_ERROR(folder.ReadAt(file, kLengthBytes, std::as_writable_bytes(std::span(text))));
  return ParseSafetensorsHeader(std::move(text), info.bytes, info.path);
}

absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string text, uint64_t file_bytes,
                                                         std::string_view name) {
  const uint64_t data_offset = kLengthBytes + text.size();
  const auto document =
      JsonDocument::Parse(std::move(text), {.bytes_max = kSafetensorsHeaderBytesMax,
                                            .values_max = 40'000'000,
                                            .depth_max = 127,
                                            .duplicates = JsonDuplicates::kKeep});
  if (!document.ok()) {
    return Damaged(name, absl::StrCat("header: ", document.status().message()));
  }
  return HeaderParser(name, data_offset, file_bytes).Parse((*document)->root());
}

std::optional<Dtype> DtypeOfSafetensors(std::string_view name) {
  const Type* const type = FindType(name);
  return type == nullptr ? std::nullopt : type->dtype;
}

std::optional<std::string_view> SafetensorsDtype(Dtype dtype) {
  for (const Type& type : kTypes) {
    if (type.dtype == dtype) return type.name;
  }
  return std::nullopt;
}

void AddSafetensor(const SafetensorsTensor& tensor, uint32_t file, std::string_view state,
                   ForeignIndex& index) {
  const std::optional<Dtype> dtype = DtypeOfSafetensors(tensor.dtype);
  std::vector<uint64_t> shape = tensor.shape;
  bool whole = dtype.has_value();
  if (dtype == Dtype::kFloat4E2m1fnX2) {
    whole = !shape.empty() && shape.back() % 2 == 0;
    if (whole) shape.back() /= 2;
  }
  if (!whole) {
    index.unreadable.push_back(
        {tensor.name, absl::StrFormat("is of dtype %s and shape [%s], for which there is no dtype "
                                      "here",
                                      tensor.dtype, absl::StrJoin(tensor.shape, ", "))});
    return;
  }
  const uint32_t number =
      index.AddState({tensor.name, std::string(state), *dtype, std::move(shape)});
  index.AddWholePiece(number, index.AddRaw(file, tensor.offset_bytes, tensor.bytes), 0);
}

absl::StatusOr<bool> RecognizesSafetensors(const ForeignFolder& folder) {
  if (folder.files().size() != 1) return false;
  if (folder.files()[0].path.ends_with(".safetensors")) return true;
  return LooksLikeSafetensors(folder, 0);
}

absl::StatusOr<ForeignIndex> ReadSafetensors(const ForeignFolder& folder, const ReadOptions&) {
  ASSIGN_OR_RETURN(const SafetensorsHeader header, ReadSafetensorsHeader(folder, 0));
  ForeignIndex index;
  for (const SafetensorsTensor& tensor : header.tensors) AddSafetensor(tensor, 0, "tensor", index);
  AddTied(header, index);
  if (header.has_metadata) {
    const auto member = [](std::string* out, const std::pair<std::string, std::string>& entry) {
      absl::StrAppend(out, JsonQuote(entry.first), ": ", JsonQuote(entry.second));
    };
    index.scalars.push_back(
        {"metadata", absl::StrCat("{", absl::StrJoin(header.metadata, ", ", member), "}")});
  }
  return index;
}

}  // namespace holdfast::converter
