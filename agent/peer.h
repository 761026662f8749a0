// Who is at the other end of a local connection, as the kernel says.
#ifndef HOLDFAST_AGENT_PEER_H_
#define HOLDFAST_AGENT_PEER_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "io/unique_fd.h"

namespace holdfast {

struct Peer {
  uint32_t process_id = 0;  // in our pid namespace; 0 if it has no number there
  uint32_t user_id = 0;
  UniqueFd pidfd;
};

// Credentials as they were at connect(2), and a pidfd of that process: from SO_PEERPIDFD (Linux
// 6.5), else by its number. By number there is a gap in which the process may have died and its
// number been given to another one; it is closed by looking afterwards whether the connection still
// has its other end, which a dead process does not hold.
//
// Not covered by the second way: a peer that died but left its end open in a child. The pidfd is
// then that of a stranger, of the same user or not signalled at all: we only wait on it.
// Errors: kUnavailable: the peer has gone.
absl::StatusOr<Peer> IdentifyPeer(int socket);

// The second way, for kernels without the first. kUnavailable or kNotFound: the peer has gone.
absl::StatusOr<UniqueFd> PidfdByNumber(int socket, uint32_t process_id);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_PEER_H_
