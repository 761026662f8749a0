// The clocks of board writers (hook/abi/monitor.h), read by somebody else. The rate of the
// time-stamp counter is the machine's, so it is measured here and not taken from what a board
// claims.
#ifndef HOLDFAST_AGENT_MONITOR_TICK_CLOCK_H_
#define HOLDFAST_AGENT_MONITOR_TICK_CLOCK_H_

#include <cstdint>

#include "hook/abi/monitor.h"

namespace holdfast {

// One instant on a writer's clock, and what its ticks are worth.
struct TickInstant {
  uint64_t ticks = 0;
  double us_per_tick = 1e-3;

  uint64_t Micros(uint64_t span_ticks) const {
    return static_cast<uint64_t>(static_cast<double>(span_ticks) * us_per_tick);
  }
  // 0 for a time that never was (0) or is still to come.
  uint64_t MicrosSince(uint64_t then_ticks) const {
    return then_ticks == 0 || then_ticks > ticks ? 0 : Micros(ticks - then_ticks);
  }
};

// Threads: any; constant after construction.
class TickClock {
 public:
  // Takes the first of the two points through which the counter's rate is found; the other one is
  // the present.
  TickClock();

  // Now, on the clock of the board's writer. Within the first 10 ms the rate of the counter is the
  // one that the board claims, within bounds.
  TickInstant Now(const abi::BoardHeader& header) const;

 private:
  uint64_t first_ticks_;
  uint64_t first_ns_;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_TICK_CLOCK_H_
