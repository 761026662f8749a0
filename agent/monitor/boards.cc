#include "agent/monitor/boards.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_format.h"
#include "agent/monitor/names.h"
#include "base/status_macros.h"

namespace holdfast {
namespace {

using nlohmann::json;

json CommunicatorJson(const abi::CommunicatorReading& reading) {
  return {{"hash", absl::StrFormat("%016x", reading.hash)},
          {"name", reading.name},
          {"ranks", reading.ranks},
          {"rank", reading.rank},
          {"foreign", reading.foreign},
          {"enqueued", reading.enqueued},
          {"started", reading.started},
          {"finished", reading.finished}};
}

// What the connections wait for: how many, and for how long the longest.
json WaitsJson(const MappedBoard& board) {
  const abi::BoardView& view = board.view();
  struct Wait {
    int connections = 0;
    double longest_seconds = 0;
  };
  std::map<std::string, Wait> waits;
  for (uint32_t i = 0; i < abi::kBoardSlots; ++i) {
    abi::SlotReading slot;
    if (abi::ReadSlot(view, i, &slot) != abi::SlotRead::kRead) continue;
    const abi::Communicator& communicator = view.communicators[slot.key.communicator];
    if (communicator.state.load(std::memory_order_acquire) != abi::CommunicatorState::kOpen) {
      continue;
    }
    const char* name = WaitName(slot.state);
    if (name == nullptr) continue;
    Wait& wait = waits[name];
    ++wait.connections;
    const uint64_t now = board.NowTicks();
    const bool known = slot.since != 0 && slot.since <= now;
    wait.longest_seconds =
        std::max(wait.longest_seconds, known ? board.Seconds(now - slot.since) : 0.0);
  }
  json result = json::object();
  for (const auto& [name, wait] : waits) {
    result[name] = {{"connections", wait.connections}, {"longest_seconds", wait.longest_seconds}};
  }
  return result;
}

}  // namespace

MonitorBoards::MonitorBoards(EventLoop& loop, const Clock& clock) : loop_(loop), clock_(clock) {}

MonitorBoards::~MonitorBoards() {
  if (timer_ != 0) loop_.CancelTimer(timer_);
  for (const std::unique_ptr<Board>& board : boards_) {
    if (board->alive) loop_.Unwatch(board->offer.process.get());
  }
}

size_t MonitorBoards::alive_count() const {
  return static_cast<size_t>(std::count_if(boards_.begin(), boards_.end(),
                                           [](const auto& board) { return board->alive; }));
}

size_t MonitorBoards::dead_count() const { return boards_.size() - alive_count(); }

absl::Status MonitorBoards::Adopt(Offer offer) {
  if (offer.board_bytes != abi::kBoardBytes) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "monitor board: expected %d bytes, offered as %d", abi::kBoardBytes, offer.board_bytes));
  }
  ASSIGN_OR_RETURN(std::shared_ptr<MappedBoard> mapped, MappedBoard::Map(offer.board.get()));
  const auto found = std::find_if(boards_.begin(), boards_.end(), [&](const auto& board) {
    return board->mapped->device() == mapped->device() &&
           board->mapped->inode() == mapped->inode() && board->alive;
  });
  if (found != boards_.end()) return absl::OkStatus();
  if (!offer.process) {
    return absl::ResourceExhaustedError("monitor board: no descriptor left to watch its process");
  }
  if (alive_count() >= kAliveMax) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("monitor board: %d living processes have one already", kAliveMax));
  }
  auto board = std::make_unique<Board>();
  board->mapped = std::move(mapped);
  // The mapping holds the memory; the descriptor is one of a limited number.
  offer.board.Reset();
  board->offer = std::move(offer);
  board->id = next_id_++;
  Board* const watched = board.get();
  loop_.Watch(watched->offer.process.get(), EventLoop::FdEvents::kReadable,
              [this, watched] { OnDeath(watched); });
  boards_.push_back(std::move(board));
  Changed();
  return absl::OkStatus();
}

void MonitorBoards::Changed() {
  ++changes_;
  if (changed_) changed_();
}

