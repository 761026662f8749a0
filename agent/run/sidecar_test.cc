// Goal: of a job that another launcher has started one rank is killed for a hang, the suspect, and
// nobody else, ever; where a restart cannot help, or is not ours to ask for, nobody is.
// Method: real processes under a real loop; the test is the launcher, the monitor, and the engine.
#include "agent/run/sidecar.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "agent/process.h"
#include "agent/recovery/why.h"
#include "agent/run/small_files.h"
#include "agent/run/state_files.h"
#include "base/clock.h"
#include "io/epoll_loop.h"
#include "io/thread_pool.h"
#include "nlohmann/json.hpp"
#include "tests/support/run_until.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using monitor::FaultClass;
using testing::HasSubstr;

constexpr int kPoolThreads = 2;

class SidecarTest : public testing::Test {
 protected:
  ~SidecarTest() override {
    sidecar_ = nullptr;
    End();
  }

  void Begin(SidecarMode mode, recovery::Settings settings = {}) {
    Sidecar::Options options;
    options.mode = mode;
    options.settings = std::move(settings);
    options.state_directory = place_.path();
    options.look_every = absl::Milliseconds(5);
    sidecar_ = std::make_unique<Sidecar>(
        std::move(options),
        Sidecar::World{*loop_, RealClock(),
                       [this] {
                         ++looks_;
                         return processes_;
                       },
                       [this](const std::string&, const std::string&) { return runs_here_; },
                       [this](const std::string& job, const std::string& key) {
                         const bool is_newest = job == "job" && key == key_;
                         return progress_ && is_newest ? progress_()
                                                       : std::vector<Engine::RankProgress>();
                       },
                       [](const std::string&, const std::string&) { return Engine::Activity(); },
                       EvidenceWorld{*pool_, nullptr, nullptr, nullptr, nullptr, ""}});
    sidecar_->Start();
  }
  // The launcher starts the job's next attempt, of two ranks here.
  void Launch(uint32_t world_size = 2) {
    End();
    key_ = absl::StrCat("run/", ++attempts_);
    StartRanks(world_size);
  }
  void StartRanks(uint32_t world_size) {
    for (uint32_t rank = 0; rank < 2; ++rank) {
      const pid_t process = fork();
      if (process == 0) {
        while (true) pause();
      }
      ASSERT_GT(process, 0);
      ranks_[rank] = process;
      children_.push_back(process);
      AddProcess("job", rank, world_size, process);
    }
  }
  // As one that has connected, and left its descriptor.
  void AddProcess(const std::string& job, uint32_t rank, uint32_t world_size, pid_t process) {
    pidfds_.push_back(*OpenPidfd(process));
    processes_.push_back(
        {job, key_, rank, world_size, static_cast<uint32_t>(process), pidfds_.back().get()});
  }
  // What both ranks tell the engine: that they began from `from`, and have come to `step`.
  void Progress(uint32_t attempt, std::optional<CheckpointId> from, uint64_t step,
                std::optional<Step> committed) {
    std::vector<Engine::RankProgress> ranks(2);
    for (uint32_t rank = 0; rank < 2; ++rank) {
      ranks[rank].rank = Rank{rank};
      ranks[rank].attempt = Attempt{attempt};
      ranks[rank].is_open = true;
      ranks[rank].is_restored = true;
      ranks[rank].restored_from = from;
      ranks[rank].heartbeat_count = 2;
      ranks[rank].step = Step{step};
      ranks[rank].committed = committed;
      if (committed.has_value()) ranks[rank].committed_begun = RealClock().Elapsed();
    }
    progress_ = [ranks] { return ranks; };
  }
  nlohmann::json Why(Attempt of = {}) const {
    const absl::StatusOr<std::string> why = sidecar_->WhyJson("job", of);
    return why.ok() ? nlohmann::json::parse(*why) : nlohmann::json::object();
  }
  bool Outcome(const std::string& outcome) const {
    const nlohmann::json why = Why();
    return !why.empty() && !why["incidents"].empty() &&
           why["incidents"].back()["outcome"] == outcome;
  }
  // It ends what is left of it.
  void End() {
    processes_.clear();
    for (const pid_t process : children_) {
      kill(process, SIGKILL);
      waitpid(process, nullptr, 0);
    }
    children_.clear();
    ranks_.clear();
  }
  void Find(FaultClass fault, uint32_t suspect, const std::string& sentence = "It stands.") {
    monitor::FindingRecord record;
    record.job = "job";
    record.attempt_key = key_;
    record.finding.id = absl::StrCat("f", ++findings_);
    record.finding.grade = monitor::Grade::kVerdict;
    record.finding.syndrome = monitor::Syndrome::kNonCommunicationHang;
    record.finding.fault = fault;
    record.finding.suspects = {{Rank{suspect}, Rank{suspect}}};
    record.finding.evidence = {"its process is stopped"};
    record.finding.sentence = sentence;
    record.finding.since = RealClock().Elapsed();
    record.finding.timeout = absl::ZeroDuration();
    sidecar_->TakeFinding(record, monitor::FindingChange::kVerdict);
  }
  bool Pump(const std::function<bool()>& holds) { return RunUntil(*loop_, holds); }
  // Until it has looked at everything that is there now.
  bool Look() {
    return Pump([this, until = looks_ + 2] { return looks_ >= until; });
  }
  nlohmann::json Status() const {
    const nlohmann::json all = nlohmann::json::parse(sidecar_->StatusJson());
    return all.empty() ? nlohmann::json::object() : all[0];
  }
  bool WatchesAttempt() {
    return Status().value("ranks", 0) == 2 && Status().value("attempt_key", "") == key_;
  }
  bool WatchesNone() { return Status().value("ranks", 0) == 0; }
  std::string Said() { return Status().value("said", ""); }
  bool IsAlive(uint32_t rank) { return waitpid(ranks_.at(rank), nullptr, WNOHANG) == 0; }
  // Dies, and its launcher has seen it.
  bool Dies(uint32_t rank) {
    if (!Pump([&] { return !IsAlive(rank); })) return false;
    std::erase(children_, ranks_.at(rank));
    ranks_.erase(rank);
    return Pump([&] { return WatchesNone(); });
  }
  std::string Summary(int incident) const {
    const auto path = place_.Join(absl::StrCat("jobs/job/incidents/", incident, "/summary.txt"));
    return ReadFile(path, 4096).value_or("");
  }

