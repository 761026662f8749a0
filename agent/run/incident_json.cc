#include "agent/run/incident_json.h"

#include <optional>
#include <string>

#include "absl/time/time.h"
#include "nlohmann/json.hpp"

namespace holdfast {
namespace {

using nlohmann::ordered_json;

ordered_json SecondsOf(const std::optional<absl::Duration>& duration) {
  return duration.has_value() ? ordered_json(absl::ToDoubleSeconds(*duration)) : ordered_json();
}

}  // namespace

ordered_json IncidentJson(const recovery::Incident& incident) {
  const recovery::Phases phases = recovery::PhasesOf(incident);
  ordered_json suspects = ordered_json::array();
  for (const recovery::Incident::Suspect& suspect : incident.suspects) {
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
          {"cause", std::string(recovery::Name(incident.cause))},
          {"outcome", std::string(recovery::Name(incident.outcome))},
          {"suspects", std::move(suspects)},
          {"what", incident.what},
          {"sentence", incident.sentence},
          {"action", incident.action},
          {"next_launch", Value(incident.next_launch)},
          {"finding", incident.finding},
          {"seconds",
           {{"detect", SecondsOf(phases.detect)},
            {"diagnose", SecondsOf(phases.diagnose)},
            {"wait", SecondsOf(phases.wait)},
            {"stop", SecondsOf(phases.stop)},
            {"start", SecondsOf(phases.start)},
            {"load", SecondsOf(phases.load)},
            {"step", SecondsOf(phases.step)},
            {"lost", SecondsOf(phases.lost)},
            {"total", SecondsOf(phases.total)}}}};
}

}  // namespace holdfast
