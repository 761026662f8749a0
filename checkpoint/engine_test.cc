// The engine as its trainers see it, over a simulated disk: saves, commits, recycling, and restores
// in any number of ranks, from memory and from storage.
#include "checkpoint/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "checkpoint/engine_testing.h"
#include "hook/abi/shared_memory.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::HasSubstr;

TEST(Engine, SavesCommitAndRestoreInAnotherAgent) {
  SimDisk disk;
  {
    EngineHarness harness(disk, {});
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2));
    EXPECT_THAT(harness.Restore(*trainers[0]).status, IsNotFound());
    harness.SaveAll(trainers, 10);
    for (const TestTrainer* trainer : trainers) {
      EXPECT_EQ(EngineHarness::CommittedProcess(*trainer), 10u);
      EXPECT_EQ(EngineHarness::CommittedPower(*trainer), 10u);
    }
    harness.SaveAll(trainers, 20);
    EXPECT_EQ(EngineHarness::CommittedPower(*trainers[1]), 20u);
    EXPECT_EQ(harness.engine().pending_image_count(), 0u);
  }
  EngineHarness harness(disk, {.writer = "x"});
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2));
  EXPECT_EQ(trainers[0]->attempt, Attempt{2});
  for (TestTrainer* trainer : trainers) {
    const RestoreOutcome outcome = harness.Restore(*trainer);
    ExpectState(outcome, *trainer, 20, 2);
    EXPECT_EQ(outcome.bytes_from_memory, 0u);
  }
  ASSERT_OK_AND_ASSIGN(const Catalog catalog, harness.ReadJob());
  ASSERT_EQ(catalog.entries.size(), 2u);
  EXPECT_EQ(catalog.entries[0].manifest->parent, std::nullopt);
  EXPECT_EQ(catalog.entries[1].manifest->parent, catalog.entries[0].id);
  EXPECT_EQ(catalog.entries[1].manifest->survives,
            (FaultSet{.process = true, .power = true, .nodes = 0}));
}

// Every world size to every other, through storage (a new agent) and through memory (the same).
TEST(Engine, RestoresInAnyNumberOfRanks) {
  for (const bool from_memory : {false, true}) {
    SimDisk disk;
    auto harness = std::make_unique<EngineHarness>(disk, EngineHarnessOptions{});
    uint64_t step = 0;
    uint32_t old_world_size = 0;
    for (const uint32_t world_size : {4, 2, 3, 1, 4}) {
      ASSERT_OK_AND_ASSIGN(const auto trainers, harness->Launch(world_size));
      for (TestTrainer* trainer : trainers) {
        const RestoreOutcome outcome = harness->Restore(*trainer);
        if (step == 0) {
          EXPECT_THAT(outcome.status, IsNotFound());
        } else {
          ExpectState(outcome, *trainer, step, old_world_size);
          EXPECT_EQ(outcome.bytes_from_memory, from_memory ? outcome.bytes : 0);
        }
      }
      harness->SaveAll(trainers, ++step);
      EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), step);
      KillAll(*harness, trainers);
      old_world_size = world_size;
      if (!from_memory) {
        harness.reset();
        harness = std::make_unique<EngineHarness>(
            disk, EngineHarnessOptions{.writer = absl::StrFormat("w%dx", step)});
      }
    }
  }
}

TEST(Engine, GivesBackMemoryForEverMoreSaves) {
  for (const uint32_t images_max : {1, 2, 3}) {
    SimDisk disk;
    EngineHarness harness(disk, {.images_per_rank_max = images_max});
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2));
    for (uint64_t step = 1; step <= 20; ++step) harness.SaveAll(trainers, step);
    EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 20u);
    ASSERT_OK_AND_ASSIGN(const Catalog catalog, harness.ReadJob());
    EXPECT_EQ(catalog.entries.size(), 20u);
    for (const CatalogEntry& entry : catalog.entries) {
      EXPECT_EQ(entry.state, CatalogEntry::State::kCommitted);
      EXPECT_EQ(entry.branch, Branch::kCurrent);
    }
  }
}

TEST(Engine, SaveBeginsWhileTheLastOneStillFlushes) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2));
  for (const uint64_t step : {1, 2}) {
    for (TestTrainer* trainer : trainers) ASSERT_TRUE(harness.Save(*trainer, step));
  }
  // Both images' memory is taken; nothing has run yet.
  EXPECT_FALSE(trainers[0]->script->HasGrant());
  harness.Settle();
  EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 2u);
  ASSERT_OK_AND_ASSIGN(const Catalog catalog, harness.ReadJob());
  EXPECT_EQ(catalog.entries.size(), 2u);
}

