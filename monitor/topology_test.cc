// The topology file: what it may say, what is said of what it may not, and what the analysis makes
// of it.
#include "monitor/topology.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "monitor/job_analysis.h"
#include "monitor/recording.h"
#include "monitor/sim/catalogue.h"
#include "monitor/sim/run.h"
#include "monitor/sim/world.h"
#include "tests/support/status_matchers.h"

namespace holdfast::monitor {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::Optional;
using ::testing::SizeIs;

constexpr uint32_t kRanks = 8;

// The example of docs/MONITOR.md.
std::string Example() {
  std::ifstream file(std::string(HOLDFAST_SOURCE_DIR) + "/docs/MONITOR.md");
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const size_t section = text.find("### The topology file");
  const size_t begin = text.find("```json\n", section);
  const size_t end = text.find("```", begin + 8);
  if (section == std::string::npos || begin == std::string::npos) return "";
  return text.substr(begin + 8, end - begin - 8);
}

TEST(TopologyTest, TheExampleOfTheDocumentationIsRead) {
  ASSERT_OK_AND_ASSIGN(const Topology topology, Topology::Parse(Example()));
  EXPECT_EQ(topology.node_count(), 3u);
  EXPECT_THAT(topology.Find("gpu-01", 1), Optional(Port{"mlx5_1", 1, "cx7-400", "leaf-1"}));
  EXPECT_THAT(topology.Find("gpu-02", 0), Optional(Port{"mlx5_0", 0, "cx7-400", "leaf-2"}));
  // Its own GPUs, and a switch of one of them.
  EXPECT_THAT(topology.Find("old-07", 0), Optional(Port{"mlx5_0", 0, "cx6-200", "leaf-9"}));
  EXPECT_THAT(topology.Find("old-07", 1), Optional(Port{"mlx5_2", 1, "cx6-200", "leaf-8"}));
  EXPECT_EQ(topology.Find("old-07", 2), std::nullopt);
  EXPECT_EQ(topology.Find("gpu-03", 0), std::nullopt);
}

TEST(TopologyTest, WhatItMayNotSayIsNamedWithItsPlace) {
  const auto nodes = [](const std::string& node) {
    return absl::StrCat(R"({"schema_version": 1, "nodes": {"n0": )", node, "}}");
  };
  const auto gpu = [&](const std::string& members) {
    return nodes(absl::StrCat(R"({"gpus": [{"nic": "a"}, {)", members, "}]}"));
  };
  const std::string long_name(kTopologyNameBytesMax + 1, 'x');
  const std::vector<std::pair<std::string, std::vector<std::string>>> cases = {
      {"{\n  \"nodes\": }", {"line 2"}},
      {"[]", {"expected an object"}},
      {R"({"nodes": {}})", {"schema_version"}},
      {R"({"schema_version": 2, "nodes": {}})",
       {"schema_version", "expected 1, found the number 2"}},
      {R"({"schema_version": 1})", {"nodes"}},
      {R"({"schema_version": 1, "nodes": {}})", {"nodes", "1 to 65536 nodes"}},
      {R"({"schema_version": 1, "nodes": {}, "switches": {}})", {"switches"}},
      {nodes("3"), {"nodes.n0", "object"}},
      {nodes("{}"), {"nodes.n0", "kind", "gpus"}},
      {nodes(R"({"kind": "k"})"), {"nodes.n0.kind", "one of node_kinds", "\"k\""}},
      {nodes(R"({"kind": "k", "gpus": []})"), {"nodes.n0", "either"}},
      {nodes(R"({"gpus": []})"), {"nodes.n0.gpus", "1 to 64 GPUs"}},
      {nodes(R"({"gpus": [{"nic": "a"}], "switch": ""})"), {"nodes.n0.switch", "1 to 64 bytes"}},
      {gpu(""), {"nodes.n0.gpus[1]", "\"nic\""}},
      {gpu(R"("nic": "b", "rails": 1)"), {"nodes.n0.gpus[1]", "rails", "rail"}},
      {gpu(R"("nic": "b", "rail": -1)"), {"nodes.n0.gpus[1].rail", "-1"}},
      {gpu(R"("nic": "b", "rail": 1024)"), {"nodes.n0.gpus[1].rail", "up to 1023"}},
      {gpu(R"("nic": "b\u0007")"), {"nodes.n0.gpus[1].nic", "control"}},
      {gpu(absl::StrCat(R"("nic": ")", long_name, "\"")), {"nodes.n0.gpus[1].nic", "1 to 64"}},
      {gpu(R"("nic": "b", "nic": "c")"), {"nic"}},
      {R"({"schema_version": 1, "node_kinds": {"k": {}}, "nodes": {"n": {"kind": "k"}}})",
       {"node_kinds.k", "\"gpus\""}},
  };
  for (const auto& [text, expected] : cases) {
    const auto topology = Topology::Parse(text);
    ASSERT_EQ(topology.status().code(), absl::StatusCode::kInvalidArgument) << text;
    for (const std::string& part : expected) {
      EXPECT_THAT(std::string(topology.status().message()), HasSubstr(part)) << text;
    }
  }
}

