#include "agent/run/run_recorder.h"

#include <optional>
#include <span>
#include <utility>
#include <variant>

#include "absl/status/statusor.h"
#include "base/check.h"
#include "monitor/recording.h"

namespace holdfast {
namespace {

// A payload that this agent has made.
monitor::RecordedStep StepOf(const std::string& payload) {
  absl::StatusOr<monitor::Recorded> recorded =
      monitor::DecodeRecorded(std::as_bytes(std::span(payload)));
  CHECK_OK(recorded.status());
  return std::get<monitor::RecordedStep>(*std::move(recorded));
}

}  // namespace

RunRecorder::RunRecorder(MonitorService& monitor, const std::string& job, size_t bytes_max)
    : bytes_max_(bytes_max) {
  absl::StatusOr<std::shared_ptr<MonitorStream>> stream =
      monitor.Subscribe(abi::MonitorQueryKind::kRecord, job, [this] { Take(); });
  status_ = stream.status();
  if (stream.ok()) stream_ = *std::move(stream);
}

void RunRecorder::Take() {
  while (std::optional<MonitorStream::Item> item = stream_->Take()) {
    lost_ += item->lost;
    bytes_ += item->text.size();
    steps_.push_back(std::make_shared<const std::string>(std::move(item->text)));
  }
  while (bytes_ > bytes_max_ && steps_.size() > 1) {
    std::vector<monitor::RankRole> roles = StepOf(*steps_.front()).step.roles;
    if (!roles.empty()) roles_ = std::move(roles);
    bytes_ -= steps_.front()->size();
    steps_.pop_front();
    ++lost_;
  }
}

RunRecorder::Kept RunRecorder::Keep() const {
  return {{steps_.begin(), steps_.end()}, roles_, lost_};
}

std::string RunRecorder::FileOf(const Kept& kept) {
  monitor::RecordingWriter writer;
  std::string file = writer.Begin();
  if (kept.lost > 0) {
    file += writer.Append(monitor::EncodeRecorded(monitor::RecordedLoss{kept.lost}));
  }
  for (size_t i = 0; i < kept.steps.size(); ++i) {
    // What the analysis was told before these began it must be told with the first.
    if (i == 0 && !kept.roles.empty()) {
      monitor::RecordedStep first = StepOf(*kept.steps[0]);
      if (first.step.roles.empty()) first.step.roles = kept.roles;
      file += writer.Append(monitor::EncodeRecorded(std::move(first)));
      continue;
    }
    file += writer.Append(*kept.steps[i]);
  }
  return file + writer.End();
}

}  // namespace holdfast
