#include "monitor/finding_log.h"

#include <algorithm>
#include <array>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace holdfast::monitor {
namespace {

constexpr std::array<std::string_view, kFindingChanges> kChangeNames = {
    "suspicion", "verdict", "changed", "withdrawn", "reopened", "ended"};
constexpr std::array<std::string_view, kFindingStates> kStateNames = {"open", "withdrawn", "ended",
                                                                      "unwatched"};

std::optional<Suspect> First(const Finding& finding) {
  if (finding.suspects.empty()) return std::nullopt;
  return finding.suspects.front();
}

}  // namespace

std::string_view Name(FindingChange change) { return kChangeNames[static_cast<size_t>(change)]; }
std::string_view Name(FindingState state) { return kStateNames[static_cast<size_t>(state)]; }

std::string Line(const FindingRecord& record, const FindingEvent& event) {
  return absl::StrFormat("%s %s (job %s): %s", Name(event.change), record.finding.id, record.job,
                         event.text);
}

// The record that this finding goes on with: its own, if it is open or was withdrawn a moment ago
// (the analysis has given it the same id again); else one of an earlier life.
FindingLog::Entry* FindingLog::FindOpenable(const std::string& job, const std::string& attempt_key,
                                            const Finding& finding) {
  Entry* earlier = nullptr;
  for (auto& [number, entry] : records_) {
    const FindingRecord& record = entry.record;
    if (record.job != job || record.state == FindingState::kEnded) continue;
    if (entry.analysis_id == finding.id) return &entry;
    if (record.state == FindingState::kUnwatched && record.attempt_key == attempt_key &&
        record.finding.fault == finding.fault && First(record.finding) == First(finding)) {
      earlier = &entry;
    }
  }
  return earlier;
}

FindingLog::Entry& FindingLog::Open(const std::string& job, const std::string& attempt_key,
                                    const Finding& finding) {
  // Its id may be that of a record which has ended: 32 bits, or the same again after a restart.
  std::string id = finding.id;
  for (int i = 2; Find(id) != nullptr; ++i) id = absl::StrCat(finding.id, "-", i);
  MakeRoom();
  Entry& entry = records_[++opened_];
  entry.record.job = job;
  entry.record.attempt_key = attempt_key;
  entry.record.finding.id = std::move(id);
  return entry;
}

// Never an open one, as long as there are others.
void FindingLog::MakeRoom() {
  if (records_.size() < kRecordsMax) return;
  const auto closed = std::find_if(records_.begin(), records_.end(), [](const auto& one) {
    return one.second.record.state != FindingState::kOpen;
  });
  records_.erase(closed == records_.end() ? records_.begin() : closed);
}

void FindingLog::Tell(Entry& entry, FindingChange change, std::string text, const When& when,
                      std::vector<Told>& told) {
  FindingRecord& record = entry.record;
  record.history.push_back({change, when.elapsed, when.wall_time, std::move(text)});
  if (record.history.size() > kHistoryMax) {
    record.history.erase(record.history.begin() + 1);
    ++record.history_left_out;
  }
  entry.grade = record.finding.grade;
  entry.fault = record.finding.fault;
  entry.scope = record.finding.scope;
  entry.first_suspect = First(record.finding);
  entry.told_at = when.elapsed;
  told.push_back({&record, record.history.back()});
}

bool FindingLog::LooksOther(const Entry& entry, const Finding& finding) {
  return entry.fault != finding.fault || entry.scope != finding.scope ||
         entry.first_suspect != First(finding);
}

std::vector<FindingLog::Told> FindingLog::Take(const JobAnalysis& analysis,
                                               const JobAnalysis::Result& result,
                                               const When& when) {
  std::vector<Told> told;
  if (result.new_attempt) told = End(analysis.job(), when, &analysis.attempt_key());
  std::vector<Told> now =
      result.ended ? End(analysis.job(), when)
                   : Update(analysis.job(), analysis.attempt_key(), result.analysis.findings, when);
  told.insert(told.end(), now.begin(), now.end());
  return told;
}

