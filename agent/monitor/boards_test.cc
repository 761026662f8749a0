// Boards that the agent keeps: what is taken, what is refused, for how long, and what is told of
// them.
#include "agent/monitor/boards.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/sim_executor.h"

namespace holdfast {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

// A board as a trainer makes one, with one communicator that waits for credit in one connection.
class TestBoard {
 public:
  TestBoard() : fd_(memfd_create("board", MFD_CLOEXEC | MFD_ALLOW_SEALING)) {
    EXPECT_EQ(ftruncate(fd_.get(), abi::kBoardBytes), 0);
    data_ = static_cast<std::byte*>(
        mmap(nullptr, abi::kBoardBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0));
    header().magic = abi::kBoardMagic;
    header().version = abi::kBoardVersion;
    header().total_bytes = abi::kBoardBytes;
    uint64_t at = sizeof(abi::BoardHeader);
    header().communicators_offset = static_cast<uint32_t>(at);
    auto& communicator = *reinterpret_cast<abi::Communicator*>(data_ + at);
    at += sizeof(abi::Communicator) * abi::kBoardCommunicators;
    header().keys_offset = static_cast<uint32_t>(at);
    auto& key = *reinterpret_cast<std::atomic<uint64_t>*>(data_ + at);
    at += sizeof(uint64_t) * abi::kBoardSlots;
    header().slots_offset = static_cast<uint32_t>(at);
    auto& slot = *reinterpret_cast<abi::Slot*>(data_ + at);
    at += sizeof(abi::Slot) * abi::kBoardSlots;
    header().rings_offset = static_cast<uint32_t>(at);
    header().communicator_count = abi::kBoardCommunicators;
    header().slot_count = abi::kBoardSlots;
    header().ring_count = abi::kBoardRings;
    header().ring_record_count = abi::kRingRecords;
    header().clock = abi::BoardClock::kMonotonicNs;
    header().ticks_per_second = 1'000'000'000;
    header().writer = abi::BoardWriter::kProfilerPlugin;
    header().step = 12;
    communicator.generation = 1;
    communicator.hash = 0xabc;
    communicator.ranks = 4;
    communicator.rank = 2;
    communicator.enqueued = 7;
    communicator.finished = 6;
    communicator.state = abi::CommunicatorState::kOpen;
    slot.head = static_cast<uint64_t>(abi::WaitState::kSendPeerWait) << 32;
    slot.since = 1;
    key = abi::EncodeSlotKey({0, 1, 0, 3, abi::SlotDirection::kSend});
  }
  ~TestBoard() { munmap(data_, abi::kBoardBytes); }
  TestBoard(const TestBoard&) = delete;
  TestBoard& operator=(const TestBoard&) = delete;

  abi::BoardHeader& header() { return *reinterpret_cast<abi::BoardHeader*>(data_); }
  std::byte* data() { return data_; }
  void Seal() { EXPECT_EQ(fcntl(fd_.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW), 0); }
  int fd() const { return fd_.get(); }

 private:
  UniqueFd fd_;
  std::byte* data_ = nullptr;
};

MonitorBoards::Offer MakeOffer(int board, uint32_t rank) {
  MonitorBoards::Offer offer;
  offer.job = "job";
  offer.node = "n7";
  offer.rank = rank;
  offer.process_id = 100 + rank;
  offer.board_bytes = abi::kBoardBytes;
  offer.board = UniqueFd(dup(board));
  offer.process = UniqueFd(open("/dev/null", O_RDONLY | O_CLOEXEC));
  return offer;
}

class MonitorBoardsTest : public ::testing::Test {
 protected:
  // Adopts a board of its own and returns the descriptor that its process is watched by.
  int AdoptOne(uint32_t rank) {
    TestBoard board;
    board.Seal();
    MonitorBoards::Offer offer = MakeOffer(board.fd(), rank);
    const int process = offer.process.get();
    EXPECT_TRUE(boards_.Adopt(std::move(offer)).ok());
    return process;
  }
  void Die(int process) {
    executor_.MarkReady(process);
    executor_.RunUntilIdle();
  }
  json Status() { return json::parse(boards_.StatusJson()); }

