// Goal: what the policy decides of a run is what is done, whatever worker does it, and what it must
// know of checkpoints it is told before it decides.
// Method: real shims and shells under a real loop; of the engine only what it is asked for.
#include "agent/run/job_supervisor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "agent/local_server_testing.h"
#include "agent/run/small_files.h"
#include "base/clock.h"
#include "io/epoll_loop.h"
#include "io/thread_pool.h"
#include "tests/support/run_until.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using testing::ElementsAre;

constexpr CheckpointId kOlder = {Attempt{1}, Step{4}};
constexpr CheckpointId kNewer = {Attempt{1}, Step{8}};

class JobSupervisorTest : public testing::Test {
 protected:
  JobSupervisorTest() { EXPECT_EQ(mkfifo(place_.Join("go").c_str(), 0600), 0); }
  ~JobSupervisorTest() override {
    if (supervisor_ == nullptr) return;
    supervisor_->Take(recovery::Stop{});
    supervisor_->Kill();
    EXPECT_TRUE(Pump([&] { return supervisor_->is_over(); })) << "a rank has outlived the test";
  }

  void Begin(const std::string& shell) {
    RunSpec spec;
    spec.run_id = absl::StrCat("run-", ++runs_);
    spec.job = "job";
    spec.rdzv_id = spec.run_id;
    spec.command = {"sh", "-c", shell};
    spec.environment = {"PATH=/usr/bin:/bin"};
    spec.working_directory = place_.path();
    spec.log_directory = place_.Join(absl::StrCat("logs/", spec.run_id));
    spec.recovery_toml = "[recovery]\npause_first = \"0s\"\nstop_wait = \"7s\"\n";
    spec.stop_wait_seconds = stop_wait_seconds_;
    spec.boot_id = BootId();
    absl::StatusOr<std::unique_ptr<JobSupervisor>> begun =
        JobSupervisor::Begin(Places(), World(), std::move(spec), [] {});
    ASSERT_OK(begun.status());
    supervisor_ = *std::move(begun);
  }
  // The end of the worker, and the next one.
  void Replace() {
    supervisor_ = nullptr;
    absl::StatusOr<std::unique_ptr<JobSupervisor>> found =
        JobSupervisor::Recover(Places(), World(), [] {});
    ASSERT_OK(found.status());
    supervisor_ = *std::move(found);
  }
  bool Pump(const std::function<bool()>& holds) { return RunUntil(*loop_, holds); }
  // How it ended; -1: it did not.
  int Finish() {
    const bool over = Pump([&] { return supervisor_->is_over(); });
    return over ? supervisor_->view().exit_code : -1;
  }
  bool Said(const std::string& part) const {
    const auto& lines = supervisor_->view().lines;
    return std::any_of(lines.begin(), lines.end(), [&](const JobSupervisor::Line& line) {
      return line.text.find(part) != std::string::npos;
    });
  }
  // What ranks were told to begin from, launch after launch, and at the end.
  std::vector<std::optional<CheckpointId>> Orders() const {
    std::vector<std::optional<CheckpointId>> orders;
    for (const std::optional<RestoreOrder>& order : engine_->restore_orders) {
      orders.push_back(order.has_value() ? order->checkpoint : std::nullopt);
    }
    return orders;
  }
  // Lets the rank go on that reads a line from `go`.
  void Go() { std::ofstream(place_.Join("go")) << "go\n"; }
  std::string Written(const std::string& name) const {
    return ReadFile(place_.Join(name), 4096).value_or("");
  }

  const TemporaryDirectory place_;
  std::unique_ptr<EpollLoop> loop_ = *EpollLoop::Create(RealClock());
  std::unique_ptr<ThreadPool> pool_ = *ThreadPool::Create(*loop_, 2);
  std::unique_ptr<NotingEngine> engine_ = std::make_unique<NotingEngine>(*loop_);
  std::unique_ptr<JobSupervisor> supervisor_;
  std::optional<uint32_t> stop_wait_seconds_;

 private:
  JobSupervisor::Options Places() {
    JobSupervisor::Options options;
    options.state_directory = place_.Join("state");
    options.runtime_directory = place_.Join("runtime");
    options.lemons_path = place_.Join("lemons.json");
    options.socket = place_.Join("socket");
    options.shim_program = HOLDFAST_TEST_SHIM;
    EXPECT_OK(MakeDirectories(options.state_directory));
    EXPECT_OK(MakeDirectories(options.runtime_directory));
    return options;
  }
  JobSupervisor::World World() {
    return {*loop_,   *pool_,  RealClock(),
            *engine_, nullptr, EvidenceWorld{*pool_, nullptr, nullptr, nullptr, nullptr, ""}};
  }

