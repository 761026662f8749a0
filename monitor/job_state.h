// The newest report of every rank, how long each communicator of it has stood still on the rank's
// own clock, and what its operations have taught us about normal standstills.
//
// Ingest is the only place where summaries enter; it does not depend on the order of those that
// arrived in one snapshot. Judges nothing (hang.h and slow.h do).
#ifndef HOLDFAST_MONITOR_JOB_STATE_H_
#define HOLDFAST_MONITOR_JOB_STATE_H_

#include <cstdint>
#include <map>
#include <optional>
#include <unordered_map>
#include <vector>

#include "absl/time/time.h"
#include "base/ids.h"
#include "monitor/snapshot.h"
#include "monitor/summary.h"
#include "monitor/thresholds.h"

namespace holdfast::monitor {

struct CommunicatorTrack {
  CommunicatorReport now;
  uint64_t still_since_us = 0;  // the rank's clock at the first report with this progress
  uint64_t still_since_tick = 0;
  bool stood_open = false;  // an operation was open when it began to stand
  bool IsOpen() const;      // an operation is enqueued and not finished
};

struct RankTrack {
  bool seen = false;
  bool paused = false;         // our own engine holds it up
  bool observer_late = false;  // its newest report is of an observer that was not scheduled
  uint64_t tick = 0;           // of the arrival of its newest report
  absl::Duration arrived;      // on the receiver's clock
  absl::Duration ended_at;     // of the arrival of the first report that said how it ended
  uint64_t clock_us = 0;
  double cpu_share = 0;  // between its last two reports
  double run_delay_share = 0;
  uint64_t idle_since_us = 0;  // its clock when its CPU time last moved
  uint64_t last_pause_us = 0;  // its clock when it was last seen in a pause; 0: never
  RankReport report;           // without its communicators
  std::vector<CommunicatorTrack> communicators;

  // Nothing of it can move, whatever its board says.
  bool CannotRun() const;
  bool IsBlind() const { return !seen || report.level == TelemetryLevel::kNone; }
  const Section* InnermostSection() const;
  bool InPause() const;
  // A pause whose length is not told by the report. (What our engine does beside the training loop,
  // as flushing and copying, holds nobody up, and what it costs counts as the rank's own.)
  bool InUntoldPause() const;
  const CommunicatorTrack* Find(uint64_t communicator) const;

  // When its recent reports arrived and were taken: what it has not done since another's arrived.
  struct Receipt {
    uint64_t tick = 0;
    uint64_t clock_us = 0;
  };
  std::vector<Receipt> receipts;  // the newest kReceiptsMax, oldest first
};
inline constexpr size_t kReceiptsMax = 32;

struct CommunicatorKnowledge {
  uint32_t size = 0;
  std::vector<int64_t> members;  // global rank by index; -1: not known yet
  uint64_t finished_max = 0;
  uint64_t longest_standstill_us = 0;  // that ended by itself
  absl::Duration first_seen;
};

// Threads: one at a time. Lifetime: owns all it refers to.
class JobState {
 public:
  JobState(const Thresholds& thresholds, JobShape shape);

  // CHECKs that it has as many ranks.
  void Reshape(JobShape shape);

  // Takes what arrived. `learn`: whether standstills that end now were normal ones.
  void Ingest(const Snapshot& snapshot, bool learn);

  const Thresholds& thresholds() const { return thresholds_; }
  const JobShape& shape() const { return shape_; }
  const std::vector<RankTrack>& ranks() const { return ranks_; }
  const std::unordered_map<uint64_t, CommunicatorKnowledge>& communicators() const {
    return communicators_;
  }
  absl::Duration now() const { return now_; }
  absl::Duration first_report() const { return first_report_; }  // meaningful after one
  // Since the newest report of it, on the receiver's clock.
  absl::Duration Age(Rank rank) const { return now_ - ranks_[Value(rank)].arrived; }
  bool IsSilent(Rank rank) const;

  // How long the communicator has stood on the clock of `rank`; zero if the rank is not in it.
  absl::Duration StillFor(Rank rank, uint64_t communicator) const;
  // The same, counted from the newest report that arrived at `tick`, else from the first one behind
  // it: what the rank has not done since what was known of it then.
  absl::Duration StillSince(Rank rank, uint64_t communicator, uint64_t tick) const;
  // The longest standstill to be taken for normal, or nothing while there is no baseline.
  std::optional<absl::Duration> NormalStandstill(uint64_t communicator) const;

 private:
  struct Agent {
    uint64_t incarnation = 0;
    uint64_t sequence = 0;
    bool seen = false;
  };

  void Take(const NodeSummary& summary, bool learn);
  void ForgetCommunicators();
  void TakeCommunicators(RankTrack& track, const std::vector<CommunicatorReport>& reports,
                         bool learn);

  const Thresholds thresholds_;
  JobShape shape_;
  std::vector<RankTrack> ranks_;
  std::map<uint32_t, Agent> agents_;  // of the nodes of the job; others are not heard
  std::unordered_map<uint64_t, CommunicatorKnowledge> communicators_;
  uint64_t tick_ = 0;
  absl::Duration now_;
  absl::Duration first_report_ = absl::InfiniteDuration();
};

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_JOB_STATE_H_
