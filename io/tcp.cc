#include "io/tcp.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace holdfast {
namespace {

absl::Duration Now() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return absl::DurationFromTimespec(now);
}

// Not ErrnoStatus: its words are of stored files.
absl::Status SocketError(int error_number, std::string_view operation, const std::string& where) {
  const std::string text = absl::StrFormat(
      "%s%s%s: %s", operation, where.empty() ? "" : " ", where,
      strerrordesc_np(error_number) != nullptr ? strerrordesc_np(error_number) : "unknown error");
  switch (error_number) {
    case EADDRINUSE:
      return absl::AlreadyExistsError(text);
    case EMFILE:
    case ENFILE:
    case ENOBUFS:
    case ENOMEM:
      return absl::ResourceExhaustedError(text);
    case EACCES:
    case EPERM:
      return absl::PermissionDeniedError(text);
    default:
      return absl::UnavailableError(text);
  }
}

// Options that only cost speed or comfort where they are refused.
void SetOption(int fd, int level, int option) {
  const int on = 1;
  static_cast<void>(setsockopt(fd, level, option, &on, sizeof(on)));
}

absl::StatusOr<UniqueFd> NewSocket(int family) {
  UniqueFd fd(socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd) return SocketError(errno, "socket", "");
  return fd;
}

const sockaddr_in& AsV4(const sockaddr_storage& address) {
  return reinterpret_cast<const sockaddr_in&>(address);
}
const sockaddr_in6& AsV6(const sockaddr_storage& address) {
  return reinterpret_cast<const sockaddr_in6&>(address);
}

Endpoint V4(uint32_t address, uint16_t port) {
  sockaddr_storage storage{};
  sockaddr_in v4{};
  v4.sin_family = AF_INET;
  v4.sin_addr.s_addr = htonl(address);
  v4.sin_port = htons(port);
  std::memcpy(&storage, &v4, sizeof(v4));
  return Endpoint(storage);
}

}  // namespace

Deadline Deadline::After(absl::Duration duration) { return Deadline(Now() + duration); }

absl::Duration Deadline::remaining() const { return std::max(at_ - Now(), absl::ZeroDuration()); }

int Deadline::PollMilliseconds() const {
  const int64_t milliseconds = absl::ToInt64Milliseconds(
      absl::Ceil(std::min(remaining(), absl::Hours(1)), absl::Milliseconds(1)));
  return static_cast<int>(milliseconds);
}

Endpoint::Endpoint(const sockaddr_storage& address) : address_(address) {
  if (family() == AF_INET6 && IN6_IS_ADDR_V4MAPPED(&AsV6(address).sin6_addr)) {
    uint32_t v4 = 0;
    std::memcpy(&v4, &AsV6(address).sin6_addr.s6_addr[12], sizeof(v4));
    *this = V4(ntohl(v4), ntohs(AsV6(address).sin6_port));
  }
}

Endpoint Endpoint::Loopback(uint16_t port) { return V4(INADDR_LOOPBACK, port); }

Endpoint Endpoint::Any(uint16_t port) {
  // Without IPv6 in the kernel there are no such sockets.
  if (!UniqueFd(socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0))) return V4(INADDR_ANY, port);
  sockaddr_storage storage{};
  sockaddr_in6 v6{};
  v6.sin6_family = AF_INET6;
  v6.sin6_port = htons(port);
  std::memcpy(&storage, &v6, sizeof(v6));
  return Endpoint(storage);
}

Endpoint Endpoint::WithPort(uint16_t port) const {
  Endpoint result = *this;
  if (family() == AF_INET) reinterpret_cast<sockaddr_in&>(result.address_).sin_port = htons(port);
  if (family() == AF_INET6) {
    reinterpret_cast<sockaddr_in6&>(result.address_).sin6_port = htons(port);
  }
  return result;
}

uint16_t Endpoint::port() const {
  if (family() == AF_INET) return ntohs(AsV4(address_).sin_port);
  return family() == AF_INET6 ? ntohs(AsV6(address_).sin6_port) : 0;
}

