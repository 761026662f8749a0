// One job on this node: its attempts, who may join which, what each starts from, and fencing. What
// becomes of the saves is decided by its SaveGroups; the Job carries it out.
//
// Everything that touches the store or the directory of the job runs in one serial queue: one
// operation at a time, its blocking parts on the WorkPool. So in this agent a commit never races
// with the decision of a restore point. Between agents the link of MANIFEST.json decides
// (commit.h), by this order, which is Dekker's:
//   the old attempt   makes a checkpoint directory, THEN looks whether a newer attempt has begun
//   the new attempt   begins (in the store), THEN fences all unpublished directories that it finds
// so at least one of the two sees the other.
//
// Deciding the restore point of attempt n, once (job_restore.cc):
//   0. Replicas that are being compared are waited for: their group is sealed or void then. That
//      has no deadline of its own; hf_restore's ends the caller's wait. It is bounded by the work:
//      comparing sums, which are there as soon as an image is sealed; or, once after the death of a
//      worker, reading every block in memory that holds replicas, one pool job for each rank; and,
//      of replicas that differ, reading the first.
//   1. The catalog is read; the candidate is the newest of its branch, or a newer checkpoint that
//      all ranks of an older attempt have sealed in this agent's memory; where it was ordered
//      (SetRestoreOrder) that one, or none. If there is none, and the attempt was begun with a
//      checkpoint of another job to start from, it is that one.
//   2. Every directory of an older attempt without a manifest is fenced, but the candidate's.
//   3. The catalog is read again; another newest: from 1.
//   4. The point is recorded in the store; what was recorded before wins.
//   5. Images of older attempts that are not the point are void.
#ifndef HOLDFAST_CHECKPOINT_JOB_H_
#define HOLDFAST_CHECKPOINT_JOB_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/ids.h"
#include "checkpoint/catalog.h"
#include "checkpoint/coordination_store.h"
#include "checkpoint/engine.h"
#include "checkpoint/group_index.h"
#include "checkpoint/replica_vote.h"
#include "checkpoint/restore_source.h"
#include "checkpoint/save_groups.h"
#include "checkpoint/session.h"

namespace holdfast {

// Threads: the event loop's; callbacks run there, never inside the call that took them.
// Lifetime: the world outlives it; sessions are the engine's and announce their end.
class Job final : private SaveGroups::Host {
 public:
  struct Options {
    std::string root;
    std::string name;    // checked
    std::string writer;  // as PublishOptions::writer
    Caching caching = Caching::kDirect;
    uint64_t blobs_bytes_max = UINT64_MAX;               // as in EngineOptions
    std::function<void(const std::string&)> on_warning;  // may be empty
  };
  Job(Options options, const EngineWorld& world);
  ~Job() override;
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  struct Applicant {
    Rank rank{};
    uint32_t world_size = 0;
    std::string attempt_key;
    std::string restore_from = {};  // as OpenParameters::restore_from
    Attempt resume_attempt{};       // 0: a new open
    uint32_t process_id = 0;        // 0: unknown
  };
  struct Admission {
    Attempt attempt{};
    std::string job_uuid;
  };
  // Joins the newest attempt or begins the next one (then the older ones are fenced when `done`
  // runs). It begins one unless the newest has this key and world size, has an open rank, and was
  // never joined by this rank (but by this very process, which did not hear of it). A resume joins
  // the attempt that it names if that is still the newest. Errors: kFailedPrecondition (fenced),
  // kInvalidArgument (world size; another restore_from than the attempt's), kAborted (the directory
  // is another job's now, and this one is abandoned: ask a new Job), the store's and the file
  // system's.
  void Admit(Applicant applicant, std::function<void(absl::StatusOr<Admission>)> done);

  // In `done` of Admit: the rank's session. Starts it.
  void AddSession(Session& session);
  // Sessions that a former worker left, once, before anything else. `recovered` when they are
  // started and what they hold is known; `looked` after that, or after the first look at storage
  // that cannot be read: that is tried again until it can.
  void Recover(const std::vector<Session*>& sessions, std::function<void()> looked,
               std::function<void()> recovered);
  // Not OK: it is not recovered, and why: kDataLoss, or kUnavailable. Admissions are refused with
  // it, and nothing may be asked of its sessions.
  const absl::Status& recovery_error() const { return recovery_error_; }
  // Its restore has ended well.
  void SessionRestored(SessionId session);
  // Closed or dead: it saves nothing more. Call it in a later turn of the loop than the session's
  // own Close or ProcessDied, which may report captures that began before.
  void SessionEnded(SessionId session);
  // It is about to be destroyed.
  void RemoveSession(SessionId session);

