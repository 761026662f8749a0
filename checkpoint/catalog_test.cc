// What the catalog makes of the records of a root, right, damaged and foreign ones; and which
// checkpoint a new attempt starts from in each case, or why from none.
#include "checkpoint/catalog.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "checkpoint/engine_testing.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::SizeIs;
using State = CatalogEntry::State;
using Outcome = Lineage::Outcome;

constexpr char kJob[] = "/root/job/";
constexpr char kUuid[] = "01234567-89ab-4cde-8f01-23456789abcd";
constexpr char kOtherUuid[] = "11111111-89ab-4cde-8f01-23456789abcd";

CheckpointId Id(uint32_t attempt, uint64_t step) { return {Attempt{attempt}, Step{step}}; }

std::string PathOf(CheckpointId id, const std::string& name) {
  return absl::StrCat(kJob, CheckpointDirectoryName(id), "/", name);
}

// Attempt 1 committed steps 1 and 2, attempt 2 step 3.
void MakeJob(SimDisk& disk) {
  EngineHarness harness(disk, {});
  const auto first = harness.Launch(1, "a");
  ASSERT_OK(first);
  for (const uint64_t step : {1, 2}) harness.SaveAll(*first, step);
  const auto second = harness.Launch(1, "b");
  ASSERT_OK(second);
  ASSERT_OK(harness.Restore(*(*second)[0]).status);
  harness.SaveAll(*second, 3);
  ASSERT_EQ(EngineHarness::CommittedPower(*(*second)[0]), 3u);
}

void Mark(SimDisk& disk, CheckpointId id, uint32_t number, CheckpointId says,
          const std::string& uuid = kUuid) {
  BadMark mark;
  mark.number = number;
  mark.job_uuid = uuid;
  mark.checkpoint = says;
  mark.reason = absl::StrCat("reason ", number);
  mark.created_by = "test";
  disk.PutFile(PathOf(id, BadFileName(number)), EncodeBadMark(mark));
}

void PutHead(SimDisk& disk, uint32_t name_number, std::optional<CheckpointId> to, uint32_t up_to,
             uint32_t number, const std::string& uuid = kUuid) {
  Head head;
  head.number = number;
  head.job_uuid = uuid;
  head.to = to;
  head.abandons_attempts_up_to = Attempt{up_to};
  head.reason = "back";
  head.created_by = "test";
  disk.PutFile(absl::StrCat(kJob, HeadFileName(name_number)), EncodeHead(head));
}

absl::StatusOr<Catalog> Read(SimDisk& disk) { return ReadCatalog(disk, "/root", "job"); }

CheckpointId NewestOf(const Catalog& catalog) {
  EXPECT_TRUE(catalog.newest.has_value());
  return catalog.newest.has_value() ? catalog.entries[*catalog.newest].id : CheckpointId{};
}

TEST(Catalog, EveryMarkCountsAlsoOneThatCannotBeRead) {
  SimDisk disk;
  MakeJob(disk);
  Mark(disk, Id(2, 3), 1, Id(2, 3));
  disk.PutFile(PathOf(Id(2, 3), "BAD.2"), "garbage");
  Mark(disk, Id(2, 3), 3, Id(1, 1));
  Mark(disk, Id(2, 3), 4, Id(2, 3), kOtherUuid);
  disk.PutFile(PathOf(Id(2, 3), "BAD.5"), std::string(kSmallRecordBytesMax + 1, ' '));
  disk.PutFile(PathOf(Id(2, 3), "BAD.6/is a directory"), "");
  disk.PutFile(PathOf(Id(2, 3), "BAD.x"), "no mark");
  disk.PutFile(PathOf(Id(2, 3), "BAD.07"), "no mark");
  ASSERT_OK_AND_ASSIGN(const Catalog catalog, Read(disk));
  const std::vector<BadMark>& marks = catalog.Find(Id(2, 3))->bad_marks;
  ASSERT_THAT(marks, SizeIs(6));
  EXPECT_EQ(marks[0].reason, "reason 1");
  EXPECT_THAT(marks[1].reason, HasSubstr("a damaged mark"));
  EXPECT_THAT(marks[2].reason, HasSubstr("a mark of step 1 of attempt 1"));
  EXPECT_THAT(marks[3].reason, HasSubstr(kOtherUuid));
  EXPECT_THAT(marks[4].reason, HasSubstr("a damaged mark"));
  EXPECT_THAT(marks[5].reason, HasSubstr("a damaged mark"));
  for (uint32_t i = 0; i < 6; ++i) EXPECT_EQ(marks[i].number, i + 1);
  EXPECT_EQ(NewestOf(catalog), Id(1, 2));
  EXPECT_THAT(catalog.Find(Id(1, 2))->bad_marks, SizeIs(0));

  // Storage that does not answer now says nothing about a mark.
  disk.FailOperation(SimDisk::Operation::kReadSmallFile, 0, absl::UnavailableError("later"),
                     "BAD.1");
  EXPECT_THAT(Read(disk).status(), StatusIs(absl::StatusCode::kUnavailable));
  for (uint32_t number = 7; number <= kMarksMax + 1; ++number) {
    disk.PutFile(PathOf(Id(2, 3), BadFileName(number)), "");
  }
  EXPECT_THAT(Read(disk).status(),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("1000")));
}