absl::Status MonitorBoards::Window(const std::string& job, uint32_t rank, absl::Duration length,
                                   std::function<void(std::string lines)> done) {
  if (length <= absl::ZeroDuration() || length > RecordWindow::kLengthMax) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "window of %s: expected more than 0, at most %s", absl::FormatDuration(length),
        absl::FormatDuration(RecordWindow::kLengthMax)));
  }
  std::vector<std::shared_ptr<MappedBoard>> boards;
  for (const std::unique_ptr<Board>& board : boards_) {
    if (board->alive && board->offer.job == job && board->offer.rank == rank) {
      boards.push_back(board->mapped);
    }
  }
  if (boards.empty()) {
    return absl::NotFoundError(absl::StrFormat(
        "no living process of job '%s', rank %d has a monitor board here", job, rank));
  }
  if (windows_.size() >= kWindowsMax) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("%d windows of records are open already", kWindowsMax));
  }
  // Its place in the list is known only behind the insertion.
  const auto at = windows_.emplace(windows_.end());
  *at = std::make_unique<RecordWindow>(loop_, clock_, std::move(boards), length,
                                       [this, at, done = std::move(done)](std::string lines) {
                                         windows_.erase(at);
                                         done(std::move(lines));
                                       });
  return absl::OkStatus();
}

void MonitorBoards::OnDeath(Board* board) {
  loop_.Unwatch(board->offer.process.get());
  board->offer.process.Reset();
  board->alive = false;
  board->died = clock_.Elapsed();
  DropOldDead();
  Changed();
}

// Dead boards are in the order of nothing; there are few.
void MonitorBoards::DropOldDead() {
  const absl::Duration now = clock_.Elapsed();
  std::erase_if(boards_,
                [&](const auto& board) { return !board->alive && now - board->died >= kDeadAge; });
  while (dead_count() > kDeadMax) {
    boards_.erase(
        std::min_element(boards_.begin(), boards_.end(), [](const auto& a, const auto& b) {
          return std::pair(a->alive, a->died) < std::pair(b->alive, b->died);
        }));
  }
  if (timer_ != 0) loop_.CancelTimer(timer_);
  timer_ = 0;
  absl::Duration next = absl::InfiniteDuration();
  for (const std::unique_ptr<Board>& board : boards_) {
    if (!board->alive) next = std::min(next, board->died + kDeadAge - now);
  }
  if (next < absl::InfiniteDuration()) {
    timer_ = loop_.RunAfter(next, [this] {
      timer_ = 0;
      DropOldDead();
      Changed();
    });
  }
}

std::string MonitorBoards::StatusJson() const {
  json all = json::array();
  for (const std::unique_ptr<Board>& board : boards_) {
    const abi::BoardHeader& header = *board->mapped->view().header;
    uint64_t drops = 0;
    for (const std::atomic<uint64_t>& count : header.drops) {
      drops += count.load(std::memory_order_relaxed);
    }
    json communicators = json::array();
    for (uint32_t i = 0; i < abi::kBoardCommunicators; ++i) {
      abi::CommunicatorReading reading;
      if (abi::ReadCommunicator(board->mapped->view().communicators[i], &reading) &&
          reading.state == abi::CommunicatorState::kOpen) {
        communicators.push_back(CommunicatorJson(reading));
      }
    }
    json entry = {{"job", board->offer.job},
                  {"attempt_key", board->offer.attempt_key},
                  {"node", board->offer.node},
                  {"rank", board->offer.rank == UINT32_MAX ? json() : json(board->offer.rank)},
                  {"process_id", board->offer.process_id},
                  {"writer", header.writer == abi::BoardWriter::kProfilerPlugin ? "nccl" : "hook"},
                  {"alive", board->alive},
                  {"step", header.step.load(std::memory_order_relaxed)},
                  {"not_shown", drops},
                  {"communicators", std::move(communicators)},
                  {"waits", WaitsJson(*board->mapped)}};
    if (!board->alive) {
      entry["dead_for_seconds"] = absl::ToDoubleSeconds(clock_.Elapsed() - board->died);
    }
    all.push_back(std::move(entry));
  }
  return all.dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace holdfast
