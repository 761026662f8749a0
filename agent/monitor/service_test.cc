#include "agent/monitor/service.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "agent/run/run_recorder.h"
#include "monitor/finding_record.h"
#include "monitor/recording.h"
#include "monitor/sim/catalogue.h"
#include "monitor/sim/run.h"
#include "monitor/sim/world.h"
#include "tests/support/sim_disk.h"
#include "tests/support/sim_executor.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using monitor::FindingRecord;
using monitor::sim::Fault;
using monitor::sim::FaultKind;
using monitor::sim::FaultOf;
using nlohmann::json;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr int kRanks = 8;

// The executor's pool, behind a gate: what comes while it is shut rests until it is opened.
class GatedPool final : public WorkPool {
 public:
  explicit GatedPool(WorkPool& pool) : pool_(pool) {}
  void Run(std::function<void()> work, std::function<void()> done) override {
    if (!shut_) return pool_.Run(std::move(work), std::move(done));
    resting_.emplace_back(std::move(work), std::move(done));
  }
  void Shut() { shut_ = true; }
  void Open() {
    shut_ = false;
    for (auto& [work, done] : std::exchange(resting_, {})) pool_.Run(work, done);
  }
  size_t resting_count() const { return resting_.size(); }

 private:
  WorkPool& pool_;
  bool shut_ = false;
  std::vector<std::pair<std::function<void()>, std::function<void()>>> resting_;
};

// A simulated job and an agent's service over it, on one thread and a simulated disk.
class MonitorServiceTest : public ::testing::Test {
 protected:
  MonitorServiceTest() {
    EXPECT_OK(disk_.CreateDirectory("/state"));
    options_.directory = "/state/monitor";
    options_.log = [this](const std::string& line) { log_.push_back(line); };
    options_.warn = [this](const std::string& line) { warnings_.push_back(line); };
    options_.on_finding = [this](const FindingRecord& record) {
      told_.push_back(std::string(Name(record.finding.grade)) + " " + record.finding.id);
    };
  }
  ~MonitorServiceTest() override { service_.reset(); }

  void StartService() {
    service_ = std::make_unique<MonitorService>(options_, disk_, executor_, pool_, executor_);
    service_->Start();
  }
  void StartWorld(std::vector<Fault> faults) {
    monitor::sim::WorldOptions options;
    options.data_parallel = kRanks;
    options.faults = std::move(faults);
    world_ = std::make_unique<monitor::sim::World>(options);
  }

  // What the nodes of the world report in the next second.
  std::vector<monitor::NodeReport> Reports(const std::string& job = "llama",
                                           const std::string& key = "run/0") {
    std::vector<monitor::NodeReport> reports;
    for (monitor::NodeSummary summary : world_->Tick().arrived) {
      const std::string node = "gpu-" + std::to_string(10 + summary.node);
      summary.node = 0;
      reports.push_back({job, key, kRanks, node, monitor::EncodeSummary(summary)});
    }
    return reports;
  }
  // All ranks of the world are gone, and say for 19 s what `last` says of each.
  void EndWorld(monitor::RankReport last) {
    world_.reset();
    last.process = monitor::ProcessState::kGone;
    monitor::NodeSummary ended;
    ended.incarnation = UINT64_MAX;
    for (uint64_t second = 1; second < 20; ++second) {
      for (uint32_t rank = 0; rank < kRanks; ++rank) {
        ended.sequence = second;
        ended.clock_us = second * 1'000'000;
        last.rank = Rank{rank};
        ended.ranks = {last};
        service_->Deliver({"llama", "run/0", kRanks, "gpu-" + std::to_string(10 + rank),
                           monitor::EncodeSummary(ended)});
      }
      Run(1);
    }
  }

  void Run(int seconds) {
    for (int i = 0; i < seconds; ++i) {
      if (world_ != nullptr) {
        for (monitor::NodeReport& report : Reports()) service_->Deliver(std::move(report));
      }
      executor_.AdvanceTime(absl::Seconds(1));
    }
  }

