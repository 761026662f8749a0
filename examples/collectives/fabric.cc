#include "examples/collectives/fabric.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "examples/collectives/status_macros.h"

namespace collectives {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint16_t kMasterPortTries = 8;
// How long a stranger may stay silent before its connection is dropped.
constexpr std::chrono::seconds kHelloTimeout{2};
// Links whose hello is not complete. At this number no more are accepted until one is done.
constexpr size_t kPendingLinksMax = 256;

Deadline After(absl::Duration duration) {
  return Clock::now() + absl::ToChronoNanoseconds(std::min(duration, absl::Hours(24 * 365)));
}

template <typename T>
std::span<const std::byte> BytesOf(const T& value) {
  return std::as_bytes(std::span(&value, 1));
}
template <typename T>
std::span<std::byte> WritableBytesOf(T& value) {
  return std::as_writable_bytes(std::span(&value, 1));
}

// Receives more of a fixed-size struct. False: the connection has ended.
template <typename T>
bool ReceivePart(const Socket& socket, T& value, size_t& done_bytes) {
  const std::span<std::byte> rest = WritableBytesOf(value).subspan(done_bytes);
  const ssize_t received = recv(socket.fd(), rest.data(), rest.size(), 0);
  if (received == 0) return false;
  if (received < 0) return errno == EAGAIN || errno == EINTR;
  done_bytes += static_cast<size_t>(received);
  return true;
}

// A member that gave up waiting for an answer has closed this connection and knocks again.
bool IsClosed(const Socket& socket) {
  std::byte byte{};
  return recv(socket.fd(), &byte, 1, MSG_PEEK) == 0;
}

}  // namespace

uint64_t HashOf(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return hash;
}

Fabric::Fabric(Options options) : options_(std::move(options)) {}

absl::StatusOr<std::unique_ptr<Fabric>> Fabric::Create(Options options) {
  std::unique_ptr<Fabric> fabric(new Fabric(std::move(options)));
  RETURN_IF_ERROR(fabric->Rendezvous());
  fabric->thread_ = std::thread([raw = fabric.get()] { raw->Run(); });
  return fabric;
}

Fabric::~Fabric() {
  {
    MutexLock lock(mutex_);
    stop_ = true;
  }
  wake_.Signal();
  if (thread_.joinable()) thread_.join();
}

ControlMessage Fabric::Message(ControlMessage::Kind kind) const {
  ControlMessage message;
  message.kind = kind;
  message.token = token_hash();
  message.rank = options_.rank;
  message.world_size = options_.world_size;
  message.address = peers_[options_.rank].address;
  message.port = peers_[options_.rank].port;
  return message;
}

absl::Status Fabric::Rendezvous() {
  Socket given_listener(std::exchange(options_.master_listener_fd, -1));
  const Deadline deadline = After(options_.rendezvous_timeout);
  ASSIGN_OR_RETURN(const uint32_t own_address, ResolveAddress(options_.bind_address));
  ASSIGN_OR_RETURN(listener_, Listen({own_address, 0}));
  peers_.resize(options_.world_size);
  ASSIGN_OR_RETURN(peers_[options_.rank], LocalEndpoint(listener_));
  if (options_.world_size == 1) return absl::OkStatus();
  if (options_.rank != 0) return JoinMaster(deadline);
  if (given_listener.is_open()) return GatherPeers(std::move(given_listener), deadline);
  ASSIGN_OR_RETURN(const uint32_t master, ResolveAddress(options_.master_address));
  absl::Status failure = absl::OkStatus();
  for (uint16_t i = 0; i < kMasterPortTries; ++i) {
    const Endpoint at{master, static_cast<uint16_t>(options_.master_port + i)};
    absl::StatusOr<Socket> listener = Listen(at);
    if (listener.ok()) return GatherPeers(*std::move(listener), deadline);
    if (i == 0) failure = listener.status();
  }
  return failure;
}

