#include "converter/model_numbers.h"

#include <initializer_list>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "base/suggestion.h"

namespace holdfast::converter {
namespace {

constexpr size_t kShownBytesMax = 200;
// Megatron's --make-vocab-size-divisible-by, times the tensor-parallel ranks.
constexpr uint64_t kVocabularyDivisor = 128;

absl::StatusOr<std::unique_ptr<JsonDocument>> ParseObject(const std::string& text,
                                                          std::string_view what) {
  if (text.empty()) return nullptr;
  // Arguments hold what PyTorch writes: a key twice is no reason to refuse the checkpoint.
  absl::StatusOr<std::unique_ptr<JsonDocument>> document =
      JsonDocument::Parse(text, {.duplicates = JsonDuplicates::kKeep});
  if (!document.ok()) {
    return absl::InvalidArgumentError(absl::StrFormat("%s: %s", what, document.status().message()));
  }
  if ((*document)->root().type() != JsonValue::Type::kObject) {
    return absl::InvalidArgumentError(absl::StrFormat("%s: expected an object", what));
  }
  return document;
}

JsonValue MemberOf(const std::unique_ptr<JsonDocument>& document, std::string_view key) {
  return document == nullptr ? JsonValue() : document->root().Find(key);
}

// The first of these that is a number above 0.
std::optional<uint64_t> FirstNumber(const std::unique_ptr<JsonDocument>& document,
                                    std::initializer_list<std::string_view> keys) {
  for (const std::string_view key : keys) {
    const absl::StatusOr<uint64_t> number = MemberOf(document, key).Uint64();
    if (number.ok() && *number > 0 && *number <= kMappingNumberMax) return *number;
  }
  return std::nullopt;
}

// As it stands in a `require` statement; nothing for null, lists and objects.
std::optional<std::string> TextOf(JsonValue value) {
  if (!value.present()) return std::nullopt;
  if (value.type() == JsonValue::Type::kBool) return *value.Bool() ? "true" : "false";
  if (value.type() == JsonValue::Type::kString) return std::string(*value.String());
  const absl::StatusOr<int64_t> number = value.Int64();
  if (number.ok()) return absl::StrCat(*number);
  return std::nullopt;
}

}  // namespace

absl::StatusOr<ModelNumbers> ModelNumbers::Create(const Request& request) {
  ModelNumbers numbers;
  for (const std::string& text : request.set) {
    const size_t equals = text.find('=');
    uint64_t value = 0;
    if (equals == 0 || equals == std::string::npos ||
        !absl::SimpleAtoi(text.substr(equals + 1), &value) || value == 0 ||
        value > kMappingNumberMax) {
      return absl::InvalidArgumentError(
          absl::StrFormat("--set %s: expected NAME=NUMBER with a number from 1 to %d",
                          text.substr(0, kShownBytesMax), kMappingNumberMax));
    }
    numbers.set_[text.substr(0, equals)] = value;
  }
  ASSIGN_OR_RETURN(numbers.arguments_,
                   ParseObject(request.arguments, "the training arguments in the checkpoint"));
  ASSIGN_OR_RETURN(numbers.config_, ParseObject(request.config, "config.json"));
  numbers.tensor_ranks_ = request.tensor_ranks;
  return numbers;
}

std::optional<uint64_t> ModelNumbers::FromArguments(std::string_view name) const {
  if (name == "heads") return FirstNumber(arguments_, {"num_attention_heads"});
  if (name == "groups") {
    // Megatron's num_query_groups is 1 where nobody asked for groups.
    const absl::StatusOr<bool> grouped = MemberOf(arguments_, "group_query_attention").Bool();
    if (grouped.ok() && !*grouped) return FromArguments("heads");
    const std::optional<uint64_t> groups = FirstNumber(arguments_, {"num_query_groups"});
    return groups.has_value() ? groups : FromArguments("heads");
  }
  return std::nullopt;  // not its vocab_size: some tokenizers add words to it
}

std::optional<uint64_t> ModelNumbers::FromConfig(std::string_view name) const {
  if (name == "heads") return FirstNumber(config_, {"num_attention_heads", "n_head", "num_heads"});
  if (name == "groups") {
    const std::optional<uint64_t> groups =
        FirstNumber(config_, {"num_key_value_heads", "num_query_groups"});
    return groups.has_value() ? groups : FromConfig("heads");
  }
  if (name == "vocab") return FirstNumber(config_, {"vocab_size"});
  return std::nullopt;
}

absl::StatusOr<std::optional<uint64_t>> ModelNumbers::Find(const MappingNumber& number) {
  if (number.name.empty()) return number.value;
  asked_.insert(number.name);
  if (const auto set = set_.find(number.name); set != set_.end()) return set->second;
  const std::optional<uint64_t> arguments = FromArguments(number.name);
  const std::optional<uint64_t> config = FromConfig(number.name);
  if (arguments.has_value() && config.has_value() && *arguments != *config) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "%s: the training arguments in the checkpoint say %d, config.json says %d; --set %s=N "
        "decides",
        number.name, *arguments, *config, number.name));
  }
  return arguments.has_value() ? arguments : config;
}

