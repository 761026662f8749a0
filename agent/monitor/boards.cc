#include "agent/monitor/boards.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "agent/handover.h"
#include "agent/monitor/names.h"
#include "agent/monitor/node_aggregator.h"
#include "agent/monitor/process_end.h"
#include "agent/process.h"
#include "agent/run/process_tree.h"
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

constexpr char kUnnamedPrefix[] = "unnamed-";

std::string BoardName(uint64_t id) { return absl::StrCat(kMonitorPrefix, id, "/board"); }
std::string ProcessName(uint64_t id, uint32_t process_id) {
  return absl::StrCat(kMonitorPrefix, id, "/process-", process_id);
}

// A text of the header, which the process may be changing.
template <size_t kBytes>
std::string TextOf(const char (&text)[kBytes]) {
  return std::string(text, strnlen(text, kBytes));
}

}  // namespace

MonitorBoards::MonitorBoards(EventLoop& loop, const Clock& clock, DescriptorKeeper& keeper)
    : loop_(loop), clock_(clock), keeper_(keeper) {}

MonitorBoards::~MonitorBoards() {
  if (timer_ != 0) loop_.CancelTimer(timer_);
  for (const std::unique_ptr<Board>& board : boards_) {
    if (board->alive) loop_.Unwatch(board->offer.process.get());
    if (board->asks != 0) loop_.CancelTimer(board->asks);
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
  const uint64_t id = next_id_++;
  // The process first: without it a board is nobody's.
  keeper_.Keep(ProcessName(id, offer.process_id), offer.process.get());
  keeper_.Keep(BoardName(id), offer.board.get());
  Add(std::move(offer), std::move(mapped), id);
  return absl::OkStatus();
}

// What the job is called. Jobs without a name must not hide each other: where a rank of that number
// lives already, started by somebody else, it is another job, "unnamed-2". Its other ranks follow
// by who started them, or, if each has a parent of its own, as their numbers are taken, too.
std::string MonitorBoards::NameOf(const Offer& offer, pid_t parent) const {
  const auto named = [](const Board& board) { return NodeAggregator::JobNamed(board.offer.job); };
  if (NodeAggregator::JobNamed(offer.job) != NodeAggregator::kUnnamed) return offer.job;
  std::set<std::string> taken;
  const Board* relative = nullptr;
  for (const std::unique_ptr<Board>& board : boards_) {
    if (!board->alive || board->offer.node != offer.node) continue;
    const bool unnamed =
        named(*board) == NodeAggregator::kUnnamed || board->offer.job.starts_with(kUnnamedPrefix);
    if (!unnamed) continue;
    if (board->offer.process_id == offer.process_id && offer.process_id != 0) {
      return board->offer.job;  // its other board
    }
    const bool related = board->parent == parent && parent != 0;
    if (related && relative == nullptr) relative = board.get();
    if (!related && board->offer.rank == offer.rank) taken.insert(named(*board));
  }
  if (relative != nullptr && !taken.contains(named(*relative))) return relative->offer.job;
  if (!taken.contains(NodeAggregator::kUnnamed)) return offer.job;
  for (int number = 2;; ++number) {
    std::string name = absl::StrCat(kUnnamedPrefix, number);
    if (!taken.contains(name)) return name;
  }
}

void MonitorBoards::Add(Offer offer, std::shared_ptr<MappedBoard> mapped, uint64_t id) {
  auto board = std::make_unique<Board>();
  board->mapped = std::move(mapped);
  // The mapping holds the memory; the descriptor is one of a limited number.
  offer.board.Reset();
  board->parent = ParentOf(static_cast<pid_t>(offer.process_id));
  offer.job = NameOf(offer, board->parent);
  board->offer = std::move(offer);
  board->id = id;
  Board* const watched = board.get();
  loop_.Watch(watched->offer.process.get(), EventLoop::FdEvents::kReadable,
              [this, watched] { OnDeath(watched); });
  boards_.push_back(std::move(board));
  Changed();
}

void MonitorBoards::Recover(std::vector<KeptDescriptor> kept) {
  struct Pair {
    UniqueFd board;
    UniqueFd process;
    uint32_t process_id = 0;
    std::vector<std::string> names;
  };
  std::map<uint64_t, Pair> pairs;
  for (KeptDescriptor& descriptor : kept) {
    // agent/monitor/<id>/board, agent/monitor/<id>/process-<pid>. Others are not ours: they came
    // from the service manager.
    const std::vector<std::string> parts = absl::StrSplit(descriptor.name, '/');
    uint64_t id = 0;
    uint32_t process_id = 0;
    const bool is_board = parts.size() == 4 && parts[3] == "board";
    const bool is_process = parts.size() == 4 && parts[3].starts_with("process-") &&
                            absl::SimpleAtoi(absl::StripPrefix(parts[3], "process-"), &process_id);
    if ((!is_board && !is_process) || !absl::SimpleAtoi(parts[2], &id)) {
      keeper_.Drop(descriptor.name);
      continue;
    }
    Pair& pair = pairs[id];
    pair.names.push_back(descriptor.name);
    if (is_board) {
      pair.board = std::move(descriptor.fd);
    } else {
      pair.process_id = process_id;
      pair.process = std::move(descriptor.fd);
    }
    next_id_ = std::max(next_id_, id + 1);
  }
  for (auto& [id, pair] : pairs) {
    absl::StatusOr<std::shared_ptr<MappedBoard>> mapped =
        pair.board && pair.process ? MappedBoard::Map(pair.board.get())
                                   : absl::NotFoundError("half of a board");
    if (!mapped.ok()) {
      for (const std::string& name : pair.names) keeper_.Drop(name);
      continue;
    }
    // The process has said this when it offered the board, and says it in the header.
    const abi::BoardHeader& header = *(*mapped)->view().header;
    Offer offer;
    offer.job = TextOf(header.job);
    offer.attempt_key = TextOf(header.attempt_key);
    offer.node = TextOf(header.node);
    offer.rank = header.rank;
    offer.process_id = pair.process_id;
    offer.board_bytes = abi::kBoardBytes;
    offer.process = std::move(pair.process);
    Add(std::move(offer), *std::move(mapped), id);
  }
}

void MonitorBoards::Forget(const Board& board) {
  if (board.asks != 0) loop_.CancelTimer(board.asks);
  keeper_.Drop(BoardName(board.id));
  keeper_.Drop(ProcessName(board.id, board.offer.process_id));
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
    // By the name that reports, and so `holdfast monitor status`, have for it; or its own.
    const std::string& named = board->offer.job;
    if (board->alive && board->offer.rank == rank &&
        (named == job || NodeAggregator::JobNamed(named) == job)) {
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
  board->alive = false;
  board->died = clock_.Elapsed();
  AskForEnd(*board);
  DropOldDead();
  Changed();
}

void MonitorBoards::AskForEnd(Board& board) {
  const int process = board.offer.process.get();
  // Nobody will ever tell more of one that has been waited for.
  const bool may_come = PidOf(process) > 0 && ++board.asked_count < kEndAskedMax;
  board.wait_status = WaitStatusOf(process);
  if (board.wait_status.has_value() || !may_come) {
    board.offer.process.Reset();
    return;
  }
  board.asks = loop_.RunAfter(kEndAskedEvery, [this, asked = &board] {
    asked->asks = 0;
    AskForEnd(*asked);
    if (asked->wait_status.has_value()) Changed();
  });
}

// Dead boards are in the order of nothing; there are few.
void MonitorBoards::DropOldDead() {
  const absl::Duration now = clock_.Elapsed();
  std::erase_if(boards_, [&](const auto& board) {
    const bool old = !board->alive && now - board->died >= kDeadAge;
    if (old) Forget(*board);
    return old;
  });
  while (dead_count() > kDeadMax) {
    const auto oldest =
        std::min_element(boards_.begin(), boards_.end(), [](const auto& a, const auto& b) {
          return std::pair(a->alive, a->died) < std::pair(b->alive, b->died);
        });
    Forget(**oldest);
    boards_.erase(oldest);
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

std::vector<MonitorBoards::Process> MonitorBoards::Processes() const {
  std::map<uint32_t, Process> by_id;
  for (const std::unique_ptr<Board>& board : boards_) {
    if (!board->alive) continue;
    const abi::BoardView& view = board->mapped->view();
    Process& process = by_id[board->offer.process_id];
    process.job = board->offer.job;
    process.attempt_key = board->offer.attempt_key;
    process.rank = board->offer.rank;
    process.world_size = view.header->world_size;
    process.process_id = board->offer.process_id;
    for (uint32_t i = 0; i < abi::kBoardCommunicators; ++i) {
      abi::CommunicatorReading reading;
      if (abi::ReadCommunicator(view.communicators[i], &reading) && !reading.foreign &&
          reading.state == abi::CommunicatorState::kOpen && reading.rank < reading.ranks) {
        process.memberships.push_back({reading.hash, reading.ranks, reading.rank});
      }
    }
  }
  std::vector<Process> all;
  for (auto& [id, process] : by_id) all.push_back(std::move(process));
  return all;
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
