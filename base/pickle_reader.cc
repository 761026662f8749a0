#include "base/pickle_reader.h"

#include <array>
#include <bit>
#include <unordered_map>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/utf8.h"

namespace holdfast {
namespace {

constexpr std::array<std::string_view, 8> kTypeNames = {
    "None", "a boolean", "an integer", "a float", "a string", "bytes", "a list or tuple", "a dict"};

// Opcodes that find or call something, by name (Lib/pickletools.py).
std::string_view DangerousName(uint8_t opcode) {
  switch (opcode) {
    case 'c':
      return "GLOBAL";
    case 0x93:
      return "STACK_GLOBAL";
    case 'R':
      return "REDUCE";
    case 'b':
      return "BUILD";
    case 'i':
      return "INST";
    case 'o':
      return "OBJ";
    case 0x81:
      return "NEWOBJ";
    case 0x92:
      return "NEWOBJ_EX";
    case 'P':
      return "PERSID";
    case 'Q':
      return "BINPERSID";
    case 0x82:
      return "EXT1";
    case 0x83:
      return "EXT2";
    case 0x84:
      return "EXT4";
    case 0x97:
      return "NEXT_BUFFER";
    default:
      return "";
  }
}

}  // namespace

// Runs the opcodes. The stack holds indices of nodes; kMark marks the beginning of what a container
// takes.
class PickleMachine {
 public:
  PickleMachine(PickleDocument& document, const PickleLimits& limits)
      : document_(document), limits_(limits), text_(document.text_) {}

  absl::Status Run() {
    if (text_.size() < 2 || Byte(0) != 0x80 || Byte(1) < 2 || Byte(1) > 5) {
      Refuse("expected a pickle of protocol 2 to 5");
    }
    at_ = 2;
    while (status_.ok() && !stopped_) Step();
    if (status_.ok() && at_ != text_.size()) {
      Refuse(absl::StrFormat("expected the end, found %d bytes more", text_.size() - at_));
    }
    return status_;
  }

 private:
  static constexpr uint32_t kMark = UINT32_MAX;
  using Type = PickleValue::Type;
  using Node = PickleDocument::Node;

  uint8_t Byte(size_t at) const { return static_cast<uint8_t>(text_[at]); }

  void Refuse(std::string_view what) {
    if (status_.ok()) {
      status_ = absl::InvalidArgumentError(absl::StrFormat("pickle: byte %d: %s", begun_, what));
    }
  }

  // `count` bytes from here, as a little-endian number; 0 after an error.
  uint64_t Number(size_t count) {
    if (text_.size() - at_ < count) {
      Refuse("truncated");
      return 0;
    }
    uint64_t value = 0;
    for (size_t i = count; i-- > 0;) value = value << 8 | Byte(at_ + i);
    at_ += count;
    return value;
  }

  void Push(Node node) {
    if (document_.nodes_.size() >= limits_.values_max) {
      Refuse(absl::StrFormat("expected at most %d values", limits_.values_max));
      return;
    }
    stack_.push_back(static_cast<uint32_t>(document_.nodes_.size()));
    document_.nodes_.push_back(std::move(node));
  }
  void PushInteger(int64_t value) { Push({.type = Type::kInteger, .integer = value}); }
  void PushBool(bool value) { Push({.type = Type::kBool, .integer = value ? 1 : 0}); }
  void PushText(Type type, uint64_t length) {
    if (length > text_.size() - at_) {
      Refuse("truncated");
      return;
    }
    const std::string_view text = std::string_view(text_).substr(at_, length);
    if (type == Type::kString && !IsUtf8(text)) {
      Refuse("expected UTF-8");
      return;
    }
    Push({.type = type, .integer = static_cast<int64_t>(at_), .length = length});
    at_ += length;
  }

  // A value on top of the stack, not a mark; null after an error.
  Node* Top() {
    if (stack_.empty() || stack_.back() == kMark) {
      Refuse("expected a value on the stack");
      return nullptr;
    }
    return &document_.nodes_[stack_.back()];
  }

  // Takes `count` values from the top into `children`, or nothing and an error.
  bool Take(size_t count, std::vector<uint32_t>& children) {
    if (stack_.size() < count) {
      Refuse("expected more values on the stack");
      return false;
    }
    for (size_t i = stack_.size() - count; i < stack_.size(); ++i) {
      if (stack_[i] == kMark) {
        Refuse("expected a value, found a mark");
        return false;
      }
      children.push_back(stack_[i]);
    }
    stack_.resize(stack_.size() - count);
    return true;
  }
  // The same down to the topmost mark, and takes the mark.
  bool TakeToMark(std::vector<uint32_t>& children) {
    size_t count = 0;
    while (count < stack_.size() && stack_[stack_.size() - 1 - count] != kMark) ++count;
    if (count == stack_.size()) {
      Refuse("expected a mark on the stack");
      return false;
    }
    Take(count, children);
    stack_.pop_back();
    --marks_;
    return true;
  }

