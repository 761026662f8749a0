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
        if (has_point) {
          EXPECT_EQ(again.GetRestorePoint("job", Attempt{2})->checkpoint, point);
        }
        ASSERT_OK(again.BeginAttempt("job", {Attempt{number + 1}, "c", 1}))
            << cut_after << " " << where;
        ++states;
      }
    }
    EXPECT_GT(states, 80);
  }
}

}  // namespace
}  // namespace holdfast
