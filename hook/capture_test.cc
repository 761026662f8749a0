// Capture against an oracle, and its edges: groups, cancellation, what is refused. All of it over
// tensors in host memory, on a device, and mixed.
#include "hook/capture.h"

#include <gtest/gtest.h>

#include <atomic>
#include <random>
#include <stop_token>
#include <thread>
#include <vector>

#include "hook/places_testing.h"

namespace holdfast::hook {
namespace {

using abi::SlotState;

class CaptureTest : public PlacesTest {};
HOLDFAST_TEST_EVERYWHERE(CaptureTest);

// One buffer of `blocks` blocks per group, straight to the image.
TestPlan StraightPlan(TestBuffers& buffers, const std::vector<uint32_t>& groups,
                      uint32_t blocks_each, std::mt19937& random) {
  TestPlan plan;
  for (size_t i = 0; i < groups.size(); ++i) {
    const uint64_t bytes = plan.block_bytes * blocks_each;
    buffers.Add("b" + std::to_string(i), bytes, groups[i], random);
    plan.ops.push_back({i * bytes, 0, bytes, 1, bytes, static_cast<uint32_t>(i), groups[i]});
  }
  plan.block_count = static_cast<uint32_t>(groups.size()) * blocks_each;
  return plan;
}

TEST_P(CaptureTest, ImagesOfRandomPlansEqualTheOracle) {
  SCOPED_TRACE("seed " + std::to_string(seed_));
  // The fake device is slower than memory.
  const int rounds = devices_ == nullptr ? 60 : 8;
  for (int round = 0; round < rounds; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    Open(1 + random_() % 4, random_() % 2 == 0 ? CheckSource::kNone : CheckSource::kAll);
    TestBuffers buffers = RandomBuffers(random_, random_() % 30, 30'000);
    const TestPlan plan = RandomPlan(random_, buffers, uint64_t{64} << (random_() % 8));
    Register(buffers, plan);
    for (uint32_t slot = 0; slot < 2; ++slot) {
      const Error saved = job_->Save(100 + slot, NoOptions());
      ASSERT_TRUE(saved.ok()) << saved.text();
      const Error waited = Wait();
      ASSERT_TRUE(waited.ok()) << waited.text();
      ASSERT_EQ(agent_.shared().slots[slot].state.load(), SlotState::kCaptured);
      EXPECT_EQ(agent_.shared().slots[slot].step.load(), 100 + slot);
      EXPECT_GT(agent_.shared().slots[slot].captured_ns.load(), 0);
      EXPECT_EQ(agent_.shared().slots[slot].blocks_done.load(), plan.block_count);
      for (uint32_t block = 0; block < plan.block_count; ++block) {
        ASSERT_TRUE(agent_.BlockDone(slot, block)) << block;
      }
      ASSERT_EQ(FirstDifference(agent_.Image(slot), OracleImage(plan, buffers)), -1);
      // The next image is another one.
      for (size_t i = 0; i < buffers.count(); ++i) {
        for (std::byte& byte : buffers.data(i)) byte ^= std::byte{1};
      }
      Upload(buffers);
    }
    job_.reset();
  }
}

TEST_P(CaptureTest, PointersOfTheSaveAreReadInsteadOfThoseRegistered) {
  Open();
  TestBuffers registered;
  const TestPlan plan = StraightPlan(registered, {0, 1}, 2, random_);
  Register(registered, plan);
  TestBuffers others;
  StraightPlan(others, {0, 1}, 2, random_);
  const std::unique_ptr<PlacedBuffers> elsewhere = Place(others);
  std::vector<void*> pointers = {others.data(0).data(), others.data(1).data()};
  if (elsewhere != nullptr) pointers = elsewhere->pointers();
  hf_save_options options = NoOptions();
  options.pointers = pointers.data();
  ASSERT_TRUE(job_->Save(1, options).ok());
  // The table was copied.
  pointers.assign(2, nullptr);
  ASSERT_TRUE(Wait().ok());
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan, others)), -1);

  options.pointers = pointers.data();
  const Error null = job_->Save(2, options);
  EXPECT_EQ(null.code(), HF_INVALID_ARGUMENT);
  EXPECT_NE(std::string(null.text()).find("'b0'"), std::string::npos) << null.text();
}

