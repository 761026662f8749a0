// Attempts: who joins which, and that an older one publishes nothing that a newer one has not seen
// (P7), also when the two are in agents that do not know of each other.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/engine_testing.h"
#include "checkpoint/readback_testing.h"
#include "hook/abi/messages.h"
#include "tests/support/interrupting_file_system.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::HasSubstr;

Attempt AttemptOf(const absl::StatusOr<TestTrainer*>& trainer) {
  EXPECT_OK(trainer);
  return trainer.ok() ? (*trainer)->attempt : Attempt{0};
}

TEST(Attempts, RanksWithTheSameKeyFormOne) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  EXPECT_EQ(AttemptOf(harness.Open(Rank{1}, 3, "a")), Attempt{1});
  EXPECT_EQ(AttemptOf(harness.Open(Rank{0}, 3, "a")), Attempt{1});
  EXPECT_EQ(AttemptOf(harness.Open(Rank{2}, 3, "b")), Attempt{2});
  EXPECT_EQ(AttemptOf(harness.Open(Rank{0}, 3, "b")), Attempt{2});
  // A late rank of a run that was replaced does not fence its successor.
  EXPECT_THAT(harness.Open(Rank{2}, 3, "a").status(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("attempt 2")));
  EXPECT_EQ(AttemptOf(harness.Open(Rank{1}, 3, "b")), Attempt{2});
}

TEST(Attempts, WithoutAKeyTheFirstOpenMakesOne) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  EXPECT_EQ(AttemptOf(harness.Open(Rank{0}, 2)), Attempt{1});
  EXPECT_EQ(AttemptOf(harness.Open(Rank{1}, 2)), Attempt{1});
  // The launcher has started them anew; the old processes may be alive or not.
  EXPECT_EQ(AttemptOf(harness.Open(Rank{1}, 2)), Attempt{2});
  EXPECT_EQ(AttemptOf(harness.Open(Rank{0}, 2)), Attempt{2});
}

TEST(Attempts, AKeyCountsAsNewWhenTheWorldSizeDiffersARankComesBackOrItsAttemptHasEnded) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(TestTrainer* const first, harness.Open(Rank{0}, 2, "a"));
  EXPECT_EQ(first->attempt, Attempt{1});
  EXPECT_EQ(AttemptOf(harness.Open(Rank{1}, 3, "a")), Attempt{2});
  ASSERT_OK_AND_ASSIGN(TestTrainer* const third, harness.Open(Rank{0}, 3, "a"));
  EXPECT_EQ(third->attempt, Attempt{2});
  // A rank that died and comes back is a new run, although others are open.
  harness.Kill(*third);
  ASSERT_OK_AND_ASSIGN(TestTrainer* const again, harness.Open(Rank{0}, 3, "a"));
  EXPECT_EQ(again->attempt, Attempt{3});
  // The newest has ended, while an older one with this key still has a rank.
  harness.Close(*again);
  EXPECT_EQ(AttemptOf(harness.Open(Rank{2}, 3, "a")), Attempt{4});
}

// The worker dies between the session and the reply; the process asks again, of the next worker.
TEST(Attempts, AProcessThatNeverHeardTheAnswerJoinsItsAttemptAgain) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(TestTrainer* const other, harness.Open(Rank{1}, 2, "a"));
  ASSERT_OK_AND_ASSIGN(TestTrainer* const unaware, harness.Open(Rank{0}, 2, "a"));
  ASSERT_OK_AND_ASSIGN(TestTrainer* const again, harness.OpenAgain(*unaware));
  EXPECT_EQ(again->attempt, Attempt{1});
  EXPECT_NE(again->session, unaware->session);
  for (TestTrainer* trainer : {other, again}) ASSERT_OK(harness.Register(*trainer));
  harness.SaveAll({other, again}, 1);
  EXPECT_EQ(EngineHarness::CommittedPower(*again), 1u);
  // Once it has registered it heard; what opens now, under its process number, is a new run.
  EXPECT_EQ(AttemptOf(harness.OpenAgain(*again)), Attempt{2});
}

