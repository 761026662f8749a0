#include "examples/collectives/profiler.h"

#include <dlfcn.h>
#include <strings.h>
#include <sys/types.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace collectives {

// ---- Version 6 of the interface

union StateArguments {
  size_t transfer_bytes;
  int appended_proxy_ops;
  uint64_t gpu_ns;
};
static_assert(sizeof(StateArguments) == 8);

struct GroupApi {
  bool graph_captured;
  int group_depth;
};
struct CollApi {
  const char* function;
  size_t count;
  const char* data_type;
  int root;
  void* stream;
  bool graph_captured;
};
struct P2pApi {
  const char* function;
  size_t count;
  const char* data_type;
  void* stream;
  bool graph_captured;
};
struct KernelLaunch {
  void* stream;
};
struct Coll {
  uint64_t sequence;
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
  void* parent_group;
};
struct P2p {
  const char* function;
  const void* buffer;
  const char* data_type;
  size_t count;
  int peer;
  uint8_t channels;
  void* parent_group;
};
struct ProxyOp {
  pid_t pid;
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
struct Descriptor {
  uint64_t type = 0;
  void* parent = nullptr;
  int rank = 0;
  union {
    std::byte all[88] = {};  // NCCL clears what an event does not use
    GroupApi group_api;
    CollApi coll_api;
    P2pApi p2p_api;
    KernelLaunch kernel_launch;
    Coll coll;
    P2p p2p;
    ProxyOp proxy_op;
    ProxyStep proxy_step;
    KernelCh kernel_ch;
  };
};
static_assert(sizeof(Descriptor) == 112);
static_assert(offsetof(Descriptor, parent) == 8 && offsetof(Descriptor, rank) == 16);
constexpr size_t kUnionAt = offsetof(Descriptor, coll);
static_assert(kUnionAt == 24);
static_assert(kUnionAt + offsetof(Coll, data_type) == 72);
static_assert(kUnionAt + offsetof(Coll, parent_group) == 104);
static_assert(kUnionAt + offsetof(P2p, peer) == 56 && kUnionAt + offsetof(P2p, parent_group) == 64);
static_assert(kUnionAt + offsetof(ProxyOp, is_send) == 44);
static_assert(kUnionAt + offsetof(KernelCh, gpu_ns) == 32);
static_assert(kUnionAt + offsetof(CollApi, graph_captured) == 64);
static_assert(kUnionAt + offsetof(P2pApi, graph_captured) == 56);

using Logger = void (*)(int level, unsigned long flags, const char* file, int line,
                        const char* format, ...);

struct ProfilerV6 {
  const char* name;
  int (*init)(void** context, uint64_t id, int* mask, const char* name, int nodes, int ranks,
              int rank, Logger logger);
  int (*start)(void* context, void** handle, Descriptor* descriptor);
  int (*stop)(void* handle);
  int (*record)(void* handle, int state, StateArguments* arguments);
  int (*finalize)(void* context);
};
static_assert(sizeof(ProfilerV6) == 48);

namespace {

constexpr int kGroup = 1 << 0;
constexpr int kColl = 1 << 1;
constexpr int kP2p = 1 << 2;
constexpr int kProxyOp = 1 << 3;
constexpr int kProxyStep = 1 << 4;
constexpr int kProxyCtrl = 1 << 5;
constexpr int kKernelCh = 1 << 6;
constexpr int kNetPlugin = 1 << 7;
constexpr int kGroupApi = 1 << 8;
constexpr int kCollApi = 1 << 9;
constexpr int kP2pApi = 1 << 10;
constexpr int kKernelLaunch = 1 << 11;
constexpr int kCe = 7 << 12;

// An event is delivered if it or something below it is asked for (NCCL's src/plugin/profiler.cc).
constexpr int kWantsStep = kProxyStep | kNetPlugin;
constexpr int kWantsProxyOp = kProxyOp | kWantsStep;
constexpr int kBelowTask = kWantsProxyOp | kKernelCh;
constexpr int kWantsColl = kColl | kBelowTask;
constexpr int kWantsP2p = kP2p | kBelowTask;
constexpr int kWantsGroup = kGroup | kColl | kP2p | kBelowTask;
constexpr int kWantsCollApi = kCollApi | kWantsColl | kCe;
constexpr int kWantsP2pApi = kP2pApi | kWantsP2p;
constexpr int kWantsGroupApi = kGroupApi | kP2pApi | kCollApi | kKernelLaunch | kWantsGroup | kCe;

// One for the process, as in NCCL: a plugin keeps its address and may change it at any time.
std::atomic<int> process_mask{0};
static_assert(sizeof(process_mask) == sizeof(int) && std::atomic<int>::is_always_lock_free);

constexpr int kLogWarn = 2;

void Log(int level, unsigned long, const char*, int, const char* format, ...) {
  if (level != kLogWarn) return;  // NCCL prints more with NCCL_DEBUG
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "collectives: profiler plugin: %s\n", text);
}

const char* FunctionOf(OperationKind kind) {
  switch (kind) {
    case OperationKind::kAllReduce:
    case OperationKind::kBarrier:
      return "AllReduce";
    case OperationKind::kReduceScatter:
      return "ReduceScatter";
    case OperationKind::kAllGather:
      return "AllGather";
    case OperationKind::kBroadcast:
      return "Broadcast";
    case OperationKind::kSend:
    case OperationKind::kAllToAll:
      break;
  }
  return "";  // told as point to point
}

// A plugin's functions have its own declarations of the interface's types, which UBSan's check of
// function types takes for a mistake.
#if defined(__clang__)
#define COLLECTIVES_CALLS_PLUGIN __attribute__((no_sanitize("function")))
#else
#define COLLECTIVES_CALLS_PLUGIN
#endif
COLLECTIVES_CALLS_PLUGIN int CallInit(const ProfilerV6& table, void** context,
                                      const CommunicatorTrace::Identity& identity) {
  return table.init(context, identity.id, reinterpret_cast<int*>(&process_mask),
                    identity.name.c_str(), identity.nodes, identity.ranks, identity.rank, &Log);
}
// What the others return says nothing: NCCL goes on whatever it is.
COLLECTIVES_CALLS_PLUGIN void CallStart(const ProfilerV6& table, void* context, void** handle,
                                        Descriptor* descriptor) {
  static_cast<void>(table.start(context, handle, descriptor));
}
COLLECTIVES_CALLS_PLUGIN void CallStop(const ProfilerV6& table, void* handle) {
  static_cast<void>(table.stop(handle));
}
COLLECTIVES_CALLS_PLUGIN void CallRecord(const ProfilerV6& table, void* handle, EventState state,
                                         StateArguments* arguments) {
  static_cast<void>(table.record(handle, static_cast<int>(state), arguments));
}
COLLECTIVES_CALLS_PLUGIN void CallFinalize(const ProfilerV6& table, void* context) {
  static_cast<void>(table.finalize(context));
}

bool IsPointToPoint(OperationKind kind) {
  return kind == OperationKind::kSend || kind == OperationKind::kAllToAll;
}

}  // namespace

