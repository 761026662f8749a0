// The monitor's part of the hook API, in C and C++: what a communication library tells is what a
// reader of the board sees.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <string>
#include <utility>

#include "hook/abi/monitor_read.h"
#include "hook/holdfast.h"
#include "hook/holdfast.hpp"
#include "hook/process_monitor.h"

namespace {

using holdfast::hook::ProcessMonitor;
namespace abi = holdfast::abi;

abi::BoardView View() { return abi::ViewBoard(ProcessMonitor()->board().data(), abi::kBoardBytes); }

abi::CommunicatorReading Read(uint64_t communicator) {
  abi::CommunicatorReading reading;
  EXPECT_TRUE(
      abi::ReadCommunicator(View().communicators[holdfast::hook::PlaceOf(communicator)], &reading));
  return reading;
}

abi::SlotReading ReadConnection(uint64_t communicator, uint32_t peer,
                                abi::SlotDirection direction) {
  for (uint32_t i = 0; i < abi::kBoardSlots; ++i) {
    abi::SlotReading slot;
    if (abi::ReadSlot(View(), i, &slot) == abi::SlotRead::kRead &&
        slot.key.communicator == holdfast::hook::PlaceOf(communicator) && slot.key.peer == peer &&
        slot.key.direction == direction) {
      return slot;
    }
  }
  ADD_FAILURE() << "no slot";
  return {};
}

uint64_t OpenCommunicator(uint64_t id) {
  hf_communicator_options options = {};
  options.struct_bytes = sizeof(options);
  options.id = id;
  options.name = "data parallel";
  options.ranks = 4;
  options.rank = 2;
  return hf_monitor_communicator(&options);
}

int RunInChild(const std::function<void()>& body) {
  const pid_t pid = fork();
  if (pid == 0) {
    body();
    _exit(testing::Test::HasFailure() ? 1 : 0);
  }
  int status = 0;
  EXPECT_EQ(waitpid(pid, &status, 0), pid);
  return status;
}

TEST(MonitorApiTest, AnOperationIsEnqueuedStartedAndFinished) {
  const uint64_t communicator = OpenCommunicator(10);
  ASSERT_NE(communicator, 0u);
  EXPECT_EQ(Read(communicator).hash, 10u);
  EXPECT_STREQ(Read(communicator).name, "data parallel");
  const uint64_t operation = hf_operation_begin(communicator, HF_ALL_REDUCE, 4096, 0);
  EXPECT_EQ(Read(communicator).enqueued, 1u);
  EXPECT_EQ(Read(communicator).started, 0u);
  hf_operation_start(operation);
  hf_operation_start(operation);
  EXPECT_EQ(Read(communicator).started, 1u);
  EXPECT_EQ(Read(communicator).finished, 0u);
  hf_operation_end(operation);
  hf_operation_end(operation);
  EXPECT_EQ(Read(communicator).finished, 1u);
  // One that never said that it runs has run.
  hf_operation_end(hf_operation_begin(communicator, HF_BARRIER, 0, 0));
  EXPECT_EQ(Read(communicator).started, 2u);
  EXPECT_EQ(Read(communicator).finished, 2u);
  EXPECT_EQ(Read(communicator).kind_count[HF_BARRIER], 1u);
  hf_monitor_close(communicator);
  EXPECT_EQ(hf_operation_begin(communicator, HF_BARRIER, 0, 0), 0u);
}

// The number that a connection shows is the one that its other end shows, whatever else its ranks
// do in between: with other peers, or alone.
TEST(MonitorApiTest, AConnectionNumbersOperationsAsItsOtherEndDoes) {
  const uint64_t communicator = OpenCommunicator(14);
  struct Case {
    hf_operation kind;
    uint32_t peer;
    bool send;
    uint64_t number;
  };
  for (const Case& one : std::initializer_list<Case>{{HF_ALL_REDUCE, 3, true, 1},
                                                     {HF_SEND, 1, true, 1},
                                                     {HF_RECEIVE, 1, false, 1},
                                                     {HF_SEND, 3, true, 1},
                                                     {HF_ALL_GATHER, 3, true, 2},
                                                     {HF_SEND, 1, true, 2},
                                                     {HF_RECEIVE, 0, false, 1},
                                                     {HF_BARRIER, 1, false, 3}}) {
    const uint64_t operation = hf_operation_begin(communicator, one.kind, 8, one.peer);
    const uint64_t transfer =
        hf_transfer_begin(communicator, operation, 0, one.peer, one.send ? 1 : 0, 1);
    const auto direction = one.send ? abi::SlotDirection::kSend : abi::SlotDirection::kReceive;
    EXPECT_EQ(ReadConnection(communicator, one.peer, direction).operation, one.number);
    hf_transfer_end(transfer);
    hf_operation_end(operation);
  }
  const abi::CommunicatorReading reading = Read(communicator);
  EXPECT_EQ(reading.enqueued, 8u);
  EXPECT_EQ(reading.collectives, 3u);
  EXPECT_EQ(reading.last_collective_finished, 3u);
  for (const auto& [kind, count] :
       {std::pair{HF_ALL_REDUCE, 1u}, {HF_SEND, 3u}, {HF_RECEIVE, 2u}}) {
    EXPECT_EQ(reading.kind_count[kind], count);
    EXPECT_EQ(reading.kind_started[kind], count);
    EXPECT_EQ(reading.kind_finished[kind], count);
  }
}

// Operations overlap: the time counts once, from the first one's start to the last one's end.
TEST(MonitorApiTest, TheTimeInWhichAnOperationRunsIsCounted) {
  const uint64_t communicator = OpenCommunicator(15);
  EXPECT_EQ(Read(communicator).running_since, 0u);
  const uint64_t first = hf_operation_begin(communicator, HF_ALL_REDUCE, 8, 0);
  EXPECT_EQ(Read(communicator).running_since, 0u);  // enqueued only
  hf_operation_start(first);
  const uint64_t since = Read(communicator).running_since;
  EXPECT_EQ(since, Read(communicator).started_ticks);
  const uint64_t second = hf_operation_begin(communicator, HF_ALL_REDUCE, 8, 0);
  hf_operation_start(second);
  hf_operation_end(first);
  EXPECT_EQ(Read(communicator).running_since, since);
  EXPECT_EQ(Read(communicator).running_ticks, 0u);
  hf_operation_end(second);
  EXPECT_EQ(Read(communicator).running_since, 0u);
  EXPECT_EQ(Read(communicator).running_ticks, Read(communicator).finished_ticks - since);
}

TEST(MonitorApiTest, TheThreadThatMovesTheTransfersIsNamed) {
  const uint64_t communicator = OpenCommunicator(16);
  hf_monitor_thread(communicator);
  hf_monitor_thread(0);
  const abi::SlotReading thread =
      ReadConnection(communicator, abi::kNoPeer, abi::SlotDirection::kProxyThread);
  EXPECT_EQ(thread.bytes, static_cast<uint64_t>(gettid()));
  EXPECT_EQ(thread.state, abi::WaitState::kProxyActive);
}

TEST(MonitorApiTest, ANewConnectionIsCounted) {
  const uint64_t communicator = OpenCommunicator(17);
  const auto taken = [] { return View().header->slots_taken.load(); };
  const uint64_t before = taken();
  hf_transfer_end(hf_transfer_begin(communicator, 0, 0, 1, 1, 1));
  EXPECT_EQ(taken(), before + 1);
  hf_transfer_end(hf_transfer_begin(communicator, 0, 0, 1, 1, 1));
  EXPECT_EQ(taken(), before + 1);
  hf_transfer_end(hf_transfer_begin(communicator, 0, 0, 1, 0, 1));
  EXPECT_EQ(taken(), before + 2);
}

TEST(MonitorApiTest, EveryWaitOfATransferIsShown) {
  const uint64_t communicator = OpenCommunicator(11);
  const uint64_t operation = hf_operation_begin(communicator, HF_ALL_GATHER, 100, 0);
  const uint64_t send = hf_transfer_begin(communicator, operation, 0, 3, 1, 2);
  const uint64_t receive = hf_transfer_begin(communicator, operation, 0, 1, 0, 2);
  EXPECT_EQ(Read(communicator).started, 1u);
  uint64_t step = hf_step_begin(send, 0);
  for (const hf_wait wait : {HF_WAIT_SEND_LOCAL, HF_WAIT_SEND_PEER, HF_WAIT_SEND_WIRE}) {
    hf_step_wait(step, wait, 50);
    const abi::SlotReading slot = ReadConnection(communicator, 3, abi::SlotDirection::kSend);
    EXPECT_EQ(static_cast<int>(slot.state), wait);
    EXPECT_EQ(slot.operation, 1u);
    EXPECT_EQ(slot.steps_total, 2u);
  }
  hf_step_wait(step, HF_WAIT_RECEIVE_PEER, 50);  // of the other direction
  hf_step_wait(step, 99, 50);
  hf_step_end(step);
  EXPECT_EQ(ReadConnection(communicator, 3, abi::SlotDirection::kSend).bytes, 50u);
  EXPECT_EQ(ReadConnection(communicator, 3, abi::SlotDirection::kSend).steps_done, 1u);
  step = hf_step_begin(receive, 0);
  for (const hf_wait wait : {HF_WAIT_RECEIVE_PEER, HF_WAIT_RECEIVE_FLUSH, HF_WAIT_RECEIVE_LOCAL}) {
    hf_step_wait(step, wait, 50);
    EXPECT_EQ(static_cast<int>(ReadConnection(communicator, 1, abi::SlotDirection::kReceive).state),
              wait);
  }
  hf_step_end(step);
  hf_operation_end(operation);
  EXPECT_EQ(Read(communicator).finished, 0u);  // its transfers are not over
  hf_transfer_end(send);
  hf_transfer_end(receive);
  EXPECT_EQ(Read(communicator).finished, 1u);
  hf_monitor_close(communicator);
}

TEST(MonitorApiTest, IdsThatAreNoneAreIgnored) {
  hf_communicator_options options = {};
  EXPECT_EQ(hf_monitor_communicator(nullptr), 0u);
  EXPECT_EQ(hf_monitor_communicator(&options), 0u);  // struct_bytes
  const uint64_t communicator = OpenCommunicator(12);
  for (const uint64_t id : {uint64_t{0}, uint64_t{1}, UINT64_MAX, communicator, communicator + 1}) {
    hf_operation_start(id);
    hf_operation_end(id);
    hf_transfer_end(id);
    hf_step_wait(id, HF_WAIT_SEND_PEER, 1);
    hf_step_end(id);
    EXPECT_EQ(hf_step_begin(id, 0), 0u);
  }
  EXPECT_EQ(hf_operation_begin(0, HF_BARRIER, 0, 0), 0u);
  EXPECT_EQ(hf_transfer_begin(0, 0, 0, 1, 1, 1), 0u);
  EXPECT_EQ(hf_transfer_begin(communicator, 0, 255, 1, 1, 1), 0u);
  EXPECT_EQ(hf_transfer_begin(communicator, 0, 0, UINT32_MAX, 1, 1), 0u);
  EXPECT_EQ(Read(communicator).enqueued, 0u);
  hf_monitor_close(communicator);
}

TEST(MonitorApiTest, StepsAndSectionsAreShownWithoutAJob) {
  hf_heartbeat(nullptr, 17);
  EXPECT_EQ(View().header->step.load(), 17u);
  hf_section_begin(nullptr, "forward");
  hf_section_begin(nullptr, "all-reduce");
  EXPECT_EQ(View().header->section_depth.load(), 2u);
  char name[abi::kBoardSectionNameBytes];
  std::memcpy(name, View().header->section_names[1], sizeof(name));
  EXPECT_STREQ(name, "all-reduce");
  for (int i = 0; i < 3; ++i) hf_section_end(nullptr);
  EXPECT_EQ(View().header->section_depth.load(), 0u);
}

TEST(MonitorApiTest, TheWrapperClosesWhatItOpens) {
  uint64_t communicator = 0;
  {
    holdfast::Communicator opened(13, "wrapped", 8, 5);
    communicator = opened.id();
    {
      holdfast::Operation operation(opened, HF_REDUCE_SCATTER, 64);
      operation.Start();
      holdfast::Transfer transfer(opened, operation, 1, 6, holdfast::Transfer::Direction::kSend, 1);
      const uint64_t step = transfer.BeginStep(0);
      hf_step_wait(step, HF_WAIT_SEND_WIRE, 64);
      EXPECT_EQ(ReadConnection(communicator, 6, abi::SlotDirection::kSend).state,
                abi::WaitState::kSendWait);
      hf_step_end(step);
    }
    EXPECT_EQ(Read(communicator).finished, 1u);
    EXPECT_EQ(Read(communicator).rank, 5u);
  }
  EXPECT_EQ(Read(communicator).state, abi::CommunicatorState::kClosed);
}

TEST(MonitorApiTest, AForkedChildHasNoneUntilItMakesItsOwn) {
  const uint64_t communicator = OpenCommunicator(14);
  EXPECT_EQ(RunInChild([&] {
              EXPECT_EQ(hf_operation_begin(communicator, HF_BARRIER, 0, 0), 0u);
              hf_monitor_close(communicator);
              const uint64_t own = OpenCommunicator(15);
              EXPECT_NE(own, 0u);
              EXPECT_NE(own, communicator);
              EXPECT_EQ(View().header->process_id, static_cast<uint32_t>(getpid()));
            }),
            0);
  EXPECT_EQ(Read(communicator).state, abi::CommunicatorState::kOpen);
  hf_monitor_close(communicator);
}

TEST(MonitorApiTest, OffIsNothing) {
  EXPECT_EQ(RunInChild([] {
              setenv("HOLDFAST_MONITOR", "off", 1);
              EXPECT_EQ(OpenCommunicator(16), 0u);
              hf_heartbeat(nullptr, 1);
              EXPECT_EQ(ProcessMonitor(), nullptr);
            }),
            0);
}

}  // namespace