TEST(Attempts, NumbersGrowWhateverIsLost) {
  SimDisk disk;
  {
    EngineHarness harness(disk, {});
    for (const char* key : {"a", "b", "c"}) ASSERT_OK(harness.Open(Rank{0}, 1, key).status());
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1, "d"));
    harness.SaveAll(trainers, 1);
  }
  for (const std::string& path : disk.AllFiles()) {
    if (path.find("/store/") != std::string::npos) disk.RemoveFile(path);
  }
  EngineHarness harness(disk, {.root_exists = true, .writer = "x"});
  EXPECT_EQ(AttemptOf(harness.Open(Rank{0}, 1, "e")), Attempt{5});
}

TEST(Attempts, BadArgumentsAreNamed) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  EXPECT_THAT(harness.Open(Rank{2}, 2).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("found 2")));
  EXPECT_THAT(harness.Open(Rank{0}, 0).status(), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(harness.Open(Rank{0}, 1, "", "../up").status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("../up")));
  EXPECT_THAT(harness.Open(Rank{0}, 1, std::string(256, 'k')).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("256")));
}

TEST(Attempts, ANewerOneFencesTheOlderAtOnce) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(const auto old, harness.Launch(2, "a"));
  const std::optional<uint32_t> slot = harness.BeginSave(*old[0], 1);
  ASSERT_TRUE(slot.has_value());
  harness.Settle();
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2, "b"));
  harness.FinishSave(*old[0], *slot);
  ASSERT_TRUE(harness.Save(*old[1], 1));  // with a grant that it had
  harness.Settle();
  for (const TestTrainer* trainer : old) {
    EXPECT_EQ(trainer->script->page().fenced_by.load(), 2u);
    EXPECT_EQ(EngineHarness::CommittedProcess(*trainer), std::nullopt);
    EXPECT_THAT(trainer->script->ReportOf(1)->text, HasSubstr("fenced"));
  }
  EXPECT_THAT(harness.Restore(*trainers[0]).status, IsNotFound());
  harness.SaveAll(trainers, 1);
  EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 1u);
  ASSERT_OK_AND_ASSIGN(const Catalog catalog, harness.ReadJob());
  EXPECT_EQ(catalog.entries[*catalog.newest].id, (CheckpointId{Attempt{2}, Step{1}}));
}

TEST(Attempts, AResumeIntoAFencedAttemptIsRefused) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(const auto old, harness.Launch(1, "a"));
  EXPECT_TRUE(harness.Reconnect(*old[0])->resumed);
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1, "b"));
  EXPECT_THAT(harness.Reconnect(*old[0]).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("fenced")));
  // In an agent that has never seen it, too.
  harness.CrashAgent();
  EXPECT_THAT(harness.Reconnect(*old[0]).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("attempt 1"), HasSubstr("attempt 2"))));
  ASSERT_OK_AND_ASSIGN(const OpenResult resumed, harness.Reconnect(*trainers[0]));
  EXPECT_FALSE(resumed.resumed);  // a new session in the same attempt
  EXPECT_EQ(resumed.attempt, Attempt{2});
}

// ---- A directory that was removed and began anew, while the agent lives ----