  absl::StatusOr<json> Ask(MonitorService::Question question) {
    absl::StatusOr<std::string> text = absl::UnknownError("no answer");
    service_->Ask(std::move(question),
                  [&](absl::StatusOr<std::string> answer) { text = std::move(answer); });
    EXPECT_FALSE(text.ok());  // never inside the call
    executor_.RunUntilIdle();
    if (!text.ok()) return text.status();
    json answer = json::parse(*text);
    EXPECT_EQ(answer["schema_version"], 1);
    return answer;
  }
  json AskWell(abi::MonitorQueryKind kind, const std::string& job = "",
               const std::string& finding = "") {
    const absl::StatusOr<json> answer = Ask({kind, job, finding, 0});
    EXPECT_OK(answer.status());
    return answer.ok() ? *answer : json();
  }

  // The log's lines about findings, up to the colon.
  std::vector<std::string> Heads() const {
    std::vector<std::string> heads;
    for (const std::string& line : log_) heads.push_back(line.substr(0, line.find(": ", 9)));
    return heads;
  }

  SimDisk disk_;
  SimExecutor executor_;
  GatedPool pool_{executor_};
  MonitorService::Options options_;
  std::unique_ptr<MonitorService> service_;
  std::unique_ptr<monitor::sim::World> world_;
  std::vector<std::string> log_;
  std::vector<std::string> warnings_;
  std::vector<std::string> told_;
};

TEST_F(MonitorServiceTest, AFaultIsSuspectedThenAVerdictThenWithdrawn) {
  StartService();
  Fault stopped = FaultOf(FaultKind::kStopped, 3, 0);
  stopped.end = stopped.onset + absl::Seconds(20);
  StartWorld({stopped});
  Run(90);
  ASSERT_EQ(service_->findings().size(), 1u);
  const FindingRecord& record = *service_->findings().Records()[0];
  EXPECT_EQ(monitor::sim::Describe(record.finding), "verdict stopped process 3");
  EXPECT_EQ(record.state, monitor::FindingState::kWithdrawn);
  const std::string id = record.finding.id;
  EXPECT_THAT(Heads(), ElementsAre("monitor: suspicion " + id + " (job llama)",
                                   "monitor: verdict " + id + " (job llama)",
                                   "monitor: withdrawn " + id + " (job llama)"));
  EXPECT_THAT(told_, ElementsAre("suspicion " + id, "verdict " + id));
  EXPECT_THAT(warnings_, IsEmpty());
}

// What recovery needs besides the finding: which group stands, for how long, and until when it may.
TEST_F(MonitorServiceTest, AStandstillIsToldWithItsGroupItsAgeAndItsTimeout) {
  std::vector<FindingRecord> changed;
  options_.on_change = [&](const FindingRecord& record, monitor::FindingChange) {
    changed.push_back(record);
  };
  options_.mesh_of = [](const std::string&) { return std::vector<MeshAxis>{{"dp", kRanks}}; };
  StartService();
  StartWorld({FaultOf(FaultKind::kGpuHang, 3, 0)});
  Run(90);
  ASSERT_FALSE(changed.empty());
  const monitor::Finding& finding = changed.back().finding;
  EXPECT_EQ(finding.grade, monitor::Grade::kVerdict);
  EXPECT_NE(finding.communicator, 0u);
  EXPECT_EQ(finding.group, "dp");
  EXPECT_GE(finding.standing, options_.thresholds.hang_verdict);
  ASSERT_TRUE(finding.timeout.has_value());
  EXPECT_GE(*finding.timeout, options_.thresholds.busy_timeout_min);
  EXPECT_LE(*finding.timeout, options_.thresholds.busy_timeout);
  // Shown, with whether it was learned.
  const json status = AskWell(abi::MonitorQueryKind::kStatus, "llama");
  const json& communicator = status["jobs"][0]["communicators"][0];
  EXPECT_EQ(communicator["timeout_seconds"].get<double>(), absl::ToDoubleSeconds(*finding.timeout));
  EXPECT_EQ(communicator["timeout_learned"], true);
}

TEST_F(MonitorServiceTest, HowMuchIsSeenIsToldWithEachStep) {
  std::vector<std::pair<std::string, monitor::Sight>> seen;
  options_.on_sight = [&](const std::string& job, const std::string& key,
                          const monitor::Sight& sight) {
    EXPECT_EQ(job, "llama");
    seen.emplace_back(key, sight);
  };
  StartService();
  StartWorld({});
  Run(10);
  ASSERT_FALSE(seen.empty());
  EXPECT_EQ(seen.back().first, "run/0");
  EXPECT_TRUE(seen.back().second.IsWhole());
  world_.reset();
  Run(10);
  EXPECT_EQ(seen.back().second.ranks, static_cast<uint32_t>(kRanks));
  EXPECT_EQ(seen.back().second.ranks_reporting, 0u);
}

