// How a rank's end is read, and whose it is.
#include "agent/monitor/exits.h"

#include <signal.h>

#include <string>

#include "gtest/gtest.h"

namespace holdfast {
namespace {

using monitor::ExitKind;

RankExit ExitOf(int32_t wait_status, bool stopped = false) {
  return {"job", "key", "node", 3, 4, 77, wait_status, stopped};
}

TEST(ExitOutcomeTest, EveryWaitStatusHasItsKind) {
  EXPECT_EQ(OutcomeOf(ExitOf(0)), (ExitOutcome{ExitKind::kClean, 0}));
  for (int status = 1; status < 256; ++status) {
    EXPECT_EQ(OutcomeOf(ExitOf(status << 8)), (ExitOutcome{ExitKind::kError, status}));
  }
  const auto kind_of = [](int number) {
    switch (number) {
      case SIGTERM:
      case SIGINT:
      case SIGHUP:
      case SIGQUIT:
        return ExitKind::kTerminated;
      case SIGABRT:
        return ExitKind::kAborted;
      case SIGKILL:
      case SIGXCPU:
      case SIGXFSZ:
        return ExitKind::kKilled;
      case SIGSEGV:
      case SIGBUS:
      case SIGILL:
      case SIGFPE:
      case SIGSYS:
      case SIGTRAP:
        return ExitKind::kFault;
      default:
        return ExitKind::kError;
    }
  };
  for (int number = 1; number < 65; ++number) {
    for (const int core : {0, 0x80}) {
      EXPECT_EQ(OutcomeOf(ExitOf(number | core)), (ExitOutcome{kind_of(number), number})) << number;
    }
  }
  // Stopped or continued: no end.
  EXPECT_EQ(OutcomeOf(ExitOf(0x137f)).kind, ExitKind::kUnknown);
  EXPECT_EQ(OutcomeOf(ExitOf(0xffff)).kind, ExitKind::kUnknown);
}

// In a cascade the strongest kind is the cause: the starter's own KILL must not be it.
TEST(ExitOutcomeTest, WhoWasStoppedEndedForThat) {
  EXPECT_EQ(OutcomeOf(ExitOf(SIGKILL, true)), (ExitOutcome{ExitKind::kTerminated, SIGKILL}));
  EXPECT_EQ(OutcomeOf(ExitOf(SIGABRT, true)).kind, ExitKind::kTerminated);
  EXPECT_EQ(OutcomeOf(ExitOf(1 << 8, true)), (ExitOutcome{ExitKind::kTerminated, 1}));
  EXPECT_EQ(OutcomeOf(ExitOf(0, true)).kind, ExitKind::kClean);
  EXPECT_EQ(OutcomeOf(ExitOf(SIGSEGV, true)).kind, ExitKind::kFault);
}

TEST(ExitsTest, AnExitIsOfTheProcessThatHadItsNumberOrWasThere) {
  Exits exits;
  const std::string job = "job", key = "key", other = "other";
  const auto find = [&](uint32_t rank, uint32_t pid, uint32_t own_pid, uint64_t seen) {
    return exits.Find({job, key, rank, pid, own_pid, seen}) != nullptr;
  };
  exits.Add(ExitOf(9), /*serial=*/10, absl::Seconds(1));
  EXPECT_TRUE(find(3, 77, 1, 5));    // its number here
  EXPECT_TRUE(find(3, 1, 77, 5));    // its number in its own namespace
  EXPECT_TRUE(find(3, 77, 1, 50));   // also if it was seen later than that was reported
  EXPECT_TRUE(find(3, 1, 2, 9));     // a shell around it ended
  EXPECT_FALSE(find(3, 1, 2, 11));   // of one that was before it
  EXPECT_FALSE(find(2, 77, 77, 5));  // of another rank
  EXPECT_EQ(exits.Find({other, key, 3, 77, 77, 5}), nullptr);
  EXPECT_EQ(exits.Find({job, other, 3, 77, 77, 5}), nullptr);
  // The rank's next exit takes its place.
  RankExit next = ExitOf(0);
  next.process_id = 78;
  exits.Add(next, 20, absl::Seconds(2));
  EXPECT_EQ(exits.entries().size(), 1u);
  EXPECT_EQ(exits.Find({job, key, 3, 78, 1, 30})->exit.wait_status, 0);
}

TEST(ExitsTest, TheOldestIsDroppedBeyondTheLimit) {
  Exits exits;
  for (uint32_t rank = 0; rank < Exits::kKeptMax + 5; ++rank) {
    RankExit exit = ExitOf(9);
    exit.rank = rank;
    exits.Add(exit, rank + 1, absl::Seconds(1));
  }
  EXPECT_EQ(exits.entries().size(), Exits::kKeptMax);
  EXPECT_EQ(exits.entries().front().exit.rank, 5u);
}

}  // namespace
}  // namespace holdfast
