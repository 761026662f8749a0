// Goal: what is explained is what every single rank says of itself.
// Method: random documents over all operations; every rank is asked with Layout::ForRank and its
// segments are taken apart element by element; from those alone the groups, the sharing and the
// places follow by counting.
#include "format/layout_explain.h"

#include <cstdio>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "format/layout_oracle.h"
#include "format/writer_assignment.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

using Element = std::pair<uint32_t, uint64_t>;   // tensor state, number in the tensor
using Place = std::pair<std::string, uint64_t>;  // buffer, byte
using RankElements = std::map<Element, Place>;   // of one rank

// Calls visit(element of the tensor, coordinates in the box, number in the piece).
template <typename Visit>
void ForEachElement(const Piece& piece, const BoxTable& boxes, const TensorState& tensor_state,
                    const Visit& visit) {
  const size_t dims = tensor_state.shape.size();
  std::vector<uint64_t> lo(dims, 0);
  std::vector<uint64_t> size = tensor_state.shape;
  if (piece.box != kWholeTensor) {
    const BoxView box = boxes[piece.box];
    lo.assign(box.lo.begin(), box.lo.end());
    size.assign(box.size.begin(), box.size.end());
  }
  for (uint64_t i = piece.begin; i < piece.end; ++i) {
    std::vector<uint64_t> x(dims);
    uint64_t rest = i;
    for (size_t d = dims; d-- > 0; rest /= size[d]) x[d] = rest % size[d];
    uint64_t element = 0;
    for (size_t d = 0; d < dims; ++d) element = element * tensor_state.shape[d] + lo[d] + x[d];
    visit(element, x, i - piece.begin);
  }
}

uint64_t ByteOf(uint64_t offset, const std::vector<uint64_t>& strides,
                const std::vector<uint64_t>& x, uint64_t number, uint64_t element_bytes) {
  if (strides.empty()) return offset + number * element_bytes;
  return std::inner_product(x.begin(), x.end(), strides.begin(), offset);
}

RankElements ElementsOf(const Layout& layout, uint32_t rank) {
  const auto held = layout.ForRank(Rank{rank});
  EXPECT_TRUE(held.ok()) << held.status().ToString();
  RankElements elements;
  for (const Segment& segment : held->segments) {
    const TensorState& state = layout.tensor_states()[segment.piece.tensor_state];
    const bool is_contiguous = segment.strides == kContiguous;
    const std::vector<uint64_t> strides =
        is_contiguous ? std::vector<uint64_t>() : held->strides_bytes[segment.strides];
    ForEachElement(segment.piece, held->boxes, state,
                   [&](uint64_t element, const std::vector<uint64_t>& x, uint64_t number) {
                     const uint64_t at = ByteOf(segment.buffer_offset_bytes, strides, x, number,
                                                ElementBytes(state.dtype));
                     elements[{segment.piece.tensor_state, element}] = {
                         held->buffers[segment.buffer].name, at};
                   });
  }
  return elements;
}

std::set<Element> KeysOf(const RankElements& elements) {
  std::set<Element> keys;
  for (const auto& [element, place] : elements) keys.insert(element);
  return keys;
}

uint64_t BytesOf(const Layout& layout, const std::set<Element>& elements) {
  uint64_t bytes = 0;
  for (const auto& [state, element] : elements) {
    bytes += ElementBytes(layout.tensor_states()[state].dtype);
  }
  return bytes;
}

