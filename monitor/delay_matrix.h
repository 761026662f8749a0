// The delay matrix: how long a byte takes from each rank to each other one, and which end a pattern
// of slow cells accuses.
//
// A whole row that is slow is the sender, a whole column the receiver, a single cell the path
// between two ends that are healthy elsewhere. A ring fills one cell a row: then nothing tells the
// three apart, and the scope says so.
#ifndef HOLDFAST_MONITOR_DELAY_MATRIX_H_
#define HOLDFAST_MONITOR_DELAY_MATRIX_H_

#include <cstdint>
#include <vector>

#include "base/ids.h"
#include "monitor/finding.h"

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

// Median and median absolute deviation (scaled to a standard deviation). CHECKs that there are
// values.
struct Spread {
  double median = 0;
  double deviation = 0;
};
Spread SpreadOf(std::vector<double> values);

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_DELAY_MATRIX_H_
