#include "agent/handover.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/json_reader.h"
#include "base/status_macros.h"
#include "io/errno_status.h"
#include "nlohmann/json.hpp"

namespace holdfast {
namespace {

constexpr size_t kHandoverBytesMax = size_t{64} << 20;
// Room for the registrations of many ranks at once; the kernel caps it at wmem_max.
constexpr int kChannelBytes = 1 << 20;

struct WireMessage {
  ChannelMessage::Type type;
  int32_t exit_code;
  char name[kDescriptorNameBytesMax + 8];  // NUL-terminated
};

WireMessage MakeMessage(ChannelMessage::Type type, const std::string& name) {
  CheckDescriptorName(name);
  WireMessage message{};
  message.type = type;
  std::memcpy(message.name, name.data(), name.size());
  return message;
}

absl::Status Send(int channel, const WireMessage& message, int fd, absl::Duration deadline) {
  return SendOnSocket(channel, std::as_bytes(std::span(&message, 1)), fd, deadline);
}

absl::Status SetCloseOnExec(int fd) {
  if (fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--handover is for holdfastd itself: descriptor %d is not open", fd));
  }
  return absl::OkStatus();
}

absl::StatusOr<UniqueFd> TakeNumber(const JsonValue& root, const char* key) {
  ASSIGN_OR_RETURN(const JsonValue value, root.Get(key));
  ASSIGN_OR_RETURN(const uint64_t number, value.Uint64());
  const int fd = static_cast<int>(number);
  RETURN_IF_ERROR(SetCloseOnExec(fd));
  return UniqueFd(fd);
}

}  // namespace

bool IsDescriptorName(std::string_view name) {
  return !name.empty() && name.size() <= kDescriptorNameBytesMax &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' || c == '/' ||
                  c == '-';
         });
}

void CheckDescriptorName(std::string_view name) { CHECK(IsDescriptorName(name)); }

absl::Status SendOnSocket(int socket, std::span<const std::byte> message, int fd,
                          absl::Duration deadline) {
  iovec part{const_cast<std::byte*>(message.data()), message.size()};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  if (fd >= 0) {
    header.msg_control = control;
    header.msg_controllen = sizeof(control);
    cmsghdr* const rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(rights), &fd, sizeof(int));
  }
  const absl::Duration end = RealClock().Elapsed() + deadline;
  for (;;) {
    if (sendmsg(socket, &header, MSG_NOSIGNAL | MSG_DONTWAIT) ==
        static_cast<ssize_t>(message.size())) {
      return absl::OkStatus();
    }
    // ETOOMANYREFS: too many descriptors are in flight; the peer's reading helps, as for EAGAIN.
    const bool full = errno == EAGAIN || errno == ETOOMANYREFS || errno == ENOBUFS;
    if (errno == EINTR) continue;
    if (!full) return absl::UnavailableError(absl::StrCat("channel: ", ErrnoName(errno)));
    const absl::Duration left = end - RealClock().Elapsed();
    if (left <= absl::ZeroDuration()) {
      return absl::UnavailableError(absl::StrCat("channel: the other process has not read for ",
                                                 absl::FormatDuration(deadline)));
    }
    pollfd entry{socket, POLLOUT, 0};
    const timespec timeout = absl::ToTimespec(std::min(left, absl::Milliseconds(20)));
    ppoll(&entry, 1, &timeout, nullptr);
  }
}

absl::StatusOr<StartedPeer> StartPeer(const StartRequest& request) {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) {
    return ErrnoStatus(errno, "socketpair", "channel");
  }
  StartedPeer peer;
  peer.channel.Reset(ends[0]);
  const UniqueFd theirs(ends[1]);
  for (const int end : ends) {
    // A smaller buffer works too: the sender waits sooner.
    (void)setsockopt(end, SOL_SOCKET, SO_SNDBUF, &kChannelBytes, sizeof(kChannelBytes));
  }
  ASSIGN_OR_RETURN(const UniqueFd self, OpenPidfd(getpid()));

  nlohmann::json table = {{"channel", theirs.get()},
                          {"peer", self.get()},
                          {"kill_plan", request.kill_plan},
                          {"restart_count", request.restart_count}};
  table["descriptors"] = nlohmann::json::array();
  std::vector<int> inherited = {theirs.get(), self.get()};
  for (const NamedFd& descriptor : request.descriptors) {
    CheckDescriptorName(descriptor.name);
    table["descriptors"].push_back({{"name", descriptor.name}, {"fd", descriptor.fd}});
    inherited.push_back(descriptor.fd);
  }
  ASSIGN_OR_RETURN(const UniqueFd memory, SealedMemfd("holdfast handover", table.dump()));
  inherited.push_back(memory.get());
  const std::string role = request.role == Role::kKeeper ? "--keeper" : "--worker";
  ASSIGN_OR_RETURN(
      Child child,
      SpawnSelf({"holdfastd", role, "--handover", absl::StrCat(memory.get())}, inherited));
  peer.pidfd = std::move(child.pidfd);
  return peer;
}

