// The monitor board: what a training process shows of its communication, in shared memory, readable
// at any instant without a lock, also after the process has died or in the middle of a hang.
//
// One board per process and writer (the NCCL profiler plugin has one, libholdfast's hook API has
// one; both carry the same identity). The trainer writes; everybody else maps read-only, all but
// the last page, and treats every value as a claim (monitor_read.h reads and validates). In order:
//
//   BoardHeader      who writes, its clock, drops, training step, sections
//   Communicator[]   one per (communicator, rank) opened in the process: names and counters
//   keys[], Slot[]   the state board: one slot per (communicator, channel, peer, direction),
//                    overwritten in place
//   Ring[]           one per thread: the last records, kept only at level full or while a window
//                    is open
//   BoardRequests    on a page of its own: the one thing that the agent writes and the trainer
//                    reads
//
// Concurrency. Every word that changes is an atomic of its own, so no read is ever torn below a
// word. Values of several words carry a sequence: odd while being written. The writer stores the
// odd sequence, then every data word with release, then the even sequence with release; a reader
// loads the sequence with acquire, every data word with acquire, and the sequence again, and takes
// the value if both are equal and even. (A data word loaded with acquire pairs with the release
// store of that word, before which the odd sequence was stored: who sees a new word sees the odd
// sequence or a later one. No fences: ThreadSanitizer does not see them.)
// One thread at a time writes a slot: NCCL's proxy thread of that connection. If two do by mistake,
// readers see a mixture until the next event; nothing else happens.
//
// Time is in ticks of the header's clock. Limits are below; at each of them the event is counted in
// BoardHeader::drops and nothing blocks.
//
// Plain data, std only. Any change of a struct is a new kBoardVersion.
#ifndef HOLDFAST_HOOK_ABI_MONITOR_H_
#define HOLDFAST_HOOK_ABI_MONITOR_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace holdfast::abi {

static_assert(std::atomic<uint32_t>::is_always_lock_free);
static_assert(std::atomic<uint64_t>::is_always_lock_free);

inline constexpr uint32_t kBoardMagic = 0x31424d48;  // "HMB1" in memory
inline constexpr uint32_t kBoardVersion = 2;

// Communicators open at once in a process. The last quarter is for those of other processes, whose
// operations NCCL gives to this process's proxy (PXN).
inline constexpr uint32_t kBoardCommunicators = 256;
inline constexpr uint32_t kBoardForeignCommunicators = 64;
// Connections (with their kernels and proxy threads) of all open communicators.
inline constexpr uint32_t kBoardSlots = 8192;
// Threads that record.
inline constexpr uint32_t kBoardRings = 32;
// Records that a ring holds: the oldest is overwritten.
inline constexpr uint32_t kRingRecords = 2048;
// Operations of a communicator whose kind and size are kept.
inline constexpr uint32_t kRecentOperations = 16;
// A window that is asked for longer than this is not opened.
inline constexpr uint32_t kWindowSecondsMax = 60;
inline constexpr uint32_t kBoardSectionDepth = 8;
inline constexpr uint32_t kBoardSectionNameBytes = 32;  // with the NUL
inline constexpr uint32_t kCommunicatorNameBytes = 64;  // with the NUL; longer ones are cut

enum class BoardWriter : uint32_t { kProfilerPlugin = 1, kHookApi = 2 };

enum class MonitorLevel : uint32_t {
  kOff = 0,
  kLight = 1,  // the state board
  kFull = 2,   // and records, kernels per channel, API calls
};

enum class BoardClock : uint32_t {
  kMonotonicNs = 1,  // CLOCK_MONOTONIC in nanoseconds
  kTsc = 2,          // rdtsc, invariant; see BoardHeader for its rate
};

enum class OperationKind : uint8_t {
  kUnknown = 0,
  kAllReduce = 1,
  kBroadcast = 2,
  kReduce = 3,
  kAllGather = 4,
  kReduceScatter = 5,
  kAllToAll = 6,
  kGather = 7,
  kScatter = 8,
  kSend = 9,
  kReceive = 10,
  kBarrier = 11,
};
inline constexpr uint32_t kOperationKinds = 16;  // places in arrays

