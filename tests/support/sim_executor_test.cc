#include "tests/support/sim_executor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "tests/support/sim_disk.h"

namespace holdfast {
namespace {

using ::testing::ElementsAre;

TEST(SimExecutor, PostedFunctionsRunInOrderWithWhatTheyPostAtTheEnd) {
  SimExecutor executor;
  std::vector<int> ran;
  executor.Post([&] {
    ran.push_back(1);
    executor.Post([&] { ran.push_back(3); });
  });
  executor.Post([&] { ran.push_back(2); });
  EXPECT_EQ(executor.RunUntilIdle(), 3u);
  EXPECT_THAT(ran, ElementsAre(1, 2, 3));
  EXPECT_FALSE(executor.RunOne());
}

TEST(SimExecutor, TimersRunInOrderOfTheirTimesAndOnlyWhenTimePasses) {
  SimExecutor executor;
  const absl::Duration begin = executor.Elapsed();
  std::vector<absl::Duration> ran;
  const auto record = [&] { ran.push_back(executor.Elapsed() - begin); };
  executor.RunAfter(absl::Seconds(3), record);
  executor.RunAfter(absl::Seconds(1), [&] {
    record();
    executor.RunAfter(absl::Seconds(1), record);
  });
  const EventLoop::TimerId cancelled = executor.RunAfter(absl::Seconds(2), record);
  EXPECT_EQ(executor.RunUntilIdle(), 0u);
  EXPECT_EQ(executor.next_timer_due(), begin + absl::Seconds(1));
  executor.CancelTimer(cancelled);
  executor.CancelTimer(cancelled);  // ignored
  executor.AdvanceTime(absl::Milliseconds(2999));
  EXPECT_THAT(ran, ElementsAre(absl::Seconds(1), absl::Seconds(2)));
  executor.AdvanceTime(absl::Milliseconds(1));
  EXPECT_THAT(ran, ElementsAre(absl::Seconds(1), absl::Seconds(2), absl::Seconds(3)));
  EXPECT_EQ(executor.Elapsed(), begin + absl::Seconds(3));
  EXPECT_FALSE(executor.next_timer_due().has_value());
}

TEST(SimExecutor, DoneOfPoolWorkIsPostedAfterTheWork) {
  SimExecutor executor;
  std::vector<std::string> ran;
  executor.Run([&] { ran.push_back("work"); }, [&] { ran.push_back("done"); });
  executor.Post([&] { ran.push_back("posted"); });
  executor.RunUntilIdle();
  EXPECT_THAT(ran, ElementsAre("posted", "work", "done"));
}

// The orders of four pieces of pool work, as the seed chooses.
std::string OrderOf(uint64_t seed) {
  SimExecutor executor(seed);
  std::string order;
  for (const char name : {'a', 'b', 'c', 'd'}) {
    executor.Run([&order, name] { order += name; }, [] {});
  }
  executor.RunUntilIdle();
  return order;
}

TEST(SimExecutor, SeedsGiveEveryOrderOfPoolWorkAndTheSameSeedTheSameOrder) {
  EXPECT_EQ(OrderOf(0), "abcd");
  std::set<std::string> orders;
  for (uint64_t seed = 1; seed <= 500; ++seed) {
    EXPECT_EQ(OrderOf(seed), OrderOf(seed));
    orders.insert(OrderOf(seed));
  }
  EXPECT_EQ(orders.size(), 24u);
}

TEST(SimExecutor, MarkReadyRunsTheWatchUnlessItIsGone) {
  SimExecutor executor;
  int count = 0;
  executor.Watch(7, EventLoop::FdEvents::kReadable, [&] {
    ++count;
    executor.Unwatch(7);
  });
  EXPECT_TRUE(executor.is_watched(7));
  executor.MarkReady(7);
  executor.MarkReady(7);
  executor.RunUntilIdle();
  EXPECT_EQ(count, 1);
  EXPECT_FALSE(executor.is_watched(7));
}

TEST(SimExecutor, DrivenRingCompletesAndAStoppedOneDoesNot) {
  SimExecutor executor;
  SimDisk disk;
  executor.Drive(disk);
  const auto file = disk.CreateSized("/a", 512, Caching::kBuffered);
  ASSERT_TRUE(file.ok());
  int completed = 0;
  disk.Sync(**file, [&](const absl::Status& status) { completed += status.ok(); });
  executor.RunUntilIdle();
  EXPECT_EQ(completed, 1);
  disk.Sync(**file, [&](const absl::Status& status) { completed += status.ok(); });
  executor.StopDriving(disk);
  executor.RunUntilIdle();
  EXPECT_EQ(completed, 1);
  disk.RunCompletions();
  EXPECT_EQ(completed, 2);
}

TEST(SimExecutorDeathTest, ALoopThatFeedsItselfIsFound) {
  SimExecutor executor;
  std::function<void()> again = [&] { executor.Post(again); };
  executor.Post(again);
  EXPECT_DEATH(executor.RunUntilIdle(1000), "steps < steps_max");
}

}  // namespace
}  // namespace holdfast
