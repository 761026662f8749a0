#include "agent/recovery/why.h"

#include <optional>
#include <span>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/recovery/incident.h"
#include "agent/recovery/incident_json.h"
#include "agent/recovery/phases.h"
#include "agent/recovery/text.h"
#include "nlohmann/json.hpp"

namespace holdfast::recovery {
namespace {

using nlohmann::ordered_json;

std::string HeadOf(const Incident& incident, std::string_view home) {
  std::string head = absl::StrFormat(
      "Incident %d, attempt %s, %s: %s", incident.number,
      Value(incident.attempt) == 0 ? "-" : absl::StrCat(Value(incident.attempt)),
      absl::FormatTime("%Y-%m-%d %H:%M:%S UTC", incident.wall, absl::UTCTimeZone()), incident.what);
  if (!incident.suspects.empty()) {
    const Incident::Suspect& suspect = incident.suspects.front();
    absl::StrAppendFormat(&head, "; suspect rank %d (%s)", Value(suspect.rank),
                          Name(suspect.gpu, home));
  }
  if (incident.confidence_permille > 0) {
    absl::StrAppendFormat(&head, ", confidence %.2f", incident.confidence_permille / 1000.0);
  }
  return absl::StrCat(head, ".");
}

std::string DoneAbout(const Incident& incident) {
  std::string done = incident.action.empty() ? "nothing" : incident.action;
  if (incident.restored.has_value()) {
    absl::StrAppend(&done, ", from step ", CountText(Value(incident.restored->step)));
  }
  if (incident.lost_steps.has_value()) {
    absl::StrAppendFormat(&done, ", %s steps done again", CountText(*incident.lost_steps));
  }
  return absl::StrCat("  Done: ", done, "; ", std::string(Name(incident.outcome)), ".");
}

std::string TimeOf(const Incident& incident) {
  const Phases phases = PhasesOf(incident);
  std::string parts;
  for (const NamedPhase& one : std::span(kDowntimePhases).first<kDowntimePhasesInOrder>()) {
    const std::optional<absl::Duration>& phase = phases.*one.phase;
    if (!phase.has_value()) continue;
    absl::StrAppendFormat(&parts, "%s%s %.2f s", parts.empty() ? "" : ", ", one.name,
                          absl::ToDoubleSeconds(*phase));
  }
  if (parts.empty()) return "";
  if (!incident.resumed.has_value()) return absl::StrCat("  Time so far: ", parts, ".");
  const absl::Duration down = *incident.resumed - incident.onset.value_or(*incident.resumed);
  return absl::StrFormat("  %.2f s from its onset to the end of the first new step: %s.",
                         absl::ToDoubleSeconds(down), parts);
}

}  // namespace

std::vector<Incident> IncidentsOf(const History& history, Attempt of) {
  std::vector<Incident> incidents = history.past;
  if (history.incident.has_value()) incidents.push_back(*history.incident);
  if (of != Attempt{}) {
    std::erase_if(incidents, [&](const Incident& incident) { return incident.attempt != of; });
  }
  return incidents;
}

std::vector<std::string> WhyLines(const History& history, Attempt of) {
  std::vector<std::string> lines;
  for (const Incident& incident : IncidentsOf(history, of)) {
    lines.push_back(HeadOf(incident, HomeOf(history)));
    if (!incident.sentence.empty()) lines.push_back(absl::StrCat("  Why: ", incident.sentence));
    lines.push_back(DoneAbout(incident));
    if (std::string time = TimeOf(incident); !time.empty()) lines.push_back(std::move(time));
  }
  return lines;
}

nlohmann::ordered_json WhyJson(const History& history, Attempt of) {
  const std::vector<Incident> incidents = IncidentsOf(history, of);
  ordered_json json = {{"incidents", ordered_json::array()},
                       {"seconds", SecondsJson(SumOf(incidents))},
                       {"downtime", DowntimeTable(incidents, HomeOf(history))},
                       {"why", WhyLines(history, of)}};
  for (const Incident& incident : incidents) json["incidents"].push_back(IncidentJson(incident));
  return json;
}

}  // namespace holdfast::recovery
