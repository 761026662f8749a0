// The ranks of one launch, as the agent sees them: their shims. Starts them, finds them again after
// a restart of the worker, signals them, and says when one runs, has ended, or has ended with all
// that it had started.
//
// On disk, in the launch's directory (mode 0700), for whoever comes after:
//
//   rank-R/shim.sock, rank-R/exit   as shim_protocol.h says
//   rank-R/shim                     the shim was started; its process number
//
// A directory without `shim` is of a rank that was never started: whoever wanted to died before.
#ifndef HOLDFAST_AGENT_RUN_RANK_GROUP_H_
#define HOLDFAST_AGENT_RUN_RANK_GROUP_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "agent/run/shim_client.h"
#include "agent/run/shim_protocol.h"
#include "base/executor.h"
#include "io/unique_fd.h"

namespace holdfast {

struct RankEnd {
  int32_t process_id = 0;
  int32_t wait_status = 0;
  int32_t start_error = 0;  // errno; 0: it was started
  bool shim_lost = false;   // its shim was killed, and it with it: the status is that of a KILL
};

// Threads: the event loop's. Callbacks come from the loop, never out of a call.
// Lifetime: the loop outlives it. The destructor leaves ranks and shims as they are.
class RankGroup {
 public:
  struct Callbacks {
    std::function<void(uint32_t rank, int32_t process_id)> started;
    std::function<void(uint32_t rank, const RankEnd& end)> ended;
    std::function<void()> all_gone;  // every tree that there is now has ended
  };

  RankGroup(std::string directory, std::string shim_program, EventLoop& loop, Callbacks callbacks);
  ~RankGroup();
  RankGroup(const RankGroup&) = delete;
  RankGroup& operator=(const RankGroup&) = delete;

  // Finds what a former worker has started. Calls back for every rank that runs or has ended.
  void Recover();

  // `spec.directory` is set here. A rank that has a shim already is left alone. Errors: of the
  // disk, and of starting a process.
  absl::Status Start(ShimSpec spec);

  bool has(uint32_t rank) const { return ranks_.count(rank) != 0; }
  size_t count() const { return ranks_.size(); }

  // To all that have not ended.
  void Signal(int signal_number);
  // KILL to every process of all ranks, also to what those that have ended left behind.
  void KillTrees();
  // All exits were taken: shims may end. To be called when all have ended; ends their trees.
  void Release();
  bool all_gone() const;
  // The shim of a rank was killed: what the rank had started is not in a tree any more.
  bool lost_a_shim() const { return lost_a_shim_; }

 private:
  struct RankShim {
    std::string directory;
    UniqueFd connection;
    UniqueFd child;  // of ours to reap; none after a restart of the worker
    bool has_started = false;
    bool has_ended = false;
    bool tree_gone = false;
    int connect_tries = 0;
  };

  std::string DirectoryOf(uint32_t rank) const;
  void Connect(uint32_t rank);
  void OnReady(uint32_t rank);
  void OnConnectionEnd(uint32_t rank);
  void TakeState(uint32_t rank, const ShimState& state);
  void TakeEnd(uint32_t rank, const RankEnd& end);
  void TreeGone(uint32_t rank);
  void DropConnection(RankShim& shim);
  void ReapShim(uint32_t rank);
  void Tell(std::function<void()> what);
  void Ask(RankShim& shim, ShimRequestType type, int signal_number = 0);

  const std::string directory_;
  const std::string shim_program_;
  EventLoop& loop_;
  const Callbacks callbacks_;
  std::map<uint32_t, RankShim> ranks_;
  bool kills_ = false;
  bool is_released_ = false;
  bool lost_a_shim_ = false;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_RANK_GROUP_H_
