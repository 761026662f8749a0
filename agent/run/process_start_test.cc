// When a process was started, against the clock that the agent goes by.
#include "agent/run/process_start.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <optional>

#include "absl/time/time.h"
#include "agent/process.h"
#include "base/clock.h"
#include "io/unique_fd.h"

namespace holdfast {
namespace {

constexpr absl::Duration kTick = absl::Milliseconds(10);

TEST(ProcessStartTest, LiesBetweenBeforeAndBehindTheForkUntilTheProcessIsGone) {
  const absl::Duration before = RealClock().Elapsed();
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    pause();
    _exit(0);
  }
  const absl::Duration behind = RealClock().Elapsed();
  const absl::StatusOr<UniqueFd> pidfd = OpenPidfd(child);
  ASSERT_TRUE(pidfd.ok()) << pidfd.status();
  const std::optional<absl::Duration> start = StartOf(pidfd->get());
  ASSERT_TRUE(start.has_value());
  EXPECT_GE(*start + kTick, before);
  EXPECT_LE(*start, behind);
  EXPECT_EQ(*start % kTick, absl::ZeroDuration());

  SendSignal(pidfd->get(), SIGKILL);
  ASSERT_EQ(waitpid(child, nullptr, 0), child);
  EXPECT_EQ(StartOf(pidfd->get()), std::nullopt);
}

}  // namespace
}  // namespace holdfast