std::shared_ptr<ProfilerPlugin> ProfilerPlugin::Load(const std::string& name, std::string* why) {
  why->clear();
  if (strcasecmp(name.c_str(), "none") == 0) return nullptr;
  std::vector<std::string> paths = {name.empty() ? "libnccl-profiler.so" : name};
  const bool is_library = name.starts_with("lib") && name.ends_with(".so");
  if (!name.empty() && name.find('/') == std::string::npos && !is_library) {
    paths.push_back(absl::StrCat("libnccl-profiler-", name, ".so"));
  }
  void* library = nullptr;
  for (const std::string& path : paths) {
    const bool is_this_program = strcasecmp(path.c_str(), "STATIC_PLUGIN") == 0;
    library = dlopen(is_this_program ? nullptr : path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) break;
    if (!name.empty()) absl::StrAppend(why, why->empty() ? "" : "; ", dlerror());
  }
  if (library == nullptr) return nullptr;
  const auto* table = static_cast<const ProfilerV6*>(dlsym(library, "ncclProfiler_v6"));
  if (table == nullptr) {
    *why = absl::StrCat(name, ": has no ncclProfiler_v6");
    dlclose(library);
    return nullptr;
  }
  return std::shared_ptr<ProfilerPlugin>(new ProfilerPlugin(library, table));
}

ProfilerPlugin::~ProfilerPlugin() { dlclose(library_); }

