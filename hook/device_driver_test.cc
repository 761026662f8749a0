// Our declarations of the driver API against NVIDIA's header, where that is there; and what is
// found in a process that has loaded no driver, or one that is too old.
#include "hook/device_driver.h"

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstddef>
#include <memory>
#include <random>
#include <string>
#include <type_traits>

#include "hook/test_agent.h"
#include "hook/test_job.h"

#ifdef HOLDFAST_CUDA_HEADER
#include <cuda.h>
#endif

namespace holdfast::hook {
namespace {

TEST(DeviceDriverTest, AProcessThatHasLoadedNoDriverHasNone) {
  Result<std::shared_ptr<const DeviceDriver>> driver = DeviceDriver::FindLoaded();
  ASSERT_TRUE(driver.ok()) << driver.error().text();
  EXPECT_EQ(driver.value(), nullptr);
}

TEST(DeviceDriverTest, ADriverThatIsTooOldIsNamedWithWhatItLacks) {
  if (access(HOLDFAST_TEST_OLD_CUDA, R_OK) != 0) GTEST_SKIP() << "no " << HOLDFAST_TEST_OLD_CUDA;
  void* const old_driver = dlopen(HOLDFAST_TEST_OLD_CUDA, RTLD_NOW | RTLD_LOCAL);
  ASSERT_NE(old_driver, nullptr) << dlerror();
  TestAgent agent;
  HostSourceReader reader;
  Result<std::unique_ptr<Job>> opened = OpenTestJob(TestSettings(agent), &reader);
  ASSERT_TRUE(opened.ok()) << opened.error().text();
  Job& job = *opened.value();
  TestPlan plan;
  plan.block_count = 1;
  agent.SetPlan([plan](const TestDocument&) { return plan; });
  std::mt19937 random(1);
  TestBuffers buffers;
  buffers.Add("b", 100, 0, random);
  // Where tensors lie, nobody can say: nothing is captured, and training goes on.
  const Error refused = RegisterAll(job, buffers);
  EXPECT_EQ(refused.code(), HF_FAILED_PRECONDITION);
  for (const char* part : {"libcuda.so.1, version 9020", "has no cu", "expected 10.1 or newer"}) {
    EXPECT_NE(std::string(refused.text()).find(part), std::string::npos) << refused.text();
  }
  EXPECT_EQ(job.Save(1, NoOptions()).code(), HF_FAILED_PRECONDITION);
  EXPECT_EQ(dlclose(old_driver), 0);
  EXPECT_TRUE(RegisterAll(job, buffers).ok());
  EXPECT_TRUE(job.Save(1, NoOptions()).ok());
  EXPECT_TRUE(job.WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs)).ok());
}

#ifdef HOLDFAST_CUDA_HEADER

// Passed alike: both pointers, or numbers of one size. (Opaque handles are pointers in both.)
template <typename Ours, typename Theirs>
constexpr bool PassedAlike() {
  return sizeof(Ours) == sizeof(Theirs) && std::is_pointer_v<Ours> == std::is_pointer_v<Theirs> &&
         std::is_floating_point_v<Ours> == std::is_floating_point_v<Theirs>;
}

template <typename Ours, typename Theirs>
struct Alike;
template <typename... Ours, typename... Theirs>
struct Alike<CuResult(Ours...), CUresult(Theirs...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(Ours) != sizeof...(Theirs)) {
      return false;
    } else {
      return (PassedAlike<Ours, Theirs>() && ...);
    }
  }();
};
static_assert(sizeof(CuResult) == sizeof(CUresult));
// The check can fail.
static_assert(!Alike<CuResult(int), CUresult(long)>::value);
static_assert(!Alike<CuResult(int), CUresult(int, int)>::value);

#define TEXT(x) #x
#define TEXT_OF(x) TEXT(x)

template <typename Member>
struct FunctionOf;
template <typename Function>
struct FunctionOf<Function * DeviceDriver::*> {
  using Type = Function;
};

