// A restore selection that is understood chooses by its patterns: all states if it has none, else
// some for each of them; or it is refused, and always as the caller's value.
#include <algorithm>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "checkpoint/restore_selection.h"
#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {
namespace {

std::vector<TensorState> FixedStates() {
  std::vector<TensorState> states;
  for (const char* tensor : {"wte", "layers.0.w", "layers.1.w", "layers.12.bias", "*odd{"}) {
    for (const char* state : {"param", "exp_avg", "exp_avg_sq"}) {
      states.push_back({tensor, state, Dtype::kFloat32, {2, 3}});
    }
  }
  return states;
}

size_t ChosenCount(const RestoreSelection& selection, const std::vector<TensorState>& states) {
  const absl::StatusOr<std::vector<bool>> chosen = ChooseStates(selection, states);
  if (!chosen.ok()) {
    CHECK(chosen.status().code() == absl::StatusCode::kInvalidArgument);
    return 0;
  }
  CHECK(chosen->size() == states.size());
  return static_cast<size_t>(std::count(chosen->begin(), chosen->end(), true));
}

}  // namespace

bool FuzzSelection(Input input) {
  const auto selection =
      DecodeSelection({reinterpret_cast<const char*>(input.data()), input.size()});
  if (!selection.ok()) {
    CHECK(selection.status().code() == absl::StatusCode::kInvalidArgument);
    return false;
  }
  CHECK(selection->tensors.size() + selection->states.size() <= kSelectionPatternsMax);
  const std::vector<TensorState> states = FixedStates();
  const size_t count = ChosenCount(*selection, states);
  if (selection->is_everything()) CHECK(count == states.size());
  if (count == 0) return false;
  // Without the patterns of one kind no less is chosen: each kind only takes away.
  for (const RestoreSelection& wider :
       {RestoreSelection{selection->tensors, {}}, RestoreSelection{{}, selection->states}}) {
    CHECK(ChosenCount(wider, states) >= count);
  }
  return true;
}

}  // namespace holdfast::fuzz
