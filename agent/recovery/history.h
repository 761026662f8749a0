// All that the policy remembers of a job: a value that it changes with each event, small enough to
// be written to disk before anything that was decided is carried out.
//
// So nothing can be lost between a decision and its action: what is under way follows from the
// history alone, and is asked for again after a restart (AgentRestarted). Encode and Decode are
// strict and exact: a decoded history goes on as the one that was encoded, event by event.
#ifndef HOLDFAST_AGENT_RECOVERY_HISTORY_H_
#define HOLDFAST_AGENT_RECOVERY_HISTORY_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "agent/recovery/actions.h"
#include "agent/recovery/events.h"
#include "agent/recovery/gpus.h"
#include "agent/recovery/incident.h"
#include "monitor/finding.h"

namespace holdfast::recovery {

// What a person sees.
enum class State : uint8_t {
  kIdle,                // no run has begun
  kStarting,            // from the start to the first new step of every rank
  kRunning,             //
  kSuspected,           // it runs, and a suspicion is open
  kStalled,             // something is wrong, and it is too early to act, or not ours to act
  kCollecting,          // evidence, before anything is stopped
  kWaitingForApproval,  // of a person
  kHolding,             // a person said: not now
  kSaving,              // a last save before the ranks are stopped
  kStopping,            //
  kDeciding,            // no rank runs; the next attempt starts after a pause
  kWaitingForCapacity,  // no rank runs; there are not enough GPUs
  kDone,
  kGivenUp,
};
inline constexpr size_t kStates = 14;
std::string_view Name(State state);

// What the ranks of the newest launch are doing, as far as the policy is concerned. What State says
// besides follows from the facts.
enum class Phase : uint8_t { kIdle, kAlive, kSaving, kStopping, kDown, kOver };
inline constexpr size_t kPhases = 6;

enum class RankPhase : uint8_t {
  kAsked,  // StartRanks was decided
  kStarted,
  kOpened,
  kRestored,
  kStepping,
  kEnded,
  kStuck,  // KILL has not ended it: its GPU is not to be had
};
inline constexpr size_t kRankPhases = 7;

struct RankRecord {
  RankPhase phase{};
  Exit exit;                                   // of kEnded
  bool told_to_end = false;                    // before it ended
  std::optional<absl::Duration> silent_since;  // it is beyond a time-out
  uint64_t step = 0;                           // the last finished one that was told
  friend bool operator==(const RankRecord&, const RankRecord&) = default;
};

struct OpenFinding {
  std::string id;
  monitor::Grade grade{};
  monitor::Syndrome syndrome{};
  monitor::FaultClass fault{};
  monitor::Scope scope{};
  std::vector<monitor::Suspect> suspects;  // at most kSuspectsMax
  uint32_t confidence_permille = 0;
  uint32_t sources = 0;
  bool busy = false;
  std::string sentence;
  std::string group;
  absl::Duration since;  // what it describes
  std::optional<absl::Duration> timeout;
  uint32_t slow_permille = 0;
  friend bool operator==(const OpenFinding&, const OpenFinding&) = default;
};

// The driver's word about a GPU of this launch.
struct GpuFault {
  Gpu gpu;
  int32_t code = 0;
  bool drain = false;  // else it must be reset before it is used again
  absl::Duration at;
  friend bool operator==(const GpuFault&, const GpuFault&) = default;
};

struct CheckpointRecord {
  CheckpointFacts facts;
  std::optional<absl::Duration> captured_at;
  uint32_t crashes = 0;  // attempts that restored it and died before they came to anything
  friend bool operator==(const CheckpointRecord&, const CheckpointRecord&) = default;
};

// What a person is asked. `key` says what exactly: an approval holds for that and nothing else.
struct Proposal {
  std::string id;
  std::string key;
  std::string question;
  friend bool operator==(const Proposal&, const Proposal&) = default;
};

struct EndRequest {
  int32_t code = 0;
  std::string why;
  bool save_first = true;
  friend bool operator==(const EndRequest&, const EndRequest&) = default;
};

struct History {
  // Limits of the lists; what happens there stands where each is filled.
  static constexpr uint32_t kRanksMax = 65'536;
  static constexpr size_t kFindingsMax = 64;
  static constexpr size_t kSuspectsMax = 8;
  static constexpr size_t kCheckpointsMax = 64;
  static constexpr size_t kIncidentsMax = 32;
  static constexpr size_t kKeysMax = 16;
  static constexpr size_t kTextBytesMax = 1024;
  static constexpr size_t kBytesMax = size_t{64} << 20;

