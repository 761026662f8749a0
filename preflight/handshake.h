// How two processes of one preflight find out that they are that, before either believes a word of
// the other: challenge and response over a token that both know and that is never sent.
//
//   the listening end   Greeting  magic, a nonce of its own
//   the connecting end  Hello     who it is, whom it wants, for what; a nonce of its own;
//                                 HMAC-SHA256(token, "hello", the greeting's nonce, the rest of
//                                 Hello)
//   the listening end   Reply     its answer, and HMAC(token, "reply", both nonces, Hello, answer)
//
// The listening end speaks first, so that nothing is ever sent to a stranger's service that happens
// to have the port (torchrun keeps a store of its own at MASTER_PORT). Nothing can be replayed, for
// every nonce is new; HMAC(token, "key", ...) authenticates what follows on the connection
// (channel.h), so that who relays a handshake cannot put words in between. What is sent is not
// secret. A token that can be guessed can be found out by a listening stranger with a fake
// Greeting: it must be long and random, and serve once.
//
// Integers are little-endian, as on x86.
#ifndef HOLDFAST_PREFLIGHT_HANDSHAKE_H_
#define HOLDFAST_PREFLIGHT_HANDSHAKE_H_

#include <poll.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/sha256.h"
#include "io/tcp.h"
#include "io/unique_fd.h"

namespace holdfast::preflight {

// Who this process is in the job.
struct Identity {
  std::string token;  // the same on all nodes; empty only among processes of one machine
  uint32_t rank = 0;
  uint32_t node_count = 1;
};

// What a connection is for. The last four are the legs of a pair (pair.h).
enum class Line : uint32_t {
  kControl = 1,
  kPair = 2,
  kRoundTrips = 3,
  kForward = 4,
  kBackward = 5,
  kBothWays = 6,
};

using Nonce = std::array<std::byte, 32>;
using Magic = std::array<char, 8>;
inline constexpr Magic kMagic = {'H', 'F', 'P', 'R', 'E', '0', '1', '\n'};

struct Greeting {
  Magic magic = kMagic;
  Nonce nonce = {};
};
static_assert(sizeof(Greeting) == 40);

struct Hello {
  Magic magic = kMagic;
  Line line = Line::kControl;
  uint32_t round = 0;
  uint32_t from_rank = 0;
  uint32_t to_rank = 0;
  uint32_t node_count = 0;
  uint32_t reserved = 0;
  Nonce nonce = {};
  Sha256Digest code = {};
};
static_assert(sizeof(Hello) == 96);

enum class Answer : uint32_t {
  kWelcome = 1,
  kWrongToken = 2,  // without a code that could be checked
  kWrongNodeCount = 3,
  kTaken = 4,   // a node of this rank has come already
  kNotNow = 5,  // nobody waits for this rank, line or round here
};

struct Reply {
  Magic magic = kMagic;
  Answer answer = Answer::kWelcome;
  uint32_t reserved = 0;
  Sha256Digest code = {};
};
static_assert(sizeof(Reply) == 48);

// A connection whose other end knows the token.
struct Connection {
  UniqueFd fd;
  Endpoint remote = {};
  uint32_t remote_rank = 0;
  Line line = Line::kControl;
  uint32_t round = 0;
  Sha256Digest key = {};  // of this connection alone
};

// Connects to the node of rank `to_rank` at `endpoint`. Errors: kUnavailable, kDeadlineExceeded
// (nobody there, or somebody silent); kUnauthenticated (somebody who does not speak this protocol
// or does not know the token, or who says that this process's token is wrong); kFailedPrecondition
// (a node of the job refuses; why is named).
absl::StatusOr<Connection> Connect(const Identity& self, uint32_t to_rank, const Endpoint& endpoint,
                                   Line line, uint32_t round, Deadline deadline);

// Who was turned away, and how often.
struct Refusal {
  std::string address;  // without the port
  std::string reason;
  uint32_t count = 0;
};

// A listening socket, and the connections to it whose other end has not proven yet that it knows
// the token. Strangers cost it at most kPendingMax descriptors and kHelloPatience each.
//
// Threads: one.
class Listener {
 public:
  // With more connections the one that has been silent for longest is closed.
  static constexpr size_t kPendingMax = 256;
  static constexpr absl::Duration kHelloPatience = absl::Seconds(5);
  // Of different kinds; more are only counted.
  static constexpr size_t kRefusalsMax = 16;

  // What to say to somebody who knows the token and has this node count.
  using Judge = std::function<Answer(const Hello&)>;

  // At `at`; its port 0: the kernel chooses. Errors: those of ListenTcp.
  static absl::StatusOr<std::unique_ptr<Listener>> Create(const Identity& self, const Endpoint& at);

  const Endpoint& endpoint() const { return endpoint_; }

  // For a poll(2) of the caller: Pump() has work when one of them is readable, and at the latest in
  // kHelloPatience.
  void AppendPollFds(std::vector<pollfd>* entries) const;
  // Takes what has come, never waits. Errors: kResourceExhausted (no descriptors), kUnavailable: of
  // the listening socket itself.
  absl::StatusOr<std::vector<Connection>> Pump(const Judge& judge);
  // The next one whom `judge` welcomes. `interrupt_fd`: gives up with kAborted when it is readable
  // or hung up; -1: none. Errors besides: kDeadlineExceeded.
  absl::StatusOr<Connection> Accept(const Judge& judge, int interrupt_fd, Deadline deadline);

  const std::vector<Refusal>& refusals() const { return refusals_; }
  uint32_t refusal_count() const { return refusal_count_; }

 private:
  struct Pending {
    UniqueFd fd;
    Endpoint remote;
    Nonce nonce = {};
    Deadline deadline;
    std::array<std::byte, sizeof(Hello)> hello = {};
    size_t hello_bytes = 0;
  };

  Listener(const Identity& self, UniqueFd fd, const Endpoint& endpoint)
      : self_(self), fd_(std::move(fd)), endpoint_(endpoint) {}
  absl::Status TakeNew();
  // True once this one is to be forgotten: it is welcome (then in `welcomed`), refused or gone.
  bool Advance(Pending& pending, const Judge& judge, std::vector<Connection>* welcomed);
  std::optional<Connection> Examine(Pending& pending, const Judge& judge);
  void Refuse(const Endpoint& remote, std::string reason);

  const Identity self_;
  const UniqueFd fd_;
  const Endpoint endpoint_;
  std::deque<Pending> pending_;
  std::vector<Refusal> refusals_;
  uint32_t refusal_count_ = 0;
};

// Of any address, for Refusal: two connections of one stranger have different ports.
std::string AddressWithoutPort(const Endpoint& endpoint);

}  // namespace holdfast::preflight

#endif  // HOLDFAST_PREFLIGHT_HANDSHAKE_H_