// One rank on each node, all on one rail. `kinds`: of NICs, by node; others are "400G".
std::string Document(const std::map<uint32_t, std::string>& kinds, uint32_t nodes = kRanks) {
  std::string text = R"({"schema_version": 1, "nodes": {)";
  for (uint32_t node = 0; node < nodes; ++node) {
    const auto kind = kinds.find(node);
    absl::StrAppend(&text, node == 0 ? "" : ",", "\"gpu-1", node, R"(": {"switch": "leaf-)",
                    node / 4, R"(", "gpus": [{"nic": "mlx5_)", node, R"(", "nic_kind": ")",
                    kind == kinds.end() ? "400G" : kind->second, "\"}]}");
  }
  return text + "}}";
}

struct Heard {
  std::vector<Finding> verdicts;  // open at the end
  uint32_t placed = 0;
  JobAnalysis::Refused refused;
};

// What is found in a job of which `topology` is known from its second step on; recorded and
// replayed on the way, as everything that reaches an analysis can be.
Heard Analyse(const sim::WorldOptions& options, int seconds, const std::string& topology) {
  sim::World world(options);
  RecordingWriter writer;
  std::string file = writer.Begin();
  for (int second = 0; second < seconds; ++second) {
    Snapshot snapshot = world.Tick();
    JobStep step{snapshot.elapsed, snapshot.receiver_gap, {}, {}, {}};
    if (second == 1) step.topology = topology;
    for (NodeSummary& summary : snapshot.arrived) {
      const std::string node = absl::StrCat("gpu-1", std::exchange(summary.node, 0));
      step.reports.push_back({"llama", "run/0", kRanks, node, EncodeSummary(summary)});
    }
    file += writer.Append(EncodeRecorded(RecordedStep{"llama", std::move(step)}));
  }
  file += writer.End();
  JobAnalysis job(Thresholds{}, "llama");
  Heard heard;
  const auto reader = RecordingReader::Create(file);
  EXPECT_OK(reader.status());
  for (auto next = (*reader)->Next(); next.ok() && next->has_value(); next = (*reader)->Next()) {
    heard.verdicts = job.Step(std::move(std::get<RecordedStep>(**next).step)).analysis.findings;
  }
  EXPECT_TRUE((*reader)->ended());
  std::erase_if(heard.verdicts, [](const Finding& f) { return f.grade != Grade::kVerdict; });
  for (uint32_t r = 0; r < kRanks; ++r) heard.placed += job.IsPlaced(Rank{r}) ? 1 : 0;
  heard.refused = job.refused();
  return heard;
}

sim::WorldOptions TwoRings() {
  sim::WorldOptions options;
  options.traffic = sim::Traffic::kTwoRings;
  return options;
}

TEST(TopologyTest, AVerdictNamesTheNicsWithAFileAndSaysThatItCannotWithout) {
  sim::WorldOptions options = TwoRings();
  options.faults = {sim::FaultOf(sim::FaultKind::kSender, 3, 0.5)};
  Heard heard = Analyse(options, 110, Document({}));
  EXPECT_EQ(heard.placed, kRanks);
  ASSERT_THAT(heard.verdicts, SizeIs(1));
  EXPECT_EQ(sim::Describe(heard.verdicts[0]), "verdict sender-end sender-nic 3");
  EXPECT_THAT(heard.verdicts[0].sentence, HasSubstr("(sender-nic; NIC mlx5_3 of node gpu-13)"));
  EXPECT_THAT(heard.verdicts[0].evidence, Contains("rail 0, switch leaf-0"));
  heard = Analyse(options, 110, "");
  EXPECT_EQ(heard.placed, 0u);
  ASSERT_THAT(heard.verdicts, SizeIs(1));
  EXPECT_THAT(heard.verdicts[0].sentence, HasSubstr("(sender-nic; NIC unknown)"));

  options.faults = {sim::FaultOf(sim::FaultKind::kLink, 3, 0, 4)};
  heard = Analyse(options, 60, Document({}));
  ASSERT_THAT(heard.verdicts, SizeIs(1));
  EXPECT_THAT(heard.verdicts[0].sentence,
              HasSubstr("(from NIC mlx5_3 of node gpu-13 to NIC mlx5_4 of node gpu-14)."));
  EXPECT_THAT(heard.verdicts[0].evidence, Contains("rail 0, switch leaf-0 to switch leaf-1"));
  EXPECT_THAT(Analyse(options, 60, "").verdicts[0].sentence, Not(HasSubstr("NIC")));
}

// A NIC that has been slow from the start may be of a slower kind: only the file can tell.
TEST(TopologyTest, WhoIsSlowFromTheStartIsFoundIfItsNicIsOfTheKindOfTheOthers) {
  sim::WorldOptions options = TwoRings();
  options.node_rate.assign(kRanks, 1);
  options.node_rate[5] = 0.5;
  EXPECT_THAT(Analyse(options, 110, "").verdicts, IsEmpty());
  EXPECT_THAT(Analyse(options, 110, Document({{5, "200G"}})).verdicts, IsEmpty());
  EXPECT_THAT(Analyse(options, 110, Document({})).verdicts, Not(IsEmpty()));
  // One rank of which the file says nothing: what is not known of it might explain the rest.
  const Heard heard = Analyse(options, 110, Document({}, kRanks - 1));
  EXPECT_EQ(heard.placed, kRanks - 1);
  EXPECT_THAT(heard.verdicts, IsEmpty());
}

TEST(TopologyTest, AFileThatCannotBeReadIsCountedAndChangesNothing) {
  const Heard heard = Analyse(TwoRings(), 3, "{");
  EXPECT_EQ(heard.placed, 0u);
  EXPECT_EQ(heard.refused.unreadable, 1u);
  EXPECT_THAT(heard.refused.why, AllOf(HasSubstr("topology"), HasSubstr("line 1")));
}

// Ranks that were started without LOCAL_RANK all say 0.
TEST(TopologyTest, RanksOfANodeThatSayTheSameLocalRankHaveNoNic) {
  JobAnalysis job(Thresholds{}, "llama");
  const auto report = [&](uint64_t sequence, uint32_t second_local_rank) {
    NodeSummary summary;
    summary.incarnation = 1;
    summary.sequence = sequence;
    summary.ranks.resize(3);
    for (uint32_t r = 0; r < 3; ++r) summary.ranks[r].rank = Rank{r};
    summary.ranks[0].local_rank = 0;
    summary.ranks[1].local_rank = second_local_rank;  // of the third nothing is known
    JobStep step{absl::Seconds(sequence), absl::ZeroDuration(), {}, {}, {}};
    step.reports.push_back({"llama", "run/0", 3, "n0", EncodeSummary(summary)});
    if (sequence == 1) {
      step.topology = R"({"schema_version": 1, "nodes": {"n0": {"gpus": [{"nic": "a"},
                          {"nic": "b"}, {"nic": "c"}]}}})";
    }
    job.Step(std::move(step));
    return std::vector<bool>{job.IsPlaced(Rank{0}), job.IsPlaced(Rank{1}), job.IsPlaced(Rank{2})};
  };
  EXPECT_TRUE(job.analyzer() == nullptr && !job.topology_given());
  EXPECT_EQ(report(1, 0), (std::vector<bool>{false, false, false}));
  EXPECT_EQ(report(2, 1), (std::vector<bool>{true, true, false}));
  EXPECT_TRUE(job.topology_given());
  // Beyond what the file has.
  EXPECT_EQ(report(3, 3), (std::vector<bool>{true, false, false}));
}

}  // namespace
}  // namespace holdfast::monitor
