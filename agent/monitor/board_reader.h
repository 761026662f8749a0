// One board (hook/abi/monitor.h) as the analysis wants it: the communicators of its process with
// their counters and connections, in the fields and meanings of monitor/summary.h.
//
// It keeps what one look cannot tell: which slots are in use (so that 8192 mostly empty ones are
// not looked at again), the last good reading of each (of a writer that was stopped in the middle
// of a change), and the time in operations of communicators that are closed by now.
//
// What is on the board is its writer's claim: every list is bounded, and what cannot be is left
// out.
#ifndef HOLDFAST_AGENT_MONITOR_BOARD_READER_H_
#define HOLDFAST_AGENT_MONITOR_BOARD_READER_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "agent/monitor/exits.h"
#include "agent/monitor/tick_clock.h"
#include "hook/abi/monitor_read.h"
#include "monitor/summary.h"

namespace holdfast {

struct BoardReport {
  monitor::TelemetryLevel level{};
  uint64_t drops = 0;         // without Drop::kStale, of which nothing is lost
  uint64_t operation_us = 0;  // as RankReport has it
  std::vector<monitor::CommunicatorReport> communicators;
  std::vector<uint64_t> tokens;  // of each of them: abi::Communicator::token
  // And point-to-point operations enqueued with each peer.
  struct PeerCount {
    uint32_t peer = 0;
    monitor::Direction direction{};
    uint64_t enqueued = 0;
  };
  std::vector<std::vector<PeerCount>> peers;
  // Connections that this process serves for communicators of other processes (PXN), by the token
  // that those have. The number of their operation is not known: 0.
  struct Foreign {
    uint64_t token = 0;
    std::vector<monitor::ConnectionReport> connections;
  };
  std::vector<Foreign> foreign;
  std::vector<uint32_t> proxy_threads;  // their ids, as their process sees them
};

// Threads: one at a time.
// Lifetime: the mapping behind `board` outlives it.
class BoardReader {
 public:
  // Communicators with more ranks than this are taken for garbage. (What the analysis keeps of one
  // grows with its ranks.)
  static constexpr uint32_t kCommunicatorRanksMax = RankExit::kRanksMax;
  static constexpr size_t kProxyThreadsMax = 64;

  explicit BoardReader(const abi::BoardView& board) : board_(board) {}

  // `now`: on the writer's clock.
  BoardReport Read(const TickInstant& now);

  // Whether the process has made a communicator yet. Costs next to nothing.
  bool HasCommunicators() const;

  // Slots known to be in use, and how often all 8192 keys were looked at.
  size_t slot_count() const { return slots_.size(); }
  uint64_t scan_count() const { return scan_count_; }

 private:
  struct Look;  // what one Read finds out

  struct KnownSlot {
    uint32_t index = 0;
    bool was_read = false;
    abi::SlotReading reading;  // the last good one, if any
  };
  struct OperationTime {
    uint32_t generation = 0;
    uint64_t seen_us = 0;
  };

  void FindSlots();
  bool ReadKnown(KnownSlot& slot, bool* gone) const;

  abi::BoardView board_;
  std::vector<KnownSlot> slots_;  // by index
  uint64_t slots_taken_ = UINT64_MAX;
  uint64_t scan_count_ = 0;
  std::vector<OperationTime> operation_times_;  // by place of the communicator
  uint64_t operation_us_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_BOARD_READER_H_
