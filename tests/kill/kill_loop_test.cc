// Goal: kill -9 of worker, keeper, trainers or all of them, at every named instant, loses nothing
// that was committed; a death of worker or keeper alone is not even noticed by the trainers.
// Method: for every kill point and every kind of kill: run a world of two ranks with the point
// armed, prove from the log that the point was reached, and let the next world restore. Every
// trainer checks the restored bytes itself.
//
// HOLDFAST_DRILL_ROUNDS (default 1): in round r each point acts when it is reached for the r-th
// time. HOLDFAST_DRILL_STRIDE (default 1; 5 in sanitizer builds): only every so many points, each
// test beginning at another one. HOLDFAST_DRILL_KILLS (default 12): kills of the random series.
#include <signal.h>
#include <stdlib.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/kill_point.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/kill/drill.h"

namespace holdfast {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;

using Trainers = std::vector<std::unique_ptr<Trainer>>;
constexpr absl::Duration kDeadline = absl::Seconds(120);
constexpr uint64_t kSteps = 6;
constexpr uint64_t kEvery = 2;

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* const text = getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

// Points of the worker, in the order of the list: every stride-th from `first` on. Nobody runs a
// job here: those of `holdfast run` are in scripts/demo_recovery.py.
std::vector<std::string> WorkerPoints(uint64_t first) {
  const uint64_t stride = FromEnvironment("HOLDFAST_DRILL_STRIDE", 1);
  std::vector<std::string> points;
  uint64_t index = stride - first % stride;
  for (const std::string_view point : kKillPoints) {
    if (point.rfind("keeper.", 0) == 0 || point.rfind("run.", 0) == 0) continue;
    if (index++ % stride == 0) points.emplace_back(point);
  }
  return points;
}

// A job that lives through many worlds, each of which starts from the last one's end.
class KillLoop : public ::testing::Test {
 protected:
  KillLoop() {
    drill_.Set("HOLDFAST_LINGER", "20ms");
    RunToEnd();  // so that every armed world has something to restore
  }

  std::string Seen(const Trainers& trainers) const {
    std::string text = drill_.Log();
    for (const auto& trainer : trainers) {
      trainer->ReadOutput();
      absl::StrAppend(&text, "---- a rank said:\n", trainer->output());
    }
    return text;
  }

  // An undisturbed world: must start from at least `committed_` and becomes the new state.
  void RunToEnd() {
    drill_.Set("HOLDFAST_KILL_AT", "");
    Trainers trainers = drill_.StartTrainers(2, kSteps, kEvery);
    ExpectFinished(trainers);
    ASSERT_TRUE(drill_.WaitAgentGone(kDeadline));
  }

  void StartArmed(const std::string& plan) {
    ASSERT_TRUE(drill_.WaitAgentGone(kDeadline)) << drill_.Log();
    drill_.ClearLog();
    drill_.Set("HOLDFAST_KILL_AT", plan);
    trainers_ = drill_.StartTrainers(2, kSteps, kEvery);
  }

  // All ranks end with 0, having started from what was committed last; remembers where they ended.
  void ExpectFinished(Trainers& trainers) {
    for (const auto& trainer : trainers) {
      ASSERT_EQ(trainer->Wait(kDeadline), 0) << Seen(trainers);
      if (committed_ > 0) {
        ASSERT_GE(trainer->LastNumber("restored").value_or(0), committed_) << Seen(trainers);
      }
    }
    ASSERT_EQ(trainers[0]->LastNumber("restored"), trainers[1]->LastNumber("restored"))
        << Seen(trainers);
    committed_ = trainers[0]->LastNumber("finished").value_or(0);
  }

  void ExpectReached(const std::string& point) {
    EXPECT_NE(drill_.Log().find(absl::StrCat("kill point ", point, " reached")), std::string::npos)
        << "the drill missed its point\n"
        << Seen(trainers_);
  }

  // Kills the ranks that live. What they had restored must have been right, and at least what was
  // committed before; takes what they know to be committed now.
  void KillTrainers() {
    killed_count_ = 0;
    for (const auto& trainer : trainers_) trainer->Kill();
    uint64_t committed = committed_;
    for (const auto& trainer : trainers_) {
      const int code = trainer->Wait(kDeadline);
      ASSERT_TRUE(code == 128 + SIGKILL || code == 0) << code << Seen(trainers_);
      killed_count_ += code == 0 ? 0 : 1;
      ASSERT_FALSE(trainer->HasSaid("restored none")) << Seen(trainers_);
      ASSERT_GE(trainer->LastNumber("restored").value_or(committed_), committed_)
          << Seen(trainers_);
      committed = std::max(committed, trainer->LastNumber("committed").value_or(0));
    }
    committed_ = committed;
  }

