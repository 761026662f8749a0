// Sockets and frames of the collectives: what goes over TCP, and how it is sent and received
// without ever blocking a thread outside poll(2).
//
// Neighbours: fabric.h (who is where, who is lost) and communicator.cc (what the frames mean).
//
// A link is one TCP connection with one direction of data. It opens with one LinkHello; then come
// messages, each cut into frames of at most `chunk_bytes` of payload. The reverse direction is not
// used yet: a receiver will return credits on it. Integers are little-endian, as on x86.
#ifndef HOLDFAST_EXAMPLES_COLLECTIVES_WIRE_H_
#define HOLDFAST_EXAMPLES_COLLECTIVES_WIRE_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace collectives {

using Deadline = std::chrono::steady_clock::time_point;

// An IPv4 address and port, both in host byte order.
struct Endpoint {
  uint32_t address = 0;
  uint16_t port = 0;
};
std::string ToString(const Endpoint& endpoint);

// Resolves a name or a dotted address. Errors: kNotFound.
absl::StatusOr<uint32_t> ResolveAddress(const std::string& host);

// Owns a descriptor. Move only; -1 is "none".
class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  ~Socket() { Close(); }
  Socket(Socket&& other) noexcept : fd_(other.Release()) {}
  Socket& operator=(Socket&& other) noexcept;

  int fd() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }
  int Release();
  void Close();

 private:
  int fd_ = -1;
};

// Wakes a thread that polls. Threads: any may call Signal(); one drains.
class WakeEvent {
 public:
  WakeEvent();
  int fd() const { return socket_.fd(); }
  void Signal() const;
  void Drain() const;

 private:
  Socket socket_;
};

// A listening socket, not blocking. Port 0: the kernel chooses. Errors: kUnavailable (in use, ...).
absl::StatusOr<Socket> Listen(const Endpoint& at);
absl::StatusOr<Endpoint> LocalEndpoint(const Socket& socket);

// Begins to connect from the address `from` (port chosen by the kernel); the connection may still
// be on its way, and its failure shows at the first send or receive. Not blocking, no delay (Nagle
// off).
absl::StatusOr<Socket> BeginConnect(const Endpoint& to, uint32_t from);
// Accepts one waiting connection, or returns a closed Socket if there is none.
absl::StatusOr<Socket> Accept(const Socket& listener);

// Sends or receives all of the bytes, waiting in poll(2) up to `deadline`. For the few bytes of the
// rendezvous. Errors: kDeadlineExceeded, kUnavailable (the other end closed, or refused).
absl::Status SendAll(const Socket& socket, std::span<const std::byte> bytes, Deadline deadline);
absl::Status ReceiveAll(const Socket& socket, std::span<std::byte> bytes, Deadline deadline);

// Milliseconds for poll(2) until `deadline`, rounded up, at least 0.
int PollMilliseconds(Deadline deadline);

// What a link is for.
enum class LinkKind : uint32_t { kRing = 1, kPointToPoint = 2 };

inline constexpr uint32_t kWireMagic = 0x314c4f43;  // "COL1"
inline constexpr size_t kCommunicatorNameBytesMax = 63;

struct LinkHello {
  uint32_t magic = kWireMagic;
  LinkKind kind = LinkKind::kRing;
  uint64_t token = 0;       // of the job's attempt: strangers are refused
  uint64_t ranks_hash = 0;  // of the communicator's list of ranks, in order
  uint32_t from_rank = 0;   // global
  uint32_t generation = 0;  // how many communicators of this name the sender has made before
  char name[kCommunicatorNameBytesMax + 1] = {};
};
static_assert(sizeof(LinkHello) == 96);

// Which operation a frame belongs to. A receiver that expects another one has found a bug of the
// program (ranks that disagree), and says which.
enum class OperationKind : uint16_t {
  kAllReduce = 1,
  kReduceScatter = 2,
  kAllGather = 3,
  kBroadcast = 4,
  kBarrier = 5,
  kSend = 6,
};
const char* Name(OperationKind kind);

struct FrameHeader {
  uint32_t magic = kWireMagic;
  OperationKind kind = OperationKind::kAllReduce;
  uint16_t step = 0;           // of the operation's program
  uint64_t sequence = 0;       // of the operation: per communicator, or per link for kSend
  uint64_t message_bytes = 0;  // of all frames of this message
  uint64_t offset_bytes = 0;   // of this frame's payload in the message
  uint32_t payload_bytes = 0;
  uint32_t reserved = 0;
};
static_assert(sizeof(FrameHeader) == 40);

// Whether and how received bytes are joined with those in memory.
enum class Combine { kCopy, kSumInt64, kSumFloat32 };

// The sending end of a link.
//
// Threads: one at a time.
// Lifetime: the bytes given to Start() must live until idle().
class LinkSender {
 public:
  LinkSender(Socket socket, const LinkHello& hello, size_t chunk_bytes);

  int fd() const { return socket_.fd(); }
  bool idle() const { return phase_ == Phase::kIdle; }
  // Precondition: idle(). `header` without the fields of the frame. A message of zero bytes is one
  // frame without payload.
  void Start(const FrameHeader& header, std::span<const std::byte> message);
  // Sends what the socket takes now. Errors: kUnavailable: the link is broken.
  absl::Status Pump();

 private:
  enum class Phase { kIdle, kHello, kHeader, kPayload };
  void BeginFrame(uint64_t offset_bytes);
  std::span<const std::byte> Current() const;

  Socket socket_;
  const LinkHello hello_;
  const size_t chunk_bytes_;
  bool hello_sent_ = false;
  Phase phase_ = Phase::kIdle;
  FrameHeader header_;
  std::span<const std::byte> message_;
  size_t done_bytes_ = 0;  // of what Current() returns
};

// The receiving end of a link, after its hello.
//
// Threads: one at a time.
// Lifetime: the bytes given to Start() must live until idle().
class LinkReceiver {
 public:
  LinkReceiver(Socket socket, size_t chunk_bytes);

  int fd() const { return socket_.fd(); }
  bool idle() const { return !busy_; }
  // Precondition: idle(). The next message must carry `expected` (kind, step, sequence) and have
  // the size of `into`.
  void Start(const FrameHeader& expected, std::span<std::byte> into, Combine combine);
  // Receives what is there now. Errors: kUnavailable (the link is broken), kFailedPrecondition (the
  // peer is in another operation, or in one of another size; both are named).
  absl::Status Pump();

 private:
  absl::StatusOr<size_t> ReceiveSome(std::span<std::byte> into);
  absl::Status CheckHeader() const;
  void FinishFrame();

  Socket socket_;
  const size_t chunk_bytes_;
  bool busy_ = false;
  FrameHeader expected_;
  std::span<std::byte> into_;
  Combine combine_ = Combine::kCopy;
  FrameHeader header_;
  size_t header_done_bytes_ = 0;
  size_t payload_done_bytes_ = 0;
  uint64_t message_done_bytes_ = 0;
  std::vector<std::byte> scratch_;  // one chunk, when bytes are summed
};

}  // namespace collectives

#endif  // HOLDFAST_EXAMPLES_COLLECTIVES_WIRE_H_
