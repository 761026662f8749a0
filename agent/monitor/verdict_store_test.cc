#include "agent/monitor/verdict_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "monitor/finding_record.h"
#include "tests/support/sim_disk.h"
#include "tests/support/sim_executor.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using monitor::FindingLog;
using monitor::FindingRecord;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr char kDirectory[] = "/state/monitor";

// A log whose every change is stored, as in the service; each life is a worker's.
class Life {
 public:
  explicit Life(FileSystem& disk)
      : store_({kDirectory, [this] { return log_.Records(); },
                [this](const std::string& text) { warnings.push_back(text); }},
               disk, executor_) {
    for (FindingRecord& record : store_.Load()) log_.Restore(std::move(record));
  }

  // The finding `id` is open with this grade; all others of the log are withdrawn. Durable, if the
  // disk does as it is told.
  void Open(const std::string& id, monitor::Grade grade) {
    monitor::Finding finding;
    finding.id = id;
    finding.suspects = {{Rank{static_cast<uint32_t>(id[0])}, Rank{0}}};
    finding.grade = grade;
    finding.sentence = "It is " + id;
    Store(log_.Update("job", "", {finding}, {absl::Seconds(1), absl::UnixEpoch()}));
    executor_.RunUntilIdle();
  }
  void OpenWithoutWaiting(const std::string& id) {
    monitor::Finding finding;
    finding.id = id;
    finding.suspects = {{Rank{static_cast<uint32_t>(id[0])}, Rank{0}}};
    Store(log_.Update("job", "", {finding}, {absl::Seconds(1), absl::UnixEpoch()}));
  }
  void Wait() { executor_.RunUntilIdle(); }

  const FindingLog& log() const { return log_; }
  const VerdictStore& store() const { return store_; }
  std::vector<std::string> warnings;

 private:
  void Store(const std::vector<FindingLog::Told>& told) {
    for (const FindingLog::Told& one : told) store_.Put(*one.record);
  }
  SimExecutor executor_;
  FindingLog log_;
  VerdictStore store_;
};

std::unique_ptr<SimDisk> NewDisk() {
  auto disk = std::make_unique<SimDisk>();
  EXPECT_OK(disk->CreateDirectory("/state"));
  EXPECT_OK(disk->SyncDirectory("/"));
  return disk;
}

std::vector<std::string> FilesOf(const SimDisk& disk) {
  std::vector<std::string> files;
  for (const std::string& path : disk.AllFiles()) {
    if (path.starts_with(kDirectory)) files.push_back(path);
  }
  return files;
}

TEST(VerdictStoreTest, FindingsOutliveTheWorkerWithTheirHistory) {
  const auto disk = NewDisk();
  {
    Life life(*disk);
    EXPECT_THAT(FilesOf(*disk), IsEmpty());  // who finds nothing writes nothing
    life.Open("a", monitor::Grade::kSuspicion);
    life.Open("a", monitor::Grade::kVerdict);
    life.Open("b", monitor::Grade::kSuspicion);
  }
  Life life(*disk);
  EXPECT_THAT(life.warnings, IsEmpty());
  ASSERT_EQ(life.log().size(), 2u);
  const FindingRecord& a = *life.log().Find("a");
  EXPECT_EQ(a.state, monitor::FindingState::kWithdrawn);
  EXPECT_EQ(a.finding.grade, monitor::Grade::kVerdict);
  EXPECT_EQ(a.finding.sentence, "It is a");
  EXPECT_THAT(a.history, SizeIs(3));
  EXPECT_EQ(life.log().Find("b")->state, monitor::FindingState::kUnwatched);
  // The next life's file replaces the one before.
  life.Open("c", monitor::Grade::kVerdict);
  EXPECT_THAT(FilesOf(*disk), SizeIs(1));
  EXPECT_EQ(Life(*disk).log().size(), 3u);
}

// Goal: whatever the moment of a power cut, all that was durable before is there, and nothing else
// than what was put.
TEST(VerdictStoreTest, APowerCutAtAnyOperationLosesOnlyWhatWasNotDurable) {
  int cuts = 0;
  for (uint64_t crash_point = 0;; ++crash_point) {
    const auto disk = NewDisk();
    {
      Life before(*disk);
      before.Open("a", monitor::Grade::kVerdict);
    }
    disk->CutPowerAfter(crash_point);
    Life life(*disk);
    int durable = 0;
    for (const char* id : {"b", "c", "d"}) {
      life.Open(id, monitor::Grade::kVerdict);
      if (disk->power_was_cut()) break;
      ++durable;
    }
    if (!disk->power_was_cut()) {
      EXPECT_GE(crash_point, 7u);  // not vacuous: create, append, sync, sync directory, ...
      break;
    }
    ++cuts;
    for (const Survivors& survivors : disk->LegalSurvivors()) {
      const auto after = disk->RebootedCopy(survivors);
      Life reader(*after);
      ASSERT_NE(reader.log().Find("a"), nullptr) << "crash point " << crash_point;
      EXPECT_GE(reader.log().size(), 1u + static_cast<size_t>(durable));
      EXPECT_LE(reader.log().size(), 4u);
      // And it goes on.
      reader.Open("e", monitor::Grade::kVerdict);
      EXPECT_NE(Life(*after).log().Find("e"), nullptr);
      EXPECT_NE(Life(*after).log().Find("a"), nullptr);
    }
  }
  EXPECT_GE(cuts, 7);
}

