// A monitor board in the memory of a process that nobody vouches for. The input is words of a board
// and their values: what is read of the board they make keeps the limits of a summary.
#include <cstdlib>
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "agent/monitor/board_reader.h"
#include "base/check.h"
#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {
namespace {

constexpr size_t kWordsMax = 4096;

struct Write {
  uint32_t word;  // of the board
  uint64_t value;
};
constexpr size_t kWriteBytes = 12;

// An empty board, 64-aligned, for ever.
std::byte* EmptyBoard() {
  static std::byte* const board = [] {
    auto* const memory =
        static_cast<std::byte*>(std::aligned_alloc(64, (abi::kBoardBytes + 63) / 64 * 64));
    std::memset(memory, 0, abi::kBoardBytes);
    auto* const header = reinterpret_cast<abi::BoardHeader*>(memory);
    uint64_t at = sizeof(abi::BoardHeader);
    header->communicators_offset = static_cast<uint32_t>(at);
    at += sizeof(abi::Communicator) * abi::kBoardCommunicators;
    header->keys_offset = static_cast<uint32_t>(at);
    at += sizeof(uint64_t) * abi::kBoardSlots;
    header->slots_offset = static_cast<uint32_t>(at);
    at += sizeof(abi::Slot) * abi::kBoardSlots;
    header->rings_offset = static_cast<uint32_t>(at);
    header->total_bytes = abi::kBoardBytes;
    header->communicator_count = abi::kBoardCommunicators;
    header->slot_count = abi::kBoardSlots;
    header->ring_count = abi::kBoardRings;
    header->ring_record_count = abi::kRingRecords;
    header->clock = abi::BoardClock::kMonotonicNs;
    header->writer = abi::BoardWriter::kProfilerPlugin;
    header->version = abi::kBoardVersion;
    header->magic = abi::kBoardMagic;
    return memory;
  }();
  return board;
}

std::vector<Write> WritesOf(Input input) {
  std::vector<Write> writes;
  for (size_t at = 0; at + kWriteBytes <= input.size() && writes.size() < kWordsMax;
       at += kWriteBytes) {
    Write write{};
    std::memcpy(&write.word, input.data() + at, sizeof(write.word));
    std::memcpy(&write.value, input.data() + at + sizeof(write.word), sizeof(write.value));
    // The names and the geometry, which were checked when the board was taken, stay.
    constexpr uint32_t kFirst = offsetof(abi::BoardHeader, drops) / 8;
    write.word = kFirst + write.word % (abi::kBoardBytes / 8 - kFirst);
    writes.push_back(write);
  }
  return writes;
}

void CheckReport(const BoardReport& report) {
  CHECK(report.communicators.size() <= monitor::kCommunicatorsMax);
  CHECK(report.tokens.size() == report.communicators.size());
  CHECK(report.peers.size() == report.communicators.size());
  CHECK(report.proxy_threads.size() <= BoardReader::kProxyThreadsMax);
  for (const monitor::CommunicatorReport& communicator : report.communicators) {
    CHECK(communicator.index < communicator.size);
    CHECK(communicator.connections.size() <= monitor::kConnectionsMax);
    for (const monitor::OperationCounts& counts : communicator.counts) {
      CHECK(counts.finished <= counts.started && counts.started <= counts.enqueued);
    }
    for (const monitor::ConnectionReport& connection : communicator.connections) {
      CHECK(static_cast<size_t>(connection.state) < monitor::kWaitStates);
      CHECK(connection.peer < communicator.size);
    }
  }
}

}  // namespace

bool FuzzBoard(Input input) {
  std::byte* const board = EmptyBoard();
  const std::vector<Write> writes = WritesOf(input);
  std::vector<uint64_t> before;
  const abi::BoardView view = abi::ViewBoard(board, abi::kBoardBytes);
  CHECK(view.header != nullptr);
  BoardReader reader(view);
  const TickInstant now{uint64_t{1} << 40, 1e-3};
  CheckReport(reader.Read(now));
  for (const Write& write : writes) {
    uint64_t& word = *reinterpret_cast<uint64_t*>(board + 8 * size_t{write.word});
    before.push_back(std::exchange(word, write.value));
  }
  // A second time: with what was kept of the first.
  bool is_accepted = false;
  for (int i = 0; i < 2; ++i) {
    BoardReport report = reader.Read(now);
    CheckReport(report);
    is_accepted |= !report.communicators.empty();
    monitor::NodeSummary summary;
    monitor::RankReport& rank = summary.ranks.emplace_back();
    rank.drops = report.drops;
    rank.operation_us = report.operation_us;
    rank.communicators = std::move(report.communicators);
    CHECK(monitor::FitToBudget(summary, monitor::kSummaryBytesBudget));
    const std::string bytes = monitor::EncodeSummary(summary);
    const auto decoded = monitor::DecodeSummary(std::as_bytes(std::span(bytes)));
    CHECK_OK(decoded.status());
    CHECK(*decoded == summary);
  }
  for (size_t i = writes.size(); i-- > 0;) {
    *reinterpret_cast<uint64_t*>(board + 8 * size_t{writes[i].word}) = before[i];
  }
  return is_accepted;
}

}  // namespace holdfast::fuzz
