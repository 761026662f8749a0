// Boards, processes and ends of a node, and the reports that come of them.
#include "agent/monitor/node_aggregator.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "agent/monitor/board_testing.h"
#include "agent/monitor/report_testing.h"
#include "agent/monitor/table_keeper_testing.h"
#include "agent/process.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/sim_executor.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using hook::Token;
using monitor::ExitKind;
using monitor::NodeSummary;
using monitor::ProcessState;
using monitor::RankReport;
using monitor::TelemetryLevel;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr uint64_t kIncarnation = 1000;

// The executor's clock, and what a busy loop adds to it.
class LateClock final : public Clock {
 public:
  explicit LateClock(const Clock& clock) : clock_(clock) {}
  absl::Duration Elapsed() const override { return clock_.Elapsed() + late; }
  absl::Time WallTime() const override { return clock_.WallTime(); }
  absl::Duration late{};

 private:
  const Clock& clock_;
};

size_t OpenDescriptors() {
  const std::filesystem::directory_iterator all("/proc/self/fd");
  return static_cast<size_t>(std::distance(begin(all), end(all)));
}

class NodeAggregatorTest : public ::testing::Test {
 protected:
  struct Trainer {
    std::unique_ptr<TrainerBoard> board;
    int process = -1;  // the descriptor that its death is seen by
    Token communicator = 0;
    hook::MonitorEvents& events() const { return board->events(); }
  };

  static hook::MonitorIdentity Named(uint32_t rank, const std::string& node = "n0") {
    return {.job = "job", .attempt_key = "k:0", .node = node, .rank = rank, .world_size = 4};
  }

  // A process with one board and one communicator. `pid`: by default 1000 + its rank.
  Trainer Join(hook::MonitorIdentity identity, uint32_t pid = 0,
               abi::BoardWriter writer = abi::BoardWriter::kHookApi) {
    if (pid == 0) pid = 1000 + identity.rank;
    Trainer trainer;
    const uint32_t rank = identity.rank;
    trainer.board =
        std::make_unique<TrainerBoard>(std::move(identity), writer, abi::MonitorLevel::kLight, pid);
    trainer.communicator = trainer.events().OpenCommunicator(
        {.hash = 7, .name = "all", .ranks = 4, .rank = rank % 4, .nodes = 0});
    trainer.process = Adopt(*trainer.board, pid);
    return trainer;
  }
  int Adopt(const TrainerBoard& board, uint32_t pid) {
    UniqueFd process(open("/dev/null", O_RDONLY | O_CLOEXEC));
    const int watched = process.get();
    EXPECT_OK(boards_.Adopt(board.Offer(std::move(process), pid)));
    return watched;
  }
  void Die(const Trainer& trainer) {
    executor_.MarkReady(trainer.process);
    executor_.RunUntilIdle();
  }
  static RankExit Exit(uint32_t rank, int32_t wait_status, uint32_t pid = 0) {
    return {"job", "k:0", "n0", rank, 4, pid == 0 ? 1000 + rank : pid, wait_status, false};
  }

  // What arrives within `duration`, by default one report of each node.
  std::vector<ReportCollector::Arrived> Reports(absl::Duration duration = absl::Seconds(1)) {
    sink_.arrived.clear();
    executor_.AdvanceTime(duration);
    return sink_.arrived;
  }
  // The one report of the next second.
  NodeSummary Next() {
    const auto arrived = Reports();
    EXPECT_THAT(arrived, SizeIs(1));
    return arrived.empty() ? NodeSummary() : arrived[0].summary;
  }

  SimExecutor executor_;
  LateClock clock_{executor_};
  TableKeeper keeper_;
  MonitorBoards boards_{executor_, executor_, keeper_};
  ReportCollector sink_;
  Engine::Activity activity_;
  NodeAggregator aggregator_{
      boards_,      executor_,
      clock_,       [this](const std::string&, const std::string&) { return activity_; },
      kIncarnation, sink_};
};

