// The table of wait_edges.h, line by line, from two hand-made boards.
#include "monitor/wait_edges.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

namespace holdfast::monitor {
namespace {

struct End {
  WaitState state{};
  uint64_t operation = 5;
  uint32_t steps_done = 3;
};

// Rank 0 waits on a connection with rank 1, of which `other` is the other end. `change` may alter
// what rank 1's node says besides. Both stand for long.
template <typename Change>
std::string TargetOf(WaitState mine, const End& other, Change change) {
  JobShape shape;
  shape.ranks.resize(2);
  shape.ranks[1].node = 1;
  JobState state(Thresholds{}, shape);
  for (uint64_t second = 1; second <= 8; ++second) {
    Snapshot snapshot;
    snapshot.elapsed = absl::Seconds(second);
    for (uint32_t r = 0; r < 2; ++r) {
      NodeSummary summary;
      summary.node = r;
      summary.sequence = second;
      summary.clock_us = second * 1'000'000;
      RankReport rank;
      rank.rank = Rank{r};
      rank.level = TelemetryLevel::kLight;
      rank.process = ProcessState::kRunning;
      CommunicatorReport c;
      c.id = 9;
      c.size = 2;
      c.index = r;
      c.counts[static_cast<size_t>(OperationKind::kAllReduce)] = {5, 5, 4};
      ConnectionReport connection;
      connection.peer = 1 - r;
      const bool receives = mine == WaitState::kReceiveWait;
      connection.direction = (r == 0) == receives ? Direction::kReceive : Direction::kSend;
      connection.state = r == 0 ? mine : other.state;
      connection.operation = r == 0 ? 5 : other.operation;
      connection.steps_done = r == 0 ? 3 : other.steps_done;
      connection.steps_total = 8;
      c.connections = {connection};
      rank.communicators = {c};
      summary.ranks = {rank};
      if (r == 1) change(summary);
      snapshot.arrived.push_back(summary);
    }
    state.Ingest(snapshot, /*learn=*/false);
  }
  const WaitPicture picture = DrawWaits(state);
  std::string target = "nobody";
  for (const ReasonedEdge& edge : picture.edges) {
    if (edge.ends.waiter != 0) continue;
    EXPECT_EQ(target, "nobody") << "one wait, one edge";
    if (const auto link = picture.links.find(edge.ends.awaited); link != picture.links.end()) {
      target = "link " + std::to_string(Value(link->second.first)) + ">" +
               std::to_string(Value(link->second.second));
      continue;
    }
    EXPECT_EQ(edge.ends.awaited, 1u);
    target = edge.reason == WaitReason::kNotEntered ? "not entered"
             : edge.reason == WaitReason::kNoData   ? "no data"
             : edge.reason == WaitReason::kNoCredit ? "no credit"
             : edge.reason == WaitReason::kBlind    ? "blind"
                                                    : "?";
  }
  return target;
}

std::string TargetOf(WaitState mine, const End& other) {
  return TargetOf(mine, other, [](NodeSummary&) {});
}

TEST(WaitEdgesTest, AReceiverWithoutDataIsReadFromTheSendersEnd) {
  constexpr WaitState kMine = WaitState::kReceiveWait;
  for (const WaitState state :
       {WaitState::kSendGpuWait, WaitState::kQueued, WaitState::kBetweenSteps}) {
    EXPECT_EQ(TargetOf(kMine, {state}), "no data");
    // It has sent more than has come here.
    EXPECT_EQ(TargetOf(kMine, {state, 5, 4}), "link 1>0");
  }
  EXPECT_EQ(TargetOf(kMine, {WaitState::kSendWait}), "link 1>0");
  EXPECT_EQ(TargetOf(kMine, {WaitState::kSendPeerWait}), "link 1>0");
  EXPECT_EQ(TargetOf(kMine, {WaitState::kNone, 5, 8}), "link 1>0");
  EXPECT_EQ(TargetOf(kMine, {WaitState::kSendGpuWait, 6, 0}), "link 1>0");
  EXPECT_EQ(TargetOf(kMine, {WaitState::kNone, 4, 8}), "not entered");
}

TEST(WaitEdgesTest, ASenderWithoutCreditIsReadFromTheReceiversEnd) {
  constexpr WaitState kMine = WaitState::kSendPeerWait;
  for (const WaitState state : {WaitState::kReceiveGpuWait, WaitState::kReceiveFlushWait,
                                WaitState::kQueued, WaitState::kBetweenSteps}) {
    EXPECT_EQ(TargetOf(kMine, {state}), "no credit");
  }
  EXPECT_EQ(TargetOf(kMine, {WaitState::kReceiveWait}), "link 0>1");
  EXPECT_EQ(TargetOf(kMine, {WaitState::kNone, 4, 8}), "not entered");
}

TEST(WaitEdgesTest, WhatIsPostedWaitsForTheLink) {
  for (const WaitState state : {WaitState::kReceiveWait, WaitState::kReceiveGpuWait}) {
    EXPECT_EQ(TargetOf(WaitState::kSendWait, {state}), "link 0>1");
  }
}

TEST(WaitEdgesTest, WaitsForTheLocalGpuGiveNoEdge) {
  for (const WaitState state :
       {WaitState::kQueued, WaitState::kBetweenSteps, WaitState::kSendGpuWait}) {
    EXPECT_EQ(TargetOf(state, {WaitState::kReceiveWait}), "nobody");
  }
}

TEST(WaitEdgesTest, WhoCannotRunIsBlamedWhateverItsBoardShows) {
  for (const WaitState mine :
       {WaitState::kReceiveWait, WaitState::kSendPeerWait, WaitState::kSendWait}) {
    for (const WaitState theirs :
         {WaitState::kNone, WaitState::kSendWait, WaitState::kReceiveWait}) {
      const auto target = [&](auto change) { return TargetOf(mine, {theirs}, change); };
      EXPECT_EQ(target([](NodeSummary& s) { s.ranks[0].process = ProcessState::kStopped; }),
                "no data");
      EXPECT_EQ(target([](NodeSummary& s) { s.ranks[0].exit = ExitKind::kKilled; }), "no data");
      EXPECT_EQ(target([](NodeSummary& s) { s.ranks[0].run_delay_us = s.clock_us * 9 / 10; }),
                "no data");
    }
  }
}

TEST(WaitEdgesTest, APeerWithoutTelemetryIsNotTakenForTheCause) {
  const auto blind = [](NodeSummary& s) {
    s.ranks[0].level = TelemetryLevel::kNone;
    s.ranks[0].communicators.clear();
  };
  EXPECT_EQ(TargetOf(WaitState::kReceiveWait, {}, blind), "blind");
  EXPECT_EQ(TargetOf(WaitState::kSendPeerWait, {}, blind), "blind");
  EXPECT_EQ(TargetOf(WaitState::kSendWait, {}, blind), "link 0>1");
}

}  // namespace
}  // namespace holdfast::monitor
