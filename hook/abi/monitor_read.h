// Reading a monitor board (monitor.h) that somebody else writes, perhaps at this moment, perhaps
// garbage: bounded copies with the sequences checked. Everything returned is the writer's claim;
// what is out of range is said to be unreadable.
//
// Threads: any; nothing is written.
#ifndef HOLDFAST_HOOK_ABI_MONITOR_READ_H_
#define HOLDFAST_HOOK_ABI_MONITOR_READ_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "hook/abi/monitor.h"

namespace holdfast::abi {

// A writer is in a slot for some ten nanoseconds, so a second try nearly always succeeds; one that
// was stopped or killed in the middle never finishes.
inline constexpr int kReadAttempts = 64;

// The board's parts, after their offsets were checked. Valid as long as the mapping.
struct BoardView {
  const BoardHeader* header = nullptr;  // nullptr: not a board
  const Communicator* communicators = nullptr;
  const std::atomic<uint64_t>* keys = nullptr;
  const Slot* slots = nullptr;
  const Ring* rings = nullptr;
};

// `bytes` at `data`, 64-aligned, are mapped. Only boards of this version, whose limits are those of
// this header, are taken.
inline BoardView ViewBoard(const std::byte* data, uint64_t bytes) {
  BoardView view;
  if (data == nullptr || bytes < kBoardBytes) return view;
  const auto* header = reinterpret_cast<const BoardHeader*>(data);
  if (header->magic != kBoardMagic || header->version != kBoardVersion) return view;
  constexpr uint64_t kCommunicatorsAt = sizeof(BoardHeader);
  constexpr uint64_t kKeysAt = kCommunicatorsAt + sizeof(Communicator) * kBoardCommunicators;
  constexpr uint64_t kSlotsAt = kKeysAt + sizeof(uint64_t) * kBoardSlots;
  constexpr uint64_t kRingsAt = kSlotsAt + sizeof(Slot) * kBoardSlots;
  if (header->total_bytes != kBoardBytes || header->communicators_offset != kCommunicatorsAt ||
      header->communicator_count != kBoardCommunicators || header->keys_offset != kKeysAt ||
      header->slots_offset != kSlotsAt || header->slot_count != kBoardSlots ||
      header->rings_offset != kRingsAt || header->ring_count != kBoardRings ||
      header->ring_record_count != kRingRecords) {
    return view;
  }
  view.header = header;
  view.communicators = reinterpret_cast<const Communicator*>(data + kCommunicatorsAt);
  view.keys = reinterpret_cast<const std::atomic<uint64_t>*>(data + kKeysAt);
  view.slots = reinterpret_cast<const Slot*>(data + kSlotsAt);
  view.rings = reinterpret_cast<const Ring*>(data + kRingsAt);
  return view;
}

struct CommunicatorReading {
  CommunicatorState state = CommunicatorState::kEmpty;
  uint32_t generation = 0;
  uint64_t token = 0;
  uint64_t hash = 0;
  uint32_t ranks = 0;
  uint32_t rank = 0;
  uint32_t nodes = 0;
  bool foreign = false;
  uint64_t opened_ticks = 0;
  uint64_t closed_ticks = 0;
  char name[kCommunicatorNameBytes] = {};
  // Each counter is true for an instant of its own.
  uint64_t enqueued = 0;
  uint64_t started = 0;
  uint64_t finished = 0;
  uint64_t last_started = 0;
  uint64_t last_finished = 0;
  uint64_t enqueued_ticks = 0;
  uint64_t started_ticks = 0;
  uint64_t finished_ticks = 0;
  uint64_t api_calls = 0;
  uint64_t kernel_launches = 0;
  uint64_t collectives = 0;
  uint64_t last_collective_finished = 0;
  uint64_t running_ticks = 0;
  uint64_t running_since = 0;
  uint64_t kind_started[kOperationKinds] = {};
  uint64_t kind_finished[kOperationKinds] = {};
  uint64_t kind_count[kOperationKinds] = {};
  uint64_t kind_nccl_sequence[kOperationKinds] = {};
};

// False: the place is empty, being opened, or stayed torn.
inline bool ReadCommunicator(const Communicator& from, CommunicatorReading* to) {
  constexpr auto kAcquire = std::memory_order_acquire;
  for (int attempt = 0; attempt < kReadAttempts; ++attempt) {
    to->generation = from.generation.load(kAcquire);
    to->state = from.state.load(kAcquire);
    if (to->state != CommunicatorState::kOpen && to->state != CommunicatorState::kClosed) {
      return false;
    }
    to->token = from.token.load(kAcquire);
    to->hash = from.hash.load(kAcquire);
    to->ranks = from.ranks.load(kAcquire);
    to->rank = from.rank.load(kAcquire);
    to->nodes = from.nodes.load(kAcquire);
    to->foreign = from.foreign.load(kAcquire) != 0;
    to->opened_ticks = from.opened_ticks.load(kAcquire);
    to->closed_ticks = from.closed_ticks.load(kAcquire);
    for (size_t i = 0; i < kCommunicatorNameBytes / 8; ++i) {
      const uint64_t word = from.name[i].load(kAcquire);
      std::memcpy(to->name + 8 * i, &word, 8);
    }
    to->name[kCommunicatorNameBytes - 1] = '\0';
    // In this order: what has finished had started, what has started was enqueued.
    for (uint32_t kind = 0; kind < kOperationKinds; ++kind) {
      to->kind_finished[kind] = from.kind_finished[kind].load(kAcquire);
    }
    to->last_collective_finished = from.last_collective_finished.load(kAcquire);
    for (uint32_t kind = 0; kind < kOperationKinds; ++kind) {
      to->kind_started[kind] = from.kind_started[kind].load(kAcquire);
    }
    to->finished = from.finished.load(kAcquire);
    to->last_finished = from.last_finished.load(kAcquire);
    to->finished_ticks = from.finished_ticks.load(kAcquire);
    to->started = from.started.load(kAcquire);
    to->last_started = from.last_started.load(kAcquire);
    to->started_ticks = from.started_ticks.load(kAcquire);
    to->enqueued = from.enqueued.load(kAcquire);
    to->enqueued_ticks = from.enqueued_ticks.load(kAcquire);
    to->api_calls = from.api_calls.load(kAcquire);
    to->kernel_launches = from.kernel_launches.load(kAcquire);
    to->collectives = from.collectives.load(kAcquire);
    to->running_ticks = from.running_ticks.load(kAcquire);
    to->running_since = from.running_since.load(kAcquire);
    for (uint32_t kind = 0; kind < kOperationKinds; ++kind) {
      to->kind_count[kind] = from.kind_count[kind].load(kAcquire);
      to->kind_nccl_sequence[kind] = from.kind_nccl_sequence[kind].load(kAcquire);
    }
    const CommunicatorState state = from.state.load(kAcquire);
    if (from.generation.load(kAcquire) == to->generation && state == to->state) return true;
  }
  return false;
}

struct OperationReading {
  uint64_t number = 0;
  OperationKind kind = OperationKind::kUnknown;
  DataType data_type = DataType::kUnknown;
  uint32_t root_or_peer = 0;
  uint64_t bytes = 0;
  uint64_t ticks = 0;
};

// Operation `number` of the communicator. False: not kept (any more), or being written.
inline bool ReadRecentOperation(const Communicator& from, uint64_t number, OperationReading* to) {
  constexpr auto kAcquire = std::memory_order_acquire;
  const RecentOperation& entry = from.recent[number % kRecentOperations];
  if (number == 0 || entry.number.load(kAcquire) != number) return false;
  const uint64_t detail = entry.detail.load(kAcquire);
  to->bytes = entry.bytes.load(kAcquire);
  to->ticks = entry.ticks.load(kAcquire);
  if (entry.number.load(kAcquire) != number) return false;
  to->number = number;
  const uint32_t kind = detail & 0xff;
  to->kind = kind < kOperationKinds ? static_cast<OperationKind>(kind) : OperationKind::kUnknown;
  to->data_type = static_cast<DataType>(detail >> 8 & 0xff);
  to->root_or_peer = static_cast<uint32_t>(detail >> 32);
  return true;
}

struct SlotReading {
  SlotKey key = {};
  WaitState state = WaitState::kNone;
  uint32_t open_steps = 0;
  OperationKind kind = OperationKind::kUnknown;
  uint64_t operation = 0;
  uint32_t steps_done = 0;
  uint32_t steps_total = 0;
  uint64_t since = 0;
  uint64_t bytes = 0;
  uint64_t waited[3] = {};
};

enum class SlotRead {
  kRead,
  kUnused,   // or a leftover of a communicator that is not there any more
  kTorn,     // the writer was in it at every attempt: stopped in the middle, perhaps for good
  kGarbage,  // values that the writer cannot have written
};

inline SlotRead ReadSlot(const BoardView& board, uint32_t index, SlotReading* to) {
  constexpr auto kAcquire = std::memory_order_acquire;
  const Slot& slot = board.slots[index];
  for (int attempt = 0; attempt < kReadAttempts; ++attempt) {
    const uint64_t key = board.keys[index].load(kAcquire);
    if (key == 0 || key == kBusyKey) return SlotRead::kUnused;
    to->key = DecodeSlotKey(key);
    const uint32_t direction = static_cast<uint32_t>(to->key.direction);
    if (direction == 0 || direction >= kSlotDirections ||
        to->key.communicator >= kBoardCommunicators) {
      return SlotRead::kGarbage;
    }
    const Communicator& communicator = board.communicators[to->key.communicator];
    if ((communicator.generation.load(kAcquire) & 0xffff) != to->key.generation) {
      return SlotRead::kUnused;
    }
    const uint64_t head = slot.head.load(kAcquire);
    to->operation = slot.operation.load(kAcquire);
    const uint64_t steps = slot.steps.load(kAcquire);
    to->since = slot.since.load(kAcquire);
    to->bytes = slot.bytes.load(kAcquire);
    for (int i = 0; i < 3; ++i) to->waited[i] = slot.waited[i].load(kAcquire);
    if ((head & 1) != 0 || slot.head.load(kAcquire) != head ||
        board.keys[index].load(kAcquire) != key) {
      continue;
    }
    if ((head >> 32 & 0xff) >= kWaitStates || (head >> 48 & 0xff) >= kOperationKinds) {
      return SlotRead::kGarbage;
    }
    to->state = static_cast<WaitState>(head >> 32 & 0xff);
    to->open_steps = head >> 40 & 0xff;
    to->kind = static_cast<OperationKind>(head >> 48 & 0xff);
    to->steps_done = static_cast<uint32_t>(steps);
    to->steps_total = static_cast<uint32_t>(steps >> 32);
    return SlotRead::kRead;
  }
  return SlotRead::kTorn;
}

struct RecordReading {
  uint64_t ticks = 0;
  RecordKind kind = RecordKind::kApiCall;
  uint8_t detail = 0;
  uint32_t place = 0;
  uint32_t step = 0;
  uint64_t operation = 0;
  uint64_t value = 0;
};

// Record `index` (counted from the ring's beginning). False: not written yet, or overwritten.
inline bool ReadRecord(const Ring& ring, uint64_t index, RecordReading* to) {
  constexpr auto kAcquire = std::memory_order_acquire;
  if (index >= ring.written.load(kAcquire)) return false;
  const Record& record = ring.records[index % kRingRecords];
  to->ticks = record.ticks.load(kAcquire);
  const uint64_t what = record.what.load(kAcquire);
  to->operation = record.operation.load(kAcquire);
  to->value = record.value.load(kAcquire);
  to->kind = static_cast<RecordKind>(what & 0xff);
  to->detail = static_cast<uint8_t>(what >> 8);
  to->place = static_cast<uint32_t>(what >> 16 & 0xffff);
  to->step = static_cast<uint32_t>(what >> 32);
  return index + kRingRecords > ring.written.load(kAcquire);
}

}  // namespace holdfast::abi

#endif  // HOLDFAST_HOOK_ABI_MONITOR_READ_H_
