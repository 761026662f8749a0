// Other witnesses as a service of the agent: knows which processes of which jobs are on this node
// (by their boards, and as they wait to be asked), and asks about a job when something is found in
// it.
//
// Who listens gets everything that is said; the worker gives it to the analysis.
#ifndef HOLDFAST_AGENT_WITNESS_SERVICE_H_
#define HOLDFAST_AGENT_WITNESS_SERVICE_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "agent/monitor/boards.h"
#include "agent/witness/waiting_processes.h"
#include "agent/witness/witnesses.h"
#include "base/clock.h"
#include "base/executor.h"
#include "monitor/finding_record.h"

namespace holdfast {

// Threads: the event loop's. Lifetime: loop, pool, clock and boards outlive it; what is being asked
//   when it goes is dropped.
class WitnessService {
 public:
  // Processes come and go; who uses which GPU is read again at most so often, ...
  static constexpr absl::Duration kGpusEvery = absl::Seconds(30);
  // ... and without such a sign at least so often: a process takes its GPU later than it shows a
  // board, and a driver may be loaded later than the agent.
  static constexpr absl::Duration kGpusAtLeastEvery = absl::Minutes(5);

  struct Options {
    std::string node;                                // for people; empty: the host's name
    std::string helper_path;                         // empty: HelperPath()
    std::optional<RasAddress> ras;                   // nothing: not asked
    std::string kernel_log;                          // path; empty: not read
    std::function<void(const std::string&)> warn;    // may be null
    std::function<void(const XidSighting&)> on_xid;  // as in Witnesses::Options
  };
  // `pool`: of Witnesses::kPoolThreads threads, which nobody else needs: they may be blocked.
  WitnessService(Options options, EventLoop& loop, WorkPool& pool, const Clock& clock,
                 const MonitorBoards& boards);
  ~WitnessService();
  WitnessService(const WitnessService&) = delete;
  WitnessService& operator=(const WitnessService&) = delete;

  // Begins to read the kernel's log, and to look every Witnesses::kRoundInterval at the Flight
  // Recorders of jobs that have no telemetry: nothing else would raise a suspicion there.
  void Start();

  WaitingProcesses& waiting() { return waiting_; }

  // Everything that is said from now on, about any job. One listener; null: none.
  void Listen(std::function<void(const Witnesses::Hearing&)> listener) {
    listener_ = std::move(listener);
  }

  // Something was found: asks about its job now, or as soon as the last question is so old.
  void OnFinding(const monitor::FindingRecord& record);

  // Asks about all jobs of this node, and gives what was said as JSON (docs/MONITOR.md).
  void AskAll(std::function<void(std::string text)> done);

  // Tells at once what the kernel's log says by now.
  void ReadKernelLog() { witnesses_->ReadKernelLog(); }

  // An array with one object per source, as it was last heard or not.
  std::string StatusJson() const;

 private:
  struct Collection;
  struct Wanted {
    std::string attempt_key;
    Witnesses::Depth depth{};
  };

  void Look();
  void LookAtBlindJobs();
  Witnesses::Question QuestionAbout(const std::string& job, const std::string& attempt_key,
                                    Witnesses::Depth depth) const;
  // The boards' processes, named as reports name them.
  std::vector<MonitorBoards::Process> BoardProcesses() const;
  // Of all jobs: those with a board, and those that wait to be asked.
  std::vector<Witnesses::Process> Processes() const;
  void Heard(Witnesses::Hearing hearing);

  EventLoop& loop_;
  const Clock& clock_;
  const MonitorBoards& boards_;
  EventLoop::TimerId timer_ = 0;
  WaitingProcesses waiting_;
  std::function<void(const Witnesses::Hearing&)> listener_;
  std::map<std::string, Wanted> wanted_;                  // by job: to be asked with the next look
  std::vector<std::weak_ptr<Collection>> collections_;    // of AskAll, while they run
  std::optional<uint64_t> gpus_read_at_;                  // MonitorBoards::changes() then
  absl::Duration gpus_read_ = -absl::InfiniteDuration();  // when
  std::unique_ptr<Witnesses> witnesses_;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_WITNESS_SERVICE_H_
