// A strict, bounded reader of Python's pickles, for bytes that we do not trust. A pickle is a
// program: it builds values, and it may find a class by name and call it. This reader finds and
// calls nothing, so reading cannot run code. What names or calls something (GLOBAL, REDUCE, NEWOBJ,
// BUILD, a persistent id) is either refused by name, for dumps that have no need of it, or becomes
// an inert node that says what would have happened: a global is its module and name, an object is
// whom to call, with which arguments, and which state, items and entries it was given.
//
// Protocols 1 to 5 (Lib/pickletools.py; protocol 0 is recognised and refused), one pickle. Always
// refused: INST and OBJ (protocol 0's objects), EXT* (a registry that is not in the file), PERSID,
// STRING and UNICODE (protocol 0's text), NEXT_BUFFER and READONLY_BUFFER (data outside of the
// file). A dict is what Python would make of it: the last value of a key counts, at the place of
// the first.
//
// Memory is bounded by a small multiple of the bytes: a value takes 16 bytes, a container 4 more
// for each value in it, and texts stay where they are. Values may be shared (a memo, exponentially:
// forty levels of lists that hold the one below ten times), and a list may even hold itself:
// whoever walks a document does so by a form of known depth, or by PickleDocument::Walk, which sees
// each value once. Equal integers, and empty tuples, may be one value, as they are in Python.
#ifndef HOLDFAST_BASE_PICKLE_READER_H_
#define HOLDFAST_BASE_PICKLE_READER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace holdfast {

class PickleDocument;

inline constexpr size_t kPickleNameBytesMax = size_t{1} << 20;  // of a global's module or name
inline constexpr size_t kPickleIntegerDigitsMax = 4300;         // decimal ones, as Python's default

struct PickleOptions {
  size_t bytes_max = size_t{64} << 20;  // above 1 GiB counts as 1 GiB
  size_t values_max = 4'000'000;        // of the whole document; above 2^28 counts as 2^28
  size_t depth_max = 64;                // of containers that are being built (marks)
  enum class Classes : uint8_t { kRefused, kOpaque };
  Classes classes = Classes::kRefused;
  // kAllowed: bytes may follow the pickle, and consumed_bytes() says where; and bytes that end
  // before it does are kOutOfRange, not kInvalidArgument, so that the caller can try with more.
  enum class Following : uint8_t { kRefused, kAllowed };
  Following following = Following::kRefused;
};

// A value of a parsed document, immutable. Accessors return kInvalidArgument that says what was
// expected and what was found. The names are those of JsonValue, so that one template reads both.
//
// Threads: any, once parsed. Lifetime: refers to its document, which outlives it.
class PickleValue {
 public:
  enum class Type : uint8_t {
    kNone,
    kBool,
    kInteger,
    kFloat,
    kString,  // UTF-8, in which surrogates may stand alone (Python's "surrogatepass") if kOpaque
    kBytes,   // also of protocol 1 and 2's BINSTRING, if it is no UTF-8
    kList,
    kDict,
    kTuple,
    kSet,
    kFrozenSet,
    kByteArray,
    kBigInteger,  // does not fit int64_t
    // Only with Classes::kOpaque:
    kGlobal,      // module(), name()
    kObject,      // callee(), args(), ...
    kPersistent,  // persistent_id()
  };

  // An absent value: present() is false and every accessor refuses it.
  PickleValue() = default;

  bool present() const { return document_ != nullptr; }
  Type type() const;  // CHECKs present()
  bool Is(Type asked) const { return present() && type() == asked; }
  absl::StatusOr<bool> Bool() const;
  absl::StatusOr<int64_t> Int64() const;    // integers that fit
  absl::StatusOr<uint64_t> Uint64() const;  // those that are not negative
  absl::StatusOr<double> Double() const;    // floats and integers, big ones excepted
  absl::StatusOr<std::string_view> String() const;
  absl::StatusOr<std::string_view> Bytes() const;  // bytes and bytearrays
  // Of a big integer: two's complement, little-endian.
  absl::StatusOr<std::string_view> BigInteger() const;

  // Lists, tuples and sets (in the order in which the pickle adds to them).
  absl::StatusOr<size_t> ArraySize() const;
  PickleValue operator[](size_t index) const;  // CHECKs that this is one and index < size

  // Dicts. Find: the value of this key, else absent. Keys: those that are strings, in the order of
  // the entries. Find takes O(log entries).
  PickleValue Find(std::string_view key) const;
  absl::StatusOr<std::vector<std::string_view>> Keys() const;
  // Entries with keys of any kind; Key and Entry CHECK that this is a dict and index < count.
  absl::StatusOr<size_t> EntryCount() const;
  PickleValue Key(size_t index) const;
  PickleValue Entry(size_t index) const;