  const TemporaryDirectory place_;
  std::unique_ptr<EpollLoop> loop_ = *EpollLoop::Create(RealClock());
  std::unique_ptr<ThreadPool> pool_ = *ThreadPool::Create(*loop_, kPoolThreads);
  std::vector<UniqueFd> pidfds_;
  std::vector<Sidecar::Process> processes_;
  std::function<std::vector<Engine::RankProgress>()> progress_;
  bool runs_here_ = false;
  std::map<uint32_t, pid_t> ranks_;  // of the newest attempt
  std::vector<pid_t> children_;
  std::string key_;
  int looks_ = 0;
  int attempts_ = 0;
  int findings_ = 0;
  std::unique_ptr<Sidecar> sidecar_;
};

TEST_F(SidecarTest, TheSuspectIsKilledAndNobodyElse) {
  Begin(SidecarMode::kAct);
  for (uint32_t suspect : {1u, 0u}) {
    Launch();
    ASSERT_TRUE(Pump([&] { return WatchesAttempt(); }));
    EXPECT_EQ(sidecar_->WordOf("job").trouble, "");
    Find(FaultClass::kStopped, suspect);
    EXPECT_EQ(sidecar_->WordOf("job").trouble, "It stands.");
    EXPECT_TRUE(sidecar_->WordOf("job").is_handled);
    ASSERT_TRUE(Dies(suspect));
    EXPECT_TRUE(IsAlive(1 - suspect));
    // The attempt is over: what is found of it now is nothing to act on.
    Find(FaultClass::kStopped, 1 - suspect);
    ASSERT_TRUE(Look());
    EXPECT_TRUE(IsAlive(1 - suspect));
    EXPECT_EQ(sidecar_->WordOf("job").next, "");
  }
  EXPECT_EQ(Status()["kills"], 2);
  EXPECT_EQ(Status()["incidents"], 2);
  EXPECT_THAT(Summary(1), HasSubstr("Suspect: rank 1."));
  EXPECT_THAT(Summary(2), HasSubstr("Suspect: rank 0."));
  const auto incident = ReadFile(place_.Join("jobs/job/incidents/2/incident.json"), 65536);
  ASSERT_OK(incident.status());
  EXPECT_EQ(nlohmann::json::parse(*incident)["action"], "restart in place");
}

