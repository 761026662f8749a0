#include "cli/agent_client.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>

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

template <typename Body>
struct Message {
  abi::MessageHeader header{};
  Body body{};
  UniqueFd fd;
  bool ended = false;  // the agent has closed the connection
};

template <typename Body>
absl::StatusOr<Message<Body>> Receive(int fd, const std::string& path) {
  Message<Body> answer;
  std::array<iovec, 2> parts = {iovec{&answer.header, sizeof(answer.header)},
                                iovec{&answer.body, sizeof(answer.body)}};
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
  answer.ended = received == 0;
  if (answer.ended) return answer;
  if (static_cast<size_t>(received) < sizeof(answer.header) ||
      answer.header.magic != abi::kProtocolMagic) {
    return absl::UnavailableError(
        absl::StrFormat("agent at %s: expected an answer of %d bytes, got %d", path,
                        sizeof(answer.header) + sizeof(answer.body), received));
  }
  if (answer.header.version != abi::kProtocolVersion) {
    return absl::FailedPreconditionError(
        absl::StrFormat("agent at %s speaks protocol %d, this command %d", path,
                        answer.header.version, abi::kProtocolVersion));
  }
  return answer;
}

// `attached`: a descriptor that goes along; -1: none.
template <typename Body>
absl::Status SendRequest(int fd, const std::string& path, abi::MessageType type, const Body& body,
                         int attached = -1) {
  struct Request {
    abi::MessageHeader header;
    Body body;
  };
  Request request = {
      {abi::kProtocolMagic, abi::kProtocolVersion, type, /*request_id=*/1, sizeof(Body)}, body};
  iovec part = {&request, sizeof(request)};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (attached >= 0) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* const rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(rights), &attached, sizeof(attached));
  }
  if (sendmsg(fd, &message, MSG_NOSIGNAL) != static_cast<ssize_t>(sizeof(request))) {
    return SocketError("send", path);
  }
  return absl::OkStatus();
}

absl::StatusOr<UniqueFd> SealedText(const std::string& text) {
  UniqueFd memory(memfd_create("holdfast run", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!memory ||
      write(memory.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size()) ||
      fcntl(memory.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL) !=
          0) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("memory for a request of %d bytes: %s", text.size(), std::strerror(errno)));
  }
  return memory;
}

// The text that a message has brought along.
absl::StatusOr<std::string> TextOf(const UniqueFd& fd, uint64_t text_bytes,
                                   const std::string& path) {
  if (!fd || text_bytes > kTextBytesMax) {
    return absl::UnavailableError(
        absl::StrFormat("agent at %s: no text attached, or one of %d bytes", path, text_bytes));
  }
  std::string text(text_bytes, '\0');
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t got =
        pread(fd.get(), text.data() + done, text.size() - done, static_cast<off_t>(done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return SocketError("read answer", path);
    done += static_cast<size_t>(got);
  }
  return text;
}

// The text that answers a request.
absl::StatusOr<std::string> ReceiveText(int fd, const std::string& path) {
  ASSIGN_OR_RETURN(Message<abi::QueryReply> answer, Receive<abi::QueryReply>(fd, path));
  if (answer.ended) {
    return absl::UnavailableError(absl::StrFormat(
        "agent at %s: it has closed the connection instead of answering: it is ending, or of "
        "another version than this command",
        path));
  }
  abi::ReplyStatus& status = answer.body.status;
  status.text[sizeof(status.text) - 1] = '\0';
  if (status.code != 0) {
    return absl::Status(static_cast<absl::StatusCode>(status.code), status.text);
  }
  return TextOf(answer.fd, answer.body.text_bytes, path);
}

// Sends one request and reads the text that answers it.
template <typename Body>
absl::StatusOr<std::string> Ask(const std::string& socket_path, abi::MessageType type,
                                const Body& body, absl::Duration timeout) {
  ASSIGN_OR_RETURN(const UniqueFd fd, Connect(socket_path, timeout));
  RETURN_IF_ERROR(SendRequest(fd.get(), socket_path, type, body));
  return ReceiveText(fd.get(), socket_path);
}

// kInvalidArgument: it does not fit.
absl::Status PutText(const char* what, const std::string& text, std::span<char> field) {
  if (text.size() >= field.size()) {
    return absl::InvalidArgumentError(absl::StrFormat("%s: expected at most %d bytes, found %d",
                                                      what, field.size() - 1, text.size()));
  }
  std::copy(text.begin(), text.end(), field.begin());
  return absl::OkStatus();
}

absl::StatusOr<abi::MonitorQuery> ToQuery(const MonitorQuestion& question) {
  abi::MonitorQuery query{};
  query.kind = question.kind;
  query.communicator = question.communicator;
  RETURN_IF_ERROR(PutText("job", question.job, query.job));
  RETURN_IF_ERROR(PutText("finding", question.finding, query.finding));
  return query;
}

}  // namespace

