// Capture from device memory, on the fake driver or a real one: what reaches the image, behind
// which work of the caller's stream, and what is asked of the driver for it. Failures:
// device_failure_test.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "hook/device_testing.h"
#include "hook/test_agent.h"
#include "hook/test_job.h"

namespace holdfast::hook {
namespace {

using abi::SlotState;
using Kind = TestDevices::Kind;

class DeviceCaptureTest : public DeviceTest {
 protected:
  void TearDown() override {
    job_.reset();
    DeviceTest::TearDown();
  }
  void Open(uint32_t threads = 1, CheckSource check = CheckSource::kNone) {
    Settings settings = TestSettings(agent_);
    settings.copy_threads = threads;
    settings.check_source = check;
    Result<std::unique_ptr<Job>> job = OpenTestJob(settings, &host_);
    ASSERT_TRUE(job.ok()) << job.error().text();
    job_ = std::move(job.value());
  }
  void Register(const PlacedBuffers& buffers, const TestPlan& plan) {
    agent_.SetPlan([plan](const TestDocument&) { return plan; });
    const Error error = job_->Register("{\"holdfast_layout\": 1}", buffers.list(), {},
                                       Deadline::After(kPatienceNs));
    ASSERT_TRUE(error.ok()) << error.text();
    UseStreamFor(buffers);
  }
  Error Save(uint64_t step, void* const* pointers = nullptr) {
    hf_save_options options = NoOptions();
    options.streams = streams_.data();
    options.stream_count = streams_.size();
    options.pointers = pointers;
    return job_->Save(step, options);
  }
  Error Wait(int32_t group = HF_ALL_GROUPS, int64_t patience_ns = kPatienceNs) {
    return job_->WaitCaptured(group, Deadline::After(patience_ns));
  }
  uint32_t SlotOf(uint64_t step) {
    uint32_t slot = 0;
    while (agent_.shared().slots[slot].step.load() != step) ++slot;
    return slot;
  }
  // Device, host, or either, and of all devices that there are.
  auto RandomPlaces(int kind) {
    return [this, kind](size_t) {
      const int device = static_cast<int>(random_() % static_cast<uint32_t>(devices_->count()));
      if (kind == 0) return 0;
      return kind == 1 && random_() % 2 == 0 ? PlacedBuffers::kHost : device;
    };
  }

