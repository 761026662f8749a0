// Goal: an attempt that was told what to begin from begins from exactly that, on all its ranks,
// whatever dies meanwhile, and what it saves is the branch from then on; an order that cannot be
// followed is never followed by something else.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "checkpoint/engine_testing.h"
#include "format/manifest.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using Known = Engine::KnownCheckpoint;

constexpr CheckpointId Id(uint32_t attempt, uint64_t step) {
  return {Attempt{attempt}, Step{step}};
}

// Two ranks save the steps; then they are dead.
void Train(EngineHarness& harness, const std::string& key, std::vector<uint64_t> steps,
           const std::string& job = "job") {
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2, key, job));
  for (TestTrainer* trainer : trainers) harness.Restore(*trainer);
  for (const uint64_t step : steps) harness.SaveAll(trainers, step);
  EXPECT_EQ(EngineHarness::CommittedProcess(*trainers[0]), steps.back());
  KillAll(harness, trainers);
  harness.Settle();
}

void Order(EngineHarness& harness, const std::string& key, std::optional<CheckpointId> checkpoint) {
  harness.engine().SetRestoreOrder("job", RestoreOrder{key, checkpoint});
}

std::vector<Known> Read(EngineHarness& harness, const std::string& job = "job") {
  absl::StatusOr<std::vector<Known>> known = absl::UnknownError("no answer");
  harness.engine().ReadCheckpoints(
      job, [&](absl::StatusOr<std::vector<Known>> answer) { known = std::move(answer); });
  harness.Settle();
  EXPECT_OK(known.status());
  return known.ok() ? *std::move(known) : std::vector<Known>();
}

void MarkBad(EngineHarness& harness, SimDisk& disk, CheckpointId id) {
  const absl::StatusOr<Catalog> catalog = harness.ReadJob();
  ASSERT_OK(catalog.status());
  BadMark mark;
  mark.number = 1;
  mark.job_uuid = catalog->job.job_uuid;
  mark.checkpoint = id;
  mark.reason = "the loss was NaN";
  mark.created_by = "test";
  disk.PutFile(absl::StrCat(catalog->Find(id)->directory, "/", BadFileName(1)),
               EncodeBadMark(mark));
}

TEST(RestoreOrder, AnOlderCheckpointIsTheBranchFromThenOn) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  Train(harness, "a", {1, 2, 3});
  Order(harness, "b", Id(1, 2));
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(3, "b"));
  for (TestTrainer* trainer : trainers) {
    const RestoreOutcome outcome = harness.Restore(*trainer);
    EXPECT_EQ(outcome.checkpoint, Id(1, 2));
    ExpectState(outcome, *trainer, 2, 2);
  }
  // Until it has committed, what it has passed over is still there for others.
  EXPECT_THAT(Read(harness), ElementsAre(Known{Id(1, 1), false, true}, Known{Id(1, 2), false, true},
                                         Known{Id(1, 3), false, true}));
  harness.SaveAll(trainers, 4);
  ASSERT_OK_AND_ASSIGN(const Catalog catalog, harness.ReadJob());
  EXPECT_EQ(catalog.entries[*catalog.newest].id, Id(2, 4));
  EXPECT_EQ(catalog.Find(Id(2, 4))->manifest->parent, Id(1, 2));
  EXPECT_EQ(catalog.Find(Id(1, 3))->branch, Branch::kAbandoned);
  EXPECT_THAT(Read(harness), ElementsAre(Known{Id(1, 1), false, true}, Known{Id(1, 2), false, true},
                                         Known{Id(2, 4), true, true}));
  KillAll(harness, trainers);
  // The order was of one attempt.
  ASSERT_OK_AND_ASSIGN(const auto next, harness.Launch(2, "c"));
  for (TestTrainer* trainer : next) ExpectState(harness.Restore(*trainer), *trainer, 4, 3);
}

TEST(RestoreOrder, WhatIsOnlyInMemoryIsRestoredFromThere) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  Train(harness, "a", {1});
  disk.FailOperationsFrom(SimDisk::Operation::kRingSync, 0, absl::DataLossError("EIO"));
  Train(harness, "b", {2});
  EXPECT_GT(disk.fault_count(), 0u);
  disk.ClearFaults();
  EXPECT_THAT(Read(harness),
              ElementsAre(Known{Id(1, 1), false, true}, Known{Id(2, 2), true, false}));
  Order(harness, "c", Id(2, 2));
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2, "c"));
  for (TestTrainer* trainer : trainers) {
    const RestoreOutcome outcome = harness.Restore(*trainer);
    ExpectState(outcome, *trainer, 2, 2);
    EXPECT_EQ(outcome.bytes_from_memory, outcome.bytes);
  }
}

