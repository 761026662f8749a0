#include "agent/witness/waiting_processes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/sim_executor.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr absl::Duration kDeadline = absl::Seconds(2);

class WaitingProcessesTest : public testing::Test {
 protected:
  // Process `id` of `job` and `key`, rank `id`, waits, and answers `number`.
  absl::Status Wait(uint64_t id, const std::string& job, uint64_t number = 0,
                    const std::string& key = "") {
    abi::WitnessWait wait{};
    wait.number = number;
    wait.parts = number == 0 ? 0 : abi::kWitnessPythonStacks;
    std::vector<UniqueFd> parts;
    if (number != 0) {
      wait.bytes[1] = 100 + id;
      parts.emplace_back(memfd_create("stacks", MFD_CLOEXEC));
    }
    WaitingProcesses::Process process;
    process.job = job;
    process.attempt_key = key;
    process.rank = static_cast<uint32_t>(id);
    return waiting_.Arrive(id, process, wait, std::move(parts),
                           [this, id](const abi::WitnessAsk& ask) { asked_[id] = ask; });
  }
  void Ask(const std::string& job, const std::string& key = "") {
    asked_.clear();
    round_.reset();
    waiting_.Ask(job, key, abi::kWitnessPythonStacks, kDeadline,
                 [this](WaitingProcesses::Round round) { round_ = std::move(round); });
  }

  SimExecutor executor_;
  WaitingProcesses waiting_{executor_};
  std::map<uint64_t, abi::WitnessAsk> asked_;
  std::optional<WaitingProcesses::Round> round_;
};

TEST_F(WaitingProcessesTest, WhoWaitsIsAskedAndAnswers) {
  EXPECT_OK(Wait(1, "a"));
  EXPECT_OK(Wait(2, "a"));
  EXPECT_OK(Wait(3, "b"));
  Ask("a");
  ASSERT_THAT(asked_, SizeIs(2));
  EXPECT_EQ(asked_[1].number, asked_[2].number);
  EXPECT_EQ(asked_[1].parts, abi::kWitnessPythonStacks);
  EXPECT_OK(Wait(2, "a", asked_[2].number));
  executor_.RunUntilIdle();
  EXPECT_FALSE(round_.has_value());
  EXPECT_OK(Wait(1, "a", asked_[1].number));
  executor_.RunUntilIdle();  // no time passes
  ASSERT_TRUE(round_.has_value());
  EXPECT_THAT(round_->silent, IsEmpty());
  ASSERT_THAT(round_->answers, SizeIs(2));
  EXPECT_EQ(round_->answers[0].process.rank, 2u);
  EXPECT_EQ(round_->answers[0].python_stacks.bytes, 102u);
  EXPECT_TRUE(round_->answers[0].python_stacks.memory);
  EXPECT_FALSE(round_->answers[0].flight_record.memory);
  EXPECT_THAT(waiting_.processes(), SizeIs(3));
}

TEST_F(WaitingProcessesTest, AttemptsAreToldApartWhereBothAreKnown) {
  EXPECT_OK(Wait(1, "a", 0, "run/0"));
  EXPECT_OK(Wait(2, "a", 0, "run/1"));
  EXPECT_OK(Wait(3, "a"));
  Ask("a", "run/1");
  EXPECT_THAT(asked_, SizeIs(2));
  EXPECT_FALSE(asked_.contains(1));
}

TEST_F(WaitingProcessesTest, WhoIsSilentOrGoesIsNamed) {
  for (const uint64_t id : {1, 2, 3}) EXPECT_OK(Wait(id, "a"));
  Ask("a");
  const uint64_t old = asked_[1].number;
  waiting_.Leave(2);
  EXPECT_OK(Wait(3, "a", old));
  executor_.AdvanceTime(kDeadline - absl::Milliseconds(1));
  EXPECT_FALSE(round_.has_value());
  executor_.AdvanceTime(absl::Milliseconds(1));
  ASSERT_TRUE(round_.has_value());
  EXPECT_THAT(round_->answers, SizeIs(1));
  EXPECT_THAT(round_->silent, SizeIs(2));
  // The first answers too late, while somebody else is asked: heard by nobody, and it waits again.
  Ask("a");
  EXPECT_FALSE(asked_.contains(1));
  EXPECT_OK(Wait(1, "a", old));
  executor_.RunUntilIdle();
  EXPECT_TRUE(asked_.contains(1));  // now it is asked, too
  executor_.AdvanceTime(kDeadline);
  ASSERT_TRUE(round_.has_value());
  EXPECT_THAT(round_->answers, IsEmpty());
  EXPECT_THAT(round_->silent, SizeIs(2));
  Ask("nobody's");
  executor_.RunUntilIdle();
  ASSERT_TRUE(round_.has_value());
  EXPECT_TRUE(round_->answers.empty() && round_->silent.empty());
}

// A process that was not asked, or not so, gets nothing kept, however often it says it.
TEST_F(WaitingProcessesTest, WhatWasNotAskedIsAnAnswerToNobody) {
  EXPECT_OK(Wait(1, "a"));
  Ask("a");
  const uint64_t number = asked_[1].number;
  EXPECT_OK(Wait(9, "a", number));  // knows the number, and was not asked
  executor_.RunUntilIdle();
  EXPECT_FALSE(round_.has_value());
  EXPECT_OK(Wait(1, "a", number));
  executor_.RunUntilIdle();
  ASSERT_TRUE(round_.has_value());
  EXPECT_THAT(round_->answers, SizeIs(1));
}

TEST_F(WaitingProcessesTest, EveryWrongAnswerIsRefused) {
  EXPECT_OK(Wait(1, "a"));
  EXPECT_THAT(Wait(1, "a"), StatusIs(absl::StatusCode::kFailedPrecondition));
  const auto arrive = [&](uint32_t parts, size_t descriptors) {
    abi::WitnessWait wait{};
    wait.parts = parts;
    std::vector<UniqueFd> fds;
    for (size_t i = 0; i < descriptors; ++i) fds.emplace_back(memfd_create("part", MFD_CLOEXEC));
    return waiting_.Arrive(9, {}, wait, std::move(fds), [](const abi::WitnessAsk&) {});
  };
  for (uint32_t parts = 0; parts < 16; ++parts) {
    for (size_t descriptors = 0; descriptors <= 4; ++descriptors) {
      const bool fits = (parts == 0 && descriptors == 0) || (parts == 1 && descriptors == 1) ||
                        (parts == 2 && descriptors == 1) || (parts == 3 && descriptors == 2);
      EXPECT_EQ(arrive(parts, descriptors).ok(), fits) << parts << " " << descriptors;
      waiting_.Leave(9);
    }
  }
  EXPECT_EQ(waiting_.size(), 1u);
}

TEST_F(WaitingProcessesTest, BeyondTheLimitTheyAreRefusedAndSomebodysEndMakesRoom) {
  for (uint64_t id = 0; id < WaitingProcesses::kWaitingMax; ++id) EXPECT_OK(Wait(id, "a"));
  EXPECT_THAT(Wait(5000, "a"), StatusIs(absl::StatusCode::kResourceExhausted));
  waiting_.Leave(7);
  EXPECT_OK(Wait(5000, "a"));
}

}  // namespace
}  // namespace holdfast
