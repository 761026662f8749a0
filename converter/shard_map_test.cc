// Goal: every element of a shard is said to lie where the framework's own slicing took it from.
// Method: whole tensors filled with their own element numbers, sliced element by element by the
// rule's definition, against the map, over random shapes and ranges.
#include "converter/shard_map.h"

#include <gtest/gtest.h>

#include <optional>
#include <random>

#include "tests/support/status_matchers.h"

namespace holdfast::converter {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kPadding = UINT64_MAX;
constexpr int kRounds = 300;

// For every element of the shard its number in the whole tensor, as the map has it.
std::vector<uint64_t> Elements(const ShardMap& map, uint64_t begin, uint64_t end) {
  std::vector<uint64_t> elements(end - begin, kPadding);
  const TensorState state{
      .tensor = "t", .state = "param", .dtype = Dtype::kInt8, .shape = map.shape};
  uint64_t last = begin;
  for (const BlockRange& range : RangesOf(map, begin, end)) {
    EXPECT_GE(range.shard_begin, last);
    last = range.shard_begin + (range.end - range.begin);
    BoxTable boxes;
    const ShardBlock& block = map.blocks[range.block];
    const Piece piece{.tensor_state = 0,
                      .box = boxes.Add(block.lo, block.size),
                      .begin = range.begin,
                      .end = range.end};
    EXPECT_OK(CheckPiece(piece, std::span(&state, 1), boxes));
    for (uint64_t i = range.begin; i < range.end; ++i) {
      elements[range.shard_begin + (i - range.begin) - begin] =
          ElementInTensor(piece, boxes, state, i);
    }
  }
  EXPECT_LE(last, end);
  return elements;
}

// The whole, and some ranges of it.
void ExpectElements(const ShardMap& map, const std::vector<uint64_t>& expected,
                    std::mt19937_64& random) {
  ASSERT_EQ(map.shard_elements, expected.size());
  EXPECT_EQ(Elements(map, 0, expected.size()), expected);
  for (int i = 0; i < 4; ++i) {
    uint64_t a = random() % (expected.size() + 1);
    uint64_t b = random() % (expected.size() + 1);
    if (a > b) std::swap(a, b);
    EXPECT_EQ(Elements(map, a, b),
              std::vector<uint64_t>(expected.begin() + static_cast<int64_t>(a),
                                    expected.begin() + static_cast<int64_t>(b)));
  }
}

// Calls visit(coordinates) in row-major order.
template <typename Visit>
void ForEach(const Shape& shape, Visit visit) {
  Shape at(shape.size(), 0);
  uint64_t count = 1;
  for (uint64_t size : shape) count *= size;
  for (uint64_t n = 0; n < count; ++n) {
    visit(at);
    for (size_t d = shape.size(); d-- > 0;) {
      if (++at[d] < shape[d]) break;
      at[d] = 0;
    }
  }
}

uint64_t Number(const Shape& at, const Shape& shape) {
  uint64_t number = 0;
  for (size_t d = 0; d < shape.size(); ++d) number = number * shape[d] + at[d];
  return number;
}

Shape RandomShape(std::mt19937_64& random, size_t dims_min) {
  Shape shape(dims_min + random() % 3);
  for (uint64_t& size : shape) size = random() % 6;
  return shape;
}

TEST(ShardMapTest, JoinedShardsAreSlicesAlongTheDimension) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  for (int round = 0; round < kRounds; ++round) {
    const Shape base = RandomShape(random, 1);
    const size_t dimension = random() % base.size();
    std::vector<Shape> shapes(1 + random() % 4, base);
    Shape whole = base;
    whole[dimension] = 0;
    for (Shape& shape : shapes) {
      shape[dimension] = random() % 5;
      whole[dimension] += shape[dimension];
    }
    uint64_t before = 0;
    for (size_t rank = 0; rank < shapes.size(); ++rank) {
      ASSERT_OK_AND_ASSIGN(const ShardMap map, JoinedShard(shapes, rank, dimension));
      EXPECT_EQ(map.shape, whole);
      std::vector<uint64_t> expected;
      ForEach(shapes[rank], [&](Shape at) {
        at[dimension] += before;
        expected.push_back(Number(at, whole));
      });
      ExpectElements(map, expected, random);
      before += shapes[rank][dimension];
    }
  }
}