TEST(Replaced, AJobThatBeginsAnewInTheSameAgentKnowsNothingOfTheFormer) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  for (const char* key : {"a", "b", "c"}) ASSERT_OK(harness.Open(Rank{0}, 1, key).status());
  ASSERT_OK_AND_ASSIGN(const auto old, harness.Launch(2, "d"));
  harness.SaveAll(old, 10);
  for (TestTrainer* trainer : old) harness.Kill(*trainer);
  harness.RemoveJobDirectory();

  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2, "e"));
  EXPECT_EQ(trainers[0]->attempt, Attempt{1});
  EXPECT_THAT(harness.Restore(*trainers[0]).status, IsNotFound());
  harness.SaveAll(trainers, 1);
  EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 1u);
  ASSERT_OK_AND_ASSIGN(const Catalog catalog, harness.ReadJob());
  EXPECT_NE(catalog.job.job_uuid, "01234567-89ab-4cde-8f01-23456789abcd");
  ASSERT_EQ(catalog.entries.size(), 1u);
  EXPECT_EQ(catalog.entries[0].state, CatalogEntry::State::kCommitted);
  // The memory of the former job's images was given back.
  EXPECT_EQ(harness.engine().StatusJson().find("\"attempt\":4"), std::string::npos);
}

// In the agent that serves the new one, and in another that has not heard of it.
TEST(Replaced, TheOldTrainersPublishNothingInTheNewJobsDirectory) {
  for (const bool same_agent : {true, false}) {
    for (const bool captured_before : {true, false}) {
      SCOPED_TRACE(testing::Message() << same_agent << captured_before);
      SimDisk disk;
      EngineHarness harness(disk, {});
      for (const char* key : {"a", "b", "c"}) ASSERT_OK(harness.Open(Rank{0}, 1, key).status());
      ASSERT_OK_AND_ASSIGN(const auto old, harness.Launch(2, "d"));
      harness.SaveAll(old, 10);
      // Either it is all in memory when the directory goes, or it comes after the new job began.
      std::vector<std::optional<uint32_t>> slots;
      for (TestTrainer* trainer : old) slots.push_back(harness.BeginSave(*trainer, 20));
      if (captured_before) {
        for (size_t i = 0; i < old.size(); ++i) harness.FinishSave(*old[i], slots[i].value());
      } else {
        harness.Settle();  // the checkpoint's directory and files are made
      }
      harness.RemoveJobDirectory();

      EngineHarness other(disk, {.root_exists = true, .writer = "x", .uuid_bits = 0x777});
      EngineHarness& serving = same_agent ? harness : other;
      ASSERT_OK_AND_ASSIGN(const auto trainers, serving.Launch(2, "e"));
      EXPECT_EQ(trainers[0]->attempt, Attempt{1});
      EXPECT_THAT(serving.Restore(*trainers[0]).status, IsNotFound());
      serving.SaveAll(trainers, 1);
      EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 1u);

      if (!captured_before) {
        for (size_t i = 0; i < old.size(); ++i) harness.FinishSave(*old[i], slots[i].value());
      }
      harness.Settle();
      for (TestTrainer* trainer : old) harness.Save(*trainer, 30);
      harness.Settle();
      for (const TestTrainer* trainer : old) {
        EXPECT_EQ(EngineHarness::CommittedPower(*trainer), 10u);
        EXPECT_EQ(trainer->script->ReportOf(20)->state, 5u);
        if (same_agent) {
          EXPECT_EQ(trainer->script->page().fenced_by.load(), abi::kJobReplaced);
        }
      }
      // Nothing of it is in the way of the new one.
      ASSERT_OK_AND_ASSIGN(const Catalog catalog, harness.ReadJob());
      ASSERT_EQ(catalog.entries.size(), 1u);
      EXPECT_EQ(catalog.entries[0].id, (CheckpointId{Attempt{1}, Step{1}}));
      serving.SaveAll(trainers, 2);
      for (TestTrainer* trainer : trainers) serving.Kill(*trainer);
      ASSERT_OK_AND_ASSIGN(const auto again, serving.Launch(3, "f"));
      const RestoreOutcome outcome = serving.Restore(*again[0]);
      ASSERT_OK(outcome.status);
      EXPECT_EQ(outcome.checkpoint, (CheckpointId{Attempt{1}, Step{2}}));
    }
  }
}

