#include "converter/mapping_rules.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <span>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "base/suggestion.h"
#include "base/utf8.h"
#include "converter/block_tensor.h"
#include "format/tensor_piece.h"

namespace holdfast::converter {
namespace {

constexpr std::array<std::string_view, 6> kOperations = {"transpose", "concat", "interleave",
                                                         "stack",     "pad",    "rotary"};
constexpr std::array<std::string_view, 3> kStatements = {"drop", "shape", "require"};
constexpr std::string_view kPunctuation = "(),=[]*";
constexpr size_t kShownBytesMax = 200;

struct Token {
  enum class Kind { kWord, kText, kMark, kEndOfLine, kEnd };  // kText: a JSON string
  Kind kind = Kind::kEnd;
  std::string text;
  size_t line = 0;
};

std::string Listed(std::span<const std::string_view> words) {
  return absl::StrJoin(std::vector<std::string>(words.begin(), words.end()), ", ");
}

bool IsBlank(char c) { return c == ' ' || c == '\t' || c == '\r'; }

class Parser {
 public:
  Parser(std::string_view text, std::string_view where) : rest_(text), where_(where) {}

  absl::StatusOr<MappingRules> Run() {
    RETURN_IF_ERROR(Advance());
    while (token_.kind != Token::Kind::kEnd) {
      if (token_.kind == Token::Kind::kEndOfLine) {
        RETURN_IF_ERROR(Advance());
        continue;
      }
      if (++statement_count_ > kMappingStatementsMax) {
        return Refuse(absl::StrFormat("expected at most %d statements", kMappingStatementsMax));
      }
      RETURN_IF_ERROR(ParseStatement());
      if (token_.kind != Token::Kind::kEndOfLine && token_.kind != Token::Kind::kEnd) {
        return Expected("the end of the line");
      }
    }
    return std::move(result_);
  }

 private:
  absl::Status Refuse(const std::string& what) const { return RefuseAt(token_.line, what); }
  absl::Status RefuseAt(size_t line, const std::string& what) const {
    return absl::InvalidArgumentError(absl::StrFormat("%s: line %d: %s", where_, line, what));
  }
  std::string Found() const {
    switch (token_.kind) {
      case Token::Kind::kEnd:
        return "the end of the file";
      case Token::Kind::kEndOfLine:
        return "the end of the line";
      default:
        return absl::StrFormat("\"%s\"", token_.text.substr(0, kShownBytesMax));
    }
  }
  absl::Status Expected(const std::string& what) const {
    return Refuse(absl::StrFormat("expected %s, found %s", what, Found()));
  }
  bool IsMark(char mark) const {
    return token_.kind == Token::Kind::kMark && token_.text[0] == mark;
  }

  // The next token. A statement may go on in the next line within brackets, and after `=`.
  absl::Status Advance() {
    const bool goes_on = open_ > 0 || IsMark('=');
    for (;;) {
      const size_t begin = rest_.find_first_not_of(" \t\r");
      rest_.remove_prefix(std::min(begin, rest_.size()));
      if (!rest_.empty() && rest_[0] == '#') {
        rest_.remove_prefix(std::min(rest_.find('\n'), rest_.size()));
      }
      if (rest_.empty()) {
        token_ = {Token::Kind::kEnd, "", line_};
        return absl::OkStatus();
      }
      if (rest_[0] != '\n') break;
      rest_.remove_prefix(1);
      ++line_;
      if (!goes_on) {
        token_ = {Token::Kind::kEndOfLine, "", line_ - 1};
        return absl::OkStatus();
      }
    }
    if (kPunctuation.find(rest_[0]) != std::string_view::npos) {
      token_ = {Token::Kind::kMark, std::string(1, rest_[0]), line_};
      if (rest_[0] == '(' || rest_[0] == '[') ++open_;
      if ((rest_[0] == ')' || rest_[0] == ']') && open_ > 0) --open_;
      rest_.remove_prefix(1);
      return absl::OkStatus();
    }
    return rest_[0] == '"' ? ReadText() : ReadWord();
  }

  absl::Status ReadWord() {
    size_t end = 0;
    while (end < rest_.size() && !IsBlank(rest_[end]) && rest_[end] != '\n' && rest_[end] != '#' &&
           kPunctuation.find(rest_[end]) == std::string_view::npos) {
      ++end;
    }
    token_ = {Token::Kind::kWord, std::string(rest_.substr(0, end)), line_};
    rest_.remove_prefix(end);
    return absl::OkStatus();
  }

