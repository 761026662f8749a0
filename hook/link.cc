#include "hook/link.h"

#include <poll.h>

#include <algorithm>
#include <exception>
#include <utility>

namespace holdfast::hook {
namespace {

// How long the thread waits for an answer to its own requests after it has connected again, and for
// the agent to take a message.
constexpr int64_t kEstablishNs = 60 * kNsPerSecond;
constexpr int64_t kSendNs = 10 * kNsPerSecond;
constexpr int64_t kConnectNs = kNsPerSecond;

Error NotRegistered() {
  return Error(HF_FAILED_PRECONDITION, "nothing is registered: hf_register must have succeeded");
}

Result<std::shared_ptr<Registration>> ToRegistration(std::shared_ptr<const Document> document,
                                                     const Message& message) {
  abi::RegisterReply reply;
  if (Error error = message.Read(&reply, message.fd_count, "kRegisterReply"); !error.ok()) {
    return error;
  }
  if (Error error = ToError(reply.status); !error.ok()) return error;
  return Registration::Make(std::move(document), reply, {message.fds.data(), message.fd_count});
}

// Restore sleeps on this word for pieces.
void WakeRestore(Registration* registration) {
  if (registration == nullptr) return;
  FutexWakeAll(registration->shared().restore.produced, FutexScope::kShared);
}

}  // namespace

Error ToError(const abi::ReplyStatus& status) {
  if (status.code == HF_OK) return Error();
  char text[sizeof(status.text)];
  std::memcpy(text, status.text, sizeof(text));
  text[sizeof(text) - 1] = '\0';
  const bool known = status.code >= HF_INVALID_ARGUMENT && status.code <= HF_DATA_LOSS;
  return Error(known ? static_cast<hf_code>(status.code) : HF_INTERNAL, "%s", text);
}

Link::Link(LinkOptions options) : options_(std::move(options)) {}

Result<std::unique_ptr<Link>> Link::Open(LinkOptions options, Deadline deadline) {
  std::unique_ptr<Link> link(new Link(std::move(options)));
  Result<UniqueFd> wake = MakeEventFd();
  if (!wake.ok()) return wake.error();
  link->wake_ = std::move(wake.value());
  int64_t backoff_ns = kBackoffFirstNs;
  Error refusal;  // the last answer of an agent that may be followed by a better one
  // What the caller hears of a try for which there was no time: why there was need of it.
  const auto outcome = [&refusal](const Error& error) {
    return error.code() == HF_DEADLINE_EXCEEDED && !refusal.ok() ? refusal : error;
  };
  for (;;) {
    Result<UniqueFd> connection = link->options_.connect_first(deadline);
    if (!connection.ok()) return outcome(connection.error());
    link->channel_ = std::make_unique<Channel>(std::move(connection.value()));
    bool answered = false;
    Error error = link->OpenSession(deadline, &answered);
    if (error.ok()) break;
    // An agent that went away before it answered may be about to come back; one that says that it
    // is ending, or not ready yet, makes room for the next one, or becomes ready.
    if (error.code() != HF_UNAVAILABLE || deadline.passed()) return outcome(error);
    if (answered) refusal = error;
    link->channel_.reset();
    pollfd never = {link->wake_.get(), POLLIN, 0};
    poll(&never, 1, Deadline::After(backoff_ns).Earlier(deadline).PollMs(1000));
    backoff_ns = std::min(2 * backoff_ns, kBackoffLastNs);
  }
  link->SetPhase(Phase::kReady);
  if (Error error = link->thread_.Start("holdfast-link", &Link::Main, link.get()); !error.ok()) {
    return error;
  }
  return link;
}

Link::~Link() {
  {
    MutexLock lock(mutex_);
    closing_ = true;
  }
  if (wake_.valid()) RingEventFd(wake_.get());
  thread_.Join();
}

// ---- Calls, on the trainer's threads

Link::Session Link::session() const {
  MutexLock lock(mutex_);
  return session_;
}

Link::Snapshot Link::snapshot() const {
  MutexLock lock(mutex_);
  Snapshot snapshot;
  snapshot.version = version_.load(std::memory_order_relaxed);
  snapshot.ready = phase_ == Phase::kReady;
  snapshot.session = session_;
  snapshot.registration = registration_;
  snapshot.registration_error = registration_error_.ok() ? NotRegistered() : registration_error_;
  return snapshot;
}

// Behind every change of what a Snapshot holds, or of what a call waits for.
void Link::ChangedLocked() {
  version_.fetch_add(1, std::memory_order_release);
  changed_.SignalAll();
}

bool Link::connected() const {
  MutexLock lock(mutex_);
  return phase_ == Phase::kReady;
}

uint32_t Link::reconnect_count() const {
  MutexLock lock(mutex_);
  return reconnect_count_;
}

uint64_t Link::epoch() const {
  MutexLock lock(mutex_);
  return epoch_;
}

Error Link::WorthWaitingLocked(int64_t absent_grace_ns) const {
  if (phase_ == Phase::kReady) return Error();
  if (phase_ == Phase::kRefused) return refusal_;
  const int64_t grace_ns = phase_ == Phase::kResuming ? kResumingGraceNs : absent_grace_ns;
  if (phase_ != Phase::kClosed && MonotonicNs() - lost_ns_ < grace_ns) return Error();
  return Error(HF_UNAVAILABLE, "the agent at %s is gone, and was not reached again: %s",
               ShortName(options_.socket_path).text(), last_failure_.text());
}

Error Link::Reachable() const {
  MutexLock lock(mutex_);
  return WorthWaitingLocked(0);
}

Error Link::WorthWaiting() const {
  MutexLock lock(mutex_);
  return WorthWaitingLocked(kAbsentGraceNs);
}

Error Link::WaitReadyLocked(Deadline deadline) {
  while (phase_ != Phase::kReady) {
    if (Error error = WorthWaitingLocked(kAbsentGraceNs); !error.ok()) return error;
    if (deadline.passed()) {
      return Error(HF_DEADLINE_EXCEEDED, "the agent at %s is being waited for",
                   ShortName(options_.socket_path).text());
    }
    const int64_t grace_ns = phase_ == Phase::kResuming ? kResumingGraceNs : kAbsentGraceNs;
    changed_.Wait(mutex_, deadline.Earlier(Deadline::At(lost_ns_ + grace_ns)));
  }
  return Error();
}

Error Link::WaitConnected(Deadline deadline) {
  MutexLock lock(mutex_);
  return WaitReadyLocked(deadline);
}

// Sends the request and waits for its reply, over lost connections. The reply's status is not
// looked at.
Error Link::Call(std::shared_ptr<PendingCall> call, Deadline deadline) {
  MutexLock lock(mutex_);
  for (;;) {
    if (Error error = WaitReadyLocked(deadline); !error.ok()) return error;
    call->sent = false;
    call->lost = false;
    pending_ = call;
    RingEventFd(wake_.get());
    while (!call->reply.has_value() && !call->lost && !deadline.passed()) {
      changed_.Wait(mutex_, deadline);
    }
    pending_.reset();
    if (call->reply.has_value()) return Error();
    if (!call->lost) return Error(HF_DEADLINE_EXCEEDED, "the agent did not answer in time");
  }
}

template <typename Request>
std::shared_ptr<Link::PendingCall> Link::MakeCall(abi::MessageType type, const Request& request) {
  auto call = std::make_shared<PendingCall>();
  static_assert(sizeof(request) <= sizeof(call->body));
  call->type = type;
  std::memcpy(call->body.data(), &request, sizeof(request));
  call->body_bytes = sizeof(request);
  return call;
}

Error Link::Register(std::shared_ptr<const Document> document, Deadline deadline) {
  {
    MutexLock lock(mutex_);
    document_.reset();
    registration_.reset();
    registration_error_ = NotRegistered();
    ChangedLocked();
  }
  for (;;) {
    auto call = MakeCall(abi::MessageType::kRegister, abi::RegisterRequest{document->bytes()});
    call->fd = document->fd();
    call->owner = document;
    if (Error error = Call(call, deadline); !error.ok()) return error;
    Result<std::shared_ptr<Registration>> made = ToRegistration(document, *call->reply);
    if (!made.ok()) return made.error();
    MutexLock lock(mutex_);
    // Lost since: whether the agent still has this registration is unknown.
    if (call->epoch != epoch_) continue;
    registration_ = std::move(made.value());
    document_ = std::move(document);
    registration_error_ = Error();
    ChangedLocked();
    return Error();
  }
}

Result<std::shared_ptr<Registration>> Link::registration() const {
  MutexLock lock(mutex_);
  if (registration_ != nullptr) return registration_;
  return registration_error_.ok() ? NotRegistered() : registration_error_;
}

Result<RestoreStart> Link::StartRestore(const Registration& registration,
                                        std::shared_ptr<const Selection> selection,
                                        Deadline deadline) {
  const abi::RestoreRequest request = {registration.id(),
                                       selection == nullptr ? 0 : selection->bytes()};
  auto call = MakeCall(abi::MessageType::kRestore, request);
  if (selection != nullptr) call->fd = selection->fd();
  call->owner = std::move(selection);
  if (Error error = Call(call, deadline); !error.ok()) return error;
  {
    MutexLock lock(mutex_);
    if (registration_.get() != &registration) {
      return Error(HF_ABORTED, "the registration was replaced");
    }
  }
  Message& message = *call->reply;
  RestoreStart start;
  if (Error error = message.Read(&start.reply, message.fd_count, "kRestoreReply"); !error.ok()) {
    return error;
  }
  if (Error error = ToError(start.reply.status); !error.ok()) {
    // HF_ABORTED has a meaning of its own here.
    return error.code() == HF_ABORTED ? Error(HF_INTERNAL, "%s", error.text()) : error;
  }
  if (message.fd_count != 2) {
    return Error(HF_INTERNAL, "kRestoreReply from the agent: expected 2 descriptors, found %zu",
                 message.fd_count);
  }
  start.operations = std::move(message.fds[0]);
  start.blobs = std::move(message.fds[1]);
  start.image_maps = std::move(call->image_maps);
  start.epoch = call->epoch;
  return start;
}

void Link::CancelRestore() {
  MutexLock lock(mutex_);
  if (phase_ != Phase::kReady) return;
  cancels_restore_ = true;
  RingEventFd(wake_.get());
}

std::optional<abi::RestoreDone> Link::restore_done(uint64_t epoch) const {
  MutexLock lock(mutex_);
  if (epoch != epoch_) return std::nullopt;
  return restore_done_;
}

// ---- The link's thread

void Link::Main(void* self) { static_cast<Link*>(self)->Run(); }

bool Link::closing() const {
  MutexLock lock(mutex_);
  return closing_;
}

bool Link::refused() const {
  MutexLock lock(mutex_);
  return phase_ == Phase::kRefused;
}

void Link::SetPhase(Phase phase) {
  MutexLock lock(mutex_);
  phase_ = phase;
  ChangedLocked();
}

void Link::Run() {
  while (!closing()) {
    try {
      if (channel_ != nullptr) {
        Serve();
      } else if (refused()) {
        SleepUntilWoken(Deadline::Never());
      } else {
        Reconnect();
      }
    } catch (const std::exception&) {
      // Out of memory. The connection is given up and made again when there may be some.
      channel_.reset();
      LoseConnection();
      SleepUntilWoken(Deadline::After(kBackoffLastNs));
    }
  }
  if (channel_ != nullptr) {
    // Best effort: the agent also sees the end of the connection, and of the process.
    (void)channel_->Send(abi::MessageType::kClose, ++last_request_id_, {}, {},
                         Deadline::After(kNsPerMs));
    channel_.reset();
  }
  SetPhase(Phase::kClosed);
}

// Until the connection is lost, or the link closes.
void Link::Serve() {
  while (!closing()) {
    if (Error error = SendRestoreCancel(); !error.ok()) break;
    if (Error error = SendPending(); !error.ok()) break;
    Message message;
    Error error = channel_->Receive(&message, wake_.get(), Deadline::Never());
    if (error.code() == HF_ABORTED) {
      DrainEventFd(wake_.get());
      continue;
    }
    if (!error.ok()) break;
    if (error = Dispatch(std::move(message)); !error.ok()) break;
  }
  if (closing()) return;
  channel_.reset();
  LoseConnection();
}

Error Link::SendRestoreCancel() {
  {
    MutexLock lock(mutex_);
    if (!std::exchange(cancels_restore_, false)) return Error();
  }
  return channel_->Send(abi::MessageType::kRestoreCancel, 0, {}, {}, Deadline::After(kSendNs));
}

Error Link::SendPending() {
  std::shared_ptr<PendingCall> call;
  {
    MutexLock lock(mutex_);
    if (pending_ == nullptr || pending_->sent) return Error();
    call = pending_;
    call->sent = true;
    call->request_id = ++last_request_id_;
    call->epoch = epoch_;
  }
  const std::span<const int> fds(&call->fd, call->fd >= 0 ? 1 : 0);
  return channel_->Send(call->type, call->request_id, std::span(call->body).first(call->body_bytes),
                        fds, Deadline::After(kSendNs));
}

Error Link::Dispatch(Message message) {
  switch (message.header.type) {
    case abi::MessageType::kRegisterReply:
      return DeliverReply(abi::MessageType::kRegister, std::move(message));
    case abi::MessageType::kRestoreReply:
      return DeliverReply(abi::MessageType::kRestore, std::move(message));
    case abi::MessageType::kImageMap: {
      abi::ImageMap map;
      if (Error error = message.Read(&map, 1, "kImageMap"); !error.ok()) return error;
      MutexLock lock(mutex_);
      if (image_maps_.size() >= kImageMapsMax) return Error(HF_INTERNAL, "too many kImageMap");
      image_maps_.emplace_back(map, std::move(message.fds[0]));
      return Error();
    }
    case abi::MessageType::kRestoreDone: {
      abi::RestoreDone done;
      if (Error error = message.Read(&done, 0, "kRestoreDone"); !error.ok()) return error;
      std::shared_ptr<Registration> registration;
      {
        MutexLock lock(mutex_);
        restore_done_ = done;
        registration = registration_;
      }
      WakeRestore(registration.get());
      return Error();
    }
    default:
      return Error(HF_INTERNAL, "message of type %u from the agent is not expected",
                   static_cast<unsigned>(message.header.type));
  }
}

// Gives a reply to the call that waits for it. One that nobody waits for any more is dropped, with
// the image maps that came before it.
Error Link::DeliverReply(abi::MessageType request, Message message) {
  MutexLock lock(mutex_);
  std::vector<std::pair<abi::ImageMap, UniqueFd>> image_maps;
  if (request == abi::MessageType::kRestore) image_maps.swap(image_maps_);
  if (pending_ == nullptr || !pending_->sent || pending_->request_id != message.header.request_id) {
    return Error();
  }
  if (pending_->type != request) return Error(HF_INTERNAL, "a reply to another kind of request");
  pending_->reply = std::move(message);
  if (request == abi::MessageType::kRestore) {
    pending_->image_maps = std::move(image_maps);
    restore_done_.reset();
  }
  ChangedLocked();
  return Error();
}

void Link::LoseConnection() {
  std::shared_ptr<Registration> registration;
  {
    MutexLock lock(mutex_);
    // Absent only when a connection was refused: a worker's restart is the common case.
    phase_ = Phase::kResuming;
    lost_ns_ = MonotonicNs();
    ++epoch_;
    image_maps_.clear();
    restore_done_.reset();
    cancels_restore_ = false;  // the agent ends it when the session is resumed
    if (pending_ != nullptr) pending_->lost = true;
    registration = registration_;
    ChangedLocked();
  }
  WakeRestore(registration.get());
  FutexWakeAll(page().agent_events, FutexScope::kShared);
}

// One attempt to connect and establish the session; sleeps if it failed.
void Link::Reconnect() {
  Result<UniqueFd> connection = ConnectToAgent(options_.socket_path, Deadline::After(kConnectNs));
  if (connection.ok()) {
    SetPhase(Phase::kResuming);
    channel_ = std::make_unique<Channel>(std::move(connection.value()));
    const Error error = EstablishSession(Deadline::After(kEstablishNs));
    if (error.ok()) {
      backoff_ns_ = kBackoffFirstNs;
      FutexWakeAll(page().agent_events, FutexScope::kShared);
      if (options_.on_session) options_.on_session(*this);
      return;
    }
    channel_.reset();
    if (error.code() == HF_FAILED_PRECONDITION) {
      Refuse(error);
      return;
    }
    SetLastFailure(error);
  } else {
    SetLastFailure(connection.error());
    SetPhase(Phase::kAbsent);
  }
  SleepUntilWoken(Deadline::After(backoff_ns_));
  backoff_ns_ = std::min(2 * backoff_ns_, kBackoffLastNs);
}

void Link::SleepUntilWoken(Deadline deadline) {
  pollfd wake = {wake_.get(), POLLIN, 0};
  poll(&wake, 1, deadline.never() ? -1 : deadline.PollMs(60'000));
  if ((wake.revents & POLLIN) != 0) DrainEventFd(wake_.get());
}

void Link::SetLastFailure(const Error& error) {
  MutexLock lock(mutex_);
  last_failure_ = error;
}

void Link::Refuse(const Error& error) {
  MutexLock lock(mutex_);
  phase_ = Phase::kRefused;
  refusal_ = error;
  ChangedLocked();
}

// HF_FAILED_PRECONDITION: the agent refuses for good. Any other error: try again.
Error Link::EstablishSession(Deadline deadline) {
  const Session before = session();
  bool answered = false;
  if (Error error = OpenSession(deadline, &answered); !error.ok()) {
    if (answered && error.code() == HF_FAILED_PRECONDITION) return error;
    return Error(HF_UNAVAILABLE, "%s", error.text());
  }
  if (session().id != before.id) {
    if (Error error = RegisterAgain(deadline); !error.ok()) {
      return Error(HF_UNAVAILABLE, "%s", error.text());
    }
  }
  MutexLock lock(mutex_);
  phase_ = Phase::kReady;
  ++reconnect_count_;
  ChangedLocked();
  return Error();
}

// Says kOpen, resuming if there was a session. `answered`: the error is the agent's own.
Error Link::OpenSession(Deadline deadline, bool* answered) {
  abi::OpenRequest request = options_.open;
  {
    MutexLock lock(mutex_);
    request.resume_attempt = session_.attempt;
    request.resume_session_id = session_.id;
    request.resume_registration_id = registration_ != nullptr ? registration_->id() : 0;
  }
  const uint32_t request_id = ++last_request_id_;
  const int fd = options_.doorbell_fd;
  if (Error error =
          channel_->Send(abi::MessageType::kOpen, request_id, BodyOf(request), {&fd, 1}, deadline);
      !error.ok()) {
    return error;
  }
  Message message;
  if (Error error = ReceiveReply(abi::MessageType::kOpenReply, request_id, &message, deadline);
      !error.ok()) {
    return error;
  }
  abi::OpenReply reply;
  if (Error error = message.Read(&reply, message.fd_count, "kOpenReply"); !error.ok()) return error;
  *answered = true;
  if (Error error = ToError(reply.status); !error.ok()) return error;
  if (reply.resumed != 0 && request.resume_session_id == reply.session_id) return Error();
  if (message.fd_count != 1) {
    return Error(HF_INTERNAL, "kOpenReply from the agent: expected 1 descriptor, found %zu",
                 message.fd_count);
  }
  Result<Mapping> page = Mapping::Map(message.fds[0].get(), reply.rank_page_bytes,
                                      Mapping::Access::kReadWrite, "rank page");
  if (!page.ok()) return page.error();
  return AdoptSession(reply, std::move(page.value()));
}

Error Link::AdoptSession(const abi::OpenReply& reply, Mapping page) {
  if (page.bytes() < sizeof(abi::RankPage)) {
    return Error(HF_INTERNAL, "rank page from the agent: expected %zu bytes, found %llu",
                 sizeof(abi::RankPage), static_cast<unsigned long long>(page.bytes()));
  }
  abi::RankPage* mapped = reinterpret_cast<abi::RankPage*>(page.data());
  if (mapped->magic != abi::kRankPageMagic || mapped->version != abi::kProtocolVersion) {
    return Error(HF_INTERNAL, "rank page from the agent: magic %08x or version %u is wrong",
                 mapped->magic, mapped->version);
  }
  MutexLock lock(mutex_);
  pages_.push_back(std::move(page));
  page_.store(mapped, std::memory_order_release);
  session_ = {reply.session_id, reply.attempt, reply.block_bytes};
  registration_.reset();
  registration_error_ = NotRegistered();
  ChangedLocked();
  return Error();
}

// Registers the kept document with a new agent. An error of the connection is returned; one of the
// agent's is kept for whoever asks for the registration.
Error Link::RegisterAgain(Deadline deadline) {
  std::shared_ptr<const Document> document;
  {
    MutexLock lock(mutex_);
    document = document_;
  }
  if (document == nullptr) return Error();
  const abi::RegisterRequest request = {document->bytes()};
  const uint32_t request_id = ++last_request_id_;
  const int fd = document->fd();
  if (Error error = channel_->Send(abi::MessageType::kRegister, request_id, BodyOf(request),
                                   {&fd, 1}, deadline);
      !error.ok()) {
    return error;
  }
  Message message;
  if (Error error = ReceiveReply(abi::MessageType::kRegisterReply, request_id, &message, deadline);
      !error.ok()) {
    return error;
  }
  Result<std::shared_ptr<Registration>> made = ToRegistration(document, message);
  MutexLock lock(mutex_);
  if (document_ != document) return Error();  // hf_register is about to replace it
  if (made.ok()) {
    registration_ = std::move(made.value());
    registration_error_ = Error();
  } else {
    registration_error_ = made.error();
  }
  ChangedLocked();
  return Error();
}

Error Link::ReceiveReply(abi::MessageType type, uint32_t request_id, Message* message,
                         Deadline deadline) {
  for (;;) {
    // Before the thread runs nobody rings wake_. After that a ring means a call, which waits, or
    // closing, which does not.
    Error error = channel_->Receive(message, wake_.get(), deadline);
    if (error.code() == HF_ABORTED) {
      DrainEventFd(wake_.get());
      if (closing()) return error;
      continue;
    }
    if (!error.ok()) return error;
    if (message->header.type == type && message->header.request_id == request_id) return Error();
    return Error(HF_INTERNAL, "message from the agent: expected type %u, found %u",
                 static_cast<unsigned>(type), static_cast<unsigned>(message->header.type));
  }
}

}  // namespace holdfast::hook