void ExpectSummary(const Layout& layout, const std::vector<RankElements>& ranks) {
  std::vector<uint64_t> stored(layout.world_size());
  std::iota(stored.begin(), stored.end(), 100u);
  const LayoutSummary summary = Summarize(layout, stored);

  std::map<std::set<Element>, std::vector<uint32_t>> alike;
  std::map<Element, std::vector<uint32_t>> holders;
  for (uint32_t rank = 0; rank < ranks.size(); ++rank) {
    alike[KeysOf(ranks[rank])].push_back(rank);
    for (const auto& [element, place] : ranks[rank]) holders[element].push_back(rank);
  }
  std::map<std::vector<uint32_t>, uint64_t> groups;  // ranks -> bytes held by each
  for (const auto& [elements, members] : alike) groups[members] = BytesOf(layout, elements);
  ASSERT_EQ(summary.groups.size(), groups.size());
  uint32_t last_first = 0;
  uint64_t held = 0;
  for (const RankGroup& group : summary.groups) {
    ASSERT_EQ(groups.count(group.ranks), 1u) << RanksText(group.ranks, 100);
    EXPECT_EQ(group.held_bytes, groups.at(group.ranks));
    EXPECT_EQ(group.stored_bytes_min, 100u + group.ranks.front());
    EXPECT_EQ(group.stored_bytes_max, 100u + group.ranks.back());
    EXPECT_GE(group.ranks.front(), last_first);
    last_first = group.ranks.front();
    held += group.held_bytes * group.ranks.size();
  }
  EXPECT_EQ(summary.held_bytes, held);

  // Every group is in exactly one row of its like.
  std::map<std::pair<size_t, uint64_t>, std::set<uint32_t>> rows;
  for (const auto& [members, bytes] : groups) {
    rows[{members.size(), bytes}].insert(members.begin(), members.end());
  }
  ASSERT_EQ(summary.alike.size(), rows.size());
  for (const GroupsAlike& row : summary.alike) {
    const std::set<uint32_t> members(row.ranks.begin(), row.ranks.end());
    EXPECT_TRUE(std::is_sorted(row.ranks.begin(), row.ranks.end()));
    EXPECT_EQ(members, (rows[{row.ranks.size() / row.group_count, row.held_bytes}]));
    EXPECT_EQ(row.stored_bytes_min, 100u + row.ranks.front());
    EXPECT_EQ(row.stored_bytes_max, 100u + row.ranks.back());
  }

  std::map<std::vector<uint32_t>, uint64_t> sets;
  for (const auto& [element, members] : holders) {
    sets[members] += ElementBytes(layout.tensor_states()[element.first].dtype);
  }
  std::map<uint64_t, std::vector<uint64_t>> bytes_by_count;
  uint64_t distinct = 0;
  for (const auto& [members, bytes] : sets) {
    bytes_by_count[members.size()].push_back(bytes);
    distinct += bytes;
  }
  EXPECT_EQ(summary.distinct_bytes, distinct);
  ASSERT_EQ(summary.sharing.size(), bytes_by_count.size());
  for (size_t i = 0; i < summary.sharing.size(); ++i) {
    const Sharing& sharing = summary.sharing[i];
    if (i > 0) {
      EXPECT_LT(sharing.rank_count, summary.sharing[i - 1].rank_count);
    }
    const std::vector<uint64_t>& bytes = bytes_by_count[sharing.rank_count];
    EXPECT_EQ(sharing.set_count, bytes.size());
    EXPECT_EQ(sharing.bytes, std::accumulate(bytes.begin(), bytes.end(), uint64_t{0}));
    EXPECT_EQ(sharing.set_bytes_min, *std::min_element(bytes.begin(), bytes.end()));
    EXPECT_EQ(sharing.set_bytes_max, *std::max_element(bytes.begin(), bytes.end()));
    EXPECT_EQ(sharing.first_ranks.size(), sharing.rank_count);
    EXPECT_EQ(sets.count(sharing.first_ranks), 1u);
  }
}

