// The program holdfast-witness on real processes and on a model of NVML, and what becomes of one
// that hangs, crashes or does not exist.
#include "agent/witness/helper.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/clock.h"
#include "monitor/witness/gpu.h"
#include "monitor/witness/stacks.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr absl::Duration kPatience = absl::Seconds(60);

absl::StatusOr<std::string> RunOne(const std::vector<std::string>& arguments,
                                   absl::Duration deadline = kPatience,
                                   const std::string& path = HOLDFAST_TEST_WITNESS) {
  return RunHelpers(path, {arguments}, {deadline, deadline}).front();
}

// Where a child of the test stands. External, so that the symbol table names it.
[[gnu::noinline]] void StandHere(int ready) {
  const char byte = 1;
  CHECK(write(ready, &byte, 1) == 1);
  for (;;) pause();
}

// A child that stands in StandHere, asleep, until it goes.
class StandingChild {
 public:
  StandingChild() {
    int ends[2];
    CHECK(pipe(ends) == 0);
    pid_ = fork();
    CHECK(pid_ >= 0);
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      StandHere(ends[1]);
      _exit(0);
    }
    char byte = 0;
    CHECK(read(ends[0], &byte, 1) == 1);
    close(ends[0]);
    close(ends[1]);
    AwaitState('S');  // it has written: what it sleeps in is the pause
  }
  ~StandingChild() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  pid_t pid() const { return pid_; }
  std::string Status() const {
    std::ifstream file(absl::StrCat("/proc/", pid_, "/status"));
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  }
  // Whoever was held and is let go runs for a moment before it sleeps, or is stopped, again.
  void AwaitState(char state) const {
    const absl::Duration end = RealClock().Elapsed() + kPatience;
    while (Status().find(absl::StrCat("State:\t", std::string(1, state))) == std::string::npos) {
      ASSERT_LT(RealClock().Elapsed(), end) << Status();
      poll(nullptr, 0, 1);
    }
  }

 private:
  pid_t pid_ = -1;
};

TEST(HelperTest, NativeStacksNameFunctionAndModule) {
  const StandingChild child;
  const auto text = RunOne({"stacks", absl::StrCat(child.pid())});
  ASSERT_TRUE(text.ok()) << text.status().ToString();
  const std::vector<monitor::ThreadStack> threads = monitor::ParseNativeStacks(*text);
  ASSERT_GE(threads.size(), 1u);
  EXPECT_TRUE(threads[0].main);
  EXPECT_EQ(threads[0].thread, static_cast<uint64_t>(child.pid()));
  EXPECT_THAT(threads[0].frames, Contains(HasSubstr("StandHere (witness_helper_test)"))) << *text;
  EXPECT_THAT(threads[0].frames, Contains(HasSubstr("pause (libc.so.6)"))) << *text;
  EXPECT_THAT(*text, HasSubstr("# held "));
  // It goes on as before, and nobody holds it.
  child.AwaitState('S');
  EXPECT_THAT(child.Status(), HasSubstr("TracerPid:\t0"));
}

TEST(HelperTest, AStoppedProcessStaysStopped) {
  const StandingChild child;
  ASSERT_EQ(kill(child.pid(), SIGSTOP), 0);
  ASSERT_EQ(waitpid(child.pid(), nullptr, WUNTRACED), child.pid());
  const auto text = RunOne({"stacks", absl::StrCat(child.pid())});
  ASSERT_TRUE(text.ok()) << text.status().ToString();
  EXPECT_THAT(*text, HasSubstr("StandHere"));
  child.AwaitState('T');
}