absl::Status Fabric::GatherPeers(Socket listener, Deadline deadline) {
  while (controls_.size() + 1 < options_.world_size) {
    pollfd entry{listener.fd(), POLLIN, 0};
    const int ready = poll(&entry, 1, PollMilliseconds(deadline));
    if (ready < 0 && errno != EINTR) {
      return absl::InternalError(absl::StrCat("poll: ", std::strerror(errno)));
    }
    if (ready > 0) {
      ASSIGN_OR_RETURN(Socket socket, Accept(listener));
      if (socket.is_open()) RETURN_IF_ERROR(Welcome(std::move(socket), deadline));
    }
    if (Clock::now() >= deadline) {
      return absl::DeadlineExceededError(
          absl::StrFormat("rendezvous: %d of %d ranks came in %s", controls_.size() + 1,
                          options_.world_size, FormatDuration(options_.rendezvous_timeout)));
    }
  }
  for (const Control& control : controls_) {
    for (uint32_t rank = 0; rank < options_.world_size; ++rank) {
      ControlMessage peer = Message(ControlMessage::Kind::kPeer);
      peer.rank = rank;
      peer.address = peers_[rank].address;
      peer.port = peers_[rank].port;
      RETURN_IF_ERROR(SendAll(control.socket, BytesOf(peer), deadline));
    }
  }
  return absl::OkStatus();
}

// Strangers are dropped, members that cannot be are refused with a reason, and a rank that comes a
// second time is an error here too: one of the two was started by mistake.
absl::Status Fabric::Welcome(Socket socket, Deadline deadline) {
  ControlMessage hello;
  const Deadline hello_deadline = std::min<Deadline>(deadline, Clock::now() + kHelloTimeout);
  if (!ReceiveAll(socket, WritableBytesOf(hello), hello_deadline).ok() ||
      hello.magic != kWireMagic || hello.kind != ControlMessage::Kind::kHello) {
    return absl::OkStatus();
  }
  std::erase_if(controls_, [](const Control& control) { return IsClosed(control.socket); });
  ControlMessage answer = Message(ControlMessage::Kind::kRefused);
  const bool twice = std::any_of(controls_.begin(), controls_.end(), [&](const Control& control) {
    return control.rank == hello.rank;
  });
  if (hello.token != token_hash()) {
    answer.rank = static_cast<uint32_t>(RefusalReason::kToken);
  } else if (hello.world_size != options_.world_size || hello.rank >= options_.world_size) {
    answer.rank = static_cast<uint32_t>(RefusalReason::kWorldSize);
  } else if (twice || hello.rank == 0) {
    answer.rank = static_cast<uint32_t>(RefusalReason::kRankTwice);
  } else {
    answer.kind = ControlMessage::Kind::kWelcome;
  }
  const absl::Status sent = SendAll(socket, BytesOf(answer), hello_deadline);
  if (!sent.ok()) return absl::OkStatus();  // gone already; it may knock again
  if (answer.kind == ControlMessage::Kind::kWelcome) {
    peers_[hello.rank] = {hello.address, static_cast<uint16_t>(hello.port)};
    controls_.push_back({hello.rank, std::move(socket), {}, 0});
    return absl::OkStatus();
  }
  if (answer.rank == static_cast<uint32_t>(RefusalReason::kRankTwice)) {
    return absl::AlreadyExistsError(absl::StrFormat("rank %d came twice", hello.rank));
  }
  return absl::OkStatus();
}

// A socket on which rank 0 has said welcome. kNotFound: this is not our rank 0.
absl::StatusOr<Socket> Fabric::KnockAt(const Endpoint& master, Deadline deadline) {
  const Deadline answer_deadline = std::min<Deadline>(deadline, Clock::now() + kHelloTimeout);
  absl::StatusOr<Socket> socket = BeginConnect(master, peers_[options_.rank].address);
  const ControlMessage hello = Message(ControlMessage::Kind::kHello);
  ControlMessage answer;
  if (!socket.ok() || !SendAll(*socket, BytesOf(hello), answer_deadline).ok() ||
      !ReceiveAll(*socket, WritableBytesOf(answer), answer_deadline).ok() ||
      answer.magic != kWireMagic) {
    return absl::NotFoundError(absl::StrCat("no rank 0 at ", ToString(master)));
  }
  if (answer.kind == ControlMessage::Kind::kWelcome) return socket;
  switch (static_cast<RefusalReason>(answer.rank)) {
    case RefusalReason::kWorldSize:
      return absl::InvalidArgumentError(absl::StrFormat("rank 0 has world size %d, rank %d has %d",
                                                        answer.world_size, options_.rank,
                                                        options_.world_size));
    case RefusalReason::kRankTwice:
      return absl::AlreadyExistsError(absl::StrFormat("rank %d has joined already", options_.rank));
    case RefusalReason::kToken:
      break;
  }
  return absl::NotFoundError(absl::StrCat("another job listens at ", ToString(master)));
}