absl::StatusOr<Handover> TakeHandover(int fd) {
  RETURN_IF_ERROR(SetCloseOnExec(fd));
  const UniqueFd memory(fd);
  ASSIGN_OR_RETURN(std::string text, ReadAll(fd, kHandoverBytesMax));
  ASSIGN_OR_RETURN(const std::unique_ptr<JsonDocument> document,
                   JsonDocument::Parse(std::move(text)));
  const JsonValue root = document->root();
  Handover handover;
  ASSIGN_OR_RETURN(handover.channel, TakeNumber(root, "channel"));
  ASSIGN_OR_RETURN(handover.peer_pidfd, TakeNumber(root, "peer"));
  ASSIGN_OR_RETURN(const JsonValue kill_plan, root.Get("kill_plan"));
  ASSIGN_OR_RETURN(handover.kill_plan, kill_plan.String());
  ASSIGN_OR_RETURN(const JsonValue restarts, root.Get("restart_count"));
  ASSIGN_OR_RETURN(const uint64_t restart_count, restarts.Uint64());
  handover.restart_count = static_cast<uint32_t>(restart_count);
  ASSIGN_OR_RETURN(const JsonValue descriptors, root.Get("descriptors"));
  ASSIGN_OR_RETURN(const size_t count, descriptors.ArraySize());
  for (size_t i = 0; i < count; ++i) {
    KeptDescriptor kept;
    ASSIGN_OR_RETURN(const JsonValue name, descriptors[i].Get("name"));
    ASSIGN_OR_RETURN(kept.name, name.String());
    ASSIGN_OR_RETURN(kept.fd, TakeNumber(descriptors[i], "fd"));
    handover.descriptors.push_back(std::move(kept));
  }
  return handover;
}

absl::Status SendKeep(int channel, const std::string& name, int fd, absl::Duration deadline) {
  CHECK(fd >= 0);
  return Send(channel, MakeMessage(ChannelMessage::Type::kKeep, name), fd, deadline);
}

absl::Status SendDrop(int channel, const std::string& name, absl::Duration deadline) {
  return Send(channel, MakeMessage(ChannelMessage::Type::kDrop, name), -1, deadline);
}

absl::Status SendFinished(int channel, int exit_code, absl::Duration deadline) {
  WireMessage message{};
  message.type = ChannelMessage::Type::kFinished;
  message.exit_code = exit_code;
  return Send(channel, message, -1, deadline);
}

absl::StatusOr<std::optional<ChannelMessage>> ReceiveMessage(int channel) {
  WireMessage wire{};
  iovec part{&wire, sizeof(wire)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof(control);
  ssize_t length = 0;
  do {
    length = recvmsg(channel, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  } while (length < 0 && errno == EINTR);
  // 0, ECONNRESET: the peer has gone and its messages are read.
  if (length <= 0) return std::nullopt;

  ChannelMessage message;
  if (const cmsghdr* rights = CMSG_FIRSTHDR(&header);
      rights != nullptr && rights->cmsg_type == SCM_RIGHTS) {
    int fd = -1;
    std::memcpy(&fd, CMSG_DATA(rights), sizeof(int));
    message.fd.Reset(fd);
  }
  if (length != static_cast<ssize_t>(sizeof(wire)) || wire.name[sizeof(wire.name) - 1] != '\0') {
    return absl::DataLossError(
        absl::StrFormat("channel: expected a message of %d bytes, found %d", sizeof(wire), length));
  }
  message.type = wire.type;
  message.name = wire.name;
  message.exit_code = wire.exit_code;
  if (message.type == ChannelMessage::Type::kKeep && !message.fd) {
    return absl::DataLossError(
        absl::StrCat("channel: the descriptor ", message.name,
                     " did not arrive: this process is at its limit of open files"));
  }
  return message;
}

}  // namespace holdfast
