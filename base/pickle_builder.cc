#include "base/pickle_builder.h"

#include <algorithm>

#include "absl/strings/str_format.h"

namespace holdfast {
namespace {

// Of which pickles what is reserved at once, and how many of its bytes there are for each node and
// for each child: a checkpoint's metadata has one for about as many.
constexpr size_t kReservedFromBytes = size_t{1} << 20;
constexpr size_t kReservedForBytesMax = size_t{32} << 20;
constexpr size_t kBytesOfNode = 8;
constexpr size_t kBytesOfChild = 4;

}  // namespace

PickleBuilder::PickleBuilder(PickleDocument& document, const PickleOptions& options)
    : document_(document),
      values_max_(std::min(options.values_max, size_t{1} << 28)),
      depth_max_(options.depth_max) {
  known_integers_.fill(kNoNode);
  // Address space may be limited, used or not (RLIMIT_AS of the sandbox), and a text may be all
  // bytes.
  const size_t bytes = std::min(document.text_.size(), kReservedForBytesMax);
  if (bytes < kReservedFromBytes) return;
  document.nodes_.reserve(std::min(bytes / kBytesOfNode, values_max_));
  document.children_.reserve(bytes / kBytesOfChild);
  dense_memo_.reserve(std::min(bytes / kBytesOfNode, values_max_));
}

void PickleBuilder::Fail(absl::StatusCode code, std::string_view what) {
  if (status_.ok())
    status_ = absl::Status(code, absl::StrFormat("pickle: byte %d: %s", begun_, what));
}

// A new node that is not on the stack; kNoNode and an error beyond the limit.
uint32_t PickleBuilder::Make(const Node& node) {
  if (!status_.ok()) return kNoNode;
  if (document_.nodes_.size() >= values_max_) {
    Refuse(absl::StrFormat("expected at most %d values", values_max_));
    return kNoNode;
  }
  document_.nodes_.push_back(node);
  return static_cast<uint32_t>(document_.nodes_.size() - 1);
}

// Its number; kNoNode after an error.
uint32_t PickleBuilder::Push(const Node& node) {
  const uint32_t made = Make(node);
  if (made != kNoNode) stack_.push_back(made);
  return made;
}

void PickleBuilder::PushEmpty(Type type) {
  Node node;
  node.type = type;
  Push(node);
}

void PickleBuilder::PushEmptyTuple() {
  if (empty_tuple_ != kNoNode) return PushAgain(empty_tuple_);
  Node node;
  node.type = Type::kTuple;
  empty_tuple_ = Push(node);
}

void PickleBuilder::PushBool(bool value) {
  Node node;
  node.type = Type::kBool;
  node.integer = value ? 1 : 0;
  Push(node);
}

void PickleBuilder::PushInteger(int64_t value) {
  // Fibonacci hashing: numbers in a row, and multiples of one, fall apart.
  const uint64_t hash = static_cast<uint64_t>(value) * 0x9E3779B97F4A7C15;
  uint32_t& known = known_integers_[hash >> (64 - kKnownIntegersBits)];
  if (known != kNoNode && At(known).integer == value) return PushAgain(known);
  Node node;
  node.type = Type::kInteger;
  node.integer = value;
  known = Push(node);
}

void PickleBuilder::PushDouble(double value) {
  Node node;
  node.type = Type::kFloat;
  node.real = value;
  Push(node);
}

void PickleBuilder::PushPlace(Type type, size_t offset, size_t length) {
  Node node;
  node.type = type;
  node.range = {static_cast<uint32_t>(offset), static_cast<uint32_t>(length)};
  Push(node);
}

std::string PickleBuilder::DescribeOf(uint32_t number) const {
  return document_.ValueAt(number).Describe();
}

PickleBuilder::Node& PickleBuilder::At(uint32_t number) { return document_.nodes_[number]; }

// A value on top of the stack, not a mark; else an error.
bool PickleBuilder::HasTop() {
  if (!stack_.empty() && stack_.back() != kMark) return true;
  Refuse("expected a value on the stack");
  return false;
}

// Takes the top value; kNoNode and an error if there is none.
uint32_t PickleBuilder::Pop() {
  if (!HasTop()) return kNoNode;
  const uint32_t number = stack_.back();
  stack_.pop_back();
  return number;
}

// How many values stand on the topmost mark; nothing and an error if there is none.
std::optional<size_t> PickleBuilder::CountToMark() {
  size_t count = 0;
  while (count < stack_.size() && stack_[stack_.size() - 1 - count] != kMark) ++count;
  if (count == stack_.size()) {
    Refuse("expected a mark on the stack");
    return std::nullopt;
  }
  return count;
}

bool PickleBuilder::HasValues(size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (i >= stack_.size() || stack_[stack_.size() - 1 - i] == kMark) {
      Refuse(i >= stack_.size() ? "expected more values on the stack"
                                : "expected a value, found a mark");
      return false;
    }
  }
  return true;
}

