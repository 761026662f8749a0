// Restore to device memory: what the agent delivers reaches it, behind whatever the caller's stream
// was still doing to it.
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "hook/device_testing.h"
#include "hook/device_uploads.h"
#include "hook/test_agent.h"
#include "hook/test_job.h"
#include "hook/test_restore.h"

namespace holdfast::hook {
namespace {

class DeviceRestoreTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    if (IsSkipped()) return;
    Result<std::unique_ptr<Job>> job = OpenTestJob(TestSettings(agent_), &reader_);
    ASSERT_TRUE(job.ok()) << job.error().text();
    job_ = std::move(job.value());
  }
  void TearDown() override {
    job_.reset();
    DeviceTest::TearDown();
  }
  void Register(const PlacedBuffers& buffers, uint32_t block_count = 64) {
    TestPlan plan;
    plan.block_count = block_count;
    agent_.SetPlan([plan](const TestDocument&) { return plan; });
    const Error error = job_->Register("{}", buffers.list(), {}, Deadline::After(kPatienceNs));
    ASSERT_TRUE(error.ok()) << error.text();
    UseStreamFor(buffers);
  }
  Error Restore(int64_t patience_ns = kPatienceNs) {
    hf_restore_options options = {};
    options.struct_bytes = sizeof(options);
    options.streams = streams_.data();
    options.stream_count = streams_.size();
    return job_->Restore(options, &result_, Deadline::After(patience_ns));
  }

  TestAgent agent_;
  HostSourceReader reader_;
  std::unique_ptr<Job> job_;
  hf_restore_result result_ = {};
};

TEST_F(DeviceRestoreTest, RandomDeliveriesEqualTheOracleAlsoWhenTheWorkerDiesInBetween) {
  SCOPED_TRACE("seed " + std::to_string(seed_));
  for (int round = 0; round < 25; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    TestBuffers buffers = RandomBuffers(random_, 1 + random_() % 8, 3000);
    const PlacedBuffers placed(*devices_, buffers, [&](size_t) {
      return static_cast<int>(random_() % static_cast<uint32_t>(devices_->count() + 1)) - 1;
    });
    Register(placed);
    TestRestore script = RandomRestore(random_, buffers, random_() % 100, 2);
    if (round % 3 == 0 && !script.pieces.empty()) {
      script.die_after = 1 + random_() % script.pieces.size();
    }
    agent_.SetRestore(script);
    const Error restored = Restore();
    ASSERT_TRUE(restored.ok()) << restored.text();
    // Host buffers were filled in place.
    TestBuffers expected = buffers;
    Apply(script, &expected);
    for (size_t i = 0; i < buffers.count(); ++i) {
      ASSERT_EQ(FirstDifference(placed.Found(i), expected.data(i)), -1) << "buffer " << i;
    }
  }
}

