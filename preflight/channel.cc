#include "preflight/channel.h"

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/status_macros.h"

namespace holdfast::preflight {
namespace {

struct Header {
  uint32_t type = 0;
  uint32_t payload_bytes = 0;
};
static_assert(sizeof(Header) == 8);

void Append(std::vector<std::byte>* to, std::span<const std::byte> bytes) {
  to->insert(to->end(), bytes.begin(), bytes.end());
}

}  // namespace

Channel::Channel(Connection connection, End end) : connection_(std::move(connection)), end_(end) {}

Sha256Digest Channel::CodeOf(End sender, uint64_t number,
                             std::span<const std::byte> header_and_payload) {
  std::vector<std::byte> message;
  message.push_back(static_cast<std::byte>(sender));
  Append(&message, std::as_bytes(std::span<const uint64_t, 1>(&number, 1)));
  Append(&message, header_and_payload);
  return HmacSha256(connection_.key, message);
}

absl::Status Channel::SendPayload(MessageType type, std::span<const std::byte> payload,
                                  Deadline deadline) {
  const Header header{static_cast<uint32_t>(type), static_cast<uint32_t>(payload.size())};
  std::vector<std::byte> message;
  Append(&message, std::as_bytes(std::span<const Header, 1>(&header, 1)));
  Append(&message, payload);
  const Sha256Digest code = CodeOf(end_, sent_count_++, message);
  Append(&message, code);
  return SendAll(fd(), message, deadline);
}

absl::StatusOr<std::optional<Message>> Channel::TryReceive() {
  size_t needed_bytes = sizeof(Header);
  Header header;
  while (true) {
    if (received_.size() >= sizeof(Header)) {
      std::memcpy(&header, received_.data(), sizeof(header));
      if (header.payload_bytes > kPayloadBytesMax) {
        return absl::DataLossError(absl::StrFormat("a message of %d bytes, at most %d are expected",
                                                   header.payload_bytes, kPayloadBytesMax));
      }
      needed_bytes = sizeof(Header) + header.payload_bytes + kSha256Bytes;
    }
    if (received_.size() == needed_bytes) break;
    const size_t have_bytes = received_.size();
    received_.resize(needed_bytes);
    const absl::StatusOr<size_t> found =
        ReceiveSome(fd(), std::span(received_).subspan(have_bytes));
    received_.resize(have_bytes + (found.ok() ? *found : 0));
    RETURN_IF_ERROR(found.status());
    if (*found == 0) return std::optional<Message>();
  }
  const auto header_and_payload = std::span(received_).first(sizeof(Header) + header.payload_bytes);
  Sha256Digest code;
  std::memcpy(code.data(), &received_[header_and_payload.size()], code.size());
  const End sender = end_ == End::kConnecting ? End::kListening : End::kConnecting;
  if (!EqualInConstantTime(code, CodeOf(sender, received_count_++, header_and_payload))) {
    return absl::DataLossError("a message whose authentication code is wrong");
  }
  Message message{static_cast<MessageType>(header.type),
                  {received_.begin() + sizeof(Header),
                   received_.begin() + static_cast<std::ptrdiff_t>(header_and_payload.size())}};
  received_.clear();
  return message;
}

absl::StatusOr<Message> Channel::Receive(Deadline deadline) {
  while (true) {
    ASSIGN_OR_RETURN(std::optional<Message> message, TryReceive());
    if (message.has_value()) return *std::move(message);
    if (deadline.passed()) return absl::DeadlineExceededError("no message within the deadline");
    pollfd entry{fd(), POLLIN, 0};
    if (poll(&entry, 1, deadline.PollMilliseconds()) < 0 && errno != EINTR) {
      return absl::UnavailableError(absl::StrFormat("poll: errno %d", errno));
    }
  }
}

}  // namespace holdfast::preflight
