// The names that the agent's answers have for what stands on a board.
#ifndef HOLDFAST_AGENT_MONITOR_NAMES_H_
#define HOLDFAST_AGENT_MONITOR_NAMES_H_

#include "hook/abi/monitor.h"

namespace holdfast {

// Of a connection that waits; nullptr: it does not.
const char* WaitName(abi::WaitState state);
// Of any state, as of the next ones: "unknown" for what this version does not know.
const char* StateName(abi::WaitState state);
const char* OperationName(abi::OperationKind kind);
const char* RecordName(abi::RecordKind kind);
const char* DirectionName(abi::SlotDirection direction);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_NAMES_H_