// `symbol`: the one that we look up; `expanded`: what cuda.h's macro of the plain name stands for.
template <auto kMember, typename Theirs>
void Check(const char* symbol, const char* expanded) {
  static_assert(Alike<typename FunctionOf<decltype(kMember)>::Type, Theirs>::value);
  EXPECT_STREQ(symbol, expanded);
}

TEST(DeviceDriverTest, EveryEntryPointIsDeclaredAsInCudaH) {
  Check<&DeviceDriver::DriverGetVersion, decltype(::cuDriverGetVersion)>(
      "cuDriverGetVersion", TEXT_OF(cuDriverGetVersion));
  Check<&DeviceDriver::GetErrorName, decltype(::cuGetErrorName)>("cuGetErrorName",
                                                                 TEXT_OF(cuGetErrorName));
  Check<&DeviceDriver::GetErrorString, decltype(::cuGetErrorString)>("cuGetErrorString",
                                                                     TEXT_OF(cuGetErrorString));
  Check<&DeviceDriver::PointerGetAttributes, decltype(::cuPointerGetAttributes)>(
      "cuPointerGetAttributes", TEXT_OF(cuPointerGetAttributes));
  Check<&DeviceDriver::DeviceGet, decltype(::cuDeviceGet)>("cuDeviceGet", TEXT_OF(cuDeviceGet));
  Check<&DeviceDriver::DeviceGetName, decltype(::cuDeviceGetName)>("cuDeviceGetName",
                                                                   TEXT_OF(cuDeviceGetName));
  Check<&DeviceDriver::DevicePrimaryCtxRetain, decltype(::cuDevicePrimaryCtxRetain)>(
      "cuDevicePrimaryCtxRetain", TEXT_OF(cuDevicePrimaryCtxRetain));
  Check<&DeviceDriver::DevicePrimaryCtxRelease, decltype(::cuDevicePrimaryCtxRelease)>(
      "cuDevicePrimaryCtxRelease_v2", TEXT_OF(cuDevicePrimaryCtxRelease));
  Check<&DeviceDriver::CtxPushCurrent, decltype(::cuCtxPushCurrent)>("cuCtxPushCurrent_v2",
                                                                     TEXT_OF(cuCtxPushCurrent));
  Check<&DeviceDriver::CtxPopCurrent, decltype(::cuCtxPopCurrent)>("cuCtxPopCurrent_v2",
                                                                   TEXT_OF(cuCtxPopCurrent));
  Check<&DeviceDriver::CtxGetStreamPriorityRange, decltype(::cuCtxGetStreamPriorityRange)>(
      "cuCtxGetStreamPriorityRange", TEXT_OF(cuCtxGetStreamPriorityRange));
  Check<&DeviceDriver::ThreadExchangeStreamCaptureMode,
        decltype(::cuThreadExchangeStreamCaptureMode)>("cuThreadExchangeStreamCaptureMode",
                                                       TEXT_OF(cuThreadExchangeStreamCaptureMode));
  Check<&DeviceDriver::StreamCreateWithPriority, decltype(::cuStreamCreateWithPriority)>(
      "cuStreamCreateWithPriority", TEXT_OF(cuStreamCreateWithPriority));
  Check<&DeviceDriver::StreamDestroy, decltype(::cuStreamDestroy)>("cuStreamDestroy_v2",
                                                                   TEXT_OF(cuStreamDestroy));
  Check<&DeviceDriver::StreamGetCtx, decltype(::cuStreamGetCtx)>("cuStreamGetCtx",
                                                                 TEXT_OF(cuStreamGetCtx));
  Check<&DeviceDriver::StreamIsCapturing, decltype(::cuStreamIsCapturing)>(
      "cuStreamIsCapturing", TEXT_OF(cuStreamIsCapturing));
  Check<&DeviceDriver::EventCreate, decltype(::cuEventCreate)>("cuEventCreate",
                                                               TEXT_OF(cuEventCreate));
  Check<&DeviceDriver::EventDestroy, decltype(::cuEventDestroy)>("cuEventDestroy_v2",
                                                                 TEXT_OF(cuEventDestroy));
  Check<&DeviceDriver::EventRecord, decltype(::cuEventRecord)>("cuEventRecord",
                                                               TEXT_OF(cuEventRecord));
  Check<&DeviceDriver::EventQuery, decltype(::cuEventQuery)>("cuEventQuery", TEXT_OF(cuEventQuery));
  Check<&DeviceDriver::MemHostRegister, decltype(::cuMemHostRegister)>("cuMemHostRegister_v2",
                                                                       TEXT_OF(cuMemHostRegister));
  Check<&DeviceDriver::MemHostUnregister, decltype(::cuMemHostUnregister)>(
      "cuMemHostUnregister", TEXT_OF(cuMemHostUnregister));
  Check<&DeviceDriver::MemAllocHost, decltype(::cuMemAllocHost)>("cuMemAllocHost_v2",
                                                                 TEXT_OF(cuMemAllocHost));
  Check<&DeviceDriver::MemFreeHost, decltype(::cuMemFreeHost)>("cuMemFreeHost",
                                                               TEXT_OF(cuMemFreeHost));
  Check<&DeviceDriver::MemcpyDtoHAsync, decltype(::cuMemcpyDtoHAsync)>("cuMemcpyDtoHAsync_v2",
                                                                       TEXT_OF(cuMemcpyDtoHAsync));
  Check<&DeviceDriver::MemcpyHtoDAsync, decltype(::cuMemcpyHtoDAsync)>("cuMemcpyHtoDAsync_v2",
                                                                       TEXT_OF(cuMemcpyHtoDAsync));
  Check<&DeviceDriver::Memcpy2DAsync, decltype(::cuMemcpy2DAsync)>("cuMemcpy2DAsync_v2",
                                                                   TEXT_OF(cuMemcpy2DAsync));
  size_t count = 0;
#define HOLDFAST_COUNT(member, symbol, parameters) ++count;
  HOLDFAST_CUDA_ENTRY_POINTS(HOLDFAST_COUNT)
#undef HOLDFAST_COUNT
  EXPECT_EQ(count, 27u) << "an entry point without a line above";
}