  TestAgent agent_;
  HostSourceReader host_;
  std::unique_ptr<Job> job_;
};

TEST_F(DeviceCaptureTest, ImagesOfRandomPlansEqualTheOracle) {
  SCOPED_TRACE("seed " + std::to_string(seed_));
  for (int round = 0; round < 24; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    Open(1 + random_() % 4, static_cast<CheckSource>(random_() % 3));
    TestBuffers buffers = RandomBuffers(random_, 1 + random_() % 20, 20'000);
    const PlacedBuffers placed(*devices_, buffers, RandomPlaces(round % 3));
    const TestPlan plan = RandomPlan(random_, buffers, uint64_t{256} << (random_() % 8));
    Register(placed, plan);
    for (uint32_t slot = 0; slot < 2; ++slot) {
      ASSERT_TRUE(Save(100 + slot).ok());
      const Error waited = Wait();
      ASSERT_TRUE(waited.ok()) << waited.text();
      ASSERT_EQ(agent_.shared().slots[slot].state.load(), SlotState::kCaptured);
      EXPECT_EQ(agent_.shared().slots[slot].blocks_done.load(), plan.block_count);
      ASSERT_EQ(FirstDifference(agent_.Image(slot), OracleImage(plan, buffers)), -1);
    }
    job_.reset();
  }
}

// One buffer of `bytes` per group, straight to the image, on device 0.
TestPlan StraightPlan(TestBuffers& buffers, const std::vector<uint32_t>& groups, uint64_t bytes,
                      uint64_t block_bytes, std::mt19937& random) {
  TestPlan plan;
  plan.block_bytes = block_bytes;
  for (size_t i = 0; i < groups.size(); ++i) {
    buffers.Add("b" + std::to_string(i), bytes, groups[i], random);
    plan.ops.push_back({i * bytes, 0, bytes, 1, bytes, static_cast<uint32_t>(i), groups[i]});
  }
  plan.block_count = static_cast<uint32_t>((groups.size() * bytes + block_bytes - 1) / block_bytes);
  return plan;
}

int OnDevice(size_t) { return 0; }

TEST_F(DeviceCaptureTest, TheImageIsTheStateBehindTheWorkOnTheStream) {
  Open(2, CheckSource::kAll);
  TestBuffers buffers;
  const TestPlan plan = StraightPlan(buffers, {0, 1}, 100'000, 8192, random_);
  const PlacedBuffers placed(*devices_, buffers, OnDevice);
  Register(placed, plan);
  // The stream stands still, with a change of every tensor before the save and one behind it.
  devices_->Hold(0, stream_);
  for (size_t i = 0; i < 2; ++i) {
    devices_->Set(0, stream_, placed.data(i), std::byte{1}, buffers.data(i).size());
  }
  ASSERT_TRUE(Save(1).ok());
  EXPECT_EQ(job_->WaitCaptured(0, Deadline::After(kNsPerMs)).code(), HF_DEADLINE_EXCEEDED);
  // Nothing was in flight.
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kVoid);
  ASSERT_TRUE(Save(2).ok());
  devices_->Release();
  ASSERT_TRUE(Wait().ok());
  for (size_t i = 0; i < 2; ++i) {
    devices_->Set(0, stream_, placed.data(i), std::byte{2}, buffers.data(i).size());
    std::fill(buffers.data(i).begin(), buffers.data(i).end(), std::byte{1});
  }
  devices_->Synchronize(0, stream_);
  EXPECT_EQ(FirstDifference(agent_.Image(1), OracleImage(plan, buffers)), -1);
  EXPECT_EQ(agent_.shared().slots[1].state.load(), SlotState::kCaptured);
}

// Several devices, and several contexts of one, in one registration.
TEST_F(DeviceCaptureTest, EveryContextIsCapturedBehindItsOwnStream) {
  constexpr uint64_t kBytes = 50'000;
  const int contexts = devices_->count();
  ASSERT_GE(contexts, devices_->fake() != nullptr ? 3 : 2);
  Open(2, CheckSource::kAll);
  TestBuffers buffers;
  const std::vector<uint32_t> groups(static_cast<size_t>(contexts) + 1);
  const TestPlan plan = StraightPlan(buffers, groups, kBytes, 4096, random_);
  // The first in host memory, then one of each context.
  const PlacedBuffers placed(*devices_, buffers, [](size_t i) { return static_cast<int>(i) - 1; });
  Register(placed, plan);
  std::vector<CuStream> streams;
  for (int context = 0; context < contexts; ++context) {
    streams.push_back(devices_->MakeStream(context));
  }
  // In whatever order.
  streams_.assign(streams.rbegin(), streams.rend());
  uint64_t step = 0;
  for (int held = 0; held < contexts; ++held) {
    SCOPED_TRACE("context " + std::to_string(held) + " stands still");
    const auto value = static_cast<std::byte>(held + 1);
    devices_->Hold(held, streams[held]);
    for (int context = 0; context < contexts; ++context) {
      const size_t buffer = static_cast<size_t>(context) + 1;
      devices_->Set(context, streams[context], placed.data(buffer), value, kBytes);
      std::fill(buffers.data(buffer).begin(), buffers.data(buffer).end(), value);
    }
    ASSERT_TRUE(Save(++step).ok());
    EXPECT_EQ(Wait(HF_ALL_GROUPS, kNsPerMs).code(), HF_DEADLINE_EXCEEDED);
    EXPECT_EQ(agent_.shared().slots[SlotOf(step)].state.load(), SlotState::kVoid);
    agent_.Grant(SlotOf(step));
    ASSERT_TRUE(Save(++step).ok());
    devices_->Release();
    const Error waited = Wait();
    ASSERT_TRUE(waited.ok()) << waited.text();
    EXPECT_EQ(FirstDifference(agent_.Image(SlotOf(step)), OracleImage(plan, buffers)), -1);
    hf_save_report report = {};
    ASSERT_TRUE(job_->Report(step, &report).ok());
    EXPECT_EQ(report.device_bytes, static_cast<uint64_t>(contexts) * kBytes);
    agent_.Grant(SlotOf(step));
  }
  job_.reset();
  for (int context = 0; context < contexts; ++context) {
    devices_->DestroyStream(context, streams[context]);
  }
}

TEST_F(DeviceCaptureTest, WithoutAStreamTheDefaultStreamIsMeant) {
  Open();
  TestBuffers buffers;
  const TestPlan plan = StraightPlan(buffers, {0}, 50'000, 4096, random_);
  const PlacedBuffers placed(*devices_, buffers, OnDevice);
  Register(placed, plan);
  devices_->Hold(0, nullptr);
  devices_->Set(0, nullptr, placed.data(0), std::byte{7}, 50'000);
  ASSERT_TRUE(job_->Save(1, NoOptions()).ok());
  devices_->Release();
  ASSERT_TRUE(Wait().ok());
  std::fill(buffers.data(0).begin(), buffers.data(0).end(), std::byte{7});
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan, buffers)), -1);
}

TEST_F(DeviceCaptureTest, MemoryOfEveryKindIsRecognisedFromAnyThread) {
  for (const Kind kind : {Kind::kPlain, Kind::kPool, Kind::kManaged, Kind::kVirtual}) {
    // A thread in which no context is current.
    std::thread([&] { Open(1, CheckSource::kAll); }).join();
    TestBuffers buffers;
    const TestPlan plan = StraightPlan(buffers, {0, 3}, 30'000, 4096, random_);
    const PlacedBuffers placed(*devices_, buffers, OnDevice, kind);
    std::thread([&] {
      Register(placed, plan);
      ASSERT_TRUE(Save(1).ok());
      const Error waited = Wait();
      ASSERT_TRUE(waited.ok()) << waited.text();
    }).join();
    EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan, buffers)), -1);
    hf_save_report report = {};
    ASSERT_TRUE(job_->Report(1, &report).ok());
    EXPECT_EQ(report.device_bytes, 60'000u);
    EXPECT_EQ(report.unpinned_bytes, 0u);
    EXPECT_GT(report.gate_ns, 0);
    EXPECT_GT(report.device_ns, 0);
    EXPECT_GE(report.capture_ns, report.gate_ns + report.device_ns);
    job_.reset();
  }
}

TEST_F(DeviceCaptureTest, AGroupThatMayChangeIsNotComparedAnyMore) {
  Open(1, CheckSource::kAll);
  TestBuffers buffers;
  const TestPlan plan = StraightPlan(buffers, {0, 1}, 200'000, 4096, random_);
  const PlacedBuffers placed(*devices_, buffers, OnDevice);
  Register(placed, plan);
  for (uint64_t step = 1; step <= 20; ++step) {
    for (size_t i = 0; i < 2; ++i) {
      std::fill(buffers.data(i).begin(), buffers.data(i).end(), static_cast<std::byte>(step));
      devices_->Set(0, stream_, placed.data(i), static_cast<std::byte>(step), 200'000);
    }
    ASSERT_TRUE(Save(step).ok());
    ASSERT_TRUE(Wait(0).ok());
    devices_->Set(0, stream_, placed.data(0), std::byte{99}, 200'000);
    const Error waited = Wait(1);
    ASSERT_TRUE(waited.ok()) << waited.text();
    const uint32_t slot = SlotOf(step);
    ASSERT_EQ(FirstDifference(agent_.Image(slot), OracleImage(plan, buffers)), -1);
    agent_.Grant(slot);
  }
}

TEST_F(DeviceCaptureTest, AnUpdateUnderCaptureVoidsTheImageByName) {
  if (devices_->fake() != nullptr) devices_->fake()->SetCopyRate(uint64_t{100} << 20);
  const bool is_fake = devices_->fake() != nullptr;
  Open(1, CheckSource::kAll);
  // On a real device large enough that an update meets the capture.
  const uint64_t bytes = is_fake ? uint64_t{4} << 20 : uint64_t{512} << 20;
  TestBuffers buffers;
  TestPlan plan;
  plan.block_bytes = uint64_t{1} << 20;
  buffers.Add("weights", is_fake ? bytes : 1, 0, random_);
  void* const weights = devices_->Allocate(0, bytes);
  plan.ops.push_back({0, 0, bytes, 1, bytes, 0, 0});
  plan.block_count = static_cast<uint32_t>(bytes / plan.block_bytes);
  agent_.SetPlan([plan](const TestDocument&) { return plan; });
  const hf_buffer buffer = {"weights", weights, bytes, 0};
  streams_ = {stream_};
  ASSERT_TRUE(job_->Register("{}", {&buffer, 1}, {}, Deadline::After(kPatienceNs)).ok());
  const CuStream other = devices_->MakeStream(0);
  devices_->Set(0, stream_, weights, std::byte{1}, bytes);
  ASSERT_TRUE(Save(1).ok());
  // Two blocks are there, and the optimizer does not wait.
  ASSERT_TRUE(agent_.Await([&] {
    hf_save_report report = {};
    return job_->Report(1, &report).ok() && report.blocks_captured >= 2;
  }));
  devices_->Set(0, other, weights, std::byte{2}, bytes);
  hf_save_report report = {};
  ASSERT_TRUE(agent_.Await(
      [&] { return job_->Report(1, &report).ok() && report.state == HF_SAVE_FAILED; }));
  const Error waited = Wait();
  EXPECT_STREQ(report.error.text, waited.text());
  EXPECT_EQ(waited.code(), HF_ABORTED);
  EXPECT_NE(std::string(waited.text()).find("'weights' changed under capture"), std::string::npos)
      << waited.text();
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kVoid);
  devices_->Synchronize(0, other);
  devices_->DestroyStream(0, other);
  job_.reset();
  devices_->Free(0, weights);
}

TEST_F(DeviceCaptureTest, PointersOfTheSaveMayMoveButNotToOtherMemory) {
  Open();
  TestBuffers buffers;
  const TestPlan plan = StraightPlan(buffers, {0, 0}, 20'000, 4096, random_);
  const PlacedBuffers registered(*devices_, buffers,
                                 [](size_t i) { return i == 0 ? 0 : PlacedBuffers::kHost; });
  Register(registered, plan);
  TestBuffers moved;
  StraightPlan(moved, {0, 0}, 20'000, 4096, random_);
  const PlacedBuffers elsewhere(*devices_, moved,
                                [](size_t i) { return i == 0 ? 0 : PlacedBuffers::kHost; });
  std::vector<void*> pointers = elsewhere.pointers();
  ASSERT_TRUE(Save(1, pointers.data()).ok());
  ASSERT_TRUE(Wait().ok());
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan, moved)), -1);
  // What was in host memory is in device memory now, and the other way round.
  const char* const names[] = {"'b0'", "'b1'"};
  for (int i = 0; i < 2; ++i) {
    pointers = elsewhere.pointers();
    pointers[i] = elsewhere.data(1 - i);
    ASSERT_TRUE(Save(2 + i, pointers.data()).ok());
    const Error waited = Wait();
    EXPECT_EQ(waited.code(), HF_INVALID_ARGUMENT);
    EXPECT_NE(std::string(waited.text()).find(names[i]), std::string::npos) << waited.text();
    EXPECT_EQ(agent_.shared().slots[1].state.load(), SlotState::kVoid);
    agent_.Grant(1);
  }
  // A registration without any device memory finds out too.
  TestBuffers plain;
  const TestPlan plain_plan = StraightPlan(plain, {0}, 20'000, 4096, random_);
  const PlacedBuffers in_host(*devices_, plain, [](size_t) { return PlacedBuffers::kHost; });
  Register(in_host, plain_plan);
  void* device_pointer = registered.data(0);
  ASSERT_TRUE(Save(9, &device_pointer).ok());
  EXPECT_EQ(Wait().code(), HF_INVALID_ARGUMENT);
}

TEST_F(DeviceCaptureTest, AStreamOfAnotherContextOrInAGraphIsRefused) {
  Open();
  TestBuffers buffers;
  const TestPlan plan = StraightPlan(buffers, {0}, 20'000, 4096, random_);
  const PlacedBuffers placed(*devices_, buffers, OnDevice);
  Register(placed, plan);
  if (devices_->count() > 1) {
    const CuStream foreign = devices_->MakeStream(1);
    hf_save_options options = NoOptions();
    void* streams[] = {nullptr, foreign};
    options.streams = streams;
    options.stream_count = 2;
    const Error refused = job_->Save(1, options);
    EXPECT_EQ(refused.code(), HF_INVALID_ARGUMENT) << refused.text();
    EXPECT_NE(std::string(refused.text()).find("stream 1"), std::string::npos) << refused.text();
    EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kGranted);
    devices_->DestroyStream(1, foreign);
  }
  devices_->BeginGraph(0, stream_);
  const Error in_graph = Save(1);
  EXPECT_EQ(in_graph.code(), HF_FAILED_PRECONDITION) << in_graph.text();
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kGranted);
  EXPECT_TRUE(devices_->EndGraph(0, stream_));
  EXPECT_TRUE(Save(1).ok());
  EXPECT_TRUE(Wait().ok());
}

// The trainer captures a CUDA graph on one thread while a capture of ours runs: neither disturbs
// the other.
TEST_F(DeviceCaptureTest, AGraphIsCapturedBesideIt) {
  Open(2, CheckSource::kAll);
  TestBuffers buffers;
  const TestPlan plan = StraightPlan(buffers, {0}, 500'000, 4096, random_);
  const PlacedBuffers placed(*devices_, buffers, OnDevice);
  Register(placed, plan);
  const CuStream graph = devices_->MakeStream(0);
  devices_->Hold(0, stream_);
  ASSERT_TRUE(Save(1).ok());
  devices_->BeginGraph(0, graph);
  devices_->Release();
  const Error waited = Wait();
  EXPECT_TRUE(waited.ok()) << waited.text();
  EXPECT_TRUE(devices_->EndGraph(0, graph));
  devices_->DestroyStream(0, graph);
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan, buffers)), -1);
}

