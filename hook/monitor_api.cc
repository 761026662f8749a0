// The monitor's part of the C ABI: ids are tokens, everything else is MonitorEvents'.
#include <cstring>
#include <exception>

#include "hook/holdfast.h"
#include "hook/monitor_events.h"
#include "hook/process_monitor.h"

namespace {

namespace abi = holdfast::abi;
using holdfast::hook::MakeProcessMonitor;
using holdfast::hook::MonitorEvents;
using holdfast::hook::ProcessMonitor;

// The ABI's numbers are the board's.
static_assert(static_cast<int>(abi::OperationKind::kAllReduce) == HF_ALL_REDUCE);
static_assert(static_cast<int>(abi::OperationKind::kSend) == HF_SEND);
static_assert(static_cast<int>(abi::OperationKind::kReceive) == HF_RECEIVE);
static_assert(static_cast<int>(abi::OperationKind::kBarrier) == HF_BARRIER);
static_assert(static_cast<int>(abi::WaitState::kSendGpuWait) == HF_WAIT_SEND_LOCAL);
static_assert(static_cast<int>(abi::WaitState::kSendPeerWait) == HF_WAIT_SEND_PEER);
static_assert(static_cast<int>(abi::WaitState::kSendWait) == HF_WAIT_SEND_WIRE);
static_assert(static_cast<int>(abi::WaitState::kReceiveWait) == HF_WAIT_RECEIVE_PEER);
static_assert(static_cast<int>(abi::WaitState::kReceiveFlushWait) == HF_WAIT_RECEIVE_FLUSH);
static_assert(static_cast<int>(abi::WaitState::kReceiveGpuWait) == HF_WAIT_RECEIVE_LOCAL);

}  // namespace

extern "C" {

uint64_t hf_monitor_communicator(const hf_communicator_options* options) {
  hf_communicator_options known = {};
  if (options == nullptr || options->struct_bytes < sizeof(size_t) ||
      options->struct_bytes > sizeof(known)) {
    return 0;
  }
  std::memcpy(&known, options, options->struct_bytes);
  try {
    MonitorEvents* const events = MakeProcessMonitor();
    if (events == nullptr) return 0;
    const uint64_t communicator = events->OpenCommunicator({.hash = known.id,
                                                            .name = known.name,
                                                            .ranks = known.ranks,
                                                            .rank = known.rank,
                                                            .nodes = known.nodes});
    holdfast::hook::OfferProcessMonitor();
    return communicator;
  } catch (const std::exception&) {
    return 0;  // no memory: not watched
  }
}

void hf_monitor_close(uint64_t communicator) {
  MonitorEvents* const events = ProcessMonitor();
  if (events != nullptr) events->CloseCommunicator(communicator);
}

void hf_monitor_thread(uint64_t communicator) {
  MonitorEvents* const events = ProcessMonitor();
  if (events == nullptr) return;
  events->ProxyThreadState(events->BeginProxyThread(communicator), abi::WaitState::kProxyActive, 0);
}

uint64_t hf_operation_begin(uint64_t communicator, int32_t kind, uint64_t bytes,
                            uint32_t root_or_peer) {
  MonitorEvents* const events = ProcessMonitor();
  if (events == nullptr) return 0;
  const bool known = kind > HF_OPERATION_OTHER && kind <= HF_BARRIER;
  const bool point_to_point = kind == HF_SEND || kind == HF_RECEIVE;
  return events->BeginOperation(
      communicator,
      {.kind = known ? static_cast<abi::OperationKind>(kind) : abi::OperationKind::kUnknown,
       .bytes = bytes,
       .root = root_or_peer,
       .peer = point_to_point ? root_or_peer : abi::kNoPeer});
}

void hf_operation_start(uint64_t operation) {
  MonitorEvents* const events = ProcessMonitor();
  if (events != nullptr) events->StartOperation(operation);
}

void hf_operation_end(uint64_t operation) {
  MonitorEvents* const events = ProcessMonitor();
  if (events != nullptr) events->FinishOperation(operation);
}

uint64_t hf_transfer_begin(uint64_t communicator, uint64_t operation, uint32_t channel,
                           uint32_t peer, int send, uint32_t steps) {
  MonitorEvents* const events = ProcessMonitor();
  if (events == nullptr || communicator == 0 || channel >= abi::kNoChannel ||
      peer >= abi::kNoPeer) {
    return 0;
  }
  return events->BeginTransfer(
      communicator, operation,
      {.channel = channel, .peer = peer, .steps = steps, .send = send != 0});
}

uint64_t hf_step_begin(uint64_t transfer, uint32_t step) {
  MonitorEvents* const events = ProcessMonitor();
  return events == nullptr ? 0 : events->BeginStep(transfer, step);
}

void hf_step_wait(uint64_t step, int32_t state, uint64_t bytes) {
  MonitorEvents* const events = ProcessMonitor();
  if (events == nullptr || state < HF_WAIT_SEND_LOCAL || state > HF_WAIT_RECEIVE_LOCAL) return;
  events->StepState(step, static_cast<abi::WaitState>(state), bytes);
}

void hf_step_end(uint64_t step) {
  MonitorEvents* const events = ProcessMonitor();
  if (events != nullptr) events->EndStep(step);
}

void hf_transfer_end(uint64_t transfer) {
  MonitorEvents* const events = ProcessMonitor();
  if (events != nullptr) events->EndTransfer(transfer);
}

}  // extern "C"
