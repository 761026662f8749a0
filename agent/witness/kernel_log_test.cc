#include "agent/witness/kernel_log.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "io/epoll_loop.h"
#include "io/unique_fd.h"
#include "tests/support/sim_executor.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST(KernelLogTest, RecordsOfTheDeviceAreTakenApart) {
  EXPECT_EQ(TextOfKernelRecord("6,339,5140900,-;NVRM: Xid (PCI:0000:3b:00): 79\n SUBSYSTEM=pci\n"),
            "NVRM: Xid (PCI:0000:3b:00): 79");
  EXPECT_EQ(TextOfKernelRecord("6,339,5140900,-;"), "");
  EXPECT_EQ(TextOfKernelRecord("no record"), "");
}

// Time passes only when the test says so; the file is real.
class KernelLogFileTest : public testing::Test {
 protected:
  void Start() {
    log_ = std::make_unique<KernelLog>(
        executor_, path_, [this](std::string_view line) { lines_.emplace_back(line); });
    log_->Start();
  }
  void Append(const std::string& text) { std::ofstream(path_, std::ios::app) << text; }
  std::vector<std::string> Look() {
    lines_.clear();
    executor_.AdvanceTime(KernelLog::kLookEvery);
    return lines_;
  }

  const TemporaryDirectory directory_;
  const std::string path_ = directory_.Join("kern.log");
  SimExecutor executor_;
  std::vector<std::string> lines_;
  std::unique_ptr<KernelLog> log_;
};

TEST_F(KernelLogFileTest, WhatIsAppendedIsToldLineByLine) {
  Append("old\n");
  Start();
  EXPECT_OK(log_->state());
  EXPECT_THAT(Look(), IsEmpty());
  Append("one\ntwo\nthr");
  EXPECT_THAT(Look(), ElementsAre("one", "two"));
  EXPECT_THAT(Look(), IsEmpty());
  Append("ee\n\n");
  EXPECT_THAT(Look(), ElementsAre("three"));
}

TEST_F(KernelLogFileTest, WhatIsThereIsToldAtOnceIfSomebodyAsks) {
  Start();
  log_->ReadNow();
  EXPECT_THAT(lines_, IsEmpty());
  Append("made later\nhalf");
  log_->ReadNow();
  EXPECT_THAT(lines_, ElementsAre("made later"));
  Append(" a line\n");
  log_->ReadNow();
  EXPECT_THAT(lines_, ElementsAre("made later", "half a line"));
  EXPECT_THAT(Look(), IsEmpty());  // nothing is told twice
}

TEST_F(KernelLogFileTest, TheLastOfAFileIsItsEnd) {
  EXPECT_THAT(LastOfKernelLog(path_, 10), StatusIs(absl::StatusCode::kNotFound));
  Append("0123456789");
  EXPECT_THAT(LastOfKernelLog(path_, 0), IsOkAndHolds(""));
  EXPECT_THAT(LastOfKernelLog(path_, 3), IsOkAndHolds("789"));
  EXPECT_THAT(LastOfKernelLog(path_, 10), IsOkAndHolds("0123456789"));
  EXPECT_THAT(LastOfKernelLog(path_, 11), IsOkAndHolds("0123456789"));
  EXPECT_THAT(LastOfKernelLog(directory_.path(), 3), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST_F(KernelLogFileTest, ARotatedOrCutFileGoesOn) {
  Append("old\n");
  Start();
  Append("last of the first\n");
  ASSERT_EQ(rename(path_.c_str(), directory_.Join("kern.log.1").c_str()), 0);
  Append("first of the second\n");
  EXPECT_THAT(Look(), ElementsAre("last of the first"));
  EXPECT_THAT(Look(), ElementsAre("first of the second"));
  ASSERT_EQ(truncate(path_.c_str(), 0), 0);
  EXPECT_THAT(Look(), IsEmpty());
  Append("new\n");
  EXPECT_THAT(Look(), ElementsAre("new"));
}

TEST_F(KernelLogFileTest, AFileThatIsMadeLaterIsReadFromItsBeginning) {
  Start();
  EXPECT_THAT(log_->state(), StatusIs(absl::StatusCode::kNotFound, HasSubstr(path_)));
  EXPECT_THAT(Look(), IsEmpty());
  Append("first\n");
  Look();  // opens it
  EXPECT_OK(log_->state());
  EXPECT_THAT(Look(), ElementsAre("first"));
  ASSERT_EQ(unlink(path_.c_str()), 0);
  EXPECT_THAT(Look(), IsEmpty());
  Append("second\n");
  Look();
  EXPECT_THAT(Look(), ElementsAre("second"));
}

TEST_F(KernelLogFileTest, WhatIsNoLogIsSaid) {
  ASSERT_EQ(mkfifo(path_.c_str(), 0600), 0);
  Start();
  EXPECT_THAT(log_->state(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(path_)));
  EXPECT_THAT(Look(), IsEmpty());
}

TEST_F(KernelLogFileTest, AFileWithoutLinesTakesNoMemory) {
  Append("");
  Start();
  Append(std::string(3 * KernelLog::kBytesPerTurnMax, 'x') + "\nnext\n");
  std::vector<std::string> all;
  for (int i = 0; i < 5; ++i) {
    for (std::string& line : Look()) all.push_back(std::move(line));
  }
  EXPECT_THAT(all, ElementsAre(std::string(KernelLog::kLineBytesMax, 'x'), "next"));
}

// Oracle: whatever is appended in whatever pieces, the lines are those of the whole.
TEST_F(KernelLogFileTest, PiecesOfAnySizeAreTheLinesOfTheWhole) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937 random(seed);
  Append("");
  Start();
  std::vector<std::string> told, written;
  std::string line;
  for (int i = 0; i < 200; ++i) {
    std::string piece;
    for (uint32_t left = random() % 12; left > 0; --left) {
      if (random() % 5 == 0) {
        piece += '\n';
        if (!line.empty()) written.push_back(std::exchange(line, ""));
      } else {
        piece += 'a';
        line += 'a';
      }
    }
    Append(piece);
    for (std::string& one : Look()) told.push_back(std::move(one));
  }
  EXPECT_EQ(told, written);
  EXPECT_GT(told.size(), 50u);
}

TEST(KernelLogDeviceTest, LinesComeFromTheRealLog) {
  const UniqueFd writer(open(KernelLog::kDevice, O_WRONLY | O_CLOEXEC));
  if (!writer) GTEST_SKIP() << "this needs to write to /dev/kmsg, as root";
  const std::unique_ptr<EpollLoop> loop = *EpollLoop::Create(RealClock());
  const std::string mark = absl::StrCat("holdfast-test-", getpid());
  std::string seen;
  KernelLog log(*loop, KernelLog::kDevice, [&](std::string_view line) {
    if (line.find(mark) == std::string_view::npos) return;
    seen = line;
    loop->Stop();
  });
  log.Start();
  if (!log.state().ok()) GTEST_SKIP() << log.state().ToString();
  const std::string line = absl::StrCat("<6>", mark, " a line\n");
  ASSERT_EQ(write(writer.get(), line.data(), line.size()), static_cast<ssize_t>(line.size()));
  loop->RunAfter(absl::Seconds(60), [&] { loop->Stop(); });
  loop->Run();
  EXPECT_EQ(seen, mark + " a line");
}

}  // namespace
}  // namespace holdfast
