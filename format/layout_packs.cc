#include "format/layout_packs.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/check.h"

namespace holdfast {
namespace {

uint64_t RoundUp(uint64_t value, uint64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

CoordinateChoices AllCoordinates(const Mesh& mesh) {
  CoordinateChoices choices(mesh.axes.size());
  ChooseAllOthers(mesh, choices);
  return choices;
}

void ChooseAllOthers(const Mesh& mesh, CoordinateChoices& choices) {
  for (size_t axis = 0; axis < mesh.axes.size(); ++axis) {
    if (!choices[axis].empty()) continue;
    choices[axis].resize(mesh.axes[axis].size);
    std::iota(choices[axis].begin(), choices[axis].end(), 0u);
  }
}

std::vector<uint32_t> RanksOf(const Mesh& mesh, const CoordinateChoices& choices) {
  std::vector<uint32_t> ranks = {0};
  for (size_t axis = 0; axis < mesh.axes.size(); ++axis) {
    std::vector<uint32_t> next;
    next.reserve(ranks.size() * choices[axis].size());
    for (uint32_t rank : ranks) {
      for (uint32_t c : choices[axis]) next.push_back(rank * mesh.axes[axis].size + c);
    }
    ranks = std::move(next);
  }
  return ranks;
}

void ChooseJoint(const Mesh& mesh, std::span<const uint32_t> axes, uint32_t joint,
                 CoordinateChoices& choices) {
  for (size_t i = axes.size(); i-- > 0;) {
    choices[axes[i]] = {joint % mesh.axes[axes[i]].size};
    joint /= mesh.axes[axes[i]].size;
  }
}

PackContents FillPack(const LayoutProgram& program, const PackProgram& pack,
                      std::span<const uint32_t> coordinates) {
  PackContents contents;
  contents.starts.reserve(pack.members.size());
  uint64_t total = 0;
  for (uint32_t member : pack.members) {
    const LocalTensor local =
        Evaluate(program, program.placements[program.states[member].placement],
                 program.tensor_states[member].shape, coordinates);
    if (!local.held()) {
      contents.starts.push_back(PackContents::kNotHeld);
      continue;
    }
    const uint64_t start = RoundUp(total, pack.align_elements);
    contents.starts.push_back(start);
    total = start + local.places();
  }
  const uint64_t parts = program.meshes[pack.mesh].SizeOf(pack.axes);
  contents.slice_elements = RoundUp(total, pack.multiple_elements * parts) / parts;
  return contents;
}

PackCuts::PackCuts(const LayoutProgram& program, const PackProgram& pack)
    : program_(&program), pack_(&pack), mesh_(&program.meshes[pack.mesh]) {
  CoordinateChoices choices(mesh_->axes.size(), {0});
  const CoordinateChoices all = AllCoordinates(*mesh_);
  for (uint32_t axis : pack.other_axes) choices[axis] = all[axis];
  for (uint32_t rank : RanksOf(*mesh_, choices)) {
    tuples_.push_back(mesh_->CoordinatesOf(rank));
    contents_.push_back(FillPack(program, pack, tuples_.back()));
  }
}

uint64_t PackCuts::LocalKey(uint32_t member, std::span<const uint32_t> coordinates) const {
  uint64_t key = 0;
  for (const PlacementOp& op :
       program_->placements[program_->states[pack_->members[member]].placement].ops) {
    if (op.kind == PlacementOp::Kind::kShard || op.kind == PlacementOp::Kind::kFlat) {
      key = key * mesh_->SizeOf(op.axes) + mesh_->JointCoordinate(op.axes, coordinates);
    }
  }
  return key;
}

std::map<uint64_t, std::vector<uint32_t>> PackCuts::TuplesAlike(uint32_t member) const {
  std::map<uint64_t, std::vector<uint32_t>> alike;
  for (uint32_t tuple = 0; tuple < tuples_.size(); ++tuple) {
    if (contents_[tuple].starts[member] != PackContents::kNotHeld) {
      alike[LocalKey(member, tuples_[tuple])].push_back(tuple);
    }
  }
  return alike;
}

LocalTensor PackCuts::LocalOf(uint32_t member, uint32_t tuple) const {
  const uint32_t index = pack_->members[member];
  return Evaluate(*program_, program_->placements[program_->states[index].placement],
                  program_->tensor_states[index].shape, tuples_[tuple]);
}

std::vector<uint64_t> PackCuts::CutsIn(uint32_t member, const std::vector<uint32_t>& tuples,
                                       uint64_t begin, uint64_t end) const {
  std::vector<uint64_t> cuts = {begin, end};
  for (uint32_t tuple : tuples) {
    const PackContents& contents = contents_[tuple];
    const uint64_t start = contents.starts[member];
    uint64_t boundary = RoundUp(start + begin, contents.slice_elements);
    for (; boundary < start + end; boundary += contents.slice_elements) {
      cuts.push_back(boundary - start);
    }
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  return cuts;
}

std::vector<PackCuts::Interval> PackCuts::IntervalsOf(uint32_t member,
                                                      const std::vector<uint32_t>& tuples,
                                                      uint64_t begin, uint64_t end) const {
  const std::vector<uint64_t> cuts = CutsIn(member, tuples, begin, end);
  std::vector<Interval> intervals;
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    Interval interval{cuts[i], cuts[i + 1], {}};
    for (uint32_t tuple : tuples) {
      const PackContents& contents = contents_[tuple];
      const uint64_t slice = (contents.starts[member] + cuts[i]) / contents.slice_elements;
      CHECK(slice < mesh_->SizeOf(pack_->axes));
      interval.holders.emplace_back(tuple, static_cast<uint32_t>(slice));
    }
    intervals.push_back(std::move(interval));
  }
  return intervals;
}

std::vector<uint32_t> PackCuts::Ranks(const std::vector<Holder>& holders) const {
  CoordinateChoices choices(mesh_->axes.size());
  std::vector<uint32_t> ranks;
  for (const auto& [tuple, slice] : holders) {
    for (uint32_t axis : pack_->other_axes) choices[axis] = {tuples_[tuple][axis]};
    ChooseJoint(*mesh_, pack_->axes, slice, choices);
    ChooseAllOthers(*mesh_, choices);
    const std::vector<uint32_t> more = RanksOf(*mesh_, choices);
    ranks.insert(ranks.end(), more.begin(), more.end());
  }
  std::sort(ranks.begin(), ranks.end());
  return ranks;
}

std::vector<PackCut> PackCuts::CutsOf(uint32_t member, std::span<const uint32_t> coordinates,
                                      uint64_t begin, uint64_t end) const {
  const uint64_t key = LocalKey(member, coordinates);
  std::vector<uint32_t> tuples;
  for (uint32_t tuple = 0; tuple < tuples_.size(); ++tuple) {
    if (contents_[tuple].starts[member] != PackContents::kNotHeld &&
        LocalKey(member, tuples_[tuple]) == key) {
      tuples.push_back(tuple);
    }
  }
  std::vector<PackCut> cuts;
  for (const Interval& interval : IntervalsOf(member, tuples, begin, end)) {
    cuts.push_back({interval.begin, interval.end, Ranks(interval.holders)});
  }
  return cuts;
}

uint64_t PackCuts::HolderNumbers(uint64_t part_numbers, uint64_t numbers_max) const {
  // Ranks that differ in no axis that counts are holders together.
  const uint64_t ranks_of_holder =
      program_->world_size / (tuples_.size() * mesh_->SizeOf(pack_->axes));
  uint64_t numbers = 0;
  for (uint32_t member = 0; member < pack_->members.size() && numbers <= numbers_max; ++member) {
    for (const auto& [key, tuples] : TuplesAlike(member)) {
      const LocalTensor local = LocalOf(member, tuples[0]);
      if (local.places() == 0) continue;
      const uint64_t parts = CutsIn(member, tuples, 0, local.places()).size() - 1;
      numbers += parts * (part_numbers + tuples.size() * (1 + ranks_of_holder) + local.RangeCost());
    }
  }
  return numbers;
}

void PackCuts::AddLoads(std::map<std::vector<uint32_t>, uint64_t>& loads) const {
  std::map<std::vector<Holder>, uint64_t> bytes;
  for (uint32_t member = 0; member < pack_->members.size(); ++member) {
    const TensorState& tensor_state = program_->tensor_states[pack_->members[member]];
    for (const auto& [key, tuples] : TuplesAlike(member)) {
      const LocalTensor local = LocalOf(member, tuples[0]);
      if (local.places() == 0) continue;
      for (Interval& interval : IntervalsOf(member, tuples, 0, local.places())) {
        const uint64_t elements = local.ElementCount(interval.begin, interval.end);
        if (elements == 0) continue;  // padding only
        bytes[std::move(interval.holders)] += elements * ElementBytes(tensor_state.dtype);
      }
    }
  }
  for (const auto& [holders, count] : bytes) loads[Ranks(holders)] += count;
}

}  // namespace holdfast
