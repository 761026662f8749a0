// Sockets and frames of the collectives: what goes over TCP.
//
// Neighbours: link.h (how the frames are moved without blocking), fabric.h (who is where, who is
// lost), connection.h (what the frames mean).
//
// A link is one TCP connection with one direction of data. It opens with one LinkHello; then come
// chunks, each behind a FrameHeader. The receiver drives it: a chunk is sent only once the receiver
// has a place for it, which it says in the reverse direction with a LinkCredit (clear to send).
// Integers are little-endian, as on x86.
#ifndef HOLDFAST_EXAMPLES_COLLECTIVES_WIRE_H_
#define HOLDFAST_EXAMPLES_COLLECTIVES_WIRE_H_

#include <atomic>
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

// Wakes a thread that polls. Signals until the next Drain() are one. What was stored before a
// Signal() is seen after the Drain() that takes it.
// Threads: any may call Signal(); one drains.
class WakeEvent {
 public:
  WakeEvent();
  int fd() const { return socket_.fd(); }
  void Signal() const;
  void Drain() const;

 private:
  Socket socket_;
  mutable std::atomic<bool> is_signalled_{false};
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

inline constexpr uint32_t kWireMagic = 0x324c4f43;  // "COL2"
inline constexpr size_t kCommunicatorNameBytesMax = 63;

struct LinkHello {
  uint32_t magic = kWireMagic;
  uint32_t channel = 0;
  uint64_t token = 0;       // of the job's attempt: strangers are refused
  uint64_t ranks_hash = 0;  // of the communicator's list of ranks and of its rings, in order
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
  kAllToAll = 7,
};
const char* Name(OperationKind kind);

struct FrameHeader {
  uint32_t magic = kWireMagic;
  OperationKind kind = OperationKind::kAllReduce;
  uint16_t step = 0;           // of the operation's program
  uint64_t sequence = 0;       // of the operation: per communicator, or per link for kSend
  uint64_t message_bytes = 0;  // of all chunks of this step
  uint64_t offset_bytes = 0;   // of this chunk among them
  uint32_t payload_bytes = 0;
  uint32_t reserved = 0;
};
static_assert(sizeof(FrameHeader) == 40);

// Chunks of a link that may be under way at once, as NCCL's NCCL_STEPS.
inline constexpr uint32_t kCredits = 8;

// What a receiver returns, as totals since the link was made, so that of several only the last
// counts. `posted` is never more than kCredits ahead of what has been consumed.
struct LinkCredit {
  uint64_t posted = 0;   // chunks that there is, or was, a place for
  uint64_t arrived = 0;  // chunks that have arrived: what tells the sender that a send is complete
};
static_assert(sizeof(LinkCredit) == 16);

}  // namespace collectives

#endif  // HOLDFAST_EXAMPLES_COLLECTIVES_WIRE_H_