  // The directory is another job's now (somebody removed it and began anew): its attempts are
  // fenced, it publishes nothing any more, and the memory of its images is given back.
  void Abandon();

  // Registrations of an attempt come in rounds, one for each change of the layout: a rank is in the
  // round after the last that it has finished; a registration of the layout that it has already
  // is of no new one. OK if the other ranks of the round have this layout and `copies`; else
  // kInvalidArgument with both ranks and the first difference. After OK call RegistrationEnded.
  absl::Status CheckLayout(SessionId session, std::shared_ptr<const Registration> registration);
  // It was made, or failed. The session may have ended.
  void RegistrationEnded(Attempt attempt, Rank rank, const absl::Status& status);

  // The attempt's restore point, deciding it if it is not yet. Errors: kDataLoss (the newest
  // checkpoint is damaged, or the branch cannot be told), kFailedPrecondition (all are marked bad;
  // fenced), the store's, those of FindForeignCheckpoint.
  void DecideRestorePoint(Attempt attempt, std::function<void(absl::StatusOr<RestorePoint>)> done);
  // kDataLoss: it is neither in memory nor on storage any more, or not readable.
  void OpenSource(const RestorePoint& point,
                  std::function<void(absl::StatusOr<std::shared_ptr<RestoreSource>>)> done);
  // As in Engine.
  void SetRestoreOrder(std::optional<RestoreOrder> order) { restore_order_ = std::move(order); }
  // What the attempt was begun with; empty if nothing, or if the attempt is unknown.
  std::string restore_from(Attempt attempt) const;
  // Nothing: not decided yet, or the attempt is unknown.
  std::optional<RestorePoint> restore_point(Attempt attempt) const;

  // As Engine::pending_image_count.
  size_t pending_image_count() const;
  SaveGroups& groups() { return groups_; }
  const SaveGroups& groups() const { return groups_; }
  const std::string& name() const { return options_.name; }
  const std::string& uuid() const { return uuid_; }  // empty before the first admission

  // For StatusJson.
  struct AttemptView {
    AttemptRecord record;
    bool newest = false;
    std::optional<RestorePoint> restore_point;
    std::map<Rank, SessionId> sessions;
  };
  std::vector<AttemptView> attempts() const;
  const std::set<CheckpointId>& committed() const { return committed_; }
  const std::deque<std::string>& warnings() const { return warnings_; }

 private:
  struct AttemptState {
    AttemptRecord record;
    std::map<Rank, SessionId> sessions;  // the newest of each rank that ever joined
    std::optional<RestorePoint> restore_point;
    struct Round {
      std::shared_ptr<const Registration> first;
      std::set<Rank> ranks;  // that have finished it, or are about to
    };
    std::vector<Round> rounds;
    std::map<Rank, size_t> rounds_finished;
  };
  struct Loaded;  // what the store and the root know
  struct Vote;    // a comparison of replicas

  // ---- The serial queue ----
  using Finish = std::function<void()>;
  void Enqueue(std::function<void(Finish finish)> operation);
  void StartNext();
  // Runs `work` on the pool, then `then` with its result on the loop, if this still lives.
  template <typename T>
  void OnPool(std::function<T()> work, std::function<void(T)> then);
  void Warn(std::string text);

  // ---- Admission (job.cc) ----
  void TryAdmit(Applicant applicant, int tries_left,
                std::function<void(absl::StatusOr<Admission>)> then);
  absl::StatusOr<bool> MayJoin(const std::optional<AttemptRecord>& newest,
                               const Applicant& applicant) const;
  absl::Status CheckSameOrigin(const AttemptRecord& newest, const Applicant& applicant) const;
  bool HasOpenRank(const AttemptState& attempt) const;
  bool AsksAgain(const AttemptState& attempt, const Applicant& applicant) const;
  void JoinNewest(const AttemptRecord& newest, std::function<void(absl::StatusOr<Admission>)> then);
  void BeginNext(const std::optional<AttemptRecord>& newest, Applicant applicant, int tries_left,
                 std::function<void(absl::StatusOr<Admission>)> then);
  void Fence(Attempt newest);
  absl::Status WasReplaced() const;
  AttemptState& AddAttempt(const AttemptRecord& record);
  static absl::StatusOr<Loaded> Load(const EngineWorld& world, const std::string& root,
                                     const std::string& job, const std::set<Attempt>& attempts);
  void TryRecover(std::function<void()> looked, std::function<void()> recovered);
  void StartRecovered(const Loaded& loaded, std::function<void()> then);
  Session* FindSession(SessionId id) const;
  RankImages* FindImages(ImageId id) const;
  void RaiseCommitted(Session& session) const;
  void ReportEarlierCommits(Session& session) const;
  void LowerCommitted(Attempt attempt) const;
  void RememberCommitted(const Catalog& catalog);

