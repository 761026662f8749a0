// Asks the witnesses of a job on this node, and makes testimonies of what they say: Flight Recorder
// and Python stacks of the processes that wait to be asked (waiting_processes.h), native stacks and
// NVML through the program holdfast-witness, NCCL's RAS port, and the kernel's log, which speaks by
// itself.
//
// Asking is bounded, never on the event loop's thread where it could block or take long, and at
// most once in kRoundInterval per job. Each source is told as soon as it has answered. What could
// not be heard is said with the reason (monitor::WitnessState).
#ifndef HOLDFAST_AGENT_WITNESS_WITNESSES_H_
#define HOLDFAST_AGENT_WITNESS_WITNESSES_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "agent/witness/kernel_log.h"
#include "agent/witness/ras_client.h"
#include "agent/witness/waiting_processes.h"
#include "base/clock.h"
#include "base/executor.h"
#include "monitor/testimony.h"
#include "monitor/witness/flight_record.h"
#include "monitor/witness/gpu.h"
#include "monitor/witness/ras.h"
#include "monitor/witness/stacks.h"
#include "monitor/witness/xid.h"

namespace holdfast {

// A fault of a GPU, as the kernel's log has just told it.
struct XidSighting {
  monitor::Xid xid;
  std::optional<uint32_t> gpu_index;  // as NVML numbers it, if it has told; nothing: not known
};

// Threads: the event loop's, but for the pool's work.
// Lifetime: loop, pool, clock and waiting processes outlive it; what is on its way when it goes is
//   dropped.
class Witnesses {
 public:
  static constexpr absl::Duration kRoundInterval = absl::Seconds(5);
  static constexpr absl::Duration kProcessDeadline = absl::Seconds(2);   // for what a process tells
  static constexpr absl::Duration kHelperDeadline = absl::Seconds(4);    // one's stacks, NVML
  static constexpr absl::Duration kHelpersDeadline = absl::Seconds(10);  // all stacks of a round
  static constexpr absl::Duration kRasDeadline = absl::Seconds(3);       // each of two looks
  static constexpr absl::Duration kRasApart = absl::Seconds(2);
  // Processes of one job whose native stacks are taken; beyond, it is said.
  static constexpr size_t kStacksMax = 64;
  // Jobs whose history is kept: the least recently asked gives way.
  static constexpr size_t kJobsMax = 64;
  // Work of one round that may wait for a thread of the pool: what looks at processes, what asks
  // RAS, and what reads answers. With so many threads none of them waits for another.
  static constexpr int kPoolThreads = 3;
  // Different faults of GPUs that are told within kRoundInterval; beyond, they are not.
  static constexpr size_t kXidsMax = 256;

  // A process of this node that belongs to a job.
  struct Process {
    std::string job;
    std::string attempt_key;
    uint32_t rank = 0;
    uint32_t process_id = 0;
  };
  // How much is asked.
  enum class Depth {
    kRecords,  // Flight Recorders: what costs the processes nothing that could be measured
    kGpus,     // NVML: of a job that runs
    kAll,      // of a job in which something stands or has ended
  };
  struct Question {
    std::string job;
    std::string attempt_key;
    uint32_t world_size = 0;
    std::vector<Process> processes;  // of the attempt, on this node, alive
    Depth depth = Depth::kAll;
    // The global rank of each member of a communicator, by its hash; may be empty.
    std::map<uint64_t, std::vector<int64_t>> members;
  };
  // What one source has said about a job. May come without testimonies.
  struct Hearing {
    std::string job;
    monitor::WitnessState witness;
    std::vector<monitor::Testimony> testimonies;
  };

  struct Options {
    std::string node;               // of this agent, for people
    std::string helper_path;        // HelperPath()
    std::optional<RasAddress> ras;  // nothing: not asked
    std::string kernel_log;         // path; empty: not read
    uint64_t learn_operations_min = 20;
    std::function<void(const std::string&)> warn;  // an Xid, for the log; may be null
    // Every Xid, whomever it concerns: whoever acts on them. May be null.
    std::function<void(const XidSighting&)> on_xid;
  };
  struct World {
    EventLoop& loop;
    WorkPool& pool;  // its threads may be blocked for kHelpersDeadline
    const Clock& clock;
    WaitingProcesses& waiting;
    // All processes of this node, of all jobs: whom a fault of a GPU concerns.
    std::function<std::vector<Process>()> processes;
    // Every hearing, on the event loop.
    std::function<void(Hearing)> heard;
  };

  Witnesses(Options options, World world);
  ~Witnesses();
  Witnesses(const Witnesses&) = delete;
  Witnesses& operator=(const Witnesses&) = delete;

  // Begins to read the kernel's log. Once.
  void Start();

  // Tells at once what the kernel's log says by now.
  void ReadKernelLog() {
    if (kernel_log_ != nullptr) kernel_log_->ReadNow();
  }

  // Asks them, unless that was done for this job, in the same depth, within kRoundInterval, or its
  // processes are still being looked at: then false. `done` (may be null) is called when the last
  // one has answered or was given up.
  bool Ask(Question question, std::function<void()> done);

  // Learns which processes use which GPU, so that a line of the kernel's log can be told whom it
  // concerns. Until that is known again, what was known before counts.
  void LookAtGpus();

  // The last word about each source that is known.
  std::vector<monitor::WitnessState> states() const;

 private:
  struct Job {
    monitor::FlightHistory flight;
    std::map<Depth, absl::Duration> asked;
    bool helpers_run = false;
    absl::Duration last_asked() const;
  };
  struct Round;
  using Gpus = absl::StatusOr<std::vector<monitor::GpuReading>>;

  monitor::WitnessState KernelLogState() const;
  Job& JobOf(const std::string& name);
  void AskProcesses(const std::shared_ptr<Round>& round);
  void AskHelpers(const std::shared_ptr<Round>& round);
  void AskRasTwice(const std::shared_ptr<Round>& round);
  void TakeFlightRecords(Round& round);
  void TakeStacks(Round& round);
  void TakeGpus(const Round& round, const Gpus& gpus);
  void TellKernelLog(const std::string& job, std::vector<monitor::Testimony> testimonies);
  void OnKernelLine(std::string_view line);
  void Tell(const std::string& job, monitor::Source source, bool heard, std::string why,
            std::vector<monitor::Testimony> testimonies);
  void Over(Round& round);

  const Options options_;
  const World world_;
  std::map<std::string, Job> jobs_;
  std::map<monitor::Source, monitor::WitnessState> states_;
  std::unique_ptr<KernelLog> kernel_log_;  // null: not read
  std::vector<monitor::GpuReading> gpus_;  // as they were last read
  bool looking_at_gpus_ = false;
  // By GPU and code, when it was told: a driver may repeat itself a thousand times a second.
  std::map<std::pair<std::string, int32_t>, absl::Duration> xids_told_;
  // Work of the pool and timers hold a weak reference: they may end after this object.
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_WITNESS_WITNESSES_H_
