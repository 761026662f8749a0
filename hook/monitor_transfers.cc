// Transfers, their steps, and kernels: what a connection's slot shows.
//
// A slot shows the transfer that began last on its connection, and of that the oldest open step:
// nothing behind it can be done before it. Events of the steps behind it change the entry only; the
// slot, and the clock, are left alone.
#include <bit>

#include "hook/monitor_events.h"
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

// The token of the transfer that a step's token belongs to.
constexpr Token TransferOf(Token step) {
  return (step & ~(uint64_t{0xf} << kTokenKindShift | 0xff)) |
         static_cast<uint64_t>(TokenKind::kTransfer) << kTokenKindShift;
}

}  // namespace

Token MonitorEvents::BeginTransfer(Token communicator, Token operation, const TransferInfo& info) {
  const uint32_t index = AnyCommunicator(communicator);
  if (index == kNoPlace) return 0;
  const SlotDirection direction = info.send ? SlotDirection::kSend : SlotDirection::kReceive;
  const uint32_t slot = board_->FindSlot(index, info.channel, info.peer, direction);
  if (slot == kNoPlace) return 0;
  const Token shown = tables_->shown[slot].load(kRelaxed);
  uint32_t generation = 0;
  const uint32_t at =
      Allocate(tables_->transfers, kTransferEntries, tables_->next_transfer,
               shown == 0 ? kNoPlace : PlaceOf(shown), Drop::kTransfers, &generation);
  if (at == kNoPlace) return 0;
  TransferEntry& entry = tables_->transfers[at];
  uint64_t number = 0;
  uint32_t kind = 0;
  const OperationEntry* parent =
      Find(tables_->operations, kOperationEntries, TokenKind::kOperation, operation);
  if (parent != nullptr) {
    number = parent->like_number.load(kRelaxed);
    kind = parent->kind.load(kRelaxed);
  } else if (Ours(operation, TokenKind::kOperation)) {
    CountStale();
  }
  entry.owner.store(OwnerOf(index), kRelaxed);
  entry.slot.store(slot, kRelaxed);
  entry.open.store(0, kRelaxed);
  entry.states.store(0, kRelaxed);
  entry.oldest.store(0, kRelaxed);
  entry.steps_done.store(0, kRelaxed);
  entry.steps_total.store(info.steps, kRelaxed);
  entry.direction_kind.store(static_cast<uint32_t>(direction) | kind << 8, kRelaxed);
  entry.number.store(number, kRelaxed);
  entry.operation.store(parent != nullptr && AddPart(operation) ? operation : 0, kRelaxed);
  entry.new_bytes.store(0, kRelaxed);
  const Token token = MakeToken(TokenKind::kTransfer, at, generation);
  // Behind another one on the same connection it stays invisible until it begins.
  if (!Live(shown)) ShowTransfer(entry, token, WaitState::kQueued, Now());
  if (recording()) {
    RecordTransfer(entry, RecordKind::kTransferBegun, info.steps, 0, 0, Now());
  }
  return token;
}

// What the transfer waits for: what its oldest open step does.
WaitState MonitorEvents::StateOf(const TransferEntry& entry) {
  if (entry.open.load(kRelaxed) == 0) return WaitState::kBetweenSteps;
  const uint32_t shift = 4 * (entry.oldest.load(kRelaxed) % kStepsOpen);
  return static_cast<WaitState>(entry.states.load(kRelaxed) >> shift & 0xf);
}

void MonitorEvents::ShowTransfer(TransferEntry& entry, Token token, WaitState state, uint64_t now) {
  if (!Open(entry.owner.load(kRelaxed))) {
    CountStale();
    return;
  }
  const uint32_t place = entry.slot.load(kRelaxed) % abi::kBoardSlots;
  const uint32_t open = entry.open.load(kRelaxed);
  tables_->shown[place].store(token, kRelaxed);
  abi::Slot& slot = slots_[place];
  const uint64_t bytes = slot.bytes.load(kRelaxed) + entry.new_bytes.load(kRelaxed);
  entry.new_bytes.store(0, kRelaxed);
  SlotChange change(slot);
  change.SetState(state, static_cast<uint32_t>(std::popcount(open)),
                  static_cast<abi::OperationKind>(entry.direction_kind.load(kRelaxed) >> 8 & 0xff),
                  now);
  slot.operation.store(entry.number.load(kRelaxed), kRelease);
  slot.steps.store(
      entry.steps_done.load(kRelaxed) | uint64_t{entry.steps_total.load(kRelaxed)} << 32, kRelease);
  slot.bytes.store(bytes, kRelease);
  change.Commit();
}

