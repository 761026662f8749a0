#include "io/mount_probe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "io/errno_status.h"
#include "io/posix_file_system.h"
#include "tests/support/sim_disk.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using absl::StatusCode;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::StartsWith;

// The real file system, on which some things are refused.
class RefusingFileSystem final : public FileSystem {
 public:
  bool direct = true;
  bool links = true;
  uint64_t created_count = 0;

  absl::StatusOr<std::unique_ptr<WritableFile>> CreateNew(const std::string& path) override {
    return real_->CreateNew(path);
  }
  absl::StatusOr<std::unique_ptr<IoFile>> CreateSized(const std::string& path, uint64_t size_bytes,
                                                      Caching caching) override {
    if (caching == Caching::kDirect && !direct) return ErrnoStatus(EINVAL, "open", path);
    ++created_count;
    return real_->CreateSized(path, size_bytes, caching);
  }
  absl::StatusOr<std::unique_ptr<IoFile>> OpenForRead(const std::string& path,
                                                      Caching caching) override {
    return real_->OpenForRead(path, caching);
  }
  absl::StatusOr<std::string> ReadSmallFile(const std::string& path, uint64_t bytes_max) override {
    return real_->ReadSmallFile(path, bytes_max);
  }
  absl::Status Link(const std::string& from, const std::string& to) override {
    return links ? real_->Link(from, to) : ErrnoStatus(EOPNOTSUPP, "link", to);
  }
  absl::Status Unlink(const std::string& path) override { return real_->Unlink(path); }
  absl::Status SyncFile(const std::string& path) override { return real_->SyncFile(path); }
  absl::Status CreateDirectory(const std::string& path) override {
    return real_->CreateDirectory(path);
  }
  absl::Status SyncDirectory(const std::string& path) override {
    return real_->SyncDirectory(path);
  }
  absl::StatusOr<std::vector<std::string>> List(const std::string& path,
                                                size_t count_max) override {
    return real_->List(path, count_max);
  }
  absl::StatusOr<FileInfo> Stat(const std::string& path) override { return real_->Stat(path); }
  absl::StatusOr<Space> SpaceOf(const std::string& path) override { return real_->SpaceOf(path); }

 private:
  std::unique_ptr<FileSystem> real_ = NewPosixFileSystem();
};

TEST(MountProbe, ARealDirectoryIsTriedOnceAndLeftAsItWas) {
  const TemporaryDirectory directory;
  RefusingFileSystem file_system;
  MountProbe probe(file_system, "");
  ASSERT_OK_AND_ASSIGN(const MountFacts facts, probe.Probe(directory.path()));
  EXPECT_TRUE(facts.links_supported);
  EXPECT_EQ(facts.alignment_bytes & (facts.alignment_bytes - 1), 0u);
  EXPECT_GT(facts.alignment_bytes, 0u);
  EXPECT_EQ(facts.transfer_bytes, uint64_t{4} << 20);
  EXPECT_EQ(facts.direct_supported, facts.direct_refusal.empty());
  EXPECT_EQ(file_system.created_count, 1u);
  EXPECT_THAT(file_system.List(directory.path(), 10), IsOkAndHolds(IsEmpty()));
  EXPECT_THAT(probe.Probe(directory.path()), IsOkAndHolds(facts));
  EXPECT_EQ(file_system.created_count, 1u);
  EXPECT_EQ(probe.trial_count(), 1u);
}

TEST(MountProbe, TheFactsHold) {
  // What the probe promises of direct files, tried on the same mount.
  const TemporaryDirectory directory;
  const std::unique_ptr<FileSystem> file_system = NewPosixFileSystem();
  MountProbe probe(*file_system, "");
  ASSERT_OK_AND_ASSIGN(const MountFacts facts, probe.Probe(directory.path()));
  EXPECT_OK(file_system->CreateSized(directory.Join("a"), 4096, facts.caching()));
  EXPECT_EQ(file_system->Link(directory.Join("a"), directory.Join("b")).ok(),
            facts.links_supported);
}

