#include "hook/profiler/board_testing.h"

#include <dirent.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <set>

namespace holdfast::profiler {

std::vector<std::string> BoardPaths(pid_t pid) {
  const std::string directory = "/proc/" + std::to_string(pid) + "/fd";
  std::vector<std::pair<int, std::string>> found;
  DIR* listing = opendir(directory.c_str());
  if (listing == nullptr) return {};
  while (const dirent* entry = readdir(listing)) {
    const std::string path = directory + "/" + entry->d_name;
    char target[PATH_MAX] = {};
    if (readlink(path.c_str(), target, sizeof(target) - 1) <= 0) continue;
    if (std::string(target).rfind("/memfd:holdfast-monitor", 0) == 0) {
      found.emplace_back(atoi(entry->d_name), path);
    }
  }
  closedir(listing);
  std::sort(found.begin(), found.end());
  std::vector<std::string> paths;
  for (const auto& [number, path] : found) paths.push_back(path);
  return paths;
}

int MappedBoard::Count(pid_t pid) { return static_cast<int>(BoardPaths(pid).size()); }

std::unique_ptr<MappedBoard> MappedBoard::Find(pid_t pid) {
  std::unique_ptr<MappedBoard> best;
  for (const std::string& path : BoardPaths(pid)) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) continue;
    void* memory = mmap(nullptr, abi::kBoardBytes, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (memory == MAP_FAILED) continue;
    const abi::BoardView view =
        abi::ViewBoard(static_cast<const std::byte*>(memory), abi::kBoardBytes);
    std::unique_ptr<MappedBoard> board(new MappedBoard(memory, view));
    // A forked child inherits the descriptor of its parent's.
    if (view.header != nullptr && view.header->process_id == static_cast<uint32_t>(pid)) {
      best = std::move(board);
    }
  }
  return best;
}

MappedBoard::~MappedBoard() { munmap(memory_, abi::kBoardBytes); }

std::optional<uint32_t> MappedBoard::FindCommunicator(uint64_t hash, uint32_t rank) const {
  std::optional<uint32_t> found;
  uint64_t opened = 0;
  for (uint32_t i = 0; i < abi::kBoardCommunicators; ++i) {
    abi::CommunicatorReading reading;
    if (!abi::ReadCommunicator(view_.communicators[i], &reading)) continue;
    if (reading.hash == hash && reading.rank == rank && !reading.foreign &&
        reading.opened_ticks >= opened) {
      found = i;
      opened = reading.opened_ticks;
    }
  }
  return found;
}

abi::CommunicatorReading MappedBoard::communicator(uint32_t index) const {
  abi::CommunicatorReading reading;
  EXPECT_TRUE(abi::ReadCommunicator(view_.communicators[index], &reading)) << index;
  return reading;
}

std::vector<abi::SlotReading> MappedBoard::SlotsOf(uint32_t communicator) const {
  std::vector<abi::SlotReading> slots;
  for (uint32_t i = 0; i < abi::kBoardSlots; ++i) {
    abi::SlotReading reading;
    if (abi::ReadSlot(view_, i, &reading) == abi::SlotRead::kRead &&
        reading.key.communicator == communicator) {
      slots.push_back(reading);
    }
  }
  return slots;
}

std::optional<abi::SlotReading> MappedBoard::FindSlot(uint32_t communicator, uint32_t channel,
                                                      uint32_t peer,
                                                      abi::SlotDirection direction) const {
  for (const abi::SlotReading& slot : SlotsOf(communicator)) {
    if (slot.key.channel == channel && slot.key.peer == peer && slot.key.direction == direction) {
      return slot;
    }
  }
  return std::nullopt;
}

RankWaits WaitsOf(const MappedBoard& board, uint32_t communicator) {
  RankWaits waits;
  for (const abi::SlotReading& slot : board.SlotsOf(communicator)) {
    switch (slot.state) {
      case abi::WaitState::kSendPeerWait:
      case abi::WaitState::kReceiveWait:
        waits.peers.emplace_back(slot.key.peer, slot.state);
        break;
      case abi::WaitState::kSendGpuWait:
      case abi::WaitState::kReceiveGpuWait:
        ++waits.gpu;
        break;
      case abi::WaitState::kSendWait:
        ++waits.wire;
        break;
      default:
        break;
    }
  }
  return waits;
}

std::vector<uint32_t> Suspects(const std::vector<RankWaits>& ranks) {
  std::set<uint32_t> waited_for;
  for (const RankWaits& rank : ranks) {
    for (const auto& [peer, state] : rank.peers) waited_for.insert(peer);
  }
  std::vector<uint32_t> suspects;
  for (const uint32_t rank : waited_for) {
    if (rank < ranks.size() && ranks[rank].peers.empty()) suspects.push_back(rank);
  }
  return suspects;
}

int RunInChild(const std::function<void()>& body) {
  std::fflush(nullptr);
  const pid_t pid = fork();
  if (pid == 0) {
    body();
    std::fflush(nullptr);
    _exit(testing::Test::HasFailure() ? 1 : 0);
  }
  int status = 0;
  EXPECT_EQ(waitpid(pid, &status, 0), pid);
  return status;
}

}  // namespace holdfast::profiler
