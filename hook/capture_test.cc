// Capture against an oracle, and its edges: groups, cancellation, what is refused.
#include "hook/capture.h"

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <random>
#include <stop_token>
#include <thread>
#include <vector>

#include "hook/test_agent.h"
#include "hook/test_job.h"

namespace holdfast::hook {
namespace {

using abi::SlotState;

// Reads like HostSourceReader, but only after the gate has let it.
class GatedReader final : public SourceReader {
 public:
  void Read(std::byte* target, const std::byte* source, uint64_t run_bytes, uint64_t count,
            uint64_t stride) override {
    {
      std::unique_lock lock(mutex_);
      ++arrived_;
      changed_.notify_all();
      changed_.wait(lock, [&] { return permits_ > 0; });
      --permits_;
    }
    host_.Read(target, source, run_bytes, count, stride);
  }
  Result<bool> Equal(const std::byte* copy, const std::byte* source, uint64_t run_bytes,
                     uint64_t count, uint64_t stride) override {
    return host_.Equal(copy, source, run_bytes, count, stride);
  }
  void Permit(int reads) {
    std::lock_guard lock(mutex_);
    permits_ += reads;
    changed_.notify_all();
  }
  // Takes the permits back that nobody used.
  void Close() {
    std::lock_guard lock(mutex_);
    permits_ = 0;
  }
  void AwaitArrivals(int count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return arrived_ >= count; });
  }
  int arrived() {
    std::lock_guard lock(mutex_);
    return arrived_;
  }

 private:
  HostSourceReader host_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int permits_ = 0;
  int arrived_ = 0;
};

class CaptureTest : public ::testing::Test {
 protected:
  void Open(SourceReader* reader, uint32_t threads = 1, CheckSource check = CheckSource::kNone,
            int64_t head_start_ns = 0) {
    Settings settings = TestSettings(agent_);
    settings.capture_head_start_ns = head_start_ns;
    settings.copy_threads = threads;
    settings.check_source = check;
    Result<std::unique_ptr<Job>> job = OpenTestJob(settings, reader);
    ASSERT_TRUE(job.ok()) << job.error().text();
    job_ = std::move(job.value());
  }
  void Register(TestBuffers& buffers, const TestPlan& plan,
                const std::vector<hf_blob_slot>& blobs = {}) {
    agent_.SetPlan([plan](const TestDocument&) { return plan; });
    const Error error = RegisterAll(*job_, buffers, blobs);
    ASSERT_TRUE(error.ok()) << error.text();
  }

  TestAgent agent_;
  HostSourceReader host_;
  std::unique_ptr<Job> job_;
};

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

TEST_F(CaptureTest, ImagesOfRandomPlansEqualTheOracle) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  for (int round = 0; round < 60; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    Open(&host_, 1 + random() % 4, random() % 2 == 0 ? CheckSource::kNone : CheckSource::kAll);
    TestBuffers buffers = RandomBuffers(random, random() % 30, 30'000);
    const TestPlan plan = RandomPlan(random, buffers, uint64_t{64} << (random() % 8));
    Register(buffers, plan);
    for (uint32_t slot = 0; slot < 2; ++slot) {
      const Error saved = job_->Save(100 + slot, NoOptions());
      ASSERT_TRUE(saved.ok()) << saved.text();
      const Error waited = job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs));
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
    }
    job_.reset();
  }
}

TEST_F(CaptureTest, PointersOfTheSaveAreReadInsteadOfThoseRegistered) {
  std::mt19937 random(5);
  Open(&host_);
  TestBuffers registered;
  const TestPlan plan = StraightPlan(registered, {0, 1}, 2, random);
  Register(registered, plan);
  TestBuffers others;
  StraightPlan(others, {0, 1}, 2, random);
  std::vector<void*> pointers = {others.data(0).data(), others.data(1).data()};
  hf_save_options options = NoOptions();
  options.pointers = pointers.data();
  ASSERT_TRUE(job_->Save(1, options).ok());
  // The table was copied.
  pointers.assign(2, nullptr);
  ASSERT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs)).ok());
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan, others)), -1);

  options.pointers = pointers.data();
  const Error null = job_->Save(2, options);
  EXPECT_EQ(null.code(), HF_INVALID_ARGUMENT);
  EXPECT_NE(std::string(null.text()).find("'b0'"), std::string::npos) << null.text();
}

