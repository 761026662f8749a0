#include "monitor/recording.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "monitor/finding_log.h"
#include "monitor/finding_record.h"
#include "monitor/sim/catalogue.h"
#include "monitor/sim/world.h"
#include "tests/support/status_matchers.h"

namespace holdfast::monitor {
namespace {

using ::testing::SizeIs;

JobStep ToStep(const Snapshot& snapshot, uint32_t world_size) {
  JobStep step{snapshot.elapsed, snapshot.receiver_gap, {}, {}, {}};
  for (NodeSummary summary : snapshot.arrived) {
    const std::string node = "gpu-" + std::to_string(10 + summary.node);
    summary.node = 0;
    step.reports.push_back({"llama", "run/0", world_size, node, EncodeSummary(summary)});
  }
  return step;
}

// The whole story of a job: every finding with its history.
class Teller {
 public:
  void Step(JobStep step) {
    const absl::Duration elapsed = step.elapsed;
    const JobAnalysis::Result result = analysis_.Step(std::move(step));
    log_.Take(analysis_, result, {elapsed, std::nullopt});
  }
  std::string Story() const {
    std::string story;
    for (const FindingRecord* record : log_.Records()) {
      story += OneLine(FindingRecordObject(*record)) + "\n";
    }
    return story;
  }

