// EngineImpl: how far ranks have come, and a save that is wanted besides the schedule.
#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "checkpoint/engine_impl.h"
#include "checkpoint/job.h"
#include "checkpoint/session.h"

namespace holdfast {
namespace {

// Between the step that a rank has asked for last and the one that is made due: it may be about to
// ask for the next.
constexpr uint64_t kDueMarginSteps = 2;
// The ranks go on while they are told: each time with twice the margin.
constexpr int kDueTries = 8;

}  // namespace

std::vector<Engine::RankProgress> EngineImpl::ProgressOf(const std::string& job,
                                                         const std::string& attempt_key) const {
  std::vector<RankProgress> ranks;
  for (const auto& [id, entry] : sessions_) {
    const SessionIdentity& identity = entry.session->identity();
    if (identity.job != job || identity.attempt_key != attempt_key) continue;
    RankProgress progress;
    progress.rank = identity.rank;
    progress.attempt = identity.attempt;
    const bool restores = !entry.restores.empty() && !entry.restores.back()->is_over();
    if (entry.job != nullptr && entry.restore_number > 0 && !restores) {
      const std::optional<RestorePoint> point = entry.job->restore_point(identity.attempt);
      progress.is_restored = point.has_value();
      if (point.has_value()) progress.restored_from = point->checkpoint;
    }
    progress.is_open = entry.session->is_open();
    const SaveReports& reports = entry.session->reports();
    progress.sections = reports.sections();
    const SaveReports::Heartbeat heartbeat = reports.heartbeat();
    progress.heartbeat_count = heartbeat.count;
    progress.step = Step{heartbeat.step};
    if (const auto committed = reports.committed(Survives::kProcess)) {
      progress.committed = committed->step;
      progress.committed_begun = committed->begun;
    }
    ranks.push_back(progress);
  }
  return ranks;
}

std::vector<Engine::OpenSession> EngineImpl::open_sessions() const {
  std::vector<OpenSession> open;
  for (const auto& [id, entry] : sessions_) {
    const SessionIdentity& identity = entry.session->identity();
    if (!entry.session->is_open()) continue;
    open.push_back({identity.job, identity.attempt_key, identity.rank, identity.world_size,
                    identity.process_id});
  }
  return open;
}

absl::StatusOr<Step> EngineImpl::MakeDue(const std::string& job, const std::string& attempt_key) {
  std::vector<Session*> sessions;
  uint32_t world_size = 0;
  uint64_t asked_max = 0;
  for (const auto& [id, entry] : sessions_) {
    const SessionIdentity& identity = entry.session->identity();
    if (identity.job != job || identity.attempt_key != attempt_key || !entry.session->is_open()) {
      continue;
    }
    const uint64_t asked = entry.session->reports().asked_step();
    if (asked == 0) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "rank %d has not asked yet whether a save is due (hf_due)", Value(identity.rank)));
    }
    asked_max = std::max(asked_max, asked);
    world_size = identity.world_size;
    sessions.push_back(entry.session.get());
  }
  if (sessions.empty() || sessions.size() != world_size) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "job %s: expected all %d ranks to be open, found %d", job, world_size, sessions.size()));
  }
  uint64_t margin = kDueMarginSteps;
  for (int i = 0; i < kDueTries; ++i, margin *= 2) {
    // A trainer writes there what it likes.
    if (asked_max > UINT64_MAX / 2) break;
    const uint64_t due = asked_max + margin;
    for (Session* const session : sessions) session->reports().SetDueStep(due);
    for (Session* const session : sessions) {
      asked_max = std::max(asked_max, session->reports().asked_step());
    }
    if (asked_max < due) return Step{due};
  }
  return absl::UnavailableError(
      absl::StrFormat("job %s: its ranks are at step %d already, and too fast to be told of a save",
                      job, asked_max));
}

}  // namespace holdfast