bool Endpoint::is_loopback() const {
  if (family() == AF_INET) return ntohl(AsV4(address_).sin_addr.s_addr) >> 24 == 127;
  return family() == AF_INET6 && IN6_IS_ADDR_LOOPBACK(&AsV6(address_).sin6_addr);
}

bool Endpoint::is_any() const {
  if (family() == AF_INET) return AsV4(address_).sin_addr.s_addr == htonl(INADDR_ANY);
  return family() == AF_INET6 && IN6_IS_ADDR_UNSPECIFIED(&AsV6(address_).sin6_addr);
}

void Endpoint::Encode(std::span<std::byte, 16> into) const {
  std::memset(into.data(), 0, into.size());
  if (family() == AF_INET) {
    into[10] = into[11] = std::byte{0xff};
    std::memcpy(&into[12], &AsV4(address_).sin_addr, 4);
  } else if (family() == AF_INET6) {
    std::memcpy(into.data(), &AsV6(address_).sin6_addr, 16);
  }
}

Endpoint Endpoint::Decode(std::span<const std::byte, 16> bytes, uint16_t port) {
  sockaddr_storage storage{};
  sockaddr_in6 v6{};
  v6.sin6_family = AF_INET6;
  v6.sin6_port = htons(port);
  std::memcpy(&v6.sin6_addr, bytes.data(), 16);
  std::memcpy(&storage, &v6, sizeof(v6));
  return Endpoint(storage);
}

const sockaddr* Endpoint::address() const { return reinterpret_cast<const sockaddr*>(&address_); }

socklen_t Endpoint::address_bytes() const {
  return family() == AF_INET6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in);
}

std::string Endpoint::ToString() const {
  char text[INET6_ADDRSTRLEN] = "";
  if (family() == AF_INET) {
    inet_ntop(AF_INET, &AsV4(address_).sin_addr, text, sizeof(text));
    return absl::StrCat(text, ":", port());
  }
  if (family() != AF_INET6) return "no address";
  inet_ntop(AF_INET6, &AsV6(address_).sin6_addr, text, sizeof(text));
  return absl::StrCat("[", text, "]:", port());
}

absl::StatusOr<std::vector<Endpoint>> ResolveHost(const std::string& host, uint16_t port) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* first = nullptr;
  const int result = getaddrinfo(host.c_str(), nullptr, &hints, &first);
  if (result != 0) {
    return absl::NotFoundError(
        absl::StrFormat("no address of '%s': %s", host, gai_strerror(result)));
  }
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owner(first, freeaddrinfo);
  std::vector<Endpoint> endpoints;
  for (const addrinfo* found = first; found != nullptr; found = found->ai_next) {
    if (found->ai_addrlen > sizeof(sockaddr_storage)) continue;
    sockaddr_storage storage{};
    std::memcpy(&storage, found->ai_addr, found->ai_addrlen);
    endpoints.push_back(Endpoint(storage).WithPort(port));
  }
  if (endpoints.empty()) return absl::NotFoundError(absl::StrFormat("no address of '%s'", host));
  return endpoints;
}

absl::StatusOr<UniqueFd> ListenTcp(const Endpoint& at, int backlog) {
  ASSIGN_OR_RETURN(UniqueFd fd, NewSocket(at.family()));
  SetOption(fd.get(), SOL_SOCKET, SO_REUSEADDR);
  if (at.family() == AF_INET6) {
    // Any address means both families, whatever net.ipv6.bindv6only says.
    const int off = 0;
    static_cast<void>(setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off)));
  }
  if (bind(fd.get(), at.address(), at.address_bytes()) != 0) {
    return SocketError(errno, "bind to", at.ToString());
  }
  if (listen(fd.get(), backlog) != 0) return SocketError(errno, "listen on", at.ToString());
  return fd;
}

absl::StatusOr<Endpoint> LocalEndpoint(int fd) {
  sockaddr_storage address{};
  socklen_t bytes = sizeof(address);
  if (getsockname(fd, reinterpret_cast<sockaddr*>(&address), &bytes) != 0) {
    return SocketError(errno, "getsockname", "");
  }
  return Endpoint(address);
}

