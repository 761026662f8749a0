#include "base/kill_point.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <set>
#include <string>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

using ::testing::HasSubstr;

TEST(KillPoint, NamesAreUnique) {
  const std::set<std::string_view> names(std::begin(kKillPoints), std::end(kKillPoints));
  EXPECT_EQ(names.size(), kKillPointCount);
}

TEST(KillPoint, ParsesWhatItSays) {
  const absl::StatusOr<KillPlan> plain = ParseKillPlan("flush.synced");
  ASSERT_TRUE(plain.ok()) << plain.status();
  EXPECT_EQ(kKillPoints[plain->point_index], "flush.synced");
  EXPECT_EQ(plain->count, 1u);
  EXPECT_EQ(plain->action, KillPlan::Action::kKill);

  const absl::StatusOr<KillPlan> full = ParseKillPlan("keep.sent:12:stop");
  ASSERT_TRUE(full.ok()) << full.status();
  EXPECT_EQ(kKillPoints[full->point_index], "keep.sent");
  EXPECT_EQ(full->count, 12u);
  EXPECT_EQ(full->action, KillPlan::Action::kStop);
}

TEST(KillPoint, RefusesWhatItDoesNotKnow) {
  EXPECT_THAT(std::string(ParseKillPlan("flush.sinced").status().message()),
              HasSubstr("did you mean \"flush.synced\""));
  for (const char* text : {"", "flush.synced:0", "flush.synced:x", "flush.synced:-1",
                           "flush.synced:1:explode", "flush.synced:1:kill:2", "flush.synced:"}) {
    EXPECT_FALSE(ParseKillPlan(text).ok()) << text;
  }
}

// Runs a child that reaches `reached` points and then exits 7, and returns its wait status.
int RunArmed(const char* plan, int synced_times) {
  const pid_t child = fork();
  if (child == 0) {
    ArmKillPoint(*ParseKillPlan(plan));
    for (int i = 0; i < synced_times; ++i) {
      KillPoint("flush.synced");
      KillPoint("flush.written");  // another point never counts
    }
    _exit(7);
  }
  int status = 0;
  waitpid(child, &status, WUNTRACED);
  if (WIFSTOPPED(status)) {
    kill(child, SIGCONT);
    int end = 0;
    waitpid(child, &end, 0);
    EXPECT_TRUE(WIFEXITED(end) && WEXITSTATUS(end) == 7);  // goes on where it was
  }
  return status;
}

TEST(KillPoint, ActsAtTheCountAskedForAndNotBefore) {
  int status = RunArmed("flush.synced:3", 2);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 7);
  status = RunArmed("flush.synced:3", 3);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  status = RunArmed("flush.synced:2:stop", 5);
  EXPECT_TRUE(WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP);
}

// What a child writes to standard error that reaches its point for the second time, on its main
// thread or on another.
std::string LastWords(bool on_other_thread) {
  int ends[2];
  EXPECT_EQ(pipe(ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    int described = 0;
    DescribeAtKillPoint([&described] { return "described " + std::to_string(++described); });
    ArmKillPoint(*ParseKillPlan("flush.synced:2"));
    const auto reach = [] {
      KillPoint("flush.synced");
      KillPoint("flush.synced");
    };
    if (on_other_thread) {
      std::thread(reach).join();
    } else {
      reach();
    }
    _exit(7);
  }
  close(ends[1]);
  std::string text;
  char bytes[256];
  for (ssize_t got; (got = read(ends[0], bytes, sizeof(bytes))) > 0;) {
    text.append(bytes, static_cast<size_t>(got));
  }
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  return text;
}

TEST(KillPoint, TheThreadThatCanDescribeTheProcessDoesSoOnceBeforeItDies) {
  const char kReached[] =
      "holdfastd: kill point flush.synced reached 2 times: process [0-9]+ kills itself\n";
  EXPECT_THAT(LastWords(/*on_other_thread=*/false),
              ::testing::MatchesRegex(
                  std::string("holdfastd: at kill point flush.synced: described 1\n") + kReached));
  EXPECT_THAT(LastWords(/*on_other_thread=*/true), ::testing::MatchesRegex(kReached));
}

}  // namespace
}  // namespace holdfast
