#include "checkpoint/sealed_json.h"

#include <cstddef>
#include <nlohmann/json.hpp>
#include <span>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/crc32c.h"

namespace holdfast {
namespace {

std::string SealLine(std::string_view before) {
  return absl::StrFormat("\"crc32c\": \"%08x\"}\n", Crc32c(std::as_bytes(std::span(before))));
}

}  // namespace

std::string JsonString(std::string_view text) {
  return nlohmann::json(std::string(text))
      .dump(-1, ' ', /*ensure_ascii=*/true, nlohmann::json::error_handler_t::replace);
}

std::string SealJson(const std::vector<std::string>& members) {
  std::string text = "{";
  for (const std::string& member : members) absl::StrAppend(&text, member, ",\n");
  return absl::StrCat(text, SealLine(text));
}

absl::StatusOr<std::unique_ptr<JsonDocument>> UnsealJson(std::string_view bytes,
                                                         const std::string& where) {
  const size_t seal_bytes = SealLine("").size();
  if (bytes.size() < seal_bytes) {
    return absl::DataLossError(
        absl::StrFormat("%s: truncated: expected a checksum line of %d "
                        "bytes at the end, found %d bytes in all",
                        where, seal_bytes, bytes.size()));
  }
  const std::string_view before = bytes.substr(0, bytes.size() - seal_bytes);
  const std::string_view found = bytes.substr(before.size());
  const std::string expected = SealLine(before);
  if (found != expected) {
    return absl::DataLossError(
        absl::StrFormat("%s: the checksum line does not match: expected %s, "
                        "found %s",
                        where, JsonString(expected), JsonString(found)));
  }
  absl::StatusOr<std::unique_ptr<JsonDocument>> document = JsonDocument::Parse(std::string(bytes));
  if (!document.ok()) {
    return absl::DataLossError(absl::StrFormat("%s: %s", where, document.status().message()));
  }
  return document;
}

}  // namespace holdfast
