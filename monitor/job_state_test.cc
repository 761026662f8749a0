#include "monitor/job_state.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "absl/time/time.h"

namespace holdfast::monitor {
namespace {

constexpr uint64_t kCommunicator = 7;

JobShape TwoNodes() {
  JobShape shape;
  shape.ranks.resize(2);
  shape.ranks[1].node = 1;
  return shape;
}

struct Said {
  uint32_t node = 0;  // and its only rank
  uint64_t sequence = 0;
  double clock_s = 0;
  uint64_t finished = 0;
  bool open = true;
  uint64_t observer_gap_us = 0;
  uint64_t incarnation = 1;
  uint64_t communicator = kCommunicator;
};

NodeSummary Summary(const Said& said) {
  NodeSummary summary;
  summary.node = said.node;
  summary.incarnation = said.incarnation;
  summary.sequence = said.sequence;
  summary.clock_us = static_cast<uint64_t>(said.clock_s * 1e6);
  summary.observer_gap_us = said.observer_gap_us;
  RankReport rank;
  rank.rank = Rank{said.node};
  rank.level = TelemetryLevel::kLight;
  CommunicatorReport c;
  c.id = said.communicator;
  c.size = 2;
  c.index = said.node;
  const uint64_t begun = said.finished + (said.open ? 1 : 0);
  c.counts[static_cast<size_t>(OperationKind::kAllReduce)] = {begun, begun, said.finished};
  rank.communicators = {c};
  summary.ranks = {rank};
  return summary;
}

class JobStateTest : public testing::Test {
 protected:
  void Arrive(double at_s, const std::vector<Said>& said, double receiver_gap_s = 0) {
    Snapshot snapshot;
    snapshot.elapsed = absl::Seconds(at_s);
    snapshot.receiver_gap = absl::Seconds(receiver_gap_s);
    for (const Said& one : said) snapshot.arrived.push_back(Summary(one));
    state_.Ingest(snapshot, /*learn=*/true);
  }
  absl::Duration StillFor(uint32_t rank) const {
    return state_.StillFor(Rank{rank}, kCommunicator);
  }

