// An incident as JSON: in the state of a run, and in its folder of evidence (docs/RUN.md).
#ifndef HOLDFAST_AGENT_RUN_INCIDENT_JSON_H_
#define HOLDFAST_AGENT_RUN_INCIDENT_JSON_H_

#include "agent/recovery/incident.h"
#include "nlohmann/json_fwd.hpp"

namespace holdfast {

nlohmann::ordered_json IncidentJson(const recovery::Incident& incident);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_INCIDENT_JSON_H_
