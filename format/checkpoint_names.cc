#include "format/checkpoint_names.h"

#include <algorithm>
#include <limits>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace holdfast {
namespace {

bool IsPlainNameByte(char c) {
  return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' ||
         c == '_' || c == '-';
}

absl::Status CheckPlainName(const char* what, std::string_view name, size_t bytes_max) {
  const bool plain = std::all_of(name.begin(), name.end(), IsPlainNameByte);
  if (name.empty() || name.size() > bytes_max || !plain || name[0] == '.') {
    return absl::InvalidArgumentError(absl::StrFormat(
        "%s: expected 1 to %d of the characters A-Z a-z 0-9 . _ -, not beginning with a dot; found "
        "\"%s\"%s",
        what, bytes_max, absl::CHexEscape(std::string(name.substr(0, 300))),
        name.size() > 300 ? "..." : ""));
  }
  return absl::OkStatus();
}

// Decimal digits without leading zeros beyond `width_min`, and nothing else.
template <typename Number>
std::optional<Number> ParseDigits(std::string_view digits, size_t width_min) {
  if (digits.empty() || digits.size() < width_min || digits.size() > 20) return std::nullopt;
  if (digits.size() > width_min && digits[0] == '0' && digits.size() > 1) return std::nullopt;
  uint64_t value = 0;
  for (const char c : digits) {
    if (c < '0' || c > '9') return std::nullopt;
    const auto digit = static_cast<uint64_t>(c - '0');
    if (value > (std::numeric_limits<Number>::max() - digit) / 10) return std::nullopt;
    value = value * 10 + digit;
  }
  return static_cast<Number>(value);
}

bool ConsumePrefix(std::string_view& text, std::string_view prefix) {
  if (text.substr(0, prefix.size()) != prefix) return false;
  text.remove_prefix(prefix.size());
  return true;
}

bool ConsumeSuffix(std::string_view& text, std::string_view suffix) {
  if (text.size() < suffix.size() || text.substr(text.size() - suffix.size()) != suffix) {
    return false;
  }
  text.remove_suffix(suffix.size());
  return true;
}

}  // namespace

std::string CheckpointDirectoryName(CheckpointId id) {
  return absl::StrFormat("s%012d.a%04d", Value(id.step), Value(id.attempt));
}

std::optional<CheckpointId> ParseCheckpointDirectoryName(std::string_view name) {
  const size_t dot = name.find('.');
  if (dot == std::string_view::npos) return std::nullopt;
  std::string_view step_text = name.substr(0, dot);
  std::string_view attempt_text = name.substr(dot);
  if (!ConsumePrefix(step_text, "s") || !ConsumePrefix(attempt_text, ".a")) return std::nullopt;
  const std::optional<uint64_t> step = ParseDigits<uint64_t>(step_text, 12);
  const std::optional<uint32_t> attempt = ParseDigits<uint32_t>(attempt_text, 4);
  if (!step.has_value() || !attempt.has_value()) return std::nullopt;
  return CheckpointId{Attempt{*attempt}, Step{*step}};
}

std::string ImageFileName(Rank rank, uint32_t retry) {
  if (retry == 0) return absl::StrFormat("rank-%05d.h5", Value(rank));
  return absl::StrFormat("rank-%05d.r%d.h5", Value(rank), retry);
}

std::optional<ImageFile> ParseImageFileName(std::string_view name) {
  if (!ConsumePrefix(name, "rank-") || !ConsumeSuffix(name, ".h5")) return std::nullopt;
  const size_t dot = name.find('.');
  const std::optional<uint32_t> rank = ParseDigits<uint32_t>(name.substr(0, dot), 5);
  if (!rank.has_value()) return std::nullopt;
  if (dot == std::string_view::npos) return ImageFile{Rank{*rank}, 0};
  name.remove_prefix(dot);
  if (!ConsumePrefix(name, ".r")) return std::nullopt;
  const std::optional<uint32_t> retry = ParseDigits<uint32_t>(name, 1);
  if (!retry.has_value() || *retry == 0) return std::nullopt;
  return ImageFile{Rank{*rank}, *retry};
}

std::string BadFileName(uint32_t number) { return absl::StrCat("BAD.", number); }
std::string HeadFileName(uint32_t number) { return absl::StrCat("HEAD.", number); }

std::optional<uint32_t> ParseNumberedName(std::string_view prefix, std::string_view name) {
  if (!ConsumePrefix(name, prefix) || !ConsumePrefix(name, ".")) return std::nullopt;
  const std::optional<uint32_t> number = ParseDigits<uint32_t>(name, 1);
  return number == uint32_t{0} ? std::nullopt : number;
}

absl::Status CheckJobName(std::string_view job) {
  return CheckPlainName("job", job, kJobNameBytesMax);
}

absl::Status CheckFileName(std::string_view file) { return CheckPlainName("file", file, 255); }

absl::Status CheckJobUuid(std::string_view uuid) {
  bool good = uuid.size() == 36;
  for (size_t i = 0; good && i < uuid.size(); ++i) {
    const char c = uuid[i];
    const bool dash = i == 8 || i == 13 || i == 18 || i == 23;
    good = dash ? c == '-' : (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
  }
  if (good) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrFormat("job uuid: expected 8-4-4-4-12 small hexadecimal digits, found \"%s\"",
                      absl::CHexEscape(std::string(uuid.substr(0, 64)))));
}

}  // namespace holdfast
