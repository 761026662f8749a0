// A step as an agent or a recording gives it, and a recording as a file: what is read can be
// written again with the same bytes, and analysed.
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "base/check.h"
#include "monitor/finding_log.h"
#include "monitor/job_analysis.h"
#include "monitor/recording.h"
#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {
namespace {

using monitor::Recorded;

bool IsRefusal(const absl::Status& status) {
  return status.code() == absl::StatusCode::kDataLoss ||
         status.code() == absl::StatusCode::kInvalidArgument;
}

// The world sizes of hostile reports cost memory by right; only small ones are analysed here.
bool IsSmall(const monitor::JobStep& step) {
  constexpr uint32_t kRanksMax = 64;
  for (const monitor::NodeReport& report : step.reports) {
    if (report.world_size > kRanksMax) return false;
    const auto summary = monitor::DecodeSummary(std::as_bytes(std::span(report.summary)));
    if (!summary.ok()) continue;
    for (const monitor::RankReport& rank : summary->ranks) {
      if (Value(rank.rank) > kRanksMax) return false;
    }
  }
  return true;
}

}  // namespace

bool FuzzRecordedStep(Input input) {
  const auto recorded = monitor::DecodeRecorded(std::as_bytes(input));
  if (!recorded.ok()) {
    CHECK(IsRefusal(recorded.status()));
    return false;
  }
  CHECK(monitor::EncodeRecorded(*recorded) ==
        std::string_view(reinterpret_cast<const char*>(input.data()), input.size()));
  const auto* step = std::get_if<monitor::RecordedStep>(&*recorded);
  if (step == nullptr || !IsSmall(step->step)) return true;
  monitor::JobAnalysis analysis(monitor::Thresholds{}, step->job);
  monitor::FindingLog log;
  for (int i = 0; i < 3; ++i) {
    monitor::JobStep again = step->step;
    again.elapsed += absl::Seconds(i);
    const auto result = analysis.Step(std::move(again));
    log.Take(analysis, result, {absl::Seconds(i), std::nullopt});
  }
  return true;
}

bool FuzzRecording(Input input) {
  const std::string_view file(reinterpret_cast<const char*>(input.data()), input.size());
  const auto reader = monitor::RecordingReader::Create(file);
  if (!reader.ok()) {
    CHECK(reader.status().code() == absl::StatusCode::kDataLoss ||
          reader.status().code() == absl::StatusCode::kUnimplemented);
    return false;
  }
  for (;;) {
    const auto next = (*reader)->Next();
    if (!next.ok()) {
      CHECK(IsRefusal(next.status()));
      CHECK(!(*reader)->ended());
      // It stays where it is.
      CHECK((*reader)->Next().ok() && !(*reader)->Next()->has_value());
      return false;
    }
    if (!next->has_value()) return true;
  }
}

}  // namespace holdfast::fuzz
