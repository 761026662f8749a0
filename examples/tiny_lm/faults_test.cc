// Goal: every fault of the grammar is read as it is documented, everything else is refused by line
// and reason, and a changed file acts at the step it says.
#include "examples/tiny_lm/faults.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tiny_lm {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::vector<Fault> Parsed(const std::string& text) {
  absl::StatusOr<std::vector<Fault>> faults = ParseFaults(text);
  EXPECT_TRUE(faults.ok()) << faults.status();
  return faults.ok() ? *std::move(faults) : std::vector<Fault>();
}

TEST(Faults, EveryKindAndKeyIsReadAsDocumented) {
  const std::vector<Fault> faults = Parsed(
      "# a comment\n"
      "\n"
      "  slow-compute\trank=3 factor=1.5   # and one behind a fault\r\n"
      "slow-data rank=1,4 seconds=0.4 from_step=50 steps=100\n"
      "pause rank=all seconds=2 section=evaluation every=40 busy=1\n"
      "gpu-hang rank=2 from_step=120\n"
      "flush-stall rank=0 seconds=3\n"
      "never-enter rank=0\n"
      "endless-loop rank=0 seconds=1\n"
      "wrong-size rank=0\n"
      "wrong-kind rank=0\n"
      "nan rank=0\n"
      "exit rank=0 status=3");
  ASSERT_EQ(faults.size(), 11U);
  EXPECT_EQ(faults[0].kind, FaultKind::kSlowCompute);
  EXPECT_THAT(faults[0].ranks, ElementsAre(3U));
  EXPECT_EQ(faults[0].factor, 1.5);
  EXPECT_EQ(faults[0].steps, 0U) << "without end";
  EXPECT_EQ(faults[0].from_step, std::nullopt);
  EXPECT_EQ(faults[0].line, "slow-compute\trank=3 factor=1.5");
  EXPECT_THAT(faults[1].ranks, ElementsAre(1U, 4U));
  EXPECT_EQ(faults[1].duration, absl::Milliseconds(400));
  EXPECT_EQ(faults[1].from_step, 50U);
  EXPECT_EQ(faults[1].steps, 100U);
  EXPECT_TRUE(faults[2].ranks.empty());
  EXPECT_EQ(faults[2].section, "evaluation");
  EXPECT_EQ(faults[2].every, 40U);
  EXPECT_TRUE(faults[2].is_busy);
  EXPECT_EQ(faults[3].duration, absl::InfiniteDuration());
  EXPECT_EQ(faults[3].steps, 1U);
  EXPECT_EQ(faults[4].duration, absl::Seconds(3));
  EXPECT_EQ(faults[10].status, 3);
  const FaultKind kinds[] = {
      FaultKind::kSlowCompute, FaultKind::kSlowData,   FaultKind::kPause,
      FaultKind::kGpuHang,     FaultKind::kFlushStall, FaultKind::kNeverEnter,
      FaultKind::kEndlessLoop, FaultKind::kWrongSize,  FaultKind::kWrongKind,
      FaultKind::kNan,         FaultKind::kExit};
  for (size_t i = 0; i < faults.size(); ++i) {
    EXPECT_EQ(faults[i].kind, kinds[i]);
    EXPECT_EQ(faults[i].line.find(Name(kinds[i])), 0U);
  }
}

TEST(Faults, WhatIsNotUnderstoodIsRefusedByLineAndReason) {
  const std::pair<const char*, const char*> cases[] = {
      {"slow rank=1", "line 1: expected a kind of fault, found 'slow'"},
      {"\n\nnan", "line 3: nan: expected rank="},
      {"slow-compute rank=1", "slow-compute: expected factor="},
      {"pause rank=1", "pause: expected seconds="},
      {"slow-data rank=1", "slow-data: expected seconds="},
      {"nan rank=x", "rank: expected ranks as 3, 1,4 or all, found 'x'"},
      {"nan rank=", "rank: expected ranks"},
      {"nan rank=1,", "rank: expected ranks"},
      {"nan rank=-1", "rank: expected ranks"},
      {"nan rank=65536", "rank: expected ranks"},
      {"nan rank=1 rank=2", "expected each key once, found 'rank=2'"},
      {"nan rank=1 factor=2", "expected key=value with a key of nan, found 'factor=2'"},
      {"nan rank=1 steps", "steps: expected a number from 1"},
      {"nan rank=1 steps=0", "steps: expected a number from 1 to 4294967295, found '0'"},
      {"nan rank=1 from_step=4294967296", "from_step: expected a number"},
      {"nan rank=1 every=1.5", "every: expected a number"},
      {"slow-compute rank=1 factor=1", "factor: expected a number above 1, up to 1000"},
      {"slow-compute rank=1 factor=1001", "factor: expected"},
      {"slow-compute rank=1 factor=nan", "factor: expected"},
      {"slow-compute rank=1 factor=inf", "factor: expected"},
      {"pause rank=1 seconds=0", "seconds: expected a number above 0"},
      {"pause rank=1 seconds=-1", "seconds: expected"},
      {"pause rank=1 seconds=1e7", "seconds: expected"},
      {"pause rank=1 seconds=1 busy=2", "busy: expected a number from 0 to 1"},
      {"pause rank=1 seconds=1 section=", "section: expected a name of 1 to 31 bytes"},
      {"pause rank=1 seconds=1 section=a-name-that-is-longer-than-31-bytes", "section: expected"},
      {"exit rank=1 status=256", "status: expected a number from 0 to 255"},
  };
  for (const auto& [text, reason] : cases) {
    const absl::Status status = ParseFaults(text).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << text;
    EXPECT_THAT(std::string(status.message()), HasSubstr(reason)) << text;
  }
  std::string many;
  for (size_t i = 0; i < kFaultsMax; ++i) absl::StrAppend(&many, "nan rank=", i, "\n");
  EXPECT_EQ(Parsed(many).size(), kFaultsMax);
  EXPECT_THAT(std::string(ParseFaults(many + "nan rank=1").status().message()),
              HasSubstr("line 101: expected at most 100 faults"));
}

