#include "preflight/handshake.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <span>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/random_bits.h"
#include "base/status_macros.h"

namespace holdfast::preflight {
namespace {

constexpr int kBacklog = 512;

Nonce NewNonce() {
  Nonce nonce;
  for (size_t at = 0; at < nonce.size(); at += sizeof(uint64_t)) {
    const uint64_t bits = RandomBits();
    std::memcpy(&nonce[at], &bits, sizeof(bits));
  }
  return nonce;
}

template <typename T>
std::span<const std::byte> BytesOf(const T& value) {
  return std::as_bytes(std::span<const T, 1>(&value, 1));
}

template <typename T>
std::span<std::byte> WritableBytesOf(T& value) {
  return std::as_writable_bytes(std::span<T, 1>(&value, 1));
}

// All inputs have fixed sizes but `purpose`, which ends in a zero byte: no two of them give the
// same bytes.
Sha256Digest CodeOf(const std::string& token, std::string_view purpose, const Nonce& greeting_nonce,
                    const Hello& hello, uint32_t answer) {
  Hello unsigned_hello = hello;
  unsigned_hello.code = {};
  std::string message = absl::StrFormat("holdfast preflight %s", purpose);
  message.push_back('\0');
  const auto append = [&message](std::span<const std::byte> bytes) {
    message.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  };
  append(greeting_nonce);
  append(BytesOf(unsigned_hello));
  append(BytesOf(answer));
  return HmacSha256(std::as_bytes(std::span(token)), std::as_bytes(std::span(message)));
}

Sha256Digest HelloCode(const std::string& token, const Nonce& greeting_nonce, const Hello& hello) {
  return CodeOf(token, "hello", greeting_nonce, hello, 0);
}
Sha256Digest ReplyCode(const std::string& token, const Nonce& greeting_nonce, const Hello& hello,
                       Answer answer) {
  return CodeOf(token, "reply", greeting_nonce, hello, static_cast<uint32_t>(answer));
}
Sha256Digest KeyOf(const std::string& token, const Nonce& greeting_nonce, const Hello& hello) {
  return CodeOf(token, "key", greeting_nonce, hello, 0);
}

std::string AnswerText(Answer answer) {
  switch (answer) {
    case Answer::kWelcome:
      return "welcome";
    case Answer::kWrongToken:
      return "another token (HOLDFAST_PREFLIGHT_TOKEN)";
    case Answer::kWrongNodeCount:
      return "another number of nodes (WORLD_SIZE)";
    case Answer::kTaken:
      return "a node of this rank has come already";
    case Answer::kNotNow:
      return "not expected now";
  }
  return absl::StrFormat("unknown answer %d", static_cast<uint32_t>(answer));
}

}  // namespace

absl::StatusOr<Connection> Connect(const Identity& self, uint32_t to_rank, const Endpoint& endpoint,
                                   Line line, uint32_t round, Deadline deadline) {
  const auto stranger = [&](std::string_view why) {
    return absl::UnauthenticatedError(absl::StrFormat("at %s: %s", endpoint.ToString(), why));
  };
  ASSIGN_OR_RETURN(UniqueFd fd, ConnectTcp(endpoint, deadline));
  Greeting greeting;
  RETURN_IF_ERROR(ReceiveAll(fd.get(), WritableBytesOf(greeting), deadline));
  if (greeting.magic != kMagic) return stranger("somebody who does not speak this protocol");

  Hello hello{.line = line,
              .round = round,
              .from_rank = self.rank,
              .to_rank = to_rank,
              .node_count = self.node_count,
              .nonce = NewNonce()};
  hello.code = HelloCode(self.token, greeting.nonce, hello);
  RETURN_IF_ERROR(SendAll(fd.get(), BytesOf(hello), deadline));

  Reply reply;
  RETURN_IF_ERROR(ReceiveAll(fd.get(), WritableBytesOf(reply), deadline));
  if (reply.magic != kMagic) return stranger("somebody who does not speak this protocol");
  if (reply.answer == Answer::kWrongToken) {
    return stranger("refused: it has another token (HOLDFAST_PREFLIGHT_TOKEN)");
  }
  if (!EqualInConstantTime(reply.code,
                           ReplyCode(self.token, greeting.nonce, hello, reply.answer))) {
    return stranger("somebody who does not know the token");
  }
  if (reply.answer != Answer::kWelcome) {
    return absl::FailedPreconditionError(absl::StrFormat("rank %d at %s refused rank %d: %s",
                                                         to_rank, endpoint.ToString(), self.rank,
                                                         AnswerText(reply.answer)));
  }
  return Connection{.fd = std::move(fd),
                    .remote = endpoint,
                    .remote_rank = to_rank,
                    .line = line,
                    .round = round,
                    .key = KeyOf(self.token, greeting.nonce, hello)};
}

std::string AddressWithoutPort(const Endpoint& endpoint) {
  const std::string text = endpoint.ToString();
  return text.substr(0, text.rfind(':'));
}

absl::StatusOr<std::unique_ptr<Listener>> Listener::Create(const Identity& self,
                                                           const Endpoint& at) {
  ASSIGN_OR_RETURN(UniqueFd fd, ListenTcp(at, kBacklog));
  ASSIGN_OR_RETURN(const Endpoint endpoint, LocalEndpoint(fd.get()));
  return std::unique_ptr<Listener>(new Listener(self, std::move(fd), endpoint));
}

void Listener::AppendPollFds(std::vector<pollfd>* entries) const {
  entries->push_back({fd_.get(), POLLIN, 0});
  for (const Pending& pending : pending_) entries->push_back({pending.fd.get(), POLLIN, 0});
}

absl::StatusOr<std::vector<Connection>> Listener::Pump(const Judge& judge) {
  RETURN_IF_ERROR(TakeNew());
  std::vector<Connection> welcomed;
  std::deque<Pending> kept;
  for (Pending& pending : pending_) {
    if (!Advance(pending, judge, &welcomed)) kept.push_back(std::move(pending));
  }
  pending_ = std::move(kept);
  return welcomed;
}

absl::StatusOr<Connection> Listener::Accept(const Judge& judge, int interrupt_fd,
                                            Deadline deadline) {
  while (true) {
    // One at a time: `judge` may welcome a second one only after this call.
    bool taken = false;
    ASSIGN_OR_RETURN(std::vector<Connection> welcomed, Pump([&](const Hello& hello) {
                       if (taken) return Answer::kNotNow;
                       const Answer answer = judge(hello);
                       taken = answer == Answer::kWelcome;
                       return answer;
                     }));
    if (!welcomed.empty()) return std::move(welcomed.front());
    if (deadline.passed()) return absl::DeadlineExceededError("nobody came within the deadline");
    std::vector<pollfd> entries = {{interrupt_fd, POLLIN, 0}};
    AppendPollFds(&entries);
    const Deadline next = deadline.Earlier(Deadline::After(kHelloPatience));
    if (poll(entries.data(), entries.size(), next.PollMilliseconds()) < 0 && errno != EINTR) {
      return absl::UnavailableError(absl::StrFormat("poll: errno %d", errno));
    }
    if (entries[0].revents != 0) return absl::AbortedError("interrupted");
  }
}

absl::Status Listener::TakeNew() {
  while (true) {
    absl::StatusOr<UniqueFd> fd = AcceptTcp(fd_.get());
    // Without descriptors strangers make room for whoever comes next.
    if (absl::IsResourceExhausted(fd.status()) && !pending_.empty()) {
      Refuse(pending_.front().remote, "silent while others came");
      pending_.pop_front();
      continue;
    }
    RETURN_IF_ERROR(fd.status());
    if (!*fd) return absl::OkStatus();
    const absl::StatusOr<Endpoint> remote = RemoteEndpoint(fd->get());
    if (!remote.ok()) continue;  // it has gone already
    if (pending_.size() == kPendingMax) {
      Refuse(pending_.front().remote, "silent while others came");
      pending_.pop_front();
    }
    const Greeting greeting{.nonce = NewNonce()};
    const absl::StatusOr<size_t> sent = SendSome(fd->get(), BytesOf(greeting));
    // A new connection has room for so little.
    if (!sent.ok() || *sent != sizeof(greeting)) continue;
    pending_.push_back({.fd = *std::move(fd),
                        .remote = *remote,
                        .nonce = greeting.nonce,
                        .deadline = Deadline::After(kHelloPatience)});
  }
}

bool Listener::Advance(Pending& pending, const Judge& judge, std::vector<Connection>* welcomed) {
  while (pending.hello_bytes < pending.hello.size()) {
    const absl::StatusOr<size_t> received =
        ReceiveSome(pending.fd.get(), std::span(pending.hello).subspan(pending.hello_bytes));
    if (!received.ok()) {
      // A node that looks for rank 0 on several ports does so too; only a beginning is suspicious.
      if (pending.hello_bytes > 0) Refuse(pending.remote, "broke off in the middle");
      return true;
    }
    pending.hello_bytes += *received;
    const size_t magic_bytes = std::min(pending.hello_bytes, kMagic.size());
    if (std::memcmp(pending.hello.data(), kMagic.data(), magic_bytes) != 0) {
      Refuse(pending.remote, "does not speak this protocol");
      return true;
    }
    if (*received > 0) continue;
    if (!pending.deadline.passed()) return false;
    Refuse(pending.remote, "silent");
    return true;
  }
  if (std::optional<Connection> connection = Examine(pending, judge)) {
    welcomed->push_back(*std::move(connection));
  }
  return true;
}

std::optional<Connection> Listener::Examine(Pending& pending, const Judge& judge) {
  Hello hello;
  std::memcpy(&hello, pending.hello.data(), sizeof(hello));
  Reply reply;
  if (!EqualInConstantTime(hello.code, HelloCode(self_.token, pending.nonce, hello))) {
    reply.answer = Answer::kWrongToken;
  } else if (hello.node_count != self_.node_count || hello.from_rank >= self_.node_count) {
    reply.answer = Answer::kWrongNodeCount;
  } else if (hello.to_rank != self_.rank) {
    reply.answer = Answer::kNotNow;
  } else {
    reply.answer = judge(hello);
  }
  if (reply.answer != Answer::kWrongToken) {
    reply.code = ReplyCode(self_.token, pending.nonce, hello, reply.answer);
  }
  const absl::StatusOr<size_t> sent = SendSome(pending.fd.get(), BytesOf(reply));
  if (reply.answer != Answer::kWelcome) {
    Refuse(pending.remote, absl::StrFormat("says that it is rank %d, %s", hello.from_rank,
                                           AnswerText(reply.answer)));
    return std::nullopt;
  }
  if (!sent.ok() || *sent != sizeof(reply)) {
    Refuse(pending.remote, absl::StrFormat("rank %d broke off", hello.from_rank));
    return std::nullopt;
  }
  return Connection{.fd = std::move(pending.fd),
                    .remote = pending.remote,
                    .remote_rank = hello.from_rank,
                    .line = hello.line,
                    .round = hello.round,
                    .key = KeyOf(self_.token, pending.nonce, hello)};
}

void Listener::Refuse(const Endpoint& remote, std::string reason) {
  ++refusal_count_;
  const std::string address = AddressWithoutPort(remote);
  for (Refusal& refusal : refusals_) {
    if (refusal.address == address && refusal.reason == reason) {
      ++refusal.count;
      return;
    }
  }
  if (refusals_.size() < kRefusalsMax) refusals_.push_back({address, std::move(reason), 1});
}

}  // namespace holdfast::preflight
