// The events of communication, turned into the monitor board: state machines of operations,
// transfers (NCCL's proxy operations), their steps, and kernels. Used by the NCCL profiler plugin
// and by the hook API.
//
// Tokens. Whoever reports an event gets a token for it and gives it back with what follows. A token
// is no pointer: it is the process's tag, a kind, a place in one of this object's tables, and the
// generation of that place. So a late event, one given twice, or one of another process (NCCL gives
// PXN operations, with the contexts and parents of their own process, to the proxy of another) is
// recognised and counted, whatever happened in between. 0 is no token: it is given where an event
// is left out, and taken everywhere and ignored.
//
//   tag (22 bits: the process id) | kind (4) | place (14) | generation (16) | step (8)
//
// Tables are fixed. A full one forgets an old entry (Drop::kOperations and so on): its later events
// are stale then; what the board shows of it stays.
//
// No lock, no allocation, no system call (but one per communicator: BeginProxyThread); no call
// blocks or fails. The clock is read only where
// what the board shows changes (or while records are kept): the same wait state again, as NCCL
// reports it at every poll, costs a look at one entry.
#ifndef HOLDFAST_HOOK_MONITOR_EVENTS_H_
#define HOLDFAST_HOOK_MONITOR_EVENTS_H_

#include <atomic>
#include <cstdint>
#include <memory>

#include "hook/abi/monitor.h"
#include "hook/error.h"
#include "hook/monitor_board.h"

// Of functions that NCCL's proxy calls all the time: the linker puts them side by side, so that
// little of the instruction cache is needed.
#define HOOK_HOT __attribute__((hot))

namespace holdfast::hook {

using Token = uint64_t;

enum class TokenKind : uint32_t {
  kCommunicator = 1,
  kOperation = 2,
  kTransfer = 3,
  kStep = 4,  // place and generation are its transfer's
  kKernel = 5,
  kProxyThread = 6,  // place: its slot
  kOther = 7,        // an event that only a chained plugin looks at
};

inline constexpr int kTokenGenerationShift = 8;
inline constexpr int kTokenPlaceShift = 24;
inline constexpr int kTokenKindShift = 38;
inline constexpr int kTokenTagShift = 42;
inline constexpr uint32_t kTokenPlaceMask = (1u << 14) - 1;

inline constexpr uint32_t kOperationEntries = 4096;
inline constexpr uint32_t kTransferEntries = 4096;
inline constexpr uint32_t kKernelEntries = 1024;
inline constexpr uint32_t kOtherEntries = 1024;
// Steps that NCCL has open on one proxy operation at most (NCCL_STEPS).
inline constexpr uint32_t kStepsOpen = 8;

inline constexpr TokenKind KindOf(Token token) {
  return static_cast<TokenKind>(token >> kTokenKindShift & 0xf);
}
inline constexpr uint32_t PlaceOf(Token token) {
  return static_cast<uint32_t>(token >> kTokenPlaceShift) & kTokenPlaceMask;
}
inline constexpr uint32_t TagOf(Token token) {
  return static_cast<uint32_t>(token >> kTokenTagShift);
}

struct OperationInfo {
  abi::OperationKind kind = abi::OperationKind::kUnknown;
  abi::DataType data_type = abi::DataType::kUnknown;
  uint64_t bytes = 0;
  uint32_t root = 0;
  uint32_t peer = abi::kNoPeer;         // of kSend and kReceive: a rank of the communicator
  uint64_t nccl_sequence = UINT64_MAX;  // UINT64_MAX: has none
};

struct TransferInfo {
  uint32_t channel = 0;  // below abi::kNoChannel
  uint32_t peer = 0;     // a rank of the communicator
  uint32_t steps = 0;
  bool send = false;
};

// Threads: any. What begins at one token (a transfer's steps, a kernel's end) comes from one thread
//   at a time, as NCCL's callbacks do; everything else may come from several at once.
// Lifetime: nobody may be in a call when it is destroyed.
class MonitorEvents {
 public:
  // Takes the board. Errors: HF_RESOURCE_EXHAUSTED (memory).
  static Result<std::unique_ptr<MonitorEvents>> Create(std::unique_ptr<MonitorBoard> board);
  ~MonitorEvents();
  MonitorEvents(const MonitorEvents&) = delete;
  MonitorEvents& operator=(const MonitorEvents&) = delete;

  const MonitorBoard& board() const { return *board_; }

  // 0: the board is full (counted).
  Token OpenCommunicator(const CommunicatorInfo& info);
  // Events on it that come later are stale. False: not an open communicator of this process.
  bool CloseCommunicator(Token communicator);

  // An operation is enqueued.
  Token BeginOperation(Token communicator, const OperationInfo& info);
  // Nothing more is said of it but by its parts (NCCL's stop: it was given to the GPU). If all
  // parts that have begun are over, it is finished. False: stale.
  bool EndOperation(Token operation);
  // It runs from now until FinishOperation, whatever its parts do. Finishing one that never started
  // starts it. False: stale.
  void StartOperation(Token operation);
  bool FinishOperation(Token operation);