TEST(HelperTest, WhatCannotBeLookedAtIsSaid) {
  const auto none = RunOne({"stacks", "2147483646"});
  EXPECT_EQ(none.status().code(), absl::StatusCode::kNotFound) << none.status().ToString();
  EXPECT_EQ(RunOne({"stacks", "x"}).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(RunOne({"stacks", "-1"}).status().code(), absl::StatusCode::kUnavailable);
  std::ifstream file("/proc/2/comm");
  std::string name;
  if (!(file >> name) || name != "kthreadd") {
    GTEST_SKIP() << "no kernel thread to be seen here, which nobody may trace";
  }
  const auto kernel = RunOne({"stacks", "2"});
  EXPECT_EQ(kernel.status().code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(kernel.status().ToString(), HasSubstr("ptrace_scope"));
}

TEST(HelperTest, WhoHangsIsEndedAndWhoCrashesIsSaid) {
  const std::string shell = "/bin/sh";
  const auto late = RunOne({"-c", "exec cat /dev/zero >/dev/null"}, absl::Milliseconds(200), shell);
  EXPECT_EQ(late.status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(RunOne({"-c", "kill -SEGV $$"}, kPatience, shell).status().ToString(),
              HasSubstr("signal 11"));
  EXPECT_THAT(RunOne({"-c", "echo why >&2; exit 3"}, kPatience, shell).status().ToString(),
              StartsWith("PERMISSION_DENIED: why"));
  EXPECT_EQ(RunOne({"-c", "head -c 3000000 /dev/zero"}, kPatience, shell)->size(),
            kHelperOutputBytesMax);
  EXPECT_EQ(RunOne({}, kPatience, "/nonexistent/holdfast-witness").status().code(),
            absl::StatusCode::kUnavailable);
}

// Each run notes that it is there before it counts those that are, and takes the note back before
// it ends.
TEST(HelperTest, AFewRunAtOnceAndEachHasItsOwnOutcome) {
  const std::string shell = "/bin/sh";
  const TemporaryDirectory directory;
  std::vector<std::vector<std::string>> runs;
  constexpr int kRuns = 9;
  for (int i = 0; i < kRuns; ++i) {
    const std::string mine = directory.Join(absl::StrCat("run-", i));
    runs.push_back({"-c", absl::StrCat("touch ", mine, "; ls ", directory.path(), " | wc -l; rm ",
                                       mine, i == 4 ? "; exit 5" : "")});
  }
  const auto outcomes = RunHelpers(shell, runs, {kPatience, kPatience});
  ASSERT_EQ(outcomes.size(), runs.size());
  for (int i = 0; i < kRuns; ++i) {
    const auto& outcome = outcomes[static_cast<size_t>(i)];
    if (i == 4) {
      EXPECT_EQ(outcome.status().code(), absl::StatusCode::kNotFound);
      continue;
    }
    ASSERT_TRUE(outcome.ok()) << outcome.status();
    int seen = 0;
    ASSERT_TRUE(absl::SimpleAtoi(*outcome, &seen)) << *outcome;
    EXPECT_GE(seen, 1);
    EXPECT_LE(seen, static_cast<int>(kHelpersAtOnce));
  }
}

// The first one goes on until the last one has been there: were its turn not the only one that it
// takes, it would never be.
TEST(HelperTest, OneThatTakesLongHoldsUpNobody) {
  const std::string shell = "/bin/sh";
  const TemporaryDirectory directory;
  const std::string there = directory.Join("there");
  std::vector<std::vector<std::string>> runs = {
      {"-c", absl::StrCat("until [ -e ", there, " ]; do sleep 0.01; done; echo a")}};
  for (int i = 0; i < 5; ++i) runs.push_back({"-c", "echo a"});
  runs.push_back({"-c", absl::StrCat("touch ", there, "; echo a")});
  for (const auto& outcome : RunHelpers(shell, runs, {kPatience, kPatience})) {
    ASSERT_TRUE(outcome.ok()) << outcome.status();
    EXPECT_EQ(*outcome, "a\n");
  }
}

TEST(HelperTest, AllEndAtTheDeadlineAndThoseWhoseTurnDidNotComeAreSaid) {
  const std::vector<std::string> hangs = {"-c", "exec cat /dev/zero >/dev/null"};
  const std::vector<std::vector<std::string>> runs(kHelpersAtOnce + 1, hangs);
  const auto outcomes = RunHelpers("/bin/sh", runs, {kPatience, absl::Milliseconds(200)});
  for (const auto& outcome : outcomes) {
    EXPECT_EQ(outcome.status().code(), absl::StatusCode::kDeadlineExceeded);
  }
  EXPECT_THAT(outcomes.front().status().ToString(), HasSubstr("no answer in time"));
  EXPECT_THAT(outcomes.back().status().ToString(), HasSubstr("its turn did not come"));
  EXPECT_TRUE(RunHelpers("/bin/sh", {}, {kPatience, kPatience}).empty());
}

class NvmlTest : public testing::Test {
 protected:
  static absl::StatusOr<std::string> Gpus(const char* mode, absl::Duration deadline = kPatience) {
    setenv("LD_LIBRARY_PATH", HOLDFAST_TEST_NVML_DIRECTORY, 1);
    setenv("HOLDFAST_FAKE_NVML", mode, 1);
    auto text = RunOne({"gpus"}, deadline);
    unsetenv("LD_LIBRARY_PATH");
    unsetenv("HOLDFAST_FAKE_NVML");
    return text;
  }
  static std::vector<monitor::GpuReading> Parsed(const char* mode) {
    const auto text = Gpus(mode);
    EXPECT_TRUE(text.ok()) << text.status().ToString();
    const auto gpus = monitor::ParseGpuReadings(*text);
    EXPECT_TRUE(gpus.ok()) << gpus.status().ToString() << *text;
    return *gpus;
  }
  // The user of the first GPU is rank 4.
  static std::vector<Rank> RanksOf(const monitor::GpuReading& gpu) {
    return gpu.processes == std::vector<int64_t>{getpid()} ? std::vector{Rank{4}}
                                                           : std::vector<Rank>{};
  }
};

TEST_F(NvmlTest, AHealthyGpuSaysNothing) {
  const std::vector<monitor::GpuReading> gpus = Parsed("healthy");
  ASSERT_EQ(gpus.size(), 2u);
  EXPECT_EQ(gpus[0].pci_address, "0000:3b:00");
  EXPECT_EQ(gpus[1].pci_address, "0000:af:00");
  EXPECT_EQ(gpus[0].ecc_corrected, 5u);
  EXPECT_EQ(gpus[0].ecc_uncorrected, 0u);
  EXPECT_EQ(gpus[0].pcie_width, 16u);
  EXPECT_FALSE(gpus[0].pcie_generation.has_value());  // this library has no such function
  EXPECT_EQ(gpus[0].processes, std::vector<int64_t>{getpid()});
  EXPECT_TRUE(monitor::TestifyGpus(gpus, RanksOf).empty());
}

TEST_F(NvmlTest, AHotGpuIsImpaired) {
  const auto said = monitor::TestifyGpus(Parsed("hot"), RanksOf);
  ASSERT_EQ(said.size(), 1u);
  EXPECT_EQ(said[0].claim, monitor::Claim::kGpuImpaired);
  EXPECT_EQ(said[0].ranks, std::vector{Rank{4}});
  EXPECT_THAT(said[0].sentence, HasSubstr("too hot (hardware)"));
  EXPECT_THAT(said[0].sentence, HasSubstr("4 lanes, that of most GPUs here 16"));
}

TEST_F(NvmlTest, ALostGpuIsAFault) {
  const auto said = monitor::TestifyGpus(Parsed("lost"), RanksOf);
  ASSERT_EQ(said.size(), 1u);
  EXPECT_EQ(said[0].claim, monitor::Claim::kGpuFault);
  EXPECT_GE(said[0].certainty, 0.9);
  EXPECT_THAT(said[0].sentence, HasSubstr("GPU is lost"));
}

TEST_F(NvmlTest, ADriverThatFailsOrHangsIsSaid) {
  EXPECT_THAT(Gpus("absent").status().ToString(), HasSubstr("Driver Not Loaded"));
  EXPECT_EQ(Gpus("hang", absl::Milliseconds(300)).status().code(),
            absl::StatusCode::kDeadlineExceeded);
}

TEST_F(NvmlTest, WithoutADriverThereIsNone) {
  const auto text = RunOne({"gpus"});
  if (text.ok()) GTEST_SKIP() << "this machine has a driver";
  EXPECT_EQ(text.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(text.status().ToString(), HasSubstr("no NVIDIA driver"));
}

}  // namespace
}  // namespace holdfast