// Tensors that lie side by side in different allocations are not joined, and one that lies in
// several (mappings of virtual memory) is cut.
TEST_F(DeviceCaptureTest, NoCopyLeavesAnAllocation) {
  SideBySide memory(*devices_);
  if (memory.data() == nullptr) GTEST_SKIP() << "the driver gave no allocations side by side";
  const uint64_t each = memory.bytes_each();
  // Ends of the tensors, in quarters of an allocation: two in the first, of which the second ends
  // with it; one that fills the next; one over three; the rest, every other half of a quarter.
  const std::vector<uint64_t> ends = {2, 4, 8, 19, 24};
  for (const uint64_t block_bytes : {8 * each, each, each / 8}) {
    SCOPED_TRACE("block_bytes " + std::to_string(block_bytes));
    Open(2, CheckSource::kAll);
    TestBuffers buffers;
    TestPlan plan;
    plan.block_bytes = block_bytes;
    std::vector<std::byte> all;
    uint64_t begin = 0;
    for (uint32_t i = 0; i < ends.size(); ++i) {
      const uint64_t bytes = ends[i] * each / 4 - begin;
      buffers.Add("t" + std::to_string(i), bytes, 0, random_);
      all.insert(all.end(), buffers.data(i).begin(), buffers.data(i).end());
      const bool is_last = i + 1 == ends.size();
      const uint64_t run_bytes = is_last ? each / 8 : bytes;
      plan.ops.push_back(
          {begin, 0, run_bytes, is_last ? bytes / run_bytes / 2 : 1, 2 * run_bytes, i, 0});
      begin += bytes;
    }
    plan.block_count = static_cast<uint32_t>((begin + block_bytes - 1) / block_bytes);
    memory.Write(all.data());
    std::vector<hf_buffer> list = buffers.List();
    for (uint32_t i = 0; i < list.size(); ++i) {
      list[i].data = memory.data() + plan.ops[i].image_offset;
    }
    agent_.SetPlan([plan](const TestDocument&) { return plan; });
    const Error registered = job_->Register("{}", list, {}, Deadline::After(kPatienceNs));
    ASSERT_TRUE(registered.ok()) << registered.text();
    streams_ = {stream_};
    ASSERT_TRUE(Save(1).ok());
    const Error waited = Wait();
    ASSERT_TRUE(waited.ok()) << waited.text();
    EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan, buffers)), -1);
    job_.reset();
  }
}

