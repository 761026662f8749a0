// How processes ended that are not the agent's children: what the kernel says, and what becomes of
// it in the node's reports, as under a launcher that tells nobody (torchrun).
#include "agent/monitor/process_end.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "agent/monitor/board_testing.h"
#include "agent/monitor/node_aggregator.h"
#include "agent/monitor/report_testing.h"
#include "agent/monitor/table_keeper_testing.h"
#include "agent/process.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/sim_executor.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using monitor::ExitKind;
using monitor::RankReport;
using ::testing::SizeIs;

// Whether the kernel tells of a process that its parent has waited for (Linux 6.15).
bool TellsOfReaped() {
  utsname name{};
  int major = 0, minor = 0;
  return uname(&name) == 0 && std::sscanf(name.release, "%d.%d", &major, &minor) == 2 &&
         std::pair(major, minor) >= std::pair(6, 15);
}

// A process that ends as it is told, and whose parent is the launcher: it waits for it when it
// likes.
class Rank {
 public:
  // `signal_number` 0: with `status`.
  explicit Rank(int status, int signal_number = 0) {
    int ends[2];
    EXPECT_EQ(pipe(ends), 0);
    pid_ = fork();
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);  // goes with the test
      char byte = 0;
      (void)!read(ends[0], &byte, 1);
      if (signal_number != 0) raise(signal_number);
      _exit(status);
    }
    close(ends[0]);
    word_ = UniqueFd(ends[1]);
    pidfd_ = *OpenPidfd(pid_);
  }
  ~Rank() {
    if (reaped_) return;
    kill(pid_, SIGKILL);
    Reap();
  }
  Rank(const Rank&) = delete;
  Rank& operator=(const Rank&) = delete;

  // Returns when it is dead.
  void End() {
    EXPECT_EQ(write(word_.get(), "", 1), 1);
    EXPECT_TRUE(WaitUntilDead(pidfd_.get(), absl::Seconds(60)));
  }
  void Reap() {
    EXPECT_EQ(waitpid(pid_, &status_, 0), pid_);
    reaped_ = true;
  }
  pid_t pid() const { return pid_; }
  int pidfd() const { return pidfd_.get(); }
  int status() const { return status_; }

 private:
  pid_t pid_ = 0;
  UniqueFd word_, pidfd_;
  int status_ = 0;
  bool reaped_ = false;
};

TEST(WaitStatusTest, IsWhatItsParentIsToldBeforeAndAfterItIsWaitedFor) {
  for (const auto& [status, signal_number] :
       {std::pair(0, 0), std::pair(3, 0), std::pair(0, SIGKILL), std::pair(0, SIGTERM)}) {
    Rank rank(status, signal_number);
    EXPECT_EQ(WaitStatusOf(rank.pidfd()), std::nullopt) << "it lives";
    rank.End();
    const std::optional<int> before = WaitStatusOf(rank.pidfd());
    rank.Reap();
    EXPECT_EQ(before, rank.status());
    EXPECT_EQ(WaitStatusOf(rank.pidfd()),
              TellsOfReaped() ? std::optional(rank.status()) : std::nullopt);
  }
  const UniqueFd no_process(open("/dev/null", O_RDONLY | O_CLOEXEC));
  EXPECT_EQ(WaitStatusOf(no_process.get()), std::nullopt);
}

// What a stranger reads in /proc of a zombie is a status of 0, whatever it died of.
TEST(WaitStatusTest, OfAnotherUsersProcessIsNotTakenForZero) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root, to become two other users";
  Rank rank(3);
  rank.End();
  const auto as_stranger = [&] {
    const pid_t stranger = fork();
    if (stranger == 0) {
      const bool became = setresgid(65533, 65533, 65533) == 0 &&
                          setresuid(65533, 65533, 65533) == 0 &&
                          prctl(PR_SET_DUMPABLE, 1) == 0;  // it may look at itself
      const bool sees = PidOf(rank.pidfd()) == rank.pid();
      const std::optional<int> status = WaitStatusOf(rank.pidfd());
      _exit(!became ? 10 : status.has_value() ? 20 + WEXITSTATUS(*status) : sees ? 30 : 31);
    }
    int status = 0;
    EXPECT_EQ(waitpid(stranger, &status, 0), stranger);
    return WEXITSTATUS(status);
  };
  EXPECT_EQ(as_stranger(), 30);
  rank.Reap();
  EXPECT_EQ(as_stranger(), TellsOfReaped() ? 23 : 31);
}

// Ranks with boards, an agent's aggregator, and a launcher that says nothing.
class UntoldEndTest : public ::testing::Test {
 protected:
  int Join(const Rank& rank, uint32_t number) {
    boards_of_ranks_.push_back(std::make_unique<TrainerBoard>(
        hook::MonitorIdentity{
            .job = "job", .attempt_key = "k:0", .node = "n0", .rank = number, .world_size = 4},
        abi::BoardWriter::kHookApi, abi::MonitorLevel::kLight, static_cast<uint32_t>(rank.pid())));
    UniqueFd process = Duplicate(rank.pidfd());
    const int watched = process.get();
    EXPECT_OK(boards_.Adopt(
        boards_of_ranks_.back()->Offer(std::move(process), static_cast<uint32_t>(rank.pid()))));
    return watched;
  }
  void TellOfDeath(int watched) {
    executor_.MarkReady(watched);
    executor_.RunUntilIdle();
  }
  // The ranks of the last report after so long.
  std::vector<RankReport> After(absl::Duration duration) {
    sink_.arrived.clear();
    executor_.AdvanceTime(duration);
    if (sink_.arrived.empty()) return {};
    return sink_.arrived.back().summary.ranks;
  }

