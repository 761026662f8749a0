// A tensor that changes under capture voids the image, by name; and how often a sample misses it.
#include "hook/check_source.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>

#include "hook/test_agent.h"
#include "hook/test_job.h"

namespace holdfast::hook {
namespace {

using abi::SlotState;

class CheckSourceTest : public ::testing::Test {
 protected:
  void Open(CheckSource mode, uint64_t seed = 1) {
    Settings settings = TestSettings(agent_);
    settings.check_source = mode;
    Result<std::unique_ptr<Job>> job = OpenTestJob(settings, &reader_, seed);
    ASSERT_TRUE(job.ok()) << job.error().text();
    job_ = std::move(job.value());
  }
  void Register(TestBuffers& buffers, const TestPlan& plan) {
    agent_.SetPlan([plan](const TestDocument&) { return plan; });
    ASSERT_TRUE(RegisterAll(*job_, buffers).ok());
  }
  // Saves, and returns when the copier is through, but before anybody has waited.
  void SaveAndLetFinish(uint64_t step, uint32_t slot) {
    ASSERT_TRUE(job_->Save(step, NoOptions()).ok());
    // By the library's own counter, whose acquire orders the copier's reads before what follows:
    // what then changes a tensor breaks the contract, but is no data race.
    ASSERT_TRUE(agent_.Await([&] {
      hf_save_report report = {};
      return job_->Report(step, &report).ok() && report.blocks_captured == report.blocks;
    }));
    ASSERT_TRUE(agent_.Await([&] { return agent_.shared().slots[slot].captured_ns.load() != 0; }));
  }
  Error Wait(int32_t group = HF_ALL_GROUPS) {
    return job_->WaitCaptured(group, Deadline::After(kPatienceNs));
  }

  TestAgent agent_;
  HostSourceReader reader_;
  std::unique_ptr<Job> job_;
};

TEST_F(CheckSourceTest, AllFindsEveryChangedByteThatIsCaptured) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  Open(CheckSource::kAll);
  int found = 0;
  for (int round = 0; round < 60; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    TestBuffers buffers = RandomBuffers(random, 1 + random() % 10, 8000);
    const TestPlan plan = RandomPlan(random, buffers, 256);
    Register(buffers, plan);
    const uint64_t step = static_cast<uint64_t>(round) + 1;
    SaveAndLetFinish(step, 0);
    const std::vector<std::byte> before = OracleImage(plan, buffers);
    const size_t changed = random() % buffers.count();
    if (!buffers.data(changed).empty()) {
      buffers.data(changed)[random() % buffers.data(changed).size()] ^= std::byte{4};
    }
    const bool captured_byte = OracleImage(plan, buffers) != before;
    const Error waited = Wait();
    if (captured_byte) {
      ++found;
      ASSERT_EQ(waited.code(), HF_ABORTED);
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
  EXPECT_GT(found, 5);
}

TEST_F(CheckSourceTest, NothingIsCommittableBeforeItWasCompared) {
  std::mt19937 random(3);
  for (const CheckSource mode : {CheckSource::kSample, CheckSource::kAll}) {
    Open(mode);
    TestBuffers buffers;
    buffers.Add("b", 5000, 0, random);
    TestPlan plan;
    plan.block_count = 2;
    plan.ops.push_back({0, 0, 5000, 1, 0, 0, 0});
    Register(buffers, plan);
    SaveAndLetFinish(1, 0);
    EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCapturing);
    EXPECT_TRUE(Wait().ok());
    EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCaptured);
    job_.reset();
  }
  // Without a comparison there is nothing to wait for.
  Open(CheckSource::kNone);
  TestBuffers buffers;
  buffers.Add("b", 5000, 0, random);
  TestPlan plan;
  plan.block_count = 2;
  plan.ops.push_back({0, 0, 5000, 1, 0, 0, 0});
  Register(buffers, plan);
  SaveAndLetFinish(1, 0);
  EXPECT_TRUE(agent_.AwaitSlot(0, SlotState::kCaptured));
}

TEST_F(CheckSourceTest, OfAGroupThatMayChangeOnlyTheOthersAreComparedLater) {
  std::mt19937 random(4);
  Open(CheckSource::kAll);
  TestBuffers buffers;
  buffers.Add("early", 3000, 0, random);
  buffers.Add("late", 3000, 1, random);
  TestPlan plan;
  plan.block_count = 2;
  plan.ops = {{0, 0, 3000, 1, 0, 0, 0}, {3000, 0, 3000, 1, 0, 1, 1}};
  Register(buffers, plan);
  SaveAndLetFinish(1, 0);
  EXPECT_TRUE(Wait(0).ok());
  buffers.data(0)[0] ^= std::byte{1};
  EXPECT_TRUE(Wait(1).ok());
  SaveAndLetFinish(2, 1);
  EXPECT_TRUE(Wait(0).ok());
  buffers.data(1)[2999] ^= std::byte{1};
  const Error late = Wait(1);
  EXPECT_EQ(late.code(), HF_ABORTED);
  EXPECT_NE(std::string(late.text()).find("'late'"), std::string::npos) << late.text();
}

TEST_F(CheckSourceTest, WaitingForTheCommitComparesToo) {
  std::mt19937 random(5);
  Open(CheckSource::kAll);
  TestBuffers buffers;
  buffers.Add("b", 100, 0, random);
  TestPlan plan;
  plan.block_count = 1;
  plan.ops.push_back({0, 0, 100, 1, 0, 0, 0});
  Register(buffers, plan);
  SaveAndLetFinish(1, 0);
  buffers.data(0)[50] ^= std::byte{1};
  EXPECT_EQ(job_->WaitCommitted(1, HF_SURVIVE_POWER, Deadline::After(kPatienceNs)).code(),
            HF_ABORTED);
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kVoid);
}

// The documented miss rate: with a fraction f of the bytes changed, (1 - f)^64 at most. The trials
// are independent draws of one seeded generator.
TEST_F(CheckSourceTest, ASampleMissesNoMoreThanDocumented) {
  std::mt19937 random(6);
  Open(CheckSource::kNone);
  TestBuffers buffers;
  constexpr uint64_t kBytes = uint64_t{4} << 20;
  buffers.Add("b", kBytes, 0, random);
  TestPlan plan;
  plan.block_bytes = 65536;
  plan.block_count = kBytes / plan.block_bytes;
  plan.ops.push_back({0, 0, kBytes, 1, 0, 0, 0});
  Register(buffers, plan);
  SaveAndLetFinish(1, 0);
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
                         [&](int32_t) -> SourceComparer& { return reader_; });
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
