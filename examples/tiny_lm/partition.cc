#include "examples/tiny_lm/partition.h"

#include <algorithm>

namespace tiny_lm {
namespace {

// The stage's pp coordinate among those that hold the parameter, or none.
const uint32_t* FindStage(const std::vector<uint32_t>& stages, uint32_t stage) {
  const auto found = std::find(stages.begin(), stages.end(), stage);
  return found == stages.end() ? nullptr : &*found;
}

// The parameter on tensor-parallel rank `tp` of `tp_count`, without slot and copy.
LocalParameter Cut(const Parameter& parameter, uint32_t tp_count, uint32_t tp) {
  LocalParameter local;
  local.parameter = &parameter;
  local.whole = local.size = local.slot_count = parameter.count;
  if (!parameter.cut.has_value()) return local;
  const TensorCut& cut = *parameter.cut;
  local.whole = parameter.shape[cut.dimension];
  for (size_t d = 0; d < parameter.shape.size(); ++d) {
    if (d < cut.dimension) local.outer *= parameter.shape[d];
    if (d > cut.dimension) local.inner *= parameter.shape[d];
  }
  const Slice part = CeilPart(local.whole, cut.grain, tp_count, tp);
  local.begin = part.begin;
  local.size = part.count;
  local.slot_count = local.count();
  if (cut.padded) {
    local.slot_count =
        local.outer * CeilPart(local.whole, cut.grain, tp_count, 0).count * local.inner;
  }
  return local;
}

}  // namespace

std::vector<uint32_t> StagesOf(const JobLayout& layout, const Home& home) {
  std::vector<uint32_t> stages;
  for (uint32_t stage = 0; stage < layout.mesh.pp; ++stage) {
    const Slice layers = layout.LayersOf(stage);
    if ((home.layer.has_value() && *home.layer >= layers.begin &&
         *home.layer < layers.begin + layers.count) ||
        (home.first_stage && stage == 0) || (home.last_stage && stage + 1 == layout.mesh.pp)) {
      stages.push_back(stage);
    }
  }
  return stages;
}

Partition::Partition(const ParameterTable& table, const JobLayout& layout, uint32_t rank)
    : table_(table), layout_(layout), rank_(rank), at_(layout.mesh.Of(rank)) {
  AddParameters();
  AddRuns();
  for (const Run& run : runs_) {
    const size_t begin = std::max(run.exchange, own_.begin);
    const size_t end = std::min(run.exchange + run.count, own_.begin + own_.count);
    if (begin >= end) continue;
    own_runs_.push_back({run.parameter, run.first + begin - run.exchange, end - begin, begin});
  }
}

void Partition::AddParameters() {
  for (const Parameter& parameter : table_.parameters()) {
    const std::vector<uint32_t> stages = StagesOf(layout_, parameter.home);
    const uint32_t* const stage = FindStage(stages, at_.pp);
    if (stage == nullptr) continue;
    LocalParameter local = Cut(parameter, layout_.mesh.tp, at_.tp);
    local.copy = static_cast<uint32_t>(stage - stages.data());
    if (!parameter.cut.has_value()) local.copy = local.copy * layout_.mesh.tp + at_.tp;
    local.slot = slot_count_;
    slot_count_ += local.slot_count;
    if (local.slot_count > 0) parameters_.push_back(local);
  }
}

void Partition::AddRuns() {
  const size_t dp = layout_.mesh.dp;
  if (layout_.zero != Zero::kParameters) {
    for (size_t i = 0; i < parameters_.size(); ++i) {
      const size_t count = parameters_[i].count();
      if (count > 0) runs_.push_back({i, 0, count, exchange_count_});
      exchange_count_ += count;
    }
    own_ = {0, exchange_count_};
    if (layout_.zero == Zero::kReplicated) return;
    const size_t part = (exchange_count_ + dp - 1) / dp;
    exchange_count_ = part * dp;
    own_ = {at_.dp * part, part};
    return;
  }
  size_t room = 0;  // of one dp rank
  for (const LocalParameter& local : parameters_) room += CeilPart(local.count(), 1, dp, 0).count;
  for (size_t coordinate = 0; coordinate < dp; ++coordinate) {
    size_t exchange = coordinate * room;
    for (size_t i = 0; i < parameters_.size(); ++i) {
      const size_t count = parameters_[i].count();
      const Slice part = CeilPart(count, 1, dp, coordinate);
      if (part.count > 0) runs_.push_back({i, part.begin, part.count, exchange});
      exchange += CeilPart(count, 1, dp, 0).count;
    }
  }
  exchange_count_ = room * dp;
  own_ = {at_.dp * room, room};
}

const LocalParameter* Partition::Find(const std::string& name) const {
  const auto found =
      std::find_if(parameters_.begin(), parameters_.end(),
                   [&](const LocalParameter& local) { return local.parameter->name == name; });
  return found == parameters_.end() ? nullptr : &*found;
}

}  // namespace tiny_lm
