// HOLDFAST_RESTORE_FROM: a new job that starts from another job's checkpoint, whatever that job's
// name, root, layout and world size; the decision, once for all ranks, over deaths of the worker;
// and that what cannot be used is refused, and never taken for "there is no checkpoint".
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "checkpoint/engine_testing.h"
#include "checkpoint/foreign_checkpoint.h"
#include "format/manifest.h"
#include "tests/support/interrupting_file_system.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

constexpr char kOld[] = "/elsewhere/old";
constexpr char kOldStep5[] = "/elsewhere/old/s000000000005.a0001";

// Job "old" in root "/elsewhere": 3 ranks, steps 4 and 5 of attempt 1; and an empty "/root".
std::unique_ptr<SimDisk> DiskWithOldJob(uint64_t block_bytes = 4096) {
  auto disk = std::make_unique<SimDisk>();
  for (const char* root : {"/elsewhere", "/root"}) EXPECT_OK(disk->CreateDirectory(root));
  EXPECT_OK(disk->SyncDirectory("/"));
  EngineHarness harness(*disk, {.block_bytes = block_bytes,
                                .root_exists = true,
                                .writer = "old",
                                .root = "/elsewhere",
                                .uuid_bits = 0xabc});
  const auto trainers = harness.Launch(3, "", "old");
  EXPECT_OK(trainers);
  harness.SaveAll(*trainers, 4);
  harness.SaveAll(*trainers, 5);
  EXPECT_EQ(EngineHarness::CommittedPower(*(*trainers)[0]), 5u);
  return disk;
}

// Another one like it: making a job takes much longer than copying its disk.
std::unique_ptr<SimDisk> CopyOf(SimDisk& disk) {
  if (!disk.power_was_cut()) disk.CutPowerNow();
  return disk.RebootedCopy(Survivors::All());
}

absl::Status RestoreStatus(EngineHarness& harness, const std::string& path,
                           const std::string& key = "") {
  const auto trainers = harness.Launch(1, key, "job", path);
  return trainers.ok() ? harness.Restore(*(*trainers)[0]).status : trainers.status();
}

// The root of a job may be the root of all, and what lies there is looked for there.
TEST(RestoreFrom, PathsRightBelowTheRootAreFoundThere) {
  const auto disk = DiskWithOldJob();
  const std::string job_directory = absl::StrCat(kOld, "/");
  for (const std::string& path : disk->AllFiles()) {
    if (!path.starts_with(job_directory)) continue;
    const std::string below = path.substr(job_directory.size());
    ASSERT_OK_AND_ASSIGN(const std::string contents, disk->Contents(path));
    disk->PutFile(absl::StrCat("/old/", below), contents);
    disk->PutFile(absl::StrCat("/", below), contents);  // a checkpoint without its job's directory
  }
  for (const char* path : {"/old", "/old/s000000000005.a0001"}) {
    ASSERT_OK_AND_ASSIGN(const ForeignCheckpoint found, FindForeignCheckpoint(*disk, path));
    EXPECT_EQ(found.checkpoint, (CheckpointId{Attempt{1}, Step{5}}));
    EXPECT_OK(LoadForeignIndex(*disk, found));
  }
  const absl::Status none = FindForeignCheckpoint(*disk, "/s000000000005.a0001").status();
  EXPECT_THAT(none, Not(IsOk()));
  EXPECT_THAT(std::string(none.message()),
              AllOf(HasSubstr("restore from /s000000000005.a0001"), Not(HasSubstr("./"))));
}