TEST_F(CaptureTest, HundredThousandBuffersOfAFewBytes) {
  std::mt19937 random(6);
  Open(&host_, 2);
  TestBuffers buffers;
  TestPlan plan;
  uint64_t at = 0;
  constexpr uint32_t kCount = 100'000;
  for (uint32_t i = 0; i < kCount; ++i) {
    const uint64_t bytes = i % 7;
    buffers.Add("t" + std::to_string(i), bytes, i % 64, random);
    plan.ops.push_back({at, 0, bytes, 1, 0, i, i % 64});
    at += bytes;
  }
  plan.block_bytes = 65536;
  plan.block_count = static_cast<uint32_t>(at / plan.block_bytes + 1);
  Register(buffers, plan);
  ASSERT_TRUE(job_->Save(1, NoOptions()).ok());
  for (int32_t group = 0; group < 64; ++group) {
    ASSERT_TRUE(job_->WaitCaptured(group, Deadline::After(kPatienceNs)).ok());
  }
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCaptured);
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan, buffers)), -1);
}

TEST_F(CaptureTest, NothingToCaptureIsCapturedAtOnce) {
  Open(&host_, 1, CheckSource::kSample);
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
  EXPECT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs)).ok());
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCaptured);
}

TEST_F(CaptureTest, BlocksWithoutTensorsAreDoneAtTheSave) {
  std::mt19937 random(7);
  GatedReader gated;
  Open(&gated);
  TestBuffers buffers;
  TestPlan plan;
  buffers.Add("b", 100, 0, random);
  plan.block_count = 4;
  plan.ops.push_back({2 * 4096 + 50, 0, 100, 1, 0, 0, 0});
  Register(buffers, plan);
  ASSERT_TRUE(job_->Save(1, NoOptions()).ok());
  gated.AwaitArrivals(1);
  for (const uint32_t block : {0u, 1u, 3u}) EXPECT_TRUE(agent_.BlockDone(0, block));
  EXPECT_FALSE(agent_.BlockDone(0, 2));
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCapturing);
  gated.Permit(1);
  ASSERT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs)).ok());
  EXPECT_TRUE(agent_.BlockDone(0, 2));
}

TEST_F(CaptureTest, GroupsAreCapturedInOrderAndCanBeWaitedForOneByOne) {
  std::mt19937 random(8);
  GatedReader gated;
  Open(&gated);
  TestBuffers buffers;
  // In the image group 9 lies in front of group 3.
  const TestPlan plan = StraightPlan(buffers, {9, 3}, 2, random);
  Register(buffers, plan);
  ASSERT_TRUE(job_->Save(1, NoOptions()).ok());
  gated.Permit(2);
  ASSERT_TRUE(job_->WaitCaptured(3, Deadline::After(kPatienceNs)).ok());
  EXPECT_TRUE(agent_.BlockDone(0, 2) && agent_.BlockDone(0, 3));
  EXPECT_FALSE(agent_.BlockDone(0, 0) || agent_.BlockDone(0, 1));
  // A group without tensors is done; group 3 may change now.
  EXPECT_TRUE(job_->WaitCaptured(40, Deadline::After(0)).ok());
  const std::vector<std::byte> oracle = OracleImage(plan, buffers);
  std::fill(buffers.data(1).begin(), buffers.data(1).end(), std::byte{0});
  EXPECT_EQ(job_->Save(2, NoOptions()).code(), HF_FAILED_PRECONDITION);
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCapturing);
  gated.Permit(2);
  ASSERT_TRUE(job_->WaitCaptured(9, Deadline::After(kPatienceNs)).ok());
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCaptured);
  EXPECT_EQ(FirstDifference(agent_.Image(0), oracle), -1);
  for (const int32_t wrong : {-2, 64}) {
    EXPECT_EQ(job_->WaitCaptured(wrong, Deadline::After(0)).code(), HF_INVALID_ARGUMENT);
  }
}

