// The entry points. Each enters (is recorded, and may be told to fail), looks at its arguments, and
// leaves the rest to the device.
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "tests/support/fake_cuda/device.h"

namespace holdfast::fake {
namespace {

using hook::CuCaptureMode;
using hook::CuContext;
using hook::CuEvent;
using hook::CuStream;
using Kind = Operation::Kind;

thread_local std::vector<Context*> current_contexts;
thread_local CuCaptureMode capture_mode = CuCaptureMode::kGlobal;

Context* Current() { return current_contexts.empty() ? nullptr : current_contexts.back(); }

constexpr bool kUnsafe = true;

CuResult Enter(const char* name, Context* context = nullptr, bool unsafe = false,
               const void* stream = nullptr, const void* event = nullptr, uint64_t bytes = 0,
               int priority = 0) {
  if (const std::function<void()> before = TheDevice().TakeBefore(name)) before();
  FakeCuda::Call call;
  call.name = name;
  call.stream = stream;
  call.event = event;
  call.bytes = bytes;
  call.priority = priority;
  return TheDevice().Enter(std::move(call), context,
                           unsafe && capture_mode != CuCaptureMode::kRelaxed);
}

// What $HOLDFAST_FAKE_CUDA says.
bool Is(const char* mode) {
  const char* const set = std::getenv("HOLDFAST_FAKE_CUDA");
  return set != nullptr && std::strcmp(set, mode) == 0;
}

// Handles are what the application sees; their types are those of hook/device_driver.h.
Context* ToContext(CuContext handle) { return reinterpret_cast<Context*>(handle); }
CuContext FromContext(Context* context) { return reinterpret_cast<CuContext>(context); }
Event* ToEvent(CuEvent handle) { return reinterpret_cast<Event*>(handle); }

// A handle, or the default stream of the current context.
Stream* ToStream(CuStream handle) {
  if (handle != nullptr) return reinterpret_cast<Stream*>(handle);
  return Current() == nullptr ? nullptr : TheDevice().DefaultStream(Current());
}

// Copies between a device's memory and the host's, in the order of the stream.
CuResult CopyRows(const char* name, CuStream stream_handle, CuDevicePointer device_pointer,
                  uint64_t device_pitch, void* host, uint64_t host_pitch, uint64_t width,
                  uint64_t height, bool to_host) {
  Stream* const stream = ToStream(stream_handle);
  Context* const context = Current();
  if (CuResult result = Enter(name, context, false, stream_handle, nullptr, width * height);
      result != CuResult::kSuccess) {
    return result;
  }
  if (context == nullptr || stream == nullptr) return CuResult::kInvalidContext;
  if (width == 0 || height == 0) return CuResult::kSuccess;
  if (host_pitch < width || device_pitch < width) return CuResult::kInvalidValue;
  std::byte* view = nullptr;
  const uint64_t device_bytes = device_pitch * (height - 1) + width;
  if (!TheDevice().Find(device_pointer, device_bytes, &view)) return CuResult::kInvalidValue;
  Operation operation;
  operation.kind = Kind::kCopy;
  std::byte* const host_bytes = static_cast<std::byte*>(host);
  operation.target = to_host ? host_bytes : view;
  operation.source = to_host ? view : host_bytes;
  operation.target_pitch = to_host ? host_pitch : device_pitch;
  operation.source_pitch = to_host ? device_pitch : host_pitch;
  operation.width = width;
  operation.height = height;
  operation.to_host = to_host;
  operation.is_registered = TheDevice().IsPinned(host, host_pitch * (height - 1) + width);
  TheDevice().Enqueue(stream, operation);
  return operation.is_registered ? CuResult::kSuccess : TheDevice().Drain(stream);
}

}  // namespace
}  // namespace holdfast::fake

