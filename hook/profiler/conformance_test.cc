// What a plugin must stand, enumerated: everything that NCCL is known to do to one (the header of
// plugin.cc), in every version of the interface, on a board that is read from outside. Limits,
// processes, threads and levels are in limits_test.cc.
#include <gtest/gtest.h>
#include <unistd.h>

#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "hook/profiler/board_testing.h"
#include "hook/profiler/events_testing.h"
#include "hook/profiler/nccl_driver_testing.h"

namespace holdfast::profiler {
namespace {

using abi::Drop;
using abi::SlotDirection;
using abi::WaitState;

class ConformanceTest : public testing::TestWithParam<int> {
 protected:
  Library library_{HOLDFAST_TEST_PLUGIN, GetParam()};
};
INSTANTIATE_TEST_SUITE_P(Versions, ConformanceTest, testing::ValuesIn(kVersions));

// ---- The ordinary

TEST_P(ConformanceTest, AsksForWhatLightShowsAndOnlyForWhatTheVersionKnows) {
  EXPECT_STREQ(library_.name(), "Holdfast");
  Fixture fixture(library_);
  const uint64_t light = kColl | kP2p | kProxyOp | kProxyStep | kProxyCtrl | kCeColl;
  EXPECT_EQ(static_cast<uint64_t>(library_.mask().load()), light & KnownEvents(GetParam()));
  EXPECT_EQ(light & KnownEvents(GetParam()) & kCeColl, GetParam() >= 6 ? kCeColl : 0u);
  const abi::CommunicatorReading reading = fixture.reading();
  EXPECT_EQ(reading.hash, fixture.id());
  EXPECT_STREQ(reading.name, "a communicator");
  EXPECT_EQ(reading.ranks, 2u);
  EXPECT_EQ(reading.rank, 0u);
  EXPECT_EQ(reading.nodes, 2u);
  EXPECT_EQ(reading.token, reinterpret_cast<uint64_t>(fixture.context()));
}

TEST_P(ConformanceTest, CountsOperationsOfACleanJobWithoutADrop) {
  Job job(library_, {.id = NewId()});
  const auto before = MappedBoard::Find(getpid());
  std::vector<uint64_t> drops;
  for (uint32_t i = 0; i < abi::kDropCauses; ++i) drops.push_back(before->view().header->drops[i]);
  for (int round = 0; round < 5; ++round) {
    job.EnqueueAll();
    job.EnqueueAll();
    ASSERT_TRUE(job.RunUntilNothingMoves());
  }
  for (uint32_t rank = 0; rank < 4; ++rank) {
    const auto index = before->FindCommunicator(job.options().id, rank);
    ASSERT_TRUE(index.has_value());
    const abi::CommunicatorReading reading = before->communicator(*index);
    EXPECT_EQ(reading.enqueued, 10u);
    EXPECT_EQ(reading.started, 10u);
    EXPECT_EQ(reading.finished, 10u);
    EXPECT_EQ(reading.last_finished, 10u);
    EXPECT_EQ(reading.api_calls, GetParam() >= 5 ? 10u : 0u);
    EXPECT_EQ(reading.kind_nccl_sequence[1], 10u);
    int connections = 0;
    for (const abi::SlotReading& slot : before->SlotsOf(*index)) {
      if (slot.key.direction > SlotDirection::kReceive) continue;
      ++connections;
      EXPECT_EQ(slot.state, WaitState::kNone);
      EXPECT_EQ(slot.operation, 10u);
      EXPECT_EQ(slot.steps_done, 12u);
      EXPECT_EQ(slot.steps_total, 12u);
      EXPECT_EQ(slot.bytes, 10u * 12 * (4'000'000 / 12));
      EXPECT_EQ(slot.kind, abi::OperationKind::kAllReduce);
      const bool send = slot.key.direction == SlotDirection::kSend;
      EXPECT_EQ(slot.key.peer, send ? (rank + 1) % 4 : (rank + 3) % 4);
      EXPECT_GT(slot.waited[0] + slot.waited[1] + slot.waited[2], 0u);
    }
    EXPECT_EQ(connections, 4);
  }
  for (uint32_t i = 0; i < abi::kDropCauses; ++i) {
    EXPECT_EQ(before->view().header->drops[i], drops[i]) << "drop cause " << i;
  }
}

TEST_P(ConformanceTest, AnOperationIsFinishedWhenItsLastPartIsNotWhenItIsStopped) {
  Fixture fixture(library_);
  void* coll = fixture.StartColl();
  EXPECT_EQ(fixture.reading().enqueued, 1u);
  library_.Stop(coll);
  EXPECT_EQ(fixture.reading().started, 0u);
  EXPECT_EQ(fixture.reading().finished, 0u);
  void* send = fixture.StartOp(coll, true);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).state, WaitState::kQueued);
  EXPECT_EQ(fixture.reading().started, 1u);
  void* receive = fixture.StartOp(coll, false);
  library_.Record(send, kStateProxyOpInProgress, nullptr);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).state, WaitState::kBetweenSteps);
  library_.Stop(send);
  EXPECT_EQ(fixture.reading().finished, 0u);
  library_.Stop(receive);
  EXPECT_EQ(fixture.reading().finished, 1u);
  // NCCL gives the proxy more of it, after all.
  void* late = fixture.StartOp(coll, true, 1);
  EXPECT_EQ(fixture.reading().finished, 0u);
  EXPECT_EQ(fixture.reading().last_finished, 0u);
  library_.Stop(late);
  EXPECT_EQ(fixture.reading().finished, 1u);
  EXPECT_EQ(fixture.reading().started, 1u);
}

