// Worlds that tests and benchmarks share: those in which nothing is wrong.
#ifndef HOLDFAST_MONITOR_SIM_CATALOGUE_H_
#define HOLDFAST_MONITOR_SIM_CATALOGUE_H_

#include <cstdint>
#include <vector>

#include "absl/time/time.h"
#include "monitor/sim/world.h"

namespace holdfast::monitor::sim {

// When the faults of the catalogue begin: after a baseline was learned.
inline constexpr absl::Duration kOnset = absl::Seconds(40);

Fault FaultOf(FaultKind kind, uint32_t rank, double factor, uint32_t peer = 0);

struct NamedWorld {
  const char* name;
  WorldOptions options;
};

// Everything that only looks wrong: mixed NICs, imbalance, pauses, lost summaries, ... `length` is
// how long the world will run: what comes again comes until then.
std::vector<NamedWorld> CleanWorlds(absl::Duration length);

}  // namespace holdfast::monitor::sim

#endif  // HOLDFAST_MONITOR_SIM_CATALOGUE_H_
