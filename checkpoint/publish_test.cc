// Files that appear whole, under a name that one alone gets: with links and without, after errors
// of the same writer, against others that are at the same name at the same time.
#include "checkpoint/publish.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "tests/support/interrupting_file_system.h"
#include "tests/support/sim_disk.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::IsEmpty;

constexpr char kDirectory[] = "/d";
constexpr char kPath[] = "/d/RECORD";

// Whole contents end with a full stop.
PublishOptions Options(const std::string& writer) {
  return {.writer = writer,
          .on_visible = nullptr,
          .on_durable = nullptr,
          .is_whole = [](const std::string& bytes) { return bytes.ends_with('.'); },
          .bytes_max = 100};
}

std::unique_ptr<SimDisk> NewDisk(bool links) {
  SimDisk::Options options;
  options.links_supported = links;
  auto disk = std::make_unique<SimDisk>(options);
  EXPECT_OK(disk->CreateDirectory(kDirectory));
  EXPECT_OK(disk->SyncDirectory("/"));
  return disk;
}

absl::Status Publish(FileSystem& file_system, const std::string& writer, const std::string& bytes) {
  return PublishFile(file_system, kDirectory, "RECORD", bytes, Options(writer));
}

TEST(Publish, OneWriterGetsTheName) {
  for (const bool links : {true, false}) {
    const std::unique_ptr<SimDisk> disk = NewDisk(links);
    ASSERT_OK(Publish(*disk, "a", "first."));
    EXPECT_THAT(Publish(*disk, "b", "second."), StatusIs(absl::StatusCode::kAlreadyExists));
    EXPECT_THAT(Publish(*disk, "a", "third."), StatusIs(absl::StatusCode::kAlreadyExists));
    EXPECT_THAT(disk->AllFiles(), testing::ElementsAre(kPath));
    EXPECT_THAT(disk->Contents(kPath), IsOkAndHolds("first."));
  }
}

// One operation fails; the same writer tries again. The name is not taken by what it left behind.
TEST(Publish, TheSameWriterSucceedsAfterAnyError) {
  using Operation = SimDisk::Operation;
  for (const bool links : {true, false}) {
    int faults = 0;
    for (const Operation operation :
         {Operation::kCreateNew, Operation::kAppend, Operation::kSyncFile, Operation::kLink,
          Operation::kUnlink, Operation::kSyncDirectory}) {
      for (uint64_t index = 0;; ++index) {
        SCOPED_TRACE(testing::Message() << "links " << links << ", operation "
                                        << static_cast<int>(operation) << " number " << index);
        const std::unique_ptr<SimDisk> disk = NewDisk(links);
        disk->FailOperation(operation, index, absl::ResourceExhaustedError("ENOSPC"));
        const absl::Status first = Publish(*disk, "a", "mine.");
        if (disk->fault_count() == 0) break;
        ++faults;
        const absl::Status second = Publish(*disk, "a", "mine.");
        // The first may have failed with the file in its place; then it is this.
        if (!second.ok() || first.ok()) {
          EXPECT_THAT(second, StatusIs(absl::StatusCode::kAlreadyExists));
        }
        EXPECT_THAT(disk->Contents(kPath), IsOkAndHolds("mine."));
        // Nor by what it left behind for anybody else.
        EXPECT_THAT(Publish(*disk, "b", "other."), StatusIs(absl::StatusCode::kAlreadyExists));
      }
    }
    EXPECT_GE(faults, links ? 5 : 11);
  }
}

// Cut at every operation; another writer comes after the reboot.
TEST(Publish, WhatACutLeftBehindMakesRoom) {
  for (const bool links : {true, false}) {
    int states = 0;
    int made_room = 0;
    for (uint64_t cut_after = 0;; ++cut_after) {
      const std::unique_ptr<SimDisk> disk = NewDisk(links);
      disk->CutPowerAfter(cut_after);
      const absl::Status first = Publish(*disk, "a", "mine.");
      if (!disk->power_was_cut()) break;
      for (const Survivors& survivors : disk->LegalSurvivors()) {
        SCOPED_TRACE(testing::Message() << "links " << links << ", cut after " << cut_after << ", "
                                        << survivors.description());
        const std::unique_ptr<SimDisk> after = disk->RebootedCopy(survivors);
        const absl::StatusOr<std::string> torn = after->Contents(kPath);
        // Without links the name is durable, too, before it is said.
        if (first.ok() && !links) {
          EXPECT_THAT(torn, IsOkAndHolds("mine."));
        }
        const absl::Status second = Publish(*after, "b", "other.");
        if (torn.ok() && *torn == "mine.") {
          EXPECT_THAT(second, StatusIs(absl::StatusCode::kAlreadyExists));
        } else {
          ASSERT_OK(second);
          EXPECT_THAT(after->Contents(kPath), IsOkAndHolds("other."));
          made_room += torn.ok() ? 1 : 0;
        }
        ++states;
      }
    }
    EXPECT_GT(states, links ? 10 : 20);
    EXPECT_TRUE(links || made_room > 0);
  }
}