void MonitorEvents::RecordTransfer(const TransferEntry& entry, RecordKind kind, uint32_t step,
                                   uint8_t detail, uint64_t value, uint64_t now) {
  board_->Record({.kind = kind,
                  .detail = detail,
                  .place = entry.slot.load(kRelaxed),
                  .step = step,
                  .operation = entry.number.load(kRelaxed),
                  .value = value},
                 now);
}

void MonitorEvents::TransferInProgress(Token transfer) {
  TransferEntry* entry = Find(tables_->transfers, kTransferEntries, TokenKind::kTransfer, transfer);
  if (entry == nullptr) {
    if (transfer != 0) CountStale();
    return;
  }
  const uint32_t direction_kind = entry->direction_kind.load(kRelaxed);
  if ((direction_kind >> 16) != 0) return;
  entry->direction_kind.store(direction_kind | 1u << 16, kRelaxed);
  const uint64_t now = Now();
  ShowTransfer(*entry, transfer, StateOf(*entry), now);
  RecordTransfer(*entry, RecordKind::kTransferInProgress, 0, 0, 0, now);
}

bool MonitorEvents::EndTransfer(Token transfer) {
  TransferEntry* entry = Find(tables_->transfers, kTransferEntries, TokenKind::kTransfer, transfer);
  if (entry == nullptr) {
    if (transfer != 0) CountStale();
    return false;
  }
  const uint64_t now = Now();
  RecordTransfer(*entry, RecordKind::kTransferEnded, entry->steps_done.load(kRelaxed), 0, 0, now);
  const Token operation = entry->operation.load(kRelaxed);
  const uint32_t place = entry->slot.load(kRelaxed) % abi::kBoardSlots;
  entry->open.store(0, kRelaxed);
  if (tables_->shown[place].load(kRelaxed) == transfer) {
    ShowTransfer(*entry, transfer, WaitState::kNone, now);
  }
  entry->life.store(entry->life.load(kRelaxed) & ~kLive, kRelease);
  if (operation != 0) RemovePart(operation);
  return true;
}

// ---- Steps

MonitorEvents::TransferEntry* MonitorEvents::FindStep(Token token, uint32_t* step) const {
  if (!Ours(token, TokenKind::kStep)) return nullptr;
  const uint32_t place = PlaceOf(token);
  if (place >= kTransferEntries) return nullptr;
  TransferEntry& entry = tables_->transfers[place];
  const uint32_t life = entry.life.load(kAcquire);
  if ((life & kLive) == 0 || Generation(life) != (token >> kTokenGenerationShift & 0xffff)) {
    return nullptr;
  }
  // The one open step of [oldest, oldest + 8) with these low bits.
  const uint32_t oldest = entry.oldest.load(kRelaxed);
  *step = oldest + ((static_cast<uint32_t>(token) - oldest) & 0xff);
  const bool inside = *step - oldest < kStepsOpen;
  return inside && (entry.open.load(kRelaxed) >> *step % kStepsOpen & 1) != 0 ? &entry : nullptr;
}

