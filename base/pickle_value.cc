// What base/pickle_reader.h offers of a document once it is parsed; the parser is pickle_reader.cc.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/pickle_reader.h"

namespace holdfast {
namespace {

using Type = PickleValue::Type;

// From so many entries on a dict is searched through its sorted keys.
constexpr size_t kSortedFrom = 16;
// Up to so many, strings are compared each with each.
constexpr size_t kFewEntries = 8;
constexpr size_t kShownBytes = 200;  // of a name in an error

constexpr std::array<std::string_view, 16> kTypeNames = {
    "None",          "a boolean", "an integer", "a float",        "a string",    "bytes",
    "a list",        "a dict",    "a tuple",    "a set",          "a frozenset", "a bytearray",
    "a big integer", "a global",  "an object",  "a persistent id"};

bool HasSequence(Type type) {
  return type == Type::kList || type == Type::kTuple || type == Type::kSet ||
         type == Type::kFrozenSet;
}

bool HasText(Type type) {
  return type == Type::kString || type == Type::kBytes || type == Type::kByteArray ||
         type == Type::kBigInteger;
}

// Containers and objects as keys are equal to themselves only.
bool IsEqualByValue(Type type) {
  return HasText(type) || type == Type::kNone || type == Type::kBool || type == Type::kInteger ||
         type == Type::kFloat;
}

}  // namespace

std::string_view PickleDocument::TextOf(const Node& node) const {
  return std::string_view(text_).substr(node.range.begin, node.range.length);
}

// kNoNode if the object has none.
uint32_t PickleDocument::PartOf(const Node& object, Part part) const {
  if (part == kCallee) return object.call.callee;
  if (part == kArgs) return object.call.args;
  if (object.is_extended) return children_[object.more + size_t{part} - kKwargs];
  return part == kState ? object.more : kNoNode;
}

void PickleDocument::MakeDictsUnique() {
  for (uint32_t i = 0; i < nodes_.size(); ++i) {
    if (nodes_[i].type == Type::kDict) MakeDictUnique(i);
  }
}

// Whether the keys are few, strings, and all different: the state of an object, mostly.
bool PickleDocument::HasFewDifferentStrings(const Node& dict) const {
  const size_t entries = dict.range.length / 2;
  if (entries > kFewEntries) return false;
  std::array<std::string_view, kFewEntries> keys;
  for (size_t i = 0; i < entries; ++i) {
    const Node& key = nodes_[children_[dict.range.begin + 2 * i]];
    if (key.type != Type::kString) return false;
    keys[i] = TextOf(key);
    if (std::find(keys.begin(), keys.begin() + i, keys[i]) != keys.begin() + i) return false;
  }
  return true;
}

// Python's rule for what is one key: 1, 1.0 and True are; 'a' and b'a' are not. Keys that are
// containers or objects are only equal to themselves, and so is NaN. By sorting, not by hashing:
// whoever made the bytes could choose keys with equal hashes.
void PickleDocument::MakeDictUnique(uint32_t dict) {
  Node& node = nodes_[dict];
  const uint32_t entries = node.range.length / 2;
  if (entries < 2 || HasFewDifferentStrings(node)) return;
  const uint32_t begin = node.range.begin;
  struct Place {
    uint32_t key;  // a node
    uint32_t first;
    uint32_t last;  // entry whose value counts
  };
  // The same key often: first by its number, so that long texts are compared once each.
  std::vector<Place> places;
  places.reserve(entries);
  for (uint32_t i = 0; i < entries; ++i) places.push_back({children_[begin + 2 * i], i, i});
  const auto merge = [&places](auto equal) {
    size_t kept = 0;
    for (size_t i = 1; i < places.size(); ++i) {
      if (equal(places[kept].key, places[i].key)) {
        places[kept].first = std::min(places[kept].first, places[i].first);
        places[kept].last = std::max(places[kept].last, places[i].last);
      } else {
        places[++kept] = places[i];
      }
    }
    places.resize(kept + 1);
  };
  if (!std::ranges::is_sorted(places, {}, &Place::key)) std::ranges::sort(places, {}, &Place::key);
  merge([](uint32_t a, uint32_t b) { return a == b; });

  const auto compared_end =
      std::partition(places.begin(), places.end(),
                     [this](const Place& place) { return IsEqualByValue(nodes_[place.key].type); });
  std::sort(places.begin(), compared_end,
            [this](const Place& a, const Place& b) { return CompareKeys(a.key, b.key) < 0; });
  merge([this](uint32_t a, uint32_t b) { return CompareKeys(a, b) == 0; });

  std::vector<uint32_t> sorted;  // string keys, by the numbers of their first entries
  for (const Place& place : places) {
    if (nodes_[place.key].type == Type::kString) sorted.push_back(place.first);
  }
  if (places.size() < entries) {
    std::ranges::sort(places, {}, &Place::first);
    std::vector<uint32_t> kept;
    kept.reserve(2 * places.size());
    for (const Place& place : places) {
      kept.push_back(children_[begin + 2 * place.first]);
      kept.push_back(children_[begin + 2 * place.last + 1]);
    }
    std::copy(kept.begin(), kept.end(), children_.begin() + begin);
    node.range.length = static_cast<uint32_t>(kept.size());
    for (uint32_t& first : sorted) {  // becomes the number of its entry now
      const auto place = std::ranges::lower_bound(places, first, {}, &Place::first);
      first = static_cast<uint32_t>(place - places.begin());
    }
  }
  if (places.size() < kSortedFrom) return;
  for (uint32_t& entry : sorted) entry = begin + 2 * entry;
  sorted_keys_.emplace(dict, std::move(sorted));
}

// An order in which keys that Python takes for one are equal; strings are sorted by their bytes.
int PickleDocument::CompareKeys(uint32_t a, uint32_t b) const {
  // What is compared: numbers that are integers as such, others by their own kind.
  struct Simple {
    Type type;
    int64_t bits;
  };
  const auto simplify = [this](uint32_t key) -> Simple {
    const Node& found = nodes_[key];
    if (found.type == Type::kBool) return {Type::kInteger, found.integer};
    if (found.type == Type::kFloat && !std::isnan(found.real)) {
      if (found.real == std::trunc(found.real) && std::abs(found.real) < 0x1p63) {
        return {Type::kInteger, static_cast<int64_t>(found.real)};
      }
      return {Type::kFloat, std::bit_cast<int64_t>(found.real)};
    }
    if (found.type == Type::kInteger) return {Type::kInteger, found.integer};
    if (found.type == Type::kNone) return {Type::kNone, 0};
    if (HasText(found.type)) return {found.type, 0};
    return {Type::kObject, key};
  };
  const Simple first = simplify(a);
  const Simple second = simplify(b);
  if (first.type != second.type) return first.type < second.type ? -1 : 1;
  if (HasText(first.type)) return TextOf(nodes_[a]).compare(TextOf(nodes_[b]));
  if (first.bits != second.bits) return first.bits < second.bits ? -1 : 1;
  return 0;
}

uint32_t PickleDocument::FindEntry(uint32_t dict, std::string_view key) const {
  const Node& node = nodes_[dict];
  if (node.range.length >= 2 * kSortedFrom) {
    const auto sorted = sorted_keys_.find(dict);
    CHECK(sorted != sorted_keys_.end());
    const auto found = std::lower_bound(sorted->second.begin(), sorted->second.end(), key,
                                        [this](uint32_t at, std::string_view text) {
                                          return TextOf(nodes_[children_[at]]) < text;
                                        });
    const bool is_there = found != sorted->second.end() && TextOf(nodes_[children_[*found]]) == key;
    return is_there ? children_[*found + size_t{1}] : kNoNode;
  }
  for (size_t i = node.range.begin; i < size_t{node.range.begin} + node.range.length; i += 2) {
    const Node& found = nodes_[children_[i]];
    if (found.type == Type::kString && TextOf(found) == key) return children_[i + 1];
  }
  return kNoNode;
}

void PickleDocument::Walk(absl::FunctionRef<Step(PickleValue)> visit) const {
  std::vector<bool> seen(nodes_.size());
  std::vector<uint32_t> open = {root_};
  while (!open.empty()) {
    const uint32_t number = open.back();
    open.pop_back();
    if (seen[number]) continue;
    seen[number] = true;
    const Step step = visit(PickleValue(this, number));
    if (step == Step::kStop) return;
    if (step == Step::kSkip) continue;
    const auto add = [&](uint32_t child) {
      if (child != kNoNode && !seen[child]) open.push_back(child);
    };
    const Node& node = nodes_[number];
    if (HasSequence(node.type) || node.type == Type::kDict) {
      for (size_t i = node.range.length; i-- > 0;) add(children_[node.range.begin + i]);
    } else if (node.type == Type::kObject) {
      for (const Part part : {kEntries, kItems, kState, kKwargs, kArgs, kCallee}) {
        add(PartOf(node, part));
      }
    } else if (node.type == Type::kPersistent) {
      add(node.id);
    }
  }
}

PickleValue::Type PickleValue::type() const {
  CHECK(present());
  return document_->nodes_[node_].type;
}

std::string PickleValue::Describe() const {
  if (!present()) return "nothing";
  const auto shown = [](std::string_view text) {
    return std::string(text.size() > kShownBytes ? text.substr(0, kShownBytes) : text);
  };
  if (type() == Type::kGlobal) {
    return absl::StrCat("the global ", shown(module()), ".", shown(name()));
  }
  if (type() == Type::kObject) {
    // Of a call of a call ...: whose result is called is deep enough to be told apart.
    PickleValue who = callee();
    std::string called;
    for (int depth = 0; depth < 4 && who.Is(Type::kObject); ++depth, who = who.callee()) {
      called = "the result of ";
    }
    if (!who.Is(Type::kGlobal)) return "an object";
    return absl::StrCat("an object of ", called, shown(who.module()), ".", shown(who.name()));
  }
  return std::string(kTypeNames[static_cast<size_t>(type())]);
}

absl::Status PickleValue::Mismatch(std::string_view expected) const {
  const std::string text = absl::StrFormat("pickle: expected %s, found %s", expected, Describe());
  const bool opaque = Is(Type::kGlobal) || Is(Type::kObject) || Is(Type::kPersistent);
  return opaque ? absl::PermissionDeniedError(text) : absl::InvalidArgumentError(text);
}

absl::StatusOr<bool> PickleValue::Bool() const {
  if (!Is(Type::kBool)) return Mismatch("a boolean");
  return document_->nodes_[node_].integer != 0;
}

absl::StatusOr<int64_t> PickleValue::Int64() const {
  if (!Is(Type::kInteger)) return Mismatch("an integer");
  return document_->nodes_[node_].integer;
}

absl::StatusOr<uint64_t> PickleValue::Uint64() const {
  if (!Is(Type::kInteger) || document_->nodes_[node_].integer < 0) {
    return Mismatch("an integer that is not negative");
  }
  return static_cast<uint64_t>(document_->nodes_[node_].integer);
}

absl::StatusOr<double> PickleValue::Double() const {
  if (Is(Type::kFloat)) return document_->nodes_[node_].real;
  if (Is(Type::kInteger)) return static_cast<double>(document_->nodes_[node_].integer);
  return Mismatch("a number");
}

absl::StatusOr<std::string_view> PickleValue::String() const {
  if (!Is(Type::kString)) return Mismatch("a string");
  return document_->TextOf(document_->nodes_[node_]);
}

absl::StatusOr<std::string_view> PickleValue::Bytes() const {
  if (!Is(Type::kBytes) && !Is(Type::kByteArray)) return Mismatch("bytes");
  return document_->TextOf(document_->nodes_[node_]);
}

absl::StatusOr<std::string_view> PickleValue::BigInteger() const {
  if (!Is(Type::kBigInteger)) return Mismatch("an integer of more than 8 bytes");
  return document_->TextOf(document_->nodes_[node_]);
}

absl::StatusOr<size_t> PickleValue::ArraySize() const {
  if (!present() || !HasSequence(type())) return Mismatch("a list or tuple");
  return document_->nodes_[node_].range.length;
}

PickleValue PickleValue::operator[](size_t index) const {
  CHECK(HasSequence(type()));
  const PickleDocument::Node& node = document_->nodes_[node_];
  CHECK(index < node.range.length);
  return PickleValue(document_, document_->children_[node.range.begin + index]);
}

PickleValue PickleValue::Find(std::string_view key) const {
  if (!Is(Type::kDict)) return {};
  const uint32_t found = document_->FindEntry(node_, key);
  return found == PickleDocument::kNoNode ? PickleValue() : PickleValue(document_, found);
}

absl::StatusOr<std::vector<std::string_view>> PickleValue::Keys() const {
  if (!Is(Type::kDict)) return Mismatch("a dict");
  std::vector<std::string_view> keys;
  const PickleDocument::Node& node = document_->nodes_[node_];
  for (size_t i = 0; i < node.range.length / 2; ++i) {
    if (Key(i).type() == Type::kString) keys.push_back(*Key(i).String());
  }
  return keys;
}

absl::StatusOr<size_t> PickleValue::EntryCount() const {
  if (!Is(Type::kDict)) return Mismatch("a dict");
  return document_->nodes_[node_].range.length / 2;
}

PickleValue PickleValue::Key(size_t index) const {
  const PickleDocument::Node& node = document_->nodes_[node_];
  CHECK(node.type == Type::kDict && index < node.range.length / 2);
  return PickleValue(document_, document_->children_[node.range.begin + 2 * index]);
}

PickleValue PickleValue::Entry(size_t index) const {
  const PickleDocument::Node& node = document_->nodes_[node_];
  CHECK(node.type == Type::kDict && index < node.range.length / 2);
  return PickleValue(document_, document_->children_[node.range.begin + 2 * index + 1]);
}

std::string_view PickleValue::module() const {
  return Is(Type::kGlobal) ? document_->TextOf(document_->nodes_[node_]) : std::string_view();
}

std::string_view PickleValue::name() const {
  if (!Is(Type::kGlobal)) return {};
  const PickleDocument::Range name = document_->names_[document_->nodes_[node_].more];
  return std::string_view(document_->text_).substr(name.begin, name.length);
}

bool PickleValue::IsGlobal(std::string_view module_name, std::string_view global_name) const {
  return Is(Type::kGlobal) && module() == module_name && name() == global_name;
}

PickleValue PickleValue::PartAt(uint8_t part) const {
  if (!Is(Type::kObject)) return {};
  const uint32_t found =
      document_->PartOf(document_->nodes_[node_], static_cast<PickleDocument::Part>(part));
  return found == PickleDocument::kNoNode ? PickleValue() : PickleValue(document_, found);
}

PickleValue::Making PickleValue::making() const { return document_->nodes_[node_].making; }
PickleValue PickleValue::callee() const { return PartAt(PickleDocument::kCallee); }
PickleValue PickleValue::args() const { return PartAt(PickleDocument::kArgs); }
PickleValue PickleValue::kwargs() const { return PartAt(PickleDocument::kKwargs); }
PickleValue PickleValue::state() const { return PartAt(PickleDocument::kState); }
PickleValue PickleValue::items() const { return PartAt(PickleDocument::kItems); }
PickleValue PickleValue::entries() const { return PartAt(PickleDocument::kEntries); }

size_t PickleValue::state_count() const {
  if (!Is(Type::kObject)) return 0;
  const PickleDocument::Node& node = document_->nodes_[node_];
  if (node.is_extended) return document_->PartOf(node, PickleDocument::kBuilds);
  return node.more == PickleDocument::kNoNode ? 0 : 1;
}

bool PickleValue::IsCallOf(std::string_view module_name, std::string_view global_name) const {
  return callee().IsGlobal(module_name, global_name);
}

PickleValue PickleValue::persistent_id() const {
  if (!Is(Type::kPersistent)) return {};
  return PickleValue(document_, document_->nodes_[node_].id);
}

}  // namespace holdfast
