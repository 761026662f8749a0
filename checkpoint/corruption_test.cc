// Flips every bit of every file of a small checkpoint, cuts every file short, swaps files, and puts
// another checkpoint's files in: whoever reads must say so (P3), and verify must name the place.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "checkpoint/catalog.h"
#include "checkpoint/engine_testing.h"
#include "checkpoint/readback_testing.h"
#include "checkpoint/verify.h"
#include "io/posix_file_system.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

constexpr char kFirst[] = "/root/job/s000000000001.a0001";
constexpr char kSecond[] = "/root/job/s000000000002.a0001";

// One job, 2 ranks, steps 1 and 2 committed.
void MakeJob(SimDisk& disk) {
  EngineHarness harness(disk, {});
  const auto trainers = harness.Launch(2);
  ASSERT_OK(trainers);
  harness.SaveAll(*trainers, 1);
  harness.SaveAll(*trainers, 2);
  ASSERT_EQ(EngineHarness::CommittedPower(*(*trainers)[0]), 2u);
}

absl::StatusOr<VerifyReport> Verify(SimDisk& disk, CheckpointId id) {
  const absl::StatusOr<Catalog> catalog = ReadCatalog(disk, "/root", "job");
  if (!catalog.ok()) return catalog.status();
  return VerifyCheckpoint(disk, SimReadAt(disk), *catalog->Find(id), VerifyOptions{});
}

constexpr CheckpointId kSecondId{Attempt{1}, Step{2}};

TEST(Corruption, EveryFlippedBitIsDetected) {
  SimDisk disk;
  MakeJob(disk);
  uint64_t bytes = 0;
  uint64_t flips = 0;
  uint64_t unread = 0;
  for (const std::string& path : disk.AllFiles()) {
    if (!absl::StartsWith(path, kSecond)) continue;
    const std::string contents = disk.Contents(path).value();
    bytes += contents.size();
    for (uint64_t offset = 0; offset < contents.size(); ++offset) {
      for (int bit = 0; bit < 8; ++bit) {
        disk.FlipBit(path, offset, bit);
        const absl::StatusOr<VerifyReport> report = Verify(disk, kSecondId);
        ASSERT_OK(report) << path << " " << offset << "." << bit;
        // In an image where no tensor and no blob lies, no restore reads; it is reported all the
        // same.
        ASSERT_TRUE(report->verdict == Verdict::kDamaged ||
                    report->verdict == Verdict::kDamagedUnread)
            << path << " " << offset << "." << bit;
        ASSERT_TRUE(absl::EndsWith(path, report->findings.front().file))
            << path << " " << report->findings.front().file;
        unread += report->verdict == Verdict::kDamagedUnread ? 1 : 0;
        disk.FlipBit(path, offset, bit);
        ++flips;
      }
    }
  }
  std::printf("%llu bytes, %llu flips, %llu of them in blocks that no restore reads\n",
              static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(flips),
              static_cast<unsigned long long>(unread));
  EXPECT_LE(bytes, 65536u);
  EXPECT_EQ(flips, 8 * bytes);
  ASSERT_OK_AND_ASSIGN(const VerifyReport good, Verify(disk, kSecondId));
  EXPECT_EQ(good.verdict, Verdict::kGood);
}

// A manifest and a file that agree about a size that nobody has memory for: a hole takes no space.
TEST(Corruption, AnIndexOfAnImpossibleSizeIsDamageAndNotAnAllocation) {
  SimDisk disk;
  MakeJob(disk);
  ASSERT_OK_AND_ASSIGN(const Catalog catalog, ReadCatalog(disk, "/root", "job"));
  Manifest manifest = *catalog.Find(kSecondId)->manifest;
  const TemporaryDirectory directory;
  const std::string path = directory.path() + "/INDEX";
  std::ofstream(path).close();
  const std::unique_ptr<FileSystem> file_system = NewPosixFileSystem();
  for (const uint64_t bytes : {uint64_t{1} << 40, uint64_t{INT64_MAX}}) {
    manifest.index_bytes = bytes;
    // Not every file system takes the larger one.
    if (truncate(path.c_str(), static_cast<off_t>(bytes)) != 0) {
      ASSERT_EQ(bytes, uint64_t{INT64_MAX});
    }
    EXPECT_THAT(LoadIndex(*file_system, directory.path(), manifest),
                StatusIs(absl::StatusCode::kDataLoss,
                         testing::AllOf(testing::HasSubstr(std::to_string(bytes)),
                                        testing::HasSubstr(std::to_string(kIndexBytesMax)))));
  }
}

