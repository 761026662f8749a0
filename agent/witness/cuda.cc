#include "agent/witness/cuda.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"

namespace holdfast {
namespace {

using nlohmann::json;

constexpr char kLibrary[] = "libcuda.so.1";
constexpr int kDevicesMax = 64;

// cuda.h
using Result = int;
constexpr Result kSuccess = 0;
constexpr Result kNoDevice = 100;
using Context = void*;

// The entry points: X(member, symbol, parameters).
#define WITNESS_CUDA_ENTRY_POINTS(X)                                    \
  X(Init, "cuInit", (unsigned))                                         \
  X(DriverGetVersion, "cuDriverGetVersion", (int*))                     \
  X(GetErrorName, "cuGetErrorName", (Result, const char**))             \
  X(DeviceGetCount, "cuDeviceGetCount", (int*))                         \
  X(DeviceGet, "cuDeviceGet", (int*, int))                              \
  X(DeviceGetName, "cuDeviceGetName", (char*, int, int))                \
  X(PrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (Context*, int))      \
  X(PrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (int))           \
  X(CtxPushCurrent, "cuCtxPushCurrent_v2", (Context))                   \
  X(CtxPopCurrent, "cuCtxPopCurrent_v2", (Context*))                    \
  X(MemHostRegister, "cuMemHostRegister_v2", (void*, size_t, unsigned)) \
  X(MemHostUnregister, "cuMemHostUnregister", (void*))

struct Driver {
#define WITNESS_CUDA_MEMBER(member, symbol, parameters) Result(*member) parameters = nullptr;
  WITNESS_CUDA_ENTRY_POINTS(WITNESS_CUDA_MEMBER)
#undef WITNESS_CUDA_MEMBER

  absl::Status Find(void* library) {
#define WITNESS_CUDA_FIND(member, symbol, parameters)                          \
  member = reinterpret_cast<decltype(member)>(dlsym(library, symbol));         \
  if (member == nullptr) {                                                     \
    return absl::UnavailableError(absl::StrCat(kLibrary, " has no ", symbol)); \
  }
    WITNESS_CUDA_ENTRY_POINTS(WITNESS_CUDA_FIND)
#undef WITNESS_CUDA_FIND
    return absl::OkStatus();
  }

  std::string ErrorText(const char* call, Result result) const {
    const char* name = nullptr;
    if (GetErrorName(result, &name) != kSuccess || name == nullptr) name = "unknown";
    return absl::StrFormat("%s: %s (%d)", call, name, result);
  }
  absl::Status ToStatus(const char* call, Result result) const {
    if (result == kSuccess) return absl::OkStatus();
    return result == kNoDevice ? absl::NotFoundError(ErrorText(call, result))
                               : absl::UnavailableError(ErrorText(call, result));
  }
};

// What the device refuses, as the end of a sentence about it; empty: it registers `memory`. What
// cannot be given back goes with the process, which ends soon.
std::string TryToPin(const Driver& driver, int device, void* memory) {
  Context context = nullptr;
  Result result = driver.PrimaryCtxRetain(&context, device);
  if (result != kSuccess) {
    return absl::StrCat("gives no context: ", driver.ErrorText("cuDevicePrimaryCtxRetain", result));
  }
  std::string trouble;
  if (result = driver.CtxPushCurrent(context); result != kSuccess) {
    trouble = absl::StrCat("gives no context: ", driver.ErrorText("cuCtxPushCurrent", result));
  } else {
    result = driver.MemHostRegister(memory, kPinTrialBytes, 0);
    if (result == kSuccess) {
      static_cast<void>(driver.MemHostUnregister(memory));
    } else {
      trouble = absl::StrCat("registers no host memory, so that captures are slower: ",
                             driver.ErrorText("cuMemHostRegister", result));
    }
    static_cast<void>(driver.CtxPopCurrent(&context));
  }
  static_cast<void>(driver.PrimaryCtxRelease(device));
  return trouble;
}

json ReadingOf(const Driver& driver, int index, void* memory) {
  json reading = {{"index", index}, {"name", "unknown"}};
  int device = 0;
  std::string trouble;
  if (const Result result = driver.DeviceGet(&device, index); result != kSuccess) {
    trouble = absl::StrCat("is not there: ", driver.ErrorText("cuDeviceGet", result));
  } else {
    char name[96] = {};
    if (driver.DeviceGetName(name, sizeof(name) - 1, device) == kSuccess) reading["name"] = name;
    trouble = TryToPin(driver, device, memory);
  }
  if (!trouble.empty()) reading["trouble"] = trouble;
  return reading;
}

}  // namespace

absl::StatusOr<std::string> CudaReadings() {
  void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return absl::NotFoundError(absl::StrCat("no CUDA driver: ", dlerror()));
  }
  Driver driver;
  RETURN_IF_ERROR(driver.Find(library));
  RETURN_IF_ERROR(driver.ToStatus("cuInit", driver.Init(0)));
  int version = 0;
  int count = 0;
  RETURN_IF_ERROR(driver.ToStatus("cuDriverGetVersion", driver.DriverGetVersion(&version)));
  RETURN_IF_ERROR(driver.ToStatus("cuDeviceGetCount", driver.DeviceGetCount(&count)));
  if (count == 0) return absl::NotFoundError("the CUDA driver has no device");
  void* const memory =
      mmap(nullptr, kPinTrialBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    return absl::UnavailableError(absl::StrFormat("no memory of %d bytes", kPinTrialBytes));
  }
  json readings = {{"version", version}, {"devices", json::array()}};
  for (int i = 0; i < std::min(count, kDevicesMax); ++i) {
    readings["devices"].push_back(ReadingOf(driver, i, memory));
  }
  munmap(memory, kPinTrialBytes);
  return readings.dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace holdfast
