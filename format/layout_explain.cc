#include "format/layout_explain.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <set>
#include <string_view>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "base/suggestion.h"
#include "format/name_pattern.h"
#include "format/planner_geometry.h"
#include "format/writer_assignment.h"

namespace holdfast {
namespace {

// Equal for pieces of one tensor that have the same elements: a box that is a range of its tensor
// may be given as either (a strided segment needs the box).
using PieceKey = std::tuple<bool, std::vector<uint64_t>, std::vector<uint64_t>, uint64_t, uint64_t>;

PieceKey KeyOf(const Piece& piece, const BoxTable& boxes, std::span<const uint64_t> shape) {
  if (piece.box == kWholeTensor) return {true, {}, {}, piece.begin, piece.end};
  const BoxView box = boxes[piece.box];
  if (const auto start = ContiguousStart(box, shape); start.has_value()) {
    return {true, {}, {}, *start + piece.begin, *start + piece.end};
  }
  return {false,
          {box.lo.begin(), box.lo.end()},
          {box.size.begin(), box.size.end()},
          piece.begin,
          piece.end};
}

// The same piece in another table.
Piece Moved(Piece piece, const BoxTable& from, BoxTable& to) {
  if (piece.box == kWholeTensor) return piece;
  const BoxView box = from[piece.box];
  piece.box = to.Add(box.lo, box.size);
  return piece;
}

// Collects what rank after rank has of one tensor state.
class HoldersOfState {
 public:
  HoldersOfState(uint32_t tensor_state, const Layout& layout)
      : shape_(layout.tensor_states()[tensor_state].shape) {
    result_.tensor_state = tensor_state;
  }

  void AddHeld(uint32_t rank, const RankLayout& layout, const Segment& segment) {
    const auto [found, is_new] =
        number_of_piece_.emplace(KeyOf(segment.piece, layout.boxes, shape_), result_.held.size());
    if (is_new) result_.held.push_back({Moved(segment.piece, layout.boxes, result_.boxes), {}});
    HeldPiece& held = result_.held[found->second];
    if (held.piece.box == kWholeTensor) {  // the box also says what strides are of
      held.piece = Moved(segment.piece, layout.boxes, result_.boxes);
    }
    std::vector<HeldPlace>& places = held.places;
    HeldPlace place;
    place.buffer = layout.buffers[segment.buffer].name;
    place.offset_bytes = segment.buffer_offset_bytes;
    if (segment.strides != kContiguous) place.strides_bytes = layout.strides_bytes[segment.strides];
    const auto same = std::find_if(places.begin(), places.end(), [&](const HeldPlace& other) {
      return other.offset_bytes == place.offset_bytes && other.buffer == place.buffer &&
             other.strides_bytes == place.strides_bytes;
    });
    if (same != places.end()) {
      same->ranks.push_back(rank);
    } else {
      place.ranks = {rank};
      places.push_back(std::move(place));
    }
  }

  void AddStored(uint32_t rank, const RankLayout& layout, const Segment& segment) {
    result_.stored.push_back({Moved(segment.piece, layout.boxes, result_.boxes), rank});
  }

  TensorHolders Take() { return std::move(result_); }