absl::Status Fabric::JoinMaster(Deadline deadline) {
  ASSIGN_OR_RETURN(const uint32_t master, ResolveAddress(options_.master_address));
  while (true) {
    for (uint16_t i = 0; i < kMasterPortTries; ++i) {
      const Endpoint at{master, static_cast<uint16_t>(options_.master_port + i)};
      absl::StatusOr<Socket> socket = KnockAt(at, deadline);
      if (socket.ok()) {
        RETURN_IF_ERROR(ReceivePeers(*socket, deadline));
        controls_.push_back({0, *std::move(socket), {}, 0});
        return absl::OkStatus();
      }
      if (!absl::IsNotFound(socket.status())) return socket.status();
    }
    if (Clock::now() >= deadline) {
      return absl::DeadlineExceededError(
          absl::StrFormat("rendezvous: no rank 0 at %s (and the %d ports after it) within %s",
                          ToString({master, options_.master_port}), kMasterPortTries - 1,
                          FormatDuration(options_.rendezvous_timeout)));
    }
    // Rank 0 may not have started yet.
    static_cast<void>(poll(nullptr, 0, 20));
  }
}

absl::Status Fabric::ReceivePeers(const Socket& socket, Deadline deadline) {
  for (uint32_t rank = 0; rank < options_.world_size; ++rank) {
    ControlMessage peer;
    if (absl::Status status = ReceiveAll(socket, WritableBytesOf(peer), deadline); !status.ok()) {
      return absl::Status(status.code(), absl::StrCat("rendezvous: waiting for the other ranks: ",
                                                      std::string(status.message())));
    }
    if (peer.kind != ControlMessage::Kind::kPeer || peer.rank >= options_.world_size) {
      return absl::InternalError("rendezvous: rank 0 sent something else than its list of ranks");
    }
    peers_[peer.rank] = {peer.address, static_cast<uint16_t>(peer.port)};
  }
  return absl::OkStatus();
}

absl::StatusOr<uint32_t> Fabric::Attach(const std::string& name, const WakeEvent* wake) {
  MutexLock lock(mutex_);
  if (!attached_.emplace(name, wake).second) {
    return absl::AlreadyExistsError(absl::StrFormat("communicator '%s' exists", name));
  }
  return generations_[name]++;
}

void Fabric::Detach(const std::string& name) {
  MutexLock lock(mutex_);
  attached_.erase(name);
  const uint32_t next_generation = generations_[name];
  std::erase_if(arrived_, [&](const auto& entry) {
    return entry.first.name == name && entry.first.generation < next_generation;
  });
}

std::optional<Fabric::Link> Fabric::TakeLink(const LinkKey& key) {
  MutexLock lock(mutex_);
  const auto found = arrived_.find(key);
  if (found == arrived_.end()) return std::nullopt;
  Link link = std::move(found->second);
  arrived_.erase(found);
  return link;
}

std::vector<uint32_t> Fabric::Lost() const {
  MutexLock lock(mutex_);
  return lost_;
}

bool Fabric::HasLeft(uint32_t rank) const {
  MutexLock lock(mutex_);
  return left_.contains(rank);
}

