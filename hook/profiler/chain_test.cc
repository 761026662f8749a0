// A second plugin behind ours: it must see what NCCL would have given it, with its own contexts,
// parents and handles, and never anything that would make it crash.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "hook/profiler/board_testing.h"
#include "hook/profiler/nccl_driver_testing.h"
#include "hook/profiler/recorded_stream_testing.h"

namespace holdfast::profiler {
namespace {

// The counters of the chained plugin.
class Chained {
 public:
  Chained() : library_(dlopen(HOLDFAST_TEST_CHAINED, RTLD_NOW | RTLD_LOCAL)) {
    if (library_ == nullptr) ADD_FAILURE() << dlerror();
  }
  ~Chained() { dlclose(library_); }
  Chained(const Chained&) = delete;
  Chained& operator=(const Chained&) = delete;

  uint64_t Count(const char* counter, uint64_t type) const {
    return Find<uint64_t (*)(uint64_t)>(counter)(type);
  }
  uint64_t mistakes() const { return Find<uint64_t (*)()>("chained_mistakes")(); }
  int contexts() const { return Find<int (*)()>("chained_contexts")(); }
  void SetMask(int mask) const { Find<void (*)(int)>("chained_set_mask")(mask); }

 private:
  template <typename Function>
  Function Find(const char* name) const {
    void* symbol = dlsym(library_, name);
    EXPECT_NE(symbol, nullptr) << name;
    return reinterpret_cast<Function>(symbol);
  }
  void* library_;
};

uint64_t Calls(Job& job, const char* call, uint64_t type) {
  uint64_t count = 0;
  for (int rank = 0; rank < job.options().ranks; ++rank) {
    for (const CallRecord& record : job.rank(rank).calls()) {
      count += record.call == call && record.type == type;
    }
  }
  return count;
}

// Each test has a process of its own: what is chained stays chained.
void WithChain(int version, const char* value, const char* mask,
               const std::function<void(Library&, const Chained&)>& body) {
  EXPECT_EQ(RunInChild([&] {
              setenv("HOLDFAST_PROFILER_CHAIN", value, 1);
              setenv("HOLDFAST_TEST_CHAINED_MASK", mask, 1);
              Library library(HOLDFAST_TEST_PLUGIN, version);
              Chained chained;
              body(library, chained);
            }),
            0);
}

TEST(ChainTest, TheSecondPluginSeesEveryEventThatNcclDelivers) {
  for (const int version : {4, 5, 6, 7}) {
    SCOPED_TRACE(version);
    WithChain(
        version, HOLDFAST_TEST_CHAINED, "32767", [](Library& library, const Chained& chained) {
          {
            Job job(library, {.id = 1});
            EXPECT_EQ(chained.contexts(), 4);
            job.EnqueueAll();
            job.EnqueueAll();
            EXPECT_TRUE(job.RunUntilNothingMoves());
            job.FinalizeAll();
            for (const uint64_t type : {kGroup, kColl, kProxyOp, kProxyStep, kProxyCtrl, kKernelCh,
                                        kGroupApi, kCollApi, kKernelLaunch}) {
              EXPECT_EQ(chained.Count("chained_starts", type), Calls(job, "start", type)) << type;
              EXPECT_EQ(chained.Count("chained_stops", type), Calls(job, "stop", type)) << type;
              EXPECT_EQ(chained.Count("chained_records", type), Calls(job, "state", type)) << type;
            }
            for (const uint64_t type : {kColl, kProxyOp, kProxyStep, kKernelCh}) {
              EXPECT_GT(Calls(job, "start", type), 0u) << type;
              EXPECT_EQ(chained.Count("chained_parents", type), Calls(job, "start", type)) << type;
            }
          }
          EXPECT_EQ(chained.contexts(), 0);
          EXPECT_EQ(chained.mistakes(), 0u);
          // Ours goes on beside it.
          const auto board = MappedBoard::Find(getpid());
          EXPECT_EQ(board->communicator(*board->FindCommunicator(1, 0)).finished, 2u);
        });
  }
}

TEST(ChainTest, ItGetsWhatItAskedForAndTheMaskHasBoth) {
  WithChain(6, HOLDFAST_TEST_CHAINED, "64", [](Library& library, const Chained& chained) {
    Job job(library, {.id = 1});
    EXPECT_EQ(library.mask().load() & static_cast<int>(kKernelCh | kProxyStep),
              static_cast<int>(kKernelCh | kProxyStep));
    job.EnqueueAll();
    EXPECT_TRUE(job.RunUntilNothingMoves());
    EXPECT_EQ(chained.Count("chained_starts", kKernelCh), 8u);
    EXPECT_EQ(chained.Count("chained_starts", kColl), 4u);  // its parent
    EXPECT_EQ(chained.Count("chained_starts", kProxyOp), 0u);
    EXPECT_EQ(chained.Count("chained_starts", kProxyStep), 0u);
    // It changes its mind: with the next operation NCCL is told.
    chained.SetMask(static_cast<int>(kProxyStep));
    job.EnqueueAll();
    EXPECT_TRUE(job.RunUntilNothingMoves());
    job.EnqueueAll();
    EXPECT_TRUE(job.RunUntilNothingMoves());
    EXPECT_GT(chained.Count("chained_starts", kProxyStep), 0u);
    EXPECT_EQ(library.mask().load() & static_cast<int>(kKernelCh), 0);
    EXPECT_EQ(chained.mistakes(), 0u);
  });
}

TEST(ChainTest, ItIsNeverGivenStaleForeignOrRepeatedHandles) {
  WithChain(6, HOLDFAST_TEST_CHAINED, "32767", [](Library& library, const Chained& chained) {
    void* context = nullptr;
    library.Init(&context, 1, nullptr, 2, 2, 0);
    void* api = library.Start(context, {.type = kCollApi});
    void* coll = library.Start(context, {.type = kColl, .parent = api, .count = 1});
    const ProxyOp proxy_op = {getpid(), 0, 1, 4, 1, 1};
    void* op = library.Start(context, {.type = kProxyOp, .parent = coll, .proxy_op = proxy_op});
    void* step = library.Start(context, {.type = kProxyStep, .parent = op});
    for (int round = 0; round < 3; ++round) {
      for (void* handle : {step, op, coll, api}) library.Stop(handle);
      for (void* handle : {step, op, coll, api}) library.Record(handle, 9, nullptr);
    }
    EXPECT_EQ(chained.Count("chained_stops", kCollApi), 1u);
    EXPECT_EQ(chained.Count("chained_stops", kProxyStep), 1u);
    // A parent that is over, one that is NULL, and one that is nobody's.
    int stranger = 0;
    for (void* parent : {op, coll, static_cast<void*>(&stranger), static_cast<void*>(nullptr)}) {
      library.Start(context, {.type = kKernelCh, .parent = parent, .channel = 1});
    }
    EXPECT_EQ(chained.Count("chained_starts", kKernelCh), 4u);
    // An operation of another process: same kind of token, other tag.
    void* foreign =
        reinterpret_cast<void*>(reinterpret_cast<uint64_t>(context) ^ uint64_t{3} << 42);
    const uint64_t starts = chained.Count("chained_starts", kProxyOp);
    void* theirs = library.Start(foreign, {.type = kProxyOp, .proxy_op = proxy_op});
    EXPECT_NE(theirs, nullptr);
    library.Start(foreign, {.type = kProxyStep, .parent = theirs});
    library.Stop(theirs);
    EXPECT_EQ(chained.Count("chained_starts", kProxyOp), starts);
    // What was open when its communicator was finalized.
    void* open = library.Start(context, {.type = kColl, .count = 1});
    library.Finalize(context);
    const uint64_t records = chained.Count("chained_records", kColl);
    const uint64_t stops = chained.Count("chained_stops", kColl);
    library.Record(open, 9, nullptr);
    library.Stop(open);
    EXPECT_EQ(chained.Count("chained_records", kColl), records);
    EXPECT_EQ(chained.Count("chained_stops", kColl), stops);
    EXPECT_EQ(chained.mistakes(), 0u);
  });
}

// The recorder, chained as scripts/gpu-check chains it: its stream is what was called, with the
// parents' types, and ends on the board as the calls themselves do.
TEST(ChainTest, WhatTheRecorderWritesIsWhatWasCalledAndCanBeReplayed) {
  const std::string directory = testing::TempDir() + "/stream-" + std::to_string(getpid());
  std::filesystem::create_directories(directory);
  const std::string path = directory + "/rank-0.jsonl";
  setenv("HOLDFAST_RECORD_STREAM", directory.c_str(), 1);
  setenv("HOLDFAST_MONITOR", "full", 1);
  WithChain(6, HOLDFAST_TEST_RECORDER, "0", [&](Library& library, const Chained&) {
    Job job(library, {.id = 1, .ranks = 2});
    job.SetFreeze({.rank = 1, .channel = 0, .operation = 1, .slice = 3});
    for (int i = 0; i < 2; ++i) job.EnqueueAll();
    EXPECT_FALSE(job.RunUntilNothingMoves());
    // At every poll, as NCCL does.
    for (int i = 0; i < 10; ++i) job.rank(0).Progress();
    const std::vector<CallRecord> stream = ToRecords(ReadStream(path));
    const std::vector<CallRecord>& calls = job.rank(0).calls();
    size_t next = 0;
    size_t repeated = 0;
    std::map<uint64_t, int> states;  // of steps, by handle
    for (const CallRecord& call : calls) {
      if (call.call == "state" && call.type == kProxyStep) {
        const auto [known, news] = states.emplace(call.handle, call.state);
        if (!news && known->second == call.state) {
          ++repeated;
          continue;
        }
        known->second = call.state;
      }
      ASSERT_LT(next, stream.size());
      const CallRecord& line = stream[next++];
      EXPECT_EQ(line.call, call.call) << next;
      EXPECT_EQ(line.type, call.type) << next;
      EXPECT_EQ(line.state, call.state) << next;
      EXPECT_EQ(line.handle, call.handle) << next;
      EXPECT_EQ(line.parent, call.parent) << next;
      EXPECT_EQ(line.parent_type, call.parent_type) << next;
      EXPECT_EQ(line.proxy_op.peer, call.proxy_op.peer) << next;
      EXPECT_EQ(line.step, call.step) << next;
    }
    EXPECT_EQ(next, stream.size());
    EXPECT_GT(repeated, 0u);
  });
  // Given to a plugin in this process, it shows the same hang.
  const std::vector<RecordedCall> stream = ReadStream(path);
  Library library(HOLDFAST_TEST_PLUGIN, 6);
  Replay replay(library, 2, stream);
  replay.RunTo(stream.size());
  const auto board = MappedBoard::Find(getpid());
  const auto index = board->FindCommunicator(2, 0);
  ASSERT_TRUE(index.has_value());
  EXPECT_EQ(board->communicator(*index).enqueued, 2u);
  EXPECT_EQ(board->communicator(*index).finished, 1u);
  EXPECT_FALSE(WaitsOf(*board, *index).peers.empty());
  unsetenv("HOLDFAST_RECORD_STREAM");
  unsetenv("HOLDFAST_MONITOR");
  std::filesystem::remove_all(directory);
}

TEST(ChainTest, ItIsFoundAsNcclFindsPlugins) {
  void* by_name = dlopen("libnccl-profiler-chained.so", RTLD_NOW | RTLD_LOCAL);
  if (by_name == nullptr) GTEST_SKIP() << "LD_LIBRARY_PATH does not lead to the chained plugin";
  dlclose(by_name);
  for (const char* value : {HOLDFAST_TEST_CHAINED, "libnccl-profiler-chained.so", "chained"}) {
    SCOPED_TRACE(value);
    WithChain(6, value, "2", [](Library& library, const Chained& chained) {
      void* context = nullptr;
      EXPECT_EQ(library.Init(&context, 1, nullptr, 2, 2, 0), kNcclSuccess);
      EXPECT_EQ(chained.contexts(), 1);
    });
  }
}

TEST(ChainTest, WhatCannotBeChainedLeavesOursAlone) {
  for (const char* value :
       {"no-such-plugin", "/no/such/file.so", "libc.so.6", HOLDFAST_TEST_PLUGIN}) {
    SCOPED_TRACE(value);
    WithChain(6, value, "2", [](Library& library, const Chained& chained) {
      Job job(library, {.id = 1});
      job.EnqueueAll();
      EXPECT_TRUE(job.RunUntilNothingMoves());
      EXPECT_EQ(chained.contexts(), 0);
      const auto board = MappedBoard::Find(getpid());
      EXPECT_EQ(board->communicator(*board->FindCommunicator(1, 0)).finished, 1u);
    });
  }
}

}  // namespace
}  // namespace holdfast::profiler
