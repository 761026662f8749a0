#include "examples/collectives/wire.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "examples/collectives/status_macros.h"

namespace collectives {
namespace {

absl::Status ErrnoStatus(const std::string& what) {
  return absl::UnavailableError(absl::StrFormat("%s: %s", what, std::strerror(errno)));
}

sockaddr_in ToSockaddr(const Endpoint& endpoint) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(endpoint.address);
  address.sin_port = htons(endpoint.port);
  return address;
}

const sockaddr* Generic(const sockaddr_in* address) {
  return reinterpret_cast<const sockaddr*>(address);
}
sockaddr* Generic(sockaddr_in* address) { return reinterpret_cast<sockaddr*>(address); }

absl::StatusOr<Socket> NewSocket() {
  Socket socket(::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket.is_open()) return ErrnoStatus("socket");
  return socket;
}

void NoDelay(const Socket& socket) {
  const int on = 1;
  // Only speed depends on it, so a failure is no error.
  static_cast<void>(setsockopt(socket.fd(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)));
}

absl::Status WaitFor(const Socket& socket, int16_t events, Deadline deadline) {
  while (true) {
    pollfd entry{socket.fd(), events, 0};
    const int ready = poll(&entry, 1, PollMilliseconds(deadline));
    if (ready > 0) return absl::OkStatus();
    if (ready < 0 && errno != EINTR) return ErrnoStatus("poll");
    if (ready == 0 && std::chrono::steady_clock::now() >= deadline) {
      return absl::DeadlineExceededError("no answer within the deadline");
    }
  }
}

}  // namespace

std::string ToString(const Endpoint& endpoint) {
  return absl::StrFormat("%d.%d.%d.%d:%d", endpoint.address >> 24, endpoint.address >> 16 & 255,
                         endpoint.address >> 8 & 255, endpoint.address & 255, endpoint.port);
}

absl::StatusOr<uint32_t> ResolveAddress(const std::string& host) {
  addrinfo hints{};
  hints.ai_family = AF_INET;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int result = getaddrinfo(host.c_str(), nullptr, &hints, &found);
  if (result != 0 || found == nullptr) {
    return absl::NotFoundError(
        absl::StrFormat("no IPv4 address of '%s': %s", host, gai_strerror(result)));
  }
  sockaddr_in address{};
  std::memcpy(&address, found->ai_addr, sizeof(address));
  freeaddrinfo(found);
  return ntohl(address.sin_addr.s_addr);
}

Socket& Socket::operator=(Socket&& other) noexcept {
  if (this != &other) {
    Close();
    fd_ = other.Release();
  }
  return *this;
}

int Socket::Release() { return std::exchange(fd_, -1); }

void Socket::Close() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

WakeEvent::WakeEvent() : socket_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {}

void WakeEvent::Signal() const {
  if (is_signalled_.exchange(true)) return;
  const uint64_t one = 1;
  // Fails only if the counter is full, and then the reader is awake anyway.
  if (write(socket_.fd(), &one, sizeof(one)) < 0) return;
}

void WakeEvent::Drain() const {
  uint64_t count = 0;
  // Fails only if there is nothing to drain, or a signaller has not written yet: then the caller is
  // woken once more than needed. A Signal() between the two lines leaves its flag to the second,
  // which sees what was stored before it.
  if (read(socket_.fd(), &count, sizeof(count)) < 0) count = 0;
  is_signalled_.exchange(false);
}