// Two writers at once, at every place: at most one is told that it has published, and then the
// file is its own and stays so.
TEST(Publish, TwoWritersAreNeverBothToldThatTheyHavePublished) {
  for (const bool links : {true, false}) {
    int first_won = 0;
    int second_won = 0;
    for (uint64_t index = 0;; ++index) {
      SCOPED_TRACE(testing::Message() << "links " << links << ", operation " << index);
      const std::unique_ptr<SimDisk> disk = NewDisk(links);
      InterruptingFileSystem interrupted(*disk);
      absl::Status second = absl::UnknownError("not run");
      interrupted.InterruptBefore(index, [&] { second = Publish(*disk, "b", "second."); });
      const absl::Status first = Publish(interrupted, "a", "first.");
      if (!interrupted.was_interrupted()) break;
      EXPECT_FALSE(first.ok() && second.ok());
      EXPECT_TRUE(first.ok() || second.ok());
      EXPECT_THAT(disk->Contents(kPath), IsOkAndHolds(first.ok() ? "first." : "second."));
      EXPECT_THAT(PublicationWasCutOff(*disk, kDirectory, "RECORD"), IsOkAndHolds(false));
      first_won += first.ok() ? 1 : 0;
      second_won += second.ok() ? 1 : 0;
    }
    EXPECT_GT(first_won, 0);
    EXPECT_GT(second_won, links ? 2 : 5);
  }
}

// A writer is killed anywhere, the machine lives; who comes next and finds the name taken may count
// on what is there.
TEST(Publish, WhatADeadWriterLeftIsDurableWhenItCounts) {
  for (const bool links : {true, false}) {
    int taken = 0;
    for (uint64_t stop_before = 0;; ++stop_before) {
      SCOPED_TRACE(testing::Message() << "links " << links << ", operation " << stop_before);
      const std::unique_ptr<SimDisk> disk = NewDisk(links);
      InterruptingFileSystem dying(*disk);
      dying.StopBefore(stop_before);
      const absl::Status first = Publish(dying, "a", "mine.");
      if (!dying.is_stopped()) break;
      const absl::Status second = Publish(*disk, "b", "mine.");
      if (!second.ok()) {
        EXPECT_THAT(second, StatusIs(absl::StatusCode::kAlreadyExists));
        ++taken;
      }
      ASSERT_OK(RemoveMarkers(*disk, kDirectory, "RECORD"));
      ASSERT_OK(disk->SyncDirectory(kDirectory));
      disk->CutPowerNow();
      const std::unique_ptr<SimDisk> after = disk->RebootedCopy(Survivors::None());
      EXPECT_THAT(after->Contents(kPath), IsOkAndHolds("mine."));
      EXPECT_THAT(PublicationWasCutOff(*after, kDirectory, "RECORD"), IsOkAndHolds(false));
    }
    EXPECT_GT(taken, links ? 0 : 3);
  }
}

TEST(Publish, DamageWithoutAMarkerKeepsTheName) {
  const std::unique_ptr<SimDisk> disk = NewDisk(/*links=*/false);
  disk->PutFile(kPath, "rotten");
  EXPECT_THAT(Publish(*disk, "a", "new."), StatusIs(absl::StatusCode::kAlreadyExists));
  EXPECT_THAT(disk->Contents(kPath), IsOkAndHolds("rotten"));
  EXPECT_THAT(PublicationWasCutOff(*disk, kDirectory, "RECORD"), IsOkAndHolds(false));
}

TEST(Publish, MarkersOfTheDeadAreRemoved) {
  const std::unique_ptr<SimDisk> disk = NewDisk(/*links=*/false);
  disk->PutFile(kPath, "whole.");
  disk->PutFile("/d/RECORD.exclusive.x", "whole.");
  disk->PutFile("/d/RECORD.exclusive.y", "");
  disk->PutFile("/d/OTHER.exclusive.y", "");
  EXPECT_THAT(PublicationWasCutOff(*disk, kDirectory, "RECORD"), IsOkAndHolds(true));
  ASSERT_OK(RemoveMarkers(*disk, kDirectory, "RECORD"));
  EXPECT_THAT(disk->AllFiles(), testing::ElementsAre("/d/OTHER.exclusive.y", kPath));
  EXPECT_THAT(disk->DescribeUnsynced(), IsEmpty());
}

}  // namespace
}  // namespace holdfast
