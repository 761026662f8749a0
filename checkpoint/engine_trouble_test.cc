// The engine in trouble: memory that is short or not there, images that are lost, taken back or in
// the way, records that are damaged. Whom it concerns is told; nobody else notices.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/engine.h"
#include "checkpoint/engine_testing.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::HasSubstr;

// A tensor that the checkpoint does not have is an error that names it. "Not found" would say that
// there is no checkpoint, and the trainer would begin from nothing.
TEST(EngineTrouble, ATensorThatIsNotInTheCheckpointIsNoMissingCheckpoint) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1, "a"));
  harness.SaveAll(trainers, 1);
  ASSERT_OK_AND_ASSIGN(TestTrainer* const renamed, harness.Open(Rank{0}, 1, "b"));
  ASSERT_OK(harness.Register(
      *renamed, R"({"holdfast_layout":1,"mesh":[],"tensors":[{"name":"renamed","shape":[2],)"
                R"("states":[{"state":"param","dtype":"float32"}]}]})"));
  EXPECT_THAT(harness.Restore(*renamed).status,
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("\"renamed\"")));
}

// A budget of one image per rank, a disk that was full, a restart: what the disk did not take, and
// the new attempt has loaded (or will never load), gives way to its next save.
TEST(EngineTrouble, AnOlderAttemptsImageThatIsOnlyInMemoryMakesRoom) {
  uint64_t image_bytes = 0;
  {
    SimDisk disk;
    EngineHarness harness(disk, {});
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1));
    image_bytes = uint64_t{4096} * trainers[0]->script->block_count();
  }
  for (const bool is_point : {true, false}) {
    SCOPED_TRACE(is_point);
    SimDisk disk;
    EngineHarness harness(disk, {.host_memory_bytes = image_bytes});
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1));
    harness.SaveAll(trainers, 1);
    disk.FailOperationsFrom(SimDisk::Operation::kRingSync, 0, absl::DataLossError("EIO"));
    ASSERT_TRUE(harness.Save(*trainers[0], 2));
    while (EngineHarness::CommittedProcess(*trainers[0]) != 2u) {
      ASSERT_TRUE(harness.executor().RunOne());
    }
    harness.Kill(*trainers[0]);  // before it could ask for room
    EXPECT_GT(disk.fault_count(), 0u);
    disk.ClearFaults();
    // Marked as bad by somebody: then it is not the point.
    if (!is_point) disk.PutFile("/root/job/s000000000002.a0001/BAD.1", "?");

    ASSERT_OK_AND_ASSIGN(const auto again, harness.Launch(1));
    EXPECT_FALSE(again[0]->script->HasGrant());
    ExpectState(harness.Restore(*again[0]), *again[0], is_point ? 2 : 1, 1);
    harness.Settle();
    harness.SaveAll(again, 3);
    EXPECT_EQ(EngineHarness::CommittedPower(*again[0]), 3u);
    harness.SaveAll(again, 4);
    EXPECT_EQ(EngineHarness::CommittedPower(*again[0]), 4u);
  }
}

// Committed images are given back to make room for a registration whose pages the machine does not
// have; the worker stays up whether that helps or not.
TEST(EngineTrouble, ARegistrationThatFindsNoPagesFailsAloneOrIsTriedAgain) {
  for (const int failures : {1, 2, 100}) {
    SimDisk disk;
    int failures_left = 0;
    EngineHarness harness(disk, {.populate = [&](int, uint64_t, std::span<std::byte>) {
                            return --failures_left >= 0 ? absl::ResourceExhaustedError("ENOMEM")
                                                        : absl::OkStatus();
                          }});
    ASSERT_OK_AND_ASSIGN(const auto one, harness.Launch(1, "a", "one"));
    harness.SaveAll(one, 1);
    failures_left = failures;
    ASSERT_OK_AND_ASSIGN(TestTrainer* const two, harness.Open(Rank{0}, 1, "a", "two"));
    const absl::Status registered = harness.Register(*two);
    if (failures == 100) {
      EXPECT_THAT(registered, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("ENOMEM")));
    } else {
      ASSERT_OK(registered);
      harness.SaveAll({two}, 1);
      EXPECT_EQ(EngineHarness::CommittedPower(*two), 1u);
    }
    harness.SaveAll(one, 2);
    EXPECT_EQ(EngineHarness::CommittedPower(*one[0]), 2u);
  }
}

