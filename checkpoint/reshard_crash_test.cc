// Goal: whatever the moment of a power cut, or whatever fails, a reader finds no checkpoint or the
// whole one; once RunReshard has said OK, it is there; the source is never touched; and a next run
// makes it, finds it made, or says what is in its way.
// Method: a reshard from 2 ranks to 3 on the simulated disk. The power is cut before every single
// operation, and every choice of what of the unsynced state survives is tried; every operation of
// every kind fails once.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "checkpoint/engine_testing.h"
#include "checkpoint/readback_testing.h"
#include "checkpoint/reshard.h"
#include "checkpoint/reshard_testing.h"
#include "tests/support/sim_disk.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

constexpr uint32_t kSourceRanks = 2;

// Makes disks that hold the same source.
class Disks {
 public:
  Disks() {
    const std::unique_ptr<SimDisk> disk = NewEmpty(true);
    EXPECT_OK(WriteTestCheckpoint(*disk, SmallLayout(kSourceRanks), {}));
    for (const std::string& path : disk->AllFiles()) files_[path] = disk->Contents(path).value();
    source_ = FindNewest(*disk, "/src", "job").value();
    // Planned once: the plan is the same for all, and so are its heads.
    plan_ = PlanReshard(*disk, Request(), source_.index).value();
    schedule_ = plan_->Schedule(uint64_t{1} << 20, 1).value();
  }

  std::unique_ptr<SimDisk> New(bool links_supported) const {
    std::unique_ptr<SimDisk> disk = NewEmpty(links_supported);
    for (const auto& [path, bytes] : files_) disk->PutFile(path, bytes);
    return disk;
  }

  absl::Status Run(SimDisk& disk) const {
    return RunReshard(SimReshardStorage(disk), Request(), plan_, schedule_,
                      {.source_caching = Caching::kDirect, .target_caching = Caching::kDirect})
        .status();
  }

  // As a next process does it: looks at the target anew.
  absl::Status RunAgain(SimDisk& disk) const {
    ReshardRequest request = Request();
    request.writer = "again";
    request.new_job_uuid = "00000000-0000-4000-8000-000000000001";
    ASSIGN_OR_RETURN(auto plan, PlanReshard(disk, request, source_.index));
    ASSIGN_OR_RETURN(const ReshardSchedule schedule, plan->Schedule(uint64_t{1} << 20, 1));
    return RunReshard(SimReshardStorage(disk), request, std::move(plan), schedule, {}).status();
  }

  void ExpectSourceUntouched(const SimDisk& disk) const {
    for (const auto& [path, bytes] : files_) {
      const absl::StatusOr<std::string> found = disk.Contents(path);
      EXPECT_TRUE(found.ok() && *found == bytes) << path;
    }
  }

 private:
  static std::unique_ptr<SimDisk> NewEmpty(bool links_supported) {
    SimDisk::Options options;
    options.links_supported = links_supported;
    auto disk = std::make_unique<SimDisk>(options);
    for (const char* root : {"/src", "/out"}) EXPECT_OK(disk->CreateDirectory(root));
    EXPECT_OK(disk->SyncDirectory("/"));
    return disk;
  }

  ReshardRequest Request() const {
    ReshardRequest request;
    request.source_directory = source_.entry.directory;
    request.layout_json = SmallLayout(3);
    request.root = "/out";
    request.job = "job";
    request.new_job_uuid = "fedcba98-7654-4321-8fed-cba987654321";
    request.writer = "first";
    request.scratch_directory = ScratchDirectory();
    return request;
  }

  std::map<std::string, std::string> files_;
  Found source_;
  std::shared_ptr<const ReshardPlan> plan_;
  ReshardSchedule schedule_;
};

enum class Seen { kNothing, kWhole };

// What a reader finds; an error says what is broken.
absl::StatusOr<Seen> Look(SimDisk& disk) {
  const absl::StatusOr<Catalog> catalog = ReadCatalog(disk, "/out", "job");
  if (catalog.status().code() == absl::StatusCode::kNotFound) return Seen::kNothing;
  RETURN_IF_ERROR(catalog.status());
  for (const CatalogEntry& entry : catalog->entries) {
    if (entry.state == CatalogEntry::State::kIncomplete) continue;
    RETURN_IF_ERROR(CheckTestCheckpoint(disk, SimReadAt(disk), entry, kSourceRanks));
    return Seen::kWhole;
  }
  return Seen::kNothing;
}

// What a run before has left behind: one that was killed removes nothing.
enum class LeftBehind { kNothing, kPerhapsImages };

