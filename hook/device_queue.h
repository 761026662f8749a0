// The copies from devices that one copier thread has in flight, block by block.
//
// Small tensors that lie one behind the other, in one allocation and in the image, become one copy.
// A block is complete when the event behind its last copy is; blocks are looked at in the order in
// which they were enqueued. At most kBlocksInFlightMax blocks and, if a block is not larger by
// itself, kBytesInFlightMax bytes are in flight: enough that the device never waits for us (half a
// millisecond of PCIe 5), little enough that a cancellation is over soon.
#ifndef HOLDFAST_HOOK_DEVICE_QUEUE_H_
#define HOLDFAST_HOOK_DEVICE_QUEUE_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "hook/device_contexts.h"
#include "hook/error.h"

namespace holdfast::hook {

inline constexpr uint32_t kBlocksInFlightMax = 64;
inline constexpr uint64_t kBytesInFlightMax = uint64_t{32} << 20;

// Threads: one.
// Lifetime: the table outlives it. Destroy it only when it is empty.
class DeviceQueue {
 public:
  struct Block {
    uint32_t index = 0;
    uint64_t bytes = 0;  // from devices
    bool whole = true;   // false: not all of its copies could be enqueued
  };

  explicit DeviceQueue(const DeviceTable* table) : table_(table) {}

  bool empty() const { return count_ == 0; }
  // Another block may be begun.
  bool has_room() const {
    return count_ < kBlocksInFlightMax && (count_ == 0 || bytes_ < kBytesInFlightMax);
  }

  // Adds a copy to the block that is being enqueued. It may be with the driver only after EndBlock.
  // Errors: the driver's, of this copy or the one before. EndBlock comes all the same.
  Error Add(uint32_t context, std::byte* target, const DeviceRuns& runs);
  // True if copies were added since the last EndBlock.
  bool block_has_copies() const { return pending_.bytes > 0; }
  uint64_t block_bytes() const { return pending_.bytes; }
  // Ends the block: it is in flight now. Only if has_room(). Errors: the driver's, of a copy; the
  // block is not whole then.
  Error EndBlock(uint32_t index, bool whole);

  // kPending, or the oldest block is taken out. kFailed: it is unknown whether its copies are
  // complete; the driver's reason is in `error`. Only if !empty().
  EventState TakeOldest(Block* block, Error* error);

 private:
  struct InFlight {
    Block block;
    uint32_t contexts = 0;  // bit mask: those whose event is not complete yet
    std::array<CuEvent, kDeviceContextsMax> events;
    bool failed = false;
  };
  struct Pending {
    uint64_t bytes = 0;
    uint32_t contexts = 0;
    // The last copy, not with the driver yet, as one run that may grow; nothing if runs.run_bytes
    // is 0.
    uint32_t context = 0;
    std::byte* target = nullptr;
    DeviceRuns runs;
  };
  Error Flush();

  const DeviceTable* const table_;
  Pending pending_;
  std::array<InFlight, kBlocksInFlightMax> ring_;
  uint32_t first_ = 0;
  uint32_t count_ = 0;
  uint64_t bytes_ = 0;
  CuAllocation known_;  // the one met last: none is freed under capture
  Error error_;         // of a block that failed
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_DEVICE_QUEUE_H_
