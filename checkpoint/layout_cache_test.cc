// One parse of a document for all ranks that register it, and nothing kept that nobody uses.
#include "checkpoint/layout_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/crc32c.h"
#include "checkpoint/capture_harness.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

TEST(LayoutCacheTest, OneTextIsParsedOnceWhileSomebodyHoldsIt) {
  LayoutCache cache;
  ASSERT_OK_AND_ASSIGN(auto first, cache.Get(TestLayout(2)));
  ASSERT_OK_AND_ASSIGN(auto second, cache.Get(TestLayout(2)));
  EXPECT_EQ(first, second);
  EXPECT_EQ(cache.parse_count(), 1u);
  ASSERT_OK_AND_ASSIGN(auto other, cache.Get(TestLayout(3)));
  EXPECT_NE(other, first);
  EXPECT_EQ(cache.parse_count(), 2u);
  first.reset();
  ASSERT_OK_AND_ASSIGN(first, cache.Get(TestLayout(2)));  // `second` holds it
  EXPECT_EQ(first, second);
  EXPECT_EQ(cache.parse_count(), 2u);
  first.reset();
  second.reset();
  ASSERT_OK_AND_ASSIGN(first, cache.Get(TestLayout(2)));
  EXPECT_EQ(cache.parse_count(), 3u);
  EXPECT_EQ(first->layout->world_size(), 2u);
}

TEST(LayoutCacheTest, ItHoldsNoMoreThanItsUsers) {
  LayoutCache cache;
  for (uint32_t world_size = 1; world_size <= 100; ++world_size) {
    ASSERT_OK(cache.Get(TestLayout(world_size)).status());
    EXPECT_LE(cache.size(), 1u);
  }
  for (int i = 0; i < 100; ++i) {
    EXPECT_THAT(cache.Get(absl::StrCat("{", i)), StatusIs(absl::StatusCode::kInvalidArgument));
    EXPECT_LE(cache.size(), 1u);
  }
}

// Texts of one hash are told apart by their bytes.
TEST(LayoutCacheTest, AnotherTextWithTheSameHashIsAnotherLayout) {
  std::mt19937 random(1);
  std::map<uint32_t, std::string> texts;  // by CRC32C
  std::string one;
  std::string other;
  while (other.empty()) {
    std::string text = TestLayout(2);
    for (int i = 0; i < 64; ++i) text += random() % 2 == 0 ? ' ' : '\n';
    const auto [known, is_new] = texts.emplace(Crc32c(std::as_bytes(std::span(text))), text);
    if (is_new || known->second == text) continue;
    one = known->second;
    other = text;
  }
  LayoutCache cache;
  ASSERT_OK_AND_ASSIGN(const auto first, cache.Get(one));
  ASSERT_OK_AND_ASSIGN(const auto second, cache.Get(other));
  EXPECT_EQ(first->layout->hash(), second->layout->hash());
  EXPECT_EQ(first->layout->text(), one);
  EXPECT_EQ(second->layout->text(), other);
  EXPECT_EQ(cache.Get(one).value(), first);
}

TEST(LayoutCacheTest, ThreadsThatAskTogetherGetOne) {
  for (int round = 0; round < 20; ++round) {
    LayoutCache cache;
    std::vector<std::shared_ptr<const SharedLayout>> found(8);
    std::vector<std::thread> threads;
    for (size_t i = 0; i < found.size(); ++i) {
      threads.emplace_back([&, i] { found[i] = cache.Get(TestLayout(4)).value(); });
    }
    for (std::thread& thread : threads) thread.join();
    for (const auto& each : found) EXPECT_EQ(each, found[0]);
    EXPECT_EQ(cache.parse_count(), 1u);
  }
}

// Also of a worker that takes over: it understands every document anew, each once.
TEST(LayoutCacheTest, AllRanksOfAJobShareOneAlsoAfterARecovery) {
  CaptureHarness harness({});
  constexpr uint32_t kRanks = 4;
  std::vector<SessionId> sessions;
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    sessions.push_back(harness.OpenAndRegister(Rank{rank}, kRanks));
  }
  EXPECT_EQ(harness.layouts().parse_count(), 1u);
  harness.Crash(SimDisk::InFlight::kAll);
  EXPECT_EQ(harness.layouts().parse_count(), 1u);
  for (const SessionId id : sessions) {
    EXPECT_EQ(&harness.session(id).registration(1)->layout(),
              &harness.session(sessions[0]).registration(1)->layout());
  }
}

}  // namespace
}  // namespace holdfast