void PickleBuilder::DropMark() {
  stack_.pop_back();
  --marks_;
}

bool PickleBuilder::HasRoom(size_t count) {
  if (document_.children_.size() + count < kNoNode) return true;
  Refuse("expected fewer values in containers");
  return false;
}

// Moves the top `count` values, which are there, into the container.
void PickleBuilder::MoveTop(uint32_t container, size_t count) {
  Node& node = At(container);
  std::vector<uint32_t>& children = document_.children_;
  PickleDocument::Range& range = node.range;
  const size_t length = range.length + count;
  if (length > node.more) {
    if (!HasRoom(range.length + 2 * length)) return;
    if (range.begin + size_t{node.more} != children.size()) {
      const size_t begin = children.size();
      for (size_t i = 0; i < range.length; ++i) {
        const uint32_t child = children[range.begin + i];
        children.push_back(child);
      }
      range.begin = static_cast<uint32_t>(begin);
    }
    // A first filling is mostly the only one.
    node.more =
        static_cast<uint32_t>(range.length == 0 ? length : std::max(length, size_t{node.more} * 2));
    children.resize(range.begin + size_t{node.more}, kNoNode);
  }
  std::copy(stack_.end() - static_cast<ptrdiff_t>(count), stack_.end(),
            children.begin() + range.begin + range.length);
  range.length = static_cast<uint32_t>(length);
  stack_.resize(stack_.size() - count);
}

void PickleBuilder::MakeTuple(size_t count) {
  if (!HasValues(count)) return;
  Node node;
  node.type = Type::kTuple;
  const uint32_t tuple = Make(node);
  if (tuple == kNoNode) return;
  MoveTop(tuple, count);
  stack_.push_back(tuple);
}

void PickleBuilder::MakeFromMark(Type type) {
  const std::optional<size_t> count = CountToMark();
  if (!count.has_value()) return;
  if (type == Type::kDict && *count % 2 != 0) return Refuse("expected keys and values in pairs");
  Node node;
  node.type = type;
  const uint32_t container = Make(node);
  if (container == kNoNode) return;
  MoveTop(container, *count);
  DropMark();
  stack_.push_back(container);
}

// What the values at the top are added to: the container below them, or, of an object, its list
// of items or dict of entries, made at the first time. kNoNode after an error.
uint32_t PickleBuilder::Receiver(Type type, uint32_t below) {
  const Type found = At(below).type;
  if (found == type) return below;
  if (found != Type::kObject) {
    Refuse(absl::StrFormat("expected %s to add to, found %s",
                           type == Type::kList ? "a list" : "a dict", DescribeOf(below)));
    return kNoNode;
  }
  if (!Extend(below)) return kNoNode;
  uint32_t& part =
      ExtensionOf(below, type == Type::kList ? PickleDocument::kItems : PickleDocument::kEntries);
  if (part == kNoNode) {
    Node made;
    made.type = type;
    part = Make(made);
  }
  return part;
}