TEST_F(DeviceCaptureTest, SavesAndCancellationsInAnyOrderNeverMixImages) {
  SCOPED_TRACE("seed " + std::to_string(seed_));
  Open(3);
  TestBuffers buffers;
  const TestPlan plan = StraightPlan(buffers, {0, 1, 2}, 300'000, 4096, random_);
  // Another context, whose work is on its default stream.
  const int other = devices_->count() - 1;
  const PlacedBuffers placed(*devices_, buffers, [&](size_t i) {
    return i == 0 ? 0 : i == 1 ? PlacedBuffers::kHost : other;
  });
  Register(placed, plan);
  int captured = 0;
  for (uint64_t step = 1; step <= 150; ++step) {
    for (size_t i = 0; i < buffers.count(); ++i) {
      std::fill(buffers.data(i).begin(), buffers.data(i).end(), static_cast<std::byte>(step));
      if (i == 1) continue;
      devices_->Set(placed.place(i), i == 0 ? stream_ : nullptr, placed.data(i),
                    static_cast<std::byte>(step), 300'000);
    }
    ASSERT_TRUE(Save(step).ok());
    const uint32_t patience = random_() % 3;
    const Error waited =
        job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(patience == 0   ? kPatienceNs
                                                          : patience == 1 ? 0
                                                                          : 300'000));
    const uint32_t slot = SlotOf(step);
    if (waited.ok()) {
      ++captured;
      ASSERT_EQ(agent_.shared().slots[slot].state.load(), SlotState::kCaptured);
      ASSERT_EQ(FirstDifference(agent_.Image(slot), OracleImage(plan, buffers)), -1);
    } else {
      ASSERT_EQ(waited.code(), HF_DEADLINE_EXCEEDED) << waited.text();
      ASSERT_EQ(agent_.shared().slots[slot].state.load(), SlotState::kVoid);
    }
    agent_.Grant(slot);
  }
  EXPECT_GT(captured, 30);
}

TEST_F(DeviceCaptureTest, CopiesAreNotFasterThanThePacerAllows) {
  Settings settings = TestSettings(agent_);
  settings.device_bytes_per_second_max = uint64_t{20} << 20;
  Result<std::unique_ptr<Job>> job = OpenTestJob(settings, &host_);
  ASSERT_TRUE(job.ok()) << job.error().text();
  job_ = std::move(job.value());
  TestBuffers buffers;
  const TestPlan plan = StraightPlan(buffers, {0}, uint64_t{2} << 20, uint64_t{1} << 18, random_);
  const PlacedBuffers placed(*devices_, buffers, OnDevice);
  Register(placed, plan);
  ASSERT_TRUE(Save(1).ok());
  ASSERT_TRUE(Wait().ok());
  hf_save_report report = {};
  ASSERT_TRUE(job_->Report(1, &report).ok());
  EXPECT_EQ(report.device_bytes, uint64_t{2} << 20);
  // Seven of eight blocks were waited for: 1.75 MiB.
  EXPECT_GE(report.device_ns, kNsPerSecond * 175 / 2000);
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan, buffers)), -1);
}