TEST_F(MonitorServiceTest, AWorkersDeathInAHangChangesNeitherIdNorGradeAndTellsNothingTwice) {
  StartService();
  StartWorld({FaultOf(FaultKind::kGpuHang, 3, 0)});
  Run(60);
  ASSERT_EQ(service_->findings().size(), 1u);
  const std::string id = service_->findings().Records()[0]->finding.id;
  ASSERT_EQ(service_->findings().Find(id)->finding.grade, monitor::Grade::kVerdict);
  log_.clear();
  told_.clear();
  StartService();
  ASSERT_NE(service_->findings().Find(id), nullptr);
  EXPECT_EQ(service_->findings().Find(id)->state, monitor::FindingState::kUnwatched);
  Run(150);
  ASSERT_EQ(service_->findings().size(), 1u);
  EXPECT_EQ(service_->findings().Find(id)->state, monitor::FindingState::kOpen);
  EXPECT_EQ(service_->findings().Find(id)->finding.grade, monitor::Grade::kVerdict);
  EXPECT_THAT(Heads(), ElementsAre("monitor: reopened " + id + " (job llama)"));
  EXPECT_THAT(told_, ElementsAre("verdict " + id)) << "witnesses are asked again";
}

TEST_F(MonitorServiceTest, WhatHealedWhileNobodyWatchedIsWithdrawn) {
  StartService();
  StartWorld({FaultOf(FaultKind::kGpuHang, 3, 0)});
  Run(60);
  StartService();
  StartWorld({});
  Run(125);
  ASSERT_EQ(service_->findings().size(), 1u);
  EXPECT_EQ(service_->findings().Records()[0]->state, monitor::FindingState::kWithdrawn);
}

TEST_F(MonitorServiceTest, WhatNothingIsHeardOfAfterARestartIsWithdrawn) {
  StartService();
  StartWorld({FaultOf(FaultKind::kGpuHang, 3, 0)});
  Run(60);
  StartService();
  executor_.AdvanceTime(absl::Minutes(9));
  EXPECT_EQ(service_->findings().Records()[0]->state, monitor::FindingState::kUnwatched);
  executor_.AdvanceTime(absl::Minutes(2));
  EXPECT_EQ(service_->findings().Records()[0]->state, monitor::FindingState::kWithdrawn);
}

TEST_F(MonitorServiceTest, FindingsAreKeptAsLongAsConfigured) {
  options_.verdicts_keep = absl::Minutes(30);
  StartService();
  StartWorld({FaultOf(FaultKind::kKilled, 3, 0)});
  Run(60);
  world_.reset();
  Run(1);
  ASSERT_EQ(service_->findings().size(), 1u);
  executor_.AdvanceTime(absl::Minutes(15));  // the job has been silent: it has ended
  EXPECT_EQ(service_->job_count(), 0u);
  EXPECT_THAT(Heads().back(), HasSubstr("ended"));
  EXPECT_EQ(service_->findings().size(), 1u);
  executor_.AdvanceTime(absl::Minutes(45));
  EXPECT_EQ(service_->findings().size(), 0u);
}

