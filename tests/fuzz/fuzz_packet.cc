// Datagrams of a client: each is nothing, garbage, of another version, or a packet with exactly the
// body that was sent.
#include <sys/socket.h>

#include <algorithm>
#include <cstring>

#include "agent/packet.h"
#include "base/check.h"
#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {
namespace {

template <typename Body>
void ReadAs(const Packet& packet) {
  const absl::StatusOr<Body> body = BodyAs<Body>(packet, 0);
  CHECK(body.ok() == (packet.body.size() == sizeof(Body)));
}

void ReadOpen(const Packet& packet) {
  const absl::StatusOr<abi::OpenRequest> request = BodyAs<abi::OpenRequest>(packet, 0);
  if (!request.ok()) return;
  for (const std::span<const char> field :
       {std::span<const char>(request->job), std::span<const char>(request->attempt_key),
        std::span<const char>(request->root), std::span<const char>(request->restore_from),
        std::span<const char>(request->node)}) {
    const absl::StatusOr<std::string> text = TextField("field", field);
    CHECK(!text.ok() || (text->size() < field.size() && text->find('\0') == std::string::npos));
  }
}

}  // namespace

bool FuzzPacket(Input input) {
  // One byte more than a message may have, so that the limit is passed.
  input = input.first(std::min(input.size(), abi::kMessageBytesMax + 1));
  int ends[2];
  CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
  const UniqueFd sender(ends[0]);
  const UniqueFd receiver(ends[1]);
  CHECK(send(sender.get(), input.data(), input.size(), MSG_NOSIGNAL) ==
        static_cast<ssize_t>(input.size()));
  const Received received = ReceivePacket(receiver.get());
  switch (received.kind) {
    case Received::Kind::kNothing:
      CHECK(false);
      return false;
    case Received::Kind::kEnd:
      CHECK(input.empty());
      return false;
    case Received::Kind::kOtherVersion:
    case Received::Kind::kGarbage:
      CHECK(!received.problem.empty());
      return false;
    case Received::Kind::kPacket:
      break;
  }
  const Packet& packet = received.packet;
  const std::span<const uint8_t> body = input.subspan(sizeof(abi::MessageHeader));
  CHECK(packet.body.size() == body.size() && packet.fds.empty());
  CHECK(body.empty() || std::memcmp(packet.body.data(), body.data(), body.size()) == 0);
  ReadAs<abi::RegisterRequest>(packet);
  ReadAs<abi::RestoreRequest>(packet);
  ReadAs<abi::QueryRequest>(packet);
  ReadAs<abi::WitnessWait>(packet);
  ReadOpen(packet);
  CHECK(ReceivePacket(receiver.get()).kind == Received::Kind::kNothing);
  return true;
}

}  // namespace holdfast::fuzz
