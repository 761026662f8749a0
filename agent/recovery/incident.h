// What happened to a job once, from the last sign of health to the first new step after it, and
// where the time went: the downtime table of C4 (HPCA'25), `holdfast why`.
//
// Moments are on the clock of Event::now. Those that were never reached are absent, and so are the
// phases between them: nothing is estimated here.
#ifndef HOLDFAST_AGENT_RECOVERY_INCIDENT_H_
#define HOLDFAST_AGENT_RECOVERY_INCIDENT_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"
#include "agent/recovery/events.h"
#include "agent/recovery/gpus.h"
#include "base/ids.h"
#include "monitor/finding.h"

namespace holdfast::recovery {

// Why something must be done, ordered by what it tells: of two causes of one incident the greater
// stays. The rows of the table in docs/RECOVERY.md.
enum class Cause : uint8_t {
  kGrow,         // a GPU was readmitted: more ranks than now
  kSlow,         // a verdict of slowness
  kHang,         // nobody is named, or by one source only, or the suspect is busy
  kHangNamed,    // the culprit is named by two independent sources
  kProgram,      // the ranks call different operations, or wait for each other
  kProcessDead,  // a process has ended with an error
  kNodeGone,
  kGpuFault,  // an Xid of the drain set
  kUsage,     // an exit code that says that a restart cannot help
};
inline constexpr size_t kCauses = 9;
std::string_view Name(Cause cause);

enum class Outcome : uint8_t {
  kOpen,
  kWithdrawn,  // it went by itself
  kResumed,    // the next attempt has finished its first new step
  kReplaced,   // a further incident came before that
  kEnded,      // the job has ended with it
};
inline constexpr size_t kOutcomes = 5;
std::string_view Name(Outcome outcome);

struct Incident {
  uint32_t number = 0;  // from 1
  Launch launch{};      // that it happened to
  Attempt attempt{};    // its number in the store; 0: no rank had opened the job
  Cause cause{};
  Outcome outcome = Outcome::kOpen;
  absl::Time wall;  // when it was detected, for people

  struct Suspect {
    Rank rank{};
    Rank peer{};  // of a connection; else the rank
    Gpu gpu;
    friend bool operator==(const Suspect&, const Suspect&) = default;
  };
  std::vector<Suspect> suspects;     // the likeliest first
  std::string finding;               // id; empty: the monitor had no part in it
  std::string what;                  // "comm hang in dp", "rank 2 killed by signal 9"
  std::string sentence;              // the monitor's, or why
  uint32_t confidence_permille = 0;  // 0: not a matter of confidence

  std::string action;  // "restart in place", "restart without GPU 3"; empty: none was decided
  Launch next_launch{};
  std::optional<CheckpointId> restored;

  // ---- Moments, in this order.
  std::optional<absl::Duration> onset;      // the last sign of health before it
  std::optional<absl::Duration> detected;   // the incident was opened
  std::optional<absl::Duration> diagnosed;  // it was known well enough to act, evidence collected
  std::optional<absl::Duration> stopping;   // the ranks were told to end
  std::optional<absl::Duration> stopped;    // the last of them had ended
  std::optional<absl::Duration> starting;   // the next attempt was started
  std::optional<absl::Duration> opened;     // all its ranks had opened the job
  std::optional<absl::Duration> restored_at;
  std::optional<absl::Duration> resumed;  // all had finished a new step

  // ---- Work that was lost: from the capture of the restored checkpoint to the onset.
  std::optional<uint64_t> lost_steps;
  std::optional<absl::Duration> lost_work;

  friend bool operator==(const Incident&, const Incident&) = default;
};

struct Phases {
  std::optional<absl::Duration> detect;    // onset to detected
  std::optional<absl::Duration> diagnose;  // to diagnosed
  std::optional<absl::Duration> wait;      // for a person, a hold, a pause, a GPU
  std::optional<absl::Duration> stop;
  std::optional<absl::Duration> start;  // to the last rank's open; where none opens, to the step
  std::optional<absl::Duration> load;
  std::optional<absl::Duration> step;  // the first new one
  std::optional<absl::Duration> lost;
  std::optional<absl::Duration> total;  // onset to resumed, and the lost work
};
Phases PhasesOf(const Incident& incident);

// One row an incident, newest last, and the sum. Lines without their ends. A phase that is absent
// is `unknown` of an incident that is over, because the job trains again: nobody saw it. Else it is
// `-`: not reached.
std::vector<std::string> DowntimeTable(std::span<const Incident> incidents, std::string_view home);

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_INCIDENT_H_
