#include "monitor/sim/catalogue.h"

namespace holdfast::monitor::sim {
namespace {

// One that acts again and again.
std::vector<Fault> Again(FaultKind kind, uint32_t rank, double factor, absl::Duration every,
                         absl::Duration length) {
  std::vector<Fault> faults;
  for (absl::Duration at = kOnset; at + every < length; at += every) {
    faults.push_back(FaultOf(kind, rank, factor));
    faults.back().onset = at;
  }
  return faults;
}

}  // namespace

Fault FaultOf(FaultKind kind, uint32_t rank, double factor, uint32_t peer) {
  Fault fault;
  fault.kind = kind;
  fault.rank = rank;
  fault.peer = peer;
  fault.factor = factor;
  fault.onset = kOnset;
  return fault;
}

std::vector<NamedWorld> CleanWorlds(absl::Duration length) {
  std::vector<NamedWorld> worlds;
  WorldOptions plain;
  plain.clock_drift = 1e-4;
  for (const Traffic traffic : {Traffic::kRing, Traffic::kTwoRings, Traffic::kAllToAll}) {
    WorldOptions options = plain;
    options.traffic = traffic;
    worlds.push_back({"plain", options});
  }
  for (const bool known : {false, true}) {
    WorldOptions mixed = plain;
    mixed.traffic = Traffic::kTwoRings;
    mixed.node_rate = {1, 1, 1, 1, 1, 1, 1, 0.5};
    mixed.topology_known = known;
    worlds.push_back({known ? "two kinds of NICs, known" : "two kinds of NICs", mixed});
  }
  WorldOptions pipeline = plain;
  pipeline.data_parallel = 4;
  pipeline.stages = 3;
  pipeline.stage_weight = {1, 1, 1.4};
  worlds.push_back({"the last stage has more to do", pipeline});
  WorldOptions uneven = plain;
  uneven.faults = {FaultOf(FaultKind::kUnevenSequences, 0, 1.6)};
  worlds.push_back({"sequences of all lengths", uneven});
  WorldOptions collections = plain;
  collections.faults = {FaultOf(FaultKind::kCollections, 0, 0.8)};
  worlds.push_back({"garbage collections", collections});
  WorldOptions checkpoints = plain;
  checkpoints.faults = Again(FaultKind::kCheckpoint, 0, 30, absl::Seconds(120), length);
  worlds.push_back({"checkpoints", checkpoints});
  WorldOptions evaluations = plain;
  evaluations.faults = Again(FaultKind::kEvaluation, 0, 90, absl::Seconds(200), length);
  worlds.push_back({"rank 0 evaluates", evaluations});
  WorldOptions engine = plain;
  engine.faults = Again(FaultKind::kEnginePause, 3, 6, absl::Seconds(50), length);
  worlds.push_back({"our own engine pauses a node", engine});
  engine.faults = Again(FaultKind::kEnginePause, 3, 2, absl::Seconds(9), length);
  worlds.push_back({"our own engine pauses a node all the time", engine});
  WorldOptions compile = plain;
  compile.faults = {FaultOf(FaultKind::kSlowCompile, 0, 60)};
  compile.faults[0].onset = absl::ZeroDuration();
  worlds.push_back({"the first step compiles", compile});
  WorldOptions observer = plain;
  observer.faults = Again(FaultKind::kLateObserver, 5, 4, absl::Seconds(50), length);
  worlds.push_back({"an agent is not scheduled", observer});
  WorldOptions loss = plain;
  loss.loss = 0.05;
  loss.lateness = 0.05;
  worlds.push_back({"summaries are lost and late", loss});
  WorldOptions blind = plain;
  blind.blind = {2, 6};
  worlds.push_back({"two ranks have no plugin", blind});
  return worlds;
}

}  // namespace holdfast::monitor::sim
