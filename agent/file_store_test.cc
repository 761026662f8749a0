#include "agent/file_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "tests/support/sim_disk.h"
#include "tests/support/sim_executor.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::HasSubstr;

constexpr char kUuid[] = "01234567-89ab-4cde-8f01-23456789abcd";

FileStore::Options StoreOptions(const std::string& writer) {
  return {.root = "/root", .writer = writer, .make_uuid = [] { return std::string(kUuid); }};
}

std::unique_ptr<SimDisk> NewDisk(bool links_supported) {
  SimDisk::Options options;
  options.links_supported = links_supported;
  auto disk = std::make_unique<SimDisk>(options);
  EXPECT_OK(disk->CreateDirectory("/root"));
  EXPECT_OK(disk->SyncDirectory("/"));
  return disk;
}

TEST(FileStore, KeepsWhatItWasTold) {
  for (const bool links : {true, false}) {
    const std::unique_ptr<SimDisk> disk = NewDisk(links);
    SimExecutor clock;
    FileStore store(*disk, clock, StoreOptions("w"));
    EXPECT_THAT(store.NewestAttempt("job"), IsNotFound());
    EXPECT_THAT(store.JobUuid("job"), IsOkAndHolds(kUuid));
    EXPECT_THAT(store.NewestAttempt("job"), IsNotFound());
    // A key is any bytes that fit; it comes back as it went.
    const std::string key = "none\n\"0\" \xC3\xA9 \x01";
    ASSERT_OK(store.BeginAttempt("job", {Attempt{1}, key, 4}));
    ASSERT_OK(store.BeginAttempt("job", {Attempt{7}, "", 1}));
    ASSERT_OK_AND_ASSIGN(const AttemptRecord newest, store.NewestAttempt("job"));
    EXPECT_EQ(newest.attempt, Attempt{7});
    EXPECT_EQ(newest.world_size, 1u);

    FileStore other(*disk, clock, StoreOptions("x"));
    EXPECT_THAT(other.BeginAttempt("job", {Attempt{7}, "late", 2}),
                StatusIs(absl::StatusCode::kAlreadyExists));
    EXPECT_THAT(other.BeginAttempt("job", {Attempt{3}, "late", 2}),
                StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("attempt 7")));
    ASSERT_OK(other.BeginAttempt("job", {Attempt{8}, key, 2}));
    ASSERT_OK_AND_ASSIGN(const AttemptRecord eighth, store.NewestAttempt("job"));
    EXPECT_EQ(eighth.key, key);

    EXPECT_EQ(eighth.restore_from, "");

    const AttemptRecord from_elsewhere{Attempt{9}, "k", 2, "/a \"b\" \xC3\xA9/job"};
    ASSERT_OK(store.BeginAttempt("job", from_elsewhere));
    ASSERT_OK_AND_ASSIGN(const AttemptRecord ninth, other.NewestAttempt("job"));
    EXPECT_EQ(ninth.restore_from, from_elsewhere.restore_from);
    const ForeignCheckpoint foreign{
        "/a \"b\"/job/s000000000003.a0000", "job", kUuid, {Attempt{0}, Step{3}}};
    ASSERT_OK(store.DecideRestorePoint("job", Attempt{9}, {std::nullopt, foreign}));
    ASSERT_OK_AND_ASSIGN(const RestorePoint elsewhere, other.GetRestorePoint("job", Attempt{9}));
    EXPECT_EQ(elsewhere, (RestorePoint{std::nullopt, foreign}));

    EXPECT_THAT(store.GetRestorePoint("job", Attempt{8}), IsNotFound());
    const CheckpointId point{Attempt{7}, Step{UINT64_MAX}};
    ASSERT_OK_AND_ASSIGN(const RestorePoint first,
                         store.DecideRestorePoint("job", Attempt{8}, {point}));
    EXPECT_EQ(first.checkpoint, point);
    // The record wins over whatever comes later, from nothing included.
    ASSERT_OK_AND_ASSIGN(const RestorePoint second,
                         other.DecideRestorePoint("job", Attempt{8}, {}));
    EXPECT_EQ(second.checkpoint, point);
    ASSERT_OK(other.DecideRestorePoint("job", Attempt{7}, {}).status());
    ASSERT_OK_AND_ASSIGN(const RestorePoint nothing, store.GetRestorePoint("job", Attempt{7}));
    EXPECT_EQ(nothing.checkpoint, std::nullopt);
  }
}