// The whole agent is killed; its trainers go on in their attempt with a new one, which tells them
// what became of their saves.
TEST(Engine, ANewAgentReportsWhatTheAttemptHasCommitted) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2));
  const uint64_t last = abi::kReportCount + 3;
  for (uint64_t step = 1; step <= last; ++step) harness.SaveAll(trainers, step);
  // Captured by all, on storage of none.
  disk.FailOperationsFrom(SimDisk::Operation::kRingSync, 0, absl::DataLossError("EIO"));
  harness.SaveAll(trainers, last + 1);
  disk.ClearFaults();
  harness.CrashAgent();
  for (TestTrainer* trainer : trainers) {
    ASSERT_OK(harness.Reconnect(*trainer).status());
    ASSERT_OK(harness.Register(*trainer));
    EXPECT_EQ(EngineHarness::CommittedPower(*trainer), last);
    for (uint64_t step = 1; step <= last + 1; ++step) {
      const auto report = trainer->script->ReportOf(step);
      const bool is_kept = step > last - abi::kReportCount && step <= last;
      ASSERT_EQ(report.has_value(), is_kept) << step;
      if (is_kept) {
        EXPECT_EQ(report->state, 4u) << step;
      }
    }
  }
  harness.SaveAll(trainers, last + 2);
  EXPECT_EQ(EngineHarness::CommittedPower(*trainers[1]), last + 2);
  EXPECT_EQ(trainers[0]->script->ReportOf(last + 2)->state, 4u);
  EXPECT_EQ(trainers[0]->script->ReportOf(last)->state, 4u);
}

// ---- Saves that cannot be complete ----

TEST(Engine, ARankThatSkipsAStepFailsThatSaveOnEveryRank) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2));
  ASSERT_TRUE(harness.Save(*trainers[0], 5));
  harness.Settle();
  ASSERT_TRUE(harness.Save(*trainers[1], 6));
  harness.Settle();
  const auto report = trainers[0]->script->ReportOf(5);
  ASSERT_TRUE(report.has_value());
  EXPECT_EQ(report->state, 5u);
  EXPECT_THAT(report->text, AllOf(HasSubstr("rank 1"), HasSubstr("step 6"), HasSubstr("step 5")));
  // And training goes on.
  ASSERT_TRUE(harness.Save(*trainers[0], 6));
  harness.Settle();
  EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 6u);
}

TEST(Engine, ADeadOrClosedRankFailsTheSavesThatWaitForIt) {
  for (const bool dies : {true, false}) {
    for (const bool has_begun : {true, false}) {
      SimDisk disk;
      EngineHarness harness(disk, {});
      ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2));
      if (has_begun) {
        ASSERT_TRUE(harness.BeginSave(*trainers[1], 5).has_value());
      }
      ASSERT_TRUE(harness.Save(*trainers[0], 5));
      harness.Settle();
      if (dies) {
        harness.Kill(*trainers[1]);
      } else {
        harness.Close(*trainers[1]);
        if (has_begun) {
          // A closed process may still be capturing; it ends when it dies.
          EXPECT_NE(trainers[0]->script->ReportOf(5)->state, 4u);
          harness.Kill(*trainers[1]);
        }
      }
      harness.Settle();
      const auto report = trainers[0]->script->ReportOf(5);
      EXPECT_EQ(report->state, 5u);
      EXPECT_THAT(report->text, HasSubstr("rank 1"));
      // A later one is refused at once, and says why.
      ASSERT_TRUE(harness.Save(*trainers[0], 6));
      harness.Settle();
      EXPECT_EQ(trainers[0]->script->ReportOf(6)->state, 5u);
      EXPECT_THAT(trainers[0]->script->ReportOf(6)->text, HasSubstr("rank 1"));
      EXPECT_EQ(harness.engine().pending_image_count(), 0u);
      ASSERT_OK_AND_ASSIGN(const Catalog catalog, harness.ReadJob());
      for (const CatalogEntry& entry : catalog.entries) {
        EXPECT_EQ(entry.state, CatalogEntry::State::kIncomplete);
      }
    }
  }
}

TEST(Engine, StepsOfAnAttemptMustGrow) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1));
  harness.SaveAll(trainers, 7);
  ASSERT_TRUE(harness.Save(*trainers[0], 6));
  harness.Settle();
  EXPECT_THAT(trainers[0]->script->ReportOf(6)->text, HasSubstr("must grow"));
  harness.SaveAll(trainers, 8);
  EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 8u);
}

