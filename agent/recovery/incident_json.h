// An incident as JSON: in the state of a run, and in its folder of evidence (docs/RUN.md).
#ifndef HOLDFAST_AGENT_RECOVERY_INCIDENT_JSON_H_
#define HOLDFAST_AGENT_RECOVERY_INCIDENT_JSON_H_

#include <nlohmann/json_fwd.hpp>

#include "agent/recovery/incident.h"

namespace holdfast::recovery {

// `seconds`: every phase by its name; null: not reached.
nlohmann::ordered_json SecondsJson(const Phases& phases);

nlohmann::ordered_json IncidentJson(const Incident& incident);

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_INCIDENT_JSON_H_
