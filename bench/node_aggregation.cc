// What the agent's aggregation costs for a node of 8 ranks in 10 communicators, each a ring over
// the network of 16 ranks with the given number of channels. The ranks' boards are written by the
// hook library's own code between the looks, as a job does that runs 2 operations of each
// communicator a second; behind each stands a living process with a proxy thread. Before every look
// the caches are filled with something else, as trainers do. Time runs as fast as it can.
//
// Usage: bench_node_aggregation CHANNELS. Prints JSON: CPU seconds per second; bytes of a report;
// host memory per rank: what its board occupies of shared memory, and its share of the agent's.
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "agent/monitor/board_testing.h"
#include "agent/monitor/node_aggregator.h"
#include "agent/monitor/table_keeper_testing.h"
#include "agent/process.h"
#include "base/check.h"
#include "tests/support/allocation_meter.h"
#include "tests/support/sim_executor.h"

namespace holdfast {
namespace {

constexpr uint32_t kRanks = 8;
constexpr uint32_t kCommunicators = 10;
constexpr uint32_t kRing = 16;
constexpr int kSeconds = 30;
constexpr int kLooksPerSecond = 10;

double CpuSeconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) / 1e9;
}

class Sizes final : public monitor::ReportSink {
 public:
  void Deliver(monitor::NodeReport report) override {
    ++reports;
    bytes_max = std::max(bytes_max, report.summary.size());
  }
  size_t reports = 0;
  size_t bytes_max = 0;
};

struct Rank {
  std::unique_ptr<TrainerBoard> board;
  pid_t process = -1;
  std::vector<hook::Token> communicators;
  // Of each communicator: its open operation, and the open transfers of it with their steps.
  struct Open {
    hook::Token operation = 0;
    std::vector<std::pair<hook::Token, hook::Token>> transfers;
  };
  std::vector<Open> open;
};

Rank MakeRank(uint32_t number) {
  Rank rank;
  rank.process = fork();
  CHECK(rank.process >= 0);
  if (rank.process == 0) {
    for (;;) pause();
  }
  hook::MonitorIdentity identity;
  identity.job = "job";
  identity.node = "node";
  identity.rank = number;
  identity.world_size = kRing * kRanks;
  rank.board = std::make_unique<TrainerBoard>(identity, abi::BoardWriter::kProfilerPlugin,
                                              abi::MonitorLevel::kLight,
                                              static_cast<uint32_t>(rank.process));
  for (uint32_t c = 0; c < kCommunicators; ++c) {
    rank.communicators.push_back(rank.board->events().OpenCommunicator(
        {.hash = 100 + c, .name = "ring", .ranks = kRing, .rank = number, .nodes = kRing}));
  }
  const hook::Token thread = rank.board->events().BeginProxyThread(rank.communicators[0]);
  const uint32_t slot = hook::PlaceOf(thread);
  rank.board->board().slot(slot).bytes = static_cast<uint64_t>(rank.process);
  rank.open.resize(kCommunicators);
  return rank;
}

// Ends the open operation of a communicator and begins the next: all steps of it but the last.
void Work(Rank& rank, uint32_t number, uint32_t communicator, uint32_t channels) {
  hook::MonitorEvents& events = rank.board->events();
  Rank::Open& open = rank.open[communicator];
  for (const auto& [transfer, step] : open.transfers) {
    events.EndStep(step);
    events.EndTransfer(transfer);
  }
  open.transfers.clear();
  open.operation =
      events.BeginOperation(rank.communicators[communicator],
                            {.kind = abi::OperationKind::kAllReduce, .bytes = uint64_t{1} << 26});
  for (uint32_t channel = 0; channel < channels; ++channel) {
    for (const bool send : {false, true}) {
      const uint32_t peer = (number + (send ? 1 : kRing - 1)) % kRing;
      const hook::Token transfer =
          events.BeginTransfer(rank.communicators[communicator], open.operation,
                               {.channel = channel, .peer = peer, .steps = 64, .send = send});
      const abi::WaitState wait =
          send ? abi::WaitState::kSendWait : abi::WaitState::kReceiveGpuWait;
      for (uint32_t step = 0; step < 63; ++step) {
        const hook::Token token = events.BeginStep(transfer, step);
        events.StepState(token, wait, 1 << 19);
        events.EndStep(token);
      }
      open.transfers.emplace_back(transfer, events.BeginStep(transfer, 63));
    }
  }
  events.EndOperation(open.operation);
}

int Run(uint32_t channels) {
  std::vector<Rank> ranks;
  for (uint32_t number = 0; number < kRanks; ++number) ranks.push_back(MakeRank(number));
  std::vector<uint64_t> other(4 << 20);  // 32 MiB
  Sizes sizes;
  double cpu_seconds = 0;
  size_t agent_bytes = 0;
  {
    const AllocationMeter meter;
    SimExecutor executor;
    TableKeeper keeper;
    MonitorBoards boards(executor, executor, keeper);
    NodeAggregator aggregator(
        boards, executor, executor,
        [](const std::string&, const std::string&) { return Engine::Activity{}; }, 1, sizes);
    for (Rank& rank : ranks) {
      UniqueFd pidfd = *OpenPidfd(rank.process);
      CHECK_OK(
          boards.Adopt(rank.board->Offer(std::move(pidfd), static_cast<uint32_t>(rank.process))));
    }
    for (int look = 0; look < kSeconds * kLooksPerSecond; ++look) {
      for (uint32_t number = 0; number < kRanks; ++number) {
        for (uint32_t c = 0; c < kCommunicators; ++c) {
          if ((static_cast<uint32_t>(look) + c) % 5 == 0) Work(ranks[number], number, c, channels);
        }
      }
      for (uint64_t& word : other) ++word;
      const double before = CpuSeconds();
      executor.AdvanceTime(NodeAggregator::kLookEvery);
      cpu_seconds += CpuSeconds() - before;
    }
    agent_bytes = meter.GrowthPeak();
  }
  uint64_t board_bytes = 0;
  for (const Rank& rank : ranks) {
    struct stat file {};
    CHECK(fstat(rank.board->board().fd(), &file) == 0);
    board_bytes = std::max(board_bytes, static_cast<uint64_t>(file.st_blocks) * 512);
    kill(rank.process, SIGKILL);
    waitpid(rank.process, nullptr, 0);
  }
  CHECK(sizes.reports == kSeconds);
  std::printf(
      "{\"cpu_s_per_s\": %.6f, \"report_bytes\": %zu, \"board_bytes\": %llu, "
      "\"agent_bytes_per_rank\": %zu}\n",
      cpu_seconds / kSeconds, sizes.bytes_max, static_cast<unsigned long long>(board_bytes),
      agent_bytes / kRanks);
  return 0;
}

}  // namespace
}  // namespace holdfast

int main(int argc, char** argv) {
  const int channels = argc == 2 ? std::atoi(argv[1]) : 0;
  if (channels < 1 || channels > 64) {
    std::fprintf(stderr, "usage: bench_node_aggregation CHANNELS (1 to 64)\n");
    return 2;
  }
  return holdfast::Run(static_cast<uint32_t>(channels));
}