TEST_F(SidecarTest, AnIncidentOfAnEarlierWorkerIsNotWrittenOver) {
  ASSERT_OK(MakeDirectories(place_.Join("jobs/job/incidents/7")));
  Begin(SidecarMode::kAct);
  Launch();
  ASSERT_TRUE(Pump([&] { return WatchesAttempt(); }));
  Find(FaultClass::kStopped, 1);
  ASSERT_TRUE(Dies(1));
  EXPECT_THAT(Summary(8), HasSubstr("Suspect: rank 1."));
  EXPECT_EQ(Summary(7), "");
}

TEST_F(SidecarTest, WhoIsSilentIsFoundWithoutTheMonitor) {
  recovery::Settings settings;
  settings.hang_timeout = absl::Milliseconds(300);
  // One of them, who is it then; all of them, because one stands and the others wait: anyone.
  for (const bool all : {false, true}) {
    Begin(SidecarMode::kAct, settings);
    Launch();
    uint64_t beats = 2;
    progress_ = [all, beats]() mutable {
      std::vector<Engine::RankProgress> ranks(2);
      ++beats;
      for (uint32_t rank = 0; rank < 2; ++rank) {
        ranks[rank].rank = Rank{rank};
        ranks[rank].is_open = true;
        ranks[rank].heartbeat_count = all || rank == 1 ? 2 : beats;
        ranks[rank].step = Step{ranks[rank].heartbeat_count};
      }
      return ranks;
    };
    // Who has been silent stays it while evidence is collected, however often it is looked at.
    const auto hold = std::make_shared<std::mutex>();
    std::unique_lock<std::mutex> held(*hold);
    for (int thread = 0; thread < kPoolThreads; ++thread) {
      pool_->Run([hold] { std::scoped_lock lock(*hold); }, [] {});
    }
    ASSERT_TRUE(Pump([&] { return sidecar_->WordOf("job").trouble != ""; }));
    ASSERT_TRUE(Look());
    EXPECT_EQ(sidecar_->WordOf("job").trouble,
              all ? "All ranks are silent: no sign of life from any of 2 within the time-out."
                  : "No sign of life from rank 1 within the time-out.");
    EXPECT_THAT(Why()["incidents"].back()["suspects"], testing::SizeIs(all ? 0 : 1));
    held.unlock();
    ASSERT_TRUE(Dies(all ? 0 : 1));
    EXPECT_TRUE(IsAlive(all ? 1 : 0));
    EXPECT_EQ(Status()["kills"], 1);
    EXPECT_THAT(Said(), HasSubstr(all ? "All ranks are silent" : "No sign of life from rank 1"));
    progress_ = nullptr;
  }
}

TEST_F(SidecarTest, TheSameMismatchAgainKillsNobody) {
  Begin(SidecarMode::kAct);
  for (const bool again : {false, true}) {
    Launch();
    ASSERT_TRUE(Pump([&] { return WatchesAttempt(); }));
    Find(FaultClass::kMismatch, 0, absl::StrCat("Rank 0 is at operation ", 7 + attempts_, "."));
    if (!again) {
      ASSERT_TRUE(Dies(0));
      continue;
    }
    ASSERT_TRUE(Pump([&] { return Status()["state"] == "left alone"; })) << Status();
    EXPECT_THAT(Said(), HasSubstr("a restart cannot help"));
    EXPECT_FALSE(sidecar_->WordOf("job").is_handled);
    ASSERT_TRUE(Look());
    EXPECT_TRUE(IsAlive(0));
    EXPECT_TRUE(IsAlive(1));
  }
  EXPECT_EQ(Status()["kills"], 1);
}

