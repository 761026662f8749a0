// The trainer's part of faults.h: what each fault of the file makes this rank do.
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <span>
#include <vector>

#include "absl/strings/str_format.h"
#include "examples/collectives/device.h"
#include "examples/collectives/status_macros.h"
#include "examples/tiny_lm/sections.h"
#include "examples/tiny_lm/trainer.h"

namespace tiny_lm {
namespace {

using Clock = std::chrono::steady_clock;

int64_t MonotonicNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch())
      .count();
}

// Passes the time, asleep or not. An infinite duration never ends.
void Spend(absl::Duration duration, bool is_busy) {
  const bool is_endless = duration == absl::InfiniteDuration();
  const Clock::time_point end =
      is_endless ? Clock::time_point::max() : Clock::now() + absl::ToChronoNanoseconds(duration);
  while (Clock::now() < end) {
    if (!is_busy) {
      const absl::Duration left =
          is_endless ? absl::Hours(1) : absl::FromChrono(end - Clock::now());
      const timespec rest = absl::ToTimespec(std::max(left, absl::ZeroDuration()));
      // A signal that does not end the process changes nothing: the loop looks again.
      static_cast<void>(clock_nanosleep(CLOCK_MONOTONIC, 0, &rest, nullptr));
    }
  }
}

// A device stands still for ever as long as anybody looks.
absl::Duration ForDevice(absl::Duration duration) {
  return std::min(duration, absl::Hours(24 * 365));
}

}  // namespace

const Fault* Trainer::Acting(FaultKind kind) const {
  for (const Fault& fault : acting_) {
    if (fault.kind == kind) return &fault;
  }
  return nullptr;
}

void Trainer::BeginFaults(uint64_t step) {
  if (const absl::Status status = faults_.Refresh(step); !status.ok()) {
    log_.Print("faults_refused",
               absl::StrFormat("\"text\":%s", JsonString(std::string(status.message()))));
  }
  acting_ = faults_.ActingIn(step);
  std::set<std::string> lines;
  for (const Fault& fault : acting_) {
    lines.insert(fault.line);
    // One that goes on is told once.
    if (acted_lines_.contains(fault.line) && fault.every == 1 && fault.kind != FaultKind::kPause) {
      continue;
    }
    log_.Print("fault",
               absl::StrFormat("\"kind\":\"%s\",\"step\":%d,\"monotonic_ns\":%d,"
                               "\"line\":%s",
                               Name(fault.kind), step, MonotonicNs(), JsonString(fault.line)));
  }
  acted_lines_ = std::move(lines);
  if (const Fault* fault = Acting(FaultKind::kGpuHang)) {
    context_->device().HangNextOperation(ForDevice(fault->duration));
  }
  if (const Fault* fault = Acting(FaultKind::kFlushStall)) {
    context_->device().StallFlush(ForDevice(fault->duration));
  }
  for (const Fault& fault : acting_) {
    if (fault.kind != FaultKind::kPause) continue;
    std::optional<Section> section;
    if (!fault.section.empty()) section.emplace(job(), fault.section.c_str());
    Spend(fault.duration, fault.is_busy);
  }
}

void Trainer::SlowData() const {
  if (const Fault* fault = Acting(FaultKind::kSlowData)) Spend(fault->duration, false);
}

double Trainer::ComputeFactor() const {
  const Fault* fault = Acting(FaultKind::kSlowCompute);
  return fault == nullptr ? 1 : fault->factor;
}

absl::Status Trainer::ActBeforeReduction() {
  if (const Fault* fault = Acting(FaultKind::kNeverEnter)) Spend(fault->duration, false);
  if (const Fault* fault = Acting(FaultKind::kEndlessLoop)) Spend(fault->duration, true);
  // At once, as a crash ends: nobody is told goodbye.
  if (const Fault* fault = Acting(FaultKind::kExit)) _exit(fault->status);
  const bool wrong_size = Acting(FaultKind::kWrongSize) != nullptr;
  if (!wrong_size && Acting(FaultKind::kWrongKind) == nullptr) return absl::OkStatus();
  // In the place of what the others do next with the same ranks.
  collectives::Communicator& ranks = data_ranks_ == nullptr ? *metrics_ranks_ : *data_ranks_;
  std::vector<int64_t> data(data_ranks_ == nullptr ? metrics_.size() : partition_.exchange_count());
  if (!wrong_size) return ranks.Broadcast(std::as_writable_bytes(std::span(data)), 0).Wait();
  const bool scatters = data_ranks_ != nullptr && partition_.layout().zero != Zero::kReplicated;
  // What is scattered is counted per rank, as NCCL does: one less for each.
  const size_t missing = std::min<size_t>(scatters ? ranks.size() : 1, data.size());
  const std::span<int64_t> shorter = std::span(data).first(data.size() - missing);
  return scatters ? ranks.ReduceScatter(shorter).Wait() : ranks.AllReduce(shorter).Wait();
}

void Trainer::ActBehindStep() {
  if (Acting(FaultKind::kNan) == nullptr) return;
  constexpr uint16_t kBfloat16Nan = 0x7fc0;
  if (!state_.parameters.empty()) state_.parameters.front() = kBfloat16Nan;
  // Else the optimizer would overwrite it.
  if (!state_.master.empty()) state_.master.front() = std::numeric_limits<float>::quiet_NaN();
}

}  // namespace tiny_lm