TEST(MountProbe, ATmpfsIsNamed) {
  const TemporaryDirectory directory("/dev/shm");
  const std::unique_ptr<FileSystem> file_system = NewPosixFileSystem();
  MountProbe probe(*file_system, "");
  ASSERT_OK_AND_ASSIGN(const MountFacts facts, probe.Probe(directory.path()));
  EXPECT_EQ(facts.file_system, "tmpfs");
  EXPECT_THAT(facts.Describe(), StartsWith("tmpfs, "));
}

TEST(MountProbe, WhereDirectTransfersAreRefusedBufferedOnesServeAndTheReasonIsSaid) {
  const TemporaryDirectory directory;
  RefusingFileSystem file_system;
  file_system.direct = false;
  MountProbe probe(file_system, "");
  ASSERT_OK_AND_ASSIGN(const MountFacts facts, probe.Probe(directory.path()));
  EXPECT_FALSE(facts.direct_supported);
  EXPECT_EQ(facts.caching(), Caching::kBuffered);
  EXPECT_EQ(facts.transfers_in_flight, 8u);
  EXPECT_THAT(facts.direct_refusal, HasSubstr("EINVAL"));
  EXPECT_THAT(facts.Describe(), HasSubstr("buffered (open "));
  EXPECT_THAT(file_system.List(directory.path(), 10), IsOkAndHolds(IsEmpty()));
}

TEST(MountProbe, BlocksSmallerThanTheAlignmentAreNotForDirectTransfers) {
  MountFacts facts;
  facts.direct_refusal = "no such thing here";
  EXPECT_EQ(facts.DirectRefusal(4096), "no such thing here");
  facts = {};
  facts.direct_supported = true;
  facts.alignment_bytes = 16384;
  EXPECT_THAT(facts.DirectRefusal(4096), AllOf(HasSubstr("4096"), HasSubstr("16384")));
  EXPECT_NE(facts.DirectRefusal(8192), "");
  EXPECT_EQ(facts.DirectRefusal(16384), "");
  EXPECT_EQ(facts.DirectRefusal(uint64_t{4} << 20), "");
  facts.alignment_bytes = 512;
  EXPECT_EQ(facts.DirectRefusal(4096), "");
}

TEST(MountProbe, WhereLinksAreRefusedItSaysSo) {
  const TemporaryDirectory directory;
  RefusingFileSystem file_system;
  file_system.links = false;
  MountProbe probe(file_system, "");
  ASSERT_OK_AND_ASSIGN(const MountFacts facts, probe.Probe(directory.path()));
  EXPECT_FALSE(facts.links_supported);
  EXPECT_THAT(facts.Describe(), HasSubstr(", no links, "));
}

TEST(MountProbe, ADirectoryThatIsNotThereIsAnError) {
  const TemporaryDirectory directory;
  RefusingFileSystem file_system;
  MountProbe probe(file_system, "");
  EXPECT_THAT(probe.Probe(directory.Join("absent")), IsNotFound());
}

// --- on a simulated disk, where everything can be arranged ---

class SimProbeTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_OK(disk_.CreateDirectory("/root"));
    ASSERT_OK(disk_.CreateDirectory("/cache"));
    disk_.PutFile("/proc/sys/kernel/random/boot_id", "first-boot\n");
  }
  std::string CachePath() {
    const auto names = disk_.List("/cache", 10);
    CHECK(names.ok() && names->size() == 1);
    return "/cache/" + names->front();
  }
  // Of a new MountProbe, as after a restart.
  uint64_t TrialsOfARestart() {
    MountProbe probe(disk_, "/cache");
    const auto facts = probe.Probe("/root");
    CHECK_OK(facts.status());
    CHECK(*facts == facts_);
    return probe.trial_count();
  }
  void Probe() {
    MountProbe probe(disk_, "/cache");
    ASSERT_OK_AND_ASSIGN(facts_, probe.Probe("/root"));
    ASSERT_EQ(probe.trial_count(), 1u);
  }

  SimDisk disk_;
  MountFacts facts_;
};

TEST_F(SimProbeTest, TheCacheSparesTheNextAgentTheTrial) {
  Probe();
  EXPECT_EQ(TrialsOfARestart(), 0u);
  EXPECT_THAT(disk_.List("/root", 10), IsOkAndHolds(IsEmpty()));
}

