#include "agent/keeper.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/log.h"
#include "agent/process.h"
#include "base/check.h"
#include "base/kill_point.h"

namespace holdfast {
namespace {

// So many messages are read before signals are looked at again.
constexpr int kMessagesPerTurn = 64;

UniqueFd MakeSignalFd() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  CHECK(sigprocmask(SIG_BLOCK, &signals, nullptr) == 0);
  UniqueFd signal_fd(signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK));
  CHECK(signal_fd);
  return signal_fd;
}

bool IsAgents(const std::string& name) { return name.rfind("agent/", 0) == 0; }

}  // namespace

Keeper::Keeper(Start start, const KeeperLimits& limits, const Clock& clock)
    : limits_(limits),
      clock_(clock),
      service_manager_(std::move(start.unit)),
      worker_kill_plans_(std::move(start.worker_kill_plans)),
      channel_(std::move(start.channel)),
      worker_pidfd_(std::move(start.worker_pidfd)),
      worker_started_(clock.Elapsed()),
      start_at_(clock.Elapsed()) {
  for (KeptDescriptor& kept : start.descriptors) Hold(kept.name, std::move(kept.fd));
}

void Keeper::Hold(const std::string& name, UniqueFd fd) {
  descriptors_[name] = {next_order_++, std::move(fd)};
}

int Keeper::Run() {
  const UniqueFd signal_fd = MakeSignalFd();
  while (!done_) {
    if (!worker_pidfd_ && clock_.Elapsed() >= start_at_) StartWorker();
    if (clock_.Elapsed() >= kill_at_ && worker_pidfd_) {
      LogError("the worker did not end within its deadline; killing it");
      SendSignal(worker_pidfd_.get(), SIGKILL);
      exit_code_ = 1;
      kill_at_ = absl::InfiniteDuration();
    }
    // A negative descriptor is ignored by poll.
    pollfd entries[3] = {{signal_fd.get(), POLLIN, 0},
                         {channel_.get(), POLLIN, 0},
                         {worker_pidfd_.get(), POLLIN, 0}};
    const absl::Duration wait = TimeUntilNextDeadline();
    const timespec timeout = absl::ToTimespec(std::min(wait, absl::Hours(1)));
    if (ppoll(entries, 3, &timeout, nullptr) < 0) {
      CHECK(errno == EINTR);
      continue;
    }
    if (entries[0].revents != 0) OnSignal(signal_fd.get());
    if (entries[1].revents != 0) ReadMessages();
    if (entries[2].revents != 0) OnWorkerDead();
  }
  return exit_code_;
}

absl::Duration Keeper::TimeUntilNextDeadline() const {
  const absl::Duration next = worker_pidfd_ ? kill_at_ : start_at_;
  return std::max(next - clock_.Elapsed(), absl::ZeroDuration());
}

void Keeper::StartWorker() {
  StartRequest request;
  request.role = Role::kWorker;
  request.restart_count = starts_;
  if (!worker_kill_plans_.empty()) {
    request.kill_plan = std::move(worker_kill_plans_.front());
    worker_kill_plans_.pop_front();
  }
  std::map<uint64_t, NamedFd> in_order;
  for (const auto& [name, held] : descriptors_) in_order[held.order] = {name, held.fd.get()};
  for (const auto& [order, one] : in_order) request.descriptors.push_back(one);
  KillPoint("keeper.worker_starting");
  absl::StatusOr<StartedPeer> started = StartPeer(request);
  KillPoint("keeper.worker_started");
  if (!started.ok()) {
    // No memory, no process slot: as if it had died at once.
    LogError(absl::StrCat("cannot start the worker: ", started.status().ToString()));
    start_at_ = clock_.Elapsed() + limits_.backoff_max;
    return;
  }
  ++starts_;
  worker_pidfd_ = std::move(started->pidfd);
  channel_ = std::move(started->channel);
  worker_started_ = clock_.Elapsed();
  LogInfo(absl::StrFormat("started worker %d (start %d) with %d descriptors",
                          PidOf(worker_pidfd_.get()), starts_, descriptors_.size()));
  if (terminating_) SendSignal(worker_pidfd_.get(), SIGTERM);
}

