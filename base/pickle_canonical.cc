// For base/pickle_reader_test.py: reads pickles from standard input, each behind its length (8
// bytes, little-endian), and prints for each a line: what the reader made of it, in a form that a
// second reader can print too, or `refused` and the error.
//
// None N; booleans T F; integers i<decimal>, big ones h<two's complement>; floats d<bits>; texts s,
// bytes b, bytearrays B in hexadecimal; lists [..], tuples (..), sets {..}, frozensets <..>, dicts
// %key:value..%; globals g<module>.<name>; objects o(kind callee args kwargs state builds items
// entries), - for what is absent; persistent ids p(id). What was printed before is #<number in the
// order of printing>: containers, objects, persistent ids.
#include <bit>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/pickle_reader.h"

namespace holdfast {
namespace {

using Type = PickleValue::Type;

std::string Hex(std::string_view bytes) {
  return absl::BytesToHexString(absl::string_view(bytes.data(), bytes.size()));
}

// What is still to be printed: a value, or text between values. Nothing recurses.
struct Item {
  PickleValue value;
  std::string text;
};

class Printer {
 public:
  std::string Print(PickleValue root) {
    open_.push_back({root, ""});
    while (!open_.empty()) {
      const Item item = open_.back();
      open_.pop_back();
      if (item.value.present()) {
        Add(item.value);
      } else {
        out_ += item.text;
      }
    }
    return out_;
  }

 private:
  // `parts` will be printed next, the first one first.
  void Open(const std::vector<Item>& parts) {
    open_.insert(open_.end(), parts.rbegin(), parts.rend());
  }

  static Item PartOf(PickleValue value) {
    return value.present() ? Item{value, ""} : Item{{}, "-"};
  }

  void Add(PickleValue value) {
    switch (value.type()) {
      case Type::kNone:
        out_ += 'N';
        return;
      case Type::kBool:
        out_ += *value.Bool() ? 'T' : 'F';
        return;
      case Type::kInteger:
        absl::StrAppend(&out_, "i", *value.Int64(), ";");
        return;
      case Type::kBigInteger:
        absl::StrAppend(&out_, "h", Hex(*value.BigInteger()), ";");
        return;
      case Type::kFloat:
        absl::StrAppend(&out_, "d",
                        absl::Hex(std::bit_cast<uint64_t>(*value.Double()), absl::kZeroPad16), ";");
        return;
      case Type::kString:
        absl::StrAppend(&out_, "s", Hex(*value.String()), ";");
        return;
      case Type::kBytes:
      case Type::kByteArray:
        absl::StrAppend(&out_, value.type() == Type::kBytes ? "b" : "B", Hex(*value.Bytes()), ";");
        return;
      case Type::kGlobal:
        absl::StrAppend(&out_, "g", Hex(value.module()), ".", Hex(value.name()), ";");
        return;
      default:
        break;
    }
    const auto [place, is_new] = printed_.try_emplace(value.number(), printed_.size());
    if (!is_new) {
      absl::StrAppend(&out_, "#", place->second, ";");
      return;
    }
    std::vector<Item> parts;
    const auto close = [&](std::string_view begin, const char* end) {
      out_ += begin;
      parts.push_back({{}, end});
      Open(parts);
    };
    if (value.type() == Type::kPersistent) {
      parts.push_back(PartOf(value.persistent_id()));
      return close("p(", ")");
    }
    if (value.type() == Type::kObject) {
      for (const PickleValue part : {value.callee(), value.args(), value.kwargs(), value.state()}) {
        parts.push_back(PartOf(part));
      }
      parts.push_back({{}, absl::StrCat(value.state_count(), ";")});
      parts.push_back(PartOf(value.items()));
      parts.push_back(PartOf(value.entries()));
      return close(value.making() == PickleValue::Making::kNew ? "o(n" : "o(r", ")");
    }
    if (value.type() == Type::kDict) {
      for (size_t i = 0; i < *value.EntryCount(); ++i) {
        parts.push_back(PartOf(value.Key(i)));
        parts.push_back({{}, ":"});
        parts.push_back(PartOf(value.Entry(i)));
      }
      return close("%", "%");
    }
    for (size_t i = 0; i < *value.ArraySize(); ++i) parts.push_back(PartOf(value[i]));
    if (value.type() == Type::kList) return close("[", "]");
    if (value.type() == Type::kTuple) return close("(", ")");
    return value.type() == Type::kSet ? close("{", "}") : close("<", ">");
  }

  std::string out_;
  std::vector<Item> open_;
  std::unordered_map<uint32_t, size_t> printed_;
};

int Main() {
  PickleOptions options;
  options.bytes_max = size_t{1} << 30;
  options.values_max = size_t{1} << 26;
  options.classes = PickleOptions::Classes::kOpaque;
  uint64_t length = 0;
  while (std::fread(&length, sizeof length, 1, stdin) == 1) {
    if (length > options.bytes_max) return 1;
    std::string bytes(length, '\0');
    if (length != 0 && std::fread(bytes.data(), length, 1, stdin) != 1) return 1;
    const auto document = PickleDocument::Parse(std::move(bytes), options);
    const std::string line = document.ok() ? Printer().Print((*document)->root())
                                           : "refused " + document.status().ToString();
    std::printf("%s\n", line.c_str());
  }
  return 0;
}

}  // namespace
}  // namespace holdfast

int main() { return holdfast::Main(); }
