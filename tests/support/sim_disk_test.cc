// The model of the simulated disk, against its written model: what survives which choice, and that
// every fault that can be asked for happens.
#include "tests/support/sim_disk.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using absl::StatusCode;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

std::span<const std::byte> Bytes(const std::string& text) { return std::as_bytes(std::span(text)); }

void Append(SimDisk& disk, const std::string& path, const std::string& text, bool sync) {
  ASSERT_OK_AND_ASSIGN(const auto file, disk.CreateNew(path));
  ASSERT_OK(file->Append(Bytes(text)));
  if (sync) {
    ASSERT_OK(file->Sync());
  }
}

absl::Status RingWrite(SimDisk& disk, IoFile& file, uint64_t offset, const std::string& text) {
  absl::Status result = absl::UnknownError("not completed");
  disk.Write(file, offset, Bytes(text), [&](absl::Status status) { result = std::move(status); });
  while (disk.in_flight_count() > 0) disk.RunCompletions();
  return result;
}

absl::Status RingSync(SimDisk& disk, IoFile& file) {
  absl::Status result = absl::UnknownError("not completed");
  disk.Sync(file, [&](absl::Status status) { result = std::move(status); });
  while (disk.in_flight_count() > 0) disk.RunCompletions();
  return result;
}

// Everything a reader sees, as one value.
std::map<std::string, std::string> Everything(const SimDisk& disk) {
  std::map<std::string, std::string> files;
  for (const std::string& path : disk.AllFiles()) files[path] = *disk.Contents(path);
  return files;
}

std::set<std::map<std::string, std::string>> AllOutcomes(SimDisk& disk) {
  disk.CutPowerNow();
  std::set<std::map<std::string, std::string>> outcomes;
  for (const Survivors& survivors : disk.LegalSurvivors({.every_tear = true})) {
    outcomes.insert(Everything(*disk.RebootedCopy(survivors)));
  }
  return outcomes;
}

using Files = std::map<std::string, std::string>;

TEST(SimDisk, WhatIsSyncedWithItsNameSurvivesEveryChoice) {
  SimDisk disk;
  Append(disk, "/a", "hello", /*sync=*/true);
  ASSERT_OK(disk.SyncDirectory("/"));
  EXPECT_THAT(AllOutcomes(disk), ElementsAre(Files{{"/a", "hello"}}));
}

TEST(SimDisk, ASyncedFileWhoseDirectoryIsNotSyncedMayLoseItsName) {
  SimDisk disk;
  Append(disk, "/a", "hello", /*sync=*/true);
  EXPECT_THAT(AllOutcomes(disk), ElementsAre(Files{}, Files{{"/a", "hello"}}));
}

TEST(SimDisk, ANameMaySurviveWithoutItsData) {
  SimDisk disk;
  Append(disk, "/a", "hello", /*sync=*/false);
  ASSERT_OK(disk.SyncDirectory("/"));
  EXPECT_THAT(AllOutcomes(disk), ElementsAre(Files{{"/a", ""}}, Files{{"/a", "hello"}}));
}

TEST(SimDisk, ADirectoryWhoseOwnNameIsLostTakesWhatIsInsideAlong) {
  SimDisk disk;
  ASSERT_OK(disk.CreateDirectory("/d"));
  Append(disk, "/d/a", "hello", /*sync=*/true);
  ASSERT_OK(disk.SyncDirectory("/d"));
  EXPECT_THAT(AllOutcomes(disk), ElementsAre(Files{}, Files{{"/d/a", "hello"}}));
}

TEST(SimDisk, AnUnsyncedUnlinkMayComeBack) {
  SimDisk disk;
  disk.PutFile("/a", "hello");
  ASSERT_OK(disk.Unlink("/a"));
  EXPECT_THAT(disk.Contents("/a"), IsNotFound());
  EXPECT_THAT(AllOutcomes(disk), ElementsAre(Files{}, Files{{"/a", "hello"}}));
}

TEST(SimDisk, OfALinkAndAnUnlinkEachAloneMaySurvive) {
  SimDisk disk;
  disk.PutFile("/a", "hello");
  ASSERT_OK(disk.Link("/a", "/b"));
  ASSERT_OK(disk.Unlink("/a"));
  EXPECT_THAT(AllOutcomes(disk),
              ElementsAre(Files{}, Files{{"/a", "hello"}}, Files{{"/a", "hello"}, {"/b", "hello"}},
                          Files{{"/b", "hello"}}));
}

