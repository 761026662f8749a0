#include "agent/keeper_link.h"

#include <signal.h>

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/log.h"
#include "agent/process.h"
#include "base/check.h"
#include "base/kill_point.h"

namespace holdfast {
namespace {

constexpr absl::Duration kDeathDeadline = absl::Seconds(2);
constexpr absl::Duration kRetryDelay = absl::Seconds(1);
// A keeper that dies sooner is restarted after kRetryDelay instead of at once.
constexpr absl::Duration kHealthyAfter = absl::Milliseconds(100);

bool IsAgents(const std::string& name) { return name.rfind("agent/", 0) == 0; }

}  // namespace

KeeperLink::KeeperLink(Handover handover, const Limits& limits, EventLoop& loop, const Clock& clock,
                       ServiceManager* service_manager)
    : limits_(limits),
      loop_(loop),
      clock_(clock),
      service_manager_(service_manager),
      channel_(std::move(handover.channel)),
      keeper_pidfd_(std::move(handover.peer_pidfd)),
      keeper_started_(clock.Elapsed() - kHealthyAfter) {
  for (KeptDescriptor& kept : handover.descriptors) {
    if (service_manager_ != nullptr) service_manager_->Keep(kept.name, kept.fd.get());
    descriptors_[kept.name] = std::move(kept.fd);
  }
  WatchKeeper();
}

KeeperLink::~KeeperLink() {
  if (keeper_pidfd_) loop_.Unwatch(keeper_pidfd_.get());
  if (retry_timer_ != 0) loop_.CancelTimer(retry_timer_);
}

void KeeperLink::WatchKeeper() {
  loop_.Watch(keeper_pidfd_.get(), EventLoop::FdEvents::kReadable, [this] { OnKeeperDead(); });
}

void KeeperLink::Keep(const std::string& name, int fd) {
  CheckDescriptorName(name);
  CHECK(descriptors_.size() < kKeptDescriptorsMax);
  KillPoint("keep.sending");
  UniqueFd copy = Duplicate(fd);
  if (!copy) {
    // The limit of open files is sized for this (LocalServer); without a copy the keeper can still
    // hold it, but a new keeper would not get it.
    LogError(absl::StrCat("out of descriptors while keeping ", name));
  }
  const auto [entry, is_new] = descriptors_.emplace(name, std::move(copy));
  CHECK(is_new);
  absl::Status sent = absl::UnavailableError("there is no keeper");
  if (keeper_pidfd_) sent = SendKeep(channel_.get(), name, fd, limits_.send_deadline);
  KillPoint("keep.sent");
  if (service_manager_ != nullptr) service_manager_->Keep(name, fd);
  if (sent.ok()) return;
  LogWarning(absl::StrCat("keeping ", name, ": ", sent.ToString()));
  RestartKeeper();  // with all of descriptors_, this one included
}

void KeeperLink::Drop(const std::string& name) {
  if (descriptors_.erase(name) == 0) return;
  if (service_manager_ != nullptr) {
    service_manager_->Drop(name, [this](const std::string& waiting) { return Find(waiting); });
  }
  if (!keeper_pidfd_) return;
  const absl::Status sent = SendDrop(channel_.get(), name, limits_.send_deadline);
  KillPoint("drop.sent");
  if (!sent.ok()) {
    LogWarning(absl::StrCat("dropping ", name, ": ", sent.ToString()));
    RestartKeeper();
  }
}

int KeeperLink::Find(const std::string& name) const {
  const auto found = descriptors_.find(name);
  return found == descriptors_.end() ? -1 : found->second.get();
}

std::vector<KeptDescriptor> KeeperLink::EngineDescriptors() const {
  std::vector<KeptDescriptor> kept;
  for (const auto& [name, fd] : descriptors_) {
    if (!IsAgents(name)) kept.push_back({name, Duplicate(fd.get())});
  }
  return kept;
}

bool KeeperLink::holds_engine_descriptors() const {
  return std::any_of(descriptors_.begin(), descriptors_.end(),
                     [](const auto& entry) { return !IsAgents(entry.first); });
}

std::vector<KeptDescriptor> KeeperLink::FindAll(const std::string& prefix) const {
  std::vector<KeptDescriptor> kept;
  for (const auto& [name, fd] : descriptors_) {
    if (name.rfind(prefix, 0) == 0) kept.push_back({name, Duplicate(fd.get())});
  }
  return kept;
}

void KeeperLink::Finish(int exit_code) {
  if (!keeper_pidfd_) return;
  // Dropped: a keeper that cannot hear it starts one more worker, which finds nothing to do.
  SendFinished(channel_.get(), exit_code, limits_.send_deadline).IgnoreError();
}

pid_t KeeperLink::keeper_pid() const { return keeper_pidfd_ ? PidOf(keeper_pidfd_.get()) : 0; }

void KeeperLink::OnKeeperDead() {
  LogError(absl::StrCat("the keeper died (", Reap(keeper_pidfd_.get()), ")"));
  if (clock_.Elapsed() - keeper_started_ < kHealthyAfter) {
    RestartLater();
  } else {
    RestartKeeper();
  }
}

void KeeperLink::RestartLater() {
  if (keeper_pidfd_) loop_.Unwatch(keeper_pidfd_.get());
  keeper_pidfd_.Reset();
  channel_.Reset();
  if (retry_timer_ != 0) return;
  retry_timer_ = loop_.RunAfter(kRetryDelay, [this] {
    retry_timer_ = 0;
    if (!keeper_pidfd_) RestartKeeper();
  });
}

void KeeperLink::RestartKeeper() {
  if (keeper_pidfd_) {
    loop_.Unwatch(keeper_pidfd_.get());
    // It may only be stopped. Two keepers would start two workers.
    SendSignal(keeper_pidfd_.get(), SIGKILL);
    if (!WaitUntilDead(keeper_pidfd_.get(), kDeathDeadline)) {
      LogError("the keeper does not die; going on without a new one");
      WatchKeeper();
      return;
    }
    Reap(keeper_pidfd_.get());
    keeper_pidfd_.Reset();
    channel_.Reset();
  }
  StartRequest request;
  request.role = Role::kKeeper;
  request.restart_count = keeper_restart_count_ + 1;
  for (const auto& [name, fd] : descriptors_) {
    if (fd) request.descriptors.push_back({name, fd.get()});
  }
  absl::StatusOr<StartedPeer> started = StartPeer(request);
  if (!started.ok()) {
    LogError(absl::StrCat("cannot start a keeper: ", started.status().ToString()));
    RestartLater();
    return;
  }
  ++keeper_restart_count_;
  keeper_started_ = clock_.Elapsed();
  channel_ = std::move(started->channel);
  keeper_pidfd_ = std::move(started->pidfd);
  WatchKeeper();
  LogInfo(absl::StrFormat("started keeper %d (restart %d) with %d descriptors", keeper_pid(),
                          keeper_restart_count_, request.descriptors.size()));
}

}  // namespace holdfast
