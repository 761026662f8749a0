#include "agent/recovery/incident_json.h"

#include <optional>
#include <string>
#include <utility>

#include "absl/time/time.h"
#include "agent/recovery/phases.h"
#include "nlohmann/json.hpp"

namespace holdfast::recovery {
using nlohmann::ordered_json;

ordered_json SecondsJson(const Phases& phases) {
  ordered_json seconds = ordered_json::object();
  for (const NamedPhase& one : kDowntimePhases) {
    const std::optional<absl::Duration>& phase = phases.*one.phase;
    seconds[one.name] =
        phase.has_value() ? ordered_json(absl::ToDoubleSeconds(*phase)) : ordered_json();
  }
  return seconds;
}

ordered_json IncidentJson(const Incident& incident) {
  ordered_json suspects = ordered_json::array();
  for (const Incident::Suspect& suspect : incident.suspects) {
    ordered_json one = {{"rank", Value(suspect.rank)}};
    if (suspect.peer != suspect.rank) one["peer"] = Value(suspect.peer);
    one["node"] = suspect.gpu.node;
    one["gpu"] = suspect.gpu.index;
    if (!suspect.gpu.uuid.empty()) one["gpu_uuid"] = suspect.gpu.uuid;
    suspects.push_back(std::move(one));
  }
  return {{"number", incident.number},
          {"launch", Value(incident.launch)},
          {"attempt", Value(incident.attempt)},
          {"cause", std::string(Name(incident.cause))},
          {"outcome", std::string(Name(incident.outcome))},
          {"suspects", std::move(suspects)},
          {"what", incident.what},
          {"sentence", incident.sentence},
          {"action", incident.action},
          {"next_launch", Value(incident.next_launch)},
          {"finding", incident.finding},
          {"seconds", SecondsJson(PhasesOf(incident))}};
}

}  // namespace holdfast::recovery
