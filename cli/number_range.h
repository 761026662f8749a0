// CLI::Range takes "nan" for a number in any range, as it is neither below nor above.
#ifndef HOLDFAST_CLI_NUMBER_RANGE_H_
#define HOLDFAST_CLI_NUMBER_RANGE_H_

#include <CLI/CLI.hpp>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace holdfast::cli {

// Of an option's text: a number from `min` to `max`, and nothing else.
inline CLI::Validator NumberRange(double min, double max) {
  return CLI::Validator(
      [min, max](std::string& text) {
        double number = 0;
        if (absl::SimpleAtod(text, &number) && number >= min && number <= max) return std::string();
        return absl::StrCat("expected a number from ", min, " to ", max, ", found \"", text, "\"");
      },
      absl::StrCat("FLOAT in [", min, " - ", max, "]"), "NumberRange");
}

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_NUMBER_RANGE_H_
