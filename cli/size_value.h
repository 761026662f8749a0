// A number of bytes on the command line, with a unit or without: 4096, 256M.
#ifndef HOLDFAST_CLI_SIZE_VALUE_H_
#define HOLDFAST_CLI_SIZE_VALUE_H_

#include <CLI/CLI.hpp>
#include <string>
#include <utility>

namespace holdfast::cli {

// CLI::AsSizeValue, which takes -1 for 2^64 - 1, for numbers of at least 0.
class SizeValue : public CLI::AsSizeValue {
 public:
  enum class Units { kDecimal, kBinary };  // K is 1000 bytes, or 1024
  explicit SizeValue(Units units) : CLI::AsSizeValue(units == Units::kDecimal) {
    func_ = [parse = std::move(func_)](std::string& input) {
      if (input.find('-') == std::string::npos) return parse(input);
      return "expected a number of bytes, as 4096 or 256M, found " + input;
    };
  }
};

// Of what SizeValue has made.
inline CLI::Validator PositiveSize() {
  return CLI::Validator(
      [](std::string& text) {
        return text == "0" ? std::string("expected more than 0 bytes") : std::string();
      },
      "POSITIVE", "PositiveSize");
}

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_SIZE_VALUE_H_