  const Thresholds thresholds_;
  JobState state_{thresholds_, TwoNodes()};
};

TEST_F(JobStateTest, StandingIsMeasuredOnTheRanksOwnClock) {
  Arrive(1, {{.sequence = 1, .clock_s = 100}});
  Arrive(50, {{.sequence = 2, .clock_s = 101}});  // the receiver's 49 s count for nothing
  EXPECT_EQ(StillFor(0), absl::Seconds(1));
  Arrive(51, {{.sequence = 3, .clock_s = 104}});
  EXPECT_EQ(StillFor(0), absl::Seconds(4));
  Arrive(52, {{.sequence = 4, .clock_s = 105, .finished = 1}});
  EXPECT_EQ(StillFor(0), absl::ZeroDuration());
}

TEST_F(JobStateTest, AgainstTheAwaitedCountsWhatItHasNotDoneSinceAReportThatWasThere) {
  const auto since = [&](uint64_t tick) { return state_.StillSince(Rank{1}, kCommunicator, tick); };
  Arrive(1, {{.node = 1, .sequence = 1, .clock_s = 1000}});
  Arrive(2, {});
  // Of two that came at once the newer is what was known.
  Arrive(3, {{.node = 1, .sequence = 2, .clock_s = 1010},
             {.node = 1, .sequence = 3, .clock_s = 1012}});
  Arrive(4, {{.node = 1, .sequence = 4, .clock_s = 1020}});
  Arrive(5, {});
  EXPECT_EQ(StillFor(1), absl::Seconds(20));
  EXPECT_EQ(since(1), absl::Seconds(20));
  EXPECT_EQ(since(2), absl::Seconds(10)) << "none came with it: the first behind it";
  EXPECT_EQ(since(3), absl::Seconds(8));
  EXPECT_EQ(since(4), absl::ZeroDuration()) << "one report alone";
  EXPECT_EQ(since(5), absl::ZeroDuration()) << "none at all";
  // What it did do ends it.
  Arrive(6, {{.node = 1, .sequence = 5, .clock_s = 1030, .finished = 1}});
  Arrive(7, {{.node = 1, .sequence = 6, .clock_s = 1031, .finished = 1}});
  EXPECT_EQ(since(3), absl::Seconds(1));
}

TEST_F(JobStateTest, AnObserverThatWasLateProvesNoStandstill) {
  const auto gap = static_cast<uint64_t>(absl::ToInt64Microseconds(thresholds_.observer_gap_max));
  Arrive(1, {{.sequence = 1, .clock_s = 10}});
  Arrive(2, {{.sequence = 2, .clock_s = 15, .observer_gap_us = gap}});
  EXPECT_EQ(StillFor(0), absl::Seconds(5));
  Arrive(3, {{.sequence = 3, .clock_s = 20, .observer_gap_us = gap + 1}});
  EXPECT_EQ(StillFor(0), absl::ZeroDuration());
  Arrive(4, {{.sequence = 4, .clock_s = 22}});
  EXPECT_EQ(StillFor(0), absl::Seconds(2));
}

TEST_F(JobStateTest, TheNewestCountsInWhateverOrderAndHoweverOftenItComes) {
  const Said first = {.sequence = 1, .clock_s = 10};
  const Said second = {.sequence = 2, .clock_s = 11};
  const Said third = {.sequence = 3, .clock_s = 12, .finished = 5};
  Arrive(1, {third, first, second, third});
  Arrive(2, {second});
  ASSERT_NE(state_.ranks()[0].Find(kCommunicator), nullptr);
  EXPECT_EQ(Total(state_.ranks()[0].Find(kCommunicator)->now).finished, 5u);
  EXPECT_EQ(state_.ranks()[0].clock_us, 12'000'000u);
}

TEST_F(JobStateTest, ARestartedAgentBeginsAnewAndIsNoStandstill) {
  Arrive(1, {{.sequence = 50, .clock_s = 500}});
  Arrive(2, {{.sequence = 1, .clock_s = 3, .incarnation = 2}});
  EXPECT_EQ(StillFor(0), absl::ZeroDuration());
  Arrive(3, {{.sequence = 51, .clock_s = 501}});  // of the old one, late
  EXPECT_EQ(state_.ranks()[0].clock_us, 3'000'000u);
  Arrive(4, {{.sequence = 2, .clock_s = 5, .incarnation = 2}});
  EXPECT_EQ(StillFor(0), absl::Seconds(2));
}

TEST_F(JobStateTest, AReceiverThatWasLateBelievesNobodyToBeSilent) {
  Arrive(1, {{.sequence = 1, .clock_s = 1}});
  Arrive(1 + absl::ToDoubleSeconds(thresholds_.node_silent), {});
  EXPECT_TRUE(state_.IsSilent(Rank{0}));
  EXPECT_FALSE(state_.IsSilent(Rank{1})) << "it was never heard";
  Arrive(60, {}, absl::ToDoubleSeconds(thresholds_.receiver_gap_max) + 1);
  EXPECT_FALSE(state_.IsSilent(Rank{0}));
}

TEST_F(JobStateTest, OnlyStandstillsInsideAnOperationThatEndAreNormal) {
  uint64_t sequence = 0;
  const auto say = [&](double at, uint64_t finished, bool open) {
    ++sequence;
    Arrive(at, {{.sequence = sequence, .clock_s = at, .finished = finished, .open = open}});
  };
  say(1, 100, true);
  EXPECT_EQ(state_.NormalStandstill(kCommunicator), absl::ZeroDuration());
  say(4, 100, true);
  EXPECT_EQ(state_.NormalStandstill(kCommunicator), absl::ZeroDuration()) << "it has not ended";
  say(5, 101, false);
  EXPECT_EQ(state_.NormalStandstill(kCommunicator), absl::Seconds(3));
  say(50, 101, false);
  say(51, 102, true);
  EXPECT_EQ(state_.NormalStandstill(kCommunicator), absl::Seconds(3)) << "nothing was open";
}

TEST_F(JobStateTest, WithoutEnoughOperationsThereIsNoBaseline) {
  Arrive(1, {{.sequence = 1, .clock_s = 1, .finished = thresholds_.learn_operations_min - 1}});
  EXPECT_EQ(state_.NormalStandstill(kCommunicator), std::nullopt);
  Arrive(2, {{.sequence = 2, .clock_s = 2, .finished = thresholds_.learn_operations_min}});
  EXPECT_EQ(state_.NormalStandstill(kCommunicator), absl::ZeroDuration());
}

TEST_F(JobStateTest, CommunicatorsThatAreGoneAreForgottenAndStrangersNotHeard) {
  for (uint64_t i = 1; i <= 1000; ++i) {
    Arrive(static_cast<double>(i),
           {{.sequence = i, .clock_s = static_cast<double>(i), .communicator = i}});
    EXPECT_LE(state_.communicators().size(), 64u);
  }
  Arrive(1001, {{.node = 2, .sequence = 1, .clock_s = 1}});
  EXPECT_EQ(state_.communicators().count(kCommunicator), 0u);
}

}  // namespace
}  // namespace holdfast::monitor
