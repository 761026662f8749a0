#include "hook/socket.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace holdfast::hook {
namespace {

constexpr int kPollCapMs = 60'000;

// The address of `path`. Too long for sun_path: opens the socket's file itself, and names it as
// /proc/self/fd/N, which the kernel follows like a link.
Error MakeAddress(const std::string& path, sockaddr_un* address, UniqueFd* holder) {
  *address = {};
  address->sun_family = AF_UNIX;
  if (path.size() < sizeof(address->sun_path)) {
    std::memcpy(address->sun_path, path.c_str(), path.size() + 1);
    return Error();
  }
  holder->Reset(open(path.c_str(), O_PATH | O_CLOEXEC));
  if (!holder->valid()) {
    const hf_code code = errno == ENOENT || errno == ENOTDIR ? HF_NOT_FOUND : HF_PERMISSION_DENIED;
    return Error(code, "socket %s: %s", ShortName(path).text(), strerror(errno));
  }
  std::snprintf(address->sun_path, sizeof(address->sun_path), "/proc/self/fd/%d", holder->get());
  return Error();
}

void SetSendTimeout(int fd, Deadline deadline) {
  const int64_t remaining_ns =
      std::clamp<int64_t>(deadline.remaining_ns(), kNsPerMs, kPollCapMs * kNsPerMs);
  timeval timeout;
  timeout.tv_sec = remaining_ns / kNsPerSecond;
  timeout.tv_usec = remaining_ns % kNsPerSecond / 1000;
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
}

// Moves the descriptors that came with `header` to the message; closes those beyond its maximum.
void TakeFds(msghdr& header, Message* message) {
  for (cmsghdr* control = CMSG_FIRSTHDR(&header); control != nullptr;
       control = CMSG_NXTHDR(&header, control)) {
    if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int raw = -1;
      std::memcpy(&raw, CMSG_DATA(control) + i * sizeof(int), sizeof(int));
      UniqueFd fd(raw);
      if (message->fd_count < message->fds.size()) {
        message->fds[message->fd_count++] = std::move(fd);
      }
    }
  }
}

Error CheckHeader(const abi::MessageHeader& header, size_t bytes) {
  if (bytes < sizeof(header) || header.magic != abi::kProtocolMagic) {
    return Error(HF_INTERNAL, "message from the agent: %zu bytes without Holdfast's magic", bytes);
  }
  if (header.version != abi::kProtocolVersion) {
    return Error(HF_INTERNAL, "message from the agent: expected protocol version %u, found %u",
                 abi::kProtocolVersion, header.version);
  }
  if (header.body_bytes != bytes - sizeof(header)) {
    return Error(HF_INTERNAL, "message from the agent: its header says %u bytes of body, found %zu",
                 header.body_bytes, bytes - sizeof(header));
  }
  return Error();
}

// An agent serves its own user only. In /tmp anybody could have made the directory of a private
// agent's socket before us, and would be given what this process shows and keeps.
Error CheckListener(int fd, const std::string& path) {
  ucred listener = {};
  socklen_t bytes = sizeof(listener);
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &listener, &bytes) != 0) {
    return Error(HF_INTERNAL, "agent at %s: getsockopt: %s", ShortName(path).text(),
                 strerror(errno));
  }
  if (listener.uid == geteuid()) return Error();
  return Error(HF_PERMISSION_DENIED, "agent at %s: expected user %u's, found user %u's",
               ShortName(path).text(), geteuid(), listener.uid);
}

}  // namespace

Result<UniqueFd> ConnectToAgent(const std::string& path, Deadline deadline) {
  sockaddr_un address;
  UniqueFd holder;
  if (Error error = MakeAddress(path, &address, &holder); !error.ok()) return error;
  UniqueFd fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return Error(HF_RESOURCE_EXHAUSTED, "socket: %s", strerror(errno));
  for (;;) {
    // A blocking connect waits while the listener's queue is full, at most the send timeout.
    SetSendTimeout(fd.get(), deadline);
    if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) {
      if (Error error = CheckListener(fd.get(), path); !error.ok()) return error;
      return fd;
    }
    const int reason = errno;
    if ((reason == EINTR || reason == EAGAIN) && !deadline.passed()) continue;
    hf_code code = HF_INTERNAL;
    if (reason == ENOENT || reason == ENOTDIR) code = HF_NOT_FOUND;
    if (reason == ECONNREFUSED || reason == EPROTOTYPE) code = HF_UNAVAILABLE;
    if (reason == EACCES || reason == EPERM) code = HF_PERMISSION_DENIED;
    if (reason == EINTR || reason == EAGAIN) code = HF_DEADLINE_EXCEEDED;
    return Error(code, "no agent at %s: connect: %s", ShortName(path).text(), strerror(reason));
  }
}

