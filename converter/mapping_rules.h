// The language of mapping files (`--map FILE`) and of the built-in families: equations between the
// tensors of two frameworks. Grammar with examples: docs/CONVERTER_MAPPING.md.
//
//   wte.weight            = model.embed_tokens.weight
//   h.{n}.qkv.weight      = interleave(groups, heads * h.{n}.q, groups * h.{n}.k, groups * h.{n}.v)
//   transpose(h.{n}.fc1)  = concat(h.{n}.gate, h.{n}.up)
//   drop  h.{n}.attn.mask
//   shape h.{n}.q [q hidden]
//   require args.swiglu true
//
// An equation says that two expressions are the same tensor. It is read from left to right or from
// right to left: the side that the source has is put together, and the other one is taken apart.
// Every operation can be undone, so one table serves both ways.
#ifndef HOLDFAST_CONVERTER_MAPPING_RULES_H_
#define HOLDFAST_CONVERTER_MAPPING_RULES_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "format/name_pattern.h"

namespace holdfast::converter {

inline constexpr size_t kMappingStatementsMax = 10'000;
inline constexpr size_t kMappingDepthMax = 8;       // of operations in operations
inline constexpr size_t kMappingOperandsMax = 256;  // of one operation
inline constexpr uint64_t kMappingNumberMax = uint64_t{1} << 32;
inline constexpr uint64_t kMappingPaddingMax = uint64_t{1} << 20;  // rows

using NamePatternNumbers = NamePattern::Numbers;

// A tensor's name with numbers in it, which `{n}` stands for.
//
// Threads: any; immutable.
class NameTemplate {
 public:
  // kInvalidArgument; the text is what was expected.
  static absl::StatusOr<NameTemplate> Parse(std::string text);

  const std::string& text() const { return text_; }
  const std::set<std::string>& captures() const { return captures_; }
  // Only of names that Name gives back: h.007 is none of h.{n}.
  std::optional<NamePatternNumbers> Match(std::string_view name) const;
  // All captures have a number.
  std::string Name(const NamePatternNumbers& numbers) const;

 private:
  NameTemplate(std::string text, NamePattern pattern)
      : text_(std::move(text)), pattern_(std::move(pattern)) {}

  std::string text_;
  NamePattern pattern_;
  std::set<std::string> captures_;
};

// A number, or the name of one that the model has (converter/model_numbers.h).
struct MappingNumber {
  std::string name;  // empty: `value` counts
  uint64_t value = 1;
};

struct MappingExpression {
  enum class Kind {
    kTensor,
    kTranspose,   // of the last two dimensions
    kInterleave,  // chunks of dimension 0; concat is this with one chunk
    kStack,       // along a new dimension 0
    kPad,         // of dimension 0
    kRotary,      // rows of heads: pairs beside each other become halves
  };
  Kind kind = Kind::kTensor;
  std::optional<NameTemplate> name;         // kTensor
  std::string capture;                      // kStack
  MappingNumber number;                     // kInterleave: chunks; kRotary: heads; kPad: rows
  MappingNumber padded;                     // kPad: rows with padding
  std::vector<MappingExpression> operands;  // kTensor has none
  std::vector<MappingNumber> weights;  // kInterleave: how the rows of operands are to each other
};

struct MappingRule {
  MappingExpression left;
  MappingExpression right;
  size_t line = 0;
};

// Sizes that equal words must have in common, in tensors with equal captures.
struct MappingShape {
  NameTemplate name;
  std::vector<std::string> words;
  size_t line = 0;
};

// A fact of the source's, where it has it: another value means another model.
struct MappingRequirement {
  std::string fact;   // "args.swiglu", "config.model_type"
  std::string value;  // "true", "llama", "4"
  size_t line = 0;
};

struct MappingRules {
  std::vector<MappingRule> rules;
  std::vector<NameTemplate> drops;
  std::vector<MappingShape> shapes;
  std::vector<MappingRequirement> requirements;
};

// kInvalidArgument: `where`, the line, what was expected and found, and the nearest known word.
absl::StatusOr<MappingRules> ParseMappingRules(std::string_view text, std::string_view where);

// All names in an expression, in the order of the text.
std::vector<const NameTemplate*> NamesIn(const MappingExpression& expression);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MAPPING_RULES_H_
