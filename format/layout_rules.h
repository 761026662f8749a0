// Making layout documents: from another one, with some axes resized (`holdfast reshard --to`), and
// from rules that say by patterns of names how the tensors of a checkpoint are cut.
//
// Both give a whole document, which Layout::Parse has accepted. Grammars, with examples:
// docs/layout-grammar.md.
#ifndef HOLDFAST_FORMAT_LAYOUT_RULES_H_
#define HOLDFAST_FORMAT_LAYOUT_RULES_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "format/tensor_piece.h"

namespace holdfast {

// What `--to` asks for: the size of an axis.
struct AxisSize {
  size_t column = 0;  // 1-based, in the text
  std::string mesh;   // of MESH.AXIS; else empty
  std::string axis;
  uint64_t size = 0;
};
// AXIS=SIZE,... as they are written. kInvalidArgument with column, what was expected and found; an
// axis that is there twice.
absl::StatusOr<std::vector<AxisSize>> ParseAxisSizes(const std::string& to);

// `to` is AXIS=SIZE,..., of axes that the document's own mesh names (and those of the same name in
// its further meshes), MESH.AXIS=SIZE of one further mesh alone, and zero=STAGE, which replaces the
// stage of the document's zero rule. In any order. What is not named stays as it is.
//
// Errors: kInvalidArgument with the column in `to`, what was expected and found, or with what of
// the document does not fit the new sizes: coordinates that are listed one by one, sizes, ranks.
// Those need a document or rules.
absl::StatusOr<std::string> ResizeLayout(const std::string& document, const std::string& to);

// A document for these tensor states, in their order. `rules` is a document with "rules" in the
// place of "tensors":
//
//   {"holdfast_layout_rules": 1, "mesh": ..., "meshes": ..., "zero": ..., "packs": ...,
//    "placements": ..., "rules": [{"tensors": PATTERN, "states": [NAME, ...], "place": ...}, ...]}
//
// The first rule that fits a tensor state counts. In a pattern `*` stands for any characters and
// `{name}` for a number, which "{name}" stands for in the rule's "place".
// Errors: kInvalidArgument: a tensor state that no rule fits, a rule that fits none, and all that
// Layout::Parse refuses.
absl::StatusOr<std::string> ExpandLayoutRules(const std::string& rules,
                                              const std::vector<TensorState>& states);

// Whether a JSON text is meant to be rules, and not a document.
bool IsLayoutRules(const std::string& json);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_LAYOUT_RULES_H_
