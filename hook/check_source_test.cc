// A tensor that changes under capture voids the image, by name, wherever it lies; and how often a
// sample misses it.
#include "hook/check_source.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <random>
#include <string>

#include "hook/op_pieces.h"
#include "hook/places_testing.h"

namespace holdfast::hook {
namespace {

using abi::SlotState;

class CheckSourceTest : public PlacesTest {
 protected:
  // Saves, and returns when everything was copied, but nothing compared yet. All of one group.
  void SaveAndLetFinish(uint64_t step, uint32_t slot, const TestPlan& plan,
                        CheckSource mode = CheckSource::kAll) {
    const bool is_compared_by_copiers =
        mode != CheckSource::kNone &&
        std::any_of(plan.ops.begin(), plan.ops.end(), [this](const abi::CaptureOp& op) {
          return IsOnDevice(op.buffer_index) && OpBytes(op) > 0;
        });
    if (is_compared_by_copiers) {
      if (fake() == nullptr) GTEST_SKIP() << "a real device does not wait for permits";
      // The image's memory is registered; what is copied to be compared goes elsewhere.
      fake()->HoldCopies(FakeCuda::Copies::kToUnregistered);
    }
    const uint64_t before = is_compared_by_copiers ? fake()->copies_arrived() : 0;
    ASSERT_TRUE(job_->Save(step, NoOptions()).ok());
    if (is_compared_by_copiers) {
      ASSERT_TRUE(agent_.Await([&] { return fake()->copies_arrived() > before; }));
    }
    // By the library's own counter, whose acquire orders the copier's reads before what follows:
    // what then changes a tensor breaks the contract, but is no data race.
    ASSERT_TRUE(agent_.Await([&] {
      hf_save_report report = {};
      return job_->Report(step, &report).ok() && report.blocks_captured == report.blocks;
    }));
    const std::atomic<int64_t>& captured_ns = agent_.shared().slots[slot].captured_ns;
    if (is_compared_by_copiers) {
      EXPECT_EQ(captured_ns.load(), 0);
    } else {
      ASSERT_TRUE(agent_.Await([&] { return captured_ns.load() != 0; }));
    }
  }
  // The tensor is changed where it lies.
  void ChangeByte(TestBuffers& buffers, size_t buffer, uint64_t at) {
    buffers.data(buffer)[at] ^= std::byte{4};
    if (placed_ != nullptr) placed_->Upload(buffer);
  }
  Error Wait(int32_t group = HF_ALL_GROUPS) {
    LetAllThrough();
    return PlacesTest::Wait(group);
  }
};
HOLDFAST_TEST_EVERYWHERE(CheckSourceTest);

TEST_P(CheckSourceTest, AllFindsEveryChangedByteThatIsCaptured) {
  SCOPED_TRACE("seed " + std::to_string(seed_));
  Open(1, CheckSource::kAll);
  int found = 0;
  const int rounds = devices_ == nullptr ? 60 : 20;
  for (int round = 0; round < rounds; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    TestBuffers buffers = RandomBuffers(random_, 1 + random_() % 10, 8000, /*group_count=*/1);
    const TestPlan plan = RandomPlan(random_, buffers, 256);
    Register(buffers, plan);
    const uint64_t step = static_cast<uint64_t>(round) + 1;
    SaveAndLetFinish(step, 0, plan);
    if (IsSkipped() || HasFatalFailure()) return;
    const std::vector<std::byte> before = OracleImage(plan, buffers);
    const size_t changed = random_() % buffers.count();
    if (!buffers.data(changed).empty()) {
      ChangeByte(buffers, changed, random_() % buffers.data(changed).size());
    }
    const bool captured_byte = OracleImage(plan, buffers) != before;
    const Error waited = Wait();
    if (captured_byte) {
      ++found;
      ASSERT_EQ(waited.code(), HF_ABORTED) << waited.text();
      const std::string name = "'state/tensor" + std::to_string(changed) + "'";
      EXPECT_NE(std::string(waited.text()).find(name), std::string::npos) << waited.text();
      EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kVoid);
      EXPECT_EQ(agent_.shared().slots[0].void_code.load(), HF_ABORTED);
      EXPECT_STREQ(agent_.shared().slots[0].void_text, waited.text());
    } else {
      // A byte that no operation takes is nobody's business.
      ASSERT_TRUE(waited.ok()) << waited.text();
      EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCaptured);
    }
  }
  EXPECT_GT(found, rounds / 12);
}

// Two buffers, of which a mix has one on the device.
TestPlan TwoBuffers(TestBuffers& buffers, std::mt19937& random) {
  TestPlan plan;
  buffers.Add("a", 3000, 0, random);
  buffers.Add("b", 2000, 0, random);
  plan.block_count = 2;
  plan.ops = {{0, 0, 3000, 1, 0, 0, 0}, {3000, 0, 2000, 1, 0, 1, 0}};
  return plan;
}

TEST_P(CheckSourceTest, NothingIsCommittableBeforeItWasCompared) {
  uint64_t step = 0;
  for (const CheckSource mode : {CheckSource::kSample, CheckSource::kAll, CheckSource::kNone}) {
    Open(1, mode);
    TestBuffers buffers;
    const TestPlan plan = TwoBuffers(buffers, random_);
    Register(buffers, plan);
    SaveAndLetFinish(++step, 0, plan, mode);
    if (IsSkipped() || HasFatalFailure()) return;
    if (mode == CheckSource::kNone) {
      // Without a comparison there is nothing to wait for.
      EXPECT_TRUE(agent_.AwaitSlot(0, SlotState::kCaptured));
    } else {
      EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCapturing);
      EXPECT_TRUE(Wait().ok());
      EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCaptured);
    }
    job_.reset();
  }
}