TEST_F(SidecarTest, KillsInARowHaveALimitAndAHealthyAttemptBeginsANewRow) {
  recovery::Settings settings;
  settings.max_restarts = 2;
  settings.healthy_after = absl::ZeroDuration();
  for (const bool healthy : {false, true}) {
    Begin(SidecarMode::kAct, settings);
    // Who has finished steps was healthy, here.
    progress_ = [healthy] {
      std::vector<Engine::RankProgress> ranks(healthy ? 2 : 0);
      for (uint32_t rank = 0; rank < ranks.size(); ++rank) {
        ranks[rank].rank = Rank{rank};
        ranks[rank].heartbeat_count = 2;
        ranks[rank].step = Step{7};
      }
      return ranks;
    };
    for (uint32_t i = 0; i < 3; ++i) {
      Launch();
      ASSERT_TRUE(Pump([&] { return WatchesAttempt(); }));
      ASSERT_TRUE(Pump([&] { return !healthy || Status()["state"] == "running"; })) << Status();
      Find(FaultClass::kStopped, 1);
      if (!healthy && i == 2) break;
      ASSERT_TRUE(Dies(1));
      EXPECT_EQ(Status()["kills_in_a_row"], healthy ? 1 : i + 1);
    }
    if (healthy) {
      // One that ends by itself, too.
      Launch();
      ASSERT_TRUE(Pump([&] { return WatchesAttempt() && Status()["state"] == "running"; }));
      End();
      ASSERT_TRUE(Pump([&] { return WatchesNone(); }));
      EXPECT_EQ(Status()["kills_in_a_row"], 0);
      break;
    }
    ASSERT_TRUE(Pump([&] { return Status()["state"] == "left alone"; })) << Status();
    EXPECT_THAT(Said(), HasSubstr("2 attempts in a row had a rank killed"));
    EXPECT_TRUE(IsAlive(1));
  }
}

TEST_F(SidecarTest, ToObserveIsToKillNobody) {
  Begin(SidecarMode::kObserve);
  Launch();
  ASSERT_TRUE(Pump([&] { return WatchesAttempt(); }));
  Find(FaultClass::kStopped, 1);
  ASSERT_TRUE(Pump([&] { return !Summary(1).empty(); }));
  ASSERT_TRUE(Pump([&] { return Status()["state"] == "stalled"; })) << Status();
  EXPECT_FALSE(sidecar_->WordOf("job").is_handled);
  EXPECT_TRUE(IsAlive(0));
  EXPECT_TRUE(IsAlive(1));
  EXPECT_TRUE(Outcome("open"));
  // It ends, of whatever: nobody knows more of it.
  End();
  ASSERT_TRUE(Pump([&] { return Outcome("ended"); })) << Why();
}

TEST_F(SidecarTest, WhyHasEveryIncidentWithItsPhasesAlsoForWhoeverComesLater) {
  Begin(SidecarMode::kAct);
  EXPECT_TRUE(absl::IsNotFound(sidecar_->WhyJson("", Attempt{}).status()));
  EXPECT_TRUE(absl::IsNotFound(sidecar_->WhyJson("job", Attempt{}).status()));
  Launch();
  Progress(1, std::nullopt, 7, Step{5});
  ASSERT_TRUE(Pump([&] { return Status().value("state", "") == "running"; })) << Status();
  Find(FaultClass::kStopped, 1);
  ASSERT_TRUE(Dies(1));
  EXPECT_TRUE(Outcome("open"));
  // Not all of it has gone yet: nothing is said of what follows.
  EXPECT_TRUE(Why()["incidents"][0]["seconds"]["stop"].is_null());
  Launch();
  Progress(2, CheckpointId{Attempt{1}, Step{5}}, 6, std::nullopt);
  ASSERT_TRUE(Pump([&] { return Outcome("resumed"); })) << Why();
  const nlohmann::json why = Why();
  ASSERT_EQ(why["incidents"].size(), 1);
  const nlohmann::json& incident = why["incidents"][0];
  EXPECT_EQ(incident["attempt"], 1);
  EXPECT_EQ(incident["action"], "restart in place");
  EXPECT_EQ(incident["suspects"][0]["rank"], 1);
  double sum = 0;
  for (const char* phase :
       {"detect", "diagnose", "wait", "stop", "start", "load", "step", "lost"}) {
    ASSERT_TRUE(incident["seconds"][phase].is_number()) << phase << incident;
    sum += incident["seconds"][phase].get<double>();
  }
  EXPECT_NEAR(sum, incident["seconds"]["total"].get<double>(), 1e-5);
  EXPECT_EQ(why["downtime"].size(), 3);
  EXPECT_EQ(Why(Attempt{1})["incidents"], why["incidents"]);
  EXPECT_TRUE(Why(Attempt{2})["incidents"].empty());
  const absl::StatusOr<std::string> only = sidecar_->WhyJson("", Attempt{});
  ASSERT_OK(only.status());
  EXPECT_EQ(nlohmann::json::parse(*only)["job"], "job");

  // On disk, for whoever asks when the agent has gone, and for the next worker.
  sidecar_ = nullptr;
  const absl::StatusOr<recovery::History> history = ReadHistory(place_.Join("jobs/job"));
  ASSERT_OK(history.status());
  EXPECT_EQ(history->phase, recovery::Phase::kIdle);
  EXPECT_EQ(nlohmann::json(recovery::WhyJson(*history, Attempt{}))["incidents"], why["incidents"]);
  Begin(SidecarMode::kAct);
  ASSERT_TRUE(Pump([&] { return WatchesAttempt(); }));
  EXPECT_EQ(Why()["incidents"], why["incidents"]);
  Find(FaultClass::kStopped, 0);
  ASSERT_TRUE(Dies(0));
  ASSERT_EQ(Why()["incidents"].size(), 2);
  EXPECT_EQ(Why()["incidents"][1]["number"], 2);
  EXPECT_GT(Why()["incidents"][1]["launch"], incident["launch"]);
}

