#include "agent/save_cost.h"

#include <gtest/gtest.h>

#include <random>

#include "absl/strings/str_cat.h"

namespace holdfast {
namespace {

// Steps of a job, told one after the other.
class Steps {
 public:
  // Tells `count` steps that took so long.
  void Take(uint64_t count, absl::Duration each) {
    for (uint64_t i = 0; i < count; ++i) {
      now_ += each;
      cost.Reached(++step, now_);
    }
  }

  SaveCost cost;
  uint64_t step = 0;

 private:
  absl::Duration now_ = absl::Seconds(1000);
};

// Wherever around the save the time was lost: heartbeats stand where the trainer likes.
TEST(SaveCost, IsWhatTheStepsAroundASaveTookMoreThanOthers) {
  for (uint64_t slow = 0; slow < 5; ++slow) {
    SCOPED_TRACE(absl::StrCat("step S - 1 + ", slow));
    Steps steps;
    steps.Take(20, absl::Milliseconds(100));
    EXPECT_EQ(steps.cost.saves(), 0);
    EXPECT_EQ(steps.cost.step(), absl::Milliseconds(100));
    const uint64_t saved = steps.step + 2;
    steps.cost.Due(saved);
    steps.Take(slow, absl::Milliseconds(100));
    steps.Take(1, absl::Milliseconds(140));
    steps.Take(5 - slow, absl::Milliseconds(100));
    EXPECT_EQ(steps.cost.saves(), 0);  // it may have failed
    steps.cost.Captured(saved);
    EXPECT_EQ(steps.cost.saves(), 1);
    // S - 1 is before the first word of the window, S + 3 behind its last.
    EXPECT_EQ(steps.cost.stall(), absl::Milliseconds(slow >= 1 && slow <= 3 ? 40 : 0));
  }
}

TEST(SaveCost, StepsThatNobodySawEndAreSpreadEvenly) {
  SaveCost cost;
  absl::Duration now = absl::Seconds(5);
  for (uint64_t step = 10; step <= 100; step += 3) {
    cost.Reached(step, now);
    now += absl::Milliseconds(15);
  }
  EXPECT_NEAR(absl::ToDoubleMilliseconds(cost.step()), 5, 1e-3);
  // A leap is no evidence of anything.
  cost.Reached(1'000'000, now);
  EXPECT_EQ(cost.step(), absl::ZeroDuration());
  cost.Reached(UINT64_MAX, now);
  cost.Captured(UINT64_MAX);
  cost.Captured(0);
  EXPECT_EQ(cost.saves(), 0);
}

TEST(SaveCost, TwoSavesThatMeetAreNotMeasured) {
  for (const uint64_t apart : {1, 2, 3}) {
    Steps steps;
    steps.Take(20, absl::Milliseconds(100));
    for (const uint64_t saved : {steps.step + 1, steps.step + 1 + apart}) steps.cost.Due(saved);
    steps.cost.Captured(21);
    steps.cost.Captured(21 + apart);
    steps.Take(10, absl::Milliseconds(130));
    EXPECT_EQ(steps.cost.saves(), apart < 3 ? 0 : 2) << apart;
  }
}

TEST(SaveCost, ANewAttemptKeepsWhatWasMeasured) {
  Steps steps;
  steps.Take(20, absl::Milliseconds(100));
  steps.cost.Captured(21);
  steps.Take(3, absl::Milliseconds(110));
  EXPECT_EQ(steps.cost.stall(), absl::Milliseconds(30));
  steps.cost.BeginAttempt();
  EXPECT_EQ(steps.cost.step(), absl::ZeroDuration());
  EXPECT_EQ(steps.cost.saves(), 1);
  steps.step = 10;
  steps.Take(20, absl::Milliseconds(200));
  EXPECT_EQ(steps.cost.step(), absl::Milliseconds(200));
}

// Goal: however steps vary, the mean of the measured saves is near the truth.
TEST(SaveCost, OfStepsThatVaryItIsRightOnAverage) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> varies(0.97, 1.03);
  Steps steps;
  for (int save = 0; save < 40; ++save) {
    for (int i = 0; i < 20; ++i) steps.Take(1, absl::Milliseconds(100) * varies(random));
    steps.cost.Captured(steps.step);
    steps.Take(1, absl::Milliseconds(100) * varies(random) + absl::Milliseconds(25));
  }
  EXPECT_EQ(steps.cost.saves(), SaveCost::kSavesMax);
  // The mean of 16 sums of three steps: about 0.75 ms of deviation, and as much of the median's.
  EXPECT_NEAR(absl::ToDoubleMilliseconds(steps.cost.stall()), 25, 8);
}

}  // namespace
}  // namespace holdfast
