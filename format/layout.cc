// Lowering: from the program of a layout to the segments of one rank, and to who holds them.
//
// Pieces of unpacked tensors are equal or disjoint by construction, so their holders follow from
// the placement alone. Packed ones can overlap in part: where local tensors differ in size or
// presence (tied embeddings on two pipeline stages, uneven tensor-parallel shards), the packs of
// different ranks are cut at different elements. format/layout_packs.cc cuts those until pieces are
// equal or disjoint again.
#include "format/layout.h"

#include <algorithm>
#include <map>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "format/layout_packs.h"
#include "format/layout_program.h"

namespace holdfast {
namespace {

// The piece that elements [begin, end) of the local tensor's box are, in the form that is the same
// for all boxes that hold the same elements in the same order: a range of the whole tensor if the
// box is one.
Piece PieceOf(const LocalTensor& local, std::span<const uint64_t> shape, BoxTable& boxes) {
  const std::span<const uint64_t> lo(local.lo.data(), local.dims);
  const std::span<const uint64_t> size(local.size.data(), local.dims);
  if (const auto first = ContiguousStart({lo, size}, shape); first.has_value()) {
    return {0, kWholeTensor, *first + local.begin, *first + local.end};
  }
  // The states of one tensor come one behind the other and mostly have one box.
  if (boxes.size() > 0) {
    const BoxView last = boxes[boxes.size() - 1];
    if (std::equal(lo.begin(), lo.end(), last.lo.begin(), last.lo.end()) &&
        std::equal(size.begin(), size.end(), last.size.begin(), last.size.end())) {
      return {0, boxes.size() - 1, local.begin, local.end};
    }
  }
  return {0, boxes.Add(lo, size), local.begin, local.end};
}

// The ranks that a placement without a pack gives the same piece as the rank at `coordinates`.
std::vector<uint32_t> HoldersOf(const LayoutProgram& program, const Placement& placement,
                                std::span<const uint32_t> coordinates) {
  CoordinateChoices choices = AllCoordinates(program.mesh);
  for (const PlacementOp& op : placement) {
    choices[op.axis] = op.kind == PlacementOp::Kind::kPlace
                           ? op.coordinates
                           : std::vector<uint32_t>{coordinates[op.axis]};
  }
  return RanksOf(program.mesh, choices);
}

// Collects the segments of one rank.
class RankLowering {
 public:
  RankLowering(const LayoutProgram& program, Rank rank)
      : program_(program),
        coordinates_(program.CoordinatesOf(Value(rank))),
        buffer_numbers_(program.buffer_names.size(), kNoBuffer) {}

  // `cut_by_holders`: also fills holders and holder_sets, and cuts packed pieces where those
  // change.
  RankHoldings Lower(bool cut_by_holders) {
    cut_by_holders_ = cut_by_holders;
    for (const PackProgram& pack : program_.packs) {
      contents_.push_back(FillPack(program_, pack, coordinates_));
      if (cut_by_holders) cuts_.emplace_back(program_, pack);
    }
    for (uint32_t index = 0; index < program_.tensor_states.size(); ++index) {
      if (program_.states[index].pack == kNoPack) {
        AddUnpacked(index);
      } else {
        AddPacked(index);
      }
    }
    return std::move(out_);
  }

 private:
  static constexpr uint32_t kNoBuffer = UINT32_MAX;

  uint32_t Buffer(uint32_t name, uint64_t end_bytes) {
    uint32_t& number = buffer_numbers_[name];
    if (number == kNoBuffer) {
      number = static_cast<uint32_t>(out_.layout.buffers.size());
      out_.layout.buffers.push_back({program_.buffer_names[name], 0});
    }
    uint64_t& bytes = out_.layout.buffers[number].bytes;
    bytes = std::max(bytes, end_bytes);
    return number;
  }

  void Add(uint32_t index, const LocalTensor& local, uint32_t buffer, uint64_t offset_bytes) {
    Segment segment;
    segment.piece = PieceOf(local, program_.tensor_states[index].shape, out_.layout.boxes);
    segment.piece.tensor_state = index;
    segment.buffer = buffer;
    segment.buffer_offset_bytes = offset_bytes;
    out_.layout.segments.push_back(segment);
  }

  void AddUnpacked(uint32_t index) {
    const StateProgram& state = program_.states[index];
    const TensorState& tensor_state = program_.tensor_states[index];
    const Placement& placement = program_.placements[state.placement];
    const LocalTensor local = Evaluate(program_.mesh, placement, tensor_state.shape, coordinates_);
    if (!local.held) return;
    const uint64_t bytes = (local.end - local.begin) * ElementBytes(tensor_state.dtype);
    const uint32_t buffer = Buffer(state.buffer, bytes == 0 ? 0 : state.offset_bytes + bytes);
    if (bytes == 0) return;
    Add(index, local, buffer, state.offset_bytes);
    if (!cut_by_holders_) return;
    const auto [found, is_new] = set_of_placement_.emplace(state.placement, 0);
    if (is_new) found->second = HolderSet(HoldersOf(program_, placement, coordinates_));
    out_.holders.push_back(found->second);
  }