TEST(Catalog, TheGreatestHeadCountsAndMustBeWhole) {
  SimDisk disk;
  MakeJob(disk);
  PutHead(disk, 1, Id(1, 2), 2, 1);
  ASSERT_OK_AND_ASSIGN(const Catalog first, Read(disk));
  EXPECT_EQ(NewestOf(first), Id(1, 2));
  EXPECT_EQ(first.Find(Id(2, 3))->branch, Branch::kAbandoned);
  PutHead(disk, 10, Id(1, 1), 2, 10);
  PutHead(disk, 9, Id(2, 3), 2, 9);
  ASSERT_OK_AND_ASSIGN(const Catalog second, Read(disk));
  EXPECT_EQ(second.head->number, 10u);
  EXPECT_EQ(NewestOf(second), Id(1, 1));

  PutHead(disk, 11, Id(1, 1), 2, 12);
  EXPECT_THAT(Read(disk).status(), StatusIs(absl::StatusCode::kDataLoss,
                                            AllOf(HasSubstr("HEAD.11"), HasSubstr("found 12"))));
  PutHead(disk, 11, Id(1, 1), 2, 11, kOtherUuid);
  EXPECT_THAT(Read(disk).status(), StatusIs(absl::StatusCode::kDataLoss,
                                            AllOf(HasSubstr(kUuid), HasSubstr(kOtherUuid))));
  disk.PutFile(absl::StrCat(kJob, "HEAD.11"), "garbage");
  EXPECT_THAT(Read(disk).status(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("HEAD.11")));
  disk.RemoveFile(absl::StrCat(kJob, "HEAD.11"));
  EXPECT_OK(Read(disk).status());
}

TEST(Catalog, AManifestThatIsAnothersIsDamage) {
  struct Case {
    const char* what;
    std::function<void(Manifest&)> change;
    const char* expected;
  };
  const std::vector<Case> cases = {
      {"job", [](Manifest& manifest) { manifest.job = "other"; }, "found other"},
      {"uuid", [](Manifest& manifest) { manifest.job_uuid = kOtherUuid; }, kOtherUuid},
      {"step", [](Manifest& manifest) { manifest.checkpoint = Id(2, 4); }, "step 4 of attempt 2"},
      {"attempt", [](Manifest& manifest) { manifest.checkpoint = Id(3, 3); }, "attempt 3"},
  };
  for (const Case& one : cases) {
    SCOPED_TRACE(one.what);
    SimDisk disk;
    MakeJob(disk);
    ASSERT_OK_AND_ASSIGN(const Catalog good, Read(disk));
    Manifest manifest = *good.Find(Id(2, 3))->manifest;
    one.change(manifest);
    disk.PutFile(PathOf(Id(2, 3), kManifestFileName), EncodeManifest(manifest));
    ASSERT_OK_AND_ASSIGN(const Catalog catalog, Read(disk));
    const CatalogEntry& entry = *catalog.Find(Id(2, 3));
    EXPECT_EQ(entry.state, State::kDamaged);
    EXPECT_THAT(entry.why, AllOf(HasSubstr("MANIFEST.json"), HasSubstr(one.expected)));
    EXPECT_FALSE(entry.manifest.has_value());
    EXPECT_EQ(catalog.outcome, Outcome::kDamaged);
    EXPECT_EQ(NewestOf(catalog), Id(2, 3));
    EngineHarness harness(disk, {.writer = "x"});
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1));
    EXPECT_THAT(harness.Restore(*trainers[0]).status,
                StatusIs(absl::StatusCode::kDataLoss,
                         AllOf(HasSubstr("step 3 of attempt 2"), HasSubstr(one.expected))));
  }
}

// ---- What a new attempt starts from ----

// The step that a new attempt in another agent starts from, or why none.
absl::StatusOr<uint64_t> StartOf(SimDisk& disk) {
  EngineHarness harness(disk, {.writer = "x"});
  const auto trainers = harness.Launch(2);
  if (!trainers.ok()) return trainers.status();
  const RestoreOutcome outcome = harness.Restore(*(*trainers)[0]);
  if (!outcome.status.ok()) return outcome.status;
  return Value(outcome.checkpoint.step);
}

