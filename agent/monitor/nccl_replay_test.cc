// What NCCL 2.30.7's own host code called in four jobs (../shared/fixtures/nccl), all the way: each
// rank is a process that gives its recorded calls to the real plugin, the boards go through the
// aggregator, and its reports to the analysis, which must name the rank whose kernel stands or that
// was killed, and in the clean jobs nobody.
//
// Time is virtual and runs at half the speed of the recordings: with one report a second a
// standstill of 4 s is shorter than what is taken for one. (Ages on the boards are real and
// therefore short; the analysis of hangs goes by progress and the reports' clocks.)
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "agent/monitor/node_aggregator.h"
#include "agent/monitor/report_testing.h"
#include "agent/monitor/table_keeper_testing.h"
#include "agent/process.h"
#include "gtest/gtest.h"
#include "hook/profiler/board_testing.h"
#include "hook/profiler/recorded_stream_testing.h"
#include "monitor/analyzer.h"
#include "tests/support/sim_executor.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using monitor::OperationKind;

constexpr double kSpeed = 0.5;
constexpr uint32_t kRanks = 4;
constexpr uint64_t kCommunicator = 0xe0001;

std::string Fixtures() { return std::string(HOLDFAST_TEST_SHARED) + "/fixtures/nccl/"; }

// One rank: a process that plays its stream as far as it is told.
class RankProcess {
 public:
  RankProcess(const std::string& job, uint32_t rank, uint32_t ranks) {
    int to[2], from[2];
    CHECK(pipe2(to, O_CLOEXEC) == 0 && pipe2(from, O_CLOEXEC) == 0);
    pid_ = fork();
    CHECK(pid_ >= 0);
    if (pid_ == 0) {
      close(to[1]);
      close(from[0]);
      Play(job, rank, ranks, to[0], from[1]);
      _exit(testing::Test::HasFailure() ? 1 : 0);
    }
    close(to[0]);
    close(from[1]);
    to_.Reset(to[1]);
    from_.Reset(from[0]);
    end_us_ = Answer();
  }
  ~RankProcess() {
    if (pid_ > 0) Kill();
  }
  RankProcess(const RankProcess&) = delete;
  RankProcess& operator=(const RankProcess&) = delete;

  pid_t pid() const { return pid_; }
  double end_us() const { return end_us_; }
  void RunTo(double us) {
    if (pid_ <= 0) return;
    CHECK(write(to_.get(), &us, sizeof(us)) == sizeof(us));
    Answer();
  }
  int Kill() {
    int status = 0;
    kill(pid_, SIGKILL);
    CHECK(waitpid(pid_, &status, 0) == pid_);
    pid_ = -1;
    return status;
  }

 private:
  static void Play(const std::string& job, uint32_t rank, uint32_t ranks, int from, int to) {
    setenv("HOLDFAST_JOB", job.c_str(), 1);
    setenv("HOLDFAST_ATTEMPT_KEY", "recorded:0", 1);
    setenv("HOLDFAST_NODE", absl::StrCat("node-", rank).c_str(), 1);
    setenv("HOLDFAST_MONITOR", "full", 1);
    setenv("HOLDFAST_SOCKET", "/nowhere", 1);
    setenv("RANK", absl::StrCat(rank).c_str(), 1);
    setenv("WORLD_SIZE", absl::StrCat(ranks).c_str(), 1);
    const auto stream =
        profiler::ReadStream(absl::StrCat(Fixtures(), job, "/rank-", rank, ".jsonl"));
    profiler::Library library(HOLDFAST_TEST_PLUGIN, 6);
    profiler::Replay replay(library, kCommunicator, stream);
    double us = stream.empty() ? 0 : stream.back().us;
    do {
      if (write(to, &us, sizeof(us)) != sizeof(us)) return;
      if (read(from, &us, sizeof(us)) != sizeof(us)) return;
      const auto next = std::find_if(stream.begin(), stream.end(),
                                     [&](const auto& call) { return call.us > us; });
      replay.RunTo(static_cast<size_t>(next - stream.begin()));
    } while (true);
  }
  double Answer() const {
    double us = 0;
    CHECK(read(from_.get(), &us, sizeof(us)) == sizeof(us));
    return us;
  }

  pid_t pid_ = -1;
  UniqueFd to_, from_;
  double end_us_ = 0;
};

using Texts = std::set<std::string>;

