#include "format/layout_program.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "base/check.h"

namespace holdfast {

std::vector<uint32_t> Mesh::CoordinatesOf(uint32_t rank) const {
  std::vector<uint32_t> coordinates(axes.size());
  for (size_t axis = axes.size(); axis-- > 0;) {
    coordinates[axis] = rank % axes[axis].size;
    rank /= axes[axis].size;
  }
  CHECK(rank == 0);
  return coordinates;
}

uint32_t Mesh::SizeOf(std::span<const uint32_t> axis_numbers) const {
  uint32_t size = 1;
  for (uint32_t axis : axis_numbers) size *= axes[axis].size;
  return size;
}

uint32_t Mesh::JointCoordinate(std::span<const uint32_t> axis_numbers,
                               std::span<const uint32_t> coordinates) const {
  uint32_t joint = 0;
  for (uint32_t axis : axis_numbers) joint = joint * axes[axis].size + coordinates[axis];
  return joint;
}

void Mesh::SetCombination(std::span<const uint32_t> axis_numbers, uint64_t combination,
                          std::vector<uint32_t>& coordinates) const {
  for (const uint32_t axis : axis_numbers) {
    coordinates[axis] = static_cast<uint32_t>(combination % axes[axis].size);
    combination /= axes[axis].size;
  }
}

std::string CheckCut(const CutRule& rule, uint64_t elements, uint32_t count) {
  if (rule.kind == CutRule::Kind::kEven) {
    if (elements % (rule.grain * count) == 0) return "";
    if (rule.grain == 1) return absl::StrFormat("a multiple of %d elements", count);
    return absl::StrFormat("a multiple of %d elements (%d ranks x grain %d)", count * rule.grain,
                           count, rule.grain);
  }
  if (rule.kind == CutRule::Kind::kSizes) {
    const uint64_t sum = rule.ends.empty() ? 0 : rule.ends.back();
    if (sum != elements) return absl::StrFormat("the sum of the sizes, %d elements", sum);
  }
  return "";
}

std::pair<uint64_t, uint64_t> Cut(const CutRule& rule, uint64_t elements, uint32_t count,
                                  uint32_t coordinate) {
  if (rule.kind == CutRule::Kind::kSizes) {
    return {coordinate == 0 ? 0 : rule.ends[coordinate - 1], rule.ends[coordinate]};
  }
  const uint64_t grains = elements / rule.grain + (elements % rule.grain != 0 ? 1 : 0);
  uint64_t first = 0;
  uint64_t last = 0;
  if (rule.kind == CutRule::Kind::kBalanced) {
    const uint64_t each = grains / count;
    const uint64_t more = grains % count;  // the first `more` coordinates get one more
    first = coordinate * each + std::min<uint64_t>(coordinate, more);
    last = first + each + (coordinate < more ? 1 : 0);
  } else {  // kEven is kCeil without a remainder
    const uint64_t each = grains / count + (grains % count != 0 ? 1 : 0);
    first = std::min(coordinate * each, grains);
    last = std::min(first + each, grains);
  }
  return {std::min(first * rule.grain, elements), std::min(last * rule.grain, elements)};
}

}  // namespace holdfast
