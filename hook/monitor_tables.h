// The tables behind MonitorEvents' tokens: entries of atomic words, given out in turn.
//
// An entry is written by whoever begins it, and then by the one thread that its events come from.
// All words are atomic (relaxed: plain moves) because a stale token may make another thread look at
// an entry while it is given to somebody else; that one compares generations and looks no further.
// Freeing stores `life` with release, taking reads it with acquire: owners never overlap.
#ifndef HOLDFAST_HOOK_MONITOR_TABLES_H_
#define HOLDFAST_HOOK_MONITOR_TABLES_H_

#include <atomic>
#include <cstdint>

#include "hook/monitor_events.h"

namespace holdfast::hook {

// An entry's life: generation << 16, and below it flags of its kind. 0 flags: free.
inline constexpr uint32_t kLive = 1u << 15;
// Of operations: how many parts are open (low 12 bits), and
inline constexpr uint32_t kPartsMask = (1u << 12) - 1;
inline constexpr uint32_t kEnded = 1u << 12;     // EndOperation was called
inline constexpr uint32_t kStarted = 1u << 13;   // a part has begun
inline constexpr uint32_t kFinished = 1u << 14;  // counted as finished
// Of kernels: the GPU's stop was reported.
inline constexpr uint32_t kStopped = 1u << 0;

constexpr uint32_t Generation(uint32_t life) { return life >> 16; }

// Entries looked at for a free one, before the oldest of them is taken from its owner.
inline constexpr uint32_t kAllocationProbes = 8;
// Retries of a compare-and-swap against other threads: each failure is another's success.
inline constexpr int kSwapAttempts = 64;

struct MonitorEvents::OperationEntry {
  std::atomic<uint32_t> life;
  std::atomic<uint32_t> stamp;        // when it was given out: the table's cursor
  std::atomic<uint32_t> owner;        // communicator: index << 16 | generation, as in the next ones
  std::atomic<uint32_t> peer_slot;    // kNoPlace: not point to point
  std::atomic<uint64_t> number;       // in its communicator
  std::atomic<uint64_t> like_number;  // as Slot::operation counts
  std::atomic<uint32_t> kind;
  std::atomic<uint32_t> runs;  // 1: StartOperation counts as a part of it
};

// One cache line. Plain loads and stores to its owner; atomic because a stale token may look.
struct MonitorEvents::TransferEntry {
  std::atomic<uint32_t> life;
  std::atomic<uint32_t> stamp;
  std::atomic<uint32_t> owner;
  std::atomic<uint32_t> slot;
  // Of step s at bit s % 8, and its state at nibble s % 8.
  std::atomic<uint32_t> open;
  std::atomic<uint32_t> states;
  std::atomic<uint32_t> oldest;  // greatest step below which all are over
  std::atomic<uint32_t> steps_done;
  std::atomic<uint32_t> steps_total;
  std::atomic<uint32_t> direction_kind;  // SlotDirection | OperationKind << 8 | begun << 16
  std::atomic<uint64_t> number;          // as Slot::operation counts, as in the next one
  std::atomic<uint64_t> operation;       // token of this process, or 0
  std::atomic<uint64_t> new_bytes;       // not yet added to the slot
};

struct MonitorEvents::KernelEntry {
  std::atomic<uint32_t> life;
  std::atomic<uint32_t> stamp;
  std::atomic<uint32_t> owner;
  std::atomic<uint32_t> slot;
  std::atomic<uint64_t> number;
  std::atomic<uint64_t> operation;
  std::atomic<uint64_t> start_gpu_ns;
};

struct MonitorEvents::OtherEntry {
  std::atomic<uint32_t> life;
  std::atomic<uint32_t> stamp;
};

struct MonitorEvents::Tables {
  OperationEntry operations[kOperationEntries];
  TransferEntry transfers[kTransferEntries];
  KernelEntry kernels[kKernelEntries];
  OtherEntry others[kOtherEntries];
  // The token that each slot shows: a transfer's or a kernel's.
  std::atomic<uint64_t> shown[abi::kBoardSlots];
  alignas(64) std::atomic<uint32_t> next_operation;
  alignas(64) std::atomic<uint32_t> next_transfer;
  alignas(64) std::atomic<uint32_t> next_kernel;
  alignas(64) std::atomic<uint32_t> next_other;

  static_assert(sizeof(OperationEntry) == 40 && sizeof(TransferEntry) == 64);
  static_assert(kOperationEntries <= kTokenPlaceMask && kTransferEntries <= kTokenPlaceMask);
  static_assert(abi::kBoardSlots <= kTokenPlaceMask);
};

template <typename Entry>
uint32_t MonitorEvents::Allocate(Entry* entries, uint32_t count, std::atomic<uint32_t>& cursor,
                                 uint32_t hint, abi::Drop cause, uint32_t* generation) {
  const uint32_t stamp = cursor.fetch_add(1, std::memory_order_relaxed);
  const auto take = [&](uint32_t place, uint32_t life) {
    *generation = (Generation(life) + 1) & 0xffff;
    // Acquire: pairs with the release that freed it, so that its last owner's stores are over.
    if (!entries[place].life.compare_exchange_strong(life, *generation << 16 | kLive,
                                                     std::memory_order_acquire,
                                                     std::memory_order_relaxed)) {
      return false;
    }
    entries[place].stamp.store(stamp, std::memory_order_relaxed);
    return true;
  };
  const auto free = [&](uint32_t place, uint32_t life) {
    if ((life & kLive) == 0) return true;
    if constexpr (requires { entries->owner; }) {
      if (!Open(entries[place].owner.load(std::memory_order_relaxed))) return true;
    }
    // An operation that was enqueued and shows no open part may be forgotten: mostly it is over.
    return (life & kEnded) != 0 && (life & kPartsMask) == 0;
  };
  if (hint < count) {
    const uint32_t life = entries[hint].life.load(std::memory_order_relaxed);
    if ((life & kLive) == 0 && take(hint, life)) return hint;
  }
  uint32_t oldest = stamp % count;
  uint32_t oldest_age = 0;
  for (uint32_t probe = 0; probe < kAllocationProbes; ++probe) {
    const uint32_t place = (stamp + probe) % count;
    const uint32_t life = entries[place].life.load(std::memory_order_relaxed);
    if (free(place, life) && take(place, life)) return place;
    const uint32_t age = stamp - entries[place].stamp.load(std::memory_order_relaxed);
    if (age > oldest_age) {
      oldest = place;
      oldest_age = age;
    }
  }
  board_->CountDrop(cause);
  return take(oldest, entries[oldest].life.load(std::memory_order_relaxed)) ? oldest : kNoPlace;
}

template <typename Entry>
Entry* MonitorEvents::Find(Entry* entries, uint32_t count, TokenKind kind, Token token) const {
  if (!Ours(token, kind)) return nullptr;
  const uint32_t place = PlaceOf(token);
  if (place >= count) return nullptr;
  const uint32_t life = entries[place].life.load(std::memory_order_acquire);
  if ((life & kLive) == 0 || Generation(life) != (token >> kTokenGenerationShift & 0xffff)) {
    return nullptr;
  }
  return &entries[place];
}

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_MONITOR_TABLES_H_
