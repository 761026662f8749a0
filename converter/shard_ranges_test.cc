// Goal: the ranges that a writer reads for a shard are the shard's elements, in its order.
// Method: shards of random tensors, cut in every way that shard_map.h has, against the map's own
// blocks, element by element (shard_map_test proves those against slicing).
#include "converter/shard_ranges.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "converter/shard_testing.h"
#include "tests/support/status_matchers.h"

namespace holdfast::converter {
namespace {

constexpr uint32_t kTensor = 7;

std::vector<uint64_t> ByRanges(const ShardMap& map, uint64_t begin, uint64_t end) {
  std::vector<ElementRange> ranges;
  AppendShard(map, kTensor, begin, end, ranges);
  std::vector<uint64_t> elements;
  for (const ElementRange& range : ranges) {
    EXPECT_GT(range.ElementCount(), 0u);
    for (uint64_t part = 0; part < range.repeat_count; ++part) {
      for (uint64_t i = range.begin; i < range.end; ++i) {
        const bool zero = range.tensor_state == kZeroElements;
        EXPECT_TRUE(zero || range.tensor_state == kTensor);
        elements.push_back(zero ? kPaddingElement : i + part * range.repeat_stride);
      }
    }
  }
  return elements;
}

// One rank's shard of a random tensor, cut in one of the ways.
ShardMap RandomShard(std::mt19937_64& random) {
  const auto below = [&random](uint64_t n) { return random() % n; };
  const uint64_t ranks = 1 + below(3);
  const size_t dims = 1 + below(4);
  Shape shard;
  for (size_t d = 0; d < dims; ++d) shard.push_back(1 + below(4));
  const size_t dimension = below(dims);
  ShardMap map;
  if (below(2) == 0) {
    map = *JoinedShard(std::vector<Shape>(ranks, shard), below(ranks), dimension);
  } else {
    std::vector<Shape> widths;
    Shape whole = shard;
    whole[dimension] = 0;
    for (uint64_t sub = 0; sub < 1 + below(3); ++sub) {
      widths.push_back(Shape(ranks, 1 + below(3)));
      whole[dimension] += ranks * widths.back()[0];
    }
    map = *SubTensorShard(whole, dimension, widths, below(ranks));
  }
  if (below(3) == 0) {
    EXPECT_OK(KeepRows(1 + below(map.shape[0]), map));
  }
  return map;
}

TEST(ShardRanges, AreTheElementsOfTheShardInItsOrder) {
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  bool repeats = false;
  for (int round = 0; round < 2000; ++round) {
    const ShardMap map = RandomShard(random);
    const std::vector<uint64_t> expected = ElementsOf(map);
    const uint64_t a = random() % (expected.size() + 1);
    const uint64_t b = random() % (expected.size() + 1);
    const auto begin = static_cast<int64_t>(std::min(a, b));
    const auto end = static_cast<int64_t>(std::max(a, b));
    EXPECT_EQ(ByRanges(map, 0, expected.size()), expected);
    EXPECT_EQ(ByRanges(map, std::min(a, b), std::max(a, b)),
              std::vector<uint64_t>(expected.begin() + begin, expected.begin() + end));
    std::vector<ElementRange> ranges;
    AppendShard(map, kTensor, 0, expected.size(), ranges);
    repeats = repeats || std::ranges::any_of(ranges, [](const ElementRange& range) {
                return range.repeat_count > 1;
              });
  }
  EXPECT_TRUE(repeats);
}

TEST(ShardRanges, ColumnsOfAMatrixAreOneRange) {
  const std::vector<Shape> shards(2, {1000, 3});
  ASSERT_OK_AND_ASSIGN(const ShardMap map, JoinedShard(shards, 1, 1));
  std::vector<ElementRange> ranges;
  AppendShard(map, kTensor, 0, 3000, ranges);
  ASSERT_EQ(ranges.size(), 1u);
  EXPECT_EQ(ranges[0].begin, 3u);
  EXPECT_EQ(ranges[0].end, 6u);
  EXPECT_EQ(ranges[0].repeat_count, 1000u);
  EXPECT_EQ(ranges[0].repeat_stride, 6u);
}

TEST(ShardRanges, AScalarIsOneElement) {
  ASSERT_OK_AND_ASSIGN(const ShardMap map, WholeShard({}));
  EXPECT_EQ(ByRanges(map, 0, 1), std::vector<uint64_t>{0});
  EXPECT_EQ(ByRanges(map, 1, 1), std::vector<uint64_t>{});
}

}  // namespace
}  // namespace holdfast::converter