// What a newer save that waits to be committed must not become: the newest, behind the back of an
// attempt that has begun before it.
TEST(RestoreOrder, WhatIsNewerAndNotCommittedYetNeverIs) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  Train(harness, "a", {1});
  disk.FailOperationsFrom(SimDisk::Operation::kRingSync, 0, absl::DataLossError("EIO"));
  Train(harness, "b", {2});
  disk.ClearFaults();
  Order(harness, "c", Id(1, 1));
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2, "c"));
  for (TestTrainer* trainer : trainers) {
    ExpectState(harness.Restore(*trainer), *trainer, 1, 2);
  }
  EXPECT_THAT(Read(harness), ElementsAre(Known{Id(1, 1), false, true}));
  harness.SaveAll(trainers, 5);
  EXPECT_THAT(Read(harness),
              ElementsAre(Known{Id(1, 1), false, true}, Known{Id(3, 5), true, true}));
}

TEST(RestoreOrder, NothingIsTheBeginning) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  Train(harness, "a", {1, 2});
  Order(harness, "b", std::nullopt);
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2, "b"));
  for (TestTrainer* trainer : trainers) {
    EXPECT_THAT(harness.Restore(*trainer).status, IsNotFound());
  }
  harness.SaveAll(trainers, 1);
  ASSERT_OK_AND_ASSIGN(const Catalog catalog, harness.ReadJob());
  EXPECT_EQ(catalog.entries[*catalog.newest].id, Id(2, 1));
  EXPECT_EQ(catalog.Find(Id(2, 1))->manifest->parent, std::nullopt);
}

TEST(RestoreOrder, NothingIsWhereTheJobBeganThatStartedFromAnother) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  Train(harness, "x", {5}, "old");
  Train(harness, "a", {7});
  Order(harness, "b", std::nullopt);
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2, "b", "job", "/root/old"));
  for (TestTrainer* trainer : trainers) {
    const RestoreOutcome outcome = harness.Restore(*trainer);
    ExpectState(outcome, *trainer, 5, 2);
    EXPECT_EQ(outcome.restore_from, RestoreFrom::kUsed);
  }
}

TEST(RestoreOrder, OneThatCannotBeFollowedIsNotReplacedByAnything) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  Train(harness, "a", {1, 2, 3});
  MarkBad(harness, disk, Id(1, 2));
  struct Case {
    CheckpointId ordered;
    absl::StatusCode code;
    std::string text;
  };
  using enum absl::StatusCode;
  const std::vector<Case> cases = {{Id(1, 9), kDataLoss, "neither in memory nor on storage"},
                                   {Id(1, 2), kFailedPrecondition, "the loss was NaN"},
                                   {Id(2, 1), kFailedPrecondition, "not older"}};
  Order(harness, "b", cases[0].ordered);
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2, "b"));
  for (const Case& one : cases) {
    Order(harness, "b", one.ordered);
    for (TestTrainer* trainer : trainers) {
      EXPECT_THAT(harness.Restore(*trainer).status, StatusIs(one.code, HasSubstr(one.text)));
    }
  }
  // Nothing was decided by that.
  Order(harness, "b", Id(1, 1));
  for (TestTrainer* trainer : trainers) ExpectState(harness.Restore(*trainer), *trainer, 1, 2);
  // And what was decided stays.
  Order(harness, "b", Id(1, 3));
  for (TestTrainer* trainer : trainers) ExpectState(harness.Restore(*trainer), *trainer, 1, 2);
}

TEST(RestoreOrder, TheDecisionOutlivesTheWorkerAndTheOrderIsSaidAgain) {
  for (const bool decided : {false, true}) {
    SimDisk disk;
    EngineHarness harness(disk, {});
    Train(harness, "a", {1, 2, 3});
    Order(harness, "b", Id(1, 2));
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2, "b"));
    if (decided) ExpectState(harness.Restore(*trainers[0]), *trainers[0], 2, 2);
    harness.CrashWorker(SimDisk::InFlight::kAll);
    if (!decided) Order(harness, "b", Id(1, 2));
    for (TestTrainer* trainer : trainers) ExpectState(harness.Restore(*trainer), *trainer, 2, 2);
  }
}

TEST(ReadCheckpoints, SaysWhatIsMarkedAndWhatIsNotThereIsNothing) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  EXPECT_THAT(Read(harness), IsEmpty());
  Train(harness, "a", {1, 2});
  MarkBad(harness, disk, Id(1, 2));
  for (const bool in_memory : {true, false}) {
    EXPECT_THAT(Read(harness),
                ElementsAre(Known{Id(1, 1), false, true}, Known{Id(1, 2), in_memory, true, true}));
    harness.CrashAgent();
  }
  harness.RemoveJobDirectory();
  EXPECT_THAT(Read(harness), IsEmpty());
}

TEST(ReadCheckpoints, TheNewestAreKept) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  std::vector<uint64_t> steps;
  for (uint64_t step = 1; step <= Engine::kKnownCheckpointsMax + 2; ++step) steps.push_back(step);
  Train(harness, "a", steps);
  const std::vector<Known> known = Read(harness);
  ASSERT_EQ(known.size(), Engine::kKnownCheckpointsMax);
  EXPECT_EQ(known.front().id, Id(1, 3));
  EXPECT_EQ(known.back().id, Id(1, steps.back()));
}

}  // namespace
}  // namespace holdfast
