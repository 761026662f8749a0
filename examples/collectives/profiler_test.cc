// Goal: a plugin is told what NCCL tells it, in its order, with its parents, from its threads; and
// the monitor's board, through the real plugin, shows each wait state when its cause is there.
// Method: the same jobs as were recorded with NCCL's own host code (beside the repository; skipped
// where they are absent), through a plugin that records; then the real plugin, a cause for each
// state, and the board read as an outsider reads it.
#include "examples/collectives/profiler.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <filesystem>
#include <fstream>
#include <latch>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "absl/strings/str_cat.h"
#include "examples/collectives/collectives.h"
#include "examples/collectives/device.h"
#include "examples/collectives/ranks_testing.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "hook/profiler/board_testing.h"
#include "hook/profiler/call_order_testing.h"
#include "hook/profiler/recorded_stream_testing.h"

namespace collectives {
namespace {

namespace abi = holdfast::abi;
namespace hp = holdfast::profiler;
using abi::SlotDirection;
using abi::WaitState;
using testing::ElementsAre;

// ---- What is called, against what NCCL called

class StreamsTest : public testing::Test {
 protected:
  StreamsTest() {
    std::string name = std::filesystem::temp_directory_path() / "streams-XXXXXX";
    directory_ = mkdtemp(name.data());
    setenv("COLLECTIVES_TEST_STREAMS", directory_.c_str(), 1);
  }
  ~StreamsTest() override { std::filesystem::remove_all(directory_); }

  // Runs `body` as ranks of one communicator, each a process with the recording plugin, and returns
  // what was called in each.
  std::vector<std::vector<hp::CallRecord>> Record(
      World& world, const std::function<bool(Context&, Communicator&)>& body) {
    world.options.profiler_plugin = COLLECTIVES_TEST_RECORDER;
    {
      Children children;
      Fork(world, children, [&](const Options& options, int report) {
        auto context = *Context::Create(options);
        auto communicator = *context->CreateCommunicator("recorded");
        const bool done = body(*context, *communicator);
        communicator.reset();
        context.reset();
        Report(report, done ? "done" : "failed");
      });
      for (uint32_t rank = 0; rank < world.options.world_size; ++rank) {
        EXPECT_EQ(children.ReadLine(rank), "done");
      }
    }
    std::vector<std::vector<hp::CallRecord>> streams;
    for (uint32_t rank = 0; rank < world.options.world_size; ++rank) {
      streams.push_back(hp::ToRecords(
          hp::ReadStream(absl::StrCat(directory_.string(), "/rank-", rank, ".jsonl"))));
    }
    return streams;
  }