TEST(RestoreFrom, ANewJobStartsFromAnotherJobOfAnotherRootLayoutAndWorldSize) {
  for (const char* path : {kOld, kOldStep5, "/elsewhere/old/"}) {
    for (const uint32_t world_size : {1u, 2u, 3u, 5u}) {
      SCOPED_TRACE(testing::Message() << path << ", " << world_size << " ranks");
      const std::unique_ptr<SimDisk> disk = DiskWithOldJob();
      EngineHarness harness(*disk, {.root_exists = true});
      ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(world_size, "a", "job", path));
      for (TestTrainer* trainer : trainers) {
        const RestoreOutcome outcome = harness.Restore(*trainer);
        ExpectState(outcome, *trainer, 5, 3);
        EXPECT_EQ(outcome.restore_from, RestoreFrom::kUsed);
        EXPECT_EQ(outcome.bytes_from_memory, 0u);
        EXPECT_EQ(outcome.checkpoint, (CheckpointId{Attempt{1}, Step{5}}));
      }
      EXPECT_THAT(harness.engine().StatusJson(),
                  AllOf(HasSubstr(absl::StrCat("\"restore_from\":\"", path, "\"")),
                        HasSubstr("\"restore_from_used\":true"),
                        HasSubstr(absl::StrCat("\"directory\":\"", kOldStep5, "\""))));
      // The lineage of the new job begins with it, also where it counts its steps as the old one.
      harness.SaveAll(trainers, 5);
      harness.SaveAll(trainers, 6);
      EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 6u);
      ASSERT_OK_AND_ASSIGN(const Catalog catalog, harness.ReadJob());
      ASSERT_EQ(catalog.entries.size(), 2u);
      EXPECT_EQ(catalog.entries[0].manifest->parent, std::nullopt);
      EXPECT_EQ(catalog.entries[1].manifest->parent, (CheckpointId{Attempt{1}, Step{5}}));
    }
  }
}

TEST(RestoreFrom, AnyNamedCheckpointServesAlsoAnOlderOne) {
  const std::unique_ptr<SimDisk> disk = DiskWithOldJob();
  EngineHarness harness(*disk, {.root_exists = true});
  ASSERT_OK_AND_ASSIGN(const auto trainers,
                       harness.Launch(2, "", "job", "/elsewhere/old/s000000000004.a0001"));
  for (TestTrainer* trainer : trainers) ExpectState(harness.Restore(*trainer), *trainer, 4, 3);
}

TEST(RestoreFrom, ItMayLieInTheSameRootAndBeServedByTheSameAgent) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(const auto old, harness.Launch(3, "", "old"));
  harness.SaveAll(old, 5);
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2, "", "job", "/root/old"));
  for (TestTrainer* trainer : trainers) ExpectState(harness.Restore(*trainer), *trainer, 5, 3);
  // The old job goes on as if nothing had been.
  harness.SaveAll(old, 6);
  EXPECT_EQ(EngineHarness::CommittedPower(*old[0]), 6u);
}

// Blocks of another size than this agent's.
TEST(RestoreFrom, BlocksMayBeLargerAndSmallerThanTheAgents) {
  for (const auto& [theirs, ours] : {std::pair(4096u, 16384u), std::pair(16384u, 4096u)}) {
    const std::unique_ptr<SimDisk> disk = DiskWithOldJob(theirs);
    EngineHarness harness(*disk, {.block_bytes = ours, .root_exists = true});
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2, "", "job", kOld));
    for (TestTrainer* trainer : trainers) ExpectState(harness.Restore(*trainer), *trainer, 5, 3);
  }
}

TEST(RestoreFrom, AJobWithACheckpointOfItsOwnIgnoresItAndSaysSo) {
  const std::unique_ptr<SimDisk> disk = DiskWithOldJob();
  EngineHarness harness(*disk, {.root_exists = true});
  ASSERT_OK_AND_ASSIGN(const auto first, harness.Launch(2, "a", "job", kOld));
  for (TestTrainer* trainer : first) ExpectState(harness.Restore(*trainer), *trainer, 5, 3);
  harness.SaveAll(first, 7);
  KillAll(harness, first);
  // From memory, and from storage alone; also where the path leads nowhere any more.
  for (const bool from_memory : {true, false}) {
    for (const char* path : {kOld, "/gone/job"}) {
      if (!from_memory) harness.CrashAgent();
      ASSERT_OK_AND_ASSIGN(const auto trainers,
                           harness.Launch(2, absl::StrCat(from_memory, path), "job", path));
      for (TestTrainer* trainer : trainers) {
        const RestoreOutcome outcome = harness.Restore(*trainer);
        ExpectState(outcome, *trainer, 7, 2);
        EXPECT_EQ(outcome.restore_from, RestoreFrom::kIgnored);
      }
      EXPECT_THAT(harness.engine().StatusJson(), HasSubstr("\"restore_from_used\":false"));
      KillAll(harness, trainers);
    }
  }
  // Nothing given, nothing said.
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2, "z"));
  EXPECT_EQ(harness.Restore(*trainers[0]).restore_from, RestoreFrom::kNotGiven);
}