TEST_P(ConformanceTest, EveryWaitStateOfASendAndAReceiveIsShown) {
  Fixture fixture(library_);
  void* coll = fixture.StartColl();
  void* send = fixture.StartOp(coll, true);
  void* receive = fixture.StartOp(coll, false);
  void* step = fixture.StartStep(send, 0);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).state, WaitState::kSendGpuWait);
  for (const auto& [state, expected] : {std::pair{kStateSendGpuWait, WaitState::kSendGpuWait},
                                        {kStateSendPeerWait, WaitState::kSendPeerWait},
                                        {kStateSendWait, WaitState::kSendWait}}) {
    RecordBytes(library_, step, state, 1000);
    EXPECT_EQ(fixture.Slot(SlotDirection::kSend).state, expected);
  }
  library_.Stop(step);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).steps_done, 1u);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).bytes, 1000u);
  step = fixture.StartStep(receive, 0);
  EXPECT_EQ(fixture.Slot(SlotDirection::kReceive).state, WaitState::kReceiveWait);
  for (const auto& [state, expected] : {std::pair{kStateReceiveWait, WaitState::kReceiveWait},
                                        {kStateReceiveFlushWait, WaitState::kReceiveFlushWait},
                                        {kStateReceiveGpuWait, WaitState::kReceiveGpuWait}}) {
    RecordBytes(library_, step, state, 500);
    EXPECT_EQ(fixture.Slot(SlotDirection::kReceive).state, expected);
  }
  library_.Stop(step);
  EXPECT_EQ(fixture.Slot(SlotDirection::kReceive).bytes, 500u);
  EXPECT_EQ(fixture.Slot(SlotDirection::kReceive).state, WaitState::kBetweenSteps);
}

// Of the open steps the oldest counts, whatever the others do; in the end all are counted.
TEST_P(ConformanceTest, TheOldestOpenStepIsShown) {
  Fixture fixture(library_);
  void* send = fixture.StartOp(fixture.StartColl(), true);
  std::vector<void*> steps;
  for (int i = 0; i < 4; ++i) steps.push_back(fixture.StartStep(send, i));
  const uint64_t since = fixture.Slot(SlotDirection::kSend).since;
  for (int i = 1; i < 4; ++i) {
    RecordBytes(library_, steps[static_cast<size_t>(i)], kStateSendPeerWait, 0);
  }
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).state, WaitState::kSendGpuWait);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).since, since);
  RecordBytes(library_, steps[0], kStateSendWait, 10);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).state, WaitState::kSendWait);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).open_steps, 4u);
  library_.Stop(steps[0]);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).state, WaitState::kSendPeerWait);
  library_.Stop(steps[1]);
  library_.Stop(steps[2]);
  library_.Stop(steps[3]);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).steps_done, 4u);
}