// Whatever the bytes: an answer, no crash (run under the sanitizers too).
TEST(Faults, AnyBytesAreReadOrRefused) {
  const uint32_t seed = 20260;
  std::mt19937 random(seed);
  const std::string good =
      "slow-compute rank=3 factor=1.5\npause rank=all seconds=2 section=e every=4 busy=1\n";
  size_t refused = 0;
  for (int round = 0; round < 20'000; ++round) {
    std::string text = good;
    for (int changes = 1 + static_cast<int>(random() % 4); changes > 0; --changes) {
      text[random() % text.size()] = static_cast<char>(random());
    }
    refused += ParseFaults(text.substr(0, random() % (text.size() + 1))).ok() ? 0 : 1;
  }
  EXPECT_GT(refused, 5'000U) << "seed " << seed;
}

class FaultFileTest : public testing::Test {
 protected:
  FaultFileTest() {
    std::string name = std::filesystem::temp_directory_path() / "faults-XXXXXX";
    directory_ = mkdtemp(name.data());
    path_ = directory_ / "faults";
  }
  ~FaultFileTest() override { std::filesystem::remove_all(directory_); }

  // As somebody should: the file is there whole, or not at all.
  void Write(const std::string& text) {
    std::ofstream(directory_ / "new") << text;
    std::filesystem::rename(directory_ / "new", path_);
  }
  std::vector<std::string> LinesIn(FaultFile& file, uint64_t step) {
    std::vector<std::string> lines;
    for (const Fault& fault : file.ActingIn(step)) lines.push_back(fault.line);
    return lines;
  }

  std::filesystem::path directory_;
  std::filesystem::path path_;
};

TEST_F(FaultFileTest, AFaultActsFromTheStepBeforeWhichItAppearsUntilItsLineIsGone) {
  FaultFile file(path_, 1);
  ASSERT_TRUE(file.Refresh(1).ok()) << "a file that is not there has no faults";
  EXPECT_TRUE(LinesIn(file, 1).empty());
  Write("slow-compute rank=1 factor=2\n");
  ASSERT_TRUE(file.Refresh(2).ok());
  EXPECT_THAT(LinesIn(file, 2), ElementsAre("slow-compute rank=1 factor=2"));
  // A line that stays keeps its first step; another one begins.
  Write("slow-compute rank=1 factor=2\nnan rank=all\nnan rank=0\n");
  ASSERT_TRUE(file.Refresh(5).ok());
  EXPECT_THAT(LinesIn(file, 5), ElementsAre("slow-compute rank=1 factor=2", "nan rank=all"));
  ASSERT_TRUE(file.Refresh(6).ok());
  EXPECT_THAT(LinesIn(file, 6), ElementsAre("slow-compute rank=1 factor=2")) << "nan acts once";
  std::filesystem::remove(path_);
  ASSERT_TRUE(file.Refresh(7).ok());
  EXPECT_TRUE(LinesIn(file, 7).empty());
}

TEST_F(FaultFileTest, StepsAndEveryAreCountedFromTheFirst) {
  Write("pause rank=0 seconds=1 from_step=10 steps=7 every=3\n");
  FaultFile file(path_, 0);
  ASSERT_TRUE(file.Refresh(1).ok());
  std::vector<uint64_t> acted;
  for (uint64_t step = 1; step < 40; ++step) {
    if (!file.ActingIn(step).empty()) acted.push_back(step);
  }
  EXPECT_THAT(acted, ElementsAre(10U, 13U, 16U));
}

TEST_F(FaultFileTest, ABadFileIsRefusedOnceAndWhatWasReadBeforeStays) {
  FaultFile file(path_, 0);
  Write("slow-compute rank=0 factor=2\n");
  ASSERT_TRUE(file.Refresh(1).ok());
  Write("slow-compute rank=0 factor=3\nwhat is this\n");
  const absl::Status refused = file.Refresh(2);
  EXPECT_TRUE(absl::IsInvalidArgument(refused));
  EXPECT_THAT(std::string(refused.message()), HasSubstr(path_.string() + ": line 2"));
  EXPECT_TRUE(file.Refresh(3).ok()) << "it has not changed since";
  EXPECT_THAT(LinesIn(file, 3), ElementsAre("slow-compute rank=0 factor=2"));
  Write(std::string(kFaultFileBytesMax + 1, '\n'));
  EXPECT_THAT(std::string(file.Refresh(4).message()), HasSubstr("at most 65536 bytes"));
  Write(std::string(kFaultFileBytesMax, '\n'));
  EXPECT_TRUE(file.Refresh(5).ok());
  std::filesystem::remove(path_);
  std::filesystem::create_directory(path_);
  EXPECT_FALSE(file.Refresh(6).ok()) << "a directory is no file";
}

TEST_F(FaultFileTest, WithoutAPathThereAreNone) {
  FaultFile file("", 0);
  ASSERT_TRUE(file.Refresh(1).ok());
  EXPECT_TRUE(file.ActingIn(1).empty());
}

}  // namespace
}  // namespace tiny_lm
