// What a node says about its ranks once a second, as plain values and as bytes.
//
// A summary holds no wall clock: every duration is measured on the sender's own clock, and
// `clock_us` is that clock, with an origin that nobody else knows. Work and waits are totals since
// the communicator was made, not deltas: what happened in a window is the difference of any two
// summaries, so that a lost or late one costs resolution and nothing else.
//
// Does not read the board (the agent does) and does not judge (analyzer.h does).
//
// Bytes: magic "HFMS", version, body, CRC32C of all before it. The body is LEB128 varints in the
// order of the fields below; signed numbers are zigzag, lists carry their length. Decode is strict:
// the shortest form of every number, known enumerators, lengths within the limits, no byte left
// over. Version 3 is written. Version 2, of older recordings, has no RankReport::held_us; version 1
// has neither CommunicatorReport::operations nor RankReport::local_rank, either.
#ifndef HOLDFAST_MONITOR_SUMMARY_H_
#define HOLDFAST_MONITOR_SUMMARY_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/ids.h"

namespace holdfast::monitor {

// Limits. Decode refuses what is above them; Encode CHECKs them, FitToBudget brings a summary
// below.
inline constexpr size_t kRanksMax = 64;           // of one node
inline constexpr size_t kCommunicatorsMax = 256;  // of one rank
inline constexpr size_t kConnectionsMax = 4096;   // of one rank in one communicator
inline constexpr size_t kOperationsMax = 16;      // of one communicator, as the board keeps
inline constexpr uint32_t kLocalRankMax = 65'535;
inline constexpr size_t kSectionsMax = 4;              // the innermost ones
inline constexpr size_t kSectionNameBytesMax = 32;     // longer names are cut by the sender
inline constexpr size_t kSummaryBytesMax = 1 << 20;    // of one encoded summary
inline constexpr size_t kSummaryBytesBudget = 20'000;  // what a node may send each second

// Numbered as on the board (hook/abi/monitor.h), as are the wait states.
enum class OperationKind : uint8_t {
  kUnknown,
  kAllReduce,
  kBroadcast,
  kReduce,
  kAllGather,
  kReduceScatter,
  kAllToAll,
  kGather,
  kScatter,
  kSend,  // point to point is counted by peer, and never compared across ranks
  kReceive,
  kBarrier,
};
inline constexpr size_t kOperationKinds = 12;
constexpr bool IsPointToPoint(OperationKind kind) {
  return kind == OperationKind::kSend || kind == OperationKind::kReceive;
}

// What a collective was called with.
inline constexpr uint32_t kNoRoot = UINT32_MAX;
struct RecentOperation {
  OperationKind kind{};
  uint64_t bytes = 0;
  uint32_t root = kNoRoot;  // index inside the communicator; kNoRoot: the kind has none
  friend auto operator<=>(const RecentOperation&, const RecentOperation&) = default;
};
// A communicator's operations are told once it has stood for so long: of one that moves they would
// be out of date on arrival, and cost as much as all the rest.
inline constexpr uint64_t kOperationsToldAfterUs = 500'000;

enum class Direction : uint8_t { kSend, kReceive };

// The oldest unfinished step of a connection. kNone: no operation is open on it.
enum class WaitState : uint8_t {
  kNone,
  kQueued,            // given to the proxy thread, which has not begun
  kBetweenSteps,      // begun; no step is open
  kSendGpuWait,       // the local GPU has not produced the chunk
  kSendPeerWait,      // the chunk is there, the receiver's credit is not
  kSendWait,          // posted, not completed: path or NIC
  kReceiveWait,       // posted, nothing has come
  kReceiveFlushWait,  // has come, is being flushed to the GPU
  kReceiveGpuWait,    // the local GPU has not consumed the chunk
};
inline constexpr size_t kWaitStates = 9;

enum class ProcessState : uint8_t { kUnknown, kRunning, kSleeping, kBlocked, kStopped, kGone };
inline constexpr size_t kProcessStates = 6;

// How a process ended, ordered from what others do to it to what it does by itself: in a cascade
// the greatest is the cause (never the earliest: there is no common clock).
enum class ExitKind : uint8_t {
  kNone,        // it runs
  kClean,       // status 0
  kTerminated,  // TERM, INT or HUP: somebody stopped it
  kAborted,     // ABRT: a watchdog or a check, often because a peer was lost
  kUnknown,     // gone, and nobody saw how
  kError,       // a status other than 0
  kKilled,      // KILL: the out-of-memory killer or a person
  kFault,       // SEGV, BUS, ILL, FPE
};
inline constexpr size_t kExitKinds = 8;

enum class TelemetryLevel : uint8_t { kNone, kLight, kFull };  // kNone: no plugin, no hook events
inline constexpr size_t kTelemetryLevels = 3;

// What a rank says it is doing. All but kCompute and kData are pauses that are meant.
enum class SectionKind : uint8_t {
  kCompute,
  kData,
  kCheckpoint,
  kEvaluation,
  kCompile,
  kCollection
};
inline constexpr size_t kSectionKinds = 6;

struct Section {
  SectionKind kind{};
  uint64_t elapsed_us = 0;
  std::string name;
  friend bool operator==(const Section&, const Section&) = default;
};

struct OperationCounts {
  uint64_t enqueued = 0;
  uint64_t started = 0;
  uint64_t finished = 0;
  friend bool operator==(const OperationCounts&, const OperationCounts&) = default;
};

struct ConnectionReport {
  uint16_t channel = 0;
  uint16_t channels = 1;  // how many this stands for (FitToBudget); `channel` waits the longest
  uint32_t peer = 0;      // index inside the communicator
  Direction direction{};
  WaitState state{};
  // Both ends number alike: a collective among the collectives of the communicator, point to point
  // among the operations with this peer in this direction; from 1, 0 before the first.
  uint64_t operation = 0;
  uint32_t steps_done = 0;
  uint32_t steps_total = 0;
  uint64_t waiting_us = 0;    // in `state`
  uint64_t bytes = 0;         // total of finished steps
  uint64_t wire_wait_us = 0;  // total time in kSendWait (send) or kReceiveWait (receive)
  friend bool operator==(const ConnectionReport&, const ConnectionReport&) = default;
};

struct CommunicatorReport {
  uint64_t id = 0;     // equal on all its ranks within an attempt
  uint32_t size = 0;   // ranks in it
  uint32_t index = 0;  // this rank's, below size
  std::array<OperationCounts, kOperationKinds> counts{};  // by kind
  OperationKind last_kind{};                              // of the operation enqueued last
  uint64_t last_bytes = 0;                                // of it
  uint64_t last_sequence = 0;                             // of it, among those of its kind
  uint64_t open_us = 0;  // since the oldest unfinished operation began; 0 = none is open
  std::vector<ConnectionReport> connections;
  // Its newest collectives, oldest first; the last is number Collectives().enqueued. Empty: it has
  // moved within kOperationsToldAfterUs, or they are not known.
  std::vector<RecentOperation> operations;
  friend bool operator==(const CommunicatorReport&, const CommunicatorReport&) = default;
};

inline constexpr uint32_t kNoLocalRank = UINT32_MAX;
struct RankReport {
  Rank rank{};
  uint32_t local_rank = kNoLocalRank;  // as it says itself (LOCAL_RANK); kNoLocalRank: not known
  ProcessState process{};
  ExitKind exit{};
  int32_t exit_value = 0;  // status or signal; 0 while it runs
  uint64_t cpu_us = 0;     // total CPU time of the process
  // Total time inside operations. From the board: the time in which a connection was in use, of the
  // busiest connection of each communicator, summed; of a communicator without connections, the
  // time in which an operation of it ran; with kernels (level full), theirs. Of operations that are
  // enqueued long before the GPU comes to them it begins with the kernel at level full, else too
  // early: then lateness is not visible in it.
  uint64_t operation_us = 0;
  uint64_t data_us = 0;  // total time in sections of kind data, as sampled every 100 ms
  // Total time that calls of our own library (saves, restores, waiting for either) have held up its
  // training loop; begins anew with a job that is opened again. Nothing: not known (it does not use
  // the library), or of an older recording.
  std::optional<uint64_t> held_us;
  // Total time its proxy threads were runnable and did not run; of those that waited the longest.
  uint64_t run_delay_us = 0;
  TelemetryLevel level{};
  uint64_t drops = 0;             // records lost, total
  std::vector<Section> sections;  // outermost first
  std::vector<CommunicatorReport> communicators;
  friend bool operator==(const RankReport&, const RankReport&) = default;
};

struct NodeSummary {
  uint32_t node = 0;
  Attempt attempt{};
  uint64_t incarnation = 0;      // of the agent: after its restart totals may begin again
  uint64_t sequence = 0;         // of this summary within the incarnation
  uint64_t clock_us = 0;         // the agent's monotonic clock when the board was read
  uint64_t observer_gap_us = 0;  // the longest time the observer was late by in this window
  bool engine_paused = false;    // our own capture, flush or restore held the trainers up
  std::vector<RankReport> ranks;
  friend bool operator==(const NodeSummary&, const NodeSummary&) = default;
};

// The bytes of `summary`, which keeps the limits.
std::string EncodeSummary(const NodeSummary& summary);

// Errors: kDataLoss (not a summary, another checksum, truncated), kUnimplemented (another version),
// kInvalidArgument (a value that no sender of ours writes). All say what was expected and found.
absl::StatusOr<NodeSummary> DecodeSummary(std::span<const std::byte> bytes);

// Makes the encoded form at most `bytes_max` long, by as little as is needed: merges the channels
// of each (communicator, peer, direction) into one connection that carries their sums and the state
// of the channel that waits the longest; then drops all operations but the newest of each
// communicator, connections without an open operation, all operations; then the connections that
// wait the least, then communicators, those without an open operation first. Returns whether it
// fits: kRanksMax ranks do in kSummaryBytesBudget, whatever was in them.
bool FitToBudget(NodeSummary& summary, size_t bytes_max);

// All operations, and those that every rank of the communicator calls.
OperationCounts Total(const CommunicatorReport& report);
OperationCounts Collectives(const CommunicatorReport& report);

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_SUMMARY_H_