  // Kills a process of the agent. False: the whole agent has ended before.
  bool KillOfAgent(pid_t pid) {
    if (drill_.WaitAgentGone(absl::ZeroDuration())) return false;
    EXPECT_GT(pid, 0) << drill_.Log();  // 0 would be this test itself
    return pid > 0 && kill(pid, SIGKILL) == 0;
  }

  // After a kill: the next world's ranks check what is there, when they restore. A world that dies
  // early does not get so far, so every few times one runs undisturbed, and after the last.
  void RunToEndNowAndThen(size_t point_index, size_t point_count) {
    if (point_index % 6 == 5 || point_index + 1 == point_count) RunToEnd();
  }

  // Waits until the worker has stopped itself at the point.
  void AwaitStop(const std::string& point) {
    ASSERT_TRUE(drill_.WaitForLog(absl::StrCat("kill point ", point, " reached"), kDeadline))
        << "the drill missed its point\n"
        << Seen(trainers_);
    // The keeper says so behind the start: the worker may have come to its first points by then.
    ASSERT_TRUE(drill_.WaitForLog("started worker ", kDeadline)) << Seen(trainers_);
    worker_ = drill_.WorkerPid();
    ASSERT_TRUE(WaitUntil([this] { return IsStopped(worker_); }, kDeadline)) << Seen(trainers_);
  }

  // `kill_them` while the worker stands still, once at each of WorkerPoints(first); then nothing
  // committed may be lost.
  void AtEveryPoint(uint64_t first, const std::function<void()>& kill_them) {
    const std::vector<std::string> points = WorkerPoints(first);
    for (size_t i = 0; i < points.size(); ++i) {
      SCOPED_TRACE(points[i]);
      StartArmed(absl::StrCat(points[i], ":1:stop"));
      AwaitStop(points[i]);
      if (HasFatalFailure()) return;
      kill_them();
      if (HasFatalFailure()) return;
      RunToEndNowAndThen(i, points.size());
      if (HasFailure()) return;
    }
  }