TEST_F(NodeAggregatorTest, ThereIsOneReportPerNodeNameAndSecond) {
  EXPECT_THAT(Reports(absl::Seconds(5)), IsEmpty());
  EXPECT_FALSE(executor_.next_timer_due().has_value()) << "nothing runs without boards";
  const Trainer a = Join(Named(0, "n0")), b = Join(Named(3, "n0")), c = Join(Named(2, "n1"));
  const auto arrived = Reports(absl::Seconds(3));
  ASSERT_THAT(arrived, SizeIs(6));
  for (size_t i = 0; i < 6; ++i) {
    const auto& [report, summary] = arrived[i];
    EXPECT_EQ(report.job, "job");
    EXPECT_EQ(report.attempt_key, "k:0");
    EXPECT_EQ(report.world_size, 4u);
    EXPECT_EQ(report.node, i % 2 == 0 ? "n0" : "n1");
    EXPECT_EQ(summary.node, 0u);
    EXPECT_EQ(summary.incarnation, kIncarnation);
    EXPECT_EQ(summary.sequence, i / 2 + 1);
    EXPECT_EQ(summary.observer_gap_us, 0u);
    EXPECT_FALSE(summary.engine_paused);
    EXPECT_EQ(summary.clock_us, arrived[0].summary.clock_us + i / 2 * 1'000'000);
    ASSERT_THAT(summary.ranks, SizeIs(i % 2 == 0 ? 2 : 1));
    EXPECT_EQ(Value(summary.ranks[0].rank), i % 2 == 0 ? 0u : 2u);
    for (const RankReport& rank : summary.ranks) {
      EXPECT_EQ(rank.process, ProcessState::kUnknown);
      EXPECT_EQ(rank.exit, ExitKind::kNone);
      EXPECT_EQ(rank.level, TelemetryLevel::kLight);
      ASSERT_THAT(rank.communicators, SizeIs(1));
      EXPECT_EQ(rank.communicators[0].id, 7u);
      EXPECT_EQ(rank.communicators[0].index, Value(rank.rank));
    }
  }
}

TEST_F(NodeAggregatorTest, BothBoardsOfAProcessAreOneRank) {
  TrainerBoard hooks(Named(2));
  TrainerBoard plugins(Named(2), abi::BoardWriter::kProfilerPlugin, abi::MonitorLevel::kFull);
  hooks.events().OpenCommunicator({.hash = 1, .name = nullptr, .ranks = 4, .rank = 2, .nodes = 0});
  plugins.events().OpenCommunicator(
      {.hash = 2, .name = nullptr, .ranks = 4, .rank = 2, .nodes = 0});
  // The same communicator told twice counts once, as the plugin tells it.
  hooks.events().OpenCommunicator({.hash = 3, .name = nullptr, .ranks = 4, .rank = 1, .nodes = 0});
  plugins.events().OpenCommunicator(
      {.hash = 3, .name = nullptr, .ranks = 4, .rank = 2, .nodes = 0});
  hooks.board().CountDrop(abi::Drop::kSlots);
  plugins.board().CountDrop(abi::Drop::kSlots);
  hooks.board().SetSection(0, "evaluation");
  Adopt(hooks, 55);
  Adopt(plugins, 55);
  const NodeSummary summary = Next();
  ASSERT_THAT(summary.ranks, SizeIs(1));
  const RankReport& rank = summary.ranks[0];
  ASSERT_THAT(rank.communicators, SizeIs(3));
  EXPECT_EQ(rank.communicators[0].id, 2u);
  EXPECT_EQ(rank.communicators[1].id, 3u);
  EXPECT_EQ(rank.communicators[1].index, 2u);
  EXPECT_EQ(rank.communicators[2].id, 1u);
  EXPECT_EQ(rank.level, TelemetryLevel::kFull);
  EXPECT_EQ(rank.drops, 2u);
  ASSERT_THAT(rank.sections, SizeIs(1));
  EXPECT_EQ(rank.sections[0].kind, monitor::SectionKind::kEvaluation);
}

