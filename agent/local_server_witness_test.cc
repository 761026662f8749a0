// Processes that wait to be asked, over a real socket: what they answer comes to who asked, what is
// no answer is refused by name, and they count neither as sessions nor as clients that need an
// agent.
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "agent/local_server_testing.h"
#include "agent/witness/waiting_processes.h"
#include "gmock/gmock.h"

namespace holdfast {
namespace {

using ::testing::HasSubstr;

abi::WitnessWait WaitOf(uint32_t rank) {
  abi::WitnessWait wait{};
  std::strcpy(wait.job, "job");
  wait.rank = rank;
  wait.world_size = 4;
  return wait;
}

class LocalServerWitnessTest : public LocalServerTest {
 protected:
  LocalServerWitnessTest() {
    MakeServer([this](LocalServer::Options& server) {
      server.waiting_processes = &waiting_;
      server.ask_witnesses = [this](std::function<void(std::string)> done) {
        done_ = std::move(done);
      };
    });
  }
  ~LocalServerWitnessTest() override { server_.reset(); }

  void Ask() {
    waiting_.Ask("job", "", abi::kWitnessPythonStacks, absl::Seconds(20),
                 [this](WaitingProcesses::Round round) { round_ = std::move(round); });
  }

  WaitingProcesses waiting_{*loop_};
  std::optional<WaitingProcesses::Round> round_;
  std::function<void(std::string)> done_;
};

TEST_F(LocalServerWitnessTest, WhoWaitsIsAskedAnswersAndWaitsAgain) {
  const UniqueFd socket = Connect();
  Request(socket, abi::MessageType::kWitness, WaitOf(2));
  ASSERT_TRUE(PumpUntil([&] { return server_->waiting_count() == 1; }));
  EXPECT_EQ(server_->connection_count(), 1u);
  for (int round = 0; round < 2; ++round) {
    round_.reset();
    Ask();
    const auto ask = HearReply<abi::WitnessAsk>(socket, abi::MessageType::kWitnessReply, 0);
    EXPECT_EQ(ask.status.code, 0);
    EXPECT_EQ(ask.parts, abi::kWitnessPythonStacks);
    abi::WitnessWait answer = WaitOf(2);
    answer.number = ask.number;
    answer.parts = abi::kWitnessPythonStacks;
    answer.bytes[1] = 6;
    Request(socket, abi::MessageType::kWitness, answer, Fds(*SealedMemfd("stacks", "stacks")));
    ASSERT_TRUE(PumpUntil([&] { return round_.has_value(); }));
    ASSERT_EQ(round_->answers.size(), 1u);
    const WaitingProcesses::Answer& got = round_->answers[0];
    EXPECT_EQ(got.process.rank, 2u);
    EXPECT_EQ(got.process.process_id, static_cast<uint32_t>(getpid()));
    const absl::StatusOr<std::string> text = ReadAll(got.python_stacks.memory.get(), 100);
    ASSERT_TRUE(text.ok());
    EXPECT_EQ(*text, "stacks");
  }
}

TEST_F(LocalServerWitnessTest, WhoGoesWhileItIsAskedEndsTheRound) {
  UniqueFd socket = Connect();
  Request(socket, abi::MessageType::kWitness, WaitOf(2));
  ASSERT_TRUE(PumpUntil([&] { return server_->waiting_count() == 1; }));
  Ask();
  socket.Reset();
  ASSERT_TRUE(PumpUntil([&] { return round_.has_value(); }));
  EXPECT_EQ(round_->silent.size(), 1u);
  EXPECT_EQ(waiting_.size(), 0u);
  EXPECT_EQ(server_->connection_count(), 0u);
}

TEST_F(LocalServerWitnessTest, WhatIsNoAnswerIsRefusedByName) {
  const UniqueFd socket = Connect();
  abi::WitnessWait parts = WaitOf(2);
  parts.parts = abi::kWitnessFlightRecord;  // and no descriptor
  abi::WitnessWait rank = WaitOf(RankExit::kRanksMax);
  abi::WitnessWait job = WaitOf(2);
  std::memset(job.job, 'x', sizeof(job.job));
  const std::vector<std::pair<abi::WitnessWait, std::string>> wrong = {
      {parts, "found 0"}, {rank, "expected a rank below"}, {job, "job"}};
  for (const auto& [wait, why] : wrong) {
    Request(socket, abi::MessageType::kWitness, wait);
    const auto reply = HearReply<abi::WitnessAsk>(socket, abi::MessageType::kWitnessReply, 0);
    EXPECT_EQ(reply.status.code, static_cast<int>(absl::StatusCode::kInvalidArgument));
    EXPECT_THAT(std::string(reply.status.text), HasSubstr(why));
  }
  EXPECT_EQ(server_->waiting_count(), 0u);
  // A second wait on the same connection, while the first one lasts.
  Request(socket, abi::MessageType::kWitness, WaitOf(2));
  Request(socket, abi::MessageType::kWitness, WaitOf(2));
  const auto reply = HearReply<abi::WitnessAsk>(socket, abi::MessageType::kWitnessReply, 0);
  EXPECT_THAT(std::string(reply.status.text), HasSubstr("waits already"));
  EXPECT_EQ(server_->waiting_count(), 1u);
}

TEST_F(LocalServerWitnessTest, AClientMayHaveAllOfThemAsked) {
  const UniqueFd socket = Connect();
  Request(socket, abi::MessageType::kQuery, abi::QueryRequest{abi::QueryKind::kWitnesses, 0});
  ASSERT_TRUE(PumpUntil([&] { return done_ != nullptr; }));
  done_("{}");
  const auto reply = HearReply<abi::QueryReply>(socket, abi::MessageType::kQueryReply, 1);
  EXPECT_EQ(reply.text_bytes, 2u);
}

TEST_F(LocalServerWitnessTest, AnAgentThatAsksNobodySaysSo) {
  MakeServer({});
  const UniqueFd socket = Connect();
  Request(socket, abi::MessageType::kWitness, WaitOf(2));
  const auto reply = HearReply<abi::WitnessAsk>(socket, abi::MessageType::kWitnessReply, 0);
  EXPECT_EQ(reply.status.code, static_cast<int>(absl::StatusCode::kUnimplemented));
}

}  // namespace
}  // namespace holdfast