TEST(DeviceDriverTest, NumbersAndStructsAreThoseOfCudaH) {
  EXPECT_EQ(static_cast<int>(CuResult::kInvalidValue), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(static_cast<int>(CuResult::kOutOfMemory), CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_EQ(static_cast<int>(CuResult::kNotInitialized), CUDA_ERROR_NOT_INITIALIZED);
  EXPECT_EQ(static_cast<int>(CuResult::kDeinitialized), CUDA_ERROR_DEINITIALIZED);
  EXPECT_EQ(static_cast<int>(CuResult::kNoDevice), CUDA_ERROR_NO_DEVICE);
  EXPECT_EQ(static_cast<int>(CuResult::kInvalidContext), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(static_cast<int>(CuResult::kEccUncorrectable), CUDA_ERROR_ECC_UNCORRECTABLE);
  EXPECT_EQ(static_cast<int>(CuResult::kInvalidHandle), CUDA_ERROR_INVALID_HANDLE);
  EXPECT_EQ(static_cast<int>(CuResult::kNotReady), CUDA_ERROR_NOT_READY);
  EXPECT_EQ(static_cast<int>(CuResult::kIllegalAddress), CUDA_ERROR_ILLEGAL_ADDRESS);
  EXPECT_EQ(static_cast<int>(CuResult::kContextIsDestroyed), CUDA_ERROR_CONTEXT_IS_DESTROYED);
  EXPECT_EQ(static_cast<int>(CuResult::kHostMemoryAlreadyRegistered),
            CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
  EXPECT_EQ(static_cast<int>(CuResult::kNotSupported), CUDA_ERROR_NOT_SUPPORTED);
  EXPECT_EQ(static_cast<int>(CuResult::kStreamCaptureImplicit), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
  EXPECT_EQ(static_cast<int>(CuMemoryType::kHost), CU_MEMORYTYPE_HOST);
  EXPECT_EQ(static_cast<int>(CuMemoryType::kDevice), CU_MEMORYTYPE_DEVICE);
  EXPECT_EQ(static_cast<int>(CuPointerAttribute::kContext), CU_POINTER_ATTRIBUTE_CONTEXT);
  EXPECT_EQ(static_cast<int>(CuPointerAttribute::kMemoryType), CU_POINTER_ATTRIBUTE_MEMORY_TYPE);
  EXPECT_EQ(static_cast<int>(CuPointerAttribute::kIsManaged), CU_POINTER_ATTRIBUTE_IS_MANAGED);
  EXPECT_EQ(static_cast<int>(CuPointerAttribute::kRangeStart),
            CU_POINTER_ATTRIBUTE_RANGE_START_ADDR);
  EXPECT_EQ(static_cast<int>(CuPointerAttribute::kRangeSize), CU_POINTER_ATTRIBUTE_RANGE_SIZE);
  EXPECT_EQ(static_cast<int>(CuPointerAttribute::kDeviceOrdinal),
            CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
  EXPECT_EQ(static_cast<int>(CuCaptureMode::kRelaxed), CU_STREAM_CAPTURE_MODE_RELAXED);
  EXPECT_EQ(static_cast<int>(CuCaptureStatus::kNone), CU_STREAM_CAPTURE_STATUS_NONE);
  EXPECT_EQ(kCuStreamNonBlocking, static_cast<unsigned>(CU_STREAM_NON_BLOCKING));
  EXPECT_EQ(kCuEventDisableTiming, static_cast<unsigned>(CU_EVENT_DISABLE_TIMING));
  EXPECT_EQ(kCuHostRegisterPortable, static_cast<unsigned>(CU_MEMHOSTREGISTER_PORTABLE));

  static_assert(sizeof(CuMemcpy2D) == sizeof(CUDA_MEMCPY2D));
  static_assert(offsetof(CuMemcpy2D, source_type) == offsetof(CUDA_MEMCPY2D, srcMemoryType));
  static_assert(offsetof(CuMemcpy2D, source_host) == offsetof(CUDA_MEMCPY2D, srcHost));
  static_assert(offsetof(CuMemcpy2D, source_device) == offsetof(CUDA_MEMCPY2D, srcDevice));
  static_assert(offsetof(CuMemcpy2D, source_pitch_bytes) == offsetof(CUDA_MEMCPY2D, srcPitch));
  static_assert(offsetof(CuMemcpy2D, target_x_bytes) == offsetof(CUDA_MEMCPY2D, dstXInBytes));
  static_assert(offsetof(CuMemcpy2D, target_type) == offsetof(CUDA_MEMCPY2D, dstMemoryType));
  static_assert(offsetof(CuMemcpy2D, target_host) == offsetof(CUDA_MEMCPY2D, dstHost));
  static_assert(offsetof(CuMemcpy2D, target_device) == offsetof(CUDA_MEMCPY2D, dstDevice));
  static_assert(offsetof(CuMemcpy2D, target_pitch_bytes) == offsetof(CUDA_MEMCPY2D, dstPitch));
  static_assert(offsetof(CuMemcpy2D, width_bytes) == offsetof(CUDA_MEMCPY2D, WidthInBytes));
  static_assert(offsetof(CuMemcpy2D, height) == offsetof(CUDA_MEMCPY2D, Height));
}

#else

TEST(DeviceDriverTest, EveryEntryPointIsDeclaredAsInCudaH) {
  GTEST_SKIP() << "cuda.h is not installed";
}

#endif

}  // namespace
}  // namespace holdfast::hook