using holdfast::fake::Context;
using holdfast::fake::Current;
using holdfast::fake::Enter;
using holdfast::fake::FromContext;
using holdfast::fake::Is;
using holdfast::fake::Operation;
using holdfast::fake::Stream;
using holdfast::fake::TheDevice;
using holdfast::fake::ToContext;
using holdfast::fake::ToEvent;
using holdfast::fake::ToStream;
using holdfast::hook::CuCaptureMode;
using holdfast::hook::CuCaptureStatus;
using holdfast::hook::CuContext;
using holdfast::hook::CuDevicePointer;
using holdfast::hook::CuEvent;
using holdfast::hook::CuMemcpy2D;
using holdfast::hook::CuMemoryType;
using holdfast::hook::CuPointerAttribute;
using holdfast::hook::CuResult;
using holdfast::hook::CuStream;

#define ENTER(...) \
  if (const CuResult entered = Enter(__VA_ARGS__); entered != CuResult::kSuccess) return entered

extern "C" {

holdfast::FakeCuda* fake_cuda() { return &TheDevice(); }

CuResult cuInit(unsigned) {
  if (Is("mismatch")) return static_cast<CuResult>(803);
  if (Is("absent")) return CuResult::kNoDevice;
  TheDevice();
  return CuResult::kSuccess;
}

CuResult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CuResult::kSuccess;
}

CuResult cuGetErrorName(CuResult result, const char** name) {
  switch (static_cast<int>(result)) {
#define NAME(number, text) \
  case number:             \
    *name = text;          \
    return CuResult::kSuccess
    NAME(1, "CUDA_ERROR_INVALID_VALUE");
    NAME(2, "CUDA_ERROR_OUT_OF_MEMORY");
    NAME(46, "CUDA_ERROR_DEVICE_UNAVAILABLE");
    NAME(100, "CUDA_ERROR_NO_DEVICE");
    NAME(214, "CUDA_ERROR_ECC_UNCORRECTABLE");
    NAME(220, "CUDA_ERROR_NVLINK_UNCORRECTABLE");
    NAME(700, "CUDA_ERROR_ILLEGAL_ADDRESS");
    NAME(709, "CUDA_ERROR_CONTEXT_IS_DESTROYED");
    NAME(719, "CUDA_ERROR_LAUNCH_FAILED");
    NAME(999, "CUDA_ERROR_UNKNOWN");
#undef NAME
    default:
      *name = "CUDA_ERROR_OF_THE_FAKE";
      return CuResult::kSuccess;
  }
}

CuResult cuGetErrorString(CuResult, const char** text) {
  *text = "as the test wanted it";
  return CuResult::kSuccess;
}

CuResult cuDeviceGetCount(int* count) {
  *count = holdfast::fake::Device::kCount;
  return CuResult::kSuccess;
}

CuResult cuDeviceGet(int* device, int ordinal) {
  ENTER("cuDeviceGet");
  *device = ordinal;
  return ordinal >= 0 && ordinal < holdfast::fake::Device::kCount ? CuResult::kSuccess
                                                                  : static_cast<CuResult>(101);
}

CuResult cuDeviceGetName(char* name, int length, int) {
  std::strncpy(name, "fake", static_cast<size_t>(length));
  return CuResult::kSuccess;
}

CuResult cuDevicePrimaryCtxRetain(CuContext* context, int device) {
  ENTER("cuDevicePrimaryCtxRetain");
  return TheDevice().Retain(device, reinterpret_cast<Context**>(context));
}

CuResult cuDevicePrimaryCtxRelease_v2(int device) {
  ENTER("cuDevicePrimaryCtxRelease_v2");
  return TheDevice().Release(device);
}

CuResult cuCtxCreate_v2(CuContext* context, unsigned, int device) {
  ENTER("cuCtxCreate_v2");
  Context* made = nullptr;
  const CuResult result = TheDevice().MakeContext(device, &made);
  if (result != CuResult::kSuccess) return result;
  holdfast::fake::current_contexts.push_back(made);
  *context = FromContext(made);
  return CuResult::kSuccess;
}

