// Devices that fail, stop, or are lost during a capture: the save fails with device, tensor and the
// driver's error, older images stay, and blocks that a device may still write are not given back.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "hook/device_pins.h"
#include "hook/device_testing.h"
#include "hook/test_agent.h"
#include "hook/test_job.h"

namespace holdfast::hook {
namespace {

using abi::SlotState;

class DeviceFailureTest : public ::testing::Test {
 protected:
  static constexpr uint64_t kBytes = 100'000;

  void SetUp() override {
    std::string why;
    devices_ = TestDevices::Open(&why);
    if (devices_ == nullptr) GTEST_SKIP() << why;
    fake_ = devices_->fake();
    if (fake_ == nullptr) GTEST_SKIP() << "a real device does not fail when it is told to";
    fake_->Reset(1);
    Open();
    std::mt19937 random(3);
    for (int i = 0; i < 2; ++i) {
      buffers_.Add("b" + std::to_string(i), kBytes, 0, random);
      plan_.ops.push_back(
          {static_cast<uint64_t>(i) * kBytes, 0, kBytes, 1, kBytes, static_cast<uint32_t>(i), 0});
    }
    plan_.block_count = static_cast<uint32_t>(2 * kBytes / plan_.block_bytes + 1);
    placed_ = std::make_unique<PlacedBuffers>(*devices_, buffers_, [](size_t) { return 0; });
    agent_.SetPlan([this](const TestDocument&) { return plan_; });
  }
  void TearDown() override {
    job_.reset();
    if (fake_ == nullptr) return;
    fake_->Reset(1);
    placed_.reset();
  }
  void Open(CheckSource check = CheckSource::kNone) {
    job_.reset();
    Settings settings = TestSettings(agent_);
    settings.check_source = check;
    Result<std::unique_ptr<Job>> job = OpenTestJob(settings, &host_);
    ASSERT_TRUE(job.ok()) << job.error().text();
    job_ = std::move(job.value());
  }
  Error Register() { return Register(placed_->list()); }
  Error Register(const std::vector<hf_buffer>& list) {
    return job_->Register("{}", list, {}, Deadline::After(kPatienceNs));
  }
  Error Save(uint64_t step) { return job_->Save(step, NoOptions()); }
  Error Wait(int64_t patience_ns = kPatienceNs) {
    return job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(patience_ns));
  }
  // Begins a save; the device stops with copies of it executed, and others in flight: one that it
  // is at it may still finish, so there is another.
  void SaveUntilTheDeviceStops(uint64_t step) {
    fake_->SetCopyRate(uint64_t{64} << 10);
    const uint64_t before = fake_->copies_executed();
    ASSERT_TRUE(Save(step).ok());
    ASSERT_TRUE(agent_.Await([&] {
      fake_->Stall(true);
      const uint64_t executed = fake_->copies_executed() - before;
      if (executed > 0 && CountCalls("cuMemcpyDtoHAsync_v2") >= executed + 2) return true;
      fake_->Stall(false);
      return false;
    }));
  }
  uint64_t CountCalls(const std::string& name) {
    const std::vector<FakeCuda::Call> calls = fake_->calls();
    return static_cast<uint64_t>(std::count_if(
        calls.begin(), calls.end(), [&](const FakeCuda::Call& call) { return call.name == name; }));
  }
  SlotState State(uint32_t slot) { return agent_.shared().slots[slot].state.load(); }
  void ExpectNames(const Error& error, const std::vector<std::string>& parts) {
    for (const std::string& part : parts) {
      EXPECT_NE(std::string(error.text()).find(part), std::string::npos)
          << part << " in: " << error.text();
    }
  }

