// Restored bytes on their way into device memory: through a ring of pieces that the driver has
// pinned, so that the processor fills one while the device copies from the others.
#ifndef HOLDFAST_HOOK_DEVICE_UPLOADS_H_
#define HOLDFAST_HOOK_DEVICE_UPLOADS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "hook/deadline.h"
#include "hook/device_contexts.h"
#include "hook/error.h"

namespace holdfast::hook {

inline constexpr uint64_t kUploadPieceBytes = uint64_t{4} << 20;
inline constexpr uint32_t kUploadPieces = 8;

// Threads: one.
// Lifetime: the table outlives it. Destroying it waits for copies in flight for a second; memory
//   that a device may read still is kept for the rest of the process then.
class DeviceUploads {
 public:
  DeviceUploads(const DeviceTable& table, Deadline deadline) : table_(table), deadline_(deadline) {}
  ~DeviceUploads();
  DeviceUploads(const DeviceUploads&) = delete;
  DeviceUploads& operator=(const DeviceUploads&) = delete;

  // Waits until the caller's streams (as in DeviceTable::RecordGates) have come to this call: what
  // they write to the tensors is overwritten, not the other way round. Errors, of all calls: the
  // driver's, HF_DEADLINE_EXCEEDED, HF_RESOURCE_EXHAUSTED.
  Error Begin(std::span<void* const> streams);

  // Copies `target.count` runs, `source_stride` apart in host memory, to device memory of the
  // context. The source is not looked at any more when it returns.
  Error Copy(uint32_t context, const DeviceRuns& target, const std::byte* source,
             uint64_t source_stride);

  // After OK everything has arrived.
  Error Finish();

 private:
  struct Piece {
    uint32_t copied = 0;     // bit mask of contexts: have copies from it that no event is behind
    uint32_t in_flight = 0;  // bit mask of contexts: whose event is not complete yet
    std::array<CuEvent, kDeviceContextsMax> events;
  };
  Error Allocate();
  Error Seal();
  Error AwaitPiece(Piece& piece, Deadline deadline);
  std::byte* room() { return memory_ + current_ * kUploadPieceBytes + filled_bytes_; }

  const DeviceTable& table_;
  const Deadline deadline_;
  std::byte* memory_ = nullptr;
  bool pinned_ = false;
  std::array<Piece, kUploadPieces> pieces_;
  uint32_t current_ = 0;
  uint64_t filled_bytes_ = 0;  // of the current piece
  CuAllocation known_;         // the one met last: none is freed under restore
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_DEVICE_UPLOADS_H_