TEST_P(CaptureTest, HundredThousandBuffersOfAFewBytes) {
  Open(2);
  TestBuffers buffers;
  TestPlan plan;
  uint64_t at = 0;
  constexpr uint32_t kCount = 100'000;
  for (uint32_t i = 0; i < kCount; ++i) {
    const uint64_t bytes = i % 7;
    buffers.Add("t" + std::to_string(i), bytes, i % 64, random_);
    plan.ops.push_back({at, 0, bytes, 1, 0, i, i % 64});
    at += bytes;
  }
  plan.block_bytes = 65536;
  plan.block_count = static_cast<uint32_t>(at / plan.block_bytes + 1);
  Register(buffers, plan, {}, Packing::kFlat);
  ASSERT_TRUE(job_->Save(1, NoOptions()).ok());
  for (int32_t group = 0; group < 64; ++group) {
    ASSERT_TRUE(job_->WaitCaptured(group, Deadline::After(kPatienceNs)).ok());
  }
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCaptured);
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan, buffers)), -1);
}

TEST_P(CaptureTest, NothingToCaptureIsCapturedAtOnce) {
  Open(1, CheckSource::kSample);
  TestBuffers none;
  TestPlan plan;
  plan.block_count = 3;
  Register(none, plan);
  ASSERT_TRUE(job_->Save(1, NoOptions()).ok());
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCaptured);
  for (uint32_t block = 0; block < 3; ++block) EXPECT_TRUE(agent_.BlockDone(0, block));
  // No image at all, too.
  plan.block_count = 0;
  Register(none, plan);
  ASSERT_TRUE(job_->Save(2, NoOptions()).ok());
  EXPECT_TRUE(Wait().ok());
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCaptured);
}

TEST_P(CaptureTest, BlocksWithoutTensorsAreDoneAtTheSave) {
  Open();
  TestBuffers buffers;
  TestPlan plan;
  buffers.Add("b", 100, 0, random_);
  plan.block_count = 4;
  plan.ops.push_back({2 * 4096 + 50, 0, 100, 1, 0, 0, 0});
  Register(buffers, plan);
  if (!Hold()) GTEST_SKIP() << "a real device does not wait for permits";
  ASSERT_TRUE(job_->Save(1, NoOptions()).ok());
  ASSERT_TRUE(AwaitArrivals(1));
  for (const uint32_t block : {0u, 1u, 3u}) EXPECT_TRUE(agent_.BlockDone(0, block));
  EXPECT_FALSE(agent_.BlockDone(0, 2));
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCapturing);
  Permit(0, 1);
  ASSERT_TRUE(Wait().ok());
  EXPECT_TRUE(agent_.BlockDone(0, 2));
}

TEST_P(CaptureTest, GroupsAreCapturedInOrderAndCanBeWaitedForOneByOne) {
  Open();
  mixed_device_ = 0;  // the group that is captured last
  TestBuffers buffers;
  // In the image group 9 lies in front of group 3.
  const TestPlan plan = StraightPlan(buffers, {9, 3}, 2, random_);
  Register(buffers, plan);
  if (!Hold()) GTEST_SKIP() << "a real device does not wait for permits";
  ASSERT_TRUE(job_->Save(1, NoOptions()).ok());
  Permit(1, 2);
  ASSERT_TRUE(Wait(3).ok());
  EXPECT_TRUE(agent_.BlockDone(0, 2) && agent_.BlockDone(0, 3));
  EXPECT_FALSE(agent_.BlockDone(0, 0) || agent_.BlockDone(0, 1));
  // A group without tensors is done; group 3 may change now.
  EXPECT_TRUE(job_->WaitCaptured(40, Deadline::After(0)).ok());
  const std::vector<std::byte> oracle = OracleImage(plan, buffers);
  std::fill(buffers.data(1).begin(), buffers.data(1).end(), std::byte{0});
  Upload(buffers);
  EXPECT_EQ(job_->Save(2, NoOptions()).code(), HF_FAILED_PRECONDITION);
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCapturing);
  Permit(0, 2);
  ASSERT_TRUE(Wait(9).ok());
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCaptured);
  EXPECT_EQ(FirstDifference(agent_.Image(0), oracle), -1);
  for (const int32_t wrong : {-2, 64}) {
    EXPECT_EQ(job_->WaitCaptured(wrong, Deadline::After(0)).code(), HF_INVALID_ARGUMENT);
  }
}