enum class DataType : uint8_t {
  kUnknown = 0,
  kInt8 = 1,
  kUint8 = 2,
  kInt32 = 3,
  kUint32 = 4,
  kInt64 = 5,
  kUint64 = 6,
  kFloat16 = 7,
  kFloat32 = 8,
  kFloat64 = 9,
  kBfloat16 = 10,
  kFloat8E4m3 = 11,
  kFloat8E5m2 = 12,
};

// What the oldest open step of a connection waits for. In brackets: whom that blames.
enum class WaitState : uint8_t {
  kNone = 0,              // no operation is on this connection
  kQueued = 1,            // an operation was given to the proxy; it has not begun
  kBetweenSteps = 2,      // begun; no step is open
  kSendGpuWait = 3,       // the local GPU has not produced the data [this rank]
  kSendPeerWait = 4,      // the receiver has given no credit [the peer]
  kSendWait = 5,          // posted, not completed [path, NIC, or the peer's NIC]
  kReceiveWait = 6,       // posted, no data yet [the peer, or the path]
  kReceiveFlushWait = 7,  // data are here, being flushed to the GPU [local PCIe, NIC]
  kReceiveGpuWait = 8,    // the local GPU has not consumed the data [this rank]
  kKernelRunning = 9,     // kKernel: the kernel has started and not stopped
  kProxyIdle = 10,        // kProxyThread: nothing to progress
  kProxyActive = 11,
  kProxySleeping = 12,   // waits for operations
  kProxyAppending = 13,  // takes over operations
};
inline constexpr uint32_t kWaitStates = 14;

enum class SlotDirection : uint8_t {
  kSend = 1,
  kReceive = 2,
  kKernel = 3,        // the communicator's kernel on this channel; peer = kNoPeer
  kProxyThread = 4,   // channel = kNoChannel, peer = kNoPeer
  kPeerSends = 5,     // point-to-point operations to this peer, counted; channel = kNoChannel
  kPeerReceives = 6,  // and from it
};
inline constexpr uint32_t kSlotDirections = 7;
inline constexpr uint32_t kNoChannel = 255;
inline constexpr uint32_t kNoPeer = (1u << 24) - 1;

// Why an event is not on the board.
enum class Drop : uint32_t {
  kCommunicators = 0,  // more than kBoardCommunicators are open: nothing of this one is shown
  kForeign = 1,        // more than kBoardForeignCommunicators of other processes
  kSlots = 2,          // more than kBoardSlots connections
  kOperations = 3,     // the oldest open operation was forgotten for this one
  kTransfers = 4,      // the oldest open proxy operation was forgotten for this one
  kKernels = 5,        // the oldest open kernel event was forgotten for this one
  kOthers = 6,         // the same of events that only a chained plugin looks at
  kRings = 7,          // more than kBoardRings threads: the record of this one was not kept
  kStale = 8,          // came after its operation had ended; not lost: it says nothing any more
  kUnknownContext = 9  // with a context or parent that is none of ours
};
inline constexpr uint32_t kDropCauses = 16;  // places in the array

// Constant after the board was made, but for what is atomic.
struct BoardHeader {
  uint32_t magic;
  uint32_t version;
  uint64_t total_bytes;
  // Offsets from the beginning of the board, and what of each there is.
  uint32_t communicators_offset;
  uint32_t communicator_count;
  uint32_t keys_offset;
  uint32_t slots_offset;
  uint32_t slot_count;
  uint32_t rings_offset;
  uint32_t ring_count;
  uint32_t ring_record_count;

  BoardWriter writer;
  uint32_t process_id;   // as the process sees it
  uint32_t process_tag;  // the top bits of its tokens (Communicator::token)
  MonitorLevel level;
  uint32_t rank;  // global; UINT32_MAX: not known
  uint32_t world_size;
  uint32_t local_rank;
  BoardClock clock;