TEST_F(CaptureTest, PastTheDeadlineTheImageIsVoidAndNothingIsReadAnyMore) {
  std::mt19937 random(9);
  GatedReader gated;
  Open(&gated);
  TestBuffers buffers;
  TestPlan plan = StraightPlan(buffers, {0}, 4, random);
  plan.granted = 1;
  Register(buffers, plan);
  // The gate opens just before the deadline passes. Should the copier be through all the same, the
  // next save tries again.
  uint64_t step = 6;
  int begun = 0;
  Error late;
  do {
    agent_.Grant(0);
    ASSERT_TRUE(job_->Save(++step, NoOptions()).ok());
    gated.AwaitArrivals(++begun);
    gated.Permit(4);
    late = job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(0));
    begun = gated.arrived();
    gated.Close();
  } while (late.ok());
  ASSERT_EQ(late.code(), HF_DEADLINE_EXCEEDED) << late.text();
  const abi::ImageSlot& slot = agent_.shared().slots[0];
  EXPECT_EQ(slot.state.load(), SlotState::kVoid);
  EXPECT_EQ(slot.void_code.load(), HF_DEADLINE_EXCEEDED);
  EXPECT_NE(std::string(slot.void_text).find("step " + std::to_string(step)), std::string::npos)
      << slot.void_text;
  // The tensors are gone, and nobody looks at them.
  gated.Permit(100);
  buffers = TestBuffers();
  // Waiting again finds nothing to wait for, and the next capture is a good one.
  EXPECT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(0)).ok());
  EXPECT_EQ(gated.arrived(), begun);
  TestBuffers next;
  plan = StraightPlan(next, {0}, 4, random);
  Register(next, plan);
  ASSERT_TRUE(job_->Save(step + 1, NoOptions()).ok());
  ASSERT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs)).ok());
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan, next)), -1);
  hf_save_report report = {};
  ASSERT_TRUE(job_->Report(step, &report).ok());
  EXPECT_EQ(report.state, HF_SAVE_FAILED);
  EXPECT_EQ(report.error.code, HF_DEADLINE_EXCEEDED);
}

TEST_F(CaptureTest, SavesAndCancellationsInAnyOrderNeverMixImages) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  Open(&host_, 4);
  TestBuffers buffers;
  const TestPlan plan = StraightPlan(buffers, {0, 1, 2}, 6, random);
  Register(buffers, plan);
  int captured = 0;
  for (uint64_t step = 1; step <= 400; ++step) {
    for (size_t i = 0; i < buffers.count(); ++i) {
      std::fill(buffers.data(i).begin(), buffers.data(i).end(), static_cast<std::byte>(step));
    }
    ASSERT_TRUE(job_->Save(step, NoOptions()).ok());
    const bool patient = random() % 2 == 0;
    const Error waited =
        job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(patient ? kPatienceNs : 0));
    uint32_t slot = 0;
    while (agent_.shared().slots[slot].step.load() != step) ++slot;
    if (waited.ok()) {
      ++captured;
      ASSERT_EQ(agent_.shared().slots[slot].state.load(), SlotState::kCaptured);
      ASSERT_EQ(FirstDifference(agent_.Image(slot), OracleImage(plan, buffers)), -1);
    } else {
      ASSERT_FALSE(patient);
      ASSERT_EQ(agent_.shared().slots[slot].state.load(), SlotState::kVoid);
    }
    agent_.Grant(slot);
  }
  EXPECT_GT(captured, 100);
}

TEST_F(CaptureTest, WithoutAGrantedSlotASaveFailsAtOnceOrWaits) {
  std::mt19937 random(10);
  Open(&host_);
  TestBuffers buffers;
  TestPlan plan = StraightPlan(buffers, {0}, 2, random);
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
  ASSERT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs)).ok());
  EXPECT_EQ(agent_.shared().slots[1].state.load(), SlotState::kCaptured);
  // A grant wakes the save that sleeps.
  std::thread granter([&] { agent_.Grant(0); });
  EXPECT_TRUE(job_->Save(2, patient).ok());
  granter.join();
  // The buffers end before the job.
  EXPECT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs)).ok());
}