// NCCL gives the proxy the next operation of a connection while the last one still runs.
TEST_P(ConformanceTest, AnOperationThatIsQueuedDoesNotHideTheOneThatRuns) {
  Fixture fixture(library_);
  void* first = fixture.StartOp(fixture.StartColl(), true);
  library_.Record(first, kStateProxyOpInProgress, nullptr);
  void* step = fixture.StartStep(first, 0);
  RecordBytes(library_, step, kStateSendPeerWait, 0);
  void* second = fixture.StartOp(fixture.StartColl(), true);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).state, WaitState::kSendPeerWait);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).operation, 1u);
  library_.Stop(step);
  library_.Stop(first);
  library_.Record(second, kStateProxyOpInProgress, nullptr);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).operation, 2u);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).state, WaitState::kBetweenSteps);
}

TEST_P(ConformanceTest, PointToPointIsCountedByPeerAndDirection) {
  Fixture fixture(library_);
  for (int round = 0; round < 3; ++round) {
    void* send = library_.Start(fixture.context(),
                                {.type = kP2p, .function = "Send", .count = 10, .peer = 1});
    library_.Stop(send);
    if (round == 2) break;
    library_.Stop(fixture.StartOp(send, true));
  }
  void* receive =
      library_.Start(fixture.context(), {.type = kP2p, .function = "Recv", .count = 10, .peer = 1});
  library_.Stop(receive);
  const auto slot =
      fixture.board().FindSlot(fixture.index(), abi::kNoChannel, 1, SlotDirection::kPeerSends);
  ASSERT_TRUE(slot.has_value());
  EXPECT_EQ(slot->operation, 3u);
  EXPECT_EQ(slot->steps_total, 2u);
  EXPECT_EQ(slot->steps_done, 2u);
  EXPECT_EQ(slot->bytes, 3u * 40);
  EXPECT_TRUE(fixture.board()
                  .FindSlot(fixture.index(), abi::kNoChannel, 1, SlotDirection::kPeerReceives)
                  .has_value());
  EXPECT_EQ(fixture.reading().kind_count[static_cast<int>(abi::OperationKind::kSend)], 3u);
  EXPECT_EQ(fixture.reading().kind_count[static_cast<int>(abi::OperationKind::kReceive)], 1u);
  EXPECT_EQ(fixture.reading().kind_nccl_sequence[static_cast<int>(abi::OperationKind::kSend)], 0u);
}

// A graph that is replayed calls with the sequence number of its capture: ours goes on.
TEST_P(ConformanceTest, OperationsAreNumberedThoughNcclsNumberStandsStill) {
  Fixture fixture(library_);
  for (int i = 0; i < 5; ++i) library_.Stop(fixture.StartColl());
  EXPECT_EQ(fixture.reading().enqueued, 5u);
  EXPECT_EQ(fixture.reading().kind_nccl_sequence[1], 8u);
  abi::OperationReading operation;
  ASSERT_TRUE(abi::ReadRecentOperation(fixture.board().view().communicators[fixture.index()], 5,
                                       &operation));
  EXPECT_EQ(operation.kind, abi::OperationKind::kAllReduce);
  EXPECT_EQ(operation.bytes, 400u);
  EXPECT_FALSE(abi::ReadRecentOperation(fixture.board().view().communicators[fixture.index()], 6,
                                        &operation));
}

// ---- What is not as one would expect