TEST_F(NodeAggregatorTest, AnOpenedJobNamesTheProcessBetterThanItsEnvironment) {
  hook::MonitorIdentity environment = Named(0);
  environment.job.clear();
  TrainerBoard plugins(environment, abi::BoardWriter::kProfilerPlugin);
  Adopt(plugins, 55);
  auto arrived = Reports();
  ASSERT_THAT(arrived, SizeIs(1));
  EXPECT_EQ(arrived[0].report.job, NodeAggregator::kUnnamed);
  TrainerBoard hooks(Named(1));
  Adopt(hooks, 55);
  arrived = Reports(absl::Seconds(2));
  ASSERT_THAT(arrived, SizeIs(2)) << "the unnamed job has no rank any more";
  for (const auto& one : arrived) {
    EXPECT_EQ(one.report.job, "job");
    ASSERT_THAT(one.summary.ranks, SizeIs(1));
    EXPECT_EQ(Value(one.summary.ranks[0].rank), 1u);
  }
}

TEST_F(NodeAggregatorTest, ADeadProcessIsToldAsItWasWhileOthersLive) {
  const Trainer a = Join(Named(0)), b = Join(Named(1));
  const Token operation = a.events().BeginOperation(
      a.communicator, {.kind = abi::OperationKind::kAllReduce, .bytes = 64});
  Next();
  Die(a);
  NodeSummary summary = Next();
  ASSERT_THAT(summary.ranks, SizeIs(2));
  EXPECT_EQ(summary.ranks[0].process, ProcessState::kGone);
  EXPECT_EQ(summary.ranks[0].exit, ExitKind::kUnknown);
  EXPECT_EQ(summary.ranks[1].exit, ExitKind::kNone);
  EXPECT_EQ(monitor::Total(summary.ranks[0].communicators.at(0)).enqueued, 1u);
  const RankReport last = summary.ranks[0];
  // Nothing of it moves any more, not even the age of its waits.
  a.events().FinishOperation(operation);
  EXPECT_EQ(Next().ranks[0], last);
  aggregator_.TakeExit(Exit(0, 9));
  summary = Next();
  EXPECT_EQ(summary.ranks[0].exit, ExitKind::kKilled);
  EXPECT_EQ(summary.ranks[0].exit_value, 9);
  // As long as the other one lives, also when its board is not kept any more.
  executor_.AdvanceTime(MonitorBoards::kDeadAge + absl::Minutes(1));
  EXPECT_EQ(boards_.dead_count(), 0u);
  summary = Next();
  ASSERT_THAT(summary.ranks, SizeIs(2));
  EXPECT_EQ(summary.ranks[0].exit, ExitKind::kKilled);
  EXPECT_EQ(summary.ranks[0].communicators, last.communicators);
  EXPECT_EQ(summary.incarnation, kIncarnation);
  // And for a while after.
  Die(b);
  EXPECT_THAT(Reports(NodeAggregator::kEndedAge - absl::Seconds(1)), SizeIs(59));
  EXPECT_THAT(Reports(absl::Seconds(5)), SizeIs(::testing::Le(2)));
  EXPECT_THAT(Reports(absl::Seconds(5)), IsEmpty());
  executor_.AdvanceTime(MonitorBoards::kDeadAge);
  EXPECT_FALSE(executor_.next_timer_due().has_value());
}

TEST_F(NodeAggregatorTest, AProcessThatTakesARankOverBeginsANewIncarnation) {
  const Trainer a = Join(Named(0)), other = Join(Named(1));
  EXPECT_EQ(Next().incarnation, kIncarnation);
  Die(a);
  aggregator_.TakeExit(Exit(0, 9));
  EXPECT_EQ(Next().ranks[0].exit, ExitKind::kKilled);
  const Trainer again = Join(Named(0), 2000);
  NodeSummary summary = Next();
  EXPECT_EQ(summary.incarnation, kIncarnation + 1);
  ASSERT_THAT(summary.ranks, SizeIs(2));
  EXPECT_EQ(summary.ranks[0].process, ProcessState::kUnknown);
  EXPECT_EQ(summary.ranks[0].exit, ExitKind::kNone);
  EXPECT_EQ(Next().incarnation, kIncarnation + 1);
  // The exit of the first one is not the second one's.
  Die(again);
  EXPECT_EQ(Next().ranks[0].exit, ExitKind::kUnknown);
}

