// A device for tests: whatever libcuda.so.1 the loader finds, the fake one or a real one, and
// tensors in its memory. The test process loads the driver, as a training process would.
#ifndef HOLDFAST_HOOK_DEVICE_TESTING_H_
#define HOLDFAST_HOOK_DEVICE_TESTING_H_

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "hook/device_driver.h"
#include "hook/test_job.h"
#include "tests/support/fake_cuda/fake_cuda.h"

namespace holdfast::hook {

// Threads: the test's one.
class TestDevices {
 public:
  // nullptr, with the reason in *why: there is no driver, or no device.
  static TestDevices* Open(std::string* why) {
    static std::string failure;
    static TestDevices* const devices = Load(&failure);
    *why = failure;
    return devices;
  }

  FakeCuda* fake() const { return fake_; }  // nullptr: a real driver
  // What is called a device here is a context: the primary one of each, and another one of the
  // first.
  int count() const { return static_cast<int>(contexts_.size()); }
  CuContext context(int device) const { return contexts_[device]; }
  // One more of the first device, as the last.
  void MakeContext() {
    CuContext context = nullptr;
    CuContext popped = nullptr;
    Check(create_context_(&context, 0, 0), "cuCtxCreate");
    Check(pop_(&popped), "cuCtxPopCurrent");
    contexts_.push_back(context);
  }
  // Of the last.
  void DestroyContext() {
    Check(destroy_context_(contexts_.back()), "cuCtxDestroy");
    contexts_.pop_back();
  }

  // Memory of a device; freed by Free. kPool and kVirtual: of no context in particular. kVirtual:
  // as many mappings side by side as it takes, as allocators that grow their segments have it; of
  // this one only Write and Free know.
  enum class Kind { kPlain, kPool, kManaged, kVirtual };
  void* Allocate(int device, uint64_t bytes, Kind kind = Kind::kPlain) {
    const Current current(*this, device);
    CuDevicePointer pointer = 0;
    if (kind == Kind::kVirtual) return AllocateVirtual(bytes);
    if (kind == Kind::kPlain) Check(mem_alloc_(&pointer, bytes), "cuMemAlloc");
    if (kind == Kind::kManaged) Check(mem_alloc_managed_(&pointer, bytes, 1), "cuMemAllocManaged");
    if (kind == Kind::kPool) {
      Check(mem_alloc_async_(&pointer, bytes, nullptr), "cuMemAllocAsync");
      Check(stream_synchronize_(nullptr), "cuStreamSynchronize");
    }
    return reinterpret_cast<void*>(pointer);
  }
  void Free(int device, void* pointer) {
    const Current current(*this, device);
    if (const auto found = virtual_bytes_.find(pointer); found != virtual_bytes_.end()) {
      Unmap(pointer, found->second);
      Check(address_free_(reinterpret_cast<CuDevicePointer>(pointer), found->second),
            "cuMemAddressFree");
      virtual_bytes_.erase(found);
      return;
    }
    Check(mem_free_(reinterpret_cast<CuDevicePointer>(pointer)), "cuMemFree");
  }
  // Of one mapping of kVirtual's.
  uint64_t mapping_bytes() const { return mapping_bytes_; }
  // Of mappings of kVirtual's: what lay there is gone, and what is mapped is new memory of the
  // first device.
  void Unmap(void* pointer, uint64_t bytes) {
    Check(unmap_(reinterpret_cast<CuDevicePointer>(pointer), bytes), "cuMemUnmap");
  }
  void MapNew(void* pointer, uint64_t bytes) {
    const MemoryOfDevice memory;
    for (uint64_t at = 0; at < bytes; at += mapping_bytes_) {
      unsigned long long handle = 0;
      Check(mem_create_(&handle, mapping_bytes_, &memory, 0), "cuMemCreate");
      Check(map_(reinterpret_cast<CuDevicePointer>(pointer) + at, mapping_bytes_, 0, handle, 0),
            "cuMemMap");
      Check(mem_release_(handle), "cuMemRelease");  // the mapping keeps it
    }
    const AccessOfDevice access;
    Check(set_access_(reinterpret_cast<CuDevicePointer>(pointer), bytes, &access, 1),
          "cuMemSetAccess");
  }
  void Write(int device, void* pointer, const void* data, uint64_t bytes) {
    if (bytes == 0) return;
    const Current current(*this, device);
    const std::byte* from = static_cast<const std::byte*>(data);
    for (std::byte* at = static_cast<std::byte*>(pointer); bytes > 0;) {
      const uint64_t piece = std::min(bytes, BytesInOneMapping(at));
      Check(memcpy_htod_(reinterpret_cast<CuDevicePointer>(at), from, piece), "cuMemcpyHtoD");
      at += piece;
      from += piece;
      bytes -= piece;
    }
    // It may return when the bytes are on their way.
    Check(stream_synchronize_(nullptr), "cuStreamSynchronize");
  }
  std::vector<std::byte> Read(int device, const void* pointer, uint64_t bytes) {
    std::vector<std::byte> data(bytes);
    const Current current(*this, device);
    if (bytes > 0) {
      Check(memcpy_dtoh_(data.data(), reinterpret_cast<CuDevicePointer>(pointer), bytes),
            "cuMemcpyDtoH");
    }
    return data;
  }