absl::StatusOr<Endpoint> RemoteEndpoint(int fd) {
  sockaddr_storage address{};
  socklen_t bytes = sizeof(address);
  if (getpeername(fd, reinterpret_cast<sockaddr*>(&address), &bytes) != 0) {
    return SocketError(errno, "getpeername", "");
  }
  return Endpoint(address);
}

absl::StatusOr<UniqueFd> AcceptTcp(int listener) {
  UniqueFd fd(accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (fd) {
    SetOption(fd.get(), IPPROTO_TCP, TCP_NODELAY);
    return fd;
  }
  switch (errno) {
    case EMFILE:
    case ENFILE:
    case ENOBUFS:
    case ENOMEM:
    case EBADF:
    case EINVAL:
    case ENOTSOCK:
    case EOPNOTSUPP:
      return SocketError(errno, "accept", "");
    default:
      // Nothing waits, or what did is gone: accept(2) also reports the trouble of a connection that
      // failed before it was taken, which is its peer's.
      return UniqueFd();
  }
}

absl::Status WaitFor(int fd, short events, Deadline deadline) {
  while (true) {
    pollfd entry{fd, events, 0};
    const int ready = poll(&entry, 1, deadline.PollMilliseconds());
    if (ready > 0) return absl::OkStatus();
    if (ready < 0 && errno != EINTR) return SocketError(errno, "poll", "");
    if (ready == 0 && deadline.passed()) {
      return absl::DeadlineExceededError("no answer within the deadline");
    }
  }
}

absl::StatusOr<UniqueFd> ConnectTcp(const Endpoint& to, Deadline deadline) {
  ASSIGN_OR_RETURN(UniqueFd fd, NewSocket(to.family()));
  SetOption(fd.get(), IPPROTO_TCP, TCP_NODELAY);
  if (connect(fd.get(), to.address(), to.address_bytes()) == 0) return fd;
  if (errno != EINPROGRESS) return SocketError(errno, "connect to", to.ToString());
  if (!WaitFor(fd.get(), POLLOUT, deadline).ok()) {
    return absl::DeadlineExceededError(absl::StrCat("connect to ", to.ToString(), ": no answer"));
  }
  int error_number = 0;
  socklen_t bytes = sizeof(error_number);
  if (getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error_number, &bytes) != 0) error_number = errno;
  if (error_number != 0) return SocketError(error_number, "connect to", to.ToString());
  return fd;
}

absl::StatusOr<size_t> SendSome(int fd, std::span<const std::byte> bytes) {
  const ssize_t sent = send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
  if (sent >= 0) return static_cast<size_t>(sent);
  if (errno == EAGAIN || errno == EINTR) return size_t{0};
  return SocketError(errno, "send", "");
}

absl::StatusOr<size_t> ReceiveSome(int fd, std::span<std::byte> bytes) {
  CHECK(!bytes.empty());
  const ssize_t received = recv(fd, bytes.data(), bytes.size(), 0);
  if (received > 0) return static_cast<size_t>(received);
  if (received == 0) return absl::UnavailableError("the other end closed the connection");
  if (errno == EAGAIN || errno == EINTR) return size_t{0};
  return SocketError(errno, "receive", "");
}

absl::Status SendAll(int fd, std::span<const std::byte> bytes, Deadline deadline) {
  while (!bytes.empty()) {
    ASSIGN_OR_RETURN(const size_t sent, SendSome(fd, bytes));
    bytes = bytes.subspan(sent);
    if (sent == 0) RETURN_IF_ERROR(WaitFor(fd, POLLOUT, deadline));
  }
  return absl::OkStatus();
}

absl::Status ReceiveAll(int fd, std::span<std::byte> bytes, Deadline deadline) {
  while (!bytes.empty()) {
    ASSIGN_OR_RETURN(const size_t received, ReceiveSome(fd, bytes));
    bytes = bytes.subspan(received);
    if (received == 0) RETURN_IF_ERROR(WaitFor(fd, POLLIN, deadline));
  }
  return absl::OkStatus();
}

void DropUnsentOnClose(int fd) {
  const linger at_once{1, 0};
  // If it is refused the kernel goes on sending in the background, which harms nobody for long.
  static_cast<void>(setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once)));
}

}  // namespace holdfast
