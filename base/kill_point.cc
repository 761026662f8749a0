#include "base/kill_point.h"

#include <signal.h>
#include <unistd.h>

#include <iterator>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "base/suggestion.h"

namespace holdfast {
namespace {

// Written by ArmKillPoint before other threads exist, but for the countdown.
KillPlan armed_plan;
std::atomic<uint64_t> times_left{0};
// Of DescribeAtKillPoint: touched by that thread only. 0: none.
std::function<std::string()> describe_process;
std::atomic<pid_t> describing_thread{0};

}  // namespace

namespace kill_point_internal {

std::atomic<uint32_t> armed_index{UINT32_MAX};

void Reached(uint32_t index) {
  if (times_left.fetch_sub(1, std::memory_order_relaxed) != 1) return;
  const bool stop = armed_plan.action == KillPlan::Action::kStop;
  const std::string point(kKillPoints[index]);
  std::string text;
  if (describing_thread.load(std::memory_order_relaxed) == gettid()) {
    text = absl::StrFormat("holdfastd: at kill point %s: %s\n", point, describe_process());
  }
  absl::StrAppendFormat(&text, "holdfastd: kill point %s reached %d times: process %d %s itself\n",
                        point, armed_plan.count, getpid(), stop ? "stops" : "kills");
  // A drill whose message is lost is still a drill.
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, text.data(), text.size());
  kill(getpid(), stop ? SIGSTOP : SIGKILL);
}

}  // namespace kill_point_internal

absl::StatusOr<KillPlan> ParseKillPlan(std::string_view text) {
  const std::vector<std::string> parts = absl::StrSplit(std::string(text), ':');
  KillPlan plan;
  plan.point_index = kKillPointCount;
  for (uint32_t index = 0; index < kKillPointCount; ++index) {
    if (kKillPoints[index] == parts[0]) plan.point_index = index;
  }
  if (plan.point_index == kKillPointCount) {
    return absl::InvalidArgumentError(absl::StrCat("kill point \"", parts[0], "\": no such point",
                                                   DidYouMean(parts[0], kKillPoints)));
  }
  if (parts.size() > 1 && (!absl::SimpleAtoi(parts[1], &plan.count) || plan.count == 0)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "kill point ", parts[0], ": expected a count from 1, found \"", parts[1], "\""));
  }
  if (parts.size() > 2) {
    if (parts.size() > 3 || (parts[2] != "kill" && parts[2] != "stop")) {
      return absl::InvalidArgumentError(absl::StrCat(
          "kill point ", parts[0], ": expected kill or stop behind the count, found \"", parts[2],
          "\" in \"", std::string(text), "\""));
    }
    if (parts[2] == "stop") plan.action = KillPlan::Action::kStop;
  }
  return plan;
}

void DescribeAtKillPoint(std::function<std::string()> describe) {
  describing_thread.store(describe ? gettid() : 0, std::memory_order_relaxed);
  describe_process = std::move(describe);
}

void ArmKillPoint(const KillPlan& plan) {
  armed_plan = plan;
  times_left.store(plan.count, std::memory_order_relaxed);
  kill_point_internal::armed_index.store(plan.point_index, std::memory_order_relaxed);
}

}  // namespace holdfast