TEST(RestoreFrom, AnAttemptThatCommittedNothingIsFollowedByOneThatStartsFromItAgain) {
  const std::unique_ptr<SimDisk> disk = DiskWithOldJob();
  EngineHarness harness(*disk, {.root_exists = true});
  for (const char* key : {"a", "b"}) {
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2, key, "job", kOld));
    for (TestTrainer* trainer : trainers) ExpectState(harness.Restore(*trainer), *trainer, 5, 3);
    KillAll(harness, trainers);
  }
}

TEST(RestoreFrom, RanksThatNameDifferentOnesAreToldSo) {
  const std::unique_ptr<SimDisk> disk = DiskWithOldJob();
  EngineHarness harness(*disk, {.root_exists = true});
  ASSERT_OK_AND_ASSIGN(TestTrainer* const first, harness.Open(Rank{0}, 3, "a", "job", kOld));
  EXPECT_THAT(harness.Open(Rank{1}, 3, "a", "job", kOldStep5).status(),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr(kOld), HasSubstr("rank 1"), HasSubstr(kOldStep5))));
  EXPECT_THAT(harness.Open(Rank{1}, 3, "a").status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("rank 1 names nothing")));
  // Nor after the worker, which alone has heard it so far, died.
  harness.CrashWorker(SimDisk::InFlight::kAll);
  EXPECT_THAT(harness.Open(Rank{1}, 3, "a").status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(kOld)));
  ASSERT_OK_AND_ASSIGN(TestTrainer* const second, harness.Open(Rank{1}, 3, "a", "job", kOld));
  EXPECT_EQ(second->attempt, first->attempt);
  // The other way round: the attempt was begun with nothing.
  ASSERT_OK(harness.Open(Rank{0}, 2, "b").status());
  EXPECT_THAT(harness.Open(Rank{1}, 2, "b", "job", kOld).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("begun with nothing")));
}

// ---- What cannot be used ----

struct Unusable {
  const char* name;
  std::string path;
  std::function<void(SimDisk&)> spoil;
  absl::StatusCode code;
  std::string text;
};

void MarkBad(SimDisk& disk, const std::string& directory, uint64_t step) {
  BadMark mark;
  mark.number = 1;
  mark.job_uuid = "01234567-89ab-4cde-8f01-000000000abc";
  mark.checkpoint = {Attempt{1}, Step{step}};
  mark.reason = "the loss was NaN";
  mark.created_by = "test";
  disk.PutFile(absl::StrCat(directory, "/", BadFileName(1)), EncodeBadMark(mark));
}

