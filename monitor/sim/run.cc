#include "monitor/sim/run.h"

#include <algorithm>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace holdfast::monitor::sim {

Outcome Observe(const WorldOptions& options, absl::Duration length, const Thresholds& thresholds,
                const std::function<void(Snapshot&)>& each) {
  World world(options);
  Analyzer analyzer(thresholds, world.shape());
  std::map<std::string, Told> told;
  std::set<std::pair<WaitNote::Reason, Rank>> noted;
  Outcome outcome;
  for (int second = 0; second < absl::ToInt64Seconds(length); ++second) {
    Snapshot snapshot = world.Tick();
    if (each) each(snapshot);
    const Analysis analysis = analyzer.Step(snapshot);
    outcome.sight = analysis.sight;
    for (const Finding& finding : analysis.findings) {
      const auto [at, first] = told.try_emplace(finding.id);
      Told& incident = at->second;
      if (first) incident.first = snapshot.elapsed;
      if (finding.grade == Grade::kVerdict && !incident.verdict.has_value()) {
        incident.verdict = snapshot.elapsed;
      }
      incident.finding = finding;
      const std::string text = Describe(finding);
      if (incident.history.empty() || incident.history.back() != text) {
        incident.history.push_back(text);
      }
    }
    for (const WaitNote& note : analysis.notes) {
      if (noted.emplace(note.reason, note.rank).second) outcome.notes.push_back(note);
    }
  }
  for (auto& [id, incident] : told) outcome.told.push_back(std::move(incident));
  outcome.iterations = world.iterations();
  outcome.events = world.events();
  outcome.faults_happened = world.faults_happened();
  return outcome;
}

std::string Describe(const Finding& finding) {
  std::string text =
      absl::StrFormat("%s %s %s", Name(finding.grade), Name(finding.fault), Name(finding.scope));
  for (const Suspect& suspect : finding.suspects) {
    absl::StrAppend(&text, " ", Value(suspect.rank));
    if (suspect.peer != suspect.rank) absl::StrAppend(&text, ">", Value(suspect.peer));
  }
  return text;
}

std::string Describe(const Outcome& outcome) {
  std::string text =
      absl::StrFormat("%d iterations, %d events\n", outcome.iterations, outcome.events);
  for (const Told& told : outcome.told) {
    absl::StrAppendFormat(&text, "%s at %.0f s: %s\n", told.finding.id,
                          absl::ToDoubleSeconds(told.first), told.finding.sentence);
    for (const std::string& line : told.history) absl::StrAppend(&text, "    ", line, "\n");
  }
  for (const WaitNote& note : outcome.notes) absl::StrAppend(&text, "note ", note.sentence, "\n");
  return text;
}

}  // namespace holdfast::monitor::sim