TEST_P(CaptureTest, PastTheDeadlineTheImageIsVoidAndNothingIsReadAnyMore) {
  Open();
  // More than a device may have in flight.
  constexpr uint32_t kBlocks = kBlocksInFlightMax + 30;
  TestBuffers buffers;
  TestPlan plan = StraightPlan(buffers, {0, 0}, kBlocks, random_);
  plan.granted = 1;
  Register(buffers, plan);
  // The gate opens just before the deadline passes. Should the copier be through all the same, the
  // next save tries again.
  uint64_t step = 6;
  uint64_t begun = arrived();
  Error late;
  do {
    if (!Hold()) GTEST_SKIP() << "a real device does not wait for permits";
    agent_.Grant(0);
    ASSERT_TRUE(job_->Save(++step, NoOptions()).ok());
    ASSERT_TRUE(AwaitArrivals(++begun));
    PermitEverywhere(2 * kBlocks);
    late = job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(0));
    begun = arrived();
  } while (late.ok());
  ASSERT_EQ(late.code(), HF_DEADLINE_EXCEEDED) << late.text();
  const abi::ImageSlot& slot = agent_.shared().slots[0];
  EXPECT_TRUE(agent_.AwaitSlot(0, SlotState::kVoid));
  EXPECT_EQ(slot.void_code.load(), HF_DEADLINE_EXCEEDED);
  EXPECT_NE(std::string(slot.void_text).find("step " + std::to_string(step)), std::string::npos)
      << slot.void_text;
  // The tensors are gone, and nobody looks at them.
  begun = arrived();
  PermitEverywhere(100);
  placed_.reset();
  buffers = TestBuffers();
  // Waiting again finds nothing to wait for, and the next capture is a good one.
  EXPECT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(0)).ok());
  EXPECT_EQ(arrived(), begun);
  LetAllThrough();
  TestBuffers next;
  plan = StraightPlan(next, {0, 0}, 4, random_);
  Register(next, plan);
  ASSERT_TRUE(job_->Save(step + 1, NoOptions()).ok());
  ASSERT_TRUE(Wait().ok());
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan, next)), -1);
  hf_save_report report = {};
  ASSERT_TRUE(job_->Report(step, &report).ok());
  EXPECT_EQ(report.state, HF_SAVE_FAILED);
  EXPECT_EQ(report.error.code, HF_DEADLINE_EXCEEDED);
}

TEST_P(CaptureTest, SavesAndCancellationsInAnyOrderNeverMixImages) {
  SCOPED_TRACE("seed " + std::to_string(seed_));
  Open(4);
  TestBuffers buffers;
  const TestPlan plan = StraightPlan(buffers, {0, 1, 2}, 6, random_);
  Register(buffers, plan);
  const uint64_t steps = devices_ == nullptr ? 400 : 100;
  uint64_t captured = 0;
  for (uint64_t step = 1; step <= steps; ++step) {
    for (size_t i = 0; i < buffers.count(); ++i) {
      std::fill(buffers.data(i).begin(), buffers.data(i).end(), static_cast<std::byte>(step));
    }
    Upload(buffers);
    ASSERT_TRUE(job_->Save(step, NoOptions()).ok());
    const bool patient = random_() % 2 == 0;
    const Error waited =
        job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(patient ? kPatienceNs : 0));
    uint32_t slot = 0;
    while (agent_.shared().slots[slot].step.load() != step) ++slot;
    if (waited.ok()) {
      ++captured;
      ASSERT_EQ(agent_.shared().slots[slot].state.load(), SlotState::kCaptured);
      ASSERT_EQ(FirstDifference(agent_.Image(slot), OracleImage(plan, buffers)), -1);
    } else {
      ASSERT_FALSE(patient) << waited.text();
      // What a device had in flight may end a moment later.
      ASSERT_TRUE(agent_.AwaitSlot(slot, SlotState::kVoid));
    }
    agent_.Grant(slot);
  }
  EXPECT_GT(captured, steps / 4);
}

