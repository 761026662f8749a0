#include "cli/agent_client.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "hook/abi/messages.h"
#include "io/unique_fd.h"

namespace holdfast::cli {
namespace {

// Larger answers are not from an agent of ours.
constexpr uint64_t kTextBytesMax = uint64_t{256} << 20;

absl::Status SocketError(const char* what, const std::string& path) {
  const int error = errno;
  const std::string text = absl::StrFormat("agent at %s: %s: %s", path, what, std::strerror(error));
  if (error == EACCES || error == EPERM) return absl::PermissionDeniedError(text);
  return absl::UnavailableError(text);
}

absl::StatusOr<UniqueFd> Connect(const std::string& path, absl::Duration timeout) {
  const size_t slash = path.rfind('/');
  const std::string directory = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  const std::string name = slash == std::string::npos ? path : path.substr(slash + 1);
  // A unix address holds 107 bytes: name the directory by its descriptor, so any path works.
  const UniqueFd directory_fd(open(directory.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!directory_fd) return SocketError("open directory", path);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string short_path = absl::StrFormat("/proc/self/fd/%d/%s", directory_fd.get(), name);
  if (short_path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "agent at %s: the file name is longer than %d bytes", path, sizeof(address.sun_path) - 1));
  }
  std::memcpy(address.sun_path, short_path.c_str(), short_path.size() + 1);
  UniqueFd fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!fd) return SocketError("socket", path);
  const timeval limit = absl::ToTimeval(timeout);
  if (setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)) != 0 ||
      setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)) != 0) {
    return SocketError("set timeout", path);
  }
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return SocketError("connect", path);
  }
  return fd;
}

struct Answer {
  abi::MessageHeader header{};
  abi::QueryReply reply{};
  UniqueFd fd;
};

absl::StatusOr<Answer> Receive(int fd, const std::string& path) {
  Answer answer;
  std::array<iovec, 2> parts = {iovec{&answer.header, sizeof(answer.header)},
                                iovec{&answer.reply, sizeof(answer.reply)}};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = parts.data();
  message.msg_iovlen = parts.size();
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  const ssize_t received = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
  if (received < 0) return SocketError("receive", path);
  if (const cmsghdr* item = CMSG_FIRSTHDR(&message);
      item != nullptr && item->cmsg_level == SOL_SOCKET && item->cmsg_type == SCM_RIGHTS &&
      item->cmsg_len == CMSG_LEN(sizeof(int))) {
    int passed = -1;
    std::memcpy(&passed, CMSG_DATA(item), sizeof(passed));
    answer.fd.Reset(passed);
  }
  if (static_cast<size_t>(received) < sizeof(answer.header) ||
      answer.header.magic != abi::kProtocolMagic) {
    return absl::UnavailableError(
        absl::StrFormat("agent at %s: expected an answer of %d bytes, got %d", path,
                        sizeof(answer.header) + sizeof(answer.reply), received));
  }
  if (answer.header.version != abi::kProtocolVersion) {
    return absl::FailedPreconditionError(
        absl::StrFormat("agent at %s speaks protocol %d, this command %d", path,
                        answer.header.version, abi::kProtocolVersion));
  }
  answer.reply.status.text[sizeof(answer.reply.status.text) - 1] = '\0';
  return answer;
}

// Sends one request and reads the text that answers it.
template <typename Body>
absl::StatusOr<std::string> Ask(const std::string& socket_path, abi::MessageType type,
                                const Body& body, absl::Duration timeout) {
  ASSIGN_OR_RETURN(const UniqueFd fd, Connect(socket_path, timeout));
  struct Request {
    abi::MessageHeader header;
    Body body;
  };
  const Request request = {
      {abi::kProtocolMagic, abi::kProtocolVersion, type, /*request_id=*/1, sizeof(Body)}, body};
  if (send(fd.get(), &request, sizeof(request), MSG_NOSIGNAL) !=
      static_cast<ssize_t>(sizeof(request))) {
    return SocketError("send", socket_path);
  }
  ASSIGN_OR_RETURN(Answer answer, Receive(fd.get(), socket_path));
  if (answer.reply.status.code != 0) {
    return absl::Status(static_cast<absl::StatusCode>(answer.reply.status.code),
                        answer.reply.status.text);
  }
  if (!answer.fd || answer.reply.text_bytes > kTextBytesMax) {
    return absl::UnavailableError(absl::StrFormat(
        "agent at %s: no text attached, or one of %d bytes", socket_path, answer.reply.text_bytes));
  }
  std::string text(answer.reply.text_bytes, '\0');
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t got =
        pread(answer.fd.get(), text.data() + done, text.size() - done, static_cast<off_t>(done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return SocketError("read answer", socket_path);
    done += static_cast<size_t>(got);
  }
  return text;
}

}  // namespace

absl::StatusOr<std::string> QueryStatus(const std::string& socket_path, absl::Duration timeout) {
  return Ask(socket_path, abi::MessageType::kQuery,
             abi::QueryRequest{abi::QueryKind::kStatus, /*reserved=*/0}, timeout);
}

absl::StatusOr<std::string> QueryMonitorWindow(const std::string& socket_path,
                                               const std::string& job, uint32_t rank,
                                               absl::Duration length, absl::Duration timeout) {
  abi::MonitorWindowRequest request{};
  if (job.size() >= sizeof(request.job)) {
    return absl::InvalidArgumentError(absl::StrFormat("job: expected at most %d bytes, found %d",
                                                      sizeof(request.job) - 1, job.size()));
  }
  std::memcpy(request.job, job.data(), job.size());
  request.rank = rank;
  request.milliseconds =
      static_cast<uint32_t>(std::clamp<int64_t>(absl::ToInt64Milliseconds(length), 0, UINT32_MAX));
  return Ask(socket_path, abi::MessageType::kMonitorWindow, request, length + timeout);
}

}  // namespace holdfast::cli