  // One instant on both clocks, when the board was made, and the rate found then (1e9 for
  // kMonotonicNs). A reader on the same machine does better: it reads both clocks itself, and takes
  // the line through the two points.
  uint64_t start_ticks;
  int64_t start_monotonic_ns;
  uint64_t ticks_per_second;
  uint8_t reserved0[24];

  char job[129];  // NUL-terminated, as the next; empty: not known
  char attempt_key[256];
  char node[128];  // HOLDFAST_NODE, else the host name
  uint8_t reserved1[383];

  std::atomic<uint64_t> drops[kDropCauses];

  // 1: records are kept. Level full: always. Else from the first operation, or change of a proxy
  // thread, that sees BoardRequests::window_until_ticks ahead, to the first event after that time.
  std::atomic<uint32_t> window;
  uint32_t reserved2;
  // The writer is alive and called at that time (updated with every enqueued operation).
  std::atomic<uint64_t> last_call_ticks;
  // Training steps done, as told by the hook API.
  std::atomic<uint64_t> step;
  std::atomic<uint64_t> step_ticks;
  std::atomic<uint64_t> step_count;
  // Open sections, outermost first; may exceed kBoardSectionDepth, deeper names are not kept. A
  // name may be torn: it is for people.
  std::atomic<uint32_t> section_depth;
  uint32_t reserved3;
  std::atomic<uint64_t> section_ticks;  // of the last change of the stack
  std::atomic<uint64_t> section_names[kBoardSectionDepth][kBoardSectionNameBytes / 8];
  // Slots that were ever given to a connection: while it stands, a reader knows all of them.
  std::atomic<uint64_t> slots_taken;
  uint8_t reserved4[2624];
};
static_assert(offsetof(BoardHeader, job) == 128);
static_assert(offsetof(BoardHeader, drops) == 1024);
static_assert(sizeof(BoardHeader) == 4096);

enum class CommunicatorState : uint32_t {
  kEmpty = 0,
  kChanging = 1,  // being opened: nothing of it is valid
  kOpen = 2,
  kClosed = 3,  // what it was stays readable until the place is needed
};

// Number, kind and size of an operation. Written number = 0, detail, bytes, number; a reader takes
// it if the number is the same before and after, and not 0.
struct RecentOperation {
  std::atomic<uint64_t> number;  // counted from 1 in this communicator, as it enqueued them
  std::atomic<uint64_t> detail;  // OperationKind | DataType << 8 | root or peer << 32
  std::atomic<uint64_t> bytes;
  std::atomic<uint64_t> ticks;  // when it was enqueued
};
static_assert(sizeof(RecentOperation) == 32);

// A communicator as one rank of it sees it.
//
// Counters. An operation is enqueued when NCCL starts its Coll or P2p event (NCCL's stop of that
// event says that it was given to the GPU, microseconds later; it does not say that it is done); it
// is started when its first visible part begins: a proxy operation, or a kernel (level full); it is
// finished when all visible parts have ended. What runs over NVLink or shared memory alone has no
// visible part at level light: then `started` stays behind `enqueued` and says nothing.
// `finished` may go down by one when NCCL gives the proxy more of an operation whose first parts
// are done already.
struct Communicator {
  // Written before `state` becomes kOpen (release); read after it (acquire), and `generation` again
  // afterwards.
  std::atomic<CommunicatorState> state;
  std::atomic<uint32_t> generation;  // of this place, 1 and up
  std::atomic<uint64_t> token;       // the context given to NCCL: names it across processes
  std::atomic<uint64_t> hash;        // commId: the same on all its ranks; 0 if foreign
  std::atomic<uint32_t> ranks;       // 0 if foreign
  std::atomic<uint32_t> rank;
  std::atomic<uint32_t> nodes;
  std::atomic<uint32_t> foreign;  // 1: of another process, whose board has the same token
  std::atomic<uint64_t> opened_ticks;
  std::atomic<uint64_t> closed_ticks;  // 0: open
  uint64_t reserved0;
  std::atomic<uint64_t> name[kCommunicatorNameBytes / 8];

