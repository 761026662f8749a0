#include "converter/rename_rules.h"

#include <re2/re2.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "base/suggestion.h"
#include "base/utf8.h"
#include "format/tensor_piece.h"

namespace holdfast::converter {
namespace {

constexpr std::array<std::string_view, 4> kWords = {"name", "prefix", "suffix", "regex"};
constexpr size_t kTokensMax = 4;  // one more than a rule has
constexpr int64_t kPatternMemoryBytes = 1 << 20;

absl::Status Refuse(size_t line, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrFormat("--rename: line %d: %s", line, what));
}

// The end of the JSON string that begins `text`, or npos.
size_t EndOfString(std::string_view text) {
  for (size_t i = 1; i < text.size(); ++i) {
    if (text[i] == '\\') {
      ++i;
    } else if (text[i] == '"') {
      return i + 1;
    }
  }
  return std::string_view::npos;
}

absl::StatusOr<std::vector<std::string>> TokensOf(std::string_view line, size_t number) {
  std::vector<std::string> tokens;
  for (;;) {
    const size_t begin = line.find_first_not_of(" \t\r");
    if (begin == std::string_view::npos || line[begin] == '#') return tokens;
    line.remove_prefix(begin);
    if (tokens.size() == kTokensMax) return tokens;
    if (line.front() != '"') {
      const size_t end = std::min(line.find_first_of(" \t\r"), line.size());
      tokens.emplace_back(line.substr(0, end));
      line.remove_prefix(end);
      continue;
    }
    const size_t end = EndOfString(line);
    const nlohmann::json text =
        end == std::string_view::npos
            ? nlohmann::json()
            : nlohmann::json::parse(line.substr(0, end), nullptr, /*allow_exceptions=*/false);
    if (!text.is_string()) {
      return Refuse(number, "expected a JSON string, found a quotation mark that begins none");
    }
    tokens.push_back(text.get<std::string>());
    line.remove_prefix(end);
  }
}

}  // namespace

struct RenameRules::Rule {
  enum class Kind { kName, kPrefix, kSuffix, kRegex };
  Kind kind = Kind::kName;
  std::string from;
  std::string to;
  std::unique_ptr<const re2::RE2> pattern;  // kRegex
  size_t line = 0;
  bool used = false;

  bool Change(std::string& name) const {
    switch (kind) {
      case Kind::kName:
        if (name != from) return false;
        name = to;
        return true;
      case Kind::kPrefix:
        if (!name.starts_with(from)) return false;
        name.replace(0, from.size(), to);
        return true;
      case Kind::kSuffix:
        if (!name.ends_with(from)) return false;
        name.replace(name.size() - from.size(), from.size(), to);
        return true;
      case Kind::kRegex:
        return re2::RE2::GlobalReplace(&name, *pattern, to) > 0;
    }
    return false;
  }
};

RenameRules::RenameRules(std::vector<std::unique_ptr<Rule>> rules) : rules_(std::move(rules)) {}
RenameRules::RenameRules(RenameRules&&) noexcept = default;
RenameRules& RenameRules::operator=(RenameRules&&) noexcept = default;
RenameRules::~RenameRules() = default;

absl::StatusOr<RenameRules> RenameRules::Parse(std::string_view text) {
  std::vector<std::unique_ptr<Rule>> rules;
  size_t number = 0;
  size_t patterns = 0;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    ++number;
    if (!IsUtf8(line)) return Refuse(number, "expected UTF-8, found other bytes");
    ASSIGN_OR_RETURN(std::vector<std::string> tokens, TokensOf(line, number));
    if (tokens.empty()) continue;
    const auto word = std::find(kWords.begin(), kWords.end(), tokens[0]);
    if (word == kWords.end()) {
      return Refuse(number,
                    absl::StrFormat("expected name, prefix, suffix or regex, found \"%s\"%s",
                                    tokens[0].substr(0, 200), DidYouMean(tokens[0], kWords)));
    }
    if (tokens.size() != 3) {
      return Refuse(number, absl::StrFormat("expected %s OLD NEW, found %s", tokens[0],
                                            tokens.size() < 3 ? "fewer words" : "more words"));
    }
    if (rules.size() == kRenameRulesMax) {
      return Refuse(number, absl::StrFormat("expected at most %d rules", kRenameRulesMax));
    }
    // What no name can have; a longer NEW would be put in at every match of a pattern.
    for (const std::string& each : {tokens[1], tokens[2]}) {
      if (each.size() <= kNameBytesMax) continue;
      return Refuse(number, absl::StrFormat("expected words of at most %d bytes, found %d",
                                            kNameBytesMax, each.size()));
    }
    auto rule = std::make_unique<Rule>();
    rule->kind = static_cast<Rule::Kind>(word - kWords.begin());
    rule->from = std::move(tokens[1]);
    rule->to = std::move(tokens[2]);
    rule->line = number;
    if (rule->kind == Rule::Kind::kRegex && rule->from.empty()) {
      return Refuse(number, "expected a pattern, found an empty one");
    }
    if (rule->kind == Rule::Kind::kRegex) {
      if (++patterns > kRenamePatternsMax) {
        return Refuse(number, absl::StrFormat("expected at most %d patterns", kRenamePatternsMax));
      }
      re2::RE2::Options options(re2::RE2::Quiet);
      options.set_max_mem(kPatternMemoryBytes);
      rule->pattern = std::make_unique<const re2::RE2>(rule->from, options);
      if (!rule->pattern->ok()) {
        return Refuse(number, absl::StrFormat("expected an RE2 pattern, found \"%s\": %s",
                                              rule->from.substr(0, 200), rule->pattern->error()));
      }
      std::string error;
      if (!rule->pattern->CheckRewriteString(rule->to, &error)) {
        return Refuse(number, absl::StrFormat("\"%s\": %s", rule->to.substr(0, 200), error));
      }
    }
    rules.push_back(std::move(rule));
  }
  return RenameRules(std::move(rules));
}

bool RenameRules::empty() const { return rules_.empty(); }

std::string RenameRules::Apply(std::string name) {
  for (const std::unique_ptr<Rule>& rule : rules_) {
    if (rule->Change(name)) rule->used = true;
    // No rule can make a name longer than any name may be, again and again.
    if (name.size() > kNameBytesMax) return name;
  }
  return name;
}

absl::Status RenameRules::CheckAllUsed() const {
  for (const std::unique_ptr<Rule>& rule : rules_) {
    if (rule->used) continue;
    return Refuse(rule->line, absl::StrFormat("%s \"%s\": it fits no tensor's name",
                                              kWords[static_cast<size_t>(rule->kind)],
                                              rule->from.substr(0, 200)));
  }
  return absl::OkStatus();
}

}  // namespace holdfast::converter