// ---- What is asked of the driver: the fake one's record

class DeviceCallsTest : public DeviceCaptureTest {
 protected:
  void SetUp() override {
    DeviceCaptureTest::SetUp();
    if (!IsSkipped() && devices_->fake() == nullptr) {
      GTEST_SKIP() << "a real driver does not say what it was asked";
    }
  }
  std::vector<FakeCuda::Call> Calls(const std::string& name) {
    std::vector<FakeCuda::Call> found;
    for (const FakeCuda::Call& call : devices_->fake()->calls()) {
      if (call.name == name) found.push_back(call);
    }
    return found;
  }
};

TEST_F(DeviceCallsTest, TheTrainersThreadAsksAFewThingsAndNeverWaits) {
  Open(1, CheckSource::kAll);
  TestBuffers buffers;
  TestPlan plan;
  plan.block_bytes = 65536;
  constexpr uint32_t kCount = 2000;
  for (uint32_t i = 0; i < kCount; ++i) {
    buffers.Add("t" + std::to_string(i), 100, 0, random_);
    plan.ops.push_back({i * 100, 0, 100, 1, 0, i, 0});
  }
  plan.block_count = kCount * 100 / 65536 + 1;
  // They lie side by side, as in a flat buffer.
  const std::byte* const flat = static_cast<const std::byte*>(devices_->Allocate(0, kCount * 100));
  std::vector<hf_buffer> list = buffers.List();
  for (uint32_t i = 0; i < kCount; ++i) {
    list[i].data = const_cast<std::byte*>(flat) + i * 100;
    devices_->Write(0, list[i].data, buffers.data(i).data(), 100);
  }
  agent_.SetPlan([plan](const TestDocument&) { return plan; });
  ASSERT_TRUE(job_->Register("{}", list, {}, Deadline::After(kPatienceNs)).ok());
  devices_->fake()->Reset(seed_);
  const std::thread::id trainer = std::this_thread::get_id();
  streams_ = {stream_};
  ASSERT_TRUE(Save(1).ok());
  ASSERT_TRUE(Wait().ok());
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan, buffers)), -1);
  std::vector<std::string> asked;
  for (const FakeCuda::Call& call : devices_->fake()->calls()) {
    if (call.thread == trainer) asked.push_back(call.name);
  }
  const std::vector<std::string> expected = {"cuStreamGetCtx", "cuCtxPushCurrent_v2",
                                             "cuStreamIsCapturing", "cuEventRecord",
                                             "cuCtxPopCurrent_v2"};
  EXPECT_EQ(asked, expected);
  for (const char* waits : {"cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize"}) {
    EXPECT_TRUE(Calls(waits).empty()) << waits;
  }
  // One copy per block, of the capture, and one per tensor and block, of the comparison of all.
  size_t captured = 0;
  for (const FakeCuda::Call& call : Calls("cuMemcpyDtoHAsync_v2")) captured += call.bytes > 100;
  EXPECT_EQ(captured, plan.block_count);
  job_.reset();
  devices_->Free(0, const_cast<std::byte*>(flat));
}

