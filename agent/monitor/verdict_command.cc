#include "agent/monitor/verdict_command.h"

#include <signal.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "monitor/finding_record.h"

namespace holdfast {
namespace {

// A variable of the environment holds no NUL, and the kernel refuses one of 128 KiB.
std::string Variable(const char* name, std::string_view value) {
  constexpr size_t kBytesMax = 4096;
  std::string text(value.substr(0, kBytesMax));
  std::replace(text.begin(), text.end(), '\0', ' ');
  return absl::StrCat(name, "=", text);
}

std::string RanksOf(const monitor::Finding& finding) {
  std::string ranks;
  for (const monitor::Suspect& suspect : finding.suspects) {
    absl::StrAppend(&ranks, ranks.empty() ? "" : ",", Value(suspect.rank));
  }
  return ranks;
}

}  // namespace

VerdictCommand::VerdictCommand(Options options, EventLoop& loop)
    : options_(std::move(options)), loop_(loop) {}

VerdictCommand::~VerdictCommand() {
  for (const auto& [number, running] : running_) {
    loop_.Unwatch(running.child.pidfd.get());
    loop_.CancelTimer(running.timer);
  }
}

void VerdictCommand::Warn(const std::string& text) const {
  if (options_.warn) options_.warn(absl::StrCat("on_verdict: ", text));
}

void VerdictCommand::Run(const monitor::FindingRecord& record, const monitor::FindingEvent& event) {
  const monitor::Finding& finding = record.finding;
  Call call;
  call.id = finding.id;
  call.json = absl::StrCat(monitor::OneLine(monitor::FindingRecordObject(record)), "\n");
  call.variables = {Variable("HOLDFAST_EVENT", Name(event.change)),
                    Variable("HOLDFAST_FINDING", finding.id),
                    Variable("HOLDFAST_JOB", record.job),
                    Variable("HOLDFAST_ATTEMPT_KEY", record.attempt_key),
                    Variable("HOLDFAST_GRADE", Name(finding.grade)),
                    Variable("HOLDFAST_FAULT", Name(finding.fault)),
                    Variable("HOLDFAST_SCOPE", Name(finding.scope)),
                    Variable("HOLDFAST_RANKS", RanksOf(finding)),
                    Variable("HOLDFAST_CONFIDENCE", absl::StrFormat("%.2f", finding.confidence)),
                    Variable("HOLDFAST_SENTENCE", finding.sentence)};
  if (running_.size() < options_.running_max) return Start(std::move(call));
  if (waiting_.size() < options_.waiting_max) {
    waiting_.push_back(std::move(call));
    return;
  }
  ++dropped_count_;
  Warn(absl::StrFormat("not run for finding %s: %d run and %d wait already", call.id,
                       running_.size(), waiting_.size()));
}

void VerdictCommand::Start(Call call) {
  ++run_count_;
  // A sealed file instead of a pipe: nobody has to feed it.
  absl::StatusOr<UniqueFd> input = SealedMemfd("holdfast finding", call.json);
  absl::StatusOr<Child> child = input.ok()
                                    ? SpawnShell(options_.command, call.variables, input->get())
                                    : absl::StatusOr<Child>(input.status());
  if (!child.ok()) {
    ++failure_count_;
    Warn(absl::StrFormat("for finding %s: %s", call.id, std::string(child.status().message())));
    return;
  }
  const uint64_t number = next_++;
  Running& running = running_[number];
  running.call = std::move(call);
  running.child = *std::move(child);
  running.timer = loop_.RunAfter(options_.timeout, [this, number] { OnTimeout(number); });
  loop_.Watch(running.child.pidfd.get(), EventLoop::FdEvents::kReadable,
              [this, number] { OnEnd(number); });
}

// It has not been reaped, so its number, and its group's, is still its own.
void VerdictCommand::OnTimeout(uint64_t number) {
  Running& running = running_.at(number);
  running.killed = true;
  kill(-running.child.pid, SIGKILL);
}

void VerdictCommand::OnEnd(uint64_t number) {
  Running running = std::move(running_.at(number));
  running_.erase(number);
  loop_.Unwatch(running.child.pidfd.get());
  loop_.CancelTimer(running.timer);
  const std::string how = Reap(running.child.pidfd.get());
  if (running.killed) {
    ++failure_count_;
    Warn(absl::StrFormat("for finding %s: killed after %s", running.call.id,
                         absl::FormatDuration(options_.timeout)));
  } else if (how != "exit code 0") {
    ++failure_count_;
    Warn(absl::StrFormat("for finding %s: %s", running.call.id, how));
  }
  while (!waiting_.empty() && running_.size() < options_.running_max) {
    Call next = std::move(waiting_.front());
    waiting_.pop_front();
    Start(std::move(next));
  }
}

}  // namespace holdfast
