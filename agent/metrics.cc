#include "agent/metrics.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/recovery/phases.h"
#include "base/check.h"

namespace holdfast {
namespace {

constexpr MetricFamily kFamilies[] = {
    {"holdfast_agent_info", "gauge", "version, mode", "1; its labels say what the agent is."},
    {"holdfast_agent_ready", "gauge", "",
     "1 if the agent serves; 0 while it takes over from a worker before it, or ends."},
    {"holdfast_agent_restarts_total", "counter", "process",
     "How often keeper and worker were started again after a death."},
    {"holdfast_agent_cpu_seconds_total", "counter", "", "Processor time of the worker."},
    {"holdfast_agent_resident_bytes", "gauge", "",
     "Resident memory of the worker, with what it maps of images."},
    {"holdfast_memory_limit_bytes", "gauge", "", "host_memory: the most that images may take."},
    {"holdfast_memory_used_bytes", "gauge", "", "What images take of it, or are promised."},
    {"holdfast_sessions_open", "gauge", "", "Ranks that have a job open."},
    {"holdfast_images_pending", "gauge", "", "Images that are not yet durable and can become so."},
    {"holdfast_connections", "gauge", "", "Connections to the agent's socket."},
    {"holdfast_garbage_messages_total", "counter", "",
     "Messages on the socket that were none of the protocol."},
    {"holdfast_http_answers_total", "counter", "path, code", "Answers of this port."},
    {"holdfast_job_state", "gauge", "job, state",
     "1 for the state that the job is in (the words of `holdfast`)."},
    {"holdfast_job_needs_human", "gauge", "job",
     "1 if `holdfast` names a command for a person to run."},
    {"holdfast_job_attempt", "gauge", "job", "Number of the job's newest attempt."},
    {"holdfast_job_ranks_open", "gauge", "job", "Ranks on this node that have the job open."},
    {"holdfast_job_step", "gauge", "job", "The greatest step that a rank has told."},
    {"holdfast_job_committed_step", "gauge", "job", "Step of the newest committed checkpoint."},
    {"holdfast_job_restarts_total", "counter", "job", "Restarts of this run."},
    {"holdfast_job_incidents_total", "counter", "job", "Incidents of the job, of all its runs."},
    {"holdfast_job_last_incident_seconds", "gauge", "job, phase",
     "Where the time of the last incident that is over went (`holdfast why`)."},
    {"holdfast_job_findings", "gauge", "job, grade",
     "Open suspicions and verdicts of the monitor."},
    {"holdfast_job_ranks_watched", "gauge", "job", "Ranks whose telemetry the monitor has."},
};

using Labels = std::initializer_list<std::pair<std::string_view, std::string_view>>;

class Exposition {
 public:
  // What is added next belongs to this family, which is in the table.
  void Begin(std::string_view name) {
    const auto family = std::find_if(std::begin(kFamilies), std::end(kFamilies),
                                     [&](const MetricFamily& one) { return name == one.name; });
    CHECK(family != std::end(kFamilies));
    name_ = family->name;
    absl::StrAppend(&text_, "# HELP ", family->name, " ", family->help, "\n# TYPE ", family->name,
                    " ", family->type, "\n");
  }
  void Add(uint64_t value, Labels labels = {}) { Line(absl::StrCat(value), labels); }
  void AddSeconds(absl::Duration value, Labels labels = {}) {
    Line(absl::StrFormat("%.9g", absl::ToDoubleSeconds(value)), labels);
  }
  std::string Take() && { return std::move(text_); }

 private:
  void Line(const std::string& value, Labels labels) {
    absl::StrAppend(&text_, name_);
    const char* before = "{";
    for (const auto& [label, text] : labels) {
      absl::StrAppend(&text_, before, std::string(label), "=\"", Escaped(text), "\"");
      before = ",";
    }
    absl::StrAppend(&text_, labels.size() == 0 ? "" : "}", " ", value, "\n");
  }
  static std::string Escaped(std::string_view text) {
    std::string escaped;
    for (const char c : text) {
      if (c == '\\' || c == '"') escaped += '\\';
      if (c == '\n') {
        escaped += "\\n";
      } else {
        escaped += c;
      }
    }
    return escaped;
  }

