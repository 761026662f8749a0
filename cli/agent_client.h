// Asks a running agent over its local socket (hook/abi/messages.h, kQuery).
#ifndef HOLDFAST_CLI_AGENT_CLIENT_H_
#define HOLDFAST_CLI_AGENT_CLIENT_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace holdfast::cli {

// The agent's status as JSON text (docs/OPERATING.md). Blocks for `timeout` at most.
// Errors: kUnavailable (nobody listens at `socket_path`, or no answer in time), kPermissionDenied
// (another user's agent), kFailedPrecondition (it speaks another protocol version; both are named).
absl::StatusOr<std::string> QueryStatus(const std::string& socket_path, absl::Duration timeout);

// What the processes of a rank record for `length`, as JSON lines (docs/MONITOR.md). Blocks for
// `length` and then for `timeout` at most. Errors: as above, and kNotFound (no such rank there),
// kInvalidArgument (length), kResourceExhausted (too many at once).
absl::StatusOr<std::string> QueryMonitorWindow(const std::string& socket_path,
                                               const std::string& job, uint32_t rank,
                                               absl::Duration length, absl::Duration timeout);

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_AGENT_CLIENT_H_
