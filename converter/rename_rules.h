// Rules by which a conversion gives tensors other names (`--rename FILE`).
//
//   # one rule a line; each is applied to what the rules above it have made of the name
//   name   OLD NEW       the name that is OLD
//   prefix OLD NEW       names that begin with OLD
//   suffix OLD NEW       names that end with OLD
//   regex  PATTERN NEW   every match of an RE2 pattern; \1 to \9 in NEW are its groups
//
// Words stand between blanks; one that has blanks in it, or none of anything (""), is a JSON
// string. Grammar with examples: docs/CONVERTER_WRITING.md.
#ifndef HOLDFAST_CONVERTER_RENAME_RULES_H_
#define HOLDFAST_CONVERTER_RENAME_RULES_H_

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace holdfast::converter {

inline constexpr size_t kRenameRulesMax = 10'000;
// Of them with patterns, each of which may take up to a MiB to match.
inline constexpr size_t kRenamePatternsMax = 1'000;

// Threads: one at a time (it counts what it does). Lifetime: owns everything.
class RenameRules {
 public:
  // kInvalidArgument with line, what was expected and found. An empty text renames nothing.
  static absl::StatusOr<RenameRules> Parse(std::string_view text);
  RenameRules(RenameRules&&) noexcept;
  RenameRules& operator=(RenameRules&&) noexcept;
  ~RenameRules();

  bool empty() const;
  std::string Apply(std::string name);
  // kInvalidArgument that names the first rule which has changed no name so far: it is misspelt, or
  // one above it takes its names away.
  absl::Status CheckAllUsed() const;

 private:
  struct Rule;
  explicit RenameRules(std::vector<std::unique_ptr<Rule>> rules);

  std::vector<std::unique_ptr<Rule>> rules_;
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_RENAME_RULES_H_
