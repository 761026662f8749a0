// The monitor boards of the processes on this node (hook/abi/monitor.h): mapped for reading,
// watched, and kept for a while after their process has died, because then they are evidence.
//
// What a process writes there is its claim: it is read with bounds, and nothing that it can write
// or do harms the agent. (The memfd must be sealed against shrinking, so that no read runs off its
// end.) Analysis is not here: monitor/.
//
// Boards survive this worker: the keeper holds their memory and the pidfds of their processes, as
// "agent/monitor/<id>/board" and "agent/monitor/<id>/process-<pid>". Nobody has to offer them
// again.
#ifndef HOLDFAST_AGENT_MONITOR_BOARDS_H_
#define HOLDFAST_AGENT_MONITOR_BOARDS_H_

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "agent/monitor/mapped_board.h"
#include "agent/monitor/record_window.h"
#include "base/clock.h"
#include "base/executor.h"
#include "checkpoint/descriptor_keeper.h"
#include "io/unique_fd.h"

namespace holdfast {

// Threads: the event loop's.
// Lifetime: loop, clock and keeper outlive it.
class MonitorBoards {
 public:
  // Of living processes; beyond, a new one is refused.
  static constexpr size_t kAliveMax = 256;
  // Of dead ones; beyond, the one that died first is dropped. And how long they are kept.
  static constexpr size_t kDeadMax = 64;
  static constexpr absl::Duration kDeadAge = absl::Hours(1);
  // Whoever may not trace a process is told how it ended only after its parent has waited for it:
  // it is asked for so often, so many times.
  static constexpr absl::Duration kEndAskedEvery = absl::Milliseconds(100);
  static constexpr int kEndAskedMax = 50;
  // Windows of records that are open at once.
  static constexpr size_t kWindowsMax = 4;

  struct Offer {
    std::string job;
    std::string attempt_key;
    std::string node;
    uint32_t rank = 0;
    uint32_t process_id = 0;  // as the kernel says
    uint64_t board_bytes = 0;
    UniqueFd board;
    UniqueFd process;  // a pidfd
  };

  struct Board {
    uint64_t id = 0;  // from 1, in the order of their coming; never used again, by no later worker
    // Without the board's descriptor; `process` is none when it is dead and nothing more is to be
    // learned of it. A job without a name has one that it shares with no other (NameOf).
    Offer offer;
    std::shared_ptr<MappedBoard> mapped;
    pid_t parent = 0;  // of its process, when it came; 0: not known
    bool alive = true;
    absl::Duration died{};  // on the agent's clock; meaningful when it is not alive
    // How its process ended, if the kernel tells us (process_end.h).
    std::optional<int> wait_status;
    EventLoop::TimerId asks = 0;  // for its end; 0: not any more
    int asked_count = 0;
  };

  MonitorBoards(EventLoop& loop, const Clock& clock, DescriptorKeeper& keeper);
  ~MonitorBoards();
  MonitorBoards(const MonitorBoards&) = delete;
  MonitorBoards& operator=(const MonitorBoards&) = delete;

  // Takes what the last worker kept; before any Adopt. What is no board any more is dropped. A
  // board of a process that is dead counts as of one that died now.
  void Recover(std::vector<KeptDescriptor> kept);

  // Maps the board and watches its process. OK also for one that is here already.
  // Errors: kInvalidArgument (no board, not sealed, another version or size), kResourceExhausted.
  absl::Status Adopt(Offer offer);

  // Has the living processes of a rank keep records for `length`, and calls `done` with them when
  // it is over (record_window.h). Dropped with this object. Errors: kInvalidArgument (length),
  // kNotFound (no such board), kResourceExhausted (kWindowsMax).
  absl::Status Window(const std::string& job, uint32_t rank, absl::Duration length,
                      std::function<void(std::string lines)> done);

  size_t alive_count() const;
  size_t dead_count() const;

  // Valid until changes() differs.
  const std::vector<std::unique_ptr<Board>>& boards() const { return boards_; }
  // Counts boards that came, died, whose end was told, and that were dropped.
  uint64_t changes() const { return changes_; }
  // `changed` runs after each of them, inside the call that made it. One listener; empty: none.
  void Listen(std::function<void()> changed) { changed_ = std::move(changed); }

  // The living processes that have a board here, each once.
  struct Process {
    std::string job;  // as Board::offer has it
    std::string attempt_key;
    uint32_t rank = 0;        // UINT32_MAX: not known
    uint32_t world_size = 0;  // 0: not known
    uint32_t process_id = 0;
    struct Membership {
      uint64_t communicator = 0;  // its hash
      uint32_t ranks = 0;
      uint32_t index = 0;
    };
    std::vector<Membership> memberships;  // of open communicators
  };
  std::vector<Process> Processes() const;

  // An array with one object per board. Keys: docs/MONITOR.md.
  std::string StatusJson() const;

 private:
  void Changed();
  std::string NameOf(const Offer& offer, pid_t parent) const;
  void Add(Offer offer, std::shared_ptr<MappedBoard> mapped, uint64_t id);
  void Forget(const Board& board);
  void OnDeath(Board* board);
  void AskForEnd(Board& board);
  void DropOldDead();

  EventLoop& loop_;
  const Clock& clock_;
  DescriptorKeeper& keeper_;
  std::vector<std::unique_ptr<Board>> boards_;
  uint64_t next_id_ = 1;
  uint64_t changes_ = 0;
  std::function<void()> changed_;
  std::list<std::unique_ptr<RecordWindow>> windows_;
  EventLoop::TimerId timer_ = 0;  // of the next one to be too old; 0: none
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_BOARDS_H_
