#include "format/name_pattern.h"

#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"

namespace holdfast {
namespace {

bool IsDigit(char c) { return c >= '0' && c <= '9'; }
// Not in the middle of a longer one.
std::optional<uint64_t> NumberAt(std::string_view name, size_t at) {
  if (at > 0 && IsDigit(name[at - 1])) return std::nullopt;
  size_t end = at;
  while (end < name.size() && IsDigit(name[end])) ++end;
  uint64_t number = 0;
  if (end == at || !absl::SimpleAtoi(std::string(name.substr(at, end - at)), &number)) {
    return std::nullopt;
  }
  return number;
}

}  // namespace

absl::StatusOr<NamePattern> NamePattern::Parse(std::string_view text) {
  NamePattern pattern;
  std::string literal;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '*' && text[i] != '{') {
      literal += text[i];
      continue;
    }
    if (!literal.empty()) pattern.parts_.push_back({Part::kLiteral, std::exchange(literal, {})});
    if (text[i] == '*') {
      if (pattern.parts_.empty() || pattern.parts_.back().kind != Part::kAny) {
        pattern.parts_.push_back({Part::kAny, ""});
      }
      continue;
    }
    const size_t end = text.find('}', i);
    if (end == std::string_view::npos || end == i + 1) {
      return absl::InvalidArgumentError("a name between { and }");
    }
    pattern.parts_.push_back({Part::kNumber, std::string(text.substr(i + 1, end - i - 1))});
    if (++pattern.number_count_ > kPatternNumbersMax) {
      return absl::InvalidArgumentError(absl::StrFormat("at most %d numbers", kPatternNumbersMax));
    }
    i = end;
  }
  if (!literal.empty()) pattern.parts_.push_back({Part::kLiteral, literal});
  return pattern;
}

std::optional<NamePattern::Numbers> NamePattern::Match(std::string_view name) const {
  Numbers numbers;
  // Greedy with one point of return: after the last `*` (as for wildcards, but a number takes all
  // digits there are, so what follows it decides no more than a literal would).
  size_t part = 0;
  size_t at = 0;
  std::optional<std::pair<size_t, size_t>> retry;  // part behind the last `*`, where it began
  Numbers at_retry;
  for (;;) {
    if (part == parts_.size()) {
      if (at == name.size()) return numbers;
    } else if (parts_[part].kind == Part::kAny) {
      retry = {++part, at};
      at_retry = numbers;
      continue;
    } else if (parts_[part].kind == Part::kLiteral) {
      if (name.substr(at, parts_[part].text.size()) == parts_[part].text) {
        at += parts_[part++].text.size();
        continue;
      }
    } else if (const auto number = NumberAt(name, at); number.has_value()) {
      const auto [same, is_new] = numbers.emplace(parts_[part].text, *number);
      if (is_new || same->second == *number) {
        ++part;
        while (at < name.size() && IsDigit(name[at])) ++at;
        continue;
      }
    }
    if (!retry.has_value() || retry->second >= name.size()) return std::nullopt;
    part = retry->first;
    at = ++retry->second;
    numbers = at_retry;
  }
}

}  // namespace holdfast