  int runs_ = 0;
};

TEST_F(JobSupervisorTest, ARunOfWhichNothingWasDecidedIsNotTakenForTheOneBefore) {
  Begin("exit 0");
  EXPECT_EQ(Finish(), 0);
  engine_->immediate = false;
  Begin("echo ran >>ran");
  // What there is to begin from was asked for, and not answered: the policy knows of nothing.
  EXPECT_TRUE(Pump([&] { return !engine_->answers.empty(); }));
  engine_->answers.clear();
  engine_->immediate = true;
  Replace();
  EXPECT_FALSE(supervisor_->is_over());
  EXPECT_EQ(Finish(), 0);
  EXPECT_EQ(Written("ran"), "ran\n");
  EXPECT_EQ(supervisor_->view().history.run_count, 2u);
}

TEST_F(JobSupervisorTest, ARunBeginsFromTheNewestCheckpointThatIsNotMarked) {
  for (const bool marked : {false, true}) {
    engine_->checkpoints = {{kOlder, false, true, false}, {kNewer, false, true, marked}};
    engine_->restore_orders.clear();
    Begin("exit 0");
    EXPECT_EQ(Finish(), 0);
    std::optional<CheckpointId> ordered;
    if (marked) ordered = kOlder;
    EXPECT_THAT(Orders(), ElementsAre(ordered, std::nullopt));
    EXPECT_EQ(Said("passed over: step 8 (marked bad)"), marked);
  }
}

TEST_F(JobSupervisorTest, AMarkThatComesWhileRanksRunCountsForTheNextLaunch) {
  engine_->checkpoints = {{kOlder, false, true}, {kNewer, false, true}};
  Begin("if [ $TORCHELASTIC_RESTART_COUNT = 0 ]; then echo >up; read line <go; exit 1; fi");
  ASSERT_TRUE(Pump([&] { return !Written("up").empty(); }));
  engine_->checkpoints[1].marked_bad = true;
  Go();
  EXPECT_EQ(Finish(), 0);
  EXPECT_THAT(Orders(), ElementsAre(std::nullopt, kOlder, std::nullopt));
}

TEST_F(JobSupervisorTest, WhatWasAskedForIsStrongerThanTheConfiguration) {
  for (const bool asked : {false, true}) {
    if (asked) stop_wait_seconds_ = 40;
    Begin("true");
    EXPECT_EQ(supervisor_->view().settings.stop_wait, absl::Seconds(asked ? 40 : 7));
    Replace();
    EXPECT_EQ(supervisor_->view().settings.stop_wait, absl::Seconds(asked ? 40 : 7));
    EXPECT_EQ(Finish(), 0);
  }
}

TEST_F(JobSupervisorTest, ThatTheEngineHadToTakeAnOlderOneIsSaid) {
  for (const bool older : {false, true}) {
    engine_->checkpoints = {{kOlder, false, true}, {kNewer, false, true}};
    Engine::RankProgress progress;
    progress.attempt = Attempt{2};
    progress.is_restored = true;
    progress.restored_from = older ? kOlder : kNewer;
    engine_->progress = {progress};
    Begin("read line <go");
    // Not what is remembered of the run before.
    ASSERT_TRUE(Pump([&] {
      const JobSupervisor::View view = supervisor_->view();
      return view.history.run_count == view.spec.run_number && view.history.restored.has_value();
    }));
    Go();
    EXPECT_EQ(Finish(), 0);
    EXPECT_EQ(Said("begin from step 4: step 8"), older);
  }
}

TEST_F(JobSupervisorTest, AnXidIsOfTheRankWhoseTreeItNames) {
  Begin("sleep 1000 & echo $! >up; read line <go");
  ASSERT_TRUE(Pump([&] { return Written("up").ends_with('\n'); }));
  XidSighting sighting;
  sighting.xid.code = 79;
  ASSERT_TRUE(absl::SimpleAtoi(absl::StripAsciiWhitespace(Written("up")), &sighting.xid.process));
  // The rank may write before the supervisor has heard of its process.
  ASSERT_TRUE(Pump([&] {
    supervisor_->TakeXid(sighting);
    return !supervisor_->view().history.gpu_faults.empty();
  }));
  sighting.xid.code = 48;
  sighting.xid.process = getpid();  // its grandmother
  supervisor_->TakeXid(sighting);
  supervisor_->Take(recovery::Stop{});
  EXPECT_EQ(Finish(), 75);
  EXPECT_TRUE(Said("GPU 0: Xid 79"));
  EXPECT_FALSE(Said("Xid 48"));
}

}  // namespace
}  // namespace holdfast
