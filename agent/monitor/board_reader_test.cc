// What a board becomes: every field of the summary that comes from it.
#include "agent/monitor/board_reader.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "agent/monitor/board_testing.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

using hook::OperationInfo;
using hook::Token;
using monitor::CommunicatorReport;
using monitor::ConnectionReport;
using monitor::Direction;
using monitor::OperationCounts;
using monitor::OperationKind;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr auto kRelease = std::memory_order_release;

hook::MonitorIdentity Rank2() {
  return {.job = "job", .attempt_key = "k:0", .node = "n0", .rank = 2, .world_size = 4};
}

const OperationCounts& Of(const CommunicatorReport& report, OperationKind kind) {
  return report.counts[static_cast<size_t>(kind)];
}

class BoardReaderTest : public ::testing::Test {
 protected:
  Token Open(uint64_t id = 0xabc, uint32_t ranks = 4, uint32_t rank = 2) {
    return trainer_.events().OpenCommunicator(
        {.hash = id, .name = "group", .ranks = ranks, .rank = rank, .nodes = 0});
  }
  Token Enqueue(Token communicator, abi::OperationKind kind, uint64_t bytes = 64,
                uint32_t peer = abi::kNoPeer) {
    return trainer_.events().BeginOperation(communicator,
                                            {.kind = kind, .bytes = bytes, .peer = peer});
  }
  BoardReport Read() { return reader_.Read(trainer_.now()); }
  CommunicatorReport ReadOne() {
    BoardReport report = Read();
    EXPECT_THAT(report.communicators, SizeIs(1));
    return report.communicators.empty() ? CommunicatorReport() : report.communicators[0];
  }
  abi::Slot& SlotOf(uint32_t index) const { return trainer_.board().slot(index); }

  TrainerBoard trainer_{Rank2()};
  BoardReader reader_{trainer_.view()};
};

TEST_F(BoardReaderTest, ACommunicatorIsNamedAndCountedByKind) {
  const Token communicator = Open();
  EXPECT_EQ(ReadOne().id, 0xabcu);
  EXPECT_EQ(ReadOne().size, 4u);
  EXPECT_EQ(ReadOne().index, 2u);
  EXPECT_EQ(monitor::Total(ReadOne()), OperationCounts{});
  trainer_.events().FinishOperation(Enqueue(communicator, abi::OperationKind::kAllReduce));
  const Token running = Enqueue(communicator, abi::OperationKind::kAllReduce, 128);
  trainer_.events().StartOperation(running);
  Enqueue(communicator, abi::OperationKind::kBroadcast, 32);
  const CommunicatorReport report = ReadOne();
  EXPECT_EQ(Of(report, OperationKind::kAllReduce), (OperationCounts{2, 2, 1}));
  EXPECT_EQ(Of(report, OperationKind::kBroadcast), (OperationCounts{1, 0, 0}));
  EXPECT_EQ(report.last_kind, OperationKind::kBroadcast);
  EXPECT_EQ(report.last_bytes, 32u);
  EXPECT_EQ(report.last_sequence, 1u);
  trainer_.events().CloseCommunicator(communicator);
  EXPECT_THAT(Read().communicators, IsEmpty());
}

