// What the kernel says of a training process: its state, its CPU time, and how long the threads
// that move its transfers were ready to run and did not.
//
// A process is its directory in /proc, opened while its pidfd said that it lived: once it is dead,
// nothing there answers, whoever gets its number. Numbers of threads come from the process, in its
// own pid namespace; where that is another one than ours (a container), they are looked up by
// NSpid.
#ifndef HOLDFAST_AGENT_MONITOR_PROCESS_WITNESS_H_
#define HOLDFAST_AGENT_MONITOR_PROCESS_WITNESS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "absl/time/time.h"
#include "io/unique_fd.h"
#include "monitor/summary.h"

namespace holdfast {

struct ProcessTestimony {
  monitor::ProcessState state{};  // kUnknown: not visible from here
  uint64_t cpu_us = 0;            // of all its threads, in the kernel's ticks (10 ms)
  // Since the threads were first looked at; of those that waited the longest between two looks.
  uint64_t run_delay_us = 0;
  bool is_traced = false;  // stopped by a tracer (t), not by a signal (T)
};

// The line of /proc/PID/stat (proc(5)): state and CPU time. Nothing if it is none.
std::optional<ProcessTestimony> ParseStat(std::string_view line, uint64_t ticks_per_second);
// Of /proc/PID/task/TID/schedstat: the nanoseconds that the thread waited on a run queue.
std::optional<uint64_t> ParseRunDelayNs(std::string_view line);

// Threads: one at a time. All calls are reads of /proc, which do not block.
class ProcessWitness {
 public:
  static constexpr size_t kThreadsMax = 64;
  // Threads of a process that are looked at to find one by its number in another pid namespace;
  // and how long until the next search.
  static constexpr size_t kTasksMax = 4096;
  static constexpr absl::Duration kSearchPause = absl::Seconds(10);

  // `pidfd` is read during the call only. `own_number`: the process's number as it sees it.
  ProcessWitness(int pidfd, uint32_t own_number);

  // `proxy_threads`: numbers as the process sees them. `now` only spaces searches. Whoever is held
  // by a tracer counts as stopped from the second look in a row on, as for a moment somebody may
  // have looked at its stack. The agent's own helper that does so (agent/witness/) may need longer
  // on a loaded machine: whom a child of this process holds is what he was before.
  ProcessTestimony Look(std::span<const uint32_t> proxy_threads, absl::Duration now);

 private:
  struct Thread {
    uint32_t task = 0;  // its number here; 0: not found
    std::optional<uint64_t> delay_ns;
  };

  std::string Read(const std::string& name) const;
  bool IsHeldByStranger() const;
  void FindTasks(absl::Duration now);
  void CountRunDelay();

  UniqueFd directory_;  // none: not visible from here
  bool same_numbers_ = false;
  std::map<uint32_t, Thread> threads_;  // by their own numbers
  absl::Duration next_search_ = -absl::InfiniteDuration();
  uint64_t run_delay_ns_ = 0;
  bool was_traced_ = false;   // at the last look
  bool was_stopped_ = false;  // at the last look without a tracer
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_PROCESS_WITNESS_H_
