// Every threshold of the analysis, in one place, with its reason. docs/MONITOR_ANALYSIS.md says
// which of them were adjusted after a run, and shows the runs: a change here means running those
// again.
#ifndef HOLDFAST_MONITOR_THRESHOLDS_H_
#define HOLDFAST_MONITOR_THRESHOLDS_H_

#include <cstddef>
#include <cstdint>

#include "absl/time/time.h"

namespace holdfast::monitor {

struct Thresholds {
  // --- Standing still. All on the clock of the rank that stands.
  // A suspicion costs nothing, so it may come early: within 5 s of the onset at the 90th
  // percentile.
  absl::Duration hang_suspicion = absl::Milliseconds(2500);
  // Within 10 s where two witnesses agree (its peers wait for it; its own process or board says
  // why).
  absl::Duration hang_verdict = absl::Milliseconds(6500);
  // The same without a second witness.
  absl::Duration hang_verdict_alone = absl::Seconds(30);
  // A standstill counts only if it is so many times longer than the longest one that this
  // communicator recovered from by itself.
  double standstill_factor = 3;
  // A suspect whose CPU time moves is busy, not stuck: nothing is done before this. It is learned
  // as `busy_factor` times the longest standstill, at least `busy_timeout_min`; configured until
  // `learn_operations_min` operations have been seen.
  absl::Duration busy_timeout = absl::Seconds(600);
  absl::Duration busy_timeout_min = absl::Seconds(60);
  double busy_factor = 10;
  uint64_t learn_operations_min = 20;
  // A process that used less of a CPU than this is not busy.
  double busy_cpu_share = 0.02;
  // A named pause or a pause of our own engine ends the patience only here.
  absl::Duration section_timeout = absl::Seconds(1800);

  // --- Deaths and silence.
  // Other ranks may die of the first death, and their reports may come first: the kinds of exit are
  // compared only after this.
  absl::Duration cascade_settle = absl::Seconds(3);
  // A node that has said nothing for so long, on the receiver's clock, counts as silent: more than
  // two lost summaries in a row. A silent node alone is blindness; with peers that wait for it, a
  // suspect.
  absl::Duration node_silent = absl::Seconds(5);
  absl::Duration node_silent_verdict = absl::Seconds(10);
  // Reports older than this say nothing about the present.
  absl::Duration stale = absl::Seconds(4);

  // --- Joining. Communicators are made one after another while the job starts.
  absl::Duration join_timeout = absl::Seconds(120);

  // --- Observers. A gap in the observer's own schedule looks like a gap of those it observes.
  absl::Duration observer_gap_max = absl::Milliseconds(500);
  absl::Duration receiver_gap_max = absl::Seconds(2);

  // --- Slowness. A window is long enough for several steps and short enough for a verdict in 60 s.
  absl::Duration window = absl::Seconds(5);
  // A cell of the delay matrix or a rank is abnormal in a window if it is this much above the
  // median of its peers, and this many robust deviations.
  double slow_ratio = 1.25;
  double slow_deviations = 5;
  // Of so many peers the deviation is known well, and fewer of them do: a healthy connection of an
  // all-to-all exceeds 3.5 in 0.07% of its windows (of eight rows, whose deviation is a guess, one
  // exceeds 5 in 0.25%), and one window says nothing.
  double slow_deviations_of_many = 3.5;
  size_t many_peers = 30;
  // Deviations are never taken as smaller than this share of the median.
  double deviation_floor = 0.04;
  // The excess must also cost this share of the window, or nobody would want to know.
  double slow_cost = 0.04;
  // A connection with fewer bytes in a window is not judged, nor one that hardly waited.
  uint64_t connection_bytes_min = uint64_t{1} << 20;
  absl::Duration connection_wait_min = absl::Milliseconds(20);
  // Peers needed for a median that means something (the suspect not counted).
  uint32_t peers_min = 2;
  // Windows of the last `window_memory` that must be abnormal.
  uint32_t window_memory = 8;
  uint32_t windows_for_suspicion = 4;
  uint32_t windows_for_verdict = 6;
  // Nor may chance explain them better than this, at the rate at which its peers are abnormal.
  double chance_max = 1e-5;
  // Windows in a row that must be normal before a slow finding is withdrawn: more than are needed
  // to raise it, so that it does not flap.
  uint32_t windows_to_clear = 6;
  // Windows that teach a connection its own normal; before them it has no baseline.
  uint32_t baseline_windows = 4;
  // Proxy threads that waited for a CPU for this share of the window are starved.
  double starved_share = 0.3;

  // --- Other witnesses (testimony_book.h).
  // What stands may be told a little earlier by one clock than by another.
  absl::Duration witness_slack = absl::Seconds(1);
  // A fault that the kernel or a library reported, or an end, explains what begins within this time
  // of it: NCCL's own error comes after 30 s, a watchdog's after minutes.
  absl::Duration witness_cause_age = absl::Seconds(600);
  // A testimony alone, where telemetry is blind, must be so fresh: the witnesses of a job without
  // telemetry are asked more often than that.
  absl::Duration witness_alone_age = absl::Seconds(30);
  // So certain must it be to be a verdict by itself: the driver's word that the GPU is lost.
  double witness_verdict_certainty = 0.9;
  // Share of the remaining doubt that a witness takes who agrees, and of the confidence that one
  // takes who says something else; both times its certainty.
  double agreement_weight = 0.6;
  double contradiction_weight = 0.5;

  // --- Findings.
  // A hang finding is withdrawn after its evidence has been gone for so long.
  absl::Duration clear_after = absl::Seconds(5);
  // One that comes back within this is the same incident, with the same id.
  absl::Duration reopen_within = absl::Seconds(120);
  // Share of confidence lost where telemetry is missing.
  double blind_penalty = 0.5;
};

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_THRESHOLDS_H_
