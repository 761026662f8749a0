#include "hook/device_driver.h"

#include <dlfcn.h>

namespace holdfast::hook {
namespace {

constexpr char kLibrary[] = "libcuda.so.1";

}  // namespace

Result<std::shared_ptr<const DeviceDriver>> DeviceDriver::FindLoaded() {
  void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  if (library == nullptr) return std::shared_ptr<const DeviceDriver>();
  std::shared_ptr<DeviceDriver> driver(new DeviceDriver(library));
  const char* missing = nullptr;
#define HOLDFAST_CUDA_FIND(member, symbol, parameters)                                 \
  driver->member = reinterpret_cast<decltype(driver->member)>(dlsym(library, symbol)); \
  if (driver->member == nullptr) missing = symbol;
  HOLDFAST_CUDA_ENTRY_POINTS(HOLDFAST_CUDA_FIND)
#undef HOLDFAST_CUDA_FIND
  if (missing != nullptr) {
    int version = 0;
    if (driver->DriverGetVersion != nullptr) driver->DriverGetVersion(&version);
    return Error(
        HF_FAILED_PRECONDITION,
        "the CUDA driver that this process has loaded (%s, version %d) has no %s: expected "
        "10.1 or newer",
        kLibrary, version, missing);
  }
  return std::shared_ptr<const DeviceDriver>(std::move(driver));
}

DeviceDriver::~DeviceDriver() { dlclose(library_); }

Result<CuPlace> DeviceDriver::Locate(const void* pointer) const {
  CuMemoryType type{};
  unsigned managed = 0;  // the driver writes a bool or an int, depending on its version
  CuPlace place;
  CuPointerAttribute attributes[] = {
      CuPointerAttribute::kMemoryType, CuPointerAttribute::kIsManaged,
      CuPointerAttribute::kDeviceOrdinal, CuPointerAttribute::kContext};
  void* values[] = {&type, &managed, &place.ordinal, &place.context};
  // Attributes of a pointer that the driver does not know come back as zeros, and no error.
  const CuResult result =
      PointerGetAttributes(4, attributes, values, reinterpret_cast<CuDevicePointer>(pointer));
  // Before cuInit, in a forked child and on a node without a device no memory is a device's; nor is
  // what belongs to no context of unified addresses, which all contexts of 64-bit systems have.
  if (result == CuResult::kInvalidValue || result == CuResult::kInvalidContext ||
      result == CuResult::kNotInitialized || result == CuResult::kNoDevice) {
    return CuPlace();
  }
  if (result != CuResult::kSuccess) return ToError(result, "cuPointerGetAttributes");
  place.is_device = type == CuMemoryType::kDevice || managed != 0;
  return place;
}

CuAllocation DeviceDriver::FindAllocation(const void* pointer, uint64_t bytes) const {
  CuDevicePointer begin = 0;
  size_t size = 0;
  CuPointerAttribute attributes[] = {CuPointerAttribute::kRangeStart,
                                     CuPointerAttribute::kRangeSize};
  void* values[] = {&begin, &size};
  const CuResult result =
      PointerGetAttributes(2, attributes, values, reinterpret_cast<CuDevicePointer>(pointer));
  const CuAllocation found = {static_cast<uintptr_t>(begin), static_cast<uintptr_t>(begin) + size};
  // An error of the context shows in the copy.
  if (result == CuResult::kSuccess && found.Holds(pointer, 1)) return found;
  const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
  return {at, at + bytes};
}

Error DeviceDriver::ToError(CuResult result, const char* what) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (GetErrorName(result, &name) != CuResult::kSuccess || name == nullptr) name = "error";
  if (GetErrorString(result, &text) != CuResult::kSuccess || text == nullptr) text = "unknown";
  const hf_code code = result == CuResult::kOutOfMemory ? HF_RESOURCE_EXHAUSTED : HF_INTERNAL;
  return Error(code, "%s: %s (%d): %s", what, name, static_cast<int>(result), text);
}

DeviceScope::DeviceScope(const DeviceDriver& driver, CuContext context)
    : driver_(driver), result_(driver.CtxPushCurrent(context)) {
  if (result_ == CuResult::kSuccess) driver_.ThreadExchangeStreamCaptureMode(&mode_);
}

DeviceScope::~DeviceScope() {
  if (result_ != CuResult::kSuccess) return;
  driver_.ThreadExchangeStreamCaptureMode(&mode_);
  CuContext popped = nullptr;
  driver_.CtxPopCurrent(&popped);
}

}  // namespace holdfast::hook
