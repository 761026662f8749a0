// Messages on a connection, each with an authentication code under the connection's own key that
// covers its direction and number too: nothing can be put in, left out, changed or sent back.
//
//   u32 type, u32 payload_bytes, payload, HMAC-SHA256(key, direction, number, type, payload)
#ifndef HOLDFAST_PREFLIGHT_CHANNEL_H_
#define HOLDFAST_PREFLIGHT_CHANNEL_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_format.h"
#include "io/tcp.h"
#include "preflight/handshake.h"

namespace holdfast::preflight {

enum class MessageType : uint32_t;  // messages.h

struct Message {
  MessageType type{};
  std::vector<std::byte> payload;

  // The payload as a T. kInvalidArgument if it has another size.
  template <typename T>
  absl::StatusOr<T> As() const {
    static_assert(std::is_trivially_copyable_v<T>);
    if (payload.size() != sizeof(T)) {
      return absl::InvalidArgumentError(
          absl::StrFormat("message of type %d: expected %d bytes, found %d",
                          static_cast<uint32_t>(type), sizeof(T), payload.size()));
    }
    T value;
    std::memcpy(&value, payload.data(), sizeof(T));
    return value;
  }
};

// Threads: one.
class Channel {
 public:
  static constexpr size_t kPayloadBytesMax = 4096;

  enum class End { kConnecting, kListening };
  Channel(Connection connection, End end);

  int fd() const { return connection_.fd.get(); }
  const Connection& connection() const { return connection_; }

  // Errors: kUnavailable (the connection is gone), kDeadlineExceeded.
  template <typename T>
  absl::Status Send(MessageType type, const T& value, Deadline deadline) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kPayloadBytesMax);
    return SendPayload(type, std::as_bytes(std::span<const T, 1>(&value, 1)), deadline);
  }

  // The next message, if it is there; never waits. Errors: kUnavailable (the connection is gone),
  // kDataLoss (not a message of the other end; the connection is of no use any more).
  absl::StatusOr<std::optional<Message>> TryReceive();
  // Waits for it. Errors besides: kDeadlineExceeded.
  absl::StatusOr<Message> Receive(Deadline deadline);

 private:
  absl::Status SendPayload(MessageType type, std::span<const std::byte> payload, Deadline deadline);
  Sha256Digest CodeOf(End sender, uint64_t number, std::span<const std::byte> header_and_payload);

  const Connection connection_;
  const End end_;
  uint64_t sent_count_ = 0;
  uint64_t received_count_ = 0;
  std::vector<std::byte> received_;  // the beginning of the next message
};

}  // namespace holdfast::preflight

#endif  // HOLDFAST_PREFLIGHT_CHANNEL_H_
