// The agent's side of a holdfast-shim: starts it, finds it again, asks it, hears it.
#ifndef HOLDFAST_AGENT_RUN_SHIM_CLIENT_H_
#define HOLDFAST_AGENT_RUN_SHIM_CLIENT_H_

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "agent/process.h"
#include "agent/run/shim_protocol.h"
#include "io/unique_fd.h"

namespace holdfast {

// The program beside this one, else the name alone.
std::string ShimPath();

// Starts a shim for `spec.rank` in `spec.directory`, which exists and is only ours; `spec.listener`
// is of no meaning here. After OK it can be connected to at once. The child is the caller's to
// reap, if it lives so long. Errors: as of starting a process; kInvalidArgument if command and
// environment are too long.
absl::StatusOr<Child> StartShim(const std::string& program, ShimSpec spec);

// A non-blocking connection to the shim of that directory. kUnavailable, kNotFound: there is none
// (any more).
absl::StatusOr<UniqueFd> ConnectToShim(const std::string& directory);

struct ShimMessage {
  enum class Kind { kNothing, kEnd, kState };  // kEnd: the shim has gone, or speaks another version
  Kind kind = Kind::kNothing;
  ShimState state{};
};
// The next one. Never waits.
ShimMessage ReceiveFromShim(int connection);

// False: the shim has gone, or does not read. Never waits.
bool SendToShim(int connection, ShimRequestType type, int signal_number = 0);

// What the shim of that directory has recorded. Nothing: nothing yet.
std::optional<ExitRecord> ReadExitRecord(const std::string& directory);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_SHIM_CLIENT_H_
