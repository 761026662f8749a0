// A strict, bounded reader of JSON (RFC 8259) for bytes that we do not trust: manifests, layout
// documents, foreign headers. Refuses what lenient readers let pass: duplicate keys, trailing
// bytes, invalid UTF-8, lone surrogates, numbers outside the asked type, too much depth, too many
// values. Does not write JSON: output goes through nlohmann-json.
//
// A document is its text plus one flat table of 20-byte nodes, so that a layout of 100,000 tensors
// (20 MB) parses in a fraction of a second. Strings are decoded in place: a decoded string is never
// longer than its escaped form.
#ifndef HOLDFAST_BASE_JSON_READER_H_
#define HOLDFAST_BASE_JSON_READER_H_

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace holdfast {

class JsonDocument;

// What a key that an object has twice means. kKeep is for foreign formats that say more precisely
// which of them may be: Keys and Member have all, Find the last.
enum class JsonDuplicates { kRefuse, kKeep };

struct JsonLimits {
  size_t bytes_max = size_t{64} << 20;  // above 512 MiB counts as 512 MiB
  size_t values_max = 20'000'000;       // of the whole document
  int depth_max = 32;                   // of nested arrays and objects
  JsonDuplicates duplicates = JsonDuplicates::kRefuse;
};

// A value of a parsed document, immutable. Accessors return kInvalidArgument that names the path
// (`tensors[3].shape`), what was expected and what was found.
//
// Threads: any, once parsed. Lifetime: refers to its document (JsonDocument), which outlives it.
class JsonValue {
 public:
  enum class Type { kNull, kBool, kNumber, kString, kArray, kObject };

  // An absent value: present() is false and every accessor refuses it.
  JsonValue() = default;

  Type type() const;  // CHECKs present()
  absl::StatusOr<bool> Bool() const;
  absl::StatusOr<uint64_t> Uint64() const;  // integers only: 1.0 and 1e3 are refused
  absl::StatusOr<int64_t> Int64() const;
  absl::StatusOr<double> Double() const;  // any number in the range of a double
  absl::StatusOr<std::string_view> String() const;

  // Arrays.
  absl::StatusOr<size_t> ArraySize() const;
  JsonValue operator[](size_t index) const;  // CHECKs that this is an array and index < size

  // Objects. Get: kInvalidArgument if the member is absent or this is no object; Find: a value
  // whose present() is false then. Keys in document order. O(log members).
  absl::StatusOr<JsonValue> Get(std::string_view key) const;
  JsonValue Find(std::string_view key) const;
  bool present() const;
  absl::StatusOr<std::vector<std::string_view>> Keys() const;
  JsonValue Member(size_t index) const;  // of the key Keys()[index]; CHECKs that there is one

  // OK if this is an object whose keys are all in `known`; else names the first unknown key and the
  // nearest known one ("did you mean").
  absl::Status ExpectKeys(std::initializer_list<std::string_view> known) const;

  // `tensors[3].shape`; the document itself is `$`; a key that is no identifier is quoted:
  // `placements["my layer"]`.
  std::string Path() const;

  // kInvalidArgument `<path>: expected <expected>, found <this value>`, for callers that check more
  // than the type.
  absl::Status Mismatch(std::string_view expected) const;

 private:
  friend class JsonDocument;
  JsonValue(const JsonDocument* document, uint32_t node) : document_(document), node_(node) {}
  std::string Describe() const;

  const JsonDocument* document_ = nullptr;
  uint32_t node_ = 0;
};

// Threads: any, once parsed. Lifetime: owns the text and all values; not movable, because values
//   point to it.
class JsonDocument {
 public:
  JsonDocument(const JsonDocument&) = delete;
  JsonDocument& operator=(const JsonDocument&) = delete;

  // Errors: kInvalidArgument with line and column, what was expected and what was found.
  static absl::StatusOr<std::unique_ptr<JsonDocument>> Parse(std::string text,
                                                             const JsonLimits& limits = {});
  JsonValue root() const;

 private:
  friend class JsonValue;
  friend class JsonParser;

  // Children of an array or object are neighbours in nodes_, in document order.
  struct Node {
    uint32_t begin = 0;      // scalar: offset of its text; array, object: index of its first child
    uint32_t length = 0;     // scalar: bytes of its text; array, object: number of children
    uint32_t parent = 0;     // index; the root is its own parent
    uint32_t key_begin = 0;  // of a member: its decoded key
    uint32_t key_length : 29 = 0;
    uint32_t type : 3 = 0;
  };
  static_assert(sizeof(Node) == 20);

  JsonDocument() = default;
  std::string_view TextOf(const Node& node) const;
  std::string_view KeyOf(const Node& node) const;
  // Index of the member, or UINT32_MAX.
  uint32_t FindMember(const Node& object, std::string_view key) const;

  std::string text_;
  std::vector<Node> nodes_;  // the root is the last one
  // For objects with many members, by first child: indices of the members, sorted by key.
  std::unordered_map<uint32_t, std::vector<uint32_t>> sorted_members_;
};

}  // namespace holdfast

#endif  // HOLDFAST_BASE_JSON_READER_H_