  SimExecutor executor_;
  MonitorBoards boards_{executor_, executor_};
};

TEST_F(MonitorBoardsTest, ABoardIsToldWithWhatItsConnectionsWaitFor) {
  TestBoard board;
  board.Seal();
  ASSERT_TRUE(boards_.Adopt(MakeOffer(board.fd(), 2)).ok());
  ASSERT_TRUE(boards_.Adopt(MakeOffer(board.fd(), 2)).ok());  // again
  const json status = Status();
  ASSERT_EQ(status.size(), 1u);
  EXPECT_EQ(status[0]["job"], "job");
  EXPECT_EQ(status[0]["node"], "n7");
  EXPECT_EQ(status[0]["rank"], 2);
  EXPECT_EQ(status[0]["writer"], "nccl");
  EXPECT_EQ(status[0]["alive"], true);
  EXPECT_EQ(status[0]["step"], 12);
  EXPECT_EQ(status[0]["communicators"][0]["hash"], "0000000000000abc");
  EXPECT_EQ(status[0]["communicators"][0]["enqueued"], 7);
  EXPECT_EQ(status[0]["communicators"][0]["finished"], 6);
  EXPECT_EQ(status[0]["waits"]["send_peer"]["connections"], 1);
  EXPECT_GT(status[0]["waits"]["send_peer"]["longest_seconds"], 0.0);
}

TEST_F(MonitorBoardsTest, WhatIsNoBoardIsRefusedByName) {
  const auto refusal = [&](MonitorBoards::Offer offer) {
    const absl::Status status = boards_.Adopt(std::move(offer));
    EXPECT_FALSE(status.ok());
    return std::string(status.message());
  };
  int pipes[2];
  ASSERT_EQ(pipe(pipes), 0);
  EXPECT_THAT(refusal(MakeOffer(pipes[0], 0)), HasSubstr("expected a memfd"));
  close(pipes[0]);
  close(pipes[1]);
  TestBoard board;
  EXPECT_THAT(refusal(MakeOffer(board.fd(), 0)), HasSubstr("sealed against shrinking"));
  board.Seal();
  MonitorBoards::Offer offer = MakeOffer(board.fd(), 0);
  offer.board_bytes = 10;
  EXPECT_THAT(refusal(std::move(offer)), HasSubstr("(offered as 10)"));
  UniqueFd small(memfd_create("small", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(fcntl(small.get(), F_ADD_SEALS, F_SEAL_SHRINK), 0);
  EXPECT_THAT(refusal(MakeOffer(small.get(), 0)), HasSubstr("found 0 "));
  board.header().version = 99;
  EXPECT_THAT(refusal(MakeOffer(board.fd(), 0)), HasSubstr("found no board of it"));
  board.header().version = abi::kBoardVersion;
  offer = MakeOffer(board.fd(), 0);
  offer.process.Reset();
  EXPECT_THAT(refusal(std::move(offer)), HasSubstr("no descriptor left"));
  EXPECT_EQ(boards_.alive_count(), 0u);
  ASSERT_TRUE(boards_.Adopt(MakeOffer(board.fd(), 0)).ok());
}

TEST_F(MonitorBoardsTest, ADeadProcesssBoardIsKeptForAnHour) {
  Die(AdoptOne(1));
  EXPECT_EQ(boards_.alive_count(), 0u);
  EXPECT_EQ(boards_.dead_count(), 1u);
  executor_.AdvanceTime(MonitorBoards::kDeadAge - absl::Seconds(1));
  ASSERT_EQ(Status().size(), 1u);
  EXPECT_EQ(Status()[0]["alive"], false);
  EXPECT_EQ(Status()[0]["waits"]["send_peer"]["connections"], 1);
  EXPECT_NEAR(Status()[0]["dead_for_seconds"].get<double>(), 3599, 0.5);
  executor_.AdvanceTime(absl::Seconds(1));
  EXPECT_EQ(boards_.dead_count(), 0u);
}

TEST_F(MonitorBoardsTest, BeyondTheLimitsTheLivingAreRefusedAndTheOldestDeadDropped) {
  std::vector<int> processes;
  for (uint32_t i = 0; i < MonitorBoards::kAliveMax; ++i) processes.push_back(AdoptOne(i));
  TestBoard one_more;
  one_more.Seal();
  EXPECT_EQ(boards_.Adopt(MakeOffer(one_more.fd(), 0)).code(),
            absl::StatusCode::kResourceExhausted);
  for (size_t i = 0; i < MonitorBoards::kDeadMax + 3; ++i) {
    executor_.AdvanceTime(absl::Seconds(1));
    Die(processes[i]);
  }
  EXPECT_EQ(boards_.dead_count(), MonitorBoards::kDeadMax);
  for (const json& board : Status()) EXPECT_GE(board["rank"], 3);  // the first three are gone
  EXPECT_TRUE(boards_.Adopt(MakeOffer(one_more.fd(), 0)).ok());
}

// Goal: whatever the process writes, the status is an object and the agent lives.
TEST_F(MonitorBoardsTest, GarbageOnABoardHarmsNothing) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937_64 random(seed);
  TestBoard board;
  board.Seal();
  ASSERT_TRUE(boards_.Adopt(MakeOffer(board.fd(), 1)).ok());
  int waits = 0;
  for (int round = 0; round < 4; ++round) {
    // First only the slots, under a communicator and a key that hold; then all.
    const uint64_t begin = round < 2 ? board.header().slots_offset : 0;
    for (uint64_t at = begin; at + 8 <= abi::kBoardBytes; at += 8) {
      uint64_t word = random() % 4 == 0 ? random() % 8 : random();
      if (round < 2 && at == begin) word = uint64_t{4} << 32;
      std::memcpy(board.data() + at, &word, 8);
    }
    const json status = Status();
    ASSERT_EQ(status.size(), 1u);
    EXPECT_EQ(status[0]["job"], "job");
    waits += !status[0]["waits"].empty();
  }
  EXPECT_GE(waits, 2);
}

}  // namespace
}  // namespace holdfast
