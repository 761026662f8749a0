#include "converter/names_file.h"

#include <memory>
#include <unordered_set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/json_reader.h"
#include "base/status_macros.h"
#include "format/tensor_piece.h"

namespace holdfast::converter {
namespace {

// Of a unit's elements: sums of two of them do not overflow.
constexpr uint64_t kElementsMax = kTensorBytesMax;

absl::StatusOr<uint64_t> ReadCount(const JsonValue& value) {
  ASSIGN_OR_RETURN(const uint64_t count, value.Uint64());
  if (count > kElementsMax) return value.Mismatch(absl::StrCat("at most ", kElementsMax));
  return count;
}

absl::StatusOr<FlatPiece> ReadPiece(const JsonValue& value) {
  FlatPiece piece;
  ASSIGN_OR_RETURN(const JsonValue name, value.Get("name"));
  ASSIGN_OR_RETURN(piece.name, name.String());
  ASSIGN_OR_RETURN(const JsonValue shape, value.Get("shape"));
  ASSIGN_OR_RETURN(const size_t dims, shape.ArraySize());
  if (dims > kTensorDimsMax) return shape.Mismatch(absl::StrCat(kTensorDimsMax, " dimensions"));
  piece.count = 1;
  for (size_t d = 0; d < dims; ++d) {
    ASSIGN_OR_RETURN(const uint64_t size, ReadCount(shape[d]));
    piece.shape.push_back(size);
    if (size != 0 && piece.count > kElementsMax / size) {
      return shape.Mismatch(absl::StrCat("at most ", kElementsMax, " elements"));
    }
    piece.count *= size;
  }
  if (const JsonValue numel = value.Find("numel"); numel.present()) {
    ASSIGN_OR_RETURN(const uint64_t count, numel.Uint64());
    if (count != piece.count)
      return numel.Mismatch(absl::StrCat(piece.count, ", as the shape has"));
  }
  return piece;
}

absl::StatusOr<FlatUnit> ReadUnit(const JsonValue& value) {
  FlatUnit unit;
  ASSIGN_OR_RETURN(const JsonValue name, value.Get("unit"));
  ASSIGN_OR_RETURN(unit.unit, name.String());
  ASSIGN_OR_RETURN(const JsonValue pieces, value.Get("pieces"));
  ASSIGN_OR_RETURN(const size_t count, pieces.ArraySize());
  uint64_t at = 0;
  for (size_t i = 0; i < count; ++i) {
    const JsonValue item = pieces[i];
    if (const JsonValue offset = item.Find("offset"); offset.present()) {
      ASSIGN_OR_RETURN(const uint64_t begin, ReadCount(offset));
      if (begin < at)
        return offset.Mismatch(absl::StrCat("at least ", at, ", where the last ends"));
      at = begin;
    }
    if (const JsonValue padding = item.Find("padding"); padding.present()) {
      ASSIGN_OR_RETURN(const uint64_t elements, ReadCount(padding));
      at += elements;
    } else {
      ASSIGN_OR_RETURN(FlatPiece piece, ReadPiece(item));
      piece.offset = at;
      at += piece.count;
      unit.end = at;
      unit.pieces.push_back(std::move(piece));
    }
    if (at > kElementsMax)
      return item.Mismatch(absl::StrCat("at most ", kElementsMax, " elements"));
  }
  return unit;
}

}  // namespace

absl::StatusOr<NamesFile> ParseNamesFile(std::string json) {
  NamesFile names;
  if (json.empty()) return names;
  ASSIGN_OR_RETURN(const std::unique_ptr<JsonDocument> document,
                   JsonDocument::Parse(std::move(json)));
  const JsonValue root = document->root();
  if (const JsonValue parameters = root.Find("parameters"); parameters.present()) {
    ASSIGN_OR_RETURN(const size_t count, parameters.ArraySize());
    std::unordered_set<std::string_view> seen;
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const std::string_view name, parameters[i].String());
      if (!seen.insert(name).second) return parameters[i].Mismatch("a name that is not there yet");
      names.parameters.emplace_back(name);
    }
  }
  if (const JsonValue units = root.Find("units"); units.present()) {
    ASSIGN_OR_RETURN(const size_t count, units.ArraySize());
    std::unordered_set<std::string> seen;
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(FlatUnit unit, ReadUnit(units[i]));
      for (const FlatPiece& piece : unit.pieces) {
        if (!seen.insert(piece.name).second) {
          return units[i].Mismatch(absl::StrCat("pieces of distinct names (not ", piece.name, ")"));
        }
      }
      names.units.push_back(std::move(unit));
    }
  }
  return names;
}

}  // namespace holdfast::converter
