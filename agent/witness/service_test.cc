// Which jobs are asked, when, and how much of them. The boards are real, the program in the place
// of holdfast-witness notes what it was asked, and time passes only when the test says so.
#include "agent/witness/service.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "agent/monitor/board_testing.h"
#include "agent/monitor/table_keeper_testing.h"
#include "base/check.h"
#include "tests/support/sim_executor.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using monitor::Source;
using monitor::Syndrome;
using nlohmann::json;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using ::testing::UnorderedElementsAre;

class WitnessServiceTest : public testing::Test {
 protected:
  WitnessServiceTest() {
    WriteHelper(
        "[ $1 = gpus ] && echo '{\"gpus\": []}'\n"
        "[ $1 = stacks ] && printf 'thread %d main\\n  step (app)\\n' $2\nexit 0\n");
    WitnessService::Options options;
    options.node = "n0";
    options.helper_path = helper_path_;
    service_ = std::make_unique<WitnessService>(std::move(options), executor_, executor_, executor_,
                                                boards_);
    service_->Listen([this](const Witnesses::Hearing& hearing) {
      if (hearing.witness.source != Source::kKernelLog) heard_.push_back(hearing);
    });
    service_->Start();
  }

  void WriteHelper(const std::string& body) {
    std::ofstream script(helper_path_);
    script << "#!/bin/sh\necho \"$@\" >> " << asked_path_ << "\n" << body;
    script.close();
    CHECK(chmod(helper_path_.c_str(), 0700) == 0);
  }

  // A process of the job with a board; with a communicator, if `ranks` is not 0.
  void AddRank(const std::string& job, const std::string& key, uint32_t rank, uint32_t ranks) {
    hook::MonitorIdentity identity;
    identity.job = job;
    identity.attempt_key = key;
    identity.node = "n0";
    identity.rank = rank;
    identity.world_size = ranks;
    trainers_.push_back(std::make_unique<TrainerBoard>(identity));
    if (ranks > 0) {
      trainers_.back()->events().OpenCommunicator(
          {.hash = 0xa1, .name = "dp", .ranks = ranks, .rank = rank, .nodes = 1});
    }
    EXPECT_OK(boards_.Adopt(
        trainers_.back()->Offer(UniqueFd(open("/dev/null", O_RDONLY | O_CLOEXEC)), 1000 + rank)));
  }
  void AddWaiting(uint64_t id, const std::string& job) {
    WaitingProcesses::Process process{job, "", static_cast<uint32_t>(id), 4, 2000};
    EXPECT_OK(service_->waiting().Arrive(
        id, process, abi::WitnessWait{}, {},
        [this, id](const abi::WitnessAsk& ask) { asks_.emplace_back(id, ask.parts); }));
  }
  void Find(Syndrome syndrome, const std::string& job = "job", const std::string& key = "run/1") {
    monitor::FindingRecord record;
    record.job = job;
    record.attempt_key = key;
    record.finding.syndrome = syndrome;
    service_->OnFinding(record);
    executor_.RunUntilIdle();
  }
  // What the helper was asked since the last call.
  std::vector<std::string> Asked() {
    std::ifstream file(asked_path_);
    std::vector<std::string> lines;
    for (std::string line; std::getline(file, line);) lines.push_back(line);
    std::ofstream(asked_path_, std::ios::trunc);
    return lines;
  }

  int64_t StacksAsked() {
    const std::vector<std::string> asked = Asked();
    return std::count(asked.begin(), asked.end(), "stacks 1000");
  }

  const TemporaryDirectory directory_;
  const std::string helper_path_ = directory_.Join("helper");
  const std::string asked_path_ = directory_.Join("asked");
  SimExecutor executor_;
  TableKeeper keeper_;
  MonitorBoards boards_{executor_, executor_, keeper_};
  std::vector<std::unique_ptr<TrainerBoard>> trainers_;
  std::vector<Witnesses::Hearing> heard_;
  std::vector<std::pair<uint64_t, uint32_t>> asks_;
  std::unique_ptr<WitnessService> service_;
};

TEST_F(WitnessServiceTest, AStandstillAsksAllOfTheRanksOfItsAttempt) {
  AddRank("job", "run/1", 0, 2);
  AddRank("job", "run/1", 1, 2);
  AddRank("job", "run/0", 2, 2);
  AddRank("other", "", 3, 2);
  Find(Syndrome::kNonCommunicationHang);
  EXPECT_THAT(Asked(), UnorderedElementsAre("gpus", "stacks 1000", "stacks 1001"));
}

TEST_F(WitnessServiceTest, AJobThatIsSlowIsNotLookedAt) {
  AddRank("job", "run/1", 0, 2);
  for (const Syndrome slow : {Syndrome::kCommunicationSlow, Syndrome::kNonCommunicationSlow}) {
    Find(slow);
    EXPECT_THAT(Asked(), UnorderedElementsAre("gpus"));
    executor_.AdvanceTime(2 * Witnesses::kRoundInterval);
    Asked();
  }
}

