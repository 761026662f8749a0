// The input is two texts with a NUL between: a document and what to resize (--to), or rules for
// some tensor states that are always the same.
#include <algorithm>
#include <string>

#include "base/check.h"
#include "format/layout.h"
#include "format/layout_rules.h"
#include "tests/fuzz/targets.h"
#include "tests/fuzz/use_layout.h"

namespace holdfast::fuzz {
namespace {

const std::vector<TensorState>& States() {
  static const std::vector<TensorState> states = {
      {"layers.0.attn.q.weight", "param", Dtype::kBfloat16, {8, 4}},
      {"layers.0.attn.q.weight", "exp_avg", Dtype::kFloat32, {8, 4}},
      {"layers.11.mlp.7.weight", "param", Dtype::kFloat32, {4, 6}},
      {std::string(4096, 'a'), "param", Dtype::kUint8, {}},
      {std::string(2000, '1') + "b", "param", Dtype::kUint8, {0, 3}},
  };
  return states;
}

bool CheckMade(const absl::StatusOr<std::string>& made, bool has_states_of_rules) {
  if (!made.ok()) {
    CHECK(made.status().code() == absl::StatusCode::kInvalidArgument);
    return false;
  }
  const auto layout = Layout::Parse(*made);
  CHECK_OK(layout.status());
  UseLayout(**layout);
  if (!has_states_of_rules) return true;
  CHECK(std::ranges::equal((*layout)->tensor_states(), States(),
                           [](const TensorState& a, const TensorState& b) {
                             return a.tensor == b.tensor && a.state == b.state &&
                                    a.dtype == b.dtype && a.shape == b.shape;
                           }));
  return true;
}

}  // namespace

bool FuzzLayoutRules(Input input) {
  const auto nul = std::find(input.begin(), input.end(), uint8_t{0});
  const std::string text(input.begin(), nul);
  const std::string to(nul == input.end() ? nul : nul + 1, input.end());
  if (IsLayoutRules(text)) return CheckMade(ExpandLayoutRules(text, States()), true);
  return CheckMade(ResizeLayout(text, to), false);
}

}  // namespace holdfast::fuzz
