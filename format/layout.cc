// Lowering: from the program of a layout to the segments of one rank, and to who holds them.
//
// Pieces of unpacked tensors are equal or disjoint by construction, so their holders follow from
// the placement alone; of listed ones the document says them. Packed ones can overlap in part:
// where local tensors differ in size or presence (tied embeddings on two pipeline stages, uneven
// tensor-parallel shards), the packs of different ranks are cut at different elements.
// format/layout_packs.cc cuts those until pieces are equal or disjoint again.
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
#include "format/local_tensor.h"
#include "format/planner_geometry.h"

namespace holdfast {
namespace {

// A box in the form that is the same for all boxes that hold the same elements in the same order: a
// range of the whole tensor if it is one.
Piece PieceOf(BoxView box, uint64_t begin, uint64_t end, std::span<const uint64_t> shape,
              BoxTable& boxes) {
  if (const auto first = ContiguousStart(box, shape); first.has_value()) {
    return {0, kWholeTensor, *first + begin, *first + end};
  }
  // The states of one tensor come one behind the other and mostly have one box.
  if (boxes.size() > 0) {
    const BoxView last = boxes[boxes.size() - 1];
    if (std::equal(box.lo.begin(), box.lo.end(), last.lo.begin(), last.lo.end()) &&
        std::equal(box.size.begin(), box.size.end(), last.size.begin(), last.size.end())) {
      return {0, boxes.size() - 1, begin, end};
    }
  }
  return {0, boxes.Add(box.lo, box.size), begin, end};
}

// The ranks that a placement without a pack gives the same piece as the rank at `coordinates`.
std::vector<uint32_t> HoldersOf(const LayoutProgram& program, const Placement& placement,
                                std::span<const uint32_t> coordinates) {
  const Mesh& mesh = program.MeshOf(placement);
  CoordinateChoices choices(mesh.axes.size());
  for (const PlacementOp& op : placement.ops) {
    for (uint32_t axis : op.axes) {
      choices[axis] = op.kind == PlacementOp::Kind::kPlace
                          ? op.coordinates
                          : std::vector<uint32_t>{coordinates[axis]};
    }
  }
  ChooseAllOthers(mesh, choices);
  return RanksOf(mesh, choices);
}

std::vector<uint32_t> RanksOfListed(const ListedSegment& listed) {
  std::vector<uint32_t> ranks;
  for (const ListedSegment::Copy& copy : listed.copies) ranks.push_back(copy.rank);
  return ranks;
}

// Collects the segments of one rank.
class RankLowering {
 public:
  RankLowering(const LayoutProgram& program, Rank rank)
      : program_(program),
        rank_(Value(rank)),
        buffer_numbers_(program.buffer_names.size(), kNoBuffer) {
    for (const Mesh& mesh : program.meshes) {
      coordinates_.push_back(mesh.CoordinatesOf(Value(rank)));
    }
  }