void Fabric::Run() {
  while (true) {
    std::vector<pollfd> entries;
    entries.push_back({wake_.fd(), POLLIN, 0});
    const bool accepts = pending_.size() < kPendingLinksMax;
    entries.push_back({accepts ? listener_.fd() : -1, POLLIN, 0});
    for (const Control& control : controls_) entries.push_back({control.socket.fd(), POLLIN, 0});
    Deadline deadline = Clock::now() + std::chrono::hours(1);
    for (const PendingLink& pending : pending_) {
      entries.push_back({pending.socket.fd(), POLLIN, 0});
      deadline = std::min(deadline, pending.deadline);
    }
    if (poll(entries.data(), entries.size(), PollMilliseconds(deadline)) < 0) continue;  // EINTR
    wake_.Drain();
    {
      MutexLock lock(mutex_);
      if (stop_) break;
    }
    const Deadline now = Clock::now();
    for (Control& control : controls_) {
      if (!ReadControl(control)) control.socket.Close();
    }
    std::erase_if(controls_, [](const Control& control) { return !control.socket.is_open(); });
    std::erase_if(pending_, [&](PendingLink& pending) {
      return !ReadPending(pending) || pending.deadline <= now;
    });
    if (accepts) AcceptLinks();
  }
  TellOthers(ControlMessage::Kind::kLeaving, options_.rank);
}

void Fabric::AcceptLinks() {
  while (pending_.size() < kPendingLinksMax) {
    absl::StatusOr<Socket> socket = Accept(listener_);
    // Out of descriptors, for example: the connection stays in the kernel's queue.
    if (!socket.ok() || !socket->is_open()) return;
    pending_.push_back({*std::move(socket), Clock::now() + kHelloTimeout, {}, 0});
    if (!ReadPending(pending_.back())) pending_.pop_back();
  }
}

bool Fabric::ReadPending(PendingLink& pending) {
  if (!ReceivePart(pending.socket, pending.hello, pending.done_bytes)) return false;
  const LinkHello& hello = pending.hello;
  if (pending.done_bytes < sizeof(hello)) return true;
  if (hello.magic != kWireMagic || hello.token != token_hash() ||
      hello.name[kCommunicatorNameBytesMax] != '\0') {
    return false;
  }
  MutexLock lock(mutex_);
  const LinkKey key{hello.name, hello.generation, hello.channel, hello.from_rank};
  const auto known = generations_.find(key.name);
  const uint32_t made = known == generations_.end() ? 0 : known->second;
  const uint32_t over = attached_.contains(key.name) ? made - 1 : made;
  // Of a communicator that is gone here: the sender shall see it rather than wait.
  if (key.generation < over) return false;
  arrived_.insert_or_assign(key, Link{std::move(pending.socket), hello.ranks_hash});
  if (const auto found = attached_.find(key.name); found != attached_.end()) {
    found->second->Signal();
  }
  return false;
}

bool Fabric::ReadControl(Control& control) {
  if (!ReceivePart(control.socket, control.message, control.done_bytes)) {
    if (!HasLeft(control.rank)) RecordLoss(control.rank);
    return false;
  }
  if (control.done_bytes == sizeof(control.message)) {
    HandleControl(control);
    control.done_bytes = 0;
  }
  return true;
}

void Fabric::HandleControl(const Control& control) {
  const ControlMessage& message = control.message;
  if (message.kind == ControlMessage::Kind::kLeaving) RecordLeft(message.rank);
  if (message.kind == ControlMessage::Kind::kLost) RecordLoss(message.rank);
}

void Fabric::RecordLoss(uint32_t rank) {
  {
    MutexLock lock(mutex_);
    if (std::find(lost_.begin(), lost_.end(), rank) != lost_.end()) return;
    lost_.push_back(rank);
  }
  any_gone_.store(true, std::memory_order_release);
  WakeAll();
  if (options_.rank == 0) TellOthers(ControlMessage::Kind::kLost, rank);
}

void Fabric::RecordLeft(uint32_t rank) {
  {
    MutexLock lock(mutex_);
    left_.insert(rank);
  }
  any_gone_.store(true, std::memory_order_release);
  WakeAll();
  if (options_.rank == 0) TellOthers(ControlMessage::Kind::kLeaving, rank);
}

void Fabric::TellOthers(ControlMessage::Kind kind, uint32_t rank) {
  ControlMessage message = Message(kind);
  message.rank = rank;
  for (const Control& control : controls_) {
    // A rank that cannot be told is being lost itself, which its connection will show.
    static_cast<void>(
        SendAll(control.socket, BytesOf(message), Clock::now() + std::chrono::seconds(1)));
  }
}

void Fabric::WakeAll() {
  MutexLock lock(mutex_);
  for (const auto& [name, wake] : attached_) wake->Signal();
}

}  // namespace collectives