  // `operation`: 0 or one of another process: not known.
  Token BeginTransfer(Token communicator, Token operation, const TransferInfo& info);
  void TransferInProgress(Token transfer);
  bool EndTransfer(Token transfer);

  HOOK_HOT Token BeginStep(Token transfer, uint32_t step);
  // `bytes`: of the step, from kSendWait and kReceiveFlushWait on. A state of the other direction
  // is stale. False: stale.
  HOOK_HOT bool StepState(Token step, abi::WaitState state, uint64_t bytes);
  HOOK_HOT bool EndStep(Token step);

  // `gpu_ns`: the GPU's clock.
  Token BeginKernel(Token communicator, Token operation, uint32_t channel, uint64_t gpu_ns);
  bool KernelStopped(Token kernel, uint64_t gpu_ns);
  bool EndKernel(Token kernel);

  // The calling thread moves the communicator's transfers.
  Token BeginProxyThread(Token communicator);
  void ProxyThreadState(Token thread, abi::WaitState state, uint32_t appended);

  void ApiCall(Token communicator, const OperationInfo& info);
  void KernelLaunch(Token communicator);

  // Entries for events that are somebody else's.
  Token BeginOther();
  bool EndOther(Token other);

  // Whether the token's entry is still there.
  bool Live(Token token) const;

 private:
  struct Tables;
  struct OperationEntry;
  struct TransferEntry;
  struct KernelEntry;
  struct OtherEntry;

  MonitorEvents(std::unique_ptr<MonitorBoard> board, Tables* tables);

  Token MakeToken(TokenKind kind, uint32_t place, uint32_t generation) const {
    return tag_ | static_cast<uint64_t>(kind) << kTokenKindShift |
           uint64_t{place} << kTokenPlaceShift |
           uint64_t{generation & 0xffff} << kTokenGenerationShift;
  }
  bool Ours(Token token, TokenKind kind) const {
    return token >> kTokenKindShift ==
           (tag_ | static_cast<uint64_t>(kind) << kTokenKindShift) >> kTokenKindShift;
  }
  void CountStale() const { board_->CountDrop(abi::Drop::kStale); }

  template <typename Entry>
  uint32_t Allocate(Entry* entries, uint32_t count, std::atomic<uint32_t>& cursor, uint32_t hint,
                    abi::Drop cause, uint32_t* generation);
  template <typename Entry>
  Entry* Find(Entry* entries, uint32_t count, TokenKind kind, Token token) const;

  // Whether an entry's communicator is still open. What comes later on it is stale: its slots may
  // be another's by then.
  bool Open(uint32_t owner) const {
    const abi::Communicator& place = communicators_[owner >> 16 & 0xff];
    return place.state.load(std::memory_order_acquire) == abi::CommunicatorState::kOpen &&
           (place.generation.load(std::memory_order_relaxed) & 0xffff) == (owner & 0xffff);
  }
  uint32_t OwnerOf(uint32_t communicator) const {
    return communicator << 16 |
           (communicators_[communicator].generation.load(std::memory_order_relaxed) & 0xffff);
  }

  uint32_t OwnCommunicator(Token communicator) const;
  uint32_t AnyCommunicator(Token communicator) const;
  HOOK_HOT TransferEntry* FindStep(Token token, uint32_t* step) const;

  // A part of the operation begins or ends.
  bool AddPart(Token operation);
  void RemovePart(Token operation);
  void Started(OperationEntry& entry, uint64_t now);
  void Finished(OperationEntry& entry, uint64_t now);
  void Unfinished(OperationEntry& entry);
  void CountPeer(const OperationEntry& entry, int total, int done, uint64_t now);

  static abi::WaitState StateOf(const TransferEntry& entry);
  // Its slot shows this transfer, in this state.
  HOOK_HOT void ShowTransfer(TransferEntry& entry, Token token, abi::WaitState state, uint64_t now);
  void RecordTransfer(const TransferEntry& entry, abi::RecordKind kind, uint32_t step,
                      uint8_t detail, uint64_t value, uint64_t now);
  void StopKernel(KernelEntry& entry, uint64_t gpu_ns, uint64_t now);

  uint64_t Now() const { return tsc_ ? __rdtsc() : board_->Now(); }
  bool recording() const { return header_->window.load(std::memory_order_relaxed) != 0; }

  // One cache line: an event that finds nothing in the caches waits for as few lines, one behind
  // the other, as possible. So what the board knows is here again.
  alignas(64) const uint64_t tag_;  // at its place
  Tables* const tables_;
  abi::Slot* const slots_;
  abi::Communicator* const communicators_;
  abi::BoardHeader* const header_;
  const bool tsc_;
  const std::unique_ptr<MonitorBoard> board_;
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_MONITOR_EVENTS_H_
