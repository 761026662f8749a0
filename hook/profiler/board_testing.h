// The boards of a process, found as an outsider finds them: among its descriptors.
#ifndef HOLDFAST_HOOK_PROFILER_BOARD_TESTING_H_
#define HOLDFAST_HOOK_PROFILER_BOARD_TESTING_H_

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "hook/abi/monitor_read.h"

namespace holdfast::profiler {

// The board descriptors of a process, as paths in /proc: the oldest first.
std::vector<std::string> BoardPaths(pid_t pid);

// A board, mapped read-only.
class MappedBoard {
 public:
  // Of this process, or of another one of this user. The newest if there are several; null if there
  // is none.
  static std::unique_ptr<MappedBoard> Find(pid_t pid);
  static int Count(pid_t pid);
  ~MappedBoard();
  MappedBoard(const MappedBoard&) = delete;
  MappedBoard& operator=(const MappedBoard&) = delete;

  const abi::BoardView& view() const { return view_; }
  uint64_t dropped(abi::Drop cause) const {
    return view_.header->drops[static_cast<uint32_t>(cause)].load();
  }
  // The open communicator with this hash and rank that was opened last.
  std::optional<uint32_t> FindCommunicator(uint64_t hash, uint32_t rank) const;
  abi::CommunicatorReading communicator(uint32_t index) const;
  // All slots of a communicator that can be read.
  std::vector<abi::SlotReading> SlotsOf(uint32_t communicator) const;
  std::optional<abi::SlotReading> FindSlot(uint32_t communicator, uint32_t channel, uint32_t peer,
                                           abi::SlotDirection direction) const;

 private:
  MappedBoard(void* memory, abi::BoardView view) : memory_(memory), view_(view) {}
  void* memory_;
  abi::BoardView view_;
};

// What one rank's slots say of whom it waits for.
struct RankWaits {
  // Peers, with the state: credit or data that they owe.
  std::vector<std::pair<uint32_t, abi::WaitState>> peers;
  int gpu = 0;   // connections that wait for this rank's own GPU
  int wire = 0;  // that wait for a posted send
};
RankWaits WaitsOf(const MappedBoard& board, uint32_t communicator);

// The ranks that some rank waits for and that wait for no peer themselves, by the boards alone.
std::vector<uint32_t> Suspects(const std::vector<RankWaits>& ranks);

// Runs `body` in a forked child and returns its exit status: 0 if nothing failed in it.
int RunInChild(const std::function<void()>& body);

}  // namespace holdfast::profiler

#endif  // HOLDFAST_HOOK_PROFILER_BOARD_TESTING_H_