// A next run ends in a whole checkpoint, or in a sentence; either way nothing is broken by it.
void ExpectGoesOn(const Disks& disks, SimDisk& disk, Seen before, LeftBehind left,
                  const std::string& where) {
  const absl::Status again = disks.RunAgain(disk);
  const absl::StatusOr<Seen> after = Look(disk);
  ASSERT_OK(after) << where;
  if (again.ok()) {
    EXPECT_EQ(before, Seen::kNothing) << where;
    EXPECT_EQ(*after, Seen::kWhole) << where;
    return;
  }
  EXPECT_TRUE(left != LeftBehind::kNothing || before == Seen::kWhole) << where << ": " << again;
  EXPECT_EQ(*after, before) << where;
  EXPECT_THAT(again,
              StatusIs(absl::StatusCode::kAlreadyExists,
                       testing::HasSubstr(before == Seen::kWhole ? "made before" : "never ended")))
      << where;
}

TEST(ReshardCrash, AfterAPowerCutAtAnyOperationThereIsNothingOrTheWhole) {
  const Disks disks;
  for (const bool links : {true, false}) {
    uint64_t states = 0;
    uint64_t whole = 0;
    uint64_t cut_after = 0;
    for (;; ++cut_after) {
      const std::unique_ptr<SimDisk> disk = disks.New(links);
      disk->CutPowerAfter(cut_after);
      const absl::Status result = disks.Run(*disk);
      EXPECT_EQ(result.ok(), !disk->power_was_cut());
      if (!disk->power_was_cut()) {
        // Once it said OK, it is there whatever was not synced.
        disk->CutPowerNow();
        for (const Survivors& survivors : disk->LegalSurvivors()) {
          const std::unique_ptr<SimDisk> after = disk->RebootedCopy(survivors);
          EXPECT_THAT(Look(*after), IsOkAndHolds(Seen::kWhole)) << survivors.description();
        }
        break;
      }
      for (const Survivors& survivors : disk->LegalSurvivors()) {
        const std::string where =
            absl::StrCat("links ", links, ", cut after ", cut_after, ", ", survivors.description());
        const std::unique_ptr<SimDisk> after = disk->RebootedCopy(survivors);
        const absl::StatusOr<Seen> seen = Look(*after);
        ASSERT_OK(seen) << where;
        ++states;
        whole += *seen == Seen::kWhole ? 1 : 0;
        disks.ExpectSourceUntouched(*after);
        if (HasFailure()) return;
      }
      // Of all that was written, or of nothing.
      for (const Survivors& survivors : {Survivors::All(), Survivors::None()}) {
        const std::unique_ptr<SimDisk> after = disk->RebootedCopy(survivors);
        const absl::StatusOr<Seen> seen = Look(*after);
        ASSERT_OK(seen);
        ExpectGoesOn(disks, *after, *seen, LeftBehind::kPerhapsImages,
                     absl::StrCat("links ", links, ", cut ", cut_after));
        if (HasFailure()) return;
      }
    }
    std::printf("links %d: %llu operations, %llu states, whole in %llu\n", links,
                static_cast<unsigned long long>(cut_after), static_cast<unsigned long long>(states),
                static_cast<unsigned long long>(whole));
    EXPECT_GE(cut_after, 30u);
    EXPECT_GE(states, 200u);
    EXPECT_GE(whole, 1u);
  }
}

TEST(ReshardCrash, AnErrorAtAnyOperationIsReportedAndHarmsNothing) {
  const Disks disks;
  uint64_t fault_count = 0;
  for (const absl::Status& error :
       {absl::DataLossError("EIO"), absl::ResourceExhaustedError("ENOSPC")}) {
    for (const NamedOperation& fault : kSimDiskOperations) {
      for (uint64_t index = 0;; ++index) {
        const std::unique_ptr<SimDisk> disk = disks.New(/*links_supported=*/true);
        disk->FailOperation(fault.operation, index, error);
        const absl::Status result = disks.Run(*disk);
        if (disk->fault_count() == 0) {
          EXPECT_OK(result);
          break;
        }
        ++fault_count;
        const std::string where =
            absl::StrCat(fault.name, " ", index, ": ", std::string(error.message()));
        disk->ClearFaults();
        const absl::StatusOr<Seen> seen = Look(*disk);
        ASSERT_OK(seen) << where;
        // Only the removal of a name that nobody needs may fail unseen. Of what was reported as
        // failed, the manifest alone may be there: its name was linked, and could not be synced.
        const bool is_last_sync = fault.operation == SimDisk::Operation::kSyncDirectory;
        if (result.ok()) {
          EXPECT_EQ(fault.operation, SimDisk::Operation::kUnlink) << where;
          EXPECT_EQ(*seen, Seen::kWhole) << where;
        } else if (!is_last_sync) {
          EXPECT_EQ(*seen, Seen::kNothing) << where << ": " << result;
        }
        disks.ExpectSourceUntouched(*disk);
        // The fault is over when images are removed, so a next run finds none in its way.
        ExpectGoesOn(disks, *disk, *seen, LeftBehind::kNothing, where);
        if (HasFailure()) return;
      }
    }
  }
  std::printf("%llu faults\n", static_cast<unsigned long long>(fault_count));
  EXPECT_GE(fault_count, 100u);
}

}  // namespace
}  // namespace holdfast
