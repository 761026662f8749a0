// The writer's side of a monitor board (hook/abi/monitor.h): makes the memory, gives out places for
// communicators and connections, reads the clock, keeps records.
//
// What an event means is monitor_events.h's; this file knows places and words only. Everything but
// Create may be called on NCCL's threads: no lock, no allocation, no system call (with an invariant
// time-stamp counter; without one, clock_gettime through the vDSO). At a limit the event is counted
// and left out.
#ifndef HOLDFAST_HOOK_MONITOR_BOARD_H_
#define HOLDFAST_HOOK_MONITOR_BOARD_H_

#include <x86intrin.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "hook/abi/monitor.h"
#include "hook/deadline.h"
#include "hook/error.h"
#include "hook/os.h"

namespace holdfast::hook {

// Places tried for a connection, twice, before it is given up as Drop::kSlots.
inline constexpr uint32_t kSlotProbes = 64;
// And for a communicator of another process; one that was not used for so long makes room.
inline constexpr uint32_t kForeignProbes = 8;
inline constexpr uint64_t kForeignIdleSeconds = 600;
inline constexpr uint32_t kNoPlace = UINT32_MAX;

struct MonitorIdentity {
  std::string job;
  std::string attempt_key;
  std::string node;
  uint32_t rank = UINT32_MAX;
  uint32_t world_size = 0;
  uint32_t local_rank = 0;
};

// HOLDFAST_JOB, HOLDFAST_ATTEMPT_KEY or torchrun's, HOLDFAST_NODE or the host name, RANK,
// WORLD_SIZE, LOCAL_RANK. What is not set or no number stays not known: a profiler must not fail a
// job for it.
MonitorIdentity ReadMonitorIdentity();

// HOLDFAST_MONITOR: off, light (also if not set) or full. Errors: HF_INVALID_ARGUMENT.
Result<abi::MonitorLevel> ReadMonitorLevel();

struct CommunicatorInfo {
  uint64_t hash = 0;
  const char* name = nullptr;  // may be NULL
  uint32_t ranks = 0;
  uint32_t rank = 0;
  uint32_t nodes = 0;
};

// Threads: any, but each slot is written by one thread at a time.
// Lifetime: nobody may be in a call when it is destroyed; readers keep their own mapping.
class MonitorBoard {
 public:
  enum class Clock { kBest, kMonotonic };  // the second for tests

  // Errors: HF_RESOURCE_EXHAUSTED (descriptors, memory), HF_INTERNAL.
  static Result<std::unique_ptr<MonitorBoard>> Create(abi::BoardWriter writer,
                                                      abi::MonitorLevel level,
                                                      const MonitorIdentity& identity, Clock clock);
  MonitorBoard(const MonitorBoard&) = delete;
  MonitorBoard& operator=(const MonitorBoard&) = delete;

  // A memfd of abi::kBoardBytes, sealed against another size.
  int fd() const { return fd_.get(); }
  abi::BoardHeader& header() const { return *header_; }
  abi::Communicator& communicator(uint32_t index) const { return communicators_[index]; }
  abi::Slot& slot(uint32_t index) const { return slots_[index]; }
  const std::byte* data() const { return memory_.data(); }
  bool uses_tsc() const { return tsc_; }

  uint64_t Now() const { return tsc_ ? __rdtsc() : static_cast<uint64_t>(MonotonicNs()); }
  void CountDrop(abi::Drop cause) const {
    header_->drops[static_cast<uint32_t>(cause)].fetch_add(1, std::memory_order_relaxed);
  }

  // A place for a communicator of this process, open and with zero counters. kNoPlace: none is left
  // (counted). `token_prefix`: the token without index and generation, which are put at these bits.
  uint32_t OpenCommunicator(const CommunicatorInfo& info, uint64_t token_prefix, int index_shift,
                            int generation_shift) const;
  // What it was stays readable.
  void CloseCommunicator(uint32_t index) const;
  // The place of another process's communicator, made if there is none. kNoPlace: counted.
  uint32_t ForeignCommunicator(uint64_t token) const;

  // The slot of a connection of an open communicator, made with state kNone if there is none.
  // kNoPlace: counted.
  uint32_t FindSlot(uint32_t communicator, uint32_t channel, uint32_t peer,
                    abi::SlotDirection direction) const;