TEST(FileStore, RefusesNamesThatLeadElsewhere) {
  const std::unique_ptr<SimDisk> disk = NewDisk(true);
  SimExecutor clock;
  FileStore store(*disk, clock, StoreOptions("w"));
  for (const std::string name : {"", ".", "..", ".hidden", "a/b", "a b", "\xC3\xA9"}) {
    EXPECT_THAT(store.JobUuid(name), StatusIs(absl::StatusCode::kInvalidArgument)) << name;
  }
  EXPECT_THAT(store.JobUuid(std::string(129, 'a')), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST(FileStore, ARecordOfAnotherNumberOrJobIsDamage) {
  const std::unique_ptr<SimDisk> disk = NewDisk(true);
  SimExecutor clock;
  FileStore store(*disk, clock, StoreOptions("w"));
  ASSERT_OK(store.JobUuid("job").status());
  ASSERT_OK(store.BeginAttempt("job", {Attempt{1}, "", 1}));
  disk->PutFile("/root/job/store/attempt-2.json",
                disk->Contents("/root/job/store/attempt-1.json").value());
  EXPECT_THAT(store.NewestAttempt("job"),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("expected 2, found 1")));
  disk->PutFile("/root/other/JOB.json", disk->Contents("/root/job/JOB.json").value());
  EXPECT_THAT(store.JobUuid("other"), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("other")));
}

// What a job's first moments leave behind, whatever the moment of a power cut: what was said is
// there, and a new agent goes on.
TEST(FileStore, OldOrNewAtEveryCut) {
  for (const bool links : {true, false}) {
    int states = 0;
    for (uint64_t cut_after = 0;; ++cut_after) {
      const std::unique_ptr<SimDisk> disk = NewDisk(links);
      disk->CutPowerAfter(cut_after);
      SimExecutor clock;
      FileStore store(*disk, clock, StoreOptions("w"));
      const CheckpointId point{Attempt{0}, Step{5}};
      const bool has_uuid = store.JobUuid("job").ok();
      const bool has_first = has_uuid && store.BeginAttempt("job", {Attempt{1}, "a", 2}).ok();
      const bool has_second = has_first && store.BeginAttempt("job", {Attempt{2}, "b", 3}).ok();
      const bool has_point =
          has_second && store.DecideRestorePoint("job", Attempt{2}, {point}).ok();
      if (!disk->power_was_cut()) {
        EXPECT_TRUE(has_point);
        break;
      }
      for (const Survivors& survivors : disk->LegalSurvivors()) {
        const std::unique_ptr<SimDisk> after = disk->RebootedCopy(survivors);
        FileStore again(*after, clock, StoreOptions("x"));
        const std::string where = survivors.description();
        ASSERT_THAT(again.JobUuid("job"), IsOkAndHolds(kUuid)) << cut_after << " " << where;
        const absl::StatusOr<AttemptRecord> newest = again.NewestAttempt("job");
        uint32_t number = 0;
        if (newest.ok()) {
          number = Value(newest->attempt);
          // Whole, or void: a torn one that nobody was told of.
          const bool is_void = newest->world_size == 0 && newest->key.empty();
          EXPECT_TRUE(is_void || newest->world_size == number + 1) << cut_after << " " << where;
          EXPECT_FALSE(is_void && number <= (has_second ? 2u : has_first ? 1u : 0u));
        } else {
          ASSERT_THAT(newest, IsNotFound()) << cut_after << " " << where;
        }
        EXPECT_GE(number, has_second ? 2u : has_first ? 1u : 0u) << cut_after << " " << where;
        if (has_second) {
          // Decided, or not: then it can be, and is.
          const absl::StatusOr<RestorePoint> found = again.GetRestorePoint("job", Attempt{2});
          if (found.ok()) {
            EXPECT_EQ(found->checkpoint, point) << cut_after << " " << where;
          } else {
            EXPECT_FALSE(has_point) << cut_after << " " << where;
            ASSERT_THAT(found, IsNotFound()) << cut_after << " " << where;
            ASSERT_OK(again.DecideRestorePoint("job", Attempt{2}, {}).status())
                << cut_after << " " << where;
            EXPECT_EQ(again.GetRestorePoint("job", Attempt{2})->checkpoint, std::nullopt);
          }
        }
        ASSERT_OK(again.BeginAttempt("job", {Attempt{number + 1}, "c", 1}))
            << cut_after << " " << where;
        ++states;
      }
    }
    EXPECT_GT(states, 80);
  }
}