  std::atomic<uint64_t> enqueued;
  std::atomic<uint64_t> started;
  std::atomic<uint64_t> finished;
  std::atomic<uint64_t> last_started;    // greatest operation number that has started
  std::atomic<uint64_t> last_finished;   // greatest that has finished
  std::atomic<uint64_t> enqueued_ticks;  // of the last change of the three counters
  std::atomic<uint64_t> started_ticks;
  std::atomic<uint64_t> finished_ticks;

  std::atomic<uint64_t> api_calls;        // collectives and point-to-point calls by the program
  std::atomic<uint64_t> kernel_launches;  // level full
  // Of what is not point to point: enqueued, and the greatest number among them that has finished.
  std::atomic<uint64_t> collectives;
  std::atomic<uint64_t> last_collective_finished;
  // Ticks in which an operation ran (had started and not finished), without the present one; and
  // since when one runs, 0: none does. Two threads that begin and end operations at the same moment
  // may cost it one of them.
  std::atomic<uint64_t> running_ticks;
  std::atomic<uint64_t> running_since;
  uint64_t reserved1[2];

  // Operations enqueued, by OperationKind; and NCCL's own number of the last one plus 1 (it counts
  // per function in the communicator, as RAS does; 0: none; replayed CUDA graphs do not advance
  // it).
  std::atomic<uint64_t> kind_count[kOperationKinds];
  std::atomic<uint64_t> kind_nccl_sequence[kOperationKinds];

  RecentOperation recent[kRecentOperations];  // operation n at n % kRecentOperations
  // Of kind_count, those that have started and finished.
  std::atomic<uint64_t> kind_started[kOperationKinds];
  std::atomic<uint64_t> kind_finished[kOperationKinds];
  uint8_t reserved2[256];
};
static_assert(offsetof(Communicator, enqueued) == 128);
static_assert(offsetof(Communicator, kind_count) == 256);
static_assert(offsetof(Communicator, recent) == 512);
static_assert(offsetof(Communicator, kind_started) == 1024);
static_assert(sizeof(Communicator) == 1536);

// A slot's key. 0: never used. kBusyKey: being made. The communicator must be open in this
// generation, else the slot is a leftover. Read the key, the slot, and the key again.
inline constexpr uint64_t kBusyKey = UINT64_MAX;
struct SlotKey {
  uint32_t communicator;  // index
  uint32_t generation;    // low 16 bits of the communicator's
  uint32_t channel;
  uint32_t peer;  // rank in the communicator
  SlotDirection direction;
};
constexpr uint64_t EncodeSlotKey(const SlotKey& key) {
  return static_cast<uint64_t>(key.direction) << 56 | uint64_t{key.channel & 0xff} << 48 |
         uint64_t{key.peer & 0xffffff} << 24 | uint64_t{key.communicator & 0xff} << 16 |
         (key.generation & 0xffff);
}
constexpr SlotKey DecodeSlotKey(uint64_t key) {
  return {static_cast<uint32_t>(key >> 16 & 0xff), static_cast<uint32_t>(key & 0xffff),
          static_cast<uint32_t>(key >> 48 & 0xff), static_cast<uint32_t>(key >> 24 & 0xffffff),
          static_cast<SlotDirection>(key >> 56)};
}

// The state of one connection. Of the up to 8 steps that NCCL has open on it the oldest counts:
// nothing behind it can be done before it.
//
// kKernel: operation, since; steps: total = kernels started, done = stopped; waited[0] = GPU
//   nanoseconds between start and stop, summed; waited[1] = the GPU's clock at the last start.
// kProxyThread: state, since; steps.total = operations appended so far; bytes = the thread's id as
//   its process sees it, 0: not known.
// kPeerSends, kPeerReceives: no sequence: operation = operations enqueued with this peer, steps:
//   total = started, done = finished; bytes = enqueued; since = of the last change.
struct Slot {
  // sequence (low 32 bits) | WaitState << 32 | open steps << 40 | OperationKind << 48
  std::atomic<uint64_t> head;
  // Number of the operation as both ends count it: a collective among the collectives of its
  // communicator, point to point among those with this peer in this direction; from 1. 0: not known
  // (of another process).
  std::atomic<uint64_t> operation;
  std::atomic<uint64_t> steps;  // done (low 32 bits) | total << 32, of that operation
  std::atomic<uint64_t> since;  // ticks: no change of the oldest step or its state since then
  std::atomic<uint64_t> bytes;  // posted (send) or arrived (receive), of all operations
  // Ticks that the oldest step spent in each state, of all operations, without the present one:
  // send: GPU, peer, wire; receive: data, flush, GPU. Together: how long the connection was in use.
  std::atomic<uint64_t> waited[3];
};
static_assert(sizeof(Slot) == 64);

