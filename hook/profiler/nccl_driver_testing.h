// Calls a profiler plugin as NCCL does: loaded with RTLD_NOW, in one of four versions of the
// interface, in NCCL's order, with its parents, from its threads.
//
// Model: ring all-reduces over the network transport. The program's thread makes the calls of
// ncclAllReduce; a proxy per rank drives a send and a receive of each channel, at most 8 steps
// open, receiver-driven credit; a kernel per channel produces and consumes slices, and can be made
// to stand still. Everything moves by polling, so one thread can drive all ranks until nothing
// moves (a hang is then a fact, not a time-out), or each rank can have a thread. Not modelled:
// other algorithms, bytes (sizes are said, nothing is moved), time, NCCL's pools. What NCCL 2.30.7
// really called is in recorded streams, against which replay_test.cc holds this.
#ifndef HOLDFAST_HOOK_PROFILER_NCCL_DRIVER_TESTING_H_
#define HOLDFAST_HOOK_PROFILER_NCCL_DRIVER_TESTING_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "hook/profiler/interface.h"

namespace holdfast::profiler {

// What a call to the plugin was.
struct CallRecord {
  int thread = 0;    // 0 the program's, 1 the proxy's
  std::string call;  // start, stop, state
  uint64_t type = 0;
  int state = 0;
  uint64_t parent_type = 0;  // 0: none
  uint64_t handle = 0;       // numbered from 1 in order of start
  uint64_t parent = 0;
  ProxyOp proxy_op = {};
  int step = 0;
  size_t bytes = 0;  // of a state
};

// An event in all versions; a Library makes the version's descriptor of it.
struct Event {
  uint64_t type = 0;
  void* parent = nullptr;
  int rank = 0;
  const char* function = "AllReduce";
  const char* data_type = "ncclFloat32";
  size_t count = 0;
  uint64_t sequence = 0;
  int root = 0;
  int peer = 0;
  uint8_t channels = 0;
  void* parent_group = nullptr;
  ProxyOp proxy_op = {};
  int step = 0;
  uint8_t channel = 0;
  uint64_t gpu_ns = 0;
};

// A plugin, loaded.
//
// Threads: any.
class Library {
 public:
  // Fails the running test if it cannot be loaded.
  Library(const std::string& path, int version);
  ~Library();
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  int version() const { return version_; }
  const char* name() const { return v4_ != nullptr ? v4_->name : v5_->name; }
  // NCCL's one mask of the process.
  std::atomic<int>& mask() { return mask_; }

  NcclResult Init(void** context, uint64_t id, const char* name, int nodes, int ranks, int rank);
  void* Start(void* context, const Event& event);
  void Stop(void* handle);
  void Record(void* handle, int state, StateArguments* arguments);
  NcclResult Finalize(void* context);

 private:
  int version_;
  void* library_;
  const ProfilerV4* v4_ = nullptr;
  const ProfilerV5* v5_ = nullptr;
  std::atomic<int> mask_{0};
};

// What NCCL delivers for a mask: a type and what stands above it.
uint64_t Delivered(uint64_t mask, int version);

struct JobOptions {
  uint64_t id = 0x1234;
  int ranks = 4;
  int channels = 2;
  int steps = 12;            // of each proxy operation; slices of two per chunk
  size_t count = 1'000'000;  // elements
  uint64_t forced_mask = 0;  // 0: the plugin's
};

// Where the kernel of a rank stands still: it consumes and produces no slice from this one on.
struct Freeze {
  int rank = -1;
  int channel = -1;  // -1: all
  int operation = 0;
  int slice = 0;
};

class Job;

// An event that was started; handles need not be distinct.
struct Opened {
  void* handle = nullptr;
  uint64_t number = 0;  // 0: was not delivered
  uint64_t type = 0;
};

// One rank of a communicator.
//
// Threads: Enqueue by the program's thread, Progress by the proxy's.
class DriverRank {
 public:
  DriverRank(Library& library, Job& job, int rank);
  ~DriverRank();

  void* context() const { return context_; }
  // An all-reduce: what the program's thread calls.
  void Enqueue();
  // One poll of the proxy. False: nothing moved.
  bool Progress();
  bool done() const;
  // Operations.
  int finished() const { return finished_.load(); }
  // A dead process: nothing is called any more, not even finalize.
  void Die() { dead_ = true; }
  void Finalize();
  const std::vector<CallRecord>& calls() const { return calls_; }

 private:
  struct Side {
    Opened op;
    bool in_progress = false;
    bool over = false;
    std::array<Opened, 8> steps = {};
    int posted = 0;
    int middle = 0;  // sends: transmitted; receives: received
    int flushed = 0;
    int done = 0;
    bool told_credit_wait = false;
  };
  struct Operation {
    int number = 0;
    Opened coll;
    uint64_t mask = 0;
    bool appended = false;
    std::vector<Side> sends;
    std::vector<Side> receives;
    std::vector<Opened> kernels;
    std::vector<int> consumed;
    std::vector<bool> kernel_over;
  };

  bool Wants(uint64_t mask, uint64_t type) const;
  Opened Start(int thread, uint64_t mask, const Opened& parent, Event event);
  void Stop(int thread, const Opened& opened);
  void Record(int thread, const Opened& opened, int state, size_t bytes, int appended);
  void ProxyCtrl(int state, int appended, bool keep_open);
  void Append(Operation& operation);
  bool MoveSend(Operation& operation, int channel);
  bool MoveReceive(Operation& operation, int channel);
  bool MoveKernel(Operation& operation, int channel);
  bool Frozen(const Operation& operation, int channel, int slice) const;
  size_t StepBytes() const;

  Library& library_;
  Job& job_;
  const int rank_;
  void* context_ = nullptr;
  bool dead_ = false;
  bool finalized_ = false;
  int enqueued_ = 0;
  uint64_t gpu_ns_ = 1000;
  Opened sleep_;

  std::mutex mutex_;  // of inbox_
  std::deque<Operation> inbox_;
  std::deque<Operation> running_;
  std::atomic<int> unfinished_{0};
  std::atomic<int> finished_{0};

  std::mutex calls_mutex_;
  std::vector<CallRecord> calls_;
  uint64_t started_ = 0;
};

// Ranks that reduce together.
class Job {
 public:
  Job(Library& library, const JobOptions& options);

  const JobOptions& options() const { return options_; }
  DriverRank& rank(int index) { return *ranks_[static_cast<size_t>(index)]; }
  void SetFreeze(const Freeze& freeze) { freeze_ = freeze; }
  const Freeze& freeze() const { return freeze_; }

  void EnqueueAll() {
    for (auto& rank : ranks_) rank->Enqueue();
  }
  // Drives all ranks from this thread until a whole round moves nothing. Returns whether all is
  // done.
  bool RunUntilNothingMoves();
  void FinalizeAll() {
    for (auto& rank : ranks_) rank->Finalize();
  }

  // Progress of a connection, by (operation, channel, receiving rank).
  struct Wire {
    std::atomic<int> posted{0};       // receives
    std::atomic<int> transmitted{0};  // sends
    std::atomic<int> received{0};
  };
  Wire& wire(int operation, int channel, int receiver) {
    return wires_[static_cast<size_t>((operation * options_.channels + channel) * options_.ranks +
                                      receiver)];
  }
  static constexpr int kOperationsMax = 256;

 private:
  const JobOptions options_;
  Freeze freeze_;
  std::vector<Wire> wires_;
  std::vector<std::unique_ptr<DriverRank>> ranks_;
};

}  // namespace holdfast::profiler

#endif  // HOLDFAST_HOOK_PROFILER_NCCL_DRIVER_TESTING_H_
