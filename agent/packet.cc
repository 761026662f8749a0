#include "agent/packet.h"

#include <errno.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"

namespace holdfast {
namespace {

constexpr size_t kControlBytes = CMSG_SPACE(abi::kMessageFdsMax * sizeof(int));

void TakeDescriptors(msghdr& header, std::vector<UniqueFd>& fds) {
  for (cmsghdr* item = CMSG_FIRSTHDR(&header); item != nullptr; item = CMSG_NXTHDR(&header, item)) {
    if (item->cmsg_level != SOL_SOCKET || item->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (item->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(item) + i * sizeof(int), sizeof(int));
      fds.emplace_back(fd);
    }
  }
}

Received Garbage(std::string problem) {
  Received received;
  received.kind = Received::Kind::kGarbage;
  received.problem = std::move(problem);
  return received;
}

// Takes a datagram apart that has arrived whole.
Received Decode(std::span<const std::byte> bytes, std::vector<UniqueFd> fds) {
  abi::MessageHeader header;
  if (bytes.size() < sizeof(header)) {
    return Garbage(absl::StrFormat("a message of %d bytes, expected at least %d", bytes.size(),
                                   sizeof(header)));
  }
  std::memcpy(&header, bytes.data(), sizeof(header));
  if (header.magic != abi::kProtocolMagic) {
    return Garbage(absl::StrFormat("magic %08x, expected %08x", header.magic, abi::kProtocolMagic));
  }
  Received received;
  received.packet.type = header.type;
  received.packet.request_id = header.request_id;
  if (header.version != abi::kProtocolVersion) {
    received.kind = Received::Kind::kOtherVersion;
    received.problem = absl::StrFormat(
        "the agent speaks protocol %d, the caller protocol %d: install both from "
        "one release",
        abi::kProtocolVersion, header.version);
    return received;
  }
  if (bytes.size() - sizeof(header) != header.body_bytes) {
    return Garbage(absl::StrFormat("a body of %d bytes, expected %d as its header says",
                                   bytes.size() - sizeof(header), header.body_bytes));
  }
  received.kind = Received::Kind::kPacket;
  received.packet.body.assign(bytes.begin() + sizeof(header), bytes.end());
  received.packet.fds = std::move(fds);
  return received;
}

}  // namespace

Received ReceivePacket(int socket) {
  std::array<std::byte, abi::kMessageBytesMax> bytes;
  iovec part{bytes.data(), bytes.size()};
  alignas(cmsghdr) std::array<char, kControlBytes> control{};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control.data();
  header.msg_controllen = control.size();
  ssize_t length = 0;
  do {
    length = recvmsg(socket, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  } while (length < 0 && errno == EINTR);
  Received received;
  if (length < 0) {
    const bool nothing = errno == EAGAIN || errno == EWOULDBLOCK;
    received.kind = nothing ? Received::Kind::kNothing : Received::Kind::kEnd;
    return received;
  }
  std::vector<UniqueFd> fds;
  TakeDescriptors(header, fds);
  // Also what a datagram of no bytes looks like, which is no message either.
  if (length == 0) {
    received.kind = Received::Kind::kEnd;
    return received;
  }
  if ((header.msg_flags & MSG_TRUNC) != 0) {
    return Garbage(absl::StrCat("a message of more than ", abi::kMessageBytesMax, " bytes"));
  }
  if ((header.msg_flags & MSG_CTRUNC) != 0) {
    return Garbage(absl::StrCat("more than ", abi::kMessageFdsMax,
                                " descriptors, or more than this process may open"));
  }
  return Decode({bytes.data(), static_cast<size_t>(length)}, std::move(fds));
}

Sent SendPacket(int socket, const Packet& packet) {
  abi::MessageHeader head{abi::kProtocolMagic, abi::kProtocolVersion, packet.type,
                          packet.request_id, static_cast<uint32_t>(packet.body.size())};
  CHECK(sizeof(head) + packet.body.size() <= abi::kMessageBytesMax);
  CHECK(packet.fds.size() <= abi::kMessageFdsMax);
  std::array<iovec, 2> parts = {
      iovec{&head, sizeof(head)},
      iovec{const_cast<std::byte*>(packet.body.data()), packet.body.size()}};  // only read
  alignas(cmsghdr) std::array<char, kControlBytes> control{};
  msghdr header{};
  header.msg_iov = parts.data();
  header.msg_iovlen = parts.size();
  if (!packet.fds.empty()) {
    header.msg_control = control.data();
    header.msg_controllen = CMSG_SPACE(packet.fds.size() * sizeof(int));
    cmsghdr* const rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(packet.fds.size() * sizeof(int));
    for (size_t i = 0; i < packet.fds.size(); ++i) {
      const int fd = packet.fds[i].get();
      std::memcpy(CMSG_DATA(rights) + i * sizeof(int), &fd, sizeof(int));
    }
  }
  for (;;) {
    if (sendmsg(socket, &header, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) return Sent::kYes;
    if (errno == EINTR) continue;
    const bool full = errno == EAGAIN || errno == ENOBUFS || errno == ETOOMANYREFS;
    return full ? Sent::kFull : Sent::kPeerGone;
  }
}

abi::MessageType ReplyType(abi::MessageType request) {
  switch (request) {
    case abi::MessageType::kOpen:
      return abi::MessageType::kOpenReply;
    case abi::MessageType::kRegister:
      return abi::MessageType::kRegisterReply;
    case abi::MessageType::kRestore:
      return abi::MessageType::kRestoreReply;
    case abi::MessageType::kQuery:
    case abi::MessageType::kMonitorWindow:
    case abi::MessageType::kMonitorQuery:
    case abi::MessageType::kRun:
    case abi::MessageType::kRunCommand:
      return abi::MessageType::kQueryReply;
    case abi::MessageType::kMonitor:
      return abi::MessageType::kMonitorReply;
    case abi::MessageType::kRankExit:
      return abi::MessageType::kRankExitReply;
    case abi::MessageType::kWitness:
      return abi::MessageType::kWitnessReply;
    default:
      return abi::MessageType{};
  }
}

absl::Status CheckPacket(const Packet& packet, size_t body_bytes, size_t fd_count) {
  if (packet.body.size() == body_bytes && packet.fds.size() == fd_count) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrFormat(
      "message of type %d: expected a body of %d bytes and %d descriptors, found %d and %d",
      static_cast<int>(packet.type), body_bytes, fd_count, packet.body.size(), packet.fds.size()));
}

absl::StatusOr<std::string> TextField(const char* name, std::span<const char> field) {
  const auto end = std::find(field.begin(), field.end(), '\0');
  if (end == field.end()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: expected a NUL within %d bytes, found none", name, field.size()));
  }
  return std::string(field.begin(), end);
}

abi::ReplyStatus ToReplyStatus(const absl::Status& status) {
  abi::ReplyStatus reply{};
  reply.code = static_cast<int32_t>(status.code());
  const size_t length = std::min(status.message().size(), sizeof(reply.text) - 1);
  std::memcpy(reply.text, status.message().data(), length);
  return reply;
}

}  // namespace holdfast