  TestDevices* devices_ = nullptr;
  FakeCuda* fake_ = nullptr;
  TestAgent agent_;
  HostSourceReader host_;
  TestBuffers buffers_;
  TestPlan plan_;
  std::unique_ptr<PlacedBuffers> placed_;
  std::unique_ptr<Job> job_;
};

// What a driver says from then on to whatever is asked of the context.
struct StickyError {
  int code;
  const char* name;
};
constexpr StickyError kStickyErrors[] = {
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE"}, {220, "CUDA_ERROR_NVLINK_UNCORRECTABLE"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE"}, {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    {719, "CUDA_ERROR_LAUNCH_FAILED"},     {999, "CUDA_ERROR_UNKNOWN"},
};

TEST_F(DeviceFailureTest, ALostContextFailsTheSaveAndItsBlocksStay) {
  for (const StickyError& sticky : kStickyErrors) {
    SCOPED_TRACE(sticky.name);
    const std::string driver_error = std::string(sticky.name) + " (" + std::to_string(sticky.code);
    fake_->Reset(1);
    Open();
    ASSERT_TRUE(Register().ok());
    ASSERT_TRUE(Save(1).ok());
    ASSERT_TRUE(Wait().ok());
    const std::vector<std::byte> older = agent_.Image(0);
    EXPECT_EQ(FirstDifference(older, OracleImage(plan_, buffers_)), -1);
    fake_->FailCopy(7, sticky.code);
    ASSERT_TRUE(Save(2).ok());
    // The report knows it before the training loop waits.
    hf_save_report report = {};
    ASSERT_TRUE(agent_.Await(
        [&] { return job_->Report(2, &report).ok() && report.state == HF_SAVE_FAILED; }));
    const std::string reported = report.error.text;
    const Error lost = Wait();
    EXPECT_EQ(lost.code(), HF_INTERNAL);
    EXPECT_EQ(reported, lost.text());
    ExpectNames(lost, {"buffer 'b", "device 0 (fake)", driver_error});
    // Void, and never recycled while the process lives.
    EXPECT_EQ(State(1), SlotState::kAbandoned);
    EXPECT_STREQ(agent_.shared().slots[1].void_text, lost.text());
    EXPECT_EQ(State(0), SlotState::kCaptured);
    EXPECT_EQ(FirstDifference(agent_.Image(0), older), -1);
    // Training goes on: everything says so at once, and nothing hangs.
    agent_.Grant(0);
    const Error next = Save(3);
    EXPECT_EQ(next.code(), HF_INTERNAL) << next.text();
    ExpectNames(next, {"device 0 (fake)", driver_error});
    EXPECT_EQ(State(0), SlotState::kGranted);
    EXPECT_TRUE(Wait().ok());
    ASSERT_TRUE(job_->Report(2, &report).ok());
    EXPECT_EQ(report.state, HF_SAVE_FAILED);
    EXPECT_STREQ(report.error.text, lost.text());
    EXPECT_EQ(State(1), SlotState::kAbandoned);
    // What lies in host memory can be saved on, once it is registered without the rest.
    ASSERT_TRUE(RegisterAll(*job_, buffers_).ok());
    ASSERT_TRUE(Save(4).ok());
    ASSERT_TRUE(Wait().ok());
    EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan_, buffers_)), -1);
  }
}

// The tensor's memory is freed before its last copies are enqueued.
TEST_F(DeviceFailureTest, MemoryThatIsFreedUnderCaptureFailsThatSaveOnly) {
  std::vector<hf_buffer> list = placed_->list();
  list[1].data = devices_->Allocate(0, kBytes);
  ASSERT_TRUE(Register(list).ok());
  fake_->Before("cuMemcpyDtoHAsync_v2", 40, [&] { devices_->Free(0, list[1].data); });
  ASSERT_TRUE(Save(1).ok());
  const Error freed = Wait();
  EXPECT_EQ(freed.code(), HF_INTERNAL);
  ExpectNames(
      freed, {"buffer 'b1'", "device 0 (fake): cuMemcpyDtoHAsync", "CUDA_ERROR_INVALID_VALUE (1)"});
  // Everything that the device had begun is over: its blocks are free.
  EXPECT_EQ(State(0), SlotState::kVoid);
  EXPECT_STREQ(agent_.shared().slots[0].void_text, freed.text());
  ASSERT_TRUE(Register().ok());
  agent_.Grant(0);
  ASSERT_TRUE(Save(2).ok());
  ASSERT_TRUE(Wait().ok());
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan_, buffers_)), -1);
}