CommunicatorTrace::CommunicatorTrace(std::shared_ptr<ProfilerPlugin> plugin,
                                     const Identity& identity)
    : plugin_(std::move(plugin)), rank_(identity.rank), process_id_(getpid()) {
  if (plugin_ == nullptr) return;
  if (CallInit(plugin_->table(), &context_, identity) == 0) return;
  context_ = nullptr;
  plugin_ = nullptr;
}

CommunicatorTrace::~CommunicatorTrace() {
  if (plugin_ != nullptr && context_ != nullptr) CallFinalize(plugin_->table(), context_);
}

void* CommunicatorTrace::Start(void* descriptor) {
  void* handle = nullptr;
  CallStart(plugin_->table(), context_, &handle, static_cast<Descriptor*>(descriptor));
  return handle;
}

void CommunicatorTrace::Stop(void* handle) {
  if (handle != nullptr) CallStop(plugin_->table(), handle);
}

CommunicatorTrace::Call CommunicatorTrace::Begin(const CallInfo& info, Operation& operation) {
  if (plugin_ == nullptr) return {};
  const int mask = process_mask.load(std::memory_order_relaxed);
  operation.event_mask = mask;
  operation.tells_kernels = (mask & kKernelCh) != 0;
  void* group_api = nullptr;
  if ((mask & kWantsGroupApi) != 0) {
    Descriptor descriptor;
    descriptor.type = kGroupApi;
    descriptor.group_api.group_depth = 1;
    group_api = Start(&descriptor);
  }
  const bool p2p = IsPointToPoint(info.kind);
  return p2p ? BeginPointToPoint(info, mask, group_api, operation)
             : BeginCollective(info, mask, group_api, operation);
}

CommunicatorTrace::Call CommunicatorTrace::BeginApiCalls(void* group_api) {
  Call call;
  call.group_api = group_api;
  if (group_api != nullptr) {
    CallRecord(plugin_->table(), group_api, EventState::kGroupStartApiStop, nullptr);
  }
  return call;
}

void CommunicatorTrace::EndApiCalls(Call& call, int mask) {
  if (call.group_api != nullptr) {
    CallRecord(plugin_->table(), call.group_api, EventState::kGroupEndApiStart, nullptr);
  }
  if ((mask & kKernelLaunch) != 0) {
    Descriptor descriptor;
    descriptor.type = kKernelLaunch;
    descriptor.parent = call.group_api;
    Stop(Start(&descriptor));
  }
  if ((mask & kWantsGroup) != 0) {
    Descriptor descriptor;
    descriptor.type = kGroup;
    call.group = Start(&descriptor);
  }
}

CommunicatorTrace::Call CommunicatorTrace::BeginCollective(const CallInfo& info, int mask,
                                                           void* group_api, Operation& operation) {
  Call call = BeginApiCalls(group_api);
  void* api = nullptr;
  if ((mask & kWantsCollApi) != 0) {
    Descriptor descriptor;
    descriptor.type = kCollApi;
    descriptor.parent = group_api;
    descriptor.coll_api = {FunctionOf(info.kind),       info.count, info.data_type,
                           static_cast<int>(info.root), nullptr,    false};
    api = Start(&descriptor);
    Stop(api);
  }
  EndApiCalls(call, mask);
  const auto function = static_cast<size_t>(
      info.kind == OperationKind::kBarrier ? OperationKind::kAllReduce : info.kind);
  const uint64_t sequence = sequences_[function].fetch_add(1, std::memory_order_relaxed);
  if ((mask & kWantsColl) != 0) {
    Descriptor descriptor;
    descriptor.type = kColl;
    descriptor.parent = api;
    descriptor.rank = rank_;
    descriptor.coll = {sequence,
                       FunctionOf(info.kind),
                       nullptr,
                       nullptr,
                       info.count,
                       static_cast<int>(info.root),
                       info.data_type,
                       static_cast<uint8_t>(info.channels),
                       1,
                       "RING",
                       "SIMPLE",
                       call.group};
    call.tasks.push_back(Start(&descriptor));
    for (const std::unique_ptr<Flow>& flow : operation.flows) flow->task = call.tasks.back();
  }
  return call;
}