CuResult cuCtxDestroy_v2(CuContext context) {
  ENTER("cuCtxDestroy_v2");
  if (Current() == ToContext(context)) holdfast::fake::current_contexts.pop_back();
  return TheDevice().DestroyContext(ToContext(context));
}

CuResult cuCtxPushCurrent_v2(CuContext context) {
  ENTER("cuCtxPushCurrent_v2");
  if (TheDevice().IsDestroyed(ToContext(context))) return CuResult::kContextIsDestroyed;
  holdfast::fake::current_contexts.push_back(ToContext(context));
  return CuResult::kSuccess;
}

CuResult cuCtxPopCurrent_v2(CuContext* context) {
  ENTER("cuCtxPopCurrent_v2");
  if (holdfast::fake::current_contexts.empty()) return CuResult::kInvalidContext;
  *context = FromContext(Current());
  holdfast::fake::current_contexts.pop_back();
  return CuResult::kSuccess;
}

CuResult cuCtxGetCurrent(CuContext* context) {
  *context = FromContext(Current());
  return CuResult::kSuccess;
}

CuResult cuCtxGetStreamPriorityRange(int* lowest, int* highest) {
  *lowest = 0;
  *highest = -5;
  return CuResult::kSuccess;
}

CuResult cuThreadExchangeStreamCaptureMode(CuCaptureMode* mode) {
  std::swap(*mode, holdfast::fake::capture_mode);
  return CuResult::kSuccess;
}

CuResult cuStreamCreateWithPriority(CuStream* stream, unsigned, int priority) {
  ENTER("cuStreamCreateWithPriority", Current(), holdfast::fake::kUnsafe, nullptr, nullptr, 0,
        priority);
  if (Current() == nullptr) return CuResult::kInvalidContext;
  *stream = reinterpret_cast<CuStream>(TheDevice().MakeStream(Current()));
  return CuResult::kSuccess;
}

CuResult cuStreamDestroy_v2(CuStream stream) {
  ENTER("cuStreamDestroy_v2", nullptr, false, stream);
  return TheDevice().DestroyStream(ToStream(stream));
}

CuResult cuStreamGetCtx(CuStream stream, CuContext* context) {
  ENTER("cuStreamGetCtx", nullptr, false, stream);
  Stream* const found = ToStream(stream);
  if (found == nullptr) return CuResult::kInvalidContext;
  *context = FromContext(found->context);
  return CuResult::kSuccess;
}

CuResult cuStreamBeginCapture_v2(CuStream stream, CuCaptureMode) {
  return TheDevice().SetCapturing(ToStream(stream), true);
}

CuResult cuStreamEndCapture(CuStream stream, void** graph) {
  *graph = nullptr;
  return TheDevice().SetCapturing(ToStream(stream), false);
}

CuResult cuStreamIsCapturing(CuStream stream, CuCaptureStatus* status) {
  ENTER("cuStreamIsCapturing", nullptr, false, stream);
  Stream* const found = ToStream(stream);
  if (found == nullptr) return CuResult::kInvalidContext;
  *status = TheDevice().capturing(found) ? CuCaptureStatus::kActive : CuCaptureStatus::kNone;
  return CuResult::kSuccess;
}

CuResult cuStreamSynchronize(CuStream stream) {
  ENTER("cuStreamSynchronize", Current(), holdfast::fake::kUnsafe, stream);
  return TheDevice().Drain(ToStream(stream));
}

CuResult cuStreamWaitValue32_v2(CuStream stream, CuDevicePointer address, uint32_t value,
                                unsigned) {
  Operation operation;
  operation.kind = Operation::Kind::kWaitValue;
  operation.word = reinterpret_cast<const uint32_t*>(static_cast<uintptr_t>(address));
  operation.value = value;
  return TheDevice().Enqueue(ToStream(stream), operation);
}

CuResult cuEventCreate(CuEvent* event, unsigned) {
  ENTER("cuEventCreate", Current());
  if (Current() == nullptr) return CuResult::kInvalidContext;
  *event = reinterpret_cast<CuEvent>(TheDevice().MakeEvent(Current()));
  return CuResult::kSuccess;
}