// A mapping of virtual memory goes, at every moment of a capture and of its comparison, or other
// memory takes its place behind the last copy of the capture: the image is void, with a reason that
// names the tensor, or it is what was there at the save. (What changes before it is copied, nobody
// can find: check_source.h.)
TEST_F(DeviceFailureTest, MemoryThatIsRemappedUnderCaptureVoidsTheImageByName) {
  std::vector<hf_buffer> list = placed_->list();
  const uint64_t mapping_bytes = devices_->mapping_bytes();
  uint64_t step = 0;
  // Saves; before that copy one mapping in the middle of the second tensor is changed.
  struct Outcome {
    Error error;
    bool happened = false;
    int copies = 0;
  };
  const auto save = [&](int skipped, bool is_mapped_anew) {
    list[1].data = devices_->Allocate(0, kBytes, TestDevices::Kind::kVirtual);
    devices_->Write(0, list[1].data, buffers_.data(1).data(), kBytes);
    void* const middle = static_cast<std::byte*>(list[1].data) + 8 * mapping_bytes;
    EXPECT_TRUE(Register(list).ok());
    fake_->Reset(static_cast<uint32_t>(skipped));
    Outcome outcome;
    fake_->Before("cuMemcpyDtoHAsync_v2", skipped, [&] {
      outcome.happened = true;
      devices_->Unmap(middle, mapping_bytes);
      if (is_mapped_anew) devices_->MapNew(middle, mapping_bytes);
    });
    EXPECT_TRUE(Save(++step).ok());
    outcome.error = Wait();
    outcome.copies = static_cast<int>(CountCalls("cuMemcpyDtoHAsync_v2"));
    fake_->Reset(1);
    if (outcome.error.ok()) {
      EXPECT_EQ(State(0), SlotState::kCaptured);
      EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan_, buffers_)), -1);
    } else {
      ExpectNames(outcome.error, {"buffer 'b1'"});
      EXPECT_EQ(State(0), SlotState::kVoid);
      EXPECT_STREQ(agent_.shared().slots[0].void_text, outcome.error.text());
    }
    EXPECT_TRUE(Register().ok());
    devices_->Free(0, list[1].data);
    return outcome;
  };
  constexpr int kNever = 1 << 20;
  const Outcome unchecked = save(kNever, false);
  ASSERT_TRUE(unchecked.error.ok());
  Open(CheckSource::kAll);
  const Outcome checked = save(kNever, false);
  ASSERT_TRUE(checked.error.ok());
  ASSERT_GT(checked.copies, unchecked.copies);
  int gone = 0;
  int changed = 0;
  for (int skipped = 0; skipped < checked.copies; skipped += 5) {
    SCOPED_TRACE("unmapped before copy " + std::to_string(skipped));
    const Outcome outcome = save(skipped, false);
    EXPECT_TRUE(outcome.happened);
    gone += outcome.error.code() == HF_INTERNAL ? 1 : 0;
  }
  for (int skipped = unchecked.copies; skipped < checked.copies; skipped += 5) {
    SCOPED_TRACE("mapped anew before copy " + std::to_string(skipped));
    const Outcome outcome = save(skipped, true);
    EXPECT_TRUE(outcome.happened);
    changed += outcome.error.code() == HF_ABORTED ? 1 : 0;
  }
  EXPECT_GT(gone, 5);
  EXPECT_GT(changed, 3);
}

TEST_F(DeviceFailureTest, ADestroyedContextFailsTheSaveAndTheOthersServeOn) {
  devices_->MakeContext();
  std::vector<hf_buffer> list = placed_->list();
  list[1].data = devices_->Allocate(devices_->count() - 1, kBytes);
  devices_->Write(devices_->count() - 1, list[1].data, buffers_.data(1).data(), kBytes);
  ASSERT_TRUE(job_->Register("{}", list, {}, Deadline::After(kPatienceNs)).ok());
  ASSERT_TRUE(Save(1).ok());
  ASSERT_TRUE(Wait().ok());
  const std::vector<std::byte> older = agent_.Image(0);
  EXPECT_EQ(FirstDifference(older, OracleImage(plan_, buffers_)), -1);
  devices_->DestroyContext();
  const Error destroyed = Save(2);
  EXPECT_EQ(destroyed.code(), HF_INTERNAL);
  ExpectNames(destroyed, {"device 0 (fake)", "CUDA_ERROR_CONTEXT_IS_DESTROYED (709)"});
  EXPECT_EQ(State(1), SlotState::kGranted);
  EXPECT_EQ(FirstDifference(agent_.Image(0), older), -1);
  // What lies elsewhere can be saved, once it is registered without the rest.
  ASSERT_TRUE(Register().ok());
  agent_.Grant(0);
  ASSERT_TRUE(Save(3).ok());
  ASSERT_TRUE(Wait().ok());
}