  std::string name_;
  std::string text_;
};

void AddAgent(const AgentNumbers& agent, Exposition& out) {
  out.Begin("holdfast_agent_info");
  out.Add(1, {{"version", agent.version}, {"mode", agent.mode}});
  out.Begin("holdfast_agent_ready");
  out.Add(agent.is_ready ? 1 : 0);
  out.Begin("holdfast_agent_restarts_total");
  out.Add(agent.worker_restarts, {{"process", "worker"}});
  out.Add(agent.keeper_restarts, {{"process", "keeper"}});
  out.Begin("holdfast_agent_cpu_seconds_total");
  out.AddSeconds(agent.processor_time);
  out.Begin("holdfast_agent_resident_bytes");
  out.Add(agent.resident_bytes);
  out.Begin("holdfast_memory_limit_bytes");
  out.Add(agent.memory_limit_bytes);
  out.Begin("holdfast_memory_used_bytes");
  out.Add(agent.memory_used_bytes);
  out.Begin("holdfast_sessions_open");
  out.Add(agent.open_sessions);
  out.Begin("holdfast_images_pending");
  out.Add(agent.pending_images);
  out.Begin("holdfast_connections");
  out.Add(agent.connections);
  out.Begin("holdfast_garbage_messages_total");
  out.Add(agent.garbage_messages);
  out.Begin("holdfast_http_answers_total");
  for (const auto& [key, count] : agent.http_answers) {
    out.Add(count, {{"path", key.first}, {"code", absl::StrCat(key.second)}});
  }
}

// One sample for each job that has a value.
template <typename ValueOf>
void AddJobs(std::string_view name, std::span<const JobSnapshot> jobs, Exposition& out,
             ValueOf value_of) {
  out.Begin(name);
  for (const JobSnapshot& job : jobs) {
    if (const std::optional<uint64_t> value = value_of(job); value.has_value()) {
      out.Add(*value, {{"job", job.job}});
    }
  }
}

std::optional<uint64_t> StepOf(const JobSnapshot& job) {
  std::optional<uint64_t> step;
  for (const Engine::RankProgress& rank : job.ranks) {
    if (rank.heartbeat_count > 0) step = std::max(step.value_or(0), Value(rank.step));
  }
  return step;
}

void AddLastIncidents(std::span<const JobSnapshot> jobs, Exposition& out) {
  out.Begin("holdfast_job_last_incident_seconds");
  for (const JobSnapshot& job : jobs) {
    if (!job.run.has_value()) continue;
    const auto& past = job.run->history.past;
    const auto last = std::find_if(past.rbegin(), past.rend(), [](const auto& incident) {
      return incident.outcome == recovery::Outcome::kResumed;
    });
    if (last == past.rend()) continue;
    const recovery::Phases phases = recovery::PhasesOf(*last);
    for (const recovery::NamedPhase& one : recovery::kDowntimePhases) {
      // Without their sum: whoever adds the samples up would count all twice.
      if (one.phase == &recovery::Phases::total) continue;
      const std::optional<absl::Duration>& phase = phases.*one.phase;
      if (phase.has_value()) out.AddSeconds(*phase, {{"job", job.job}, {"phase", one.name}});
    }
  }
}

}  // namespace

std::span<const MetricFamily> MetricFamilies() { return kFamilies; }

std::string MetricsTable() {
  std::string table = "| metric | type | labels | meaning |\n|---|---|---|---|\n";
  for (const MetricFamily& family : kFamilies) {
    absl::StrAppend(&table, "| `", family.name, "` | ", family.type, " | ", family.labels, " | ",
                    family.help, " |\n");
  }
  return table;
}

void ReadProcess(AgentNumbers& numbers) {
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) == 0) {
    numbers.processor_time =
        absl::DurationFromTimeval(usage.ru_utime) + absl::DurationFromTimeval(usage.ru_stime);
  }
  std::ifstream file("/proc/self/statm");
  uint64_t size_pages = 0;
  uint64_t resident_pages = 0;
  if (file >> size_pages >> resident_pages) {
    numbers.resident_bytes = resident_pages * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  }
}

std::string MetricsText(const AgentNumbers& agent, std::span<const JobSnapshot> jobs) {
  using Number = std::optional<uint64_t>;
  Exposition out;
  AddAgent(agent, out);
  out.Begin("holdfast_job_state");
  for (const JobSnapshot& job : jobs) {
    out.Add(1, {{"job", job.job}, {"state", StateOf(job)}});
  }
  AddJobs("holdfast_job_needs_human", jobs, out,
          [](const JobSnapshot& job) -> Number { return HumanStep(job) == "nothing" ? 0 : 1; });
  AddJobs("holdfast_job_attempt", jobs, out,
          [](const JobSnapshot& job) -> Number { return Value(job.attempt); });
  AddJobs("holdfast_job_ranks_open", jobs, out,
          [](const JobSnapshot& job) -> Number { return job.open_ranks; });
  AddJobs("holdfast_job_step", jobs, out, StepOf);
  AddJobs("holdfast_job_committed_step", jobs, out, [](const JobSnapshot& job) -> Number {
    if (!job.newest_committed.has_value()) return std::nullopt;
    return Value(job.newest_committed->step);
  });
  AddJobs("holdfast_job_restarts_total", jobs, out, [](const JobSnapshot& job) -> Number {
    return job.run.has_value() ? Number(job.run->history.restart_count) : std::nullopt;
  });
  AddJobs("holdfast_job_incidents_total", jobs, out, [](const JobSnapshot& job) -> Number {
    return job.run.has_value() ? Number(job.run->history.incident_count) : std::nullopt;
  });
  AddLastIncidents(jobs, out);
  out.Begin("holdfast_job_findings");
  for (const JobSnapshot& job : jobs) {
    out.Add(job.suspicions, {{"job", job.job}, {"grade", "suspicion"}});
    out.Add(job.verdicts, {{"job", job.job}, {"grade", "verdict"}});
  }
  AddJobs("holdfast_job_ranks_watched", jobs, out,
          [](const JobSnapshot& job) -> Number { return job.watched_ranks; });
  return std::move(out).Take();
}

}  // namespace holdfast