  Drill drill_;
  Trainers trainers_;
  uint64_t committed_ = 0;
  size_t killed_count_ = 0;  // ranks that the last KillTrainers found alive
  pid_t worker_ = 0;
};

TEST_F(KillLoop, TheWorkerAtEveryPointIsNotNoticed) {
  for (uint64_t count = 1; count <= FromEnvironment("HOLDFAST_DRILL_ROUNDS", 1); ++count) {
    for (const std::string& point : WorkerPoints(0)) {
      SCOPED_TRACE(absl::StrCat(point, ":", count));
      StartArmed(absl::StrCat(point, ":", count));
      ExpectFinished(trainers_);
      if (count == 1) ExpectReached(point);
      EXPECT_FALSE(trainers_[0]->HasSaid("trouble")) << Seen(trainers_);
      EXPECT_FALSE(trainers_[1]->HasSaid("trouble")) << Seen(trainers_);
      if (HasFailure()) return;
    }
  }
}

// The next worker dies too, in its recovery or later.
TEST_F(KillLoop, TwoWorkersInARowAtEveryPointAreNotNoticed) {
  size_t attempted = 0;
  size_t reached = 0;
  for (const std::string& point : WorkerPoints(1)) {
    SCOPED_TRACE(point);
    ++attempted;
    StartArmed(absl::StrCat("flush.block_written:5,", point));
    ExpectFinished(trainers_);
    ExpectReached("flush.block_written");
    if (drill_.Log().find(absl::StrCat("kill point ", point, " reached")) != std::string::npos) {
      ++reached;
    }
    EXPECT_FALSE(trainers_[0]->HasSaid("trouble")) << Seen(trainers_);
    if (HasFailure()) return;
  }
  // Not all come again after the first kill: nobody opens, registers or restores a second time.
  EXPECT_GE(reached, attempted / 2);
}

TEST_F(KillLoop, AllTrainersAtEveryPointLoseNothingCommitted) {
  AtEveryPoint(2, [this] {
    KillTrainers();
    kill(worker_, SIGCONT);
    ASSERT_TRUE(drill_.WaitAgentGone(kDeadline)) << drill_.Log();
  });
}

TEST_F(KillLoop, TheKeeperAtEveryPointIsNotNoticed) {
  for (const std::string& point : WorkerPoints(3)) {
    SCOPED_TRACE(point);
    StartArmed(absl::StrCat(point, ":1:stop"));
    AwaitStop(point);
    if (HasFatalFailure()) return;
    ASSERT_TRUE(KillOfAgent(drill_.KeeperPid())) << Seen(trainers_);
    kill(worker_, SIGCONT);
    ExpectFinished(trainers_);
    // The worker has noticed: by the keeper's pidfd, or at once because a message could not be
    // sent.
    EXPECT_THAT(drill_.Log(), AnyOf(HasSubstr("the keeper died"), HasSubstr("started keeper")));
    EXPECT_FALSE(trainers_[0]->HasSaid("trouble")) << Seen(trainers_);
    if (HasFailure()) return;
  }
}

TEST_F(KillLoop, EverythingAtOnceAtEveryPointLosesNothingCommitted) {
  AtEveryPoint(4, [this] {
    KillTrainers();
    drill_.KillAgent();
  });
}

// Its own points: it dies between two of its instructions instead of ours.
TEST_F(KillLoop, TheKeeperAtItsOwnPointsIsNotNoticed) {
  for (const char* plan :
       {"keeper.message_received:1", "keeper.message_received:4", "keeper.message_received:9",
        "keeper.worker_started:1", "commit.index_written:1,keeper.worker_started:2"}) {
    SCOPED_TRACE(plan);
    StartArmed(plan);
    ExpectFinished(trainers_);
    ExpectReached(std::string(plan).find("message") != std::string::npos ? "keeper.message_received"
                                                                         : "keeper.worker_started");
    EXPECT_FALSE(trainers_[0]->HasSaid("trouble")) << Seen(trainers_);
    if (HasFailure()) return;
  }
}

// Dying between the worker's death and its next start, the keeper takes everything with it.
TEST_F(KillLoop, BothAtOnceAreTheAgentsDeathAndNothingCommittedIsLost) {
  StartArmed("commit.index_written:1,keeper.worker_starting:2");
  for (const auto& trainer : trainers_) {
    ASSERT_NE(trainer->Wait(kDeadline), -1) << Seen(trainers_);
    committed_ = std::max(committed_, trainer->LastNumber("committed").value_or(0));
  }
  ExpectReached("keeper.worker_starting");
  RunToEnd();
}

// Kills at any instant, not only at named ones.
TEST_F(KillLoop, ARandomSeriesOfKillsLosesNothingCommitted) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937 random(seed);
  drill_.Set("HOLDFAST_KILL_AT", "");
  const uint64_t kills = FromEnvironment("HOLDFAST_DRILL_KILLS", 12);
  uint64_t hits = 0;
  for (uint64_t i = 0; i < kills; ++i) {
    ASSERT_TRUE(drill_.WaitAgentGone(kDeadline));
    drill_.ClearLog();
    drill_.CloseGate();
    trainers_ = drill_.StartTrainers(2, 40, 2, /*step_ms=*/2);
    // After a random share of the world's life: counted in its commits, not in time.
    const uint64_t start = committed_ + random() % 30;
    ASSERT_TRUE(WaitUntil(
        [&] {
          trainers_[0]->ReadOutput();
          return trainers_[0]->LastNumber("committed").value_or(0) >= start;
        },
        kDeadline))
        << Seen(trainers_);
    switch (random() % 4) {
      case 0:
        if (KillOfAgent(drill_.WorkerPid())) ++hits;
        drill_.OpenGate();
        ExpectFinished(trainers_);
        break;
      case 1:
        if (KillOfAgent(drill_.KeeperPid())) ++hits;
        drill_.OpenGate();
        ExpectFinished(trainers_);
        break;
      case 2:
        KillTrainers();
        hits += killed_count_ > 0 ? 1 : 0;
        break;
      default:
        KillTrainers();
        hits += killed_count_ > 0 ? 1 : 0;
        drill_.KillAgent();
    }
    if (HasFailure()) return;
  }
  drill_.OpenGate();
  RunToEnd();
  EXPECT_EQ(hits, kills) << "no world ends by itself before its kill";
}

}  // namespace
}  // namespace holdfast