TEST(Engine, RanksWithDifferentLayoutsAreNamed) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(TestTrainer* const first, harness.Open(Rank{0}, 2));
  ASSERT_OK_AND_ASSIGN(TestTrainer* const second, harness.Open(Rank{1}, 2));
  ASSERT_OK(harness.Register(*first));
  std::string other = SmallLayout(2);
  other.replace(other.find("[11,3]"), 6, "[12,3]");
  EXPECT_THAT(harness.Register(*second, other),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("rank 1"), HasSubstr("rank 0"), HasSubstr("[12,3]"),
                             HasSubstr("[11,3]"))));
  // The right one is accepted, and the job goes on.
  ASSERT_OK(harness.Register(*second));
  harness.SaveAll({first, second}, 1);
  EXPECT_EQ(EngineHarness::CommittedPower(*first), 1u);
}

TEST(Engine, TwoJobsInOneRoot) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(const auto one, harness.Launch(2, "", "one"));
  ASSERT_OK_AND_ASSIGN(const auto two, harness.Launch(1, "", "two"));
  harness.SaveAll(one, 3);
  harness.SaveAll(two, 4);
  KillAll(harness, one);
  KillAll(harness, two);
  ASSERT_OK_AND_ASSIGN(const auto again_one, harness.Launch(1, "", "one"));
  ASSERT_OK_AND_ASSIGN(const auto again_two, harness.Launch(2, "", "two"));
  ExpectState(harness.Restore(*again_one[0]), *again_one[0], 3, 2);
  ExpectState(harness.Restore(*again_two[1]), *again_two[1], 4, 1);
  EXPECT_THAT(ListJobs(disk, "/root"), IsOkAndHolds(testing::ElementsAre("one", "two")));
}

TEST(Engine, SaysWhatIsUnderWayForAnAttempt) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2, "key"));
  const auto activity = [&] { return harness.engine().ActivityOf("job", "key"); };
  const auto nothing = [&] {
    return !activity().capturing && !activity().flushing && !activity().restoring;
  };
  EXPECT_EQ(Value(activity().attempt), 1u);
  EXPECT_TRUE(nothing());
  EXPECT_EQ(Value(harness.engine().ActivityOf("job", "").attempt), 0u);
  EXPECT_EQ(Value(harness.engine().ActivityOf("other", "key").attempt), 0u);
  std::vector<uint32_t> slots;
  for (TestTrainer* trainer : trainers) slots.push_back(harness.BeginSave(*trainer, 1).value());
  harness.Settle();
  EXPECT_TRUE(activity().capturing);
  for (size_t i = 0; i < trainers.size(); ++i) harness.FinishSave(*trainers[i], slots[i]);
  EXPECT_FALSE(activity().capturing);
  for (const SessionId session : harness.engine().sessions()) harness.engine().Doorbell(session);
  bool flushed = false;
  while (harness.executor().RunOne()) flushed |= activity().flushing;
  EXPECT_TRUE(flushed);
  harness.Settle();
  EXPECT_TRUE(nothing());
  EXPECT_THAT(activity().held, testing::IsEmpty());
  trainers[1]->script->page().held_ns.store(3'000'000);
  EXPECT_THAT(activity().held, testing::ElementsAre(testing::Pair(Rank{1}, absl::Milliseconds(3))));
}

// ---- Storage that fails ----

TEST(Engine, AFullDiskFailsTheSaveAndNotTheMemoryTier) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2));
  harness.SaveAll(trainers, 1);
  disk.SetCapacity(disk.used_bytes() + 4096);
  harness.SaveAll(trainers, 2);
  const auto report = trainers[0]->script->ReportOf(2);
  EXPECT_EQ(report->state, 5u);
  EXPECT_EQ(report->code, static_cast<int32_t>(absl::StatusCode::kResourceExhausted));
  EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 1u);
  EXPECT_EQ(EngineHarness::CommittedProcess(*trainers[0]), 2u);
  // Room again: the next save succeeds.
  disk.SetCapacity(uint64_t{1} << 40);
  harness.SaveAll(trainers, 3);
  EXPECT_EQ(EngineHarness::CommittedPower(*trainers[1]), 3u);
  ASSERT_OK_AND_ASSIGN(const Catalog catalog, harness.ReadJob());
  ASSERT_EQ(catalog.newest.has_value(), true);
  EXPECT_EQ(catalog.entries[*catalog.newest].manifest->parent, (CheckpointId{Attempt{1}, Step{1}}));
}

