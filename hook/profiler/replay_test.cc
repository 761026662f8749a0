// What NCCL 2.30.7 really called, given to the plugin again, and compared with what the driver
// calls.
//
// The streams lie beside the repository (../shared/fixtures/nccl): four jobs, two clean, one whose
// rank 2 stood still for 4 s inside every operation, one whose rank 1 was killed. Where they are
// absent these tests are skipped, and say so. Streams of the driver's own, in tests/data/nccl,
// prove the same everywhere.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "hook/profiler/board_testing.h"
#include "hook/profiler/call_order_testing.h"
#include "hook/profiler/nccl_driver_testing.h"
#include "hook/profiler/recorded_stream_testing.h"

namespace holdfast::profiler {
namespace {

using abi::SlotDirection;
using abi::WaitState;
using testing::ElementsAre;

uint64_t NewId() {
  static uint64_t last = 0xe0000;
  return ++last;
}

std::string Shared(const std::string& job) {
  return std::string(HOLDFAST_TEST_SHARED) + "/fixtures/nccl/" + job;
}

#define SKIP_WITHOUT(directory)                                                        \
  if (!std::filesystem::exists(directory)) {                                           \
    GTEST_SKIP() << "recorded streams are not here: " << (directory) << ": 1 skipped"; \
  }

std::vector<std::vector<RecordedCall>> ReadJob(const std::string& directory, int ranks) {
  std::vector<std::vector<RecordedCall>> streams;
  for (int rank = 0; rank < ranks; ++rank) {
    streams.push_back(ReadStream(directory + "/rank-" + std::to_string(rank) + ".jsonl"));
  }
  return streams;
}

// Where the first silence of more than 2 s begins, behind the first proxy operation.
size_t FirstSilence(const std::vector<RecordedCall>& stream) {
  bool running = false;
  for (size_t i = 0; i + 1 < stream.size(); ++i) {
    running = running || stream[i].event.type == kProxyOp;
    if (running && stream[i + 1].us - stream[i].us > 2e6) return i + 1;
  }
  return stream.size();
}

// The boards of all ranks after their streams were given up to `ends`, or to the end.
struct Replayed {
  std::unique_ptr<MappedBoard> board;
  std::vector<uint32_t> communicators;
  std::vector<RankWaits> waits;
};

Replayed ReplayJob(Library& library, const std::vector<std::vector<RecordedCall>>& streams,
                   const std::vector<size_t>& ends) {
  const uint64_t id = NewId();
  for (size_t rank = 0; rank < streams.size(); ++rank) {
    Replay replay(library, id, streams[rank]);
    replay.RunTo(ends[rank]);
  }
  Replayed replayed;
  replayed.board = MappedBoard::Find(getpid());
  EXPECT_NE(replayed.board, nullptr);
  for (uint32_t rank = 0; rank < streams.size(); ++rank) {
    const auto index = replayed.board->FindCommunicator(id, rank);
    EXPECT_TRUE(index.has_value()) << rank;
    replayed.communicators.push_back(index.value_or(0));
    replayed.waits.push_back(WaitsOf(*replayed.board, index.value_or(0)));
  }
  return replayed;
}

std::vector<size_t> ToTheEnd(const std::vector<std::vector<RecordedCall>>& streams) {
  std::vector<size_t> ends;
  for (const auto& stream : streams) ends.push_back(stream.size());
  return ends;
}

// All but finalize.
std::vector<size_t> BeforeFinalize(const std::vector<std::vector<RecordedCall>>& streams) {
  std::vector<size_t> ends;
  for (const auto& stream : streams) {
    ends.push_back(stream.back().call == "finalize" ? stream.size() - 1 : stream.size());
  }
  return ends;
}

void ExpectPeers(const RankWaits& waits, uint32_t peer) {
  EXPECT_FALSE(waits.peers.empty());
  for (const auto& [waited_for, state] : waits.peers) EXPECT_EQ(waited_for, peer);
}

// ---- The recorded jobs

TEST(ReplayTest, CleanJobsEndWithAllCountersEqualAndNobodyWaiting) {
  SKIP_WITHOUT(Shared("allreduce-4"));
  Library library(HOLDFAST_TEST_PLUGIN, 6);
  const auto before = MappedBoard::Find(getpid());
  for (const auto& [job, ranks, count, steps] :
       {std::tuple{"allreduce-2", 2, 4'000'000u, 8u}, {"allreduce-4", 4, 1'000'000u, 12u}}) {
    SCOPED_TRACE(job);
    const auto streams = ReadJob(Shared(job), ranks);
    const Replayed replayed = ReplayJob(library, streams, BeforeFinalize(streams));
    for (const uint32_t index : replayed.communicators) {
      const abi::CommunicatorReading reading = replayed.board->communicator(index);
      EXPECT_EQ(reading.enqueued, 3u);
      EXPECT_EQ(reading.started, 3u);
      EXPECT_EQ(reading.finished, 3u);
      EXPECT_EQ(reading.kind_count[static_cast<int>(abi::OperationKind::kAllReduce)], 3u);
      EXPECT_EQ(reading.kind_nccl_sequence[static_cast<int>(abi::OperationKind::kAllReduce)], 3u);
      EXPECT_EQ(reading.api_calls, 3u);
      EXPECT_EQ(reading.kernel_launches, 3u);
      abi::OperationReading last;
      ASSERT_TRUE(abi::ReadRecentOperation(replayed.board->view().communicators[index], 3, &last));
      EXPECT_EQ(last.bytes, count * 4);
      uint64_t sent = 0;
      for (const abi::SlotReading& slot : replayed.board->SlotsOf(index)) {
        if (slot.key.direction == SlotDirection::kProxyThread) continue;
        EXPECT_EQ(slot.state, WaitState::kNone);
        if (slot.key.direction == SlotDirection::kKernel) {
          EXPECT_EQ(slot.steps_done, 3u);
          EXPECT_GT(slot.waited[0], 0u);
          continue;
        }
        EXPECT_EQ(slot.steps_done, steps);
        EXPECT_EQ(slot.steps_total, steps);
        EXPECT_EQ(slot.operation, 3u);
        if (slot.key.direction == SlotDirection::kSend) sent += slot.bytes;
      }
      // A ring sends 2 (n - 1) / n of the data; sizes of slices are rounded up.
      const double expected = 3.0 * count * 4 * 2 * (ranks - 1) / ranks;
      EXPECT_NEAR(static_cast<double>(sent), expected, expected / 50);
    }
  }
  for (const abi::Drop cause : {abi::Drop::kStale, abi::Drop::kUnknownContext, abi::Drop::kSlots}) {
    const auto after = MappedBoard::Find(getpid());
    EXPECT_EQ(after->dropped(cause), before == nullptr ? 0 : before->dropped(cause));
  }
}

TEST(ReplayTest, InTheStalledJobTheBoardsNameRankTwo) {
  SKIP_WITHOUT(Shared("stall-4"));
  Library library(HOLDFAST_TEST_PLUGIN, 6);
  const auto streams = ReadJob(Shared("stall-4"), 4);
  std::vector<size_t> ends;
  for (const auto& stream : streams) {
    ends.push_back(FirstSilence(stream));
    ASSERT_LT(ends.back(), stream.size()) << "the stream has no stall";
  }
  const Replayed replayed = ReplayJob(library, streams, ends);
  EXPECT_THAT(Suspects(replayed.waits), ElementsAre(2u));
  // The innocent point along the ring to it; it waits for its own GPU.
  ExpectPeers(replayed.waits[3], 2);
  EXPECT_TRUE(replayed.waits[2].peers.empty());
  EXPECT_GT(replayed.waits[2].gpu, 0);
  for (const uint32_t index : replayed.communicators) {
    const abi::CommunicatorReading reading = replayed.board->communicator(index);
    EXPECT_EQ(reading.enqueued, 2u);
    EXPECT_EQ(reading.started, 2u);
    EXPECT_EQ(reading.finished, 1u);
  }
}

TEST(ReplayTest, InTheJobWithAKilledRankTheBoardsNameRankOne) {
  SKIP_WITHOUT(Shared("killed-4"));
  Library library(HOLDFAST_TEST_PLUGIN, 6);
  const auto streams = ReadJob(Shared("killed-4"), 4);
  const Replayed replayed = ReplayJob(library, streams, ToTheEnd(streams));
  EXPECT_THAT(Suspects(replayed.waits), ElementsAre(1u));
  // Also without the board of the dead.
  std::vector<RankWaits> survivors = replayed.waits;
  survivors[1] = RankWaits();
  EXPECT_THAT(Suspects(survivors), ElementsAre(1u));
}

// ---- The driver against the recorded jobs

TEST(DriverTest, CallsWhatNcclCallsInItsOrderWithItsParentsFromItsThreads) {
  SKIP_WITHOUT(Shared("allreduce-4"));
  for (const auto& [name, ranks, steps, count] :
       {std::tuple{"allreduce-2", 2, 8, size_t{4'000'000}}, {"allreduce-4", 4, 12, 1'000'000}}) {
    Library library(HOLDFAST_TEST_PLUGIN, 6);
    Job job(library, {.id = NewId(),
                      .ranks = ranks,
                      .steps = steps,
                      .count = count,
                      .forced_mask = (1 << 15) - 1});
    for (int operation = 0; operation < 3; ++operation) {
      job.EnqueueAll();
      ASSERT_TRUE(job.RunUntilNothingMoves());
    }
    const auto streams = ReadJob(Shared(name), ranks);
    for (int rank = 0; rank < ranks; ++rank) {
      SCOPED_TRACE(std::string(name) + " rank " + std::to_string(rank));
      const std::vector<CallRecord> recorded = ToRecords(streams[static_cast<size_t>(rank)]);
      const std::vector<CallRecord>& driven = job.rank(rank).calls();
      EXPECT_EQ(OfThread(driven, 0), OfThread(recorded, 0));
      for (const uint64_t type : {kProxyOp, kProxyStep, kKernelCh}) {
        EXPECT_EQ(Lives(driven, type), Lives(recorded, type)) << type;
      }
      EXPECT_EQ(ProxyOps(driven), ProxyOps(recorded));
      EXPECT_LE(MostOpenSteps(driven), 8);
      EXPECT_LE(MostOpenSteps(recorded), 8);
      std::set<Kind> driven_kinds;
      std::set<Kind> recorded_kinds;
      for (const CallRecord& call : driven) driven_kinds.insert(KindOf(call));
      for (const CallRecord& call : recorded) recorded_kinds.insert(KindOf(call));
      // The driver has no moment of NCCL's that says "active" or "idle" of a proxy's thread.
      for (auto* kinds : {&driven_kinds, &recorded_kinds}) {
        kinds->erase({1, "state", kProxyCtrl, kStateProxyActive, 0});
        kinds->erase({1, "state", kProxyCtrl, kStateProxyWakeup, 0});
      }
      EXPECT_EQ(driven_kinds, recorded_kinds);
    }
  }
}

// ---- A real GPU

// NCCL 2.28.9 in PyTorch on an H200, two ranks as hosts of their own on it, level full, recorded by
// scripts/gpu-check: one all-reduce of 1024 elements on one channel and three of a million on two.
TEST(ReplayTest, WhatNcclCalledOnARealGpuEndsWithAllCountersEqualAndNobodyWaiting) {
  const auto streams = ReadJob(std::string(HOLDFAST_TEST_DATA) + "/nccl/gpu-2", 2);
  Library library(HOLDFAST_TEST_PLUGIN, 5);
  const auto before = MappedBoard::Find(getpid());
  const Replayed replayed = ReplayJob(library, streams, BeforeFinalize(streams));
  for (const uint32_t index : replayed.communicators) {
    const abi::CommunicatorReading reading = replayed.board->communicator(index);
    EXPECT_EQ(reading.enqueued, 4u);
    EXPECT_EQ(reading.started, 4u);
    EXPECT_EQ(reading.finished, 4u);
    EXPECT_EQ(reading.api_calls, 4u);
    EXPECT_EQ(reading.kernel_launches, 4u);
    uint64_t sent = 0;
    uint64_t kernels = 0;
    for (const abi::SlotReading& slot : replayed.board->SlotsOf(index)) {
      if (slot.key.direction == SlotDirection::kProxyThread) continue;
      EXPECT_EQ(slot.state, WaitState::kNone);
      if (slot.key.direction == SlotDirection::kSend) sent += slot.bytes;
      if (slot.key.direction == SlotDirection::kKernel) {
        kernels += slot.steps_done;
        EXPECT_GT(slot.waited[0], 0u);  // on the GPU's clock
      }
    }
    EXPECT_EQ(kernels, 7u);
    EXPECT_NEAR(static_cast<double>(sent), 4.0 * (1024 + 3'000'000), 40'000.0);
  }
  for (const abi::Drop cause : {abi::Drop::kStale, abi::Drop::kUnknownContext, abi::Drop::kSlots}) {
    const auto after = MappedBoard::Find(getpid());
    EXPECT_EQ(after->dropped(cause), before == nullptr ? 0 : before->dropped(cause));
  }
}

// No event on the GPU lived as none of the driver's does: with those parents, through those states.
TEST(DriverTest, ItsEventsLiveAsThoseOnARealGpu) {
  const auto streams = ReadJob(std::string(HOLDFAST_TEST_DATA) + "/nccl/gpu-2", 2);
  Library library(HOLDFAST_TEST_PLUGIN, 5);
  Job job(library, {.id = NewId(), .ranks = 2, .steps = 4, .forced_mask = (1 << 12) - 1});
  for (int operation = 0; operation < 2; ++operation) {
    job.EnqueueAll();
    ASSERT_TRUE(job.RunUntilNothingMoves());
  }
  for (int rank = 0; rank < 2; ++rank) {
    const std::vector<CallRecord> recorded = ToRecords(streams[static_cast<size_t>(rank)]);
    const std::vector<CallRecord>& driven = job.rank(rank).calls();
    EXPECT_LE(MostOpenSteps(recorded), 8);
    for (const uint64_t type :
         {kGroupApi, kCollApi, kKernelLaunch, kGroup, kColl, kProxyOp, kProxyStep, kKernelCh}) {
      const auto lives = Lives(driven, type);
      for (const auto& life : Lives(recorded, type)) {
        EXPECT_GT(lives.count(life), 0u) << type << ": " << testing::PrintToString(life);
      }
    }
    std::set<Kind> driven_starts;
    for (const CallRecord& call : driven) {
      if (call.call == "start") driven_starts.insert(KindOf(call));
    }
    for (const CallRecord& call : recorded) {
      EXPECT_TRUE(call.call != "start" || driven_starts.count(KindOf(call)) > 0) << call.type;
    }
  }
}

// ---- The driver's own streams

// The streams in tests/data/nccl are what the driver makes, and say what it says.
TEST(ReplayTest, TheDriversOwnStreamsNameTheCulpritToo) {
  constexpr int kRanks = 3;
  Library library(HOLDFAST_TEST_PLUGIN, 6);
  Job job(
      library,
      {.id = NewId(), .ranks = kRanks, .steps = 8, .count = 30'000, .forced_mask = (1 << 12) - 1});
  job.SetFreeze({.rank = 1, .channel = -1, .operation = 0, .slice = 4});
  job.EnqueueAll();
  ASSERT_FALSE(job.RunUntilNothingMoves());
  const std::string directory = std::string(HOLDFAST_TEST_DATA) + "/nccl/stall-3";
  std::vector<std::vector<RecordedCall>> streams = ReadJob(directory, kRanks);
  for (int rank = 0; rank < kRanks; ++rank) {
    const auto at = static_cast<size_t>(rank);
    const std::vector<CallRecord> kept = ToRecords(streams[at]);
    const std::vector<CallRecord>& driven = job.rank(rank).calls();
    // To make them anew after a deliberate change of the driver: write ToJson of this there.
    ASSERT_EQ(kept.size(), driven.size()) << ToJson(driven, kRanks, rank, 30'000);
    for (size_t i = 0; i < kept.size(); ++i) {
      ASSERT_EQ(KindOf(kept[i]), KindOf(driven[i])) << "rank " << rank << ", call " << i;
    }
  }
  const Replayed replayed = ReplayJob(library, streams, ToTheEnd(streams));
  EXPECT_THAT(Suspects(replayed.waits), ElementsAre(1u));
}

}  // namespace
}  // namespace holdfast::profiler