TEST_F(MonitorServiceTest, WhatIsRecordedReplaysToTheSameFindings) {
  options_.mesh_of = [](const std::string&) {
    return std::vector<MeshAxis>{{"pp", 2}, {"dp", kRanks / 2}};
  };
  StartService();
  int waked = 0;
  ASSERT_OK_AND_ASSIGN(const auto stream, service_->Subscribe(abi::MonitorQueryKind::kRecord,
                                                              "llama", [&] { ++waked; }));
  StartWorld({FaultOf(FaultKind::kStopped, 3, 0)});
  for (int i = 0; i < 70; ++i) {
    for (monitor::NodeReport& report : Reports("other")) service_->Deliver(std::move(report));
    // More deliveries than a step can have batches, each of one source: all of them count.
    for (size_t source = 0; i == 65 && source < monitor::kSources; ++source) {
      monitor::Testimony said;
      said.source = static_cast<monitor::Source>(source);
      said.claim = monitor::Claim::kOddStack;
      said.ranks = {Rank{3}};
      said.certainty = 0.5;
      said.sentence = "rank 3 is odd";
      service_->Deliver("llama", std::span(&said, 1));
      const monitor::Testimony state =
          monitor::ToTestimony({said.source, "n1", source > 0, "asleep"});
      service_->Deliver("llama", std::span(&state, 1));
    }
    Run(1);
  }
  EXPECT_EQ(waked, 70);
  monitor::JobAnalysis analysis(monitor::Thresholds{}, "llama");
  monitor::FindingLog replayed;
  int roles = 0;
  for (int i = 0; i < 70; ++i) {
    const std::optional<MonitorStream::Item> item = stream->Take();
    ASSERT_TRUE(item.has_value());
    EXPECT_EQ(item->lost, 0u);
    ASSERT_OK_AND_ASSIGN(monitor::Recorded recorded,
                         monitor::DecodeRecorded(std::as_bytes(std::span(item->text))));
    auto& step = std::get<monitor::RecordedStep>(recorded);
    EXPECT_EQ(step.job, "llama");
    roles += step.step.roles.empty() ? 0 : 1;
    const absl::Duration elapsed = step.step.elapsed;
    const auto result = analysis.Step(std::move(step.step));
    replayed.Take(analysis, result, {elapsed, std::nullopt});
  }
  EXPECT_GE(roles, 1);
  EXPECT_LE(roles, 2);
  EXPECT_FALSE(stream->Take().has_value());
  const auto live = service_->findings().Records("llama");
  ASSERT_EQ(replayed.size(), live.size());
  ASSERT_THAT(live, SizeIs(1));
  EXPECT_EQ(FindingJson(replayed.Records()[0]->finding), FindingJson(live[0]->finding));
  const std::vector<std::string>& evidence = live[0]->finding.evidence;
  EXPECT_EQ(std::count_if(evidence.begin(), evidence.end(),
                          [](const std::string& line) { return line.ends_with("rank 3 is odd"); }),
            static_cast<ptrdiff_t>(monitor::kSources));
  EXPECT_THAT(evidence, Contains("flight-recorder was not heard on n1: asleep"));
  const json status = AskWell(abi::MonitorQueryKind::kStatus, "llama");
  EXPECT_THAT(status["jobs"][0]["witnesses"], SizeIs(monitor::kSources));
  EXPECT_EQ(
      status["jobs"][0]["witnesses"][0],
      (json{{"source", "flight-recorder"}, {"node", "n1"}, {"heard", false}, {"why", "asleep"}}));
  EXPECT_EQ(status["agent"]["reports_dropped"], 0);
  EXPECT_EQ(replayed.Records()[0]->history.size(), live[0]->history.size());
}

TEST_F(MonitorServiceTest, WhatARunsRecorderKeepsReplaysToTheSameFinding) {
  options_.mesh_of = [](const std::string&) {
    return std::vector<MeshAxis>{{"pp", 2}, {"dp", kRanks / 2}};
  };
  StartService();
  const RunRecorder whole(*service_, "llama");
  const RunRecorder last(*service_, "llama", 1);  // bytes: of the newest step alone there is room
  EXPECT_OK(whole.status());
  StartWorld({FaultOf(FaultKind::kStopped, 3, 0)});
  Run(70);
  EXPECT_THAT(whole.Keep().steps, SizeIs(70));
  EXPECT_THAT(last.Keep().steps, SizeIs(1));

  struct Replay {
    monitor::FindingLog log;
    uint64_t lost = 0;
    bool begins_with_roles = false;
  };
  const auto replay = [](const RunRecorder& recorder) {
    const std::string file = RunRecorder::FileOf(recorder.Keep());
    Replay replayed;
    monitor::JobAnalysis analysis(monitor::Thresholds{}, "llama");
    const auto reader = monitor::RecordingReader::Create(file);
    EXPECT_OK(reader.status());
    for (bool is_first = true;;) {
      absl::StatusOr<std::optional<monitor::Recorded>> next = (*reader)->Next();
      EXPECT_OK(next.status());
      if (!next.ok() || !next->has_value()) break;
      if (const auto* loss = std::get_if<monitor::RecordedLoss>(&**next)) {
        replayed.lost += loss->steps;
        continue;
      }
      monitor::JobStep step = std::get<monitor::RecordedStep>(**next).step;
      if (std::exchange(is_first, false)) replayed.begins_with_roles = !step.roles.empty();
      const absl::Duration elapsed = step.elapsed;
      const auto result = analysis.Step(std::move(step));
      replayed.log.Take(analysis, result, {elapsed, std::nullopt});
    }
    EXPECT_TRUE((*reader)->ended());
    return replayed;
  };
  const Replay of_whole = replay(whole);
  EXPECT_EQ(of_whole.lost, 0u);
  const auto live = service_->findings().Records("llama");
  ASSERT_THAT(live, SizeIs(1));
  ASSERT_EQ(of_whole.log.size(), 1u);
  EXPECT_EQ(FindingJson(of_whole.log.Records()[0]->finding), FindingJson(live[0]->finding));
  const Replay of_last = replay(last);
  EXPECT_EQ(of_last.lost, 69u);
  EXPECT_TRUE(of_last.begins_with_roles);
}

