#include "examples/tiny_lm/parallel.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace tiny_lm {

Coordinates Mesh::Of(uint32_t rank) const { return {rank / (dp * tp), rank / tp % dp, rank % tp}; }

uint32_t Mesh::RankAt(const Coordinates& at) const { return (at.pp * dp + at.dp) * tp + at.tp; }

std::vector<uint32_t> Mesh::Stages(Coordinates at) const {
  std::vector<uint32_t> ranks;
  for (at.pp = 0; at.pp < pp; ++at.pp) ranks.push_back(RankAt(at));
  return ranks;
}

std::vector<uint32_t> Mesh::DataRanks(Coordinates at) const {
  std::vector<uint32_t> ranks;
  for (at.dp = 0; at.dp < dp; ++at.dp) ranks.push_back(RankAt(at));
  return ranks;
}

std::vector<uint32_t> Mesh::TensorRanks(Coordinates at) const {
  std::vector<uint32_t> ranks;
  for (at.tp = 0; at.tp < tp; ++at.tp) ranks.push_back(RankAt(at));
  return ranks;
}

Slice CeilPart(size_t count, size_t grain, size_t parts, size_t index) {
  const size_t grains = (count + grain - 1) / grain;
  const size_t each = (grains + parts - 1) / parts * grain;
  const size_t begin = std::min(index * each, count);
  return {begin, std::min(each, count - begin)};
}

namespace {

std::vector<uint32_t> EvenStages(size_t layer_count, size_t stage_count) {
  std::vector<uint32_t> stages;
  for (size_t stage = 0; stage < stage_count; ++stage) {
    const size_t more = stage < layer_count % stage_count ? 1 : 0;
    stages.push_back(static_cast<uint32_t>(layer_count / stage_count + more));
  }
  return stages;
}

}  // namespace

Slice JobLayout::LayersOf(uint32_t stage) const {
  const auto own = stage_layers.begin() + stage;
  return {std::accumulate(stage_layers.begin(), own, size_t{0}), *own};
}

bool JobLayout::has_even_stages() const {
  return stage_layers == EvenStages(std::accumulate(stage_layers.begin(), stage_layers.end(), 0u),
                                    stage_layers.size());
}

absl::StatusOr<JobLayout> MakeJobLayout(const ParallelOptions& options, size_t layer_count,
                                        uint32_t world_size, uint64_t ballast_bytes) {
  const uint64_t unit = uint64_t{options.pp} * options.tp;
  if (world_size % unit != 0) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--pp %d --tp %d: expected a multiple of %d ranks, found %d", options.pp,
                        options.tp, unit, world_size));
  }
  JobLayout layout;
  layout.mesh = {options.pp, static_cast<uint32_t>(world_size / unit), options.tp};
  layout.zero = options.zero;
  layout.ballast_bytes = ballast_bytes;
  layout.stage_layers =
      options.pp_layers.empty() ? EvenStages(layer_count, options.pp) : options.pp_layers;
  const uint64_t sum =
      std::accumulate(layout.stage_layers.begin(), layout.stage_layers.end(), uint64_t{0});
  if (layout.stage_layers.size() != options.pp || sum != layer_count) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "--pp-layers %s: expected %d stages (--pp) of %d layers in all (--layers), found %d of %d",
        absl::StrJoin(options.pp_layers, ","), options.pp, layer_count, options.pp_layers.size(),
        sum));
  }
  return layout;
}

}  // namespace tiny_lm
