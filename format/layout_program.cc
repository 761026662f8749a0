#include "format/layout_program.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_format.h"
#include "base/check.h"

namespace holdfast {

std::vector<uint32_t> LayoutProgram::CoordinatesOf(uint32_t rank) const {
  std::vector<uint32_t> coordinates(mesh.size());
  for (size_t axis = mesh.size(); axis-- > 0;) {
    coordinates[axis] = rank % mesh[axis].size;
    rank /= mesh[axis].size;
  }
  CHECK(rank == 0);
  return coordinates;
}

std::string CheckCut(const CutRule& rule, uint64_t elements, uint32_t count) {
  if (rule.kind == CutRule::Kind::kEven) {
    if (elements % (rule.grain * count) == 0) return "";
    if (rule.grain == 1) return absl::StrFormat("a multiple of %d elements", count);
    return absl::StrFormat("a multiple of %d elements (%d ranks x grain %d)", count * rule.grain,
                           count, rule.grain);
  }
  if (rule.kind == CutRule::Kind::kSizes) {
    const uint64_t sum = std::accumulate(rule.sizes.begin(), rule.sizes.end(), uint64_t{0});
    if (sum != elements) return absl::StrFormat("the sum of the sizes, %d elements", sum);
  }
  return "";
}

std::pair<uint64_t, uint64_t> Cut(const CutRule& rule, uint64_t elements, uint32_t count,
                                  uint32_t coordinate) {
  if (rule.kind == CutRule::Kind::kSizes) {
    const auto mine = rule.sizes.begin() + coordinate;
    const uint64_t begin = std::accumulate(rule.sizes.begin(), mine, uint64_t{0});
    return {begin, begin + *mine};
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

LocalTensor Evaluate(const std::vector<MeshAxis>& mesh, const Placement& placement,
                     std::span<const uint64_t> shape, std::span<const uint32_t> coordinates) {
  LocalTensor local;
  local.dims = shape.size();
  std::fill_n(local.lo.begin(), shape.size(), uint64_t{0});
  std::copy(shape.begin(), shape.end(), local.size.begin());
  const auto volume = [&local] {
    uint64_t elements = 1;  // bounded by the tensor's: no overflow, but for a zero in between
    for (size_t d = 0; d < local.dims; ++d) elements *= local.size[d];
    return elements;
  };
  bool flat = false;
  for (const PlacementOp& op : placement) {
    const uint32_t coordinate = coordinates[op.axis];
    switch (op.kind) {
      case PlacementOp::Kind::kShard:
        if (!flat) {
          const auto [first, last] =
              Cut(op.rule, local.size[op.dim], mesh[op.axis].size, coordinate);
          local.lo[op.dim] += first;
          local.size[op.dim] = last - first;
          break;
        }
        [[fallthrough]];  // behind a flat cut the only dimension is the range
      case PlacementOp::Kind::kFlat: {
        if (!flat) local.end = volume();
        flat = true;
        const auto [first, last] =
            Cut(op.rule, local.end - local.begin, mesh[op.axis].size, coordinate);
        local.end = local.begin + last;
        local.begin += first;
        break;
      }
      case PlacementOp::Kind::kPlace:
        if (!std::binary_search(op.coordinates.begin(), op.coordinates.end(), coordinate)) {
          local.held = false;
          return local;
        }
        break;
      case PlacementOp::Kind::kPack:
        break;
    }
  }
  if (!flat) local.end = volume();
  return local;
}

}  // namespace holdfast