void ExpectTensors(const Layout& layout, const std::vector<RankElements>& ranks) {
  std::vector<uint32_t> all(layout.tensor_states().size());
  std::iota(all.begin(), all.end(), 0u);
  const auto explained = ExplainTensors(layout, all, Writers::kAssigned);
  ASSERT_TRUE(explained.ok()) << explained.status().ToString();
  EXPECT_EQ(explained->ranks_asked, layout.world_size());
  ASSERT_EQ(explained->states.size(), all.size());
  std::vector<RankElements> found(ranks.size());
  std::map<Element, uint32_t> writers;
  std::vector<uint64_t> stored_bytes(ranks.size(), 0);
  for (const TensorHolders& state : explained->states) {
    const TensorState& tensor_state = layout.tensor_states()[state.tensor_state];
    const uint64_t element_bytes = ElementBytes(tensor_state.dtype);
    std::set<uint64_t> seen;
    for (const HeldPiece& held : state.held) {
      ForEachElement(held.piece, state.boxes, tensor_state,
                     [&](uint64_t element, const std::vector<uint64_t>& x, uint64_t number) {
                       EXPECT_TRUE(seen.insert(element).second) << "in two pieces";
                       for (const HeldPlace& place : held.places) {
                         const uint64_t at = ByteOf(place.offset_bytes, place.strides_bytes, x,
                                                    number, element_bytes);
                         for (const uint32_t rank : place.ranks) {
                           found[rank][{state.tensor_state, element}] = {place.buffer, at};
                         }
                       }
                     });
    }
    for (const StoredPart& part : state.stored) {
      stored_bytes[part.rank] += part.piece.ElementCount() * element_bytes;
      ForEachElement(part.piece, state.boxes, tensor_state,
                     [&](uint64_t element, const std::vector<uint64_t>&, uint64_t) {
                       const Element key(state.tensor_state, element);
                       EXPECT_TRUE(writers.emplace(key, part.rank).second) << "two writers";
                       EXPECT_EQ(ranks[part.rank].count(key), 1u) << "a writer that has it not";
                     });
    }
  }
  EXPECT_TRUE(found == ranks);
  std::set<Element> everything;
  for (const RankElements& rank : ranks) everything.merge(KeysOf(rank));
  EXPECT_EQ(writers.size(), everything.size());

  // What was assigned is what is stored, but for the grain at the ends of intervals.
  const std::vector<uint64_t> assigned = WriterAssignment::Create(layout).AssignedBytes();
  EXPECT_EQ(std::accumulate(assigned.begin(), assigned.end(), uint64_t{0}),
            BytesOf(layout, everything));
  uint64_t sets = 0;
  for (const HolderLoad& load : layout.HolderLoads()) sets += load.ranks.size();
  for (size_t rank = 0; rank < assigned.size(); ++rank) {
    const uint64_t more = std::max(assigned[rank], stored_bytes[rank]);
    const uint64_t less = std::min(assigned[rank], stored_bytes[rank]);
    EXPECT_LE(more - less, sets * kWriterGrainBytes);
  }
}

TEST(LayoutExplain, SaysWhatEveryRankSaysOfItself) {
  const uint64_t seed = 20261126;
  const int rounds = 2000;
  printf("seed %llu\n", static_cast<unsigned long long>(seed));
  int documents = 0;
  int with_groups = 0;  // several ranks in one group, and several groups
  for (int round = 0; round < rounds; ++round) {
    oracle::Random random(seed + static_cast<uint64_t>(round));
    const oracle::Document document = oracle::RandomDocument(random, oracle::RandomTensors(random));
    const auto layout = Layout::Parse(oracle::ToJson(document, random));
    if (!layout.ok()) continue;  // a rule that does not fit
    SCOPED_TRACE(absl::StrCat("round ", round, "\n", (*layout)->text()));
    std::vector<RankElements> ranks;
    for (uint32_t rank = 0; rank < (*layout)->world_size(); ++rank) {
      ranks.push_back(ElementsOf(**layout, rank));
    }
    ExpectSummary(**layout, ranks);
    ExpectTensors(**layout, ranks);
    if (testing::Test::HasFailure()) return;
    ++documents;
    const size_t groups = Summarize(**layout, std::vector<uint64_t>(ranks.size(), 0)).groups.size();
    with_groups += groups > 1 && groups < ranks.size() ? 1 : 0;
  }
  printf("%d documents, %d with several groups of several ranks\n", documents, with_groups);
  EXPECT_GT(documents, rounds / 3);
  EXPECT_GT(with_groups, 50);
}

std::vector<uint32_t> RanksOf(const std::string& text) {
  std::vector<uint32_t> ranks;
  for (const std::string& range : std::vector<std::string>(absl::StrSplit(text, ','))) {
    const std::vector<std::string> ends_and_step = absl::StrSplit(range, ':');
    const std::vector<std::string> ends = absl::StrSplit(ends_and_step[0], '-');
    uint32_t first = 0;
    uint32_t last = 0;
    uint32_t step = 1;
    EXPECT_TRUE(absl::SimpleAtoi(ends.front(), &first) && absl::SimpleAtoi(ends.back(), &last));
    if (ends_and_step.size() > 1) {
      EXPECT_TRUE(absl::SimpleAtoi(ends_and_step[1], &step));
    }
    for (uint32_t rank = first; rank <= last; rank += step) ranks.push_back(rank);
  }
  return ranks;
}