  absl::Status ReadText() {
    size_t end = 1;
    while (end < rest_.size() && rest_[end] != '"' && rest_[end] != '\n') {
      end += rest_[end] == '\\' ? 2 : 1;
    }
    const nlohmann::json text = nlohmann::json::parse(rest_.substr(0, end + 1), nullptr,
                                                      /*allow_exceptions=*/false);
    if (!text.is_string()) {
      return RefuseAt(line_, "expected a JSON string, found a quotation mark that begins none");
    }
    token_ = {Token::Kind::kText, text.get<std::string>(), line_};
    rest_.remove_prefix(std::min(end + 1, rest_.size()));
    return absl::OkStatus();
  }

  absl::Status Take(char mark) {
    if (!IsMark(mark)) return Expected(absl::StrFormat("\"%c\"", mark));
    return Advance();
  }

  absl::StatusOr<std::string> TakeWord(const std::string& expected) {
    if (token_.kind != Token::Kind::kWord) return Expected(expected);
    std::string word = token_.text;
    RETURN_IF_ERROR(Advance());
    return word;
  }

  absl::StatusOr<NameTemplate> TakeName() {
    if (token_.kind != Token::Kind::kWord && token_.kind != Token::Kind::kText) {
      return Expected("a tensor's name");
    }
    absl::StatusOr<NameTemplate> name = NameTemplate::Parse(token_.text);
    if (!name.ok()) return Expected(std::string(name.status().message()));
    RETURN_IF_ERROR(Advance());
    return name;
  }

  absl::Status ParseStatement() {
    const size_t line = token_.line;
    const Token first = token_;
    if (first.kind == Token::Kind::kWord && first.text == "drop") return ParseDrop();
    if (first.kind == Token::Kind::kWord && first.text == "shape") return ParseShape(line);
    if (first.kind == Token::Kind::kWord && first.text == "require") return ParseRequire(line);
    ASSIGN_OR_RETURN(MappingExpression left, ParseExpression(0));
    if (!IsMark('=')) {
      const bool is_word = first.kind == Token::Kind::kWord;
      return Refuse(absl::StrFormat("expected \"=\", found %s%s", Found(),
                                    is_word ? DidYouMean(first.text, kStatements) : std::string()));
    }
    RETURN_IF_ERROR(Advance());
    ASSIGN_OR_RETURN(MappingExpression right, ParseExpression(0));
    MappingRule rule{.left = std::move(left), .right = std::move(right), .line = line};
    RETURN_IF_ERROR(CheckCaptures(rule));
    result_.rules.push_back(std::move(rule));
    return absl::OkStatus();
  }

  absl::Status ParseDrop() {
    RETURN_IF_ERROR(Advance());
    ASSIGN_OR_RETURN(NameTemplate name, TakeName());
    result_.drops.push_back(std::move(name));
    return absl::OkStatus();
  }

  absl::Status ParseShape(size_t line) {
    RETURN_IF_ERROR(Advance());
    ASSIGN_OR_RETURN(NameTemplate name, TakeName());
    RETURN_IF_ERROR(Take('['));
    MappingShape shape{.name = std::move(name), .words = {}, .line = line};
    while (!IsMark(']')) {
      ASSIGN_OR_RETURN(std::string word, TakeWord("a word for a size, or \"]\""));
      shape.words.push_back(std::move(word));
      if (shape.words.size() > kTensorDimsMax) {
        return Refuse(absl::StrFormat("expected at most %d dimensions", kTensorDimsMax));
      }
    }
    RETURN_IF_ERROR(Advance());
    result_.shapes.push_back(std::move(shape));
    return absl::OkStatus();
  }

  absl::Status ParseRequire(size_t line) {
    RETURN_IF_ERROR(Advance());
    const Token at = token_;
    ASSIGN_OR_RETURN(std::string fact, TakeWord("a fact (args.NAME or config.NAME)"));
    if (!fact.starts_with("args.") && !fact.starts_with("config.")) {
      return RefuseAt(at.line, absl::StrFormat("expected args.NAME or config.NAME, found \"%s\"",
                                               fact.substr(0, kShownBytesMax)));
    }
    if (token_.kind != Token::Kind::kWord && token_.kind != Token::Kind::kText) {
      return Expected("a value");
    }
    result_.requirements.push_back({std::move(fact), token_.text, line});
    return Advance();
  }