// The job's own records: an agent refuses them, and the catalog refuses JOB.json.
TEST(Corruption, EveryFlippedBitOfTheJobsRecordsIsDetected) {
  SimDisk disk;
  MakeJob(disk);
  SimExecutor executor;
  FileStore store(disk, executor, {.root = "/root", .writer = "t", .make_uuid = [] {
                                     return std::string("fedcba98-89ab-4cde-8f01-23456789abcd");
                                   }});
  const std::string job_path = "/root/job/JOB.json";
  const std::string attempt_path = "/root/job/store/attempt-1.json";
  const std::string restore_path = "/root/job/store/attempt-1.restore.json";
  for (const std::string& path : {job_path, attempt_path, restore_path}) {
    const std::string contents = disk.Contents(path).value();
    for (uint64_t offset = 0; offset < contents.size(); ++offset) {
      for (int bit = 0; bit < 8; ++bit) {
        disk.FlipBit(path, offset, bit);
        absl::StatusCode code;
        if (path == job_path) {
          code = store.JobUuid("job").status().code();
          EXPECT_EQ(ReadCatalog(disk, "/root", "job").status().code(), absl::StatusCode::kDataLoss);
        } else if (path == attempt_path) {
          code = store.NewestAttempt("job").status().code();
        } else {
          code = store.GetRestorePoint("job", Attempt{1}).status().code();
        }
        ASSERT_EQ(code, absl::StatusCode::kDataLoss) << path << " " << offset << "." << bit;
        disk.FlipBit(path, offset, bit);
      }
    }
  }
}

TEST(Corruption, EveryTruncationIsDetected) {
  SimDisk disk;
  MakeJob(disk);
  for (const std::string& path : disk.AllFiles()) {
    if (!absl::StartsWith(path, kSecond)) continue;
    const std::string contents = disk.Contents(path).value();
    const uint64_t stride = contents.size() > 4096 ? 97 : 1;
    for (uint64_t size = 0; size < contents.size(); size += stride) {
      disk.TruncateFile(path, size);
      ASSERT_OK_AND_ASSIGN(const VerifyReport report, Verify(disk, kSecondId));
      ASSERT_EQ(report.verdict, Verdict::kDamaged) << path << " " << size;
      disk.RemoveFile(path);
      disk.PutFile(path, contents);
    }
    disk.RemoveFile(path);
    disk.PutFile(path, contents + "x");
    ASSERT_OK_AND_ASSIGN(const VerifyReport longer, Verify(disk, kSecondId));
    EXPECT_EQ(longer.verdict, Verdict::kDamaged) << path;
    disk.RemoveFile(path);
    disk.PutFile(path, contents);
  }
}

TEST(Corruption, SwappedAndForeignFilesAreDetected) {
  SimDisk disk;
  MakeJob(disk);
  const auto replace = [&](const std::string& path, const std::string& bytes) {
    disk.RemoveFile(path);
    disk.PutFile(path, bytes);
  };
  const std::string second(kSecond);
  const std::string first(kFirst);
  // Two ranks' images against each other, and everything that step 1 has under the same name.
  const std::string rank0 = disk.Contents(second + "/rank-00000.h5").value();
  const std::string rank1 = disk.Contents(second + "/rank-00001.h5").value();
  replace(second + "/rank-00000.h5", rank1);
  replace(second + "/rank-00001.h5", rank0);
  ASSERT_OK_AND_ASSIGN(const VerifyReport swapped, Verify(disk, kSecondId));
  EXPECT_EQ(swapped.verdict, Verdict::kDamaged);
  replace(second + "/rank-00000.h5", rank0);
  replace(second + "/rank-00001.h5", rank1);
  for (const std::string name : {"rank-00000.h5", "INDEX", "MANIFEST.json"}) {
    const std::string mine = disk.Contents(second + "/" + name).value();
    replace(second + "/" + name, disk.Contents(first + "/" + name).value());
    ASSERT_OK_AND_ASSIGN(const VerifyReport foreign, Verify(disk, kSecondId));
    EXPECT_EQ(foreign.verdict, Verdict::kDamaged) << name;
    EXPECT_FALSE(foreign.findings.front().text.empty());
    if (name == "MANIFEST.json") {
      EXPECT_THAT(foreign.findings.front().text,
                  testing::AllOf(testing::HasSubstr("expected step 2"),
                                 testing::HasSubstr("found step 1")));
      // And nobody restores an older one in silence.
      EngineHarness harness(disk, {.root_exists = true, .writer = "x"});
      ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2));
      EXPECT_THAT(harness.Restore(*trainers[0]).status,
                  StatusIs(absl::StatusCode::kDataLoss, testing::HasSubstr("step 2 of attempt 1")));
    }
    replace(second + "/" + name, mine);
  }
}

}  // namespace
}  // namespace holdfast