TEST_P(ConformanceTest, NullsAndStrangersAreCountedAndHarmless) {
  Fixture fixture(library_);
  const uint64_t unknown = fixture.board().dropped(Drop::kUnknownContext);
  const uint64_t stale = fixture.board().dropped(Drop::kStale);
  // No context, and one that is a pointer of somebody else's.
  int stranger = 0;
  EXPECT_EQ(library_.Start(nullptr, {.type = kProxyOp, .proxy_op = MakeProxyOp(true)}), nullptr);
  EXPECT_EQ(library_.Start(&stranger, {.type = kProxyOp, .proxy_op = MakeProxyOp(true)}), nullptr);
  EXPECT_EQ(fixture.board().dropped(Drop::kUnknownContext), unknown + 2);
  // Parents that are NULL or not ours.
  void* op = fixture.StartOp(nullptr, true);
  ASSERT_NE(op, nullptr);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).operation, 0u);
  EXPECT_EQ(fixture.StartStep(nullptr, 0), nullptr);
  EXPECT_EQ(fixture.StartStep(&stranger, 0), nullptr);
  // Arguments that are NULL, for every kind of handle and every state.
  void* coll = fixture.StartColl();
  void* step = fixture.StartStep(op, 0);
  void* kernel =
      library_.Start(fixture.context(), {.type = kKernelCh, .parent = coll, .channel = 0});
  void* control = library_.Start(fixture.context(), {.type = kProxyCtrl});
  for (void* handle : {coll, op, step, kernel, control, static_cast<void*>(&stranger)}) {
    for (int state = 0; state < 40; ++state) library_.Record(handle, state, nullptr);
  }
  for (void* handle : {step, op, kernel, control, coll, static_cast<void*>(&stranger)}) {
    library_.Stop(handle);
    library_.Stop(handle);
  }
  EXPECT_GT(fixture.board().dropped(Drop::kStale), stale);
  EXPECT_EQ(fixture.reading().finished, 1u);
}

TEST_P(ConformanceTest, WhatComesAfterTheStopIsStaleAndChangesNothing) {
  Fixture fixture(library_);
  void* coll = fixture.StartColl();
  void* op = fixture.StartOp(coll, true);
  void* step = fixture.StartStep(op, 0);
  RecordBytes(library_, step, kStateSendWait, 100);
  library_.Stop(step);
  library_.Stop(op);
  library_.Stop(coll);
  const abi::SlotReading before = fixture.Slot(SlotDirection::kSend);
  const uint64_t stale = fixture.board().dropped(Drop::kStale);
  RecordBytes(library_, step, kStateSendGpuWait, 100);
  RecordBytes(library_, op, kStateProxyOpInProgress, 0);
  library_.Stop(step);
  library_.Stop(op);
  library_.Stop(coll);
  EXPECT_EQ(fixture.StartStep(op, 1), nullptr);
  EXPECT_EQ(fixture.board().dropped(Drop::kStale), stale + 6);
  const abi::SlotReading after = fixture.Slot(SlotDirection::kSend);
  EXPECT_EQ(after.state, WaitState::kNone);
  EXPECT_EQ(after.since, before.since);
  EXPECT_EQ(after.bytes, 100u);
  EXPECT_EQ(fixture.reading().finished, 1u);
}

// The place of an old handle has a new owner: the old one must not be taken for it.
TEST_P(ConformanceTest, AHandleOfAnEarlierOwnerOfThePlaceIsStale) {
  Fixture fixture(library_);
  void* coll = fixture.StartColl();
  void* old_op = fixture.StartOp(coll, true);
  void* old_step = fixture.StartStep(old_op, 0);
  library_.Stop(old_step);
  library_.Stop(old_op);
  void* op = fixture.StartOp(coll, true);
  void* step = fixture.StartStep(op, 0);
  ASSERT_NE(op, old_op);
  ASSERT_NE(step, old_step);
  RecordBytes(library_, old_step, kStateSendWait, 1);
  library_.Stop(old_step);
  library_.Stop(old_op);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).state, WaitState::kSendGpuWait);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).open_steps, 1u);
}

