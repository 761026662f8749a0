#include "cli/output.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/str_format.h"
#include "base/utf8.h"

namespace holdfast::cli {
namespace {

// `sequence`: one character of UTF-8. C1 is U+0080 to U+009F: C2 80 to C2 9F.
bool IsControl(std::string_view sequence) {
  const auto first = static_cast<unsigned char>(sequence[0]);
  if (sequence.size() == 1) return first < 0x20 || first == 0x7F;
  return first == 0xC2 && static_cast<unsigned char>(sequence[1]) < 0xA0;
}

}  // namespace

std::string Printable(std::string_view text) {
  std::string result;
  while (!text.empty()) {
    const size_t known_bytes = Utf8SequenceBytes(text);
    const std::string_view sequence = text.substr(0, std::max<size_t>(known_bytes, 1));
    text.remove_prefix(sequence.size());
    if (known_bytes > 0 && !IsControl(sequence)) {
      result += sequence;
    } else if (sequence == "\n") {
      result += "\\n";
    } else if (sequence == "\t") {
      result += "\\t";
    } else {
      for (const char byte : sequence) {
        absl::StrAppendFormat(&result, "\\x%02x", static_cast<unsigned char>(byte));
      }
    }
  }
  return result;
}

std::string JsonText(const nlohmann::ordered_json& json) {
  return json.dump(1, ' ', /*ensure_ascii=*/false, nlohmann::json::error_handler_t::replace);
}

}  // namespace holdfast::cli
