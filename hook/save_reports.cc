#include "hook/save_reports.h"

namespace holdfast::hook {
namespace {

constexpr int kTriesMax = 1000;

hf_save_state ToState(uint32_t state) {
  return state <= HF_SAVE_FAILED ? static_cast<hf_save_state>(state) : HF_SAVE_NONE;
}

AgentReport Copy(const abi::SaveReport& entry) {
  AgentReport report;
  report.step = entry.step.load(std::memory_order_relaxed);
  report.state = ToState(entry.state.load(std::memory_order_relaxed));
  report.block_count = entry.block_count.load(std::memory_order_relaxed);
  report.blocks_captured = entry.blocks_captured.load(std::memory_order_relaxed);
  report.blocks_flushed = entry.blocks_flushed.load(std::memory_order_relaxed);
  report.capture_ns = entry.capture_ns.load(std::memory_order_relaxed);
  report.flush_ns = entry.flush_ns.load(std::memory_order_relaxed);
  report.commit_ns = entry.commit_ns.load(std::memory_order_relaxed);
  const int32_t code = entry.code.load(std::memory_order_relaxed);
  if (code != HF_OK) {
    char text[sizeof(entry.text)];
    for (size_t i = 0; i < sizeof(text); ++i) {
      text[i] = __atomic_load_n(&entry.text[i], __ATOMIC_RELAXED);
    }
    text[sizeof(text) - 1] = '\0';
    report.error = Error(static_cast<hf_code>(code), "%s", text);
  }
  return report;
}

std::optional<AgentReport> ReadConsistent(const abi::SaveReport& entry) {
  for (int tries = 0; tries < kTriesMax; ++tries) {
    // Pairs with the agent's release of an even sequence.
    const uint32_t before = entry.sequence.load(std::memory_order_acquire);
    if (before % 2 != 0) continue;
    const AgentReport report = Copy(entry);
    // A read-don't-modify-write would be the textbook's fence; with acquire loads of the fields
    // being relaxed, this fence keeps them before the second look at the sequence.
    std::atomic_thread_fence(std::memory_order_acquire);
    if (entry.sequence.load(std::memory_order_relaxed) == before) return report;
  }
  return std::nullopt;
}

}  // namespace

std::optional<AgentReport> FindReport(const abi::RankPage& page, uint64_t step) {
  const uint32_t next = page.next_report_index.load(std::memory_order_acquire);
  for (uint32_t back = 1; back <= abi::kReportCount; ++back) {
    const abi::SaveReport& entry = page.reports[(next - back) % abi::kReportCount];
    if (entry.step.load(std::memory_order_relaxed) != step) continue;
    std::optional<AgentReport> report = ReadConsistent(entry);
    if (report.has_value() && report->step == step && report->state != HF_SAVE_NONE) return report;
  }
  return std::nullopt;
}

}  // namespace holdfast::hook