// What one job's storage cannot tell is in nobody else's way, and loses nothing that is in memory.
TEST(EngineTrouble, ADamagedJobStaysAloneAfterARestartOfTheWorker) {
  const std::vector<std::string> records = {"/root/one/store/attempt-1.json",
                                            "/root/one/store/attempt-1.restore.json",
                                            "/root/one/JOB.json"};
  for (const std::string& record : records) {
    for (const bool dies : {false, true}) {
      SCOPED_TRACE(testing::Message() << record << ", dies " << dies);
      SimDisk disk;
      EngineHarness harness(disk, {});
      ASSERT_OK_AND_ASSIGN(const auto one, harness.Launch(2, "a", "one"));
      ASSERT_OK_AND_ASSIGN(const auto two, harness.Launch(1, "a", "two"));
      harness.SaveAll(one, 1);
      harness.SaveAll(two, 1);
      for (TestTrainer* trainer : one) ASSERT_TRUE(harness.Save(*trainer, 2));
      for (int i = 0; i < 4; ++i) ASSERT_TRUE(harness.executor().RunOne());
      disk.FlipBit(record, 30, 2);
      harness.CrashWorker(SimDisk::InFlight::kAll);

      harness.SaveAll(two, 2);
      EXPECT_EQ(EngineHarness::CommittedPower(*two[0]), 2u);
      EXPECT_THAT(harness.Reconnect(*one[0]).status(),
                  StatusIs(absl::StatusCode::kDataLoss, HasSubstr(record)));
      EXPECT_THAT(harness.Open(Rank{0}, 2, "b", "one").status(),
                  StatusIs(absl::StatusCode::kDataLoss, HasSubstr(record)));
      EXPECT_EQ(harness.engine().pending_image_count(), 2u);
      EXPECT_THAT(harness.warnings(), testing::Contains(HasSubstr(record)));
      const size_t warned = harness.warnings().size();
      harness.executor().AdvanceTime(absl::Seconds(10));
      EXPECT_EQ(harness.warnings().size(), warned);  // once
      if (dies) harness.Kill(*one[1]);

      disk.FlipBit(record, 30, 2);
      harness.executor().AdvanceTime(absl::Seconds(2));
      ASSERT_OK_AND_ASSIGN(const OpenResult resumed, harness.Reconnect(*one[0]));
      EXPECT_TRUE(resumed.resumed);
      harness.Settle();
      EXPECT_EQ(EngineHarness::CommittedPower(*one[0]), 2u);
      EXPECT_EQ(harness.engine().pending_image_count(), 0u);
      if (dies) {
        EXPECT_EQ(harness.engine().open_session_count(), 2u);
        continue;
      }
      ASSERT_OK(harness.Reconnect(*one[1]).status());
      harness.SaveAll(one, 3);
      EXPECT_EQ(EngineHarness::CommittedPower(*one[1]), 3u);
    }
  }
}