TEST(SimDisk, AWriteOfSeveralSectorsIsTornAfterAnyOfThem) {
  SimDisk disk({.sector_bytes = 4, .stale_byte = '.'});
  disk.PutFile("/a", "");
  ASSERT_OK_AND_ASSIGN(const auto file, disk.CreateSized("/b", 12, Caching::kBuffered));
  ASSERT_OK(disk.SyncDirectory("/"));
  ASSERT_OK(RingSync(disk, *file));
  ASSERT_OK(RingWrite(disk, *file, 2, "01234567"));  // sectors [2,4) [4,8) [8,10)
  EXPECT_THAT(AllOutcomes(disk), ElementsAre(Files{{"/a", ""}, {"/b", "............"}},
                                             Files{{"/a", ""}, {"/b", "..01........"}},
                                             Files{{"/a", ""}, {"/b", "..012345...."}},
                                             Files{{"/a", ""}, {"/b", "..01234567.."}}));
}

TEST(SimDisk, EachPrefixAndEachSingleLossAndEachSingleSurvivorIsListed) {
  SimDisk disk({.sector_bytes = 1, .stale_byte = '.'});
  ASSERT_OK_AND_ASSIGN(const auto file, disk.CreateSized("/b", 4, Caching::kBuffered));
  ASSERT_OK(disk.SyncDirectory("/"));
  ASSERT_OK(RingSync(disk, *file));
  for (int i = 0; i < 4; ++i) ASSERT_OK(RingWrite(disk, *file, i, std::string(1, 'a' + i)));
  std::set<std::string> contents;
  for (const Files& files : AllOutcomes(disk)) contents.insert(files.at("/b"));
  EXPECT_THAT(contents, testing::UnorderedElementsAre("....", "a...", "ab..", "abc.", "abcd",  //
                                                      ".b..", "..c.", "...d",                  //
                                                      ".bcd", "a.cd", "ab.d"));
}

TEST(SimDisk, AllNamesMaySurviveWithoutAnyDataAndAllDataWithoutAnyName) {
  SimDisk disk;
  disk.PutFile("/a", "");
  ASSERT_OK_AND_ASSIGN(const auto b, disk.CreateSized("/b", 0, Caching::kBuffered));
  ASSERT_OK_AND_ASSIGN(const auto c, disk.CreateSized("/c", 0, Caching::kBuffered));
  ASSERT_OK(disk.Link("/b", "/b2"));
  ASSERT_OK(RingWrite(disk, *b, 0, "b"));
  ASSERT_OK(RingWrite(disk, *c, 0, "c"));
  const auto outcomes = AllOutcomes(disk);
  EXPECT_THAT(outcomes, Contains(Files{{"/a", ""}, {"/b", ""}, {"/b2", ""}, {"/c", ""}}));
  EXPECT_THAT(outcomes, Contains(Files{{"/a", ""}}));
}

TEST(SimDisk, EveryEffectIsListedOnceAndSaysWhatItIs) {
  SimDisk disk;
  Append(disk, "/a", "hello", false);
  Append(disk, "/b", "hello", false);
  disk.CutPowerNow();
  std::set<std::string> descriptions;
  const std::vector<Survivors> choices = disk.LegalSurvivors();
  for (const Survivors& choice : choices) descriptions.insert(choice.description());
  EXPECT_EQ(descriptions.size(), choices.size());
  EXPECT_THAT(descriptions, Contains(HasSubstr("write /a [0, 5)")));
  EXPECT_THAT(disk.DescribeUnsynced(), ElementsAre("#0 name a in /", "#1 write /a [0, 5)",
                                                   "#2 name b in /", "#3 write /b [0, 5)"));
}

