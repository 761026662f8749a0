// CUDA's driver API, found at run time: the few entry points that capture and restore use, with
// declarations of our own, so that one library serves nodes with and without GPUs and builds
// without a toolkit. device_driver_test compares every declaration with cuda.h where that is there.
//
// The driver is never loaded and never initialised by us: a process that has not loaded
// libcuda.so.1 has no device memory, and needs none of its threads and pages. (CUDA's runtime,
// PyTorch and JAX load it under this name.)
//
// References: NVIDIA, CUDA Driver API 13.0. Names with _v2 are those that cuda.h's macros stand
// for.
#ifndef HOLDFAST_HOOK_DEVICE_DRIVER_H_
#define HOLDFAST_HOOK_DEVICE_DRIVER_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "hook/error.h"

namespace holdfast::hook {

// As in cuda.h, under names of our own.
using CuDevice = int;
using CuDevicePointer = unsigned long long;
using CuContext = struct CuContextTag*;
using CuStream = struct CuStreamTag*;
using CuEvent = struct CuEventTag*;

enum class CuResult : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kDeinitialized = 4,
  kNoDevice = 100,
  kInvalidContext = 201,
  kEccUncorrectable = 214,
  kInvalidHandle = 400,
  kNotReady = 600,
  kIllegalAddress = 700,
  kContextIsDestroyed = 709,
  kHostMemoryAlreadyRegistered = 712,
  kNotSupported = 801,
  kStreamCaptureImplicit = 906,
  kUnknown = 999,
};

enum class CuMemoryType : int { kHost = 1, kDevice = 2, kArray = 3, kUnified = 4 };
enum class CuPointerAttribute : int {
  kContext = 1,
  kMemoryType = 2,
  kIsManaged = 8,
  kDeviceOrdinal = 9,
  kRangeStart = 11,
  kRangeSize = 12,
};
enum class CuCaptureMode : int { kGlobal = 0, kThreadLocal = 1, kRelaxed = 2 };
enum class CuCaptureStatus : int { kNone = 0, kActive = 1, kInvalidated = 2 };
inline constexpr unsigned kCuStreamNonBlocking = 1;
inline constexpr unsigned kCuEventDisableTiming = 2;
inline constexpr unsigned kCuHostRegisterPortable = 1;

struct CuMemcpy2D {
  size_t source_x_bytes;
  size_t source_y;
  CuMemoryType source_type;
  const void* source_host;
  CuDevicePointer source_device;
  void* source_array;
  size_t source_pitch_bytes;
  size_t target_x_bytes;
  size_t target_y;
  CuMemoryType target_type;
  void* target_host;
  CuDevicePointer target_device;
  void* target_array;
  size_t target_pitch_bytes;
  size_t width_bytes;
  size_t height;
};
static_assert(sizeof(CuMemcpy2D) == 128);