CommunicatorTrace::Call CommunicatorTrace::BeginPointToPoint(const CallInfo& info, int mask,
                                                             void* group_api,
                                                             Operation& operation) {
  Call call = BeginApiCalls(group_api);
  // NCCL has one call for each, and a group around those of an all-to-all.
  std::vector<void*> apis(operation.flows.size(), nullptr);
  for (size_t i = 0; i < apis.size() && (mask & kWantsP2pApi) != 0; ++i) {
    Descriptor descriptor;
    descriptor.type = kP2pApi;
    descriptor.parent = group_api;
    descriptor.p2p_api = {operation.flows[i]->is_send ? "Send" : "Recv", info.count, info.data_type,
                          nullptr, false};
    apis[i] = Start(&descriptor);
    Stop(apis[i]);
  }
  EndApiCalls(call, mask);
  for (size_t i = 0; i < apis.size() && (mask & kWantsP2p) != 0; ++i) {
    Flow& flow = *operation.flows[i];
    Descriptor descriptor;
    descriptor.type = kP2p;
    descriptor.parent = apis[i];
    descriptor.rank = rank_;
    descriptor.p2p = {flow.is_send ? "Send" : "Recv", nullptr, info.data_type, info.count,
                      static_cast<int>(flow.peer),    1,       call.group};
    flow.task = Start(&descriptor);
    call.tasks.push_back(flow.task);
  }
  return call;
}

void CommunicatorTrace::End(const Call& call) {
  if (plugin_ == nullptr) return;
  for (void* const task : call.tasks) Stop(task);
  Stop(call.group);
  Stop(call.group_api);
}

void* CommunicatorTrace::StartProxyOp(int mask, const Flow& flow, size_t chunk_bytes) {
  if (plugin_ == nullptr || (mask & kWantsProxyOp) == 0) return nullptr;
  Descriptor descriptor;
  descriptor.type = kProxyOp;
  descriptor.parent = flow.task;
  descriptor.rank = rank_;
  descriptor.proxy_op = {process_id_,
                         static_cast<uint8_t>(flow.channel),
                         static_cast<int>(flow.peer),
                         static_cast<int>(flow.chunk_count()),
                         static_cast<int>(chunk_bytes),
                         flow.is_send ? 1 : 0};
  return Start(&descriptor);
}

void* CommunicatorTrace::StartStep(int mask, void* proxy_op, uint32_t step) {
  if (plugin_ == nullptr || (mask & kWantsStep) == 0) return nullptr;
  Descriptor descriptor;
  descriptor.type = kProxyStep;
  descriptor.parent = proxy_op;
  descriptor.rank = rank_;
  descriptor.proxy_step.step = static_cast<int>(step);
  return Start(&descriptor);
}

void* CommunicatorTrace::StartKernel(int mask, void* task, uint32_t channel, uint64_t start_ns) {
  if (plugin_ == nullptr || (mask & kKernelCh) == 0) return nullptr;
  Descriptor descriptor;
  descriptor.type = kKernelCh;
  descriptor.parent = task;
  descriptor.kernel_ch.channel = static_cast<uint8_t>(channel);
  descriptor.kernel_ch.gpu_ns = start_ns;
  return Start(&descriptor);
}

void CommunicatorTrace::StopKernel(void* kernel, uint64_t stop_ns) {
  if (kernel == nullptr) return;
  StateArguments arguments = {};
  arguments.gpu_ns = stop_ns;
  CallRecord(plugin_->table(), kernel, EventState::kKernelChStop, &arguments);
  Stop(kernel);
}

void CommunicatorTrace::Record(void* handle, EventState state, size_t bytes) {
  if (handle == nullptr) return;
  StateArguments arguments = {};
  arguments.transfer_bytes = bytes;
  CallRecord(plugin_->table(), handle, state, &arguments);
}

void* CommunicatorTrace::StartProxyCtrl(EventState state) {
  // Of these events the mask is read anew every time.
  if (plugin_ == nullptr || (process_mask.load(std::memory_order_relaxed) & kProxyCtrl) == 0) {
    return nullptr;
  }
  Descriptor descriptor;
  descriptor.type = kProxyCtrl;
  void* const handle = Start(&descriptor);
  RecordProxyCtrl(handle, state, 0);
  return handle;
}

void CommunicatorTrace::RecordProxyCtrl(void* handle, EventState state, int appended) {
  if (handle == nullptr || (process_mask.load(std::memory_order_relaxed) & kProxyCtrl) == 0) return;
  StateArguments arguments = {};
  arguments.appended_proxy_ops = appended;
  CallRecord(plugin_->table(), handle, state, &arguments);
}

}  // namespace collectives