  // ---- The run.
  std::string job;
  uint32_t run_count = 0;
  uint32_t launches_of_run = 0;
  uint32_t world_size = 0;  // that the job wants
  std::string layout;       // that it has with it
  std::vector<Gpu> gpus;
  // Of the last event. All moments here are on the policy's own clock, which goes on over boots:
  // Event::now and what `clock_offset_us` adds to it. Deadlines of actions, and `wake_at`, are on
  // the clock of Event::now.
  absl::Duration now;
  int64_t clock_offset_us = 0;
  absl::Time wall = absl::UnixEpoch();

  // ---- Where it stands.
  State state = State::kIdle;
  absl::Duration state_since;
  Phase phase = Phase::kIdle;
  // When something is due without an event: Tick then. Nothing: only events matter.
  std::optional<absl::Duration> wake_at;
  std::optional<EndRequest> end;
  int32_t exit_code = 0;  // of kOver
  std::string exit_why;

  // ---- The launch.
  Launch launch{};      // the newest; 0: none yet
  Launch launch_max{};  // that was ever seen: numbers are not used twice
  Attempt attempt{};
  Placement placement;
  RestoreRule restore_rule;
  std::string start_why;
  std::vector<RankRecord> ranks;
  absl::Duration launched_at;
  std::optional<absl::Duration> running_since;
  bool stepped = false;          // every rank has finished a new step
  absl::Duration last_progress;  // a rank finished a step, or came further in its start
  std::optional<CheckpointId> restored;
  bool committed_since = false;
  std::vector<GpuFault> gpu_faults;
  std::vector<OpenFinding> findings;
  std::optional<Sight> sight;
  absl::Duration save_asked_at;  // kSaving
  absl::Duration save_deadline;
  bool save_failed = false;
  absl::Duration kill_at;  // kStopping
  std::string stop_why;

  // ---- The incident that is open, and those before.
  std::optional<Incident> incident;
  enum class Evidence : uint8_t { kNotAsked, kAsked, kDone };
  Evidence evidence = Evidence::kNotAsked;
  absl::Duration evidence_deadline;
  bool permitted = false;      // what is done about it was allowed, by the mode or by a person
  bool blamed = false;         // its suspects are on the lemon list
  bool counted = false;        // its crash was counted against the checkpoint
  std::string signature;       // of kProgram
  std::vector<Incident> past;  // oldest first; beyond the limit the oldest goes
  uint32_t incident_count = 0;

  // ---- People.
  std::optional<Proposal> proposal;
  std::vector<std::string> approved;  // keys, of this launch
  std::vector<std::string> vetoed;
  uint32_t proposal_count = 0;
  std::optional<absl::Duration> approval_deadline;
  std::optional<absl::Duration> hold_until;
  std::string hold_reason;

  // ---- The circuit breaker.
  uint32_t restart_count = 0;  // of this run, all
  uint32_t restarts_charged = 0;
  uint32_t unhealthy_in_a_row = 0;
  bool next_is_free = false;                    // the next restart is not charged
  std::vector<absl::Duration> recent_restarts;  // charged, within the window
  uint32_t exclusion_count = 0;
  std::optional<absl::Duration> resume_at;  // the end of the pause
  std::optional<absl::Duration> capacity_deadline;
  std::vector<std::string> signatures;  // of programs that were restarted for a mismatch

  // ---- GPUs.
  LemonList lemons;
  std::vector<std::string> nodes_gone;
  struct Stuck {
    Launch launch{};
    Rank rank{};
    Gpu gpu;
    friend bool operator==(const Stuck&, const Stuck&) = default;
  };
  std::vector<Stuck> stuck_ranks;
  bool grow = false;  // a GPU came back: run with more ranks, from the next checkpoint on

  // ---- Checkpoints.
  std::vector<CheckpointRecord> checkpoints;  // ascending; beyond the limit the oldest goes

  // ---- Measured.
  uint32_t failures = 0;
  absl::Duration time_alive;
  absl::Duration alive_since;                // of kAlive
  std::optional<absl::Duration> start_time;  // of the last start to its first new step

  friend bool operator==(const History&, const History&) = default;
};

// The node that needs not be named: that of the first GPU.
std::string_view HomeOf(const History& history);

// What of it outlives a run: incidents (one that is open is the last of `past`, and stays open),
// what was learned of the program and of checkpoints, numbers that are not used twice, the clock.
// Phase::kIdle. For another job than its own only the clock and the numbers of launches.
History Outliving(const History& history, std::string_view job);

std::string Encode(const History& history);
// kDataLoss, kInvalidArgument, kUnimplemented (another version): what was expected and found.
absl::StatusOr<History> DecodeHistory(std::span<const std::byte> bytes);

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_HISTORY_H_