  CuStream MakeStream(int device) {
    const Current current(*this, device);
    CuStream stream = nullptr;
    Check(stream_create_(&stream, kCuStreamNonBlocking, 0), "cuStreamCreateWithPriority");
    return stream;
  }
  void DestroyStream(int device, CuStream stream) {
    const Current current(*this, device);
    Check(stream_destroy_(stream), "cuStreamDestroy");
  }
  void Synchronize(int device, CuStream stream) {
    const Current current(*this, device);
    Check(stream_synchronize_(stream), "cuStreamSynchronize");
  }
  // Work on the stream: fills memory.
  void Set(int device, CuStream stream, void* pointer, std::byte value, uint64_t bytes) {
    const Current current(*this, device);
    Check(memset_async_(reinterpret_cast<CuDevicePointer>(pointer),
                        static_cast<unsigned char>(value), bytes, stream),
          "cuMemsetD8Async");
  }
  // The stream goes no further until Release.
  void Hold(int device, CuStream stream) {
    const Current current(*this, device);
    __atomic_store_n(gate_, 0, __ATOMIC_RELEASE);
    Check(wait_value_(stream, reinterpret_cast<CuDevicePointer>(gate_), 1, 0), "cuStreamWaitValue");
  }
  void Release() { __atomic_store_n(gate_, 1, __ATOMIC_RELEASE); }

  void BeginGraph(int device, CuStream stream) {
    const Current current(*this, device);
    Check(begin_capture_(stream, CuCaptureMode::kGlobal), "cuStreamBeginCapture");
  }
  // False: the capture was broken.
  bool EndGraph(int device, CuStream stream) {
    const Current current(*this, device);
    void* graph = nullptr;
    return end_capture_(stream, &graph) == CuResult::kSuccess;
  }

 private:
  // What one copy from `at` on may take.
  uint64_t BytesInOneMapping(const std::byte* at) const {
    const auto after = virtual_bytes_.upper_bound(at);
    if (after == virtual_bytes_.begin()) return UINT64_MAX;
    const auto& [begin, bytes] = *std::prev(after);
    const uint64_t offset = static_cast<uint64_t>(at - static_cast<const std::byte*>(begin));
    return offset >= bytes ? UINT64_MAX : mapping_bytes_ - offset % mapping_bytes_;
  }

  // As in cuda.h (CUmemAllocationProp, CUmemAccessDesc): pinned memory of device 0, read and
  // written by it.
  struct MemoryOfDevice {
    int type = 1;
    int handle_types = 0;
    int location_type = 1;
    int device = 0;
    void* meta_data = nullptr;
    unsigned char flags[8] = {};
  };
  struct AccessOfDevice {
    int location_type = 1;
    int device = 0;
    int flags = 3;
  };

  void* AllocateVirtual(uint64_t bytes) {
    const uint64_t mapped = (bytes + mapping_bytes_ - 1) / mapping_bytes_ * mapping_bytes_;
    CuDevicePointer pointer = 0;
    Check(reserve_(&pointer, mapped, 0, 0, 0), "cuMemAddressReserve");
    void* const at = reinterpret_cast<void*>(pointer);
    MapNew(at, mapped);
    virtual_bytes_[at] = mapped;
    return at;
  }

  // The device's context is current for the calling thread.
  class Current {
   public:
    Current(TestDevices& devices, int device) : devices_(devices) {
      devices.Check(devices.push_(devices.contexts_[device]), "cuCtxPushCurrent");
    }
    ~Current() {
      CuContext popped = nullptr;
      devices_.pop_(&popped);
    }

