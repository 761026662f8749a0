// Goal: a worker that comes after knows of every rank what the one before would have known, at
// whatever moment that one has gone; and what was told to end has ended, with all that it started.
// Method: real shims and shells under a real loop; a "worker" is a RankGroup, which may go at any
// step of a rank's life, and the next one recovers.
#include "agent/run/rank_group.h"

#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "agent/run/process_tree.h"
#include "agent/run/shim_protocol.h"
#include "base/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "io/epoll_loop.h"
#include "tests/support/run_until.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

class RankGroupTest : public ::testing::Test {
 protected:
  ~RankGroupTest() override {
    if (group_ != nullptr) group_->KillTrees();
    EXPECT_TRUE(Pump([&] { return group_ == nullptr || group_->all_gone(); }));
    if (group_ != nullptr) group_->Release();
  }

  // A worker's beginning.
  void Begin() {
    started_.clear();
    ended_.clear();
    all_gone_ = 0;
    RankGroup::Callbacks callbacks;
    callbacks.started = [this](uint32_t rank, int32_t process) {
      EXPECT_TRUE(started_.emplace(rank, process).second) << "told twice";
    };
    callbacks.ended = [this](uint32_t rank, const RankEnd& end) {
      EXPECT_TRUE(ended_.emplace(rank, end).second) << "told twice";
    };
    callbacks.all_gone = [this] { ++all_gone_; };
    group_ = std::make_unique<RankGroup>(place_.Join(launch_), HOLDFAST_TEST_SHIM, *loop_,
                                         std::move(callbacks));
    group_->Recover();
  }
  // The end of one, and the next.
  void Replace() {
    group_ = nullptr;
    Begin();
  }
  void Start(uint32_t rank, const std::string& shell) {
    ShimSpec spec;
    spec.rank = rank;
    spec.log_directory = place_.Join(absl::StrCat("logs/", rank));
    spec.working_directory = place_.path();
    spec.environment = {"PATH=/usr/bin:/bin"};
    spec.command = {"sh", "-c", shell};
    ASSERT_OK(group_->Start(std::move(spec)));
  }
  bool Pump(const std::function<bool()>& holds) { return RunUntil(*loop_, holds); }
  // Tells a rank that reads a line from the file of that name to go on.
  void Go(const std::string& name) { std::ofstream(place_.Join(name)) << "go\n"; }
  std::string Fifo(const std::string& name) {
    EXPECT_EQ(mkfifo(place_.Join(name).c_str(), 0600), 0);
    return place_.Join(name);
  }
  pid_t ShimOf(uint32_t rank) {
    std::ifstream file(place_.Join(absl::StrCat(launch_, "/rank-", rank, "/shim")));
    pid_t process = 0;
    file >> process;
    return process;
  }

  TemporaryDirectory place_;
  std::string launch_ = "launch";
  std::unique_ptr<EpollLoop> loop_ = *EpollLoop::Create(RealClock());
  std::unique_ptr<RankGroup> group_;
  std::map<uint32_t, int32_t> started_;
  std::map<uint32_t, RankEnd> ended_;
  int all_gone_ = 0;
};

TEST_F(RankGroupTest, TellsOfEveryRankOnceThatItRunsAndHowItEnded) {
  Begin();
  const std::string go = Fifo("go");
  Start(0, "exit 0");
  Start(1, absl::StrCat("read line <", go, "; exit 7"));
  Start(2, "kill -KILL $$");
  Start(2, "exit 1");  // it has a shim: left alone
  ASSERT_TRUE(Pump([&] { return ended_.size() == 2 && started_.size() == 3; }));
  EXPECT_FALSE(ended_.contains(1));
  EXPECT_FALSE(group_->all_gone());
  Go("go");
  ASSERT_TRUE(Pump([&] { return all_gone_ == 1; }));
  EXPECT_EQ(ended_.at(0).wait_status, 0);
  EXPECT_EQ(WEXITSTATUS(ended_.at(1).wait_status), 7);
  EXPECT_EQ(ended_.at(2).wait_status, SIGKILL);
  for (const auto& [rank, end] : ended_) EXPECT_EQ(end.process_id, started_.at(rank));
  EXPECT_FALSE(group_->lost_a_shim());
}

