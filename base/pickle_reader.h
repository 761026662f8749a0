// A strict, bounded reader of the harmless part of Python's pickles, for bytes that we do not
// trust: None, booleans, integers, floats, strings, bytes, lists, tuples and dicts. A pickle is a
// program; this one runs only the opcodes that build such values. Whatever names a class or calls
// anything (GLOBAL, REDUCE, BUILD, PERSID, ...) is refused by name, so that reading cannot run
// code.
//
// Protocols 2 to 5, one pickle, nothing behind it. Strings stay in the document's text. Memory is
// bounded by a small multiple of the bytes; values may be shared (a memo), and a list may even hold
// itself: whoever walks a document does so by a form of known depth.
#ifndef HOLDFAST_BASE_PICKLE_READER_H_
#define HOLDFAST_BASE_PICKLE_READER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace holdfast {

class PickleDocument;

struct PickleLimits {
  size_t bytes_max = size_t{64} << 20;
  size_t values_max = 4'000'000;  // of the whole document
  size_t depth_max = 64;          // of containers that are being built
};

// A value of a parsed document, immutable. Accessors return kInvalidArgument that says what was
// expected and what was found. The names are those of JsonValue, so that one template reads both.
//
// Threads: any, once parsed. Lifetime: refers to its document, which outlives it.
class PickleValue {
 public:
  enum class Type : uint8_t { kNone, kBool, kInteger, kFloat, kString, kBytes, kList, kDict };

  // An absent value: present() is false and every accessor refuses it.
  PickleValue() = default;

  bool present() const { return document_ != nullptr; }
  Type type() const;  // CHECKs present()
  absl::StatusOr<bool> Bool() const;
  absl::StatusOr<int64_t> Int64() const;    // integers that fit
  absl::StatusOr<uint64_t> Uint64() const;  // those that are not negative
  absl::StatusOr<double> Double() const;    // floats and integers
  absl::StatusOr<std::string_view> String() const;

  // Lists and tuples.
  absl::StatusOr<size_t> ArraySize() const;
  PickleValue operator[](size_t index) const;  // CHECKs that this is one and index < size

  // Dicts. Find: the value of the last entry with this string as key, else absent. Keys: those that
  // are strings, in the order of the entries. O(entries).
  PickleValue Find(std::string_view key) const;
  absl::StatusOr<std::vector<std::string_view>> Keys() const;

 private:
  friend class PickleDocument;
  PickleValue(const PickleDocument* document, uint32_t node) : document_(document), node_(node) {}
  absl::Status Mismatch(std::string_view expected) const;

  const PickleDocument* document_ = nullptr;
  uint32_t node_ = 0;
};

// Threads: any, once parsed. Lifetime: owns the text and all values; not movable, because values
//   point to it.
class PickleDocument {
 public:
  PickleDocument(const PickleDocument&) = delete;
  PickleDocument& operator=(const PickleDocument&) = delete;

  // Errors, all with the offset: kInvalidArgument (no pickle, truncated, beyond a limit),
  // kPermissionDenied (an opcode that could run code, by its name).
  static absl::StatusOr<std::unique_ptr<PickleDocument>> Parse(std::string bytes,
                                                               const PickleLimits& limits = {});
  PickleValue root() const { return PickleValue(this, root_); }

 private:
  friend class PickleValue;
  friend class PickleMachine;

  struct Node {
    PickleValue::Type type{};
    int64_t integer = 0;  // kBool, kInteger; strings and bytes: offset in the text
    double real = 0;      // kFloat; strings and bytes: unused
    size_t length = 0;    // strings and bytes
    // kList: the items; kDict: key, value, key, value ...
    std::vector<uint32_t> children = {};
  };

  PickleDocument() = default;

  std::string text_;
  std::vector<Node> nodes_;
  uint32_t root_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_BASE_PICKLE_READER_H_
