// The proof of P1 and P2 for storage: a job of 2 ranks saves 2 checkpoints, and the power is cut
// after every single operation on the disk. Of what was not synced then survive: nothing, all, all
// but one change, only one, each prefix of each file and directory, and torn writes. In every such
// state, a reader without an engine finds old or new, whole, bit for bit, and never less than was
// reported as surviving power; and a new agent goes on from it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/engine_testing.h"
#include "checkpoint/readback_testing.h"
#include "tests/support/interrupting_file_system.h"
#include "tests/support/sim_disk.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

constexpr uint32_t kRanks = 2;
constexpr uint64_t kSteps[] = {1, 2};

// What the trainers were told.
struct Told {
  std::optional<uint64_t> committed;  // newest step surviving power
  bool launched = false;
  bool complete = true;  // every save was answered on every rank: committed, or failed
};

// The whole life of a job: open, register, two saves. Goes on as far as the disk lets it.
Told RunJob(SimDisk& disk, uint64_t seed) {
  EngineHarness harness(disk, {.seed = seed, .root_exists = true});
  Told told;
  const absl::StatusOr<std::vector<TestTrainer*>> trainers = harness.Launch(kRanks);
  if (!trainers.ok()) return told;
  told.launched = true;
  for (const uint64_t step : kSteps) {
    for (TestTrainer* trainer : *trainers) harness.Save(*trainer, step);
    harness.Settle();
    for (TestTrainer* trainer : *trainers) {
      told.committed = std::max(told.committed, EngineHarness::CommittedPower(*trainer));
      const auto report = trainer->script->ReportOf(step);
      told.complete &= report.has_value() && report->state >= 4;
    }
  }
  return told;
}

std::unique_ptr<SimDisk> NewDisk(uint64_t seed, bool links_supported = true) {
  SimDisk::Options options;
  options.seed = seed;
  options.links_supported = links_supported;
  auto disk = std::make_unique<SimDisk>(options);
  EXPECT_OK(disk->CreateDirectory("/root"));
  EXPECT_OK(disk->SyncDirectory("/"));
  return disk;
}

// The committed steps on `disk` are a prefix of kSteps that holds what was told.
void ExpectOldOrNew(const absl::StatusOr<std::vector<CheckpointId>>& found, const Told& told,
                    const std::string& where) {
  ASSERT_OK(found) << where;
  ASSERT_LE(found->size(), std::size(kSteps)) << where;
  for (size_t i = 0; i < found->size(); ++i) {
    EXPECT_EQ((*found)[i], (CheckpointId{Attempt{1}, Step{kSteps[i]}})) << where;
  }
  if (told.committed.has_value()) {
    ASSERT_FALSE(found->empty()) << where;
    EXPECT_GE(Value(found->back().step), *told.committed) << where;
  }
}

// A new agent on what is left: restores exactly what the reader found, and saves again.
void ExpectAgentGoesOn(SimDisk& disk, const std::vector<CheckpointId>& found,
                       const ReadBack& read_back, ReadBack::Parents parents,
                       const std::string& where) {
  EngineHarness harness(disk, {.root_exists = true, .writer = "after"});
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(kRanks));
  for (TestTrainer* trainer : trainers) {
    const RestoreOutcome outcome = harness.Restore(*trainer);
    if (found.empty()) {
      EXPECT_THAT(outcome.status, IsNotFound()) << where;
      continue;
    }
    ASSERT_OK(outcome.status) << where;
    EXPECT_EQ(outcome.checkpoint, found.back()) << where;
    EXPECT_TRUE(outcome.buffers ==
                StateAfter(*trainer->layout, trainer->rank, Value(found.back().step)))
        << where;
  }
  harness.SaveAll(trainers, 9);
  EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 9u) << where;
  ASSERT_OK_AND_ASSIGN(const auto after, read_back.CheckAll(disk, parents));
  EXPECT_EQ(after.size(), found.size() + 1) << where;
}

