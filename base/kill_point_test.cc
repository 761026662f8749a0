#include "base/kill_point.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <set>
#include <string>

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

}  // namespace
}  // namespace holdfast
