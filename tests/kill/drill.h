// A drill: real trainers (drill_trainer), a real agent, a real file system, in a directory of their
// own; and the means to kill any of them and to see what became of it.
//
// Processes are watched by reading their output and by pidfd; every wait has a deadline, after
// which the test fails with what was seen so far.
#ifndef HOLDFAST_TESTS_KILL_DRILL_H_
#define HOLDFAST_TESTS_KILL_DRILL_H_

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "io/unique_fd.h"

namespace holdfast {

// Threads: one. Lifetime: the drill that started it outlives it.
class Trainer {
 public:
  Trainer(pid_t pid, UniqueFd pidfd, UniqueFd output);
  ~Trainer();  // kills it if it runs
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;

  // Reads what it has said until now.
  void ReadOutput();
  bool HasSaid(const std::string& line_start) const;
  // The number behind the last line that starts so ("committed 12").
  std::optional<uint64_t> LastNumber(const std::string& line_start) const;
  // Reads until it knows a step from `step` on to be committed; false at the deadline.
  bool WaitForCommit(uint64_t step, absl::Duration deadline);
  // Reads until it has said such a line; false at the deadline.
  bool WaitFor(const std::string& line_start, absl::Duration deadline);
  // Waits until it has ended and returns its exit code, or 128 + signal; -1 at the deadline.
  int Wait(absl::Duration deadline);
  void Kill();
  const std::string& output() const { return text_; }

 private:
  const pid_t pid_;
  UniqueFd pidfd_;
  UniqueFd output_;
  std::string text_;
  std::optional<int> exit_code_;
};

class Drill {
 public:
  // In a new directory.
  Drill();
  ~Drill();  // ends the agent, removes the directory
  Drill(const Drill&) = delete;
  Drill& operator=(const Drill&) = delete;

  // In the environment of every process started from now on.
  void Set(const std::string& variable, const std::string& value);

  struct TrainerOptions {
    int rank = 0;
    int world_size = 1;
    uint64_t steps = 4;
    uint64_t every = 2;
    uint64_t step_ms = 0;
  };
  std::unique_ptr<Trainer> StartTrainer(const TrainerOptions& options);
  // All ranks of a world.
  std::vector<std::unique_ptr<Trainer>> StartTrainers(int world_size, uint64_t steps,
                                                      uint64_t every, uint64_t step_ms = 0);

  // From now on trainers wait before their last step until OpenGate(): however slow the test is,
  // they have not finished before it has done what it does to them.
  void CloseGate();
  // For those that wait, and those that are started later.
  void OpenGate() const;

  // Everything that agents have logged here so far.
  std::string Log() const;
  // Waits until the log holds `text`; false at the deadline.
  bool WaitForLog(const std::string& text, absl::Duration deadline) const;
  // The pids in the last "started worker N" line, and in the last "started keeper N" line or of the
  // first keeper. CHECKs that there is one: kill(0, ...) would be the test's own group.
  pid_t WorkerPid() const;
  pid_t KeeperPid() const;
  // Waits until no process of an agent lives (its lock is free); false at the deadline.
  bool WaitAgentGone(absl::Duration deadline) const;
  // From now on agents that detach themselves become children of this process, so that
  // WaitAgentCode can learn how they ended.
  void AdoptAgents();
  // Waits for the end of this keeper: its exit code, or 128 + signal; -1 at the deadline.
  int WaitAgentCode(pid_t keeper, absl::Duration deadline) const;
  // SIGKILL to both processes, and waits.
  void KillAgent();
  // Forgets the log, so that the next WaitForLog speaks of the next agent.
  void ClearLog();

  const std::string& root() const { return root_; }

 private:
  // 0 if the log names none.
  pid_t LoggedWorker() const;
  pid_t LoggedKeeper() const;
  std::string RuntimePath(const std::string& name) const;
  std::string GatePath() const;

  std::string directory_;
  std::string root_;
  std::string runtime_;
  std::map<std::string, std::string> environment_;
};

// Waits until `holds`, looking every few milliseconds; false at the deadline.
bool WaitUntil(const std::function<bool()>& holds, absl::Duration deadline);

// True if the process is stopped by a signal now.
bool IsStopped(pid_t pid);

}  // namespace holdfast

#endif  // HOLDFAST_TESTS_KILL_DRILL_H_
