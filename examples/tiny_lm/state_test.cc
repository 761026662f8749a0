// Goal: however the state is cut, the ranks hold every element of every copy once, with the values
// of a world of one, in the memory that is registered; and the layout document says exactly that.
// Method: layouts of all kinds against a world of one; the document is read by Holdfast's own
// parser, and what it places is compared element by element with what the state says it has.
#include "examples/tiny_lm/state.h"

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "examples/tiny_lm/layout_document.h"
#include "examples/tiny_lm/random.h"
#include "format/layout.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tiny_lm {
namespace {

struct Case {
  Zero zero;
  Mesh mesh;
  bool tied;
};

std::vector<Case> AllCases() {
  std::vector<Case> cases;
  const Mesh meshes[] = {{1, 1, 1}, {1, 2, 1}, {1, 3, 1}, {1, 5, 1}, {1, 1, 2}, {1, 1, 3},
                         {1, 2, 5}, {2, 1, 1}, {3, 1, 1}, {4, 2, 1}, {2, 3, 2}, {3, 2, 4}};
  for (const Zero zero :
       {Zero::kReplicated, Zero::kOptimizer, Zero::kGradients, Zero::kParameters}) {
    for (const Mesh& mesh : meshes) {
      for (const bool tied : {false, true}) cases.push_back({zero, mesh, tied});
    }
  }
  return cases;
}

std::string Name(const testing::TestParamInfo<Case>& info) {
  const Case& c = info.param;
  return absl::StrCat("Zero", static_cast<int>(c.zero), "Pp", c.mesh.pp, "Dp", c.mesh.dp, "Tp",
                      c.mesh.tp, c.tied ? "Tied" : "Untied");
}

class StateTest : public testing::TestWithParam<Case> {
 protected:
  struct RankState {
    RankState(const ParameterTable& table, const JobLayout& layout, uint32_t rank)
        : partition(table, layout, rank), state(partition, 11) {}
    Partition partition;
    TrainingState state;
  };

  static ModelConfig SmallModel() {
    ModelConfig config;
    config.context = 3;
    config.width = 16;
    config.heads = 2;
    config.layers = 3;
    config.hidden = 24;
    config.vocabulary = 13;
    config.tied = GetParam().tied;
    return config;
  }
  JobLayout MakeLayout(Zero zero, const Mesh& mesh) const {
    JobLayout layout;
    layout.zero = zero;
    layout.mesh = mesh;
    // Uneven, and a stage without layers if there are enough.
    layout.stage_layers.assign(mesh.pp, 0);
    for (size_t i = 0; i < 3; ++i) ++layout.stage_layers[i == 2 ? mesh.pp - 1 : 0];
    layout.ballast_bytes = 7 * kPageBytes - 5;
    return layout;
  }
  std::vector<std::unique_ptr<RankState>> AllRanks(const JobLayout& layout) const {
    std::vector<std::unique_ptr<RankState>> ranks;
    for (uint32_t rank = 0; rank < layout.mesh.world_size(); ++rank) {
      ranks.push_back(std::make_unique<RankState>(table_, layout, rank));
    }
    return ranks;
  }

  // (state/tensor): (digest, elements) of the whole tensor. Checks that all copies agree.
  using Digests = std::map<std::string, std::pair<uint64_t, uint64_t>>;
  Digests DigestsOf(const std::vector<std::unique_ptr<RankState>>& ranks) const {
    std::map<std::pair<std::string, uint32_t>, std::pair<uint64_t, uint64_t>> copies;
    for (const auto& rank : ranks) {
      for (const Piece& piece : rank->state.Pieces()) {
        auto& [digest, count] = copies[{piece.state + "/" + piece.tensor, piece.replica}];
        digest += DigestOf(piece);
        count += piece.count;
      }
    }
    Digests digests;
    for (const auto& [name, found] : copies) {
      EXPECT_EQ(digests.emplace(name.first, found).first->second, found)
          << name.first << " copy " << name.second;
    }
    return digests;
  }