// A step that was sealed, failed on storage, and is saved again all the same, in a slot before it.
TEST(EngineTrouble, ASealedImageIsNotGivenUpForAVoidOneOfItsStep) {
  SimDisk disk;
  EngineHarness harness(disk, {.images_per_rank_max = 3});
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1));
  for (const uint64_t step : {1, 2}) harness.SaveAll(trainers, step);
  disk.FailOperationsFrom(SimDisk::Operation::kRingSync, 0, absl::DataLossError("EIO"));
  const std::optional<uint32_t> sealed_slot = harness.BeginSave(*trainers[0], 3);
  ASSERT_EQ(sealed_slot, 2u);
  harness.FinishSave(*trainers[0], *sealed_slot);
  harness.Settle();
  disk.ClearFaults();
  EXPECT_EQ(EngineHarness::CommittedProcess(*trainers[0]), 3u);
  EXPECT_EQ(trainers[0]->script->ReportOf(3)->state, 5u);
  ASSERT_EQ(harness.BeginSave(*trainers[0], 3), 0u);  // its capture does not end
  harness.Settle();
  EXPECT_EQ(EngineHarness::CommittedProcess(*trainers[0]), 3u);
  harness.CrashWorker(SimDisk::InFlight::kAll);
  EXPECT_EQ(EngineHarness::CommittedProcess(*trainers[0]), 3u);
  KillAll(harness, trainers);
  ASSERT_OK_AND_ASSIGN(const auto again, harness.Launch(1));
  ExpectState(harness.Restore(*again[0]), *again[0], 3, 1);
}

// All ranks have sealed it; then a trainer finds that its source changed meanwhile (or a look finds
// it): it is not committed for anything any more.
TEST(EngineTrouble, WhatIsTakenBackIsNotCalledCommitted) {
  for (const bool has_older : {false, true}) {
    for (const bool crash : {false, true}) {
      SimDisk disk;
      EngineHarness harness(disk, {});
      ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2));
      if (has_older) harness.SaveAll(trainers, 1);
      std::vector<uint32_t> slots;
      for (TestTrainer* trainer : trainers) {
        slots.push_back(harness.BeginSave(*trainer, 2).value());
        harness.FinishSave(*trainer, slots.back());
      }
      while (EngineHarness::CommittedProcess(*trainers[0]) != 2u) {
        ASSERT_TRUE(harness.executor().RunOne());
      }
      ASSERT_NE(EngineHarness::CommittedPower(*trainers[0]), 2u);
      trainers[0]->script->GiveUp(slots[0], 10, "the source changed");
      if (crash) harness.CrashWorker(SimDisk::InFlight::kNone);
      harness.Settle();
      for (const TestTrainer* trainer : trainers) {
        const auto report = trainer->script->ReportOf(2);
        EXPECT_EQ(report->state, 5u);
        EXPECT_THAT(report->text, HasSubstr("the source changed"));
        EXPECT_EQ(EngineHarness::CommittedProcess(*trainer),
                  has_older ? std::optional<uint64_t>(1) : std::nullopt);
      }
      harness.SaveAll(trainers, 3);
      EXPECT_EQ(EngineHarness::CommittedProcess(*trainers[0]), 3u);
      EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 3u);
    }
  }
}

// Repeated and failed registrations put no rank ahead of the others.
TEST(EngineTrouble, OnlyAChangeOfTheLayoutThatWasMadeBeginsARound) {
  SimDisk disk;
  int failures_left = 0;
  EngineHarness harness(disk, {.populate = [&](int, uint64_t, std::span<std::byte>) {
                          return --failures_left >= 0 ? absl::ResourceExhaustedError("ENOMEM")
                                                      : absl::OkStatus();
                        }});
  std::string other = SmallLayout(2);
  other.replace(other.find("[11,3]"), 6, "[12,3]");
  ASSERT_OK_AND_ASSIGN(TestTrainer* const first, harness.Open(Rank{0}, 2));
  ASSERT_OK_AND_ASSIGN(TestTrainer* const second, harness.Open(Rank{1}, 2));
  // Failed, of another layout; then twice of the right one.
  failures_left = 100;
  EXPECT_THAT(harness.Register(*first, other), StatusIs(absl::StatusCode::kResourceExhausted));
  failures_left = 0;
  ASSERT_OK(harness.Register(*first));
  ASSERT_OK(harness.Register(*first));
  EXPECT_THAT(harness.Register(*second, other), StatusIs(absl::StatusCode::kInvalidArgument));
  ASSERT_OK(harness.Register(*second));
  harness.SaveAll({first, second}, 1);
  EXPECT_EQ(EngineHarness::CommittedPower(*first), 1u);
  // Another layout on both, the second rank first; the old one is not accepted beside it.
  ASSERT_OK(harness.Register(*second, other));
  ASSERT_OK(harness.Register(*second, other));
  ASSERT_OK(harness.Register(*first, other));
  std::string third = SmallLayout(2);
  third.replace(third.find("[11,3]"), 6, "[13,3]");
  ASSERT_OK(harness.Register(*first, third));
  EXPECT_THAT(harness.Register(*second),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("[13,3]")));
  ASSERT_OK(harness.Register(*second, third));
  harness.SaveAll({first, second}, 2);
  EXPECT_EQ(EngineHarness::CommittedPower(*second), 2u);
}

