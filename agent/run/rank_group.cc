#include "agent/run/rank_group.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/log.h"
#include "base/status_macros.h"
#include "io/errno_status.h"

namespace holdfast {
namespace {

constexpr char kRankPrefix[] = "rank-";
constexpr char kStartedName[] = "shim";
// A shim that does not answer although it lives is looked for again; with a connection that its own
// limit has closed this happens once.
constexpr absl::Duration kConnectAgain = absl::Milliseconds(50);
constexpr int kConnectTriesMax = 100;

absl::Status WriteStarted(const std::string& directory, pid_t process) {
  const std::string path = absl::StrCat(directory, "/", kStartedName);
  const std::string text = absl::StrCat(process, "\n");
  const UniqueFd file(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  if (!file || write(file.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
    return ErrnoStatus(errno, "write", path);
  }
  return absl::OkStatus();
}

bool WasStarted(const std::string& directory) {
  return access(absl::StrCat(directory, "/", kStartedName).c_str(), F_OK) == 0;
}

RankEnd ToEnd(const ExitRecord& record) {
  return {record.rank_pid, record.wait_status, record.start_error, /*shim_lost=*/false};
}

}  // namespace

RankGroup::RankGroup(std::string directory, std::string shim_program, EventLoop& loop,
                     Callbacks callbacks)
    : directory_(std::move(directory)),
      shim_program_(std::move(shim_program)),
      loop_(loop),
      callbacks_(std::move(callbacks)) {}

RankGroup::~RankGroup() {
  for (auto& [rank, shim] : ranks_) {
    DropConnection(shim);
    if (shim.child) loop_.Unwatch(shim.child.get());
  }
}

void RankGroup::DropConnection(RankShim& shim) {
  if (!shim.connection) return;
  loop_.Unwatch(shim.connection.get());
  shim.connection.Reset();
}

void RankGroup::ReapShim(uint32_t rank) {
  UniqueFd& child = ranks_.at(rank).child;
  loop_.Unwatch(child.get());
  Reap(child.get());
  child.Reset();
}

std::string RankGroup::DirectoryOf(uint32_t rank) const {
  return absl::StrCat(directory_, "/", kRankPrefix, rank);
}

void RankGroup::Tell(std::function<void()> what) {
  loop_.Post([alive = std::weak_ptr<bool>(alive_), what = std::move(what)] {
    if (!alive.expired()) what();
  });
}

void RankGroup::Recover() {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(directory_, error)) {
    const std::string name = entry.path().filename().string();
    uint32_t rank = 0;
    if (!name.starts_with(kRankPrefix) ||
        !absl::SimpleAtoi(name.substr(sizeof(kRankPrefix) - 1), &rank)) {
      continue;
    }
    const bool listens = ConnectToShim(entry.path().string()).ok();
    if (!listens && !WasStarted(entry.path().string())) continue;
    ranks_[rank].directory = entry.path().string();
    Connect(rank);
  }
}

absl::Status RankGroup::Start(ShimSpec spec) {
  const uint32_t rank = spec.rank;
  if (has(rank)) return absl::OkStatus();
  spec.directory = DirectoryOf(rank);
  std::error_code error;
  std::filesystem::create_directories(spec.directory, error);
  if (error) return ErrnoStatus(error.value(), "create directory", spec.directory);
  ASSIGN_OR_RETURN(Child child, StartShim(shim_program_, spec));
  RankShim& shim = ranks_[rank];
  shim.directory = spec.directory;
  shim.child = std::move(child.pidfd);
  loop_.Watch(shim.child.get(), EventLoop::FdEvents::kReadable, [this, rank] { ReapShim(rank); });
  // Without the mark it is found by its socket, while it lives.
  if (absl::Status written = WriteStarted(spec.directory, child.pid); !written.ok()) {
    LogWarning(absl::StrCat("rank ", rank, ": ", written.ToString()));
  }
  Connect(rank);
  return absl::OkStatus();
}

void RankGroup::Connect(uint32_t rank) {
  RankShim& shim = ranks_.at(rank);
  absl::StatusOr<UniqueFd> connection = ConnectToShim(shim.directory);
  if (!connection.ok()) {
    if (absl::IsResourceExhausted(connection.status()) && ++shim.connect_tries < kConnectTriesMax) {
      loop_.RunAfter(kConnectAgain, [this, alive = std::weak_ptr<bool>(alive_), rank] {
        if (!alive.expired()) Connect(rank);
      });
      return;
    }
    // There is no shim any more: what it has recorded is the last word, or it was killed, and the
    // rank with it.
    const std::optional<ExitRecord> record = ReadExitRecord(shim.directory);
    RankEnd end;
    end.wait_status = SIGKILL;
    end.shim_lost = true;
    if (record.has_value()) end = ToEnd(*record);
    lost_a_shim_ |= !shim.tree_gone;
    if (!record.has_value() && !shim.has_ended) {
      LogWarning(absl::StrFormat("rank %d: its shim has gone without a record of an end", rank));
    }
    TakeEnd(rank, end);
    TreeGone(rank);
    return;
  }
  shim.connection = *std::move(connection);
  loop_.Watch(shim.connection.get(), EventLoop::FdEvents::kReadable,
              [this, rank] { OnReady(rank); });
  if (kills_) Ask(shim, ShimRequestType::kKillTree);
  if (is_released_) Ask(shim, ShimRequestType::kRelease);
}

void RankGroup::OnReady(uint32_t rank) {
  for (;;) {
    RankShim& shim = ranks_.at(rank);
    const ShimMessage message = ReceiveFromShim(shim.connection.get());
    switch (message.kind) {
      case ShimMessage::Kind::kNothing:
        return;
      case ShimMessage::Kind::kEnd:
        OnConnectionEnd(rank);
        return;
      case ShimMessage::Kind::kState:
        TakeState(rank, message.state);
    }
  }
}

void RankGroup::OnConnectionEnd(uint32_t rank) {
  RankShim& shim = ranks_.at(rank);
  DropConnection(shim);
  // It has ended, or has only closed this connection.
  if (!shim.tree_gone) Connect(rank);
}

void RankGroup::TakeState(uint32_t rank, const ShimState& state) {
  RankShim& shim = ranks_.at(rank);
  if (!shim.has_started && state.rank_pid != 0) {
    shim.has_started = true;
    Tell([this, rank, process_id = state.rank_pid] { callbacks_.started(rank, process_id); });
  }
  if (state.has_ended != 0) {
    TakeEnd(rank, {state.rank_pid, state.wait_status, state.start_error, /*shim_lost=*/false});
  }
  if (state.tree_has_ended != 0) TreeGone(rank);
}

void RankGroup::TakeEnd(uint32_t rank, const RankEnd& end) {
  RankShim& shim = ranks_.at(rank);
  if (std::exchange(shim.has_ended, true)) return;
  Tell([this, rank, end] { callbacks_.ended(rank, end); });
}

void RankGroup::TreeGone(uint32_t rank) {
  if (std::exchange(ranks_.at(rank).tree_gone, true) || !all_gone()) return;
  Tell([this] { callbacks_.all_gone(); });
}

void RankGroup::Ask(RankShim& shim, ShimRequestType type, int signal_number) {
  // Dropped: a shim that has gone is seen by its connection.
  if (shim.connection) (void)SendToShim(shim.connection.get(), type, signal_number);
}

void RankGroup::Signal(int signal_number) {
  for (auto& [rank, shim] : ranks_) {
    if (!shim.has_ended) Ask(shim, ShimRequestType::kSignal, signal_number);
  }
}

void RankGroup::KillTrees() {
  kills_ = true;
  for (auto& [rank, shim] : ranks_) Ask(shim, ShimRequestType::kKillTree);
}

void RankGroup::Release() {
  is_released_ = true;
  for (auto& [rank, shim] : ranks_) Ask(shim, ShimRequestType::kRelease);
}

bool RankGroup::all_gone() const {
  for (const auto& [rank, shim] : ranks_) {
    if (!shim.tree_gone) return false;
  }
  return true;
}

}  // namespace holdfast