TEST_P(ConformanceTest, StepsMayBeUnpaired) {
  Fixture fixture(library_);
  void* op = fixture.StartOp(fixture.StartColl(), true);
  // None of these is ever stopped; NCCL goes on with later ones.
  for (int step = 0; step < 100; ++step) {
    void* handle = fixture.StartStep(op, step);
    ASSERT_NE(handle, nullptr);
    if (step % 10 == 9) RecordBytes(library_, handle, kStateSendWait, 1);
  }
  EXPECT_NE(fixture.Slot(SlotDirection::kSend).state, WaitState::kNone);
  library_.Stop(op);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).state, WaitState::kNone);
}

TEST_P(ConformanceTest, CreditMissingAtEveryPollIsOneWait) {
  Fixture fixture(library_);
  void* op = fixture.StartOp(fixture.StartColl(), true);
  void* step = fixture.StartStep(op, 0);
  RecordBytes(library_, step, kStateSendPeerWait, 0);
  const abi::SlotReading first = fixture.Slot(SlotDirection::kSend);
  for (int poll = 0; poll < 10000; ++poll) RecordBytes(library_, step, kStateSendPeerWait, 0);
  const abi::SlotReading last = fixture.Slot(SlotDirection::kSend);
  EXPECT_EQ(last.state, WaitState::kSendPeerWait);
  EXPECT_EQ(last.since, first.since);
  EXPECT_EQ(last.waited[1], 0u);
  RecordBytes(library_, step, kStateSendWait, 7);
  EXPECT_GT(fixture.Slot(SlotDirection::kSend).waited[1], 0u);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).bytes, 7u);
}

TEST_P(ConformanceTest, AKernelWithoutEndEndsWithTheNextOnItsChannel) {
  Fixture fixture(library_);
  void* first = fixture.StartColl();
  void* second = fixture.StartColl();
  library_.Stop(first);
  library_.Stop(second);
  // From another thread than the proxy's.
  std::thread([&] {
    library_.Start(fixture.context(),
                   {.type = kKernelCh, .parent = first, .channel = 3, .gpu_ns = 100});
  }).join();
  const auto running = [&] {
    return *fixture.board().FindSlot(fixture.index(), 3, abi::kNoPeer, SlotDirection::kKernel);
  };
  EXPECT_EQ(running().state, WaitState::kKernelRunning);
  EXPECT_EQ(running().operation, 1u);
  void* kernel = library_.Start(fixture.context(),
                                {.type = kKernelCh, .parent = second, .channel = 3, .gpu_ns = 500});
  EXPECT_EQ(running().operation, 2u);
  EXPECT_EQ(fixture.reading().finished, 1u);
  StateArguments arguments = {};
  arguments.kernel_ch.gpu_ns = 750;
  library_.Record(kernel, kStateKernelChStop, &arguments);
  EXPECT_EQ(running().state, WaitState::kNone);
  EXPECT_EQ(running().waited[0], 250u);
  library_.Stop(kernel);
  EXPECT_EQ(running().steps_done, 2u);
  EXPECT_EQ(fixture.reading().finished, 2u);
}

TEST_P(ConformanceTest, SixtyFourChannelsHaveTheirSlots) {
  Fixture fixture(library_);
  void* coll = fixture.StartColl();
  std::vector<void*> ops;
  for (int channel = 0; channel < 64; ++channel) {
    ops.push_back(fixture.StartOp(coll, true, channel));
    ops.push_back(fixture.StartOp(coll, false, channel));
    library_.Start(fixture.context(),
                   {.type = kKernelCh, .parent = coll, .channel = static_cast<uint8_t>(channel)});
  }
  EXPECT_EQ(fixture.board().SlotsOf(fixture.index()).size(), 192u);
  for (void* op : ops) EXPECT_NE(op, nullptr);
}

// Raised from outside (RAS), or of a later NCCL: every type gets a handle, so that its children
// come, and every child of such a handle is taken.
TEST_P(ConformanceTest, EveryTypeGetsAHandleWhateverTheMask) {
  Fixture fixture(library_);
  for (int bit = 0; bit < (GetParam() == 4 ? 8 : 20); ++bit) {
    const uint64_t type = uint64_t{1} << bit;
    if (type == kProxyStep) continue;
    void* handle = library_.Start(
        fixture.context(), {.type = type, .peer = 1, .proxy_op = MakeProxyOp(true), .channel = 1});
    EXPECT_NE(handle, nullptr) << bit;
    EXPECT_NE(fixture.StartOp(handle, true), nullptr) << bit;
    library_.Record(handle, 23, nullptr);
    library_.Stop(handle);
    library_.Stop(handle);
  }
}

