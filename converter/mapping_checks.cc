#include "converter/mapping_checks.h"

#include <cstdint>
#include <map>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "converter/optimizer_groups.h"
#include "format/planner_source.h"

namespace holdfast::converter {
namespace {

std::string ShapeText(std::span<const uint64_t> shape) {
  return absl::StrFormat("[%s]", absl::StrJoin(shape.begin(), shape.end(), ", "));
}

}  // namespace

absl::Status CheckShapes(std::span<const MappingShape> shapes, std::string_view where,
                         const ForeignIndex& index) {
  struct Seen {
    uint64_t size = 0;
    std::string_view tensor;
  };
  std::map<std::pair<NamePatternNumbers, std::string_view>, Seen> sizes;
  for (const TensorState& state : index.tensor_states) {
    if (!IsWeightState(state.state)) continue;
    for (const MappingShape& shape : shapes) {
      const std::optional<NamePatternNumbers> numbers = shape.name.Match(state.tensor);
      if (!numbers.has_value()) continue;
      if (shape.words.size() != state.shape.size()) {
        return absl::FailedPreconditionError(
            absl::StrFormat("%s: line %d: %s: expected %d dimensions, found %s", where, shape.line,
                            Describe(state), shape.words.size(), ShapeText(state.shape)));
      }
      for (size_t d = 0; d < state.shape.size(); ++d) {
        const auto [seen, is_new] =
            sizes.try_emplace(std::pair(*numbers, std::string_view(shape.words[d])),
                              Seen{state.shape[d], state.tensor});
        if (is_new || seen->second.size == state.shape[d]) continue;
        return absl::FailedPreconditionError(absl::StrFormat(
            "%s: line %d: %s: expected a size %s of %d, as \"%s\" has, found %s (heads, groups or "
            "the family may be others)",
            where, shape.line, Describe(state), shape.words[d], seen->second.size,
            seen->second.tensor, ShapeText(state.shape)));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status CheckCover(const ForeignIndex& index) {
  std::vector<StoredPiece> stored;
  std::vector<uint32_t> numbers;
  for (uint32_t state = 0; state < index.tensor_states.size(); ++state) {
    const TensorState& each = index.tensor_states[state];
    if (each.shape.size() > kTensorDimsMax || each.ElementCount() == 0) continue;
    const auto [first, last] = index.PiecesOf(state);
    stored.clear();
    for (size_t i = first; i < last; ++i) {
      stored.push_back({index.pieces[i].piece, index.extents[index.pieces[i].extent].file, 0});
    }
    numbers.resize(stored.size());
    std::iota(numbers.begin(), numbers.end(), 0);
    const SourceView view{index.tensor_states, index.boxes, stored};
    ASSIGN_OR_RETURN(const StateSource source,
                     StateSource::Create(view, state, numbers, StateSource::Asked::kRanges));
    uint64_t steps = 0;
    RETURN_IF_ERROR(source.Cover(
        {state, kWholeTensor, 0, each.ElementCount()}, index.boxes,
        [](uint32_t, uint64_t, uint64_t) {}, [](uint32_t, const ElementBox&) {}, steps));
  }
  return absl::OkStatus();
}

}  // namespace holdfast::converter
