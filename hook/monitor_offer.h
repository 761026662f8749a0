// Offers a monitor board to the node's agent, so that it outlives its process.
#ifndef HOLDFAST_HOOK_MONITOR_OFFER_H_
#define HOLDFAST_HOOK_MONITOR_OFFER_H_

#include <string>

#include "hook/deadline.h"
#include "hook/error.h"
#include "hook/monitor_board.h"

namespace holdfast::hook {

// The longest that an offer holds anybody up, if an agent listens and does not answer. Without an
// agent it takes a failed connect(2).
inline constexpr int64_t kMonitorOfferNs = 200 * kNsPerMs;

// $HOLDFAST_SOCKET, else the private agent's of $HOLDFAST_JOB; empty if neither is set.
std::string MonitorSocketPath();

// One connection, one message, one answer. Errors: HF_NOT_FOUND, HF_UNAVAILABLE (no agent, or one
// that keeps no boards), HF_DEADLINE_EXCEEDED, and what the agent says.
Error OfferMonitorBoard(const MonitorBoard& board, const std::string& socket_path,
                        Deadline deadline);

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_MONITOR_OFFER_H_