absl::StatusOr<std::string> QueryStatus(const std::string& socket_path, absl::Duration timeout) {
  return Ask(socket_path, abi::MessageType::kQuery,
             abi::QueryRequest{abi::QueryKind::kStatus, /*reserved=*/0}, timeout);
}

absl::StatusOr<std::string> QueryWitnesses(const std::string& socket_path, absl::Duration timeout) {
  return Ask(socket_path, abi::MessageType::kQuery,
             abi::QueryRequest{abi::QueryKind::kWitnesses, /*reserved=*/0}, timeout);
}

absl::StatusOr<std::string> QueryMonitorWindow(const std::string& socket_path,
                                               const std::string& job, uint32_t rank,
                                               absl::Duration length, absl::Duration timeout) {
  abi::MonitorWindowRequest request{};
  RETURN_IF_ERROR(PutText("job", job, request.job));
  request.rank = rank;
  request.milliseconds =
      static_cast<uint32_t>(std::clamp<int64_t>(absl::ToInt64Milliseconds(length), 0, UINT32_MAX));
  return Ask(socket_path, abi::MessageType::kMonitorWindow, request, length + timeout);
}

absl::StatusOr<std::string> QueryMonitor(const std::string& socket_path,
                                         const MonitorQuestion& question, absl::Duration timeout) {
  ASSIGN_OR_RETURN(const abi::MonitorQuery query, ToQuery(question));
  return Ask(socket_path, abi::MessageType::kMonitorQuery, query, timeout);
}

absl::StatusOr<std::string> OrderRun(const std::string& socket_path, const RunOrder& order,
                                     absl::Duration timeout) {
  abi::RunCommand command{};
  command.kind = order.kind;
  command.number = order.number;
  RETURN_IF_ERROR(PutText("job", order.job, command.job));
  RETURN_IF_ERROR(PutText("text", order.text, command.text));
  return Ask(socket_path, abi::MessageType::kRunCommand, command, timeout);
}

absl::StatusOr<std::unique_ptr<AgentEvents>> AgentEvents::OpenRun(const std::string& socket_path,
                                                                  const std::string& spec,
                                                                  absl::Duration timeout) {
  ASSIGN_OR_RETURN(const UniqueFd memory, SealedText(spec));
  ASSIGN_OR_RETURN(UniqueFd fd, Connect(socket_path, timeout));
  const abi::RunRequest request{spec.size()};
  RETURN_IF_ERROR(
      SendRequest(fd.get(), socket_path, abi::MessageType::kRun, request, memory.get()));
  ASSIGN_OR_RETURN(std::string first, ReceiveText(fd.get(), socket_path));
  return std::unique_ptr<AgentEvents>(
      new AgentEvents(socket_path, std::move(fd), std::move(first)));
}

absl::StatusOr<std::unique_ptr<AgentEvents>> AgentEvents::Open(const std::string& socket_path,
                                                               const MonitorQuestion& question,
                                                               absl::Duration timeout) {
  ASSIGN_OR_RETURN(const abi::MonitorQuery query, ToQuery(question));
  ASSIGN_OR_RETURN(UniqueFd fd, Connect(socket_path, timeout));
  RETURN_IF_ERROR(SendRequest(fd.get(), socket_path, abi::MessageType::kMonitorQuery, query));
  ASSIGN_OR_RETURN(std::string first, ReceiveText(fd.get(), socket_path));
  return std::unique_ptr<AgentEvents>(
      new AgentEvents(socket_path, std::move(fd), std::move(first)));
}

absl::StatusOr<std::optional<AgentEvents::Event>> AgentEvents::Receive() {
  ASSIGN_OR_RETURN(const Message<abi::MonitorEvent> message,
                   cli::Receive<abi::MonitorEvent>(fd_.get(), socket_path_));
  if (message.ended) return std::nullopt;
  Event event;
  ASSIGN_OR_RETURN(event.text, TextOf(message.fd, message.body.text_bytes, socket_path_));
  event.lost = message.body.lost;
  return event;
}

}  // namespace holdfast::cli