 private:
  JobAnalysis analysis_{Thresholds{}, "llama"};
  FindingLog log_;
};

// Records `seconds` of a world; returns the file, and what was said meanwhile.
std::string RecordWorld(const sim::WorldOptions& options, int seconds, std::string* story) {
  sim::World world(options);
  const JobShape shape = world.shape();
  Teller teller;
  RecordingWriter writer;
  std::string file;
  for (int i = 0; i < seconds; ++i) {
    JobStep step = ToStep(world.Tick(), static_cast<uint32_t>(shape.ranks.size()));
    if (i == 5) {
      for (const RankPlace& place : shape.ranks) {
        step.roles.push_back({place.stage, place.tensor_position});
      }
    }
    file += writer.Append(EncodeRecorded(RecordedStep{"llama", step}));
    teller.Step(std::move(step));
  }
  file += writer.End();
  *story = teller.Story();
  return file;
}

std::string Replay(const std::string& file, const std::function<void(JobStep&)>& change = nullptr) {
  const auto reader = RecordingReader::Create(file);
  EXPECT_OK(reader.status());
  Teller teller;
  for (;;) {
    const absl::StatusOr<std::optional<Recorded>> next = (*reader)->Next();
    EXPECT_OK(next.status());
    if (!next.ok() || !next->has_value()) break;
    RecordedStep recorded = std::get<RecordedStep>(**next);
    EXPECT_EQ(recorded.job, "llama");
    if (change) change(recorded.step);
    teller.Step(std::move(recorded.step));
  }
  EXPECT_TRUE((*reader)->ended());
  return teller.Story();
}

// The worlds of every fault that the simulation knows, once each, with losses and drift.
std::vector<sim::WorldOptions> Worlds() {
  std::vector<sim::WorldOptions> worlds;
  for (const auto& [kind, factor] :
       std::map<sim::FaultKind, double>{{sim::FaultKind::kGpuHang, 0},
                                        {sim::FaultKind::kKilled, 1},
                                        {sim::FaultKind::kStopped, 0},
                                        {sim::FaultKind::kNodeDies, 0},
                                        {sim::FaultKind::kWrongSize, 0},
                                        {sim::FaultKind::kSlowGpu, 1.5},
                                        {sim::FaultKind::kSender, 0.5},
                                        {sim::FaultKind::kNeverEnters, 0}}) {
    sim::WorldOptions& options = worlds.emplace_back();
    options.seed = 10 + static_cast<uint32_t>(worlds.size());
    options.stages = worlds.size() % 2 == 0 ? 1 : 2;
    options.data_parallel = options.stages == 1 ? 8 : 4;
    options.loss = 0.05;
    options.lateness = 0.05;
    options.clock_drift = 1e-4;
    options.faults = {sim::FaultOf(kind, 2, factor)};
  }
  return worlds;
}

TEST(RecordingTest, AReplayTellsTheSameStoryAlsoInAnotherOrderWithinItsSteps) {
  size_t told = 0;
  for (const sim::WorldOptions& options : Worlds()) {
    std::string story;
    const std::string file = RecordWorld(options, 90, &story);
    EXPECT_EQ(Replay(file), story) << "seed " << options.seed;
    std::mt19937 random(options.seed);
    EXPECT_EQ(Replay(file,
                     [&](JobStep& step) {
                       std::shuffle(step.reports.begin(), step.reports.end(), random);
                     }),
              story)
        << "seed " << options.seed;
    told += story.empty() ? 0 : 1;
  }
  EXPECT_GE(told, 6u);  // not vacuous: most faults are found in that time
}

TEST(RecordingTest, IsSmall) {
  std::string story;
  const std::string file = RecordWorld(Worlds()[1], 90, &story);
  sim::World world(Worlds()[1]);
  size_t plain = 0;
  for (int i = 0; i < 90; ++i) {
    for (const NodeReport& report : ToStep(world.Tick(), 8).reports) {
      plain += report.summary.size();
    }
  }
  printf("%zu bytes of summaries, %zu bytes recorded\n", plain, file.size());
  EXPECT_LT(file.size(), plain / 2);
}

TEST(RecordingTest, ACutFileGivesAllThatWasWrittenBefore) {
  RecordingWriter writer;
  std::string file;
  std::vector<size_t> ends;  // of the file, after each step
  for (int i = 1; i <= 4; ++i) {
    RecordedStep recorded{"llama", {absl::Seconds(i), absl::Milliseconds(i), {}, {}, {}}};
    recorded.step.reports.push_back({"llama", "k", 2, "node", std::string(20, 's')});
    recorded.step.roles = {{1, 2}};
    file += writer.Append(EncodeRecorded(recorded));
    ends.push_back(file.size());
  }
  file += writer.Append(EncodeRecorded(RecordedLoss{3}));
  file += writer.End();
  for (size_t bytes = 6; bytes <= file.size(); ++bytes) {
    ASSERT_OK_AND_ASSIGN(const auto reader,
                         RecordingReader::Create(std::string_view(file).substr(0, bytes)));
    const auto whole = static_cast<size_t>(
        std::count_if(ends.begin(), ends.end(), [&](size_t end) { return end <= bytes; }));
    size_t read = 0;
    for (;;) {
      ASSERT_OK_AND_ASSIGN(const auto next, reader->Next());
      if (!next.has_value()) break;
      if (const auto* step = std::get_if<RecordedStep>(&*next); step != nullptr) {
        ++read;
        EXPECT_EQ(step->step.elapsed, absl::Seconds(static_cast<int64_t>(read)));
        EXPECT_EQ(step->step.receiver_gap, absl::Milliseconds(static_cast<int64_t>(read)));
        EXPECT_EQ(step->step.reports[0].node, "node");
        EXPECT_EQ(step->step.roles, (std::vector<RankRole>{{1, 2}}));
      } else {
        EXPECT_EQ(std::get<RecordedLoss>(*next).steps, 3u);
      }
    }
    EXPECT_GE(read, whole);
    EXPECT_LE(read, 4u);
    EXPECT_FALSE(reader->ended() && bytes + 4 < file.size()) << bytes;
  }
  ASSERT_OK_AND_ASSIGN(const auto reader, RecordingReader::Create(file));
  int records = 0;
  for (;;) {
    ASSERT_OK_AND_ASSIGN(const auto next, reader->Next());
    if (!next.has_value()) break;
    ++records;
  }
  EXPECT_EQ(records, 5);
  EXPECT_TRUE(reader->ended());
}

TEST(RecordingTest, OtherFilesAreRefusedWithAReason) {
  EXPECT_THAT(RecordingReader::Create("").status(), StatusIs(absl::StatusCode::kDataLoss));
  EXPECT_THAT(RecordingReader::Create("HFMR").status(), StatusIs(absl::StatusCode::kDataLoss));
  EXPECT_THAT(RecordingReader::Create("HFMS1").status(), StatusIs(absl::StatusCode::kDataLoss));
  EXPECT_EQ(RecordingReader::Create("HFMR\x03").status().code(), absl::StatusCode::kUnimplemented);
  std::string story;
  std::string file = RecordWorld({}, 3, &story);
  // Version 1 had no topology, and is otherwise the same.
  std::string first = file;
  ASSERT_EQ(first[4], 2);
  first[4] = 1;
  ASSERT_OK_AND_ASSIGN(const auto old, RecordingReader::Create(first));
  ASSERT_OK_AND_ASSIGN(const auto step, old->Next());
  EXPECT_TRUE(step.has_value());
  size_t refused = 0;
  for (size_t at = 5; at < file.size(); at += 7) {
    std::string damaged = file;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x10);
    const auto reader = RecordingReader::Create(damaged);
    ASSERT_OK(reader.status());
    for (;;) {
      const auto next = (*reader)->Next();
      if (!next.ok()) ++refused;
      if (!next.ok() || !next->has_value()) break;
    }
  }
  EXPECT_GT(refused, 10u);
}

}  // namespace
}  // namespace holdfast::monitor
