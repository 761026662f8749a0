#include "agent/monitor/verdict_command.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "base/json_reader.h"
#include "io/epoll_loop.h"
#include "monitor/finding_record.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

std::string ReadText(const std::string& path) {
  std::ifstream file(path);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

monitor::FindingRecord MakeRecord() {
  monitor::FindingRecord record;
  record.job = "llama";
  record.attempt_key = "run/0";
  record.finding.id = "5965a069";
  record.finding.grade = monitor::Grade::kVerdict;
  record.finding.fault = monitor::FaultClass::kLink;
  record.finding.scope = monitor::Scope::kPath;
  record.finding.suspects = {{Rank{3}, Rank{4}}, {Rank{7}, Rank{7}}};
  record.finding.confidence = 0.5;
  record.finding.sentence = "Rank 3 'is' $slow; `true` \"here\"\nand there";
  return record;
}

class VerdictCommandTest : public ::testing::Test {
 protected:
  void Make(const std::string& command,
            const std::function<void(VerdictCommand::Options&)>& change = nullptr) {
    VerdictCommand::Options options;
    options.command = command;
    options.warn = [this](const std::string& text) { warnings_.push_back(text); };
    if (change) change(options);
    command_ = std::make_unique<VerdictCommand>(std::move(options), *loop_);
  }
  void Run() { command_->Run(MakeRecord(), {monitor::FindingChange::kVerdict, {}, {}, ""}); }
  // Until nothing runs or waits any more.
  void RunLoop() {
    Poll();
    loop_->Run();
  }
  void Poll() {
    if (command_->running_count() == 0) return loop_->Stop();
    loop_->RunAfter(absl::Milliseconds(2), [this] { Poll(); });
  }

  TemporaryDirectory directory_;
  std::unique_ptr<EpollLoop> loop_ = *EpollLoop::Create(RealClock());
  std::unique_ptr<VerdictCommand> command_;
  std::vector<std::string> warnings_;
};

TEST_F(VerdictCommandTest, GetsTheFindingOnStandardInputAndInItsEnvironment) {
  const std::string json = directory_.path() + "/json";
  const std::string variables = directory_.path() + "/variables";
  // One that the agent itself has must not win.
  ASSERT_EQ(setenv("HOLDFAST_JOB", "another", 1), 0);
  Make("cat > " + json + "; env > " + variables);
  Run();
  RunLoop();
  EXPECT_THAT(warnings_, SizeIs(0));
  ASSERT_OK_AND_ASSIGN(const auto document, JsonDocument::Parse(ReadText(json)));
  ASSERT_OK_AND_ASSIGN(const auto record, monitor::ParseFindingRecord(document->root()));
  EXPECT_EQ(record.finding.sentence, MakeRecord().finding.sentence);
  const std::string text = ReadText(variables);
  for (const char* line :
       {"HOLDFAST_EVENT=verdict\n", "HOLDFAST_FINDING=5965a069\n", "HOLDFAST_JOB=llama\n",
        "HOLDFAST_ATTEMPT_KEY=run/0\n", "HOLDFAST_GRADE=verdict\n", "HOLDFAST_FAULT=link\n",
        "HOLDFAST_SCOPE=path\n", "HOLDFAST_RANKS=3,7\n", "HOLDFAST_CONFIDENCE=0.50\n",
        "HOLDFAST_SENTENCE=Rank 3 'is' $slow; `true` \"here\"\n"}) {
    EXPECT_THAT(text, HasSubstr(line));
  }
  EXPECT_EQ(text.find("another"), std::string::npos);
  unsetenv("HOLDFAST_JOB");
}

TEST_F(VerdictCommandTest, FailuresAreSaidAndCounted) {
  Make("exit 3");
  Run();
  RunLoop();
  EXPECT_THAT(warnings_, ElementsAre("on_verdict: for finding 5965a069: exit code 3"));
  Make("kill -9 $$");
  Run();
  RunLoop();
  EXPECT_THAT(warnings_.back(), HasSubstr("signal 9"));
  EXPECT_EQ(command_->failure_count(), 1u);
  EXPECT_EQ(command_->run_count(), 1u);
}

TEST_F(VerdictCommandTest, OneThatHangsIsKilledWithAllThatItStarted) {
  const std::string pids = directory_.path() + "/pids";
  int child = 0;
  // Again with more patience if it was killed before it had started anything.
  for (absl::Duration timeout = absl::Milliseconds(300); child == 0 && timeout < absl::Minutes(2);
       timeout *= 4) {
    warnings_.clear();
    Make("sleep 1000 & echo $! > " + pids + "; wait",
         [&](VerdictCommand::Options& options) { options.timeout = timeout; });
    Run();
    RunLoop();
    ASSERT_THAT(warnings_, SizeIs(1));
    EXPECT_THAT(warnings_[0], HasSubstr("killed after " + absl::FormatDuration(timeout)));
    child = std::atoi(ReadText(pids).c_str());
  }
  ASSERT_GT(child, 0);
  // Killed with its group, and gone as soon as the kernel has come to it.
  const absl::StatusOr<UniqueFd> process = OpenPidfd(child);
  EXPECT_TRUE(!process.ok() || WaitUntilDead(process->get(), absl::Seconds(60)));
}

TEST_F(VerdictCommandTest, AtMostSoManyRunAndWait) {
  const std::string gate = directory_.path() + "/gate";
  const std::string ran = directory_.path() + "/ran";
  Make("while ! test -e " + gate + "; do sleep 0.01; done; echo x >> " + ran,
       [](VerdictCommand::Options& options) {
         options.running_max = 2;
         options.waiting_max = 3;
       });
  for (int i = 0; i < 7; ++i) Run();
  EXPECT_EQ(command_->running_count(), 2u);
  EXPECT_EQ(command_->dropped_count(), 2u);
  EXPECT_THAT(warnings_, SizeIs(2));
  std::ofstream(gate) << "open";
  RunLoop();
  EXPECT_EQ(ReadText(ran), "x\nx\nx\nx\nx\n");
  EXPECT_EQ(command_->failure_count(), 0u);
}

}  // namespace
}  // namespace holdfast
