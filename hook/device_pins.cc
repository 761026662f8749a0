#include "hook/device_pins.h"

#include <algorithm>
#include <utility>

namespace holdfast::hook {
namespace {

uint64_t ChunkBytes(uint64_t wanted, uint64_t block_bytes) {
  return std::max<uint64_t>(wanted / block_bytes, 1) * block_bytes;
}

}  // namespace

DevicePins::DevicePins(std::shared_ptr<const DeviceTable> table, std::byte* data, uint64_t bytes,
                       uint64_t block_bytes, uint64_t chunk_bytes)
    : table_(std::move(table)),
      data_(data),
      bytes_(bytes),
      chunk_bytes_(ChunkBytes(chunk_bytes, block_bytes)),
      chunks_((bytes + chunk_bytes_ - 1) / chunk_bytes_) {}

DevicePins::~DevicePins() {
  const DeviceDriver& driver = table_->driver();
  // Registered for all contexts, so any of them serves. What fails here is gone already: the
  // context has failed or was destroyed, and the driver lets go of the pages with the process.
  const DeviceScope scope(driver, table_->context(0).context());
  if (scope.result() != CuResult::kSuccess) return;
  for (size_t i = 0; i < chunks_.size(); ++i) {
    if (chunks_[i].load(std::memory_order_relaxed) != State::kPinned) continue;
    (void)driver.MemHostUnregister(data_ + i * chunk_bytes_);
  }
}

bool DevicePins::Pin(const std::byte* block) {
  const uint64_t index = static_cast<uint64_t>(block - data_) / chunk_bytes_;
  std::atomic<State>& state = chunks_[index];
  // Pairs with the release below: the driver knows the chunk.
  State found = state.load(std::memory_order_acquire);
  if (found != State::kNone) return found == State::kPinned;
  MutexLock lock(mutex_);
  found = state.load(std::memory_order_relaxed);
  if (found != State::kNone) return found == State::kPinned;
  const DeviceDriver& driver = table_->driver();
  const DeviceScope scope(driver, table_->context(0).context());
  CuResult result = scope.result();
  if (result == CuResult::kSuccess) {
    const uint64_t begin = index * chunk_bytes_;
    result = driver.MemHostRegister(data_ + begin, std::min(chunk_bytes_, bytes_ - begin),
                                    kCuHostRegisterPortable);
  }
  const bool pinned = result == CuResult::kSuccess;
  if (!pinned) refused_count_.fetch_add(1, std::memory_order_relaxed);
  state.store(pinned ? State::kPinned : State::kRefused, std::memory_order_release);
  return pinned;
}

}  // namespace holdfast::hook
