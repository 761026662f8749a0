// Nothing that the catalog says depends on a clock (P9).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "checkpoint/catalog.h"
#include "io/posix_file_system.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

constexpr char kJob[] = "job";
constexpr char kUuid[] = "00112233-4455-4677-8899-aabbccddeeff";

struct Commit {
  CheckpointId id;
  std::optional<CheckpointId> parent;
};

CheckpointId Id(uint32_t attempt, uint64_t step) { return {Attempt{attempt}, Step{step}}; }

class CatalogClockTest : public testing::Test {
 protected:
  CatalogClockTest() { std::filesystem::create_directory(JobPath("")); }

  std::string JobPath(const std::string& name) const {
    return absl::StrCat(root_.path(), "/", kJob, "/", name);
  }
  // Replaces what is there, with `hours` as the time of the record and of its file.
  static void Write(const std::string& path, const std::string& bytes, int hours) {
    std::ofstream(path, std::ios::trunc) << bytes;
    std::filesystem::last_write_time(
        path, std::filesystem::file_time_type(std::chrono::hours(200'000 + hours)));
  }
  static absl::Time At(int hours) { return absl::UnixEpoch() + absl::Hours(400'000 + hours); }

  void WriteJob(int hours) {
    JobRecord job{.job = kJob, .job_uuid = kUuid, .created_by = "test", .created_at = At(hours)};
    Write(JobPath(kJobFileName), EncodeJobRecord(job), hours);
  }
  void WriteManifest(const Commit& commit, int hours) {
    Manifest manifest;
    manifest.job = kJob;
    manifest.job_uuid = kUuid;
    manifest.checkpoint = commit.id;
    manifest.parent = commit.parent;
    manifest.world_size = 1;
    manifest.survives = {.process = true, .power = true};
    manifest.index_bytes = 1000;
    manifest.images = {{.file = ImageFileName(Rank{0}, 0), .bytes = 4096, .checksum_root = 7}};
    manifest.created_by = "test";
    manifest.created_at = At(hours);
    const std::string directory = JobPath(CheckpointDirectoryName(commit.id));
    std::filesystem::create_directory(directory);
    Write(absl::StrCat(directory, "/", kManifestFileName), EncodeManifest(manifest), hours);
  }

  TemporaryDirectory root_;
  std::unique_ptr<FileSystem> file_system_ = NewPosixFileSystem();
};

// Goal: no clock orders anything (P9). Method: all orders in which the wall clocks of those who
// wrote a job's files, and the files' own times, may have put them, forwards and backwards
// included.
TEST_F(CatalogClockTest, TheNewestAndItsBranchAreTheSameWhateverAllClocksSaid) {
  // Attempt 2 went on from step 10 and left step 20 of attempt 1 behind.
  const std::vector<Commit> commits = {{Id(1, 10), std::nullopt},
                                       {Id(1, 20), Id(1, 10)},
                                       {Id(2, 15), Id(1, 10)},
                                       {Id(2, 25), Id(2, 15)}};
  std::vector<int> hours = {0, 1, 2, 3, 4};  // of JOB.json and the commits
  size_t orders = 0;
  do {
    WriteJob(hours[0]);
    for (size_t i = 0; i < commits.size(); ++i) WriteManifest(commits[i], hours[i + 1]);
    const absl::StatusOr<Catalog> catalog = ReadCatalog(*file_system_, root_.path(), kJob);
    ASSERT_TRUE(catalog.ok()) << catalog.status();
    std::vector<CheckpointId> ids;
    std::vector<Branch> branch;
    for (const CatalogEntry& entry : catalog->entries) {
      ids.push_back(entry.id);
      branch.push_back(entry.branch);
    }
    EXPECT_THAT(ids, testing::ElementsAre(Id(1, 10), Id(1, 20), Id(2, 15), Id(2, 25)));
    EXPECT_THAT(branch, testing::ElementsAre(Branch::kCurrent, Branch::kAbandoned, Branch::kCurrent,
                                             Branch::kCurrent));
    EXPECT_EQ(catalog->outcome, Lineage::Outcome::kFound);
    EXPECT_EQ(catalog->newest, 3u);
    ++orders;
  } while (!HasFailure() && std::next_permutation(hours.begin(), hours.end()));
  EXPECT_EQ(orders, 120u);
}

// The HEAD that counts is the one with the greatest number.
TEST_F(CatalogClockTest, TheGreatestHeadCountsWhateverTheClocksSaid) {
  WriteJob(0);
  WriteManifest({Id(1, 10), std::nullopt}, 5);
  WriteManifest({Id(1, 20), Id(1, 10)}, 4);
  WriteManifest({Id(1, 30), Id(1, 20)}, 3);
  for (const bool forwards : {true, false}) {
    for (uint32_t number : {1u, 2u}) {
      Head head;
      head.number = number;
      head.job_uuid = kUuid;
      head.to = number == 1 ? Id(1, 10) : Id(1, 20);
      head.abandons_attempts_up_to = Attempt{1};
      head.created_by = "test";
      const int hours = static_cast<int>(forwards ? number : 10 - number);
      head.created_at = At(hours);
      Write(JobPath(HeadFileName(number)), EncodeHead(head), hours);
    }
    const absl::StatusOr<Catalog> catalog = ReadCatalog(*file_system_, root_.path(), kJob);
    ASSERT_TRUE(catalog.ok()) << catalog.status();
    ASSERT_TRUE(catalog->newest.has_value());
    EXPECT_EQ(catalog->entries[*catalog->newest].id, Id(1, 20)) << forwards;
  }
}

}  // namespace
}  // namespace holdfast
