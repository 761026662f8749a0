// One SEQPACKET unix socket to the agent and the messages of hook/abi/messages.h on it.
//
// What it does not do: requests and their replies (link.h).
#ifndef HOLDFAST_HOOK_SOCKET_H_
#define HOLDFAST_HOOK_SOCKET_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>

#include "hook/abi/messages.h"
#include "hook/deadline.h"
#include "hook/error.h"
#include "hook/os.h"

namespace holdfast::hook {

// A message as received: its type, body and descriptors.
struct Message {
  abi::MessageHeader header = {};
  std::array<std::byte, abi::kMessageBytesMax> body;
  std::array<UniqueFd, abi::kMessageFdsMax> fds;
  size_t fd_count = 0;

  // The body as a T. HF_INTERNAL unless it has exactly T's size and `fds` descriptors.
  template <typename T>
  Error Read(T* value, size_t expected_fds, const char* what) const {
    if (header.body_bytes != sizeof(T)) {
      return Error(HF_INTERNAL, "%s from the agent: expected a body of %zu bytes, found %u", what,
                   sizeof(T), header.body_bytes);
    }
    if (fd_count != expected_fds) {
      return Error(HF_INTERNAL, "%s from the agent: expected %zu descriptors, found %zu", what,
                   expected_fds, fd_count);
    }
    std::memcpy(value, body.data(), sizeof(T));
    return Error();
  }
};

// Connects to the socket at `path`, of any length (a sockaddr holds only 107 bytes; longer ones go
// through /proc/self/fd). Errors: HF_NOT_FOUND (no such file), HF_UNAVAILABLE (nobody listens),
// HF_DEADLINE_EXCEEDED (the queue stayed full), HF_PERMISSION_DENIED (another user's), HF_INTERNAL.
Result<UniqueFd> ConnectToAgent(const std::string& path, Deadline deadline);

// Sends and receives whole messages.
//
// Threads: one at a time.
class Channel {
 public:
  // `socket` is a connected SEQPACKET socket; it is made non-blocking.
  explicit Channel(UniqueFd socket);
  int fd() const { return socket_.get(); }

  // Errors: HF_UNAVAILABLE (the peer is gone), HF_DEADLINE_EXCEEDED.
  Error Send(abi::MessageType type, uint32_t request_id, std::span<const std::byte> body,
             std::span<const int> fds, Deadline deadline);

  // Receives one message; waits for it until the deadline. `interrupt_fd`: if it becomes readable,
  // gives up with HF_ABORTED; -1: none. Errors besides: HF_UNAVAILABLE (the peer is gone),
  // HF_DEADLINE_EXCEEDED, HF_INTERNAL (not a message of this protocol).
  Error Receive(Message* message, int interrupt_fd, Deadline deadline);

 private:
  UniqueFd socket_;
};

// `value` as the bytes of a body.
template <typename T>
std::span<const std::byte> BodyOf(const T& value) {
  return std::as_bytes(std::span<const T, 1>(&value, 1));
}

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_SOCKET_H_
