// Ranks that call different operations: the one that does is named wherever it stands by now, and
// nobody is named where all have called the same.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "monitor/candidates.h"

namespace holdfast::monitor {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr uint32_t kRanks = 8;
constexpr uint64_t kCommunicator = 0x77;

constexpr RecentOperation kUsual{OperationKind::kReduceScatter, 4096, kNoRoot};

// What a rank has called, and how many of them are over.
struct Program {
  std::vector<RecentOperation> called;
  uint64_t finished = 0;
  bool tells = true;  // which they were, besides how many of each kind
};

CommunicatorReport ReportOf(const Program& program, uint32_t rank) {
  CommunicatorReport report;
  report.id = kCommunicator;
  report.size = kRanks;
  report.index = rank;
  uint64_t left = program.finished;
  for (const RecentOperation& operation : program.called) {
    OperationCounts& counts = report.counts[static_cast<size_t>(operation.kind)];
    ++counts.enqueued;
    ++counts.started;
    if (left > 0) {
      ++counts.finished;
      --left;
    }
  }
  report.last_kind = program.called.back().kind;
  report.last_bytes = program.called.back().bytes;
  if (!program.tells) return report;
  const size_t count = std::min(program.called.size(), kOperationsMax);
  report.operations.assign(program.called.end() - static_cast<ptrdiff_t>(count),
                           program.called.end());
  return report;
}

// After all have stood so for 8 s.
std::vector<Mismatch> Find(const std::vector<Program>& programs) {
  JobShape shape;
  shape.ranks.resize(kRanks);
  JobState state(Thresholds{}, shape);
  for (uint64_t second = 1; second <= 8; ++second) {
    Snapshot snapshot;
    snapshot.elapsed = absl::Seconds(second);
    NodeSummary& summary = snapshot.arrived.emplace_back();
    summary.sequence = second;
    summary.clock_us = second * 1'000'000;
    for (uint32_t r = 0; r < programs.size(); ++r) {
      RankReport& rank = summary.ranks.emplace_back();
      rank.rank = Rank{r};
      rank.process = ProcessState::kSleeping;
      rank.level = TelemetryLevel::kLight;
      rank.communicators = {ReportOf(programs[r], r)};
    }
    state.Ingest(snapshot, /*learn=*/false);
  }
  return FindMismatches(state);
}

// All have finished `before` operations and stand inside of the next one, behind which `ahead` more
// were enqueued.
std::vector<Program> AllAlike(uint64_t before, uint64_t ahead = 0) {
  Program program;
  program.finished = before;
  program.called.assign(before + 1 + ahead, kUsual);
  return std::vector<Program>(kRanks, program);
}

// Goal: whoever calls something else is named, at every place, whether it waits, has gone on by any
// number of operations, or has nothing open at all; as far as the telling reaches back.
TEST(MismatchTest, TheOddOneIsNamedHoweverFarItHasGoneOn) {
  const std::vector<RecentOperation> others = {{OperationKind::kBroadcast, 4096, 3},
                                               {OperationKind::kReduceScatter, 8192, kNoRoot},
                                               {OperationKind::kBarrier, 0, kNoRoot}};
  for (uint32_t victim = 0; victim < kRanks; ++victim) {
    for (const RecentOperation& other : others) {
      for (uint64_t further = 0; further <= kOperationsMax; ++further) {
        for (const bool waits : {true, false}) {
          SCOPED_TRACE(testing::Message()
                       << "rank " << victim << ", kind " << static_cast<int>(other.kind) << ", "
                       << further << " further, waits " << waits);
          std::vector<Program> programs = AllAlike(40);
          Program& odd = programs[victim];
          odd.called.back() = other;
          odd.called.insert(odd.called.end(), further, kUsual);
          // Else it stands in the last one that it called, or in none.
          odd.finished = waits ? 40 : odd.called.size() - (further % 2);
          const std::vector<Mismatch> found = Find(programs);
          if (further == kOperationsMax) {
            EXPECT_THAT(found, IsEmpty());
            continue;
          }
          ASSERT_THAT(found, SizeIs(1));
          EXPECT_EQ(found[0].communicator, kCommunicator);
          EXPECT_FALSE(found[0].tie);
          EXPECT_THAT(found[0].odd, ElementsAre(Rank{victim}));
          EXPECT_GE(found[0].standing, absl::Seconds(6));
        }
      }
    }
  }
}

TEST(MismatchTest, TheSentenceSaysWhoCalledWhatAsWhichOperation) {
  std::vector<Program> programs = AllAlike(122);
  programs[0].called.back() = {OperationKind::kBroadcast, 16, 0};
  programs[0].called.push_back(kUsual);
  programs[0].finished = 123;
  std::vector<Mismatch> found = Find(programs);
  ASSERT_THAT(found, SizeIs(1));
  EXPECT_EQ(found[0].what,
            "rank 0 called Broadcast of 16 bytes with root 0 as operation 123 of communicator 77, "
            "where 7 ranks called ReduceScatter of 4096 bytes");
  // Another root alone is enough.
  for (Program& program : programs) program.called[122] = {OperationKind::kBroadcast, 16, 5};
  programs[0].called[122].root = 4;
  found = Find(programs);
  ASSERT_THAT(found, SizeIs(1));
  EXPECT_THAT(found[0].odd, ElementsAre(Rank{0}));
  EXPECT_THAT(found[0].what, HasSubstr("with root 4"));
}

TEST(MismatchTest, NobodyIsNamedWhereAllCallTheSame) {
  for (const uint64_t ahead : {0u, 1u, 5u, 15u}) {
    // Two stand one operation behind, as in a ring.
    std::vector<Program> programs = AllAlike(40, ahead);
    programs[2].finished = programs[3].finished = 39;
    EXPECT_THAT(Find(programs), IsEmpty()) << ahead;
    // One that has not come yet, and one that was never seen.
    programs[5].called.resize(40);
    programs.pop_back();
    EXPECT_THAT(Find(programs), IsEmpty()) << ahead;
  }
  // The sizes of all-to-all differ by right.
  std::vector<Program> programs = AllAlike(40);
  for (uint32_t r = 0; r < kRanks; ++r) {
    programs[r].called.back() = {OperationKind::kAllToAll, 100 + r, kNoRoot};
  }
  EXPECT_THAT(Find(programs), IsEmpty());
}

// They stand where they called the same: what one of them calls behind it, or called before it,
// does not hold them up.
TEST(MismatchTest, ADifferenceInWhichNobodyStandsIsNoReason) {
  for (uint64_t number = 30; number <= 45; ++number) {
    std::vector<Program> programs = AllAlike(40, 5);
    programs[6].called.at(number).bytes = 1;
    const std::vector<Mismatch> found = Find(programs);
    EXPECT_THAT(found, SizeIs(number == 40 ? 1 : 0)) << number;
  }
}

// Without the operations themselves (recordings of version 1; too long ago) those are compared that
// have called as many.
TEST(MismatchTest, CountsAndTheLastOneAreComparedWhereNoOperationsAreTold) {
  std::vector<Program> programs = AllAlike(40);
  programs[4].called.back() = {OperationKind::kBroadcast, 4096, 0};
  for (Program& program : programs) program.tells = false;
  std::vector<Mismatch> found = Find(programs);
  ASSERT_THAT(found, SizeIs(1));
  EXPECT_THAT(found[0].odd, ElementsAre(Rank{4}));
  // It is told of none of them what they called 20 operations ago, but one has called a broadcast.
  programs = AllAlike(40, 20);
  programs[4].called.at(40) = {OperationKind::kBroadcast, 4096, 0};
  found = Find(programs);
  ASSERT_THAT(found, SizeIs(1));
  EXPECT_THAT(found[0].odd, ElementsAre(Rank{4}));
  EXPECT_THAT(found[0].what, HasSubstr("of the 61 operations"));
}

TEST(MismatchTest, WithoutAMajorityAllAreNamed) {
  std::vector<Program> programs = AllAlike(40);
  for (uint32_t r = 0; r < kRanks; r += 2) programs[r].called.back().bytes = 8;
  const std::vector<Mismatch> found = Find(programs);
  ASSERT_THAT(found, SizeIs(1));
  EXPECT_TRUE(found[0].tie);
  EXPECT_THAT(found[0].odd, SizeIs(kRanks));
}

// Whatever ranks claim of numbers, the answer comes, and soon: every rank in another operation.
TEST(MismatchTest, AnyNumbersAreTaken) {
  std::vector<Program> programs = AllAlike(40);
  for (uint32_t r = 0; r < kRanks; ++r) {
    programs[r].finished = r * 5;
    programs[r].called.resize(r * 5 + 1 + r % 3, kUsual);
  }
  EXPECT_THAT(Find(programs), IsEmpty());
}

}  // namespace
}  // namespace holdfast::monitor
