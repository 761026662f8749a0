#include "agent/recovery/incident.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/recovery/phases.h"
#include "agent/recovery/text.h"

namespace holdfast::recovery {
namespace {

std::optional<absl::Duration> Between(const std::optional<absl::Duration>& from,
                                      const std::optional<absl::Duration>& to) {
  if (!from.has_value() || !to.has_value()) return std::nullopt;
  return std::max(absl::ZeroDuration(), *to - *from);
}

// Absent if both are.
std::optional<absl::Duration> Sum(const std::optional<absl::Duration>& a,
                                  const std::optional<absl::Duration>& b) {
  if (!a.has_value() && !b.has_value()) return std::nullopt;
  return a.value_or(absl::ZeroDuration()) + b.value_or(absl::ZeroDuration());
}

// `absent`: what stands for a phase that is not there.
std::string Cells(const Phases& phases, std::string_view absent) {
  std::string cells;
  for (const NamedPhase& one : kDowntimePhases) {
    const std::optional<absl::Duration>& phase = phases.*one.phase;
    absl::StrAppendFormat(&cells, " %8s",
                          phase.has_value() ? DurationText(*phase) : std::string(absent));
  }
  return cells;
}

}  // namespace

std::string_view Name(Cause cause) {
  static constexpr std::string_view kNames[kCauses] = {"more ranks",
                                                       "slow",
                                                       "hang",
                                                       "hang, culprit named",
                                                       "mismatch or deadlock",
                                                       "process dead",
                                                       "node gone",
                                                       "GPU fault",
                                                       "usage"};
  return kNames[static_cast<size_t>(cause)];
}

std::string_view Name(Outcome outcome) {
  static constexpr std::string_view kNames[kOutcomes] = {"open", "withdrawn", "resumed", "replaced",
                                                         "ended"};
  return kNames[static_cast<size_t>(outcome)];
}

Phases PhasesOf(const Incident& incident) {
  Phases phases;
  phases.detect = Between(incident.onset, incident.detected);
  phases.diagnose = Between(incident.detected, incident.diagnosed);
  // Ranks that ended by themselves were not told to.
  const std::optional<absl::Duration> told =
      incident.stopping.has_value() ? incident.stopping : incident.diagnosed;
  phases.wait = Sum(Between(incident.diagnosed, incident.stopping),
                    Between(incident.stopped, incident.starting));
  // Of one that is over, a part of it says nothing.
  if (incident.outcome == Outcome::kResumed && !incident.starting.has_value()) phases.wait.reset();
  phases.stop = Between(told, incident.stopped);
  const std::optional<absl::Duration> opened =
      incident.opened.has_value() ? incident.opened : incident.resumed;
  phases.start = Between(incident.starting, opened);
  phases.load = Between(incident.opened, incident.restored_at);
  phases.step = Between(incident.restored_at.has_value() ? incident.restored_at : incident.opened,
                        incident.resumed);
  phases.lost = incident.lost_work;
  if (const auto down = Between(incident.onset, incident.resumed); down.has_value()) {
    phases.total = *down + incident.lost_work.value_or(absl::ZeroDuration());
  }
  return phases;
}

Phases SumOf(std::span<const Incident> incidents) {
  Phases sum;
  for (const Incident& incident : incidents) {
    const Phases phases = PhasesOf(incident);
    for (const NamedPhase& one : kDowntimePhases) {
      sum.*one.phase = Sum(sum.*one.phase, phases.*one.phase);
    }
  }
  return sum;
}

std::vector<std::string> DowntimeTable(std::span<const Incident> incidents, std::string_view home) {
  std::vector<std::string> lines;
  std::string head = absl::StrFormat("%-4s %-8s %-22s", "#", "attempt", "cause");
  for (const NamedPhase& one : kDowntimePhases) absl::StrAppendFormat(&head, " %8s", one.name);
  lines.push_back(absl::StrCat(head, "  what"));
  for (const Incident& incident : incidents) {
    std::string line =
        absl::StrFormat("%-4d %-8s %-22s", incident.number,
                        Value(incident.attempt) == 0 ? "-" : absl::StrCat(Value(incident.attempt)),
                        std::string(Name(incident.cause)));
    // Whoever trains again has come through all of them.
    const bool is_through = incident.outcome == Outcome::kResumed;
    absl::StrAppend(&line, Cells(PhasesOf(incident), is_through ? "unknown" : "-"), "  ",
                    incident.what);
    if (!incident.suspects.empty()) {
      absl::StrAppendFormat(&line, ", rank %d (%s)", Value(incident.suspects.front().rank),
                            Name(incident.suspects.front().gpu, home));
    }
    if (!incident.action.empty()) absl::StrAppend(&line, "; ", incident.action);
    if (incident.outcome != Outcome::kResumed) {
      absl::StrAppend(&line, "; ", std::string(Name(incident.outcome)));
    }
    lines.push_back(std::move(line));
  }
  lines.push_back(absl::StrCat(absl::StrFormat("%-4s %-8s %-22s", "", "", "all"),
                               Cells(SumOf(incidents), "-")));
  return lines;
}

}  // namespace holdfast::recovery
