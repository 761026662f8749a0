// What is read can be written again, and then reads the same; no accessor fails but with
// kInvalidArgument.
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/json_reader.h"
#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {
namespace {

std::string Quoted(std::string_view text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\' || static_cast<unsigned char>(c) < 0x20) {
      absl::StrAppendFormat(&quoted, "\\u%04x", static_cast<unsigned char>(c));
    } else {
      quoted += c;
    }
  }
  return quoted + "\"";
}

template <typename T>
bool IsValueOrRefusal(const absl::StatusOr<T>& value) {
  CHECK(value.ok() || value.status().code() == absl::StatusCode::kInvalidArgument);
  return value.ok();
}

// Depth is bounded by the reader's limit.
void Write(const JsonValue& value, std::string& out) {
  const bool is_bool = IsValueOrRefusal(value.Bool());
  const bool is_string = IsValueOrRefusal(value.String());
  const bool is_unsigned = IsValueOrRefusal(value.Uint64());
  const bool is_signed = IsValueOrRefusal(value.Int64());
  const bool is_double = IsValueOrRefusal(value.Double());
  const bool is_number = is_unsigned || is_signed || is_double;
  CHECK(is_bool + is_string + is_number <= 1);
  switch (value.type()) {
    case JsonValue::Type::kNull:
      out += "null";
      return;
    case JsonValue::Type::kBool:
      out += *value.Bool() ? "true" : "false";
      return;
    case JsonValue::Type::kNumber:
      // Beyond 2^64 a number is a double, and beyond that none that can be asked for.
      if (value.Uint64().ok()) {
        absl::StrAppend(&out, *value.Uint64());
      } else if (value.Int64().ok()) {
        absl::StrAppend(&out, *value.Int64());
      } else {
        absl::StrAppendFormat(&out, "%.17g", value.Double().value_or(0));
      }
      return;
    case JsonValue::Type::kString:
      out += Quoted(*value.String());
      return;
    case JsonValue::Type::kArray:
      out += "[";
      for (size_t i = 0; i < *value.ArraySize(); ++i) {
        if (i > 0) out += ",";
        Write(value[i], out);
      }
      out += "]";
      return;
    case JsonValue::Type::kObject: {
      out += "{";
      const auto keys = *value.Keys();
      for (size_t i = 0; i < keys.size(); ++i) {
        absl::StrAppend(&out, i > 0 ? "," : "", Quoted(keys[i]), ":");
        const JsonValue member = value.Find(keys[i]);
        CHECK(member.present() && !member.Path().empty());
        Write(member, out);
      }
      out += "}";
      return;
    }
  }
}

}  // namespace

bool FuzzJson(Input input) {
  const auto document = JsonDocument::Parse(std::string(input.begin(), input.end()));
  if (!IsValueOrRefusal(document)) return false;
  std::string text;
  Write((*document)->root(), text);
  const auto again = JsonDocument::Parse(text);
  CHECK_OK(again.status());
  std::string text_again;
  Write((*again)->root(), text_again);
  CHECK(text == text_again);
  return true;
}

}  // namespace holdfast::fuzz
