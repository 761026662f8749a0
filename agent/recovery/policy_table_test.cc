// Every row of the default table (docs/RECOVERY.md), each mode, and what limits them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/recovery/policy_testing.h"

namespace holdfast::recovery {
namespace {

using monitor::ExitKind;
using monitor::FaultClass;
using monitor::Grade;
using monitor::Syndrome;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

std::vector<uint32_t> Indices(const Placement& placement) {
  std::vector<uint32_t> indices;
  for (const Gpu& gpu : placement.gpus) indices.push_back(gpu.index);
  return indices;
}

// A job that trains, with a checkpoint of step 100 and at step 150.
TestJob Training(Settings settings = {}, uint32_t ranks = 4, uint32_t gpus = 4) {
  TestJob job(std::move(settings));
  job.Begin(ranks, gpus);
  job.ComeUp(1);
  job.Train(100, absl::Minutes(1));
  job.Commit(100);
  job.Train(150, absl::Seconds(30));
  EXPECT_EQ(job.state(), State::kRunning);
  return job;
}

TEST(PolicyTable, ARunBeginsWithOneStart) {
  TestJob job;
  const auto starts = Only<StartRanks>(job.Begin());
  ASSERT_THAT(starts, SizeIs(1));
  EXPECT_EQ(starts[0].launch, Launch{1});
  EXPECT_EQ(starts[0].restart_count, 0);
  EXPECT_THAT(Indices(starts[0].placement), ElementsAre(0, 1, 2, 3));
  EXPECT_EQ(starts[0].restore.kind, RestoreRule::Kind::kNewest);
  EXPECT_EQ(job.state(), State::kStarting);
  job.ComeUp(1);
  EXPECT_EQ(job.state(), State::kRunning);
}

TEST(PolicyTable, ADeadProcessIsRestartedAtOnce) {
  TestJob job = Training();
  const auto died = job.Dies(2);
  EXPECT_THAT(Only<CollectEvidence>(died), SizeIs(1));
  EXPECT_THAT(Only<StopRanks>(died), IsEmpty());
  EXPECT_EQ(job.state(), State::kCollecting);
  const auto stop = Only<StopRanks>(job.Evidence());
  ASSERT_THAT(stop, SizeIs(1));
  EXPECT_EQ(stop[0].kill_at, job.now() + job.settings().stop_wait);
  EXPECT_EQ(job.state(), State::kStopping);
  const auto starts = Only<StartRanks>(job.AllDie());
  ASSERT_THAT(starts, SizeIs(1));
  EXPECT_EQ(starts[0].launch, Launch{2});
  EXPECT_EQ(starts[0].restart_count, 1);
  EXPECT_EQ(starts[0].restore.checkpoint, CheckpointAt(100).id);
  EXPECT_THAT(Indices(starts[0].placement), ElementsAre(0, 1, 2, 3));
  job.ComeUp(101);
  ASSERT_THAT(job.history().past, SizeIs(1));
  EXPECT_EQ(job.history().past[0].outcome, Outcome::kResumed);
  EXPECT_EQ(job.history().past[0].lost_steps, 50);
  EXPECT_EQ(job.history().past[0].lost_work, absl::Seconds(30));
}

TEST(PolicyTable, EvidenceThatDoesNotComeIsWaitedForOnlySoLong) {
  TestJob job = Training();
  job.Dies(2);
  EXPECT_THAT(Only<StopRanks>(job.Wait(job.settings().evidence_wait - absl::Milliseconds(1))),
              IsEmpty());
  EXPECT_THAT(Only<StopRanks>(job.Wait(absl::Milliseconds(1))), SizeIs(1));
}

TEST(PolicyTable, WhenAllRestartsAreUsedUpItEndsWithOne) {
  Settings settings;
  settings.max_restarts = 2;
  TestJob job = Training(settings);
  for (int i = 0; i < 2; ++i) {
    job.Dies(0);
    job.Evidence();
    job.AllDie();
    job.Wait(absl::Minutes(1));
    job.ComeUp(101);
  }
  job.Dies(0);
  job.Evidence();
  const auto exits = Only<ExitJob>(job.AllDie());
  ASSERT_THAT(exits, SizeIs(1));
  EXPECT_EQ(exits[0].code, 1);
  EXPECT_EQ(job.state(), State::kGivenUp);
}

TEST(PolicyTable, AJobWhoseRanksAllEndWithZeroIsDone) {
  TestJob job = Training();
  const auto exits = Only<ExitJob>(job.AllDie({ExitKind::kClean, 0}));
  ASSERT_THAT(exits, SizeIs(1));
  EXPECT_EQ(exits[0].code, 0);
  EXPECT_EQ(job.state(), State::kDone);
}

}  // namespace
}  // namespace holdfast::recovery
