// Every number of nodes up to a few hundred.
#include "preflight/pairing.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <set>
#include <utility>
#include <vector>

namespace holdfast::preflight {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

TEST(PairingTest, OneNodeHasNoPairAndTwoHaveOne) {
  EXPECT_THAT(RoundsOf(0), IsEmpty());
  EXPECT_THAT(RoundsOf(1), IsEmpty());
  EXPECT_THAT(RoundsOf(2), ElementsAre(ElementsAre(Pair{0, 1})));
}

TEST(PairingTest, OfThreeNodesEachSitsOutOnce) {
  EXPECT_THAT(RoundsOf(3), ElementsAre(ElementsAre(Pair{0, 1}), ElementsAre(Pair{1, 2}),
                                       ElementsAre(Pair{0, 2})));
}

TEST(PairingTest, EveryNodeIsInTwoPairsWithDifferentPartnersAndInOneAtATime) {
  for (uint32_t node_count = 3; node_count <= 300; ++node_count) {
    const std::vector<std::vector<Pair>> rounds = RoundsOf(node_count);
    // The third round of an odd number is for one pair only.
    ASSERT_EQ(rounds.size(), 2 + node_count % 2);
    std::vector<std::set<uint32_t>> partners(node_count);
    for (size_t round = 0; round < rounds.size(); ++round) {
      std::set<uint32_t> busy;
      for (const Pair& pair : rounds[round]) {
        ASSERT_LT(pair.a, pair.b);
        ASSERT_LT(pair.b, node_count);
        EXPECT_TRUE(busy.insert(pair.a).second && busy.insert(pair.b).second) << node_count;
        EXPECT_TRUE(partners[pair.a].insert(pair.b).second) << node_count;
        EXPECT_TRUE(partners[pair.b].insert(pair.a).second) << node_count;
      }
      const uint32_t sitting_out = node_count - static_cast<uint32_t>(busy.size());
      EXPECT_EQ(sitting_out, round == 2 ? node_count - 2 : node_count % 2) << node_count;
    }
    for (const std::set<uint32_t>& of_one : partners) EXPECT_EQ(of_one.size(), 2U) << node_count;
  }
}

}  // namespace
}  // namespace holdfast::preflight