// Collectives by their numbers, with all that they were called with, once nothing has moved for a
// while; point to point is not among them.
TEST_F(BoardReaderTest, TheNewestCollectivesAreToldOfACommunicatorThatStands) {
  const Token communicator = Open();
  abi::Communicator& place = trainer_.board().communicator(0);
  std::vector<monitor::RecentOperation> all;
  const auto stand = [&](int64_t microseconds) {
    const uint64_t then =
        trainer_.board().Now() - static_cast<uint64_t>(microseconds) * uint64_t{1000};
    for (auto* ticks : {&place.enqueued_ticks, &place.started_ticks, &place.finished_ticks}) {
      ticks->store(then, kRelease);
    }
    return ReadOne().operations;
  };
  EXPECT_THAT(stand(10'000'000), IsEmpty());
  for (uint32_t i = 0; i < 40; ++i) {
    const bool rooted = i % 3 == 0;
    const auto kind = rooted ? abi::OperationKind::kReduce : abi::OperationKind::kAllGather;
    const Token operation = trainer_.events().BeginOperation(
        communicator, {.kind = kind, .bytes = 100 + i, .root = i % 4});
    all.push_back({rooted ? OperationKind::kReduce : OperationKind::kAllGather, 100 + i,
                   rooted ? i % 4 : monitor::kNoRoot});
    if (i % 2 == 0) trainer_.events().FinishOperation(operation);
    const size_t kept = std::min(all.size(), monitor::kOperationsMax);
    const std::vector<monitor::RecentOperation> newest(all.end() - static_cast<ptrdiff_t>(kept),
                                                       all.end());
    EXPECT_EQ(stand(monitor::kOperationsToldAfterUs), newest) << i;
    // It moved an hour after the look: however slow we are, it has not stood.
    EXPECT_THAT(stand(-3'600'000'000), IsEmpty()) << i;
  }
  EXPECT_EQ(monitor::Collectives(ReadOne()).enqueued, all.size());
  // Of the 16 that are kept three are point to point now.
  for (const auto kind :
       {abi::OperationKind::kSend, abi::OperationKind::kReceive, abi::OperationKind::kSend}) {
    Enqueue(communicator, kind, 64, 1);
  }
  const std::vector<monitor::RecentOperation> left(all.end() - 13, all.end());
  EXPECT_EQ(stand(10'000'000), left);
  // One that is being enqueued: its number is given, and it is not there yet.
  place.enqueued.fetch_add(1, kRelease);
  EXPECT_THAT(stand(10'000'000), IsEmpty());
}

TEST_F(BoardReaderTest, AnOpenOperationIsAsOldAsItself) {
  const Token communicator = Open();
  const Token operation = Enqueue(communicator, abi::OperationKind::kAllReduce);
  abi::Communicator& place = trainer_.board().communicator(0);
  place.recent[1].ticks.store(trainer_.board().Now() - 5'000'000'000, kRelease);
  EXPECT_NEAR(static_cast<double>(ReadOne().open_us), 5e6, 1e6);
  // Behind one that was over only then.
  place.finished_ticks.store(trainer_.board().Now() - 2'000'000'000, kRelease);
  EXPECT_NEAR(static_cast<double>(ReadOne().open_us), 2e6, 1e6);
  trainer_.events().FinishOperation(operation);
  EXPECT_EQ(ReadOne().open_us, 0u);
}

// Every state that a step can be in, at each end: state, progress, and what is added to the time on
// the wire and in the operation.
TEST_F(BoardReaderTest, EveryWaitOfAConnectionIsTold) {
  struct Case {
    abi::WaitState state;
    bool wire;
  };
  for (const bool send : {true, false}) {
    const std::vector<Case> cases =
        send ? std::vector<Case>{{abi::WaitState::kSendGpuWait, false},
                                 {abi::WaitState::kSendPeerWait, false},
                                 {abi::WaitState::kSendWait, true}}
             : std::vector<Case>{{abi::WaitState::kReceiveWait, true},
                                 {abi::WaitState::kReceiveFlushWait, false},
                                 {abi::WaitState::kReceiveGpuWait, false}};
    for (const Case& one : cases) {
      SCOPED_TRACE(absl::StrCat(send ? "send " : "receive ", static_cast<int>(one.state)));
      TrainerBoard trainer(Rank2());
      hook::MonitorEvents& events = trainer.events();
      BoardReader reader(trainer.view());
      const Token communicator =
          events.OpenCommunicator({.hash = 7, .name = nullptr, .ranks = 4, .rank = 2, .nodes = 0});
      const Token operation = events.BeginOperation(
          communicator, {.kind = abi::OperationKind::kAllReduce, .bytes = 64});
      const Token transfer = events.BeginTransfer(
          communicator, operation, {.channel = 5, .peer = 3, .steps = 9, .send = send});
      const auto connection = [&] {
        const BoardReport report = reader.Read(trainer.now());
        EXPECT_EQ(report.communicators.at(0).connections.size(), 1u);
        return report.communicators.at(0).connections.at(0);
      };
      EXPECT_EQ(connection().state, monitor::WaitState::kQueued);
      events.TransferInProgress(transfer);
      EXPECT_EQ(connection().state, monitor::WaitState::kBetweenSteps);
      events.EndStep(events.BeginStep(transfer, 0));
      const Token step = events.BeginStep(transfer, 1);
      events.StepState(step, one.state, 40);
      const uint32_t slot = trainer.board().FindSlot(
          0, 5, 3, send ? abi::SlotDirection::kSend : abi::SlotDirection::kReceive);
      for (auto& waited : trainer.board().slot(slot).waited) waited.store(0, kRelease);
      trainer.board().slot(slot).since.store(trainer.board().Now() - 3'000'000'000, kRelease);
      const ConnectionReport found = connection();
      EXPECT_EQ(static_cast<int>(found.state), static_cast<int>(one.state));
      EXPECT_EQ(found.channel, 5);
      EXPECT_EQ(found.channels, 1);
      EXPECT_EQ(found.peer, 3u);
      EXPECT_EQ(found.direction, send ? Direction::kSend : Direction::kReceive);
      EXPECT_EQ(found.operation, 1u);
      EXPECT_EQ(found.steps_done, 1u);
      EXPECT_EQ(found.steps_total, 9u);
      EXPECT_NEAR(static_cast<double>(found.waiting_us), 3e6, 1e6);
      EXPECT_NEAR(static_cast<double>(found.wire_wait_us), one.wire ? 3e6 : 0, 1e6);
      EXPECT_NEAR(static_cast<double>(reader.Read(trainer.now()).operation_us), 3e6, 1e6);
      events.EndStep(step);
      events.EndTransfer(transfer);
      EXPECT_EQ(connection().state, monitor::WaitState::kNone);
      EXPECT_NEAR(static_cast<double>(connection().wire_wait_us), one.wire ? 3e6 : 0, 1e6);
      EXPECT_EQ(connection().steps_done, 2u);
    }
  }
}

TEST_F(BoardReaderTest, TimeInOperationsNeverGoesBack) {
  // By the running time, where there are no connections.
  const Token communicator = Open();
  trainer_.events().StartOperation(Enqueue(communicator, abi::OperationKind::kAllReduce));
  trainer_.board().communicator(0).running_since.store(trainer_.board().Now() - 4'000'000'000,
                                                       kRelease);
  EXPECT_NEAR(static_cast<double>(Read().operation_us), 4e6, 1e6);
  trainer_.events().CloseCommunicator(communicator);
  EXPECT_NEAR(static_cast<double>(Read().operation_us), 4e6, 1e6);
  // The next one takes another place, then the first one's: what they add comes on top.
  for (int i = 1; i <= 200; ++i) {
    const Token next = Open(static_cast<uint64_t>(i));
    trainer_.board().communicator(hook::PlaceOf(next)).running_ticks.store(1'000'000'000, kRelease);
    EXPECT_NEAR(static_cast<double>(Read().operation_us), 4e6 + 1e6 * i, 1e6) << i;
    trainer_.events().CloseCommunicator(next);
  }
}

TEST_F(BoardReaderTest, KernelsTellTheTimeInOperationsBetterThanConnections) {
  TrainerBoard trainer(Rank2(), abi::BoardWriter::kProfilerPlugin, abi::MonitorLevel::kFull);
  hook::MonitorEvents& events = trainer.events();
  BoardReader reader(trainer.view());
  const Token communicator =
      events.OpenCommunicator({.hash = 7, .name = nullptr, .ranks = 4, .rank = 2, .nodes = 0});
  const Token operation =
      events.BeginOperation(communicator, {.kind = abi::OperationKind::kAllReduce, .bytes = 64});
  const Token transfer = events.BeginTransfer(communicator, operation,
                                              {.channel = 0, .peer = 3, .steps = 1, .send = true});
  events.BeginStep(transfer, 0);
  const uint32_t slot = trainer.board().FindSlot(0, 0, 3, abi::SlotDirection::kSend);
  trainer.board().slot(slot).waited[0].store(9'000'000'000, kRelease);
  const Token kernel = events.BeginKernel(communicator, operation, 0, 1'000'000);
  events.KernelStopped(kernel, 2'001'000'000);
  EXPECT_EQ(reader.Read(trainer.now()).level, monitor::TelemetryLevel::kFull);
  EXPECT_EQ(reader.Read(trainer.now()).operation_us, 2'000'000u);
}

// A plugin sees nothing of what runs inside a node; nobody may be blamed for its not ending.
TEST_F(BoardReaderTest, OperationsWithoutVisiblePartsCountAsOver) {
  TrainerBoard trainer(Rank2(), abi::BoardWriter::kProfilerPlugin);
  hook::MonitorEvents& events = trainer.events();
  BoardReader reader(trainer.view());
  const Token communicator =
      events.OpenCommunicator({.hash = 7, .name = nullptr, .ranks = 4, .rank = 2, .nodes = 0});
  const auto enqueue = [&](abi::OperationKind kind, uint32_t peer = abi::kNoPeer) {
    const Token operation =
        events.BeginOperation(communicator, {.kind = kind, .bytes = 8, .peer = peer});
    events.EndOperation(operation);
    return operation;
  };
  const auto counts = [&](OperationKind kind) {
    return Of(reader.Read(trainer.now()).communicators.at(0), kind);
  };
  const auto transfer = [&](Token operation, bool over) {
    const Token moved = events.BeginTransfer(communicator, operation,
                                             {.channel = 0, .peer = 3, .steps = 1, .send = true});
    if (over) events.EndTransfer(moved);
  };
  enqueue(abi::OperationKind::kAllReduce);
  enqueue(abi::OperationKind::kAllGather);
  EXPECT_EQ(counts(OperationKind::kAllReduce), (OperationCounts{1, 1, 1}));
  EXPECT_EQ(counts(OperationKind::kAllGather), (OperationCounts{1, 1, 1}));
  EXPECT_EQ(reader.Read(trainer.now()).communicators.at(0).open_us, 0u);
  // The third one is visible: those before it run before it.
  const Token third = enqueue(abi::OperationKind::kAllReduce);
  transfer(third, false);
  EXPECT_EQ(counts(OperationKind::kAllReduce), (OperationCounts{2, 1, 0}));
  transfer(enqueue(abi::OperationKind::kAllGather), true);
  EXPECT_EQ(counts(OperationKind::kAllReduce), (OperationCounts{2, 2, 2}));
  EXPECT_EQ(counts(OperationKind::kAllGather), (OperationCounts{2, 2, 2}));
  EXPECT_EQ(monitor::Total(reader.Read(trainer.now()).communicators.at(0)).finished, 4u);
  // Point to point by peer: with 1 nothing was ever visible, with 3 it was.
  enqueue(abi::OperationKind::kSend, 1);
  enqueue(abi::OperationKind::kSend, 1);
  EXPECT_EQ(counts(OperationKind::kSend), (OperationCounts{2, 2, 2}));
  transfer(enqueue(abi::OperationKind::kSend, 3), true);
  enqueue(abi::OperationKind::kSend, 3);
  EXPECT_EQ(counts(OperationKind::kSend), (OperationCounts{4, 3, 3}));
  enqueue(abi::OperationKind::kReceive, 3);
  EXPECT_EQ(counts(OperationKind::kReceive), (OperationCounts{1, 1, 1}));
}

// What the hook API is told is all that there is: what was not ended is open, whatever came later.
TEST_F(BoardReaderTest, OperationsOfTheHookApiAreOverWhenTheyAreEnded) {
  const Token communicator = Open();
  trainer_.events().StartOperation(Enqueue(communicator, abi::OperationKind::kAllReduce));
  trainer_.events().FinishOperation(Enqueue(communicator, abi::OperationKind::kAllReduce));
  EXPECT_EQ(Of(ReadOne(), OperationKind::kAllReduce), (OperationCounts{2, 2, 1}));
}

TEST_F(BoardReaderTest, ConnectionsServedForOthersAreToldByTheirToken) {
  TrainerBoard owner(Rank2(), abi::BoardWriter::kProfilerPlugin);
  TrainerBoard server(Rank2(), abi::BoardWriter::kProfilerPlugin);
  const Token communicator = owner.events().OpenCommunicator(
      {.hash = 7, .name = nullptr, .ranks = 4, .rank = 2, .nodes = 0});
  const Token foreign = communicator ^ uint64_t { 1 } << hook::kTokenTagShift;  // another process's
  server.events().BeginTransfer(foreign, 0, {.channel = 1, .peer = 3, .steps = 1, .send = true});
  BoardReader reader(server.view());
  const BoardReport report = reader.Read(server.now());
  EXPECT_THAT(report.communicators, IsEmpty());
  ASSERT_THAT(report.foreign, SizeIs(1));
  EXPECT_EQ(report.foreign[0].token, foreign);
  ASSERT_THAT(report.foreign[0].connections, SizeIs(1));
  EXPECT_EQ(report.foreign[0].connections[0].peer, 3u);
  EXPECT_EQ(report.foreign[0].connections[0].operation, 0u);
}

TEST_F(BoardReaderTest, EmptySlotsAreLookedAtOnlyWhenOneWasTaken) {
  const Token communicator = Open();
  Read();
  const uint64_t scans = reader_.scan_count();
  for (int i = 0; i < 5; ++i) Read();
  EXPECT_EQ(reader_.scan_count(), scans);
  const Token transfer = trainer_.events().BeginTransfer(
      communicator, 0, {.channel = 0, .peer = 1, .steps = 1, .send = true});
  EXPECT_THAT(ReadOne().connections, SizeIs(1));
  EXPECT_EQ(reader_.scan_count(), scans + 1);
  trainer_.events().EndTransfer(transfer);
  trainer_.events().BeginTransfer(communicator, 0,
                                  {.channel = 0, .peer = 1, .steps = 1, .send = true});
  EXPECT_THAT(ReadOne().connections, SizeIs(1));
  EXPECT_EQ(reader_.scan_count(), scans + 1);
  EXPECT_EQ(reader_.slot_count(), 1u);
}

// A writer that was stopped in the middle of a change never ends it: what was read before it holds.
TEST_F(BoardReaderTest, OfATornSlotTheLastReadingIsTold) {
  const Token communicator = Open();
  const Token transfer = trainer_.events().BeginTransfer(
      communicator, 0, {.channel = 0, .peer = 1, .steps = 7, .send = true});
  trainer_.events().TransferInProgress(transfer);
  ASSERT_THAT(ReadOne().connections, SizeIs(1));
  abi::Slot& slot = SlotOf(trainer_.board().FindSlot(0, 0, 1, abi::SlotDirection::kSend));
  slot.head.store(slot.head.load() | 1, kRelease);
  slot.steps.store(uint64_t{99} << 32, kRelease);
  const CommunicatorReport torn = ReadOne();
  ASSERT_THAT(torn.connections, SizeIs(1));
  EXPECT_EQ(torn.connections[0].state, monitor::WaitState::kBetweenSteps);
  EXPECT_EQ(torn.connections[0].steps_total, 7u);
  // Torn from the first: nothing is known of it.
  BoardReader late(trainer_.view());
  EXPECT_THAT(late.Read(trainer_.now()).communicators.at(0).connections, IsEmpty());
}

TEST_F(BoardReaderTest, WhatCannotBeIsLeftOut) {
  const Token communicator = Open(1, 4, 2);
  trainer_.events().BeginTransfer(communicator, 0,
                                  {.channel = 0, .peer = 4, .steps = 1, .send = true});
  EXPECT_THAT(ReadOne().connections, IsEmpty()) << "a peer that is not in it";
  abi::Communicator& place = trainer_.board().communicator(0);
  place.rank.store(4, kRelease);
  EXPECT_THAT(Read().communicators, IsEmpty()) << "rank 4 of 4";
  place.rank.store(2, kRelease);
  place.ranks.store(BoardReader::kCommunicatorRanksMax + 1, kRelease);
  EXPECT_THAT(Read().communicators, IsEmpty()) << "more ranks than there are";
  place.ranks.store(4, kRelease);
  place.kind_finished[1].store(50, kRelease);
  place.kind_started[1].store(40, kRelease);
  EXPECT_EQ(Of(ReadOne(), OperationKind::kAllReduce), OperationCounts{}) << "never enqueued";
}

TEST_F(BoardReaderTest, DropsAreCountedButForWhatCameTooLate) {
  for (uint32_t cause = 0; cause < 10; ++cause) {
    trainer_.board().CountDrop(static_cast<abi::Drop>(cause));
  }
  EXPECT_EQ(Read().drops, 9u);
}

TEST_F(BoardReaderTest, ThreadsThatMoveTransfersAreTold) {
  const Token communicator = Open();
  trainer_.events().BeginProxyThread(communicator);
  EXPECT_THAT(Read().proxy_threads, ElementsAre(static_cast<uint32_t>(gettid())));
}

// Goal: whatever a process writes, what is read of it keeps the summary's limits.
// Method: random words over the whole board, then over its parts with the others whole.
TEST_F(BoardReaderTest, AnyBytesGiveAReportWithinTheLimits) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937_64 random(seed);
  const Token communicator = Open();
  trainer_.events().BeginTransfer(communicator, 0,
                                  {.channel = 0, .peer = 1, .steps = 1, .send = true});
  const auto* const header = trainer_.view().header;
  auto* const data = const_cast<std::byte*>(trainer_.board().data());
  const std::pair<uint64_t, uint64_t> parts[] = {
      {1024, sizeof(abi::BoardHeader)},
      {header->communicators_offset, header->keys_offset},
      {header->keys_offset, header->slots_offset},
      {header->slots_offset, header->rings_offset},
      {1024, abi::kBoardBytes}};
  size_t connections = 0;
  for (int round = 0; round < 10; ++round) {
    const auto [begin, end] = parts[round % 5];
    for (uint64_t at = begin; at + 8 <= end; at += 8) {
      const uint64_t word = random() % 2 == 0 ? random() % 8 : random();
      std::memcpy(data + at, &word, 8);
    }
    const BoardReport report = Read();
    EXPECT_LE(report.communicators.size(), monitor::kCommunicatorsMax);
    EXPECT_LE(report.proxy_threads.size(), BoardReader::kProxyThreadsMax);
    for (const CommunicatorReport& one : report.communicators) {
      EXPECT_LT(one.index, one.size);
      EXPECT_LE(one.size, BoardReader::kCommunicatorRanksMax);
      EXPECT_LE(one.connections.size(), monitor::kConnectionsMax);
      connections += one.connections.size();
      for (const ConnectionReport& connection : one.connections) {
        EXPECT_LT(static_cast<size_t>(connection.state), monitor::kWaitStates);
        EXPECT_LT(connection.peer, one.size);
      }
      for (const OperationCounts& counts : one.counts) {
        EXPECT_LE(counts.finished, counts.started);
        EXPECT_LE(counts.started, counts.enqueued);
      }
    }
  }
  EXPECT_GT(connections, 0u);
}

}  // namespace
}  // namespace holdfast
