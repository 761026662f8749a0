// /metrics: the agent and its jobs in numbers, in Prometheus' text format (0.0.4, "Exposition
// formats" of its documentation). Names follow its conventions: base units, `_total` for what only
// grows. docs/OPERATING.md repeats the table, and a test compares document and output.
#ifndef HOLDFAST_AGENT_METRICS_H_
#define HOLDFAST_AGENT_METRICS_H_

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <utility>

#include "absl/time/time.h"
#include "agent/job_snapshots.h"

namespace holdfast {

struct MetricFamily {
  const char* name;
  const char* type;    // "gauge" or "counter"
  const char* labels;  // "job, state"; empty: none
  const char* help;    // one sentence
};
std::span<const MetricFamily> MetricFamilies();
// The table in Markdown.
std::string MetricsTable();

inline constexpr char kMetricsContentType[] = "text/plain; version=0.0.4; charset=utf-8";

// The agent's own part.
struct AgentNumbers {
  std::string version;
  std::string mode;  // "private" or "system"
  uint32_t worker_restarts = 0;
  uint32_t keeper_restarts = 0;
  bool is_ready = false;
  uint64_t memory_limit_bytes = 0;
  uint64_t memory_used_bytes = 0;
  uint64_t open_sessions = 0;
  uint64_t pending_images = 0;
  uint64_t connections = 0;
  uint64_t garbage_messages = 0;
  absl::Duration processor_time;  // of the worker
  uint64_t resident_bytes = 0;    // of the worker; with what it maps of images
  std::map<std::pair<std::string, int>, uint64_t> http_answers;  // by path and code
};
// What the kernel says of this process: processor_time and resident_bytes.
void ReadProcess(AgentNumbers& numbers);

std::string MetricsText(const AgentNumbers& agent, std::span<const JobSnapshot> jobs);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_METRICS_H_