// Sealed by all ranks, but storage refused it: the newest complete state is in memory only.
TEST(Engine, TheNewestSealedStateIsRestoredFromMemory) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2));
  harness.SaveAll(trainers, 1);
  disk.FailOperationsFrom(SimDisk::Operation::kRingSync, 0, absl::DataLossError("EIO"));
  EXPECT_TRUE(harness.engine().uncommitted_saves().empty());
  harness.SaveAll(trainers, 2);
  EXPECT_GT(disk.fault_count(), 0u);
  // Nothing is pending any more, but the state of step 2 would end with the agent.
  EXPECT_EQ(harness.engine().pending_image_count(), 0u);
  ASSERT_EQ(harness.engine().uncommitted_saves().size(), 1u);
  EXPECT_EQ(harness.engine().uncommitted_saves()[0].job, "job");
  EXPECT_EQ(harness.engine().uncommitted_saves()[0].checkpoint,
            (CheckpointId{Attempt{1}, Step{2}}));
  EXPECT_EQ(EngineHarness::CommittedProcess(*trainers[0]), 2u);
  EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 1u);
  KillAll(harness, trainers);
  disk.ClearFaults();

  ASSERT_OK_AND_ASSIGN(const auto again, harness.Launch(3));
  for (TestTrainer* trainer : again) {
    const RestoreOutcome outcome = harness.Restore(*trainer);
    ExpectState(outcome, *trainer, 2, 2);
    EXPECT_EQ(outcome.bytes_from_memory, outcome.bytes);
  }
  // Its successor is a child of what storage has.
  ASSERT_TRUE(harness.BeginSave(*again[0], 3).has_value());
  harness.Settle();
  EXPECT_EQ(harness.engine().uncommitted_saves().size(), 2u);
  again[0]->script->CopyBlocks(0);
  harness.FinishSave(*again[0], 0);
  for (const size_t rank : {1, 2}) ASSERT_TRUE(harness.Save(*again[rank], 3));
  harness.Settle();
  EXPECT_TRUE(harness.engine().uncommitted_saves().empty());
  EXPECT_EQ(EngineHarness::CommittedPower(*again[0]), 3u);
  ASSERT_OK_AND_ASSIGN(const Catalog catalog, harness.ReadJob());
  EXPECT_EQ(catalog.Find({Attempt{2}, Step{3}})->manifest->parent,
            (CheckpointId{Attempt{1}, Step{1}}));
}

TEST(Engine, ARestorePointThatWasOnlyInMemoryAndIsLostIsAClearError) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2));
  harness.SaveAll(trainers, 1);
  disk.FailOperationsFrom(SimDisk::Operation::kRingSync, 0, absl::DataLossError("EIO"));
  harness.SaveAll(trainers, 2);
  KillAll(harness, trainers);
  disk.ClearFaults();
  ASSERT_OK_AND_ASSIGN(const auto again, harness.Launch(2));
  ExpectState(harness.Restore(*again[0]), *again[0], 2, 2);

  // The agent is gone with its memory; rank 1 comes back to a new one, in the same attempt.
  harness.CrashAgent();
  ASSERT_OK(harness.Reconnect(*again[1]).status());
  ASSERT_OK(harness.Register(*again[1]));
  EXPECT_THAT(harness.Restore(*again[1]).status,
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("step 2 of attempt 1")));
  // A new attempt decides anew.
  KillAll(harness, again);
  ASSERT_OK_AND_ASSIGN(const auto third, harness.Launch(2));
  ExpectState(harness.Restore(*third[1]), *third[1], 1, 2);
}

