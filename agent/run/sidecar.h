// Beside another launcher (torchrun, ft_launcher, a Slurm script): the agent has started no rank,
// and cannot start one. It acts through the launcher: a rank that it kills the launcher takes for
// one that has failed, and restarts the job as it does after any failure; that costs one of the
// launcher's own restarts. So only what a launcher does not see by itself is acted on: hangs, by
// the monitor's verdicts and by the silence of heartbeats. Ends of processes are the launcher's.
//
// What is done about them is the policy's to say (recovery/policy.h): an attempt that follows one
// of which a rank was killed is its next launch, any other a run of its own, because the launcher
// decides about starts. Of several nodes nothing is done: every agent would do it.
//
// A process is the descriptor that whoever connected left with the agent (SO_PEERPIDFD), never a
// number: nobody is watched, or killed, who has got a dead one's.
//
// What happened is written to STATE/jobs/JOB/history, as that of `holdfast run` is, with each
// change of an incident. Counts of kills are in memory only: a new worker begins them anew, with
// the attempts that it finds.
#ifndef HOLDFAST_AGENT_RUN_SIDECAR_H_
#define HOLDFAST_AGENT_RUN_SIDECAR_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "agent/config.h"
#include "agent/recovery/actions.h"
#include "agent/recovery/events.h"
#include "agent/recovery/incident.h"
#include "agent/recovery/settings.h"
#include "agent/run/evidence_collector.h"
#include "base/clock.h"
#include "base/executor.h"
#include "base/ids.h"
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
  // While an attempt is to come after a kill, or has not come to its first new step: the phases of
  // a restart are measured by it.
  static constexpr absl::Duration kLookStarting = absl::Milliseconds(50);

  struct Options {
    SidecarMode mode = SidecarMode::kOff;
    // Of it count the time-outs, `healthy_after`, and `max_restarts`: so many ranks of a job are
    // killed in a row, before an attempt was healthy; beyond, it only says what is wrong.
    recovery::Settings settings;
    std::string state_directory;                   // incidents go to jobs/JOB/incidents below it
    absl::Duration look_every = absl::Seconds(1);  // for attempts, and for what is due
  };
  // A rank on this node that lives.
  struct Process {
    std::string job;  // as the trainer names it; may be empty, as its key
    std::string attempt_key;
    uint32_t rank = 0;        // UINT32_MAX: not known
    uint32_t world_size = 0;  // 0: not known
    uint32_t process_id = 0;  // for people
    int pidfd = -1;           // borrowed, until the loop goes on; -1: there is none
  };
  struct World {
    EventLoop& loop;
    const Clock& clock;
    // Each process once.
    std::function<std::vector<Process>()> processes;
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

  // What happened to a job, as far as the state of a run says it (docs/RUN.md): JSON. `of`: only
  // incidents of this attempt; 0: all. `job` may be empty if there is one. kNotFound: it is not
  // watched; kInvalidArgument: there are several.
  absl::StatusOr<std::string> WhyJson(const std::string& job, Attempt of) const;

 private:
  struct Job;
  using Processes = std::vector<Process>;
  using Jobs = std::map<std::string, std::unique_ptr<Job>>;

  void Look();
  absl::Duration LookEvery() const;
  Jobs::iterator Forget(Jobs::iterator job);
  Job* Place(const std::string& name);
  void Begin(Job& job, const std::string& attempt_key, const Processes& processes);
  bool IsOurs(const Job& job) const;
  void BeginRun(Job& job);
  void LookAt(Job& job);
  void Push(Job& job, decltype(recovery::Event::what) what);
  void CarryOut(Job& job, const recovery::CollectEvidence& action);
  void Stop(Job& job);
  void Kill(Job& job, const recovery::Incident& incident);
  void Ended(Job& job);
  void Close(Job& job);
  void Gone(Job& job, uint32_t rank);
  void NoteHealth(Job& job) const;
  void Leave(const Job& job);
  void Remember(Job& job);
  std::string JobDirectory(const Job& job) const;
  std::string IncidentDirectory(const Job& job, uint32_t number) const;
  static std::string StateOf(const Job& job);
  void Say(Job& job, const std::string& text);

  const Options options_;
  const World world_;
  const recovery::Settings settings_;
  Jobs jobs_;
  EventLoop::TimerId timer_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_SIDECAR_H_
