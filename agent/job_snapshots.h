// What an agent knows of each of its jobs at one moment, gathered from engine, supervisor and
// monitor: the one source of what people see on a screen (`holdfast`) and what watches agents
// (/metrics).
#ifndef HOLDFAST_AGENT_JOB_SNAPSHOTS_H_
#define HOLDFAST_AGENT_JOB_SNAPSHOTS_H_

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "agent/monitor/boards.h"
#include "agent/run/job_supervisor.h"
#include "agent/run/run_service.h"
#include "agent/run/sidecar.h"
#include "base/ids.h"
#include "checkpoint/engine.h"
#include "monitor/finding.h"
#include "monitor/finding_log.h"

namespace holdfast {

class AutoSaves;

struct JobSnapshot {
  std::string job;
  // The newest attempt; 0: no rank has opened the job.
  Attempt attempt{};
  std::string attempt_key;
  uint32_t world_size = 0;
  uint32_t open_ranks = 0;  // on this node
  std::optional<CheckpointId> newest_committed;
  std::vector<Engine::RankProgress> ranks;  // of that attempt
  std::optional<JobSupervisor::View> run;   // of `holdfast run`; nothing: another launcher's job
  uint32_t watched_ranks = 0;               // that have a monitor board and live
  uint32_t suspicions = 0;                  // open findings by grade
  uint32_t verdicts = 0;
  std::optional<monitor::Finding> finding;  // the strongest of them
  Sidecar::Word word;                       // of another launcher's job
  std::string every;                        // AutoSaves::SentenceOf
};

// All outlive the call. Snapshots are valid until the loop goes on.
struct JobSources {
  const Engine& engine;
  const nlohmann::json& engine_status;  // Engine::StatusJson, parsed
  const RunService& runs;
  const MonitorBoards& boards;
  const monitor::FindingLog& findings;
  const AutoSaves& auto_saves;
  const Sidecar& sidecar;
};
// By name of the job.
std::vector<JobSnapshot> JobsNow(const JobSources& sources);

// "running", "stalled", ... (docs/RECOVERY.md); of another launcher's job what StateOf says.
std::string StateOf(const JobSnapshot& job);
// "nothing", or one command.
std::string HumanStep(const JobSnapshot& job);
std::vector<std::string> ScreenOf(const JobSnapshot& job, absl::Duration now);

// `screens` of the agent's status (docs/OPERATING.md): an array.
nlohmann::json ScreensJson(std::span<const JobSnapshot> jobs, absl::Duration now);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_JOB_SNAPSHOTS_H_
