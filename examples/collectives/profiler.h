// A profiler plugin of NCCL, loaded and called as NCCL does: whatever watches NCCL's collectives
// can watch these.
//
// Interface version 6, declared here anew from NCCL 2.30.7 (src/include/plugin/profiler/
// profiler_v6.h, profiler_v5.h; sizes and offsets on LP64 asserted in profiler.cc). Order, parents
// and conditions are those of NCCL's src/plugin/profiler.cc, src/enqueue.cc, src/proxy.cc and
// src/transport/net.cc. Not called: events of the network plugin (NCCL's own builds leave them
// out), copy-engine collectives, CUDA graphs.
//
// What is not as in NCCL: there is no barrier in NCCL; one is told as an all-reduce of one byte, as
// which frameworks perform it. All-to-all is told as NCCL tells its own: as a send to and a receive
// from every other rank.
#ifndef HOLDFAST_EXAMPLES_COLLECTIVES_PROFILER_H_
#define HOLDFAST_EXAMPLES_COLLECTIVES_PROFILER_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/container/inlined_vector.h"
#include "examples/collectives/operation.h"

namespace collectives {

struct ProfilerV6;

// States of an event, as NCCL numbers them.
enum class EventState : int {
  kSendGpuWait = 8,
  kSendWait = 9,
  kReceiveWait = 10,
  kReceiveFlushWait = 11,
  kReceiveGpuWait = 12,
  kProxyIdle = 13,
  kProxyActive = 14,
  kProxySleep = 15,
  kProxyWakeup = 16,
  kProxyAppend = 17,
  kProxyAppendEnd = 18,
  kProxyOpInProgress = 19,
  kSendPeerWait = 20,
  kKernelChStop = 22,
  kGroupStartApiStop = 23,
  kGroupEndApiStart = 24,
};

// A plugin's library, loaded. Closed with the last reference, as NCCL closes it with its last
// communicator.
//
// Threads: any.
class ProfilerPlugin {
 public:
  // By NCCL's rules: `name` as it is, then libnccl-profiler-NAME.so if it is neither a path nor a
  // library's name; "": libnccl-profiler.so; "STATIC_PLUGIN": this program; "none": none. Null if
  // there is none, or none of version 6; `why` then says so (empty for "none", and for "" if there
  // is no such library).
  static std::shared_ptr<ProfilerPlugin> Load(const std::string& name, std::string* why);
  ~ProfilerPlugin();
  ProfilerPlugin(const ProfilerPlugin&) = delete;
  ProfilerPlugin& operator=(const ProfilerPlugin&) = delete;

  const ProfilerV6& table() const { return *table_; }

 private:
  ProfilerPlugin(void* library, const ProfilerV6* table) : library_(library), table_(table) {}
  void* const library_;
  const ProfilerV6* const table_;
};

// What a call of the program asks for, as its events say it.
struct CallInfo {
  OperationKind kind = OperationKind::kAllReduce;
  size_t count = 0;  // elements
  const char* data_type = "ncclInt8";
  uint32_t root = 0;
  uint32_t channels = 1;
};

// One communicator of one rank. Without a plugin, or if its init failed, every call is a no.
//
// Threads: calls of the program from any thread; those of the proxy from its own.
// Lifetime: the plugin's context lives as long; no event may come afterwards.
class CommunicatorTrace {
 public:
  struct Identity {
    uint64_t id = 0;  // the same on all ranks
    std::string name;
    int nodes = 1;
    int ranks = 1;
    int rank = 0;
  };
  CommunicatorTrace(std::shared_ptr<ProfilerPlugin> plugin, const Identity& identity);
  ~CommunicatorTrace();
  CommunicatorTrace(const CommunicatorTrace&) = delete;
  CommunicatorTrace& operator=(const CommunicatorTrace&) = delete;

  // The program's call. Between Begin() and End() the operation is given to the proxy; Begin() sets
  // its mask and its flows' tasks.
  struct Call {
    void* group_api = nullptr;
    void* group = nullptr;
    absl::InlinedVector<void*, 2> tasks;
  };
  Call Begin(const CallInfo& info, Operation& operation);
  void End(const Call& call);

  // The proxy's. `mask` is the operation's; handles may be null.
  void* StartProxyOp(int mask, const Flow& flow, size_t chunk_bytes);
  void* StartStep(int mask, void* proxy_op, uint32_t step);
  void* StartKernel(int mask, void* task, uint32_t channel, uint64_t start_ns);
  void StopKernel(void* kernel, uint64_t stop_ns);
  void Record(void* handle, EventState state, size_t bytes = 0);
  void Stop(void* handle);
  // An event of the thread itself; the caller stops it.
  void* StartProxyCtrl(EventState state);
  void RecordProxyCtrl(void* handle, EventState state, int appended);

 private:
  void* Start(void* descriptor);
  // Around the API calls of the program: what every kind of them tells besides.
  Call BeginApiCalls(void* group_api);
  void EndApiCalls(Call& call, int mask);
  Call BeginCollective(const CallInfo& info, int mask, void* group_api, Operation& operation);
  Call BeginPointToPoint(const CallInfo& info, int mask, void* group_api, Operation& operation);

  std::shared_ptr<ProfilerPlugin> plugin_;  // null: nothing is told
  void* context_ = nullptr;
  const int rank_;
  const int process_id_;  // asked for once, as in NCCL: getpid(2) is a system call
  // By OperationKind. On a cache line of its own: the program counts while the proxy reads the
  // above.
  alignas(64) std::array<std::atomic<uint64_t>, 8> sequences_ = {};
};

}  // namespace collectives

#endif  // HOLDFAST_EXAMPLES_COLLECTIVES_PROFILER_H_
