// Numbers in names of files and keys.
#ifndef HOLDFAST_CONVERTER_DECIMAL_H_
#define HOLDFAST_CONVERTER_DECIMAL_H_

#include <charconv>
#include <cstdint>
#include <optional>
#include <string_view>
#include <system_error>

namespace holdfast::converter {

// Digits only, all of the text; nothing if it is anything else or does not fit.
inline std::optional<uint64_t> ParseDecimal(std::string_view text) {
  uint64_t number = 0;
  const char* const end = text.data() + text.size();
  const auto [at, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || at != end) return std::nullopt;
  return number;
}

// Where the digits at the end of the text begin; its size if there are none.
inline size_t TrailingDigits(std::string_view text) {
  const size_t last = text.find_last_not_of("0123456789");
  return last == std::string_view::npos ? 0 : last + 1;
}

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_DECIMAL_H_
