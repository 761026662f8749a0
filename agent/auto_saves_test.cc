#include "agent/auto_saves.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/sim_executor.h"

namespace holdfast {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr absl::Duration kStep = absl::Milliseconds(100);

// Model: one rank that tells a step every 100 ms; one that is due takes `stall` longer, is captured
// at its end and committed `commit_` later. The rank asks for every step when it begins it.
class AutoSavesTest : public ::testing::Test {
 protected:
  AutoSavesTest()
      : saves_({executor_, executor_, [this] { return std::vector<JobSnapshot>{Snapshot()}; },
                [this](const std::string& job, const std::string& key) {
                  EXPECT_EQ(job, "llama");
                  return key == key_ ? std::vector<Engine::RankProgress>{rank_}
                                     : std::vector<Engine::RankProgress>();
                },
                [this](const std::string&, const std::string& key) { return MakeDue(key); }}) {}

  JobSnapshot Snapshot() const {
    JobSnapshot job;
    job.job = "llama";
    job.attempt = Attempt{attempt_};
    job.attempt_key = key_;
    job.world_size = 1;
    job.open_ranks = is_open_ ? 1 : 0;
    job.newest_committed = on_storage_;
    return job;
  }

  absl::StatusOr<Step> MakeDue(const std::string& key) {
    EXPECT_EQ(key, key_);
    if (!asks_) return absl::FailedPreconditionError("rank 0 never asks");
    due_ = step_ + 2;  // the next one has been asked for
    due_at_.push_back(executor_.Elapsed());
    return Step{due_};
  }

  void Train(absl::Duration duration) {
    for (const absl::Duration end = executor_.Elapsed() + duration; executor_.Elapsed() < end;) {
      const uint64_t step = step_ + 1;
      const bool is_saved = step == due_;
      executor_.AdvanceTime(is_saved ? kStep + stall_ : kStep);
      step_ = step;
      rank_.step = Step{step};
      ++rank_.heartbeat_count;
      if (!is_saved) continue;
      rank_.committed = Step{step};
      rank_.committed_begun = executor_.Elapsed() - kStep;
      if (commit_ == absl::InfiniteDuration()) continue;
      const CheckpointId id{Attempt{attempt_}, Step{step}};
      executor_.RunAfter(commit_, [this, id] { on_storage_ = id; });
    }
  }

  void BeginAttempt(uint64_t from_step) {
    ++attempt_;
    key_ += "'";
    step_ = from_step;
    rank_ = {};
    due_ = 0;
  }

  SimExecutor executor_;
  uint32_t attempt_ = 1;
  std::string key_ = "key";
  bool is_open_ = true;
  bool asks_ = true;
  absl::Duration stall_ = absl::Milliseconds(60);
  absl::Duration commit_ = absl::Milliseconds(300);
  uint64_t step_ = 0;
  uint64_t due_ = 0;
  std::vector<absl::Duration> due_at_;
  Engine::RankProgress rank_;
  std::optional<CheckpointId> on_storage_;
  AutoSaves saves_;
};

TEST_F(AutoSavesTest, SavesAsOftenAsDalySaysOfWhatWasMeasuredAndSaysWhy) {
  EXPECT_EQ(saves_.SentenceOf("llama"), "");
  saves_.Start();
  Train(absl::Seconds(30));
  // Nothing is measured: 1 s is assumed, and one failure in 24 h, which is a save every 415 s.
  EXPECT_THAT(saves_.SentenceOf("llama"), HasSubstr("a save is assumed to take 1.00 s"));
  EXPECT_TRUE(due_at_.empty());
  Train(absl::Seconds(400));
  ASSERT_EQ(due_at_.size(), 1);
  EXPECT_NEAR(absl::ToDoubleSeconds(due_at_[0] - absl::Seconds(1000)), 415, 3);
  Train(absl::Seconds(400));
  // 60 ms were measured: sqrt(2 0.06 86400) is 102 s.
  EXPECT_THAT(saves_.SentenceOf("llama"), HasSubstr("a save takes 0.06 s from training"));
  EXPECT_THAT(saves_.SentenceOf("llama"), HasSubstr("and one in 1d00h assumed"));
  ASSERT_GE(due_at_.size(), 4);
  for (size_t i = 2; i < due_at_.size(); ++i) {
    EXPECT_NEAR(absl::ToDoubleSeconds(due_at_[i] - due_at_[i - 1]), 102, 4) << i;
  }
}

TEST_F(AutoSavesTest, NeverFasterThanStorageCommits) {
  stall_ = absl::ZeroDuration();  // would be done all the time
  commit_ = absl::Seconds(5);
  saves_.Start();
  Train(absl::Seconds(500));
  EXPECT_THAT(saves_.SentenceOf("llama"), HasSubstr("which is as fast as the storage commits"));
  EXPECT_THAT(saves_.SentenceOf("llama"), HasSubstr("a save takes 0.00 s"));
  ASSERT_GT(due_at_.size(), 8);
  for (size_t i = 1; i < due_at_.size(); ++i) {
    EXPECT_GE(due_at_[i] - due_at_[i - 1], commit_) << i;
    EXPECT_LT(due_at_[i] - due_at_[i - 1], 2 * commit_) << i;
  }
}

// Memory has the saves still.
TEST_F(AutoSavesTest, StorageThatCommitsNothingDoesNotEndThem) {
  stall_ = absl::ZeroDuration();
  commit_ = absl::InfiniteDuration();
  saves_.Start();
  Train(absl::Seconds(420) + 2 * AutoSaves::kCommitPatience);
  ASSERT_GE(due_at_.size(), 2);
  EXPECT_GE(due_at_[1] - due_at_[0], AutoSaves::kCommitPatience);
}

TEST_F(AutoSavesTest, FailuresOfAnotherLaunchersJobMakeThemMoreFrequent) {
  saves_.Start();
  Train(absl::Seconds(600));
  EXPECT_THAT(saves_.SentenceOf("llama"), HasSubstr("(0 in 10m00s"));
  const auto interval = [&] { return due_at_.back() - due_at_[due_at_.size() - 2]; };
  Train(absl::Seconds(200));
  const absl::Duration before = interval();
  for (int i = 0; i < 8; ++i) {
    BeginAttempt(100);
    Train(absl::Seconds(60));
  }
  EXPECT_THAT(saves_.SentenceOf("llama"), HasSubstr("(8 in "));
  Train(absl::Seconds(300));
  EXPECT_NEAR(absl::FDivDuration(interval(), before), 1.0 / 3, 0.05);  // the root of 1 / 9
}

TEST_F(AutoSavesTest, AJobThatNeverAsksOrIsNotOpenIsLeftAlone) {
  asks_ = false;
  saves_.Start();
  Train(absl::Seconds(450));
  EXPECT_THAT(saves_.SentenceOf("llama"), HasSubstr("Not in effect: rank 0 never asks."));
  asks_ = true;
  Train(absl::Seconds(2));
  EXPECT_EQ(due_at_.size(), 1);
  EXPECT_THAT(saves_.SentenceOf("llama"), Not(HasSubstr("Not in effect")));
  is_open_ = false;
  executor_.AdvanceTime(absl::Hours(1));
  EXPECT_EQ(due_at_.size(), 1);
}

}  // namespace
}  // namespace holdfast
