#include "examples/cuda/device_buffers.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "examples/collectives/status_macros.h"

namespace cuda {
namespace {

constexpr char kLibrary[] = "libcuda.so.1";

// As in cuda.h. Handles are pointers.
using Result = int;
constexpr Result kSuccess = 0;
constexpr Result kOutOfMemory = 2;
constexpr Result kNoDevice = 100;
using Pointer = unsigned long long;
constexpr unsigned kStreamNonBlocking = 1;

}  // namespace

// The entry points: X(member, symbol, parameters). Names with _v2 are those that cuda.h's macros
// stand for.
#define CUDA_ENTRY_POINTS(X)                                                         \
  X(Init, "cuInit", (unsigned))                                                      \
  X(GetErrorName, "cuGetErrorName", (Result, const char**))                          \
  X(DeviceGetCount, "cuDeviceGetCount", (int*))                                      \
  X(DeviceGet, "cuDeviceGet", (int*, int))                                           \
  X(PrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (void**, int))                     \
  X(PrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (int))                        \
  X(CtxPushCurrent, "cuCtxPushCurrent_v2", (void*))                                  \
  X(CtxPopCurrent, "cuCtxPopCurrent_v2", (void**))                                   \
  X(StreamCreateWithPriority, "cuStreamCreateWithPriority", (void**, unsigned, int)) \
  X(StreamDestroy, "cuStreamDestroy_v2", (void*))                                    \
  X(StreamSynchronize, "cuStreamSynchronize", (void*))                               \
  X(MemAlloc, "cuMemAlloc_v2", (Pointer*, size_t))                                   \
  X(MemFree, "cuMemFree_v2", (Pointer))                                              \
  X(MemAllocHost, "cuMemAllocHost_v2", (void**, size_t))                             \
  X(MemFreeHost, "cuMemFreeHost", (void*))                                           \
  X(MemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", (Pointer, const void*, size_t, void*))  \
  X(MemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", (void*, Pointer, size_t, void*))

// The library stays loaded: what CUDA has begun in a process does not end before the process.
struct Driver {
#define CUDA_MEMBER(member, symbol, parameters) Result(*member) parameters = nullptr;
  CUDA_ENTRY_POINTS(CUDA_MEMBER)
#undef CUDA_MEMBER

  static absl::StatusOr<std::unique_ptr<Driver>> Load() {
    void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat("no CUDA driver: ", dlerror()));
    }
    auto driver = std::make_unique<Driver>();
#define CUDA_FIND(member, symbol, parameters)                                          \
  driver->member = reinterpret_cast<decltype(driver->member)>(dlsym(library, symbol)); \
  if (driver->member == nullptr) {                                                     \
    return absl::FailedPreconditionError(absl::StrCat(kLibrary, " has no ", symbol));  \
  }
    CUDA_ENTRY_POINTS(CUDA_FIND)
#undef CUDA_FIND
    return driver;
  }

  absl::Status ToStatus(Result result, const char* call) const {
    if (result == kSuccess) return absl::OkStatus();
    const char* name = nullptr;
    if (GetErrorName(result, &name) != kSuccess || name == nullptr) name = "unknown";
    const std::string text = absl::StrFormat("%s: %s (%d)", call, name, result);
    if (result == kNoDevice) return absl::FailedPreconditionError(text);
    if (result == kOutOfMemory) return absl::ResourceExhaustedError(text);
    return absl::InternalError(text);
  }
};

// The context is the thread's current one.
class DeviceBuffers::Scope {
 public:
  explicit Scope(const DeviceBuffers& buffers)
      : driver_(*buffers.driver_), result_(driver_.CtxPushCurrent(buffers.context_)) {}
  ~Scope() {
    void* popped = nullptr;
    // Of a context that has failed nothing is expected any more.
    if (result_ == kSuccess) static_cast<void>(driver_.CtxPopCurrent(&popped));
  }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
  absl::Status status() const { return driver_.ToStatus(result_, "cuCtxPushCurrent"); }

 private:
  const Driver& driver_;
  const Result result_;
};

DeviceBuffers::DeviceBuffers(std::vector<std::span<std::byte>> host, std::unique_ptr<Driver> driver)
    : host_(std::move(host)), driver_(std::move(driver)) {}

absl::StatusOr<std::unique_ptr<DeviceBuffers>> DeviceBuffers::Create(
    std::vector<std::span<std::byte>> host, uint32_t local_rank) {
  ASSIGN_OR_RETURN(std::unique_ptr<Driver> driver, Driver::Load());
  std::unique_ptr<DeviceBuffers> buffers(new DeviceBuffers(std::move(host), std::move(driver)));
  RETURN_IF_ERROR(buffers->OpenDevice(local_rank));
  RETURN_IF_ERROR(buffers->Allocate());
  return buffers;
}

