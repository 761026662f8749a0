// The worker's side of the keeper: gives it descriptors, and starts it again when it dies.
#ifndef HOLDFAST_AGENT_KEEPER_LINK_H_
#define HOLDFAST_AGENT_KEEPER_LINK_H_

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "agent/handover.h"
#include "agent/service_manager.h"
#include "base/clock.h"
#include "base/executor.h"
#include "checkpoint/descriptor_keeper.h"
#include "io/unique_fd.h"

namespace holdfast {

// Holds a duplicate of every kept descriptor itself, so that it can give all of them to a new
// keeper at any moment; this costs a second descriptor each.
//
// Between the death of a keeper and the start of the next (microseconds after the event loop sees
// it, or after the next Keep) a death of the worker too is the death of the agent. Where a keeper
// cannot be started (no memory, no process slot) this is tried again every second without end, and
// the agent goes on without: keeper_pid() is 0 then, and the log says so once.
//
// Threads: the event loop's. Lifetime: the loop, the clock and the service manager outlive it.
class KeeperLink final : public DescriptorKeeper {
 public:
  struct Limits {
    absl::Duration send_deadline = absl::Seconds(5);
  };
  // `service_manager`: keeps everything, too; may be nullptr.
  KeeperLink(Handover handover, const Limits& limits, EventLoop& loop, const Clock& clock,
             ServiceManager* service_manager = nullptr);
  ~KeeperLink() override;

  // See DescriptorKeeper. A keeper that does not read within the deadline (stopped) is killed and
  // replaced; the call takes so long then.
  void Keep(const std::string& name, int fd) override;
  void Drop(const std::string& name) override;

  // One of the agent's own (names in agent/handover.h), borrowed; -1 if it is not there.
  int Find(const std::string& name) const;

  // Duplicates of all descriptors that are not the agent's own.
  std::vector<KeptDescriptor> EngineDescriptors() const;
  // Whether there are any: a session of a trainer, an image.
  bool holds_engine_descriptors() const;

  // Duplicates of those whose names begin with `prefix`.
  std::vector<KeptDescriptor> FindAll(const std::string& prefix) const;

  // Says that the worker ends for good with this code, and the keeper shall too.
  void Finish(int exit_code);

  pid_t keeper_pid() const;
  uint32_t keeper_restart_count() const { return keeper_restart_count_; }

 private:
  void WatchKeeper();
  void OnKeeperDead();
  // Makes sure that the old one is dead and starts another with everything.
  void RestartKeeper();
  void RestartLater();

  const Limits limits_;
  EventLoop& loop_;
  const Clock& clock_;
  ServiceManager* const service_manager_;
  std::map<std::string, UniqueFd> descriptors_;
  UniqueFd channel_;
  UniqueFd keeper_pidfd_;  // none: there is no keeper
  absl::Duration keeper_started_{};
  uint32_t keeper_restart_count_ = 0;
  EventLoop::TimerId retry_timer_ = 0;  // 0: none
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_KEEPER_LINK_H_
