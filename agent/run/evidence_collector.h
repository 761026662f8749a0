// Collects the evidence of incidents of one job (evidence.h): asks whoever knows something, all at
// the same time, and has it written behind the event loop's back.
#ifndef HOLDFAST_AGENT_RUN_EVIDENCE_COLLECTOR_H_
#define HOLDFAST_AGENT_RUN_EVIDENCE_COLLECTOR_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "agent/monitor/service.h"
#include "agent/run/evidence.h"
#include "agent/run/run_recorder.h"
#include "agent/witness/waiting_processes.h"
#include "base/executor.h"

namespace holdfast {

// Who is asked. What is null or empty is left out.
struct EvidenceWorld {
  WorkPool& pool;  // of kThreads, which nobody else needs: they may be blocked
  std::function<std::string()> status_json;  // of the agent
  MonitorService* monitor = nullptr;
  WaitingProcesses* waiting = nullptr;
  std::function<void()> read_kernel_log;  // what is there by now is told before it returns
  std::string kernel_log;                 // its path

  static constexpr int kThreads = 2;
};

// Threads: the event loop's. Lifetime: the world outlives it. What is under way when it goes is
//   written, and told nobody.
class EvidenceCollector {
 public:
  // Records from now on what the monitor is told.
  EvidenceCollector(EvidenceWorld world, std::string job);
  EvidenceCollector(const EvidenceCollector&) = delete;
  EvidenceCollector& operator=(const EvidenceCollector&) = delete;

  // `evidence` without what the world says. Its directory, which is made inside the call, is
  // filled until `done` is called, which comes from the loop.
  void Collect(Evidence evidence, const std::string& attempt_key,
               std::function<void(absl::Status)> done);

  // The job is over: nothing is recorded any more.
  void Stop() { recorder_ = nullptr; }

 private:
  struct Collecting;
  void Run(const std::shared_ptr<Collecting>& collecting, std::function<Missing()> work);
  void AskMonitor(const std::shared_ptr<Collecting>& collecting);
  void PartIsThere(const std::shared_ptr<Collecting>& collecting, Missing missing);

  const EvidenceWorld world_;
  const std::string job_;
  std::unique_ptr<RunRecorder> recorder_;  // null without a monitor, and when the job is over
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_EVIDENCE_COLLECTOR_H_