  absl::StatusOr<MappingExpression> ParseExpression(size_t depth) {
    if (depth > kMappingDepthMax) {
      return Refuse(
          absl::StrFormat("expected at most %d operations in each other", kMappingDepthMax));
    }
    const Token first = token_;
    MappingExpression expression;
    ASSIGN_OR_RETURN(NameTemplate name, TakeName());
    if (!IsMark('(')) {
      expression.name = std::move(name);
      return expression;
    }
    const auto word = first.kind == Token::Kind::kWord
                          ? std::find(kOperations.begin(), kOperations.end(), first.text)
                          : kOperations.end();
    if (word == kOperations.end()) {
      return RefuseAt(first.line,
                      absl::StrFormat("expected an operation (%s), found \"%s\"%s",
                                      Listed(kOperations), first.text.substr(0, kShownBytesMax),
                                      DidYouMean(first.text, kOperations)));
    }
    RETURN_IF_ERROR(Advance());
    RETURN_IF_ERROR(ParseOperands(*word, depth, expression));
    RETURN_IF_ERROR(Take(')'));
    return expression;
  }

  absl::Status ParseOperands(std::string_view operation, size_t depth, MappingExpression& into) {
    using Kind = MappingExpression::Kind;
    if (operation == "concat" || operation == "interleave") {
      into.kind = Kind::kInterleave;
      if (operation == "interleave") {
        ASSIGN_OR_RETURN(into.number, ParseNumber());
        RETURN_IF_ERROR(Take(','));
      }
      return ParseList(depth, into);
    }
    if (operation == "rotary") {
      into.kind = Kind::kRotary;
      ASSIGN_OR_RETURN(into.number, ParseNumber());
      RETURN_IF_ERROR(Take(','));
    } else if (operation == "stack") {
      into.kind = Kind::kStack;
      ASSIGN_OR_RETURN(into.capture, TakeWord("the name between { and } that counts"));
      RETURN_IF_ERROR(Take(','));
    } else {
      into.kind = operation == "pad" ? Kind::kPad : Kind::kTranspose;
    }
    ASSIGN_OR_RETURN(MappingExpression operand, ParseExpression(depth + 1));
    into.operands.push_back(std::move(operand));
    if (into.kind != Kind::kPad) return absl::OkStatus();
    into.number.name = "vocab";
    into.padded.name = "padded_vocab";
    if (!IsMark(',')) return absl::OkStatus();
    RETURN_IF_ERROR(Advance());
    ASSIGN_OR_RETURN(into.number, ParseNumber());
    RETURN_IF_ERROR(Take(','));
    ASSIGN_OR_RETURN(into.padded, ParseNumber());
    return absl::OkStatus();
  }

  // Operands of which the rows are to each other as their numbers: `heads * q, groups * k`.
  absl::Status ParseList(size_t depth, MappingExpression& into) {
    for (;;) {
      MappingNumber weight;
      const Token first = token_;
      ASSIGN_OR_RETURN(MappingExpression operand, ParseExpression(depth + 1));
      if (IsMark('*')) {
        if (first.kind != Token::Kind::kWord || operand.kind != MappingExpression::Kind::kTensor) {
          return RefuseAt(first.line, "expected a number or its name before \"*\"");
        }
        ASSIGN_OR_RETURN(weight, NumberOf(first));
        RETURN_IF_ERROR(Advance());
        ASSIGN_OR_RETURN(operand, ParseExpression(depth + 1));
      }
      into.operands.push_back(std::move(operand));
      into.weights.push_back(std::move(weight));
      if (into.operands.size() > kMappingOperandsMax) {
        return Refuse(absl::StrFormat("expected at most %d operands", kMappingOperandsMax));
      }
      if (!IsMark(',')) return absl::OkStatus();
      RETURN_IF_ERROR(Advance());
    }
  }

  absl::StatusOr<MappingNumber> ParseNumber() {
    const Token token = token_;
    RETURN_IF_ERROR(TakeWord("a number or its name").status());
    return NumberOf(token);
  }

  absl::StatusOr<MappingNumber> NumberOf(const Token& token) const {
    const std::string& word = token.text;
    const auto is_in = [&](std::string_view letters) {
      return word.find_first_not_of(letters) == std::string::npos;
    };
    MappingNumber number;
    if (is_in("0123456789")) {
      if (absl::SimpleAtoi(word, &number.value) && number.value > 0 &&
          number.value <= kMappingNumberMax) {
        return number;
      }
    } else if (is_in("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")) {
      number.name = word;
      return number;
    }
    return RefuseAt(token.line, absl::StrFormat("expected a number from 1 to %d or its name, found "
                                                "\"%s\"",
                                                kMappingNumberMax, word.substr(0, kShownBytesMax)));
  }

