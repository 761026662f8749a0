// The delay matrix: how long a byte takes from each rank to each other one, and which end a pattern
// of slow cells accuses.
//
// A whole row that is slow is the sender, a whole column the receiver, a single cell the path
// between two ends that are healthy elsewhere. A ring fills one cell a row: then nothing tells the
// three apart, and the scope says so.
//
// One window of one connection is noisy: where seven senders share the queue of a receiver, healthy
// cells differ by a factor of 2. So rows and columns are judged as such, against the other rows or
// columns: three quarters of the cells must be slower by ratio, and their mean by deviations, which
// are a fraction of a single cell's. What is common to a row stands out where none of its cells
// does.
#ifndef HOLDFAST_MONITOR_DELAY_MATRIX_H_
#define HOLDFAST_MONITOR_DELAY_MATRIX_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "base/ids.h"
#include "monitor/finding.h"
#include "monitor/thresholds.h"

namespace holdfast::monitor {

struct MatrixCell {
  Rank from{};
  Rank to{};
  bool slow = false;
};

struct SlowEnd {
  FaultClass fault{};  // kSenderEnd, kReceiverEnd or kLink
  Scope scope{};
  Suspect suspect;
  std::vector<uint32_t> cells;  // indices of the slow cells that it explains
};

// Explains the slow cells by as few ends as possible: first those that account for the most cells
// and of which at least three quarters are slow, then single cells. `cells` holds each pair once.
std::vector<SlowEnd> LocateSlowEnds(const std::vector<MatrixCell>& cells);

enum class End { kSender, kReceiver };

// A connection in one window.
struct CellDelay {
  Rank from{};
  Rank to{};
  uint32_t kind = 0;      // only cells of one kind are compared
  double us_per_mib = 0;  // that it waited on the wire
  double mib_per_us = 0;  // that it carried
  // What is normal for it. 0: it is compared with others only; infinity: not known yet, and it
  // cannot be called slow.
  double normal_us_per_mib = 0;
  double recent_cost = 0;  // WindowJudgement::cost of its last window; 0: it has none
};

struct WindowJudgement {
  std::vector<bool> slow;                // by cell: by itself, not with its whole row or column
  std::vector<double> peers_us_per_mib;  // by cell: the median of its kind
  // By cell: the share of the time that it waits longer than its peers, the newest windows counting
  // most; may be negative.
  std::vector<double> cost;
  // Rows and columns with at least two peers in one kind, and whether they are slow.
  std::map<std::pair<Rank, End>, bool> ends;
};

// What is slow in one window. Of two things that meet at a rank, one that it sends and one that it
// receives, only the one that costs more is slow: acknowledgements and credits for what goes one
// way come back the other way and wait behind the data there, never for longer than those. Each
// pair may be there several times (several communicators).
WindowJudgement JudgeWindow(const std::vector<CellDelay>& cells, const Thresholds& thresholds);

// Median and median absolute deviation (scaled to a standard deviation). CHECKs that there are
// values.
struct Spread {
  size_t count = 0;
  double median = 0;
  double deviation = 0;
};
Spread SpreadOf(std::vector<double> values);

// Whether `value` is above its peers by ratio, by robust deviations, and by what it costs: `cost`,
// a share of the window.
bool IsAbnormal(double value, const Spread& peers, double cost, const Thresholds& thresholds);

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_DELAY_MATRIX_H_
