// libnccl-profiler-holdfast.so: NCCL's profiler interface, versions 4 to 7, onto the monitor board.
//
// NCCL calls from its own threads, and this file is written for what it really does (NCCL 2.27 to
// 2.32), not for what one would expect:
//   - stop of Coll and P2p means enqueued; done is when the last part has ended (monitor_events.h);
//   - with PXN, a proxy thread gets operations of another process, whose context and parents are
//     that process's tokens: only the tag of a token says so;
//   - SendPeerWait comes at every poll; steps may be unpaired, kernels without end, states after
//   the
//     stop, stops twice, parents NULL or long gone;
//   - KernelCh comes from any thread; the mask may be changed by others at any time, so every type
//   is
//     understood at every level;
//   - a handle left NULL is not stopped, and old versions left out its children: unless a table is
//     full, every event gets a handle.
//
// Events take no lock, allocate nothing, and make no system call. init and finalize come from the
// program's threads and do: they make the board, and load the chained plugin.
//
// The library is linked never to be unloaded: NCCL closes it with its last communicator, while its
// threads may still be inside, and may load it again. What it is then goes on: one board for the
// life of the process. In a forked child, which has no board, every call is harmless.
#include <pthread.h>

#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <string_view>

#include "hook/annotations.h"
#include "hook/error.h"
#include "hook/monitor_board.h"
#include "hook/monitor_events.h"
#include "hook/monitor_offer.h"
#include "hook/profiler/chain.h"
#include "hook/profiler/interface.h"
#include "hook/profiler/names.h"

