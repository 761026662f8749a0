// The place where an agent listens: its directory, the lock that makes it the only one, and the
// socket itself.
#ifndef HOLDFAST_AGENT_RUNTIME_DIRECTORY_H_
#define HOLDFAST_AGENT_RUNTIME_DIRECTORY_H_

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "io/unique_fd.h"

namespace holdfast {

// Makes the directory of `path` (its last component only, 0700) if it is not there; else checks
// that it is a directory of this user that nobody else may write to. Errors: kPermissionDenied.
absl::Status PrepareDirectoryOf(const std::string& path);

// The right to listen on a socket: an flock of `<socket>.lock`, held as long as any process has
// the descriptor. Nothing if another agent holds it. The lock's file is never removed: two agents
// could then lock two files of one name.
absl::StatusOr<std::optional<UniqueFd>> TryLockSocket(const std::string& socket);

// Whether `<socket>.lock` still is the file that `lock` is of. Not if somebody has removed the
// directory: another agent may listen under our name then.
bool HoldsSocket(const std::string& socket, int lock);

// With the lock held: listens on `socket`, mode 0600, replacing what a dead agent left there.
absl::StatusOr<UniqueFd> Listen(const std::string& socket);

// Whether `listener` is what Listen(socket) has made, in this process or another, and the socket's
// file is there. False too where its path is too long for an address.
bool ListensOn(int listener, const std::string& socket);

// A non-blocking connection to whoever listens there. Errors: kUnavailable (nobody does), kNotFound
// (there is no such file), kResourceExhausted (its queue is full: try again).
absl::StatusOr<UniqueFd> ConnectTo(const std::string& socket);

// True if somebody accepts connections there now.
bool SomebodyListens(const std::string& socket);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUNTIME_DIRECTORY_H_