  // Opens a window, or keeps it open for longer, if the agent has asked for it.
  void FollowRequests(uint64_t now) const {
    const uint64_t until = requests_->window_until_ticks.load(std::memory_order_relaxed);
    if (until != 0 && until > now) OpenWindow(until, now);
  }
  // Keeps a record if a window is open; closes it if its time is over.
  bool recording() const { return header_->window.load(std::memory_order_relaxed) != 0; }
  struct RecordInfo {
    abi::RecordKind kind;
    uint8_t detail = 0;
    uint32_t place = 0;
    uint32_t step = 0;
    uint64_t operation = 0;
    uint64_t value = 0;
  };
  void Record(const RecordInfo& info, uint64_t now) const;

  void StepDone(uint64_t step) const;
  // Threads: one at a time.
  void SetSection(uint32_t depth,
                  const char* name) const;  // opens at `depth`, which it becomes + 1
  void SetSectionDepth(uint32_t depth) const;

 private:
  struct Instant {
    int64_t monotonic_ns = 0;
    uint64_t ticks = 0;
  };

  MonitorBoard() = default;
  // The monotonic clock and the board's own at one instant.
  Instant BothClocks() const;
  void WriteHeader(abi::BoardWriter writer, abi::MonitorLevel level,
                   const MonitorIdentity& identity, bool tsc);
  void Reset(abi::Communicator& place, const CommunicatorInfo& info, uint64_t token,
             bool foreign) const;
  bool Live(uint64_t key) const;
  bool TakeSlot(uint32_t place, uint64_t found, uint64_t key) const;
  abi::Ring* FindRing() const;
  void OpenWindow(uint64_t until, uint64_t now) const;

  UniqueFd fd_;
  Mapping memory_;
  bool tsc_ = false;
  uint64_t foreign_idle_ticks_ = 0;
  abi::BoardHeader* header_ = nullptr;
  abi::Communicator* communicators_ = nullptr;
  std::atomic<uint64_t>* keys_ = nullptr;
  abi::Slot* slots_ = nullptr;
  abi::Ring* rings_ = nullptr;
  const abi::BoardRequests* requests_ = nullptr;
  mutable std::atomic<uint64_t> window_until_{0};  // ticks; UINT64_MAX: level full
};

// One change of a slot: everything between construction and Commit is one for readers.
//
//   SlotChange change(slot);
//   change.SetState(state, open_steps, kind, now);   adds up how long the last state lasted
//   slot.steps.store(..., std::memory_order_release);
//   change.Commit();
class SlotChange {
 public:
  explicit SlotChange(abi::Slot& slot)
      : slot_(slot), head_(slot.head.load(std::memory_order_relaxed) | 1) {
    slot_.head.store(head_, std::memory_order_relaxed);
  }
  SlotChange(const SlotChange&) = delete;
  SlotChange& operator=(const SlotChange&) = delete;

  abi::WaitState state() const { return static_cast<abi::WaitState>(head_ >> 32 & 0xff); }

  void SetState(abi::WaitState state, uint32_t open_steps, abi::OperationKind kind, uint64_t now) {
    const int place = abi::WaitedIndex(this->state());
    const uint64_t since = slot_.since.load(std::memory_order_relaxed);
    // Clocks of two cores may differ by a few ticks.
    if (place >= 0 && now > since) {
      std::atomic<uint64_t>& waited = slot_.waited[place];
      waited.store(waited.load(std::memory_order_relaxed) + (now - since),
                   std::memory_order_release);
    }
    slot_.since.store(now, std::memory_order_release);
    head_ = (head_ & UINT32_MAX) | static_cast<uint64_t>(state) << 32 |
            static_cast<uint64_t>(open_steps) << 40 | static_cast<uint64_t>(kind) << 48;
  }
  // The sequence is even again, whatever two writers did to it.
  void Commit() {
    const uint64_t sequence = (head_ + 1) & UINT32_MAX;
    slot_.head.store((head_ & ~uint64_t{UINT32_MAX}) | sequence, std::memory_order_release);
  }

 private:
  abi::Slot& slot_;
  uint64_t head_;
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_MONITOR_BOARD_H_
