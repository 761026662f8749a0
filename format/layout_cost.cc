#include "format/layout_cost.h"

#include <cstdint>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "format/layout_packs.h"

namespace holdfast {
namespace {

// Sets of ranks that hold something together: one for each of these 4-byte numbers, and 40 for the
// set itself. A world of 2^20 ranks of which each holds a part of its own takes 43,000,000.
constexpr uint64_t kHolderNumbersMax = uint64_t{1} << 26;
constexpr uint64_t kNumbersOfSet = 40;
// Starts of tensors in packs, 8 bytes each; 24 for each choice of coordinates that a pack depends
// on.
constexpr uint64_t kPackStartsMax = uint64_t{1} << 25;
constexpr uint64_t kStartsOfTuple = 24;
// Operations that find these starts, blocks of a dimension counted singly.
constexpr uint64_t kPackOpsMax = uint64_t{1} << 26;
// Operations that lower one rank, blocks counted singly: a placement may be that of many tensors.
constexpr uint64_t kOpsOfRankMax = uint64_t{1} << 26;

absl::Status TooMuch(const std::string& what, uint64_t max) {
  return absl::InvalidArgumentError(
      absl::StrFormat("layout: expected at most %d %s, found more", max, what));
}

// Blocks are counted singly. No operation is counted for a listed state.
uint64_t OpsOf(const LayoutProgram& program, uint32_t tensor_state) {
  uint64_t ops = 0;
  for (const PlacementOp& op : program.placements[program.states[tensor_state].placement].ops) {
    ops += 1 + op.blocks.size();
  }
  return ops;
}

absl::Status CheckOps(const LayoutProgram& program) {
  uint64_t ops = 0;
  for (uint32_t i = 0; i < program.states.size(); ++i) {
    ops += OpsOf(program, i);
    if (ops > kOpsOfRankMax) return TooMuch("operations on all tensors of a rank", kOpsOfRankMax);
  }
  return absl::OkStatus();
}

absl::Status CheckBytes(const LayoutProgram& program) {
  uint64_t bytes = 0;
  for (const TensorState& tensor_state : program.tensor_states) {
    bytes += tensor_state.Bytes();  // both at most 2^62
    if (bytes > kTensorBytesMax) return TooMuch("bytes of all tensors together", kTensorBytesMax);
  }
  return absl::OkStatus();
}

// Which ranks hold the same of a tensor of this placement, and nothing else of it: of every axis
// the coordinates that hold anything, kCut if each holds another part; empty: all, the same.
using Structure = std::pair<uint32_t, CoordinateChoices>;
constexpr uint32_t kCut = UINT32_MAX;

Structure StructureOf(const LayoutProgram& program, const Placement& placement) {
  CoordinateChoices choices(program.MeshOf(placement).axes.size());
  for (const PlacementOp& op : placement.ops) {
    for (uint32_t axis : op.axes) {
      choices[axis] =
          op.kind == PlacementOp::Kind::kPlace ? op.coordinates : std::vector<uint32_t>{kCut};
    }
  }
  return {placement.mesh, std::move(choices)};
}

uint64_t NumbersOf(const Mesh& mesh, const CoordinateChoices& choices) {
  uint64_t sets = 1;
  uint64_t holders = 1;  // of each; both products together are at most the world's size
  for (size_t axis = 0; axis < choices.size(); ++axis) {
    if (choices[axis].empty()) {
      holders *= mesh.axes[axis].size;
    } else if (choices[axis][0] == kCut) {
      sets *= mesh.axes[axis].size;
    } else {
      holders *= choices[axis].size();
    }
  }
  return sets * (kNumbersOfSet + holders);
}

absl::Status CheckHolders(const LayoutProgram& program) {
  std::set<uint32_t> placements;
  for (const StateProgram& state : program.states) {
    if (state.listed == kNotListed && state.pack == kNoPack) placements.insert(state.placement);
  }
  std::set<Structure> structures;
  uint64_t numbers = 0;
  for (uint32_t placement : placements) {
    const auto [structure, is_new] =
        structures.insert(StructureOf(program, program.placements[placement]));
    if (is_new) numbers += NumbersOf(program.meshes[structure->first], structure->second);
    if (numbers > kHolderNumbersMax) {
      return TooMuch("ranks in sets of ranks that hold the same (40 more for each set)",
                     kHolderNumbersMax);
    }
  }
  return absl::OkStatus();
}

absl::Status CheckPacks(const LayoutProgram& program) {
  uint64_t starts = 0;
  uint64_t ops = 0;
  for (const PackProgram& pack : program.packs) {
    const uint64_t tuples = program.meshes[pack.mesh].SizeOf(pack.other_axes);
    starts += tuples * (pack.members.size() + kStartsOfTuple);
    if (starts > kPackStartsMax) {
      return TooMuch("tensors in packs, each once for every choice of other coordinates",
                     kPackStartsMax);
    }
    for (uint32_t member : pack.members) ops += tuples * OpsOf(program, member);
    if (ops > kPackOpsMax) {
      return TooMuch("operations on tensors in packs, for every choice of other coordinates",
                     kPackOpsMax);
    }
  }
  uint64_t numbers = 0;
  for (const PackProgram& pack : program.packs) {
    if (pack.members.empty()) continue;
    numbers += PackCuts(program, pack).HolderNumbers(kNumbersOfSet, kHolderNumbersMax);
    if (numbers > kHolderNumbersMax) {
      return TooMuch("ranks that hold a part of a pack, counted for each part (40 more each)",
                     kHolderNumbersMax);
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckLayoutCost(const LayoutProgram& program) {
  RETURN_IF_ERROR(CheckBytes(program));
  RETURN_IF_ERROR(CheckOps(program));
  RETURN_IF_ERROR(CheckHolders(program));
  return CheckPacks(program);
}

}  // namespace holdfast