  void AddPacked(uint32_t index) {
    const StateProgram& state = program_.states[index];
    const TensorState& tensor_state = program_.tensor_states[index];
    const PackContents& contents = contents_[state.pack];
    const uint64_t element_bytes = ElementBytes(tensor_state.dtype);
    LocalTensor local = Evaluate(program_.mesh, program_.placements[state.placement],
                                 tensor_state.shape, coordinates_);
    if (!local.held) return;
    const uint32_t buffer = Buffer(state.buffer, contents.slice_elements * element_bytes);
    const uint64_t start = contents.starts[state.pack_member];
    const uint64_t length = local.end - local.begin;
    const uint64_t slice_begin =
        contents.slice_elements * coordinates_[program_.packs[state.pack].axis];
    const uint64_t slice_end = slice_begin + contents.slice_elements;
    const uint64_t first = std::max(start, slice_begin);  // in the pack
    const uint64_t last = std::min(start + length, slice_end);
    if (first >= last) return;
    const auto add = [&](uint64_t begin, uint64_t end) {  // in the local tensor
      LocalTensor part = local;
      part.begin = local.begin + begin;
      part.end = local.begin + end;
      Add(index, part, buffer, (start + begin - slice_begin) * element_bytes);
    };
    if (!cut_by_holders_) {
      add(first - start, last - start);
      return;
    }
    for (PackCut& cut :
         cuts_[state.pack].CutsOf(state.pack_member, coordinates_, first - start, last - start)) {
      add(cut.begin, cut.end);
      out_.holders.push_back(HolderSet(std::move(cut.ranks)));
    }
  }

  uint32_t HolderSet(std::vector<uint32_t> ranks) {
    const auto [found, is_new] =
        holder_sets_.emplace(std::move(ranks), static_cast<uint32_t>(out_.holder_sets.size()));
    if (is_new) out_.holder_sets.push_back(found->first);
    return found->second;
  }

  const LayoutProgram& program_;
  const std::vector<uint32_t> coordinates_;
  bool cut_by_holders_ = false;
  RankHoldings out_;
  std::vector<uint32_t> buffer_numbers_;  // of each name: its number here
  std::vector<PackContents> contents_;
  std::vector<PackCuts> cuts_;
  std::unordered_map<uint32_t, uint32_t> set_of_placement_;
  std::map<std::vector<uint32_t>, uint32_t> holder_sets_;
};

// Two segments of a buffer share bytes only if they are the same bytes of one dtype: tied tensors.
absl::Status CheckBuffers(const std::vector<TensorState>& tensor_states, const RankLayout& layout) {
  std::vector<uint32_t> order(layout.segments.size());
  for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  const auto bytes_of = [&](const Segment& segment) {
    return segment.piece.ElementCount() *
           ElementBytes(tensor_states[segment.piece.tensor_state].dtype);
  };
  std::sort(order.begin(), order.end(), [&layout](uint32_t a, uint32_t b) {
    const Segment& x = layout.segments[a];
    const Segment& y = layout.segments[b];
    return std::tie(x.buffer, x.buffer_offset_bytes, a) <
           std::tie(y.buffer, y.buffer_offset_bytes, b);
  });
  for (size_t i = 1; i < order.size(); ++i) {
    const Segment& before = layout.segments[order[i - 1]];
    const Segment& here = layout.segments[order[i]];
    const uint64_t before_end = before.buffer_offset_bytes + bytes_of(before);
    if (before.buffer != here.buffer || here.buffer_offset_bytes >= before_end) continue;
    const TensorState& a = tensor_states[before.piece.tensor_state];
    const TensorState& b = tensor_states[here.piece.tensor_state];
    if (here.buffer_offset_bytes == before.buffer_offset_bytes && a.dtype == b.dtype &&
        bytes_of(here) == bytes_of(before)) {
      continue;
    }
    return absl::InvalidArgumentError(absl::StrFormat(
        "buffer \"%s\": %s lies at bytes [%d, %d) and %s at bytes [%d, %d); expected that they are "
        "apart, or equal and of one dtype (tied)",
        layout.buffers[here.buffer].name.substr(0, 200), Describe(a), before.buffer_offset_bytes,
        before_end, Describe(b), here.buffer_offset_bytes,
        here.buffer_offset_bytes + bytes_of(here)));
  }
  return absl::OkStatus();
}

// Bytes per combination of coordinates of the axes that the placement cuts, added up over tensors
// of one placement.
class PlacementLoad {
 public:
  PlacementLoad(const LayoutProgram& program, const Placement& placement)
      : program_(program), placement_(placement), coordinates_(program.mesh.size(), 0) {
    size_t combinations = 1;
    for (const PlacementOp& op : placement) {
      if (op.kind == PlacementOp::Kind::kPlace) {
        coordinates_[op.axis] = op.coordinates[0];  // any that holds it: all hold the same
      } else {
        axes_.push_back(op.axis);
        combinations *= program.mesh[op.axis].size;
      }
    }
    bytes_.resize(combinations);
  }

