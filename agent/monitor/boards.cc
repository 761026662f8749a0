#include "agent/monitor/boards.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <x86intrin.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_format.h"

namespace holdfast {
namespace {

using nlohmann::json;

// Now, on the clock that the board's writer uses.
uint64_t NowTicks(abi::BoardClock clock) {
  if (clock == abi::BoardClock::kTsc) return __rdtsc();
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

// How long ago `ticks` were, in seconds. The header's rate is claimed; the worst that a wrong one
// does is a wrong number.
double SecondsSince(const abi::BoardHeader& header, uint64_t ticks) {
  const uint64_t now = NowTicks(header.clock);
  if (ticks == 0 || ticks > now || header.ticks_per_second == 0) return 0;
  return static_cast<double>(now - ticks) / static_cast<double>(header.ticks_per_second);
}

const char* NameOf(abi::WaitState state) {
  switch (state) {
    case abi::WaitState::kQueued:
      return "queued";
    case abi::WaitState::kBetweenSteps:
      return "between_steps";
    case abi::WaitState::kSendGpuWait:
      return "send_gpu";
    case abi::WaitState::kSendPeerWait:
      return "send_peer";
    case abi::WaitState::kSendWait:
      return "send_wire";
    case abi::WaitState::kReceiveWait:
      return "receive_data";
    case abi::WaitState::kReceiveFlushWait:
      return "receive_flush";
    case abi::WaitState::kReceiveGpuWait:
      return "receive_gpu";
    default:
      return nullptr;  // no wait of a connection
  }
}

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
json WaitsJson(const abi::BoardView& view) {
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
    const char* name = NameOf(slot.state);
    if (name == nullptr) continue;
    Wait& wait = waits[name];
    ++wait.connections;
    wait.longest_seconds = std::max(wait.longest_seconds, SecondsSince(*view.header, slot.since));
  }
  json result = json::object();
  for (const auto& [name, wait] : waits) {
    result[name] = {{"connections", wait.connections}, {"longest_seconds", wait.longest_seconds}};
  }
  return result;
}

}  // namespace

struct MonitorBoards::Board {
  ~Board() {
    if (memory != MAP_FAILED) munmap(memory, abi::kBoardBytes);
  }
  Offer offer;
  uint64_t device = 0;
  uint64_t inode = 0;
  void* memory = MAP_FAILED;
  abi::BoardView view;
  bool alive = true;
  absl::Duration died{};  // on the agent's clock
};

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
  struct stat file {};
  if (fstat(offer.board.get(), &file) != 0 || !S_ISREG(file.st_mode)) {
    return absl::InvalidArgumentError("monitor board: expected a memfd, found another descriptor");
  }
  const auto found = std::find_if(boards_.begin(), boards_.end(), [&](const auto& board) {
    return board->device == file.st_dev && board->inode == file.st_ino && board->alive;
  });
  if (found != boards_.end()) return absl::OkStatus();
  const int seals = fcntl(offer.board.get(), F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return absl::InvalidArgumentError(
        "monitor board: expected a memfd sealed against shrinking, found one that is not");
  }
  if (static_cast<uint64_t>(file.st_size) != abi::kBoardBytes ||
      offer.board_bytes != abi::kBoardBytes) {
    return absl::InvalidArgumentError(
        absl::StrFormat("monitor board: expected %d bytes, found %d (offered as %d)",
                        abi::kBoardBytes, file.st_size, offer.board_bytes));
  }
  if (!offer.process) {
    return absl::ResourceExhaustedError("monitor board: no descriptor left to watch its process");
  }
  if (alive_count() >= kAliveMax) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("monitor board: %d living processes have one already", kAliveMax));
  }
  auto board = std::make_unique<Board>();
  board->device = file.st_dev;
  board->inode = file.st_ino;
  board->memory = mmap(nullptr, abi::kBoardBytes, PROT_READ, MAP_SHARED, offer.board.get(), 0);
  if (board->memory == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("monitor board: mmap of %d bytes: %s", abi::kBoardBytes, strerror(errno)));
  }
  board->view = abi::ViewBoard(static_cast<const std::byte*>(board->memory), abi::kBoardBytes);
  if (board->view.header == nullptr) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "monitor board: expected version %d, found no board of it", abi::kBoardVersion));
  }
  // The mapping holds the memory; the descriptor is one of a limited number.
  offer.board.Reset();
  board->offer = std::move(offer);
  Board* const watched = board.get();
  loop_.Watch(watched->offer.process.get(), EventLoop::FdEvents::kReadable,
              [this, watched] { OnDeath(watched); });
  boards_.push_back(std::move(board));
  return absl::OkStatus();
}

void MonitorBoards::OnDeath(Board* board) {
  loop_.Unwatch(board->offer.process.get());
  board->offer.process.Reset();
  board->alive = false;
  board->died = clock_.Elapsed();
  DropOldDead();
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
    });
  }
}

std::string MonitorBoards::StatusJson() const {
  json all = json::array();
  for (const std::unique_ptr<Board>& board : boards_) {
    const abi::BoardHeader& header = *board->view.header;
    uint64_t drops = 0;
    for (const std::atomic<uint64_t>& count : header.drops) {
      drops += count.load(std::memory_order_relaxed);
    }
    json communicators = json::array();
    for (uint32_t i = 0; i < abi::kBoardCommunicators; ++i) {
      abi::CommunicatorReading reading;
      if (abi::ReadCommunicator(board->view.communicators[i], &reading) &&
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
                  {"waits", WaitsJson(board->view)}};
    if (!board->alive) {
      entry["dead_for_seconds"] = absl::ToDoubleSeconds(clock_.Elapsed() - board->died);
    }
    all.push_back(std::move(entry));
  }
  return all.dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace holdfast