   private:
    TestDevices& devices_;
  };

  static TestDevices* Load(std::string* why) {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) {
      *why = std::string("no CUDA driver: ") + dlerror();
      return nullptr;
    }
    // For the rest of the process, as a driver is.
    static TestDevices devices;
    const auto find = [library](auto& member, const char* symbol) {
      member = reinterpret_cast<std::remove_reference_t<decltype(member)>>(dlsym(library, symbol));
      return member != nullptr;
    };
    CuResult (*init)(unsigned) = nullptr;
    CuResult (*get_count)(int*) = nullptr;
    CuResult (*retain)(CuContext*, int) = nullptr;
    CuResult (*alloc_host)(void**, size_t) = nullptr;
    CuResult (*granularity)(size_t*, const void*, int) = nullptr;
    FakeCuda* (*fake)() = nullptr;
    if (!find(init, "cuInit") || !find(get_count, "cuDeviceGetCount") ||
        !find(retain, "cuDevicePrimaryCtxRetain") || !find(alloc_host, "cuMemAllocHost_v2") ||
        !find(devices.push_, "cuCtxPushCurrent_v2") || !find(devices.pop_, "cuCtxPopCurrent_v2") ||
        !find(devices.create_context_, "cuCtxCreate_v2") ||
        !find(devices.destroy_context_, "cuCtxDestroy_v2") ||
        !find(devices.mem_alloc_, "cuMemAlloc_v2") ||
        !find(devices.mem_alloc_async_, "cuMemAllocAsync") ||
        !find(devices.mem_alloc_managed_, "cuMemAllocManaged") ||
        !find(devices.mem_free_, "cuMemFree_v2") ||
        !find(granularity, "cuMemGetAllocationGranularity") ||
        !find(devices.reserve_, "cuMemAddressReserve") ||
        !find(devices.address_free_, "cuMemAddressFree") ||
        !find(devices.mem_create_, "cuMemCreate") || !find(devices.mem_release_, "cuMemRelease") ||
        !find(devices.map_, "cuMemMap") || !find(devices.unmap_, "cuMemUnmap") ||
        !find(devices.set_access_, "cuMemSetAccess") ||
        !find(devices.memcpy_htod_, "cuMemcpyHtoD_v2") ||
        !find(devices.memcpy_dtoh_, "cuMemcpyDtoH_v2") ||
        !find(devices.memset_async_, "cuMemsetD8Async") ||
        !find(devices.stream_create_, "cuStreamCreateWithPriority") ||
        !find(devices.stream_destroy_, "cuStreamDestroy_v2") ||
        !find(devices.stream_synchronize_, "cuStreamSynchronize") ||
        !find(devices.wait_value_, "cuStreamWaitValue32_v2") ||
        !find(devices.begin_capture_, "cuStreamBeginCapture_v2") ||
        !find(devices.end_capture_, "cuStreamEndCapture")) {
      *why = std::string("the CUDA driver is too old: ") + dlerror();
      return nullptr;
    }
    find(fake, "fake_cuda");
    int count = 0;
    const CuResult initialized = init(0);
    if (initialized != CuResult::kSuccess || get_count(&count) != CuResult::kSuccess ||
        count == 0) {
      *why = "no CUDA device: cuInit gives " + std::to_string(static_cast<int>(initialized));
      return nullptr;
    }
    for (int device = 0; device < count; ++device) {
      CuContext context = nullptr;
      devices.Check(retain(&context, device), "cuDevicePrimaryCtxRetain");
      devices.contexts_.push_back(context);
    }
    devices.MakeContext();
    const MemoryOfDevice memory;
    devices.Check(granularity(&devices.mapping_bytes_, &memory, 0),
                  "cuMemGetAllocationGranularity");
    {
      const Current current(devices, 0);
      void* word = nullptr;
      devices.Check(alloc_host(&word, 64), "cuMemAllocHost");
      devices.gate_ = static_cast<uint32_t*>(word);
    }
    if (fake != nullptr) devices.fake_ = fake();
    return &devices;
  }

  void Check(CuResult result, const char* what) { EXPECT_EQ(static_cast<int>(result), 0) << what; }

