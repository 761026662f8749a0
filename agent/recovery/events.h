// What the policy is told: facts with a time, as values. Whoever runs the job makes them of what
// shims, the monitor, the engine, the kernel's log and people say.
//
// Facts of a rank name its launch, so that what arrives late of an earlier one changes nothing.
#ifndef HOLDFAST_AGENT_RECOVERY_EVENTS_H_
#define HOLDFAST_AGENT_RECOVERY_EVENTS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/time/time.h"
#include "agent/recovery/gpus.h"
#include "base/ids.h"
#include "monitor/finding.h"
#include "monitor/summary.h"

namespace holdfast::recovery {

// The n-th start of a job's ranks, from 1, over all runs of the job; never used twice. It makes the
// attempt key; the attempt's number comes from the store, once a rank has opened the job.
enum class Launch : uint32_t {};
constexpr uint32_t Value(Launch launch) { return static_cast<uint32_t>(launch); }

struct Exit {
  monitor::ExitKind kind = monitor::ExitKind::kNone;
  int32_t value = 0;  // status or signal
  friend bool operator==(const Exit&, const Exit&) = default;
};

// What the policy must know of a committed checkpoint on the current branch.
struct CheckpointFacts {
  CheckpointId id;
  bool marked_bad = false;     // on storage (BAD.<n>)
  bool non_finite = false;     // a tensor holds NaN or infinities; nobody counts them yet
  bool under_anomaly = false;  // captured while a verdict of broken hardware was open
  friend bool operator==(const CheckpointFacts&, const CheckpointFacts&) = default;
};

// ---- The job as a whole.

// `holdfast run` begins. No rank of an earlier run lives on the node any more.
struct RunBegun {
  std::string job;
  uint32_t world_size = 0;  // that the job wants
  std::string layout;       // that it has with it; may be empty
  std::vector<Gpu> gpus;    // that it may use: at least world_size, those of the first ranks first
  LemonList lemons;
  std::vector<CheckpointFacts> checkpoints;
};

// The worker was replaced, or the machine was started again. What was decided before is carried on.
struct AgentRestarted {
  bool same_clock = true;  // false: another boot, Event::now began anew
  struct Rank {
    Launch launch{};
    holdfast::Rank rank{};
    Exit exit;  // kNone: it lives
  };
  std::vector<Rank> ranks;  // all that have a shim, of whatever launch
};

// ---- Ranks.

struct RankStarted {  // its shim runs
  Launch launch{};
  Rank rank{};
};
struct RankOpened {  // it has opened the job at the agent
  Launch launch{};
  Rank rank{};
  Attempt attempt{};
};
struct RankRestored {
  Launch launch{};
  Rank rank{};
  std::optional<CheckpointId> checkpoint;  // nothing: it began from nothing
};
// It has finished a step. The first one of each rank; then at most once a second.
struct StepDone {
  Launch launch{};
  Rank rank{};
  Step step{};
};
struct RankExited {
  Launch launch{};
  Rank rank{};
  Exit exit;
};
// No heartbeat, or no end of a section, within the learned time-out.
// `with`: who has given no sign of life for about as long, whatever its own time-out; so that with
// one rank that stands, and the others that wait for it, no moment names the one that was looked at
// first.
struct RankTimedOut {
  Launch launch{};
  Rank rank{};
  std::string section;  // empty: the heartbeat
  absl::Duration silent;
  absl::Duration timeout;
  std::vector<Rank> with = {};
};
struct RankBeats {  // it was late, and is there again
  Launch launch{};
  Rank rank{};
};

// ---- The monitor.

// Opened, changed, or a verdict now.
struct FindingTold {
  Launch launch{};
  monitor::Finding finding;
  std::string group;        // "dp": the communicator, in the program's words; may be empty
  absl::Duration standing;  // for how long what it describes has lasted
  std::optional<absl::Duration> timeout;  // that the monitor has learned
  // How many times longer a step takes than before, in 1/1000; 0: not known.
  uint32_t slow_permille = 0;
};
// Its evidence has gone, or it has ended.
struct FindingWithdrawn {
  std::string id;
};
enum class Sight : uint8_t { kBlind, kPartial, kWhole };
struct SightChanged {
  Sight sight{};
};

// A line of the kernel's log. Whether it concerns the job's GPUs is the policy's to see.
struct XidSeen {
  Gpu gpu;
  int32_t code = 0;
};
// The lease of the node has lapsed AND its peers have lost it.
struct NodeGone {
  std::string node;
};
struct NodeBack {
  std::string node;
};

// ---- Evidence and checkpoints.

struct EvidenceCollected {
  uint32_t incident = 0;
};
struct CheckpointCommitted {
  Launch launch{};
  CheckpointFacts facts;
  absl::Duration captured_at;  // on the clock of Event::now
};
struct SaveFailed {  // the one that was asked for
  Launch launch{};
};
// The catalog, anew: replaces what was known; what the policy itself has learned of them stays. A
// mark that was in one of these and is not in the next was taken back.
struct CheckpointsRead {
  std::vector<CheckpointFacts> checkpoints;
};

// ---- People and signals.

struct Approve {
  std::string id;
};
struct Veto {
  std::string id;
};
// Nothing is stopped or started for so long, at most kHoldMax. Zero ends a hold.
inline constexpr absl::Duration kHoldMax = absl::Hours(24 * 30);
struct Hold {
  absl::Duration duration;
  std::string reason;
};
struct Readmit {
  Gpu gpu;
};
struct Save {};
struct Stop {};
enum class EndSignal : uint8_t { kInterrupt, kTerminate, kAllocationEnds };
struct SignalCame {
  EndSignal signal{};
};

// Time has passed. Once a second, and at History::wake_at.
struct Tick {};

struct Event {
  absl::Duration now;  // CLOCK_BOOTTIME. One that goes back counts as the latest seen
  absl::Time wall;     // for people and for the lemon list
  std::variant<Tick, RunBegun, AgentRestarted, RankStarted, RankOpened, RankRestored, StepDone,
               RankExited, RankTimedOut, RankBeats, FindingTold, FindingWithdrawn, SightChanged,
               XidSeen, NodeGone, NodeBack, EvidenceCollected, CheckpointCommitted, SaveFailed,
               CheckpointsRead, Approve, Veto, Hold, Readmit, Save, Stop, SignalCame>
      what;
};

// How many different witnesses a finding rests on: the peers' waits, the process, the driver, each
// kind of other witness once; those against it do not count.
uint32_t IndependentSources(const monitor::Finding& finding);
// Its suspect is busy, or in a pause: it may come yet, so nothing is done before the time-out.
bool IsBusy(const monitor::Finding& finding);

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_EVENTS_H_