TEST_F(MonitorServiceTest, ASlowSubscriberLosesAndIsToldHowMuch) {
  StartService();
  ASSERT_OK_AND_ASSIGN(const auto slow,
                       service_->Subscribe(abi::MonitorQueryKind::kRecord, "", [] {}));
  StartWorld({});
  const int seconds = static_cast<int>(MonitorStream::kWaitingMax) + 10;
  Run(seconds);
  EXPECT_EQ(AskWell(abi::MonitorQueryKind::kStatus)["agent"]["subscribers_lost"], 10);
  for (size_t i = 0; i < MonitorStream::kWaitingMax; ++i) {
    ASSERT_EQ(slow->Take()->lost, 0u) << i;
  }
  EXPECT_FALSE(slow->Take().has_value());
  Run(1);
  EXPECT_EQ(slow->Take()->lost, 10u);
}

TEST_F(MonitorServiceTest, FollowersHearOfTheirJobOnlyAndAreLimited) {
  StartService();
  std::vector<std::shared_ptr<MonitorStream>> streams;
  for (size_t i = 0; i < MonitorService::kStreamsMax; ++i) {
    ASSERT_OK_AND_ASSIGN(auto stream, service_->Subscribe(abi::MonitorQueryKind::kFollow,
                                                          i == 0 ? "llama" : "other", [] {}));
    streams.push_back(std::move(stream));
  }
  EXPECT_THAT(service_->Subscribe(abi::MonitorQueryKind::kFollow, "", [] {}).status(),
              StatusIs(absl::StatusCode::kResourceExhausted));
  streams.pop_back();
  EXPECT_OK(service_->Subscribe(abi::MonitorQueryKind::kFollow, "", [] {}).status());
  StartWorld({FaultOf(FaultKind::kKilled, 3, 0)});
  Run(60);
  const json event = json::parse(streams[0]->Take()->text);
  EXPECT_EQ(event["change"], "suspicion");
  EXPECT_EQ(event["finding"]["suspects"], json::parse(R"([{"rank": 3}])"));
  EXPECT_FALSE(streams[1]->Take().has_value());
}