  // Globals: "" of anything else.
  std::string_view module() const;
  std::string_view name() const;
  bool IsGlobal(std::string_view module, std::string_view name) const;

  // Objects: absent of anything else, and where the pickle gave none.
  enum class Making : uint8_t { kReduce, kNew };
  Making making() const;        // REDUCE: callee(*args); NEWOBJ: callee.__new__(callee, *args)
  PickleValue callee() const;   // a global, an object or a persistent id
  PickleValue args() const;     // a tuple
  PickleValue kwargs() const;   // a dict; only NEWOBJ_EX gives any
  PickleValue state() const;    // of the last BUILD
  size_t state_count() const;   // BUILDs
  PickleValue items() const;    // a list: what was appended to the object
  PickleValue entries() const;  // a dict: what was set in the object
  // An object whose callee is this global.
  bool IsCallOf(std::string_view module, std::string_view name) const;

  PickleValue persistent_id() const;  // of kPersistent, else absent

  // The same number for the same object of a document; less than its value_count().
  uint32_t number() const { return node_; }

  // kInvalidArgument `pickle: expected <expected>, found <this value>`; kPermissionDenied if this
  // is a global, object or persistent id, which it names: its content would be needed.
  absl::Status Mismatch(std::string_view expected) const;
  // `a list`, `an object of os.system`, `nothing`: for errors; bounded.
  std::string Describe() const;

 private:
  friend class PickleDocument;
  PickleValue(const PickleDocument* document, uint32_t node) : document_(document), node_(node) {}
  PickleValue PartAt(uint8_t part) const;

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
  // kPermissionDenied (an opcode that could run code, by its name), kOutOfRange (see Following).
  static absl::StatusOr<std::unique_ptr<PickleDocument>> Parse(std::string bytes,
                                                               const PickleOptions& options = {});
  PickleValue root() const { return PickleValue(this, root_); }
  size_t value_count() const { return nodes_.size(); }
  size_t consumed_bytes() const { return consumed_bytes_; }

  // Calls `visit` for the root and for all that it holds, arguments and states of objects included:
  // each value once, however often it is shared, whatever holds itself; before what it holds.
  // kSkip: not into this one. kStop: the end.
  enum class Step : uint8_t { kInto, kSkip, kStop };
  void Walk(absl::FunctionRef<Step(PickleValue)> visit) const;

 private:
  friend class PickleValue;
  friend class PickleBuilder;
  friend class PickleMachine;

  struct Range {
    uint32_t begin;
    uint32_t length;
  };
  struct Call {
    uint32_t callee;
    uint32_t args;
  };
  struct Node {
    union {
      Range range = {0, 0};  // of texts and modules in text_; of what containers hold in children_
      int64_t integer;       // kBool, kInteger
      double real;           // kFloat
      Call call;             // kObject
      uint32_t id;           // kPersistent
    };
    // Containers: the room in children_, where a dict's are key, value, key, value ...; kGlobal:
    // the name's number in names_; kObject: the state, or, if it is extended, where in children_
    // its parts stand from kKwargs on.
    uint32_t more = 0;
    PickleValue::Type type{};
    PickleValue::Making making{};
    bool is_extended = false;
  };
  static_assert(sizeof(Node) == 16);

  // Parts of an object. Most have the first two and a state; those with others are extended. The
  // last one is the number of BUILDs.
  enum Part : uint8_t { kCallee, kArgs, kKwargs, kState, kItems, kEntries, kBuilds, kPartCount };
  static constexpr size_t kExtensionLength = kPartCount - kKwargs;
  static constexpr uint32_t kNoNode = UINT32_MAX;

  PickleDocument() = default;
  PickleValue ValueAt(uint32_t number) const { return PickleValue(this, number); }
  std::string_view TextOf(const Node& node) const;
  uint32_t PartOf(const Node& object, Part part) const;
  void MakeDictsUnique();
  bool HasFewDifferentStrings(const Node& dict) const;
  void MakeDictUnique(uint32_t dict);
  int CompareKeys(uint32_t a, uint32_t b) const;
  uint32_t FindEntry(uint32_t dict, std::string_view key) const;

  std::string text_;  // the pickle; behind it, integers that it has in decimal
  size_t consumed_bytes_ = 0;
  std::vector<Node> nodes_;
  std::vector<uint32_t> children_;
  std::vector<Range> names_;  // of globals, in text_
  // Of dicts with many entries: places of the string keys in children_, sorted by key.
  std::unordered_map<uint32_t, std::vector<uint32_t>> sorted_keys_;
  uint32_t root_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_BASE_PICKLE_READER_H_
