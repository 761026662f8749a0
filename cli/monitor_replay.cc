#include "cli/monitor_replay.h"

#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <variant>

#include "base/status_macros.h"
#include "monitor/job_analysis.h"
#include "monitor/recording.h"

namespace holdfast::cli {

absl::StatusOr<Replayed> Replay(std::string_view file, const std::string& job,
                                const std::string& topology) {
  ASSIGN_OR_RETURN(const auto reader, monitor::RecordingReader::Create(file));
  Replayed replayed;
  std::map<std::string, std::unique_ptr<monitor::JobAnalysis>> analyses;
  for (;;) {
    absl::StatusOr<std::optional<monitor::Recorded>> next = reader->Next();
    if (!next.ok()) replayed.damage = next.status();
    if (!next.ok() || !next->has_value()) break;
    if (const auto* loss = std::get_if<monitor::RecordedLoss>(&**next); loss != nullptr) {
      replayed.lost += loss->steps;
      continue;
    }
    auto& recorded = std::get<monitor::RecordedStep>(**next);
    if (!job.empty() && recorded.job != job) continue;
    ++replayed.steps;
    replayed.jobs.insert(recorded.job);
    std::unique_ptr<monitor::JobAnalysis>& analysis = analyses[recorded.job];
    if (!topology.empty()) recorded.step.topology.clear();
    if (analysis == nullptr) {
      if (!topology.empty()) recorded.step.topology = topology;
      analysis = std::make_unique<monitor::JobAnalysis>(monitor::Thresholds{}, recorded.job);
    }
    const monitor::FindingLog::When when{recorded.step.elapsed, std::nullopt};
    const auto result = analysis->Step(std::move(recorded.step));
    replayed.log.Take(*analysis, result, when);
  }
  replayed.ended = reader->ended();
  return replayed;
}

}  // namespace holdfast::cli
