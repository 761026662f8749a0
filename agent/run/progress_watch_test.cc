// Goal: the policy hears of each thing that a rank comes to once, in its order, and of its steps at
// most once a second.
#include "agent/run/progress_watch.h"

#include <gtest/gtest.h>

#include <string>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace holdfast {
namespace {

constexpr recovery::Launch kLaunch{3};

class Told : public testing::Test {
 protected:
  Told() {
    watch_.BeginLaunch(kLaunch);
    rank_.rank = Rank{1};
    rank_.attempt = Attempt{7};
  }
  std::string Look() {
    std::vector<std::string> words;
    for (const ProgressWatch::Told& told : watch_.Look(rank_, now_)) {
      if (const auto* open = std::get_if<recovery::RankOpened>(&told)) {
        words.push_back(absl::StrCat("open in ", Value(open->attempt)));
        EXPECT_EQ(open->launch, kLaunch);
      } else if (const auto* restored = std::get_if<recovery::RankRestored>(&told)) {
        words.push_back(restored->checkpoint.has_value()
                            ? absl::StrCat("from ", Value(restored->checkpoint->step))
                            : "from nothing");
      } else if (const auto* done = std::get_if<recovery::StepDone>(&told)) {
        words.push_back(absl::StrCat("step ", Value(done->step)));
      } else if (const auto* committed = std::get_if<recovery::CheckpointCommitted>(&told)) {
        words.push_back(absl::StrCat("committed ", Value(committed->facts.id.step), " of ",
                                     absl::FormatDuration(committed->captured_at)));
      } else {
        ADD_FAILURE() << "something else is told";
      }
    }
    return absl::StrJoin(words, ", ");
  }
  void Beat(uint64_t step) {
    ++rank_.heartbeat_count;
    rank_.step = Step{step};
  }

  ProgressWatch watch_;
  Engine::RankProgress rank_;
  absl::Duration now_ = absl::Hours(1);
};

TEST_F(Told, EachThingOnce) {
  EXPECT_EQ(Look(), "open in 7");
  EXPECT_EQ(Look(), "");
  rank_.is_restored = true;
  rank_.restored_from = CheckpointId{Attempt{6}, Step{40}};
  Beat(41);
  // It may stand at the step's beginning.
  EXPECT_EQ(Look(), "from 40");
  EXPECT_EQ(watch_.StepOf(1), std::nullopt);
  Beat(42);
  rank_.committed = Step{41};
  rank_.committed_begun = absl::Seconds(5);
  EXPECT_EQ(Look(), "step 42, committed 41 of 5s");
  EXPECT_EQ(Look(), "");
  EXPECT_EQ(watch_.StepOf(1), 42u);
  EXPECT_EQ(watch_.StepOf(0), std::nullopt);
  EXPECT_EQ(watch_.stepped_count(), 1u);
  // All of it anew.
  watch_.BeginLaunch(kLaunch);
  EXPECT_EQ(watch_.stepped_count(), 0u);
  EXPECT_EQ(Look(), "open in 7, from 40, step 42, committed 41 of 5s");
}

TEST_F(Told, StepsOnceASecondAndTheLastOneInTheEnd) {
  Beat(1);
  Beat(2);
  EXPECT_EQ(Look(), "open in 7, step 2");
  for (uint64_t step = 3; step < 10; ++step) {
    now_ += absl::Milliseconds(100);
    Beat(step);
    EXPECT_EQ(Look(), "");
  }
  now_ += absl::Milliseconds(300);
  EXPECT_EQ(Look(), "step 9");
  now_ += absl::Seconds(10);
  EXPECT_EQ(Look(), "");
}

}  // namespace
}  // namespace holdfast
