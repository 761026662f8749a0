#include "agent/run/fields.h"

#include <charconv>

namespace holdfast {

void Fields::Add(std::string_view name, std::string_view value) {
  fields_.emplace_back(std::string(name), std::string(value));
}

void Fields::Add(std::string_view name, int64_t value) { Add(name, std::to_string(value)); }

std::optional<std::string> Fields::Text(std::string_view name) const {
  for (const auto& [key, value] : fields_) {
    if (key == name) return value;
  }
  return std::nullopt;
}

std::optional<int64_t> Fields::Number(std::string_view name, int64_t min, int64_t max) const {
  const std::optional<std::string> text = Text(name);
  if (!text.has_value()) return std::nullopt;
  int64_t value = 0;
  const char* const end = text->data() + text->size();
  const auto [stop, error] = std::from_chars(text->data(), end, value);
  if (error != std::errc() || stop != end || value < min || value > max) return std::nullopt;
  return value;
}

std::vector<std::string> Fields::All(std::string_view name) const {
  std::vector<std::string> values;
  for (const auto& [key, value] : fields_) {
    if (key == name) values.push_back(value);
  }
  return values;
}

std::string Fields::Encode(char separator) const {
  std::string bytes;
  for (const auto& [key, value] : fields_) {
    bytes += key;
    bytes += '=';
    bytes += value;
    bytes += separator;
  }
  return bytes;
}

std::optional<Fields> Fields::Decode(std::string_view bytes, char separator) {
  if (bytes.size() > kBytesMax) return std::nullopt;
  Fields fields;
  while (!bytes.empty()) {
    const size_t end = bytes.find(separator);
    if (end == std::string_view::npos) return std::nullopt;
    const std::string_view field = bytes.substr(0, end);
    bytes.remove_prefix(end + 1);
    const size_t equals = field.find('=');
    if (equals == std::string_view::npos) return std::nullopt;
    fields.Add(field.substr(0, equals), field.substr(equals + 1));
  }
  return fields;
}

}  // namespace holdfast