// What was torn is void as long as nothing came of it; after that it is damage.
TEST(FileStore, TornRecordsMakeRoomUntilSomethingWasMadeUnderThem) {
  const std::unique_ptr<SimDisk> disk = NewDisk(/*links_supported=*/false);
  SimExecutor clock;
  FileStore store(*disk, clock, StoreOptions("w"));
  disk->PutFile("/root/job/JOB.json", "{");
  disk->PutFile("/root/job/JOB.json.exclusive.dead", "");
  EXPECT_THAT(store.JobUuid("job"), IsOkAndHolds(kUuid));
  ASSERT_OK(store.BeginAttempt("job", {Attempt{1}, "", 1}));
  const std::string record = disk->Contents("/root/job/JOB.json").value();
  disk->PutFile("/root/job/JOB.json", "{");
  disk->PutFile("/root/job/JOB.json.exclusive.dead", "");
  EXPECT_THAT(store.JobUuid("job"), StatusIs(absl::StatusCode::kDataLoss));
  disk->PutFile("/root/job/JOB.json", record);
  EXPECT_THAT(store.JobUuid("job"), IsOkAndHolds(kUuid));

  const std::string path = "/root/job/store/attempt-1.restore.json";
  disk->PutFile(path, "");
  EXPECT_THAT(store.GetRestorePoint("job", Attempt{1}), StatusIs(absl::StatusCode::kDataLoss));
  disk->PutFile(path + ".exclusive.dead", "");
  EXPECT_THAT(store.GetRestorePoint("job", Attempt{1}), IsNotFound());
  disk->PutFile("/root/job/s000000000001.a0001/MANIFEST.json", "");
  EXPECT_THAT(store.GetRestorePoint("job", Attempt{1}), StatusIs(absl::StatusCode::kDataLoss));
  disk->RemoveFile("/root/job/s000000000001.a0001/MANIFEST.json");
  ASSERT_OK_AND_ASSIGN(const RestorePoint point, store.DecideRestorePoint("job", Attempt{1}, {}));
  EXPECT_EQ(point.checkpoint, std::nullopt);
  EXPECT_OK(store.GetRestorePoint("job", Attempt{1}).status());
}

// A disk that was full for a moment: the same agent goes on.
TEST(FileStore, GoesOnAfterAFullDisk) {
  for (const bool links : {true, false}) {
    int faults = 0;
    for (uint64_t index = 0;; ++index) {
      const std::unique_ptr<SimDisk> disk = NewDisk(links);
      SimExecutor clock;
      FileStore store(*disk, clock, StoreOptions("w"));
      disk->FailOperation(SimDisk::Operation::kAppend, index, absl::ResourceExhaustedError("full"));
      bool failed = !store.JobUuid("job").ok();
      ASSERT_THAT(store.JobUuid("job"), IsOkAndHolds(kUuid)) << links << index;
      Attempt attempt{1};
      if (!store.BeginAttempt("job", {attempt, "a", 1}).ok()) {
        failed = true;
        // Its number may be gone.
        const absl::StatusOr<AttemptRecord> newest = store.NewestAttempt("job");
        if (newest.ok()) attempt = Attempt{2};
        ASSERT_OK(store.BeginAttempt("job", {attempt, "a", 1})) << links << index;
      }
      if (!store.DecideRestorePoint("job", attempt, {}).ok()) {
        failed = true;
        ASSERT_OK(store.DecideRestorePoint("job", attempt, {}).status()) << links << index;
      }
      EXPECT_OK(store.GetRestorePoint("job", attempt).status());
      EXPECT_EQ(failed, disk->fault_count() > 0);
      if (disk->fault_count() == 0) break;
      ++faults;
    }
    EXPECT_EQ(faults, links ? 3 : 9);
  }
}

}  // namespace
}  // namespace holdfast
