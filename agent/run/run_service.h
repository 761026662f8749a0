// All runs of an agent (`holdfast run`): begins them, finds those of a former worker, answers and
// orders for the socket. Of each job there is one run at a time.
#ifndef HOLDFAST_AGENT_RUN_RUN_SERVICE_H_
#define HOLDFAST_AGENT_RUN_RUN_SERVICE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "agent/monitor/service.h"
#include "agent/run/job_supervisor.h"
#include "agent/witness/witnesses.h"
#include "hook/abi/messages.h"
#include "io/unique_fd.h"
#include "monitor/analyzer.h"
#include "monitor/finding_log.h"

namespace holdfast {

// Threads: the event loop's. Lifetime: the world outlives it.
class RunService {
 public:
  static constexpr size_t kJobsMax = 64;
  static constexpr size_t kFollowersMax = 8;  // of a run; beyond, the oldest hears no more

  struct Options {
    std::string state_directory;    // jobs/JOB is below it
    std::string runtime_directory;  // runs/JOB is below it; only ours
    std::string socket;
    std::string shim_program;
    std::string root;  // of checkpoints, for whoever asks where one is
  };
  RunService(Options options, JobSupervisor::World world);
  ~RunService();

  // Takes over what a former worker was supervising. Once, before anything else.
  void Recover();

  struct Owner {
    uint32_t process_id = 0;
    UniqueFd pidfd;
  };
  struct Begun {
    std::string state;                      // JSON, as in docs/RUN.md
    std::shared_ptr<MonitorStream> stream;  // gets the state whenever it has changed
  };
  // Begins the run that `bytes` describe (EncodeRunSpec), or finds it: it has the same run_id.
  // `wake`: the stream has something. Errors: kInvalidArgument, kAlreadyExists (another run of that
  // job is under way), kResourceExhausted, of the disk.
  absl::StatusOr<Begun> Begin(std::string_view bytes, Owner owner, std::function<void()> wake);

  // The state of the run, after the command. kView with a `number`: of its incidents only those
  // that happened to that attempt. Errors: kNotFound (no such run), kInvalidArgument (several and
  // none named; those that there are stand in the text).
  absl::StatusOr<std::string> Command(abi::RunCommandKind kind, const std::string& job,
                                      uint64_t number, const std::string& text);

  // What the monitor says of a job's ranks, if it is one of ours and of its newest launch.
  void TakeFinding(const monitor::FindingRecord& record, monitor::FindingChange change);

  // How much the monitor sees of a job, with each of its steps.
  void TakeSight(const std::string& job, const std::string& attempt_key,
                 const monitor::Sight& sight);
  // A line of the kernel's log.
  void TakeXid(const XidSighting& sighting);

  // The agent is to end: every run is saved and stopped.
  void Terminate();
  // It ends now: no rank may be left without it.
  void Kill();

  // Of every job that this agent runs or has run. Valid until the loop goes on.
  std::vector<JobSupervisor::View> views() const;
  // A run of that job is under way, or one of which the attempt is: a program may open its job by
  // another name than its run has.
  bool Runs(const std::string& job, const std::string& attempt_key) const;
  // Not over.
  size_t active_count() const;
  // There was a run, and all are over.
  bool is_done() const { return !jobs_.empty() && active_count() == 0; }

 private:
  struct Job {
    std::unique_ptr<JobSupervisor> supervisor;
    std::vector<std::shared_ptr<MonitorStream>> streams;
    bool tells = false;  // a change is to be told in the next turn of the loop
  };

  JobSupervisor::Options OptionsOf(const std::string& job) const;
  absl::StatusOr<Job*> Find(const std::string& job);
  void Changed(const std::string& job);
  void Tell(const std::string& job);
  // `of`: only incidents that happened to this attempt; 0: all.
  std::string StateJson(const JobSupervisor& supervisor, Attempt of = {}) const;

  const Options options_;
  const JobSupervisor::World world_;
  std::map<std::string, Job> jobs_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_RUN_SERVICE_H_