  const ParameterTable table_{SmallModel()};
};

TEST_P(StateTest, TheCopiesOfEveryTensorAreWholeWithTheValuesOfAWorldOfOne) {
  const Digests expected = DigestsOf(AllRanks(MakeLayout(Zero::kReplicated, {1, 1, 1})));
  EXPECT_EQ(expected.size(), 4 * table_.parameters().size() + 2);
  EXPECT_EQ(DigestsOf(AllRanks(MakeLayout(GetParam().zero, GetParam().mesh))), expected);
}

// An element of a rank's memory: where, and what it is.
struct Element {
  const std::byte* data;
  std::string name;
  uint64_t index;
  auto operator<=>(const Element&) const = default;
};

std::vector<Element> ElementsOf(const std::vector<Piece>& pieces) {
  std::vector<Element> elements;
  for (const Piece& piece : pieces) {
    for (uint64_t i = 0; i < piece.count; ++i) {
      elements.push_back({piece.data + i * piece.element_bytes, piece.state + "/" + piece.tensor,
                          piece.index.Of(piece.begin + i)});
    }
  }
  std::sort(elements.begin(), elements.end());
  return elements;
}

// The index in the tensor of element `i` of a box.
uint64_t IndexInTensor(const holdfast::BoxView& box, const std::vector<uint64_t>& shape,
                       uint64_t i) {
  uint64_t index = 0;
  uint64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    index += (box.lo[d] + i % box.size[d]) * stride;
    i /= box.size[d];
    stride *= shape[d];
  }
  return index;
}

std::vector<Element> ElementsOf(const holdfast::Layout& layout, const holdfast::RankLayout& held,
                                const std::map<std::string, StateBuffer>& buffers) {
  std::vector<Element> elements;
  for (const holdfast::Segment& segment : held.segments) {
    EXPECT_EQ(segment.strides, holdfast::kContiguous);
    const holdfast::TensorState& state = layout.tensor_states()[segment.piece.tensor_state];
    const std::byte* data =
        static_cast<const std::byte*>(buffers.at(held.buffers[segment.buffer].name).data) +
        segment.buffer_offset_bytes;
    for (uint64_t i = segment.piece.begin; i < segment.piece.end; ++i) {
      const uint64_t index = segment.piece.box == holdfast::kWholeTensor
                                 ? i
                                 : IndexInTensor(held.boxes[segment.piece.box], state.shape, i);
      elements.push_back({data + (i - segment.piece.begin) * holdfast::ElementBytes(state.dtype),
                          state.state + "/" + state.tensor, index});
    }
  }
  std::sort(elements.begin(), elements.end());
  return elements;
}

