// The board's memory: a reader at any instant sees a whole value or knows that it did not, whatever
// the writers do meanwhile, and whatever garbage it is given.
#include "hook/monitor_board.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "hook/abi/monitor_read.h"
#include "hook/monitor_events.h"

namespace holdfast::hook {
namespace {

using abi::SlotDirection;
using abi::WaitState;

std::unique_ptr<MonitorBoard> MakeBoard(abi::MonitorLevel level,
                                        MonitorBoard::Clock clock = MonitorBoard::Clock::kBest) {
  Result<std::unique_ptr<MonitorBoard>> board =
      MonitorBoard::Create(abi::BoardWriter::kHookApi, level,
                           {.job = "a-job",
                            .attempt_key = "k:1",
                            .node = "n0",
                            .rank = 3,
                            .world_size = 8,
                            .local_rank = 1},
                           clock);
  EXPECT_TRUE(board.ok()) << board.error().text();
  return std::move(board.value());
}

std::unique_ptr<MonitorEvents> MakeEvents(abi::MonitorLevel level) {
  Result<std::unique_ptr<MonitorEvents>> events = MonitorEvents::Create(MakeBoard(level));
  EXPECT_TRUE(events.ok()) << events.error().text();
  return std::move(events.value());
}

abi::BoardView ViewOf(const MonitorBoard& board) {
  return abi::ViewBoard(board.data(), abi::kBoardBytes);
}

TEST(MonitorBoardTest, TheHeaderSaysWhoWritesAndHowTimeRuns) {
  for (const auto clock : {MonitorBoard::Clock::kBest, MonitorBoard::Clock::kMonotonic}) {
    const auto board = MakeBoard(abi::MonitorLevel::kLight, clock);
    const abi::BoardView view = ViewOf(*board);
    ASSERT_NE(view.header, nullptr);
    const abi::BoardHeader& header = *view.header;
    EXPECT_STREQ(header.job, "a-job");
    EXPECT_STREQ(header.attempt_key, "k:1");
    EXPECT_STREQ(header.node, "n0");
    EXPECT_EQ(header.rank, 3u);
    EXPECT_EQ(header.world_size, 8u);
    EXPECT_EQ(header.local_rank, 1u);
    EXPECT_EQ(header.process_id, static_cast<uint32_t>(getpid()));
    EXPECT_GT(header.ticks_per_second, 100'000'000u);
    if (clock == MonitorBoard::Clock::kMonotonic) {
      EXPECT_EQ(header.clock, abi::BoardClock::kMonotonicNs);
      EXPECT_EQ(header.ticks_per_second, 1'000'000'000u);
    }
    // Both clocks of the header and now: the same time has passed, within 5%; and whatever happens
    // between looking at one and at the other.
    std::atomic<uint64_t> work{0};
    const int64_t until = MonotonicNs() + 20'000'000;
    while (MonotonicNs() < until) work.fetch_add(1);
    const int64_t before_ns = MonotonicNs() - header.start_monotonic_ns;
    const double ticks = static_cast<double>(board->Now() - header.start_ticks);
    const int64_t after_ns = MonotonicNs() - header.start_monotonic_ns;
    const double ns = ticks / static_cast<double>(header.ticks_per_second) * 1e9;
    EXPECT_GT(ns, 0.95 * static_cast<double>(before_ns));
    EXPECT_LT(ns, 1.05 * static_cast<double>(after_ns));
  }
}

TEST(MonitorBoardTest, ItsSizeCannotBeChanged) {
  const auto board = MakeBoard(abi::MonitorLevel::kLight);
  EXPECT_NE(ftruncate(board->fd(), 4096), 0);
  EXPECT_NE(ftruncate(board->fd(), 2 * static_cast<off_t>(abi::kBoardBytes)), 0);
}

TEST(MonitorBoardTest, LightTouchesLessMemoryThanAMegabyte) {
  const auto events = MakeEvents(abi::MonitorLevel::kLight);
  // 10 communicators of 32 channels, send and receive each.
  for (int i = 0; i < 10; ++i) {
    const Token communicator = events->OpenCommunicator({.hash = 1, .ranks = 8});
    const Token operation = events->BeginOperation(communicator, {});
    for (uint32_t channel = 0; channel < 32; ++channel) {
      for (const bool send : {true, false}) {
        events->BeginTransfer(communicator, operation,
                              {.channel = channel, .peer = 1, .steps = 4, .send = send});
      }
    }
  }
  std::vector<unsigned char> resident((abi::kBoardBytes + 4095) / 4096);
  ASSERT_EQ(
      mincore(const_cast<std::byte*>(events->board().data()), abi::kBoardBytes, resident.data()),
      0);
  const auto pages =
      std::count_if(resident.begin(), resident.end(), [](unsigned char page) { return page & 1; });
  EXPECT_GT(pages, 10);
  EXPECT_LT(pages * 4096, 512 << 10);
}

// Goal: no reading mixes two changes.
// Method: each writer has its slot and writes values that belong together, until the reader has
//   checked enough of them.
TEST(MonitorBoardTest, NoReadingMixesTwoChanges) {
  const auto board = MakeBoard(abi::MonitorLevel::kLight);
  const uint32_t communicator = board->OpenCommunicator({.hash = 1, .ranks = 8}, 0, 24, 8);
  constexpr uint32_t kWriters = 2;
  constexpr uint64_t kReadings = 1'000;
  std::vector<uint32_t> places;
  for (uint32_t i = 0; i < kWriters; ++i) {
    places.push_back(board->FindSlot(communicator, i, 1, SlotDirection::kSend));
    ASSERT_NE(places.back(), kNoPlace);
  }
  std::atomic<bool> enough{false};
  std::vector<std::thread> threads;
  for (uint32_t i = 0; i < kWriters; ++i) {
    threads.emplace_back([&, i] {
      abi::Slot& slot = board->slot(places[i]);
      for (uint64_t n = 1; !enough.load(); ++n) {
        const uint64_t low = n & UINT32_MAX;
        SlotChange change(slot);
        change.SetState(n % 2 == 0 ? WaitState::kSendWait : WaitState::kSendPeerWait, n % 9,
                        abi::OperationKind::kAllReduce, n);
        slot.operation.store(n, std::memory_order_release);
        slot.steps.store(low | low << 32, std::memory_order_release);
        slot.bytes.store(3 * n, std::memory_order_release);
        change.Commit();
        if (n % 64 == 0) std::this_thread::yield();
      }
    });
  }
  const abi::BoardView view = ViewOf(*board);
  // Each of another change than the one before: a writer that does not run shows nothing new.
  uint64_t readings = 0;
  std::vector<uint64_t> last(abi::kBoardSlots);
  while (readings < kReadings) {
    const uint64_t before = readings;
    for (const uint32_t place : places) {
      abi::SlotReading reading;
      // Torn as long as a writer is not scheduled in the middle of a change.
      if (abi::ReadSlot(view, place, &reading) != abi::SlotRead::kRead || reading.operation == 0) {
        continue;
      }
      const uint64_t n = reading.operation;
      readings += n != std::exchange(last[place], n);
      EXPECT_EQ(reading.steps_done, static_cast<uint32_t>(n));
      EXPECT_EQ(reading.steps_total, static_cast<uint32_t>(n));
      EXPECT_EQ(reading.bytes, 3 * n);
      EXPECT_EQ(reading.since, n);
      EXPECT_EQ(reading.open_steps, n % 9);
      EXPECT_EQ(reading.state, n % 2 == 0 ? WaitState::kSendWait : WaitState::kSendPeerWait);
    }
    if (readings == before) std::this_thread::yield();
  }
  enough.store(true);
  for (std::thread& thread : threads) thread.join();
}

// Two writers in one slot are against the rules; afterwards it must be readable again.
TEST(MonitorBoardTest, ASlotRecoversFromTwoWritersAtOnce) {
  const auto board = MakeBoard(abi::MonitorLevel::kLight);
  const uint32_t communicator = board->OpenCommunicator({.hash = 1}, 0, 24, 8);
  const uint32_t place = board->FindSlot(communicator, 0, 1, SlotDirection::kSend);
  abi::Slot& slot = board->slot(place);
  SlotChange first(slot);
  SlotChange second(slot);
  second.SetState(WaitState::kSendWait, 1, abi::OperationKind::kUnknown, 5);
  second.Commit();
  first.SetState(WaitState::kSendPeerWait, 1, abi::OperationKind::kUnknown, 6);
  first.Commit();
  abi::SlotReading reading;
  EXPECT_EQ(abi::ReadSlot(ViewOf(*board), place, &reading), abi::SlotRead::kRead);
}

TEST(MonitorBoardTest, AWriterThatDiedInASlotIsSaidToBeInIt) {
  const auto board = MakeBoard(abi::MonitorLevel::kLight);
  const uint32_t communicator = board->OpenCommunicator({.hash = 1}, 0, 24, 8);
  const uint32_t place = board->FindSlot(communicator, 0, 1, SlotDirection::kSend);
  SlotChange never_committed(board->slot(place));
  abi::SlotReading reading;
  EXPECT_EQ(abi::ReadSlot(ViewOf(*board), place, &reading), abi::SlotRead::kTorn);
}

TEST(MonitorBoardTest, SlotsOfAClosedCommunicatorAreLeftoversOnceItsPlaceIsTaken) {
  const auto board = MakeBoard(abi::MonitorLevel::kLight);
  const uint32_t first = board->OpenCommunicator({.hash = 1}, 0, 24, 8);
  const uint32_t place = board->FindSlot(first, 0, 1, SlotDirection::kSend);
  board->CloseCommunicator(first);
  abi::SlotReading reading;
  EXPECT_EQ(abi::ReadSlot(ViewOf(*board), place, &reading), abi::SlotRead::kRead);  // evidence
  for (uint32_t i = 0; i < abi::kBoardCommunicators; ++i) {
    board->CloseCommunicator(board->OpenCommunicator({.hash = 2}, 0, 24, 8));
  }
  EXPECT_EQ(abi::ReadSlot(ViewOf(*board), place, &reading), abi::SlotRead::kUnused);
}

TEST(MonitorBoardTest, ARingKeepsTheNewestAndSaysWhatItDoesNotHave) {
  const auto board = MakeBoard(abi::MonitorLevel::kFull);
  constexpr uint64_t kWritten = abi::kRingRecords + 100;
  for (uint64_t i = 0; i < kWritten; ++i) {
    board->Record({.kind = abi::RecordKind::kStepDone,
                   .step = static_cast<uint32_t>(i),
                   .operation = i,
                   .value = 2 * i},
                  i + 1);
  }
  const abi::BoardView view = ViewOf(*board);
  int rings = 0;
  for (uint32_t i = 0; i < abi::kBoardRings; ++i) {
    const abi::Ring& ring = view.rings[i];
    if (ring.thread.load() == 0) continue;
    ++rings;
    EXPECT_EQ(ring.written.load(), kWritten);
    for (uint64_t at = 0; at < kWritten + 1; ++at) {
      abi::RecordReading record;
      // The oldest place is where the next record would be written.
      const bool kept = at > kWritten - abi::kRingRecords && at < kWritten;
      ASSERT_EQ(abi::ReadRecord(ring, at, &record), kept) << at;
      if (!kept) continue;
      EXPECT_EQ(record.operation, at);
      EXPECT_EQ(record.value, 2 * at);
      EXPECT_EQ(record.ticks, at + 1);
    }
  }
  EXPECT_EQ(rings, 1);
}

// The one page that the agent writes, mapped by itself as the agent maps it.
class RequestPage {
 public:
  explicit RequestPage(const MonitorBoard& board)
      : memory_(mmap(nullptr, sizeof(abi::BoardRequests), PROT_READ | PROT_WRITE, MAP_SHARED,
                     board.fd(), static_cast<off_t>(abi::kBoardRequestsAt))) {
    EXPECT_NE(memory_, MAP_FAILED);
  }
  ~RequestPage() { munmap(memory_, sizeof(abi::BoardRequests)); }
  RequestPage(const RequestPage&) = delete;
  RequestPage& operator=(const RequestPage&) = delete;
  void AskUntil(uint64_t ticks) {
    static_cast<abi::BoardRequests*>(memory_)->window_until_ticks.store(ticks);
  }

 private:
  void* memory_;
};

uint64_t RecordsOf(const MonitorBoard& board) {
  uint64_t sum = 0;
  for (uint32_t i = 0; i < abi::kBoardRings; ++i) sum += ViewOf(board).rings[i].written.load();
  return sum;
}

TEST(MonitorBoardTest, RecordsAreKeptFromTheRequestToItsTime) {
  const auto board = MakeBoard(abi::MonitorLevel::kLight, MonitorBoard::Clock::kMonotonic);
  RequestPage requests(*board);
  const auto record = [&](uint64_t now) {
    board->Record({.kind = abi::RecordKind::kApiCall}, now);
    return RecordsOf(*board);
  };
  EXPECT_EQ(record(100), 0u);
  requests.AskUntil(2000);
  EXPECT_EQ(record(1000), 0u);  // nobody has looked yet
  board->FollowRequests(1000);
  EXPECT_TRUE(board->recording());
  EXPECT_EQ(record(1500), 1u);
  EXPECT_EQ(record(2000), 2u);
  EXPECT_EQ(record(2001), 2u);
  EXPECT_FALSE(board->recording());
  board->FollowRequests(2002);  // over
  EXPECT_FALSE(board->recording());
  // Again, and longer while it is open.
  requests.AskUntil(4000);
  board->FollowRequests(3000);
  requests.AskUntil(6000);
  board->FollowRequests(3500);
  EXPECT_EQ(record(5000), 3u);
  // One thread closes the old window behind another's back: the next one that looks opens it.
  board->header().window.store(0);
  board->FollowRequests(5001);
  EXPECT_EQ(record(5002), 4u);
}

TEST(MonitorBoardTest, ARequestThatMakesNoSenseAsksForNothing) {
  const auto board = MakeBoard(abi::MonitorLevel::kLight, MonitorBoard::Clock::kMonotonic);
  RequestPage requests(*board);
  const uint64_t now = 1'000'000;
  const uint64_t longest = abi::kWindowSecondsMax * board->header().ticks_per_second;
  for (const uint64_t until :
       {uint64_t{0}, uint64_t{1}, now, now + longest + 1, uint64_t{UINT64_MAX}}) {
    requests.AskUntil(until);
    board->FollowRequests(now);
    EXPECT_FALSE(board->recording()) << until;
  }
  requests.AskUntil(now + longest);
  board->FollowRequests(now);
  EXPECT_TRUE(board->recording());
}

TEST(MonitorBoardTest, LevelFullRecordsWhateverIsAskedFor) {
  const auto board = MakeBoard(abi::MonitorLevel::kFull, MonitorBoard::Clock::kMonotonic);
  RequestPage requests(*board);
  requests.AskUntil(2000);
  board->FollowRequests(1000);
  board->Record({.kind = abi::RecordKind::kApiCall}, 5000);
  EXPECT_EQ(RecordsOf(*board), 1u);
  EXPECT_TRUE(board->recording());
}

// What the program does opens the window: an operation that is enqueued, a proxy thread that wakes.
TEST(MonitorBoardTest, AnOperationOrAProxyThreadOpensTheWindow) {
  for (const bool by_operation : {true, false}) {
    const auto events = MakeEvents(abi::MonitorLevel::kLight);
    RequestPage requests(events->board());
    const Token communicator = events->OpenCommunicator({.hash = 1, .ranks = 8});
    const Token before = events->BeginOperation(communicator, {});
    requests.AskUntil(events->board().Now() + events->board().header().ticks_per_second * 30);
    events->BeginTransfer(communicator, before, {.peer = 1, .steps = 4, .send = true});
    EXPECT_EQ(RecordsOf(events->board()), 0u);
    if (by_operation) {
      events->BeginOperation(communicator, {});
    } else {
      events->ProxyThreadState(events->BeginProxyThread(communicator), WaitState::kProxyActive, 0);
    }
    EXPECT_EQ(RecordsOf(events->board()), 1u);
    events->BeginTransfer(communicator, before, {.peer = 2, .steps = 4, .send = true});
    EXPECT_EQ(RecordsOf(events->board()), 2u);
  }
}

// Threads that live at once, more than there are rings: what they record is counted as dropped.
TEST(MonitorBoardTest, ThreadsWithoutARingAreCounted) {
  const auto board = MakeBoard(abi::MonitorLevel::kFull);
  constexpr int kThreads = abi::kBoardRings + 4;
  std::atomic<int> recorded{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      board->Record({.kind = abi::RecordKind::kApiCall}, 1);
      recorded.fetch_add(1);
      while (recorded.load() < kThreads) std::this_thread::yield();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(ViewOf(*board).header->drops[static_cast<int>(abi::Drop::kRings)].load(), 4u);
}

TEST(MonitorBoardTest, StepsAndSectionsAreShown) {
  const auto board = MakeBoard(abi::MonitorLevel::kLight);
  board->StepDone(41);
  const char* longer = "a section whose name is longer than 31 bytes";
  board->SetSection(0, longer);
  board->SetSection(1, "inner");
  const abi::BoardHeader& header = *ViewOf(*board).header;
  EXPECT_EQ(header.step.load(), 41u);
  EXPECT_EQ(header.step_count.load(), 1u);
  EXPECT_EQ(header.section_depth.load(), 2u);
  char name[abi::kBoardSectionNameBytes];
  std::memcpy(name, header.section_names[0], sizeof(name));
  EXPECT_EQ(std::string(name), std::string(longer).substr(0, 31));
  std::memcpy(name, header.section_names[1], sizeof(name));
  EXPECT_STREQ(name, "inner");
  board->SetSectionDepth(0);
  EXPECT_EQ(header.section_depth.load(), 0u);
}

// Goal: whatever is in the memory, reading it ends, stays inside, and what it calls a state is one.
// Method: random words over a whole board, header right and wrong. Seed printed.
TEST(MonitorBoardTest, GarbageIsReadWithoutHarm) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  const auto board = MakeBoard(abi::MonitorLevel::kFull);
  std::vector<std::byte> copy(abi::kBoardBytes + 64);
  std::byte* const data = copy.data() + (64 - reinterpret_cast<uintptr_t>(copy.data()) % 64) % 64;
  int garbage = 0;
  for (int round = 0; round < 4; ++round) {
    for (uint64_t at = 0; at + 8 <= abi::kBoardBytes; at += 8) {
      const uint64_t word = random();
      std::memcpy(data + at, &word, 8);
    }
    EXPECT_EQ(abi::ViewBoard(data, abi::kBoardBytes).header, nullptr);
    std::memcpy(data, board->data(), sizeof(abi::BoardHeader));
    EXPECT_EQ(abi::ViewBoard(data, abi::kBoardBytes - 1).header, nullptr);
    const abi::BoardView view = abi::ViewBoard(data, abi::kBoardBytes);
    ASSERT_NE(view.header, nullptr);
    for (uint32_t i = 0; i < abi::kBoardCommunicators; ++i) {
      abi::CommunicatorReading reading;
      abi::ReadCommunicator(view.communicators[i], &reading);
      EXPECT_LT(std::strlen(reading.name), sizeof(reading.name));
    }
    for (uint32_t i = 0; i < abi::kBoardSlots; ++i) {
      abi::SlotReading reading;
      const abi::SlotRead result = abi::ReadSlot(view, i, &reading);
      garbage += result == abi::SlotRead::kGarbage;
      if (result == abi::SlotRead::kRead) {
        EXPECT_LT(static_cast<uint32_t>(reading.state), abi::kWaitStates);
        EXPECT_LT(static_cast<uint32_t>(reading.kind), abi::kOperationKinds);
      }
    }
    for (uint32_t i = 0; i < abi::kBoardRings; ++i) {
      abi::RecordReading reading;
      abi::ReadRecord(view.rings[i], random(), &reading);
    }
  }
  EXPECT_GT(garbage, 0);
}

TEST(MonitorBoardTest, LevelsAndIdentityComeFromTheEnvironment) {
  for (const auto& [text, level] : {std::pair{"off", abi::MonitorLevel::kOff},
                                    {"light", abi::MonitorLevel::kLight},
                                    {"full", abi::MonitorLevel::kFull},
                                    {"", abi::MonitorLevel::kLight}}) {
    setenv("HOLDFAST_MONITOR", text, 1);
    ASSERT_TRUE(ReadMonitorLevel().ok());
    EXPECT_EQ(ReadMonitorLevel().value(), level);
  }
  setenv("HOLDFAST_MONITOR", "loud", 1);
  EXPECT_EQ(ReadMonitorLevel().error().code(), HF_INVALID_ARGUMENT);
  unsetenv("HOLDFAST_MONITOR");
  setenv("RANK", "12", 1);
  setenv("WORLD_SIZE", "many", 1);
  setenv("HOLDFAST_NODE", "rack7-3", 1);
  unsetenv("HOLDFAST_ATTEMPT_KEY");
  setenv("TORCHELASTIC_RUN_ID", "run", 1);
  setenv("TORCHELASTIC_RESTART_COUNT", "2", 1);
  const MonitorIdentity identity = ReadMonitorIdentity();
  EXPECT_EQ(identity.rank, 12u);
  EXPECT_EQ(identity.world_size, 0u);
  EXPECT_EQ(identity.node, "rack7-3");
  EXPECT_EQ(identity.attempt_key, "run:2");
  unsetenv("HOLDFAST_NODE");
  EXPECT_FALSE(ReadMonitorIdentity().node.empty());
  for (const char* name :
       {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"}) {
    unsetenv(name);
  }
}

}  // namespace
}  // namespace holdfast::hook