std::vector<Unusable> AllUnusable() {
  const auto nothing = [](SimDisk&) {};
  const auto remove = [](const char* file) {
    return [file](SimDisk& disk) { disk.RemoveFile(absl::StrCat(kOldStep5, "/", file)); };
  };
  const auto flip = [](const char* file) {
    return [file](SimDisk& disk) { disk.FlipBit(absl::StrCat(kOldStep5, "/", file), 100, 3); };
  };
  using enum absl::StatusCode;
  return {
      {"nowhere", "/nowhere/job", nothing, kInvalidArgument, "/nowhere/job"},
      {"no such job", "/elsewhere/other", nothing, kInvalidArgument, "/elsewhere/other"},
      {"a root", "/elsewhere", nothing, kInvalidArgument, "ROOT/JOB"},
      {"no legal name", "/elsewhere/..", nothing, kInvalidArgument, "ROOT/JOB"},
      {"no such step", "/elsewhere/old/s000000000009.a0001", nothing, kInvalidArgument, "a0001"},
      {"itself, empty", "/root/job", nothing, kFailedPrecondition, "no committed checkpoint"},
      {"not committed", kOldStep5, remove("MANIFEST.json"), kFailedPrecondition, "not committed"},
      {"marked bad", kOldStep5, [](SimDisk& disk) { MarkBad(disk, kOldStep5, 5); },
       kFailedPrecondition, "the loss was NaN"},
      {"all marked bad", kOld,
       [](SimDisk& disk) {
         MarkBad(disk, kOldStep5, 5);
         MarkBad(disk, "/elsewhere/old/s000000000004.a0001", 4);
       },
       kFailedPrecondition, "every checkpoint"},
      {"a damaged manifest", kOldStep5, flip("MANIFEST.json"), kDataLoss, "damaged"},
      {"a damaged newest manifest", kOld, flip("MANIFEST.json"), kDataLoss, "damaged"},
      {"a damaged index", kOld, flip("INDEX"), kDataLoss, "INDEX"},
      {"no index", kOld, remove("INDEX"), kDataLoss, "INDEX"},
      {"no image", kOld, remove("rank-00001.h5"), kDataLoss, "rank-00001.h5"},
      {"a short image", kOld,
       [](SimDisk& disk) { disk.TruncateFile(absl::StrCat(kOldStep5, "/rank-00001.h5"), 4096); },
       kDataLoss, "rank-00001.h5"},
      {"no job record", kOld, [](SimDisk& disk) { disk.RemoveFile("/elsewhere/old/JOB.json"); },
       kInvalidArgument, "JOB.json"},
      {"a damaged job record", kOldStep5,
       [](SimDisk& disk) { disk.FlipBit("/elsewhere/old/JOB.json", 30, 1); }, kDataLoss,
       "JOB.json"},
  };
}

TEST(RestoreFrom, WhatCannotBeUsedIsRefusedLoudlyAndCanBeTriedAgain) {
  for (const Unusable& unusable : AllUnusable()) {
    SCOPED_TRACE(unusable.name);
    const std::unique_ptr<SimDisk> disk = DiskWithOldJob();
    const std::unique_ptr<SimDisk> whole = DiskWithOldJob();
    unusable.spoil(*disk);
    EngineHarness harness(*disk, {.root_exists = true});
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1, "", "job", unusable.path));
    for (int i = 0; i < 2; ++i) {
      EXPECT_THAT(harness.Restore(*trainers[0]).status,
                  StatusIs(unusable.code, HasSubstr(unusable.text)));
    }
    // Once it is mended, the same attempt can start from it.
    for (const std::string& file : whole->AllFiles()) {
      if (file.rfind("/elsewhere/", 0) != 0) continue;
      if (const absl::StatusOr<std::string> bytes = whole->Contents(file); bytes.ok()) {
        disk->PutFile(file, *bytes);
      }
    }
    for (const char* step : {"5", "4"}) {
      const std::string mark = absl::StrCat("/elsewhere/old/s00000000000", step, ".a0001/BAD.1");
      if (disk->Contents(mark).ok()) disk->RemoveFile(mark);
    }
    const RestoreOutcome outcome = harness.Restore(*trainers[0]);
    if (unusable.path.rfind(kOld, 0) == 0 && unusable.path.find("0009") == std::string::npos) {
      ExpectState(outcome, *trainers[0], 5, 3);
    } else {
      EXPECT_THAT(outcome.status, StatusIs(unusable.code));
    }
  }
}

