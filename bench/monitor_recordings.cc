// What the baselines (monitor_baselines.h) say of recorded jobs: they see the same summaries as the
// analysis did.
//
//   bench_monitor_recordings FILE ONSET [FILE ONSET]...    ONSET: in seconds, on the clock of the
//   recording
//
// Prints one line of JSON per file: for each baseline its first alarm behind the onset, in seconds
// from it, and whom it names. bench/detection/series.py scores them.
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "bench/monitor_baselines.h"
#include "monitor/recording.h"

namespace holdfast::monitor {
namespace {

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file.is_open() || file.bad()) {
    return absl::NotFoundError(absl::StrCat(path, ": cannot be read"));
  }
  return bytes;
}

// As the baselines take it: nodes have numbers.
absl::StatusOr<Snapshot> SnapshotOf(const JobStep& step, std::map<std::string, uint32_t>& nodes) {
  Snapshot snapshot;
  snapshot.elapsed = step.elapsed;
  snapshot.receiver_gap = step.receiver_gap;
  for (const NodeReport& report : step.reports) {
    ASSIGN_OR_RETURN(NodeSummary summary, DecodeSummary(std::as_bytes(std::span(report.summary))));
    summary.node =
        nodes.try_emplace(report.node, static_cast<uint32_t>(nodes.size())).first->second;
    snapshot.arrived.push_back(std::move(summary));
  }
  return snapshot;
}

std::string AlarmJson(const Baseline& baseline, absl::Duration onset) {
  const std::optional<Alarm> alarm = baseline.First(onset);
  if (!alarm.has_value()) return absl::StrFormat("{\"name\": \"%s\"}", baseline.name());
  return absl::StrFormat("{\"name\": \"%s\", \"seconds\": %.1f, \"suspects\": [%s]}",
                         baseline.name(), absl::ToDoubleSeconds(alarm->at - onset),
                         absl::StrJoin(alarm->suspects, ", ", [](std::string* out, Rank rank) {
                           absl::StrAppend(out, Value(rank));
                         }));
}

absl::Status Replay(const std::string& path, absl::Duration onset) {
  ASSIGN_OR_RETURN(const std::string bytes, ReadFile(path));
  ASSIGN_OR_RETURN(const std::unique_ptr<RecordingReader> reader, RecordingReader::Create(bytes));
  std::vector<std::unique_ptr<Baseline>> baselines;
  std::map<std::string, uint32_t> nodes;
  for (;;) {
    ASSIGN_OR_RETURN(const std::optional<Recorded> recorded, reader->Next());
    if (!recorded.has_value()) break;
    const RecordedStep* const step = std::get_if<RecordedStep>(&*recorded);
    if (step == nullptr) continue;
    if (baselines.empty()) {
      // They look at no rank before it has reported, so that only the number of ranks matters.
      JobShape shape;
      for (const NodeReport& report : step->step.reports) shape.ranks.resize(report.world_size);
      if (shape.ranks.empty()) continue;
      baselines = MakeBaselines(shape);
    }
    ASSIGN_OR_RETURN(const Snapshot snapshot, SnapshotOf(step->step, nodes));
    for (const auto& baseline : baselines) baseline->Step(snapshot);
  }
  if (baselines.empty()) return absl::NotFoundError(absl::StrCat(path, ": no report in it"));
  std::printf("{\"file\": \"%s\", \"alarms\": [%s]}\n", path.c_str(),
              absl::StrJoin(baselines, ", ", [&](std::string* out, const auto& baseline) {
                absl::StrAppend(out, AlarmJson(*baseline, onset));
              }).c_str());
  return absl::OkStatus();
}

}  // namespace
}  // namespace holdfast::monitor

int main(int argc, char** argv) {
  bool usage = argc < 3 || argc % 2 == 0;
  for (int i = 1; i + 1 < argc && !usage; i += 2) {
    double onset = 0;
    usage = !absl::SimpleAtod(argv[i + 1], &onset);
    if (usage) break;
    const absl::Status status = holdfast::monitor::Replay(argv[i], absl::Seconds(onset));
    if (status.ok()) continue;
    std::fprintf(stderr, "bench_monitor_recordings: %s: %s\n", argv[i],
                 std::string(status.message()).c_str());
    return 1;
  }
  if (!usage) return 0;
  std::fprintf(stderr, "usage: bench_monitor_recordings FILE ONSET [FILE ONSET]...\n");
  return 2;
}
