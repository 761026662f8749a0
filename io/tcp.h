// Sockets of TCP over IPv4 and IPv6 that never block outside poll(2): every wait has a deadline.
//
// What goes over them, and who may send it, is their user's.
#ifndef HOLDFAST_IO_TCP_H_
#define HOLDFAST_IO_TCP_H_

#include <sys/socket.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "io/unique_fd.h"

namespace holdfast {

// A point in time on CLOCK_MONOTONIC up to which somebody waits.
class Deadline {
 public:
  Deadline() = default;  // has passed
  static Deadline After(absl::Duration duration);
  absl::Duration remaining() const;  // never negative
  bool passed() const { return remaining() == absl::ZeroDuration(); }
  Deadline Earlier(Deadline other) const { return at_ < other.at_ ? *this : other; }
  // For poll(2): rounded up, at least 0.
  int PollMilliseconds() const;

 private:
  explicit Deadline(absl::Duration at) : at_(at) {}
  absl::Duration at_ = -absl::InfiniteDuration();
};

// An address of IPv4 or IPv6 and a port.
class Endpoint {
 public:
  Endpoint() = default;  // no address
  // An IPv4 address inside an IPv6 one (::ffff:a.b.c.d) becomes the IPv4 address: where IPv6 is
  // switched off only that can be reached.
  explicit Endpoint(const sockaddr_storage& address);
  // 127.0.0.1, and any address: of both families where the kernel has IPv6, else of IPv4.
  static Endpoint Loopback(uint16_t port);
  static Endpoint Any(uint16_t port);

  Endpoint WithPort(uint16_t port) const;
  uint16_t port() const;
  bool is_loopback() const;  // 127.0.0.0/8 or ::1
  bool is_any() const;
  int family() const { return address_.ss_family; }

  // 16 bytes of an IPv6 address in network order, in which an IPv4 one is ::ffff:a.b.c.d; without
  // the port, and without the scope of a link-local one.
  void Encode(std::span<std::byte, 16> into) const;
  static Endpoint Decode(std::span<const std::byte, 16> bytes, uint16_t port);

  const sockaddr* address() const;
  socklen_t address_bytes() const;
  std::string ToString() const;  // "10.0.0.1:29500", "[fd00::1]:29500"

 private:
  sockaddr_storage address_ = {};
};

// All addresses of a name or a numeric address, each once. Blocks as long as the resolver does (its
// own time-outs, resolv.conf(5)). Errors: kNotFound.
absl::StatusOr<std::vector<Endpoint>> ResolveHost(const std::string& host, uint16_t port);

// A listening socket; port 0: the kernel chooses. Errors: kAlreadyExists (the port is taken),
// kUnavailable.
absl::StatusOr<UniqueFd> ListenTcp(const Endpoint& at, int backlog);
absl::StatusOr<Endpoint> LocalEndpoint(int fd);
absl::StatusOr<Endpoint> RemoteEndpoint(int fd);

// A waiting connection (without delay: Nagle off), or none (a descriptor of -1). Errors:
// kResourceExhausted (no descriptors), kUnavailable.
absl::StatusOr<UniqueFd> AcceptTcp(int listener);

// Errors: kUnavailable (refused, unreachable), kDeadlineExceeded.
absl::StatusOr<UniqueFd> ConnectTcp(const Endpoint& to, Deadline deadline);

// Sends or receives what is possible now: 0 is "nothing now". Errors: kUnavailable (the other end
// has closed or broken the connection).
absl::StatusOr<size_t> SendSome(int fd, std::span<const std::byte> bytes);
absl::StatusOr<size_t> ReceiveSome(int fd, std::span<std::byte> bytes);

// Until `fd` is ready for `events` of poll(2). Errors: kDeadlineExceeded, kUnavailable.
absl::Status WaitFor(int fd, short events, Deadline deadline);

// Everything, waiting. Errors besides: kDeadlineExceeded.
absl::Status SendAll(int fd, std::span<const std::byte> bytes, Deadline deadline);
absl::Status ReceiveAll(int fd, std::span<std::byte> bytes, Deadline deadline);

// Closing the socket then drops what is not sent yet, and tells the other end at once (RST).
void DropUnsentOnClose(int fd);

}  // namespace holdfast

#endif  // HOLDFAST_IO_TCP_H_