TEST(RestoreFrom, ABlockThatIsBadIsNamedWithItsFile) {
  const std::unique_ptr<SimDisk> disk = DiskWithOldJob();
  const std::string image = absl::StrCat(kOldStep5, "/rank-00002.h5");
  const size_t bytes = disk->Contents(image).value().size();
  for (size_t offset = 8192; offset < bytes; offset += 1024) disk->FlipBit(image, offset, 0);
  EngineHarness harness(*disk, {.root_exists = true});
  EXPECT_THAT(RestoreStatus(harness, kOld),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr(image)));
}

TEST(RestoreFrom, BlobsBeyondThisAgentsLimitAreRefused) {
  const std::unique_ptr<SimDisk> disk = DiskWithOldJob();
  EngineHarness harness(*disk, {.blobs_bytes_max = 20, .root_exists = true});
  EXPECT_THAT(RestoreStatus(harness, kOld),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("20 bytes")));
}

TEST(RestoreFrom, PathsThatAreNoneAreRefusedAtTheOpen) {
  const std::unique_ptr<SimDisk> disk = DiskWithOldJob();
  EngineHarness harness(*disk, {.root_exists = true});
  for (const std::string& path :
       {std::string("old"), std::string("../elsewhere/old"), std::string("/\xff\xfe/old"),
        absl::StrCat("/", std::string(1023, 'x'))}) {
    EXPECT_THAT(harness.Open(Rank{0}, 1, "", "job", path).status(),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("restore_from")));
  }
}

// The agent reads with its own rights: what it may read and the caller may not is not the caller's
// to ask for.
TEST(RestoreFrom, AnAgentOfAnotherUserReadsNothingForTheCaller) {
  const std::unique_ptr<SimDisk> disk = DiskWithOldJob();
  EngineHarness harness(*disk, {.root_exists = true, .user_id = 1234});
  EXPECT_THAT(harness.Open(Rank{0}, 1, "", "job", kOld).status(),
              StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("1234")));
  EXPECT_OK(harness.Open(Rank{0}, 1, "").status());
}

// Who saves first has begun from nothing: to say later that there is no checkpoint would hide that
// one was named.
TEST(RestoreFrom, ASaveBeforeTheRestoreDoesNotMakeItNothing) {
  const std::unique_ptr<SimDisk> disk = DiskWithOldJob();
  EngineHarness harness(*disk, {.root_exists = true});
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1, "", "job", kOld));
  harness.SaveAll(trainers, 1);
  EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 1u);
  EXPECT_THAT(harness.Restore(*trainers[0]).status,
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("began from nothing"), HasSubstr(kOld))));
}

// ---- Once for all ranks ----

// Each operation of the decision and of reading fails once: the restore fails or succeeds, and
// never says that there is nothing.
TEST(RestoreFrom, AnErrorAtAnyOperationIsNeverTheBeginning) {
  uint64_t faults = 0;
  const std::unique_ptr<SimDisk> original = DiskWithOldJob();
  for (const SimDisk::Operation operation :
       {SimDisk::Operation::kStat, SimDisk::Operation::kList, SimDisk::Operation::kReadSmallFile,
        SimDisk::Operation::kOpenForRead, SimDisk::Operation::kRingRead,
        SimDisk::Operation::kCreateNew, SimDisk::Operation::kAppend, SimDisk::Operation::kSyncFile,
        SimDisk::Operation::kLink, SimDisk::Operation::kSyncDirectory}) {
    for (const absl::Status& error :
         {absl::NotFoundError("ENOENT"), absl::UnavailableError("EINTR"),
          absl::DataLossError("EIO"), absl::PermissionDeniedError("EACCES")}) {
      for (uint64_t index = 0;; ++index) {
        const std::unique_ptr<SimDisk> disk = CopyOf(*original);
        EngineHarness harness(*disk, {.root_exists = true});
        ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1, "", "job", kOld));
        disk->FailOperation(operation, index, error);
        const RestoreOutcome outcome = harness.Restore(*trainers[0]);
        SCOPED_TRACE(testing::Message() << static_cast<int>(operation) << " number " << index
                                        << ": " << error << ": " << outcome.status);
        EXPECT_THAT(outcome.status, Not(IsNotFound()));
        if (disk->fault_count() == 0) break;
        ++faults;
        disk->ClearFaults();
        const RestoreOutcome again = harness.Restore(*trainers[0]);
        // Where a manifest is not found, there is none: the step before is the newest then, and
        // stays what was decided.
        const uint64_t step = Value(again.checkpoint.step);
        EXPECT_TRUE(step == 5 || (step == 4 && error.code() == absl::StatusCode::kNotFound))
            << step;
        ExpectState(again, *trainers[0], step, 3);
        if (outcome.status.ok()) ExpectState(outcome, *trainers[0], step, 3);
        if (HasFailure()) return;
      }
    }
  }
  std::printf("faults: %llu\n", static_cast<unsigned long long>(faults));
  EXPECT_GT(faults, 150u);
}