// Without links: the marker of a worker that died behind its publication makes nothing void later.
TEST(EngineTrouble, DamageIsDamageAlsoWhereAMarkerWasLeftBehind) {
  SimDisk::Options options;
  options.links_supported = false;
  SimDisk disk(options);
  const std::string manifest = "/root/job/s000000000002.a0001/MANIFEST.json";
  {
    EngineHarness harness(disk, {});
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1));
    harness.SaveAll(trainers, 1);
    harness.SaveAll(trainers, 2);
    disk.PutFile(manifest + ".exclusive.dead", "");
    ASSERT_OK_AND_ASSIGN(const Catalog catalog, harness.ReadJob());
    EXPECT_TRUE(catalog.entries[1].has_stale_marker);
  }
  EngineHarness harness(disk, {.writer = "x"});
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1));
  disk.FlipBit(manifest, 40, 3);
  EXPECT_THAT(harness.Restore(*trainers[0]).status,
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("step 2 of attempt 1")));
}

// However many ranks restore at a time, the blobs are in memory once.
TEST(EngineTrouble, RanksThatRestoreTogetherShareTheBlobs) {
  for (const bool from_memory : {true, false}) {
    SimDisk disk;
    auto harness = std::make_unique<EngineHarness>(disk, EngineHarnessOptions{});
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness->Launch(2));
    harness->SaveAll(trainers, 1);
    KillAll(*harness, trainers);
    if (!from_memory) {
      harness.reset();
      harness = std::make_unique<EngineHarness>(disk, EngineHarnessOptions{.writer = "x"});
    }
    ASSERT_OK_AND_ASSIGN(const auto again, harness->Launch(3));
    std::set<ino_t> memories;
    size_t begun_count = 0;
    for (TestTrainer* trainer : again) {
      harness->engine().Restore(
          trainer->session, trainer->registration_id, {},
          [&](absl::StatusOr<RestoreBegun> begun) {
            ASSERT_OK(begun);
            struct stat info {};
            ASSERT_EQ(fstat(begun->blobs_fd.get(), &info), 0);
            EXPECT_EQ(static_cast<uint64_t>(info.st_size), begun->blobs_bytes);
            memories.insert(info.st_ino);
            ++begun_count;
          },
          [](absl::StatusOr<RestoreEnded>) {});
    }
    harness->executor().RunUntilIdle();
    EXPECT_EQ(begun_count, 3u);
    EXPECT_EQ(memories.size(), 1u);
    // And each can restore after that, alone.
    ExpectState(harness->Restore(*again[2]), *again[2], 1, 2);
  }
}

// What could not be handed out is not committed.
TEST(EngineTrouble, BlobsBeyondTheirLimitFailTheSave) {
  SimDisk disk;
  EngineHarness harness(disk, {.blobs_bytes_max = 44});  // 12 and twice 16 at steps of one digit
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2));
  harness.SaveAll(trainers, 9);
  EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 9u);
  harness.SaveAll(trainers, 10);
  EXPECT_EQ(trainers[1]->script->ReportOf(10)->state, 5u);
  EXPECT_THAT(trainers[1]->script->ReportOf(10)->text,
              AllOf(HasSubstr("47 bytes"), HasSubstr("at most 44")));
  EXPECT_EQ(EngineHarness::CommittedProcess(*trainers[0]), 9u);
}

}  // namespace
}  // namespace holdfast