TEST_P(CaptureTest, WithoutAGrantedSlotASaveFailsAtOnceOrWaits) {
  Open();
  TestBuffers buffers;
  TestPlan plan = StraightPlan(buffers, {0}, 2, random_);
  plan.granted = 0;
  Register(buffers, plan);
  EXPECT_EQ(job_->Save(1, NoOptions()).code(), HF_RESOURCE_EXHAUSTED);
  hf_save_options patient = NoOptions();
  patient.wait_ns = 1;
  EXPECT_EQ(job_->Save(1, patient).code(), HF_RESOURCE_EXHAUSTED);
  // A failed save leaves no trace: the same step can be saved.
  agent_.Grant(1);
  patient.wait_ns = kPatienceNs;
  ASSERT_TRUE(job_->Save(1, patient).ok());
  ASSERT_TRUE(Wait().ok());
  EXPECT_EQ(agent_.shared().slots[1].state.load(), SlotState::kCaptured);
  // A grant wakes the save that sleeps.
  std::thread granter([&] { agent_.Grant(0); });
  EXPECT_TRUE(job_->Save(2, patient).ok());
  granter.join();
  // The buffers end before the job.
  EXPECT_TRUE(Wait().ok());
}

// The agent may take a grant back at any moment, and give it again: a save has the slot for itself
// from its first blob on, or fails.
TEST_P(CaptureTest, AGrantThatIsTakenBackIsNeverSavedInto) {
  Open();
  TestBuffers buffers;
  TestPlan plan = StraightPlan(buffers, {0}, 1, random_);
  // A blob that takes a while to be copied: long enough for a grant to be taken back meanwhile.
  constexpr uint64_t kBlobBytes = uint64_t{2} << 20;
  plan.block_count = 1 + static_cast<uint32_t>(kBlobBytes / plan.block_bytes);
  plan.slot_count = 1;
  plan.granted = 1;
  plan.blobs = {{plan.block_bytes, kBlobBytes}};
  Register(buffers, plan, {{"rng", HF_BLOB_RANK, kBlobBytes}});
  std::atomic<SlotState>& state = agent_.shared().slots[0].state;
  std::atomic<int> taken_back{0};
  std::jthread taker([&](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      SlotState granted = SlotState::kGranted;
      if (!state.compare_exchange_strong(granted, SlotState::kEmpty)) continue;
      ++taken_back;
      // As PublishGrant does.
      agent_.shared().slots[0].step.store(abi::kNoStep);
      agent_.Grant(0);
    }
  });
  const uint64_t steps = devices_ == nullptr ? 200 : 20;
  for (uint64_t step = 1; step <= steps; ++step) {
    const std::string bytes(kBlobBytes, static_cast<char>('a' + step % 26));
    const hf_blob blob = {"rng", bytes.data(), bytes.size()};
    hf_save_options options = NoOptions();
    options.blobs = &blob;
    options.blob_count = 1;
    options.wait_ns = kPatienceNs;
    // The other thread is at it now.
    const int before = taken_back.load();
    while (taken_back.load() == before) std::this_thread::yield();
    const Error error = job_->Save(step, options);
    ASSERT_TRUE(error.ok()) << error.text();
    ASSERT_TRUE(Wait().ok());
    ASSERT_EQ(state.load(), SlotState::kCaptured);
    ASSERT_EQ(agent_.shared().slots[0].step.load(), step);
    ASSERT_EQ(agent_.BlobBytes(0, 0), bytes.size());
    const std::vector<std::byte> image = agent_.Image(0);
    ASSERT_EQ(std::memcmp(image.data() + plan.block_bytes, bytes.data(), bytes.size()), 0);
    agent_.Grant(0);
  }
  taker.request_stop();
  taker.join();
  EXPECT_GE(static_cast<uint64_t>(taken_back.load()), steps);
}

TEST_P(CaptureTest, TheAgentKnowsWhatMustBeComparedBeforeItIsCommitted) {
  for (const CheckSource check : {CheckSource::kNone, CheckSource::kSample, CheckSource::kAll}) {
    Open(1, check);
    TestBuffers buffers;
    Register(buffers, StraightPlan(buffers, {0}, 2, random_));
    agent_.shared().slots[0].must_compare.store(7);
    ASSERT_TRUE(job_->Save(1, NoOptions()).ok());
    EXPECT_EQ(agent_.shared().slots[0].must_compare.load(), check == CheckSource::kAll ? 1u : 0u);
    EXPECT_TRUE(Wait().ok());
    EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCaptured);
    job_.reset();
  }
}

