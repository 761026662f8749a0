// Trainer to agent to storage and back, with the real library, the real daemon and a real file
// system. Every trainer checks what it restored bit for bit itself (exit code 3 if it differs).
#include <signal.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/kill/drill.h"

namespace holdfast {
namespace {

using Trainers = std::vector<std::unique_ptr<Trainer>>;
constexpr absl::Duration kDeadline = absl::Seconds(120);

// All end with code 0.
void ExpectFinished(const Drill& drill, Trainers& trainers) {
  for (const auto& trainer : trainers) {
    EXPECT_EQ(trainer->Wait(kDeadline), 0) << trainer->output() << "\n" << drill.Log();
  }
}

// All know of an agent that has come after the one that died.
void ExpectReconnected(const Drill& drill, Trainers& trainers) {
  for (const auto& trainer : trainers) {
    EXPECT_TRUE(trainer->WaitFor("reconnected 1", kDeadline)) << trainer->output() << drill.Log();
  }
}

size_t Count(const std::string& all, const std::string& text) {
  size_t count = 0;
  for (size_t at = all.find(text); at != std::string::npos; at = all.find(text, at + 1)) ++count;
  return count;
}

TEST(EndToEnd, WhatTwoRanksCommitIsRestoredFromStorageOnOneTwoAndThreeRanks) {
  Drill drill;
  Trainers first = drill.StartTrainers(2, 6, 2);
  ExpectFinished(drill, first);
  EXPECT_TRUE(first[0]->HasSaid("restored none"));
  EXPECT_EQ(first[0]->LastNumber("committed"), 6u);
  uint64_t step = 6;
  uint64_t attempt = 1;
  for (const int world_size : {2, 1, 3}) {
    ASSERT_TRUE(drill.WaitAgentGone(kDeadline)) << drill.Log();
    Trainers next = drill.StartTrainers(world_size, 2, 2);
    ExpectFinished(drill, next);
    for (const auto& trainer : next) {
      EXPECT_TRUE(trainer->HasSaid(absl::StrCat("restored ", step, " ", attempt)))
          << trainer->output();
    }
    step += 2;
    attempt += 1;
    EXPECT_EQ(next[0]->LastNumber("committed"), step);
  }
}

// Each time the worker dies in the middle of the first restore, and the ranks go on with the next
// one.
TEST(EndToEnd, ANewJobStartsFromAnotherOneWhateverKillsTheWorkerMeanwhile) {
  Drill old;
  Trainers first = old.StartTrainers(2, 6, 2);
  ExpectFinished(old, first);
  ASSERT_EQ(first[0]->LastNumber("committed"), 6u);
  for (const char* point :
       {"restore.point_decided", "restore.planned", "restore.piece_delivered", "restore.ended"}) {
    SCOPED_TRACE(point);
    Drill drill;
    drill.Set("HOLDFAST_RESTORE_FROM", absl::StrCat(old.root(), "/drill"));
    drill.Set("HOLDFAST_KILL_AT", point);
    Trainers second = drill.StartTrainers(3, 2, 2);
    ExpectFinished(drill, second);
    EXPECT_EQ(Count(drill.Log(), absl::StrCat("kill point ", point, " reached")), 1u)
        << drill.Log();
    for (const auto& trainer : second) {
      EXPECT_TRUE(trainer->HasSaid("restored 6 1")) << trainer->output();
    }
    EXPECT_EQ(second[0]->LastNumber("committed"), 8u);
    // The variable may stay: what the job has committed itself is newer.
    Trainers third = drill.StartTrainers(1, 2, 2);
    ExpectFinished(drill, third);
    EXPECT_TRUE(third[0]->HasSaid("restored 8 1")) << third[0]->output();
  }
}

TEST(EndToEnd, AnAgentThatLingersRestoresFromMemoryAndStaysOne) {
  Drill drill;
  drill.Set("HOLDFAST_LINGER", "60s");
  Trainers first = drill.StartTrainers(2, 4, 2);
  ExpectFinished(drill, first);
  const pid_t worker = drill.WorkerPid();
  Trainers second = drill.StartTrainers(2, 2, 2);
  ExpectFinished(drill, second);
  EXPECT_TRUE(second[0]->HasSaid("restored 4 1")) << second[0]->output();
  EXPECT_EQ(drill.WorkerPid(), worker);
}

TEST(EndToEnd, RanksThatStartAtOnceShareOneAgentWhichEndsAfterItsLinger) {
  Drill drill;
  Trainers trainers = drill.StartTrainers(4, 4, 2);
  ExpectFinished(drill, trainers);
  ASSERT_TRUE(drill.WaitAgentGone(kDeadline));
  EXPECT_EQ(Count(drill.Log(), "started worker "), 1u) << drill.Log();
  EXPECT_EQ(Count(drill.Log(), "nobody has needed this agent"), 1u) << drill.Log();
}

TEST(EndToEnd, AWorkerThatIsKilledWhileTrainingGoesOnLosesNothing) {
  Drill drill;
  drill.CloseGate();
  Trainers trainers = drill.StartTrainers(2, 60, 2, /*step_ms=*/5);
  size_t kills = 0;
  for (uint64_t committed = 4; committed <= 40; committed += 12) {
    ASSERT_TRUE(trainers[0]->WaitForCommit(committed, kDeadline))
        << trainers[0]->output() << drill.Log();
    ASSERT_EQ(kill(drill.WorkerPid(), SIGKILL), 0);
    // Counted by the keeper, so that the next kill is of the next worker.
    ++kills;
    ASSERT_TRUE(WaitUntil(
        [&] {
          return Count(drill.Log(), "the worker died (signal 9)") == kills &&
                 Count(drill.Log(), "started worker ") == kills + 1;
        },
        kDeadline))
        << drill.Log();
  }
  drill.OpenGate();
  ExpectFinished(drill, trainers);
  EXPECT_EQ(trainers[0]->LastNumber("finished"), 60u);
  EXPECT_EQ(kills, 4u);
  EXPECT_EQ(Count(drill.Log(), "the worker died (signal 9)"), kills) << drill.Log();
  EXPECT_FALSE(trainers[0]->HasSaid("trouble")) << trainers[0]->output();
  ASSERT_TRUE(drill.WaitAgentGone(kDeadline));
  Trainers next = drill.StartTrainers(2, 2, 2);
  ExpectFinished(drill, next);
  EXPECT_TRUE(next[0]->HasSaid("restored 60 1")) << next[0]->output();
}

// The root does not answer when the next worker starts (a network file system for a moment): the
// agent must not end, because the sealed images would end with it.
TEST(EndToEnd, AWorkerThatFindsNoRootWaitsForItAndLosesNothing) {
  Drill drill;
  drill.CloseGate();
  Trainers trainers = drill.StartTrainers(2, 40, 2, /*step_ms=*/5);
  ASSERT_TRUE(trainers[0]->WaitForCommit(4, kDeadline)) << trainers[0]->output() << drill.Log();
  // Also with a keeper that has not started a worker before.
  ASSERT_EQ(kill(drill.KeeperPid(), SIGKILL), 0);
  ASSERT_TRUE(drill.WaitForLog("started keeper ", kDeadline)) << drill.Log();
  const pid_t worker = drill.WorkerPid();
  // Stopped first: between the loss of the root and its own death it must not fail a save.
  ASSERT_EQ(kill(worker, SIGSTOP), 0);
  ASSERT_TRUE(WaitUntil([&] { return IsStopped(worker); }, kDeadline));
  const std::string away = drill.root() + ".away";
  std::filesystem::rename(drill.root(), away);
  std::ofstream(drill.root()) << "not a directory";
  ASSERT_EQ(kill(worker, SIGKILL), 0);
  ASSERT_TRUE(drill.WaitForLog("cannot take over from the last worker: ", kDeadline))
      << drill.Log();
  std::filesystem::remove(drill.root());
  std::filesystem::rename(away, drill.root());
  ExpectReconnected(drill, trainers);
  drill.OpenGate();
  ExpectFinished(drill, trainers);
  for (const auto& trainer : trainers) {
    EXPECT_FALSE(trainer->HasSaid("trouble")) << trainer->output();
  }
  EXPECT_EQ(Count(drill.Log(), "started worker "), 2u) << drill.Log();
  EXPECT_EQ(Count(drill.Log(), "2 sessions taken over"), 1u) << drill.Log();
  ASSERT_TRUE(drill.WaitAgentGone(kDeadline));
  Trainers next = drill.StartTrainers(2, 2, 2);
  ExpectFinished(drill, next);
  EXPECT_TRUE(next[0]->HasSaid("restored 40 1")) << next[0]->output();
}

// What an agent takes with it is named, and its exit code says so.
TEST(EndToEnd, ASaveThatIsNotCommittedWhenTheAgentEndsIsNamed) {
  Drill drill;
  drill.AdoptAgents();
  drill.Set("HOLDFAST_DRAIN_DEADLINE", "300ms");
  drill.Set("HOLDFAST_DRILL", "stop");
  Trainers trainers = drill.StartTrainers(2, 4, 2);
  for (const auto& trainer : trainers) {
    ASSERT_TRUE(trainer->WaitFor("stopping 4", kDeadline)) << trainer->output() << drill.Log();
  }
  const pid_t keeper = drill.KeeperPid();
  ASSERT_EQ(kill(keeper, SIGTERM), 0);
  EXPECT_EQ(drill.WaitAgentCode(keeper, kDeadline), 7) << drill.Log();
  const std::string log = drill.Log();
  EXPECT_EQ(Count(log, "saves were only in memory and are lost: step 4 of attempt 1 of job drill"),
            1u)
      << log;
  EXPECT_EQ(Count(log, "ending: 2 images are not flushed within 300ms; 1 saves"), 1u) << log;
}

TEST(EndToEnd, AnAgentThatIsToldToEndWhileItCannotTakeOverSaysWhatThatCosts) {
  Drill drill;
  drill.AdoptAgents();
  drill.Set("HOLDFAST_DRAIN_DEADLINE", "300ms");
  drill.CloseGate();
  Trainers trainers = drill.StartTrainers(2, 40, 2, /*step_ms=*/5);
  ASSERT_TRUE(trainers[0]->WaitForCommit(4, kDeadline)) << trainers[0]->output() << drill.Log();
  const pid_t keeper = drill.KeeperPid();
  std::filesystem::rename(drill.root(), drill.root() + ".away");
  std::ofstream(drill.root()) << "not a directory";
  ASSERT_EQ(kill(drill.WorkerPid(), SIGKILL), 0);
  ASSERT_TRUE(drill.WaitForLog("cannot take over from the last worker: ", kDeadline));
  kill(keeper, SIGTERM);
  EXPECT_EQ(drill.WaitAgentCode(keeper, kDeadline), 7) << drill.Log();
  EXPECT_NE(drill.Log().find("could not be taken over within 300ms and is lost"),
            std::string::npos);
}

// Data loaders are forked in the middle of a capture and may outlive it.
TEST(EndToEnd, ATrainerThatForksDuringItsCapturesLosesNothing) {
  Drill drill;
  drill.Set("HOLDFAST_DRILL", "fork");
  Trainers trainers = drill.StartTrainers(2, 24, 2);
  ExpectFinished(drill, trainers);
  uint64_t under_capture = 0;
  for (const auto& trainer : trainers) {
    EXPECT_TRUE(trainer->HasSaid("forked 12 ")) << trainer->output();
    EXPECT_FALSE(trainer->HasSaid("trouble")) << trainer->output();
    under_capture += trainer->LastNumber("forked 12").value_or(0);
  }
  // Not vacuous: these forks met a running capture.
  EXPECT_GT(under_capture, 0u);
  ASSERT_TRUE(drill.WaitAgentGone(kDeadline)) << drill.Log();
  // What was captured beside the children is restored bit for bit, from storage.
  Trainers next = drill.StartTrainers(2, 2, 2);
  ExpectFinished(drill, next);
  for (const auto& trainer : next) {
    EXPECT_TRUE(trainer->HasSaid("restored 24 1")) << trainer->output();
  }
}

// Whole, but changed under capture, and its process dies before it could compare.
TEST(EndToEnd, ATornImageThatNobodyCouldCompareIsNeverRestored) {
  Drill drill;
  drill.Set("HOLDFAST_CHECK_SOURCE", "all");
  drill.Set("HOLDFAST_DRILL", "torn");
  Trainers trainers = drill.StartTrainers(2, 4, 2);
  for (const auto& trainer : trainers) {
    EXPECT_EQ(trainer->Wait(kDeadline), 128 + SIGKILL) << trainer->output() << drill.Log();
    EXPECT_TRUE(trainer->HasSaid("torn 4")) << trainer->output();
  }
  ASSERT_TRUE(drill.WaitAgentGone(kDeadline));
  drill.Set("HOLDFAST_DRILL", "");
  Trainers next = drill.StartTrainers(2, 2, 2);
  ExpectFinished(drill, next);
  for (const auto& trainer : next) {
    EXPECT_TRUE(trainer->HasSaid("restored 2 1")) << trainer->output();
  }
}

TEST(EndToEnd, AKeeperThatIsKilledIsReplacedAndNobodyNotices) {
  Drill drill;
  drill.CloseGate();
  Trainers trainers = drill.StartTrainers(2, 40, 2, /*step_ms=*/5);
  ASSERT_TRUE(trainers[0]->WaitForCommit(4, kDeadline));
  const pid_t first_keeper = drill.KeeperPid();
  const pid_t worker = drill.WorkerPid();
  ASSERT_EQ(kill(first_keeper, SIGKILL), 0);
  ASSERT_TRUE(drill.WaitForLog("started keeper ", kDeadline)) << drill.Log();
  const pid_t second_keeper = drill.KeeperPid();
  ASSERT_NE(second_keeper, first_keeper);
  // The new keeper does its work: the worker may die now.
  ASSERT_EQ(kill(worker, SIGKILL), 0);
  ExpectReconnected(drill, trainers);
  drill.OpenGate();
  ExpectFinished(drill, trainers);
  for (const auto& trainer : trainers) {
    EXPECT_FALSE(trainer->HasSaid("trouble")) << trainer->output();
  }
  // It was that keeper that saw the worker die and started the next one, which took over all of it.
  const std::string log = drill.Log();
  const std::string says = absl::StrCat("keeper[", second_keeper, "] ");
  EXPECT_EQ(Count(log, says + "the worker died ("), 1u) << log;
  EXPECT_EQ(Count(log, says + "started worker "), 1u) << log;
  EXPECT_EQ(Count(log, "2 sessions taken over"), 1u) << log;
  EXPECT_NE(drill.WorkerPid(), worker);
}

TEST(EndToEnd, AfterTheWholeAgentIsKilledTrainingGoesOnAndNothingCommittedIsLost) {
  Drill drill;
  drill.CloseGate();
  Trainers trainers = drill.StartTrainers(2, 30, 2, /*step_ms=*/5);
  ASSERT_TRUE(trainers[0]->WaitForCommit(4, kDeadline));
  const uint64_t committed = *trainers[0]->LastNumber("committed");
  drill.KillAgent();
  ASSERT_TRUE(drill.WaitAgentGone(absl::ZeroDuration())) << drill.Log();
  drill.OpenGate();
  // Nobody restarts it for them; training goes on to its end without saves, and says so.
  for (const auto& trainer : trainers) {
    EXPECT_EQ(trainer->Wait(kDeadline), 1) << trainer->output();
    EXPECT_TRUE(trainer->HasSaid("trouble save")) << trainer->output();
  }
  Trainers next = drill.StartTrainers(2, 2, 2);
  ExpectFinished(drill, next);
  EXPECT_GE(*next[0]->LastNumber("restored"), committed) << next[0]->output();
}

}  // namespace
}  // namespace holdfast
