#include "hook/device_contexts.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "hook/os.h"

namespace holdfast::hook {
namespace {

// CUDA's limit of a pitch (CU_DEVICE_ATTRIBUTE_MAX_PITCH) on every device so far.
constexpr uint64_t kPitchBytesMax = (uint64_t{1} << 31) - 1;

CuDevicePointer ToDevicePointer(const void* pointer) {
  return reinterpret_cast<CuDevicePointer>(pointer);
}

}  // namespace

void PauseBetweenLooks() {
  std::atomic<uint32_t> nobody_changes_it{0};
  FutexWait(nobody_changes_it, 0, Deadline::After(kDevicePollNs), FutexScope::kPrivate);
}

Result<std::unique_ptr<DeviceContext>> DeviceContext::Make(
    std::shared_ptr<const DeviceDriver> driver, CuDevice ordinal, CuContext context) {
  std::unique_ptr<DeviceContext> made(new DeviceContext(std::move(driver), ordinal));
  const DeviceDriver& cuda = *made->driver_;
  char model[96] = "unknown";
  CuDevice device = 0;
  if (CuResult result = cuda.DeviceGet(&device, ordinal); result != CuResult::kSuccess) {
    return cuda.ToError(result, "cuDeviceGet");
  }
  // For texts only.
  (void)cuda.DeviceGetName(model, sizeof(model), device);
  made->name_ = "device " + std::to_string(ordinal) + " (" + model + ")";
  CuContext primary = nullptr;
  if (CuResult result = cuda.DevicePrimaryCtxRetain(&primary, device);
      result != CuResult::kSuccess) {
    return made->Failed(result, "cuDevicePrimaryCtxRetain");
  }
  made->is_primary_ = context == nullptr || context == primary;
  made->context_ = made->is_primary_ ? primary : context;
  if (!made->is_primary_) cuda.DevicePrimaryCtxRelease(device);
  if (Error error = made->MakeStreamAndGate(); !error.ok()) return error;
  return made;
}

Error DeviceContext::MakeStreamAndGate() {
  {
    MutexLock lock(mutex_);
    events_.reserve(kDeviceEventsMax);
  }
  const DeviceScope scope(*driver_, context_);
  if (scope.result() != CuResult::kSuccess) return Failed(scope.result(), "cuCtxPushCurrent");
  int lowest = 0;
  int highest = 0;
  CuResult result = driver_->CtxGetStreamPriorityRange(&lowest, &highest);
  if (result != CuResult::kSuccess) return Failed(result, "cuCtxGetStreamPriorityRange");
  result = driver_->StreamCreateWithPriority(&stream_, kCuStreamNonBlocking, lowest);
  if (result != CuResult::kSuccess) return Failed(result, "cuStreamCreateWithPriority");
  result = driver_->EventCreate(&gate_, kCuEventDisableTiming);
  if (result != CuResult::kSuccess) return Failed(result, "cuEventCreate");
  return Error();
}

DeviceContext::~DeviceContext() {
  if (context_ == nullptr) return;
  {
    const DeviceScope scope(*driver_, context_);
    if (scope.result() == CuResult::kSuccess) {
      // Whatever fails here is gone already: the context was destroyed, or has failed.
      MutexLock lock(mutex_);
      for (const CuEvent event : events_) (void)driver_->EventDestroy(event);
      if (gate_ != nullptr) (void)driver_->EventDestroy(gate_);
      if (stream_ != nullptr) (void)driver_->StreamDestroy(stream_);
    }
  }
  if (!is_primary_) return;
  CuDevice device = 0;
  if (driver_->DeviceGet(&device, ordinal_) == CuResult::kSuccess) {
    (void)driver_->DevicePrimaryCtxRelease(device);
  }
}

Error DeviceContext::Failed(CuResult result, const char* call) const {
  // No allocation: this also runs where there is nobody to catch its failure.
  char what[160];
  std::snprintf(what, sizeof(what), "%s: %s", name(), call);
  return driver_->ToError(result, what);
}

Error DeviceContext::CopyToHost(std::byte* host, const DeviceRuns& runs,
                                CuAllocation* known) const {
  return Copy(Direction::kToHost, host, runs, known);
}

Error DeviceContext::CopyToDevice(const DeviceRuns& runs, const std::byte* host,
                                  CuAllocation* known) const {
  // Of this direction nothing is written to the host's memory.
  return Copy(Direction::kToDevice, const_cast<std::byte*>(host), runs, known);
}

Error DeviceContext::CopyRun(Direction direction, std::byte* host, const std::byte* device,
                             uint64_t bytes, CuAllocation* known) const {
  while (bytes > 0) {
    if (!known->Holds(device, 1)) *known = driver_->FindAllocation(device, bytes);
    const uint64_t piece =
        std::min<uint64_t>(bytes, known->end - reinterpret_cast<uintptr_t>(device));
    const CuResult result =
        direction == Direction::kToHost
            ? driver_->MemcpyDtoHAsync(host, ToDevicePointer(device), piece, stream_)
            : driver_->MemcpyHtoDAsync(ToDevicePointer(device), host, piece, stream_);
    if (result != CuResult::kSuccess) {
      return Failed(result,
                    direction == Direction::kToHost ? "cuMemcpyDtoHAsync" : "cuMemcpyHtoDAsync");
    }
    host += piece;
    device += piece;
    bytes -= piece;
  }
  return Error();
}

Error DeviceContext::Copy(Direction direction, std::byte* host, const DeviceRuns& runs,
                          CuAllocation* known) const {
  const uint64_t bytes = runs.run_bytes * runs.count;
  if (bytes == 0) return Error();
  const DeviceScope scope(*driver_, context_);
  if (scope.result() != CuResult::kSuccess) return Failed(scope.result(), "cuCtxPushCurrent");
  const std::byte* const device = static_cast<const std::byte*>(runs.device);
  if (runs.count == 1 || runs.stride == runs.run_bytes) {
    return CopyRun(direction, host, device, bytes, known);
  }
  const uint64_t span_bytes = runs.stride * (runs.count - 1) + runs.run_bytes;
  if (!known->Holds(device, 1)) *known = driver_->FindAllocation(device, span_bytes);
  if (runs.stride > kPitchBytesMax || runs.stride < runs.run_bytes ||
      !known->Holds(device, span_bytes)) {
    for (uint64_t run = 0; run < runs.count; ++run) {
      if (Error error = CopyRun(direction, host + run * runs.run_bytes, device + run * runs.stride,
                                runs.run_bytes, known);
          !error.ok()) {
        return error;
      }
    }
    return Error();
  }
  const bool to_host = direction == Direction::kToHost;
  CuMemcpy2D copy = {};
  copy.source_type = to_host ? CuMemoryType::kDevice : CuMemoryType::kHost;
  copy.target_type = to_host ? CuMemoryType::kHost : CuMemoryType::kDevice;
  copy.source_pitch_bytes = to_host ? runs.stride : runs.run_bytes;
  copy.target_pitch_bytes = to_host ? runs.run_bytes : runs.stride;
  (to_host ? copy.source_device : copy.target_device) = ToDevicePointer(runs.device);
  if (to_host) {
    copy.target_host = host;
  } else {
    copy.source_host = host;
  }
  copy.width_bytes = runs.run_bytes;
  copy.height = runs.count;
  const CuResult result = driver_->Memcpy2DAsync(&copy, stream_);
  return result == CuResult::kSuccess ? Error() : Failed(result, "cuMemcpy2DAsync");
}

Result<CuEvent> DeviceContext::RecordEvent() {
  CuEvent event = nullptr;
  {
    MutexLock lock(mutex_);
    if (!events_.empty()) {
      event = events_.back();
      events_.pop_back();
    }
  }
  const DeviceScope scope(*driver_, context_);
  CuResult result = scope.result();
  if (result == CuResult::kSuccess && event == nullptr) {
    result = driver_->EventCreate(&event, kCuEventDisableTiming);
  }
  if (result == CuResult::kSuccess) result = driver_->EventRecord(event, stream_);
  if (result == CuResult::kSuccess) return event;
  if (event != nullptr) ReturnEvent(event);
  return Failed(result, "cuEventRecord");
}

void DeviceContext::ReturnEvent(CuEvent event) {
  MutexLock lock(mutex_);
  events_.push_back(event);
}

EventState DeviceContext::Poll(CuEvent event, Error* error) const {
  const DeviceScope scope(*driver_, context_);
  const CuResult result =
      scope.result() == CuResult::kSuccess ? driver_->EventQuery(event) : scope.result();
  if (result == CuResult::kSuccess) return EventState::kComplete;
  if (result == CuResult::kNotReady) return EventState::kPending;
  *error = Failed(result, "cuEventQuery");
  return EventState::kFailed;
}

Error DeviceContext::RecordGate(CuStream stream) {
  const DeviceScope scope(*driver_, context_);
  if (scope.result() != CuResult::kSuccess) return Failed(scope.result(), "cuCtxPushCurrent");
  CuCaptureStatus status = CuCaptureStatus::kNone;
  CuResult result = driver_->StreamIsCapturing(stream, &status);
  if (result == CuResult::kStreamCaptureImplicit ||
      (result == CuResult::kSuccess && status != CuCaptureStatus::kNone)) {
    return Error(HF_FAILED_PRECONDITION,
                 "%s: the stream is being captured into a CUDA graph: save outside of the capture",
                 name());
  }
  if (result != CuResult::kSuccess) return Failed(result, "cuStreamIsCapturing");
  result = driver_->EventRecord(gate_, stream);
  return result == CuResult::kSuccess ? Error() : Failed(result, "cuEventRecord");
}

// ---- DeviceTable

int32_t DeviceTable::Find(const CuPlace& place) const {
  for (uint32_t i = 0; i < count(); ++i) {
    const DeviceContext& known = *contexts_[i];
    // Memory of no context in particular is copied in the primary one, which is entered for it.
    if (known.ordinal() == place.ordinal &&
        (place.context == nullptr ? known.is_primary() : known.context() == place.context)) {
      return static_cast<int32_t>(i);
    }
  }
  return -1;
}

Result<int32_t> DeviceTable::Enter(const void* pointer) {
  Result<CuPlace> place = driver_->Locate(pointer);
  if (!place.ok()) return place.error();
  if (!place.value().is_device) return -1;
  if (const int32_t known = Find(place.value()); known >= 0) return known;
  if (count() == kDeviceContextsMax) {
    return Error(HF_RESOURCE_EXHAUSTED, "buffers lie in more than %u CUDA contexts",
                 kDeviceContextsMax);
  }
  Result<std::unique_ptr<DeviceContext>> made =
      DeviceContext::Make(driver_, place.value().ordinal, place.value().context);
  if (!made.ok()) return made.error();
  contexts_.push_back(std::move(made.value()));
  return static_cast<int32_t>(count() - 1);
}

Result<bool> DeviceTable::LiesAt(const void* pointer, int32_t place) const {
  Result<CuPlace> found = driver_->Locate(pointer);
  if (!found.ok()) return found.error();
  if (!found.value().is_device) return place < 0;
  return Find(found.value()) == place;
}

Error DeviceTable::RecordGates(std::span<void* const> streams) const {
  CuStream chosen[kDeviceContextsMax] = {};
  for (size_t i = 0; i < streams.size(); ++i) {
    const CuStream stream = static_cast<CuStream>(streams[i]);
    if (stream == nullptr) continue;
    CuContext context = nullptr;
    const CuResult result = driver_->StreamGetCtx(stream, &context);
    if (result != CuResult::kSuccess) {
      return Error(HF_INVALID_ARGUMENT, "stream %zu: %s", i,
                   driver_->ToError(result, "cuStreamGetCtx").text());
    }
    uint32_t index = 0;
    while (index < count() && contexts_[index]->context() != context) ++index;
    if (index == count()) {
      return Error(HF_INVALID_ARGUMENT,
                   "stream %zu belongs to a CUDA context in which no buffer is registered", i);
    }
    chosen[index] = stream;
  }
  for (uint32_t i = 0; i < count(); ++i) {
    if (Error error = contexts_[i]->RecordGate(chosen[i]); !error.ok()) return error;
  }
  return Error();
}

// ---- DeviceComparer

Result<bool> DeviceComparer::Equal(const std::byte* copy, const std::byte* source,
                                   uint64_t run_bytes, uint64_t count, uint64_t stride) {
  if (stop_.load(std::memory_order_relaxed)) {
    return Error(HF_ABORTED, "the capture was cancelled during the comparison");
  }
  const uint64_t bytes = run_bytes * count;
  if (piece_.size() < bytes) piece_.resize(bytes);
  Error error = context_.CopyToHost(piece_.data(), {source, run_bytes, count, stride}, &known_);
  // Also if only part of it could be enqueued: the piece is ours to the end.
  if (Error failed = context_.WaitCopies(); error.ok()) error = failed;
  if (!error.ok()) return error;
  return std::memcmp(piece_.data(), copy, bytes) == 0;
}

}  // namespace holdfast::hook