TEST_F(DeviceCallsTest, CopiesComeBehindTheSavesEventOnAStreamOfLowestPriority) {
  devices_->fake()->Reset(seed_);
  Open(2);
  TestBuffers buffers;
  const TestPlan plan = StraightPlan(buffers, {0}, 100'000, 4096, random_);
  const PlacedBuffers placed(*devices_, buffers, OnDevice);
  Register(placed, plan);
  const std::vector<FakeCuda::Call> made = Calls("cuStreamCreateWithPriority");
  ASSERT_EQ(made.size(), 1u);
  EXPECT_EQ(made[0].priority, 0);  // the fake's range is 0 (lowest) to -5
  devices_->Hold(0, stream_);
  ASSERT_TRUE(Save(1).ok());
  // The copiers look at the event, again and again, and copy nothing.
  ASSERT_TRUE(agent_.Await([&] { return Calls("cuEventQuery").size() > 20; }));
  EXPECT_TRUE(Calls("cuMemcpyDtoHAsync_v2").empty());
  devices_->Release();
  ASSERT_TRUE(Wait().ok());
  const std::vector<FakeCuda::Call> copies = Calls("cuMemcpyDtoHAsync_v2");
  ASSERT_EQ(copies.size(), plan.block_count);
  const std::thread::id trainer = std::this_thread::get_id();
  for (const FakeCuda::Call& copy : copies) {
    EXPECT_NE(copy.stream, stream_);
    EXPECT_EQ(copy.stream, copies[0].stream);
    EXPECT_NE(copy.thread, trainer);
  }
  EXPECT_EQ(Calls("cuEventRecord")[0].stream, stream_);
}

TEST_F(DeviceCallsTest, WhereTheDriverDoesNotSayWhatWasAllocatedNothingIsJoined) {
  devices_->fake()->Reset(seed_);
  Open();
  TestBuffers buffers;
  TestPlan plan = StraightPlan(buffers, {0, 0, 0, 0}, 4096, 32768, random_);
  const PlacedBuffers placed(*devices_, buffers, OnDevice);
  ASSERT_EQ(placed.data(1), static_cast<std::byte*>(placed.data(0)) + 4096);
  Register(placed, plan);
  devices_->fake()->Fail("cuPointerGetAttributes", 0, 1, true);
  ASSERT_TRUE(Save(1).ok());
  const Error waited = Wait();
  ASSERT_TRUE(waited.ok()) << waited.text();
  EXPECT_EQ(Calls("cuMemcpyDtoHAsync_v2").size(), 4u);
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan, buffers)), -1);
}

