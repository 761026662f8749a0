#include "converter/dtensor_shards.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"

namespace holdfast::converter {
namespace {

using Runs = std::vector<ShardRun>;

uint64_t SizeOf(const Runs& runs) {
  uint64_t size = 0;
  for (const ShardRun& run : runs) size += run.size;
  return size;
}

// Elements [begin, end) of what the runs hold, appended to `out`.
void Clip(const Runs& runs, uint64_t begin, uint64_t end, Runs& out) {
  uint64_t at = 0;
  for (const ShardRun& run : runs) {
    const uint64_t lo = std::max(begin, at);
    const uint64_t hi = std::min(end, at + run.size);
    if (lo < hi) {
      const ShardRun clipped{run.begin + (lo - at), hi - lo};
      if (!out.empty() && out.back().begin + out.back().size == clipped.begin) {
        out.back().size += clipped.size;
      } else {
        out.push_back(clipped);
      }
    }
    at += run.size;
  }
}

// Part `index` of torch.chunk(size, parts): [first, second).
std::pair<uint64_t, uint64_t> Chunk(uint64_t size, uint64_t parts, uint64_t index) {
  const uint64_t chunk = size / parts + (size % parts != 0 ? 1 : 0);
  // A chunk that begins past the end is empty; index * chunk cannot overflow before that.
  if (chunk == 0 || index > size / chunk) return {size, size};
  const uint64_t begin = index * chunk;
  return {begin, begin + std::min(chunk, size - begin)};
}

absl::StatusOr<Runs> Apply(const Runs& runs, const Placement& placement, const MeshDim& mesh) {
  const uint64_t size = SizeOf(runs);
  const uint64_t parts =
      placement.kind == Placement::Kind::kStridedShard ? placement.split_factor : 1;
  const uint64_t filled = std::min(parts, size);  // the others are empty
  if (filled > kShardRunsMax) {
    return absl::ResourceExhaustedError(absl::StrFormat(
        "expected at most %d parts of a strided shard, found %d", kShardRunsMax, filled));
  }
  Runs held;
  for (uint64_t part = 0; part < filled; ++part) {
    const auto [begin, end] = Chunk(size, parts, part);
    const auto [lo, hi] = Chunk(end - begin, mesh.ranks, mesh.coordinate);
    Clip(runs, begin + lo, begin + hi, held);
    if (held.size() > kShardRunsMax) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("expected at most %d runs of a dimension, found more", kShardRunsMax));
    }
  }
  return held;
}

}  // namespace

absl::StatusOr<std::vector<std::vector<ShardRun>>> ShardRuns(
    std::span<const uint64_t> shape, std::span<const MeshDim> mesh,
    std::span<const Placement> placements) {
  if (mesh.size() != placements.size()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("expected a placement for each of %d mesh dimensions, found %d",
                        mesh.size(), placements.size()));
  }
  std::vector<Runs> runs(shape.size());
  for (size_t d = 0; d < shape.size(); ++d) {
    if (shape[d] > 0) runs[d].push_back({0, shape[d]});
  }
  for (size_t m = 0; m < mesh.size(); ++m) {
    const Placement& placement = placements[m];
    if (mesh[m].coordinate >= mesh[m].ranks) {
      return absl::InvalidArgumentError(
          absl::StrFormat("expected a coordinate below %d in mesh dimension %d, found %d",
                          mesh[m].ranks, m, mesh[m].coordinate));
    }
    if (placement.kind == Placement::Kind::kReplicate) continue;
    if (placement.dim >= shape.size()) {
      return absl::InvalidArgumentError(
          absl::StrFormat("expected a shard of one of %d dimensions, found dimension %d",
                          shape.size(), placement.dim));
    }
    if (placement.split_factor == 0) {
      return absl::InvalidArgumentError("expected a split factor above 0, found 0");
    }
    ASSIGN_OR_RETURN(runs[placement.dim], Apply(runs[placement.dim], placement, mesh[m]));
  }
  return runs;
}

}  // namespace holdfast::converter
