#include "agent/witness/ras_client.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#include <algorithm>
#include <span>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "io/tcp.h"
#include "io/unique_fd.h"
#include "monitor/witness/ras.h"

namespace holdfast {
namespace {

constexpr size_t kLineBytesMax = 4096;  // of an answer to one command
constexpr size_t kReadBytes = 64 << 10;

// A connection whose every step has the same end.
class Conversation {
 public:
  Conversation(const RasAddress& address, absl::Duration deadline)
      : address_(address), deadline_(Deadline::After(deadline)) {}

  absl::Status Connect() {
    sockaddr_storage storage{};
    socklen_t length = 0;
    sockaddr_in v4{};
    sockaddr_in6 v6{};
    if (inet_pton(AF_INET, address_.host.c_str(), &v4.sin_addr) == 1) {
      v4.sin_family = AF_INET;
      v4.sin_port = htons(address_.port);
      memcpy(&storage, &v4, length = sizeof(v4));
    } else if (inet_pton(AF_INET6, address_.host.c_str(), &v6.sin6_addr) == 1) {
      v6.sin6_family = AF_INET6;
      v6.sin6_port = htons(address_.port);
      memcpy(&storage, &v6, length = sizeof(v6));
    } else {
      return absl::InvalidArgumentError(
          absl::StrFormat("RAS: expected an address, found \"%s\"", address_.host));
    }
    socket_.Reset(socket(storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (!socket_) return absl::UnavailableError(absl::StrCat("RAS: socket: ", strerror(errno)));
    if (connect(socket_.get(), reinterpret_cast<const sockaddr*>(&storage), length) != 0 &&
        errno != EINPROGRESS) {
      return Refused(errno);
    }
    RETURN_IF_ERROR(Wait(POLLOUT));
    int error = 0;
    socklen_t size = sizeof(error);
    getsockopt(socket_.get(), SOL_SOCKET, SO_ERROR, &error, &size);
    return error == 0 ? absl::OkStatus() : Refused(error);
  }

  absl::Status Say(std::string line) {
    line += '\n';
    return Named(SendAll(socket_.get(), std::as_bytes(std::span(line)), deadline_));
  }

  absl::StatusOr<std::string> HearLine() {
    for (;;) {
      const size_t end = buffer_.find('\n');
      if (end != std::string::npos) {
        std::string line = buffer_.substr(0, end);
        buffer_.erase(0, end + 1);
        return line;
      }
      if (buffer_.size() > kLineBytesMax) {
        return absl::InvalidArgumentError("RAS: expected a line, found a longer text");
      }
      ASSIGN_OR_RETURN(const bool more, ReadSome());
      if (!more) return absl::UnavailableError("RAS: the connection was closed");
    }
  }

  absl::StatusOr<std::string> HearAll() {
    for (;;) {
      if (buffer_.size() > monitor::kRasAnswerBytesMax) {
        return absl::ResourceExhaustedError(absl::StrFormat(
            "RAS: expected a report of at most %d bytes", monitor::kRasAnswerBytesMax));
      }
      ASSIGN_OR_RETURN(const bool more, ReadSome());
      if (!more) return std::move(buffer_);
    }
  }

 private:
  absl::Status Refused(int error) const {
    const std::string text =
        absl::StrFormat("RAS at %s port %d: %s", address_.host, address_.port, strerror(error));
    return error == ECONNREFUSED ? absl::NotFoundError(text) : absl::UnavailableError(text);
  }

  static absl::Status Named(const absl::Status& status) {
    if (status.ok()) return status;
    if (absl::IsDeadlineExceeded(status)) {
      return absl::DeadlineExceededError("RAS: no answer in time");
    }
    return absl::Status(status.code(), absl::StrCat("RAS: ", status.message()));
  }
  absl::Status Wait(short events) { return Named(WaitFor(socket_.get(), events, deadline_)); }

  // False at the end of the connection.
  absl::StatusOr<bool> ReadSome() {
    for (;;) {
      char bytes[kReadBytes];
      const ssize_t count = recv(socket_.get(), bytes, sizeof(bytes), 0);
      if (count > 0) {
        buffer_.append(bytes, static_cast<size_t>(count));
        return true;
      }
      if (count == 0) return false;
      if (errno != EAGAIN && errno != EINTR) {
        return absl::UnavailableError(absl::StrCat("RAS: ", strerror(errno)));
      }
      RETURN_IF_ERROR(Wait(POLLIN));
    }
  }

  const RasAddress address_;
  const Deadline deadline_;
  UniqueFd socket_;
  std::string buffer_;
};

}  // namespace

absl::StatusOr<RasAddress> ParseRasAddress(const std::string& text) {
  RasAddress address;
  const size_t colon = text.rfind(':');
  uint32_t port = 0;
  if (colon == std::string::npos || !absl::SimpleAtoi(text.substr(colon + 1), &port) || port == 0 ||
      port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrFormat("RAS: expected host:port, found \"%s\"", text));
  }
  address.host = text.substr(0, colon);
  if (address.host == "localhost") address.host = "127.0.0.1";
  if (address.host.size() > 2 && address.host.front() == '[' && address.host.back() == ']') {
    address.host = address.host.substr(1, address.host.size() - 2);
  }
  address.port = static_cast<uint16_t>(port);
  return address;
}

absl::StatusOr<std::string> AskRas(const RasAddress& address, absl::Duration deadline) {
  Conversation conversation(address, deadline);
  RETURN_IF_ERROR(conversation.Connect());
  RETURN_IF_ERROR(conversation.Say("CLIENT PROTOCOL 2"));
  ASSIGN_OR_RETURN(const std::string greeting, conversation.HearLine());
  if (!absl::StartsWith(greeting, "SERVER PROTOCOL ")) {
    return absl::InvalidArgumentError(
        absl::StrFormat("RAS: expected SERVER PROTOCOL, found \"%s\"", greeting.substr(0, 80)));
  }
  const auto seconds = std::max<int64_t>(1, absl::ToInt64Seconds(deadline) - 1);
  RETURN_IF_ERROR(conversation.Say(absl::StrCat("TIMEOUT ", seconds)));
  ASSIGN_OR_RETURN(const std::string timeout_answer, conversation.HearLine());
  if (timeout_answer != "OK") {
    return absl::InvalidArgumentError(
        absl::StrFormat("RAS: expected OK, found \"%s\"", timeout_answer.substr(0, 80)));
  }
  RETURN_IF_ERROR(conversation.Say("SET FORMAT json"));
  // Whatever it answers: what comes then is JSON, or text.
  RETURN_IF_ERROR(conversation.HearLine().status());
  RETURN_IF_ERROR(conversation.Say("VERBOSE STATUS"));
  return conversation.HearAll();
}

}  // namespace holdfast