TEST_P(ConformanceTest, AMaskLoweredInTheMiddleLeavesNothingOpenForGood) {
  Job job(library_, {.id = NewId()});
  const int own = library_.mask().load();
  job.EnqueueAll();
  for (int poll = 0; poll < 10; ++poll) {
    for (int rank = 0; rank < 4; ++rank) job.rank(rank).Progress();
  }
  library_.mask().store(0);
  job.EnqueueAll();  // not seen
  ASSERT_TRUE(job.RunUntilNothingMoves());
  library_.mask().store(own);
  job.EnqueueAll();
  ASSERT_TRUE(job.RunUntilNothingMoves());
  const auto board = MappedBoard::Find(getpid());
  for (uint32_t rank = 0; rank < 4; ++rank) {
    const auto reading = board->communicator(*board->FindCommunicator(job.options().id, rank));
    EXPECT_EQ(reading.enqueued, 2u);
    EXPECT_EQ(reading.finished, 2u);
  }
}

TEST_P(ConformanceTest, FinalizeWithOpenEventsAndLoadingAgain) {
  void* old_step = nullptr;
  void* old_op = nullptr;
  void* old_coll = nullptr;
  {
    Library first(HOLDFAST_TEST_PLUGIN, GetParam());
    Fixture fixture(first);
    old_coll = fixture.StartColl();
    old_op = fixture.StartOp(old_coll, true);
    old_step = fixture.StartStep(old_op, 0);
    fixture.Finalize();
    const abi::CommunicatorReading closed = fixture.reading();
    EXPECT_EQ(closed.state, abi::CommunicatorState::kClosed);
    EXPECT_EQ(closed.started, 1u);
    EXPECT_EQ(closed.finished, 0u);
  }
  Library second(HOLDFAST_TEST_PLUGIN, GetParam());
  Fixture fixture(second);
  // Late calls, also into the library as it was before it was closed.
  RecordBytes(second, old_step, kStateSendWait, 10);
  second.Stop(old_step);
  second.Stop(old_op);
  second.Stop(old_coll);
  EXPECT_EQ(MappedBoard::Count(getpid()), 1);
  void* op = fixture.StartOp(fixture.StartColl(), true);
  RecordBytes(second, old_step, kStateSendWait, 10);
  fixture.StartStep(op, 0);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).state, WaitState::kSendGpuWait);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).bytes, 0u);
}

// Another communicator has the place, and its connection the slot, of one that was finalized with
// open events: what comes late must not be written there.
TEST_P(ConformanceTest, LateEventsDoNotReachTheNextOwnerOfTheirSlot) {
  void* old_step = nullptr;
  uint32_t place = 0;
  {
    Fixture fixture(library_);
    place = fixture.index();
    old_step = fixture.StartStep(fixture.StartOp(fixture.StartColl(), true), 0);
  }
  for (uint32_t i = 0; i < abi::kBoardCommunicators; ++i) {
    Fixture fixture(library_);
    if (fixture.index() != place) continue;
    void* op = fixture.StartOp(fixture.StartColl(), true);
    fixture.StartStep(op, 0);
    const uint64_t since = fixture.Slot(SlotDirection::kSend).since;
    RecordBytes(library_, old_step, kStateSendWait, 10);
    library_.Stop(old_step);
    EXPECT_EQ(fixture.Slot(SlotDirection::kSend).state, WaitState::kSendGpuWait);
    EXPECT_EQ(fixture.Slot(SlotDirection::kSend).since, since);
    EXPECT_EQ(fixture.Slot(SlotDirection::kSend).bytes, 0u);
    return;
  }
  FAIL() << "the place was not given out again";
}

}  // namespace
}  // namespace holdfast::profiler
