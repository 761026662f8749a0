// Goal: the flat layouts of ZeRO, against DeepSpeed's definitions carried out element by element.
#include "converter/zero_layout.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>

#include "tests/support/status_matchers.h"

namespace holdfast::converter {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int kRounds = 300;

// (parameter, element) of every place of a buffer.
using Places = std::map<uint64_t, std::pair<uint32_t, uint64_t>>;

Places PlacesOf(std::span<const FlatRun> runs) {
  Places places;
  for (const FlatRun& run : runs) {
    EXPECT_GT(run.count, 0u);
    for (uint64_t i = 0; i < run.count; ++i) {
      EXPECT_TRUE(
          places.emplace(run.buffer_begin + i, std::pair(run.parameter, run.parameter_begin + i))
              .second);
    }
  }
  return places;
}

std::vector<uint64_t> RandomSizes(std::mt19937_64& random) {
  std::vector<uint64_t> sizes(random() % 7);
  for (uint64_t& size : sizes) size = random() % 3 == 0 ? random() % 3 : random() % 40;
  return sizes;
}

TEST(ZeroLayoutTest, StagesOneAndTwoCutThePackedGroup) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  for (int round = 0; round < kRounds; ++round) {
    const std::vector<uint64_t> sizes = RandomSizes(random);
    std::vector<uint64_t> paddings;
    if (random() % 2 == 0) {
      for (size_t i = 0; i < sizes.size(); ++i) {
        paddings.push_back(i + 1 == sizes.size() ? 0 : random() % 4);
      }
    }
    const uint64_t ranks = 1 + random() % 5;
    Places flat;
    uint64_t at = 0;
    uint64_t total = 0;
    for (uint32_t p = 0; p < sizes.size(); ++p) {
      for (uint64_t i = 0; i < sizes[p]; ++i) flat[at++] = {p, i};
      if (sizes[p] > 0) total = at;
      if (!paddings.empty()) at += paddings[p];
    }
    const uint64_t partition = (total + 2 * ranks - 1) / (2 * ranks) * 2;
    ASSERT_OK_AND_ASSIGN(const PackedGroup group, PackedGroup::Create(sizes, paddings));
    EXPECT_EQ(group.elements(), total);
    std::vector<uint64_t> stored;
    for (uint64_t rank = 0; rank < ranks; ++rank) {
      const uint64_t begin = std::min(total, rank * partition);
      const uint64_t real = std::min(total - begin, partition);
      stored.push_back(random() % 2 == 0 ? real : partition);
    }
    ASSERT_OK_AND_ASSIGN(const uint64_t found, group.PartitionElements(stored));
    if (total > found || *std::max_element(stored.begin(), stored.end()) == partition) {
      EXPECT_EQ(found, partition);
    }
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      Places expected;
      Places whole;
      uint64_t whole_at = 0;
      std::map<uint32_t, bool> seen;
      for (uint64_t i = rank * partition; i < (rank + 1) * partition; ++i) {
        if (flat.count(i) == 0) continue;
        expected[i - rank * partition] = flat[i];
        if (!std::exchange(seen[flat[i].first], true)) {
          for (uint64_t e = 0; e < sizes[flat[i].first]; ++e) {
            whole[whole_at++] = {flat[i].first, e};
          }
        }
      }
      EXPECT_EQ(PlacesOf(group.Partition(rank, partition)), expected);
      EXPECT_EQ(PlacesOf(group.WholeParameters(rank, partition)), whole);
    }
  }
}

TEST(ZeroLayoutTest, StageThreeCutsEachParameter) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  for (int round = 0; round < kRounds; ++round) {
    const std::vector<uint64_t> sizes = RandomSizes(random);
    const auto ranks = static_cast<uint32_t>(1 + random() % 5);
    ASSERT_OK_AND_ASSIGN(const PartitionedParameters parameters,
                         PartitionedParameters::Create(sizes, ranks));
    // Sub-groups that cut the buffer anywhere.
    std::vector<uint64_t> parts;
    for (uint64_t left = parameters.elements_per_rank(); left > 0; left -= parts.back()) {
      parts.push_back(random() % (left + 1));
    }
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      Places expected;
      uint64_t at = 0;
      for (uint32_t p = 0; p < sizes.size(); ++p) {
        const uint64_t width = (sizes[p] + ranks - 1) / ranks;
        for (uint64_t i = 0; i < width; ++i, ++at) {
          if (rank * width + i < sizes[p]) expected[at] = {p, rank * width + i};
        }
      }
      EXPECT_EQ(at, parameters.elements_per_rank());
      const std::vector<FlatRun> runs = parameters.Partition(rank);
      EXPECT_EQ(PlacesOf(runs), expected);
      std::vector<FlatRun> joined;
      for (PartRun run : SplitAtParts(runs, parts)) {
        EXPECT_LE(run.run.buffer_begin + run.run.count, parts[run.part]);
        for (uint32_t i = 0; i < run.part; ++i) run.run.buffer_begin += parts[i];
        joined.push_back(run.run);
      }
      EXPECT_EQ(PlacesOf(joined), expected);
    }
  }
}

TEST(ZeroLayoutTest, RoundRobinIsEveryNthParameter) {
  EXPECT_THAT(RoundRobinOrder(7, 3), ElementsAre(0, 3, 6, 1, 4, 2, 5));
  EXPECT_THAT(RoundRobinOrder(2, 5), ElementsAre(0, 1));
  EXPECT_THAT(RoundRobinOrder(3, 1), ElementsAre(0, 1, 2));
}

TEST(ZeroLayoutTest, RefusesWhatDoesNotAddUp) {
  constexpr auto kBad = absl::StatusCode::kInvalidArgument;
  constexpr uint64_t kHuge = uint64_t{1} << 62;
  EXPECT_THAT(PackedGroup::Create({kHuge, 1}, {}), StatusIs(kBad));
  EXPECT_THAT(PackedGroup::Create({1, 1}, std::vector<uint64_t>{UINT64_MAX, 0}), StatusIs(kBad));
  EXPECT_THAT(PackedGroup::Create({1, 1}, std::vector<uint64_t>{1}), StatusIs(kBad));
  EXPECT_THAT(PackedGroup::AtOffsets({3, 3}, {0, 2}), StatusIs(kBad, HasSubstr("overlap")));
  EXPECT_THAT(PackedGroup::AtOffsets({3, 3}, {0, UINT64_MAX}), StatusIs(kBad));
  EXPECT_THAT(PartitionedParameters::Create({1}, 0), StatusIs(kBad));
  EXPECT_THAT(PartitionedParameters::Create({kHuge}, 2), StatusIs(kBad));

  ASSERT_OK_AND_ASSIGN(const PackedGroup group, PackedGroup::Create({10, 7}, {}));
  const auto partition = [&group](std::vector<uint64_t> stored) {
    return group.PartitionElements(stored);
  };
  EXPECT_THAT(partition({10, 7}), IsOkAndHolds(10u));
  EXPECT_THAT(partition({10, 10}), IsOkAndHolds(10u));
  EXPECT_THAT(partition({17, 0}), IsOkAndHolds(17u));
  constexpr auto kLost = absl::StatusCode::kDataLoss;
  EXPECT_THAT(partition({8, 8}), StatusIs(kLost, HasSubstr("at least 9")));
  EXPECT_THAT(partition({10, 8}), StatusIs(kLost, HasSubstr("rank 1")));
  EXPECT_THAT(partition({10, 7, 3}), StatusIs(kLost, HasSubstr("rank 2")));
  EXPECT_THAT(partition({0, 0}), StatusIs(kLost));
}

}  // namespace
}  // namespace holdfast::converter