TEST_F(NodeAggregatorTest, ANewRunUnderTheSameNamesIsRidOfTheOldOne) {
  const Trainer a = Join(Named(0)), b = Join(Named(1));
  Next();
  Die(a);
  Die(b);
  aggregator_.TakeExit(Exit(1, 1 << 8));
  EXPECT_THAT(Next().ranks, SizeIs(2));
  const Trainer again = Join(Named(0), 2000);
  const NodeSummary summary = Next();
  EXPECT_THAT(summary.ranks, SizeIs(1)) << "rank 1 of the old run is not told any more";
  EXPECT_EQ(summary.incarnation, kIncarnation + 1);
  EXPECT_EQ(summary.sequence, 3u);
}

TEST_F(NodeAggregatorTest, OfTwoLivingProcessesWithOneRankTheOneThatCommunicatesCounts) {
  TrainerBoard silent(Named(0));
  Adopt(silent, 1);
  EXPECT_THAT(Next().ranks.at(0).communicators, IsEmpty());
  const Trainer real = Join(Named(0), 2);
  EXPECT_THAT(Next().ranks.at(0).communicators, SizeIs(1));
  // A third one does not take its place.
  const Trainer copy = Join(Named(0), 3);
  real.events().BeginOperation(real.communicator,
                               {.kind = abi::OperationKind::kBarrier, .bytes = 0});
  NodeSummary summary = Next();
  ASSERT_THAT(summary.ranks, SizeIs(1));
  EXPECT_EQ(monitor::Total(summary.ranks[0].communicators.at(0)).enqueued, 1u);
  EXPECT_EQ(summary.incarnation, kIncarnation + 1);
}

// As a worker finds them that takes over from one that has died.
TEST_F(NodeAggregatorTest, WhoWasDeadBeforeIsToldOnlyIfItsAttemptLives) {
  Die(Join(Named(0)));
  Die(Join(Named(1)));
  EXPECT_EQ(boards_.dead_count(), 2u);
  EXPECT_THAT(Reports(absl::Seconds(3)), IsEmpty());
  Die(Join(Named(2)));
  const Trainer living = Join(Named(3));
  const NodeSummary summary = Next();
  ASSERT_THAT(summary.ranks, SizeIs(2));
  EXPECT_EQ(Value(summary.ranks[0].rank), 2u);
  EXPECT_EQ(summary.ranks[0].process, ProcessState::kGone);
  EXPECT_EQ(summary.ranks[1].exit, ExitKind::kNone);
  // One that has died at once is told by its starter.
  executor_.AdvanceTime(absl::Seconds(1));
  Die(Join(Named(5, "n5"), 2005));
  RankExit exit = Exit(5, 1 << 8, 2005);
  exit.node = "n5";
  aggregator_.TakeExit(exit);
  const auto arrived = Reports();
  ASSERT_THAT(arrived, SizeIs(2));
  EXPECT_EQ(arrived[1].summary.ranks.at(0).exit, ExitKind::kError);
}

TEST_F(NodeAggregatorTest, ARankWithoutABoardIsToldByItsEnd) {
  aggregator_.TakeExit(Exit(3, 1 << 8));
  auto arrived = Reports(absl::Milliseconds(1500));
  ASSERT_THAT(arrived, SizeIs(1));
  EXPECT_EQ(arrived[0].report.world_size, 4u);
  ASSERT_THAT(arrived[0].summary.ranks, SizeIs(1));
  const RankReport& rank = arrived[0].summary.ranks[0];
  EXPECT_EQ(Value(rank.rank), 3u);
  EXPECT_EQ(rank.process, ProcessState::kGone);
  EXPECT_EQ(rank.exit, ExitKind::kError);
  EXPECT_EQ(rank.exit_value, 1);
  EXPECT_EQ(rank.level, TelemetryLevel::kNone);
  // Beside one that has.
  const Trainer a = Join(Named(0));
  EXPECT_THAT(Next().ranks, SizeIs(2));
  Die(a);
  executor_.AdvanceTime(NodeAggregator::kEndedAge + absl::Seconds(2));
  EXPECT_THAT(Reports(absl::Seconds(3)), IsEmpty());
}

