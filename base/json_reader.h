// A strict, bounded reader of JSON (RFC 8259) for bytes that we do not trust: manifests, layout
// documents, foreign headers. Refuses what lenient readers let pass: duplicate keys, trailing
// bytes, invalid UTF-8, lone surrogates, numbers outside the asked type, too much depth, too many
// values. Does not write JSON: output goes through nlohmann-json.
#ifndef HOLDFAST_BASE_JSON_READER_H_
#define HOLDFAST_BASE_JSON_READER_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace holdfast {

struct JsonLimits {
  size_t bytes_max = size_t{64} << 20;
  size_t values_max = 20'000'000;  // of the whole document
  int depth_max = 32;
};

// A value of a parsed document, immutable. Accessors return kInvalidArgument that names the path
// (`tensors[3].shape`), what was expected and what was found.
//
// Threads: any, once parsed. Lifetime: refers to its document (JsonDocument), which outlives it.
class JsonValue {
 public:
  enum class Type { kNull, kBool, kNumber, kString, kArray, kObject };

  Type type() const;
  absl::StatusOr<bool> Bool() const;
  absl::StatusOr<uint64_t> Uint64() const;  // integers only: 1.0 and 1e3 are refused
  absl::StatusOr<int64_t> Int64() const;
  absl::StatusOr<double> Double() const;
  absl::StatusOr<std::string_view> String() const;

  // Arrays.
  absl::StatusOr<size_t> ArraySize() const;
  JsonValue operator[](size_t index) const;  // CHECKs that this is an array and index < size

  // Objects. Get: kInvalidArgument if the member is absent; Find: an empty optional-like value
  // whose `present()` is false. Keys in document order.
  absl::StatusOr<JsonValue> Get(std::string_view key) const;
  JsonValue Find(std::string_view key) const;
  bool present() const;
  absl::StatusOr<std::vector<std::string_view>> Keys() const;

  // OK if this is an object whose keys are all in `known`; else names the first unknown key and the
  // nearest known one ("did you mean").
  absl::Status ExpectKeys(std::initializer_list<std::string_view> known) const;

  // `tensors[3].shape`; the document itself is `$`.
  std::string Path() const;

 private:
  friend class JsonDocument;
  // The implementer of base/json_reader.cc chooses the representation (an index into a flat table
  // of nodes, so that 100,000 tensors parse in well under a second and in bounded memory).
  const class JsonDocument* document_ = nullptr;
  uint32_t node_ = 0;
};

// Threads: any, once parsed. Lifetime: owns the text and all values.
class JsonDocument {
 public:
  // Errors: kInvalidArgument with line and column, what was expected and what was found.
  static absl::StatusOr<std::unique_ptr<JsonDocument>> Parse(std::string text,
                                                             const JsonLimits& limits = {});
  JsonValue root() const;

 private:
  friend class JsonValue;
};

}  // namespace holdfast

#endif  // HOLDFAST_BASE_JSON_READER_H_