TEST_F(DeviceFailureTest, ACopyThatIsRefusedFailsThatSaveOnly) {
  ASSERT_TRUE(Register().ok());
  int void_count = 0;
  for (int skipped = 0; skipped < 20; skipped += 3) {
    fake_->Reset(static_cast<uint32_t>(skipped));
    fake_->Fail("cuMemcpyDtoHAsync_v2", skipped, 1, false);
    const uint64_t step = 10 + static_cast<uint64_t>(skipped) * 2;
    ASSERT_TRUE(Save(step).ok());
    const Error refused = Wait();
    EXPECT_EQ(refused.code(), HF_INTERNAL);
    ExpectNames(refused, {"'b", "device 0 (fake): cuMemcpyDtoHAsync", "CUDA_ERROR_INVALID_VALUE"});
    EXPECT_EQ(State(0), SlotState::kVoid);
    ++void_count;
    agent_.Grant(0);
    ASSERT_TRUE(Save(step + 1).ok());
    ASSERT_TRUE(Wait().ok());
    EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan_, buffers_)), -1);
    agent_.Grant(0);
  }
  EXPECT_GT(void_count, 3);
}

TEST_F(DeviceFailureTest, EveryCallThatFailsFailsTheSaveByName) {
  ASSERT_TRUE(Register().ok());
  uint64_t step = 0;
  struct Case {
    const char* call;
    int skipped;
    int result;
    hf_code code;
  };
  for (const Case& failing :
       std::vector<Case>{{"cuEventQuery", 0, 700, HF_INTERNAL},
                         {"cuEventQuery", 3, 700, HF_INTERNAL},
                         {"cuEventRecord", 1, 700, HF_INTERNAL},
                         {"cuEventRecord", 5, 700, HF_INTERNAL},
                         {"cuEventCreate", 0, 700, HF_INTERNAL},
                         {"cuEventCreate", 0, 2, HF_RESOURCE_EXHAUSTED},
                         {"cuMemcpyDtoHAsync_v2", 9, 2, HF_RESOURCE_EXHAUSTED},
                         {"cuCtxPushCurrent_v2", 9, 700, HF_INTERNAL}}) {
    SCOPED_TRACE(failing.call);
    ASSERT_TRUE(Register().ok());
    fake_->Reset(static_cast<uint32_t>(step));
    fake_->Fail(failing.call, failing.skipped, failing.result, true);
    ASSERT_TRUE(Save(++step).ok());
    const Error failed = Wait();
    EXPECT_EQ(failed.code(), failing.code) << failed.text();
    ExpectNames(failed, {"device 0 (fake)", "(" + std::to_string(failing.result) + ")"});
    EXPECT_TRUE(State(0) == SlotState::kVoid || State(0) == SlotState::kAbandoned);
    fake_->Reset(1);
  }
}

TEST_F(DeviceFailureTest, ADeviceThatCannotBeSetUpRefusesTheRegistrationByName) {
  for (const char* call : {"cuDevicePrimaryCtxRetain", "cuStreamCreateWithPriority",
                           "cuEventCreate", "cuPointerGetAttributes", "cuDeviceGet"}) {
    const FakeCuda::Live before = fake_->live();
    fake_->Fail(call, 0, 2, false);
    const Error refused = Register();
    EXPECT_EQ(refused.code(), HF_RESOURCE_EXHAUSTED) << refused.text();
    ExpectNames(refused, {"buffer 'b0'", "CUDA_ERROR_OUT_OF_MEMORY (2)"});
    EXPECT_EQ(Save(1).code(), HF_FAILED_PRECONDITION);
    EXPECT_EQ(fake_->live(), before);
  }
}