 private:
  std::span<const uint64_t> shape_;
  TensorHolders result_;
  std::map<PieceKey, size_t> number_of_piece_;
};

// How many ranks behind `first` follow it at one distance.
size_t RunLength(std::span<const uint32_t> ranks, size_t first) {
  if (first + 1 >= ranks.size()) return 1;
  size_t last = first + 1;
  const uint32_t step = ranks[last] - ranks[first];
  while (last + 1 < ranks.size() && ranks[last + 1] - ranks[last] == step) ++last;
  const size_t length = last - first + 1;
  return length >= 3 || step == 1 ? length : 1;
}

std::vector<GroupsAlike> Alike(const std::vector<RankGroup>& groups) {
  std::vector<GroupsAlike> all;
  std::map<std::pair<size_t, uint64_t>, size_t> number_of;  // ranks in a group, bytes
  for (const RankGroup& group : groups) {
    const auto [found, is_new] =
        number_of.emplace(std::pair(group.ranks.size(), group.held_bytes), all.size());
    if (is_new) {
      all.push_back({{}, 0, group.held_bytes, group.stored_bytes_min, group.stored_bytes_max});
    }
    GroupsAlike& alike = all[found->second];
    ++alike.group_count;
    alike.ranks.insert(alike.ranks.end(), group.ranks.begin(), group.ranks.end());
    alike.stored_bytes_min = std::min(alike.stored_bytes_min, group.stored_bytes_min);
    alike.stored_bytes_max = std::max(alike.stored_bytes_max, group.stored_bytes_max);
  }
  for (GroupsAlike& alike : all) std::sort(alike.ranks.begin(), alike.ranks.end());
  return all;
}

}  // namespace

std::string RanksText(std::span<const uint32_t> ranks, size_t ranges_max) {
  if (ranks.empty()) return "none";
  std::string text;
  size_t at = 0;
  for (size_t range = 0; at < ranks.size(); ++range) {
    if (range == ranges_max) return absl::StrCat(text, " and ", ranks.size() - at, " more");
    const size_t length = RunLength(ranks, at);
    absl::StrAppend(&text, text.empty() ? "" : ",", ranks[at]);
    if (length > 1) {
      const uint32_t step = ranks[at + 1] - ranks[at];
      absl::StrAppend(&text, "-", ranks[at + length - 1]);
      if (step > 1) absl::StrAppend(&text, ":", step);
    }
    at += length;
  }
  return text;
}

std::map<std::string, StateTotal> TotalsByState(const std::vector<TensorState>& tensor_states) {
  std::map<std::string, StateTotal> totals;
  for (const TensorState& tensor_state : tensor_states) {
    StateTotal& total = totals[tensor_state.state];
    ++total.tensor_count;
    total.bytes += tensor_state.Bytes();
  }
  return totals;
}

LayoutSummary Summarize(const Layout& layout, std::span<const uint64_t> stored_bytes) {
  const uint32_t world_size = layout.world_size();
  CHECK(stored_bytes.size() == world_size);
  LayoutSummary summary;
  std::vector<std::vector<uint32_t>> sets_of_rank(world_size);
  std::vector<uint64_t> held_bytes(world_size, 0);
  std::map<uint64_t, Sharing, std::greater<>> sharing;
  const std::vector<HolderLoad> loads = layout.HolderLoads();
  for (uint32_t set = 0; set < loads.size(); ++set) {
    const HolderLoad& load = loads[set];
    for (const uint32_t rank : load.ranks) {
      sets_of_rank[rank].push_back(set);
      held_bytes[rank] += load.bytes;
    }
    summary.distinct_bytes += load.bytes;
    summary.held_bytes += load.bytes * load.ranks.size();
    Sharing& alike = sharing[load.ranks.size()];
    if (alike.set_count++ == 0) {
      alike.rank_count = load.ranks.size();
      alike.first_ranks = load.ranks;
      alike.set_bytes_min = load.bytes;
    }
    alike.bytes += load.bytes;
    alike.set_bytes_min = std::min(alike.set_bytes_min, load.bytes);
    alike.set_bytes_max = std::max(alike.set_bytes_max, load.bytes);
  }
  for (auto& [count, alike] : sharing) summary.sharing.push_back(std::move(alike));

  std::map<std::vector<uint32_t>, size_t> number_of_group;
  for (uint32_t rank = 0; rank < world_size; ++rank) {
    const auto [found, is_new] =
        number_of_group.emplace(std::move(sets_of_rank[rank]), summary.groups.size());
    if (is_new) {
      summary.groups.push_back({{}, held_bytes[rank], stored_bytes[rank], stored_bytes[rank]});
    }
    RankGroup& group = summary.groups[found->second];
    group.ranks.push_back(rank);
    group.stored_bytes_min = std::min(group.stored_bytes_min, stored_bytes[rank]);
    group.stored_bytes_max = std::max(group.stored_bytes_max, stored_bytes[rank]);
  }
  summary.alike = Alike(summary.groups);
  return summary;
}

absl::StatusOr<uint32_t> CheckRanks(const Layout& layout, uint64_t rank_states_max) {
  const uint64_t world_size = layout.world_size();
  const uint64_t ranks_max =
      std::max<uint64_t>(1, rank_states_max / std::max<size_t>(1, layout.tensor_states().size()));
  const uint64_t step = (world_size + ranks_max - 1) / ranks_max;
  uint32_t asked = 0;
  for (uint64_t rank = 0; rank < world_size; rank += step, ++asked) {
    RETURN_IF_ERROR(layout.ForRank(Rank{static_cast<uint32_t>(rank)}).status());
  }
  return asked;
}

absl::StatusOr<TensorsExplained> ExplainTensors(const Layout& layout,
                                                std::span<const uint32_t> tensor_states,
                                                Writers writers, uint64_t rank_states_max) {
  CHECK(std::is_sorted(tensor_states.begin(), tensor_states.end()));
  constexpr uint32_t kNotWanted = UINT32_MAX;
  std::vector<uint32_t> number_of(layout.tensor_states().size(), kNotWanted);
  std::vector<HoldersOfState> holders;
  for (const uint32_t index : tensor_states) {
    number_of.at(index) = static_cast<uint32_t>(holders.size());
    holders.emplace_back(index, layout);
  }
  TensorsExplained explained;
  const uint64_t ranks_max =
      std::max<uint64_t>(1, rank_states_max / std::max<size_t>(1, number_of.size()));
  explained.ranks_asked = static_cast<uint32_t>(std::min<uint64_t>(layout.world_size(), ranks_max));
  std::optional<WriterAssignment> assignment;
  if (writers == Writers::kAssigned) assignment = WriterAssignment::Create(layout);
  for (uint32_t rank = 0; rank < explained.ranks_asked; ++rank) {
    const RankHoldings held = layout.HeldByRank(Rank{rank});
    bool holds_any = false;
    for (const Segment& segment : held.layout.segments) {
      const uint32_t number = number_of[segment.piece.tensor_state];
      if (number == kNotWanted) continue;
      holders[number].AddHeld(rank, held.layout, segment);
      holds_any = true;
    }
    if (!assignment.has_value() || !holds_any) continue;
    ASSIGN_OR_RETURN(const RankLayout stored, assignment->ForRank(Rank{rank}, {}));
    for (const Segment& segment : stored.segments) {
      const uint32_t number = number_of[segment.piece.tensor_state];
      if (number != kNotWanted) holders[number].AddStored(rank, stored, segment);
    }
  }
  for (HoldersOfState& state : holders) explained.states.push_back(state.Take());
  return explained;
}

absl::StatusOr<std::vector<uint32_t>> SelectTensors(const std::vector<TensorState>& tensor_states,
                                                    const std::string& name) {
  std::vector<uint32_t> selected;
  for (uint32_t i = 0; i < tensor_states.size(); ++i) {
    if (tensor_states[i].tensor == name) selected.push_back(i);
  }
  if (!selected.empty()) return selected;
  const absl::StatusOr<NamePattern> pattern = NamePattern::Parse(name);
  if (!pattern.ok()) {
    return absl::InvalidArgumentError(absl::StrFormat("tensor \"%s\": expected %s, or a name",
                                                      name.substr(0, 200),
                                                      std::string(pattern.status().message())));
  }
  std::set<std::string_view> names;
  for (uint32_t i = 0; i < tensor_states.size(); ++i) {
    if (pattern->Match(tensor_states[i].tensor).has_value()) selected.push_back(i);
    if (names.size() < kComparedNamesMax) names.insert(tensor_states[i].tensor);
  }
  if (!selected.empty()) return selected;
  const std::vector<std::string_view> known(names.begin(), names.end());
  return absl::NotFoundError(
      absl::StrFormat("no tensor \"%s\"%s", name.substr(0, 200), DidYouMean(name, known)));
}

std::string PieceText(const Piece& piece, const BoxTable& boxes, std::span<const uint64_t> shape) {
  const std::vector<uint64_t> origin(shape.size(), 0);
  const BoxView box = piece.box == kWholeTensor ? BoxView{origin, shape} : boxes[piece.box];
  std::vector<ElementBox> cut;
  CutIntoBoxes(box, piece.begin, piece.end, cut);
  if (cut.size() != 1 || shape.empty()) return Describe(piece, boxes);
  std::string text = "[";
  for (size_t d = 0; d < shape.size(); ++d) {
    absl::StrAppend(&text, d ? ", " : "", cut[0].lo[d], ":", cut[0].lo[d] + cut[0].size[d]);
  }
  text += "]";
  if (piece.box == kWholeTensor) {
    absl::StrAppendFormat(&text, ", elements [%d, %d)", piece.begin, piece.end);
  }
  return text;
}

}  // namespace holdfast