// The entry points: X(member, symbol, parameters).
#define HOLDFAST_CUDA_ENTRY_POINTS(X)                                                          \
  X(DriverGetVersion, "cuDriverGetVersion", (int*))                                            \
  X(GetErrorName, "cuGetErrorName", (CuResult, const char**))                                  \
  X(GetErrorString, "cuGetErrorString", (CuResult, const char**))                              \
  X(PointerGetAttributes, "cuPointerGetAttributes",                                            \
    (unsigned, CuPointerAttribute*, void**, CuDevicePointer))                                  \
  X(DeviceGet, "cuDeviceGet", (CuDevice*, int))                                                \
  X(DeviceGetName, "cuDeviceGetName", (char*, int, CuDevice))                                  \
  X(DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (CuContext*, CuDevice))                \
  X(DevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (CuDevice))                       \
  X(CtxPushCurrent, "cuCtxPushCurrent_v2", (CuContext))                                        \
  X(CtxPopCurrent, "cuCtxPopCurrent_v2", (CuContext*))                                         \
  X(CtxGetStreamPriorityRange, "cuCtxGetStreamPriorityRange", (int*, int*))                    \
  X(ThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode", (CuCaptureMode*))    \
  X(StreamCreateWithPriority, "cuStreamCreateWithPriority", (CuStream*, unsigned, int))        \
  X(StreamDestroy, "cuStreamDestroy_v2", (CuStream))                                           \
  X(StreamGetCtx, "cuStreamGetCtx", (CuStream, CuContext*))                                    \
  X(StreamIsCapturing, "cuStreamIsCapturing", (CuStream, CuCaptureStatus*))                    \
  X(EventCreate, "cuEventCreate", (CuEvent*, unsigned))                                        \
  X(EventDestroy, "cuEventDestroy_v2", (CuEvent))                                              \
  X(EventRecord, "cuEventRecord", (CuEvent, CuStream))                                         \
  X(EventQuery, "cuEventQuery", (CuEvent))                                                     \
  X(MemHostRegister, "cuMemHostRegister_v2", (void*, size_t, unsigned))                        \
  X(MemHostUnregister, "cuMemHostUnregister", (void*))                                         \
  X(MemAllocHost, "cuMemAllocHost_v2", (void**, size_t))                                       \
  X(MemFreeHost, "cuMemFreeHost", (void*))                                                     \
  X(MemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", (void*, CuDevicePointer, size_t, CuStream))       \
  X(MemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", (CuDevicePointer, const void*, size_t, CuStream)) \
  X(Memcpy2DAsync, "cuMemcpy2DAsync_v2", (const CuMemcpy2D*, CuStream))

// Where a pointer lies.
struct CuPlace {
  bool is_device = false;  // managed memory counts as a device's: the driver copies it
  CuDevice ordinal = 0;
  CuContext context = nullptr;  // that allocated it; nullptr: none in particular (pools, mappings)
};

// What was allocated, or mapped, at once. The driver refuses a copy that leaves it, also where the
// next allocation begins at its end (segments of caching allocators often do).
struct CuAllocation {
  uintptr_t begin = 0;
  uintptr_t end = 0;
  bool Holds(const void* pointer, uint64_t bytes) const {
    const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
    return at >= begin && at < end && bytes <= end - at;
  }
};

// Threads: any. Lifetime: the library stays loaded as long as the object lives.
class DeviceDriver {
 public:
  // The driver that this process has loaded; nullptr if it has loaded none. Errors:
  // HF_FAILED_PRECONDITION: it is older than CUDA 10.1 (the entry point that it lacks is named).
  static Result<std::shared_ptr<const DeviceDriver>> FindLoaded();
  ~DeviceDriver();
  DeviceDriver(const DeviceDriver&) = delete;
  DeviceDriver& operator=(const DeviceDriver&) = delete;

#define HOLDFAST_CUDA_MEMBER(member, symbol, parameters) CuResult(*member) parameters = nullptr;
  HOLDFAST_CUDA_ENTRY_POINTS(HOLDFAST_CUDA_MEMBER)
#undef HOLDFAST_CUDA_MEMBER

  // Errors: HF_INTERNAL (the driver refuses to say, for instance because the device is lost): the
  // pointer must not be read by anybody then.
  Result<CuPlace> Locate(const void* pointer) const;

  // The allocation in which the pointer to device memory lies. Where the driver cannot say, that is
  // [pointer, pointer + bytes): a copy of these is left to the driver as it is.
  CuAllocation FindAllocation(const void* pointer, uint64_t bytes) const;

  // "CUDA_ERROR_ECC_UNCORRECTABLE (214): uncorrectable ECC error encountered", behind `what`.
  // kUnavailable is not among the codes: no retry helps a context that has failed.
  Error ToError(CuResult result, const char* what) const;

 private:
  explicit DeviceDriver(void* library) : library_(library) {}
  void* const library_;
};

// Makes a context the calling thread's current one, and what the thread does harmless for graphs
// that other threads capture (mode RELAXED), as long as it lives; then both are as before. None of
// it is seen by other threads.
class DeviceScope {
 public:
  DeviceScope(const DeviceDriver& driver, CuContext context);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  // Not kSuccess: the context is not current (it was destroyed, or has failed).
  CuResult result() const { return result_; }

 private:
  const DeviceDriver& driver_;
  CuResult result_;
  CuCaptureMode mode_ = CuCaptureMode::kRelaxed;
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_DEVICE_DRIVER_H_
