// Blocks against a plain model, at random; memory within its budget.
#include "checkpoint/block_pool.h"

#include <random>
#include <set>
#include <vector>

#include "checkpoint/memory_budget.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

TEST(BlockPoolTest, EveryBlockIsInExactlyOneStateAtRandom) {
  const uint64_t seed = 42;
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  constexpr uint32_t kBlocks = 40;
  BlockPool pool(kBlocks);
  pool.AddFree(0, kBlocks);
  std::vector<std::vector<uint32_t>> held;
  size_t refused = 0;
  for (int i = 0; i < 5000; ++i) {
    if (random() % 2 == 0) {
      const auto count = static_cast<uint32_t>(random() % 12);
      const uint32_t free_count = pool.count(BlockState::kFree);
      std::optional<std::vector<uint32_t>> taken = pool.Take(count, BlockState::kImage);
      ASSERT_EQ(taken.has_value(), count <= free_count);
      if (taken) held.push_back(*std::move(taken));
      refused += count > free_count ? 1 : 0;
    } else if (!held.empty()) {
      std::swap(held[random() % held.size()], held.back());
      pool.Free(held.back(), BlockState::kImage);
      held.pop_back();
    }
    std::set<uint32_t> used;
    size_t used_count = 0;
    for (const std::vector<uint32_t>& blocks : held) {
      used.insert(blocks.begin(), blocks.end());
      used_count += blocks.size();
    }
    ASSERT_EQ(used.size(), used_count);  // no block twice
    ASSERT_EQ(pool.count(BlockState::kImage), used_count);
    ASSERT_EQ(pool.count(BlockState::kFree), kBlocks - used_count);
    for (const uint32_t block : used) ASSERT_EQ(pool.state(block), BlockState::kImage);
  }
  EXPECT_GT(refused, 100u);
}

TEST(BlockPoolTest, AClaimIsAllOrNothing) {
  BlockPool pool(6);
  EXPECT_EQ(pool.Take(1, BlockState::kImage), std::nullopt);  // nothing is there yet
  EXPECT_TRUE(pool.Claim(std::vector<uint32_t>{4, 1}, BlockState::kImage));
  EXPECT_FALSE(pool.Claim(std::vector<uint32_t>{0, 2, 4}, BlockState::kImage));  // 4 is taken
  EXPECT_FALSE(pool.Claim(std::vector<uint32_t>{0, 0}, BlockState::kImage));
  EXPECT_FALSE(pool.Claim(std::vector<uint32_t>{0, 6}, BlockState::kImage));
  EXPECT_EQ(pool.count(BlockState::kImage), 2u);
  EXPECT_EQ(pool.count(BlockState::kAbsent), 4u);
  pool.AddFree(0, 6);  // what is claimed stays claimed
  EXPECT_EQ(pool.count(BlockState::kFree), 4u);
  EXPECT_THAT(pool.Take(4, BlockState::kStaging).value(), ElementsAre(0, 2, 3, 5));
}

TEST(MemoryBudgetTest, IsHardAndGivesBack) {
  MemoryBudget budget(100);
  {
    ASSERT_OK_AND_ASSIGN(const MemoryReservation first, budget.Reserve(60, "first"));
    EXPECT_THAT(budget.Reserve(41, "a second image"),
                StatusIs(absl::StatusCode::kResourceExhausted,
                         AllOf(HasSubstr("a second image"), HasSubstr("41"), HasSubstr("40"),
                               HasSubstr("100"))));
    ASSERT_OK_AND_ASSIGN(MemoryReservation second, budget.Reserve(40, "second"));
    EXPECT_EQ(budget.free_bytes(), 0u);
    MemoryReservation moved = std::move(second);
    EXPECT_EQ(budget.used_bytes(), 100u);
    moved = MemoryReservation();
    EXPECT_EQ(budget.used_bytes(), 60u);
    const MemoryReservation existing = budget.ReserveExisting(70);
    EXPECT_EQ(budget.used_bytes(), 130u);
    EXPECT_EQ(budget.free_bytes(), 0u);
  }
  EXPECT_EQ(budget.used_bytes(), 0u);
}

}  // namespace
}  // namespace holdfast
