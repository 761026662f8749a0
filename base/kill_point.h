// Named instants at which a crash drill can kill (or stop) the agent: KillPoint("flush.synced") in
// the code is one predictable branch, until HOLDFAST_KILL_AT arms that name in this process
// (docs/OPERATING.md, "Crash drills"). It exists because promises about kill -9 are only worth what
// the instants are at which somebody tried it.
//
// What it deliberately is not: a way to inject errors. The process dies there by SIGKILL, or stops
// by SIGSTOP so that a test can kill somebody else at that very instant and then let it go on.
#ifndef HOLDFAST_BASE_KILL_POINT_H_
#define HOLDFAST_BASE_KILL_POINT_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace holdfast {

// Every kill point of the agent, in the order in which a first save meets them. A name in the code
// that is not here does not compile; a name here that no code calls fails tests/kill, or those of a
// run scripts/demo_recovery.py.
inline constexpr std::string_view kKillPoints[] = {
    // The worker's start.
    "worker.started",    // the keeper's descriptors have arrived; nothing was looked at yet
    "recover.begun",     // Engine::Recover was called
    "worker.recovered",  // Engine::Recover is done; the listening socket is not watched yet
    // Descriptors on their way to the keeper.
    "keep.sending",  // before the message to the keeper is sent
    "keep.sent",     // the kernel holds it
    "drop.sent",     // a Drop message was sent
    // A request of a trainer.
    "request.received",  // validated, before the engine is called
    "reply.sending",     // the engine is done, before the reply is sent
    "reply.sent",
    // Joining: kOpen, kRegister.
    "open.attempt_begun",    // the new attempt is durable in the store
    "open.session_made",     // the rank page and the session record exist
    "register.memory_made",  // rank memory and registration memory exist
    // One image, in one rank.
    "capture.begun",              // kCapturing was seen
    "capture.block_checksummed",  // after each block
    "capture.sealing",            // every block is in memory; the record does not say so yet
    "capture.sealed",             // the record says so
    "flush.file_created",
    "flush.block_written",  // after each block
    "flush.written",        // all blocks are, not synced yet
    "flush.synced",
    "flush.durable",  // the record says so
    // The commit of a group.
    "commit.directory_created",
    "commit.index_written",     // visible, not synced
    "commit.index_durable",     // contents and name
    "commit.manifest_written",  // under its partial name
    "commit.manifest_linked",   // under its final name; the directory is not synced yet
    "commit.manifest_durable",  // committed surviving power; nobody was told yet
    "commit.reported",          // the trainers' pages say so
    "release.blocks",           // a superseded image's blocks return
    // Restore.
    "restore.point_decided",  // durable in the store
    "restore.planned",
    "restore.piece_delivered",  // after each piece
    "restore.ended",
    // A recovery of `holdfast run`: in scripts/demo_recovery.py, not in the drill of tests/kill.
    "run.ranks_stopping",   // TERM is on its way to all ranks
    "run.launch_starting",  // the ranks before are gone, and none of the next was started
    "run.rank_started",     // after each
    // The keeper (armed there only).
    "keeper.message_received",  // read from the socket, not yet in the table
    "keeper.worker_starting",   // before the next worker is started
    "keeper.worker_started",    // it runs and holds everything
};

inline constexpr size_t kKillPointCount = sizeof(kKillPoints) / sizeof(kKillPoints[0]);

// A kill point's index in kKillPoints, found by the compiler.
class KillPointName {
 public:
  consteval KillPointName(const char* name) : index_(Find(name)) {}  // NOLINT: implicit on purpose
  constexpr uint32_t index() const { return index_; }

 private:
  static consteval uint32_t Find(std::string_view name) {
    for (uint32_t index = 0; index < kKillPointCount; ++index) {
      if (kKillPoints[index] == name) return index;
    }
    throw "not in kKillPoints";  // does not compile when reached
  }
  uint32_t index_;
};

// Which instant, and what happens there.
struct KillPlan {
  enum class Action { kKill, kStop };
  uint32_t point_index = 0;
  uint64_t count = 1;  // the count-th time that the point is reached, from 1
  Action action = Action::kKill;
};

// Parses "name[:count[:kill|stop]]". kInvalidArgument: names the bad part and the nearest name.
absl::StatusOr<KillPlan> ParseKillPlan(std::string_view text);

// Arms the plan in this process. Once, from main, before any other thread exists.
void ArmKillPoint(const KillPlan& plan);

// What this process says of itself when it dies (or stops) at its point: one line, in front of the
// one that says that the point was reached. `describe` is called there, on the calling thread of
// this function only: a point that another thread reaches goes without. Null takes it back, before
// what it refers to is gone.
void DescribeAtKillPoint(std::function<std::string()> describe);

namespace kill_point_internal {
// The armed point; UINT32_MAX: none. The one mutable global of the agent: a plan handed through
// every constructor would change each of their signatures for the sake of drills.
extern std::atomic<uint32_t> armed_index;
void Reached(uint32_t index);
}  // namespace kill_point_internal

// Dies (or stops) here if armed for it, after a line or two to standard error that say so.
// Threads: any.
inline void KillPoint(KillPointName name) {
  if (kill_point_internal::armed_index.load(std::memory_order_relaxed) == name.index())
      [[unlikely]] {
    kill_point_internal::Reached(name.index());
  }
}

}  // namespace holdfast

#endif  // HOLDFAST_BASE_KILL_POINT_H_
