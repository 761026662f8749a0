#include "agent/monitor/names.h"

namespace holdfast {

const char* WaitName(abi::WaitState state) {
  switch (state) {
    case abi::WaitState::kQueued:
      return "queued";
    case abi::WaitState::kBetweenSteps:
      return "between_steps";
    case abi::WaitState::kSendGpuWait:
      return "send_gpu";
    case abi::WaitState::kSendPeerWait:
      return "send_peer";
    case abi::WaitState::kSendWait:
      return "send_wire";
    case abi::WaitState::kReceiveWait:
      return "receive_data";
    case abi::WaitState::kReceiveFlushWait:
      return "receive_flush";
    case abi::WaitState::kReceiveGpuWait:
      return "receive_gpu";
    default:
      return nullptr;
  }
}

const char* StateName(abi::WaitState state) {
  switch (state) {
    case abi::WaitState::kNone:
      return "none";
    case abi::WaitState::kKernelRunning:
      return "kernel_running";
    case abi::WaitState::kProxyIdle:
      return "proxy_idle";
    case abi::WaitState::kProxyActive:
      return "proxy_active";
    case abi::WaitState::kProxySleeping:
      return "proxy_sleeping";
    case abi::WaitState::kProxyAppending:
      return "proxy_appending";
    default: {
      const char* const wait = WaitName(state);
      return wait == nullptr ? "unknown" : wait;
    }
  }
}

const char* OperationName(abi::OperationKind kind) {
  switch (kind) {
    case abi::OperationKind::kAllReduce:
      return "all_reduce";
    case abi::OperationKind::kBroadcast:
      return "broadcast";
    case abi::OperationKind::kReduce:
      return "reduce";
    case abi::OperationKind::kAllGather:
      return "all_gather";
    case abi::OperationKind::kReduceScatter:
      return "reduce_scatter";
    case abi::OperationKind::kAllToAll:
      return "all_to_all";
    case abi::OperationKind::kGather:
      return "gather";
    case abi::OperationKind::kScatter:
      return "scatter";
    case abi::OperationKind::kSend:
      return "send";
    case abi::OperationKind::kReceive:
      return "receive";
    case abi::OperationKind::kBarrier:
      return "barrier";
    default:
      return "unknown";
  }
}

const char* RecordName(abi::RecordKind kind) {
  switch (kind) {
    case abi::RecordKind::kOperationEnqueued:
      return "operation_enqueued";
    case abi::RecordKind::kOperationStarted:
      return "operation_started";
    case abi::RecordKind::kOperationFinished:
      return "operation_finished";
    case abi::RecordKind::kTransferBegun:
      return "transfer_begun";
    case abi::RecordKind::kTransferInProgress:
      return "transfer_in_progress";
    case abi::RecordKind::kStepBegun:
      return "step_begun";
    case abi::RecordKind::kStepState:
      return "step_state";
    case abi::RecordKind::kStepDone:
      return "step_done";
    case abi::RecordKind::kTransferEnded:
      return "transfer_ended";
    case abi::RecordKind::kKernelStarted:
      return "kernel_started";
    case abi::RecordKind::kKernelStopped:
      return "kernel_stopped";
    case abi::RecordKind::kProxyThread:
      return "proxy_thread";
    case abi::RecordKind::kApiCall:
      return "api_call";
    case abi::RecordKind::kKernelLaunch:
      return "kernel_launch";
    default:
      return "unknown";
  }
}

const char* DirectionName(abi::SlotDirection direction) {
  switch (direction) {
    case abi::SlotDirection::kSend:
      return "send";
    case abi::SlotDirection::kReceive:
      return "receive";
    case abi::SlotDirection::kKernel:
      return "kernel";
    case abi::SlotDirection::kProxyThread:
      return "proxy_thread";
    default:
      return "unknown";
  }
}

}  // namespace holdfast
