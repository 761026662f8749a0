#include "examples/collectives/proxy.h"

#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "examples/collectives/status_macros.h"

namespace collectives {
namespace {

using Clock = std::chrono::steady_clock;

// How long a broken link waits for rank 0 to say who was lost first, a peer that has left for the
// links that it had opened, and the end of a communicator for what it has sent to arrive.
constexpr std::chrono::seconds kLossGrace{2};
// Of every segment, before another ring is worth while.
constexpr size_t kRingBytesMin = 8;
// Up to so much work for the device is done at once instead of handed over: about as long as two
// changes of threads take.
constexpr size_t kDriveBytesMax = size_t{32} << 10;

}  // namespace

Proxy::Proxy(Fabric& fabric, Device& device, std::string name, std::vector<uint32_t> ranks,
             std::vector<RingOrder> rings, uint32_t rank)
    : fabric_(fabric),
      device_(device),
      name_(std::move(name)),
      ranks_(std::move(ranks)),
      rings_(std::move(rings)),
      rank_(rank) {
  std::string text;
  for (const uint32_t global_rank : ranks_) absl::StrAppend(&text, global_rank, ",");
  for (const RingOrder& ring : rings_) {
    absl::StrAppend(&text, ";");
    for (const uint32_t position : ring) absl::StrAppend(&text, position, ",");
  }
  ranks_hash_ = HashOf(text);
}

absl::StatusOr<std::unique_ptr<Proxy>> Proxy::Create(Fabric& fabric, Device& device,
                                                     std::shared_ptr<ProfilerPlugin> plugin,
                                                     const std::string& name,
                                                     const std::vector<uint32_t>& ranks,
                                                     std::vector<RingOrder> rings) {
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
  for (const RingOrder& ring : rings) {
    RingOrder positions = ring;
    std::sort(positions.begin(), positions.end());
    if (positions != StridedRing(static_cast<uint32_t>(ranks.size()), 0)) {
      return absl::InvalidArgumentError(
          absl::StrFormat("communicator '%s': expected rings with each of its %d positions once",
                          name, ranks.size()));
    }
  }
  std::unique_ptr<Proxy> proxy(new Proxy(fabric, device, name, ranks, std::move(rings),
                                         static_cast<uint32_t>(own - ranks.begin())));
  ASSIGN_OR_RETURN(proxy->generation_, fabric.Attach(name, &proxy->wake_));
  proxy->StartTrace(std::move(plugin));
  proxy->thread_ = std::thread([raw = proxy.get()] { raw->Run(); });
  return proxy;
}

void Proxy::StartTrace(std::shared_ptr<ProfilerPlugin> plugin) {
  std::set<uint32_t> addresses;
  for (const uint32_t rank : ranks_) addresses.insert(fabric_.endpoint(rank).address);
  const std::string identity =
      absl::StrCat(fabric_.options().token, "/", name_, "/", generation_, "/", ranks_hash_);
  trace_ = std::make_unique<CommunicatorTrace>(
      std::move(plugin), CommunicatorTrace::Identity{.id = HashOf(identity),
                                                     .name = name_,
                                                     .nodes = static_cast<int>(addresses.size()),
                                                     .ranks = static_cast<int>(size()),
                                                     .rank = static_cast<int>(rank_)});
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

// ---- What the program does

uint32_t Proxy::RingCountFor(size_t bytes) const {
  const size_t worth = bytes / (kRingBytesMin * size());
  return static_cast<uint32_t>(std::clamp<size_t>(worth, 1, rings_.size()));
}

RingPlace Proxy::PlaceIn(uint32_t ring, uint32_t ring_count) const {
  const RingOrder& order = rings_[ring];
  const auto own = std::find(order.begin(), order.end(), rank_);
  return {order, static_cast<size_t>(own - order.begin()), ring, ring_count};
}

std::shared_ptr<Operation> Proxy::NewOperation(OperationKind kind) const {
  const absl::Duration timeout = fabric_.options().lost_peer == LostPeer::kHang
                                     ? absl::Hours(24 * 365)
                                     : fabric_.options().operation_timeout;
  return std::make_shared<Operation>(kind, Clock::now() + absl::ToChronoNanoseconds(timeout));
}

Device::StreamId Proxy::StreamOf(const Operation& operation) const {
  if (operation.kind() != OperationKind::kSend) return {this, 0};
  const Flow& flow = *operation.flows.front();
  return {this, 1 + 2 * flow.peer + (flow.is_send ? 1 : 0)};
}

Handle Proxy::Submit(std::shared_ptr<Operation> operation, const CallInfo& info) {
  const CommunicatorTrace::Call call = trace_->Begin(info, *operation);
  {
    MutexLock lock(mutex_);
    if (operation->kind() == OperationKind::kSend) {
      const Flow& flow = *operation->flows.front();
      operation->sequence = point_to_point_counts_[{flow.peer, flow.is_send}]++;
    } else {
      operation->sequence = collective_count_++;
    }
    submitted_.push_back(operation);
    // Under the lock, so that device and proxy see one order.
    device_.Submit(StreamOf(*operation), operation, &wake_);
  }
  wake_.Signal();
  trace_->End(call);
  return Handle(std::move(operation));
}

Handle Proxy::SubmitSend(uint32_t peer, std::span<const std::byte> data) {
  std::shared_ptr<Operation> operation = NewOperation(OperationKind::kSend);
  operation->first_channel = point_to_point_channel();
  operation->channel_count = 1;
  operation->flows.push_back(SendFlow(point_to_point_channel(), peer, data, chunk_bytes()));
  return Submit(std::move(operation), {.kind = OperationKind::kSend, .count = data.size()});
}

Handle Proxy::SubmitReceive(uint32_t peer, std::span<std::byte> data) {
  std::shared_ptr<Operation> operation = NewOperation(OperationKind::kSend);
  operation->first_channel = point_to_point_channel();
  operation->channel_count = 1;
  operation->flows.push_back(ReceiveFlow(point_to_point_channel(), peer, data, chunk_bytes()));
  return Submit(std::move(operation), {.kind = OperationKind::kSend, .count = data.size()});
}

Handle Proxy::SubmitAllToAll(std::span<const std::byte> send, std::span<std::byte> receive,
                             size_t block_bytes) {
  std::shared_ptr<Operation> operation = NewOperation(OperationKind::kAllToAll);
  operation->first_channel = all_to_all_channel();
  operation->channel_count = 1;
  // Not all to one at a time: everybody begins with another peer.
  for (uint32_t distance = 1; distance < size() && block_bytes > 0; ++distance) {
    const uint32_t to = (rank_ + distance) % size();
    const uint32_t from = (rank_ + size() - distance) % size();
    operation->flows.push_back(ReceiveFlow(all_to_all_channel(), from,
                                           receive.subspan(from * block_bytes, block_bytes),
                                           chunk_bytes()));
    operation->flows.push_back(SendFlow(
        all_to_all_channel(), to, send.subspan(to * block_bytes, block_bytes), chunk_bytes()));
  }
  return Submit(std::move(operation), {.kind = OperationKind::kAllToAll, .count = block_bytes});
}

// ---- Texts

std::string Proxy::Describe(uint32_t peer) const {
  return absl::StrFormat("rank %d (%s)", ranks_[peer], ToString(fabric_.endpoint(ranks_[peer])));
}

std::string Proxy::During(const FlowInProxy& flow) const {
  const Operation& operation = *flow.operation;
  if (operation.kind() == OperationKind::kSend) {
    return absl::StrFormat("%s #%d", flow.flow->is_send ? "send" : "receive", operation.sequence);
  }
  const uint32_t chunk = std::min(flow.done, flow.flow->chunk_count() - 1);
  return absl::StrFormat("%s #%d step %d", Name(operation.kind()), operation.sequence,
                         flow.flow->chunks[chunk].step);
}

absl::Status Proxy::Error(absl::StatusCode code, const std::string& text) const {
  return absl::Status(code, absl::StrFormat("communicator '%s': %s", name_, text));
}

// ---- The thread

absl::StatusOr<LinkSender> Proxy::OpenLink(uint32_t peer, uint32_t channel) {
  LinkHello hello;
  hello.channel = channel;
  hello.token = fabric_.token_hash();
  hello.ranks_hash = ranks_hash_;
  hello.from_rank = fabric_.options().rank;
  hello.generation = generation_;
  std::memcpy(hello.name, name_.data(), name_.size());
  ASSIGN_OR_RETURN(Socket socket, BeginConnect(fabric_.endpoint(ranks_[peer]),
                                               fabric_.endpoint(fabric_.options().rank).address));
  return LinkSender(std::move(socket), hello);
}

absl::Status Proxy::AdoptLink(const Key& key, ReceiveConnection& connection) {
  const auto [channel, peer] = key;
  std::optional<Fabric::Link> link = fabric_.TakeLink({name_, generation_, channel, ranks_[peer]});
  if (!link.has_value()) return absl::OkStatus();
  if (link->ranks_hash != ranks_hash_) {
    return Error(absl::StatusCode::kFailedPrecondition,
                 absl::StrCat(Describe(peer), " has created it with another list of ranks"));
  }
  connection.link.emplace(std::move(link->socket));
  return absl::OkStatus();
}

void Proxy::Run() {
  const std::string thread_name = absl::StrFormat("NCCL Progress%2d", fabric_.options().rank % 100);
  pthread_setname_np(pthread_self(), thread_name.c_str());
  trace_->Stop(trace_->StartProxyCtrl(EventState::kProxyIdle));
  while (TakeSubmissions()) {
    if (broken_.ok()) broken_ = Progress();
    if (!broken_.ok()) FailAll(broken_);
    if (running_.empty() && sleep_event_ == nullptr) {
      sleep_event_ = trace_->StartProxyCtrl(EventState::kProxySleep);
    }
    WaitForEvents(NextDeadline());
  }
  Linger();
  if (sleep_event_ != nullptr) {
    trace_->RecordProxyCtrl(sleep_event_, EventState::kProxyWakeup, 0);
    trace_->Stop(sleep_event_);
  }
  FailAll(Error(absl::StatusCode::kCancelled, "destroyed with unfinished operations"));
}

bool Proxy::TakeSubmissions() {
  std::vector<std::shared_ptr<Operation>> taken;
  bool goes_on = true;
  {
    MutexLock lock(mutex_);
    taken.swap(submitted_);
    goes_on = !stop_;
  }
  if (!taken.empty()) Append(taken);
  return goes_on;
}

void Proxy::Append(const std::vector<std::shared_ptr<Operation>>& operations) {
  void* const slept = std::exchange(sleep_event_, nullptr);
  trace_->RecordProxyCtrl(slept, EventState::kProxyWakeup, 0);
  trace_->Stop(slept);
  void* const append = trace_->StartProxyCtrl(EventState::kProxyAppend);
  int appended = 0;
  for (const std::shared_ptr<Operation>& operation : operations) {
    for (const std::unique_ptr<Flow>& flow : operation->flows) {
      void* const event = trace_->StartProxyOp(operation->event_mask, *flow, chunk_bytes());
      const Key key(flow->channel, flow->peer);
      if (flow->is_send) {
        sends_.try_emplace(key, *trace_).first->second.Push({operation, flow.get(), event});
      } else {
        receives_.try_emplace(key, *trace_, chunk_bytes())
            .first->second.Push({operation, flow.get(), event});
      }
      ++appended;
    }
    running_.push_back({operation, {}, false, false});
  }
  trace_->RecordProxyCtrl(append, EventState::kProxyAppendEnd, appended);
  trace_->Stop(append);
  device_.Drive(this);
  if (slept != nullptr) trace_->Stop(trace_->StartProxyCtrl(EventState::kProxyActive));
}

absl::Status Proxy::Progress() {
  Progressed progressed;
  const auto kick = [&] {
    if (!std::exchange(progressed.tells_device, false)) return;
    if (std::exchange(progressed.device_bytes, 0) > kDriveBytesMax) {
      device_.Kick();
    } else {
      device_.Drive(this);
    }
  };
  for (auto& [key, connection] : receives_) {
    if (suspect_.has_value()) break;
    RETURN_IF_ERROR(DriveReceive(key, connection, progressed));
    kick();
  }
  for (auto& [key, connection] : sends_) {
    if (suspect_.has_value()) break;
    RETURN_IF_ERROR(DriveSend(key, connection, progressed));
    kick();
  }
  TellKernels();
  if (fabric_.AnyGone() || suspect_.has_value()) {
    RETURN_IF_ERROR(CheckLosses());
    RETURN_IF_ERROR(CheckLeavers());
  }
  return CheckDeadlines();
}

absl::Status Proxy::DriveSend(const Key& key, SendConnection& connection, Progressed& progressed) {
  if (connection.flows.empty()) return absl::OkStatus();
  const auto [channel, peer] = key;
  absl::Status status = absl::OkStatus();
  if (!connection.link.has_value() && !connection.is_silent) {
    absl::StatusOr<LinkSender> link = OpenLink(peer, channel);
    status = link.status();
    if (link.ok()) connection.link.emplace(*std::move(link));
  }
  if (status.ok()) status = connection.Progress(progressed);
  if (status.ok()) return status;
  return LinkFailed(peer, During(connection.flows.front()), status, connection.is_silent);
}

absl::Status Proxy::DriveReceive(const Key& key, ReceiveConnection& connection,
                                 Progressed& progressed) {
  if (connection.flows.empty() && !connection.link.has_value()) return absl::OkStatus();
  if (!connection.link.has_value()) RETURN_IF_ERROR(AdoptLink(key, connection));
  const absl::Status status = connection.Progress(progressed);
  if (status.ok()) return status;
  // Without a flow only the last credit is on its way, to a peer that needs it no more.
  if (connection.flows.empty()) {
    connection.link.reset();
    return absl::OkStatus();
  }
  return LinkFailed(key.second, During(connection.flows.front()), status, connection.is_silent);
}

void Proxy::TellKernels() {
  for (auto at = running_.begin(); at != running_.end();) {
    Running& running = *at;
    const Operation& operation = *running.operation;
    const uint64_t started_ns = operation.kernel_started_ns.load(std::memory_order_acquire);
    if (operation.tells_kernels && !operation.flows.empty() && started_ns != 0) {
      void* const task = operation.flows.front()->task;
      for (uint32_t i = 0; i < operation.channel_count && !running.told_start; ++i) {
        running.kernels.push_back(trace_->StartKernel(operation.event_mask, task,
                                                      operation.first_channel + i, started_ns));
      }
      running.told_start = true;
    }
    const uint64_t stopped_ns = operation.kernel_stopped_ns.load(std::memory_order_acquire);
    if (stopped_ns != 0 && !std::exchange(running.told_stop, true)) {
      for (void* const kernel : running.kernels) trace_->StopKernel(kernel, stopped_ns);
    }
    const bool over = running.told_stop && std::all_of(operation.flows.begin(),
                                                       operation.flows.end(), [](const auto& flow) {
                                                         return flow->done() == flow->chunk_count();
                                                       });
    at = over ? running_.erase(at) : std::next(at);
  }
}

absl::Status Proxy::LinkFailed(uint32_t peer, const std::string& during, const absl::Status& status,
                               bool& is_silent) {
  const std::string text =
      absl::StrFormat("%s: link to %s: %s", during, Describe(peer), std::string(status.message()));
  if (fabric_.options().lost_peer == LostPeer::kHang) {
    is_silent = true;
    if (!silence_.has_value()) {
      silence_ =
          Suspect{peer, text,
                  Clock::now() + absl::ToChronoNanoseconds(fabric_.options().lost_peer_silence)};
    }
    return absl::OkStatus();
  }
  if (!absl::IsUnavailable(status)) return Error(status.code(), text);
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
  // A member that fails for one that has left closes its links, too: the suspect itself first.
  for (uint32_t i = 0; i < size(); ++i) {
    const uint32_t peer = (suspect_->peer + i) % size();
    if (!fabric_.HasLeft(ranks_[peer])) continue;
    return Error(absl::StatusCode::kUnavailable,
                 absl::StrFormat("%s has left; seen in %s", Describe(peer), suspect_->text));
  }
  if (Clock::now() < suspect_->deadline) return absl::OkStatus();
  return Error(absl::StatusCode::kUnavailable,
               absl::StrFormat("%s is lost; seen in %s", Describe(suspect_->peer), suspect_->text));
}

bool Proxy::WaitsForLink(uint32_t peer) const {
  return std::any_of(receives_.begin(), receives_.end(), [peer](const auto& entry) {
    const ReceiveConnection& connection = entry.second;
    return entry.first.second == peer && !connection.flows.empty() && !connection.link.has_value();
  });
}

absl::Status Proxy::CheckLeavers() {
  if (fabric_.options().lost_peer == LostPeer::kHang) return absl::OkStatus();
  uint32_t peer = 0;
  while (peer < size() && !(fabric_.HasLeft(ranks_[peer]) && WaitsForLink(peer))) ++peer;
  if (peer == size()) {
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
  if (silence_.has_value() && silence_->deadline <= now) {
    return Error(
        absl::StatusCode::kUnavailable,
        absl::StrFormat("%s is lost: %s of silence; seen in %s", Describe(silence_->peer),
                        absl::FormatDuration(fabric_.options().lost_peer_silence), silence_->text));
  }
  const auto expired = [now](const auto& connection) {
    return !connection.flows.empty() && connection.flows.front().operation->deadline() <= now &&
           !connection.flows.front().operation->Done();
  };
  for (const auto& [key, connection] : receives_) {
    if (!expired(connection)) continue;
    return Error(absl::StatusCode::kDeadlineExceeded,
                 absl::StrCat(During(connection.flows.front()), " waits to receive from ",
                              Describe(key.second)));
  }
  for (const auto& [key, connection] : sends_) {
    if (!expired(connection)) continue;
    return Error(
        absl::StatusCode::kDeadlineExceeded,
        absl::StrCat(During(connection.flows.front()), " waits to send to ", Describe(key.second)));
  }
  for (const Running& running : running_) {
    const Operation& operation = *running.operation;
    if (operation.deadline() > now || operation.Done()) continue;
    return Error(absl::StatusCode::kDeadlineExceeded,
                 absl::StrFormat("%s #%d waits for this rank's device", Name(operation.kind()),
                                 operation.sequence));
  }
  return absl::OkStatus();
}

void Proxy::FailAll(const absl::Status& status) {
  device_.DropStreams(this);
  for (const Running& running : running_) running.operation->Finish(status);
  running_.clear();
  // Our end of a broken communicator is closed, so that peers in the same operation see it.
  sends_.clear();
  receives_.clear();
  suspect_.reset();
  leaver_.reset();
  silence_.reset();
}

Deadline Proxy::NextDeadline() const {
  Deadline deadline = Clock::now() + std::chrono::hours(1);
  for (const std::optional<Suspect>* suspect : {&suspect_, &leaver_, &silence_}) {
    if (suspect->has_value()) deadline = std::min(deadline, (*suspect)->deadline);
  }
  for (const Running& running : running_) {
    if (!running.operation->Done()) deadline = std::min(deadline, running.operation->deadline());
  }
  return deadline;
}

void Proxy::WaitForEvents(Deadline deadline) {
  std::vector<pollfd> entries;
  entries.push_back({wake_.fd(), POLLIN, 0});
  // What nobody waits for is not watched: its end would be reported again and again.
  const auto watch = [&entries](const auto& connection, bool reads) {
    if (!connection.link.has_value() || connection.is_silent) return;
    const int events = (reads ? POLLIN : 0) | (connection.link->is_blocked() ? POLLOUT : 0);
    if (events != 0) entries.push_back({connection.link->fd(), static_cast<int16_t>(events), 0});
  };
  if (!suspect_.has_value()) {
    for (const auto& [key, connection] : sends_) watch(connection, !connection.flows.empty());
    for (const auto& [key, connection] : receives_) watch(connection, connection.ExpectsData());
  }
  // An error of poll(2) can only be EINTR here, and then the caller looks at everything again.
  static_cast<void>(poll(entries.data(), entries.size(), PollMilliseconds(deadline)));
  if (entries.front().revents != 0) wake_.Drain();
  size_t next = 1;
  const auto tell = [&](auto& connection) {
    if (next == entries.size() || !connection.link.has_value() ||
        connection.link->fd() != entries[next].fd) {
      return;
    }
    const int16_t found = entries[next++].revents;
    const bool ended = (found & (POLLHUP | POLLERR)) != 0;
    connection.link->Ready((found & POLLIN) != 0 || ended, (found & POLLOUT) != 0 || ended);
  };
  for (auto& [key, connection] : sends_) tell(connection);
  for (auto& [key, connection] : receives_) tell(connection);
}

void Proxy::Linger() {
  const Deadline deadline = Clock::now() + kLossGrace;
  // An operation that is done is not over: its sends may not have arrived, its end not been told.
  const auto is_done = [](const Running& running) { return running.operation->Done(); };
  while (broken_.ok()) {
    broken_ = Progress();
    if (!broken_.ok() || suspect_.has_value() || silence_.has_value() || Clock::now() > deadline ||
        std::none_of(running_.begin(), running_.end(), is_done)) {
      break;
    }
    WaitForEvents(deadline);
  }
}

}  // namespace collectives
