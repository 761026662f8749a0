// Whether the operations of a placement fit a tensor on every rank.
//
// Where a placement only narrows and cuts flat, that is decided on the set of sizes that each
// dimension can have on any rank, so the cost does not grow with the world. Views, perms, pads and
// blocks are tried for every combination of coordinates, within limits.
#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "format/local_tensor.h"
#include "format/placement_parser.h"

namespace holdfast {
namespace {

constexpr size_t kLocalSizesMax = 4096;  // so that hostile sizes cost no time
// Of a whole document.
constexpr uint64_t kEvaluationsMax = 4'000'000;
constexpr uint64_t kPartsMax = 4'000'000;
// Operations applied for all ranks, and boxes looked at: what finding out takes here, and what
// Layout::HolderLoads takes later. A few seconds.
constexpr uint64_t kWorkMax = uint64_t{1} << 25;

// Adds the sizes of all parts.
void AddParts(const CutRule& rule, uint64_t size, uint32_t count, std::set<uint64_t>& parts) {
  const auto add = [&](uint32_t coordinate) {
    const auto [first, last] = Cut(rule, size, count, coordinate);
    parts.insert(last - first);
  };
  if (rule.kind == CutRule::Kind::kSizes) {
    for (uint32_t coordinate = 0; coordinate < count; ++coordinate) add(coordinate);
    return;
  }
  // The sizes of parts only fall: few different ones, each a run. Looks at the first of each run
  // by bisection.
  for (uint32_t coordinate = 0; coordinate < count;) {
    add(coordinate);
    const auto size_of = [&](uint32_t c) {
      const auto [first, last] = Cut(rule, size, count, c);
      return last - first;
    };
    uint32_t same = coordinate;  // same size as at `coordinate`
    uint32_t other = count;      // another one, or the end
    while (other - same > 1) {
      const uint32_t middle = same + (other - same) / 2;
      (size_of(middle) == size_of(coordinate) ? same : other) = middle;
    }
    coordinate = other;
  }
}

// All products of one size of each dimension; stops above kLocalSizesMax.
std::set<uint64_t> Products(const std::vector<std::set<uint64_t>>& sizes) {
  std::set<uint64_t> products = {1};
  for (const std::set<uint64_t>& dimension : sizes) {
    std::set<uint64_t> next;
    for (uint64_t a : products) {
      for (uint64_t b : dimension) {
        next.insert(a * b);
        if (next.size() > kLocalSizesMax) return next;
      }
    }
    products = std::move(next);
  }
  return products;
}

bool NarrowsOnly(const Placement& placement) {
  return std::none_of(placement.ops.begin(), placement.ops.end(), [](const PlacementOp& op) {
    return op.kind == PlacementOp::Kind::kView || op.kind == PlacementOp::Kind::kPerm ||
           op.kind == PlacementOp::Kind::kPad || !op.blocks.empty();
  });
}

}  // namespace

absl::StatusOr<PlacementParser::LocalBounds> PlacementParser::CheckFits(
    const JsonValue& where, uint32_t placement, const std::vector<uint64_t>& shape) {
  std::string key(reinterpret_cast<const char*>(shape.data()), shape.size() * sizeof(uint64_t));
  key.append(reinterpret_cast<const char*>(&placement), sizeof(placement));
  const auto known = fits_.find(key);
  if (known != fits_.end()) return known->second;
  const Placement& ops = program_.placements[placement];
  LocalBounds bounds;
  const std::string wrong =
      NarrowsOnly(ops) ? FirstMisfit(ops, shape, bounds) : FirstMisfitByRank(ops, shape, bounds);
  if (!wrong.empty()) {
    const JsonValue place = where.Find("place");
    return RefuseLayout(place.present() ? place : where, wrong);
  }
  fits_.emplace(std::move(key), bounds);
  return bounds;
}

std::string PlacementParser::AddWork(uint64_t work) {
  work_ += work;
  if (work_ <= kWorkMax) return "";
  return absl::StrFormat(
      "expected at most %d operations on local tensors of all ranks in the document, found more",
      kWorkMax);
}

std::string PlacementParser::FirstMisfit(const Placement& placement,
                                         const std::vector<uint64_t>& shape, LocalBounds& bounds) {
  bounds = {1, 1};
  for (uint64_t size : shape) bounds.places *= size;  // at most 2^62
  const Mesh& mesh = program_.MeshOf(placement);
  std::vector<std::set<uint64_t>> sizes;  // of each dimension, on any rank
  for (uint64_t size : shape) sizes.push_back({size});
  bool flat = false;
  uint64_t combinations = 1;  // of coordinates with other local tensors
  for (const PlacementOp& op : placement.ops) {
    if (op.kind != PlacementOp::Kind::kShard && op.kind != PlacementOp::Kind::kFlat) continue;
    const uint32_t count = mesh.SizeOf(op.axes);
    if (op.kind == PlacementOp::Kind::kFlat && !flat) {
      sizes = {Products(sizes)};
      flat = true;
      if (sizes[0].size() > kLocalSizesMax) {
        return absl::StrFormat(
            "expected at most %d different sizes of local tensors before a flat cut, found more",
            kLocalSizesMax);
      }
    } else if (op.kind == PlacementOp::Kind::kShard && op.dim >= sizes.size()) {
      return absl::StrFormat(
          "expected a tensor with dimension %d to cut over axis %s, found %d dimensions", op.dim,
          AxesText(mesh, op.axes), sizes.size());
    }
    std::set<uint64_t>& before = sizes[op.kind == PlacementOp::Kind::kFlat ? 0 : op.dim];
    std::set<uint64_t> after;
    combinations *= count;
    for (uint64_t size : before) {
      if (std::string most = AddWork(1 + op.rule.ends.size()); !most.empty()) return most;
      const std::string expected = CheckCut(op.rule, size, count);
      if (!expected.empty()) {
        const std::string what = flat ? "the flat range" : absl::StrCat("dimension ", op.dim);
        return absl::StrFormat("expected %s in %s to cut over axis %s, found %d", expected, what,
                               AxesText(mesh, op.axes), size);
      }
      AddParts(op.rule, size, count, after);
    }
    before = std::move(after);
  }
  // A pack asks for its tensors otherwise: format/layout_cost.h.
  const bool is_packed =
      !placement.ops.empty() && placement.ops.back().kind == PlacementOp::Kind::kPack;
  return is_packed ? "" : AddWork(combinations * placement.ops.size());
}

std::string PlacementParser::FirstMisfitByRank(const Placement& placement,
                                               const std::vector<uint64_t>& shape,
                                               LocalBounds& bounds) {
  const Mesh& mesh = program_.MeshOf(placement);
  std::vector<uint32_t> coordinates(mesh.axes.size(), 0);
  std::vector<uint32_t> axes;  // on which the local tensor depends
  uint64_t ops_work = 0;
  for (const PlacementOp& op : placement.ops) {
    ops_work += 1 + op.blocks.size();
    if (op.kind == PlacementOp::Kind::kPlace) {
      coordinates[op.axes[0]] = op.coordinates[0];
    } else if (op.kind != PlacementOp::Kind::kPack) {
      axes.insert(axes.end(), op.axes.begin(), op.axes.end());
    }
  }
  const uint64_t combinations = mesh.SizeOf(axes);
  evaluation_count_ += combinations;
  if (evaluation_count_ > kEvaluationsMax) {
    return absl::StrFormat(
        "expected at most %d local tensors with a view, perm or pad in the document, found more",
        kEvaluationsMax);
  }
  if (std::string most = AddWork(combinations * ops_work); !most.empty()) return most;
  std::vector<LocalPart> parts;
  for (uint64_t combination = 0; combination < combinations; ++combination) {
    mesh.SetCombination(axes, combination, coordinates);
    std::string misfit;
    const LocalTensor local = TryEvaluate(program_, placement, shape, coordinates, misfit);
    if (!misfit.empty()) return misfit;
    parts.clear();
    uint64_t work = 0;
    const bool is_few = local.PartsOf(0, local.places(), kLocalPartsMax, parts, &work);
    if (std::string most = AddWork(work); !most.empty()) return most;
    if (!is_few) {
      return absl::StrFormat("expected at most %d pieces of one local tensor, found more",
                             kLocalPartsMax);
    }
    bounds.places = std::max(bounds.places, local.places());
    bounds.parts = std::max<uint64_t>(bounds.parts, parts.size());
    part_count_ += parts.size();
    if (part_count_ > kPartsMax) {
      return absl::StrFormat("expected at most %d pieces of all local tensors, found more",
                             kPartsMax);
    }
  }
  return "";
}

}  // namespace holdfast
