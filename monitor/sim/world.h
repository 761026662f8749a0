// A training job that never was: a causal discrete-event simulation of ranks, their collectives and
// the wire between them, which shows of itself what a node's agent would show (summary.h) and no
// more.
//
// Model: each rank runs its program in order: load data, compute, operation, ... An operation moves
// in steps over connections (communicator, channel, from, to). A step moves when the local GPU has
// made the chunk AND the receiver has given credit (8, and only once it is in the same operation)
// AND the wire is free; the receiving GPU consumes it and gives the credit back. A ring's GPU sends
// what it has received before; all-to-all and point to point move each connection by itself. The
// wire is a flow at equal shares of the sender's NIC, the receiver's NIC and the pair's link. The
// wait states and times fall out; nobody writes them. Faults change the causes only: a rate, a
// duration, a thread that does not run. Not modelled: overlap of compute and communication, trees,
// leftover shares of a link given to others, error returns of the library (a lost peer hangs), GPUs
// of one node talking past the network (ranks of one node use the same wire, but their connections
// are not shown, as with NVLink).
//
// One seed, one thread, no clock: the same options give the same snapshots.
#ifndef HOLDFAST_MONITOR_SIM_WORLD_H_
#define HOLDFAST_MONITOR_SIM_WORLD_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/time/time.h"
#include "monitor/snapshot.h"

namespace holdfast::monitor::sim {

enum class FaultKind : uint8_t {
  // Wire. `factor` is what is left of the rate; 0 cuts it.
  kLink,      // from `rank` to `peer`
  kSender,    // all that `rank` sends
  kReceiver,  // all that `rank` receives
  // Rank.
  kSlowGpu,         // computes `factor` times as long
  kGpuHang,         // its next GPU action in an operation never ends
  kNeverEnters,     // sleeps for ever before its next operation
  kEndlessLoop,     // the same, busy
  kKilled,          // SIGKILL; the others hang, or, with `factor` > 0, exit with errors afterwards
  kStopped,         // SIGSTOP, until `end`
  kNodeDies,        // node of `rank`: its processes and its agent
  kWrongSize,       // its next all-reduce has another size
  kWrongKind,       // its next all-reduce is a reduce-scatter
  kExtraBroadcast,  // calls a broadcast before its next all-reduce, and goes on, as its root may
  kSwappedOrder,    // it calls the operations of two communicators in the other order
  kStarvedProxy,  // its proxy threads get no CPU; with `factor` > 0, each action comes that many ms
                  // late
  kSlowData,      // loading takes `factor` times the time of computing
  kNeverJoins,    // from the start
  // Nothing is wrong.
  kCheckpoint,       // all ranks, in a section, for `factor` seconds
  kEvaluation,       // rank `rank` alone, in a section, for `factor` seconds
  kEnginePause,      // node of `rank`: our own engine stops it for `factor` seconds
  kCollections,      // each rank now and then pauses `factor` seconds at most, told to nobody
  kUnevenSequences,  // computing times of every step and rank differ by up to `factor`
  kSlowCompile,      // the first iteration computes `factor` seconds more, differently on each rank
  kLateObserver,     // the agent of `rank`'s node does not run for `factor` seconds
};
inline constexpr int kFaultKinds = 24;

struct Fault {
  FaultKind kind{};
  uint32_t rank = 0;
  uint32_t peer = 0;
  double factor = 0;
  absl::Duration onset;
  absl::Duration end = absl::InfiniteDuration();
  // Of a flapping fault: it is on for `duty` of each period. Zero: always on.
  absl::Duration period;
  double duty = 1;
};

enum class Traffic : uint8_t { kRing, kTwoRings, kAllToAll };

struct WorldOptions {
  uint32_t seed = 1;
  uint32_t data_parallel = 8;
  uint32_t stages = 1;  // pipeline, 1F1B
  uint32_t tensor = 1;
  uint32_t ranks_per_node = 1;
  Traffic traffic = Traffic::kRing;
  uint32_t micro_batches = 4;                        // of a pipeline
  absl::Duration compute = absl::Milliseconds(400);  // of an iteration, per rank
  double compute_noise = 0.02;
  std::vector<double> stage_weight;  // of computing, by stage; empty: equal
  std::vector<double> node_rate;     // of the NICs, by node, relative; empty: equal
  uint64_t gradient_bytes = uint64_t{256} << 20;
  double bytes_per_second = 2e9;  // of a NIC, each way
  bool topology_known = false;
  // Telemetry.
  double loss = 0;              // of summaries
  double lateness = 0;          // share of summaries that arrive one or two seconds late
  std::vector<uint32_t> blind;  // ranks without plugin
  double clock_drift = 0;       // of the nodes' clocks, at most, each its own
  std::vector<Fault> faults;
};

// Threads: one at a time. Lifetime: owns all.
class World {
 public:
  explicit World(WorldOptions options);
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  JobShape shape() const;

  // Lets a second pass. What has arrived is in the order of arrival, which is random within it.
  Snapshot Tick();

  uint64_t iterations() const;  // that rank 0 has finished
  uint64_t events() const;      // simulated so far
  // Whether every fault's cause has acted: a fault test proves that the fault happened.
  bool faults_happened() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace holdfast::monitor::sim

#endif  // HOLDFAST_MONITOR_SIM_WORLD_H_