absl::Status DeviceBuffers::OpenDevice(uint32_t local_rank) {
  RETURN_IF_ERROR(driver_->ToStatus(driver_->Init(0), "cuInit"));
  int count = 0;
  RETURN_IF_ERROR(driver_->ToStatus(driver_->DeviceGetCount(&count), "cuDeviceGetCount"));
  if (count < 1) return driver_->ToStatus(kNoDevice, "cuDeviceGetCount");
  const int ordinal = static_cast<int>(local_rank % static_cast<uint32_t>(count));
  RETURN_IF_ERROR(driver_->ToStatus(driver_->DeviceGet(&device_, ordinal), "cuDeviceGet"));
  return driver_->ToStatus(driver_->PrimaryCtxRetain(&context_, device_),
                           "cuDevicePrimaryCtxRetain");
}

absl::Status DeviceBuffers::Allocate() {
  const Scope scope(*this);
  RETURN_IF_ERROR(scope.status());
  RETURN_IF_ERROR(
      driver_->ToStatus(driver_->StreamCreateWithPriority(&stream_, kStreamNonBlocking, 0),
                        "cuStreamCreateWithPriority"));
  size_t total_bytes = 0;
  for (const std::span<std::byte> buffer : host_) {
    total_bytes += buffer.size();
    Pointer pointer = 0;
    // The driver has nothing of 0 bytes.
    const size_t bytes = std::max<size_t>(buffer.size(), 1);
    RETURN_IF_ERROR(driver_->ToStatus(driver_->MemAlloc(&pointer, bytes), "cuMemAlloc"));
    pointers_.push_back(pointer);
  }
  void* staging = nullptr;
  RETURN_IF_ERROR(driver_->ToStatus(
      driver_->MemAllocHost(&staging, std::max<size_t>(total_bytes, 1)), "cuMemAllocHost"));
  staging_ = static_cast<std::byte*>(staging);
  return absl::OkStatus();
}

DeviceBuffers::~DeviceBuffers() {
  if (context_ == nullptr) return;
  {
    const Scope scope(*this);
    if (scope.status().ok()) {
      // Whatever fails here has failed before, or is gone with its context.
      if (stream_ != nullptr) static_cast<void>(driver_->StreamSynchronize(stream_));
      for (const Pointer pointer : pointers_) static_cast<void>(driver_->MemFree(pointer));
      if (staging_ != nullptr) static_cast<void>(driver_->MemFreeHost(staging_));
      if (stream_ != nullptr) static_cast<void>(driver_->StreamDestroy(stream_));
    }
  }
  static_cast<void>(driver_->PrimaryCtxRelease(device_));
}

void* DeviceBuffers::data(size_t index) const { return reinterpret_cast<void*>(pointers_[index]); }

absl::Status DeviceBuffers::Store() {
  const Scope scope(*this);
  RETURN_IF_ERROR(scope.status());
  // What was enqueued before may still read the staging memory.
  RETURN_IF_ERROR(driver_->ToStatus(driver_->StreamSynchronize(stream_), "cuStreamSynchronize"));
  std::byte* staging = staging_;
  for (size_t i = 0; i < host_.size(); ++i) {
    const size_t bytes = host_[i].size();
    if (bytes == 0) continue;
    std::memcpy(staging, host_[i].data(), bytes);
    RETURN_IF_ERROR(driver_->ToStatus(
        driver_->MemcpyHtoDAsync(pointers_[i], staging, bytes, stream_), "cuMemcpyHtoDAsync"));
    staging += bytes;
  }
  return absl::OkStatus();
}

absl::Status DeviceBuffers::Fetch() {
  const Scope scope(*this);
  RETURN_IF_ERROR(scope.status());
  std::byte* staging = staging_;
  for (size_t i = 0; i < host_.size(); ++i) {
    const size_t bytes = host_[i].size();
    if (bytes == 0) continue;
    RETURN_IF_ERROR(driver_->ToStatus(
        driver_->MemcpyDtoHAsync(staging, pointers_[i], bytes, stream_), "cuMemcpyDtoHAsync"));
    staging += bytes;
  }
  RETURN_IF_ERROR(driver_->ToStatus(driver_->StreamSynchronize(stream_), "cuStreamSynchronize"));
  staging = staging_;
  for (const std::span<std::byte> buffer : host_) {
    if (buffer.empty()) continue;
    std::memcpy(buffer.data(), staging, buffer.size());
    staging += buffer.size();
  }
  return absl::OkStatus();
}

}  // namespace cuda