// The agent may take a grant back at any moment, and give it again: a save has the slot for itself
// from its first blob on, or fails.
TEST_F(CaptureTest, AGrantThatIsTakenBackIsNeverSavedInto) {
  std::mt19937 random(20);
  Open(&host_);
  TestBuffers buffers;
  TestPlan plan = StraightPlan(buffers, {0}, 1, random);
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
  for (uint64_t step = 1; step <= 200; ++step) {
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
    ASSERT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs)).ok());
    ASSERT_EQ(state.load(), SlotState::kCaptured);
    ASSERT_EQ(agent_.shared().slots[0].step.load(), step);
    ASSERT_EQ(agent_.BlobBytes(0, 0), bytes.size());
    const std::vector<std::byte> image = agent_.Image(0);
    ASSERT_EQ(std::memcmp(image.data() + plan.block_bytes, bytes.data(), bytes.size()), 0);
    agent_.Grant(0);
  }
  taker.request_stop();
  taker.join();
  EXPECT_GE(taken_back.load(), 200);
}

TEST_F(CaptureTest, TheAgentKnowsWhatMustBeComparedBeforeItIsCommitted) {
  for (const CheckSource check : {CheckSource::kNone, CheckSource::kSample, CheckSource::kAll}) {
    std::mt19937 random(21);
    Open(&host_, 1, check);
    TestBuffers buffers;
    Register(buffers, StraightPlan(buffers, {0}, 2, random));
    agent_.shared().slots[0].must_compare.store(7);
    ASSERT_TRUE(job_->Save(1, NoOptions()).ok());
    EXPECT_EQ(agent_.shared().slots[0].must_compare.load(), check == CheckSource::kAll ? 1u : 0u);
    EXPECT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs)).ok());
    EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCaptured);
    job_.reset();
  }
}

TEST_F(CaptureTest, ABlockTableThatLeavesTheMemoryIsRefused) {
  std::mt19937 random(11);
  Open(&host_);
  TestBuffers buffers;
  Register(buffers, StraightPlan(buffers, {0}, 2, random));
  agent_.SetBlockIndex(0, 1, 4);
  EXPECT_EQ(job_->Save(1, NoOptions()).code(), HF_INTERNAL);
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kGranted);
}

TEST_F(CaptureTest, BlobsGoStraightToTheirAreasAcrossBlocks) {
  std::mt19937 random(12);
  Open(&host_);
  TestBuffers buffers;
  TestPlan plan = StraightPlan(buffers, {0}, 1, random);
  plan.block_count = 5;
  // "long" straddles three blocks; "other" is a global blob, which this rank (2) does not store.
  plan.blobs = {{4096 + 100, 9000}, {UINT64_MAX, 0}, {4096 * 4, 64}};
  const std::vector<hf_blob_slot> slots = {
      {"long", HF_BLOB_RANK, 9000}, {"other", HF_BLOB_GLOBAL, 10}, {"third", HF_BLOB_RANK, 64}};
  Register(buffers, plan, slots);
  std::vector<std::byte> bytes(8999);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  const std::vector<hf_blob> blobs = {{"other", "global", 6}, {"long", bytes.data(), bytes.size()}};
  hf_save_options options = NoOptions();
  options.blobs = blobs.data();
  options.blob_count = blobs.size();
  ASSERT_TRUE(job_->Save(1, options).ok());
  ASSERT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs)).ok());
  EXPECT_EQ(agent_.BlobBytes(0, 0), bytes.size());
  EXPECT_EQ(agent_.BlobBytes(0, 1), UINT64_MAX);
  EXPECT_EQ(agent_.BlobBytes(0, 2), UINT64_MAX);
  std::vector<std::byte> oracle = OracleImage(plan, buffers);
  std::copy(bytes.begin(), bytes.end(), oracle.begin() + 4096 + 100);
  EXPECT_EQ(FirstDifference(agent_.Image(0), oracle), -1);
}