TEST_P(CaptureTest, ABlockTableThatLeavesTheMemoryIsRefused) {
  Open();
  TestBuffers buffers;
  Register(buffers, StraightPlan(buffers, {0}, 2, random_));
  agent_.SetBlockIndex(0, 1, 4);
  EXPECT_EQ(job_->Save(1, NoOptions()).code(), HF_INTERNAL);
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kGranted);
}

TEST_P(CaptureTest, BlobsGoStraightToTheirAreasAcrossBlocks) {
  Open();
  TestBuffers buffers;
  TestPlan plan = StraightPlan(buffers, {0}, 1, random_);
  plan.block_count = 5;
  // "long" straddles three blocks; "other" is a global blob, which this rank (2) does not store.
  plan.blobs = {{4096 + 100, 9000}, {UINT64_MAX, 0}, {4096 * 4, 64}};
  const std::vector<hf_blob_slot> slots = {
      {"long", HF_BLOB_RANK, 9000}, {"other", HF_BLOB_GLOBAL, 10}, {"third", HF_BLOB_RANK, 64}};
  Register(buffers, plan, slots);
  std::vector<std::byte> bytes(8999);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random_());
  const std::vector<hf_blob> blobs = {{"other", "global", 6}, {"long", bytes.data(), bytes.size()}};
  hf_save_options options = NoOptions();
  options.blobs = blobs.data();
  options.blob_count = blobs.size();
  ASSERT_TRUE(job_->Save(1, options).ok());
  ASSERT_TRUE(Wait().ok());
  EXPECT_EQ(agent_.BlobBytes(0, 0), bytes.size());
  EXPECT_EQ(agent_.BlobBytes(0, 1), UINT64_MAX);
  EXPECT_EQ(agent_.BlobBytes(0, 2), UINT64_MAX);
  std::vector<std::byte> oracle = OracleImage(plan, buffers);
  std::copy(bytes.begin(), bytes.end(), oracle.begin() + 4096 + 100);
  EXPECT_EQ(FirstDifference(agent_.Image(0), oracle), -1);
}

TEST_P(CaptureTest, WrongBlobsAreNamed) {
  Open();
  TestBuffers none;
  TestPlan plan;
  plan.block_count = 1;
  plan.blobs = {{0, 16}};
  Register(none, plan, {{"rng", HF_BLOB_RANK, 16}});
  const auto save = [&](std::vector<hf_blob> blobs) {
    hf_save_options options = NoOptions();
    options.blobs = blobs.data();
    options.blob_count = blobs.size();
    return job_->Save(1, options);
  };
  for (const std::vector<hf_blob>& wrong :
       std::vector<std::vector<hf_blob>>{{{"nonsense", "x", 1}},
                                         {{"rng", "0123456789abcdefg", 17}},
                                         {{"rng", nullptr, 1}},
                                         {{"rng", "x", 1}, {"rng", "y", 1}},
                                         {{nullptr, "x", 1}}}) {
    const Error error = save(wrong);
    EXPECT_EQ(error.code(), HF_INVALID_ARGUMENT);
    EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kGranted);
    if (wrong[0].name != nullptr) {
      EXPECT_NE(std::string(error.text()).find(wrong[0].name), std::string::npos) << error.text();
    }
  }
  EXPECT_TRUE(save({{"rng", "0123456789abcdef", 16}}).ok());
  EXPECT_EQ(agent_.BlobBytes(0, 0), 16u);
}

TEST_P(CaptureTest, AStepIsSavedOnceAlsoIfItFailed) {
  Open();
  TestBuffers buffers;
  Register(buffers, StraightPlan(buffers, {0}, 1, random_));
  ASSERT_TRUE(job_->Save(5, NoOptions()).ok());
  ASSERT_TRUE(Wait().ok());
  EXPECT_EQ(job_->Save(5, NoOptions()).code(), HF_ALREADY_EXISTS);
  agent_.Report(5, HF_SAVE_COMMITTED_POWER);
  EXPECT_EQ(job_->Save(5, NoOptions()).code(), HF_ALREADY_EXISTS);
  agent_.Report(6, HF_SAVE_CAPTURED);
  EXPECT_EQ(job_->Save(6, NoOptions()).code(), HF_ALREADY_EXISTS);
  agent_.Report(5, HF_SAVE_FAILED, HF_RESOURCE_EXHAUSTED, "disk full");
  EXPECT_EQ(job_->Save(5, NoOptions()).code(), HF_ALREADY_EXISTS);
  EXPECT_TRUE(job_->Save(7, NoOptions()).ok());
  EXPECT_EQ(job_->Save(abi::kNoStep, NoOptions()).code(), HF_FAILED_PRECONDITION);
  ASSERT_TRUE(Wait().ok());
  EXPECT_EQ(job_->Save(abi::kNoStep, NoOptions()).code(), HF_INVALID_ARGUMENT);
}

