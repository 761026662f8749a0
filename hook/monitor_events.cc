// Communicators and operations; transfers, steps and kernels are in monitor_transfers.cc.
#include "hook/monitor_events.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "hook/monitor_tables.h"

namespace holdfast::hook {
namespace {

constexpr auto kRelaxed = std::memory_order_relaxed;
constexpr auto kAcquire = std::memory_order_acquire;
constexpr auto kRelease = std::memory_order_release;

using abi::Drop;
using abi::RecordKind;
using abi::SlotDirection;
using abi::WaitState;

void Raise(std::atomic<uint64_t>& greatest, uint64_t value) {
  uint64_t found = greatest.load(kRelaxed);
  for (int i = 0; i < kSwapAttempts && found < value; ++i) {
    if (greatest.compare_exchange_weak(found, value, kRelease, kRelaxed)) return;
  }
}

}  // namespace

Result<std::unique_ptr<MonitorEvents>> MonitorEvents::Create(std::unique_ptr<MonitorBoard> board) {
  // Anonymous memory: zeros, and only what is used is ever there.
  void* memory =
      mmap(nullptr, sizeof(Tables), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    return Error(HF_RESOURCE_EXHAUSTED, "mmap of the monitor's tables (%zu bytes): %s",
                 sizeof(Tables), strerror(errno));
  }
  return std::unique_ptr<MonitorEvents>(
      new MonitorEvents(std::move(board), static_cast<Tables*>(memory)));
}

MonitorEvents::MonitorEvents(std::unique_ptr<MonitorBoard> board, Tables* tables)
    : tag_(static_cast<uint64_t>(board->header().process_id) << kTokenTagShift),
      tables_(tables),
      slots_(&board->slot(0)),
      communicators_(&board->communicator(0)),
      header_(&board->header()),
      tsc_(board->uses_tsc()),
      board_(std::move(board)) {
  header_->process_tag = static_cast<uint32_t>(tag_ >> kTokenTagShift);
}

MonitorEvents::~MonitorEvents() { munmap(tables_, sizeof(Tables)); }

bool MonitorEvents::Live(Token token) const {
  switch (KindOf(token)) {
    case TokenKind::kCommunicator:
      return OwnCommunicator(token) != kNoPlace;
    case TokenKind::kOperation:
      return Find(tables_->operations, kOperationEntries, TokenKind::kOperation, token) != nullptr;
    case TokenKind::kTransfer:
      return Find(tables_->transfers, kTransferEntries, TokenKind::kTransfer, token) != nullptr;
    case TokenKind::kStep: {
      uint32_t step = 0;
      return FindStep(token, &step) != nullptr;
    }
    case TokenKind::kKernel:
      return Find(tables_->kernels, kKernelEntries, TokenKind::kKernel, token) != nullptr;
    case TokenKind::kProxyThread:
      return Ours(token, TokenKind::kProxyThread) && PlaceOf(token) < abi::kBoardSlots;
    case TokenKind::kOther:
      return Find(tables_->others, kOtherEntries, TokenKind::kOther, token) != nullptr;
  }
  return false;
}

// ---- Communicators

Token MonitorEvents::OpenCommunicator(const CommunicatorInfo& info) {
  const uint32_t index = board_->OpenCommunicator(info, MakeToken(TokenKind::kCommunicator, 0, 0),
                                                  kTokenPlaceShift, kTokenGenerationShift);
  return index == kNoPlace ? 0 : communicators_[index].token.load(kRelaxed);
}

uint32_t MonitorEvents::OwnCommunicator(Token communicator) const {
  if (!Ours(communicator, TokenKind::kCommunicator)) return kNoPlace;
  const uint32_t index = PlaceOf(communicator);
  if (index >= abi::kBoardCommunicators) return kNoPlace;
  const abi::Communicator& place = communicators_[index];
  const bool same = place.state.load(kAcquire) == abi::CommunicatorState::kOpen &&
                    place.token.load(kRelaxed) == communicator;
  return same ? index : kNoPlace;
}

uint32_t MonitorEvents::AnyCommunicator(Token communicator) const {
  if (KindOf(communicator) != TokenKind::kCommunicator || TagOf(communicator) == 0) {
    board_->CountDrop(Drop::kUnknownContext);
    return kNoPlace;
  }
  if (!Ours(communicator, TokenKind::kCommunicator)) {
    return board_->ForeignCommunicator(communicator);
  }
  const uint32_t index = OwnCommunicator(communicator);
  if (index == kNoPlace) CountStale();
  return index;
}

bool MonitorEvents::CloseCommunicator(Token communicator) {
  const uint32_t index = OwnCommunicator(communicator);
  if (index == kNoPlace) return false;
  board_->CloseCommunicator(index);
  return true;
}

void MonitorEvents::ApiCall(Token communicator, const OperationInfo& info) {
  const uint32_t index = OwnCommunicator(communicator);
  if (index == kNoPlace) return;
  communicators_[index].api_calls.fetch_add(1, kRelaxed);
  if (recording()) {
    board_->Record({.kind = RecordKind::kApiCall,
                    .detail = static_cast<uint8_t>(info.kind),
                    .place = index,
                    .value = info.bytes},
                   Now());
  }
}

void MonitorEvents::KernelLaunch(Token communicator) {
  const uint32_t index = OwnCommunicator(communicator);
  if (index == kNoPlace) return;
  communicators_[index].kernel_launches.fetch_add(1, kRelaxed);
  if (recording()) {
    board_->Record({.kind = RecordKind::kKernelLaunch, .place = index}, Now());
  }
}

// ---- Operations

Token MonitorEvents::BeginOperation(Token communicator, const OperationInfo& info) {
  const uint32_t index = OwnCommunicator(communicator);
  if (index == kNoPlace) {
    if (communicator != 0) CountStale();
    return 0;
  }
  const uint64_t now = Now();
  abi::Communicator& place = communicators_[index];
  const uint64_t number = place.enqueued.fetch_add(1, kRelaxed) + 1;
  const uint32_t kind = static_cast<uint32_t>(info.kind) % abi::kOperationKinds;
  place.kind_count[kind].fetch_add(1, kRelaxed);
  if (info.nccl_sequence != UINT64_MAX) {
    place.kind_nccl_sequence[kind].store(info.nccl_sequence + 1, kRelaxed);
  }
  const bool point_to_point = info.peer != abi::kNoPeer;
  abi::RecentOperation& recent = place.recent[number % abi::kRecentOperations];
  recent.number.store(0, kRelaxed);
  recent.detail.store(kind | static_cast<uint64_t>(info.data_type) << 8 |
                          uint64_t{point_to_point ? info.peer : info.root} << 32,
                      kRelease);
  recent.bytes.store(info.bytes, kRelease);
  recent.ticks.store(now, kRelease);
  recent.number.store(number, kRelease);
  place.enqueued_ticks.store(now, kRelease);
  header_->last_call_ticks.store(now, kRelaxed);
  board_->FollowRequests(now);
  board_->Record({.kind = RecordKind::kOperationEnqueued,
                  .detail = static_cast<uint8_t>(kind),
                  .place = index,
                  .operation = number,
                  .value = info.bytes},
                 now);

  uint32_t generation = 0;
  const uint32_t at = Allocate(tables_->operations, kOperationEntries, tables_->next_operation,
                               kNoPlace, Drop::kOperations, &generation);
  if (at == kNoPlace) return 0;
  OperationEntry& entry = tables_->operations[at];
  entry.owner.store(OwnerOf(index), kRelaxed);
  entry.number.store(number, kRelaxed);
  entry.kind.store(kind, kRelaxed);
  entry.runs.store(0, kRelaxed);
  uint64_t like_number = 0;
  uint32_t peer_slot = kNoPlace;
  if (point_to_point) {
    peer_slot =
        board_->FindSlot(index, abi::kNoChannel, info.peer,
                         info.kind == abi::OperationKind::kSend ? SlotDirection::kPeerSends
                                                                : SlotDirection::kPeerReceives);
  }
  entry.peer_slot.store(peer_slot, kRelaxed);
  if (peer_slot != kNoPlace) {
    abi::Slot& slot = slots_[peer_slot];
    like_number = slot.operation.fetch_add(1, kRelaxed) + 1;
    slot.bytes.fetch_add(info.bytes, kRelaxed);
    slot.since.store(now, kRelease);
  }
  if (!point_to_point) like_number = place.collectives.fetch_add(1, kRelaxed) + 1;
  entry.like_number.store(like_number, kRelaxed);
  return MakeToken(TokenKind::kOperation, at, generation);
}

void MonitorEvents::CountPeer(const OperationEntry& entry, int total, int done, uint64_t now) {
  const uint32_t place = entry.peer_slot.load(kRelaxed);
  if (place >= abi::kBoardSlots) return;
  abi::Slot& slot = slots_[place];
  slot.steps.fetch_add(static_cast<uint64_t>(static_cast<int64_t>(total)) << 32, kRelaxed);
  slot.steps.fetch_add(static_cast<uint64_t>(static_cast<int64_t>(done)), kRelaxed);
  slot.since.store(now, kRelease);
}

void MonitorEvents::Started(OperationEntry& entry, uint64_t now) {
  const uint32_t owner = entry.owner.load(kRelaxed);
  if (!Open(owner)) return;
  abi::Communicator& place = communicators_[owner >> 16];
  const uint64_t number = entry.number.load(kRelaxed);
  const uint64_t started = place.started.fetch_add(1, kRelaxed) + 1;
  place.kind_started[entry.kind.load(kRelaxed) % abi::kOperationKinds].fetch_add(1, kRelaxed);
  if (started - place.finished.load(kRelaxed) == 1) place.running_since.store(now, kRelease);
  Raise(place.last_started, number);
  place.started_ticks.store(now, kRelease);
  CountPeer(entry, 1, 0, now);
  board_->Record({.kind = RecordKind::kOperationStarted, .place = owner >> 16, .operation = number},
                 now);
}

void MonitorEvents::Finished(OperationEntry& entry, uint64_t now) {
  const uint32_t owner = entry.owner.load(kRelaxed);
  if (!Open(owner)) return;
  abi::Communicator& place = communicators_[owner >> 16];
  const uint64_t number = entry.number.load(kRelaxed);
  const uint64_t finished = place.finished.fetch_add(1, kRelaxed) + 1;
  place.kind_finished[entry.kind.load(kRelaxed) % abi::kOperationKinds].fetch_add(1, kRelaxed);
  if (place.started.load(kRelaxed) == finished) {
    const uint64_t since = place.running_since.exchange(0, kRelaxed);
    if (since != 0 && now > since) place.running_ticks.fetch_add(now - since, kRelease);
  }
  Raise(place.last_finished, number);
  if (entry.peer_slot.load(kRelaxed) == kNoPlace) {
    Raise(place.last_collective_finished, entry.like_number.load(kRelaxed));
  }
  place.finished_ticks.store(now, kRelease);
  CountPeer(entry, 0, 1, now);
  board_->Record(
      {.kind = RecordKind::kOperationFinished, .place = owner >> 16, .operation = number}, now);
}

void MonitorEvents::Unfinished(OperationEntry& entry) {
  const uint32_t owner = entry.owner.load(kRelaxed);
  if (!Open(owner)) return;
  abi::Communicator& place = communicators_[owner >> 16];
  uint64_t number = entry.number.load(kRelaxed);
  const uint64_t now = Now();
  const uint64_t finished = place.finished.fetch_sub(1, kRelaxed) - 1;
  place.kind_finished[entry.kind.load(kRelaxed) % abi::kOperationKinds].fetch_sub(1, kRelaxed);
  if (place.started.load(kRelaxed) - finished == 1) place.running_since.store(now, kRelease);
  // Operations of a communicator finish in order; if a later one has, this stays.
  place.last_finished.compare_exchange_strong(number, number - 1, kRelease, kRelaxed);
  number = entry.like_number.load(kRelaxed);
  if (entry.peer_slot.load(kRelaxed) == kNoPlace && number != 0) {
    place.last_collective_finished.compare_exchange_strong(number, number - 1, kRelease, kRelaxed);
  }
  CountPeer(entry, 0, -1, now);
}

bool MonitorEvents::AddPart(Token operation) {
  OperationEntry* entry =
      Find(tables_->operations, kOperationEntries, TokenKind::kOperation, operation);
  if (entry == nullptr) return false;
  uint32_t life = entry->life.load(kRelaxed);
  for (int i = 0; i < kSwapAttempts; ++i) {
    const bool same = Generation(life) == (operation >> kTokenGenerationShift & 0xffff);
    if (!same || (life & kPartsMask) == kPartsMask) return false;
    const uint32_t more = ((life + 1) | kStarted) & ~kFinished;
    if (!entry->life.compare_exchange_weak(life, more, kRelaxed)) continue;
    if ((life & kStarted) == 0) Started(*entry, Now());
    if ((life & kFinished) != 0) Unfinished(*entry);
    return true;
  }
  return false;
}

void MonitorEvents::RemovePart(Token operation) {
  OperationEntry* entry =
      Find(tables_->operations, kOperationEntries, TokenKind::kOperation, operation);
  if (entry == nullptr) return;
  uint32_t life = entry->life.load(kRelaxed);
  for (int i = 0; i < kSwapAttempts; ++i) {
    const bool same = Generation(life) == (operation >> kTokenGenerationShift & 0xffff);
    if (!same || (life & kPartsMask) == 0) return;
    uint32_t less = life - 1;
    const bool over = (less & kPartsMask) == 0 && (less & kEnded) != 0;
    if (over) less |= kFinished;
    if (!entry->life.compare_exchange_weak(life, less, kRelease, kRelaxed)) continue;
    if (over) Finished(*entry, Now());
    return;
  }
}

bool MonitorEvents::EndOperation(Token operation) {
  OperationEntry* entry =
      Find(tables_->operations, kOperationEntries, TokenKind::kOperation, operation);
  uint32_t life = entry == nullptr ? kEnded : entry->life.load(kRelaxed);
  for (int i = 0; i < kSwapAttempts; ++i) {
    const bool same = Generation(life) == (operation >> kTokenGenerationShift & 0xffff);
    if (entry == nullptr || !same || (life & kEnded) != 0) break;
    uint32_t ended = life | kEnded;
    const bool over = (life & kStarted) != 0 && (life & kPartsMask) == 0;
    if (over) ended |= kFinished;
    if (!entry->life.compare_exchange_weak(life, ended, kRelease, kRelaxed)) continue;
    if (over) Finished(*entry, Now());
    return true;
  }
  if (operation != 0) CountStale();
  return false;
}

void MonitorEvents::StartOperation(Token operation) {
  OperationEntry* entry =
      Find(tables_->operations, kOperationEntries, TokenKind::kOperation, operation);
  if (entry == nullptr) {
    if (operation != 0) CountStale();
    return;
  }
  if (entry->runs.exchange(1, kRelaxed) == 0) AddPart(operation);
}

bool MonitorEvents::FinishOperation(Token operation) {
  OperationEntry* entry =
      Find(tables_->operations, kOperationEntries, TokenKind::kOperation, operation);
  // An operation without any part ran all the same.
  if (entry != nullptr && (entry->life.load(kRelaxed) & (kStarted | kEnded)) == 0) {
    StartOperation(operation);
  }
  if (!EndOperation(operation)) return false;
  if (entry->runs.exchange(0, kRelaxed) != 0) RemovePart(operation);
  return true;
}

// ---- The proxy's thread, others

Token MonitorEvents::BeginProxyThread(Token communicator) {
  const uint32_t index = OwnCommunicator(communicator);
  if (index == kNoPlace) return 0;
  const uint32_t place =
      board_->FindSlot(index, abi::kNoChannel, abi::kNoPeer, SlotDirection::kProxyThread);
  if (place == kNoPlace) return 0;
  std::atomic<uint64_t>& thread = slots_[place].bytes;
  // The one system call of the events: once per communicator.
  if (thread.load(kRelaxed) == 0) thread.store(static_cast<uint64_t>(gettid()), kRelease);
  return MakeToken(TokenKind::kProxyThread, place, communicators_[index].generation.load(kRelaxed));
}

void MonitorEvents::ProxyThreadState(Token thread, WaitState state, uint32_t appended) {
  if (!Ours(thread, TokenKind::kProxyThread) || PlaceOf(thread) >= abi::kBoardSlots) {
    if (thread != 0) CountStale();
    return;
  }
  const uint32_t place = PlaceOf(thread);
  abi::Slot& slot = slots_[place];
  const uint64_t now = Now();
  board_->FollowRequests(now);
  SlotChange change(slot);
  change.SetState(state, 0, abi::OperationKind::kUnknown, now);
  slot.steps.store(slot.steps.load(kRelaxed) + (uint64_t{appended} << 32), kRelease);
  change.Commit();
  board_->Record({.kind = RecordKind::kProxyThread,
                  .detail = static_cast<uint8_t>(state),
                  .place = place,
                  .value = appended},
                 now);
}

Token MonitorEvents::BeginOther() {
  uint32_t generation = 0;
  const uint32_t at = Allocate(tables_->others, kOtherEntries, tables_->next_other, kNoPlace,
                               Drop::kOthers, &generation);
  return at == kNoPlace ? 0 : MakeToken(TokenKind::kOther, at, generation);
}

bool MonitorEvents::EndOther(Token other) {
  OtherEntry* entry = Find(tables_->others, kOtherEntries, TokenKind::kOther, other);
  if (entry == nullptr) return false;
  entry->life.store(entry->life.load(kRelaxed) & ~kLive, kRelease);
  return true;
}

}  // namespace holdfast::hook