// What an attempt of the former job starts from is not written into the new one's store.
TEST(Replaced, ARestorePointIsNotDecidedInTheNewJobsStore) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK(harness.Open(Rank{0}, 1, "a").status());
  ASSERT_OK_AND_ASSIGN(const auto old, harness.Launch(1, "b"));
  harness.RemoveJobDirectory();
  EngineHarness other(disk, {.root_exists = true, .writer = "x", .uuid_bits = 0x777});
  ASSERT_OK(other.Launch(1, "c").status());
  EXPECT_THAT(harness.Restore(*old[0]).status,
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("000000000777")));
  EXPECT_THAT(disk.Stat("/root/job/store/attempt-2.restore.json").status(), IsNotFound());
}

// The worker dies while old and new trainers live: their attempts are not mixed up.
TEST(Replaced, ANewWorkerKeepsTheTwoApart) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  for (const char* key : {"a", "b", "c"}) ASSERT_OK(harness.Open(Rank{0}, 1, key).status());
  ASSERT_OK_AND_ASSIGN(const auto old, harness.Launch(1, "d"));
  harness.SaveAll(old, 10);
  harness.RemoveJobDirectory();
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1, "e"));
  harness.CrashWorker(SimDisk::InFlight::kAll);
  harness.SaveAll(trainers, 1);
  EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 1u);
  EXPECT_THAT(harness.Reconnect(*old[0]).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("fenced")));
  EXPECT_EQ(harness.engine().pending_image_count(), 0u);
}

// Two agents that do not know of each other. The older attempt is paused after every step that its
// loop takes in two saves; the newer one begins, decides where it starts, and saves; then the older
// one goes on. Whatever it had reported by then is an ancestor of the newer one's checkpoint, and
// nothing else of it is ever published.
struct FencingCounts {
  int paused = 0;
  int failed = 0;  // saves of the old attempt
  int seen = 0;    // old checkpoints that the new attempt started from
};

// The new attempt: begins, and decides where it starts. Nothing: from the beginning.
std::optional<CheckpointId> BeginNew(EngineHarness& agent, std::vector<TestTrainer*>& trainers) {
  const auto launched = agent.Launch(2, "b");
  EXPECT_OK(launched);
  if (!launched.ok()) return std::nullopt;
  trainers = *launched;
  const RestoreOutcome outcome = agent.Restore(*trainers[0]);
  if (outcome.status.ok()) return outcome.checkpoint;
  EXPECT_THAT(outcome.status, IsNotFound());
  return std::nullopt;
}

// After both have gone on.
void ExpectOnlyWhatTheNewOneHasSeen(SimDisk& disk, const ReadBack& read_back,
                                    const std::vector<TestTrainer*>& old,
                                    const std::optional<uint64_t>& told,
                                    const std::optional<CheckpointId>& point,
                                    FencingCounts& counts) {
  counts.seen += point.has_value() ? 1 : 0;
  if (told.has_value()) {
    ASSERT_TRUE(point.has_value());
    EXPECT_GE(Value(point->step), *told);
  }
  ASSERT_OK_AND_ASSIGN(const std::vector<CheckpointId> found, read_back.CheckAll(disk));
  ASSERT_FALSE(found.empty());
  EXPECT_EQ(found.back(), (CheckpointId{Attempt{2}, Step{5}}));
  const std::optional<CheckpointId> before =
      found.size() > 1 ? std::optional(found[found.size() - 2]) : std::nullopt;
  EXPECT_EQ(before, point);
  // And it was told so.
  for (const TestTrainer* trainer : old) {
    const std::optional<uint64_t> committed = EngineHarness::CommittedPower(*trainer);
    EXPECT_LE(committed.value_or(0), point.has_value() ? Value(point->step) : 0);
    for (const uint64_t step : {1, 2}) {
      const auto report = trainer->script->ReportOf(step);
      if (!report.has_value() || report->state == 4u) continue;
      EXPECT_EQ(report->state, 5u);
      ++counts.failed;
    }
  }
}

