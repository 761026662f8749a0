// One datagram of the local protocol (hook/abi/messages.h) with its descriptors, as the agent
// receives and sends it. Everything received is checked here or in local_server.cc; nothing that a
// client sends can do more than end its own connection.
#ifndef HOLDFAST_AGENT_PACKET_H_
#define HOLDFAST_AGENT_PACKET_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "hook/abi/messages.h"
#include "io/unique_fd.h"

namespace holdfast {

struct Packet {
  abi::MessageType type{};
  uint32_t request_id = 0;
  std::vector<std::byte> body;
  std::vector<UniqueFd> fds;
};

struct Received {
  enum class Kind {
    kNothing,  // nothing waits
    kEnd,      // the peer has closed its end
    kPacket,
    kOtherVersion,  // `packet` has type and request_id only, `problem` both versions
    kGarbage,       // `problem` says what was expected and found
  };
  Kind kind = Kind::kNothing;
  Packet packet;
  std::string problem;
};

// Never waits.
Received ReceivePacket(int socket);

enum class Sent { kYes, kFull, kPeerGone };
// Never waits. kFull: try again when the socket is writable.
Sent SendPacket(int socket, const Packet& packet);

// The reply to a request of this type; 0 if it is none.
abi::MessageType ReplyType(abi::MessageType request);

// The bytes of a body struct.
template <typename T>
std::vector<std::byte> BodyBytes(const T& body) {
  const auto bytes = std::as_bytes(std::span<const T, 1>(&body, 1));
  return {bytes.begin(), bytes.end()};
}

// The body as a T. kInvalidArgument unless it has exactly T's size and `fd_count` descriptors came
// with it.
absl::Status CheckPacket(const Packet& packet, size_t body_bytes, size_t fd_count);
template <typename T>
absl::StatusOr<T> BodyAs(const Packet& packet, size_t fd_count) {
  if (absl::Status checked = CheckPacket(packet, sizeof(T), fd_count); !checked.ok()) {
    return checked;
  }
  T body;
  std::memcpy(&body, packet.body.data(), sizeof(T));
  return body;
}

// A text field of a body. kInvalidArgument if no NUL ends it.
absl::StatusOr<std::string> TextField(const char* name, std::span<const char> field);

abi::ReplyStatus ToReplyStatus(const absl::Status& status);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_PACKET_H_
