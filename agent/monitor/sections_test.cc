// Names of sections and what they mean; how long each is open, from samples.
#include "agent/monitor/sections.h"

#include <string>
#include <utility>
#include <vector>

#include "agent/monitor/board_testing.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

using monitor::Section;
using monitor::SectionKind;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

TEST(SectionKindTest, NamesMeanWhatTheTableSays) {
  const std::pair<const char*, SectionKind> cases[] = {
      {"forward", SectionKind::kCompute},         {"backward", SectionKind::kCompute},
      {"optimizer", SectionKind::kCompute},       {"", SectionKind::kCompute},
      {"database", SectionKind::kCompute},        {"data", SectionKind::kData},
      {"Data-Loading 3", SectionKind::kData},     {"DATALOADER", SectionKind::kData},
      {"next batch", SectionKind::kData},         {"checkpoint", SectionKind::kCheckpoint},
      {"save/shard:2", SectionKind::kCheckpoint}, {"evaluation", SectionKind::kEvaluation},
      {"eval_12", SectionKind::kEvaluation},      {"validation", SectionKind::kEvaluation},
      {"compile", SectionKind::kCompile},         {"warmup", SectionKind::kCompile},
      {"gc", SectionKind::kCollection},           {"garbage collection", SectionKind::kCollection},
  };
  for (const auto& [name, kind] : cases) EXPECT_EQ(SectionKindOf(name), kind) << name;
}

class SectionTrackerTest : public ::testing::Test {
 protected:
  void Begin(const std::string& name) {
    const uint32_t depth = trainer_.board().header().section_depth.load();
    trainer_.board().SetSection(depth, name.c_str());
  }
  void End() { trainer_.board().SetSectionDepth(trainer_.board().header().section_depth - 1); }
  // The last change was so long ago.
  void ChangedAgo(int seconds) {
    trainer_.board().header().section_ticks =
        trainer_.board().Now() - static_cast<uint64_t>(seconds) * 1'000'000'000;
  }
  void Sample(absl::Duration passed = absl::Milliseconds(100)) {
    tracker_.Sample(trainer_.board().header(), passed);
  }
  std::vector<int> OpenFor() const {
    std::vector<int> seconds;
    for (const Section& section : tracker_.Open(trainer_.now())) {
      seconds.push_back(static_cast<int>((section.elapsed_us + 500'000) / 1'000'000));
    }
    return seconds;
  }

  TrainerBoard trainer_{hook::MonitorIdentity()};
  SectionTracker tracker_;
};

TEST_F(SectionTrackerTest, ASectionIsOpenSinceItBegan) {
  Sample();
  EXPECT_THAT(tracker_.Open(trainer_.now()), IsEmpty());
  Begin("evaluation");
  ChangedAgo(30);
  Sample();
  EXPECT_THAT(OpenFor(), ElementsAre(30));
  Begin("forward");
  ChangedAgo(20);
  Sample();
  EXPECT_THAT(OpenFor(), ElementsAre(30, 20));
  // Another one of the same name has begun anew; the outer one went on.
  End();
  Begin("forward");
  ChangedAgo(4);
  Sample();
  EXPECT_THAT(OpenFor(), ElementsAre(30, 4));
  // What was outside of it is as old as before.
  End();
  Sample();
  EXPECT_THAT(OpenFor(), ElementsAre(30));
  EXPECT_EQ(tracker_.Open(trainer_.now())[0].kind, SectionKind::kEvaluation);
  EXPECT_EQ(tracker_.Open(trainer_.now())[0].name, "evaluation");
  End();
  Sample();
  EXPECT_THAT(tracker_.Open(trainer_.now()), IsEmpty());
}

TEST_F(SectionTrackerTest, OfADeepStackTheInnermostAreTold) {
  for (const char* name : {"a", "b", "c", "d", "e", "gc"}) Begin(name);
  Sample();
  ASSERT_THAT(tracker_.Open(trainer_.now()), SizeIs(monitor::kSectionsMax));
  EXPECT_EQ(tracker_.Open(trainer_.now())[0].name, "c");
  EXPECT_EQ(tracker_.Open(trainer_.now())[3].kind, SectionKind::kCollection);
  for (int i = 0; i < 20; ++i) Begin("deeper");
  Sample();
  EXPECT_THAT(tracker_.Open(trainer_.now()), SizeIs(monitor::kSectionsMax));
}

TEST_F(SectionTrackerTest, TimeInDataSectionsIsCountedBySamples) {
  Sample();
  Begin("data");
  Sample();  // until here it was not seen
  EXPECT_EQ(tracker_.data_us(), 0u);
  Sample();
  Sample();
  EXPECT_EQ(tracker_.data_us(), 200'000u);
  Begin("forward");  // the innermost one counts
  Sample();
  Sample();
  EXPECT_EQ(tracker_.data_us(), 300'000u);
  End();
  Sample();
  Sample(absl::Seconds(50));  // an observer that was late does not make up for it
  EXPECT_EQ(tracker_.data_us(), 1'300'000u);
}

TEST_F(SectionTrackerTest, ANameThatIsNoTextIsNotTold) {
  Begin("\xff\xfe");
  Sample();
  EXPECT_EQ(tracker_.Open(trainer_.now())[0].name, "?");
}

}  // namespace
}  // namespace holdfast