TEST(Fencing, APausedOldAttemptPublishesNothingThatTheNewOneHasNotSeen) {
  const ReadBack read_back(2);
  for (const bool links : {true, false}) {
    FencingCounts counts;
    for (int pause_after = 0;; ++pause_after) {
      SCOPED_TRACE(testing::Message() << "links " << links << ", paused after " << pause_after);
      SimDisk::Options options;
      options.links_supported = links;
      SimDisk disk(options);
      EngineHarness old_agent(disk, {.writer = "old"});
      ASSERT_OK_AND_ASSIGN(const auto old, old_agent.Launch(2, "a"));
      for (const uint64_t step : {1, 2}) {
        for (TestTrainer* trainer : old) ASSERT_TRUE(old_agent.Save(*trainer, step));
      }
      bool idle = false;
      for (int i = 0; i < pause_after && !idle; ++i) idle = !old_agent.executor().RunOne();
      const std::optional<uint64_t> told = EngineHarness::CommittedPower(*old[0]);
      EngineHarness new_agent(disk, {.root_exists = true, .writer = "new"});
      std::vector<TestTrainer*> trainers;
      const std::optional<CheckpointId> point = BeginNew(new_agent, trainers);
      ASSERT_FALSE(HasFailure());
      old_agent.Settle();
      new_agent.SaveAll(trainers, 5);
      old_agent.Settle();
      EXPECT_EQ(EngineHarness::CommittedPower(*trainers[1]), 5u);
      ExpectOnlyWhatTheNewOneHasSeen(disk, read_back, old, told, point, counts);
      if (idle || HasFailure()) break;
    }
    EXPECT_GT(counts.failed, 50);
    EXPECT_GT(counts.seen, 5);
  }
}

// The same between any two operations of the old attempt on the disk, also in the middle of its
// commit.
TEST(Fencing, NorBetweenAnyTwoOperationsOnTheDisk) {
  const ReadBack read_back(2);
  for (const bool links : {true, false}) {
    FencingCounts counts;
    for (uint64_t pause_before = 0;; ++pause_before) {
      SCOPED_TRACE(testing::Message() << "links " << links << ", operation " << pause_before);
      SimDisk::Options options;
      options.links_supported = links;
      SimDisk disk(options);
      InterruptingFileSystem paused(disk);
      EngineHarness old_agent(disk, {.file_system = &paused, .writer = "old"});
      ASSERT_OK_AND_ASSIGN(const auto old, old_agent.Launch(2, "a"));
      std::unique_ptr<EngineHarness> new_agent;
      std::vector<TestTrainer*> trainers;
      std::optional<CheckpointId> point;
      std::optional<uint64_t> told;
      paused.InterruptBefore(pause_before, [&] {
        told = EngineHarness::CommittedPower(*old[0]);
        new_agent = std::make_unique<EngineHarness>(
            disk, EngineHarnessOptions{.root_exists = true, .writer = "new"});
        point = BeginNew(*new_agent, trainers);
      });
      for (const uint64_t step : {1, 2}) {
        for (TestTrainer* trainer : old) ASSERT_TRUE(old_agent.Save(*trainer, step));
        old_agent.Settle();
        if (paused.was_interrupted()) break;
      }
      if (!paused.was_interrupted() || HasFailure()) break;
      ++counts.paused;
      new_agent->SaveAll(trainers, 5);
      old_agent.Settle();
      EXPECT_EQ(EngineHarness::CommittedPower(*trainers[1]), 5u);
      ExpectOnlyWhatTheNewOneHasSeen(disk, read_back, old, told, point, counts);
      if (HasFailure()) break;
    }
    std::printf("links %d: %d pauses, %d saves failed, %d seen\n", links, counts.paused,
                counts.failed, counts.seen);
    EXPECT_GT(counts.paused, links ? 60 : 80);
    EXPECT_GT(counts.failed, 30);
    EXPECT_GT(counts.seen, 20);
  }
}

}  // namespace
}  // namespace holdfast
