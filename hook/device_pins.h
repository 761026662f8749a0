// The rank's memory, registered with the driver (cuMemHostRegister), so that devices copy to it
// directly and calls that enqueue copies return at once.
//
// Registering makes every page present and takes long (of the order of a second per 10 GB), so it
// is done chunk by chunk: ahead, in the background, for blocks that were granted, and by a copier
// that comes to a chunk first. A chunk that the driver refuses stays as it is: copies to it are
// right, and slower.
#ifndef HOLDFAST_HOOK_DEVICE_PINS_H_
#define HOLDFAST_HOOK_DEVICE_PINS_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "hook/annotations.h"
#include "hook/device_contexts.h"

namespace holdfast::hook {

inline constexpr uint64_t kPinChunkBytes = uint64_t{64} << 20;

// Threads: any, but not the trainer's: a call may register a chunk, or wait for one.
// Lifetime: the memory stays mapped until this is destroyed; the table is shared.
class DevicePins {
 public:
  // Of `bytes` at `data`, cut into blocks of `block_bytes`, none of which two chunks share.
  DevicePins(std::shared_ptr<const DeviceTable> table, std::byte* data, uint64_t bytes,
             uint64_t block_bytes, uint64_t chunk_bytes = kPinChunkBytes);
  // Unregisters.
  ~DevicePins();
  DevicePins(const DevicePins&) = delete;
  DevicePins& operator=(const DevicePins&) = delete;

  // Registers the chunk in which `block` lies, if nobody has. True if it is registered.
  bool Pin(const std::byte* block) HOOK_EXCLUDES(mutex_);

  // Chunks that the driver refused.
  uint64_t refused_count() const { return refused_count_.load(std::memory_order_relaxed); }

 private:
  enum class State : uint8_t { kNone, kPinned, kRefused };

  const std::shared_ptr<const DeviceTable> table_;
  std::byte* const data_;
  const uint64_t bytes_;
  const uint64_t chunk_bytes_;
  std::vector<std::atomic<State>> chunks_;
  std::atomic<uint64_t> refused_count_{0};
  Mutex mutex_;  // one registers at a time; guards changes of chunks_
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_DEVICE_PINS_H_