TEST(ShardMapTest, SubTensorsAreEachSliced) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  for (int round = 0; round < kRounds; ++round) {
    Shape whole = RandomShape(random, 1);
    const size_t dimension = random() % whole.size();
    const size_t ranks = 1 + random() % 3;
    std::vector<Shape> widths(1 + random() % 4, Shape(ranks));
    whole[dimension] = 0;
    for (Shape& of : widths) {
      for (uint64_t& width : of) whole[dimension] += width = random() % 4;
    }
    for (size_t rank = 0; rank < ranks; ++rank) {
      // Which places along the dimension this rank has, in its own order.
      std::vector<uint64_t> places;
      uint64_t sub = 0;
      for (const Shape& of : widths) {
        for (size_t r = 0; r < ranks; ++r) {
          for (uint64_t i = 0; i < of[r]; ++i, ++sub) {
            if (r == rank) places.push_back(sub);
          }
        }
      }
      ASSERT_OK_AND_ASSIGN(const ShardMap map, SubTensorShard(whole, dimension, widths, rank));
      Shape shard = whole;
      shard[dimension] = places.size();
      std::vector<uint64_t> expected;
      ForEach(shard, [&](Shape at) {
        at[dimension] = places[at[dimension]];
        expected.push_back(Number(at, whole));
      });
      if (Number(whole, whole) == 0 && expected.empty()) continue;
      ExpectElements(map, expected, random);
    }
  }
}

TEST(ShardMapTest, AffinePiecesAreWhatAsStridedSays) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  for (int round = 0; round < kRounds; ++round) {
    // A random box of a random tensor, read with its dimensions in random order (transposed where
    // that is not the identity), written in order behind some free elements; folded at random.
    Shape whole = RandomShape(random, 1);
    for (uint64_t& size : whole) ++size;
    Shape strides(whole.size(), 1);
    for (size_t d = whole.size(); d-- > 1;) strides[d - 1] = strides[d] * whole[d];
    std::vector<size_t> order(whole.size());
    for (size_t d = 0; d < order.size(); ++d) order[d] = d;
    if (random() % 2 == 0) std::shuffle(order.begin(), order.end(), random);
    AffinePiece piece;
    piece.dest_offset = random() % 3;
    for (size_t d : order) {
      const uint64_t lo = random() % 2 == 0 ? 0 : random() % whole[d];
      piece.shape.push_back(lo == 0 && random() % 2 == 0 ? whole[d]
                                                         : 1 + random() % (whole[d] - lo));
      piece.source_offset += lo * strides[d];
      piece.source_strides.push_back(strides[d]);
    }
    piece.dest_strides.assign(piece.shape.size(), 1);
    for (size_t d = piece.shape.size(); d-- > 1;) {
      piece.dest_strides[d - 1] = piece.dest_strides[d] * piece.shape[d];
    }
    std::vector<uint64_t> expected(piece.dest_offset, kPadding);
    ForEach(piece.shape, [&](const Shape& at) {
      uint64_t source = piece.source_offset;
      for (size_t d = 0; d < at.size(); ++d) source += at[d] * piece.source_strides[d];
      expected.push_back(source);
    });
    // Fold the last two dimensions where they are one run on both sides.
    const size_t n = piece.shape.size();
    if (n > 1 && piece.source_strides[n - 2] == piece.source_strides[n - 1] * piece.shape[n - 1]) {
      piece.shape[n - 2] *= piece.shape[n - 1];
      piece.source_strides[n - 2] = piece.source_strides[n - 1];
      piece.dest_strides[n - 2] = piece.dest_strides[n - 1];
      piece.shape.pop_back();
      piece.source_strides.pop_back();
      piece.dest_strides.pop_back();
    }
    ASSERT_OK_AND_ASSIGN(const ShardMap map,
                         AffineShard(whole, {expected.size()}, std::span(&piece, 1)));
    ExpectElements(map, expected, random);
  }
}

TEST(ShardMapTest, AFoldedRunOfRowsIsOneBlock) {
  const AffinePiece piece{.shape = {336},
                          .source_offset = 336,
                          .source_strides = {1},
                          .dest_offset = 0,
                          .dest_strides = {1}};
  ASSERT_OK_AND_ASSIGN(const ShardMap map, AffineShard({24, 28}, {12, 28}, std::span(&piece, 1)));
  ASSERT_EQ(map.blocks.size(), 1u);
  EXPECT_EQ(map.blocks[0].lo, (Shape{12, 0}));
  EXPECT_EQ(map.blocks[0].size, (Shape{12, 28}));
}

