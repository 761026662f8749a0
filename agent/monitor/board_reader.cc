#include "agent/monitor/board_reader.h"

#include <algorithm>
#include <map>
#include <utility>

namespace holdfast {
namespace {

using monitor::CommunicatorReport;
using monitor::ConnectionReport;
using monitor::OperationCounts;
using monitor::OperationKind;

constexpr auto kAcquire = std::memory_order_acquire;
constexpr uint32_t kOwnPlaces = abi::kBoardCommunicators - abi::kBoardForeignCommunicators;

// The summary's numbers are the board's.
static_assert(monitor::kOperationKinds <= abi::kOperationKinds);
static_assert(static_cast<int>(OperationKind::kAllReduce) ==
              static_cast<int>(abi::OperationKind::kAllReduce));
static_assert(static_cast<int>(OperationKind::kBarrier) ==
              static_cast<int>(abi::OperationKind::kBarrier));
static_assert(static_cast<int>(monitor::WaitState::kReceiveGpuWait) ==
              static_cast<int>(abi::WaitState::kReceiveGpuWait));
static_assert(monitor::kOperationsMax == abi::kRecentOperations);

OperationKind KindOf(abi::OperationKind kind) {
  const auto number = static_cast<size_t>(kind);
  return number < monitor::kOperationKinds ? static_cast<OperationKind>(number)
                                           : OperationKind::kUnknown;
}

bool HasRoot(OperationKind kind) {
  return kind == OperationKind::kBroadcast || kind == OperationKind::kReduce ||
         kind == OperationKind::kGather || kind == OperationKind::kScatter;
}

size_t IndexOf(OperationKind kind) { return static_cast<size_t>(kind); }

// Counts up to `count` more operations of a kind as over.
uint64_t CountAsOver(OperationCounts& counts, uint64_t count) {
  const uint64_t open = counts.enqueued - counts.finished;
  const uint64_t over = std::min(count, open);
  counts.finished += over;
  counts.started = std::max(counts.started, counts.finished);
  return over;
}

}  // namespace

struct BoardReader::Look {
  // What is found of one communicator.
  struct Place {
    bool foreign = false;
    uint32_t index = 0;   // on the board
    uint32_t report = 0;  // index in BoardReport's `communicators` or `foreign`
    uint32_t size = 0;    // peers are below it
    abi::CommunicatorReading reading;
    uint64_t connection_us = 0;
    uint64_t kernel_us = 0;
    bool has_connections = false;
    bool has_kernels = false;
    // Point to point with peers with whom nothing was ever visible.
    uint64_t invisible_sends = 0;
    uint64_t invisible_receives = 0;
  };

  Look(const abi::BoardView& view, const TickInstant& instant) : board(view), now(instant) {}

  void TakeCommunicators();
  void TakeSlot(const abi::SlotReading& slot);
  void TakeConnection(const abi::SlotReading& slot, Place& place);
  Place* FindPlace(uint32_t communicator);
  void Count(const Place& place, CommunicatorReport& communicator) const;
  void TakeLast(const Place& place, CommunicatorReport& communicator) const;
  void TakeOperations(const Place& place, CommunicatorReport& communicator) const;
  uint64_t OperationUs(const Place& place) const;

