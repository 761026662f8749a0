// PyTorch's Flight Recorder: what each process remembers of its collectives, and what the dumps of
// all ranks say together: who never entered, who called something else, what was finished last.
//
// A dump is a pickle or JSON (torch._C._distributed_c10d, `_dump_nccl_trace`, `_dump_fr_trace` and
// their `_json` forms; read in 2.13.0). It comes from the trainer, so it is read as hostile.
// - With gloo an operation never becomes "completed"; only `retired` says that it has ended. The
//   same holds for NCCL, where a watchdog thread retires it.
// - `collective_seq_id` counts alike on all members of a process group. Point to point is not among
//   the collectives, and gloo does not record it.
// - With gloo `pg_config` has one nameless entry, whatever groups there are: members are then those
//   who have an entry of the group, and everybody for the default group.
// - Times are the process's wall clock: only differences inside one dump are used, and only to be
//   more patient. How long something has stood is told by two dumps (FlightHistory).
#ifndef HOLDFAST_MONITOR_WITNESS_FLIGHT_RECORD_H_
#define HOLDFAST_MONITOR_WITNESS_FLIGHT_RECORD_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/ids.h"
#include "monitor/testimony.h"

namespace holdfast::monitor {

// Limits on what is taken from a dump; beyond them the newest count.
inline constexpr size_t kFlightDumpBytesMax = size_t{16} << 20;
inline constexpr size_t kFlightGroupsMax = 256;
inline constexpr size_t kFlightOperationsMax = 64;  // of a group that are kept
inline constexpr uint32_t kFlightRankMax = 1 << 20;

struct FlightOperation {
  uint64_t sequence = 0;  // collective_seq_id, from 1
  std::string call;       // "all_reduce"
  std::string shape;      // "[10, 4] Float"; empty where ranks may differ in it
  bool retired = false;
};

struct FlightGroup {
  std::string name;                         // the same on all members, as torch numbers groups
  std::string description;                  // "default_pg", or the user's
  std::vector<Rank> members;                // ascending; empty: the dump does not tell
  uint64_t enqueued = 0;                    // of the newest collective
  uint64_t retired = 0;                     // of the newest that has ended; 0: none
  std::vector<FlightOperation> operations;  // ascending
  // The longest time between two operations that were enqueued one after the other.
  absl::Duration longest_gap;
};

struct FlightRecord {
  Rank rank{};
  std::vector<FlightGroup> groups;  // by name
};

// Errors: kInvalidArgument (neither form, a field of another type, beyond a limit),
// kPermissionDenied (a pickle that could run code).
absl::StatusOr<FlightRecord> ParseFlightRecord(Rank rank, std::string dump);

// Remembers since when each rank has been where it is.
//
// Threads: one at a time. Lifetime: owns all it refers to.
class FlightHistory {
 public:
  // What the dumps of one look say together: `now` on any monotonic clock, `world_size` of the job.
  // A rank without a record is unknown: nothing is said of it. `normal` is set once
  // `learn_operations_min` operations of a group have ended.
  std::vector<Testimony> Testify(absl::Duration now, uint32_t world_size,
                                 std::span<const FlightRecord> records,
                                 uint64_t learn_operations_min);

 private:
  struct Place {
    uint64_t enqueued = 0;
    uint64_t retired = 0;
    absl::Duration since;
    uint64_t look = 0;
  };
  std::map<std::pair<Rank, std::string>, Place> places_;
  uint64_t look_ = 0;
};

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_WITNESS_FLIGHT_RECORD_H_
