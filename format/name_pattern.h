// Patterns of tensor names: literal texts with `*` (any characters) and `{name}` (a whole number)
// between. Rules files and partial restores choose tensors with them; docs/layout-grammar.md.
#ifndef HOLDFAST_FORMAT_NAME_PATTERN_H_
#define HOLDFAST_FORMAT_NAME_PATTERN_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace holdfast {

inline constexpr size_t kPatternNumbersMax = 8;

// Threads: any; immutable once parsed.
class NamePattern {
 public:
  // kInvalidArgument; the text is what was expected ("a name between { and }").
  static absl::StatusOr<NamePattern> Parse(std::string_view text);

  using Numbers = std::map<std::string, uint64_t>;
  // The numbers, if all of the name fits. `*` takes as little as it can, a number all digits; one
  // that stands twice in the pattern has one value.
  std::optional<Numbers> Match(std::string_view name) const;

 private:
  struct Part {
    enum Kind { kLiteral, kAny, kNumber };
    Kind kind = kLiteral;
    std::string text;  // of a number its name
  };

  std::vector<Part> parts_;
  size_t number_count_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_NAME_PATTERN_H_