// A `holdfast run` of the same name, here or under another agent, has its history in the same
// place.
TEST_F(SidecarTest, TheHistoryOfARunThatHasBegunSinceIsNotWrittenOver) {
  Begin(SidecarMode::kAct);
  Launch();
  ASSERT_TRUE(Pump([&] { return WatchesAttempt(); }));
  Find(FaultClass::kStopped, 1);
  ASSERT_TRUE(Dies(1));
  const std::string directory = place_.Join("jobs/job");
  recovery::History run;
  run.job = "job";
  run.phase = recovery::Phase::kDown;
  run.incident_count = 1;
  ASSERT_OK(ReplaceFile(HistoryPath(directory), recovery::Encode(run)));
  End();
  ASSERT_TRUE(Pump([&] { return Why()["incidents"][0]["seconds"]["stop"].is_number(); })) << Why();
  EXPECT_EQ(ReadHistory(directory)->phase, recovery::Phase::kDown);
  // What it has counted, before it was over, is not counted again.
  run.phase = recovery::Phase::kOver;
  run.incident_count = 5;
  ASSERT_OK(ReplaceFile(HistoryPath(directory), recovery::Encode(run)));
  Launch();
  ASSERT_TRUE(Pump([&] { return WatchesAttempt(); }));
  Find(FaultClass::kStopped, 0);
  ASSERT_TRUE(Dies(0));
  EXPECT_NE(Summary(6), "");
  EXPECT_EQ(ReadHistory(directory)->incident_count, 6u);
}

// A launcher may hold processes ready. When it was told to begin is then not to be had.
TEST_F(SidecarTest, AnAttemptOfProcessesThatWereThereBeforeHasNoKnownStart) {
  Begin(SidecarMode::kAct);
  std::map<uint32_t, pid_t> spares;
  for (uint32_t rank = 0; rank < 2; ++rank) {
    const pid_t process = fork();
    if (process == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      while (true) pause();
    }
    spares[rank] = process;
  }
  const absl::Duration forked = RealClock().Elapsed();
  Launch();
  Progress(1, std::nullopt, 7, Step{5});
  // Later than the tick of /proc in which they were started.
  ASSERT_TRUE(Pump([&] {
    return Status().value("state", "") == "running" &&
           RealClock().Elapsed() > forked + absl::Milliseconds(50);
  }));
  Find(FaultClass::kStopped, 1);
  ASSERT_TRUE(Dies(1));
  End();
  key_ = "spares";
  for (const auto& [rank, process] : spares) {
    ranks_[rank] = process;
    children_.push_back(process);
    AddProcess("job", rank, 2, process);
  }
  Progress(2, CheckpointId{Attempt{1}, Step{5}}, 6, std::nullopt);
  ASSERT_TRUE(Pump([&] { return Outcome("resumed"); })) << Why();
  const nlohmann::json seconds = Why()["incidents"][0]["seconds"];
  EXPECT_TRUE(seconds["wait"].is_null() && seconds["start"].is_null()) << seconds;
  EXPECT_TRUE(seconds["stop"].is_number() && seconds["total"].is_number()) << seconds;
  EXPECT_THAT(Why()["downtime"][1], HasSubstr("unknown"));
}