  std::filesystem::path directory_;
};

// Parents before children, states and stop between start and the end, at most kCredits steps open.
void ExpectWellFormed(const std::vector<hp::CallRecord>& calls) {
  const std::map<uint64_t, std::set<uint64_t>> parents_of = {{hp::kCollApi, {hp::kGroupApi}},
                                                             {hp::kP2pApi, {hp::kGroupApi}},
                                                             {hp::kKernelLaunch, {hp::kGroupApi}},
                                                             {hp::kColl, {hp::kCollApi}},
                                                             {hp::kP2p, {hp::kP2pApi}},
                                                             {hp::kProxyOp, {hp::kColl, hp::kP2p}},
                                                             {hp::kProxyStep, {hp::kProxyOp}},
                                                             {hp::kKernelCh, {hp::kColl, hp::kP2p}},
                                                             {hp::kGroup, {0}},
                                                             {hp::kGroupApi, {0}},
                                                             {hp::kProxyCtrl, {0}}};
  std::map<uint64_t, uint64_t> open;  // handle: type
  for (const hp::CallRecord& call : calls) {
    if (call.call == "start") {
      EXPECT_TRUE(parents_of.at(call.type).contains(call.parent_type)) << call.type;
      open[call.handle] = call.type;
    } else {
      EXPECT_TRUE(open.contains(call.handle)) << call.call << " of an event that is over";
      if (call.call == "stop") open.erase(call.handle);
    }
  }
  EXPECT_TRUE(open.empty()) << open.size() << " events are open at the end";
  EXPECT_LE(hp::MostOpenSteps(calls), static_cast<int>(kCredits));
}

TEST_F(StreamsTest, AnAllReduceIsToldAsNcclTellsIt) {
  // Chunks as NCCL had them: the slices of a segment.
  for (const auto& [name, size, count, chunk_bytes] :
       {std::tuple{"allreduce-2", 2u, size_t{4'000'000}, size_t{1} << 20},
        {"allreduce-4", 4u, size_t{1'000'000}, size_t{256} << 10}}) {
    const std::string job = std::string(HOLDFAST_TEST_SHARED) + "/fixtures/nccl/" + name;
    if (!std::filesystem::exists(job)) {
      GTEST_SKIP() << "recorded streams are not here: " << job << ": 1 skipped";
    }
    World world(size);
    world.options.ring_count = 2;
    world.options.chunk_bytes = chunk_bytes;
    const auto streams = Record(world, [elements = count](Context&, Communicator& communicator) {
      std::vector<float> data(elements, 1);
      bool ok = true;
      for (int i = 0; i < 3; ++i) ok = ok && communicator.AllReduce(std::span(data)).Wait().ok();
      return ok;
    });
    for (uint32_t rank = 0; rank < size; ++rank) {
      SCOPED_TRACE(absl::StrCat(name, " rank ", rank));
      const std::vector<hp::CallRecord> recorded =
          hp::ToRecords(hp::ReadStream(absl::StrCat(job, "/rank-", rank, ".jsonl")));
      const std::vector<hp::CallRecord>& ours = streams[rank];
      ExpectWellFormed(ours);
      EXPECT_EQ(hp::OfThread(ours, 0), hp::OfThread(recorded, 0));
      for (const uint64_t type : {hp::kProxyOp, hp::kProxyStep, hp::kKernelCh}) {
        EXPECT_EQ(hp::Lives(ours, type), hp::Lives(recorded, type)) << type;
      }
      EXPECT_EQ(hp::ProxyOps(ours), hp::ProxyOps(recorded));
      std::set<hp::Kind> our_kinds;
      std::set<hp::Kind> recorded_kinds;
      for (const hp::CallRecord& call : ours) our_kinds.insert(hp::KindOf(call));
      for (const hp::CallRecord& call : recorded) recorded_kinds.insert(hp::KindOf(call));
      // Whether a proxy slept in between is a matter of time.
      for (auto* kinds : {&our_kinds, &recorded_kinds}) {
        for (const EventState state :
             {EventState::kProxyActive, EventState::kProxySleep, EventState::kProxyWakeup}) {
          kinds->erase({1, "state", hp::kProxyCtrl, static_cast<int>(state), 0});
        }
      }
      EXPECT_EQ(our_kinds, recorded_kinds);
    }
  }
}

TEST_F(StreamsTest, EveryOperationIsToldInOrderFromTwoThreadsAndEndsWhatItBegan) {
  constexpr uint32_t kSize = 3;
  World world(kSize);
  const auto streams = Record(world, [](Context&, Communicator& communicator) {
    std::vector<int64_t> data(300, 1);
    std::vector<std::byte> block(3 * 100), other(3 * 100);
    const uint32_t next = (communicator.rank() + 1) % kSize;
    const uint32_t previous = (communicator.rank() + kSize - 1) % kSize;
    std::vector<Handle> handles;
    handles.push_back(communicator.AllReduce(std::span(data)));
    handles.push_back(communicator.ReduceScatter(std::span(data)));
    handles.push_back(communicator.AllGather(std::span(data)));
    handles.push_back(communicator.Broadcast(std::as_writable_bytes(std::span(data)), 1));
    handles.push_back(communicator.Barrier());
    handles.push_back(communicator.AllToAll(block, other));
    handles.push_back(communicator.Send(std::span(block).first(100), next));
    handles.push_back(communicator.Receive(std::span(other).first(100), previous));
    bool ok = true;
    for (const Handle& handle : handles) ok = handle.Wait().ok() && ok;
    return ok;
  });
  for (uint32_t rank = 0; rank < kSize; ++rank) {
    SCOPED_TRACE(rank);
    ExpectWellFormed(streams[rank]);
    std::map<uint64_t, int> starts;
    std::set<int> threads;
    for (const hp::CallRecord& call : streams[rank]) {
      threads.insert(call.thread);
      if (call.call == "start") ++starts[call.type];
    }
    EXPECT_THAT(threads, ElementsAre(0, 1));
    EXPECT_EQ(starts[hp::kColl], 5);
    EXPECT_EQ(starts[hp::kP2p], 2 * 2 + 2) << "all-to-all: to and from each of the others";
    EXPECT_EQ(starts[hp::kKernelCh], 8) << "one channel each";
    EXPECT_EQ(starts[hp::kGroupApi], 8);
    // The sequence of each function counts alone; a barrier is an all-reduce.
    std::vector<std::pair<std::string, uint64_t>> sequences;
    for (const hp::RecordedCall& call :
         hp::ReadStream(absl::StrCat(directory_.string(), "/rank-", rank, ".jsonl"))) {
      if (call.call != "start" || call.event.type != hp::kColl) continue;
      sequences.emplace_back(call.event.function, call.event.sequence);
    }
    EXPECT_THAT(sequences, ElementsAre(std::pair("AllReduce", 0), std::pair("ReduceScatter", 0),
                                       std::pair("AllGather", 0), std::pair("Broadcast", 0),
                                       std::pair("AllReduce", 1)));
  }
}

TEST(Loading, FollowsNcclsRulesAndSaysWhyItFailed) {
  std::string why;
  EXPECT_EQ(ProfilerPlugin::Load("none", &why), nullptr);
  EXPECT_EQ(ProfilerPlugin::Load("NONE", &why), nullptr);
  EXPECT_EQ(why, "");
  EXPECT_EQ(ProfilerPlugin::Load("", &why), nullptr) << "libnccl-profiler.so is nowhere";
  EXPECT_EQ(why, "");
  EXPECT_EQ(ProfilerPlugin::Load("/nowhere/x.so", &why), nullptr);
  EXPECT_THAT(why, testing::HasSubstr("/nowhere/x.so"));
  EXPECT_EQ(ProfilerPlugin::Load("nowhere", &why), nullptr);
  EXPECT_THAT(why, testing::HasSubstr("libnccl-profiler-nowhere.so"));
  EXPECT_EQ(ProfilerPlugin::Load("libnowhere.so", &why), nullptr);
  EXPECT_THAT(why, testing::Not(testing::HasSubstr("libnccl-profiler-lib")));
  EXPECT_EQ(ProfilerPlugin::Load("STATIC_PLUGIN", &why), nullptr);
  EXPECT_THAT(why, testing::HasSubstr("ncclProfiler_v6"));
  EXPECT_NE(ProfilerPlugin::Load(HOLDFAST_TEST_PLUGIN, &why), nullptr) << why;
}

// A plugin whose init fails is told nothing, and nobody minds.
TEST(Loading, APluginThatRefusesIsLeftAlone) {
  unsetenv("COLLECTIVES_TEST_STREAMS");
  World world(2);
  world.options.profiler_plugin = COLLECTIVES_TEST_RECORDER;
  RunRanks(world, [](Context& context, uint32_t) {
    auto communicator = *context.CreateCommunicator("x");
    EXPECT_TRUE(communicator->Barrier().Wait().ok());
  });
}

// ---- The six wait states, through the real plugin

constexpr uint32_t kPointToPointChannel = 1;  // behind one ring

// The open communicator of that name and rank on the board of a process.
std::optional<uint32_t> FindByName(const hp::MappedBoard& board, const std::string& name,
                                   uint32_t rank) {
  for (uint32_t i = 0; i < abi::kBoardCommunicators; ++i) {
    abi::CommunicatorReading reading;
    if (!abi::ReadCommunicator(board.view().communicators[i], &reading)) continue;
    if (reading.state == abi::CommunicatorState::kOpen && reading.name == name &&
        reading.rank == rank) {
      return i;
    }
  }
  return std::nullopt;
}

// What a connection waits for, of the communicator "pair" of a process; kNone: nothing is there.
WaitState StateOf(pid_t pid, uint32_t rank, SlotDirection direction) {
  const auto board = hp::MappedBoard::Find(pid);
  if (board == nullptr) return WaitState::kNone;
  const std::optional<uint32_t> index = FindByName(*board, "pair", rank);
  if (!index.has_value()) return WaitState::kNone;
  const auto slot = board->FindSlot(*index, kPointToPointChannel, 1 - rank, direction);
  return slot.has_value() ? slot->state : WaitState::kNone;
}

// Looks until it is so, or until a deadline that a right program never meets.
template <typename Condition>
bool Eventually(const Condition& condition) {
  const Deadline deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    static_cast<void>(poll(nullptr, 0, 1));
  }
  return true;
}

bool EventuallyShows(uint32_t rank, SlotDirection direction, WaitState state) {
  return Eventually([&] { return StateOf(getpid(), rank, direction) == state; });
}

World WorldWithPlugin(uint32_t size) {
  World world(size);
  world.options.profiler_plugin = HOLDFAST_TEST_PLUGIN;
  return world;
}

TEST(WaitStates, AComputingDeviceMakesItsSenderWaitForItAndTheReceiverForData) {
  World world = WorldWithPlugin(2);
  std::latch seen(2);
  RunRanks(world, [&](Context& context, uint32_t rank) {
    auto pair = *context.CreateCommunicator("pair");
    std::vector<std::byte> data(1000);
    const Handle computed = rank == 0 ? context.device().Compute(absl::Hours(1)) : pair->Barrier();
    const Handle barrier = rank == 0 ? pair->Barrier() : computed;
    const Handle moved = rank == 0 ? pair->Send(data, 1) : pair->Receive(data, 0);
    if (rank == 0) {
      EXPECT_TRUE(EventuallyShows(0, SlotDirection::kSend, WaitState::kSendGpuWait));
    } else {
      EXPECT_TRUE(EventuallyShows(1, SlotDirection::kReceive, WaitState::kReceiveWait));
    }
    seen.arrive_and_wait();
    if (rank == 0) context.device().GoOn();
    for (const Handle& handle : {computed, barrier, moved}) EXPECT_TRUE(handle.Wait().ok());
  });
}

TEST(WaitStates, AReceiverThatDoesNotComeMakesItsSenderWaitForCredit) {
  World world = WorldWithPlugin(2);
  std::latch seen(1);
  RunRanks(world, [&](Context& context, uint32_t rank) {
    auto pair = *context.CreateCommunicator("pair");
    std::vector<std::byte> data(1000);
    if (rank == 1) seen.wait();
    const Handle moved = rank == 0 ? pair->Send(data, 1) : pair->Receive(data, 0);
    if (rank == 0) {
      EXPECT_TRUE(EventuallyShows(0, SlotDirection::kSend, WaitState::kSendPeerWait));
      seen.count_down();
    }
    EXPECT_TRUE(moved.Wait().ok());
  });
}

TEST(WaitStates, AStalledFlushAndAComputingDeviceMakeTheReceiverWaitForThem) {
  World world = WorldWithPlugin(2);
  RunRanks(world, [&](Context& context, uint32_t rank) {
    auto pair = *context.CreateCommunicator("pair");
    for (const WaitState state : {WaitState::kReceiveFlushWait, WaitState::kReceiveGpuWait}) {
      std::vector<std::byte> data(1000);
      if (rank == 0) {
        EXPECT_TRUE(pair->Send(data, 1).Wait().ok());
        continue;
      }
      if (state == WaitState::kReceiveFlushWait) {
        context.device().StallFlush(absl::Hours(1));
      } else {
        context.device().Compute(absl::Hours(1));
      }
      const Handle received = pair->Receive(data, 0);
      EXPECT_TRUE(EventuallyShows(1, SlotDirection::kReceive, state));
      context.device().GoOn();
      EXPECT_TRUE(received.Wait().ok());
    }
  });
}

// The state (R, S, T ...) of a process's thread of that name.
char ThreadState(pid_t pid, const std::string& name) {
  const std::string tasks = absl::StrCat("/proc/", pid, "/task");
  for (const auto& task : std::filesystem::directory_iterator(tasks)) {
    std::ifstream file(task.path() / "stat");
    std::string text((std::istreambuf_iterator<char>(file)), {});
    if (text.find("(" + name + ")") == std::string::npos) continue;
    return text[text.rfind(')') + 2];
  }
  return '?';
}

// A chunk is on the wire until its receiver says that it has it: here it cannot.
TEST(WaitStates, AStoppedReceiverThatGaveCreditMakesItsSenderWaitForTheWire) {
  World world = WorldWithPlugin(2);
  int go[2];
  ASSERT_EQ(pipe2(go, O_CLOEXEC), 0);
  Children children;
  Fork(world, children, [&](const Options& options, int report) {
    auto context = *Context::Create(options);
    auto pair = *context->CreateCommunicator("pair");
    std::vector<std::byte> data(100);
    bool ok = true;
    for (int i = 0; i < 2; ++i) {
      // Between the two messages rank 0 waits to be told.
      char c = 0;
      if (i == 1 && options.rank == 0) ok = read(go[0], &c, 1) == 1;
      ok = (options.rank == 0 ? pair->Send(data, 1) : pair->Receive(data, 0)).Wait().ok() && ok;
      Report(report, ok ? "done" : "failed");
    }
  });
  for (uint32_t rank = 0; rank < 2; ++rank) ASSERT_EQ(children.ReadLine(rank), "done");
  const auto [sender, receiver] = std::pair(children.pids[0], children.pids[1]);
  // Its second receive is posted, and its proxy has said so and sleeps.
  ASSERT_TRUE(Eventually([&, pid = receiver] {
    return StateOf(pid, 1, SlotDirection::kReceive) == WaitState::kReceiveWait &&
           ThreadState(pid, "NCCL Progress 1") == 'S';
  }));
  ASSERT_EQ(kill(receiver, SIGSTOP), 0);
  int status = 0;
  ASSERT_EQ(waitpid(receiver, &status, WUNTRACED), receiver);
  ASSERT_TRUE(WIFSTOPPED(status));
  ASSERT_EQ(write(go[1], "g", 1), 1);
  EXPECT_TRUE(Eventually(
      [&, pid = sender] { return StateOf(pid, 0, SlotDirection::kSend) == WaitState::kSendWait; }));
  ASSERT_EQ(kill(receiver, SIGCONT), 0);
  for (uint32_t rank = 0; rank < 2; ++rank) EXPECT_EQ(children.ReadLine(rank), "done");
  close(go[0]);
  close(go[1]);
}

TEST(WaitStates, ADeviceThatStandsStillInAnAllReduceIsNamedByTheBoardsAlone) {
  constexpr uint32_t kSize = 4;
  for (const uint32_t victim : {0u, 2u}) {
    World world = WorldWithPlugin(kSize);
    std::latch named(kSize);
    RunRanks(world, [&](Context& context, uint32_t rank) {
      auto ring = *context.CreateCommunicator(absl::StrCat("ring", victim));
      if (rank == victim) context.device().HangNextOperation(absl::Hours(1));
      std::vector<int64_t> data = Filled<int64_t>(rank, 1000);
      const Handle reduced = ring->AllReduce(std::span(data));
      if (rank == 0) {
        const auto board = hp::MappedBoard::Find(getpid());
        EXPECT_TRUE(Eventually([&] {
          std::vector<hp::RankWaits> waits;
          for (uint32_t r = 0; r < kSize; ++r) {
            const auto index = FindByName(*board, ring->name(), r);
            if (!index.has_value()) return false;
            waits.push_back(hp::WaitsOf(*board, *index));
          }
          return hp::Suspects(waits) == std::vector<uint32_t>{victim} && waits[victim].gpu > 0;
        })) << "rank "
            << victim;
      }
      named.arrive_and_wait();
      if (rank == victim) context.device().GoOn();
      EXPECT_TRUE(reduced.Wait().ok());
      EXPECT_EQ(data, Sum<int64_t>(kSize, 1000));
    });
  }
}

// ---- What it costs to wait

TEST(Idle, EightRanksThatWaitForOneUseNextToNoCpu) {
  constexpr uint32_t kSize = 8;
  World world = WorldWithPlugin(kSize);
  std::latch measured(1);
  const auto cpu_ms = [] {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    const auto of = [](const timeval& t) {
      return static_cast<double>(t.tv_sec) * 1e3 + static_cast<double>(t.tv_usec) / 1e3;
    };
    return of(usage.ru_utime) + of(usage.ru_stime);
  };
  RunRanks(world, [&](Context& context, uint32_t rank) {
    auto all = *context.CreateCommunicator("all");
    EXPECT_TRUE(all->Barrier().Wait().ok());
    std::vector<int64_t> data(10'000, 1);
    if (rank == 0) {
      // Rank 0 does not come. Whoever is not as far as it gets yet may still have work to do.
      EXPECT_TRUE(Eventually([&] {
        const double before = cpu_ms();
        static_cast<void>(poll(nullptr, 0, 500));
        return cpu_ms() - before < 25;
      })) << "of 500 ms";
      measured.count_down();
    }
    if (rank == 0) measured.wait();
    EXPECT_TRUE(all->AllReduce(std::span(data)).Wait().ok());
  });
}

}  // namespace
}  // namespace collectives