  void MakeList(size_t count) {
    Node node{.type = Type::kList};
    if (Take(count, node.children)) Push(std::move(node));
  }
  void MakeFromMark(Type type) {
    Node node{.type = type};
    if (!TakeToMark(node.children)) return;
    if (type == Type::kDict && node.children.size() % 2 != 0) {
      Refuse("expected keys and values in pairs");
      return;
    }
    Push(std::move(node));
  }
  // Adds `items` to the container on top.
  void Extend(Type type, const std::vector<uint32_t>& items) {
    Node* const container = Top();
    if (container == nullptr) return;
    if (container->type != type || (type == Type::kDict && items.size() % 2 != 0)) {
      Refuse(absl::StrFormat("expected %s to add to, found %s",
                             kTypeNames[static_cast<size_t>(type)],
                             kTypeNames[static_cast<size_t>(container->type)]));
      return;
    }
    container->children.insert(container->children.end(), items.begin(), items.end());
  }

  void Remember(uint64_t key) {
    if (Top() != nullptr) memo_[key] = stack_.back();
  }
  void Recall(uint64_t key) {
    const auto found = memo_.find(key);
    if (found == memo_.end()) {
      Refuse(absl::StrFormat("nothing was remembered as %d", key));
    } else if (stack_.size() >= limits_.values_max) {
      Refuse("the stack is too high");
    } else {
      stack_.push_back(found->second);
    }
  }

  void Long(uint64_t bytes) {
    if (bytes > 8) {
      Refuse(absl::StrFormat("expected an integer of at most 8 bytes, found %d", bytes));
      return;
    }
    const uint64_t value = Number(bytes);
    if (!status_.ok()) return;
    // Two's complement of `bytes` bytes.
    const unsigned unused = static_cast<unsigned>(64 - 8 * bytes);
    PushInteger(bytes == 0 ? 0 : static_cast<int64_t>(value << unused) >> unused);
  }

  void Double() {
    uint64_t bits = 0;  // big-endian, as nothing else is
    for (int i = 0; i < 8; ++i) bits = bits << 8 | Number(1);
    Push({.type = Type::kFloat, .real = std::bit_cast<double>(bits)});
  }

  void Mark() {
    if (++marks_ > limits_.depth_max) {
      Refuse(absl::StrFormat("expected at most %d containers in one another", limits_.depth_max));
      return;
    }
    stack_.push_back(kMark);
  }

  void Step() {
    begun_ = at_;
    if (at_ == text_.size()) {
      Refuse("truncated");
      return;
    }
    const uint8_t opcode = Byte(at_++);
    std::vector<uint32_t> items;
    switch (opcode) {
      case 'N':
        return Push({.type = Type::kNone});
      case 0x88:
      case 0x89:
        return PushBool(opcode == 0x88);
      case 'J':  // BININT: the only signed one
        return PushInteger(static_cast<int32_t>(Number(4)));
      case 'K':
        return PushInteger(static_cast<int64_t>(Number(1)));
      case 'M':
        return PushInteger(static_cast<int64_t>(Number(2)));
      case 0x8a:
        return Long(Number(1));
      case 'G':
        return Double();
      case 'X':
        return PushText(Type::kString, Number(4));
      case 0x8c:
        return PushText(Type::kString, Number(1));
      case 0x8d:
        return PushText(Type::kString, Number(8));
      case 'B':
        return PushText(Type::kBytes, Number(4));
      case 'C':
        return PushText(Type::kBytes, Number(1));
      case 0x8e:
        return PushText(Type::kBytes, Number(8));
      case '(':
        return Mark();
      case ']':
      case ')':
        return Push({.type = Type::kList});
      case '}':
        return Push({.type = Type::kDict});
      case 'l':
      case 't':
        return MakeFromMark(Type::kList);
      case 'd':
        return MakeFromMark(Type::kDict);
      case 0x85:
      case 0x86:
      case 0x87:
        return MakeList(opcode - 0x84u);
      case 'a':
        if (Take(1, items)) Extend(Type::kList, items);
        return;
      case 'e':
        if (TakeToMark(items)) Extend(Type::kList, items);
        return;
      case 's':
        if (Take(2, items)) Extend(Type::kDict, items);
        return;
      case 'u':
        if (TakeToMark(items)) Extend(Type::kDict, items);
        return;
      case 'q':
        return Remember(Number(1));
      case 'r':
        return Remember(Number(4));
      case 0x94:
        return Remember(memo_.size());
      case 'h':
        return Recall(Number(1));
      case 'j':
        return Recall(Number(4));
      case 0x95:  // FRAME: how much to read ahead
        Number(8);
        return;
      case '.':
        if (Top() == nullptr) return;
        if (stack_.size() != 1) {
          Refuse(absl::StrFormat("expected one value at the end, found %d", stack_.size()));
          return;
        }
        document_.root_ = stack_.back();
        stopped_ = true;
        return;
      default:
        break;
    }
    if (const std::string_view name = DangerousName(opcode); !name.empty()) {
      status_ = absl::PermissionDeniedError(absl::StrFormat(
          "pickle: byte %d: %s could run code: only plain values are read", begun_, name));
      return;
    }
    Refuse(absl::StrFormat("opcode %02x is not one of a plain value", opcode));
  }

