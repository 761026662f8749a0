// `holdfast why`: what happened to a job, incident by incident, and where the time went. Of a job
// that runs, by its agent; of one that is over, by whoever reads its history from disk.
//
// Every number is the difference of two moments that were observed (incident.h): a phase that was
// not reached has none, and is `null` in JSON and `-` in the table.
#ifndef HOLDFAST_AGENT_RECOVERY_WHY_H_
#define HOLDFAST_AGENT_RECOVERY_WHY_H_

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "agent/recovery/history.h"
#include "base/ids.h"

namespace holdfast::recovery {

// All of them with `of` 0, else those that happened to that attempt; the oldest first.
std::vector<Incident> IncidentsOf(const History& history, Attempt of);

// Some lines for each incident, without their ends: what it was, why, what was done, and the
// seconds from the onset to the end of the first new step by phase.
std::vector<std::string> WhyLines(const History& history, Attempt of);

// Members of the state of a run (docs/RUN.md): `incidents`, `seconds` (the sum of all), `downtime`
// (the table as lines) and `why` (WhyLines).
nlohmann::ordered_json WhyJson(const History& history, Attempt of);

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_WHY_H_
