// JobSupervisor: evidence of an incident, and what became of it.
#include <unistd.h>

#include <cstdint>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/log.h"
#include "agent/recovery/incident_json.h"
#include "agent/recovery/text.h"
#include "agent/run/job_supervisor.h"
#include "agent/run/small_files.h"
#include "nlohmann/json.hpp"

namespace holdfast {

std::string JobSupervisor::IncidentDirectory(uint32_t number) const {
  return absl::StrCat(options_.state_directory, "/incidents/", number);
}

std::string JobSupervisor::SummaryOf(const recovery::CollectEvidence& action) const {
  std::string summary = absl::StrFormat(
      "Incident %d of job %s, %s.\n%s\n", action.incident, spec_.job,
      absl::FormatTime(absl::RFC3339_sec, world_.clock.WallTime(), absl::UTCTimeZone()),
      action.why);
  for (const Rank suspect : action.suspects) {
    absl::StrAppend(&summary, "Suspect: rank ", Value(suspect), ".\n");
  }
  absl::StrAppendFormat(&summary, "Run %s, launch %d, restart %d, %d ranks, port %d, program %s.\n",
                        spec_.run_id, Value(group_launch_), history_.restart_count,
                        history_.placement.world_size(), port_, spec_.command.front());
  if (!history_.placement.layout.empty()) {
    absl::StrAppend(&summary, "Layout: ", history_.placement.layout, ".\n");
  }
  for (uint32_t rank = 0; rank < history_.placement.world_size(); ++rank) {
    const auto process = processes_.find(rank);
    absl::StrAppendFormat(&summary, "Rank %d on %s: %s", rank,
                          recovery::Name(history_.placement.gpus[rank], node_),
                          process == processes_.end() ? std::string("has ended")
                                                      : absl::StrCat("process ", process->second));
    if (const std::optional<uint64_t> step = progress_.StepOf(rank); step.has_value()) {
      absl::StrAppend(&summary, ", in step ", recovery::CountText(*step));
    }
    absl::StrAppend(&summary, ".\n");
  }
  return summary;
}

// The policy goes on when it is collected, or at its deadline, whichever is first.
void JobSupervisor::CarryOut(const recovery::CollectEvidence& action) {
  ReadCheckpoints();  // for the choice that may follow
  Evidence evidence;
  evidence.directory = IncidentDirectory(action.incident);
  evidence.summary = SummaryOf(action);
  evidence.environment = spec_.environment;
  for (uint32_t rank = 0; rank < history_.placement.world_size(); ++rank) {
    const auto process = processes_.find(rank);
    evidence.ranks.push_back({rank, LogDirectoryOf(spec_, history_.restart_count, rank),
                              process == processes_.end() ? 0 : process->second});
  }
  collector_.Collect(std::move(evidence), AttemptKeyOf(spec_, action.launch),
                     [this, incident = action.incident](absl::Status collected) {
                       if (!collected.ok()) {
                         LogWarning(absl::StrFormat("job %s: evidence of incident %d: %s",
                                                    spec_.job, incident, collected.ToString()));
                       }
                       Take(recovery::EvidenceCollected{incident});
                     });
  if (history_.incident.has_value()) WriteIncident(*history_.incident);
}

// Beside the evidence; an incident of which none was collected has no directory.
void JobSupervisor::WriteIncident(const recovery::Incident& incident) {
  const std::string directory = IncidentDirectory(incident.number);
  if (access(directory.c_str(), F_OK) != 0) return;
  const std::string text =
      IncidentJson(incident).dump(1, ' ', false, nlohmann::json::error_handler_t::replace);
  const absl::Status written =
      ReplaceFile(absl::StrCat(directory, "/", kIncidentFile), text + "\n");
  if (!written.ok()) LogWarning(absl::StrFormat("job %s: %s", spec_.job, written.ToString()));
}

}  // namespace holdfast
