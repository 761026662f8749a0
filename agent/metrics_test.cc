#include "agent/metrics.h"

#include <deque>
#include <fstream>
#include <iterator>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "agent/recovery/policy_testing.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

using ::testing::HasSubstr;

TEST(MetricsTable, IsWhatTheDocumentSays) {
  std::ifstream file(HOLDFAST_SOURCE_DIR "/docs/OPERATING.md");
  const std::string document(std::istreambuf_iterator<char>(file), {});
  EXPECT_THAT(document, HasSubstr(MetricsTable())) << "expected in docs/OPERATING.md:\n"
                                                   << MetricsTable();
}

// The conventions of Prometheus: what only grows ends with _total, and nothing else does; base
// units; one prefix.
TEST(MetricsTable, NamesFollowTheConventions) {
  std::set<std::string> names;
  for (const MetricFamily& family : MetricFamilies()) {
    const std::string name = family.name;
    EXPECT_TRUE(names.insert(name).second) << name;
    EXPECT_TRUE(absl::StartsWith(name, "holdfast_")) << name;
    EXPECT_EQ(absl::EndsWith(name, "_total"), std::string(family.type) == "counter") << name;
    EXPECT_EQ(name.find_first_not_of("abcdefghijklmnopqrstuvwxyz_"), std::string::npos) << name;
    EXPECT_FALSE(absl::StrContains(name, "millis") || absl::StrContains(name, "_mib")) << name;
    EXPECT_TRUE(absl::EndsWith(family.help, ".")) << name;
  }
}

TEST(MetricsText, EveryFamilyOnceWithItsSamples) {
  recovery::TestJob job;
  job.Begin();
  job.ComeUp(1);
  job.Train(100, absl::Minutes(1));
  job.Commit(100);
  job.Train(150, absl::Seconds(30));
  job.Dies(2);
  job.Evidence();
  job.AllDie();
  job.ComeUp(101, absl::Seconds(4));
  const RunSpec spec{};
  const std::deque<JobSupervisor::Line> lines;
  JobSnapshot run;
  run.job = "llama\"\\\n";
  run.attempt = Attempt{2};
  run.open_ranks = 4;
  run.newest_committed = CheckpointId{Attempt{1}, Step{100}};
  Engine::RankProgress rank;
  rank.heartbeat_count = 3;
  rank.step = Step{151};
  run.ranks = {rank, Engine::RankProgress{}};
  run.run.emplace(JobSupervisor::View{spec, job.settings(), job.history(), lines, 0, false, 0, {}});
  run.verdicts = 1;
  JobSnapshot watched;
  watched.job = "other";
  AgentNumbers agent;
  agent.version = "1";
  agent.mode = "system";
  agent.is_ready = true;
  agent.processor_time = absl::Milliseconds(1500);
  agent.http_answers = {{{"/metrics", 200}, 7}};
  const std::vector<JobSnapshot> jobs = {run, watched};
  const std::string text = MetricsText(agent, jobs);
  for (const char* const line :
       {"holdfast_agent_info{version=\"1\",mode=\"system\"} 1", "holdfast_agent_ready 1",
        "holdfast_agent_cpu_seconds_total 1.5",
        "holdfast_http_answers_total{path=\"/metrics\",code=\"200\"} 7",
        "holdfast_job_state{job=\"llama\\\"\\\\\\n\",state=\"running\"} 1",
        "holdfast_job_state{job=\"other\",state=\"not running\"} 1",
        "holdfast_job_needs_human{job=\"other\"} 0",
        "holdfast_job_step{job=\"llama\\\"\\\\\\n\"} 151",
        "holdfast_job_committed_step{job=\"llama\\\"\\\\\\n\"} 100",
        "holdfast_job_restarts_total{job=\"llama\\\"\\\\\\n\"} 1",
        "holdfast_job_incidents_total{job=\"llama\\\"\\\\\\n\"} 1",
        "holdfast_job_last_incident_seconds{job=\"llama\\\"\\\\\\n\",phase=\"start\"} 8",
        "holdfast_job_findings{job=\"llama\\\"\\\\\\n\",grade=\"verdict\"} 1"}) {
    EXPECT_THAT(text, HasSubstr(absl::StrCat("\n", line, "\n"))) << text;
  }
  // What is not known of a job has no sample.
  EXPECT_FALSE(absl::StrContains(text, "holdfast_job_restarts_total{job=\"other\"}"));
  EXPECT_FALSE(absl::StrContains(text, "holdfast_job_step{job=\"other\"}"));
  for (const MetricFamily& family : MetricFamilies()) {
    const std::string head = absl::StrCat("# TYPE ", family.name, " ", family.type, "\n");
    const std::vector<std::string> parts = absl::StrSplit(text, head);
    EXPECT_EQ(parts.size(), 2) << family.name;
  }
}

}  // namespace
}  // namespace holdfast
