#include "base/json_reader.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "base/suggestion.h"
#include "base/utf8.h"

namespace holdfast {
namespace {

constexpr size_t kTextBytesMax = (size_t{1} << 29) - 1;  // Node::key_length has 29 bits
constexpr uint32_t kNoNode = std::numeric_limits<uint32_t>::max();
// Objects with more members than this get a sorted index.
constexpr uint32_t kLinearMembersMax = 12;
constexpr size_t kQuotedBytesMax = 40;

bool IsDigit(char c) { return c >= '0' && c <= '9'; }

std::string Quote(std::string_view text) {
  if (text.size() <= kQuotedBytesMax) {
    return absl::StrCat("\"", absl::Utf8SafeCHexEscape(std::string(text)), "\"");
  }
  size_t shown = kQuotedBytesMax;
  while (shown > 0 && (static_cast<unsigned char>(text[shown]) & 0xC0) == 0x80) --shown;
  return absl::StrCat("\"", absl::Utf8SafeCHexEscape(std::string(text.substr(0, shown))), "...\"");
}

char* AppendUtf8(uint32_t code_point, char* out) {
  const auto put = [&out](uint32_t byte) { *out++ = static_cast<char>(byte); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xC0 | (code_point >> 6));
    put(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    put(0xE0 | (code_point >> 12));
    put(0x80 | ((code_point >> 6) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  } else {
    put(0xF0 | (code_point >> 18));
    put(0x80 | ((code_point >> 12) & 0x3F));
    put(0x80 | ((code_point >> 6) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  }
  return out;
}

}  // namespace

// One pass without recursion. Finished values wait on `pending_`; when their array or object closes
// they move to the node table as neighbours, and only then are their own children told their
// parent.
class JsonParser {
 public:
  JsonParser(JsonDocument& document, const JsonLimits& limits)
      : document_(document), limits_(limits), text_(document.text_.data()) {}

  absl::Status Parse() {
    // A sequence of: a value begins (scalar, or a container opens), or a container goes on.
    RETURN_IF_ERROR(BeginValue());
    while (!open_.empty()) RETURN_IF_ERROR(ContinueContainer());
    SkipSpace();
    if (at_ != document_.text_.size()) return Error(at_, "the end of the document");
    MoveToTable(0);
    document_.nodes_.back().parent = static_cast<uint32_t>(document_.nodes_.size() - 1);
    return absl::OkStatus();
  }

 private:
  using Node = JsonDocument::Node;
  using Type = JsonValue::Type;

  struct Open {
    size_t pending_begin;  // its first child on pending_
    bool is_object;
    uint32_t key_begin;  // its own key
    uint32_t key_length;
  };

  void SkipSpace() {
    for (;; ++at_) {
      const char c = text_[at_];
      if (c == '\n') {
        ++line_;
        line_begin_ = at_ + 1;
      } else if (c != ' ' && c != '\t' && c != '\r') {
        return;
      }
    }
  }

  absl::Status Error(size_t where, std::string_view expected) const {
    std::string found;
    if (where >= document_.text_.size()) {
      found = "the end";
    } else {
      found = absl::StrCat("'", absl::CHexEscape(document_.text_.substr(where, 1)), "'");
    }
    return absl::InvalidArgumentError(
        absl::StrFormat("JSON line %d, column %d: expected %s, found %s", line_,
                        where - line_begin_ + 1, std::string(expected), found));
  }

  // A value begins here. After this a scalar or an empty container is complete, or the first scalar
  // of the containers that opened here is.
  absl::Status BeginValue() {
    for (;;) {
      SkipSpace();
      if (++value_count_ > limits_.values_max) {
        return TooMuch(absl::StrFormat("more than %d values", limits_.values_max));
      }
      const char c = text_[at_];
      if (c != '{' && c != '[') return ReadScalar();
      if (open_.size() >= static_cast<size_t>(std::max(limits_.depth_max, 0))) {
        return TooMuch(absl::StrFormat("nested deeper than %d", limits_.depth_max));
      }
      const bool is_object = c == '{';
      open_.push_back({pending_.size(), is_object, key_begin_, key_length_});
      ++at_;
      SkipSpace();
      if (text_[at_] == (is_object ? '}' : ']')) return CloseContainer();
      key_begin_ = key_length_ = 0;
      if (is_object) RETURN_IF_ERROR(ReadKey());
    }
  }

  absl::Status TooMuch(const std::string& what) const {
    return absl::InvalidArgumentError(absl::StrFormat("JSON line %d, column %d: %s, the limit",
                                                      line_, at_ - line_begin_ + 1, what));
  }

  absl::Status ReadScalar() {
    const char c = text_[at_];
    Node node;
    node.key_begin = key_begin_;
    node.key_length = key_length_;
    if (c == '"') {
      node.type = static_cast<uint32_t>(Type::kString);
      RETURN_IF_ERROR(ReadString(node.begin, node.length));
    } else if (c == '-' || IsDigit(c)) {
      node.type = static_cast<uint32_t>(Type::kNumber);
      RETURN_IF_ERROR(ReadNumber(node));
    } else {
      RETURN_IF_ERROR(ReadWord(node));
    }
    pending_.push_back(node);
    return absl::OkStatus();
  }

  // A child of the innermost open container is complete: a comma and the next one, or the end.
  absl::Status ContinueContainer() {
    const bool is_object = open_.back().is_object;
    SkipSpace();
    const char c = text_[at_];
    if (c == (is_object ? '}' : ']')) return CloseContainer();
    if (c != ',') return Error(at_, is_object ? "',' or '}'" : "',' or ']'");
    ++at_;
    SkipSpace();
    key_begin_ = key_length_ = 0;
    if (is_object) RETURN_IF_ERROR(ReadKey());
    return BeginValue();
  }

  absl::Status CloseContainer() {
    ++at_;
    const Open open = open_.back();
    open_.pop_back();
    Node node;
    node.type = static_cast<uint32_t>(open.is_object ? Type::kObject : Type::kArray);
    node.key_begin = open.key_begin;
    node.key_length = open.key_length;
    node.begin = static_cast<uint32_t>(document_.nodes_.size());
    node.length = static_cast<uint32_t>(pending_.size() - open.pending_begin);
    MoveToTable(open.pending_begin);
    if (open.is_object) RETURN_IF_ERROR(IndexMembers(node));
    pending_.push_back(node);
    return absl::OkStatus();
  }

  void MoveToTable(size_t pending_begin) {
    for (size_t i = pending_begin; i < pending_.size(); ++i) {
      const Node& node = pending_[i];
      const uint32_t index = static_cast<uint32_t>(document_.nodes_.size());
      if (node.type == static_cast<uint32_t>(Type::kArray) ||
          node.type == static_cast<uint32_t>(Type::kObject)) {
        for (uint32_t k = 0; k < node.length; ++k) document_.nodes_[node.begin + k].parent = index;
      }
      document_.nodes_.push_back(node);
    }
    pending_.resize(pending_begin);
  }

  // Refuses a duplicate key; large objects get their sorted index, which finds duplicates too.
  absl::Status IndexMembers(const Node& object) {
    const auto key = [this](uint32_t index) { return document_.KeyOf(document_.nodes_[index]); };
    const uint32_t begin = object.begin;
    const uint32_t end = object.begin + object.length;
    const bool keep = limits_.duplicates == JsonDuplicates::kKeep;
    if (object.length <= kLinearMembersMax) {
      if (keep) return absl::OkStatus();
      for (uint32_t i = begin + 1; i < end; ++i) {
        for (uint32_t k = begin; k < i; ++k) {
          if (key(i) == key(k)) return DuplicateKey(key(i));
        }
      }
      return absl::OkStatus();
    }
    std::vector<uint32_t> sorted(object.length);
    for (uint32_t i = 0; i < object.length; ++i) sorted[i] = begin + i;
    // Of equal keys the last one comes first: FindMember takes the first that it meets.
    std::sort(sorted.begin(), sorted.end(), [&key](uint32_t a, uint32_t b) {
      const int order = key(a).compare(key(b));
      return order != 0 ? order < 0 : a > b;
    });
    for (size_t i = 1; !keep && i < sorted.size(); ++i) {
      if (key(sorted[i - 1]) == key(sorted[i])) return DuplicateKey(key(sorted[i]));
    }
    document_.sorted_members_.emplace(begin, std::move(sorted));
    return absl::OkStatus();
  }

  absl::Status DuplicateKey(std::string_view key) const {
    return absl::InvalidArgumentError(
        absl::StrFormat("JSON line %d, column %d: the object that ends here has the key %s twice",
                        line_, at_ - line_begin_, Quote(key)));
  }

  absl::Status ReadKey() {
    if (text_[at_] != '"') return Error(at_, "a key in double quotes");
    RETURN_IF_ERROR(ReadString(key_begin_, key_length_));
    SkipSpace();
    if (text_[at_] != ':') return Error(at_, "':'");
    ++at_;
    return absl::OkStatus();
  }

  // Decodes the string at `at_` in place.
  absl::Status ReadString(uint32_t& begin, uint32_t& length) {
    ++at_;
    begin = static_cast<uint32_t>(at_);
    char* out = text_ + at_;
    for (;;) {
      const unsigned char c = static_cast<unsigned char>(text_[at_]);
      if (c == '"') break;
      if (c == '\\') {
        RETURN_IF_ERROR(ReadEscape(out));
      } else if (c < 0x20) {
        return Error(at_,
                     at_ >= document_.text_.size() ? "'\"'" : "no control character in a string");
      } else if (c < 0x80) {
        *out++ = text_[at_++];
      } else {
        const size_t bytes = Utf8SequenceBytes(std::string_view(document_.text_).substr(at_, 4));
        if (bytes == 0) return Error(at_, "valid UTF-8");
        for (size_t i = 0; i < bytes; ++i) *out++ = text_[at_++];
      }
    }
    length = static_cast<uint32_t>(out - (text_ + begin));
    ++at_;
    return absl::OkStatus();
  }

  absl::Status ReadEscape(char*& out) {
    static constexpr std::string_view kLetters = "\"\\/bfnrt";
    static constexpr std::string_view kMeanings = "\"\\/\b\f\n\r\t";
    const char letter = text_[at_ + 1];
    if (letter == 'u') {
      ASSIGN_OR_RETURN(uint32_t code_point, ReadHex4(at_));
      const size_t first = at_;
      at_ += 6;
      if (code_point >= 0xDC00 && code_point <= 0xDFFF) return Error(first, "no lone surrogate");
      if (code_point >= 0xD800 && code_point <= 0xDBFF) {
        if (text_[at_] != '\\' || text_[at_ + 1] != 'u') return Error(first, "no lone surrogate");
        ASSIGN_OR_RETURN(const uint32_t low, ReadHex4(at_));
        if (low < 0xDC00 || low > 0xDFFF) return Error(first, "no lone surrogate");
        code_point = 0x10000 + ((code_point - 0xD800) << 10) + (low - 0xDC00);
        at_ += 6;
      }
      out = AppendUtf8(code_point, out);
      return absl::OkStatus();
    }
    const size_t which = kLetters.find(letter);
    if (which == std::string_view::npos) return Error(at_ + 1, "an escape of JSON");
    *out++ = kMeanings[which];
    at_ += 2;
    return absl::OkStatus();
  }

  // The four digits of the \uXXXX at `at`.
  absl::StatusOr<uint32_t> ReadHex4(size_t at) const {
    uint32_t value = 0;
    for (size_t i = at + 2; i < at + 6; ++i) {
      const char c = text_[i];  // a NUL ends the text, and is no digit
      uint32_t digit;
      if (IsDigit(c)) {
        digit = static_cast<uint32_t>(c - '0');
      } else if (c >= 'a' && c <= 'f') {
        digit = static_cast<uint32_t>(c - 'a' + 10);
      } else if (c >= 'A' && c <= 'F') {
        digit = static_cast<uint32_t>(c - 'A' + 10);
      } else {
        return Error(i, "a hexadecimal digit");
      }
      value = value * 16 + digit;
    }
    return value;
  }

  absl::Status ReadDigits() {
    if (!IsDigit(text_[at_])) return Error(at_, "a digit");
    while (IsDigit(text_[at_])) ++at_;
    return absl::OkStatus();
  }

  absl::Status ReadNumber(Node& node) {
    const size_t begin = at_;
    if (text_[at_] == '-') ++at_;
    if (text_[at_] == '0') {
      ++at_;
      if (IsDigit(text_[at_])) return Error(at_, "no digit after a leading zero");
    } else {
      RETURN_IF_ERROR(ReadDigits());
    }
    if (text_[at_] == '.') {
      ++at_;
      RETURN_IF_ERROR(ReadDigits());
    }
    if (text_[at_] == 'e' || text_[at_] == 'E') {
      ++at_;
      if (text_[at_] == '+' || text_[at_] == '-') ++at_;
      RETURN_IF_ERROR(ReadDigits());
    }
    node.begin = static_cast<uint32_t>(begin);
    node.length = static_cast<uint32_t>(at_ - begin);
    return absl::OkStatus();
  }

  absl::Status ReadWord(Node& node) {
    const std::string_view rest = std::string_view(document_.text_).substr(at_);
    for (std::string_view word : {"true", "false", "null"}) {
      if (!rest.starts_with(word)) continue;
      node.type = static_cast<uint32_t>(word == "null" ? Type::kNull : Type::kBool);
      node.begin = static_cast<uint32_t>(at_);
      node.length = static_cast<uint32_t>(word.size());
      at_ += word.size();
      return absl::OkStatus();
    }
    return Error(at_, "a value");
  }

  JsonDocument& document_;
  const JsonLimits& limits_;
  char* const text_;  // NUL-terminated
  size_t at_ = 0;
  size_t line_ = 1;
  size_t line_begin_ = 0;
  size_t value_count_ = 0;
  uint32_t key_begin_ = 0;  // of the value that begins next
  uint32_t key_length_ = 0;
  std::vector<Open> open_;
  std::vector<Node> pending_;
};

absl::StatusOr<std::unique_ptr<JsonDocument>> JsonDocument::Parse(std::string text,
                                                                  const JsonLimits& limits) {
  const size_t bytes_max = std::min(limits.bytes_max, kTextBytesMax);
  if (text.size() > bytes_max) {
    return absl::InvalidArgumentError(
        absl::StrFormat("JSON: expected at most %d bytes, found %d", bytes_max, text.size()));
  }
  std::unique_ptr<JsonDocument> document(new JsonDocument);  // the constructor is private
  document->text_ = std::move(text);
  RETURN_IF_ERROR(JsonParser(*document, limits).Parse());
  return document;
}

JsonValue JsonDocument::root() const {
  return JsonValue(this, static_cast<uint32_t>(nodes_.size() - 1));
}

std::string_view JsonDocument::TextOf(const Node& node) const {
  return std::string_view(text_).substr(node.begin, node.length);
}

std::string_view JsonDocument::KeyOf(const Node& node) const {
  return std::string_view(text_).substr(node.key_begin, node.key_length);
}

uint32_t JsonDocument::FindMember(const Node& object, std::string_view key) const {
  if (object.length > kLinearMembersMax) {
    const std::vector<uint32_t>& sorted = sorted_members_.at(object.begin);
    const auto found = std::lower_bound(
        sorted.begin(), sorted.end(), key,
        [this](uint32_t index, std::string_view k) { return KeyOf(nodes_[index]) < k; });
    if (found == sorted.end() || KeyOf(nodes_[*found]) != key) return kNoNode;
    return *found;
  }
  for (uint32_t i = object.begin + object.length; i-- > object.begin;) {
    if (KeyOf(nodes_[i]) == key) return i;
  }
  return kNoNode;
}

JsonValue::Type JsonValue::type() const {
  CHECK(present());
  return static_cast<Type>(document_->nodes_[node_].type);
}

bool JsonValue::present() const { return document_ != nullptr; }

std::string JsonValue::Describe() const {
  if (!present()) return "nothing";
  const JsonDocument::Node& node = document_->nodes_[node_];
  const std::string_view text = document_->TextOf(node);
  switch (type()) {
    case Type::kNull:
      return "null";
    case Type::kBool:
      return std::string(text);
    case Type::kNumber:
      return absl::StrCat("the number ", std::string(text.substr(0, kQuotedBytesMax)));
    case Type::kString:
      return absl::StrCat("the string ", Quote(text));
    case Type::kArray:
      return absl::StrCat("an array of ", node.length);
    case Type::kObject:
      return absl::StrCat("an object with ", node.length, node.length == 1 ? " key" : " keys");
  }
  return "an unknown value";
}

absl::Status JsonValue::Mismatch(std::string_view expected) const {
  return absl::InvalidArgumentError(
      absl::StrFormat("%s: expected %s, found %s", Path(), std::string(expected), Describe()));
}

absl::StatusOr<bool> JsonValue::Bool() const {
  if (!present() || type() != Type::kBool) return Mismatch("true or false");
  return document_->TextOf(document_->nodes_[node_]) == "true";
}

namespace {
// The whole of `text` as an integer or double, or nothing if it is none or out of range.
template <typename Number>
std::optional<Number> Convert(std::string_view text) {
  Number number{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return number;
}
}  // namespace

absl::StatusOr<uint64_t> JsonValue::Uint64() const {
  if (present() && type() == Type::kNumber) {
    const auto number = Convert<uint64_t>(document_->TextOf(document_->nodes_[node_]));
    if (number.has_value()) return *number;
  }
  return Mismatch("an integer from 0 to 2^64 - 1");
}

absl::StatusOr<int64_t> JsonValue::Int64() const {
  if (present() && type() == Type::kNumber) {
    const auto number = Convert<int64_t>(document_->TextOf(document_->nodes_[node_]));
    if (number.has_value()) return *number;
  }
  return Mismatch("an integer from -2^63 to 2^63 - 1");
}

absl::StatusOr<double> JsonValue::Double() const {
  if (present() && type() == Type::kNumber) {
    const auto number = Convert<double>(document_->TextOf(document_->nodes_[node_]));
    if (number.has_value()) return *number;
  }
  return Mismatch("a number in the range of a double");
}

absl::StatusOr<std::string_view> JsonValue::String() const {
  if (!present() || type() != Type::kString) return Mismatch("a string");
  return document_->TextOf(document_->nodes_[node_]);
}

absl::StatusOr<size_t> JsonValue::ArraySize() const {
  if (!present() || type() != Type::kArray) return Mismatch("an array");
  return document_->nodes_[node_].length;
}

JsonValue JsonValue::operator[](size_t index) const {
  CHECK(type() == Type::kArray);
  const JsonDocument::Node& node = document_->nodes_[node_];
  CHECK(index < node.length);
  return JsonValue(document_, node.begin + static_cast<uint32_t>(index));
}

JsonValue JsonValue::Find(std::string_view key) const {
  if (!present() || type() != Type::kObject) return JsonValue();
  const uint32_t member = document_->FindMember(document_->nodes_[node_], key);
  return member == kNoNode ? JsonValue() : JsonValue(document_, member);
}

absl::StatusOr<JsonValue> JsonValue::Get(std::string_view key) const {
  if (!present() || type() != Type::kObject) return Mismatch("an object");
  const JsonValue member = Find(key);
  if (!member.present()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: expected the key %s, found none", Path(), Quote(key)));
  }
  return member;
}

absl::StatusOr<std::vector<std::string_view>> JsonValue::Keys() const {
  if (!present() || type() != Type::kObject) return Mismatch("an object");
  const JsonDocument::Node& node = document_->nodes_[node_];
  std::vector<std::string_view> keys;
  keys.reserve(node.length);
  for (uint32_t i = node.begin; i < node.begin + node.length; ++i) {
    keys.push_back(document_->KeyOf(document_->nodes_[i]));
  }
  return keys;
}

JsonValue JsonValue::Member(size_t index) const {
  CHECK(type() == Type::kObject);
  const JsonDocument::Node& node = document_->nodes_[node_];
  CHECK(index < node.length);
  return JsonValue(document_, node.begin + static_cast<uint32_t>(index));
}

absl::Status JsonValue::ExpectKeys(std::initializer_list<std::string_view> known) const {
  if (!present() || type() != Type::kObject) return Mismatch("an object");
  const JsonDocument::Node& node = document_->nodes_[node_];
  for (uint32_t i = node.begin; i < node.begin + node.length; ++i) {
    const std::string_view key = document_->KeyOf(document_->nodes_[i]);
    if (std::find(known.begin(), known.end(), key) != known.end()) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(Path(), ": unknown key ", Quote(key),
                     DidYouMean(key, std::span(known.begin(), known.size()))));
  }
  return absl::OkStatus();
}

std::string JsonValue::Path() const {
  if (!present()) return "(absent)";
  const auto& nodes = document_->nodes_;
  std::vector<std::string> parts;
  for (uint32_t at = node_; nodes[at].parent != at; at = nodes[at].parent) {
    const JsonDocument::Node& parent = nodes[nodes[at].parent];
    if (static_cast<Type>(parent.type) == Type::kArray) {
      parts.push_back(absl::StrCat("[", at - parent.begin, "]"));
      continue;
    }
    const std::string_view key = document_->KeyOf(nodes[at]);
    const bool identifier = !key.empty() && key.size() <= kQuotedBytesMax && !IsDigit(key[0]) &&
                            std::all_of(key.begin(), key.end(), [](char c) {
                              return c == '_' || absl::ascii_isalnum(static_cast<unsigned char>(c));
                            });
    parts.push_back(identifier ? absl::StrCat(".", std::string(key))
                               : absl::StrCat("[", Quote(key), "]"));
  }
  if (parts.empty()) return "$";
  std::string path;
  for (auto part = parts.rbegin(); part != parts.rend(); ++part) path += *part;
  return path[0] == '.' ? path.substr(1) : path;
}

}  // namespace holdfast