TEST_F(DeviceFailureTest, ADeviceThatStopsIsWaitedForShortlyAndItsBlocksUntilItGoesOn) {
  ASSERT_TRUE(Register().ok());
  SaveUntilTheDeviceStops(1);
  const int64_t before_ns = MonotonicNs();
  EXPECT_EQ(Wait(0).code(), HF_DEADLINE_EXCEEDED);
  EXPECT_LT(MonotonicNs() - before_ns, 60 * kDrainNs);  // it stands still for ever
  EXPECT_EQ(State(0), SlotState::kAbandoned);
  // Its copies are in flight: no other capture may begin, and training goes on.
  const Error next = Save(2);
  EXPECT_EQ(next.code(), HF_UNAVAILABLE) << next.text();
  EXPECT_EQ(State(1), SlotState::kGranted);
  fake_->SetCopyRate(0);
  fake_->Stall(false);
  EXPECT_TRUE(agent_.AwaitSlot(0, SlotState::kVoid));
  // Their end is seen a moment later here.
  Error saved = Save(2);
  while (saved.code() == HF_UNAVAILABLE) saved = Save(2);
  ASSERT_TRUE(saved.ok()) << saved.text();
  ASSERT_TRUE(Wait().ok());
  EXPECT_EQ(FirstDifference(agent_.Image(1), OracleImage(plan_, buffers_)), -1);
}

TEST_F(DeviceFailureTest, AStreamThatHangsHoldsNothing) {
  ASSERT_TRUE(Register().ok());
  devices_->Hold(0, nullptr);
  const uint64_t before = fake_->copies_executed();
  for (uint64_t step = 1; step <= 3; ++step) {
    ASSERT_TRUE(Save(step).ok());
    EXPECT_EQ(Wait(kNsPerMs).code(), HF_DEADLINE_EXCEEDED);
    EXPECT_EQ(State(0), SlotState::kVoid);
    agent_.Grant(0);
  }
  EXPECT_EQ(fake_->copies_executed(), before);
  devices_->Release();
  ASSERT_TRUE(Save(4).ok());
  ASSERT_TRUE(Wait().ok());
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan_, buffers_)), -1);
}

TEST_F(DeviceFailureTest, AJobCanBeClosedWhenItsDeviceHasStopped) {
  ASSERT_TRUE(Register().ok());
  SaveUntilTheDeviceStops(1);
  EXPECT_EQ(Wait(0).code(), HF_DEADLINE_EXCEEDED);
  EXPECT_FALSE(job_->Close());
  EXPECT_EQ(State(0), SlotState::kAbandoned);
  fake_->SetCopyRate(0);
  fake_->Stall(false);
  job_.reset();
  EXPECT_EQ(State(0), SlotState::kVoid);
}

TEST_F(DeviceFailureTest, ChunksAreRegisteredOnceAndWhatIsRefusedStaysSo) {
  auto driver = DeviceDriver::FindLoaded();
  ASSERT_TRUE(driver.ok() && driver.value() != nullptr);
  auto table = std::make_shared<DeviceTable>(driver.value());
  ASSERT_EQ(table->Enter(placed_->data(0)).value(), 0);
  const FakeCuda::Live before = fake_->live();
  std::vector<std::byte> memory(100'000);
  {
    // Chunks of 3 blocks; the last one is shorter.
    DevicePins pins(table, memory.data(), memory.size(), 1000, 3500);
    fake_->Fail("cuMemHostRegister_v2", 1, 2, false);
    EXPECT_TRUE(pins.Pin(memory.data()));
    EXPECT_TRUE(pins.Pin(memory.data() + 2000));
    EXPECT_EQ(fake_->live().registered - before.registered, 1);
    EXPECT_FALSE(pins.Pin(memory.data() + 3000));
    EXPECT_FALSE(pins.Pin(memory.data() + 5000));
    EXPECT_EQ(pins.refused_count(), 1u);
    for (uint64_t block = 0; block < 100; ++block) pins.Pin(memory.data() + block * 1000);
    EXPECT_EQ(fake_->live().registered - before.registered, 33);
  }
  EXPECT_EQ(fake_->live(), before);
}

}  // namespace
}  // namespace holdfast::hook
