// Beside another launcher (torchrun, ft_launcher, a Slurm script): the agent has started no rank,
// and cannot start one. It acts through the launcher: a rank that it kills the launcher takes for
// one that has failed, and restarts the job as it does after any failure; that costs one of the
// launcher's own restarts. So only what a launcher does not see by itself is acted on: hangs, by
// the monitor's verdicts and by the silence of heartbeats. Ends of processes are the launcher's.
//
// What is done about them is the policy's to say (recovery/policy.h); each attempt that the
// launcher starts is a run of it, because the launcher decides about starts. Of several nodes
// nothing is done: every agent would do it.
//
// In memory only: a new worker begins anew with the attempts that it finds.
#ifndef HOLDFAST_AGENT_RUN_SIDECAR_H_
#define HOLDFAST_AGENT_RUN_SIDECAR_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "agent/config.h"
#include "agent/monitor/boards.h"
#include "agent/recovery/actions.h"
#include "agent/recovery/events.h"
#include "agent/recovery/incident.h"
#include "agent/recovery/settings.h"
#include "agent/run/evidence_collector.h"
#include "base/clock.h"
#include "base/executor.h"
#include "checkpoint/engine.h"
#include "monitor/analyzer.h"
#include "monitor/finding_log.h"

namespace holdfast {

// Threads: the event loop's. Lifetime: the world outlives it.
class Sidecar {
 public:
  // Beyond, one of which no attempt lives is forgotten; if all live, a new one is left alone.
  static constexpr size_t kJobsMax = 64;
  // A job of which no attempt has lived for so long is forgotten: its recording takes memory.
  static constexpr absl::Duration kForgottenAfter = absl::Minutes(5);

  struct Options {
    SidecarMode mode = SidecarMode::kOff;
    // Of it count the time-outs, `healthy_after`, and `max_restarts`: so many ranks of a job are
    // killed in a row, before an attempt was healthy; beyond, it only says what is wrong.
    recovery::Settings settings;
    std::string state_directory;                   // incidents go to jobs/JOB/incidents below it
    absl::Duration look_every = absl::Seconds(1);  // for attempts, and for what is due
  };
  struct World {
    EventLoop& loop;
    const Clock& clock;
    // Of ranks on this node that live, each once.
    std::function<std::vector<MonitorBoards::Process>()> processes;
    // By `holdfast run`.
    std::function<bool(const std::string& job, const std::string& attempt_key)> is_run_here;
    // Engine::ProgressOf and Engine::ActivityOf.
    std::function<std::vector<Engine::RankProgress>(const std::string& job,
                                                    const std::string& attempt_key)>
        progress;
    std::function<Engine::Activity(const std::string& job, const std::string& attempt_key)>
        activity;
    EvidenceWorld evidence;
  };
  Sidecar(Options options, World world);
  ~Sidecar();
  Sidecar(const Sidecar&) = delete;
  Sidecar& operator=(const Sidecar&) = delete;

  // Begins to look for jobs, unless it is off.
  void Start();

  // What the monitor says of any job.
  void TakeFinding(const monitor::FindingRecord& record, monitor::FindingChange change);
  void TakeSight(const std::string& job, const std::string& attempt_key,
                 const monitor::Sight& sight);

  // Of a job, for its screen; empty: it is not watched.
  struct Word {
    std::string next;         // what happens next: half a sentence
    std::string trouble;      // what is wrong: a sentence; empty: nothing
    bool is_handled = false;  // something is done about it
  };
  Word WordOf(const std::string& job) const;

  // An array with one object per job: docs/OPERATING.md.
  std::string StatusJson() const;

 private:
  struct Job;
  using Processes = std::vector<MonitorBoards::Process>;

  void Look();
  Job* Place(const std::string& name);
  void Begin(Job& job, const std::string& attempt_key, const Processes& processes);
  void LookAt(Job& job);
  void Push(Job& job, decltype(recovery::Event::what) what);
  void CarryOut(Job& job, const recovery::CollectEvidence& action);
  void Stop(Job& job);
  void Kill(Job& job, const recovery::Incident& incident);
  void Ended(Job& job);
  void NoteHealth(Job& job) const;
  void Leave(Job& job);
  void WriteIncident(const Job& job, const recovery::Incident& incident) const;
  std::string IncidentDirectory(const Job& job, uint32_t number) const;
  void Say(Job& job, const std::string& text);

  const Options options_;
  const World world_;
  const recovery::Settings settings_;
  std::map<std::string, std::unique_ptr<Job>> jobs_;
  EventLoop::TimerId timer_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_SIDECAR_H_