TEST_F(CaptureTest, WrongBlobsAreNamed) {
  Open(&host_);
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

TEST_F(CaptureTest, AStepIsSavedOnceAlsoIfItFailed) {
  std::mt19937 random(13);
  Open(&host_);
  TestBuffers buffers;
  Register(buffers, StraightPlan(buffers, {0}, 1, random));
  ASSERT_TRUE(job_->Save(5, NoOptions()).ok());
  ASSERT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs)).ok());
  EXPECT_EQ(job_->Save(5, NoOptions()).code(), HF_ALREADY_EXISTS);
  agent_.Report(5, HF_SAVE_COMMITTED_POWER);
  EXPECT_EQ(job_->Save(5, NoOptions()).code(), HF_ALREADY_EXISTS);
  agent_.Report(6, HF_SAVE_CAPTURED);
  EXPECT_EQ(job_->Save(6, NoOptions()).code(), HF_ALREADY_EXISTS);
  agent_.Report(5, HF_SAVE_FAILED, HF_RESOURCE_EXHAUSTED, "disk full");
  EXPECT_EQ(job_->Save(5, NoOptions()).code(), HF_ALREADY_EXISTS);
  EXPECT_TRUE(job_->Save(7, NoOptions()).ok());
  EXPECT_EQ(job_->Save(abi::kNoStep, NoOptions()).code(), HF_FAILED_PRECONDITION);
  ASSERT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs)).ok());
  EXPECT_EQ(job_->Save(abi::kNoStep, NoOptions()).code(), HF_INVALID_ARGUMENT);
}

TEST_F(CaptureTest, AJobThatClosesDuringACaptureFinishesIt) {
  std::mt19937 random(14);
  GatedReader gated;
  Open(&gated);
  TestBuffers buffers;
  const TestPlan plan = StraightPlan(buffers, {0}, 2, random);
  Register(buffers, plan);
  ASSERT_TRUE(job_->Save(1, NoOptions()).ok());
  gated.AwaitArrivals(1);
  gated.Permit(2);
  job_.reset();
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCaptured);
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan, buffers)), -1);
  EXPECT_TRUE(agent_.AwaitMessages(abi::MessageType::kClose, 1));
}

TEST_F(CaptureTest, TheDoorbellRingsWithEveryMebibyteAndAtTheEnd) {
  std::mt19937 random(15);
  GatedReader gated;
  Open(&gated);
  TestBuffers buffers;
  TestPlan plan;
  plan.block_bytes = uint64_t{1} << 20;
  buffers.Add("b", 3 * plan.block_bytes, 0, random);
  plan.ops.push_back({0, 0, 3 * plan.block_bytes, 1, 0, 0, 0});
  plan.block_count = 3;
  Register(buffers, plan);
  const auto rings_come = [&](int before) {
    return agent_.Await([&] { return agent_.doorbell_rings() > before; });
  };
  int before = agent_.doorbell_rings();
  ASSERT_TRUE(job_->Save(1, NoOptions()).ok());
  EXPECT_TRUE(rings_come(before));
  for (int block = 0; block < 3; ++block) {
    gated.AwaitArrivals(block + 1);
    before = agent_.doorbell_rings();
    gated.Permit(1);
    EXPECT_TRUE(rings_come(before)) << block;
  }
  ASSERT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs)).ok());
}

TEST_F(CaptureTest, DuringTheHeadStartTheDoorbellRingsAtTheEndOnly) {
  std::mt19937 random(16);
  GatedReader gated;
  Open(&gated, 1, CheckSource::kNone, /*head_start_ns=*/kPatienceNs);
  TestBuffers buffers;
  TestPlan plan;
  plan.block_bytes = 2 * kDoorbellBytes;
  buffers.Add("b", 3 * plan.block_bytes, 0, random);
  plan.ops.push_back({0, 0, 3 * plan.block_bytes, 1, 0, 0, 0});
  plan.block_count = 3;
  Register(buffers, plan);
  const int before = agent_.doorbell_rings();
  ASSERT_TRUE(job_->Save(1, NoOptions()).ok());
  gated.Permit(5);  // of six pieces: two blocks are done, each more than the doorbell waits for
  gated.AwaitArrivals(6);
  EXPECT_EQ(agent_.doorbell_rings(), before);
  gated.Permit(1);
  ASSERT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs)).ok());
  EXPECT_TRUE(agent_.Await([&] { return agent_.doorbell_rings() > before; }));
}

}  // namespace
}  // namespace holdfast::hook