absl::StatusOr<Socket> Listen(const Endpoint& at) {
  ASSIGN_OR_RETURN(Socket socket, NewSocket());
  const int on = 1;
  if (setsockopt(socket.fd(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) != 0) {
    return ErrnoStatus("SO_REUSEADDR");
  }
  const sockaddr_in address = ToSockaddr(at);
  if (bind(socket.fd(), Generic(&address), sizeof(address)) != 0) {
    return ErrnoStatus(absl::StrCat("bind ", ToString(at)));
  }
  if (listen(socket.fd(), 128) != 0) return ErrnoStatus(absl::StrCat("listen ", ToString(at)));
  return socket;
}

absl::StatusOr<Endpoint> LocalEndpoint(const Socket& socket) {
  sockaddr_in address{};
  socklen_t bytes = sizeof(address);
  if (getsockname(socket.fd(), Generic(&address), &bytes) != 0) return ErrnoStatus("getsockname");
  return Endpoint{ntohl(address.sin_addr.s_addr), ntohs(address.sin_port)};
}

absl::StatusOr<Socket> BeginConnect(const Endpoint& to, uint32_t from) {
  ASSIGN_OR_RETURN(Socket socket, NewSocket());
  NoDelay(socket);
  const int on = 1;
  // Leaves the choice of the port to connect(2), which can use one port for several peers. Where
  // the kernel does not know it, bind(2) chooses the port.
  static_cast<void>(setsockopt(socket.fd(), IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof(on)));
  const sockaddr_in source = ToSockaddr({from, 0});
  if (bind(socket.fd(), Generic(&source), sizeof(source)) != 0) {
    return ErrnoStatus(absl::StrCat("bind ", ToString({from, 0})));
  }
  const sockaddr_in address = ToSockaddr(to);
  if (connect(socket.fd(), Generic(&address), sizeof(address)) != 0 && errno != EINPROGRESS) {
    return ErrnoStatus(absl::StrCat("connect to ", ToString(to)));
  }
  return socket;
}

absl::StatusOr<Socket> Accept(const Socket& listener) {
  Socket socket(accept4(listener.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (socket.is_open()) {
    NoDelay(socket);
    return socket;
  }
  if (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED) return Socket();
  return ErrnoStatus("accept");
}

absl::Status SendAll(const Socket& socket, std::span<const std::byte> bytes, Deadline deadline) {
  while (!bytes.empty()) {
    const ssize_t sent = send(socket.fd(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent >= 0) {
      bytes = bytes.subspan(static_cast<size_t>(sent));
    } else if (errno == EAGAIN || errno == EINTR) {
      RETURN_IF_ERROR(WaitFor(socket, POLLOUT, deadline));
    } else {
      return ErrnoStatus("send");
    }
  }
  return absl::OkStatus();
}

absl::Status ReceiveAll(const Socket& socket, std::span<std::byte> bytes, Deadline deadline) {
  while (!bytes.empty()) {
    const ssize_t received = recv(socket.fd(), bytes.data(), bytes.size(), 0);
    if (received > 0) {
      bytes = bytes.subspan(static_cast<size_t>(received));
    } else if (received == 0) {
      return absl::UnavailableError("the other end closed the connection");
    } else if (errno == EAGAIN || errno == EINTR) {
      RETURN_IF_ERROR(WaitFor(socket, POLLIN, deadline));
    } else {
      return ErrnoStatus("recv");
    }
  }
  return absl::OkStatus();
}

int PollMilliseconds(Deadline deadline) {
  const auto now = std::chrono::steady_clock::now();
  if (deadline <= now) return 0;
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - now);
  // An hour is as good as for ever: everybody who polls looks at the clock afterwards.
  return static_cast<int>(std::min<int64_t>(left.count(), 3'600'000));
}

const char* Name(OperationKind kind) {
  switch (kind) {
    case OperationKind::kAllReduce:
      return "all_reduce";
    case OperationKind::kReduceScatter:
      return "reduce_scatter";
    case OperationKind::kAllGather:
      return "all_gather";
    case OperationKind::kBroadcast:
      return "broadcast";
    case OperationKind::kBarrier:
      return "barrier";
    case OperationKind::kSend:
      return "send";
    case OperationKind::kAllToAll:
      return "all_to_all";
  }
  return "unknown operation";
}

}  // namespace collectives