TEST_P(CaptureTest, AJobThatClosesDuringACaptureFinishesIt) {
  Open();
  TestBuffers buffers;
  const TestPlan plan = StraightPlan(buffers, {0, 0}, 1, random_);
  Register(buffers, plan);
  if (!Hold()) GTEST_SKIP() << "a real device does not wait for permits";
  ASSERT_TRUE(job_->Save(1, NoOptions()).ok());
  ASSERT_TRUE(AwaitArrivals(1));
  PermitEverywhere(2);
  job_.reset();
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCaptured);
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan, buffers)), -1);
  EXPECT_TRUE(agent_.AwaitMessages(abi::MessageType::kClose, 1));
}

// Two buffers, of one block and of two.
TestPlan ThreeBlocks(TestBuffers& buffers, uint64_t block_bytes, std::mt19937& random) {
  TestPlan plan;
  plan.block_bytes = block_bytes;
  buffers.Add("one", block_bytes, 0, random);
  buffers.Add("two", 2 * block_bytes, 0, random);
  plan.ops.push_back({0, 0, block_bytes, 1, 0, 0, 0});
  plan.ops.push_back({block_bytes, 0, 2 * block_bytes, 1, 0, 1, 0});
  plan.block_count = 3;
  return plan;
}

TEST_P(CaptureTest, TheDoorbellRingsWithEveryMebibyteAndAtTheEnd) {
  Open();
  TestBuffers buffers;
  Register(buffers, ThreeBlocks(buffers, kDoorbellBytes, random_));
  if (!Hold()) GTEST_SKIP() << "a real device does not wait for permits";
  const auto rings_come = [&](int before) {
    return agent_.Await([&] { return agent_.doorbell_rings() > before; });
  };
  int before = agent_.doorbell_rings();
  ASSERT_TRUE(job_->Save(1, NoOptions()).ok());
  EXPECT_TRUE(rings_come(before));
  for (uint64_t block = 0; block < 3; ++block) {
    ASSERT_TRUE(AwaitArrivals(block + 1));
    before = agent_.doorbell_rings();
    Permit(block == 0 ? 0 : 1, 1);
    EXPECT_TRUE(rings_come(before)) << block;
  }
  ASSERT_TRUE(Wait().ok());
}

TEST_P(CaptureTest, DuringTheHeadStartTheDoorbellRingsAtTheEndOnly) {
  Open(1, CheckSource::kNone, /*head_start_ns=*/kPatienceNs);
  // Each block is more than the doorbell waits for.
  constexpr uint64_t kBlockBytes = 2 * kDoorbellBytes;
  TestBuffers buffers;
  Register(buffers, ThreeBlocks(buffers, kBlockBytes, random_));
  if (!Hold()) GTEST_SKIP() << "a real device does not wait for permits";
  const int before = agent_.doorbell_rings();
  ASSERT_TRUE(job_->Save(1, NoOptions()).ok());
  const uint64_t first = Pieces(0, 1, kBlockBytes);
  const uint64_t second = Pieces(1, 1, kBlockBytes);
  Permit(0, first);
  Permit(1, second);
  ASSERT_TRUE(AwaitArrivals(first + second + 1));
  EXPECT_TRUE(agent_.BlockDone(0, 0) && agent_.BlockDone(0, 1));
  EXPECT_EQ(agent_.doorbell_rings(), before);
  Permit(1, second);
  ASSERT_TRUE(Wait().ok());
  EXPECT_TRUE(agent_.Await([&] { return agent_.doorbell_rings() > before; }));
}

}  // namespace
}  // namespace holdfast::hook