Token MonitorEvents::BeginStep(Token transfer, uint32_t step) {
  TransferEntry* entry = Find(tables_->transfers, kTransferEntries, TokenKind::kTransfer, transfer);
  if (entry == nullptr) {
    if (transfer != 0) CountStale();
    return 0;
  }
  const uint32_t direction_kind = entry->direction_kind.load(kRelaxed);
  const bool send = (direction_kind & 0xff) == static_cast<uint32_t>(SlotDirection::kSend);
  const uint32_t bit = step % kStepsOpen;
  uint32_t open = entry->open.load(kRelaxed);
  const uint32_t oldest = entry->oldest.load(kRelaxed);
  // Steps come in order, at most 8 at once. One that does not fit says that older ones are over,
  // whose end was not reported.
  if (open == 0 || step - oldest >= kStepsOpen) {
    open = 0;
    entry->oldest.store(step, kRelaxed);
  }
  const bool first = open == 0;
  const uint32_t initial =
      static_cast<uint32_t>(send ? WaitState::kSendGpuWait : WaitState::kReceiveWait);
  entry->states.store((entry->states.load(kRelaxed) & ~(0xfu << 4 * bit)) | initial << 4 * bit,
                      kRelaxed);
  entry->open.store(open | 1u << bit, kRelaxed);
  if (first) {
    entry->direction_kind.store(direction_kind | 1u << 16, kRelaxed);
    ShowTransfer(*entry, transfer, StateOf(*entry), Now());
  }
  if (recording()) {
    RecordTransfer(*entry, RecordKind::kStepBegun, step, 0, 0, Now());
  }
  return (transfer & ~(uint64_t{0xf} << kTokenKindShift)) |
         static_cast<uint64_t>(TokenKind::kStep) << kTokenKindShift | (step & 0xff);
}

bool MonitorEvents::StepState(Token token, WaitState state, uint64_t bytes) {
  uint32_t step = 0;
  TransferEntry* entry = FindStep(token, &step);
  if (entry == nullptr) {
    if (token != 0) CountStale();
    return false;
  }
  const uint32_t shift = 4 * (step % kStepsOpen);
  const uint32_t states = entry->states.load(kRelaxed);
  const WaitState old = static_cast<WaitState>(states >> shift & 0xf);
  if (old == state) return true;
  const bool send = old <= WaitState::kSendWait;
  if (send != (state <= WaitState::kSendWait) || abi::WaitedIndex(state) < 0) {
    CountStale();
    return false;
  }
  entry->states.store((states & ~(0xfu << shift)) | static_cast<uint32_t>(state) << shift,
                      kRelaxed);
  // The size is known from here on; before, it is that of an earlier step.
  if (state == WaitState::kSendWait || old == WaitState::kReceiveWait) {
    entry->new_bytes.store(entry->new_bytes.load(kRelaxed) + bytes, kRelaxed);
  }
  const bool shows = step == entry->oldest.load(kRelaxed);
  const bool records = recording();
  if (!shows && !records) return true;
  const uint64_t now = Now();
  if (shows) {
    ShowTransfer(*entry, TransferOf(token), StateOf(*entry), now);
  }
  if (records) {
    RecordTransfer(*entry, RecordKind::kStepState, step, static_cast<uint8_t>(state), bytes, now);
  }
  return true;
}

bool MonitorEvents::EndStep(Token token) {
  uint32_t step = 0;
  TransferEntry* entry = FindStep(token, &step);
  if (entry == nullptr) {
    if (token != 0) CountStale();
    return false;
  }
  const uint32_t open = entry->open.load(kRelaxed) & ~(1u << step % kStepsOpen);
  entry->open.store(open, kRelaxed);
  entry->steps_done.store(entry->steps_done.load(kRelaxed) + 1, kRelaxed);
  uint32_t oldest = entry->oldest.load(kRelaxed);
  const bool shows = step == oldest;
  const bool records = recording();
  if (!shows && !records) return true;
  const uint64_t now = Now();
  if (shows) {
    ++oldest;
    while (open != 0 && (open >> oldest % kStepsOpen & 1) == 0) ++oldest;
    entry->oldest.store(oldest, kRelaxed);
    ShowTransfer(*entry, TransferOf(token), StateOf(*entry), now);
  }
  if (records) RecordTransfer(*entry, RecordKind::kStepDone, step, 0, 0, now);
  return true;
}

// ---- Kernels