TEST_P(CheckSourceTest, WaitingForTheCommitComparesToo) {
  for (const size_t changed : {size_t{0}, size_t{1}}) {
    Open(1, CheckSource::kAll);
    TestBuffers buffers;
    const TestPlan plan = TwoBuffers(buffers, random_);
    Register(buffers, plan);
    SaveAndLetFinish(1, 0, plan);
    if (IsSkipped() || HasFatalFailure()) return;
    ChangeByte(buffers, changed, 1500);
    LetAllThrough();
    EXPECT_EQ(job_->WaitCommitted(1, HF_SURVIVE_POWER, Deadline::After(kPatienceNs)).code(),
              HF_ABORTED);
    EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kVoid);
    job_.reset();
  }
}

// What the trainer's thread compares itself: host memory. (Of a device's: DeviceCaptureTest.)
class CheckSourceInHostMemoryTest : public CheckSourceTest {};
INSTANTIATE_TEST_SUITE_P(Host, CheckSourceInHostMemoryTest, ::testing::Values(Places::kHost));

TEST_P(CheckSourceInHostMemoryTest, OfAGroupThatMayChangeOnlyTheOthersAreComparedLater) {
  Open(1, CheckSource::kAll);
  TestBuffers buffers;
  buffers.Add("early", 3000, 0, random_);
  buffers.Add("late", 3000, 1, random_);
  TestPlan plan;
  plan.block_count = 2;
  plan.ops = {{0, 0, 3000, 1, 0, 0, 0}, {3000, 0, 3000, 1, 0, 1, 1}};
  Register(buffers, plan);
  SaveAndLetFinish(1, 0, plan);
  EXPECT_TRUE(Wait(0).ok());
  buffers.data(0)[0] ^= std::byte{1};
  EXPECT_TRUE(Wait(1).ok());
  SaveAndLetFinish(2, 1, plan);
  EXPECT_TRUE(Wait(0).ok());
  buffers.data(1)[2999] ^= std::byte{1};
  const Error late = Wait(1);
  EXPECT_EQ(late.code(), HF_ABORTED);
  EXPECT_NE(std::string(late.text()).find("'late'"), std::string::npos) << late.text();
}

// The documented miss rate: with a fraction f of the bytes changed, (1 - f)^64 at most. The trials
// are independent draws of one seeded generator.
TEST_P(CheckSourceInHostMemoryTest, ASampleMissesNoMoreThanDocumented) {
  Open();
  TestBuffers buffers;
  constexpr uint64_t kBytes = uint64_t{4} << 20;
  buffers.Add("b", kBytes, 0, random_);
  TestPlan plan;
  plan.block_bytes = 65536;
  plan.block_count = kBytes / plan.block_bytes;
  plan.ops.push_back({0, 0, kBytes, 1, 0, 0, 0});
  Register(buffers, plan);
  SaveAndLetFinish(1, 0, plan);
  // A registration like the job's, to look at its image with checkers of our own.
  abi::RegisterReply reply = {};
  reply.registration_id = agent_.shared().registration_id;
  reply.memory_bytes = agent_.memory().bytes();
  reply.registration_memory_bytes = agent_.registration_memory().bytes();
  reply.capture_plan_bytes = agent_.plan_memory().bytes();
  reply.image_bytes = kBytes;
  reply.block_bytes = plan.block_bytes;
  const std::vector<hf_buffer> list = buffers.List();
  Result<std::shared_ptr<const Document>> document = Document::Make("{}", list, {});
  ASSERT_TRUE(document.ok());
  UniqueFd fds[3] = {UniqueFd(dup(agent_.memory().fd())),
                     UniqueFd(dup(agent_.registration_memory().fd())),
                     UniqueFd(dup(agent_.plan_memory().fd()))};
  Result<std::shared_ptr<Registration>> made = Registration::Make(document.value(), reply, fds);
  ASSERT_TRUE(made.ok()) << made.error().text();
  Registration& registration = *made.value();
  registration.pointers() = {buffers.data(0).data()};

  const auto check = [&](SourceChecker& checker) {
    return checker.Check(registration, 0, Registration::Memory::kHost, registration.groups(),
                         [&](int32_t) -> SourceComparer& { return gate_; });
  };
  SourceChecker untouched(CheckSource::kSample, 1);
  for (int trial = 0; trial < 50; ++trial) {
    ASSERT_TRUE(check(untouched).ok());
  }
  for (const double fraction : {0.02, 0.1, 1.0}) {
    TestBuffers changed = buffers;
    registration.pointers() = {changed.data(0).data()};
    for (uint64_t i = 0; i < static_cast<uint64_t>(fraction * kBytes); ++i) {
      changed.data(0)[i] ^= std::byte{1};
    }
    SourceChecker checker(CheckSource::kSample, 7);
    constexpr int kTrials = 400;
    int missed = 0;
    for (int trial = 0; trial < kTrials; ++trial) {
      missed += check(checker).ok() ? 1 : 0;
    }
    const double bound = std::pow(1 - fraction, kSampleChunks);
    const double deviation = std::sqrt(kTrials * bound * (1 - bound));
    EXPECT_LE(missed, kTrials * bound + 4 * deviation) << fraction;
    // Not vacuous: what is small is missed now and then.
    if (fraction == 0.02) {
      EXPECT_GT(missed, kTrials * bound / 2);
    }
    if (fraction == 1.0) {
      EXPECT_EQ(missed, 0);
    }
  }
}

}  // namespace
}  // namespace holdfast::hook
