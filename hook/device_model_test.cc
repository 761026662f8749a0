// What capture and restore take for granted of a driver, asked of whichever is there: of the fake
// one it is the written model, and a real one has to agree.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "hook/device_contexts.h"
#include "hook/device_testing.h"

namespace holdfast::hook {
namespace {

using Kind = TestDevices::Kind;

// CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED
constexpr auto kNotRegistered = static_cast<CuResult>(713);

class DeviceModelTest : public DeviceTest {
 protected:
  static constexpr uint64_t kBytes = uint64_t{25} << 12;

  void SetUp() override {
    DeviceTest::SetUp();
    if (IsSkipped()) return;
    Result<std::shared_ptr<const DeviceDriver>> found = DeviceDriver::FindLoaded();
    ASSERT_TRUE(found.ok()) << found.error().text();
    driver_ = found.value();
    ASSERT_NE(driver_, nullptr);
    memory_ = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(memory_, MAP_FAILED);
  }
  void TearDown() override {
    if (memory_ != nullptr) munmap(memory_, kBytes);
    DeviceTest::TearDown();
  }
  // Until it is complete, or has failed.
  CuResult Await(CuEvent event) {
    CuResult result = driver_->EventQuery(event);
    while (result == CuResult::kNotReady) {
      PauseBetweenLooks();
      result = driver_->EventQuery(event);
    }
    return result;
  }
  static CuDevicePointer At(const void* pointer) {
    return reinterpret_cast<CuDevicePointer>(pointer);
  }