TEST_F(NodeAggregatorTest, NamesThatAreNoneGetOneThatIs) {
  hook::MonitorIdentity identity = Named(0, "");
  identity.job = "../etc";
  Join(identity);
  identity = Named(1);
  identity.rank = UINT32_MAX;  // not known: no rank
  Join(identity, 77);
  const auto arrived = Reports();
  ASSERT_THAT(arrived, SizeIs(1));
  EXPECT_EQ(arrived[0].report.job, NodeAggregator::kUnnamed);
  EXPECT_EQ(arrived[0].report.node, NodeAggregator::kUnnamed);
  EXPECT_THAT(arrived[0].summary.ranks, SizeIs(1));
}

TEST_F(NodeAggregatorTest, JobsWithoutANameDoNotHideEachOther) {
  hook::MonitorIdentity identity = Named(1);
  identity.job = "";
  const Trainer first = Join(identity, 4'000'000'001), second = Join(identity, 4'000'000'002);
  auto arrived = Reports();
  ASSERT_THAT(arrived, SizeIs(2));
  EXPECT_EQ(arrived[0].report.job, "unnamed");
  EXPECT_EQ(arrived[1].report.job, "unnamed-2");
  // Its launcher does not know either how it is called here.
  RankExit exit = Exit(1, 9, 4'000'000'002);
  exit.job = "";
  aggregator_.TakeExit(exit);
  Die(second);
  arrived = Reports();
  ASSERT_THAT(arrived, SizeIs(2));
  EXPECT_EQ(arrived[0].summary.ranks.at(0).exit, ExitKind::kNone);
  EXPECT_EQ(arrived[1].summary.ranks.at(0).exit, ExitKind::kKilled);
}

TEST_F(NodeAggregatorTest, TheObserversLatenessIsToldOnce) {
  Join(Named(0));
  Next();
  executor_.AdvanceTime(absl::Milliseconds(200));
  clock_.late = absl::Milliseconds(700);
  NodeSummary summary = Next();
  EXPECT_EQ(summary.observer_gap_us, 700'000u);
  EXPECT_EQ(Next().observer_gap_us, 0u);
  // A long time without looking: one report, not many.
  clock_.late += absl::Seconds(20);
  const auto arrived = Reports();
  EXPECT_THAT(arrived, SizeIs(::testing::Le(2)));
  EXPECT_EQ(arrived.at(0).summary.observer_gap_us, 20'000'000u);
}

TEST_F(NodeAggregatorTest, WhatTheEngineDoesInBetweenIsAPause) {
  Join(Named(0));
  EXPECT_FALSE(Next().engine_paused);
  for (bool Engine::Activity::*what :
       {&Engine::Activity::capturing, &Engine::Activity::restoring, &Engine::Activity::flushing}) {
    executor_.AdvanceTime(absl::Milliseconds(350));
    activity_.*what = true;
    executor_.AdvanceTime(absl::Milliseconds(100));
    activity_.*what = false;
    EXPECT_TRUE(Next().engine_paused);
    executor_.AdvanceTime(absl::Milliseconds(550));
    EXPECT_FALSE(Next().engine_paused);
  }
  // A flush without end (storage that does not answer) is a pause for a while only.
  activity_.flushing = true;
  activity_.attempt = Attempt{5};
  EXPECT_TRUE(Next().engine_paused);
  EXPECT_EQ(Value(Next().attempt), 5u);
  executor_.AdvanceTime(EnginePause::kFlushMax);
  EXPECT_FALSE(Next().engine_paused);
  // Nor does a rank that hangs before it waits for its capture hide behind it for ever.
  activity_.flushing = false;
  activity_.capturing = true;
  EXPECT_TRUE(Next().engine_paused);
  executor_.AdvanceTime(EnginePause::kCaptureMax);
  EXPECT_FALSE(Next().engine_paused);
}

TEST_F(NodeAggregatorTest, WhatOurOwnCallsHoldUpIsToldOfEachRank) {
  Join(Named(0));
  Join(Named(2));
  EXPECT_EQ(Next().ranks.at(0).held_us, std::nullopt) << "it does not use the library";
  activity_.held = {{Rank{2}, absl::Milliseconds(1500)}, {Rank{3}, absl::Seconds(9)}};
  NodeSummary summary = Next();
  EXPECT_EQ(summary.ranks.at(0).held_us, std::nullopt);
  EXPECT_EQ(summary.ranks.at(1).held_us, 1'500'000u);
  activity_.held = {{Rank{2}, absl::Milliseconds(1400)}};  // a call was just ending
  EXPECT_EQ(Next().ranks.at(1).held_us, 1'500'000u);
  activity_.held = {{Rank{2}, absl::Milliseconds(1600)}};
  EXPECT_EQ(Next().ranks.at(1).held_us, 1'600'000u);
  activity_.held.clear();  // between two sessions
  EXPECT_EQ(Next().ranks.at(1).held_us, 1'600'000u);
  activity_.held = {{Rank{2}, absl::Milliseconds(5)}};  // the job was opened anew
  EXPECT_EQ(Next().ranks.at(1).held_us, 5'000u);
}

TEST_F(NodeAggregatorTest, ConnectionsServedByAnotherProcessBelongToTheirOwner) {
  const Trainer owner = Join(Named(0), 31, abi::BoardWriter::kProfilerPlugin);
  const Trainer server = Join(Named(1), 32, abi::BoardWriter::kProfilerPlugin);
  const Token operation = owner.events().BeginOperation(
      owner.communicator, {.kind = abi::OperationKind::kAllReduce, .bytes = 64});
  owner.events().EndOperation(operation);
  EXPECT_EQ(monitor::Total(Next().ranks[0].communicators.at(0)).finished, 1u)
      << "nothing of it is visible";
  const Token transfer = server.events().BeginTransfer(
      owner.communicator, operation, {.channel = 2, .peer = 3, .steps = 4, .send = true});
  NodeSummary summary = Next();
  EXPECT_THAT(summary.ranks[1].communicators.at(0).connections, IsEmpty());
  const monitor::CommunicatorReport& communicator = summary.ranks[0].communicators.at(0);
  ASSERT_THAT(communicator.connections, SizeIs(1));
  EXPECT_EQ(communicator.connections[0].peer, 3u);
  EXPECT_EQ(communicator.connections[0].operation, 1u);
  EXPECT_EQ(communicator.connections[0].state, monitor::WaitState::kQueued);
  EXPECT_EQ(monitor::Total(communicator).finished, 0u);
  server.events().EndTransfer(transfer);
  EXPECT_EQ(monitor::Total(Next().ranks[0].communicators.at(0)).finished, 1u);
  // Point to point: the newest with that peer.
  for (int i = 0; i < 3; ++i) {
    owner.events().EndOperation(owner.events().BeginOperation(
        owner.communicator, {.kind = abi::OperationKind::kSend, .bytes = 8, .peer = 2}));
  }
  server.events().BeginTransfer(owner.communicator, 0,
                                {.channel = 0, .peer = 2, .steps = 1, .send = true});
  summary = Next();
  for (const auto& connection : summary.ranks[0].communicators.at(0).connections) {
    EXPECT_EQ(connection.operation, connection.peer == 2 ? 3u : 1u);
  }
}

TEST_F(NodeAggregatorTest, TheKernelsWordIsTold) {
  const pid_t pid = fork();
  if (pid == 0) {
    for (;;) pause();
  }
  const size_t descriptors = OpenDescriptors();
  UniqueFd pidfd = *OpenPidfd(pid);
  const int watched = pidfd.get();
  TrainerBoard board(Named(0), abi::BoardWriter::kHookApi, abi::MonitorLevel::kLight,
                     static_cast<uint32_t>(pid));
  ASSERT_OK(boards_.Adopt(board.Offer(std::move(pidfd), static_cast<uint32_t>(pid))));
  kill(pid, SIGSTOP);
  int status = 0;
  ASSERT_EQ(waitpid(pid, &status, WUNTRACED), pid);
  EXPECT_EQ(Next().ranks.at(0).process, ProcessState::kStopped);
  kill(pid, SIGKILL);
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  executor_.MarkReady(watched);
  executor_.RunUntilIdle();
  aggregator_.TakeExit(Exit(0, status, static_cast<uint32_t>(pid)));
  const RankReport rank = Next().ranks.at(0);
  EXPECT_EQ(rank.process, ProcessState::kGone);
  EXPECT_EQ(rank.exit, ExitKind::kKilled);
  EXPECT_EQ(OpenDescriptors(), descriptors + 1 + keeper_.size())
      << "but for the test's own board, and what the keeper holds as long as the board is "
         "evidence, "
         "all are closed";
}

TEST_F(NodeAggregatorTest, BeyondTheLimitsRanksAreCountedAndNotTold) {
  std::vector<Trainer> trainers;
  for (uint32_t i = 0; i < NodeAggregator::kGroupsMax + 3; ++i) {
    trainers.push_back(Join(Named(i, absl::StrCat("node-", i)), 3000 + i));
  }
  EXPECT_THAT(Reports(), SizeIs(NodeAggregator::kGroupsMax));
  EXPECT_EQ(aggregator_.unreported_count(), 3u);
  for (uint32_t i = 0; i < monitor::kRanksMax + 5; ++i) {
    trainers.push_back(Join(Named(100 + i, "node-0"), 4000 + i));
  }
  EXPECT_THAT(Reports(), SizeIs(NodeAggregator::kGroupsMax));
  EXPECT_EQ(aggregator_.unreported_count(), 3u + 6u);
}

TEST_F(NodeAggregatorTest, TheStatusSaysWhatIsReported) {
  Join(Named(0));
  Join(Named(1));
  Next();
  const auto status = nlohmann::json::parse(aggregator_.StatusJson());
  ASSERT_EQ(status["groups"].size(), 1u);
  EXPECT_EQ(status["groups"][0]["job"], "job");
  EXPECT_EQ(status["groups"][0]["ranks"], 2);
  EXPECT_EQ(status["groups"][0]["reports"], 1);
  EXPECT_EQ(status["groups"][0]["report_bytes"], sink_.arrived[0].report.summary.size());
  EXPECT_EQ(status["not_reported"], 0);
}

// Goal: whatever trainers write, reports go on, whole and within their budget.
TEST_F(NodeAggregatorTest, AnyBytesOnBoardsGiveReportsThatCanBeRead) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937_64 random(seed);
  std::vector<Trainer> trainers;
  for (uint32_t rank = 0; rank < 4; ++rank) {
    trainers.push_back(Join(Named(rank), 0, abi::BoardWriter::kProfilerPlugin));
  }
  size_t communicators = 0;
  for (int round = 0; round < 6; ++round) {
    for (const Trainer& trainer : trainers) {
      const auto* const header = trainer.board->view().header;
      auto* const data = const_cast<std::byte*>(trainer.board->board().data());
      // The names and, in half of the rounds, the communicators stay: else hardly one would be
      // open.
      const uint64_t begin = round % 2 == 0 ? header->keys_offset : 1024;
      for (uint64_t at = begin; at + 8 <= header->rings_offset; at += 8) {
        const uint64_t word = random() % 2 == 0 ? random() % 8 : random();
        std::memcpy(data + at, &word, 8);
      }
    }
    const auto arrived = Reports();
    ASSERT_THAT(arrived, SizeIs(1));
    EXPECT_LE(arrived[0].report.summary.size(), 10 * monitor::kSummaryBytesBudget);
    ASSERT_THAT(arrived[0].summary.ranks, SizeIs(4));
    for (const RankReport& rank : arrived[0].summary.ranks) {
      communicators += rank.communicators.size();
    }
  }
  EXPECT_GT(communicators, 0u);
}

}  // namespace
}  // namespace holdfast
