#include "monitor/tracker.h"

#include <algorithm>
#include <span>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/crc32c.h"

namespace holdfast::monitor {
namespace {

std::string IdOf(const std::string& key, uint64_t number) {
  const std::string name = absl::StrCat(key, "#", number);
  return absl::StrFormat("%08x", Crc32c(std::as_bytes(std::span(name))));
}

}  // namespace

std::vector<Finding> Tracker::Update(absl::Duration now, std::vector<Candidate> candidates) {
  for (Candidate& candidate : candidates) {
    Incident& incident = incidents_[candidate.key];
    if (!incident.open) {
      if (!incident.known || now - incident.last_seen >= thresholds_.reopen_within) {
        incident.known = true;
        incident.finding = candidate.finding;
        incident.finding.since = now;
        incident.finding.id = IdOf(candidate.key, ++begun_);
      }
      incident.open = true;
    }
    incident.last_seen = now;
    Merge(incident, std::move(candidate.finding));
  }
  std::vector<Finding> open;
  for (auto& [key, incident] : incidents_) {
    if (incident.open && now - incident.last_seen >= thresholds_.clear_after) incident.open = false;
    if (incident.open) open.push_back(incident.finding);
  }
  std::erase_if(incidents_, [&](const auto& entry) {
    return !entry.second.open && now - entry.second.last_seen >= thresholds_.reopen_within;
  });
  std::sort(open.begin(), open.end(),
            [](const Finding& a, const Finding& b) { return a.id < b.id; });
  return open;
}

void Tracker::Merge(Incident& incident, Finding finding) const {
  Finding& kept = incident.finding;
  finding.id = kept.id;
  finding.since = kept.since;
  if (kept.grade == Grade::kVerdict) {
    finding.grade = Grade::kVerdict;
    if (finding.fault < kept.fault) return;
    std::vector<Suspect> suspects = kept.suspects;
    for (const Suspect& suspect : finding.suspects) {
      if (std::find(suspects.begin(), suspects.end(), suspect) == suspects.end()) {
        suspects.push_back(suspect);
      }
    }
    finding.suspects = std::move(suspects);
  }
  kept = std::move(finding);
}

bool Tracker::IsStanding() const {
  return std::any_of(incidents_.begin(), incidents_.end(), [](const auto& entry) {
    return entry.second.open && !absl::StartsWith(entry.first, "slow:");
  });
}

}  // namespace holdfast::monitor