bool Keeper::ReadMessages() {
  for (int i = 0; i < kMessagesPerTurn; ++i) {
    // Looked at BEFORE the queue: only then does an empty queue mean that nothing will ever come.
    pollfd entry{channel_.get(), 0, 0};
    const bool hung_up = poll(&entry, 1, 0) > 0;
    absl::StatusOr<std::optional<ChannelMessage>> received = ReceiveMessage(channel_.get());
    if (!received.ok()) {
      // A descriptor is missing here and the worker believes that we have it. Dying is the cure:
      // the worker starts the next keeper with all of them.
      LogError(absl::StrCat("keeper gives itself up: ", received.status().ToString()));
      _exit(1);
    }
    if (!received->has_value()) {
      if (hung_up) channel_.Reset();
      return false;
    }
    KillPoint("keeper.message_received");
    ChannelMessage& message = **received;
    switch (message.type) {
      case ChannelMessage::Type::kKeep:
        Hold(message.name, std::move(message.fd));
        break;
      case ChannelMessage::Type::kDrop:
        descriptors_.erase(message.name);
        break;
      case ChannelMessage::Type::kFinished:
        finished_ = true;
        if (exit_code_ == 0) exit_code_ = message.exit_code;
        kill_at_ = clock_.Elapsed() + limits_.drain_margin;
        break;
    }
  }
  return true;
}

void Keeper::OnWorkerDead() {
  // All that it has sent is in our queue by now: a process's pidfd becomes readable after its
  // descriptors are closed.
  while (channel_ && ReadMessages()) {
  }
  service_manager_.AwaitAllRead();
  const std::string how = Reap(worker_pidfd_.get());
  channel_.Reset();
  worker_pidfd_.Reset();
  if (finished_ || exit_code_ != 0) {  // or we have killed it
    done_ = true;
    return;
  }
  const absl::Duration lived = clock_.Elapsed() - worker_started_;
  quick_deaths_ = lived < limits_.healthy_after ? quick_deaths_ + 1 : 1;
  absl::Duration backoff = limits_.backoff_min;
  for (uint32_t i = 1; i < quick_deaths_ && backoff < limits_.backoff_max; ++i) backoff *= 2;
  start_at_ = clock_.Elapsed() + std::min(backoff, limits_.backoff_max);
  LogError(absl::StrFormat("the worker died (%s) after %s; quick deaths in a row: %d of %d", how,
                           absl::FormatDuration(absl::Trunc(lived, absl::Milliseconds(1))),
                           quick_deaths_, limits_.quick_deaths_max));
  if (quick_deaths_ < limits_.quick_deaths_max) return;
  if (dropped_everything_) {
    LogError("giving up: the worker dies at once even without anything handed over");
    done_ = true;
    exit_code_ = 1;
    return;
  }
  DropEngineDescriptors();
  quick_deaths_ = 0;
}

void Keeper::DropEngineDescriptors() {
  const size_t dropped = std::erase_if(descriptors_, [this](const auto& entry) {
    if (IsAgents(entry.first)) return false;
    service_manager_.Drop(entry.first);
    return true;
  });
  dropped_everything_ = true;
  LogError(absl::StrFormat(
      "the worker dies again and again while it takes over what it held: dropping %d descriptors; "
      "images that were only in memory are lost, what is committed to storage is not",
      dropped));
}

void Keeper::OnSignal(int signal_fd) {
  signalfd_siginfo info{};
  if (read(signal_fd, &info, sizeof(info)) != static_cast<ssize_t>(sizeof(info))) return;
  LogInfo(absl::StrFormat("signal %d from process %d: ending", info.ssi_signo, info.ssi_pid));
  if (!terminating_) kill_at_ = clock_.Elapsed() + limits_.drain_deadline + limits_.drain_margin;
  terminating_ = true;
  if (worker_pidfd_) SendSignal(worker_pidfd_.get(), SIGTERM);
}

}  // namespace holdfast