std::vector<FindingLog::Told> FindingLog::Update(const std::string& job,
                                                 const std::string& attempt_key,
                                                 const std::vector<Finding>& open,
                                                 const When& when) {
  std::vector<Told> told;
  std::set<const Entry*> seen;
  for (const Finding& finding : open) {
    Entry* entry = FindOpenable(job, attempt_key, finding);
    const bool first = entry == nullptr;
    if (first) entry = &Open(job, attempt_key, finding);
    seen.insert(entry);
    FindingRecord& record = entry->record;
    const FindingState before = record.state;
    const std::string id = record.finding.id;
    const Grade grade_before = record.finding.grade;
    record.finding = finding;
    record.finding.id = id;
    // A verdict is not taken back because we were restarted and know less for a while.
    if (!first && grade_before == Grade::kVerdict) record.finding.grade = Grade::kVerdict;
    const bool verdict = record.finding.grade == Grade::kVerdict;
    record.state = FindingState::kOpen;
    entry->analysis_id = finding.id;
    if (first) {
      Tell(*entry, verdict ? FindingChange::kVerdict : FindingChange::kSuspicion, finding.sentence,
           when, told);
    } else if (before != FindingState::kOpen) {
      Tell(*entry, FindingChange::kReopened, finding.sentence, when, told);
    } else if (verdict && entry->grade != Grade::kVerdict) {
      Tell(*entry, FindingChange::kVerdict, finding.sentence, when, told);
    } else if (LooksOther(*entry, finding) && when.elapsed - entry->told_at >= kChangedEvery) {
      Tell(*entry, FindingChange::kChanged, finding.sentence, when, told);
    }
  }
  for (auto& [number, entry] : records_) {
    if (entry.record.job != job || entry.record.state != FindingState::kOpen ||
        seen.contains(&entry)) {
      continue;
    }
    entry.record.state = FindingState::kWithdrawn;
    Tell(entry, FindingChange::kWithdrawn, "its evidence has gone", when, told);
  }
  return told;
}

std::vector<FindingLog::Told> FindingLog::End(const std::string& job, const When& when,
                                              const std::string* attempt_key) {
  std::vector<Told> told;
  for (auto& [number, entry] : records_) {
    FindingRecord& record = entry.record;
    if (record.job != job) continue;
    const bool unwatched = record.state == FindingState::kUnwatched;
    if (unwatched && attempt_key != nullptr && record.attempt_key == *attempt_key) continue;
    // What comes under its id from now on is another one.
    entry.analysis_id.clear();
    if (record.state != FindingState::kOpen && !unwatched) continue;
    record.state = FindingState::kEnded;
    Tell(entry, FindingChange::kEnded, "its attempt is over", when, told);
  }
  return told;
}

void FindingLog::Restore(FindingRecord record) {
  if (record.finding.id.empty() || Find(record.finding.id) != nullptr) return;
  if (record.state == FindingState::kOpen) record.state = FindingState::kUnwatched;
  MakeRoom();
  Entry& entry = records_[++opened_];
  entry.record = std::move(record);
  entry.grade = entry.record.finding.grade;
  entry.fault = entry.record.finding.fault;
  entry.scope = entry.record.finding.scope;
  entry.first_suspect = First(entry.record.finding);
}

std::vector<FindingLog::Told> FindingLog::GiveUpUnwatched(const std::string& job,
                                                          const When& when) {
  std::vector<Told> told;
  for (auto& [number, entry] : records_) {
    if (entry.record.job != job || entry.record.state != FindingState::kUnwatched) continue;
    entry.record.state = FindingState::kWithdrawn;
    Tell(entry, FindingChange::kWithdrawn,
         "not seen again after the agent's worker was started anew", when, told);
  }
  return told;
}

void FindingLog::Forget(absl::Time oldest) {
  std::erase_if(records_, [&](const auto& one) {
    const FindingRecord& record = one.second.record;
    if (record.state == FindingState::kOpen || record.history.empty()) return false;
    const std::optional<absl::Time>& last = record.history.back().wall_time;
    return last.has_value() && *last < oldest;
  });
}

std::vector<const FindingRecord*> FindingLog::Records(std::string_view job) const {
  std::vector<const FindingRecord*> records;
  for (const auto& [number, entry] : records_) {
    if (job.empty() || entry.record.job == job) records.push_back(&entry.record);
  }
  return records;
}

const FindingRecord* FindingLog::Find(std::string_view id) const {
  for (const auto& [number, entry] : records_) {
    if (entry.record.finding.id == id) return &entry.record;
  }
  return nullptr;
}

}  // namespace holdfast::monitor