// A trainer that leaves its restore (deadline, no room to map) gets its memory back: the grant that
// was taken for staging, and what the restore read from. It says so, or just begins a save.
TEST(Engine, ARestoreThatIsLeftGivesEverythingBack) {
  SimDisk disk;
  uint64_t image_bytes = 0;
  {
    EngineHarness harness(disk, {});
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1));
    harness.SaveAll(trainers, 1);
    image_bytes = trainers[0]->script->image_bytes();
  }
  for (const bool says_so : {true, false}) {
    SCOPED_TRACE(says_so);
    // Room for one image only: staging takes its blocks. More: a save can begin beside the restore.
    EngineHarness harness(disk,
                          {.host_memory_bytes = says_so ? image_bytes + 4096 : uint64_t{64} << 20,
                           .writer = says_so ? "x" : "y"});
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1));
    TestTrainer& trainer = *trainers[0];
    harness.Settle();
    ASSERT_TRUE(trainer.script->HasGrant());
    std::optional<absl::Status> begun;
    std::optional<absl::Status> ended;
    harness.engine().Restore(
        trainer.session, trainer.registration_id, {},
        [&](absl::StatusOr<RestoreBegun> result) { begun = result.status(); },
        [&](absl::StatusOr<RestoreEnded> result) { ended = result.status(); });
    harness.Settle();
    ASSERT_TRUE(begun.has_value());
    ASSERT_OK(*begun);
    EXPECT_FALSE(ended.has_value());
    const auto staging = [&] {
      const std::string status = harness.engine().StatusJson();
      return status.find("\"staging\":0") == std::string::npos;
    };
    EXPECT_TRUE(staging());
    const uint64_t step = says_so ? 2 : 3;
    if (says_so) {
      EXPECT_FALSE(trainer.script->HasGrant());
      harness.engine().CancelRestore(trainer.session);
      harness.Settle();
      ASSERT_TRUE(trainer.script->HasGrant());
      ASSERT_TRUE(harness.Save(trainer, step));
    } else {
      ASSERT_TRUE(trainer.script->HasGrant());
      const std::optional<uint32_t> slot = harness.BeginSave(trainer, step);
      ASSERT_TRUE(slot.has_value());
      harness.Settle();
      EXPECT_FALSE(staging());
      harness.FinishSave(trainer, *slot);
    }
    ASSERT_TRUE(ended.has_value() || says_so);
    harness.Settle();
    EXPECT_THAT(*ended, StatusIs(absl::StatusCode::kAborted, HasSubstr("left the restore")));
    EXPECT_FALSE(staging());
    EXPECT_EQ(EngineHarness::CommittedPower(trainer), step);
    // It can be asked for again.
    ExpectState(harness.Restore(trainer), trainer, step - 1, 1);
  }
}

// Left while reads from storage are in flight: they keep what they read from for a moment only.
TEST(Engine, ARestoreThatIsLeftAtAnyMomentEndsByItself) {
  SimDisk disk;
  {
    EngineHarness harness(disk, {});
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1));
    harness.SaveAll(trainers, 1);
  }
  size_t moments = 0;
  for (uint32_t turns = 0;; ++turns) {
    EngineHarness harness(disk, {.writer = absl::StrFormat("t%dx", turns)});
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1));
    TestTrainer& trainer = *trainers[0];
    harness.Settle();
    bool over = false;
    harness.engine().Restore(
        trainer.session, trainer.registration_id, {},
        [&](absl::StatusOr<RestoreBegun> result) { over = !result.ok(); },
        [&](absl::StatusOr<RestoreEnded>) { over = true; });
    bool idle = false;
    for (uint32_t turn = 0; turn < turns && !idle; ++turn) idle = !harness.executor().RunOne();
    harness.engine().CancelRestore(trainer.session);
    harness.Settle();
    harness.executor().AdvanceTime(absl::Seconds(1));
    const std::string status = harness.engine().StatusJson();
    EXPECT_NE(status.find("\"restoring\":false"), std::string::npos) << turns;
    EXPECT_NE(status.find("\"staging\":0"), std::string::npos) << turns << status;
    ++moments;
    if (idle) break;
  }
  EXPECT_GT(moments, 5u);
}

// check_source = all: what a rank had not compared when it died is nobody's restore point, also if
// the worker dies in between.
TEST(Engine, WhatWasNotComparedIsNeverCommitted) {
  for (const bool worker_dies : {false, true}) {
    SCOPED_TRACE(worker_dies);
    SimDisk disk;
    EngineHarness harness(disk, {});
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2));
    harness.SaveAll(trainers, 1);
    for (TestTrainer* trainer : trainers) {
      const std::optional<uint32_t> slot = harness.BeginSave(*trainer, 2);
      ASSERT_TRUE(slot.has_value());
      trainer->script->registration().slots[*slot].must_compare.store(1);
      trainer->script->CopyBlocks(*slot);
      // Rank 0 has compared, rank 1 dies before.
      if (Value(trainer->rank) == 0) trainer->script->Finish(*slot);
    }
    harness.Settle();
    if (worker_dies) harness.CrashWorker(SimDisk::InFlight::kAll);
    KillAll(harness, trainers);
    harness.Settle();
    ASSERT_OK_AND_ASSIGN(const auto again, harness.Launch(2));
    for (TestTrainer* trainer : again) ExpectState(harness.Restore(*trainer), *trainer, 1, 2);
    ASSERT_OK_AND_ASSIGN(const Catalog catalog, harness.ReadJob());
    const CatalogEntry* const entry = catalog.Find({Attempt{1}, Step{2}});
    EXPECT_TRUE(entry == nullptr || entry->state != CatalogEntry::State::kCommitted);
  }
}