uint64_t EnumerateCuts(uint64_t seed, bool links_supported, const ReadBack& read_back) {
  uint64_t state_count = 0;
  for (uint64_t cut_after = 0;; ++cut_after) {
    const std::unique_ptr<SimDisk> disk = NewDisk(seed, links_supported);
    disk->CutPowerAfter(cut_after);
    const Told told = RunJob(*disk, seed);
    if (!disk->power_was_cut()) {
      EXPECT_EQ(told.committed, kSteps[1]);  // undisturbed, it commits both
      return state_count;
    }
    const std::vector<Survivors> choices = disk->LegalSurvivors();
    for (const Survivors& survivors : choices) {
      const std::string where = testing::PrintToString(seed) + ": cut after " +
                                testing::PrintToString(cut_after) +
                                " operations, survivors: " + survivors.description();
      const std::unique_ptr<SimDisk> after = disk->RebootedCopy(survivors);
      const auto found = read_back.CheckAll(*after);
      ExpectOldOrNew(found, told, where);
      if (testing::Test::HasFailure()) return state_count;
      ++state_count;
    }
    for (const Survivors& survivors : {Survivors::None(), Survivors::All()}) {
      const std::unique_ptr<SimDisk> after = disk->RebootedCopy(survivors);
      const auto found = read_back.CheckAll(*after);
      if (!found.ok()) return state_count;
      ExpectAgentGoesOn(*after, *found, read_back, ReadBack::Parents::kEach,
                        "cut after " + testing::PrintToString(cut_after) +
                            ", survivors: " + survivors.description());
      if (testing::Test::HasFailure()) return state_count;
    }
  }
}

TEST(CrashEnumeration, OldOrNewAndNeverLessThanReportedAtEveryCut) {
  const ReadBack read_back(kRanks);
  uint64_t state_count = 0;
  // Seed 0 completes transfers in order, the others in orders of their own.
  for (const uint64_t seed : {0, 1, 2, 3}) {
    state_count += EnumerateCuts(seed, /*links_supported=*/true, read_back);
  }
  std::printf("states: %llu\n", static_cast<unsigned long long>(state_count));
  EXPECT_GE(state_count, 5500u);
}

// Where names cannot be linked, what was torn under its final name is void.
TEST(CrashEnumeration, HoldsOnFileSystemsWithoutLinks) {
  const ReadBack read_back(kRanks);
  const uint64_t state_count = EnumerateCuts(0, /*links_supported=*/false, read_back);
  std::printf("states: %llu\n", static_cast<unsigned long long>(state_count));
  EXPECT_GE(state_count, 1500u);
}

// ---- Workers that die ----

// The worker is killed before every single operation of its on the disk, from the first save to the
// last, and a new one takes over from the keeper; trainers live on. Nothing is lost, and what is
// reported as surviving power does, whatever a power cut then leaves.
uint64_t EnumerateWorkerDeaths(bool links_supported, SimDisk::InFlight in_flight,
                               const ReadBack& read_back) {
  for (uint64_t stop_before = 0;; ++stop_before) {
    const std::string where = "links " + testing::PrintToString(links_supported) +
                              ", killed before operation " + testing::PrintToString(stop_before);
    const std::unique_ptr<SimDisk> disk = NewDisk(0, links_supported);
    InterruptingFileSystem worker(*disk);
    EngineHarness harness(*disk, {.root_exists = true, .file_system = &worker});
    const auto trainers = harness.Launch(kRanks);
    EXPECT_OK(trainers) << where;
    if (!trainers.ok()) return stop_before;
    worker.StopBefore(stop_before);
    bool died = false;
    for (const uint64_t step : kSteps) {
      for (TestTrainer* trainer : *trainers) EXPECT_TRUE(harness.Save(*trainer, step)) << where;
      while (!worker.is_stopped() && harness.executor().RunOne()) {
      }
      if (worker.is_stopped()) {
        died = true;
        worker.StartAgain();
        harness.CrashWorker(in_flight);
      }
      harness.Settle();
      for (const TestTrainer* trainer : *trainers) {
        EXPECT_EQ(EngineHarness::CommittedPower(*trainer), step) << where;
      }
      if (testing::Test::HasFailure()) return stop_before;
      // Now, when nothing else has made it durable.
      if (!died) continue;
      died = false;
      const Told told{.committed = step, .launched = true};
      disk->CutPowerNow();
      for (const Survivors& survivors : disk->LegalSurvivors()) {
        const std::unique_ptr<SimDisk> after = disk->RebootedCopy(survivors);
        ExpectOldOrNew(read_back.CheckAll(*after), told, where + ", " + survivors.description());
      }
      break;
    }
    if (testing::Test::HasFailure() || !disk->power_was_cut()) return stop_before;
  }
}