CuResult cuEventDestroy_v2(CuEvent event) {
  ENTER("cuEventDestroy_v2", nullptr, false, nullptr, event);
  return TheDevice().DestroyEvent(ToEvent(event));
}

CuResult cuEventRecord(CuEvent event, CuStream stream) {
  ENTER("cuEventRecord", Current(), false, stream, event);
  Stream* const found = ToStream(stream);
  if (found == nullptr) return CuResult::kInvalidContext;
  return TheDevice().Record(ToEvent(event), found);
}

CuResult cuEventQuery(CuEvent event) {
  ENTER("cuEventQuery", Current(), holdfast::fake::kUnsafe, nullptr, event);
  return TheDevice().Query(ToEvent(event));
}

CuResult cuMemAlloc_v2(CuDevicePointer* pointer, size_t bytes) {
  if (Current() == nullptr) return CuResult::kInvalidContext;
  return TheDevice().Allocate(bytes, Current(), false, pointer);
}

CuResult cuMemAllocAsync(CuDevicePointer* pointer, size_t bytes, CuStream) {
  if (Current() == nullptr) return CuResult::kInvalidContext;
  return TheDevice().Allocate(bytes, nullptr, false, pointer);
}

CuResult cuMemAllocManaged(CuDevicePointer* pointer, size_t bytes, unsigned) {
  if (Current() == nullptr) return CuResult::kInvalidContext;
  return TheDevice().Allocate(bytes, Current(), true, pointer);
}

CuResult cuMemFree_v2(CuDevicePointer pointer) { return TheDevice().Free(pointer); }

CuResult cuMemGetAllocationGranularity(size_t* bytes, const void*, int) {
  *bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return CuResult::kSuccess;
}

CuResult cuMemAddressReserve(CuDevicePointer* pointer, size_t bytes, size_t, CuDevicePointer,
                             unsigned long long) {
  return TheDevice().ReserveVirtual(bytes, pointer);
}

CuResult cuMemAddressFree(CuDevicePointer, size_t) { return CuResult::kSuccess; }

CuResult cuMemCreate(unsigned long long* handle, size_t bytes, const void*, unsigned long long) {
  uint64_t made = 0;
  const CuResult result = TheDevice().MakeHandle(bytes, &made);
  *handle = made;
  return result;
}

CuResult cuMemRelease(unsigned long long handle) { return TheDevice().ReleaseHandle(handle); }

CuResult cuMemMap(CuDevicePointer pointer, size_t bytes, size_t, unsigned long long handle,
                  unsigned long long) {
  return TheDevice().MapHandle(pointer, bytes, handle);
}

CuResult cuMemUnmap(CuDevicePointer pointer, size_t bytes) {
  return TheDevice().UnmapVirtual(pointer, bytes);
}

CuResult cuMemSetAccess(CuDevicePointer, size_t, const void*, size_t) { return CuResult::kSuccess; }

CuResult cuMemAllocHost_v2(void** data, size_t bytes) {
  ENTER("cuMemAllocHost_v2", Current(), holdfast::fake::kUnsafe, nullptr, nullptr, bytes);
  *data = TheDevice().AllocateHost(bytes);
  return CuResult::kSuccess;
}

CuResult cuMemFreeHost(void* data) {
  ENTER("cuMemFreeHost", nullptr, holdfast::fake::kUnsafe);
  return TheDevice().FreeHost(data);
}

CuResult cuMemHostRegister_v2(void* data, size_t bytes, unsigned) {
  ENTER("cuMemHostRegister_v2", Current(), holdfast::fake::kUnsafe, nullptr, nullptr, bytes);
  if (Current() == nullptr) return CuResult::kInvalidContext;
  if (Is("pinless")) return CuResult::kOutOfMemory;
  return TheDevice().RegisterHost(data, bytes);
}

CuResult cuMemHostUnregister(void* data) {
  ENTER("cuMemHostUnregister", nullptr, holdfast::fake::kUnsafe);
  return TheDevice().UnregisterHost(data);
}

