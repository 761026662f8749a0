#include "agent/local_server.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/log.h"
#include "agent/process.h"
#include "base/check.h"
#include "base/kill_point.h"
#include "io/errno_status.h"

namespace holdfast {
namespace {

// Accepted in one turn of the loop.
constexpr int kAcceptsPerTurn = 64;
// Messages that a client has not read yet; a restore sends one per image map. Beyond it the
// connection is closed: its client does not read.
constexpr size_t kOutgoingMax = 8192;
// Descriptors of one session: page, registrations, memory, pidfd, doorbell; each also kept; and its
// connection.
constexpr uint64_t kFilesPerSession = 32;
constexpr uint64_t kFilesOfAgent = 512;
// Connections without a session; each takes a socket and a pidfd, out of kFilesOfAgent.
constexpr uint64_t kSpareConnectionsMax = 128;
// Without descriptors the listener stays readable: so long it is not looked at.
constexpr absl::Duration kAcceptPause = absl::Milliseconds(100);

// What waits in the eventfd is taken without blocking, whatever its flags are: the trainer shares
// them.
void DrainEventFd(int fd) {
  uint64_t value = 0;
  iovec part{&value, sizeof(value)};
  if (preadv2(fd, &part, 1, -1, RWF_NOWAIT) >= 0 || errno != EOPNOTSUPP) return;
  fcntl(fd, F_SETFL, O_NONBLOCK | O_RDWR);
  // Nothing to read is what is wanted.
  [[maybe_unused]] const ssize_t got = read(fd, &value, sizeof(value));
}

}  // namespace

size_t LocalServer::SessionsFor(uint64_t open_files_max) {
  if (open_files_max <= kFilesOfAgent + kFilesPerSession) return 1;
  return std::min<uint64_t>((open_files_max - kFilesOfAgent) / kFilesPerSession, 1024);
}

size_t LocalServer::ConnectionsFor(uint64_t open_files_max) {
  return SessionsFor(open_files_max) + std::min(open_files_max / 8, kSpareConnectionsMax);
}

LocalServer::LocalServer(Options options, int listener, Engine& engine, EventLoop& loop,
                         std::function<std::string()> status_text)
    : options_(std::move(options)),
      listener_(listener),
      engine_(engine),
      loop_(loop),
      status_text_(std::move(status_text)) {}

LocalServer::~LocalServer() {
  if (resume_timer_ != 0) {
    loop_.CancelTimer(resume_timer_);
  } else if (started_) {
    loop_.Unwatch(listener_);
  }
  for (const auto& [id, connection] : connections_) {
    if (connection->watched) loop_.Unwatch(connection->socket.get());
  }
  for (const auto& [session, watch] : sessions_) {
    loop_.Unwatch(watch.process.get());
    if (watch.doorbell) loop_.Unwatch(watch.doorbell.get());
  }
}

void LocalServer::Start() {
  CHECK(!started_);
  for (const SessionId session : engine_.sessions()) {
    const int process = engine_.process_fd(session);
    if (process < 0) continue;  // dead already; the engine knows
    const int doorbell = engine_.doorbell_fd(session);
    WatchSession(session, Duplicate(process), doorbell < 0 ? UniqueFd() : Duplicate(doorbell));
  }
  started_ = true;
  ResumeAccepting();
}

void LocalServer::ResumeAccepting() {
  resume_timer_ = 0;
  loop_.Watch(listener_, EventLoop::FdEvents::kReadable, [this] { Accept(); });
}

// The client waits in the queue meanwhile.
void LocalServer::PauseAccepting(int error) {
  ++accept_failure_count_;
  if (!accept_failed_) {
    LogError(absl::StrFormat("accept: %s; trying again every %s", ErrnoName(error),
                             absl::FormatDuration(kAcceptPause)));
  }
  accept_failed_ = true;
  loop_.Unwatch(listener_);
  resume_timer_ = loop_.RunAfter(kAcceptPause, [this] { ResumeAccepting(); });
}

void LocalServer::RefuseOpens(std::string reason) {
  open_refusal_ = absl::UnavailableError(std::move(reason));
}

void LocalServer::Accept() {
  for (int i = 0; i < kAcceptsPerTurn; ++i) {
    UniqueFd socket(accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!socket) {
      const int error = errno;
      if (error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM) {
        PauseAccepting(error);
      }
      return;
    }
    accept_failed_ = false;
    if (connections_.size() >= options_.connections_max) {
      LogWarning(
          absl::StrFormat("closing a new connection: %d are open already", connections_.size()));
      continue;
    }
    absl::StatusOr<Peer> peer = IdentifyPeer(socket.get());
    if (!peer.ok()) {
      LogDebug(absl::StrCat("closing a new connection: ", peer.status().ToString()));
      continue;
    }
    auto connection = std::make_unique<Connection>();
    connection->socket = std::move(socket);
    connection->peer = std::move(*peer);
    if (connection->peer.user_id != options_.user_id) {
      connection->refusal = absl::PermissionDeniedError(
          absl::StrFormat("this agent serves user %d, the caller is user %d", options_.user_id,
                          connection->peer.user_id));
    }
    const ConnectionId id = next_connection_++;
    connections_.emplace(id, std::move(connection));
    UpdateWatch(id);
  }
}

LocalServer::Connection* LocalServer::Find(ConnectionId id) {
  const auto found = connections_.find(id);
  return found == connections_.end() ? nullptr : found->second.get();
}

// Watches for what can be done now: reading if no request is pending, writing if something waits.
void LocalServer::UpdateWatch(ConnectionId id) {
  Connection& connection = *Find(id);
  const bool reads = !connection.busy && !connection.closing;
  const bool writes = !connection.outgoing.empty();
  if (!reads && !writes) {
    if (connection.watched) loop_.Unwatch(connection.socket.get());
    connection.watched = false;
    return;
  }
  const EventLoop::FdEvents events = reads && writes ? EventLoop::FdEvents::kReadableOrWritable
                                     : reads         ? EventLoop::FdEvents::kReadable
                                                     : EventLoop::FdEvents::kWritable;
  if (connection.watched && connection.watched_events == events) return;
  connection.watched = true;
  connection.watched_events = events;
  loop_.Watch(connection.socket.get(), events, [this, id] { OnReady(id); });
}

void LocalServer::OnReady(ConnectionId id) {
  Flush(id);
  const Connection* const connection = Find(id);
  if (connection != nullptr && !connection->busy && !connection->closing) ReadOne(id);
}

void LocalServer::ReadOne(ConnectionId id) {
  Connection& connection = *Find(id);
  Received received = ReceivePacket(connection.socket.get());
  switch (received.kind) {
    case Received::Kind::kNothing:
      return;
    case Received::Kind::kEnd:
      Close(id);
      return;
    case Received::Kind::kGarbage:
      ++garbage_count_;
      LogWarning(absl::StrFormat("closing the connection of process %d: %s",
                                 connection.peer.process_id, received.problem));
      Close(id);
      return;
    case Received::Kind::kOtherVersion:
      ++garbage_count_;
      LogWarning(absl::StrFormat("process %d: %s", connection.peer.process_id, received.problem));
      connection.closing = true;
      AnswerError(id, received.packet.type, received.packet.request_id,
                  absl::FailedPreconditionError(received.problem));
      return;
    case Received::Kind::kPacket:
      Handle(id, std::move(received.packet));
      return;
  }
}

void LocalServer::Close(ConnectionId id) {
  Connection* const connection = Find(id);
  if (connection == nullptr) return;
  if (connection->watched) loop_.Unwatch(connection->socket.get());
  if (connection->waits) options_.waiting_processes->Leave(id);
  if (connection->has_session) {
    const auto session = sessions_.find(connection->session);
    if (session != sessions_.end() && session->second.connection == id) {
      session->second.connection = 0;
    }
  }
  connections_.erase(id);
}

void LocalServer::Send(ConnectionId id, Packet packet) {
  Connection* const connection = Find(id);
  if (connection == nullptr) return;  // the client has gone; its descriptors close here
  connection->outgoing.push_back(std::move(packet));
  if (connection->outgoing.size() > kOutgoingMax) {
    LogWarning(absl::StrFormat("closing the connection of process %d: it does not read",
                               connection->peer.process_id));
    Close(id);
    return;
  }
  Flush(id);
}

void LocalServer::Flush(ConnectionId id) {
  Connection* const connection = Find(id);
  if (connection == nullptr) return;
  while (!connection->outgoing.empty()) {
    const Sent sent = SendPacket(connection->socket.get(), connection->outgoing.front());
    if (sent == Sent::kFull) break;
    if (sent == Sent::kPeerGone) {
      Close(id);
      return;
    }
    connection->outgoing.pop_front();
    KillPoint("reply.sent");
  }
  if (connection->closing && connection->outgoing.empty()) {
    Close(id);
    return;
  }
  UpdateWatch(id);
  if (connection->stream != nullptr && connection->outgoing.empty()) SendWaiting(id);
}

void LocalServer::WatchSession(SessionId session, UniqueFd process, UniqueFd doorbell) {
  UnwatchSession(session);
  if (!process) {
    LogError("no descriptors left to watch a session");
    return;
  }
  SessionWatch& watch = sessions_[session];
  watch.process = std::move(process);
  watch.doorbell = std::move(doorbell);
  loop_.Watch(watch.process.get(), EventLoop::FdEvents::kReadable,
              [this, session] { OnProcessDead(session); });
  if (watch.doorbell) {
    loop_.Watch(watch.doorbell.get(), EventLoop::FdEvents::kReadable,
                [this, session] { OnDoorbell(session); });
  }
}

void LocalServer::UnwatchSession(SessionId session) {
  const auto found = sessions_.find(session);
  if (found == sessions_.end()) return;
  loop_.Unwatch(found->second.process.get());
  if (found->second.doorbell) loop_.Unwatch(found->second.doorbell.get());
  sessions_.erase(found);
}

void LocalServer::OnDoorbell(SessionId session) {
  DrainEventFd(sessions_.at(session).doorbell.get());
  engine_.Doorbell(session);
}

void LocalServer::OnProcessDead(SessionId session) {
  const ConnectionId connection = sessions_.at(session).connection;
  // Its last words in shared memory count before its death does.
  engine_.Doorbell(session);
  UnwatchSession(session);
  if (connection != 0) Close(connection);
  engine_.ProcessDied(session);
}

}  // namespace holdfast