// Makes room for all parts of an object; false and an error if there is none.
bool PickleBuilder::Extend(uint32_t object) {
  Node& node = At(object);
  if (node.is_extended) return true;
  if (!HasRoom(PickleDocument::kExtensionLength)) return false;
  const uint32_t state = node.more;
  node.more = static_cast<uint32_t>(document_.children_.size());
  node.is_extended = true;
  document_.children_.resize(node.more + PickleDocument::kExtensionLength, kNoNode);
  ExtensionOf(object, PickleDocument::kState) = state;
  ExtensionOf(object, PickleDocument::kBuilds) = state == kNoNode ? 0 : 1;
  return true;
}

uint32_t& PickleBuilder::ExtensionOf(uint32_t object, PickleDocument::Part part) {
  return document_.children_[At(object).more + size_t{part} - PickleDocument::kKwargs];
}

void PickleBuilder::AddBelow(Type type, size_t count, size_t marks) {
  const size_t taken = count + marks;
  if (stack_.size() <= taken || stack_[stack_.size() - 1 - taken] == kMark) {
    return Refuse("expected a value on the stack");
  }
  const uint32_t receiver = Receiver(type, stack_[stack_.size() - 1 - taken]);
  if (receiver == kNoNode) return;
  if (type == Type::kDict && count % 2 != 0) return Refuse("expected keys and values in pairs");
  MoveTop(receiver, count);
  if (marks != 0) DropMark();
}

void PickleBuilder::AddTop(Type type, size_t count) {
  if (HasValues(count)) AddBelow(type, count, 0);
}

void PickleBuilder::AddMarked(Type type) {
  const std::optional<size_t> count = CountToMark();
  if (count.has_value()) AddBelow(type, *count, 1);
}

void PickleBuilder::AddToSet() {
  const std::optional<size_t> count = CountToMark();
  if (!count.has_value()) return;
  if (stack_.size() > *count + 1) {
    const uint32_t below = stack_[stack_.size() - 2 - *count];
    if (below != kMark && At(below).type == Type::kSet) {
      MoveTop(below, *count);
      return DropMark();
    }
    if (below != kMark && At(below).type == Type::kObject) {
      return AddBelow(Type::kList, *count, 1);
    }
  }
  Refuse("expected a set to add to");
}

void PickleBuilder::MakeObject(Making making, Kwargs given) {
  const bool has_kwargs = given == Kwargs::kTopmost;
  if (!HasValues(has_kwargs ? 3 : 2)) return;
  const uint32_t kwargs = has_kwargs ? Pop() : kNoNode;
  const uint32_t args = Pop();
  const uint32_t callee = Pop();
  const Type type = At(callee).type;
  if (type != Type::kGlobal && type != Type::kObject && type != Type::kPersistent) {
    return Refuse(
        absl::StrFormat("expected a class or function to call, found %s", DescribeOf(callee)));
  }
  if (At(args).type != Type::kTuple) {
    return Refuse(absl::StrFormat("expected a tuple of arguments, found %s", DescribeOf(args)));
  }
  if (has_kwargs && At(kwargs).type != Type::kDict) {
    return Refuse(absl::StrFormat("expected a dict of arguments, found %s", DescribeOf(kwargs)));
  }
  Node node;
  node.type = Type::kObject;
  node.making = making;
  node.call = {callee, args};
  node.more = kNoNode;
  const uint32_t made = Push(node);
  if (made == kNoNode || !has_kwargs || !Extend(made)) return;
  ExtensionOf(made, PickleDocument::kKwargs) = kwargs;
}

void PickleBuilder::Build() {
  if (!HasValues(2)) return;
  const uint32_t state = Pop();
  const uint32_t object = stack_.back();
  Node& node = At(object);
  if (node.type != Type::kObject) {
    return Refuse(
        absl::StrFormat("expected an object to give a state to, found %s", DescribeOf(object)));
  }
  if (!node.is_extended && node.more == kNoNode) {
    node.more = state;
    return;
  }
  if (!Extend(object)) return;
  ExtensionOf(object, PickleDocument::kState) = state;
  ++ExtensionOf(object, PickleDocument::kBuilds);  // of at most 2^30 opcodes
}