  // `cut_by_holders`: also fills holders and holder_sets, and cuts packed pieces where those
  // change.
  RankHoldings Lower(bool cut_by_holders) {
    cut_by_holders_ = cut_by_holders;
    for (const PackProgram& pack : program_.packs) {
      contents_.push_back(FillPack(program_, pack, coordinates_[pack.mesh]));
      if (cut_by_holders) cuts_.emplace_back(program_, pack);
    }
    for (uint32_t index = 0; index < program_.tensor_states.size(); ++index) {
      const StateProgram& state = program_.states[index];
      if (state.listed != kNotListed) {
        AddListed(index);
      } else if (state.pack == kNoPack) {
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

  const TensorState& State(uint32_t index) const { return program_.tensor_states[index]; }

  // The number of these strides in the layout. Neighbours are often alike.
  uint32_t Strides(std::vector<uint64_t> strides_bytes) {
    std::vector<std::vector<uint64_t>>& all = out_.layout.strides_bytes;
    if (all.empty() || all.back() != strides_bytes) all.push_back(std::move(strides_bytes));
    return static_cast<uint32_t>(all.size() - 1);
  }

  // Adds what lies in places [begin, end) of the local tensor, of which place `begin` is at
  // offset_bytes of the buffer. True if that is anything: it may all be padding.
  bool Add(uint32_t index, const LocalTensor& local, uint64_t begin, uint64_t end, uint32_t buffer,
           uint64_t offset_bytes) {
    const TensorState& tensor_state = State(index);
    const uint64_t element_bytes = ElementBytes(tensor_state.dtype);
    parts_.clear();
    // It fits when the document is parsed; a part of it may be in somewhat more pieces.
    CHECK(local.PartsOf(begin, end, kLocalPartsMax * 64, parts_));
    for (const LocalPart& part : parts_) {
      Segment segment;
      segment.buffer = buffer;
      segment.buffer_offset_bytes = offset_bytes + (part.place - begin) * element_bytes;
      if (part.contiguous) {
        segment.piece =
            PieceOf(part.box.View(), part.begin, part.end, tensor_state.shape, out_.layout.boxes);
      } else {
        std::vector<uint64_t> strides(part.box.dims);
        for (size_t d = 0; d < strides.size(); ++d) strides[d] = part.strides[d] * element_bytes;
        segment.strides = Strides(std::move(strides));
        segment.piece = {0, out_.layout.boxes.Add(part.box.View().lo, part.box.View().size),
                         part.begin, part.end};
      }
      segment.piece.tensor_state = index;
      out_.layout.segments.push_back(segment);
    }
    return !parts_.empty();
  }

  // Of the segments that have none yet.
  void SetHolders(uint32_t holder_set) {
    out_.holders.resize(out_.layout.segments.size(), holder_set);
  }

  void AddUnpacked(uint32_t index) {
    const StateProgram& state = program_.states[index];
    const Placement& placement = program_.placements[state.placement];
    const std::vector<uint32_t>& coordinates = coordinates_[placement.mesh];
    const LocalTensor local = Evaluate(program_, placement, State(index).shape, coordinates);
    if (!local.held()) return;
    const uint64_t bytes = local.places() * ElementBytes(State(index).dtype);
    const uint32_t buffer = Buffer(state.buffer, bytes == 0 ? 0 : state.offset_bytes + bytes);
    if (bytes == 0) return;
    if (!Add(index, local, 0, local.places(), buffer, state.offset_bytes)) return;
    if (!cut_by_holders_) return;
    const auto [found, is_new] = set_of_placement_.emplace(state.placement, 0);
    if (is_new) found->second = HolderSet(HoldersOf(program_, placement, coordinates));
    SetHolders(found->second);
  }

  void AddPacked(uint32_t index) {
    const StateProgram& state = program_.states[index];
    const PackProgram& pack = program_.packs[state.pack];
    const PackContents& contents = contents_[state.pack];
    const std::vector<uint32_t>& coordinates = coordinates_[pack.mesh];
    const uint64_t element_bytes = ElementBytes(State(index).dtype);
    const LocalTensor local =
        Evaluate(program_, program_.placements[state.placement], State(index).shape, coordinates);
    if (!local.held()) return;
    const uint32_t buffer = Buffer(state.buffer, contents.slice_elements * element_bytes);
    const uint64_t start = contents.starts[state.pack_member];
    const uint64_t slice_begin = contents.slice_elements *
                                 program_.meshes[pack.mesh].JointCoordinate(pack.axes, coordinates);
    const uint64_t slice_end = slice_begin + contents.slice_elements;
    const uint64_t first = std::max(start, slice_begin);  // in the pack
    const uint64_t last = std::min(start + local.places(), slice_end);
    if (first >= last) return;
    const auto add = [&](uint64_t begin, uint64_t end) {
      return Add(index, local, begin, end, buffer, (start + begin - slice_begin) * element_bytes);
    };
    if (!cut_by_holders_) {
      add(first - start, last - start);
      return;
    }
    for (PackCut& cut :
         cuts_[state.pack].CutsOf(state.pack_member, coordinates, first - start, last - start)) {
      if (add(cut.begin, cut.end)) SetHolders(HolderSet(std::move(cut.ranks)));
    }
  }

  void AddListed(uint32_t index) {
    const uint64_t element_bytes = ElementBytes(State(index).dtype);
    const ListedState& state = program_.listed[program_.states[index].listed];
    for (const ListedSegment& listed : state.segments) {
      const auto copy = std::lower_bound(
          listed.copies.begin(), listed.copies.end(), rank_,
          [](const ListedSegment::Copy& each, uint32_t rank) { return each.rank < rank; });
      if (copy == listed.copies.end() || copy->rank != rank_) continue;
      const ListedAddress& address = state.addresses[copy->address];
      Segment segment;
      uint64_t last = 0;  // offset of the last element
      uint64_t volume = 1;
      for (size_t d = 0; d < listed.size.size(); ++d) {
        volume *= listed.size[d];
        if (!address.strides_bytes.empty()) last += (listed.size[d] - 1) * address.strides_bytes[d];
      }
      if (address.strides_bytes.empty()) {
        last = (volume - 1) * element_bytes;
        segment.piece =
            PieceOf({listed.lo, listed.size}, 0, volume, State(index).shape, out_.layout.boxes);
      } else {
        segment.piece = {0, out_.layout.boxes.Add(listed.lo, listed.size), 0, volume};
        segment.strides = Strides(address.strides_bytes);
      }
      segment.piece.tensor_state = index;
      segment.buffer_offset_bytes = address.offset_bytes;
      segment.buffer = Buffer(address.buffer, address.offset_bytes + last + element_bytes);
      out_.layout.segments.push_back(segment);
      if (cut_by_holders_) SetHolders(HolderSet(RanksOfListed(listed)));
    }
  }

  uint32_t HolderSet(std::vector<uint32_t> ranks) {
    const auto [found, is_new] =
        holder_sets_.emplace(std::move(ranks), static_cast<uint32_t>(out_.holder_sets.size()));
    if (is_new) out_.holder_sets.push_back(found->first);
    return found->second;
  }

  const LayoutProgram& program_;
  const uint32_t rank_;
  std::vector<std::vector<uint32_t>> coordinates_;  // in every mesh
  bool cut_by_holders_ = false;
  RankHoldings out_;
  std::vector<uint32_t> buffer_numbers_;  // of each name: its number here
  std::vector<PackContents> contents_;
  std::vector<PackCuts> cuts_;
  std::unordered_map<uint32_t, uint32_t> set_of_placement_;
  std::map<std::vector<uint32_t>, uint32_t> holder_sets_;
  std::vector<LocalPart> parts_;
};

// Bytes of a buffer in which elements of a segment lie one behind the other.
struct BufferRun {
  uint32_t buffer = 0;
  uint64_t begin = 0;
  uint64_t end = 0;
  uint32_t segment = 0;
};

// The runs of a segment; of a strided one that has more than kRunsMax, or brings all of them above
// kRunsOfRankMax, the bytes from its first to its last, as if nothing lay between.
constexpr uint64_t kRunsMax = uint64_t{1} << 20;
constexpr uint64_t kRunsOfRankMax = uint64_t{1} << 22;
// Ops that copy the strided segments of a rank (PlanSegment): what a capture plan can hold.
constexpr uint64_t kStridedOpsMax = uint64_t{1} << 22;

void AddRuns(const std::vector<TensorState>& tensor_states, const RankLayout& layout,
             uint32_t number, std::vector<BufferRun>& runs) {
  const Segment& segment = layout.segments[number];
  const uint64_t element_bytes = ElementBytes(tensor_states[segment.piece.tensor_state].dtype);
  const uint64_t at = segment.buffer_offset_bytes;
  if (segment.strides == kContiguous) {
    runs.push_back({segment.buffer, at, at + segment.piece.ElementCount() * element_bytes, number});
    return;
  }
  const std::vector<uint64_t>& strides = layout.strides_bytes[segment.strides];
  const BoxView box = layout.boxes[segment.piece.box];
  // Dimensions from the smallest stride on, as long as they go on without a gap, are one run.
  std::vector<size_t> order(strides.size());
  for (size_t d = 0; d < order.size(); ++d) order[d] = d;
  std::erase_if(order, [&](size_t d) { return box.size[d] == 1; });
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  uint64_t run = element_bytes;
  size_t joined = 0;
  for (; joined < order.size() && strides[order[joined]] == run; ++joined) {
    run *= box.size[order[joined]];
  }
  uint64_t count = 1;
  uint64_t span = run;
  for (size_t i = joined; i < order.size(); ++i) {
    count = box.size[order[i]] > kRunsMax / count ? kRunsMax + 1 : count * box.size[order[i]];
    if (count > kRunsMax) count = kRunsMax + 1;
    span += (box.size[order[i]] - 1) * strides[order[i]];
  }
  if (count > kRunsMax ||
      count > kRunsOfRankMax - std::min<uint64_t>(kRunsOfRankMax, runs.size())) {
    runs.push_back({segment.buffer, at, at + span, number});
    return;
  }
  for (uint64_t i = 0; i < count; ++i) {
    uint64_t rest = i;
    uint64_t begin = at;
    for (size_t k = joined; k < order.size(); ++k) {
      begin += rest % box.size[order[k]] * strides[order[k]];
      rest /= box.size[order[k]];
    }
    runs.push_back({segment.buffer, begin, begin + run, number});
  }
}

absl::Status CheckStridedOps(const std::vector<TensorState>& tensor_states,
                             const RankLayout& layout) {
  uint64_t ops = 0;
  for (const Segment& segment : layout.segments) {
    if (segment.strides == kContiguous) continue;
    const TensorState& tensor_state = tensor_states[segment.piece.tensor_state];
    const uint64_t element_bytes = ElementBytes(tensor_state.dtype);
    const BoxView view = layout.boxes[segment.piece.box];
    ElementBox box;
    box.dims = view.lo.size();
    std::copy(view.lo.begin(), view.lo.end(), box.lo.begin());
    std::copy(view.size.begin(), view.size.end(), box.size.begin());
    Affine buffer;
    std::copy(layout.strides_bytes[segment.strides].begin(),
              layout.strides_bytes[segment.strides].end(), buffer.strides.begin());
    // At most 2^62 each.
    ops += CountRuns(box, RowMajor(view, 0, 0, element_bytes), buffer, element_bytes);
    if (ops <= kStridedOpsMax) continue;
    return absl::InvalidArgumentError(absl::StrFormat(
        "%s: expected at most %d copies of elements at even distances for all strided "
        "tensors, found more",
        Describe(tensor_state), kStridedOpsMax));
  }
  return absl::OkStatus();
}

// Two segments of a buffer share bytes only if they are the same bytes of one dtype: tied tensors.
absl::Status CheckBuffers(const std::vector<TensorState>& tensor_states, const RankLayout& layout) {
  std::vector<BufferRun> runs;
  runs.reserve(layout.segments.size());
  for (uint32_t i = 0; i < layout.segments.size(); ++i) AddRuns(tensor_states, layout, i, runs);
  std::sort(runs.begin(), runs.end(), [](const BufferRun& a, const BufferRun& b) {
    return std::tie(a.buffer, a.begin, a.segment) < std::tie(b.buffer, b.begin, b.segment);
  });
  for (size_t i = 1; i < runs.size(); ++i) {
    const BufferRun& before = runs[i - 1];
    const BufferRun& here = runs[i];
    if (before.buffer != here.buffer || here.begin >= before.end) continue;
    const TensorState& a = tensor_states[layout.segments[before.segment].piece.tensor_state];
    const TensorState& b = tensor_states[layout.segments[here.segment].piece.tensor_state];
    if (before.segment != here.segment && here.begin == before.begin && here.end == before.end &&
        a.dtype == b.dtype) {
      continue;
    }
    return absl::InvalidArgumentError(absl::StrFormat(
        "buffer \"%s\": %s lies at bytes [%d, %d) and %s at bytes [%d, %d); expected that they are "
        "apart, or equal and of one dtype (tied)",
        layout.buffers[here.buffer].name.substr(0, 200), Describe(a), before.begin, before.end,
        Describe(b), here.begin, here.end));
  }
  return absl::OkStatus();
}

// Bytes per combination of coordinates of the axes that the placement cuts, added up over tensors
// of one placement.
class PlacementLoad {
 public:
  PlacementLoad(const LayoutProgram& program, const Placement& placement)
      : program_(program),
        placement_(placement),
        mesh_(program.MeshOf(placement)),
        coordinates_(mesh_.axes.size(), 0) {
    for (const PlacementOp& op : placement.ops) {
      if (op.kind == PlacementOp::Kind::kPlace) {
        coordinates_[op.axes[0]] = op.coordinates[0];  // any that holds it: all hold the same
      } else {
        axes_.insert(axes_.end(), op.axes.begin(), op.axes.end());
      }
    }
    bytes_.resize(mesh_.SizeOf(axes_));
  }

  void Add(std::span<const uint64_t> shape, uint64_t element_bytes, uint64_t count) {
    for (size_t i = 0; i < bytes_.size(); ++i) {
      mesh_.SetCombination(axes_, i, coordinates_);
      const LocalTensor local = Evaluate(program_, placement_, shape, coordinates_);
      bytes_[i] += local.ElementCount(0, local.places()) * element_bytes * count;
    }
  }

  void AddTo(std::map<std::vector<uint32_t>, uint64_t>& loads) {
    for (size_t i = 0; i < bytes_.size(); ++i) {
      mesh_.SetCombination(axes_, i, coordinates_);
      if (bytes_[i] > 0) loads[HoldersOf(program_, placement_, coordinates_)] += bytes_[i];
    }
  }

 private:
  const LayoutProgram& program_;
  const Placement& placement_;
  const Mesh& mesh_;
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
const std::vector<MeshAxis>& Layout::mesh() const { return program_->meshes[0].axes; }
uint32_t Layout::world_size() const { return program_->world_size; }
const std::vector<TensorState>& Layout::tensor_states() const { return program_->tensor_states; }

absl::StatusOr<RankLayout> Layout::ForRank(Rank rank) const {
  CHECK(Value(rank) < world_size());
  RankHoldings held = RankLowering(*program_, rank).Lower(/*cut_by_holders=*/false);
  absl::Status good = CheckBuffers(program_->tensor_states, held.layout);
  if (good.ok()) good = CheckStridedOps(program_->tensor_states, held.layout);
  if (!good.ok()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("rank %d: %s", Value(rank), std::string(good.message())));
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
    if (state.pack != kNoPack || state.listed != kNotListed) continue;
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
  for (size_t i = 0; i < program_->states.size(); ++i) {
    if (program_->states[i].listed == kNotListed) continue;
    for (const ListedSegment& listed : program_->listed[program_->states[i].listed].segments) {
      uint64_t bytes = ElementBytes(program_->tensor_states[i].dtype);
      for (uint64_t size : listed.size) bytes *= size;
      loads[RanksOfListed(listed)] += bytes;
    }
  }

  std::vector<HolderLoad> result;
  result.reserve(loads.size());
  for (const auto& [ranks, bytes] : loads) result.push_back({ranks, bytes});
  return result;
}

}  // namespace holdfast