TEST(Choice, PassesOverWhatIsMarkedAndSaysIfAllIs) {
  SimDisk disk;
  MakeJob(disk);
  Mark(disk, Id(2, 3), 1, Id(2, 3));
  EXPECT_THAT(StartOf(disk), IsOkAndHolds(2u));
  Mark(disk, Id(1, 2), 1, Id(1, 2));
  EXPECT_THAT(StartOf(disk), IsOkAndHolds(1u));
  Mark(disk, Id(1, 1), 1, Id(1, 1));
  EXPECT_THAT(StartOf(disk),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("marked bad")));
}

TEST(Choice, FollowsHeadAndSaysIfItsTargetIsGone) {
  SimDisk disk;
  MakeJob(disk);
  PutHead(disk, 1, Id(1, 1), 2, 1);
  EXPECT_THAT(StartOf(disk), IsOkAndHolds(1u));
  PutHead(disk, 2, std::nullopt, 3, 2);
  EXPECT_THAT(StartOf(disk), StatusIs(absl::StatusCode::kNotFound));
  PutHead(disk, 3, Id(1, 9), 9, 3);
  EXPECT_THAT(StartOf(disk), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("cannot be told")));
}

// The newest of this agent's memory counts like one on storage: marks and HEAD hold for it, and it
// is chosen where storage has none to offer.
class MemoryChoice : public testing::Test {
 protected:
  // Steps 1 and 2 are on storage; step 3 is sealed in memory, and its storage failed.
  void SetUp() override {
    const auto trainers = harness_.Launch(2, "a");
    ASSERT_OK(trainers);
    for (const uint64_t step : {1, 2}) harness_.SaveAll(*trainers, step);
    disk_.FailOperationsFrom(SimDisk::Operation::kRingSync, 0, absl::DataLossError("EIO"));
    harness_.SaveAll(*trainers, 3);
    ASSERT_EQ(EngineHarness::CommittedProcess(*(*trainers)[0]), 3u);
    ASSERT_EQ(EngineHarness::CommittedPower(*(*trainers)[0]), 2u);
    for (TestTrainer* trainer : *trainers) harness_.Kill(*trainer);
    disk_.ClearFaults();
  }
  absl::StatusOr<uint64_t> Start() {
    const auto trainers = harness_.Launch(2, "b");
    if (!trainers.ok()) return trainers.status();
    const RestoreOutcome outcome = harness_.Restore(*(*trainers)[0]);
    if (!outcome.status.ok()) return outcome.status;
    EXPECT_TRUE(outcome.buffers ==
                StateAfter(*(*trainers)[0]->layout, Rank{0}, Value(outcome.checkpoint.step)));
    return Value(outcome.checkpoint.step);
  }
  SimDisk disk_;
  EngineHarness harness_{disk_, {}};
};

TEST_F(MemoryChoice, TakesTheNewest) { EXPECT_THAT(Start(), IsOkAndHolds(3u)); }

TEST_F(MemoryChoice, NotOneThatIsMarked) {
  Mark(disk_, Id(1, 3), 1, Id(1, 3));
  EXPECT_THAT(Start(), IsOkAndHolds(2u));
}

TEST_F(MemoryChoice, NotOneThatHeadAbandons) {
  PutHead(disk_, 1, Id(1, 1), 1, 1);
  EXPECT_THAT(Start(), IsOkAndHolds(1u));
}

TEST_F(MemoryChoice, TheTargetOfHead) {
  PutHead(disk_, 1, Id(1, 3), 1, 1);
  EXPECT_THAT(Start(), IsOkAndHolds(3u));
}

TEST_F(MemoryChoice, WhereAllOnStorageAreMarked) {
  for (const uint64_t step : {1, 2}) Mark(disk_, Id(1, step), 1, Id(1, step));
  EXPECT_THAT(Start(), IsOkAndHolds(3u));
}

TEST_F(MemoryChoice, WhereTheNewestOnStorageIsDamaged) {
  disk_.FlipBit(PathOf(Id(1, 2), kManifestFileName), 50, 1);
  EXPECT_THAT(Start(), IsOkAndHolds(3u));
}

TEST_F(MemoryChoice, NotIfStorageHasANewerOneThatIsDamaged) {
  disk_.PutFile(PathOf(Id(1, 4), kManifestFileName), "garbage");
  EXPECT_THAT(Start(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("step 4 of attempt 1")));
}

}  // namespace
}  // namespace holdfast