TEST_F(DeviceCallsTest, EverythingIsGivenBack) {
  const FakeCuda::Live before = devices_->fake()->live();
  {
    TestBuffers buffers;
    const TestPlan plan = StraightPlan(buffers, {0, 1}, 100'000, 4096, random_);
    const PlacedBuffers placed(*devices_, buffers, RandomPlaces(2));
    Open(2, CheckSource::kSample);
    for (int round = 0; round < 3; ++round) {
      Register(placed, plan);
      ASSERT_TRUE(Save(static_cast<uint64_t>(round) + 1).ok());
      ASSERT_TRUE(Wait().ok());
    }
    // Of the registrations before nothing is left.
    EXPECT_EQ(devices_->fake()->live().registered - before.registered, 1);
    EXPECT_LE(devices_->fake()->live().streams - before.streams, devices_->count());
    job_.reset();
  }
  EXPECT_EQ(devices_->fake()->live(), before);
}

TEST_F(DeviceCallsTest, ARefusedRegistrationOfMemoryMakesItSlowerAndIsReported) {
  devices_->fake()->Fail("cuMemHostRegister_v2", 0, 2, true);
  Open(2, CheckSource::kAll);
  TestBuffers buffers;
  const TestPlan plan = StraightPlan(buffers, {0}, 100'000, 4096, random_);
  const PlacedBuffers placed(*devices_, buffers, OnDevice);
  Register(placed, plan);
  ASSERT_TRUE(Save(1).ok());
  ASSERT_TRUE(Wait().ok());
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan, buffers)), -1);
  hf_save_report report = {};
  ASSERT_TRUE(job_->Report(1, &report).ok());
  EXPECT_EQ(report.device_bytes, 100'000u);
  EXPECT_EQ(report.unpinned_bytes, 100'000u);
}

}  // namespace
}  // namespace holdfast::hook