TEST_P(StateTest, TheDocumentPlacesEveryElementWhereTheStateHasIt) {
  const JobLayout layout = MakeLayout(GetParam().zero, GetParam().mesh);
  const auto document = holdfast::Layout::Parse(LayoutDocument(table_, layout));
  ASSERT_TRUE(document.ok()) << document.status();
  EXPECT_EQ((*document)->world_size(), layout.mesh.world_size());
  for (const auto& rank : AllRanks(layout)) {
    SCOPED_TRACE(absl::StrCat("rank ", rank->partition.rank()));
    const auto held = (*document)->ForRank(holdfast::Rank{rank->partition.rank()});
    ASSERT_TRUE(held.ok()) << held.status();
    std::map<std::string, StateBuffer> buffers;
    for (const StateBuffer& buffer : rank->state.Buffers()) {
      EXPECT_TRUE(buffers.emplace(buffer.name, buffer).second) << buffer.name << " comes twice";
    }
    size_t needed = 0;
    for (const holdfast::BufferNeed& need : held->buffers) {
      if (need.bytes == 0) continue;
      ++needed;
      ASSERT_EQ(buffers.count(need.name), 1U) << need.name;
      EXPECT_GE(buffers.at(need.name).bytes, need.bytes) << need.name;
    }
    EXPECT_EQ(buffers.size(), needed) << "a buffer that the layout does not know";
    const std::vector<Element> placed = ElementsOf(**document, *held, buffers);
    EXPECT_EQ(placed, ElementsOf(rank->state.Pieces()));
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, StateTest, testing::ValuesIn(AllCases()), Name);

TEST(State, AVocabularysPaddingIsRegisteredAndNeverStored) {
  ModelConfig config;  // 97 tokens over 4 ranks: 25, 25, 25, 22
  const ParameterTable table(config);
  JobLayout layout;
  layout.mesh.tp = 4;
  layout.stage_layers = {2};
  for (uint32_t rank = 0; rank < 4; ++rank) {
    const Partition partition(table, layout, rank);
    TrainingState state(partition, 1);
    const LocalParameter& tokens = *partition.Find("embed.tokens");
    EXPECT_EQ(tokens.slot_count, 25 * config.width);
    EXPECT_EQ(tokens.count(), (rank < 3 ? 25 : 22) * config.width);
    EXPECT_EQ(state.Buffers()[0].name, "param/embed.tokens");
    EXPECT_EQ(state.Buffers()[0].bytes, 25 * config.width * 2);
    EXPECT_EQ(state.Pieces()[0].count, tokens.count());
  }
}

TEST(State, DigestsOfPiecesAddUpToThatOfTheWhole) {
  std::vector<uint16_t> data(100);
  std::iota(data.begin(), data.end(), uint16_t{500});
  const auto piece = [&](uint64_t begin, uint64_t count) {
    return Piece{"t",        "s", begin, count,
                 BoxIndex(), 0,   2,     reinterpret_cast<const std::byte*>(data.data() + begin)};
  };
  const uint64_t whole = DigestOf(piece(0, 100));
  for (uint64_t cut = 0; cut <= 100; ++cut) {
    EXPECT_EQ(DigestOf(piece(0, cut)) + DigestOf(piece(cut, 100 - cut)), whole);
  }
  // As a matrix of 10 rows: columns [0, 3) and [3, 10), the second cut anywhere.
  std::vector<uint16_t> left;
  std::vector<uint16_t> right;
  for (size_t i = 0; i < 100; ++i) (i % 10 < 3 ? left : right).push_back(data[i]);
  const auto columns = [](const std::vector<uint16_t>& values, BoxIndex index, uint64_t begin,
                          uint64_t count) {
    return Piece{"t",   "s", begin, count,
                 index, 0,   2,     reinterpret_cast<const std::byte*>(values.data() + begin)};
  };
  for (uint64_t cut = 0; cut <= 70; ++cut) {
    EXPECT_EQ(DigestOf(columns(left, {3, 10, 0}, 0, 30)) +
                  DigestOf(columns(right, {7, 10, 3}, 0, cut)) +
                  DigestOf(columns(right, {7, 10, 3}, cut, 70 - cut)),
              whole);
  }
  std::swap(data[3], data[4]);
  EXPECT_NE(DigestOf(piece(0, 100)), whole) << "blind to order";
}

// A value computed by hand from the description in state.h, which other programs follow too.
TEST(State, TheDigestIsTheOneThatIsDescribed) {
  const uint16_t value = 0xbeef;
  const Piece piece{"t", "s", 5, 1, BoxIndex(), 0, 2, reinterpret_cast<const std::byte*>(&value)};
  EXPECT_EQ(DigestOf(piece), Mix(Mix(5) + 0xbeef));
  EXPECT_EQ(Mix(0), 0xe220a8397b1dcdafU);  // SplitMix64's first number for seed 0
}

TEST(Ballast, AnyWrongWordIsSeen) {
  Ballast ballast({{{0, 3, 1}, {1, 9, 1}}, 2});
  ballast.Stamp(9);
  ASSERT_TRUE(ballast.Verify(9).ok());
  EXPECT_TRUE(absl::IsDataLoss(ballast.Verify(8)));
  for (size_t i = 0; i < 2 * kPageElements; ++i) {
    ballast.data()[i] ^= uint64_t{1} << (i % 64);
    const absl::Status status = ballast.Verify(9);
    EXPECT_TRUE(absl::IsDataLoss(status)) << i;
    EXPECT_THAT(std::string(status.message()),
                testing::HasSubstr(i < kPageElements ? "the first is 3" : "the first is 9"));
    ballast.data()[i] ^= uint64_t{1} << (i % 64);
  }
  ASSERT_TRUE(ballast.Verify(9).ok());
}

// 40,000 pages are three tensors.
TEST(Ballast, EveryPageIsOnOneRank) {
  JobLayout layout;
  layout.mesh = {2, 3, 4};
  layout.ballast_bytes = 40'000 * kPageBytes;
  const std::vector<BallastTensor> tensors = BallastTensors(layout.ballast_bytes);
  EXPECT_EQ(tensors.size(), 3U);
  std::vector<int> found(40'000);
  for (uint32_t rank = 0; rank < layout.mesh.world_size(); ++rank) {
    const BallastPart part = BallastPartOf(layout, layout.mesh.Of(rank));
    uint64_t pages = 0;
    for (const BallastRange& range : part.ranges) {
      const BallastTensor& tensor = tensors[range.tensor];
      EXPECT_GE(range.first_page, tensor.first_page);
      EXPECT_LE(range.first_page + range.page_count, tensor.first_page + tensor.page_count);
      for (uint64_t i = 0; i < range.page_count; ++i) ++found[range.first_page + i];
      pages += range.page_count;
    }
    EXPECT_LE(pages, part.room_pages);
    EXPECT_LE(part.room_pages, 40'000 / 24 + 3);
  }
  EXPECT_EQ(std::count(found.begin(), found.end(), 1), 40'000);
}

}  // namespace
}  // namespace tiny_lm
