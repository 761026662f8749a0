// The analysis as one pure function of a sequence of snapshots: the same snapshots give the same
// findings, on any machine. No clock, no thread, no I/O.
//
// Per snapshot: take the reports (job_state.h), look for ends and absences (ended.cc), standing
// still (hang.cc) and slowness (slow.h), hear other witnesses (testimony_book.h), and let time
// decide (tracker.h).
#ifndef HOLDFAST_MONITOR_ANALYZER_H_
#define HOLDFAST_MONITOR_ANALYZER_H_

#include <cstdint>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "monitor/candidates.h"
#include "monitor/finding.h"
#include "monitor/job_state.h"
#include "monitor/slow.h"
#include "monitor/snapshot.h"
#include "monitor/testimony_book.h"
#include "monitor/thresholds.h"
#include "monitor/tracker.h"

namespace holdfast::monitor {

// How blind we are: grey is not green.
struct Sight {
  uint32_t ranks = 0;                 // of the job
  uint32_t ranks_reporting = 0;       // with a report that is not stale
  uint32_t ranks_with_telemetry = 0;  // of those, with a plugin or hook events
  uint64_t drops = 0;                 // records lost, total
  absl::Duration oldest_report;       // age of the oldest newest report; zero if there is none
  bool IsWhole() const { return ranks_with_telemetry == ranks && drops == 0; }
};

struct Analysis {
  std::vector<Finding> findings;  // the open ones, in order of id
  std::vector<WaitNote> notes;
  Sight sight;
  bool ended_amid = false;  // as in Candidates
};

// Threads: one at a time. Lifetime: owns all it refers to.
class Analyzer {
 public:
  Analyzer(const Thresholds& thresholds, JobShape shape);

  Analysis Step(const Snapshot& snapshot);

  // From now on the ranks, as many as before, are in these places: nodes are heard of one by one,
  // and the layout is known later than the first report.
  void Reshape(JobShape shape) { state_.Reshape(std::move(shape)); }

  // For `holdfast monitor status` and `top`.
  const JobState& state() const { return state_; }

  // For `holdfast monitor status`: which other witnesses were heard.
  std::vector<WitnessState> witnesses() const { return testimonies_.states(); }

  // For `holdfast monitor matrix`.
  const std::map<std::tuple<uint64_t, Rank, Rank>, DelayCell>& delay_cells() const {
    return slow_.cells();
  }

 private:
  Sight Look() const;

  JobState state_;
  SlowSearch slow_;
  TestimonyBook testimonies_;
  Tracker tracker_;
};

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_ANALYZER_H_
