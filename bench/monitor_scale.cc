// What the analysis costs against the number of ranks. Synthetic nodes of 8 ranks, each rank in 4
// communicators with 2 connections, all moving; one summary a node and second. In the last quarter
// of the seconds one rank hangs and all others wait. Prints JSON: per number of ranks the seconds
// of CPU time per second of job of the analysis, moving and hanging, and of an agent's step: the
// same with the reports decoded from their bytes (job_analysis.h).
#include <time.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "monitor/analyzer.h"
#include "monitor/job_analysis.h"
#include "monitor/summary.h"

namespace holdfast::monitor {
namespace {

constexpr uint32_t kPerNode = 8;
constexpr uint32_t kCommunicators = 4;
constexpr int kSeconds = 40;
constexpr int kHangAt = 30;

double CpuSeconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) / 1e9;
}

// Communicator 0 is a ring of all ranks, the others rings of the ranks equal modulo kPerNode.
CommunicatorReport Report(uint32_t ranks, uint32_t rank, uint32_t which, int second) {
  const uint32_t size = which == 0 ? ranks : ranks / kPerNode;
  const uint32_t index = which == 0 ? rank : rank / kPerNode;
  const bool hangs = second >= kHangAt;
  const auto done = static_cast<uint64_t>(hangs ? kHangAt : second) * 2;
  CommunicatorReport report;
  report.id = which == 0 ? 1 : 100 + which * kPerNode + rank % kPerNode;
  report.size = size;
  report.index = index;
  report.counts[static_cast<size_t>(OperationKind::kAllReduce)] = {done + 1, done + 1, done};
  report.last_kind = OperationKind::kAllReduce;
  report.last_bytes = 1 << 28;
  report.open_us = 1000;
  for (const Direction direction : {Direction::kReceive, Direction::kSend}) {
    ConnectionReport c;
    c.peer = direction == Direction::kSend ? (index + 1) % size : (index + size - 1) % size;
    c.direction = direction;
    // All wait for what comes around the ring from rank 1000, whose GPU does nothing.
    const bool culprit = rank == ranks / 2;
    c.state = direction == Direction::kSend ? WaitState::kSendGpuWait
              : culprit                     ? WaitState::kReceiveGpuWait
                                            : WaitState::kReceiveWait;
    c.operation = done + 1;
    c.steps_total = 100;
    c.bytes = done << 27;
    c.wire_wait_us = done * 200'000 + rank % 7 * 100;
    report.connections.push_back(c);
  }
  return report;
}

NodeSummary Summary(uint32_t ranks, uint32_t node, int second) {
  NodeSummary summary;
  summary.node = node;
  summary.sequence = static_cast<uint64_t>(second) + 1;
  summary.clock_us = static_cast<uint64_t>(second) * 1'000'000 + node;
  for (uint32_t r = node * kPerNode; r < (node + 1) * kPerNode; ++r) {
    RankReport rank;
    rank.rank = Rank{r};
    rank.process = ProcessState::kRunning;
    rank.level = TelemetryLevel::kLight;
    rank.cpu_us = summary.clock_us;
    rank.operation_us = summary.clock_us / 2 + r % 5 * 100;
    for (uint32_t which = 0; which < kCommunicators; ++which) {
      rank.communicators.push_back(Report(ranks, r, which, second));
    }
    summary.ranks.push_back(std::move(rank));
  }
  return summary;
}

struct Cost {
  double moving = 0, hanging = 0, hanging_max = 0, agent_step_max = 0;
  bool named = false;
};

Cost Measure(uint32_t ranks) {
  JobShape shape;
  for (uint32_t r = 0; r < ranks; ++r) {
    RankPlace place;
    place.node = r / kPerNode;
    place.tensor_position = r % kPerNode;
    shape.ranks.push_back(place);
  }
  Analyzer analyzer(Thresholds{}, shape);
  JobAnalysis job(Thresholds{}, "job");
  Cost cost;
  for (int second = 0; second < kSeconds; ++second) {
    Snapshot snapshot;
    snapshot.elapsed = absl::Seconds(second);
    for (uint32_t node = 0; node < ranks / kPerNode; ++node) {
      snapshot.arrived.push_back(Summary(ranks, node, second));
    }
    const double begin = CpuSeconds();
    const Analysis analysis = analyzer.Step(snapshot);
    const double spent = CpuSeconds() - begin;
    if (second < kHangAt) {
      cost.moving += spent / kHangAt;
    } else {
      cost.hanging += spent / (kSeconds - kHangAt);
      cost.hanging_max = std::max(cost.hanging_max, spent);
    }
    JobStep step;
    step.elapsed = snapshot.elapsed;
    for (NodeSummary& summary : snapshot.arrived) {
      const std::string node = std::to_string(summary.node);
      summary.node = 0;
      step.reports.push_back({"job", "", ranks, node, EncodeSummary(summary)});
    }
    const double step_begin = CpuSeconds();
    job.Step(std::move(step));
    cost.agent_step_max = std::max(cost.agent_step_max, CpuSeconds() - step_begin);
    for (const Finding& finding : analysis.findings) {
      cost.named |= finding.fault == FaultClass::kGpuHang && !finding.suspects.empty() &&
                    finding.suspects[0].rank == Rank{ranks / 2};
    }
  }
  return cost;
}

int Run() {
  std::printf("{\"rows\": [");
  const char* separator = "";
  for (const uint32_t ranks : {500u, 1'000u, 2'000u, 5'000u, 10'000u, 20'000u}) {
    const Cost cost = Measure(ranks / kPerNode * kPerNode);
    std::printf(
        "%s\n {\"ranks\": %u, \"cpu_s_per_s\": %.4f, \"cpu_s_per_s_hanging\": %.4f, "
        "\"hanging_max\": %.4f, \"agent_step_max\": %.4f, \"named\": %s}",
        separator, ranks, cost.moving, cost.hanging, cost.hanging_max, cost.agent_step_max,
        cost.named ? "true" : "false");
    std::fflush(stdout);
    separator = ",";
  }
  std::printf("]}\n");
  return 0;
}

}  // namespace
}  // namespace holdfast::monitor

int main() { return holdfast::monitor::Run(); }