  void Add(std::span<const uint64_t> shape, uint64_t element_bytes, uint64_t count) {
    for (size_t i = 0; i < bytes_.size(); ++i) {
      SetCoordinates(i);
      const LocalTensor local = Evaluate(program_.mesh, placement_, shape, coordinates_);
      bytes_[i] += (local.end - local.begin) * element_bytes * count;
    }
  }

  void AddTo(std::map<std::vector<uint32_t>, uint64_t>& loads) {
    for (size_t i = 0; i < bytes_.size(); ++i) {
      SetCoordinates(i);
      if (bytes_[i] > 0) loads[HoldersOf(program_, placement_, coordinates_)] += bytes_[i];
    }
  }

 private:
  void SetCoordinates(size_t combination) {
    for (uint32_t axis : axes_) {
      coordinates_[axis] = static_cast<uint32_t>(combination % program_.mesh[axis].size);
      combination /= program_.mesh[axis].size;
    }
  }

  const LayoutProgram& program_;
  const Placement& placement_;
  std::vector<uint32_t> axes_;
  std::vector<uint32_t> coordinates_;
  std::vector<uint64_t> bytes_;
};

}  // namespace

Layout::Layout(std::unique_ptr<const LayoutProgram> program) : program_(std::move(program)) {}
Layout::~Layout() = default;

absl::StatusOr<std::unique_ptr<const Layout>> Layout::Parse(std::string json) {
  auto program = ParseLayout(std::move(json));
  if (!program.ok()) return program.status();
  return std::unique_ptr<const Layout>(new Layout(std::move(*program)));  // private constructor
}

const std::string& Layout::text() const { return program_->text; }
LayoutHash Layout::hash() const { return program_->hash; }
const std::vector<MeshAxis>& Layout::mesh() const { return program_->mesh; }
uint32_t Layout::world_size() const { return program_->world_size; }
const std::vector<TensorState>& Layout::tensor_states() const { return program_->tensor_states; }

absl::StatusOr<RankLayout> Layout::ForRank(Rank rank) const {
  CHECK(Value(rank) < world_size());
  RankHoldings held = RankLowering(*program_, rank).Lower(/*cut_by_holders=*/false);
  absl::Status apart = CheckBuffers(program_->tensor_states, held.layout);
  if (!apart.ok()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("rank %d: %s", Value(rank), std::string(apart.message())));
  }
  return std::move(held.layout);
}

RankHoldings Layout::HeldByRank(Rank rank) const {
  CHECK(Value(rank) < world_size());
  return RankLowering(*program_, rank).Lower(/*cut_by_holders=*/true);
}

std::vector<HolderLoad> Layout::HolderLoads() const {
  // Tensors of one placement, shape and element size differ in nothing that counts here.
  std::map<std::tuple<uint32_t, uint64_t, std::vector<uint64_t>>, uint64_t> alike;
  for (size_t i = 0; i < program_->states.size(); ++i) {
    const StateProgram& state = program_->states[i];
    const TensorState& tensor_state = program_->tensor_states[i];
    if (state.pack != kNoPack) continue;
    ++alike[{state.placement, ElementBytes(tensor_state.dtype), tensor_state.shape}];
  }
  std::map<std::vector<uint32_t>, uint64_t> loads;
  for (auto it = alike.begin(); it != alike.end();) {
    const uint32_t placement = std::get<0>(it->first);
    PlacementLoad load(*program_, program_->placements[placement]);
    for (; it != alike.end() && std::get<0>(it->first) == placement; ++it) {
      load.Add(std::get<2>(it->first), std::get<1>(it->first), it->second);
    }
    load.AddTo(loads);
  }
  for (const PackProgram& pack : program_->packs) PackCuts(*program_, pack).AddLoads(loads);

  std::vector<HolderLoad> result;
  result.reserve(loads.size());
  for (const auto& [ranks, bytes] : loads) result.push_back({ranks, bytes});
  return result;
}

}  // namespace holdfast