// A verdict comes a few seconds behind its suspicion: asked when it may be, and once.
TEST_F(WitnessServiceTest, WhatMayNotBeAskedYetIsAskedLater) {
  AddRank("job", "run/1", 0, 2);
  executor_.AdvanceTime(Witnesses::kRoundInterval - absl::Seconds(1));
  Find(Syndrome::kNonCommunicationHang);
  EXPECT_EQ(StacksAsked(), 1);
  executor_.AdvanceTime(absl::Milliseconds(500));
  Find(Syndrome::kNonCommunicationHang);
  EXPECT_EQ(StacksAsked(), 0);
  executor_.AdvanceTime(absl::Seconds(1));  // the service looks, and it is too early
  EXPECT_EQ(StacksAsked(), 0);
  executor_.AdvanceTime(Witnesses::kRoundInterval);
  EXPECT_EQ(StacksAsked(), 1);
  executor_.AdvanceTime(2 * Witnesses::kRoundInterval);
  EXPECT_EQ(StacksAsked(), 0);
}

// Nothing else would notice that such a job stands.
TEST_F(WitnessServiceTest, TheFlightRecordersOfABlindJobAreAskedAgainAndAgain) {
  AddRank("seen", "", 0, 2);
  AddRank("blind", "", 1, 0);
  AddWaiting(8, "seen");
  AddWaiting(9, "blind");
  executor_.AdvanceTime(Witnesses::kRoundInterval);
  EXPECT_THAT(asks_, UnorderedElementsAre(std::pair(uint64_t{9}, abi::kWitnessFlightRecord)));
  executor_.AdvanceTime(Witnesses::kProcessDeadline);
  ASSERT_THAT(heard_, SizeIs(1));
  EXPECT_EQ(heard_[0].job, "blind");
  EXPECT_EQ(heard_[0].witness.source, Source::kFlightRecorder);
  EXPECT_THAT(heard_[0].witness.why, HasSubstr("rank 9: no answer within 2s"));
  for (const std::string& asked : Asked()) EXPECT_EQ(asked, "gpus");
}

// So that a line of the kernel's log is told whom it concerns.
TEST_F(WitnessServiceTest, WhoUsesWhichGpuIsReadWhenProcessesHaveComeOrGone) {
  executor_.AdvanceTime(2 * WitnessService::kGpusEvery);
  EXPECT_THAT(Asked(), IsEmpty());
  AddRank("job", "", 0, 2);
  executor_.AdvanceTime(Witnesses::kRoundInterval);
  EXPECT_THAT(Asked(), UnorderedElementsAre("gpus"));
  executor_.AdvanceTime(2 * WitnessService::kGpusEvery);
  EXPECT_THAT(Asked(), IsEmpty());
  AddRank("job", "", 1, 2);
  executor_.AdvanceTime(Witnesses::kRoundInterval);
  EXPECT_THAT(Asked(), UnorderedElementsAre("gpus"));
  // And from time to time in any case.
  executor_.AdvanceTime(WitnessService::kGpusAtLeastEvery - Witnesses::kRoundInterval);
  EXPECT_THAT(Asked(), IsEmpty());
  executor_.AdvanceTime(2 * Witnesses::kRoundInterval);
  EXPECT_THAT(Asked(), UnorderedElementsAre("gpus"));
}

// The driver may be loaded later than the agent.
TEST_F(WitnessServiceTest, GpusAreReadAgainWhereThereWereNone) {
  WriteHelper("[ $1 = gpus ] && exit 5\n");
  AddRank("job", "", 0, 2);
  for (int i = 0; i < 3; ++i) {
    executor_.AdvanceTime(WitnessService::kGpusAtLeastEvery + Witnesses::kRoundInterval);
    EXPECT_THAT(Asked(), Contains("gpus")) << i;
  }
}

TEST_F(WitnessServiceTest, AllOfThemAreAskedForWhoeverWantsToKnow) {
  json answer;
  const auto ask = [&] {
    answer = json();
    service_->AskAll([&](const std::string& text) { answer = json::parse(text); });
    executor_.AdvanceTime(Witnesses::kProcessDeadline);
  };
  ask();
  EXPECT_EQ(answer, (json{{"schema_version", 1}, {"jobs", json::array()}}));
  AddRank("a", "", 0, 2);
  AddRank("", "", 1, 2);
  AddWaiting(9, "b");
  ask();
  ASSERT_THAT(answer["jobs"], SizeIs(3));
  EXPECT_EQ(answer["jobs"][0]["job"], "a");
  EXPECT_EQ(answer["jobs"][1]["job"], "b");
  EXPECT_EQ(answer["jobs"][2]["job"], "unnamed");
  for (const json& job : answer["jobs"]) EXPECT_THAT(job["witnesses"], SizeIs(5));
  ask();
  EXPECT_THAT(answer["jobs"][0]["witnesses"], SizeIs(1));
  EXPECT_THAT(answer["jobs"][0]["witnesses"][0]["why"], HasSubstr("asked less than"));
  EXPECT_THAT(json::parse(service_->StatusJson()), SizeIs(5));
}

}  // namespace
}  // namespace holdfast
