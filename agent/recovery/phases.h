// The phases of an incident by name: the columns of the downtime table, the members of `seconds` in
// JSON, and the labels of the metric.
#ifndef HOLDFAST_AGENT_RECOVERY_PHASES_H_
#define HOLDFAST_AGENT_RECOVERY_PHASES_H_

#include <array>
#include <cstddef>
#include <optional>
#include <span>

#include "absl/time/time.h"
#include "agent/recovery/incident.h"

namespace holdfast::recovery {

struct NamedPhase {
  const char* name;
  std::optional<absl::Duration> Phases::*phase;
};

// In the order in which they follow one another, from the onset to the end of the first new step;
// then what is besides.
inline constexpr std::array<NamedPhase, 9> kDowntimePhases = {{{"detect", &Phases::detect},
                                                               {"diagnose", &Phases::diagnose},
                                                               {"wait", &Phases::wait},
                                                               {"stop", &Phases::stop},
                                                               {"start", &Phases::start},
                                                               {"load", &Phases::load},
                                                               {"step", &Phases::step},
                                                               {"lost", &Phases::lost},
                                                               {"total", &Phases::total}}};
// So many of them follow one another.
inline constexpr size_t kDowntimePhasesInOrder = 7;

// Of all of them together. A phase that none has reached is absent.
Phases SumOf(std::span<const Incident> incidents);

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_PHASES_H_