namespace holdfast::profiler {
namespace {

using abi::WaitState;
using hook::MonitorEvents;
using hook::OperationInfo;
using hook::Token;
using hook::TokenKind;

constexpr auto kRelaxed = std::memory_order_relaxed;

// Of the process, by nature: NCCL's interface is a set of plain functions. Null: none, or no more
// (a forked child).
alignas(64) std::atomic<MonitorEvents*> process_events{nullptr};
std::atomic<Chain*> process_chain{nullptr};  // on the same cache line
// NCCL's mask, and what we last wrote there.
std::atomic<std::atomic<int>*> process_mask{nullptr};
std::atomic<int> written_mask{0};
std::atomic<int> process_version{0};  // of the interface, at the last init
// Of init and finalize. Constant initialisation: nothing runs when the library is loaded.
constinit hook::Mutex init_mutex;
pthread_once_t fork_once = PTHREAD_ONCE_INIT;

void ForgetInChild() {
  process_events.store(nullptr, kRelaxed);
  process_chain.store(nullptr, kRelaxed);
}
void InstallForkHandler() { pthread_atfork(nullptr, nullptr, &ForgetInChild); }

Token TokenOf(const void* handle) { return reinterpret_cast<Token>(handle); }
void* HandleOf(Token token) { return reinterpret_cast<void*>(token); }

// What is asked of NCCL. Light leaves kernels out: asking for them changes how plans run
// (docs/MONITOR.md).
int OwnMask(abi::MonitorLevel level, int version) {
  uint64_t mask = kColl | kP2p | kProxyOp | kProxyStep | kProxyCtrl | kCeColl;
  if (level == abi::MonitorLevel::kFull) mask |= kKernelCh | kCollApi | kP2pApi | kKernelLaunch;
  return static_cast<int>(mask & KnownEvents(version));
}

// The logger has NCCL's own types, which UBSan's check of function types takes for a mistake.
HOOK_ATTRIBUTE(no_sanitize("function"))
void Log(const InitCall& call, NcclLogLevel level, const char* text) {
  if (call.logger == nullptr) return;
  call.logger(level, kNcclLogProfile, __FILE__, __LINE__, "PROFILER/Holdfast: %s", text);
}

// ---- init and finalize

// Our exported struct of a version.
const void* OwnProfiler(int version);

void LoadChain(const InitCall& call) HOOK_REQUIRES(init_mutex) {
  const char* value = getenv("HOLDFAST_PROFILER_CHAIN");
  if (value == nullptr || *value == '\0' || process_chain.load() != nullptr) return;
  hook::Result<std::unique_ptr<Chain>> loaded =
      Chain::Load(value, call.version, OwnProfiler(call.version));
  if (!loaded.ok()) {
    Log(call, kNcclLogWarn, loaded.error().text());
    return;
  }
  Log(call, kNcclLogInfo, loaded.value()->name());
  process_chain.store(loaded.value().release(), std::memory_order_release);
}

// The process's events, made at the first init. Null: the reason was logged.
MonitorEvents* MakeEvents(const InitCall& call) HOOK_REQUIRES(init_mutex) {
  MonitorEvents* existing = process_events.load(std::memory_order_acquire);
  if (existing != nullptr) return existing;
  hook::Result<abi::MonitorLevel> level = hook::ReadMonitorLevel();
  if (!level.ok()) Log(call, kNcclLogWarn, level.error().text());
  hook::Result<std::unique_ptr<hook::MonitorBoard>> board = hook::MonitorBoard::Create(
      abi::BoardWriter::kProfilerPlugin, level.ok() ? level.value() : abi::MonitorLevel::kLight,
      hook::ReadMonitorIdentity(), hook::MonitorBoard::Clock::kBest);
  if (!board.ok()) {
    Log(call, kNcclLogWarn, board.error().text());
    return nullptr;
  }
  hook::Result<std::unique_ptr<MonitorEvents>> events =
      MonitorEvents::Create(std::move(board.value()));
  if (!events.ok()) {
    Log(call, kNcclLogWarn, events.error().text());
    return nullptr;
  }
  pthread_once(&fork_once, &InstallForkHandler);
  MonitorEvents* const made = events.value().release();
  process_events.store(made, std::memory_order_release);
  return made;
}

// So that it outlives the process, as evidence. Without an agent the board goes on alone. Again
// with every communicator: another agent may be there by then.
void OfferToAgent(const InitCall& call, const MonitorEvents& events) {
  const hook::Error error = hook::OfferMonitorBoard(events.board(), hook::MonitorSocketPath(),
                                                    hook::Deadline::After(hook::kMonitorOfferNs));
  if (!error.ok()) Log(call, kNcclLogInfo, error.text());
}

NcclResult Init(void** context, int* mask, const InitCall& call) {
  if (context == nullptr || mask == nullptr) return kNcclSystemError;
  *context = nullptr;
  const hook::Result<abi::MonitorLevel> level = hook::ReadMonitorLevel();
  if (level.ok() && level.value() == abi::MonitorLevel::kOff) return kNcclSuccess;
  hook::MutexLock lock(init_mutex);
  MonitorEvents* const events = MakeEvents(call);
  if (events == nullptr) return kNcclSystemError;
  LoadChain(call);
  const Token communicator = events->OpenCommunicator({.hash = call.id,
                                                       .name = call.name,
                                                       .ranks = static_cast<uint32_t>(call.ranks),
                                                       .rank = static_cast<uint32_t>(call.rank),
                                                       .nodes = static_cast<uint32_t>(call.nodes)});
  int asked = OwnMask(events->board().header().level, call.version);
  Chain* const chain = process_chain.load();
  if (chain != nullptr && communicator != 0) {
    if (chain->version() > call.version || (chain->version() == 4) != (call.version == 4)) {
      Log(call, kNcclLogWarn, "the chained plugin was loaded for another version of NCCL");
    } else if (!chain->Init(call, communicator)) {
      Log(call, kNcclLogWarn, "the chained plugin refused this communicator");
    }
    asked |= static_cast<int>(chain->mask());
  }
  // One word for the whole process, which NCCL reads at any time.
  auto* const shared_mask = reinterpret_cast<std::atomic<int>*>(mask);
  shared_mask->store(asked, kRelaxed);
  written_mask.store(asked, kRelaxed);
  process_version.store(call.version, kRelaxed);
  process_mask.store(shared_mask, std::memory_order_release);
  *context = HandleOf(communicator);
  OfferToAgent(call, *events);
  return kNcclSuccess;
}

NcclResult Finalize(void* context) {
  MonitorEvents* const events = process_events.load(std::memory_order_acquire);
  if (events == nullptr) return kNcclSuccess;
  hook::MutexLock lock(init_mutex);
  Chain* const chain = process_chain.load();
  if (chain != nullptr) chain->Finalize(TokenOf(context));
  events->CloseCommunicator(TokenOf(context));
  return kNcclSuccess;
}

// The chained plugin may change its mind at any time; ours stays asked for.
void FollowChainsMask(const MonitorEvents& events, const Chain& chain) {
  const int asked = OwnMask(events.board().header().level, process_version.load(kRelaxed)) |
                    static_cast<int>(chain.mask());
  if (asked == written_mask.load(kRelaxed)) return;
  std::atomic<int>* const mask = process_mask.load(std::memory_order_acquire);
  if (mask != nullptr) mask->store(asked, kRelaxed);
  written_mask.store(asked, kRelaxed);
}

// ---- Events

template <typename D>
const CollV4& CollOf(const D& descriptor) {
  if constexpr (D::kVersion >= 7) {
    return descriptor.coll.v5.v4;
  } else if constexpr (D::kVersion >= 5) {
    return descriptor.coll.v4;
  } else {
    return descriptor.coll;
  }
}

template <typename D>
const P2pV4& P2pOf(const D& descriptor) {
  if constexpr (D::kVersion >= 7) {
    return descriptor.p2p.v5.v4;
  } else if constexpr (D::kVersion >= 5) {
    return descriptor.p2p.v4;
  } else {
    return descriptor.p2p;
  }
}

template <typename Members>
OperationInfo InfoOf(const Members& members) {
  const abi::DataType type = DataTypeOf(members.data_type);
  return {.kind = OperationKindOf(members.function),
          .data_type = type,
          .bytes = members.count * BytesOf(type)};
}

// An event that only a chained plugin looks at. Without one it gets a handle that stands for
// nothing, because NCCL may leave out the children of an event without handle.
Token BeginOther(MonitorEvents& events, const Chain* chain) {
  if (chain != nullptr) return events.BeginOther();
  return uint64_t{events.board().header().process_tag} << hook::kTokenTagShift |
         static_cast<uint64_t>(TokenKind::kOther) << hook::kTokenKindShift |
         uint64_t{hook::kTokenPlaceMask} << hook::kTokenPlaceShift;
}

template <typename D>
Token StartApi(MonitorEvents& events, const Chain* chain, Token communicator, const D& descriptor) {
  if constexpr (D::kVersion >= 7) {
    if (descriptor.type == kCollApi) {
      events.ApiCall(communicator, InfoOf(descriptor.coll_api.v5));
    } else if (descriptor.type == kP2pApi) {
      events.ApiCall(communicator, InfoOf(descriptor.p2p_api.v5));
    }
  } else if constexpr (D::kVersion >= 5) {
    if (descriptor.type == kCollApi) {
      events.ApiCall(communicator, InfoOf(descriptor.coll_api));
    } else if (descriptor.type == kP2pApi) {
      events.ApiCall(communicator, InfoOf(descriptor.p2p_api));
    }
  }
  if (descriptor.type == kKernelLaunch) events.KernelLaunch(communicator);
  return BeginOther(events, chain);
}

Token StartProxyOp(MonitorEvents& events, Token communicator, Token parent, const ProxyOp& op) {
  if (op.peer < 0 || op.channel >= abi::kNoChannel) return 0;
  return events.BeginTransfer(communicator, parent,
                              {.channel = op.channel,
                               .peer = static_cast<uint32_t>(op.peer),
                               .steps = static_cast<uint32_t>(op.steps < 0 ? 0 : op.steps),
                               .send = op.is_send != 0});
}

template <typename D>
Token StartOperation(MonitorEvents& events, const Chain* chain, Token communicator,
                     const D& descriptor) {
  OperationInfo info;
  if (descriptor.type == kP2p) {
    const P2pV4& p2p = P2pOf(descriptor);
    info = InfoOf(p2p);
    info.peer = static_cast<uint32_t>(p2p.peer) & abi::kNoPeer;
  } else if (descriptor.type == kColl) {
    const CollV4& coll = CollOf(descriptor);
    info = InfoOf(coll);
    info.root = static_cast<uint32_t>(coll.root);
    info.nccl_sequence = coll.sequence;
  } else if constexpr (D::kVersion >= 5) {
    info = InfoOf(descriptor.ce_coll);
    info.root = static_cast<uint32_t>(descriptor.ce_coll.root);
    info.nccl_sequence = descriptor.ce_coll.sequence;
  }
  if (chain != nullptr) FollowChainsMask(events, *chain);
  return events.BeginOperation(communicator, info);
}

template <typename D>
Token Dispatch(MonitorEvents& events, const Chain* chain, Token communicator, const D& descriptor) {
  const Token parent = TokenOf(descriptor.parent);
  switch (uint64_t{descriptor.type}) {
    case kProxyStep:
      return events.BeginStep(parent, static_cast<uint32_t>(descriptor.proxy_step.step));
    case kProxyOp:
      return StartProxyOp(events, communicator, parent, descriptor.proxy_op);
    case kColl:
    case kP2p:
    case kCeColl:
      return StartOperation(events, chain, communicator, descriptor);
    case kKernelCh:
      return events.BeginKernel(communicator, parent, descriptor.kernel_ch.channel,
                                descriptor.kernel_ch.gpu_ns);
    case kProxyCtrl:
      return events.BeginProxyThread(communicator);
    default:
      return StartApi(events, chain, communicator, descriptor);
  }
}

template <typename D>
HOOK_HOT NcclResult Start(void* context, void** handle, void* untyped) {
  if (handle == nullptr) return kNcclSuccess;
  *handle = nullptr;
  MonitorEvents* const events = process_events.load(std::memory_order_acquire);
  if (events == nullptr || untyped == nullptr) return kNcclSuccess;
  const D& descriptor = *static_cast<const D*>(untyped);
  Chain* const chain = process_chain.load(std::memory_order_acquire);
  const Token token = Dispatch(*events, chain, TokenOf(context), descriptor);
  if (chain != nullptr && token != 0) {
    chain->Start(*events, TokenOf(context), token, descriptor);
  }
  *handle = HandleOf(token);
  return kNcclSuccess;
}

HOOK_HOT NcclResult Stop(void* handle) {
  MonitorEvents* const events = process_events.load(std::memory_order_acquire);
  if (events == nullptr) return kNcclSuccess;
  const Token token = TokenOf(handle);
  Chain* const chain = process_chain.load(std::memory_order_acquire);
  if (chain != nullptr) chain->Stop(*events, token);
  switch (hook::KindOf(token)) {
    case TokenKind::kStep:
      events->EndStep(token);
      break;
    case TokenKind::kTransfer:
      events->EndTransfer(token);
      break;
    case TokenKind::kOperation:
      events->EndOperation(token);
      break;
    case TokenKind::kKernel:
      events->EndKernel(token);
      break;
    case TokenKind::kOther:
      events->EndOther(token);
      break;
    case TokenKind::kProxyThread:
    case TokenKind::kCommunicator:
      break;
  }
  return kNcclSuccess;
}

// A table, not a switch: one line of the cache.
struct StateTable {
  std::array<WaitState, 32> states = {};
  constexpr StateTable() {
    states[kStateSendGpuWait] = WaitState::kSendGpuWait;
    states[kStateSendPeerWait] = WaitState::kSendPeerWait;
    states[kStateSendWait] = WaitState::kSendWait;
    states[kStateReceiveWait] = WaitState::kReceiveWait;
    states[kStateReceiveFlushWait] = WaitState::kReceiveFlushWait;
    states[kStateReceiveGpuWait] = WaitState::kReceiveGpuWait;
    states[kStateProxyIdle] = WaitState::kProxyIdle;
    states[kStateProxyActive] = WaitState::kProxyActive;
    states[kStateProxyWakeup] = WaitState::kProxyActive;
    states[kStateProxyAppendEnd] = WaitState::kProxyActive;
    states[kStateProxySleep] = WaitState::kProxySleeping;
    states[kStateProxyAppend] = WaitState::kProxyAppending;
  }
};
alignas(64) constexpr StateTable kStates;

// kNone: says nothing of a wait.
WaitState StateOf(int state) {
  return state >= 0 && state < 32 ? kStates.states[static_cast<size_t>(state)] : WaitState::kNone;
}

void RecordProxyThread(MonitorEvents& events, Token token, int state,
                       const StateArguments* arguments) {
  const WaitState wait = StateOf(state);
  if (wait < WaitState::kProxyIdle) return;
  uint32_t appended = 0;
  if (state == kStateProxyAppendEnd && arguments != nullptr) {
    appended = static_cast<uint32_t>(arguments->proxy_ctrl.appended_proxy_ops);
  }
  events.ProxyThreadState(token, wait, appended);
}

// `arguments` may be NULL, whatever the state.
HOOK_HOT NcclResult Record(void* handle, int state, StateArguments* arguments) {
  MonitorEvents* const events = process_events.load(std::memory_order_acquire);
  if (events == nullptr) return kNcclSuccess;
  const Token token = TokenOf(handle);
  switch (hook::KindOf(token)) {
    case TokenKind::kStep:
      events->StepState(token, StateOf(state),
                        arguments == nullptr ? 0 : arguments->proxy_step.transfer_bytes);
      break;
    case TokenKind::kTransfer:
      if (state == kStateProxyOpInProgress) events->TransferInProgress(token);
      break;
    case TokenKind::kKernel:
      if (state == kStateKernelChStop && arguments != nullptr) {
        events->KernelStopped(token, arguments->kernel_ch.gpu_ns);
      }
      break;
    case TokenKind::kProxyThread:
      RecordProxyThread(*events, token, state, arguments);
      break;
    case TokenKind::kOperation:
    case TokenKind::kOther:
    case TokenKind::kCommunicator:
      break;
  }
  Chain* const chain = process_chain.load(std::memory_order_acquire);
  if (chain != nullptr) chain->Record(*events, token, state, arguments);
  return kNcclSuccess;
}

NcclResult InitFour(void** context, int* mask, const char* name, uint64_t hash, int nodes,
                    int ranks, int rank, NcclLogger logger) {
  return Init(context, mask, {4, hash, name, nodes, ranks, rank, logger});
}

template <int kVersion>
NcclResult InitFive(void** context, uint64_t id, int* mask, const char* name, int nodes, int ranks,
                    int rank, NcclLogger logger) {
  return Init(context, mask, {kVersion, id, name, nodes, ranks, rank, logger});
}

}  // namespace
}  // namespace holdfast::profiler