TEST(ShardMapTest, FoldedPlanesAreOneBlockAndRunsAroundARowAreNot) {
  AffinePiece piece{.shape = {24},
                    .source_offset = 24,
                    .source_strides = {1},
                    .dest_offset = 0,
                    .dest_strides = {1}};
  ASSERT_OK_AND_ASSIGN(const ShardMap planes,
                       AffineShard({4, 3, 4}, {2, 3, 4}, std::span(&piece, 1)));
  EXPECT_EQ(planes.blocks.size(), 1u);
  piece.shape = {3};
  piece.source_offset = 3;
  ASSERT_OK_AND_ASSIGN(const ShardMap around, AffineShard({2, 4}, {3}, std::span(&piece, 1)));
  EXPECT_EQ(Elements(around, 0, 3), (std::vector<uint64_t>{3, 4, 5}));
}

TEST(ShardMapTest, PaddingRowsAreInNoBlock) {
  std::vector<Shape> shapes(2, {4, 3});
  std::mt19937_64 random(1);
  ASSERT_OK_AND_ASSIGN(ShardMap first, JoinedShard(shapes, 0, 0));
  ASSERT_OK_AND_ASSIGN(ShardMap second, JoinedShard(shapes, 1, 0));
  ASSERT_OK(KeepRows(5, first));
  ASSERT_OK(KeepRows(5, second));
  EXPECT_EQ(second.shape, (Shape{5, 3}));
  ExpectElements(first, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}, random);
  ExpectElements(second,
                 {12, 13, 14, kPadding, kPadding, kPadding, kPadding, kPadding, kPadding, kPadding,
                  kPadding, kPadding},
                 random);
  EXPECT_THAT(KeepRows(6, second), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("6")));
}

TEST(ShardMapTest, RefusesWhatDoesNotAddUp) {
  constexpr auto kBad = absl::StatusCode::kInvalidArgument;
  const std::vector<Shape> uneven = {{2, 3}, {2, 4}};
  EXPECT_THAT(JoinedShard(uneven, 0, 0), StatusIs(kBad, HasSubstr("[2, 4]")));
  EXPECT_THAT(JoinedShard(uneven, 0, 2), StatusIs(kBad, HasSubstr("dimension 2")));
  const std::vector<Shape> huge = {{uint64_t{1} << 40, uint64_t{1} << 40}};
  EXPECT_THAT(JoinedShard(huge, 0, 0), StatusIs(kBad, HasSubstr("elements")));
  EXPECT_THAT(WholeShard({uint64_t{1} << 63, 0, 4}), IsOk());
  EXPECT_THAT(WholeShard({uint64_t{1} << 63, 4}), StatusIs(kBad));
  EXPECT_THAT(SubTensorShard({4, 2}, 0, {{1}, {2}}, 0), StatusIs(kBad, HasSubstr("found 3")));
  EXPECT_THAT(SubTensorShard({4, 2}, 0, {{UINT64_MAX}, {5}}, 0), StatusIs(kBad));
  EXPECT_THAT(SubTensorShard({uint64_t{1} << 30, 2}, 1, {{1}, {1}}, 0),
              StatusIs(absl::StatusCode::kResourceExhausted));

  AffinePiece piece{.shape = {2, 2},
                    .source_offset = 0,
                    .source_strides = {3, 1},
                    .dest_offset = 0,
                    .dest_strides = {2, 1}};
  const auto one = [&piece] { return AffineShard({2, 3}, {2, 2}, std::span(&piece, 1)); };
  EXPECT_OK(one());
  piece.source_offset = 2;
  EXPECT_THAT(one(), StatusIs(kBad, HasSubstr("source")));
  piece.source_offset = 0;
  piece.dest_strides = {3, 1};
  EXPECT_THAT(one(), StatusIs(kBad, HasSubstr("dest")));
  piece.dest_strides = {1, 1};
  EXPECT_THAT(one(), StatusIs(kBad, HasSubstr("twice")));
  piece.dest_strides = {uint64_t{1} << 63, uint64_t{1} << 63};
  EXPECT_THAT(one(), StatusIs(kBad));
  piece.dest_strides = {2};
  EXPECT_THAT(one(), StatusIs(kBad, HasSubstr("strides")));
}

}  // namespace
}  // namespace holdfast::converter
