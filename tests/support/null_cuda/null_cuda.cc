// A CUDA driver that does nothing: a libcuda.so.1 whose calls all succeed at once, wait for nothing
// and allocate nothing. What the hook library costs on it is its own code: for the test of what a
// save allocates, and for scripts/bench. (The fake driver's own work would hide it.)
//
// Model: one device with one context; every address is in its memory, all in one allocation; copies
//   move nothing; events are complete.
#include <cstdint>
#include <cstring>

#include "hook/device_driver.h"

using holdfast::hook::CuCaptureMode;
using holdfast::hook::CuCaptureStatus;
using holdfast::hook::CuContext;
using holdfast::hook::CuDevice;
using holdfast::hook::CuDevicePointer;
using holdfast::hook::CuEvent;
using holdfast::hook::CuMemcpy2D;
using holdfast::hook::CuMemoryType;
using holdfast::hook::CuPointerAttribute;
using holdfast::hook::CuResult;
using holdfast::hook::CuStream;

namespace {

// Handles that are not null.
template <typename Handle>
Handle Any() {
  static char anything;
  return reinterpret_cast<Handle>(&anything);
}

}  // namespace

extern "C" {

CuResult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CuResult::kSuccess;
}
CuResult cuGetErrorName(CuResult, const char** name) {
  *name = "none";
  return CuResult::kSuccess;
}
CuResult cuGetErrorString(CuResult, const char** text) {
  *text = "none";
  return CuResult::kSuccess;
}
CuResult cuDeviceGet(CuDevice* device, int) {
  *device = 0;
  return CuResult::kSuccess;
}
CuResult cuDeviceGetName(char* name, int length, CuDevice) {
  std::strncpy(name, "null", static_cast<size_t>(length));
  return CuResult::kSuccess;
}
CuResult cuDevicePrimaryCtxRetain(CuContext* context, CuDevice) {
  *context = Any<CuContext>();
  return CuResult::kSuccess;
}
CuResult cuDevicePrimaryCtxRelease_v2(CuDevice) { return CuResult::kSuccess; }
CuResult cuCtxPushCurrent_v2(CuContext) { return CuResult::kSuccess; }
CuResult cuCtxPopCurrent_v2(CuContext*) { return CuResult::kSuccess; }
CuResult cuCtxGetStreamPriorityRange(int* lowest, int* highest) {
  *lowest = *highest = 0;
  return CuResult::kSuccess;
}
CuResult cuThreadExchangeStreamCaptureMode(CuCaptureMode*) { return CuResult::kSuccess; }
CuResult cuStreamCreateWithPriority(CuStream* stream, unsigned, int) {
  *stream = Any<CuStream>();
  return CuResult::kSuccess;
}
CuResult cuStreamDestroy_v2(CuStream) { return CuResult::kSuccess; }
CuResult cuStreamGetCtx(CuStream, CuContext* context) {
  *context = Any<CuContext>();
  return CuResult::kSuccess;
}
CuResult cuStreamIsCapturing(CuStream, CuCaptureStatus* status) {
  *status = CuCaptureStatus::kNone;
  return CuResult::kSuccess;
}
CuResult cuEventCreate(CuEvent* event, unsigned) {
  *event = Any<CuEvent>();
  return CuResult::kSuccess;
}
CuResult cuEventDestroy_v2(CuEvent) { return CuResult::kSuccess; }
CuResult cuEventRecord(CuEvent, CuStream) { return CuResult::kSuccess; }
CuResult cuEventQuery(CuEvent) { return CuResult::kSuccess; }
CuResult cuMemHostRegister_v2(void*, size_t, unsigned) { return CuResult::kSuccess; }
CuResult cuMemHostUnregister(void*) { return CuResult::kSuccess; }
CuResult cuMemAllocHost_v2(void**, size_t) { return CuResult::kOutOfMemory; }
CuResult cuMemFreeHost(void*) { return CuResult::kSuccess; }
CuResult cuMemcpyDtoHAsync_v2(void*, CuDevicePointer, size_t, CuStream) {
  return CuResult::kSuccess;
}
CuResult cuMemcpyHtoDAsync_v2(CuDevicePointer, const void*, size_t, CuStream) {
  return CuResult::kSuccess;
}
CuResult cuMemcpy2DAsync_v2(const CuMemcpy2D*, CuStream) { return CuResult::kSuccess; }

CuResult cuPointerGetAttributes(unsigned count, CuPointerAttribute* attributes, void** values,
                                CuDevicePointer) {
  for (unsigned i = 0; i < count; ++i) {
    switch (attributes[i]) {
      case CuPointerAttribute::kContext:
        *static_cast<CuContext*>(values[i]) = Any<CuContext>();
        break;
      case CuPointerAttribute::kMemoryType:
        *static_cast<CuMemoryType*>(values[i]) = CuMemoryType::kDevice;
        break;
      case CuPointerAttribute::kIsManaged:
        *static_cast<unsigned*>(values[i]) = 0;
        break;
      case CuPointerAttribute::kDeviceOrdinal:
        *static_cast<CuDevice*>(values[i]) = 0;
        break;
      case CuPointerAttribute::kRangeStart:
        *static_cast<CuDevicePointer*>(values[i]) = 0;
        break;
      case CuPointerAttribute::kRangeSize:
        *static_cast<size_t*>(values[i]) = SIZE_MAX;
        break;
    }
  }
  return CuResult::kSuccess;
}

}  // extern "C"