  std::shared_ptr<const DeviceDriver> driver_;
  void* memory_ = nullptr;  // of the host
};

TEST_F(DeviceModelTest, AnEventIsCompleteBehindTheWorkBeforeIt) {
  const DeviceScope scope(*driver_, devices_->context(0));
  ASSERT_EQ(scope.result(), CuResult::kSuccess);
  CuEvent event = nullptr;
  ASSERT_EQ(driver_->EventCreate(&event, kCuEventDisableTiming), CuResult::kSuccess);
  // Before it was ever recorded there is nothing to wait for.
  EXPECT_EQ(driver_->EventQuery(event), CuResult::kSuccess);
  for (int round = 0; round < 2; ++round) {
    devices_->Hold(0, stream_);
    ASSERT_EQ(driver_->EventRecord(event, stream_), CuResult::kSuccess);
    EXPECT_EQ(driver_->EventQuery(event), CuResult::kNotReady);
    devices_->Release();
    EXPECT_EQ(Await(event), CuResult::kSuccess);
  }
  EXPECT_EQ(driver_->EventDestroy(event), CuResult::kSuccess);
}

TEST_F(DeviceModelTest, ACopyToRegisteredMemoryReturnsAtOnceAndComesInTheStreamsOrder) {
  std::byte* const device = static_cast<std::byte*>(devices_->Allocate(0, kBytes));
  const std::vector<std::byte> before(kBytes, std::byte{1});
  devices_->Write(0, device, before.data(), kBytes);
  {
    const DeviceScope scope(*driver_, devices_->context(0));
    ASSERT_EQ(driver_->MemHostRegister(memory_, kBytes, kCuHostRegisterPortable),
              CuResult::kSuccess);
    CuEvent event = nullptr;
    ASSERT_EQ(driver_->EventCreate(&event, kCuEventDisableTiming), CuResult::kSuccess);
    devices_->Hold(0, stream_);
    devices_->Set(0, stream_, device, std::byte{2}, kBytes);
    ASSERT_EQ(driver_->MemcpyDtoHAsync(memory_, At(device), kBytes, stream_), CuResult::kSuccess);
    ASSERT_EQ(driver_->EventRecord(event, stream_), CuResult::kSuccess);
    devices_->Set(0, stream_, device, std::byte{3}, kBytes);
    EXPECT_EQ(driver_->EventQuery(event), CuResult::kNotReady);
    devices_->Release();
    EXPECT_EQ(Await(event), CuResult::kSuccess);
    const std::byte* const copied = static_cast<const std::byte*>(memory_);
    EXPECT_EQ(std::count(copied, copied + kBytes, std::byte{2}), static_cast<int64_t>(kBytes));
    devices_->Synchronize(0, stream_);
    EXPECT_EQ(driver_->EventDestroy(event), CuResult::kSuccess);
    EXPECT_EQ(driver_->MemHostUnregister(memory_), CuResult::kSuccess);
  }
  devices_->Free(0, device);
}

TEST_F(DeviceModelTest, HostMemoryIsRegisteredOnce) {
  const DeviceScope scope(*driver_, devices_->context(0));
  ASSERT_EQ(driver_->MemHostRegister(memory_, kBytes, kCuHostRegisterPortable), CuResult::kSuccess);
  EXPECT_EQ(driver_->MemHostRegister(memory_, kBytes, kCuHostRegisterPortable),
            CuResult::kHostMemoryAlreadyRegistered);
  EXPECT_EQ(driver_->MemHostUnregister(memory_), CuResult::kSuccess);
  EXPECT_EQ(driver_->MemHostUnregister(memory_), kNotRegistered);
}

TEST_F(DeviceModelTest, TheDriverSaysWhereAnyPointerLies) {
  const auto is_device = [&](const void* pointer) {
    const Result<CuPlace> place = driver_->Locate(pointer);
    EXPECT_TRUE(place.ok()) << place.error().text();
    return place.ok() && place.value().is_device;
  };
  for (const void* host : {static_cast<const void*>(memory_), static_cast<const void*>(&is_device),
                           static_cast<const void*>(driver_.get())}) {
    EXPECT_FALSE(is_device(host));
  }
  for (const Kind kind : {Kind::kPlain, Kind::kPool, Kind::kManaged, Kind::kVirtual}) {
    SCOPED_TRACE("kind " + std::to_string(static_cast<int>(kind)));
    std::byte* const pointer = static_cast<std::byte*>(devices_->Allocate(0, kBytes, kind));
    for (const uint64_t at : {uint64_t{0}, uint64_t{5}, kBytes - 1}) {
      EXPECT_TRUE(is_device(pointer + at));
      EXPECT_EQ(driver_->Locate(pointer + at).value().ordinal, 0);
    }
    const CuAllocation found = driver_->FindAllocation(pointer + 5, 1);
    EXPECT_TRUE(found.Holds(pointer + 5, 1));
    if (kind == Kind::kPlain) {
      EXPECT_EQ(driver_->Locate(pointer).value().context, devices_->context(0));
      EXPECT_EQ(found.begin, reinterpret_cast<uintptr_t>(pointer));
      EXPECT_TRUE(found.Holds(pointer, kBytes));
    }
    devices_->Free(0, pointer);
  }
}

TEST_F(DeviceModelTest, ACopyThatLeavesAnAllocationIsRefused) {
  SideBySide memory(*devices_);
  if (memory.data() == nullptr) GTEST_SKIP() << "the driver gave no allocations side by side";
  const DeviceScope scope(*driver_, devices_->context(0));
  std::byte* const end = memory.data() + memory.bytes_each();
  EXPECT_EQ(driver_->MemcpyDtoHAsync(memory_, At(end - 10), 20, stream_), CuResult::kInvalidValue);
  EXPECT_EQ(driver_->MemcpyDtoHAsync(memory_, At(end - 10), 10, stream_), CuResult::kSuccess);
  devices_->Synchronize(0, stream_);
}

TEST_F(DeviceModelTest, TheLowestPriorityIsTheGreaterNumber) {
  const DeviceScope scope(*driver_, devices_->context(0));
  int lowest = -1;
  int highest = 1;
  ASSERT_EQ(driver_->CtxGetStreamPriorityRange(&lowest, &highest), CuResult::kSuccess);
  EXPECT_GE(lowest, highest);
}

}  // namespace
}  // namespace holdfast::hook
