#include "examples/collectives/proxy.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "examples/collectives/status_macros.h"

namespace collectives {
namespace {

using Clock = std::chrono::steady_clock;

// How long a broken link waits for rank 0 to say who was lost first, and a peer that has left for
// the links that it had opened.
constexpr std::chrono::seconds kLossGrace{2};

}  // namespace

void Operation::Finish(absl::Status status) {
  MutexLock lock(mutex_);
  done_ = true;
  status_ = std::move(status);
  finished_.SignalAll();
}

bool Operation::Done() const {
  MutexLock lock(mutex_);
  return done_;
}

absl::Status Operation::Wait() const {
  MutexLock lock(mutex_);
  while (!done_) finished_.Wait(mutex_);
  return status_;
}

Proxy::Proxy(Fabric& fabric, std::string name, std::vector<uint32_t> ranks, RingPlace place)
    : fabric_(fabric), name_(std::move(name)), ranks_(std::move(ranks)), place_(place) {
  peers_.resize(ranks_.size());
  std::string text;
  for (const uint32_t rank : ranks_) absl::StrAppend(&text, rank, ",");
  ranks_hash_ = HashOf(text);
}

absl::StatusOr<std::unique_ptr<Proxy>> Proxy::Create(Fabric& fabric, const std::string& name,
                                                     const std::vector<uint32_t>& ranks) {
  if (name.empty() || name.size() > kCommunicatorNameBytesMax) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "communicator '%s': expected a name of 1 to %d bytes", name, kCommunicatorNameBytesMax));
  }
  std::vector<uint32_t> sorted = ranks;
  std::sort(sorted.begin(), sorted.end());
  const auto own = std::find(ranks.begin(), ranks.end(), fabric.options().rank);
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end() || own == ranks.end() ||
      sorted.back() >= fabric.options().world_size) {
    return absl::InvalidArgumentError(
        absl::StrFormat("communicator '%s': expected different ranks below %d with %d among them",
                        name, fabric.options().world_size, fabric.options().rank));
  }
  std::unique_ptr<Proxy> proxy(
      new Proxy(fabric, name, ranks, {static_cast<size_t>(own - ranks.begin()), ranks.size()}));
  ASSIGN_OR_RETURN(proxy->generation_, fabric.Attach(name, &proxy->wake_));
  proxy->thread_ = std::thread([raw = proxy.get()] { raw->Run(); });
  return proxy;
}

Proxy::~Proxy() {
  if (!thread_.joinable()) return;  // Attach() refused it
  {
    MutexLock lock(mutex_);
    stop_ = true;
  }
  wake_.Signal();
  thread_.join();
  fabric_.Detach(name_);
}

Handle Proxy::SubmitCollective(std::shared_ptr<Operation> operation, OperationKind kind,
                               RingProgram program) {
  {
    MutexLock lock(mutex_);
    submitted_collectives_.push_back(
        {operation, kind, std::move(program), OperationDeadline(), 0, false, false});
  }
  wake_.Signal();
  return Handle(std::move(operation));
}

Handle Proxy::SubmitSend(uint32_t peer, std::span<const std::byte> data) {
  auto operation = std::make_shared<Operation>();
  {
    MutexLock lock(mutex_);
    submitted_transfers_.push_back({operation, peer, true, data, {}, OperationDeadline(), false});
  }
  wake_.Signal();
  return Handle(std::move(operation));
}

Handle Proxy::SubmitReceive(uint32_t peer, std::span<std::byte> data) {
  auto operation = std::make_shared<Operation>();
  {
    MutexLock lock(mutex_);
    submitted_transfers_.push_back({operation, peer, false, {}, data, OperationDeadline(), false});
  }
  wake_.Signal();
  return Handle(std::move(operation));
}

Deadline Proxy::OperationDeadline() const {
  const absl::Duration timeout = fabric_.options().lost_peer == LostPeer::kHang
                                     ? absl::Hours(24 * 365)
                                     : fabric_.options().operation_timeout;
  return Clock::now() + absl::ToChronoNanoseconds(timeout);
}

std::string Proxy::Describe(uint32_t peer) const {
  return absl::StrFormat("rank %d (%s)", ranks_[peer], ToString(fabric_.endpoint(ranks_[peer])));
}

absl::Status Proxy::Error(absl::StatusCode code, const std::string& text) const {
  return absl::Status(code, absl::StrFormat("communicator '%s': %s", name_, text));
}

