// make_recording FILE SECONDS FAULT RANK [FACTOR]: a recording (monitor/recording.h) of a simulated
// job of 8 ranks in which `RANK` has the fault from second 40 on. FAULT is none, hang, killed,
// stopped, cut (all that it sends) or slow.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <span>
#include <string>

#include "base/check.h"
#include "io/posix_file_system.h"
#include "monitor/recording.h"
#include "monitor/sim/catalogue.h"
#include "monitor/sim/world.h"

namespace holdfast::monitor {
namespace {

constexpr uint32_t kRanks = 8;

int Run(const std::string& path, int seconds, const std::string& fault, uint32_t rank,
        double factor) {
  const std::map<std::string, sim::FaultKind> kinds = {{"hang", sim::FaultKind::kGpuHang},
                                                       {"killed", sim::FaultKind::kKilled},
                                                       {"stopped", sim::FaultKind::kStopped},
                                                       {"cut", sim::FaultKind::kSender},
                                                       {"slow", sim::FaultKind::kSlowGpu}};
  sim::WorldOptions options;
  options.data_parallel = kRanks;
  if (fault != "none") options.faults = {sim::FaultOf(kinds.at(fault), rank, factor)};
  sim::World world(options);
  RecordingWriter writer;
  std::string bytes = writer.Begin();
  for (int i = 0; i < seconds; ++i) {
    Snapshot snapshot = world.Tick();
    RecordedStep recorded;
    recorded.job = "simulated";
    recorded.step.elapsed = snapshot.elapsed;
    recorded.step.receiver_gap = snapshot.receiver_gap;
    for (NodeSummary& summary : snapshot.arrived) {
      const std::string node = "gpu-" + std::to_string(10 + summary.node);
      summary.node = 0;
      recorded.step.reports.push_back(
          {recorded.job, "run/0", kRanks, node, EncodeSummary(summary)});
    }
    bytes += writer.Append(EncodeRecorded(std::move(recorded)));
  }
  bytes += writer.End();
  const auto files = NewPosixFileSystem();
  const auto file = files->CreateNew(path);
  CHECK_OK(file.status());
  CHECK_OK((*file)->Append(std::as_bytes(std::span(bytes))));
  return 0;
}

}  // namespace
}  // namespace holdfast::monitor

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "usage: make_recording FILE SECONDS FAULT RANK [FACTOR]\n");
    return 2;
  }
  return holdfast::monitor::Run(argv[1], std::atoi(argv[2]), argv[3],
                                static_cast<uint32_t>(std::atoi(argv[4])),
                                argc > 5 ? std::atof(argv[5]) : 0);
}
