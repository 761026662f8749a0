// The engine after a restart of the worker: sessions are rebuilt out of what the keeper held, and
// each job looks at its storage. A job whose storage cannot be read now, or is damaged, is in
// nobody's way: it is looked at again and again, its trainers are told why they wait, and the other
// jobs are served.
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "checkpoint/engine_impl.h"
#include "format/manifest.h"

namespace holdfast {

void EngineImpl::Recover(std::vector<KeptDescriptor> kept, std::function<void()> done) {
  CHECK(sessions_.empty() && jobs_.empty());
  Session::Recover(
      std::move(kept), session_world_,
      [this, alive = std::weak_ptr<bool>(alive_),
       done = std::move(done)](Session::Recovered recovered) {
        if (alive.expired()) return;
        for (std::string& warning : recovered.warnings) Warn(std::move(warning));
        for (const KeptDescriptor& other : recovered.others) {
          Warn(absl::StrFormat("kept descriptor %s is none of the engine's", other.name));
        }
        const std::map<Job*, std::vector<Session*>> sessions_of =
            AdoptSessions(std::move(recovered.sessions));
        if (sessions_of.empty()) {
          done();
          return;
        }
        const auto jobs_left = std::make_shared<size_t>(sessions_of.size());
        for (const auto& [job, sessions] : sessions_of) {
          const auto looked = [jobs_left, done] {
            if (--*jobs_left == 0) done();
          };
          job->Recover(sessions, looked,
                       [this, recovered_job = job] { JobRecovered(*recovered_job); });
        }
      });
}

// Which sessions each job has. One whose directory was replaced is a Job of its own beside its
// successor, abandoned: numbers of its attempts mean nothing to the other.
std::map<Job*, std::vector<Session*>> EngineImpl::AdoptSessions(
    std::vector<std::unique_ptr<Session>> sessions) {
  // Ids ascend, also over restarts of the worker: the last uuid is the newest job's.
  std::map<std::string, std::string> newest_uuid;
  for (const std::unique_ptr<Session>& session : sessions) {
    newest_uuid[session->identity().job] = session->identity().job_uuid;
  }
  std::map<std::pair<std::string, std::string>, Job*> replaced;
  std::map<Job*, std::vector<Session*>> sessions_of;
  for (std::unique_ptr<Session>& session : sessions) {
    const SessionIdentity& identity = session->identity();
    next_session_id_ = std::max(next_session_id_, static_cast<uint64_t>(identity.session) + 1);
    if (absl::Status name = CheckJobName(identity.job); !name.ok()) {
      Warn(std::string(name.message()));
      session->Forget();
      continue;
    }
    Job* job = nullptr;
    if (identity.job_uuid == newest_uuid.at(identity.job)) {
      job = &JobOf(identity.job);
    } else {
      Job*& of_uuid = replaced[{identity.job, identity.job_uuid}];
      if (of_uuid == nullptr) {
        orphaned_jobs_.push_back(NewJob(identity.job));
        of_uuid = orphaned_jobs_.back().get();
        of_uuid->Abandon();
      }
      job = of_uuid;
    }
    Session* const raw = session.get();
    AddSession(std::move(session), *job);
    sessions_of[job].push_back(raw);
  }
  return sessions_of;
}

// At once, or late: what its trainers did meanwhile counts now.
void EngineImpl::JobRecovered(const Job& job) {
  std::vector<SessionId> dead;
  for (const auto& [id, entry] : sessions_) {
    if (entry.job != &job) continue;
    if (entry.died_unseen) dead.push_back(id);
    ReapLater(id);
  }
  for (const SessionId id : dead) ProcessDied(id);
}

}  // namespace holdfast