TEST_F(MonitorServiceTest, QuestionsAreAnsweredFromTheSameMoment) {
  StartService();
  EXPECT_EQ(AskWell(abi::MonitorQueryKind::kStatus)["jobs"], json::array());
  StartWorld({FaultOf(FaultKind::kGpuHang, 3, 0)});
  Run(30);
  json job = AskWell(abi::MonitorQueryKind::kStatus)["jobs"][0];
  EXPECT_EQ(job["job"], "llama");
  EXPECT_EQ(job["light"], "green");
  EXPECT_EQ(job["state"], "running");
  EXPECT_EQ(job["world_size"], kRanks);
  EXPECT_EQ(job["sight"]["ranks_with_telemetry"], kRanks);
  EXPECT_EQ(job["nodes"].size(), static_cast<size_t>(kRanks));
  EXPECT_EQ(job["nodes"][0]["node"], "gpu-10");
  EXPECT_EQ(job["communicators"][0]["size"], kRanks);
  EXPECT_EQ(job["communicators"][0]["ranks_seen"], kRanks);
  EXPECT_GT(job["communicators"][0]["finished"], 10);
  EXPECT_THAT(job["findings"], IsEmpty());

  Run(30);
  job = AskWell(abi::MonitorQueryKind::kStatus, "llama")["jobs"][0];
  EXPECT_EQ(job["light"], "red");
  ASSERT_EQ(job["findings"].size(), 1u);
  const std::string id = job["findings"][0]["id"];
  EXPECT_GT(job["communicators"][0]["standing_seconds"], 10);

  const json waits = AskWell(abi::MonitorQueryKind::kWaits, "llama")["jobs"][0];
  EXPECT_EQ(waits["sinks"][0]["kind"], "rank");
  EXPECT_EQ(waits["sinks"][0]["rank"], 3);
  EXPECT_EQ(waits["sinks"][0]["waiters"], kRanks - 1);
  EXPECT_GE(waits["waits"].size(), static_cast<size_t>(kRanks - 1));
  EXPECT_TRUE(
      std::is_sorted(waits["waits"].begin(), waits["waits"].end(),
                     [](const json& a, const json& b) { return a["seconds"] > b["seconds"]; }));

  const json matrix = AskWell(abi::MonitorQueryKind::kMatrix)["jobs"][0];
  EXPECT_EQ(matrix["communicators"][0]["cells"].size(), static_cast<size_t>(kRanks));
  EXPECT_GT(matrix["communicators"][0]["cells"][0]["us_per_mib"], 0);

  EXPECT_EQ(AskWell(abi::MonitorQueryKind::kFindings)["findings"][0]["id"], id);
  EXPECT_THAT(Ask({abi::MonitorQueryKind::kFindings, "other", "", 0}).status(), IsNotFound());
  EXPECT_THAT(AskWell(abi::MonitorQueryKind::kFollow, "other")["findings"], IsEmpty());
  const json explained = AskWell(abi::MonitorQueryKind::kExplain, "", id)["finding"];
  EXPECT_EQ(explained["history"].size(), 2u);
  EXPECT_EQ(explained["history"][0]["change"], "suspicion");
  EXPECT_THAT(explained["history"][0]["wall_time"].get<std::string>(), HasSubstr("2001-09-09T"));
  EXPECT_FALSE(explained["changes_mind"].get<std::string>().empty());

  EXPECT_THAT(Ask({abi::MonitorQueryKind::kExplain, "", "nothing", 0}).status(), IsNotFound());
  EXPECT_EQ(AskWell(abi::MonitorQueryKind::kExplain, "llama", id)["finding"], explained);
  EXPECT_THAT(
      std::string(Ask({abi::MonitorQueryKind::kExplain, "other", id, 0}).status().message()),
      HasSubstr("expected one of job other, found one of job llama"));
  EXPECT_THAT(Ask({abi::MonitorQueryKind::kStatus, "nothing", "", 0}).status(), IsNotFound());
  EXPECT_THAT(Ask({abi::MonitorQueryKind{99}, "", "", 0}).status(),
              StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST_F(MonitorServiceTest, ASlowCellIsMarkedInTheMatrix) {
  StartService();
  StartWorld({FaultOf(FaultKind::kLink, 2, 0.3, 3)});
  Run(100);
  const json job = AskWell(abi::MonitorQueryKind::kMatrix)["jobs"][0];
  int slow = 0;
  for (const json& communicator : job["communicators"]) {
    for (const json& cell : communicator["cells"]) {
      if (!cell["slow"]) continue;
      ++slow;
      EXPECT_EQ(cell["from"], 2);
      EXPECT_EQ(cell["to"], 3);
      EXPECT_GT(cell["us_per_mib"].get<double>(), cell["peers_us_per_mib"].get<double>() * 1.25);
    }
  }
  EXPECT_GE(slow, 1);
}

// The pool is busy for half a minute: what came meanwhile is old for us, and nobody's fault.
TEST_F(MonitorServiceTest, AStepThatTakesLongIsABlindReceiverAndNoFinding) {
  StartService();
  ASSERT_OK_AND_ASSIGN(const auto stream,
                       service_->Subscribe(abi::MonitorQueryKind::kRecord, "", [] {}));
  StartWorld({});
  Run(30);
  pool_.Shut();
  Run(30);
  EXPECT_EQ(pool_.resting_count(), 1u);  // one step, not thirty
  pool_.Open();
  executor_.RunUntilIdle();
  Run(30);
  EXPECT_EQ(service_->findings().size(), 0u);
  absl::Duration gap;
  int steps = 0;
  while (const auto item = stream->Take()) {
    const auto recorded = monitor::DecodeRecorded(std::as_bytes(std::span(item->text)));
    gap = std::max(gap, std::get<monitor::RecordedStep>(*recorded).step.receiver_gap);
    ++steps;
  }
  EXPECT_GT(gap, absl::Seconds(20));
  EXPECT_LT(steps, 75);
}

TEST_F(MonitorServiceTest, AJobEndsWithItsLastRankAndMayBeginAgain) {
  StartService();
  StartWorld({FaultOf(FaultKind::kStopped, 3, 0)});
  Run(60);
  ASSERT_EQ(service_->findings().size(), 1u);
  monitor::RankReport ended;
  ended.exit = monitor::ExitKind::kClean;
  EndWorld(ended);
  EXPECT_THAT(Heads().back(), HasSubstr("monitor: ended"));
  EXPECT_EQ(std::count_if(log_.begin(), log_.end(),
                          [](const std::string& line) { return line.find("ended") == 9; }),
            1);
  EXPECT_EQ(AskWell(abi::MonitorQueryKind::kStatus)["jobs"][0]["state"], "ended");
  StartWorld({});
  for (int i = 0; i < 3; ++i) {
    for (monitor::NodeReport& report : Reports("llama", "run/1")) {
      service_->Deliver(std::move(report));
    }
    executor_.AdvanceTime(absl::Seconds(1));
  }
  const json job = AskWell(abi::MonitorQueryKind::kStatus)["jobs"][0];
  EXPECT_EQ(job["state"], "running");
  EXPECT_EQ(job["attempt_key"], "run/1");
}

// As under torchrun, which tells nobody how its ranks ended: no finding, and no praise.
TEST_F(MonitorServiceTest, AJobWhoseEndNobodySawIsOverAndGrey) {
  StartService();
  StartWorld({});
  Run(40);
  EXPECT_EQ(AskWell(abi::MonitorQueryKind::kStatus)["jobs"][0]["light"], "green");
  monitor::RankReport ended;
  ended.exit = monitor::ExitKind::kUnknown;
  ended.level = monitor::TelemetryLevel::kLight;
  EndWorld(ended);
  const json job = AskWell(abi::MonitorQueryKind::kStatus)["jobs"][0];
  EXPECT_EQ(job["state"], "ended");
  EXPECT_EQ(job["light"], "grey");
  EXPECT_EQ(job["sight"]["whole"], true);
  EXPECT_EQ(job["ranks_ended_unseen"], kRanks);
  EXPECT_EQ(service_->findings().size(), 0u);
}

TEST_F(MonitorServiceTest, JobsAndReportsAreBounded) {
  StartService();
  const auto deliver = [&](const std::string& job) {
    service_->Deliver({job, "", 1, "node", monitor::EncodeSummary(monitor::NodeSummary{})});
  };
  for (size_t i = 0; i < MonitorService::kJobsMax; ++i) deliver("job-" + std::to_string(i));
  EXPECT_EQ(service_->job_count(), MonitorService::kJobsMax);
  deliver("one-more");
  deliver("one-more");
  EXPECT_EQ(service_->job_count(), MonitorService::kJobsMax);
  ASSERT_THAT(warnings_, SizeIs(1));
  EXPECT_THAT(warnings_[0], HasSubstr("one-more"));
  Run(10);
  deliver("job-1");
  deliver("one-more");  // job-0 has been silent
  EXPECT_EQ(service_->job_count(), MonitorService::kJobsMax);
  EXPECT_THAT(Ask({abi::MonitorQueryKind::kStatus, "job-0", "", 0}).status(), IsNotFound());
  EXPECT_OK(Ask({abi::MonitorQueryKind::kStatus, "one-more", "", 0}).status());

  const std::string large(monitor::kSummaryBytesMax, 'x');
  for (int i = 0; i < 60; ++i) service_->Deliver({"one-more", "", 1, "node", large});
  service_->Deliver({"one-more", "", 1, "node", large + "x"});
  service_->Deliver({"", "", 1, "node", "x"});
  service_->Deliver({"one-more", "", 1, "", "x"});
  Run(1);
  const json status = AskWell(abi::MonitorQueryKind::kStatus, "one-more");
  // The small one from above leaves room for 47.
  EXPECT_EQ(status["agent"]["reports_dropped"].get<int>(), 2 + 60 - 47 + 3);
  EXPECT_EQ(status["jobs"][0]["reports_refused"], 47);
  EXPECT_THAT(status["jobs"][0]["refused_because"].get<std::string>(), HasSubstr("magic"));

  // As many testimonies as a step can have, and a delivery beyond it.
  const std::vector<monitor::Testimony> many(monitor::kTestimoniesMax);
  for (size_t i = 0; i <= monitor::kTestimoniesPerStepMax; ++i) service_->Deliver("one-more", many);
  service_->Deliver("nobody's", many);
  Run(1);
  const json after = AskWell(abi::MonitorQueryKind::kStatus, "one-more");
  EXPECT_EQ(after["agent"]["reports_dropped"].get<int>(),
            status["agent"]["reports_dropped"].get<int>() + 1);
}

TEST_F(MonitorServiceTest, ANameCannotWriteLinesIntoTheLog) {
  StartService();
  StartWorld({FaultOf(FaultKind::kKilled, 3, 0)});
  for (int i = 0; i < 60; ++i) {
    for (monitor::NodeReport& report : Reports("llama\n\x1b[31m")) {
      service_->Deliver(std::move(report));
    }
    executor_.AdvanceTime(absl::Seconds(1));
  }
  ASSERT_FALSE(log_.empty());
  for (const std::string& line : log_) {
    EXPECT_EQ(line.find('\n'), std::string::npos);
    EXPECT_EQ(line.find('\x1b'), std::string::npos);
  }
}

TEST(RolesFromMeshTest, TheLastAxisVariesFastest) {
  const auto roles = RolesFromMesh({{"pp", 2}, {"dp", 3}, {"TP", 2}}, 12);
  ASSERT_EQ(roles.size(), 12u);
  for (uint32_t rank = 0; rank < 12; ++rank) {
    EXPECT_EQ(roles[rank], (monitor::RankRole{rank / 6, rank % 2})) << rank;
  }
}

TEST(GroupFromMeshTest, IsTheAxesAlongWhichTheMembersDiffer) {
  const std::vector<MeshAxis> mesh = {{"pp", 2}, {"dp", 3}, {"tp", 2}};
  EXPECT_EQ(GroupFromMesh(mesh, {0, 6}), "pp");
  EXPECT_EQ(GroupFromMesh(mesh, {1, 3, 5}), "dp");
  EXPECT_EQ(GroupFromMesh(mesh, {5, 1, 3}), "dp");
  EXPECT_EQ(GroupFromMesh(mesh, {10, 11}), "tp");
  EXPECT_EQ(GroupFromMesh(mesh, {0, 1, 2, 3, 4, 5}), "dp+tp");
  EXPECT_EQ(GroupFromMesh(mesh, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}), "pp+dp+tp");
  EXPECT_EQ(GroupFromMesh({{"dp", 4}, {"tp", 1}}, {0, 1, 2, 3}), "dp");
}

TEST(GroupFromMeshTest, WhatIsNoGroupOfTheMeshHasNoName) {
  const std::vector<MeshAxis> mesh = {{"pp", 2}, {"dp", 3}, {"tp", 2}};
  for (const std::vector<int64_t>& members : {std::vector<int64_t>{},
                                              {0},
                                              {0, 3},
                                              {0, 1, 2},
                                              {1, 3},
                                              {0, -1},
                                              {0, 0},
                                              {0, 12},
                                              {0, INT64_MAX}}) {
    EXPECT_EQ(GroupFromMesh(mesh, members), "");
  }
  EXPECT_EQ(GroupFromMesh({}, {0, 1}), "");
  EXPECT_EQ(GroupFromMesh({{"dp", 0}}, {0, 1}), "");
}

TEST(RolesFromMeshTest, WhatSaysNothingOfRolesGivesNone) {
  EXPECT_THAT(RolesFromMesh({{"dp", 8}}, 8), IsEmpty());
  EXPECT_THAT(RolesFromMesh({}, 1), IsEmpty());
  EXPECT_THAT(RolesFromMesh({{"pp", 2}, {"dp", 3}}, 8), IsEmpty());
  EXPECT_THAT(RolesFromMesh({{"pp", 0}}, 0), IsEmpty());
  EXPECT_THAT(RolesFromMesh({{"pp", UINT32_MAX}, {"dp", UINT32_MAX}, {"x", UINT32_MAX}}, 1),
              IsEmpty());
}

}  // namespace
}  // namespace holdfast
