#include "hook/device_uploads.h"

#include <algorithm>
#include <cstdlib>

#include "hook/stream_copy.h"

namespace holdfast::hook {
namespace {

constexpr uint64_t kRingBytes = kUploadPieces * kUploadPieceBytes;

}  // namespace

DeviceUploads::~DeviceUploads() {
  if (memory_ == nullptr) return;
  const Deadline drain = Deadline::After(kNsPerSecond);
  bool idle = Seal().ok();
  for (Piece& piece : pieces_) idle = AwaitPiece(piece, drain).ok() && idle;
  if (!idle) return;  // it is read still, or nobody can tell
  if (!pinned_) {
    std::free(memory_);
    return;
  }
  const DeviceScope scope(table_.driver(), table_.context(0).context());
  // If even this fails, the driver keeps it for the rest of the process.
  if (scope.result() == CuResult::kSuccess) (void)table_.driver().MemFreeHost(memory_);
}

Error DeviceUploads::Allocate() {
  if (memory_ != nullptr) return Error();
  void* memory = nullptr;
  {
    const DeviceScope scope(table_.driver(), table_.context(0).context());
    pinned_ = scope.result() == CuResult::kSuccess &&
              table_.driver().MemAllocHost(&memory, kRingBytes) == CuResult::kSuccess;
  }
  // Without pinned memory the driver copies through its own.
  if (!pinned_) memory = std::malloc(kRingBytes);
  if (memory == nullptr) {
    return Error(HF_RESOURCE_EXHAUSTED, "no memory for the way to the device (%llu bytes)",
                 static_cast<unsigned long long>(kRingBytes));
  }
  memory_ = static_cast<std::byte*>(memory);
  return Error();
}

Error DeviceUploads::Begin(std::span<void* const> streams) {
  if (Error error = table_.RecordGates(streams); !error.ok()) return error;
  for (uint32_t i = 0; i < table_.count(); ++i) {
    for (;;) {
      Error error;
      const EventState state = table_.context(i).PollGate(&error);
      if (state == EventState::kComplete) break;
      if (state == EventState::kFailed) return error;
      if (deadline_.passed()) {
        return Error(HF_DEADLINE_EXCEEDED, "%s: the caller's stream did not come to the restore",
                     table_.context(i).name());
      }
      PauseBetweenLooks();
    }
  }
  return Error();
}

// The current piece is full: it is in flight, and the next one is taken when it is free.
Error DeviceUploads::Seal() {
  Piece& piece = pieces_[current_];
  for (; piece.copied != 0; piece.copied &= piece.copied - 1) {
    const uint32_t context = static_cast<uint32_t>(__builtin_ctz(piece.copied));
    Result<CuEvent> event = table_.context(context).RecordEvent();
    if (!event.ok()) return event.error();
    piece.events[context] = event.value();
    piece.in_flight |= uint32_t{1} << context;
  }
  current_ = (current_ + 1) % kUploadPieces;
  filled_bytes_ = 0;
  return Error();
}

Error DeviceUploads::AwaitPiece(Piece& piece, Deadline deadline) {
  while (piece.in_flight != 0) {
    const uint32_t context = static_cast<uint32_t>(__builtin_ctz(piece.in_flight));
    DeviceContext& device = table_.context(context);
    Error error;
    const EventState state = device.Poll(piece.events[context], &error);
    if (state == EventState::kPending) {
      if (deadline.passed()) {
        return Error(HF_DEADLINE_EXCEEDED, "%s: the restore did not end in time", device.name());
      }
      PauseBetweenLooks();
      continue;
    }
    if (state == EventState::kFailed) return error;
    device.ReturnEvent(piece.events[context]);
    piece.in_flight &= ~(uint32_t{1} << context);
  }
  return Error();
}

Error DeviceUploads::Copy(uint32_t context, const DeviceRuns& target, const std::byte* source,
                          uint64_t source_stride) {
  if (Error error = Allocate(); !error.ok()) return error;
  const std::byte* const device = static_cast<const std::byte*>(target.device);
  uint64_t run = 0;
  uint64_t in_run = 0;
  while (run < target.count) {
    uint64_t room_bytes = kUploadPieceBytes - filled_bytes_;
    // A run that fits into a piece is not cut.
    if (room_bytes < std::min(target.run_bytes - in_run, kUploadPieceBytes)) {
      if (Error error = Seal(); !error.ok()) return error;
      room_bytes = kUploadPieceBytes;
    }
    if (Error error = AwaitPiece(pieces_[current_], deadline_); !error.ok()) return error;
    DeviceRuns part = {device + run * target.stride + in_run, 0, 1, target.stride};
    std::byte* const staged = room();
    const uint64_t whole_runs = std::min(target.count - run, room_bytes / target.run_bytes);
    if (in_run == 0 && whole_runs > 0) {
      part.run_bytes = target.run_bytes;
      part.count = whole_runs;
      for (uint64_t i = 0; i < whole_runs; ++i) {
        StreamCopy(staged + i * target.run_bytes, source + (run + i) * source_stride,
                   target.run_bytes);
      }
      run += whole_runs;
    } else {
      part.run_bytes = std::min(target.run_bytes - in_run, room_bytes);
      StreamCopy(staged, source + run * source_stride + in_run, part.run_bytes);
      in_run += part.run_bytes;
      if (in_run == target.run_bytes) {
        in_run = 0;
        ++run;
      }
    }
    filled_bytes_ += part.run_bytes * part.count;
    pieces_[current_].copied |= uint32_t{1} << context;
    if (Error error = table_.context(context).CopyToDevice(part, staged, &known_); !error.ok()) {
      return error;
    }
  }
  return Error();
}

Error DeviceUploads::Finish() {
  if (memory_ == nullptr) return Error();
  if (Error error = Seal(); !error.ok()) return error;
  for (Piece& piece : pieces_) {
    if (Error error = AwaitPiece(piece, deadline_); !error.ok()) return error;
  }
  return Error();
}

}  // namespace holdfast::hook