TEST_F(SidecarTest, WhoeverHasTheNumberOfARankIsNoRank) {
  Begin(SidecarMode::kAct);
  Launch();
  // Both ranks are known by the other one's number, as if numbers had been given anew.
  std::swap(processes_[0].process_id, processes_[1].process_id);
  ASSERT_TRUE(Pump([&] { return WatchesAttempt(); }));
  Find(FaultClass::kStopped, 1);
  ASSERT_TRUE(Dies(1));
  EXPECT_TRUE(IsAlive(0));
  // Without a descriptor nobody knows who it is.
  Launch();
  processes_[1].pidfd = -1;
  ASSERT_TRUE(Look());
  EXPECT_TRUE(WatchesNone());
}

TEST_F(SidecarTest, ANewAttemptBesideWhatIsLeftOfTheLastOneIsTheOneThatIsWatched) {
  Begin(SidecarMode::kAct);
  Launch();
  ASSERT_TRUE(Pump([&] { return WatchesAttempt(); }));
  const std::map<uint32_t, pid_t> former = ranks_;
  key_ = "a later run";
  StartRanks(2);
  ASSERT_TRUE(Pump([&] { return WatchesAttempt(); }));
  ASSERT_TRUE(Look());
  EXPECT_TRUE(WatchesAttempt());
  Find(FaultClass::kStopped, 1);
  ASSERT_TRUE(Dies(1));
  for (const auto& [rank, process] : former) EXPECT_EQ(waitpid(process, nullptr, WNOHANG), 0);
  EXPECT_TRUE(IsAlive(0));
}

TEST_F(SidecarTest, ALauncherNeedsNoKey) {
  Begin(SidecarMode::kAct);
  StartRanks(2);
  ASSERT_TRUE(Pump([&] { return WatchesAttempt(); }));
  Find(FaultClass::kStopped, 0);
  ASSERT_TRUE(Dies(0));
  EXPECT_TRUE(IsAlive(1));
}

TEST_F(SidecarTest, WhatIsNotItsBusinessIsLeftAlone) {
  Begin(SidecarMode::kAct);
  // Of two nodes.
  Launch(4);
  ASSERT_TRUE(Look());
  EXPECT_TRUE(WatchesNone());
  // Of `holdfast run`.
  runs_here_ = true;
  Launch();
  ASSERT_TRUE(Look());
  EXPECT_TRUE(WatchesNone());
  // An end its launcher sees by itself, in a job that it may act on.
  runs_here_ = false;
  ASSERT_TRUE(Pump([&] { return WatchesAttempt(); }));
  Find(FaultClass::kDead, 1);
  EXPECT_EQ(Status()["incidents"], 0);
  EXPECT_TRUE(IsAlive(1));
}

TEST_F(SidecarTest, JobsThatAreOverMakeRoom) {
  Begin(SidecarMode::kAct);
  Launch();
  ASSERT_TRUE(Pump([&] { return WatchesAttempt(); }));
  // One lives, and more come and go than there is room for.
  const Sidecar::Process living[] = {processes_[0], processes_[1]};
  for (size_t i = 0; i < Sidecar::kJobsMax; ++i) {
    processes_ = {living[0], living[1]};
    const std::string other = absl::StrCat("other-", i);
    const pid_t process = fork();
    if (process == 0) {
      while (true) pause();
    }
    AddProcess(other, 0, 1, process);
    ASSERT_TRUE(Pump([&] { return sidecar_->WordOf(other).next != ""; })) << other;
    kill(process, SIGKILL);
    waitpid(process, nullptr, 0);
    ASSERT_TRUE(Pump([&] { return sidecar_->WordOf(other).next == ""; })) << other;
  }
  EXPECT_NE(sidecar_->WordOf("job").next, "");
}

}  // namespace
}  // namespace holdfast
