// A hang, seen from the board alone: an all-reduce is frozen in its middle, the window is closed,
// nothing is enqueued afterwards. Who is at fault must be readable from what is there.
#include <gtest/gtest.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "hook/profiler/board_testing.h"
#include "hook/profiler/nccl_driver_testing.h"

namespace holdfast::profiler {
namespace {

using abi::SlotDirection;
using abi::WaitState;

uint64_t NewId() {
  static uint64_t last = 0xf0000;
  return ++last;
}

std::vector<RankWaits> ReadAll(const MappedBoard& board, uint64_t id, int ranks) {
  std::vector<RankWaits> all;
  for (int rank = 0; rank < ranks; ++rank) {
    const auto index = board.FindCommunicator(id, static_cast<uint32_t>(rank));
    EXPECT_TRUE(index.has_value()) << rank;
    all.push_back(index.has_value() ? WaitsOf(board, *index) : RankWaits());
  }
  return all;
}

// Goal: whichever rank's kernel stands still, at whichever slice of whichever operation, in one
//   channel or in all: the board names that rank and no other; its own connections wait for its own
//   GPU, and the counters say that all entered.
// Method: every rank of 3 to 5, every slice, first and second operation, one channel and all; one
//   thread drives all ranks until nothing moves, which is the hang.
TEST(FreezeTest, TheBoardNamesTheRankWhoseKernelStandsStillWhereverItDoes) {
  int hangs = 0;
  for (const int version : {4, 6}) {
    Library library(HOLDFAST_TEST_PLUGIN, version);
    for (const int ranks : {3, 4, 5}) {
      const int steps = 4 * (ranks - 1);
      for (int culprit = 0; culprit < ranks; ++culprit) {
        for (int slice = 0; slice < steps; ++slice) {
          for (const int channel : {-1, 0, 1}) {
            const int operation = slice % 2;
            const uint64_t id = NewId();
            SCOPED_TRACE("ranks " + std::to_string(ranks) + ", culprit " + std::to_string(culprit) +
                         ", slice " + std::to_string(slice) + ", channel " +
                         std::to_string(channel));
            Job job(library, {.id = id, .ranks = ranks, .steps = steps});
            job.SetFreeze(
                {.rank = culprit, .channel = channel, .operation = operation, .slice = slice});
            job.EnqueueAll();
            job.EnqueueAll();
            ASSERT_FALSE(job.RunUntilNothingMoves());
            ++hangs;
            const auto board = MappedBoard::Find(getpid());
            ASSERT_NE(board, nullptr);
            EXPECT_EQ(board->view().header->window.load(), 0u);
            const std::vector<RankWaits> waits = ReadAll(*board, id, ranks);
            EXPECT_EQ(Suspects(waits), std::vector<uint32_t>{static_cast<uint32_t>(culprit)});
            EXPECT_GT(waits[static_cast<size_t>(culprit)].gpu, 0);
            for (int rank = 0; rank < ranks; ++rank) {
              const auto reading =
                  board->communicator(*board->FindCommunicator(id, static_cast<uint32_t>(rank)));
              EXPECT_EQ(reading.enqueued, 2u);
              EXPECT_GE(reading.last_started, static_cast<uint64_t>(operation) + 1);
              // Who does not need the slices that are missing has finished it; nobody the next.
              EXPECT_GE(reading.last_finished, static_cast<uint64_t>(operation));
              EXPECT_LE(reading.last_finished, static_cast<uint64_t>(operation) + 1);
              if (rank == culprit) {
                EXPECT_EQ(reading.last_finished, static_cast<uint64_t>(operation));
              }
            }
          }
        }
      }
    }
  }
  EXPECT_GT(hangs, 500);
}

// Goal: the same for a process that dies in the middle: its board goes with it or says an old
//   thing; the others' boards point at it.
TEST(FreezeTest, TheBoardsOfTheOthersPointAtARankThatDied) {
  Library library(HOLDFAST_TEST_PLUGIN, 6);
  for (int victim = 0; victim < 4; ++victim) {
    const uint64_t id = NewId();
    Job job(library, {.id = id});
    job.SetFreeze({.rank = victim, .channel = 0, .operation = 0, .slice = 3});
    job.EnqueueAll();
    ASSERT_FALSE(job.RunUntilNothingMoves());
    job.rank(victim).Die();
    ASSERT_FALSE(job.RunUntilNothingMoves());
    const auto board = MappedBoard::Find(getpid());
    std::vector<RankWaits> waits = ReadAll(*board, id, 4);
    waits[static_cast<size_t>(victim)] = RankWaits();
    EXPECT_EQ(Suspects(waits), std::vector<uint32_t>{static_cast<uint32_t>(victim)});
  }
}

// Goal: the slot says since when, and that does not move while NCCL goes on polling.
TEST(FreezeTest, PollingDoesNotMoveTheTimeSinceWhenARankWaits) {
  Library library(HOLDFAST_TEST_PLUGIN, 6);
  const uint64_t id = NewId();
  Job job(library, {.id = id});
  job.SetFreeze({.rank = 2, .channel = -1, .operation = 0, .slice = 2});
  job.EnqueueAll();
  ASSERT_FALSE(job.RunUntilNothingMoves());
  const auto board = MappedBoard::Find(getpid());
  int credit_waits = 0;
  std::vector<uint64_t> since;
  for (int round = 0; round < 2; ++round) {
    for (uint32_t rank = 0; rank < 4; ++rank) {
      for (const abi::SlotReading& slot : board->SlotsOf(*board->FindCommunicator(id, rank))) {
        if (slot.key.direction > SlotDirection::kReceive) continue;
        if (slot.state == WaitState::kSendPeerWait) ++credit_waits;
        if (round == 0) {
          since.push_back(slot.since);
        } else {
          EXPECT_EQ(slot.since, since.front());
          since.erase(since.begin());
        }
      }
    }
    for (int poll = 0; poll < 1000; ++poll) {
      for (int rank = 0; rank < 4; ++rank) EXPECT_FALSE(job.rank(rank).Progress());
    }
  }
  EXPECT_TRUE(since.empty());
  // Not vacuous: somebody waits for credit, whose wait NCCL reports at every poll.
  EXPECT_GT(credit_waits, 0);
}

}  // namespace
}  // namespace holdfast::profiler
