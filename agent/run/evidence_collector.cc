#include "agent/run/evidence_collector.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/status/statusor.h"
#include "agent/run/small_files.h"
#include "nlohmann/json.hpp"

namespace holdfast {
namespace {

using nlohmann::ordered_json;

std::string Text(const ordered_json& json) {
  return json.dump(1, ' ', false, ordered_json::error_handler_t::replace) + "\n";
}

// The agent's status without those of its settings that may hold a secret, as on_verdict, which is
// a command.
std::string WithoutSecrets(const std::string& status_json) {
  static constexpr const char* kShown[] = {
      "roots",     "socket",      "state_directory",  "host_memory", "every",       "threads",
      "ring",      "direct",      "drain_deadline",   "linger",      "kernel_log",  "log_file",
      "log_level", "block_bytes", "images_in_memory", "ras_address", "flush_writes"};
  ordered_json status = ordered_json::parse(status_json, nullptr, false);
  if (!status.is_object()) return status_json;
  for (auto& [key, value] : status["agent"]["config"].items()) {
    const bool is_shown = std::any_of(std::begin(kShown), std::end(kShown),
                                      [&name = key](const char* shown) { return name == shown; });
    if (!is_shown) value = "left out";
  }
  return Text(status);
}

ordered_json Parsed(const absl::StatusOr<std::string>& answer) {
  if (!answer.ok()) return {{"error", std::string(answer.status().message())}};
  ordered_json parsed = ordered_json::parse(*answer, nullptr, false);
  return parsed.is_discarded() ? ordered_json() : parsed;
}

}  // namespace

struct EvidenceCollector::Collecting {
  Evidence evidence;
  std::function<void(absl::Status)> done;
  int pending = 1;  // parts
  Missing missing;
  ordered_json monitor;     // {"status": ..., "waits": ..., "findings": ...}, as docs/MONITOR.md
  int answers_pending = 0;  // of the monitor
};

EvidenceCollector::EvidenceCollector(EvidenceWorld world, std::string job)
    : world_(std::move(world)), job_(std::move(job)) {
  if (world_.monitor != nullptr) recorder_ = std::make_unique<RunRecorder>(*world_.monitor, job_);
}

void EvidenceCollector::Collect(Evidence evidence, const std::string& attempt_key,
                                std::function<void(absl::Status)> done) {
  // The driver's word explains an end: it is heard before anything is decided about it.
  if (world_.read_kernel_log) world_.read_kernel_log();
  if (absl::Status made = MakeDirectories(evidence.directory); !made.ok()) return done(made);
  auto collecting = std::make_shared<Collecting>();
  evidence.kernel_log = world_.kernel_log;
  if (world_.status_json) evidence.status_json = WithoutSecrets(world_.status_json());
  collecting->evidence = std::move(evidence);
  collecting->done = std::move(done);
  Run(collecting, [collecting] { return CollectFromNode(collecting->evidence); });
  if (world_.waiting != nullptr) {
    ++collecting->pending;
    world_.waiting->Ask(
        job_, attempt_key, abi::kWitnessFlightRecord | abi::kWitnessPythonStacks,
        Evidence::kWitnessDeadline,
        [this, alive = std::weak_ptr<bool>(alive_), collecting](WaitingProcesses::Round round) {
          if (alive.expired()) return;
          auto answers = std::make_shared<WaitingProcesses::Round>(std::move(round));
          Run(collecting, [collecting, answers] {
            return CollectAnswers(collecting->evidence.directory, std::move(*answers));
          });
        });
  }
  if (world_.monitor != nullptr) AskMonitor(collecting);
}

void EvidenceCollector::Run(const std::shared_ptr<Collecting>& collecting,
                            std::function<Missing()> work) {
  auto missing = std::make_shared<Missing>();
  world_.pool.Run([work = std::move(work), missing] { *missing = work(); },
                  [this, alive = std::weak_ptr<bool>(alive_), collecting, missing] {
                    if (!alive.expired()) PartIsThere(collecting, std::move(*missing));
                  });
}

void EvidenceCollector::AskMonitor(const std::shared_ptr<Collecting>& collecting) {
  using Kind = abi::MonitorQueryKind;
  constexpr std::pair<const char*, Kind> kQuestions[] = {
      {"status", Kind::kStatus}, {"waits", Kind::kWaits}, {"findings", Kind::kFindings}};
  ++collecting->pending;
  if (recorder_ != nullptr && !recorder_->status().ok()) {
    collecting->missing.push_back(recorder_->status().ToString());
  }
  collecting->answers_pending = std::size(kQuestions);
  for (const auto& [part, kind] : kQuestions) {
    MonitorService::Question question;
    question.kind = kind;
    question.job = job_;
    collecting->monitor[part] = nullptr;  // in this order, whichever is answered first
    world_.monitor->Ask(std::move(question), [this, alive = std::weak_ptr<bool>(alive_), collecting,
                                              name = part](absl::StatusOr<std::string> answer) {
      if (alive.expired()) return;
      collecting->monitor[name] = Parsed(answer);
      if (--collecting->answers_pending > 0) return;
      RunRecorder::Kept recording;
      if (recorder_ != nullptr) recording = recorder_->Keep();
      Run(collecting, [collecting, recording = std::move(recording)] {
        return CollectMonitor(collecting->evidence.directory, Text(collecting->monitor), recording);
      });
    });
  }
}

void EvidenceCollector::PartIsThere(const std::shared_ptr<Collecting>& collecting,
                                    Missing missing) {
  collecting->missing.insert(collecting->missing.end(), missing.begin(), missing.end());
  if (--collecting->pending > 0) return;
  auto written = std::make_shared<absl::Status>();
  world_.pool.Run(
      [collecting, written] { *written = WriteSummary(collecting->evidence, collecting->missing); },
      [alive = std::weak_ptr<bool>(alive_), collecting, written] {
        if (!alive.expired()) collecting->done(*written);
      });
}

}  // namespace holdfast
