#include "agent/peer.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

#include "absl/strings/str_cat.h"
#include "agent/process.h"
#include "base/status_macros.h"
#include "io/errno_status.h"

namespace holdfast {
namespace {

// Linux 6.5; not in Debian 12's headers.
constexpr int kSoPeerPidfd = 77;

}  // namespace

absl::StatusOr<UniqueFd> PidfdByNumber(int socket, uint32_t process_id) {
  if (process_id == 0) {
    return absl::UnavailableError("the peer lives in a pid namespace that is not visible here");
  }
  ASSIGN_OR_RETURN(UniqueFd pidfd, OpenPidfd(static_cast<pid_t>(process_id)));
  pollfd entry{socket, POLLRDHUP, 0};
  if (poll(&entry, 1, 0) > 0 && (entry.revents & (POLLHUP | POLLRDHUP | POLLERR)) != 0) {
    return absl::UnavailableError("the peer has gone");
  }
  return pidfd;
}

absl::StatusOr<Peer> IdentifyPeer(int socket) {
  ucred credentials{};
  socklen_t length = sizeof(credentials);
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) {
    return ErrnoStatus(errno, "read credentials of", "the peer");
  }
  Peer peer;
  peer.process_id = static_cast<uint32_t>(credentials.pid);
  peer.user_id = credentials.uid;
  int pidfd = -1;
  length = sizeof(pidfd);
  if (getsockopt(socket, SOL_SOCKET, kSoPeerPidfd, &pidfd, &length) == 0) {
    peer.pidfd.Reset(pidfd);
    return peer;
  }
  // ENOPROTOOPT: an older kernel. Anything else (the peer is reaped already): the second way says.
  ASSIGN_OR_RETURN(peer.pidfd, PidfdByNumber(socket, peer.process_id));
  return peer;
}

}  // namespace holdfast