absl::StatusOr<LinkSender> Proxy::OpenLink(uint32_t peer, LinkKind kind) {
  LinkHello hello;
  hello.kind = kind;
  hello.token = fabric_.token_hash();
  hello.ranks_hash = ranks_hash_;
  hello.from_rank = fabric_.options().rank;
  hello.generation = generation_;
  std::memcpy(hello.name, name_.data(), name_.size());
  ASSIGN_OR_RETURN(Socket socket, BeginConnect(fabric_.endpoint(ranks_[peer]),
                                               fabric_.endpoint(fabric_.options().rank).address));
  return LinkSender(std::move(socket), hello, chunk_bytes());
}

absl::Status Proxy::AdoptLink(uint32_t peer, LinkKind kind, std::optional<LinkReceiver>& receiver) {
  if (receiver.has_value()) return absl::OkStatus();
  std::optional<Fabric::Link> link = fabric_.TakeLink({name_, generation_, kind, ranks_[peer]});
  if (!link.has_value()) return absl::OkStatus();
  if (link->ranks_hash != ranks_hash_) {
    return Error(absl::StatusCode::kFailedPrecondition,
                 absl::StrCat(Describe(peer), " has created it with another list of ranks"));
  }
  receiver.emplace(std::move(link->socket), chunk_bytes());
  return absl::OkStatus();
}

void Proxy::Run() {
  while (TakeSubmissions()) {
    if (broken_.ok()) broken_ = Progress();
    if (!broken_.ok()) FailAll(broken_);
    WaitForEvents();
  }
  FailAll(Error(absl::StatusCode::kCancelled, "destroyed with unfinished operations"));
}

bool Proxy::TakeSubmissions() {
  MutexLock lock(mutex_);
  for (Collective& collective : submitted_collectives_) {
    collectives_.push_back(std::move(collective));
  }
  submitted_collectives_.clear();
  for (Transfer& transfer : submitted_transfers_) {
    Peer& peer = peers_[transfer.peer];
    (transfer.is_send ? peer.sends : peer.receives).push_back(std::move(transfer));
  }
  submitted_transfers_.clear();
  return !stop_;
}

absl::Status Proxy::Progress() {
  if (!suspect_.has_value()) RETURN_IF_ERROR(DriveCollectives());
  for (uint32_t peer = 0; peer < peers_.size(); ++peer) {
    if (!suspect_.has_value()) RETURN_IF_ERROR(DriveSends(peer));
    if (!suspect_.has_value()) RETURN_IF_ERROR(DriveReceives(peer));
  }
  RETURN_IF_ERROR(CheckLosses());
  RETURN_IF_ERROR(CheckLeavers());
  return CheckDeadlines();
}