// The job, the agent that serves its four nodes, and the analysis.
class ReplayedJob {
 public:
  explicit ReplayedJob(const std::string& job) : job_(job) {
    monitor::JobShape shape;
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      ranks_.push_back(std::make_unique<RankProcess>(job, rank, kRanks));
      shape.ranks.push_back({.node = rank, .port = {}});
    }
    watched_.assign(kRanks, -1);
    analyzer_ = std::make_unique<monitor::Analyzer>(monitor::Thresholds{}, shape);
  }

  double end_us() const {
    double end = 1e12;
    for (const auto& rank : ranks_) end = std::min(end, rank->end_us());
    return end;
  }

  // Until the recordings' time `us`.
  void RunTo(double us) {
    while (now_us_ < us) {
      now_us_ += absl::ToDoubleMicroseconds(NodeAggregator::kLookEvery) * kSpeed;
      for (uint32_t rank = 0; rank < kRanks; ++rank) {
        ranks_[rank]->RunTo(now_us_);
        if (watched_[rank] < 0) Adopt(rank);
      }
      executor_.AdvanceTime(NodeAggregator::kLookEvery);
      if (!sink_.arrived.empty()) Analyse();
    }
  }

  void Kill(uint32_t rank) {
    const auto pid = static_cast<uint32_t>(ranks_[rank]->pid());
    const int status = ranks_[rank]->Kill();
    executor_.MarkReady(watched_[rank]);
    executor_.RunUntilIdle();
    aggregator_.TakeExit(
        {job_, "recorded:0", absl::StrCat("node-", rank), rank, kRanks, pid, status, false});
  }

  const Texts& suspicions() const { return suspicions_; }
  const Texts& verdicts() const { return verdicts_; }
  // All-reduces that rank 0 finished.
  uint64_t finished() const { return finished_; }
  uint64_t reports() const { return reports_; }

 private:
  void Adopt(uint32_t rank) {
    const pid_t pid = ranks_[rank]->pid();
    const std::vector<std::string> paths = profiler::BoardPaths(pid);
    if (paths.empty()) return;
    MonitorBoards::Offer offer;
    offer.job = job_;
    offer.attempt_key = "recorded:0";
    offer.node = absl::StrCat("node-", rank);
    offer.rank = rank;
    offer.process_id = static_cast<uint32_t>(pid);
    offer.board_bytes = abi::kBoardBytes;
    offer.board = UniqueFd(open(paths[0].c_str(), O_RDWR | O_CLOEXEC));
    offer.process = *OpenPidfd(pid);
    watched_[rank] = offer.process.get();
    ASSERT_OK(boards_.Adopt(std::move(offer)));
  }

  void Analyse() {
    monitor::Snapshot snapshot;
    snapshot.elapsed = executor_.Elapsed();
    for (auto& [report, summary] : sink_.arrived) {
      EXPECT_EQ(report.job, job_);
      EXPECT_EQ(report.world_size, kRanks);
      summary.node = static_cast<uint32_t>(std::stoul(report.node.substr(5)));
      if (summary.node == 0 && !summary.ranks.at(0).communicators.empty()) {
        finished_ = summary.ranks[0]
                        .communicators[0]
                        .counts[static_cast<size_t>(OperationKind::kAllReduce)]
                        .finished;
      }
      ++reports_;
      snapshot.arrived.push_back(std::move(summary));
    }
    sink_.arrived.clear();
    for (const monitor::Finding& finding : analyzer_->Step(snapshot).findings) {
      std::string text(Name(finding.fault));
      for (const monitor::Suspect& suspect : finding.suspects) {
        absl::StrAppend(&text, " ", Value(suspect.rank));
      }
      (finding.grade == monitor::Grade::kVerdict ? verdicts_ : suspicions_).insert(text);
    }
  }

  const std::string job_;
  std::vector<std::unique_ptr<RankProcess>> ranks_;
  std::vector<int> watched_;
  double now_us_ = 0;
  SimExecutor executor_;
  TableKeeper keeper_;
  MonitorBoards boards_{executor_, executor_, keeper_};
  ReportCollector sink_;
  NodeAggregator aggregator_{
      boards_,   executor_,
      executor_, [](const std::string&, const std::string&) { return Engine::Activity{}; },
      1,         sink_};
  std::unique_ptr<monitor::Analyzer> analyzer_;
  Texts suspicions_, verdicts_;
  uint64_t finished_ = 0;
  uint64_t reports_ = 0;
};

class NcclReplayTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(Fixtures())) {
      GTEST_SKIP() << "recorded streams are not here: " << Fixtures();
    }
  }
};

TEST_F(NcclReplayTest, ACleanJobRaisesNothing) {
  ReplayedJob job("allreduce-4");
  job.RunTo(job.end_us());
  EXPECT_EQ(job.finished(), 3u);
  job.RunTo(12e6);  // its ranks do nothing any more
  EXPECT_EQ(job.suspicions(), Texts{});
  EXPECT_EQ(job.verdicts(), Texts{});
  EXPECT_GE(job.reports(), 4 * 20u);
}

TEST_F(NcclReplayTest, TheStalledKernelIsRankTwos) {
  ReplayedJob job("stall-4");
  job.RunTo(6e6);
  EXPECT_EQ(job.finished(), 1u) << "it stands in the second operation";
  EXPECT_EQ(job.suspicions(), Texts{"gpu-hang 2"});
  job.RunTo(job.end_us());
  EXPECT_EQ(job.finished(), 3u);
  EXPECT_EQ(job.suspicions(), Texts{"gpu-hang 2"});
  EXPECT_EQ(job.verdicts(), Texts{}) << "there is no baseline yet, and it ends";
}

TEST_F(NcclReplayTest, TheBoardsNameRankOneBeforeItIsKilledAndItsEndAfter) {
  ReplayedJob job("killed-4");
  job.RunTo(5e6);
  EXPECT_EQ(job.finished(), 1u) << "the kernel stands in the second operation";
  EXPECT_EQ(job.suspicions(), Texts{"gpu-hang 1"});
  EXPECT_EQ(job.verdicts(), Texts{});
  job.Kill(1);
  job.RunTo(8e6);
  EXPECT_EQ(job.suspicions(), (Texts{"dead 1", "gpu-hang 1"}));
  EXPECT_EQ(job.verdicts(), Texts{"dead 1"});
}

}  // namespace
}  // namespace holdfast