Channel::Channel(UniqueFd socket) : socket_(std::move(socket)) {
  fcntl(socket_.get(), F_SETFL, O_NONBLOCK);
}

Error Channel::Send(abi::MessageType type, uint32_t request_id, std::span<const std::byte> body,
                    std::span<const int> fds, Deadline deadline) {
  abi::MessageHeader header = {};
  header.magic = abi::kProtocolMagic;
  header.version = abi::kProtocolVersion;
  header.type = type;
  header.request_id = request_id;
  header.body_bytes = static_cast<uint32_t>(body.size());
  iovec parts[2];
  parts[0] = {&header, sizeof(header)};
  parts[1] = {const_cast<std::byte*>(body.data()), body.size()};
  alignas(cmsghdr) char control_bytes[CMSG_SPACE(abi::kMessageFdsMax * sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = parts;
  message.msg_iovlen = body.empty() ? 1 : 2;
  if (!fds.empty() && fds.size() <= abi::kMessageFdsMax) {
    message.msg_control = control_bytes;
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* control = CMSG_FIRSTHDR(&message);
    control->cmsg_level = SOL_SOCKET;
    control->cmsg_type = SCM_RIGHTS;
    control->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(control), fds.data(), fds.size_bytes());
  }
  for (;;) {
    // A datagram goes whole or not at all.
    if (sendmsg(socket_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0) return Error();
    if (errno == EINTR) continue;
    if (errno != EAGAIN && errno != ENOBUFS) {
      return Error(HF_UNAVAILABLE, "the connection to the agent was lost: send: %s",
                   strerror(errno));
    }
    if (deadline.passed()) {
      return Error(HF_DEADLINE_EXCEEDED, "the agent did not take a message in time");
    }
    pollfd ready = {socket_.get(), POLLOUT, 0};
    poll(&ready, 1, deadline.PollMs(kPollCapMs));
  }
}

Error Channel::Receive(Message* message, int interrupt_fd, Deadline deadline) {
  for (;;) {
    *message = Message();
    iovec parts[2];
    parts[0] = {&message->header, sizeof(message->header)};
    parts[1] = {message->body.data(), message->body.size()};
    alignas(cmsghdr) char control_bytes[CMSG_SPACE(abi::kMessageFdsMax * sizeof(int))];
    msghdr header = {};
    header.msg_iov = parts;
    header.msg_iovlen = 2;
    header.msg_control = control_bytes;
    header.msg_controllen = sizeof(control_bytes);
    const ssize_t received = recvmsg(socket_.get(), &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (received > 0) {
      TakeFds(header, message);
      if ((header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0) {
        return Error(HF_INTERNAL,
                     "message from the agent: longer than %zu bytes or %zu descriptors",
                     abi::kMessageBytesMax, abi::kMessageFdsMax);
      }
      return CheckHeader(message->header, static_cast<size_t>(received));
    }
    if (received == 0) return Error(HF_UNAVAILABLE, "the agent closed the connection");
    if (errno == EINTR) continue;
    if (errno != EAGAIN) {
      return Error(HF_UNAVAILABLE, "the connection to the agent was lost: receive: %s",
                   strerror(errno));
    }
    if (deadline.passed()) {
      return Error(HF_DEADLINE_EXCEEDED, "the agent did not answer in time");
    }
    pollfd ready[2] = {{socket_.get(), POLLIN, 0}, {interrupt_fd, POLLIN, 0}};
    poll(ready, 2, deadline.PollMs(kPollCapMs));
    if ((ready[1].revents & POLLIN) != 0) return Error(HF_ABORTED, "interrupted");
  }
}

}  // namespace holdfast::hook