void PickleBuilder::PushGlobal(Place module, Place name) {
  if (module.length > kPickleNameBytesMax || name.length > kPickleNameBytesMax) {
    return Refuse(absl::StrFormat("expected a name of at most %d bytes", kPickleNameBytesMax));
  }
  Node node;
  node.type = Type::kGlobal;
  node.range = {static_cast<uint32_t>(module.offset), static_cast<uint32_t>(module.length)};
  node.more = static_cast<uint32_t>(document_.names_.size());
  if (Push(node) == kNoNode) return;
  document_.names_.push_back(
      {static_cast<uint32_t>(name.offset), static_cast<uint32_t>(name.length)});
}

std::optional<std::pair<PickleBuilder::Place, PickleBuilder::Place>> PickleBuilder::TakeNames() {
  if (!HasValues(2)) return std::nullopt;
  const Node name = At(Pop());
  const Node module = At(Pop());
  if (name.type != Type::kString || module.type != Type::kString) {
    Refuse("expected module and name as strings");
    return std::nullopt;
  }
  return std::pair{Place{module.range.begin, module.range.length},
                   Place{name.range.begin, name.range.length}};
}

void PickleBuilder::BinPersid() {
  Node node;
  node.type = Type::kPersistent;
  node.id = Pop();
  if (node.id != kNoNode) Push(node);
}

void PickleBuilder::Remember(uint64_t key) {
  if (!HasTop()) return;
  if (memo_count_ >= values_max_) {
    return Refuse(absl::StrFormat("expected at most %d remembered values", values_max_));
  }
  // Keys are nearly always numbers in a row; others are kept apart, so that a large one costs
  // nothing.
  uint32_t* place = nullptr;
  if (key < dense_memo_.size()) {
    place = &dense_memo_[key];
  } else if (key <= 2 * memo_count_ + 64) {
    dense_memo_.resize(key + 1, kNoNode);
    place = &dense_memo_[key];
  } else {
    place = &sparse_memo_.try_emplace(key, kNoNode).first->second;
  }
  if (*place == kNoNode) ++memo_count_;
  *place = stack_.back();
}

void PickleBuilder::Recall(uint64_t key) {
  uint32_t found = key < dense_memo_.size() ? dense_memo_[key] : kNoNode;
  if (const auto sparse = sparse_memo_.find(key);
      found == kNoNode && sparse != sparse_memo_.end()) {
    found = sparse->second;
  }
  if (found == kNoNode) return Refuse(absl::StrFormat("nothing was remembered as %d", key));
  PushAgain(found);
}

void PickleBuilder::Duplicate() {
  if (HasTop()) PushAgain(stack_.back());
}

void PickleBuilder::PushAgain(uint32_t number) {
  if (stack_.size() >= values_max_) return Refuse("the stack is too high");
  stack_.push_back(number);
}

void PickleBuilder::Mark() {
  if (++marks_ > depth_max_) {
    return Refuse(absl::StrFormat("expected at most %d containers in one another", depth_max_));
  }
  stack_.push_back(kMark);
}

void PickleBuilder::PopAny() {
  if (!stack_.empty() && stack_.back() == kMark) return DropMark();
  Pop();
}

void PickleBuilder::PopToMark() {
  const std::optional<size_t> count = CountToMark();
  if (!count.has_value()) return;
  stack_.resize(stack_.size() - *count);
  DropMark();
}

void PickleBuilder::Stop() {
  if (!HasTop()) return;
  if (stack_.size() != 1) {
    return Refuse(absl::StrFormat("expected one value at the end, found %d", stack_.size()));
  }
  document_.root_ = stack_.back();
  stopped_ = true;
}

}  // namespace holdfast
