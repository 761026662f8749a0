// The engine as a whole: sessions, jobs, restores, and who owns what. Decides little itself: Job
// decides about attempts and groups, Session about one process.
#ifndef HOLDFAST_CHECKPOINT_ENGINE_IMPL_H_
#define HOLDFAST_CHECKPOINT_ENGINE_IMPL_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/catalog.h"
#include "checkpoint/engine.h"
#include "checkpoint/job.h"
#include "checkpoint/memory_budget.h"
#include "checkpoint/rank_memory.h"
#include "checkpoint/restore.h"
#include "checkpoint/session.h"
#include "io/unique_fd.h"

namespace holdfast {

class EngineImpl final : public Engine {
 public:
  // `options` are checked and complete.
  EngineImpl(EngineOptions options, const EngineWorld& world);
  ~EngineImpl() override;

  void Recover(std::vector<KeptDescriptor> kept, std::function<void()> done) override;
  void Open(OpenParameters parameters,
            std::function<void(absl::StatusOr<OpenResult>)> done) override;
  void Register(SessionId session, UniqueFd document, uint64_t document_bytes,
                std::function<void(absl::StatusOr<RegisterResult>)> done) override;
  void Restore(SessionId session, uint64_t registration_id, RestoreSelection selection,
               std::function<void(absl::StatusOr<RestoreBegun>)> begun,
               std::function<void(absl::StatusOr<RestoreEnded>)> ended) override;
  void SetRestoreOrder(const std::string& job, std::optional<RestoreOrder> order) override;
  void ReadCheckpoints(
      const std::string& job,
      std::function<void(absl::StatusOr<std::vector<KnownCheckpoint>>)> done) override;
  void CancelRestore(SessionId session) override;
  void Doorbell(SessionId session) override;
  void Close(SessionId session) override;
  void ProcessDied(SessionId session) override;
  int process_fd(SessionId session) const override;
  int doorbell_fd(SessionId session) const override;
  std::vector<SessionId> sessions() const override;
  std::vector<MeshAxis> MeshOf(const std::string& job) const override;
  size_t open_session_count() const override;
  std::vector<OpenSession> open_sessions() const override;
  size_t pending_image_count() const override;
  std::vector<UncommittedSave> uncommitted_saves() const override;
  Activity ActivityOf(const std::string& job, const std::string& attempt_key) const override;
  std::vector<RankProgress> ProgressOf(const std::string& job,
                                       const std::string& attempt_key) const override;
  absl::StatusOr<Step> MakeDue(const std::string& job, const std::string& attempt_key) override;
  std::string StatusJson() const override;

 private:
  struct Entry {
    std::unique_ptr<Session> session;
    Job* job = nullptr;
    UniqueFd doorbell_fd;
    // The last one is the current one; the others are over, and wait for what is in flight.
    std::vector<std::unique_ptr<holdfast::Restore>> restores;
    uint64_t restore_number = 0;  // of the newest; changes when one is asked for, left or cancelled
    bool died_unseen = false;     // while its job was not recovered
  };
  using Begun = holdfast::Restore::Begun;
  using Ended = holdfast::Restore::Ended;

  void Warn(std::string text);
  void JobRecovered(const Job& job);
  // OK if the session is open and its job recovered.
  absl::Status CheckServed(const Entry* entry) const;
  absl::Status CheckOpen(const OpenParameters& parameters) const;
  absl::Status CheckRestoreFrom(const OpenParameters& parameters) const;
  // Goes on with a session that this engine knows. False: it does not.
  bool Resume(OpenParameters& parameters,
              const std::function<void(absl::StatusOr<OpenResult>)>& done);
  void OpenNew(OpenParameters parameters, std::function<void(absl::StatusOr<OpenResult>)> done);
  void Admit(const std::shared_ptr<OpenParameters>& parameters,
             std::function<void(absl::StatusOr<OpenResult>)> done);
  absl::StatusOr<OpenResult> MakeSession(OpenParameters& parameters, Job& job,
                                         const Job::Admission& admission);
  OpenResult ResultOf(Session& session, bool resumed) const;
  std::unique_ptr<Job> NewJob(const std::string& name) const;
  Job& JobOf(const std::string& name);
  std::map<Job*, std::vector<Session*>> AdoptSessions(
      std::vector<std::unique_ptr<Session>> sessions);
  Entry& AddSession(std::unique_ptr<Session> session, Job& job);
  void MakeRegistration(SessionId id, int tries_left,
                        std::function<void(absl::StatusOr<RegisterResult>)> done);
  // A restore that is being opened: the session, or nullptr if it was left or replaced meanwhile
  // (then `begun` was told so) or is gone.
  struct Opening {
    SessionId session{};
    uint64_t registration_id = 0;
    uint64_t number = 0;
    RestoreSelection selection = {};
    RestoreFrom restore_from = RestoreFrom::kNotGiven;
  };
  Entry* FindOpening(const Opening& opening, Begun& begun);
  static absl::Status NothingToRestore(const Entry& entry);
  void OpenSource(Opening opening, const RestorePoint& point, Begun begun, Ended ended);
  void StartRestore(Opening opening, absl::StatusOr<std::shared_ptr<RestoreSource>> source,
                    Begun begun, Ended ended);
  void CancelRestores(Entry& entry, const absl::Status& why, holdfast::Restore::Report report);
  void SessionEnded(SessionId id);
  // Destroys the session if nothing of it is left; looks again later if something is in flight.
  void ReapLater(SessionId id);
  void Reap(SessionId id);
  std::vector<KnownCheckpoint> KnownCheckpoints(const std::string& name,
                                                const Catalog& catalog) const;
  Entry* Find(SessionId id);
  const Entry* Find(SessionId id) const;

  const EngineOptions options_;
  const EngineWorld world_;
  MemoryBudget budget_;
  RankMemories memories_;
  const SessionWorld session_world_;
  uint64_t next_session_id_;
  std::vector<std::string> warnings_;
  std::map<std::string, std::unique_ptr<Job>> jobs_;    // outlive their sessions
  std::map<std::string, RestoreOrder> restore_orders_;  // by job
  // Their directories were replaced. They stay, for their sessions and whoever waits in a queue.
  std::vector<std::unique_ptr<Job>> orphaned_jobs_;
  std::map<SessionId, Entry> sessions_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_ENGINE_IMPL_H_