CuResult cuMemcpyDtoHAsync_v2(void* host, CuDevicePointer device, size_t bytes, CuStream stream) {
  return holdfast::fake::CopyRows("cuMemcpyDtoHAsync_v2", stream, device, bytes, host, bytes, bytes,
                                  1, true);
}

CuResult cuMemcpyHtoDAsync_v2(CuDevicePointer device, const void* host, size_t bytes,
                              CuStream stream) {
  return holdfast::fake::CopyRows("cuMemcpyHtoDAsync_v2", stream, device, bytes,
                                  const_cast<void*>(host), bytes, bytes, 1, false);
}

CuResult cuMemcpyDtoH_v2(void* host, CuDevicePointer device, size_t bytes) {
  const CuResult result = holdfast::fake::CopyRows("cuMemcpyDtoH_v2", nullptr, device, bytes, host,
                                                   bytes, bytes, 1, true);
  if (result != CuResult::kSuccess || Current() == nullptr) return result;
  return TheDevice().Drain(TheDevice().DefaultStream(Current()));
}

CuResult cuMemcpyHtoD_v2(CuDevicePointer device, const void* host, size_t bytes) {
  const CuResult result = holdfast::fake::CopyRows("cuMemcpyHtoD_v2", nullptr, device, bytes,
                                                   const_cast<void*>(host), bytes, bytes, 1, false);
  if (result != CuResult::kSuccess || Current() == nullptr) return result;
  return TheDevice().Drain(TheDevice().DefaultStream(Current()));
}

CuResult cuMemcpy2DAsync_v2(const CuMemcpy2D* copy, CuStream stream) {
  const bool to_host = copy->source_type == CuMemoryType::kDevice;
  return holdfast::fake::CopyRows(
      "cuMemcpy2DAsync_v2", stream, to_host ? copy->source_device : copy->target_device,
      to_host ? copy->source_pitch_bytes : copy->target_pitch_bytes,
      to_host ? copy->target_host : const_cast<void*>(copy->source_host),
      to_host ? copy->target_pitch_bytes : copy->source_pitch_bytes, copy->width_bytes,
      copy->height, to_host);
}

CuResult cuMemsetD8Async(CuDevicePointer device, unsigned char value, size_t bytes,
                         CuStream stream) {
  Operation operation;
  operation.kind = Operation::Kind::kSet;
  if (!TheDevice().Find(device, bytes, &operation.target)) return CuResult::kInvalidValue;
  operation.width = bytes;
  operation.value8 = value;
  return TheDevice().Enqueue(ToStream(stream), operation);
}

CuResult cuPointerGetAttributes(unsigned count, CuPointerAttribute* attributes, void** values,
                                CuDevicePointer pointer) {
  ENTER("cuPointerGetAttributes");
  std::byte* view = nullptr;
  const auto found = TheDevice().Find(pointer, 1, &view);
  for (unsigned i = 0; i < count; ++i) {
    switch (attributes[i]) {
      case CuPointerAttribute::kContext:
        *static_cast<CuContext*>(values[i]) = found ? FromContext(found->context) : nullptr;
        break;
      case CuPointerAttribute::kRangeStart:
        *static_cast<CuDevicePointer*>(values[i]) = found ? found->begin : 0;
        break;
      case CuPointerAttribute::kRangeSize:
        *static_cast<size_t*>(values[i]) = found ? found->bytes : 0;
        break;
      case CuPointerAttribute::kMemoryType:
        *static_cast<int*>(values[i]) = found ? 2 : 0;
        break;
      case CuPointerAttribute::kIsManaged:
        *static_cast<unsigned*>(values[i]) = found && found->managed ? 1 : 0;
        break;
      case CuPointerAttribute::kDeviceOrdinal:
        *static_cast<int*>(values[i]) = found && found->context ? found->context->device : 0;
        break;
    }
  }
  return CuResult::kSuccess;
}

}  // extern "C"
