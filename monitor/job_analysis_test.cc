#include "monitor/job_analysis.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "monitor/sim/catalogue.h"
#include "monitor/sim/run.h"
#include "monitor/sim/world.h"

namespace holdfast::monitor {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

// A second of a simulated job as its nodes report it: by name, each summary as bytes.
JobStep ToStep(const Snapshot& snapshot, uint32_t world_size, const std::string& key = "run/0") {
  JobStep step{snapshot.elapsed, snapshot.receiver_gap, {}, {}, {}};
  for (NodeSummary summary : snapshot.arrived) {
    const std::string node = "gpu-" + std::to_string(10 + summary.node);
    summary.node = 0;
    step.reports.push_back({"llama", key, world_size, node, EncodeSummary(summary)});
  }
  return step;
}

// What an attempt of `ranks` ranks, one on each node, reports in its `second`-th second.
JobStep Reports(int second, uint32_t ranks, uint32_t world_size, const std::string& key,
                ExitKind exit = ExitKind::kNone, uint64_t incarnation = 1) {
  JobStep step{absl::Seconds(second), absl::ZeroDuration(), {}, {}, {}};
  for (uint32_t r = 0; r < ranks; ++r) {
    NodeSummary summary;
    summary.incarnation = incarnation;
    summary.sequence = static_cast<uint64_t>(second);
    summary.clock_us = static_cast<uint64_t>(second) * 1'000'000;
    RankReport& rank = summary.ranks.emplace_back();
    rank.rank = Rank{r};
    rank.process = exit == ExitKind::kNone ? ProcessState::kRunning : ProcessState::kGone;
    rank.exit = exit;
    step.reports.push_back(
        {"llama", key, world_size, "node-" + std::to_string(r), EncodeSummary(summary)});
  }
  return step;
}

JobAnalysis NewJob() { return JobAnalysis(Thresholds{}, "llama"); }

// All that the analysis says over `seconds` of a world, as text; ids included.
std::vector<std::string> Say(const sim::WorldOptions& options, int seconds,
                             const std::function<void(JobStep&)>& change) {
  sim::World world(options);
  JobAnalysis job = NewJob();
  std::vector<std::string> said;
  for (int i = 0; i < seconds; ++i) {
    JobStep step = ToStep(world.Tick(), options.data_parallel);
    if (change) change(step);
    for (const Finding& finding : job.Step(std::move(step)).analysis.findings) {
      said.push_back(finding.id + " " + finding.sentence);
    }
  }
  return said;
}

sim::WorldOptions Hang() {
  sim::WorldOptions options;
  options.faults = {sim::FaultOf(sim::FaultKind::kGpuHang, 3, 0)};
  return options;
}

TEST(JobAnalysisTest, FindsWhatTheAnalyzerFindsAndCallsNodesByName) {
  const sim::Outcome expected = sim::Observe(Hang(), absl::Seconds(60));
  ASSERT_THAT(expected.told, SizeIs(1));
  sim::World world(Hang());
  JobAnalysis job = NewJob();
  std::vector<Finding> last;
  for (int i = 0; i < 60; ++i) {
    const JobAnalysis::Result result = job.Step(ToStep(world.Tick(), 8));
    EXPECT_EQ(result.new_attempt, i == 0);
    last = result.analysis.findings;
  }
  ASSERT_THAT(last, SizeIs(1));
  EXPECT_EQ(sim::Describe(last[0]), sim::Describe(expected.told[0].finding));
  EXPECT_THAT(last[0].sentence, HasSubstr("gpu-13"));
  EXPECT_THAT(job.nodes(), SizeIs(8));
  EXPECT_EQ(job.attempt_key(), "run/0");
}

TEST(JobAnalysisTest, TheOrderOfReportsWithinAStepChangesNothing) {
  constexpr uint32_t kSeed = 5;
  std::mt19937 random(kSeed);
  const std::vector<std::string> expected = Say(Hang(), 60, nullptr);
  ASSERT_FALSE(expected.empty());
  EXPECT_EQ(
      Say(Hang(), 60,
          [&](JobStep& step) { std::shuffle(step.reports.begin(), step.reports.end(), random); }),
      expected)
      << "seed " << kSeed;
}

TEST(JobAnalysisTest, ANewAttemptBeginsAnewAndTheOldOneIsLate) {
  JobAnalysis job = NewJob();
  for (int i = 1; i <= 5; ++i) job.Step(Reports(i, 2, 2, "run/0"));
  EXPECT_TRUE(job.Step(Reports(6, 2, 2, "run/1")).new_attempt);
  EXPECT_EQ(job.attempt_key(), "run/1");
  // The nodes of the old one go on for a while, in one step with the new ones, whatever the order.
  for (int i = 7; i < 20; ++i) {
    JobStep step = Reports(i, 2, 2, "run/1");
    for (NodeReport& report : Reports(i, 2, 2, "run/0").reports) {
      step.reports.insert(step.reports.begin(), std::move(report));
    }
    EXPECT_FALSE(job.Step(std::move(step)).new_attempt);
    EXPECT_EQ(job.attempt_key(), "run/1");
  }
  EXPECT_EQ(job.refused().late, 2u * 13);
  // One that nobody has heard of for long is new again.
  EXPECT_TRUE(job.Step(Reports(100, 2, 2, "run/0")).new_attempt);
}

TEST(JobAnalysisTest, AnotherWorldSizeIsAnotherAttempt) {
  JobAnalysis job = NewJob();
  job.Step(Reports(1, 4, 4, ""));
  EXPECT_TRUE(job.Step(Reports(2, 2, 2, "")).new_attempt);
  EXPECT_EQ(job.world_size(), 2u);
}

TEST(JobAnalysisTest, AWorldSizeThatNobodyHasSaidGrowsWithTheRanks) {
  JobAnalysis job = NewJob();
  EXPECT_FALSE(job.Step({absl::Seconds(1), {}, {}, {}, {}}).new_attempt);
  EXPECT_EQ(job.analyzer(), nullptr);
  job.Step(Reports(2, 2, 0, ""));
  EXPECT_EQ(job.world_size(), 2u);
  job.Step(Reports(3, 3, 0, ""));
  EXPECT_EQ(job.world_size(), 3u);
  // Somebody says it: those who do not are of the same attempt.
  EXPECT_TRUE(job.Step(Reports(4, 3, 8, "")).new_attempt);
  EXPECT_FALSE(job.Step(Reports(5, 3, 0, "")).new_attempt);
  EXPECT_EQ(job.world_size(), 8u);
}

TEST(JobAnalysisTest, ItEndsWhenEveryRankHasEndedCleanlyAndBeginsWhenOneRunsAgain) {
  JobAnalysis job = NewJob();
  job.Step(Reports(1, 2, 2, ""));
  EXPECT_FALSE(job.Step(Reports(2, 1, 2, "", ExitKind::kClean)).ended);
  EXPECT_TRUE(job.Step(Reports(3, 2, 2, "", ExitKind::kClean)).ended);
  // A report that was late on its way is not a new run.
  EXPECT_FALSE(job.Step(Reports(2, 2, 2, "")).new_attempt);
  const JobAnalysis::Result again = job.Step(Reports(9, 2, 2, ""));
  EXPECT_TRUE(again.new_attempt);
  EXPECT_FALSE(again.ended);
  for (const ExitKind exit : {ExitKind::kError, ExitKind::kTerminated}) {
    JobAnalysis other = NewJob();
    other.Step(Reports(1, 2, 2, ""));
    EXPECT_FALSE(other.Step(Reports(2, 2, 2, "", exit)).ended);
  }
}

TEST(JobAnalysisTest, FindingsOfTwoRunsUnderOneNameHaveTwoIds) {
  JobAnalysis job = NewJob();
  std::vector<std::string> ids;
  for (int run = 0; run < 2; ++run) {
    const int begin = 100 * run;
    for (int i = 1; i < 4; ++i) job.Step(Reports(begin + i, 2, 2, ""));
    for (int i = 4; i < 10; ++i) {
      const auto result = job.Step(Reports(begin + i, 2, 2, "", ExitKind::kKilled));
      if (i == 9) {
        ASSERT_THAT(result.analysis.findings, SizeIs(1));
        ids.push_back(result.analysis.findings[0].id);
      }
    }
  }
  EXPECT_NE(ids[0], ids[1]);
}

TEST(JobAnalysisTest, WhatIsBeyondTheLimitsIsRefusedAndSaid) {
  JobAnalysis job = NewJob();
  job.Step(Reports(1, 2, 2, ""));
  const auto refuse = [&](const std::function<void(NodeReport&)>& change, const std::string& why) {
    JobStep step = Reports(2, 1, 2, "");
    change(step.reports[0]);
    const uint64_t before = job.refused().unreadable;
    job.Step(std::move(step));
    EXPECT_EQ(job.refused().unreadable, before + 1) << why;
    EXPECT_THAT(job.refused().why, HasSubstr(why));
    EXPECT_EQ(job.world_size(), 2u);
  };
  refuse([](NodeReport& report) { report.world_size = kWorldSizeMax + 1; }, "world size");
  refuse([](NodeReport& report) { report.node.clear(); }, "node");
  refuse([](NodeReport& report) { report.attempt_key.assign(kAttemptKeyBytesMax + 1, 'k'); },
         "attempt key");
  refuse([](NodeReport& report) { report.summary[8] ^= 1; }, "CRC32C");
  refuse(
      [](NodeReport& report) {
        NodeSummary summary;
        summary.ranks.resize(1);
        summary.ranks[0].rank = Rank{kWorldSizeMax};
        report.summary = EncodeSummary(summary);
      },
      "rank: expected below");
}

// Two stages of which one computes longer: equal peers accuse it, peers of a stage do not.
TEST(JobAnalysisTest, RolesDecideWhoIsComparedWithWhom) {
  sim::WorldOptions options;
  options.data_parallel = 4;
  options.stages = 3;
  options.stage_weight = {1, 1, 3};
  for (const bool roles : {true, false}) {
    sim::World world(options);
    const JobShape shape = world.shape();
    JobAnalysis job = NewJob();
    size_t findings = 0;
    size_t imbalances = 0;
    for (int i = 0; i < 60; ++i) {
      JobStep step = ToStep(world.Tick(), static_cast<uint32_t>(shape.ranks.size()));
      if (roles && i == 3) {
        for (const RankPlace& place : shape.ranks) {
          step.roles.push_back({place.stage, place.tensor_position});
        }
      }
      const Analysis analysis = job.Step(std::move(step)).analysis;
      findings += analysis.findings.size();
      imbalances += static_cast<size_t>(std::count_if(
          analysis.notes.begin(), analysis.notes.end(),
          [](const WaitNote& note) { return note.reason == WaitNote::Reason::kImbalance; }));
    }
    EXPECT_EQ(job.roles_known(), roles);
    EXPECT_EQ(imbalances > 0, roles);
    EXPECT_TRUE(!roles || findings == 0);
  }
}

}  // namespace
}  // namespace holdfast::monitor