// What a record says.
enum class RecordKind : uint8_t {
  kOperationEnqueued = 1,  // detail: OperationKind; value: bytes
  kOperationStarted = 2,
  kOperationFinished = 3,
  kTransferBegun = 4,  // step: total steps
  kTransferInProgress = 5,
  kStepBegun = 6,
  kStepState = 7,  // detail: WaitState; value: bytes of the step
  kStepDone = 8,
  kTransferEnded = 9,   // step: steps done
  kKernelStarted = 10,  // value: the GPU's clock
  kKernelStopped = 11,  // value: the GPU's clock
  kProxyThread = 12,    // detail: WaitState
  kApiCall = 13,        // detail: OperationKind; value: bytes
  kKernelLaunch = 14,
};

struct Record {
  std::atomic<uint64_t> ticks;
  // RecordKind | detail << 8 | place << 16 | step << 32. Place: slot of 4 to 12, else communicator.
  std::atomic<uint64_t> what;
  // Its number, 0: not known: kOperation... in its communicator, others as in Slot::operation.
  std::atomic<uint64_t> operation;
  std::atomic<uint64_t> value;
};
static_assert(sizeof(Record) == 32);

// Record i lies at records[i % ring_record_count]. One thread writes: the words with release, then
// `written`. A reader copies, then loads `written` again and keeps those with
// i + ring_record_count > written: the others may have been overwritten while it read. It counts
// for itself what it has missed.
struct Ring {
  std::atomic<uint64_t> thread;   // identifies it inside the process; 0: unused
  std::atomic<uint64_t> written;  // records ever
  uint64_t reserved[6];
  Record records[kRingRecords];
};
static_assert(sizeof(Ring) == 64 + sizeof(Record) * kRingRecords);

// What the agent asks of the process. All that it can do there is to have records kept for a while:
// a value that makes no sense asks for nothing.
struct BoardRequests {
  // Records are wanted until then; at most kWindowSecondsMax ahead. 0: none asked for.
  std::atomic<uint64_t> window_until_ticks;
  uint64_t reserved[511];
};
static_assert(sizeof(BoardRequests) == 4096);

inline constexpr uint64_t kBoardRingsEnd =
    sizeof(BoardHeader) + sizeof(Communicator) * kBoardCommunicators +
    (sizeof(uint64_t) + sizeof(Slot)) * kBoardSlots + sizeof(Ring) * kBoardRings;
// Mapped by itself, so at a page's begin.
inline constexpr uint64_t kBoardRequestsAt = (kBoardRingsEnd + 4095) / 4096 * 4096;
inline constexpr uint64_t kBoardBytes = kBoardRequestsAt + sizeof(BoardRequests);

// Where to put how long a state lasted: an index of Slot::waited, or -1: nowhere.
constexpr int WaitedIndex(WaitState state) {
  switch (state) {
    case WaitState::kSendGpuWait:
    case WaitState::kReceiveWait:
      return 0;
    case WaitState::kSendPeerWait:
    case WaitState::kReceiveFlushWait:
      return 1;
    case WaitState::kSendWait:
    case WaitState::kReceiveGpuWait:
      return 2;
    default:
      return -1;
  }
}

}  // namespace holdfast::abi

#endif  // HOLDFAST_HOOK_ABI_MONITOR_H_