  std::vector<CuContext> contexts_;
  FakeCuda* fake_ = nullptr;
  size_t mapping_bytes_ = 0;
  std::map<const void*, uint64_t> virtual_bytes_;
  uint32_t* gate_ = nullptr;
  CuResult (*push_)(CuContext) = nullptr;
  CuResult (*pop_)(CuContext*) = nullptr;
  CuResult (*create_context_)(CuContext*, unsigned, int) = nullptr;
  CuResult (*destroy_context_)(CuContext) = nullptr;
  CuResult (*mem_alloc_)(CuDevicePointer*, size_t) = nullptr;
  CuResult (*mem_alloc_async_)(CuDevicePointer*, size_t, CuStream) = nullptr;
  CuResult (*mem_alloc_managed_)(CuDevicePointer*, size_t, unsigned) = nullptr;
  CuResult (*mem_free_)(CuDevicePointer) = nullptr;
  CuResult (*reserve_)(CuDevicePointer*, size_t, size_t, CuDevicePointer,
                       unsigned long long) = nullptr;
  CuResult (*address_free_)(CuDevicePointer, size_t) = nullptr;
  CuResult (*mem_create_)(unsigned long long*, size_t, const void*, unsigned long long) = nullptr;
  CuResult (*mem_release_)(unsigned long long) = nullptr;
  CuResult (*map_)(CuDevicePointer, size_t, size_t, unsigned long long,
                   unsigned long long) = nullptr;
  CuResult (*unmap_)(CuDevicePointer, size_t) = nullptr;
  CuResult (*set_access_)(CuDevicePointer, size_t, const void*, size_t) = nullptr;
  CuResult (*memcpy_htod_)(CuDevicePointer, const void*, size_t) = nullptr;
  CuResult (*memcpy_dtoh_)(void*, CuDevicePointer, size_t) = nullptr;
  CuResult (*memset_async_)(CuDevicePointer, unsigned char, size_t, CuStream) = nullptr;
  CuResult (*stream_create_)(CuStream*, unsigned, int) = nullptr;
  CuResult (*stream_destroy_)(CuStream) = nullptr;
  CuResult (*stream_synchronize_)(CuStream) = nullptr;
  CuResult (*wait_value_)(CuStream, CuDevicePointer, uint32_t, unsigned) = nullptr;
  CuResult (*begin_capture_)(CuStream, CuCaptureMode) = nullptr;
  CuResult (*end_capture_)(CuStream, void**) = nullptr;
};

// Allocations of device 0 of which each begins where the one before ends: what a caching
// allocator's segments, and mappings of virtual memory, often are. A copy by the driver must not
// leave one.
class SideBySide {
 public:
  static constexpr uint64_t kCount = 6;

  explicit SideBySide(TestDevices& devices)
      : devices_(devices),
        // The granularity of the driver's allocations.
        bytes_each_(devices.fake() != nullptr ? 4096 : uint64_t{2} << 20) {
    for (uint64_t i = 0; i < 8 * kCount; ++i) {
      all_.push_back(static_cast<std::byte*>(devices.Allocate(0, bytes_each_)));
    }
    std::sort(all_.begin(), all_.end());
    uint64_t run = 1;
    for (size_t i = 1; i < all_.size() && run < kCount; ++i) {
      run = all_[i] == all_[i - 1] + bytes_each_ ? run + 1 : 1;
      if (run == kCount) data_ = all_[i] - (kCount - 1) * bytes_each_;
    }
  }
  ~SideBySide() {
    for (std::byte* const pointer : all_) devices_.Free(0, pointer);
  }
  SideBySide(const SideBySide&) = delete;
  SideBySide& operator=(const SideBySide&) = delete;

  // nullptr: the driver gave none that lie so.
  std::byte* data() const { return data_; }
  uint64_t bytes_each() const { return bytes_each_; }
  uint64_t bytes() const { return kCount * bytes_each_; }
  void Write(const std::byte* bytes) {
    for (uint64_t at = 0; at < this->bytes(); at += bytes_each_) {
      devices_.Write(0, data_ + at, bytes + at, bytes_each_);
    }
  }
  std::vector<std::byte> Read() {
    std::vector<std::byte> found;
    for (uint64_t at = 0; at < bytes(); at += bytes_each_) {
      const std::vector<std::byte> one = devices_.Read(0, data_ + at, bytes_each_);
      found.insert(found.end(), one.begin(), one.end());
    }
    return found;
  }

