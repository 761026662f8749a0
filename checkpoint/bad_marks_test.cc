// Goal: whatever the moment of a power cut, a mark is there as a whole or not at all, and as the
// call said once it said OK; and marked is what a restore then takes it for.
#include "checkpoint/bad_marks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "checkpoint/catalog.h"
#include "checkpoint/engine_testing.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::HasSubstr;
using testing::SizeIs;

const CheckpointPlace kPlace = {"/root", "job", {Attempt{1}, Step{2}}};
const MarkRequest kRequest = {"the loss was NaN", "w1", absl::FromUnixMillis(1'764'150'000'700)};

// Steps 1 and 2 are committed.
void MakeJob(SimDisk& disk) {
  EngineHarness harness(disk, {});
  const auto trainers = harness.Launch(1, "a");
  ASSERT_OK(trainers);
  for (const uint64_t step : {1, 2}) harness.SaveAll(*trainers, step);
}

std::vector<BadMark> MarksOn(SimDisk& disk) {
  const absl::StatusOr<Catalog> catalog = ReadCatalog(disk, "/root", "job");
  EXPECT_OK(catalog.status());
  if (!catalog.ok()) return {};
  const CatalogEntry* const entry = catalog->Find(kPlace.checkpoint);
  EXPECT_EQ(catalog->entries[*catalog->newest].id.step, Step{entry->bad_marks.empty() ? 2u : 1u});
  return entry->bad_marks;
}

TEST(BadMarks, SayWhatWasSaidAndCountOnce) {
  SimDisk disk;
  MakeJob(disk);
  ASSERT_OK(MarkBad(disk, kPlace, kRequest));
  ASSERT_OK(MarkBad(disk, kPlace, kRequest));  // an action may be carried out twice
  ASSERT_OK(MarkBad(disk, kPlace, {"another reason", "w2", kRequest.created_at}));
  const std::vector<BadMark> marks = MarksOn(disk);
  ASSERT_THAT(marks, SizeIs(2));
  EXPECT_EQ(marks[0].reason, kRequest.reason);
  EXPECT_EQ(marks[0].created_at, absl::FromUnixSeconds(1'764'150'000));
  EXPECT_EQ(marks[1].reason, "another reason");
  ASSERT_OK(UnmarkBad(disk, kPlace));
  EXPECT_THAT(MarksOn(disk), SizeIs(0));
  ASSERT_OK(UnmarkBad(disk, kPlace));
}

TEST(BadMarks, WhatCannotBeMarkedIsSaid) {
  SimDisk disk;
  MakeJob(disk);
  const CheckpointPlace missing = {"/root", "job", {Attempt{1}, Step{9}}};
  EXPECT_THAT(MarkBad(disk, missing, kRequest), IsNotFound());
  EXPECT_THAT(UnmarkBad(disk, missing), IsNotFound());
  EXPECT_THAT(MarkBad(disk, {"/root", "other", kPlace.checkpoint}, kRequest), IsNotFound());
  for (const std::string& reason : {std::string("\xff"), std::string(4097, 'x')}) {
    EXPECT_THAT(MarkBad(disk, kPlace, {reason, "w1", kRequest.created_at}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("reason")));
  }
  // Whatever numbers others have taken.
  for (const uint32_t number : {1u, 2u, UINT32_MAX}) {
    disk.PutFile(
        absl::StrCat("/root/job/", CheckpointDirectoryName(kPlace.checkpoint), "/BAD.", number),
        "garbage");
  }
  ASSERT_OK(MarkBad(disk, kPlace, kRequest));
  EXPECT_THAT(MarksOn(disk), SizeIs(4));
  ASSERT_OK(UnmarkBad(disk, kPlace));
  EXPECT_THAT(MarksOn(disk), SizeIs(0));
}

// Cuts the power before the k-th operation of `change`, for every k; the number of operations.
int ForEachCut(const std::function<void(SimDisk&)>& prepare,
               const std::function<absl::Status(SimDisk&)>& change,
               const std::function<void(SimDisk&, bool ok)>& check) {
  for (int cut = 0;; ++cut) {
    SimDisk disk;
    MakeJob(disk);
    prepare(disk);
    disk.CutPowerAfter(static_cast<uint64_t>(cut));
    const absl::Status changed = change(disk);
    const bool was_cut = disk.power_was_cut();
    EXPECT_EQ(changed.ok(), !was_cut);
    disk.CutPowerNow();
    for (const auto& survivors : disk.LegalSurvivors()) {
      const std::unique_ptr<SimDisk> after = disk.RebootedCopy(survivors);
      check(*after, changed.ok());
      EXPECT_OK(change(*after));
      check(*after, true);
    }
    if (!was_cut || testing::Test::HasFailure()) return cut;
  }
}

TEST(BadMarks, AreWholeOrNotThereAtEveryPowerCut) {
  const int operations =
      ForEachCut([](SimDisk&) {}, [](SimDisk& disk) { return MarkBad(disk, kPlace, kRequest); },
                 [](SimDisk& disk, bool ok) {
                   const std::vector<BadMark> marks = MarksOn(disk);
                   EXPECT_LE(marks.size(), 1u);
                   if (ok) {
                     EXPECT_EQ(marks.size(), 1u);
                   }
                   for (const BadMark& mark : marks) EXPECT_EQ(mark.reason, kRequest.reason);
                 });
  EXPECT_GE(operations,
            5);  // create, append, sync, link, remove the partial name, sync the directory
}

TEST(BadMarks, AreGoneOrThereAtEveryPowerCut) {
  const int operations = ForEachCut(
      [](SimDisk& disk) {
        ASSERT_OK(MarkBad(disk, kPlace, kRequest));
        ASSERT_OK(MarkBad(disk, kPlace, {"b", "w2", kRequest.created_at}));
      },
      [](SimDisk& disk) { return UnmarkBad(disk, kPlace); },
      [](SimDisk& disk, bool ok) {
        if (ok) {
          EXPECT_THAT(MarksOn(disk), SizeIs(0));
        }
      });
  EXPECT_EQ(operations, 3);
}

}  // namespace
}  // namespace holdfast