TEST_F(SimProbeTest, AnotherBootAndAnotherMountAreTriedAnew) {
  Probe();
  disk_.PutFile("/proc/sys/kernel/random/boot_id", "second-boot\n");
  EXPECT_EQ(TrialsOfARestart(), 1u);
  MountProbe probe(disk_, "/cache");
  ASSERT_OK(disk_.CreateDirectory("/other"));
  EXPECT_OK(probe.Probe("/other"));
  EXPECT_EQ(probe.trial_count(), 1u);
}

TEST_F(SimProbeTest, AForeignCacheUnderOurNameIsIgnored) {
  Probe();
  const std::string path = CachePath();
  ASSERT_OK_AND_ASSIGN(const std::string foreign, disk_.Contents(path));
  disk_.RemoveFile(path);
  disk_.PutFile("/proc/sys/kernel/random/boot_id", "second-boot\n");
  Probe();
  disk_.PutFile(CachePath(), foreign);
  EXPECT_EQ(TrialsOfARestart(), 1u);
  EXPECT_EQ(TrialsOfARestart(), 0u);
}

TEST_F(SimProbeTest, ACacheTornAnywhereIsIgnoredAndReplaced) {
  disk_.SetDirectSupported(false);  // so that every field has a text
  Probe();
  const std::string path = CachePath();
  ASSERT_OK_AND_ASSIGN(const std::string whole, disk_.Contents(path));
  for (size_t length = 0; length < whole.size(); ++length) {
    disk_.PutFile(path, whole.substr(0, length));
    ASSERT_EQ(TrialsOfARestart(), 1u) << "cut to " << length;
    ASSERT_EQ(*disk_.Contents(path), whole);
  }
  disk_.PutFile(path, whole + "\n");
  EXPECT_EQ(TrialsOfARestart(), 1u);
}

TEST_F(SimProbeTest, EveryFlippedBitOfTheCacheIsNoticed) {
  Probe();
  const std::string path = CachePath();
  ASSERT_OK_AND_ASSIGN(const std::string whole, disk_.Contents(path));
  for (size_t bit = 0; bit < whole.size() * 8; ++bit) {
    disk_.PutFile(path, whole);
    disk_.FlipBit(path, bit / 8, static_cast<int>(bit % 8));
    ASSERT_EQ(TrialsOfARestart(), 1u) << "bit " << bit;
  }
}

TEST_F(SimProbeTest, ACacheThatCannotBeWrittenIsNoError) {
  MountProbe probe(disk_, "/absent");
  EXPECT_OK(probe.Probe("/root"));
  disk_.FailOperationsFrom(SimDisk::Operation::kCreateNew, 0, absl::DataLossError("EIO"));
  MountProbe again(disk_, "/cache");
  EXPECT_OK(again.Probe("/root"));
  EXPECT_EQ(disk_.fault_count(), 1u);
}

TEST_F(SimProbeTest, WhatACrashedTrialLeftIsNotInTheWay) {
  const std::string left = "/root/.holdfast-probe." + std::to_string(getpid()) + ".0";
  disk_.PutFile(left, "left");
  Probe();
  EXPECT_THAT(disk_.Contents(left), IsOkAndHolds(std::string("left")));
  EXPECT_THAT(disk_.List("/root", 10), IsOkAndHolds(testing::SizeIs(1)));
}

TEST_F(SimProbeTest, ATrialThatFailsIsAnErrorAndIsNotCached) {
  MountProbe probe(disk_, "/cache");
  disk_.FailOperation(SimDisk::Operation::kLink, 0, absl::DataLossError("EIO"));
  EXPECT_THAT(probe.Probe("/root"), StatusIs(StatusCode::kDataLoss));
  EXPECT_THAT(disk_.List("/root", 10), IsOkAndHolds(IsEmpty()));
  EXPECT_THAT(disk_.List("/cache", 10), IsOkAndHolds(IsEmpty()));
  EXPECT_OK(probe.Probe("/root"));
}

}  // namespace
}  // namespace holdfast