// ---- What NCCL looks up by name

#define HOLDFAST_EXPORT extern "C" __attribute__((visibility("default")))

HOLDFAST_EXPORT const holdfast::profiler::ProfilerV4 ncclProfiler_v4 = {
    "Holdfast",
    &holdfast::profiler::InitFour,
    &holdfast::profiler::Start<holdfast::profiler::DescriptorV4>,
    &holdfast::profiler::Stop,
    &holdfast::profiler::Record,
    &holdfast::profiler::Finalize};
HOLDFAST_EXPORT const holdfast::profiler::ProfilerV5 ncclProfiler_v5 = {
    "Holdfast",
    &holdfast::profiler::InitFive<5>,
    &holdfast::profiler::Start<holdfast::profiler::DescriptorV5>,
    &holdfast::profiler::Stop,
    &holdfast::profiler::Record,
    &holdfast::profiler::Finalize};
HOLDFAST_EXPORT const holdfast::profiler::ProfilerV5 ncclProfiler_v6 = {
    "Holdfast",
    &holdfast::profiler::InitFive<6>,
    &holdfast::profiler::Start<holdfast::profiler::DescriptorV5>,
    &holdfast::profiler::Stop,
    &holdfast::profiler::Record,
    &holdfast::profiler::Finalize};
HOLDFAST_EXPORT const holdfast::profiler::ProfilerV5 ncclProfiler_v7 = {
    "Holdfast",
    &holdfast::profiler::InitFive<7>,
    &holdfast::profiler::Start<holdfast::profiler::DescriptorV7>,
    &holdfast::profiler::Stop,
    &holdfast::profiler::Record,
    &holdfast::profiler::Finalize};

namespace holdfast::profiler {
namespace {
const void* OwnProfiler(int version) {
  switch (version) {
    case 4:
      return &ncclProfiler_v4;
    case 5:
      return &ncclProfiler_v5;
    case 6:
      return &ncclProfiler_v6;
    default:
      return &ncclProfiler_v7;
  }
}
}  // namespace
}  // namespace holdfast::profiler