absl::StatusOr<uint64_t> ModelNumbers::Get(const MappingNumber& number) {
  ASSIGN_OR_RETURN(const std::optional<uint64_t> value, Find(number));
  if (value.has_value()) return *value;
  std::string keys;
  if (number.name == "heads") keys = "num_attention_heads";
  if (number.name == "groups") keys = "num_key_value_heads";
  if (number.name == "vocab") keys = "vocab_size";
  return absl::InvalidArgumentError(absl::StrFormat(
      "%s: the checkpoint does not say it; expected --set %s=N%s", number.name, number.name,
      keys.empty() ? "" : absl::StrFormat(", or --model DIR with %s in its config.json", keys)));
}

absl::StatusOr<uint64_t> ModelNumbers::PaddedRows(const MappingNumber& padded, uint64_t rows) {
  ASSIGN_OR_RETURN(const std::optional<uint64_t> given, Find(padded));
  const uint64_t divisor = kVocabularyDivisor * tensor_ranks_;
  const uint64_t made = given.has_value() ? *given : (rows + divisor - 1) / divisor * divisor;
  if (made > rows + kMappingPaddingMax) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: expected at most %d rows of padding for the %d rows that are there, "
                        "found %d rows in all",
                        padded.name, kMappingPaddingMax, rows, made));
  }
  if (made >= rows) return made;
  return absl::InvalidArgumentError(absl::StrFormat(
      "%s: expected at least the %d rows that are there, found %d", padded.name, rows, made));
}

absl::Status ModelNumbers::Require(const MappingRequirement& requirement,
                                   std::string_view where) const {
  const size_t dot = requirement.fact.find('.');
  const bool is_argument = requirement.fact.starts_with("args.");
  const std::optional<std::string> found =
      TextOf(MemberOf(is_argument ? arguments_ : config_, requirement.fact.substr(dot + 1)));
  if (!found.has_value() || *found == requirement.value) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrFormat(
      "%s: line %d: it is for models with %s %s, found %s in %s", where, requirement.line,
      requirement.fact.substr(dot + 1), requirement.value, found->substr(0, kShownBytesMax),
      is_argument ? "the training arguments" : "config.json"));
}

absl::Status ModelNumbers::CheckAllUsed() const {
  for (const auto& [name, value] : set_) {
    if (asked_.contains(name)) continue;
    const std::vector<std::string_view> known(asked_.begin(), asked_.end());
    return absl::InvalidArgumentError(
        absl::StrFormat("--set %s=%d: the mapping asks for no such number%s", name, value,
                        DidYouMean(name, known)));
  }
  return absl::OkStatus();
}

}  // namespace holdfast::converter