  SimExecutor executor_;
  TableKeeper keeper_;
  MonitorBoards boards_{executor_, executor_, keeper_};
  ReportCollector sink_;
  NodeAggregator aggregator_{
      boards_,   executor_,
      executor_, [](const std::string&, const std::string&) { return Engine::Activity(); },
      1000,      sink_};
  std::vector<std::unique_ptr<TrainerBoard>> boards_of_ranks_;
};

TEST_F(UntoldEndTest, IsTheKernelsWordUnlessTheStarterHasAnother) {
  Rank killed(0, SIGKILL), failed(7), well(0);
  const int watched[] = {Join(killed, 0), Join(failed, 1), Join(well, 2)};
  ASSERT_THAT(After(absl::Milliseconds(1700)), SizeIs(3));
  for (Rank* const rank : {&killed, &failed, &well}) rank->End();
  for (const int one : watched) TellOfDeath(one);
  // Its starter may say more yet: that it had told it to end.
  std::vector<RankReport> ranks = After(absl::Milliseconds(350));
  ASSERT_THAT(ranks, SizeIs(3));
  for (const RankReport& rank : ranks) EXPECT_EQ(rank.exit, ExitKind::kUnknown);
  ranks = After(absl::Seconds(1));
  ASSERT_THAT(ranks, SizeIs(3));
  EXPECT_EQ(ranks[0].exit, ExitKind::kKilled);
  EXPECT_EQ(ranks[0].exit_value, SIGKILL);
  EXPECT_EQ(ranks[1].exit, ExitKind::kError);
  EXPECT_EQ(ranks[1].exit_value, 7);
  EXPECT_EQ(ranks[2].exit, ExitKind::kClean);
  aggregator_.TakeExit(
      {"job", "k:0", "n0", 0, 4, static_cast<uint32_t>(killed.pid()), SIGKILL, true});
  ranks = After(absl::Seconds(1));
  ASSERT_THAT(ranks, SizeIs(3));
  EXPECT_EQ(ranks[0].exit, ExitKind::kTerminated);
}

// A launcher whose TERM was in vain kills; a rank that is killed beside another one is a death.
TEST_F(UntoldEndTest, AKillLongAfterAnotherEndIsTheLaunchers) {
  Rank well(0), failed(1), beside(0, SIGKILL), late(0, SIGKILL);
  const int watched[] = {Join(well, 0), Join(failed, 1), Join(beside, 2), Join(late, 3)};
  well.End();
  TellOfDeath(watched[0]);
  After(NodeAggregator::kGivenUpAfter + absl::Seconds(1));
  failed.End();
  TellOfDeath(watched[1]);
  After(absl::Seconds(2));
  beside.End();
  TellOfDeath(watched[2]);
  std::vector<RankReport> ranks = After(absl::Seconds(2));
  ASSERT_THAT(ranks, SizeIs(4));
  EXPECT_EQ(ranks[2].exit, ExitKind::kKilled) << "a good end long before is no reason";
  After(NodeAggregator::kGivenUpAfter);
  late.End();
  TellOfDeath(watched[3]);
  ranks = After(absl::Seconds(2));
  ASSERT_THAT(ranks, SizeIs(4));
  EXPECT_EQ(ranks[1].exit, ExitKind::kError);
  EXPECT_EQ(ranks[2].exit, ExitKind::kKilled);
  EXPECT_EQ(ranks[3].exit, ExitKind::kTerminated);
}

// As where the agent may not trace it: the kernel says nothing before its parent has waited for it.
TEST_F(UntoldEndTest, IsAskedForAgainAsLongAsNobodyHasWaitedForTheProcess) {
  Rank rank(5);
  const int watched = Join(rank, 0);
  TellOfDeath(watched);  // before it is so: nobody says how
  const uint64_t changes = boards_.changes();
  EXPECT_EQ(boards_.boards()[0]->wait_status, std::nullopt);
  executor_.AdvanceTime(MonitorBoards::kEndAskedEvery);
  EXPECT_EQ(boards_.changes(), changes);
  EXPECT_TRUE(boards_.boards()[0]->offer.process);
  rank.End();
  executor_.AdvanceTime(MonitorBoards::kEndAskedEvery);
  EXPECT_EQ(boards_.boards()[0]->wait_status, 5 << 8);
  EXPECT_GT(boards_.changes(), changes);
  EXPECT_FALSE(boards_.boards()[0]->offer.process) << "its descriptor is not needed any more";

  // Not for ever.
  Rank other(0);
  const int others = Join(other, 1);
  TellOfDeath(others);
  executor_.AdvanceTime(MonitorBoards::kEndAskedEvery * MonitorBoards::kEndAskedMax);
  EXPECT_FALSE(boards_.boards()[1]->offer.process);
}

}  // namespace
}  // namespace holdfast
