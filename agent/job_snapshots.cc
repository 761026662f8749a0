#include "agent/job_snapshots.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "agent/auto_saves.h"
#include "agent/recovery/history.h"
#include "agent/recovery/screen.h"
#include "nlohmann/json.hpp"

namespace holdfast {
namespace {

// More is known of a verdict than of a suspicion.
bool IsStronger(const monitor::Finding& a, const monitor::Finding& b) {
  return std::pair(a.grade, a.fault) > std::pair(b.grade, b.fault);
}

recovery::WatchedJob Watched(const JobSnapshot& job) {
  recovery::WatchedJob watched;
  watched.job = job.job;
  watched.attempt = job.attempt;
  watched.world_size = job.world_size;
  watched.open_ranks = job.open_ranks;
  watched.watched_ranks = job.watched_ranks;
  for (const Engine::RankProgress& rank : job.ranks) {
    watched.step = std::max(watched.step, Value(rank.step));
  }
  watched.newest = job.newest_committed;
  watched.finding = job.finding;
  watched.next = job.word.next;
  watched.trouble = job.word.trouble;
  watched.is_handled = job.word.is_handled;
  return watched;
}

uint32_t NumberIn(const nlohmann::json& object, const char* member) {
  return object.value(member, uint32_t{0});
}

// A job, as the engine's status has it.
JobSnapshot SnapshotOf(const nlohmann::json& job, const nlohmann::json& sessions) {
  JobSnapshot snapshot;
  snapshot.job = job.value("job", "");
  for (const nlohmann::json& attempt : job.value("attempts", nlohmann::json::array())) {
    if (!attempt.value("newest", false)) continue;
    snapshot.attempt = Attempt{NumberIn(attempt, "attempt")};
    snapshot.attempt_key = attempt.value("key", "");
    snapshot.world_size = NumberIn(attempt, "world_size");
  }
  for (const nlohmann::json& session : sessions) {
    const bool is_its = session.value("job", "") == snapshot.job &&
                        NumberIn(session, "attempt") == Value(snapshot.attempt);
    if (is_its && session.value("open", false)) ++snapshot.open_ranks;
  }
  const auto committed = job.find("newest_committed");
  if (committed != job.end() && committed->is_object()) {
    snapshot.newest_committed = CheckpointId{Attempt{NumberIn(*committed, "attempt")},
                                             Step{committed->value("step", uint64_t{0})}};
  }
  return snapshot;
}

}  // namespace

std::vector<JobSnapshot> JobsNow(const JobSources& sources) {
  std::map<std::string, JobSnapshot> jobs;
  const nlohmann::json none = nlohmann::json::array();
  const auto listed = [&](const char* member) -> const nlohmann::json& {
    const auto found = sources.engine_status.find(member);
    return found != sources.engine_status.end() && found->is_array() ? *found : none;
  };
  for (const nlohmann::json& one : listed("jobs")) {
    JobSnapshot job = SnapshotOf(one, listed("sessions"));
    job.ranks = sources.engine.ProgressOf(job.job, job.attempt_key);
    const std::string name = job.job;
    jobs.emplace(name, std::move(job));
  }
  for (const JobSupervisor::View& run : sources.runs.views()) {
    JobSnapshot& job = jobs[run.spec.job];
    job.job = run.spec.job;
    job.run.emplace(run);
  }
  std::map<std::string, std::set<uint32_t>> watched;
  for (const auto& board : sources.boards.boards()) {
    if (board->alive) watched[board->offer.job].insert(board->offer.rank);
  }
  for (auto& [name, job] : jobs) {
    job.watched_ranks = static_cast<uint32_t>(watched[name].size());
    job.word = sources.sidecar.WordOf(name);
    job.every = sources.auto_saves.SentenceOf(name);
    for (const monitor::FindingRecord* const record : sources.findings.Records(name)) {
      if (record->state != monitor::FindingState::kOpen) continue;
      const bool is_verdict = record->finding.grade == monitor::Grade::kVerdict;
      ++(is_verdict ? job.verdicts : job.suspicions);
      if (!job.finding.has_value() || IsStronger(record->finding, *job.finding)) {
        job.finding = record->finding;
      }
    }
  }
  std::vector<JobSnapshot> sorted;
  for (auto& [name, job] : jobs) sorted.push_back(std::move(job));
  return sorted;
}

std::string StateOf(const JobSnapshot& job) {
  return std::string(job.run.has_value() ? recovery::Name(job.run->history.state)
                                         : recovery::StateOf(Watched(job)));
}

std::string HumanStep(const JobSnapshot& job) {
  return job.run.has_value() ? recovery::HumanStep(job.run->settings, job.run->history)
                             : recovery::HumanStep(Watched(job));
}

std::vector<std::string> ScreenOf(const JobSnapshot& job, absl::Duration now) {
  std::vector<std::string> lines = job.run.has_value()
                                       ? recovery::Screen(job.run->settings, job.run->history, now)
                                       : recovery::Screen(Watched(job), now);
  if (!job.every.empty()) lines.push_back(job.every);
  return lines;
}

nlohmann::json ScreensJson(std::span<const JobSnapshot> jobs, absl::Duration now) {
  nlohmann::json screens = nlohmann::json::array();
  for (const JobSnapshot& job : jobs) {
    screens.push_back({{"job", job.job},
                       {"supervised", job.run.has_value()},
                       {"state", StateOf(job)},
                       {"you", HumanStep(job)},
                       {"screen", ScreenOf(job, now)}});
  }
  return screens;
}

}  // namespace holdfast