// More than the ring holds, in one operation, with runs longer than a piece and shorter ones.
TEST_F(DeviceRestoreTest, WhatIsLargerThanTheRingArrivesWhole) {
  TestBuffers buffers;
  constexpr uint64_t kBytes = kUploadPieceBytes * (kUploadPieces + 3) + 12345;
  buffers.Add("large", kBytes, 0, random_);
  buffers.Add("small", 300'000, 0, random_);
  const PlacedBuffers placed(*devices_, buffers, [](size_t) { return 0; });
  Register(placed, 20'000);
  TestRestore script;
  TestRestore::Piece piece;
  piece.bytes = RandomBytes(random_, kBytes);
  piece.ops.push_back({0, 0, kBytes, 1, kBytes, kBytes, 0, 0});
  piece.ops.push_back({100, 7, 3, 100'000 - 3, 11, 3, 1, 0});
  piece.map_id = 1;
  script.map_bytes = {kBytes};
  script.pieces.push_back(piece);
  agent_.SetRestore(script);
  const Error restored = Restore();
  ASSERT_TRUE(restored.ok()) << restored.text();
  TestBuffers expected = buffers;
  Apply(script, &expected);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(FirstDifference(placed.Found(i), expected.data(i)), -1) << i;
  }
}

TEST_F(DeviceRestoreTest, ATensorInSeveralAllocationsArrivesWhole) {
  SideBySide memory(*devices_);
  if (memory.data() == nullptr) GTEST_SKIP() << "the driver gave no allocations side by side";
  const uint64_t bytes = memory.bytes();
  std::vector<std::byte> expected = RandomBytes(random_, bytes);
  memory.Write(expected.data());
  const hf_buffer buffer = {"large", memory.data(), bytes, 0};
  TestPlan plan;
  plan.block_count = static_cast<uint32_t>(bytes / plan.block_bytes + 1);
  agent_.SetPlan([plan](const TestDocument&) { return plan; });
  ASSERT_TRUE(job_->Register("{}", {&buffer, 1}, {}, Deadline::After(kPatienceNs)).ok());
  streams_ = {stream_};
  TestRestore script;
  TestRestore::Piece piece;
  piece.map_id = 1;
  piece.bytes = RandomBytes(random_, bytes);
  script.map_bytes = {bytes};
  // Over all of it, then runs with gaps, the ends of allocations among both.
  const uint64_t run_bytes = memory.bytes_each() * 3 / 8;
  piece.ops.push_back({0, 100, bytes - 100, 1, 0, 0, 0, 0});
  piece.ops.push_back({50, 0, run_bytes, 12, run_bytes, run_bytes + 10, 0, 0});
  script.pieces.push_back(piece);
  agent_.SetRestore(script);
  const Error restored = Restore();
  ASSERT_TRUE(restored.ok()) << restored.text();
  std::copy(piece.bytes.begin(), piece.bytes.end() - 100, expected.begin() + 100);
  for (uint64_t run = 0; run < 12; ++run) {
    const auto from = piece.bytes.begin() + static_cast<std::ptrdiff_t>(50 + run * run_bytes);
    std::copy(from, from + static_cast<std::ptrdiff_t>(run_bytes),
              expected.begin() + static_cast<std::ptrdiff_t>(run * (run_bytes + 10)));
  }
  EXPECT_EQ(FirstDifference(memory.Read(), expected), -1);
}

TEST_F(DeviceRestoreTest, WhatTheCallersStreamDoesToATensorIsOverwritten) {
  TestBuffers buffers;
  buffers.Add("b", 1000, 0, random_);
  const PlacedBuffers placed(*devices_, buffers, [](size_t) { return 0; });
  Register(placed);
  TestRestore script;
  TestRestore::Piece piece;
  piece.bytes = RandomBytes(random_, 1000);
  piece.ops.push_back({0, 0, 1000, 1, 0, 0, 0, 0});
  script.pieces.push_back(piece);
  agent_.SetRestore(script);
  // The tensor is still being initialised.
  devices_->Hold(0, stream_);
  devices_->Set(0, stream_, placed.data(0), std::byte{0}, 1000);
  EXPECT_EQ(Restore(50 * kNsPerMs).code(), HF_DEADLINE_EXCEEDED);
  devices_->Release();
  agent_.SetRestore(script);
  const Error restored = Restore();
  ASSERT_TRUE(restored.ok()) << restored.text();
  devices_->Synchronize(0, stream_);
  EXPECT_EQ(FirstDifference(placed.Found(0), piece.bytes), -1);
}

TEST_F(DeviceRestoreTest, AFailureOfTheDeviceIsAnErrorByName) {
  FakeCuda* const fake = devices_->fake();
  if (fake == nullptr) GTEST_SKIP() << "a real device does not fail when it is told to";
  TestBuffers buffers;
  buffers.Add("weights", 1000, 0, random_);
  auto placed = std::make_unique<PlacedBuffers>(*devices_, buffers, [](size_t) { return 0; });
  Register(*placed);
  TestRestore script;
  TestRestore::Piece piece;
  piece.bytes = RandomBytes(random_, 1000);
  piece.ops.push_back({0, 0, 1000, 1, 0, 0, 0, 0});
  script.pieces.push_back(piece);
  for (const char* call : {"cuMemcpyHtoDAsync_v2", "cuEventQuery", "cuEventRecord"}) {
    SCOPED_TRACE(call);
    fake->Fail(call, 0, 214, true);
    agent_.SetRestore(script);
    const Error failed = Restore();
    EXPECT_EQ(failed.code(), HF_INTERNAL);
    EXPECT_NE(std::string(failed.text()).find("device 0 (fake)"), std::string::npos)
        << failed.text();
    fake->Reset(1);
  }
  // Without pinned memory the way is another one.
  fake->Fail("cuMemAllocHost_v2", 0, 2, true);
  agent_.SetRestore(script);
  const Error restored = Restore();
  ASSERT_TRUE(restored.ok()) << restored.text();
  EXPECT_EQ(FirstDifference(placed->Found(0), piece.bytes), -1);
  fake->Reset(1);
  const FakeCuda::Live live = fake->live();
  job_.reset();
  EXPECT_EQ(live.host_allocations, fake->live().host_allocations);
}

}  // namespace
}  // namespace holdfast::hook