Token MonitorEvents::BeginKernel(Token communicator, Token operation, uint32_t channel,
                                 uint64_t gpu_ns) {
  const uint32_t index = AnyCommunicator(communicator);
  if (index == kNoPlace) return 0;
  const uint32_t place = board_->FindSlot(index, channel, abi::kNoPeer, SlotDirection::kKernel);
  if (place == kNoPlace) return 0;
  // A channel runs one kernel of a communicator at a time: the last one is over, told or not.
  const Token shown = tables_->shown[place].load(kRelaxed);
  if (Live(shown)) EndKernel(shown);
  uint32_t generation = 0;
  const uint32_t at = Allocate(tables_->kernels, kKernelEntries, tables_->next_kernel,
                               shown == 0 ? kNoPlace : PlaceOf(shown), Drop::kKernels, &generation);
  if (at == kNoPlace) return 0;
  KernelEntry& entry = tables_->kernels[at];
  const OperationEntry* parent =
      Find(tables_->operations, kOperationEntries, TokenKind::kOperation, operation);
  const uint64_t number = parent == nullptr ? 0 : parent->like_number.load(kRelaxed);
  const uint32_t kind = parent == nullptr ? 0 : parent->kind.load(kRelaxed);
  entry.owner.store(OwnerOf(index), kRelaxed);
  entry.slot.store(place, kRelaxed);
  entry.number.store(number, kRelaxed);
  entry.start_gpu_ns.store(gpu_ns, kRelaxed);
  entry.operation.store(parent != nullptr && AddPart(operation) ? operation : 0, kRelaxed);
  const Token token = MakeToken(TokenKind::kKernel, at, generation);
  tables_->shown[place].store(token, kRelaxed);
  const uint64_t now = Now();
  abi::Slot& slot = slots_[place];
  SlotChange change(slot);
  change.SetState(WaitState::kKernelRunning, 1, static_cast<abi::OperationKind>(kind), now);
  slot.operation.store(number, kRelease);
  slot.steps.store(slot.steps.load(kRelaxed) + (uint64_t{1} << 32), kRelease);
  slot.waited[1].store(gpu_ns, kRelease);
  change.Commit();
  board_->Record({.kind = RecordKind::kKernelStarted,
                  .place = place,
                  .step = channel,
                  .operation = number,
                  .value = gpu_ns},
                 now);
  return token;
}

void MonitorEvents::StopKernel(KernelEntry& entry, uint64_t gpu_ns, uint64_t now) {
  if (!Open(entry.owner.load(kRelaxed))) {
    CountStale();
    return;
  }
  const uint32_t place = entry.slot.load(kRelaxed) % abi::kBoardSlots;
  const uint64_t start_gpu_ns = entry.start_gpu_ns.load(kRelaxed);
  abi::Slot& slot = slots_[place];
  const uint64_t head = slot.head.load(kRelaxed);
  SlotChange change(slot);
  change.SetState(WaitState::kNone, 0, static_cast<abi::OperationKind>(head >> 48 & 0xff), now);
  const uint64_t steps = slot.steps.load(kRelaxed);
  slot.steps.store((steps & ~uint64_t{UINT32_MAX}) | static_cast<uint32_t>(steps + 1), kRelease);
  if (gpu_ns > start_gpu_ns) {
    slot.waited[0].store(slot.waited[0].load(kRelaxed) + (gpu_ns - start_gpu_ns), kRelease);
  }
  change.Commit();
  board_->Record({.kind = RecordKind::kKernelStopped,
                  .place = place,
                  .operation = entry.number.load(kRelaxed),
                  .value = gpu_ns},
                 now);
}

bool MonitorEvents::KernelStopped(Token kernel, uint64_t gpu_ns) {
  KernelEntry* entry = Find(tables_->kernels, kKernelEntries, TokenKind::kKernel, kernel);
  if (entry == nullptr) {
    if (kernel != 0) CountStale();
    return false;
  }
  const uint32_t life = entry->life.load(kRelaxed);
  if ((life & kStopped) != 0) return true;
  entry->life.store(life | kStopped, kRelaxed);
  StopKernel(*entry, gpu_ns, Now());
  return true;
}

bool MonitorEvents::EndKernel(Token kernel) {
  KernelEntry* entry = Find(tables_->kernels, kKernelEntries, TokenKind::kKernel, kernel);
  if (entry == nullptr) {
    if (kernel != 0) CountStale();
    return false;
  }
  const uint32_t life = entry->life.load(kRelaxed);
  if ((life & kStopped) == 0) StopKernel(*entry, 0, Now());
  const Token operation = entry->operation.load(kRelaxed);
  entry->life.store(Generation(life) << 16, kRelease);
  if (operation != 0) RemovePart(operation);
  return true;
}

}  // namespace holdfast::hook