  // ---- Restore points (job_restore.cc) ----
  void RunDecision(Attempt attempt, bool from_nothing,
                   std::function<void(absl::StatusOr<RestorePoint>)> then);
  void LoadDecision(Attempt attempt, bool from_nothing,
                    std::function<void(absl::StatusOr<RestorePoint>)> then);
  void Propose(Attempt attempt, bool from_nothing, int tries_left,
               std::function<void(absl::StatusOr<RestorePoint>)> then);
  absl::StatusOr<RestorePoint> Choose(const Catalog& catalog, Attempt attempt) const;
  absl::StatusOr<RestorePoint> ChooseNewest(const Catalog& catalog, Attempt attempt) const;
  absl::StatusOr<RestorePoint> ChooseOrdered(const Catalog& catalog, Attempt attempt,
                                             CheckpointId ordered) const;
  void FenceAndRecord(Attempt attempt, bool from_nothing, int tries_left, const Catalog& catalog,
                      const RestorePoint& candidate,
                      std::function<void(absl::StatusOr<RestorePoint>)> then);
  void SetRestorePoint(Attempt attempt, const RestorePoint& point);
  std::vector<GroupPart> PartsOf(const SaveGroup& group) const;
  std::vector<std::optional<MemoryImage>> MemoryOf(const SaveGroup& group) const;
  void OpenOwnSource(CheckpointId id,
                     std::function<void(absl::StatusOr<std::shared_ptr<RestoreSource>>)> done);
  void OpenForeignSource(const ForeignCheckpoint& foreign,
                         std::function<void(absl::StatusOr<std::shared_ptr<RestoreSource>>)> done);
  absl::StatusOr<ReplicaHolder> HolderOf(const SaveGroup::Member& member) const;
  // One that another rank is using, if this may use it, too.
  std::shared_ptr<RestoreSource> SharedSource(const RestorePoint& point) const;
  void ShareSource(const RestorePoint& point, const std::shared_ptr<RestoreSource>& source);
  void MakeSource(CheckpointId id, bool in_memory, absl::StatusOr<Index> index,
                  std::string directory,
                  std::function<void(absl::StatusOr<std::shared_ptr<RestoreSource>>)> done);

  // ---- SaveGroups::Host (job_commit.cc) ----
  void StartFlush(ImageId image, const std::string& path) override;
  void Void(ImageId image, const absl::Status& why) override;
  void Release(ImageId image) override;
  void MakeDirectory(CheckpointId id) override;
  void Commit(CheckpointId id) override;
  absl::Status CheckMembers(const SaveGroup& group) override;
  bool CompareReplicas(const SaveGroup& group) override;
  void SumThenVote(const std::shared_ptr<Vote>& vote);
  void CountVote(const std::shared_ptr<Vote>& vote);
  void AfterComparisons(std::function<void()> then);  // at once if there are none
  void ReportSealed(CheckpointId id) override;
  void ReportCommitted(CheckpointId id) override;
  void ReportFailed(CheckpointId id, const absl::Status& why) override;
  void ReportLost(CheckpointId id) override { LowerCommitted(id.attempt); }
  void ReportMemoryUnusable(CheckpointId id, const absl::Status& why) override;
  bool NeedsRoom() override;
  void ForEachSession(Attempt attempt, const std::function<void(Session&)>& action) const;
  void RunCommit(CheckpointId id, Finish finish);
  void AddFingerprints(const SaveGroup& group, std::vector<GroupPart>& parts) const;
  absl::Status CheckMayCommit(CheckpointId id) const;

  const Options options_;
  const EngineWorld world_;
  const std::string directory_;  // <root>/<name>
  std::string uuid_;
  bool abandoned_ = false;
  std::map<RestorePoint, std::weak_ptr<RestoreSource>> sources_;  // in use
  absl::Status recovery_error_;
  std::optional<RestoreOrder> restore_order_;
  std::map<SessionId, Session*> sessions_;
  std::map<Attempt, AttemptState> attempts_;
  std::set<CheckpointId> committed_;  // on storage, as far as known here
  // Registrations whose pieces were proven to cover their layout: those of the last commit.
  std::vector<std::shared_ptr<const Registration>> covered_;
  std::deque<std::string> warnings_;
  std::deque<std::function<void(Finish)>> queue_;
  bool running_ = false;
  // Groups whose replicas are being compared, and who waits until none are.
  uint32_t comparing_count_ = 0;
  std::vector<std::function<void()>> after_comparisons_;
  SaveGroups groups_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_JOB_H_