absl::Status Proxy::DriveCollectives() {
  while (!collectives_.empty() && !ring_silent_) {
    Collective& collective = collectives_.front();
    while (collective.step < collective.program.size()) {
      ASSIGN_OR_RETURN(const bool done, DriveStep(collective));
      if (!done) return absl::OkStatus();
      collective.send_started = collective.receive_started = false;
      ++collective.step;
    }
    collective.operation->Finish(absl::OkStatus());
    collectives_.pop_front();
    ++collective_count_;
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> Proxy::DriveStep(Collective& collective) {
  const RingStep& step = collective.program[collective.step];
  FrameHeader header;
  header.kind = collective.kind;
  header.step = static_cast<uint16_t>(collective.step);  // of long broadcasts, the low 16 bits
  header.sequence = collective_count_;
  const std::string during =
      absl::StrFormat("%s #%d step %d", Name(header.kind), header.sequence, collective.step);
  bool done = true;
  if (!step.send.empty()) {
    if (!ring_sender_.has_value()) {
      absl::StatusOr<LinkSender> sender = OpenLink(next(), LinkKind::kRing);
      if (!sender.ok()) {
        RETURN_IF_ERROR(LinkFailed(next(), during, sender.status(), ring_silent_));
        return false;
      }
      ring_sender_.emplace(*std::move(sender));
    }
    if (!std::exchange(collective.send_started, true)) ring_sender_->Start(header, step.send);
    if (const absl::Status status = ring_sender_->Pump(); !status.ok()) {
      RETURN_IF_ERROR(LinkFailed(next(), during, status, ring_silent_));
      return false;
    }
    done = ring_sender_->idle();
  }
  if (!step.receive.empty()) {
    RETURN_IF_ERROR(AdoptLink(previous(), LinkKind::kRing, ring_receiver_));
    if (!ring_receiver_.has_value()) return false;
    if (!std::exchange(collective.receive_started, true)) {
      ring_receiver_->Start(header, step.receive, step.combine);
    }
    if (const absl::Status status = ring_receiver_->Pump(); !status.ok()) {
      RETURN_IF_ERROR(LinkFailed(previous(), during, status, ring_silent_));
      return false;
    }
    done = done && ring_receiver_->idle();
  }
  return done;
}

absl::Status Proxy::DriveSends(uint32_t peer_index) {
  Peer& peer = peers_[peer_index];
  while (!peer.sends.empty() && !peer.silent) {
    Transfer& transfer = peer.sends.front();
    const std::string during = absl::StrFormat("send #%d", peer.sent_count);
    if (!peer.sender.has_value()) {
      absl::StatusOr<LinkSender> sender = OpenLink(peer_index, LinkKind::kPointToPoint);
      if (!sender.ok()) return LinkFailed(peer_index, during, sender.status(), peer.silent);
      peer.sender.emplace(*std::move(sender));
    }
    if (!std::exchange(transfer.started, true)) {
      FrameHeader header;
      header.kind = OperationKind::kSend;
      header.sequence = peer.sent_count;
      peer.sender->Start(header, transfer.send);
    }
    if (const absl::Status status = peer.sender->Pump(); !status.ok()) {
      return LinkFailed(peer_index, during, status, peer.silent);
    }
    if (!peer.sender->idle()) return absl::OkStatus();
    transfer.operation->Finish(absl::OkStatus());
    peer.sends.pop_front();
    ++peer.sent_count;
  }
  return absl::OkStatus();
}

absl::Status Proxy::DriveReceives(uint32_t peer_index) {
  Peer& peer = peers_[peer_index];
  while (!peer.receives.empty() && !peer.silent) {
    Transfer& transfer = peer.receives.front();
    RETURN_IF_ERROR(AdoptLink(peer_index, LinkKind::kPointToPoint, peer.receiver));
    if (!peer.receiver.has_value()) return absl::OkStatus();
    if (!std::exchange(transfer.started, true)) {
      FrameHeader header;
      header.kind = OperationKind::kSend;
      header.sequence = peer.received_count;
      peer.receiver->Start(header, transfer.receive, Combine::kCopy);
    }
    if (const absl::Status status = peer.receiver->Pump(); !status.ok()) {
      return LinkFailed(peer_index, absl::StrFormat("receive #%d", peer.received_count), status,
                        peer.silent);
    }
    if (!peer.receiver->idle()) return absl::OkStatus();
    transfer.operation->Finish(absl::OkStatus());
    peer.receives.pop_front();
    ++peer.received_count;
  }
  return absl::OkStatus();
}

absl::Status Proxy::LinkFailed(uint32_t peer, const std::string& during, const absl::Status& status,
                               bool& silent) {
  const std::string text =
      absl::StrFormat("%s: link to %s: %s", during, Describe(peer), std::string(status.message()));
  if (!absl::IsUnavailable(status)) return Error(status.code(), text);
  if (fabric_.options().lost_peer == LostPeer::kHang) {
    silent = true;
    return absl::OkStatus();
  }
  suspect_ = Suspect{peer, text, Clock::now() + kLossGrace};
  return absl::OkStatus();
}

absl::Status Proxy::CheckLosses() const {
  if (fabric_.options().lost_peer == LostPeer::kHang) return absl::OkStatus();
  const std::vector<uint32_t> lost = fabric_.Lost();
  const bool member_lost = std::any_of(lost.begin(), lost.end(), [&](uint32_t rank) {
    return std::find(ranks_.begin(), ranks_.end(), rank) != ranks_.end();
  });
  if (member_lost || (suspect_.has_value() && !lost.empty())) {
    return Error(absl::StatusCode::kUnavailable,
                 absl::StrFormat("rank %d (%s) is lost: its process or connection ended%s%s",
                                 lost.front(), ToString(fabric_.endpoint(lost.front())),
                                 suspect_.has_value() ? "; seen in " : "",
                                 suspect_.has_value() ? suspect_->text : ""));
  }
  if (!suspect_.has_value()) return absl::OkStatus();
  if (fabric_.HasLeft(ranks_[suspect_->peer])) {
    return Error(
        absl::StatusCode::kUnavailable,
        absl::StrFormat("%s has left; seen in %s", Describe(suspect_->peer), suspect_->text));
  }
  if (Clock::now() < suspect_->deadline) return absl::OkStatus();
  return Error(absl::StatusCode::kUnavailable,
               absl::StrFormat("%s is lost; seen in %s", Describe(suspect_->peer), suspect_->text));
}

bool Proxy::WaitsForLink(uint32_t peer) const {
  if (!peers_[peer].receives.empty() && !peers_[peer].receiver.has_value()) return true;
  if (collectives_.empty() || peer != previous() || ring_receiver_.has_value()) return false;
  const Collective& collective = collectives_.front();
  return !collective.program[collective.step].receive.empty();
}

absl::Status Proxy::CheckLeavers() {
  if (fabric_.options().lost_peer == LostPeer::kHang) return absl::OkStatus();
  uint32_t peer = 0;
  while (peer < peers_.size() && !(WaitsForLink(peer) && fabric_.HasLeft(ranks_[peer]))) ++peer;
  if (peer == peers_.size()) {
    leaver_.reset();
    return absl::OkStatus();
  }
  if (!leaver_.has_value() || leaver_->peer != peer) {
    leaver_ = Suspect{peer, "", Clock::now() + kLossGrace};
  }
  if (Clock::now() < leaver_->deadline) return absl::OkStatus();
  return Error(absl::StatusCode::kUnavailable,
               absl::StrCat(Describe(peer), " has left without sending what is waited for"));
}

absl::Status Proxy::CheckDeadlines() const {
  const Deadline now = Clock::now();
  if (!collectives_.empty() && collectives_.front().deadline <= now) {
    const Collective& collective = collectives_.front();
    const bool receives = !collective.program[collective.step].receive.empty() &&
                          (!ring_receiver_.has_value() || !ring_receiver_->idle());
    return Error(absl::StatusCode::kDeadlineExceeded,
                 absl::StrFormat("%s #%d step %d waits to %s", Name(collective.kind),
                                 collective_count_, collective.step,
                                 receives ? absl::StrCat("receive from ", Describe(previous()))
                                          : absl::StrCat("send to ", Describe(next()))));
  }
  for (uint32_t i = 0; i < peers_.size(); ++i) {
    const Peer& peer = peers_[i];
    for (const std::deque<Transfer>* queue : {&peer.sends, &peer.receives}) {
      if (queue->empty() || queue->front().deadline > now) continue;
      return Error(absl::StatusCode::kDeadlineExceeded,
                   absl::StrFormat("%s #%d waits for %s", queue == &peer.sends ? "send" : "receive",
                                   queue == &peer.sends ? peer.sent_count : peer.received_count,
                                   Describe(i)));
    }
  }
  return absl::OkStatus();
}

void Proxy::FailAll(const absl::Status& status) {
  for (Collective& collective : collectives_) collective.operation->Finish(status);
  collectives_.clear();
  for (Peer& peer : peers_) {
    for (std::deque<Transfer>* queue : {&peer.sends, &peer.receives}) {
      for (Transfer& transfer : *queue) transfer.operation->Finish(status);
      queue->clear();
    }
    // Our end of a broken communicator is closed, so that peers in the same operation see it.
    peer.sender.reset();
    peer.receiver.reset();
  }
  ring_sender_.reset();
  ring_receiver_.reset();
  suspect_.reset();
  leaver_.reset();
}

void Proxy::WaitForEvents() {
  std::vector<pollfd> entries;
  Deadline deadline = Clock::now() + std::chrono::hours(1);
  entries.push_back({wake_.fd(), POLLIN, 0});
  if (leaver_.has_value()) deadline = std::min(deadline, leaver_->deadline);
  if (suspect_.has_value()) {
    deadline = std::min(deadline, suspect_->deadline);
  } else {
    const auto watch = [&](const auto& link, int16_t events, bool silent) {
      if (!silent && link.has_value() && !link->idle()) entries.push_back({link->fd(), events, 0});
    };
    watch(ring_sender_, POLLOUT, ring_silent_);
    watch(ring_receiver_, POLLIN, ring_silent_);
    for (const Peer& peer : peers_) {
      watch(peer.sender, POLLOUT, peer.silent);
      watch(peer.receiver, POLLIN, peer.silent);
    }
  }
  if (!collectives_.empty()) deadline = std::min(deadline, collectives_.front().deadline);
  for (const Peer& peer : peers_) {
    if (!peer.sends.empty()) deadline = std::min(deadline, peer.sends.front().deadline);
    if (!peer.receives.empty()) deadline = std::min(deadline, peer.receives.front().deadline);
  }
  // An error of poll(2) can only be EINTR here, and then the caller looks at everything again.
  static_cast<void>(poll(entries.data(), entries.size(), PollMilliseconds(deadline)));
  wake_.Drain();
}

}  // namespace collectives