  PickleDocument& document_;
  const PickleLimits limits_;
  const std::string& text_;
  size_t at_ = 0;
  size_t begun_ = 0;  // of the opcode that runs
  size_t marks_ = 0;
  bool stopped_ = false;
  std::vector<uint32_t> stack_;
  std::unordered_map<uint64_t, uint32_t> memo_;
  absl::Status status_;
};

absl::StatusOr<std::unique_ptr<PickleDocument>> PickleDocument::Parse(std::string bytes,
                                                                      const PickleLimits& limits) {
  if (bytes.size() > limits.bytes_max) {
    return absl::InvalidArgumentError(absl::StrFormat("pickle: expected at most %d bytes, found %d",
                                                      limits.bytes_max, bytes.size()));
  }
  std::unique_ptr<PickleDocument> document(new PickleDocument);
  document->text_ = std::move(bytes);
  if (absl::Status status = PickleMachine(*document, limits).Run(); !status.ok()) return status;
  return document;
}

PickleValue::Type PickleValue::type() const {
  CHECK(present());
  return document_->nodes_[node_].type;
}

absl::Status PickleValue::Mismatch(std::string_view expected) const {
  return absl::InvalidArgumentError(
      absl::StrFormat("pickle: expected %s, found %s", expected,
                      present() ? kTypeNames[static_cast<size_t>(type())] : "nothing"));
}

absl::StatusOr<bool> PickleValue::Bool() const {
  if (!present() || type() != Type::kBool) return Mismatch("a boolean");
  return document_->nodes_[node_].integer != 0;
}

absl::StatusOr<int64_t> PickleValue::Int64() const {
  if (!present() || type() != Type::kInteger) return Mismatch("an integer");
  return document_->nodes_[node_].integer;
}

absl::StatusOr<uint64_t> PickleValue::Uint64() const {
  if (!present() || type() != Type::kInteger || document_->nodes_[node_].integer < 0) {
    return Mismatch("an integer that is not negative");
  }
  return static_cast<uint64_t>(document_->nodes_[node_].integer);
}

absl::StatusOr<double> PickleValue::Double() const {
  if (present() && type() == Type::kFloat) return document_->nodes_[node_].real;
  if (present() && type() == Type::kInteger) {
    return static_cast<double>(document_->nodes_[node_].integer);
  }
  return Mismatch("a number");
}

absl::StatusOr<std::string_view> PickleValue::String() const {
  if (!present() || type() != Type::kString) return Mismatch("a string");
  const PickleDocument::Node& node = document_->nodes_[node_];
  return std::string_view(document_->text_).substr(static_cast<size_t>(node.integer), node.length);
}

absl::StatusOr<size_t> PickleValue::ArraySize() const {
  if (!present() || type() != Type::kList) return Mismatch("a list or tuple");
  return document_->nodes_[node_].children.size();
}

PickleValue PickleValue::operator[](size_t index) const {
  CHECK(type() == Type::kList);
  const std::vector<uint32_t>& children = document_->nodes_[node_].children;
  CHECK(index < children.size());
  return PickleValue(document_, children[index]);
}

PickleValue PickleValue::Find(std::string_view key) const {
  if (!present() || type() != Type::kDict) return {};
  const std::vector<uint32_t>& children = document_->nodes_[node_].children;
  for (size_t i = children.size(); i >= 2; i -= 2) {
    const absl::StatusOr<std::string_view> found = PickleValue(document_, children[i - 2]).String();
    if (found.ok() && *found == key) return PickleValue(document_, children[i - 1]);
  }
  return {};
}

absl::StatusOr<std::vector<std::string_view>> PickleValue::Keys() const {
  if (!present() || type() != Type::kDict) return Mismatch("a dict");
  const std::vector<uint32_t>& children = document_->nodes_[node_].children;
  std::vector<std::string_view> keys;
  for (size_t i = 0; i + 1 < children.size(); i += 2) {
    const absl::StatusOr<std::string_view> key = PickleValue(document_, children[i]).String();
    if (key.ok()) keys.push_back(*key);
  }
  return keys;
}

}  // namespace holdfast