TEST(VerdictStoreTest, EveryDamageLosesOneLineAndIsSaid) {
  const auto disk = NewDisk();
  {
    Life life(*disk);
    for (const char* id : {"a", "b", "c"}) life.Open(id, monitor::Grade::kVerdict);
  }
  const std::string path = FilesOf(*disk).at(0);
  const std::string good = *disk->Contents(path);
  size_t lost = 0;
  for (size_t at = 0; at < good.size(); at += 13) {
    std::string damaged = good;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x20);
    disk->PutFile(path, damaged);
    Life life(*disk);
    EXPECT_THAT(life.warnings, SizeIs(::testing::Ge(1u))) << at;
    EXPECT_GE(life.log().size(), 2u) << at;
    lost += 3 - life.log().size();
  }
  EXPECT_GT(lost, 0u);
  for (size_t bytes = 0; bytes < good.size(); bytes += 17) {
    disk->PutFile(path, good.substr(0, bytes));
    Life life(*disk);
    const bool ends_in_a_line = bytes > 0 && good[bytes - 1] != '\n';
    EXPECT_EQ(life.warnings.size(), ends_in_a_line ? 1u : 0u) << bytes;
  }
  disk->PutFile(path, good + "half a li");
  Life life(*disk);
  ASSERT_THAT(life.warnings, SizeIs(1));
  EXPECT_THAT(life.warnings[0], HasSubstr("last 9 bytes are no whole line"));
  EXPECT_EQ(life.log().size(), 3u);
}

TEST(VerdictStoreTest, FilesThatAreNotItsOwnAreLeftAlone) {
  const auto disk = NewDisk();
  for (const char* name : {"notes.txt", "findings-.jsonl", "findings-0.jsonl", "findings-1x.jsonl",
                           "findings-99999999999999999999999.jsonl"}) {
    disk->PutFile(std::string(kDirectory) + "/" + name, "mine");
  }
  Life life(*disk);
  EXPECT_THAT(life.warnings, IsEmpty());
  life.Open("a", monitor::Grade::kVerdict);
  EXPECT_THAT(FilesOf(*disk), SizeIs(6));
}

TEST(VerdictStoreTest, AFailedWriteIsSaidOnceAndTheNextOneBeginsAnew) {
  for (const auto operation :
       {SimDisk::Operation::kCreateNew, SimDisk::Operation::kAppend, SimDisk::Operation::kSyncFile,
        SimDisk::Operation::kSyncDirectory, SimDisk::Operation::kCreateDirectory}) {
    const auto disk = NewDisk();
    Life life(*disk);
    disk->FailOperationsFrom(operation, 0, absl::ResourceExhaustedError("no space"), "monitor");
    for (int i = 0; i < 3; ++i) life.Open(std::to_string(i), monitor::Grade::kVerdict);
    EXPECT_GT(disk->fault_count(), 0u);
    EXPECT_EQ(life.store().failure_count(), 3u);
    ASSERT_THAT(life.warnings, SizeIs(1));
    EXPECT_THAT(life.warnings[0], HasSubstr("no space"));
    disk->ClearFaults();
    life.Open("last", monitor::Grade::kVerdict);
    EXPECT_EQ(Life(*disk).log().size(), 4u);
    EXPECT_THAT(FilesOf(*disk), SizeIs(1));
  }
}

TEST(VerdictStoreTest, AFileThatGrowsIsReplaced) {
  const auto disk = NewDisk();
  Life life(*disk);
  const std::string long_id(20'000, 'x');
  uint64_t largest = 0;
  for (int i = 0; i < 60; ++i) {
    life.Open(long_id, i % 2 == 0 ? monitor::Grade::kSuspicion : monitor::Grade::kVerdict);
    life.Open("b", monitor::Grade::kSuspicion);
    ASSERT_THAT(FilesOf(*disk), SizeIs(1));
    largest = std::max<uint64_t>(largest, disk->Contents(FilesOf(*disk)[0])->size());
  }
  EXPECT_GT(largest, VerdictStore::kFileBytes);
  EXPECT_LT(largest, 2 * VerdictStore::kFileBytes);
  EXPECT_EQ(Life(*disk).log().size(), 2u);
}

TEST(VerdictStoreTest, WhatIsPutWhileAnotherIsWrittenIsWrittenNext) {
  const auto disk = NewDisk();
  Life life(*disk);
  for (int i = 0; i < 10; ++i) life.OpenWithoutWaiting(std::to_string(i));
  EXPECT_GT(life.store().waiting_count(), 0u);
  life.Wait();
  EXPECT_EQ(life.store().waiting_count(), 0u);
  EXPECT_EQ(Life(*disk).log().size(), 10u);
}

}  // namespace
}  // namespace holdfast
