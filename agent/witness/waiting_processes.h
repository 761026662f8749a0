// Training processes that wait to be asked for what only they can tell of themselves: PyTorch's
// Flight Recorder and the stacks of their Python threads. They come by themselves, through the
// local socket (kWitness); the agent cannot call into them, and stops nothing.
//
// What a process answers is its claim: it is read with bounds, behind the event loop's back
// (witnesses.h), and judged elsewhere (monitor/witness/).
#ifndef HOLDFAST_AGENT_WITNESS_WAITING_PROCESSES_H_
#define HOLDFAST_AGENT_WITNESS_WAITING_PROCESSES_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "base/executor.h"
#include "hook/abi/messages.h"
#include "io/unique_fd.h"

namespace holdfast {

// Threads: the event loop's. Lifetime: the loop outlives it.
class WaitingProcesses {
 public:
  // Beyond, a process that comes is refused.
  static constexpr size_t kWaitingMax = 1024;

  struct Process {
    std::string job;
    std::string attempt_key;  // may be empty
    uint32_t rank = 0;        // UINT32_MAX: not known
    uint32_t world_size = 0;  // 0: not known
    uint32_t process_id = 0;  // as the kernel says
  };
  // Memory that the process claims to have sealed; not looked at yet.
  struct Part {
    UniqueFd memory;  // none: not given
    uint64_t bytes = 0;
  };
  struct Answer {
    Process process;
    Part flight_record;
    Part python_stacks;
    std::string trouble;  // why a part is not given, in the process's own words
  };
  struct Round {
    std::vector<Answer> answers;
    std::vector<Process> silent;  // were asked, and did not answer in time or went away
  };

  explicit WaitingProcesses(EventLoop& loop) : loop_(loop) {}
  ~WaitingProcesses();
  WaitingProcesses(const WaitingProcesses&) = delete;
  WaitingProcesses& operator=(const WaitingProcesses&) = delete;

  // Process `id` (any number, its own as long as it is here) waits from now on; `wait` answers what
  // it was asked before, if it was. `ask` is called once, when it is asked something. Errors:
  // kInvalidArgument (a part that is none, descriptors that do not fit), kResourceExhausted,
  // kFailedPrecondition (it waits already).
  absl::Status Arrive(uint64_t id, Process process, const abi::WitnessWait& wait,
                      std::vector<UniqueFd> parts,
                      std::function<void(const abi::WitnessAsk& ask)> ask);
  // It is gone.
  void Leave(uint64_t id);

  // Asks all processes of the job, of this attempt as far as both say which, for `parts`
  // (abi::kWitness...). One that still answers something is asked when it has. `done` is called
  // once, from the loop, when all have answered or at the deadline.
  void Ask(const std::string& job, const std::string& attempt_key, uint32_t parts,
           absl::Duration deadline, std::function<void(Round)> done);

  // Who is here, waiting or answering.
  std::vector<Process> processes() const;
  size_t size() const { return waiting_.size(); }

 private:
  struct Waiting {
    Process process;
    std::function<void(const abi::WitnessAsk&)> ask;  // null: it answers now
    std::deque<abi::WitnessAsk> next;                 // what it is to be asked then
  };
  struct Open {
    Round round;
    std::map<uint64_t, Process> awaited;
    std::function<void(Round)> done;
    EventLoop::TimerId timer = 0;
  };
  void AskNext(uint64_t id);
  void Finish(uint64_t number);

  EventLoop& loop_;
  std::map<uint64_t, Waiting> waiting_;
  std::map<uint64_t, Open> open_;  // by number
  uint64_t next_number_ = 1;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_WITNESS_WAITING_PROCESSES_H_
