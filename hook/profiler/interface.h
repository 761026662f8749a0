// NCCL's profiler interface, versions 4 to 7, as this plugin needs it: our own declarations, so
// that one binary is built without NCCL and serves every NCCL from 2.27 on. Offsets and sizes are
// those of NCCL's nccl_profiler.h on LP64 (versions 4 to 6 as of 2.30.7, 7 as of 2.32.3), asserted
// here.
//
// What NCCL guarantees, and what it does not, is said where plugin.cc deals with it.
#ifndef HOLDFAST_HOOK_PROFILER_INTERFACE_H_
#define HOLDFAST_HOOK_PROFILER_INTERFACE_H_

#include <sys/types.h>

#include <cstddef>
#include <cstdint>

namespace holdfast::profiler {

enum NcclResult : int { kNcclSuccess = 0, kNcclSystemError = 2 };

enum NcclLogLevel : int { kNcclLogWarn = 2, kNcclLogInfo = 3 };
inline constexpr unsigned long kNcclLogProfile = 0x4000;
using NcclLogger = void (*)(NcclLogLevel, unsigned long flags, const char* file, int line,
                            const char* format, ...);

// Event types: bits of the mask.
inline constexpr uint64_t kGroup = 1 << 0;
inline constexpr uint64_t kColl = 1 << 1;
inline constexpr uint64_t kP2p = 1 << 2;
inline constexpr uint64_t kProxyOp = 1 << 3;
inline constexpr uint64_t kProxyStep = 1 << 4;
inline constexpr uint64_t kProxyCtrl = 1 << 5;
inline constexpr uint64_t kKernelCh = 1 << 6;
inline constexpr uint64_t kNetPlugin = 1 << 7;
inline constexpr uint64_t kGroupApi = 1 << 8;  // from here on: version 5
inline constexpr uint64_t kCollApi = 1 << 9;
inline constexpr uint64_t kP2pApi = 1 << 10;
inline constexpr uint64_t kKernelLaunch = 1 << 11;
inline constexpr uint64_t kCeColl = 1 << 12;  // version 6
inline constexpr uint64_t kCeSync = 1 << 13;
inline constexpr uint64_t kCeBatch = 1 << 14;
inline constexpr uint64_t kKernelPhase = 1 << 15;  // version 7

// The types that a version knows.
constexpr uint64_t KnownEvents(int version) {
  if (version >= 7) return (1 << 16) - 1;
  if (version == 6) return (1 << 15) - 1;
  if (version == 5) return (1 << 12) - 1;
  return (1 << 8) - 1;
}

// What NCCL delivers when a type is asked for: itself and what stands above it.
constexpr uint64_t WithAncestors(uint64_t mask) {
  if ((mask & kNetPlugin) != 0) mask |= kProxyStep;
  if ((mask & kProxyStep) != 0) mask |= kProxyOp;
  if ((mask & kKernelPhase) != 0) mask |= kKernelCh;
  if ((mask & (kCeSync | kCeBatch)) != 0) mask |= kCeColl;
  if ((mask & (kProxyOp | kKernelCh)) != 0) mask |= kColl | kP2p;
  if ((mask & (kColl | kCeColl)) != 0) mask |= kCollApi;
  if ((mask & kP2p) != 0) mask |= kP2pApi;
  if ((mask & (kColl | kP2p)) != 0) mask |= kGroup;
  if ((mask & (kCollApi | kP2pApi | kKernelLaunch)) != 0) mask |= kGroupApi;
  return mask;
}

// States of recordEventState.
enum NcclState : int {
  kStateSendGpuWait = 8,
  kStateSendWait = 9,
  kStateReceiveWait = 10,
  kStateReceiveFlushWait = 11,
  kStateReceiveGpuWait = 12,
  kStateProxyIdle = 13,
  kStateProxyActive = 14,
  kStateProxySleep = 15,
  kStateProxyWakeup = 16,
  kStateProxyAppend = 17,
  kStateProxyAppendEnd = 18,
  kStateProxyOpInProgress = 19,
  kStateSendPeerWait = 20,
  kStateKernelChStop = 22,
};

union StateArguments {
  struct {
    size_t transfer_bytes;
  } proxy_step;
  struct {
    int appended_proxy_ops;
  } proxy_ctrl;
  struct {
    void* data;
  } net_plugin;
  struct {
    uint64_t gpu_ns;
  } kernel_ch;
};
static_assert(sizeof(StateArguments) == 8);

// ---- Members of the descriptors' union, which begins at offset 24

struct CollApiV5 {
  const char* function;
  size_t count;
  const char* data_type;
  int root;
  void* stream;
  bool graph_captured;
};
struct CollApiV7 {
  CollApiV5 v5;
  uint64_t user_tag;
};
struct P2pApiV5 {
  const char* function;
  size_t count;
  const char* data_type;
  void* stream;
  bool graph_captured;
};
struct P2pApiV7 {
  P2pApiV5 v5;
  uint64_t user_tag;
};
struct CollV4 {
  uint64_t sequence;  // per function, in the communicator
  const char* function;
  const void* send_buffer;
  void* receive_buffer;
  size_t count;
  int root;
  const char* data_type;
  uint8_t channels;
  uint8_t warps;
  const char* algorithm;
  const char* protocol;
};
struct CollV5 {
  CollV4 v4;
  void* parent_group;
};
struct CollV7 {
  CollV5 v5;
  const char* kernel_variant;
  bool symmetric;
  uint64_t user_tag;
};
struct P2pV4 {
  const char* function;
  void* buffer;
  const char* data_type;
  size_t count;
  int peer;
  uint8_t channels;  // not filled through NCCL's shim for version 4
};
struct P2pV5 {
  P2pV4 v4;
  void* parent_group;
};
struct P2pV7 {
  P2pV5 v5;
  uint64_t user_tag;
};
struct ProxyOp {
  pid_t pid;  // of the process whose operation it is
  uint8_t channel;
  int peer;
  int steps;
  int chunk_bytes;
  int is_send;
};
struct ProxyStep {
  int step;
};
struct KernelCh {
  uint8_t channel;
  uint64_t gpu_ns;
};
struct CeColl {
  uint64_t sequence;
  const char* function;
  const void* send_buffer;
  void* receive_buffer;
  size_t count;
  int root;
  const char* data_type;
  const char* sync_strategy;
  bool intra_batch_sync;
  uint32_t batch_size;
  uint32_t batches;
  uint32_t ce_sequence;
  void* stream;
};

struct CeCollV7 {
  CeColl v6;
  uint64_t user_tag;
};

struct DescriptorV4 {
  static constexpr int kVersion = 4;
  uint8_t type;  // the bytes behind it are garbage
  void* parent;
  int rank;
  union {
    CollV4 coll;
    P2pV4 p2p;
    ProxyOp proxy_op;
    ProxyStep proxy_step;
    KernelCh kernel_ch;
  };
};
static_assert(sizeof(DescriptorV4) == 104);

// Versions 5 and 6.
struct DescriptorV5 {
  static constexpr int kVersion = 5;
  uint64_t type;
  void* parent;
  int rank;
  union {
    CollApiV5 coll_api;
    P2pApiV5 p2p_api;
    CollV5 coll;
    P2pV5 p2p;
    ProxyOp proxy_op;
    ProxyStep proxy_step;
    KernelCh kernel_ch;
    CeColl ce_coll;
  };
};
static_assert(sizeof(DescriptorV5) == 112);

struct DescriptorV7 {
  static constexpr int kVersion = 7;
  uint64_t type;
  void* parent;
  int rank;
  union {
    CollApiV7 coll_api;
    P2pApiV7 p2p_api;
    CollV7 coll;
    P2pV7 p2p;
    ProxyOp proxy_op;
    ProxyStep proxy_step;
    KernelCh kernel_ch;
    CeColl ce_coll;
    CeCollV7 ce_coll_v7;
  };
};
static_assert(sizeof(DescriptorV7) == 136);

template <typename D>
constexpr bool CommonOffsetsHold() {
  return offsetof(D, type) == 0 && offsetof(D, parent) == 8 && offsetof(D, rank) == 16 &&
         offsetof(D, coll) == 24 && offsetof(D, proxy_op) == 24 && offsetof(D, kernel_ch) == 24;
}
static_assert(CommonOffsetsHold<DescriptorV4>() && CommonOffsetsHold<DescriptorV5>() &&
              CommonOffsetsHold<DescriptorV7>());
inline constexpr size_t kUnionAt = 24;
static_assert(kUnionAt + offsetof(CollV4, function) == 32);
static_assert(kUnionAt + offsetof(CollV4, count) == 56);
static_assert(kUnionAt + offsetof(CollV4, root) == 64);
static_assert(kUnionAt + offsetof(CollV4, data_type) == 72);
static_assert(kUnionAt + offsetof(CollV4, channels) == 80);
static_assert(kUnionAt + offsetof(CollV4, warps) == 81);
static_assert(kUnionAt + offsetof(CollV4, algorithm) == 88);
static_assert(kUnionAt + offsetof(CollV4, protocol) == 96);
static_assert(kUnionAt + offsetof(CollV5, parent_group) == 104);
static_assert(kUnionAt + offsetof(CollV7, kernel_variant) == 112);
static_assert(kUnionAt + offsetof(CollV7, symmetric) == 120);
static_assert(kUnionAt + offsetof(CollV7, user_tag) == 128);
static_assert(kUnionAt + offsetof(P2pV4, data_type) == 40);
static_assert(kUnionAt + offsetof(P2pV4, count) == 48);
static_assert(kUnionAt + offsetof(P2pV4, peer) == 56);
static_assert(kUnionAt + offsetof(P2pV4, channels) == 60);
static_assert(kUnionAt + offsetof(P2pV5, parent_group) == 64);
static_assert(kUnionAt + offsetof(P2pV7, user_tag) == 72);
static_assert(kUnionAt + offsetof(ProxyOp, channel) == 28);
static_assert(kUnionAt + offsetof(ProxyOp, peer) == 32);
static_assert(kUnionAt + offsetof(ProxyOp, steps) == 36);
static_assert(kUnionAt + offsetof(ProxyOp, chunk_bytes) == 40);
static_assert(kUnionAt + offsetof(ProxyOp, is_send) == 44);
static_assert(kUnionAt + offsetof(KernelCh, gpu_ns) == 32);
static_assert(kUnionAt + offsetof(CollApiV5, count) == 32);
static_assert(kUnionAt + offsetof(CollApiV5, data_type) == 40);
static_assert(kUnionAt + offsetof(CollApiV5, graph_captured) == 64);
static_assert(kUnionAt + offsetof(CollApiV7, user_tag) == 72);
static_assert(kUnionAt + offsetof(P2pApiV5, graph_captured) == 56);
static_assert(kUnionAt + offsetof(P2pApiV7, user_tag) == 64);
static_assert(kUnionAt + offsetof(CeColl, data_type) == 72);
static_assert(kUnionAt + offsetof(CeColl, sync_strategy) == 80);
static_assert(kUnionAt + offsetof(CeColl, ce_sequence) == 100);
static_assert(kUnionAt + offsetof(CeColl, stream) == 104);
static_assert(kUnionAt + offsetof(CeCollV7, user_tag) == 112);

// ---- The exported structs: six pointers. Descriptors differ by version, so they pass as void*.

using InitV4 = NcclResult (*)(void** context, int* mask, const char* name, uint64_t hash, int nodes,
                              int ranks, int rank, NcclLogger);
using InitV5 = NcclResult (*)(void** context, uint64_t id, int* mask, const char* name, int nodes,
                              int ranks, int rank, NcclLogger);
using StartEvent = NcclResult (*)(void* context, void** handle, void* descriptor);
using StopEvent = NcclResult (*)(void* handle);
using RecordEventState = NcclResult (*)(void* handle, int state, StateArguments* arguments);
using FinalizeContext = NcclResult (*)(void* context);

struct ProfilerV4 {
  const char* name;
  InitV4 init;
  StartEvent start;
  StopEvent stop;
  RecordEventState record;
  FinalizeContext finalize;
};
struct ProfilerV5 {  // to 7
  const char* name;
  InitV5 init;
  StartEvent start;
  StopEvent stop;
  RecordEventState record;
  FinalizeContext finalize;
};
static_assert(sizeof(ProfilerV4) == 48 && sizeof(ProfilerV5) == 48);

}  // namespace holdfast::profiler

#endif  // HOLDFAST_HOOK_PROFILER_INTERFACE_H_