// STYLE's protocol: contents, sync, link, sync of the directory, counted and cut at every point.
absl::Status Publish(FileSystem& disk) {
  const auto file = disk.CreateNew("/new.partial");
  if (!file.ok()) return file.status();
  const std::string text = "whole";
  for (const absl::Status& status : {(*file)->Append(Bytes(text)), (*file)->Sync(),
                                     disk.Link("/new.partial", "/new"), disk.SyncDirectory("/")}) {
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

TEST(SimDisk, PowerIsCutAtEachOfTheFiveOperationsAndAllLaterOnesFail) {
  for (uint64_t point = 0; point <= 5; ++point) {
    SimDisk disk;
    disk.CutPowerAfter(point);
    const absl::Status published = Publish(disk);
    EXPECT_EQ(published.ok(), point == 5) << published;
    EXPECT_EQ(disk.power_was_cut(), point < 5);
    EXPECT_EQ(disk.mutating_operation_count(), point);
    if (point < 5) {
      EXPECT_THAT(published, StatusIs(StatusCode::kUnavailable));
      EXPECT_THAT(disk.Stat("/"), StatusIs(StatusCode::kUnavailable));
      EXPECT_THAT(disk.CreateDirectory("/later"), StatusIs(StatusCode::kUnavailable));
    }
    for (const Files& files : AllOutcomes(disk)) {
      if (published.ok()) {
        EXPECT_EQ(files.count("/new"), 1u);
      }
      if (files.count("/new") > 0) {
        EXPECT_EQ(files.at("/new"), "whole");
      }
    }
  }
}

TEST(SimDisk, WithoutTheFirstSyncTheProtocolIsFoundBroken) {
  SimDisk disk;
  Append(disk, "/p", "whole", /*sync=*/false);
  ASSERT_OK(disk.Link("/p", "/new"));
  ASSERT_OK(disk.SyncDirectory("/"));
  EXPECT_THAT(AllOutcomes(disk), Contains(Files{{"/new", ""}, {"/p", ""}}));
}

TEST(SimDisk, WhatTheRingHasInFlightAtTheCutMayOrMayNotBeThere) {
  SimDisk disk({.sector_bytes = 4, .stale_byte = '.'});
  ASSERT_OK_AND_ASSIGN(const auto file, disk.CreateSized("/a", 4, Caching::kBuffered));
  ASSERT_OK(RingSync(disk, *file));
  ASSERT_OK(disk.SyncDirectory("/"));
  const std::string text = "abcd";
  absl::Status result;
  disk.CutPowerAfter(0);
  disk.Write(*file, 0, Bytes(text), [&](absl::Status status) { result = std::move(status); });
  disk.RunCompletions();
  EXPECT_THAT(result, StatusIs(StatusCode::kUnavailable));
  EXPECT_THAT(AllOutcomes(disk), ElementsAre(Files{{"/a", "...."}}, Files{{"/a", "abcd"}}));
}

TEST(SimDisk, ASyncOfTheRingCoversOnlyWhatHadCompletedBefore) {
  SimDisk disk({.sector_bytes = 4, .stale_byte = '.'});
  ASSERT_OK_AND_ASSIGN(const auto file, disk.CreateSized("/a", 4, Caching::kBuffered));
  ASSERT_OK(RingSync(disk, *file));
  ASSERT_OK(disk.SyncDirectory("/"));
  const std::string text = "abcd";
  disk.Write(*file, 0, Bytes(text), [](const absl::Status& status) { EXPECT_OK(status); });
  EXPECT_OK(RingSync(disk, *file));  // submitted while the write was in flight
  EXPECT_THAT(AllOutcomes(disk), Contains(Files{{"/a", "...."}}));
}

TEST(SimDisk, AfterAFailedSyncTheDataIsVisibleAndNeverDurable) {
  SimDisk disk;
  disk.FailOperation(SimDisk::Operation::kSyncFile, 0, absl::DataLossError("EIO"));
  ASSERT_OK_AND_ASSIGN(auto file, disk.CreateNew("/a"));
  ASSERT_OK(disk.SyncDirectory("/"));
  ASSERT_OK(file->Append(Bytes("hello")));
  EXPECT_THAT(file->Sync(), StatusIs(StatusCode::kDataLoss, HasSubstr("sync /a: EIO")));
  EXPECT_EQ(disk.fault_count(), 1u);
  EXPECT_THAT(file->Sync(), StatusIs(StatusCode::kFailedPrecondition));
  EXPECT_THAT(disk.Contents("/a"), IsOkAndHolds(std::string("hello")));
  EXPECT_THAT(AllOutcomes(disk), ElementsAre(Files{{"/a", ""}}));
}

TEST(SimDisk, AfterAFailedSyncOfTheRingALaterOneDoesNotBringTheDataBack) {
  SimDisk disk({.sector_bytes = 4, .stale_byte = '.'});
  disk.FailOperation(SimDisk::Operation::kRingSync, 1, absl::DataLossError("EIO"));
  ASSERT_OK_AND_ASSIGN(const auto file, disk.CreateSized("/a", 4, Caching::kBuffered));
  ASSERT_OK(disk.SyncDirectory("/"));
  ASSERT_OK(RingSync(disk, *file));
  ASSERT_OK(RingWrite(disk, *file, 0, "abcd"));
  EXPECT_THAT(RingSync(disk, *file), StatusIs(StatusCode::kDataLoss));
  EXPECT_OK(RingSync(disk, *file));
  EXPECT_THAT(AllOutcomes(disk), ElementsAre(Files{{"/a", "...."}}));
}

TEST(SimDisk, FaultsHitTheNthOperationOfTheirKindAndPath) {
  SimDisk disk;
  disk.FailOperation(SimDisk::Operation::kCreateNew, 1, absl::ResourceExhaustedError("full"), "x");
  Append(disk, "/x1", "", false);
  Append(disk, "/y", "", false);
  EXPECT_THAT(disk.CreateNew("/x2"), StatusIs(StatusCode::kResourceExhausted));
  EXPECT_OK(disk.CreateNew("/x3"));
  disk.FailOperationsFrom(SimDisk::Operation::kStat, 1, absl::DataLossError("EIO"));
  EXPECT_OK(disk.Stat("/y"));
  EXPECT_THAT(disk.Stat("/y"), StatusIs(StatusCode::kDataLoss));
  EXPECT_THAT(disk.Stat("/y"), StatusIs(StatusCode::kDataLoss));
  disk.ClearFaults();
  EXPECT_OK(disk.Stat("/y"));
  EXPECT_EQ(disk.fault_count(), 3u);
}

TEST(SimDisk, AFailedAppendAndAFailedRingWriteLeaveHalfBehind) {
  SimDisk disk({.stale_byte = '.'});
  disk.FailOperation(SimDisk::Operation::kAppend, 0, absl::DataLossError("EIO"));
  disk.FailOperation(SimDisk::Operation::kRingWrite, 0, absl::DataLossError("EIO"));
  ASSERT_OK_AND_ASSIGN(auto appended, disk.CreateNew("/a"));
  EXPECT_THAT(appended->Append(Bytes("abcd")), StatusIs(StatusCode::kDataLoss));
  ASSERT_OK_AND_ASSIGN(const auto file, disk.CreateSized("/b", 4, Caching::kBuffered));
  EXPECT_THAT(RingWrite(disk, *file, 0, "abcd"), StatusIs(StatusCode::kDataLoss));
  EXPECT_THAT(Everything(disk), (Files{{"/a", "ab"}, {"/b", "ab.."}}));
}

TEST(SimDisk, AFullDiskRefusesAndUnlinkingMakesRoom) {
  SimDisk disk({.sector_bytes = 4, .capacity_bytes = 16});
  ASSERT_OK(disk.CreateSized("/a", 8, Caching::kBuffered));
  EXPECT_THAT(disk.CreateSized("/b", 9, Caching::kBuffered),
              StatusIs(StatusCode::kResourceExhausted, HasSubstr("ENOSPC")));
  EXPECT_THAT(disk.Stat("/b"), IsNotFound());
  {
    ASSERT_OK_AND_ASSIGN(auto file, disk.CreateNew("/c"));
    EXPECT_THAT(file->Append(Bytes("0123456789")), StatusIs(StatusCode::kResourceExhausted));
    EXPECT_THAT(disk.Contents("/c"), IsOkAndHolds(std::string("01234567")));
    ASSERT_OK(disk.Unlink("/c"));
    EXPECT_EQ(disk.used_bytes(), 16u);  // still open
  }
  EXPECT_EQ(disk.used_bytes(), 8u);
  ASSERT_OK_AND_ASSIGN(const Space space, disk.SpaceOf("/"));
  EXPECT_EQ(space.available_bytes, 8u);
  EXPECT_OK(disk.CreateSized("/d", 8, Caching::kBuffered));
}

TEST(SimDisk, AReadOnlyDiskRefusesChangesAndServesReads) {
  SimDisk disk;
  disk.PutFile("/d/a", "hello");
  disk.SetReadOnly(true);
  const auto denied = StatusIs(StatusCode::kPermissionDenied, HasSubstr("read-only"));
  EXPECT_THAT(disk.CreateNew("/b"), denied);
  EXPECT_THAT(disk.CreateSized("/b", 1, Caching::kBuffered), denied);
  EXPECT_THAT(disk.CreateDirectory("/b"), denied);
  EXPECT_THAT(disk.Link("/d/a", "/b"), denied);
  EXPECT_THAT(disk.Unlink("/d/a"), denied);
  EXPECT_THAT(disk.ReadSmallFile("/d/a", 10), IsOkAndHolds(std::string("hello")));
}

TEST(SimDisk, ReachingInIsSeenByReadersAndSurvives) {
  SimDisk disk;
  disk.PutFile("/d/a", "hello");
  disk.FlipBit("/d/a", 0, 0);
  disk.TruncateFile("/d/a", 3);
  disk.PutFile("/d/b", "x");
  disk.RemoveFile("/d/b");
  EXPECT_THAT(AllOutcomes(disk), ElementsAre(Files{{"/d/a", "iel"}}));
}

TEST(SimDisk, OpenFilesAreDeadAfterAReboot) {
  SimDisk disk;
  ASSERT_OK_AND_ASSIGN(const auto file, disk.CreateSized("/a", 4, Caching::kBuffered));
  ASSERT_OK_AND_ASSIGN(const auto appended, disk.CreateNew("/b"));
  ASSERT_OK(disk.SyncDirectory("/"));
  disk.Reboot(Survivors::None());
  EXPECT_FALSE(disk.power_was_cut());
  EXPECT_THAT(RingWrite(disk, *file, 0, "abcd"), StatusIs(StatusCode::kUnavailable));
  EXPECT_THAT(appended->Append(Bytes("x")), StatusIs(StatusCode::kUnavailable));
  EXPECT_THAT(disk.AllFiles(), ElementsAre("/a", "/b"));
  EXPECT_OK(disk.CreateNew("/c"));
}

TEST(SimDisk, ARebootedCopyIsAnotherDisk) {
  SimDisk disk;
  Append(disk, "/a", "hello", false);
  disk.CutPowerNow();
  const std::unique_ptr<SimDisk> copy = disk.RebootedCopy(Survivors::All());
  ASSERT_OK(copy->Unlink("/a"));
  EXPECT_THAT(copy->AllFiles(), IsEmpty());
  EXPECT_THAT(disk.RebootedCopy(Survivors::All())->AllFiles(), ElementsAre("/a"));
}

TEST(SimDisk, SeedsGiveEveryOrderOfCompletions) {
  std::set<std::string> orders;
  for (uint64_t seed = 0; seed <= 200; ++seed) {
    SimDisk disk({.seed = seed});
    const auto file = disk.CreateSized("/a", 3, Caching::kBuffered);
    ASSERT_OK(file);
    std::string order;
    const std::string text = "x";
    for (const char name : {'a', 'b', 'c'}) {
      disk.Write(**file, 0, Bytes(text), [&order, name](const absl::Status&) { order += name; });
    }
    EXPECT_EQ(order, "");  // never inside the call that submitted
    while (disk.in_flight_count() > 0) disk.RunCompletions();
    if (seed == 0) {
      EXPECT_EQ(order, "abc");
    }
    orders.insert(order);
  }
  EXPECT_EQ(orders.size(), 6u);
}

TEST(SimDisk, UnalignedDirectTransfersAreRefused) {
  SimDisk disk;
  alignas(512) std::array<std::byte, 1024> memory{};
  ASSERT_OK_AND_ASSIGN(const auto file, disk.CreateSized("/a", 1024, Caching::kDirect));
  const auto result = [&](uint64_t offset, std::span<const std::byte> data) {
    absl::Status status;
    disk.Write(*file, offset, data, [&](absl::Status s) { status = std::move(s); });
    disk.RunCompletions();
    return status;
  };
  const std::span<const std::byte> all(memory);
  EXPECT_OK(result(512, all.first(512)));
  const auto refused = StatusIs(StatusCode::kInvalidArgument, HasSubstr("EINVAL"));
  EXPECT_THAT(result(1, all.first(512)), refused);
  EXPECT_THAT(result(0, all.first(511)), refused);
  EXPECT_THAT(result(0, all.subspan(8, 512)), refused);
  disk.SetDirectSupported(false);
  EXPECT_THAT(disk.CreateSized("/b", 512, Caching::kDirect), refused);
  EXPECT_THAT(disk.OpenForRead("/a", Caching::kDirect), refused);
}

TEST(SimDisk, AbandonedOperationsAreCarriedOutOrNotAndNobodyIsTold) {
  for (const bool carried_out : {true, false}) {
    SimDisk disk({.stale_byte = '.'});
    ASSERT_OK_AND_ASSIGN(const auto file, disk.CreateSized("/a", 2, Caching::kBuffered));
    const std::string text = "ab";
    disk.Write(*file, 0, Bytes(text), [](const absl::Status&) { FAIL(); });
    disk.AbandonInFlight(carried_out ? SimDisk::InFlight::kAll : SimDisk::InFlight::kNone);
    EXPECT_EQ(disk.in_flight_count(), 0u);
    EXPECT_THAT(disk.Contents("/a"), IsOkAndHolds(std::string(carried_out ? "ab" : "..")));
  }
}

TEST(SimDiskDeathTest, ClosingAFileWithAnOperationInFlightIsABug) {
  SimDisk disk;
  auto file = disk.CreateSized("/a", 2, Caching::kBuffered);
  ASSERT_OK(file);
  disk.Sync(**file, [](const absl::Status&) {});
  EXPECT_DEATH(file->reset(), "operation.handle != handle_");
  disk.RunCompletions();
}

}  // namespace
}  // namespace holdfast
