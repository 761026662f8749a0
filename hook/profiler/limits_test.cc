// The plugin at its limits: full tables, other processes, forks, many threads, levels; no system
// call, and nothing needed but libc.
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <functional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "hook/dynamic_symbols_testing.h"
#include "hook/profiler/board_testing.h"
#include "hook/profiler/events_testing.h"
#include "hook/profiler/nccl_driver_testing.h"
#include "hook/sanitized_testing.h"

namespace holdfast::profiler {
namespace {

using abi::Drop;
using abi::SlotDirection;
using abi::WaitState;

class LimitsTest : public testing::TestWithParam<int> {
 protected:
  Library library_{HOLDFAST_TEST_PLUGIN, GetParam()};
};
INSTANTIATE_TEST_SUITE_P(Versions, LimitsTest, testing::ValuesIn(kVersions));

// ---- The file

TEST(PluginFileTest, ExportsFourVersionsAndNeedsOnlyLibc) {
  const hook::DynamicSymbols symbols = hook::ReadDynamicSymbols(HOLDFAST_TEST_PLUGIN);
  EXPECT_EQ(symbols.defined, (std::set<std::string>{"ncclProfiler_v4", "ncclProfiler_v5",
                                                    "ncclProfiler_v6", "ncclProfiler_v7"}));
  EXPECT_EQ(std::string(HOLDFAST_TEST_PLUGIN).substr(std::string(HOLDFAST_TEST_PLUGIN).rfind('/')),
            "/libnccl-profiler-holdfast.so");
#ifdef HOLDFAST_TEST_SANITIZED
  GTEST_SKIP() << "a sanitizer build needs the sanitizer's library";
#endif
  EXPECT_EQ(symbols.undefined, std::set<std::string>());
  for (const std::string& library : symbols.needed) {
    EXPECT_TRUE(library == "libc.so.6" || library.rfind("ld-linux", 0) == 0) << library;
  }
}

// ---- Limits

TEST_P(LimitsTest, CommunicatorsBeyondTheLimitAreCountedAndTheirEventsLeftOut) {
  const auto board = [&] {
    Fixture fixture(library_);
    return MappedBoard::Find(getpid());
  }();
  const uint64_t dropped = board->dropped(Drop::kCommunicators);
  std::vector<void*> contexts;
  constexpr int kPlaces = abi::kBoardCommunicators - abi::kBoardForeignCommunicators;
  for (int i = 0; i < kPlaces + 3; ++i) {
    void* context = nullptr;
    EXPECT_EQ(library_.Init(&context, NewId(), nullptr, 1, 1, 0), kNcclSuccess);
    contexts.push_back(context);
    EXPECT_EQ(context != nullptr, i < kPlaces) << i;
    library_.Stop(library_.Start(context, {.type = kColl, .count = 1}));
  }
  EXPECT_EQ(board->dropped(Drop::kCommunicators), dropped + 3);
  for (void* context : contexts) library_.Finalize(context);
  // And there is room again, more often than there are places for their connections.
  for (int i = 0; i < 30'000; ++i) {
    void* context = nullptr;
    library_.Init(&context, NewId(), nullptr, 1, 1, 0);
    ASSERT_NE(context, nullptr);
    void* op = library_.Start(context, {.type = kProxyOp, .proxy_op = MakeProxyOp(true)});
    ASSERT_NE(op, nullptr);
    library_.Finalize(context);
  }
}

TEST_P(LimitsTest, ConnectionsAndOpenOperationsBeyondTheLimitsAreCounted) {
  Fixture fixture(library_);
  const uint64_t slots = fixture.board().dropped(Drop::kSlots);
  const uint64_t transfers = fixture.board().dropped(Drop::kTransfers);
  const uint64_t operations = fixture.board().dropped(Drop::kOperations);
  void* coll = fixture.StartColl();
  int shown = 0;
  for (int peer = 0; peer < 2 * static_cast<int>(abi::kBoardSlots); ++peer) {
    shown += library_.Start(fixture.context(),
                            {.type = kProxyOp,
                             .parent = coll,
                             .proxy_op = MakeProxyOp(true, peer % 64, peer / 64)}) != nullptr;
  }
  EXPECT_GT(fixture.board().dropped(Drop::kSlots), slots);
  EXPECT_GT(fixture.board().dropped(Drop::kTransfers), transfers);
  EXPECT_GT(shown, static_cast<int>(abi::kBoardSlots) * 9 / 10);
  // Operations that never get a part are no drops; with open parts they are.
  for (int i = 0; i < 10000; ++i) library_.Stop(fixture.StartColl());
  EXPECT_EQ(fixture.board().dropped(Drop::kOperations), operations);
  for (int i = 0; i < 10000; ++i) fixture.StartOp(fixture.StartColl(), true);
  EXPECT_GT(fixture.board().dropped(Drop::kOperations), operations);
}

// ---- Other processes

// PXN: a proxy thread of this process drives an operation of another one, with that one's context
// and parent. Both boards together say whose it is.
TEST_P(LimitsTest, OperationsOfAnotherProcessFindTheirCommunicator) {
  struct Given {
    void* context;
    void* coll;
  };
  int to_parent[2];
  int to_child[2];
  ASSERT_EQ(pipe(to_parent), 0);
  ASSERT_EQ(pipe(to_child), 0);
  const pid_t pid = fork();
  if (pid == 0) {
    // So that the end of the parent, whatever it is, ends this.
    close(to_parent[0]);
    close(to_child[1]);
    Library other(HOLDFAST_TEST_PLUGIN, GetParam());
    Given given = {};
    other.Init(&given.context, 0xabcdef, "of the other", 2, 8, 3);
    given.coll = other.Start(given.context, {.type = kColl, .rank = 3, .count = 5});
    other.Stop(given.coll);
    if (write(to_parent[1], &given, sizeof(given)) != sizeof(given)) _exit(1);
    char done;
    if (read(to_child[0], &done, 1) != 1) _exit(1);
    _exit(0);
  }
  Given given = {};
  ASSERT_EQ(read(to_parent[0], &given, sizeof(given)), static_cast<ssize_t>(sizeof(given)));
  ASSERT_NE(given.context, nullptr);

  Fixture own(library_);
  const uint64_t enqueued = own.reading().enqueued;
  ProxyOp proxy_op = MakeProxyOp(true, 0, 6);
  proxy_op.pid = pid;
  void* op = library_.Start(
      given.context, {.type = kProxyOp, .parent = given.coll, .rank = 3, .proxy_op = proxy_op});
  ASSERT_NE(op, nullptr);
  void* step = library_.Start(given.context, {.type = kProxyStep, .parent = op, .rank = 3});
  ASSERT_NE(step, nullptr);
  RecordBytes(library_, step, kStateSendPeerWait, 0);

  // Here: a foreign communicator with a connection to rank 6.
  const auto board = MappedBoard::Find(getpid());
  const auto theirs = MappedBoard::Find(pid);
  ASSERT_NE(theirs, nullptr);
  const auto their_index = theirs->FindCommunicator(0xabcdef, 3);
  ASSERT_TRUE(their_index.has_value());
  const uint64_t token = theirs->communicator(*their_index).token;
  EXPECT_EQ(token, reinterpret_cast<uint64_t>(given.context));
  EXPECT_EQ(theirs->communicator(*their_index).enqueued, 1u);
  int found = 0;
  for (uint32_t i = 0; i < abi::kBoardCommunicators; ++i) {
    abi::CommunicatorReading reading;
    if (!abi::ReadCommunicator(board->view().communicators[i], &reading)) continue;
    if (!reading.foreign || reading.token != token) continue;
    ++found;
    const auto slot = board->FindSlot(i, 0, 6, SlotDirection::kSend);
    ASSERT_TRUE(slot.has_value());
    EXPECT_EQ(slot->state, WaitState::kSendPeerWait);
  }
  EXPECT_EQ(found, 1);
  EXPECT_EQ(own.reading().enqueued, enqueued);
  library_.Stop(step);
  library_.Stop(op);
  ASSERT_EQ(write(to_child[1], "x", 1), 1);
  int status = 0;
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  EXPECT_EQ(status, 0);
  for (const int fd : {to_parent[0], to_parent[1], to_child[0], to_child[1]}) close(fd);
}

TEST_P(LimitsTest, InAForkedChildEveryCallIsHarmless) {
  Fixture fixture(library_);
  void* coll = fixture.StartColl();
  void* op = fixture.StartOp(coll, true);
  void* step = fixture.StartStep(op, 0);
  EXPECT_EQ(RunInChild([&] {
              EXPECT_EQ(fixture.StartColl(), nullptr);
              EXPECT_EQ(fixture.StartOp(coll, true), nullptr);
              EXPECT_EQ(fixture.StartStep(op, 1), nullptr);
              RecordBytes(library_, step, kStateSendWait, 5);
              library_.Stop(step);
              library_.Stop(op);
              library_.Stop(coll);
              EXPECT_EQ(library_.Finalize(fixture.context()), kNcclSuccess);
              // It may have a life of its own.
              Library again(HOLDFAST_TEST_PLUGIN, GetParam());
              Fixture own(again);
              library_.Stop(own.StartColl());
              EXPECT_EQ(own.reading().enqueued, 1u);
              EXPECT_EQ(own.board().view().header->process_id, static_cast<uint32_t>(getpid()));
            }),
            0);
  EXPECT_EQ(fixture.Slot(SlotDirection::kSend).state, WaitState::kSendGpuWait);
}

// ---- Levels

TEST_P(LimitsTest, OffIsNothingAndFullKeepsRecords) {
  EXPECT_EQ(RunInChild([&] {
              setenv("HOLDFAST_MONITOR", "off", 1);
              void* context = &context;
              EXPECT_EQ(library_.Init(&context, 1, nullptr, 1, 1, 0), kNcclSuccess);
              EXPECT_EQ(context, nullptr);
              EXPECT_EQ(library_.mask().load(), 0);
              EXPECT_EQ(MappedBoard::Find(getpid()), nullptr);
            }),
            0);
  EXPECT_EQ(RunInChild([&] {
              setenv("HOLDFAST_MONITOR", "full", 1);
              Job job(library_, {.id = 77});
              const uint64_t full = kColl | kP2p | kProxyOp | kProxyStep | kProxyCtrl | kCeColl |
                                    kKernelCh | kCollApi | kP2pApi | kKernelLaunch;
              EXPECT_EQ(static_cast<uint64_t>(library_.mask().load()),
                        full & KnownEvents(GetParam()));
              job.EnqueueAll();
              EXPECT_TRUE(job.RunUntilNothingMoves());
              const auto board = MappedBoard::Find(getpid());
              int rings = 0;
              int records[16] = {};
              uint64_t last_ticks = 0;
              for (uint32_t i = 0; i < abi::kBoardRings; ++i) {
                const abi::Ring& ring = board->view().rings[i];
                if (ring.written.load() == 0) continue;
                ++rings;
                for (uint64_t at = 0; at < ring.written.load(); ++at) {
                  abi::RecordReading record;
                  if (!abi::ReadRecord(ring, at, &record)) continue;
                  EXPECT_GE(record.ticks, last_ticks);
                  last_ticks = record.ticks;
                  ++records[static_cast<int>(record.kind) & 15];
                }
              }
              EXPECT_EQ(rings, 1);
              EXPECT_EQ(records[static_cast<int>(abi::RecordKind::kOperationEnqueued)], 4);
              EXPECT_EQ(records[static_cast<int>(abi::RecordKind::kOperationFinished)], 4);
              EXPECT_EQ(records[static_cast<int>(abi::RecordKind::kTransferBegun)], 16);
              EXPECT_EQ(records[static_cast<int>(abi::RecordKind::kStepDone)], 16 * 12);
              EXPECT_EQ(records[static_cast<int>(abi::RecordKind::kKernelStopped)], 8);
            }),
            0);
}

// ---- Threads, memory, system calls

// Every rank has its program's and its proxy's thread, and a reader looks all the time: what it
// reads is never torn. (Under ThreadSanitizer: nothing races.)
TEST_P(LimitsTest, ManyThreadsWriteWhileOthersRead) {
  Job job(library_, {.id = NewId(), .count = 12'000});
  constexpr int kOperations = 20;
  std::atomic<int> running{4};
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 4; ++rank) {
    threads.emplace_back([&, rank] {
      for (int i = 0; i < kOperations; ++i) job.rank(rank).Enqueue();
    });
    threads.emplace_back([&, rank] {
      for (;;) {
        const bool moved = job.rank(rank).Progress();
        if (moved) continue;
        if (job.rank(rank).finished() == kOperations) break;
        std::this_thread::yield();
      }
      running.fetch_sub(1);
    });
  }
  const auto board = MappedBoard::Find(getpid());
  int read = 0;
  bool last_look = false;
  while (!last_look) {
    last_look = running.load() == 0;
    for (uint32_t rank = 0; rank < 4; ++rank) {
      const auto index = board->FindCommunicator(job.options().id, rank);
      ASSERT_TRUE(index.has_value());
      const abi::CommunicatorReading reading = board->communicator(*index);
      EXPECT_LE(reading.finished, reading.started);
      EXPECT_LE(reading.started, reading.enqueued);
    }
    for (uint32_t i = 0; i < abi::kBoardSlots; ++i) {
      abi::SlotReading slot;
      if (abi::ReadSlot(board->view(), i, &slot) != abi::SlotRead::kRead) continue;
      if (slot.key.direction > SlotDirection::kReceive || slot.steps_total == 0) continue;
      ++read;
      EXPECT_LE(slot.steps_done, slot.steps_total);
      if (slot.state == WaitState::kNone && slot.steps_total == 12) {
        EXPECT_EQ(slot.steps_done, slot.steps_total);
      }
    }
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(read, 0);
  for (uint32_t rank = 0; rank < 4; ++rank) {
    const auto reading = board->communicator(*board->FindCommunicator(job.options().id, rank));
    EXPECT_EQ(reading.enqueued, static_cast<uint64_t>(kOperations));
    EXPECT_EQ(reading.finished, static_cast<uint64_t>(kOperations));
  }
}

// From now on the kernel kills this process at any system call but exit. (Strict mode
// would also take rdtsc away.)
bool ForbidSystemCalls() {
  sock_filter code[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program = {.len = 4, .filter = code};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

// An allocation that needs memory, a lock that waits, or a clock without the vDSO would be the end
// of this child.
TEST_P(LimitsTest, EventsMakeNoSystemCall) {
#ifdef HOLDFAST_TEST_SANITIZED
  GTEST_SKIP() << "the sanitizer makes system calls of its own";
#endif
  const int status = RunInChild([&] {
    Fixture fixture(library_);
    if (!ForbidSystemCalls()) return;
    for (int round = 0; round < 100; ++round) {
      void* coll = fixture.StartColl();
      library_.Stop(coll);
      void* op = fixture.StartOp(coll, true);
      void* kernel =
          library_.Start(fixture.context(), {.type = kKernelCh, .parent = coll, .channel = 1});
      library_.Record(op, kStateProxyOpInProgress, nullptr);
      for (int i = 0; i < 12; ++i) {
        void* step = fixture.StartStep(op, i);
        RecordBytes(library_, step, kStateSendPeerWait, 0);
        RecordBytes(library_, step, kStateSendWait, 10);
        library_.Stop(step);
      }
      library_.Stop(kernel);
      library_.Stop(op);
    }
    syscall(SYS_exit, 7);
  });
  EXPECT_TRUE(WIFEXITED(status)) << "killed by signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 7) << "system calls could not be forbidden";
  // Not vacuous: one is its end.
  const int killed = RunInChild([] {
    if (ForbidSystemCalls()) syscall(SYS_getpid);
  });
  EXPECT_TRUE(WIFSIGNALED(killed));
}

}  // namespace
}  // namespace holdfast::profiler
