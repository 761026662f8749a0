// How ranks ended, as whoever started them says (abi::RankExit): only a parent gets to know it.
//
// Kept until they are needed or too many; matched to processes here, so that a rank's last exit is
// never taken for that of the process that came after it.
#ifndef HOLDFAST_AGENT_MONITOR_EXITS_H_
#define HOLDFAST_AGENT_MONITOR_EXITS_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>

#include "absl/time/time.h"
#include "monitor/summary.h"

namespace holdfast {

// `wait_status`: as wait(2) gives it. `stopped`: whoever started it had told it to end before.
struct RankExit {
  static constexpr uint32_t kRanksMax = 1 << 18;  // of a job

  std::string job;
  std::string attempt_key;
  std::string node;
  uint32_t rank = 0;        // below kRanksMax
  uint32_t world_size = 0;  // up to kRanksMax; 0: not known
  uint32_t process_id = 0;  // as the reporter sees it
  int32_t wait_status = 0;
  bool stopped = false;
};

struct ExitOutcome {
  monitor::ExitKind kind{};
  int32_t value = 0;  // status or signal
  friend bool operator==(const ExitOutcome&, const ExitOutcome&) = default;
};

// A rank that was told to end counts as such (kTerminated), whatever it ended with in the end: its
// starter's KILL after a TERM in vain must not look like the cause of it all. But a status of 0 is
// a status of 0, and a fault of its own stays one.
ExitOutcome OutcomeOf(const RankExit& exit);

// Threads: one at a time.
class Exits {
 public:
  // Beyond, the oldest is dropped.
  static constexpr size_t kKeptMax = 1024;

  struct Entry {
    RankExit exit;
    uint64_t serial = 0;  // its place in the order of events
    absl::Duration received;
  };

  // Replaces an earlier one of the same rank of the same attempt.
  void Add(RankExit exit, uint64_t serial, absl::Duration now);

  // Of a process of that rank which was first seen at `seen_serial`: the exit with one of its
  // numbers, or one that was reported since (the starter's child may be a shell around it). Null:
  // nobody has said.
  struct Process {
    const std::string& job;
    const std::string& attempt_key;
    uint32_t rank = 0;
    uint32_t process_id = 0;      // as we see it
    uint32_t own_process_id = 0;  // as it sees itself
    uint64_t seen_serial = 0;
  };
  const Entry* Find(const Process& process) const;

  const std::deque<Entry>& entries() const { return entries_; }
  void EraseIf(const std::function<bool(const Entry&)>& is_over);

 private:
  std::deque<Entry> entries_;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_EXITS_H_