TEST(LayoutExplain, RanksReadBackFromTheirTextForEverySetOfTwelve) {
  for (uint32_t bits = 1; bits < 1u << 12; ++bits) {
    std::vector<uint32_t> ranks;
    for (uint32_t rank = 0; rank < 12; ++rank) {
      if (bits >> rank & 1) ranks.push_back(rank);
    }
    const std::string text = RanksText(ranks, 12);
    ASSERT_EQ(RanksOf(text), ranks) << text;
    for (size_t ranges_max = 1; ranges_max < 4; ++ranges_max) {
      const std::vector<std::string> parts = absl::StrSplit(RanksText(ranks, ranges_max), " and ");
      const size_t shown = RanksOf(parts[0]).size();
      ASSERT_EQ(std::vector<std::string>(absl::StrSplit(parts[0], ',')).size() <= ranges_max, true);
      ASSERT_EQ(parts.size() == 1 ? "" : parts[1],
                shown == ranks.size() ? "" : absl::StrCat(ranks.size() - shown, " more"));
    }
  }
  EXPECT_EQ(RanksText({}, 4), "none");
  EXPECT_EQ(RanksText(std::vector<uint32_t>{0, 1, 2, 3, 8}, 4), "0-3,8");
  EXPECT_EQ(RanksText(std::vector<uint32_t>{16, 20, 24, 28}, 4), "16-28:4");
}

// A thousand ranks are a few lines.
TEST(LayoutExplain, AThousandRanksOfAHybridShardAreSixteenGroups) {
  const auto layout = Layout::Parse(
      R"({"holdfast_layout":1,"mesh":[{"axis":"r","size":64},{"axis":"s","size":16}],
          "tensors":[{"name":"w","shape":[16000],"states":[{"state":"p","dtype":"float32",
           "place":[{"op":"shard","dim":0,"axis":"s","rule":"even"}]}]}]})");
  ASSERT_TRUE(layout.ok());
  const LayoutSummary summary = Summarize(**layout, std::vector<uint64_t>(1024, 0));
  ASSERT_EQ(summary.groups.size(), 16u);
  EXPECT_EQ(RanksText(summary.groups[3].ranks, 2), "3-1011:16");
  EXPECT_EQ(summary.groups[3].held_bytes, 4000u);
  ASSERT_EQ(summary.sharing.size(), 1u);
  EXPECT_EQ(summary.sharing[0].set_count, 16u);
}

TEST(LayoutExplain, TheSameByteAtOtherStridesIsAnotherPlace) {
  const std::string segment = R"({"lo":[0,0],"size":[2,3],"buffer":"b","offset_bytes":0,"ranks":)";
  const auto layout = Layout::Parse(absl::StrCat(
      R"({"holdfast_layout":1,"mesh":[{"axis":"dp","size":4}],"tensors":[{"name":"w","shape":[2,3],
          "states":[{"state":"p","dtype":"float32","segments":[)",
      segment, "[0,3]},", segment, R"([1],"strides":[1,2]},)", segment,
      "[2],\"strides\":[4,1]}]}]}]}"));
  ASSERT_TRUE(layout.ok()) << layout.status().ToString();
  const auto explained = ExplainTensors(**layout, std::vector<uint32_t>{0}, Writers::kNotAsked);
  ASSERT_TRUE(explained.ok());
  ASSERT_EQ(explained->states[0].held.size(), 1u);
  const std::vector<HeldPlace>& places = explained->states[0].held[0].places;
  ASSERT_EQ(places.size(), 3u);
  EXPECT_THAT(places[0].ranks, ElementsAre(0, 3));
  EXPECT_THAT(places[1].strides_bytes, ElementsAre(4, 8));
  EXPECT_THAT(places[2].strides_bytes, ElementsAre(16, 4));
  EXPECT_TRUE(explained->states[0].stored.empty());
}

std::vector<TensorState> Named(const std::vector<std::string>& names) {
  std::vector<TensorState> states;
  for (const std::string& name : names) {
    for (const char* state : {"param", "exp_avg"}) states.push_back({name, state, {}, {}});
  }
  return states;
}

TEST(LayoutExplain, AsManyRanksAreAskedAsTheLimitHasRoomForAndAlwaysOne) {
  const auto layout = Layout::Parse(R"({
      "holdfast_layout": 1, "mesh": [{"axis": "x", "size": 4}],
      "tensors": [{"name": "w", "shape": [8], "states": [
          {"state": "param", "dtype": "float32"},
          {"state": "moment", "dtype": "float32"}]}]})");
  ASSERT_TRUE(layout.ok()) << layout.status();
  const std::vector<uint32_t> asked{0};
  for (const auto& [limit, ranks] :
       std::vector<std::pair<uint64_t, uint32_t>>{{9, 4}, {8, 4}, {7, 3}, {2, 1}, {1, 1}, {0, 1}}) {
    const auto explained = ExplainTensors(**layout, asked, Writers::kAssigned, limit);
    ASSERT_TRUE(explained.ok()) << explained.status();
    EXPECT_EQ(explained->ranks_asked, ranks) << limit;
    ASSERT_EQ(explained->states.size(), 1u);
    ASSERT_EQ(explained->states[0].held.size(), 1u);
    EXPECT_EQ(explained->states[0].held[0].places[0].ranks.size(), ranks) << limit;
  }
}

TEST(LayoutExplain, ALayoutThatOneRankCannotRegisterIsRefusedIfThatRankIsAsked) {
  // Two tensors share bytes of a buffer on the last of eight ranks.
  const auto layout = Layout::Parse(R"({
      "holdfast_layout": 1, "mesh": [{"axis": "x", "size": 8}],
      "tensors": [{"name": "a", "shape": [4], "states": [
          {"state": "param", "dtype": "float32", "buffer": "b"}]},
        {"name": "b", "shape": [4], "states": [
          {"state": "param", "dtype": "float32", "buffer": "b", "offset_bytes": 8,
           "place": [{"op": "place", "axis": "x", "coordinates": [-1]}]}]}]})");
  ASSERT_TRUE(layout.ok()) << layout.status();
  for (const uint64_t limit : {kCheckedRankStatesMax, uint64_t{16}}) {
    const auto checked = CheckRanks(**layout, limit);
    EXPECT_EQ(checked.status().code(), absl::StatusCode::kInvalidArgument) << limit;
    EXPECT_THAT(std::string(checked.status().message()), HasSubstr("rank 7: buffer \"b\""));
  }
  for (const auto& [limit, ranks] : std::vector<std::pair<uint64_t, uint32_t>>{
           {15, 4}, {14, 4}, {8, 4}, {6, 3}, {4, 2}, {3, 1}, {2, 1}, {0, 1}}) {
    const auto checked = CheckRanks(**layout, limit);
    ASSERT_TRUE(checked.ok()) << checked.status();
    EXPECT_EQ(*checked, ranks) << limit;
  }
}