// ---- Damaged bytes ----

TEST(Engine, ABadBlockInMemoryComesFromStorage) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2));
  harness.SaveAll(trainers, 1);
  for (std::byte& byte : trainers[0]->script->memory_bytes()) byte ^= std::byte{1};
  KillAll(harness, trainers);
  ASSERT_OK_AND_ASSIGN(const auto again, harness.Launch(2));
  uint64_t bytes = 0;
  uint64_t bytes_from_memory = 0;
  for (TestTrainer* trainer : again) {
    const RestoreOutcome outcome = harness.Restore(*trainer);
    ExpectState(outcome, *trainer, 1, 2);
    bytes += outcome.bytes;
    bytes_from_memory += outcome.bytes_from_memory;
  }
  EXPECT_LT(bytes_from_memory, bytes);
  EXPECT_GT(bytes_from_memory, 0u);  // rank 1's image is good
}

TEST(Engine, AZombiesMemoryIsCopiedBeforeItIsVerified) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(const auto zombies, harness.Launch(2, "a"));
  harness.SaveAll(zombies, 1);
  // The processes live on; a new attempt begins.
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2, "b"));
  const RestoreOutcome clean = harness.Restore(*trainers[0]);
  ExpectState(clean, *trainers[0], 1, 2);
  EXPECT_EQ(clean.bytes_from_memory, clean.bytes);
  EXPECT_EQ(clean.maps, 0u);  // nobody maps memory that somebody else writes
  for (std::byte& byte : zombies[1]->script->memory_bytes()) byte ^= std::byte{1};
  const RestoreOutcome scribbled = harness.Restore(*trainers[1]);
  ExpectState(scribbled, *trainers[1], 1, 2);
  EXPECT_LT(scribbled.bytes_from_memory, scribbled.bytes);
}

TEST(Engine, ABadBlockEverywhereNamesFileTensorAndOffset) {
  SimDisk disk;
  {
    EngineHarness harness(disk, {});
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1));
    harness.SaveAll(trainers, 1);
  }
  const std::string path = "/root/job/s000000000001.a0001/rank-00000.h5";
  ASSERT_OK_AND_ASSIGN(const std::string bytes, disk.Contents(path));
  disk.FlipBit(path, bytes.size() - 6000, 3);
  EngineHarness harness(disk, {.writer = "x"});
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1));
  EXPECT_THAT(
      harness.Restore(*trainers[0]).status,
      StatusIs(absl::StatusCode::kDataLoss, AllOf(HasSubstr(path), HasSubstr("CRC32C"),
                                                  HasSubstr("bytes ["), HasSubstr("(param)"))));
}

// ---- Workers that die ----

// Kills the worker after every step of its loop during a save, with and without what was in flight.
TEST(Engine, AWorkerThatDiesAnywhereInASaveLosesNothing) {
  for (const SimDisk::InFlight in_flight : {SimDisk::InFlight::kAll, SimDisk::InFlight::kNone}) {
    int crashes = 0;
    for (int steps_before = 0;; ++steps_before) {
      SimDisk disk;
      EngineHarness harness(disk, {});
      ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2));
      harness.SaveAll(trainers, 1);
      for (TestTrainer* trainer : trainers) ASSERT_TRUE(harness.Save(*trainer, 2));
      bool idle = false;
      for (int i = 0; i < steps_before && !idle; ++i) idle = !harness.executor().RunOne();
      harness.CrashWorker(in_flight);
      harness.Settle();
      EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 2u) << steps_before;
      EXPECT_EQ(EngineHarness::CommittedPower(*trainers[1]), 2u) << steps_before;
      // And it goes on.
      harness.SaveAll(trainers, 3);
      EXPECT_EQ(EngineHarness::CommittedPower(*trainers[1]), 3u) << steps_before;
      ++crashes;
      if (idle || testing::Test::HasFailure()) break;
    }
    EXPECT_GT(crashes, 50);
  }
}

}  // namespace
}  // namespace holdfast
