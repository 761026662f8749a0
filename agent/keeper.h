// The keeper: the process that outlives the worker. It holds every descriptor that the worker gave
// it (above all the memory in which images lie), watches the worker by pidfd, starts it again when
// it dies and hands everything over. It does nothing else, and in particular allocates little,
// parses nothing that a trainer wrote and never maps an image, so that it has little to die of. If
// it is killed all the same, the worker starts it again (agent/keeper_link.h).
//
// Invariant: at any instant at least one living process or the kernel's queue between the two holds
// each kept descriptor, provided that a dead one is back before the other one dies. Two deaths at
// once are the death of the agent: what is not durable then is lost, unless systemd runs it as a
// unit that keeps its descriptors (agent/service_manager.h): then a worker dies with its keeper,
// and the unit's next start goes on.
#ifndef HOLDFAST_AGENT_KEEPER_H_
#define HOLDFAST_AGENT_KEEPER_H_

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "agent/handover.h"
#include "agent/service_manager.h"
#include "base/clock.h"
#include "io/unique_fd.h"

namespace holdfast {

struct KeeperLimits {
  // Before the n-th start after n quick deaths: 10 ms, 20 ms, ... at most 1 s.
  absl::Duration backoff_min = absl::Milliseconds(10);
  absl::Duration backoff_max = absl::Seconds(1);
  // A worker that lived so long did not die of its start.
  absl::Duration healthy_after = absl::Seconds(10);
  // After so many quick deaths in a row something that is handed over kills the worker: the
  // engine's descriptors are dropped (images that are only in memory are lost, which the log says)
  // and the worker starts empty. After as many again the keeper gives up: Run returns 1.
  uint32_t quick_deaths_max = 20;
  // How long a worker may take to drain after SIGTERM before it is killed.
  absl::Duration drain_deadline = absl::Seconds(30);
  // More than the worker itself waits, so that it is killed only if it hangs.
  absl::Duration drain_margin = absl::Seconds(5);
};

// Threads: one.
class Keeper {
 public:
  struct Start {
    std::vector<KeptDescriptor> descriptors;
    // A worker that runs already (this keeper replaces a dead one), or neither.
    UniqueFd channel;
    UniqueFd worker_pidfd;
    // The n-th worker started is given the n-th of these (crash drills); later ones none.
    std::deque<std::string> worker_kill_plans;
    ServiceUnit unit;  // in which systemd runs the agent
  };
  Keeper(Start start, const KeeperLimits& limits, const Clock& clock);

  // Blocks SIGTERM and SIGINT (each ends the agent: the worker drains within the deadline) and runs
  // until the worker has finished. Returns the exit code of the agent: the worker's own, or 1 if
  // it had to be given up or killed.
  int Run();

 private:
  absl::Duration TimeUntilNextDeadline() const;
  void Hold(const std::string& name, UniqueFd fd);
  void StartWorker();
  // False when nothing waits any more.
  bool ReadMessages();
  void OnWorkerDead();
  void OnSignal(int signal_fd);
  void DropEngineDescriptors();

  const KeeperLimits limits_;
  const Clock& clock_;
  ServiceManager service_manager_;
  // In the order in which they came to this keeper, which the next worker must know
  // (ServiceManager).
  struct Held {
    uint64_t order = 0;
    UniqueFd fd;
  };
  std::map<std::string, Held> descriptors_;
  uint64_t next_order_ = 0;
  std::deque<std::string> worker_kill_plans_;

  UniqueFd channel_;
  UniqueFd worker_pidfd_;  // none: no worker runs
  absl::Duration worker_started_{};
  absl::Duration start_at_{};  // when no worker runs
  uint32_t starts_ = 0;
  uint32_t quick_deaths_ = 0;
  bool dropped_everything_ = false;

  bool terminating_ = false;
  absl::Duration kill_at_ = absl::InfiniteDuration();

  bool finished_ = false;  // the worker said so
  bool done_ = false;
  int exit_code_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_KEEPER_H_