TEST(LayoutExplain, TensorsAreSelectedByNameThenByPattern) {
  const auto states = Named({"h.0.w", "h.1.w", "h.1.b", "h.*", "x{"});
  EXPECT_THAT(*SelectTensors(states, "h.1.w"), ElementsAre(2, 3));
  EXPECT_THAT(*SelectTensors(states, "*.w"), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(*SelectTensors(states, "h.{n}.b"), ElementsAre(4, 5));
  EXPECT_THAT(*SelectTensors(states, "h.*"), ElementsAre(6, 7)) << "a name goes before a pattern";
  EXPECT_THAT(*SelectTensors(states, "x{"), ElementsAre(8, 9));
  const auto wrong = SelectTensors(states, "h.1.v");
  EXPECT_EQ(wrong.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(wrong.status().message()), HasSubstr("did you mean \"h."));
  EXPECT_EQ(SelectTensors(states, "y{").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(SelectTensors(states, "y*").status().code(), absl::StatusCode::kNotFound);
}

TEST(LayoutExplain, APieceThatIsABoxIsShownAsOne) {
  BoxTable boxes;
  const std::vector<uint64_t> lo = {0, 2};
  const std::vector<uint64_t> size = {4, 2};
  const uint32_t box = boxes.Add(lo, size);
  const std::vector<uint64_t> shape = {4, 6};
  EXPECT_EQ(PieceText({0, kWholeTensor, 6, 18}, boxes, shape), "[1:3, 0:6], elements [6, 18)");
  EXPECT_EQ(PieceText({0, kWholeTensor, 5, 9}, boxes, shape), "elements [5, 9)");
  EXPECT_EQ(PieceText({0, box, 0, 8}, boxes, shape), "[0:4, 2:4]");
  EXPECT_EQ(PieceText({0, box, 2, 4}, boxes, shape), "[1:2, 2:4]");
  EXPECT_EQ(PieceText({0, box, 1, 4}, boxes, shape), "elements [1, 4) of the box [0:4, 2:4]");
  EXPECT_EQ(PieceText({0, kWholeTensor, 0, 1}, boxes, {}), "elements [0, 1)");
}

}  // namespace
}  // namespace holdfast
