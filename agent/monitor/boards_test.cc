// Boards that the agent keeps: what is taken, what is refused, for how long, and what is told of
// them.
#include "agent/monitor/boards.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "agent/monitor/node_aggregator.h"
#include "agent/monitor/table_keeper_testing.h"
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
  TableKeeper keeper_;
  MonitorBoards boards_{executor_, executor_, keeper_};
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
  EXPECT_THAT(refusal(std::move(offer)), HasSubstr("offered as 10"));
  UniqueFd small(memfd_create("small", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(fcntl(small.get(), F_ADD_SEALS, F_SEAL_SHRINK), 0);
  EXPECT_THAT(refusal(MakeOffer(small.get(), 0)), HasSubstr("bytes, found 0"));
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

TEST_F(MonitorBoardsTest, TheNextWorkerHasTheBoardsOfTheLast) {
  TestBoard board;
  board.Seal();
  std::memcpy(board.header().job, "job", 4);
  std::memcpy(board.header().node, "n7", 3);
  board.header().rank = 2;
  MonitorBoards::Offer offer = MakeOffer(board.fd(), 2);
  ASSERT_TRUE(boards_.Adopt(std::move(offer)).ok());
  Die(AdoptOne(1));
  EXPECT_EQ(keeper_.size(), 4u);
  std::vector<KeptDescriptor> kept = keeper_.HandOver();
  int dead_process = -1;
  for (const KeptDescriptor& descriptor : kept) {
    if (descriptor.name.find("process-101") != std::string::npos) {
      dead_process = descriptor.fd.get();
    }
  }
  // And what nobody can use: a board without a process, and one that is none any more.
  keeper_.Keep("agent/monitor/9/board", board.fd());
  kept.push_back({"agent/monitor/9/board", UniqueFd(dup(board.fd()))});
  MonitorBoards next(executor_, executor_, keeper_);
  next.Recover(std::move(kept));
  EXPECT_EQ(keeper_.size(), 4u);
  EXPECT_EQ(next.alive_count(), 2u);
  Die(dead_process);
  EXPECT_EQ(next.alive_count(), 1u);
  EXPECT_EQ(next.dead_count(), 1u);
  json status = json::parse(next.StatusJson());
  std::sort(status.begin(), status.end(),
            [](const json& a, const json& b) { return a["process_id"] > b["process_id"]; });
  EXPECT_EQ(status[0]["job"], "job");
  EXPECT_EQ(status[0]["node"], "n7");
  EXPECT_EQ(status[0]["rank"], 2);
  EXPECT_EQ(status[0]["process_id"], 102);
  EXPECT_EQ(status[0]["alive"], true);
  EXPECT_EQ(status[0]["communicators"][0]["enqueued"], 7);
  // Offered again it is known; a new one gets names that are free.
  ASSERT_TRUE(next.Adopt(MakeOffer(board.fd(), 2)).ok());
  EXPECT_EQ(next.alive_count(), 1u);
  TestBoard another;
  another.Seal();
  ASSERT_TRUE(next.Adopt(MakeOffer(another.fd(), 3)).ok());
  EXPECT_EQ(keeper_.size(), 6u);
  // Kept no longer than the board itself.
  executor_.AdvanceTime(MonitorBoards::kDeadAge);
  EXPECT_EQ(next.dead_count(), 0u);
  EXPECT_EQ(keeper_.size(), 4u);
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

// A ring of a TestBoard, written as hook/monitor_board.cc does.
class TestRing {
 public:
  explicit TestRing(TestBoard& board, uint32_t index = 0)
      : ring_(reinterpret_cast<abi::Ring*>(board.data() + board.header().rings_offset)[index]) {}
  void Write(abi::RecordKind kind, uint64_t operation, uint64_t ticks, uint32_t place = 0) {
    const uint64_t at = ring_.written.load();
    abi::Record& record = ring_.records[at % abi::kRingRecords];
    record.ticks.store(ticks);
    record.what.store(static_cast<uint64_t>(kind) | uint64_t{place} << 16 | uint64_t{3} << 32);
    record.operation.store(operation);
    record.value.store(4096);
    ring_.written.store(at + 1);
  }
  abi::Ring& ring() { return ring_; }

 private:
  abi::Ring& ring_;
};

std::vector<json> ParseLines(const std::string& text) {
  std::vector<json> lines;
  for (const absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
    lines.push_back(json::parse(std::string(line)));
  }
  return lines;
}

TEST_F(MonitorBoardsTest, AWindowAsksTheRankAndTellsWhatItRecorded) {
  TestBoard board;
  board.Seal();
  TestRing first(board, 0);
  TestRing second(board, 5);
  first.Write(abi::RecordKind::kOperationEnqueued, 1, 10);  // before anybody asked
  ASSERT_TRUE(boards_.Adopt(MakeOffer(board.fd(), 2)).ok());
  std::vector<json> lines;
  const auto done = [&](const std::string& text) { lines = ParseLines(text); };
  ASSERT_TRUE(boards_.Window("job", 2, absl::Seconds(2), done).ok());
  // Asked for, on the board's own clock.
  const auto& requests =
      *reinterpret_cast<abi::BoardRequests*>(board.data() + abi::kBoardRequestsAt);
  const uint64_t until = requests.window_until_ticks.load();
  ASSERT_GT(until, 2'000'000'000u);
  const uint64_t begin = until - 2'000'000'000;
  second.Write(abi::RecordKind::kStepState, 7, begin + 2000, 0);
  first.Write(abi::RecordKind::kOperationEnqueued, 2, begin + 1000);
  executor_.AdvanceTime(absl::Seconds(1));
  first.Write(abi::RecordKind::kOperationFinished, 2, begin + 1'000'000'000);
  executor_.AdvanceTime(absl::Milliseconds(900));
  EXPECT_TRUE(lines.empty());
  executor_.AdvanceTime(absl::Milliseconds(200));
  ASSERT_EQ(lines.size(), 4u);
  EXPECT_EQ(lines[0]["kind"], "operation_enqueued");
  EXPECT_EQ(lines[0]["operation"], 2);
  EXPECT_EQ(lines[0]["bytes"], 4096);
  EXPECT_EQ(lines[0]["communicator"], "0000000000000abc");
  EXPECT_DOUBLE_EQ(lines[0]["us"].get<double>(), 1.0);
  EXPECT_EQ(lines[1]["kind"], "step_state");
  EXPECT_EQ(lines[1]["thread"], 5);
  EXPECT_EQ(lines[1]["direction"], "send");
  EXPECT_EQ(lines[1]["peer"], 3);
  EXPECT_EQ(lines[1]["step"], 3);
  EXPECT_EQ(lines[2]["kind"], "operation_finished");
  EXPECT_EQ(lines[3]["kind"], "window");
  EXPECT_EQ(lines[3]["records"], 3);
  EXPECT_EQ(lines[3]["missed"], 0);
  EXPECT_EQ(lines[3]["opened"], true);
}

// A job that has no name, or one that is none, is asked for as `monitor status` shows it.
TEST_F(MonitorBoardsTest, AWindowFindsAJobByTheNameThatReportsHaveForIt) {
  TestBoard board;
  board.Seal();
  MonitorBoards::Offer offer = MakeOffer(board.fd(), 2);
  offer.job = "bad name/..";
  ASSERT_TRUE(boards_.Adopt(std::move(offer)).ok());
  int told = 0;
  const auto done = [&](const std::string&) { ++told; };
  for (const char* name : {NodeAggregator::kUnnamed, "bad name/.."}) {
    EXPECT_TRUE(boards_.Window(name, 2, absl::Seconds(1), done).ok()) << name;
  }
  EXPECT_EQ(boards_.Window("other", 2, absl::Seconds(1), done).code(), absl::StatusCode::kNotFound);
  executor_.AdvanceTime(absl::Seconds(2));
  EXPECT_EQ(told, 2);
}

// Jobs without a name: the names that they get, as told by boards().
class UnnamedJobsTest : public MonitorBoardsTest {
 protected:
  std::string NameOfNew(uint32_t rank, uint32_t process, const std::string& node = "n7") {
    TestBoard board;
    board.Seal();
    MonitorBoards::Offer offer = MakeOffer(board.fd(), rank);
    offer.job = "";
    offer.node = node;
    offer.process_id = process;
    EXPECT_TRUE(boards_.Adopt(std::move(offer)).ok());
    return NodeAggregator::JobNamed(boards_.boards().back()->offer.job);
  }
  // None of them is a process here: nobody knows their parents.
  static constexpr uint32_t kStrange = 4'000'000'000;
};

TEST_F(UnnamedJobsTest, ASecondJobWithTheSameRanksHasANameOfItsOwn) {
  for (uint32_t rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(NameOfNew(rank, kStrange + rank), "unnamed");
  }
  for (uint32_t rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(NameOfNew(rank, kStrange + 10 + rank), "unnamed-2");
  }
  EXPECT_EQ(NameOfNew(1, kStrange + 20), "unnamed-3");
  // Another board of a process, one of another node, and the next rank of the first job.
  EXPECT_EQ(NameOfNew(2, kStrange + 12), "unnamed-2");
  EXPECT_EQ(NameOfNew(1, kStrange + 30, "n8"), "unnamed");
  EXPECT_EQ(NameOfNew(3, kStrange + 3), "unnamed");
  // One that has a name keeps it.
  AdoptOne(0);
  EXPECT_EQ(boards_.boards().back()->offer.job, "job");
}

TEST_F(UnnamedJobsTest, RanksOfOneParentAreOfOneJobInAnyOrder) {
  // Our children are one family, we are of another one.
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    for (;;) pause();
  }
  const auto self = static_cast<uint32_t>(getpid());
  EXPECT_EQ(NameOfNew(0, self), "unnamed");
  EXPECT_EQ(NameOfNew(0, static_cast<uint32_t>(child)), "unnamed-2");
  const pid_t sibling = fork();
  ASSERT_GE(sibling, 0);
  if (sibling == 0) {
    for (;;) pause();
  }
  // By its number it could be of the first job.
  EXPECT_EQ(NameOfNew(1, static_cast<uint32_t>(sibling)), "unnamed-2");
  for (const pid_t one : {child, sibling}) {
    kill(one, SIGKILL);
    waitpid(one, nullptr, 0);
  }
}

TEST_F(MonitorBoardsTest, AWindowCountsWhatWasOverwrittenBeforeItLooked) {
  TestBoard board;
  board.Seal();
  TestRing ring(board);
  ASSERT_TRUE(boards_.Adopt(MakeOffer(board.fd(), 2)).ok());
  json end;
  const auto done = [&](const std::string& text) { end = ParseLines(text).back(); };
  ASSERT_TRUE(boards_.Window("job", 2, absl::Seconds(1), done).ok());
  for (uint64_t i = 0; i < abi::kRingRecords + 10; ++i) {
    ring.Write(abi::RecordKind::kApiCall, i, 1);
  }
  executor_.AdvanceTime(absl::Seconds(2));
  // The oldest that is still there may be overwritten at any moment: it is not taken.
  EXPECT_EQ(end["records"], abi::kRingRecords - 1);
  EXPECT_EQ(end["missed"], 11);
}

TEST_F(MonitorBoardsTest, AWindowThatCannotBeIsRefusedByName) {
  const auto never = [](const std::string&) { FAIL(); };
  const auto refusal = [&](const std::string& job, uint32_t rank, absl::Duration length) {
    return boards_.Window(job, rank, length, never);
  };
  AdoptOne(2);
  Die(AdoptOne(3));
  EXPECT_EQ(refusal("job", 3, absl::Seconds(1)).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(refusal("other", 2, absl::Seconds(1)).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(refusal("job", 2, absl::ZeroDuration()).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(refusal("job", 2, RecordWindow::kLengthMax + absl::Seconds(1)).code(),
            absl::StatusCode::kInvalidArgument);
  int over = 0;
  for (size_t i = 0; i < MonitorBoards::kWindowsMax; ++i) {
    EXPECT_TRUE(
        boards_.Window("job", 2, absl::Seconds(1), [&](const std::string&) { ++over; }).ok());
  }
  EXPECT_EQ(refusal("job", 2, absl::Seconds(1)).code(), absl::StatusCode::kResourceExhausted);
  executor_.AdvanceTime(absl::Seconds(2));
  EXPECT_EQ(over, static_cast<int>(MonitorBoards::kWindowsMax));
  EXPECT_TRUE(boards_.Window("job", 2, absl::Seconds(1), [](const std::string&) {}).ok());
}

// Goal: rings of garbage end in lines that can be parsed, of bounded number, and the window closes.
TEST_F(MonitorBoardsTest, GarbageInTheRingsHarmsNoWindow) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937_64 random(seed);
  TestBoard board;
  board.Seal();
  ASSERT_TRUE(boards_.Adopt(MakeOffer(board.fd(), 2)).ok());
  json end;
  const auto done = [&](const std::string& text) {
    EXPECT_LE(std::count(text.begin(), text.end(), '\n'),
              static_cast<long>(RecordWindow::kRecordsMax) + 1);
    end = ParseLines(text).back();
  };
  ASSERT_TRUE(boards_.Window("job", 2, absl::Seconds(1), done).ok());
  for (uint64_t at = sizeof(abi::BoardHeader); at + 8 <= abi::kBoardBytes; at += 8) {
    const uint64_t word = random() % 2 == 0 ? random() % 16 : random();
    std::memcpy(board.data() + at, &word, 8);
  }
  board.header().ticks_per_second = 0;
  for (int i = 0; i < 20; ++i) {
    TestRing(board, i % abi::kBoardRings).ring().written.store(random());
    executor_.AdvanceTime(absl::Milliseconds(100));
  }
  EXPECT_EQ(end["kind"], "window");
  EXPECT_GT(end["records"], 0);
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