// The worker goes at each step in the life of a rank; what the next one is told is the same.
TEST_F(RankGroupTest, AWorkerThatComesAfterKnowsWhatTheOneBeforeDid) {
  enum Step { kAtOnce, kStarted, kEnded, kGone, kSteps };
  for (int step = kAtOnce; step < kSteps; ++step) {
    SCOPED_TRACE(step);
    launch_ = absl::StrCat("launch-", step);
    Begin();
    const auto rank = static_cast<uint32_t>(step);
    const std::string go = Fifo(absl::StrCat("go", step));
    // What it leaves behind goes on until it is told.
    const std::string stay = Fifo(absl::StrCat("stay", step));
    Start(rank, absl::StrCat("(read line <", stay, ") & read line <", go, "; exit 9"));
    if (step >= kStarted) {
      ASSERT_TRUE(Pump([&] { return started_.contains(rank); }));
    }
    if (step >= kEnded) {
      Go(absl::StrCat("go", step));
      ASSERT_TRUE(Pump([&] { return ended_.contains(rank); }));
      EXPECT_EQ(all_gone_, 0);
    }
    if (step >= kGone) {
      Go(absl::StrCat("stay", step));
      ASSERT_TRUE(Pump([&] { return group_->all_gone(); }));
    }
    Replace();
    EXPECT_TRUE(group_->has(rank));
    ASSERT_TRUE(Pump([&] { return started_.contains(rank); }));
    if (step < kEnded) {
      EXPECT_FALSE(ended_.contains(rank));
      Go(absl::StrCat("go", step));
    }
    ASSERT_TRUE(Pump([&] { return ended_.contains(rank); }));
    EXPECT_EQ(WEXITSTATUS(ended_.at(rank).wait_status), 9);
    EXPECT_EQ(ended_.at(rank).process_id, started_.at(rank));
    if (step < kGone) {
      EXPECT_FALSE(group_->all_gone());
      group_->KillTrees();
    }
    ASSERT_TRUE(Pump([&] { return group_->all_gone(); }));
    group_->Release();
  }
}

TEST_F(RankGroupTest, ADirectoryOfARankThatWasNeverStartedIsNone) {
  ASSERT_EQ(mkdir(place_.Join("launch").c_str(), 0700), 0);
  ASSERT_EQ(mkdir(place_.Join("launch/rank-3").c_str(), 0700), 0);
  ASSERT_EQ(mkdir(place_.Join("launch/other").c_str(), 0700), 0);
  Begin();
  EXPECT_EQ(group_->count(), 0u);
  Start(3, "exit 4");
  ASSERT_TRUE(Pump([&] { return ended_.contains(3); }));
  EXPECT_EQ(WEXITSTATUS(ended_.at(3).wait_status), 4);
}

TEST_F(RankGroupTest, ASignalReachesAllThatLiveAndAKillWhatTheyStarted) {
  Begin();
  Start(0, "trap 'exit 5' TERM; echo x >ready0; while :; do sleep 0.01; done");
  Start(1, "trap '' TERM; echo x >ready1; sleep 1000 & echo $! >child; wait; sleep 1000");
  const auto is_there = [&](const char* name) {
    std::string text;
    std::ifstream(place_.Join(name)) >> text;
    return !text.empty();
  };
  ASSERT_TRUE(Pump([&] { return is_there("ready0") && is_there("ready1") && is_there("child"); }));
  group_->Signal(SIGTERM);
  ASSERT_TRUE(Pump([&] { return ended_.contains(0); }));
  EXPECT_EQ(WEXITSTATUS(ended_.at(0).wait_status), 5);
  EXPECT_FALSE(ended_.contains(1));
  pid_t child = 0;
  std::ifstream(place_.Join("child")) >> child;
  // Also through a worker that comes after.
  Replace();
  group_->KillTrees();
  ASSERT_TRUE(Pump([&] { return ended_.contains(1) && group_->all_gone(); }));
  EXPECT_EQ(ended_.at(1).wait_status, SIGKILL);
  const char state = ProcessState(child);
  EXPECT_TRUE(state == 0 || state == 'Z') << state;
}

TEST_F(RankGroupTest, ARankWhoseShimIsKilledHasEndedWithIt) {
  Begin();
  Start(0, "exec sleep 1000");
  ASSERT_TRUE(Pump([&] { return started_.contains(0); }));
  ASSERT_GT(ShimOf(0), 1);
  ASSERT_EQ(kill(ShimOf(0), SIGKILL), 0);
  ASSERT_TRUE(Pump([&] { return ended_.contains(0) && group_->all_gone(); }));
  EXPECT_TRUE(ended_.at(0).shim_lost);
  EXPECT_EQ(ended_.at(0).wait_status, SIGKILL);
  EXPECT_TRUE(group_->lost_a_shim());
  // The next worker finds the mark that it was started, and nobody there.
  Replace();
  ASSERT_TRUE(Pump([&] { return ended_.contains(0); }));
  EXPECT_TRUE(ended_.at(0).shim_lost);
}

}  // namespace
}  // namespace holdfast