 private:
  TestDevices& devices_;
  const uint64_t bytes_each_;
  std::vector<std::byte*> all_;
  std::byte* data_ = nullptr;
};

// TestBuffers, some of which lie in device memory: their bytes in `host` are what the oracle reads.
class PlacedBuffers {
 public:
  static constexpr int kHost = -1;

  // kFlat: those of one device lie one behind the other in one allocation, as in a flat buffer.
  enum class Packing { kEach, kFlat };

  // `place_of(i)`: kHost, or a device.
  template <typename PlaceOf>
  PlacedBuffers(TestDevices& devices, TestBuffers& host, const PlaceOf& place_of,
                TestDevices::Kind kind = TestDevices::Kind::kPlain,
                Packing packing = Packing::kEach)
      : devices_(devices), host_(host), list_(host.List()) {
    for (size_t i = 0; i < host.count(); ++i) {
      places_.push_back(host.data(i).empty() ? kHost : place_of(i));
      if (places_[i] == kHost || packing == Packing::kFlat) continue;
      list_[i].data = devices.Allocate(places_[i], host.data(i).size(), kind);
      owned_.emplace_back(places_[i], list_[i].data);
      Upload(i);
    }
    for (int device = 0; packing == Packing::kFlat && device < devices.count(); ++device) {
      PlaceFlat(device, kind);
    }
  }
  ~PlacedBuffers() {
    for (const auto& [device, pointer] : owned_) devices_.Free(device, pointer);
  }
  PlacedBuffers(const PlacedBuffers&) = delete;
  PlacedBuffers& operator=(const PlacedBuffers&) = delete;

  const std::vector<hf_buffer>& list() const { return list_; }
  int place(size_t index) const { return places_[index]; }
  void* data(size_t index) const { return list_[index].data; }
  std::vector<void*> pointers() const {
    std::vector<void*> pointers;
    for (const hf_buffer& buffer : list_) pointers.push_back(buffer.data);
    return pointers;
  }
  // The oracle's bytes to the device.
  void Upload(size_t index) {
    if (places_[index] == kHost) return;
    devices_.Write(places_[index], list_[index].data, host_.data(index).data(),
                   host_.data(index).size());
  }
  // What lies there now.
  std::vector<std::byte> Found(size_t index) const {
    if (places_[index] == kHost) return host_.data(index);
    return devices_.Read(places_[index], list_[index].data, host_.data(index).size());
  }

 private:
  void PlaceFlat(int device, TestDevices::Kind kind) {
    std::vector<std::byte> all;
    for (size_t i = 0; i < places_.size(); ++i) {
      if (places_[i] != device) continue;
      all.insert(all.end(), host_.data(i).begin(), host_.data(i).end());
    }
    if (all.empty()) return;
    std::byte* at = static_cast<std::byte*>(devices_.Allocate(device, all.size(), kind));
    owned_.emplace_back(device, at);
    devices_.Write(device, at, all.data(), all.size());
    for (size_t i = 0; i < places_.size(); ++i) {
      if (places_[i] != device) continue;
      list_[i].data = at;
      at += list_[i].bytes;
    }
  }

  TestDevices& devices_;
  TestBuffers& host_;
  std::vector<hf_buffer> list_;
  std::vector<int> places_;
  std::vector<std::pair<int, void*>> owned_;
};

// A test with a device, a stream of it and a seed; skipped where there is none.
class DeviceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    devices_ = TestDevices::Open(&why);
    if (devices_ == nullptr) GTEST_SKIP() << why;
    seed_ = std::random_device()();
    random_.seed(seed_);
    RecordProperty("seed", std::to_string(seed_));
    if (devices_->fake() != nullptr) devices_->fake()->Reset(seed_);
    stream_ = devices_->MakeStream(0);
  }
  void TearDown() override {
    if (stream_ != nullptr) devices_->DestroyStream(0, stream_);
  }
  // What a call with these buffers says its streams are: one of a device on which nothing lies
  // would be refused.
  void UseStreamFor(const PlacedBuffers& buffers) {
    streams_.clear();
    for (size_t i = 0; i < buffers.list().size(); ++i) {
      if (buffers.place(i) == 0) streams_ = {stream_};
    }
  }

  TestDevices* devices_ = nullptr;
  uint32_t seed_ = 0;
  std::mt19937 random_;
  CuStream stream_ = nullptr;
  std::vector<void*> streams_;
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_DEVICE_TESTING_H_