  const abi::BoardView& board;
  const TickInstant now;
  BoardReport report;
  std::map<uint32_t, Place> places;  // by communicator
};

// Places are given out in their order, so behind an empty one all are.
void BoardReader::Look::TakeCommunicators() {
  for (uint32_t i = 0; i < kOwnPlaces; ++i) {
    const abi::Communicator& from = board.communicators[i];
    const abi::CommunicatorState state = from.state.load(kAcquire);
    if (state == abi::CommunicatorState::kEmpty) return;
    if (state != abi::CommunicatorState::kOpen) continue;
    Place place;
    if (!abi::ReadCommunicator(from, &place.reading)) continue;
    const abi::CommunicatorReading& reading = place.reading;
    if (reading.foreign || reading.ranks > kCommunicatorRanksMax || reading.rank >= reading.ranks) {
      continue;
    }
    place.index = i;
    place.size = reading.ranks;
    place.report = static_cast<uint32_t>(report.communicators.size());
    CommunicatorReport& communicator = report.communicators.emplace_back();
    communicator.id = reading.hash;
    communicator.size = reading.ranks;
    communicator.index = reading.rank;
    report.tokens.push_back(reading.token);
    report.peers.emplace_back();
    places.emplace(i, place);
  }
}

// Null: not open, or garbage.
BoardReader::Look::Place* BoardReader::Look::FindPlace(uint32_t communicator) {
  const auto found = places.find(communicator);
  if (found != places.end()) return &found->second;
  if (communicator < kOwnPlaces) return nullptr;
  Place place;
  if (!abi::ReadCommunicator(board.communicators[communicator], &place.reading) ||
      !place.reading.foreign || place.reading.state != abi::CommunicatorState::kOpen) {
    return nullptr;
  }
  place.foreign = true;
  place.index = communicator;
  place.size = kCommunicatorRanksMax;
  place.report = static_cast<uint32_t>(report.foreign.size());
  report.foreign.push_back({place.reading.token, {}});
  return &places.emplace(communicator, place).first->second;
}

void BoardReader::Look::TakeSlot(const abi::SlotReading& slot) {
  Place* const place = FindPlace(slot.key.communicator);
  if (place == nullptr) return;
  switch (slot.key.direction) {
    case abi::SlotDirection::kSend:
    case abi::SlotDirection::kReceive:
      return TakeConnection(slot, *place);
    case abi::SlotDirection::kKernel: {
      uint64_t us = slot.waited[0] / 1000;  // by the GPU's clock
      if (slot.state == abi::WaitState::kKernelRunning) us += now.MicrosSince(slot.since);
      place->kernel_us = std::max(place->kernel_us, us);
      place->has_kernels = true;
      return;
    }
    case abi::SlotDirection::kPeerSends:
    case abi::SlotDirection::kPeerReceives: {
      if (place->foreign) return;
      const bool sends = slot.key.direction == abi::SlotDirection::kPeerSends;
      if (slot.steps_total == 0) {
        (sends ? place->invisible_sends : place->invisible_receives) += slot.operation;
      }
      report.peers[place->report].push_back(
          {slot.key.peer, sends ? monitor::Direction::kSend : monitor::Direction::kReceive,
           slot.operation});
      return;
    }
    case abi::SlotDirection::kProxyThread:
      if (slot.bytes > 0 && slot.bytes <= INT32_MAX &&
          report.proxy_threads.size() < kProxyThreadsMax) {
        report.proxy_threads.push_back(static_cast<uint32_t>(slot.bytes));
      }
      return;
  }
}

void BoardReader::Look::TakeConnection(const abi::SlotReading& slot, Place& place) {
  std::vector<ConnectionReport>& connections = place.foreign
                                                   ? report.foreign[place.report].connections
                                                   : report.communicators[place.report].connections;
  if (slot.key.peer >= place.size || connections.size() >= monitor::kConnectionsMax ||
      slot.state > abi::WaitState::kReceiveGpuWait) {
    return;
  }
  const bool sends = slot.key.direction == abi::SlotDirection::kSend;
  const uint64_t waiting_us = now.MicrosSince(slot.since);
  const int waited = abi::WaitedIndex(slot.state);
  ConnectionReport connection;
  connection.channel = static_cast<uint16_t>(slot.key.channel);
  connection.peer = slot.key.peer;
  connection.direction = sends ? monitor::Direction::kSend : monitor::Direction::kReceive;
  connection.state = static_cast<monitor::WaitState>(slot.state);
  connection.operation = slot.operation;
  connection.steps_done = slot.steps_done;
  connection.steps_total = slot.steps_total;
  connection.waiting_us = waiting_us;
  connection.bytes = slot.bytes;
  const int wire =
      abi::WaitedIndex(sends ? abi::WaitState::kSendWait : abi::WaitState::kReceiveWait);
  connection.wire_wait_us = now.Micros(slot.waited[wire]) + (waited == wire ? waiting_us : 0);
  connections.push_back(connection);
  uint64_t in_use_us = waited >= 0 ? waiting_us : 0;
  for (const uint64_t ticks : slot.waited) in_use_us += now.Micros(ticks);
  place.connection_us = std::max(place.connection_us, in_use_us);
  place.has_connections = true;
}

// What has no visible part (NVLink, shared memory) never starts for a plugin, and nothing is known
// of its end: it counts as over when it is enqueued, so that nobody waits for it. Collectives run
// one after another, so those before one that has finished are over, too.
void BoardReader::Look::Count(const Place& place, CommunicatorReport& communicator) const {
  const abi::CommunicatorReading& reading = place.reading;
  uint64_t started = 0, finished = 0;  // of collectives
  for (size_t kind = 0; kind < monitor::kOperationKinds; ++kind) {
    OperationCounts& counts = communicator.counts[kind];
    counts.enqueued = reading.kind_count[kind];
    counts.started = std::min(reading.kind_started[kind], counts.enqueued);
    counts.finished = std::min(reading.kind_finished[kind], counts.started);
    if (monitor::IsPointToPoint(static_cast<OperationKind>(kind))) continue;
    started += counts.started;
    finished += counts.finished;
  }
  if (board.header->writer != abi::BoardWriter::kProfilerPlugin) return;
  uint64_t over = started == 0 ? UINT64_MAX
                  : reading.last_collective_finished > finished
                      ? reading.last_collective_finished - finished
                      : 0;
  for (size_t kind = 0; kind < monitor::kOperationKinds && over > 0; ++kind) {
    if (monitor::IsPointToPoint(static_cast<OperationKind>(kind))) continue;
    over -= CountAsOver(communicator.counts[kind], over);
  }
  CountAsOver(communicator.counts[IndexOf(OperationKind::kSend)], place.invisible_sends);
  CountAsOver(communicator.counts[IndexOf(OperationKind::kReceive)], place.invisible_receives);
}

void BoardReader::Look::TakeLast(const Place& place, CommunicatorReport& communicator) const {
  const abi::Communicator& from = board.communicators[place.index];
  const abi::CommunicatorReading& reading = place.reading;
  abi::OperationReading operation;
  // The newest that can be read: the one behind it may be in the making.
  for (uint64_t back = 0; back < 2 && back < reading.enqueued; ++back) {
    if (!abi::ReadRecentOperation(from, reading.enqueued - back, &operation)) continue;
    communicator.last_kind = KindOf(operation.kind);
    communicator.last_bytes = operation.bytes;
    communicator.last_sequence = communicator.counts[IndexOf(communicator.last_kind)].enqueued;
    break;
  }
  const OperationCounts total = monitor::Total(communicator);
  if (total.enqueued == total.finished) return;
  // It began when it was enqueued, or when the one before it was over. Of one that is not kept any
  // more only the latter is known.
  uint64_t began = reading.finished_ticks;
  if (abi::ReadRecentOperation(from, total.finished + 1, &operation)) {
    began = std::max(began, operation.ticks);
  }
  communicator.open_us = std::max<uint64_t>(now.MicrosSince(began), 1);
}

void BoardReader::Look::TakeOperations(const Place& place, CommunicatorReport& communicator) const {
  const abi::Communicator& from = board.communicators[place.index];
  const abi::CommunicatorReading& reading = place.reading;
  const uint64_t changed =
      std::max({reading.enqueued_ticks, reading.started_ticks, reading.finished_ticks});
  if (now.MicrosSince(changed) < monitor::kOperationsToldAfterUs) return;
  std::vector<monitor::RecentOperation> newest;
  for (uint64_t number = reading.enqueued; newest.size() < monitor::kOperationsMax; --number) {
    abi::OperationReading operation;
    if (!abi::ReadRecentOperation(from, number, &operation)) break;
    const OperationKind kind = KindOf(operation.kind);
    if (monitor::IsPointToPoint(kind)) continue;
    newest.push_back(
        {kind, operation.bytes, HasRoot(kind) ? operation.root_or_peer : monitor::kNoRoot});
  }
  // Were one enqueued while we look, all numbers could be wrong by one.
  if (from.enqueued.load(kAcquire) != reading.enqueued ||
      monitor::Total(communicator).enqueued != reading.enqueued) {
    return;
  }
  communicator.operations.assign(newest.rbegin(), newest.rend());
}

uint64_t BoardReader::Look::OperationUs(const Place& place) const {
  if (place.has_kernels) return place.kernel_us;
  if (place.has_connections) return place.connection_us;
  return now.Micros(place.reading.running_ticks) + now.MicrosSince(place.reading.running_since);
}

bool BoardReader::HasCommunicators() const {
  return board_.communicators[0].state.load(kAcquire) != abi::CommunicatorState::kEmpty;
}

// Looks at all keys, but only if a slot was taken since the last time.
void BoardReader::FindSlots() {
  const uint64_t taken = board_.header->slots_taken.load(kAcquire);
  if (taken == slots_taken_) return;
  slots_taken_ = taken;
  ++scan_count_;
  std::vector<KnownSlot> found;
  auto known = slots_.begin();
  for (uint32_t i = 0; i < abi::kBoardSlots; ++i) {
    const uint64_t key = board_.keys[i].load(kAcquire);
    while (known != slots_.end() && known->index < i) ++known;
    if (key == 0 || key == abi::kBusyKey) continue;
    if (known != slots_.end() && known->index == i) {
      found.push_back(*known);
    } else {
      found.push_back({i, false, {}});
    }
  }
  slots_ = std::move(found);
}

// Whether `slot` has a reading that holds. `gone`: it is a connection's no more.
bool BoardReader::ReadKnown(KnownSlot& slot, bool* gone) const {
  abi::SlotReading reading;
  switch (abi::ReadSlot(board_, slot.index, &reading)) {
    case abi::SlotRead::kRead:
      slot.reading = reading;
      slot.was_read = true;
      return true;
    case abi::SlotRead::kTorn: {
      // Of another connection that had the place before, the last reading says nothing.
      const uint64_t key = board_.keys[slot.index].load(kAcquire);
      return slot.was_read && key == abi::EncodeSlotKey(slot.reading.key);
    }
    case abi::SlotRead::kUnused:
      *gone = true;
      return false;
    case abi::SlotRead::kGarbage:
      return false;
  }
  return false;
}

BoardReport BoardReader::Read(const TickInstant& now) {
  FindSlots();
  Look look(board_, now);
  look.report.level = board_.header->level == abi::MonitorLevel::kFull
                          ? monitor::TelemetryLevel::kFull
                          : monitor::TelemetryLevel::kLight;
  for (uint32_t cause = 0; cause < abi::kDropCauses; ++cause) {
    if (cause == static_cast<uint32_t>(abi::Drop::kStale)) continue;
    look.report.drops += board_.header->drops[cause].load(std::memory_order_relaxed);
  }
  look.TakeCommunicators();
  size_t kept = 0;
  for (KnownSlot& slot : slots_) {
    bool gone = false;
    if (ReadKnown(slot, &gone)) look.TakeSlot(slot.reading);
    if (!gone) slots_[kept++] = slot;
  }
  slots_.resize(kept);
  for (auto& [index, place] : look.places) {
    if (place.foreign) continue;
    CommunicatorReport& communicator = look.report.communicators[place.report];
    look.Count(place, communicator);
    look.TakeLast(place, communicator);
    look.TakeOperations(place, communicator);
    if (operation_times_.size() <= index) operation_times_.resize(index + 1);
    OperationTime& time = operation_times_[index];
    if (time.generation != place.reading.generation) time = {place.reading.generation, 0};
    const uint64_t us = look.OperationUs(place);
    if (us > time.seen_us) operation_us_ += us - time.seen_us;
    time.seen_us = std::max(time.seen_us, us);
  }
  look.report.operation_us = operation_us_;
  return std::move(look.report);
}

}  // namespace holdfast