  // The captures of `expression` that no stack around them counts; an error if names differ in
  // them, or a name is there twice.
  absl::StatusOr<std::set<std::string>> FreeCaptures(const MappingExpression& expression,
                                                     size_t line,
                                                     std::set<std::string>& names) const {
    using Kind = MappingExpression::Kind;
    if (expression.kind == Kind::kTensor) {
      if (!names.insert(expression.name->text()).second) {
        return RefuseAt(line, absl::StrFormat("\"%s\" is on one side twice",
                                              expression.name->text().substr(0, kShownBytesMax)));
      }
      return expression.name->captures();
    }
    std::optional<std::set<std::string>> all;
    for (const MappingExpression& operand : expression.operands) {
      ASSIGN_OR_RETURN(std::set<std::string> captures, FreeCaptures(operand, line, names));
      if (all.has_value() && *all != captures) {
        return RefuseAt(
            line, absl::StrFormat("expected {%s} in all names of one side, found {%s}",
                                  absl::StrJoin(*all, "}, {"), absl::StrJoin(captures, "}, {")));
      }
      all = std::move(captures);
    }
    if (expression.kind == Kind::kStack && all->erase(expression.capture) == 0) {
      return RefuseAt(line, absl::StrFormat("stack: expected {%s} in the names that it counts, "
                                            "found none",
                                            expression.capture.substr(0, kShownBytesMax)));
    }
    return *std::move(all);
  }

  absl::Status CheckCaptures(const MappingRule& rule) const {
    std::set<std::string> names;
    ASSIGN_OR_RETURN(const std::set<std::string> left, FreeCaptures(rule.left, rule.line, names));
    names.clear();
    ASSIGN_OR_RETURN(const std::set<std::string> right, FreeCaptures(rule.right, rule.line, names));
    if (left == right) return absl::OkStatus();
    return RefuseAt(rule.line,
                    absl::StrFormat("expected the same numbers on both sides, found {%s} and {%s}",
                                    absl::StrJoin(left, "}, {"), absl::StrJoin(right, "}, {")));
  }

  std::string_view rest_;
  const std::string_view where_;
  size_t line_ = 1;
  size_t open_ = 0;  // brackets
  size_t statement_count_ = 0;
  Token token_;
  MappingRules result_;
};

void Collect(const MappingExpression& expression, std::vector<const NameTemplate*>& names) {
  if (expression.name.has_value()) names.push_back(&*expression.name);
  for (const MappingExpression& operand : expression.operands) Collect(operand, names);
}

}  // namespace

absl::StatusOr<NameTemplate> NameTemplate::Parse(std::string text) {
  if (text.empty() || text.size() > kNameBytesMax || text.find('*') != std::string::npos) {
    return absl::InvalidArgumentError(
        absl::StrFormat("a tensor's name of 1 to %d bytes without *", kNameBytesMax));
  }
  ASSIGN_OR_RETURN(NamePattern pattern, NamePattern::Parse(text));
  NameTemplate name(std::move(text), std::move(pattern));
  for (size_t at = name.text_.find('{'); at != std::string::npos;
       at = name.text_.find('{', at + 1)) {
    name.captures_.insert(name.text_.substr(at + 1, name.text_.find('}', at) - at - 1));
  }
  return name;
}

std::optional<NamePatternNumbers> NameTemplate::Match(std::string_view name) const {
  std::optional<NamePatternNumbers> numbers = pattern_.Match(name);
  if (numbers.has_value() && Name(*numbers) != name) return std::nullopt;
  return numbers;
}

std::string NameTemplate::Name(const NamePatternNumbers& numbers) const {
  std::string name;
  std::string_view rest = text_;
  for (size_t at = rest.find('{'); at != std::string_view::npos; at = rest.find('{')) {
    const size_t end = rest.find('}', at);
    name += rest.substr(0, at);
    name += std::to_string(numbers.at(std::string(rest.substr(at + 1, end - at - 1))));
    rest.remove_prefix(end + 1);
  }
  name += rest;
  return name;
}

std::vector<const NameTemplate*> NamesIn(const MappingExpression& expression) {
  std::vector<const NameTemplate*> names;
  Collect(expression, names);
  return names;
}

absl::StatusOr<MappingRules> ParseMappingRules(std::string_view text, std::string_view where) {
  // Names that no format could hold. A line's end is no part of a longer character.
  std::string_view rest = text;
  for (size_t line = 1; !rest.empty(); ++line) {
    const size_t end = std::min(rest.find('\n'), rest.size());
    if (!IsUtf8(rest.substr(0, end))) {
      return absl::InvalidArgumentError(
          absl::StrFormat("%s: line %d: expected UTF-8, found other bytes", where, line));
    }
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  return Parser(text, where).Run();
}

}  // namespace holdfast::converter