TEST(CrashEnumeration, AWorkerThatIsKilledBetweenAnyTwoOperationsLosesNothing) {
  const ReadBack read_back(kRanks);
  for (const bool links : {true, false}) {
    for (const SimDisk::InFlight in_flight : {SimDisk::InFlight::kAll, SimDisk::InFlight::kNone}) {
      const uint64_t deaths = EnumerateWorkerDeaths(links, in_flight, read_back);
      std::printf("links %d: %llu deaths\n", links, static_cast<unsigned long long>(deaths));
      EXPECT_GE(deaths, links ? 70u : 90u);
      if (HasFailure()) return;
    }
  }
}

// ---- Errors ----

// One operation fails, once, at every place where it occurs; then the power is cut. Whatever was
// reported is there; what is not there was reported as failed or never answered with success.
uint64_t EnumerateFaults(const NamedOperation& fault, const absl::Status& error,
                         bool links_supported, const ReadBack& read_back) {
  for (uint64_t index = 0;; ++index) {
    const std::unique_ptr<SimDisk> disk = NewDisk(0, links_supported);
    disk->FailOperation(fault.operation, index, error);
    const Told told = RunJob(*disk, 0);
    if (disk->fault_count() == 0) return index;
    const std::string where = std::string(fault.name) + " number " + testing::PrintToString(index) +
                              ": " + error.ToString();
    EXPECT_TRUE(told.complete) << where;
    disk->ClearFaults();
    const auto visible = read_back.CheckAll(*disk, ReadBack::Parents::kAny);
    EXPECT_OK(visible) << where;
    disk->CutPowerNow();
    for (const Survivors& survivors : disk->LegalSurvivors()) {
      const std::unique_ptr<SimDisk> after = disk->RebootedCopy(survivors);
      const auto found = read_back.CheckAll(*after, ReadBack::Parents::kAny);
      EXPECT_OK(found) << where << ", " << survivors.description();
      if (found.ok() && told.committed.has_value()) {
        EXPECT_FALSE(found->empty()) << where << ", " << survivors.description();
        if (!found->empty()) {
          EXPECT_GE(Value(found->back().step), *told.committed) << where;
        }
      }
      if (testing::Test::HasFailure()) return index;
    }
    const std::unique_ptr<SimDisk> after = disk->RebootedCopy(Survivors::All());
    const auto found = read_back.CheckAll(*after, ReadBack::Parents::kAny);
    if (found.ok()) ExpectAgentGoesOn(*after, *found, read_back, ReadBack::Parents::kAny, where);
    if (testing::Test::HasFailure()) return index;
  }
}

TEST(CrashEnumeration, AnErrorAtAnyOperationIsReportedAndHarmsNothing) {
  const ReadBack read_back(kRanks);
  uint64_t fault_count = 0;
  for (const bool links : {true, false}) {
    for (const absl::Status& error :
         {absl::DataLossError("EIO"), absl::ResourceExhaustedError("ENOSPC"),
          absl::PermissionDeniedError("EROFS")}) {
      for (const NamedOperation& fault : kSimDiskOperations) {
        const uint64_t count = EnumerateFaults(fault, error, links, read_back);
        std::printf("links %d, %s: %llu faults of %s\n", links,
                    std::string(error.message()).c_str(), static_cast<unsigned long long>(count),
                    fault.name);
        fault_count += count;
        if (HasFailure()) return;
      }
    }
  }
  EXPECT_GE(fault_count, 600u);
}

}  // namespace
}  // namespace holdfast
