// A process's monitor board (hook/abi/monitor.h) in the agent's address space: all of it for
// reading, and the one page on which the process is asked for something, for writing.
#ifndef HOLDFAST_AGENT_MONITOR_MAPPED_BOARD_H_
#define HOLDFAST_AGENT_MONITOR_MAPPED_BOARD_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "hook/abi/monitor_read.h"

namespace holdfast {

// Threads: any for reading. Lifetime: independent of the descriptor and of the process.
class MappedBoard {
 public:
  // Errors: kInvalidArgument (no memfd, another size, not sealed against shrinking, no board of
  // this version; said with what was found), kResourceExhausted (memory).
  static absl::StatusOr<std::shared_ptr<MappedBoard>> Map(int fd);
  ~MappedBoard();
  MappedBoard(const MappedBoard&) = delete;
  MappedBoard& operator=(const MappedBoard&) = delete;

  // What the process claims.
  const abi::BoardView& view() const { return view_; }
  abi::BoardRequests& requests() const { return *requests_; }
  // The memory itself: device and inode of the memfd.
  uint64_t device() const { return device_; }
  uint64_t inode() const { return inode_; }

  // Now, on the clock of the board's writer, and how long something lasted. The header's rate is
  // claimed: the worst that a wrong one does is a wrong number.
  uint64_t NowTicks() const;
  double Seconds(uint64_t ticks) const;

 private:
  MappedBoard() = default;

  const void* memory_ = nullptr;
  abi::BoardView view_;
  abi::BoardRequests* requests_ = nullptr;
  uint64_t device_ = 0;
  uint64_t inode_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_MAPPED_BOARD_H_