// The worker dies between any two of its operations while the ranks restore, and the old job
// commits a newer checkpoint meanwhile: all ranks start from one and the same all the same, the one
// that was recorded.
TEST(RestoreFrom, TheDecisionOutlivesTheWorkerWhereverItDies) {
  uint64_t died_undecided = 0;
  uint64_t died_decided = 0;
  const std::unique_ptr<SimDisk> original = DiskWithOldJob();
  for (uint64_t stop_before = 0;; ++stop_before) {
    SCOPED_TRACE(testing::Message() << "killed before operation " << stop_before);
    const std::unique_ptr<SimDisk> disk = CopyOf(*original);
    InterruptingFileSystem worker(*disk);
    EngineHarness harness(*disk, {.root_exists = true, .file_system = &worker});
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2, "", "job", kOld));
    worker.StopBefore(stop_before);
    std::vector<uint64_t> steps;
    bool died = false;
    for (size_t i = 0; i < trainers.size(); ++i) {
      RestoreOutcome outcome = harness.Restore(*trainers[i]);
      if (worker.is_stopped()) {
        died = true;
        worker.StartAgain();
        harness.CrashWorker(SimDisk::InFlight::kAll);
        const bool decided = harness.store().GetRestorePoint("job", Attempt{1}).ok();
        ++(decided ? died_decided : died_undecided);
        EngineHarness old_agent(*disk,
                                {.root_exists = true, .writer = "late", .root = "/elsewhere"});
        ASSERT_OK_AND_ASSIGN(const auto old, old_agent.Launch(3, "later", "old"));
        for (TestTrainer* trainer : old) ASSERT_OK(old_agent.Restore(*trainer).status);
        old_agent.SaveAll(old, 6);
        ASSERT_EQ(EngineHarness::CommittedPower(*old[0]), 6u);
        outcome = harness.Restore(*trainers[i]);
      }
      ASSERT_OK(outcome.status);
      steps.push_back(Value(outcome.checkpoint.step));
      ExpectState(outcome, *trainers[i], steps.back(), 3);
      EXPECT_EQ(outcome.restore_from, RestoreFrom::kUsed);
    }
    EXPECT_EQ(steps[0], steps[1]);
    if (HasFailure() || !died) break;  // all operations have had their turn
    ASSERT_OK_AND_ASSIGN(const RestorePoint point,
                         harness.store().GetRestorePoint("job", Attempt{1}));
    ASSERT_TRUE(point.foreign.has_value());
    EXPECT_EQ(Value(point.foreign->checkpoint.step), steps[0]);
    harness.SaveAll(trainers, 9);
    EXPECT_EQ(EngineHarness::CommittedPower(*trainers[1]), 9u);
  }
  std::printf("deaths: %llu before the decision was recorded, %llu after\n",
              static_cast<unsigned long long>(died_undecided),
              static_cast<unsigned long long>(died_decided));
  EXPECT_GT(died_undecided, 10u);
  EXPECT_GT(died_decided, 5u);
}

}  // namespace
}  // namespace holdfast
