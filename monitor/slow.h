// Slowness: connections whose bytes take longer than their peers', and ranks that come late.
//
// Every window, what each rank did is the difference of two of its reports, on its own clock. A
// cell of the delay matrix is compared with cells of the same kind of communicator, hop, rail and
// NICs; a rank with ranks of the same pipeline stage and tensor-parallel position, so that a stage
// that has more to do accuses nobody. One window says nothing: what is abnormal in most of the last
// ones is raised, and withdrawn only after a longer calm.
//
// Windows with a pause of our engine, a named pause or a late observer are not counted.
#ifndef HOLDFAST_MONITOR_SLOW_H_
#define HOLDFAST_MONITOR_SLOW_H_

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "monitor/candidates.h"
#include "monitor/delay_matrix.h"
#include "monitor/job_state.h"

namespace holdfast::monitor {

// Whether one thing was abnormal in its last windows, with memory.
class Persistence {
 public:
  void Add(bool abnormal, const Thresholds& thresholds);
  // To be called after each Add, with all that are compared with each other. Where many are
  // abnormal now and then (garbage collection, uneven sequences), chance alone makes some of them
  // so for several windows: then more are needed, so many that chance is no explanation.
  static void Judge(const std::vector<Persistence*>& peers, const Thresholds& thresholds);

  uint32_t abnormal_windows() const;
  bool raised() const { return raised_; }
  bool lasting() const { return lasting_; }  // good for a verdict; until it is withdrawn

 private:
  uint32_t history_ = 0;  // the newest in bit 0
  uint32_t calm_ = 0;     // normal windows in a row
  bool raised_ = false;
  bool lasting_ = false;
};

// The probability that of `count` windows at least `least` are abnormal if each is with `share`.
double ChanceOf(uint32_t least, uint32_t count, double share);

// What `holdfast monitor matrix` shows.
struct DelayCell {
  uint64_t communicator = 0;
  Rank from{};
  Rank to{};
  double us_per_mib = 0;  // in the last window in which it was measured
  double peers_us_per_mib = 0;
  double cost = 0;  // WindowJudgement::cost
  Persistence persistence;
  double baseline_us_per_mib = 0;  // its own normal, once `baseline_windows` were measured
  uint32_t windows = 0;            // measured
};

// Threads: one at a time. Lifetime: owns all it refers to.
class SlowSearch {
 public:
  explicit SlowSearch(const JobState& state);

  // One look; `state` is always the same one, after its Ingest.
  void Look(const JobState& state, Candidates& out);

  const std::map<std::tuple<uint64_t, Rank, Rank>, DelayCell>& cells() const { return cells_; }

 private:
  struct RankWindow {
    bool begun = false;
    bool spoilt = false;
    uint64_t clock_us = 0;
    uint64_t operation_us = 0;
    uint64_t run_delay_us = 0;
    uint64_t finished = 0;
    uint64_t data_us = 0;
    std::optional<uint64_t> held_us;
    std::vector<CommunicatorReport> communicators;
  };
  struct RankSlowness {
    Persistence late;
    Persistence starved;
    // Of the last window in which it was late: the share outside of operations, its own and the
    // median of its peers.
    double share = 0;
    double peers_share = 0;
    // Whether loading data explains the difference, window by window, the newest in bit 0. Sections
    // are sampled, so that one window says little.
    uint32_t by_data = 0;
    bool IsByData(const Thresholds& thresholds) const;
    double run_delay_share = 0;
  };
  // Of a rank in a whole window.
  struct Shares {
    Rank rank{};
    double outside = 0;
    double data = 0;
  };

  void Begin(const JobState& state, Rank rank);
  bool IsDue(const JobState& state) const;
  bool IsWhole(const JobState& state, Rank rank) const;
  void Close(const JobState& state);
  void MeasureRanks(const JobState& state);
  void ForgetCells(const JobState& state);
  void MeasureCells(const JobState& state);
  // Only cells that are equal in all of this are compared: size of the communicator and of its
  // operations, same leaf, rail, the kinds of the two NICs.
  using Kind = std::tuple<uint32_t, int, bool, uint32_t, uint32_t, uint32_t>;
  struct Measured {
    DelayCell* cell = nullptr;
    double mib_per_us = 0;
    int size_class = 0;  // of the operations of its communicator
  };
  void JudgeCells(const JobState& state, const std::vector<Measured>& measured);
  void JudgeRanks(const Thresholds& thresholds, const std::vector<Shares>& group, double* median);
  std::map<uint64_t, int> SizeClasses(const JobState& state) const;
  void Report(const JobState& state);
  void ReportRanks(const JobState& state);
  const Persistence* RaisedEnd(Rank rank, End end) const;  // null: it is not
  std::vector<MatrixCell> Matrix(std::vector<const DelayCell*>& worst) const;
  void ReportCells(const JobState& state);

  absl::Duration window_begun_;
  std::vector<RankWindow> windows_;
  std::vector<RankSlowness> ranks_;
  std::map<std::tuple<uint64_t, Rank, Rank>, DelayCell> cells_;
  std::map<std::pair<Rank, End>, Persistence> ends_;  // rows and columns of several cells
  std::set<Rank> slow_now_;  // whose row or column was slow in the last closed window
  Candidates current_;       // as of the last closed window
};

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_SLOW_H_
