#include "checkpoint/save_reports.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstring>
#include <ctime>
#include <limits>
#include <utility>

#include "base/check.h"
#include "base/status_macros.h"
#include "base/utf8.h"

namespace holdfast {
namespace {

int64_t Nanoseconds(absl::Duration duration) {
  // 0 means "not yet" in a report.
  return std::max<int64_t>(1, absl::ToInt64Nanoseconds(duration));
}

}  // namespace

SaveReports::SaveReports(std::shared_ptr<SharedMapping> mapping, uint64_t session_id,
                         uint64_t due_every_steps)
    : mapping_(std::move(mapping)) {
  page().magic = abi::kRankPageMagic;
  page().version = abi::kProtocolVersion;
  page().session_id = session_id;
  page().due_every_steps = due_every_steps;
}

absl::StatusOr<std::unique_ptr<SaveReports>> SaveReports::Create(uint64_t session_id,
                                                                 uint64_t due_every_steps) {
  ASSIGN_OR_RETURN(std::shared_ptr<SharedMapping> mapping,
                   SharedMapping::Create("holdfast-rank-page", sizeof(abi::RankPage)));
  std::unique_ptr<SaveReports> reports(
      new SaveReports(std::move(mapping), session_id, due_every_steps));
  abi::RankPage& page = reports->page();
  page.committed_process_step.store(abi::kNoStep, std::memory_order_relaxed);
  page.committed_power_step.store(abi::kNoStep, std::memory_order_relaxed);
  for (abi::SaveReport& report : page.reports) {
    report.step.store(abi::kNoStep, std::memory_order_relaxed);
  }
  return reports;
}

absl::StatusOr<std::unique_ptr<SaveReports>> SaveReports::Reopen(uint64_t session_id,
                                                                 uint64_t due_every_steps,
                                                                 UniqueFd fd) {
  ASSIGN_OR_RETURN(std::shared_ptr<SharedMapping> mapping,
                   SharedMapping::Reopen("rank page", std::move(fd), sizeof(abi::RankPage)));
  std::unique_ptr<SaveReports> reports(
      new SaveReports(std::move(mapping), session_id, due_every_steps));
  reports->LoadEntries();
  return reports;
}

void SaveReports::LoadEntries() {
  next_entry_ = page().next_report_index.load(std::memory_order_relaxed) % abi::kReportCount;
  for (size_t index = 0; index < abi::kReportCount; ++index) {
    abi::SaveReport& report = page().reports[index];
    const uint32_t sequence = report.sequence.load(std::memory_order_relaxed);
    sequence_ = std::max(sequence_, sequence & ~uint32_t{1});
    // A former worker died while it wrote this one: half of it is of another save.
    if (sequence % 2 != 0) {
      report.step.store(abi::kNoStep, std::memory_order_relaxed);
      report.sequence.store(sequence + 1, std::memory_order_release);
      continue;
    }
    Entry& entry = entries_[index];
    const uint64_t step = report.step.load(std::memory_order_relaxed);
    const uint32_t state = report.state.load(std::memory_order_relaxed);
    if (step == abi::kNoStep || state > static_cast<uint32_t>(SaveState::kFailed)) continue;
    entry.step = Step{step};
    entry.state = static_cast<SaveState>(state);
    entry.block_count = report.block_count.load(std::memory_order_relaxed);
    entry.blocks_captured = report.blocks_captured.load(std::memory_order_relaxed);
    entry.blocks_flushed = report.blocks_flushed.load(std::memory_order_relaxed);
    entry.capture_ns = report.capture_ns.load(std::memory_order_relaxed);
    entry.flush_ns = report.flush_ns.load(std::memory_order_relaxed);
    entry.commit_ns = report.commit_ns.load(std::memory_order_relaxed);
    entry.code = report.code.load(std::memory_order_relaxed);
    entry.text.assign(report.text, strnlen(report.text, sizeof(report.text)));
  }
}

abi::RankPage& SaveReports::page() {
  return *reinterpret_cast<abi::RankPage*>(mapping_->bytes().data());
}

const abi::RankPage& SaveReports::page() const {
  return *reinterpret_cast<const abi::RankPage*>(mapping_->bytes().data());
}

uint64_t SaveReports::asked_step() const {
  return page().due_asked_step.load(std::memory_order_seq_cst);
}

void SaveReports::SetDueStep(uint64_t step) {
  page().due_step.store(step, std::memory_order_seq_cst);
}

SaveReports::Heartbeat SaveReports::heartbeat() const {
  Heartbeat heartbeat;
  heartbeat.count = page().heartbeat_count.load(std::memory_order_acquire);
  heartbeat.step = page().heartbeat_step.load(std::memory_order_relaxed);
  return heartbeat;
}

std::optional<absl::Duration> SaveReports::held() const {
  // A call that is open before the sum is read and behind it is not in the sum.
  const int64_t since_ns = page().held_since_ns.load(std::memory_order_acquire);
  const uint64_t sum_ns = page().held_ns.load(std::memory_order_acquire);
  if (since_ns == 0 && sum_ns == 0) return std::nullopt;
  const bool open =
      since_ns != 0 && page().held_since_ns.load(std::memory_order_acquire) == since_ns;
  const absl::Duration past = absl::Nanoseconds(
      static_cast<int64_t>(std::min<uint64_t>(sum_ns, std::numeric_limits<int64_t>::max())));
  if (!open) return past;
  timespec now = {};
  clock_gettime(CLOCK_MONOTONIC, &now);  // the trainer's clock, on the same machine
  const absl::Duration present = absl::DurationFromTimespec(now) - absl::Nanoseconds(since_ns);
  return past + std::max(present, absl::ZeroDuration());
}

std::vector<std::string> SaveReports::sections() const {
  std::vector<std::string> sections;
  const uint32_t depth = std::min<uint32_t>(page().section_depth.load(std::memory_order_acquire),
                                            abi::kSectionDepthMax);
  for (uint32_t level = 0; level < depth; ++level) {
    std::string name;
    for (const char& byte : page().section_names[level]) {
      // The trainer may be writing it.
      const char c = std::atomic_ref<char>(const_cast<char&>(byte)).load(std::memory_order_relaxed);
      if (c == 0) break;
      name += c;
    }
    sections.push_back(IsUtf8(name) ? std::move(name) : "?");
  }
  return sections;
}

std::optional<SaveReports::Committed> SaveReports::committed(Survives survives) const {
  const std::optional<Step> step = committed_[static_cast<size_t>(survives)];
  if (!step.has_value()) return std::nullopt;
  Committed committed{*step, std::nullopt};
  for (const Entry& entry : entries_) {
    // Without a beginning it was committed before this agent's time.
    if (entry.step == step && entry.begun > absl::ZeroDuration()) committed.begun = entry.begun;
  }
  return committed;
}

SaveReports::Entry* SaveReports::Find(Step step) {
  for (Entry& entry : entries_) {
    if (entry.step == step) return &entry;
  }
  return nullptr;
}

void SaveReports::Begin(Step step, uint64_t block_count, absl::Duration begun) {
  Entry* entry = Find(step);
  if (entry == nullptr) {
    entry = &entries_[next_entry_];
    next_entry_ = (next_entry_ + 1) % abi::kReportCount;
  }
  *entry = Entry();
  entry->step = step;
  entry->state = SaveState::kCapturing;
  entry->begun = begun;
  entry->block_count = block_count;
  Publish(*entry);
  page().next_report_index.store(next_entry_, std::memory_order_release);
  Wake();
}

void SaveReports::SetCounters(Step step, uint64_t blocks_captured, uint64_t blocks_flushed) {
  Entry* entry = Find(step);
  if (entry == nullptr) return;
  if (entry->blocks_captured == blocks_captured && entry->blocks_flushed == blocks_flushed) return;
  entry->blocks_captured = blocks_captured;
  entry->blocks_flushed = blocks_flushed;
  Publish(*entry);
}

void SaveReports::SetCaptured(Step step, absl::Duration capture_time) {
  Entry* entry = Find(step);
  if (entry == nullptr) return;
  if (entry->state == SaveState::kCapturing) entry->state = SaveState::kCaptured;
  entry->capture_ns = Nanoseconds(capture_time);
  Publish(*entry);
  Wake();
}

void SaveReports::SetFlushed(Step step, absl::Duration flush_time) {
  Entry* entry = Find(step);
  if (entry == nullptr) return;
  entry->flush_ns = Nanoseconds(flush_time);
  Publish(*entry);
  Wake();
}

void SaveReports::SetCommitted(Step step, Survives survives, absl::Duration now) {
  if (Entry* entry = Find(step); entry != nullptr) {
    const SaveState state =
        survives == Survives::kPower ? SaveState::kCommittedPower : SaveState::kCommittedProcess;
    const bool better = entry->state == SaveState::kFailed || entry->state < state;
    // What failed cannot be committed by process alone any more, but a commit on storage is one.
    if (better && (entry->state != SaveState::kFailed || survives == Survives::kPower)) {
      entry->state = state;
      entry->code = 0;
      entry->text.clear();
    }
    if (survives == Survives::kPower) entry->commit_ns = Nanoseconds(now - entry->begun);
    Publish(*entry);
  }
  RaiseCommitted(step, survives);
}

void SaveReports::AddCommitted(Step step) {
  if (Find(step) != nullptr) return;
  Entry& entry = entries_[next_entry_];
  next_entry_ = (next_entry_ + 1) % abi::kReportCount;
  entry = Entry();
  entry.step = step;
  entry.state = SaveState::kCommittedPower;
  Publish(entry);
  page().next_report_index.store(next_entry_, std::memory_order_release);
  Wake();
}

void SaveReports::SetFailed(Step step, const absl::Status& why) {
  CHECK(!why.ok());
  Entry* entry = Find(step);
  if (entry == nullptr || entry->state == SaveState::kCommittedPower) return;
  entry->state = SaveState::kFailed;
  entry->code = static_cast<int32_t>(why.code());
  entry->text = std::string(why.message());
  Publish(*entry);
  Wake();
}

void SaveReports::RaiseCommitted(Step step, Survives survives) {
  std::optional<Step>& committed = committed_[static_cast<size_t>(survives)];
  if (!committed || *committed < step) committed = step;
  std::atomic<uint64_t>& word =
      survives == Survives::kPower ? page().committed_power_step : page().committed_process_step;
  word.store(Value(*committed), std::memory_order_release);
  // What survives power survives a process.
  if (survives == Survives::kPower)
    RaiseCommitted(*committed, Survives::kProcess);
  else
    Wake();
}

void SaveReports::LowerCommitted(std::optional<Step> newest) {
  newest = std::max(newest, committed_[static_cast<size_t>(Survives::kPower)]);
  committed_[static_cast<size_t>(Survives::kProcess)] = newest;
  const uint64_t step = newest.has_value() ? Value(*newest) : abi::kNoStep;
  if (page().committed_process_step.exchange(step, std::memory_order_release) != step) Wake();
}

void SaveReports::SetFencedBy(Attempt attempt) {
  page().fenced_by.store(Value(attempt), std::memory_order_release);
  Wake();
}

void SaveReports::Wake() {
  page().agent_events.fetch_add(1, std::memory_order_release);
  syscall(SYS_futex, &page().agent_events, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void SaveReports::Publish(const Entry& entry) {
  const size_t index = static_cast<size_t>(&entry - entries_.data());
  abi::SaveReport& report = page().reports[index];
  // A seqlock's writer: the odd number is seen before any new field, the even one after all.
  sequence_ += 2;
  report.sequence.store(sequence_ - 1, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_release);
  report.state.store(static_cast<uint32_t>(entry.state), std::memory_order_relaxed);
  report.step.store(Value(*entry.step), std::memory_order_relaxed);
  report.block_count.store(entry.block_count, std::memory_order_relaxed);
  report.blocks_captured.store(entry.blocks_captured, std::memory_order_relaxed);
  report.blocks_flushed.store(entry.blocks_flushed, std::memory_order_relaxed);
  report.capture_ns.store(entry.capture_ns, std::memory_order_relaxed);
  report.flush_ns.store(entry.flush_ns, std::memory_order_relaxed);
  report.commit_ns.store(entry.commit_ns, std::memory_order_relaxed);
  report.code.store(entry.code, std::memory_order_relaxed);
  const size_t text_bytes = std::min(entry.text.size(), sizeof(report.text) - 1);
  std::memcpy(report.text, entry.text.data(), text_bytes);
  std::memset(report.text + text_bytes, 0, sizeof(report.text) - text_bytes);
  report.sequence.store(sequence_, std::memory_order_release);
}

}  // namespace holdfast
