// The saves of a job: for each (attempt, step) the group of all ranks' images, from the first rank
// that captures, over the two commits, to the day when the blocks are given back. It decides; what
// is to be done it asks of its host, the Job. No I/O, no clock, no thread of its own.
//
// Life of a group:
//   open        some ranks capture or flush
//   comparing   every rank's image is in memory and has its checksums, and the host compares the
//               replicas in them, if there are any. A difference fails the group, and gives its
//               images back: nobody shall restore one of two truths
//   sealed      that, and no replica differs: committed for `process`
//   committing  every rank's image is durable on storage, by identity: the host publishes
//   committed   for `power`
//   failed      a rank voided its image, ended, or saved a newer step; or storage failed. It is
//               reported on every rank, with the rank that it was. A group that was sealed before
//               stays in memory all the same, and can be restored.
//
// Commits go in the order of (attempt, step): a newer group waits for an older one that can still
// be committed. So a checkpoint's parent is known when it is committed, and "newest" never goes
// back.
//
// Blocks are given back (recycling) when the group is committed or failed, nobody reads it, and
//   a newer checkpoint is committed, or a newer group is sealed, or the ranks have no room for
//   another image, or it is of an older attempt and the newest has started from another. What the
//   newest has started from, and is not on storage, makes room only when all its ranks have it.
#ifndef HOLDFAST_CHECKPOINT_SAVE_GROUPS_H_
#define HOLDFAST_CHECKPOINT_SAVE_GROUPS_H_

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "base/ids.h"
#include "checkpoint/coordination_store.h"
#include "checkpoint/image_events.h"

namespace holdfast {

struct SaveGroup {
  enum class Phase { kOpen, kCommitting, kCommitted, kFailed };
  enum class Directory { kNone, kMaking, kReady };
  struct Member {
    ImageId image;
    std::optional<SealedImage> sealed;
    std::string durable_path;  // not empty: the image is durable there
    bool gone = false;         // void, released, or its session is
  };

  CheckpointId id;
  uint32_t world_size = 0;
  std::map<Rank, Member> members;
  Phase phase = Phase::kOpen;
  Directory directory = Directory::kNone;
  bool comparing = false;  // the host compares the replicas in the images
  bool sealed = false;     // all ranks' images are sealed, agree, and are still in memory
  absl::Status failure;
  uint32_t reader_count = 0;

  // Sealed, or about to be if the replicas agree (as they did if a former worker has called it
  // committed).
  bool IsWhole() const;
};

// "open", "comparing", "sealed", "committing", "committed", "failed"
const char* PhaseName(const SaveGroup& group);

// Threads: the event loop's. Lifetime: the host outlives it.
class SaveGroups final : public ImageObserver {
 public:
  class Host {
   public:
    virtual ~Host() = default;
    // As in RankImages; ignored if the image is unknown.
    virtual void StartFlush(ImageId image, const std::string& path) = 0;
    virtual void Void(ImageId image, const absl::Status& why) = 0;
    virtual void Release(ImageId image) = 0;
    // Answers later with DirectoryMade.
    virtual void MakeDirectory(CheckpointId id) = 0;
    // Answers later with CommitEnded. One at a time.
    virtual void Commit(CheckpointId id) = 0;
    // OK if the images of all ranks belong together: one layout, one `copies`, and blobs that can
    // be restored. Asked before the group is sealed.
    virtual absl::Status CheckMembers(const SaveGroup& group) = 0;
    // Whether ranks hold copies to be compared with each other: then answers later with
    // ReplicasCompared, though the images may be released meanwhile.
    virtual bool CompareReplicas(const SaveGroup& group) = 0;
    // To all ranks of the attempt.
    virtual void ReportSealed(CheckpointId id) = 0;
    virtual void ReportCommitted(CheckpointId id) = 0;
    virtual void ReportFailed(CheckpointId id, const absl::Status& why) = 0;
    // It was sealed, and is neither in memory any more nor committed.
    virtual void ReportLost(CheckpointId id) = 0;
    // It is committed, and stays so; its images in memory are given back. For people alone.
    virtual void ReportMemoryUnusable(CheckpointId id, const absl::Status& why) = 0;
    // Whether an open rank of the newest attempt can begin no save, because its memory is full.
    virtual bool NeedsRoom() = 0;
  };
  // `job_directory`: <root>/<job>.
  SaveGroups(std::string job_directory, Host& host);

  // An attempt whose images will be reported. Again: ignored.
  void AddAttempt(Attempt attempt, uint32_t world_size);
  // A rank will save nothing more in this attempt: what waits for it fails. `why` says what became
  // of it ("rank 3 is dead").
  void RankEnded(Attempt attempt, Rank rank, const std::string& why);
  void RankJoined(Attempt attempt, Rank rank);
  // It has all of its attempt's restore point in its own memory.
  void RankRestored(Attempt attempt, Rank rank);

  // A newer attempt has begun: what the older ones have not sealed is void. Sealed groups go on.
  void FenceOlder(Attempt newest);
  // Its restore point is decided: of the older attempts' uncommitted groups only that one goes on.
  void SettleFence(Attempt newest, std::optional<CheckpointId> restore_point);

  // The directory is another job's now: nothing is published any more, and what nobody reads is
  // given back, now and later.
  void Abandon(const absl::Status& why);

  // Images reported between these are those of a former worker, in no order. `committed` are the
  // checkpoints that storage holds, `newest` the newest attempt, `restore_point` its, if decided.
  void BeginRecovery() { recovering_ = true; }
  void EndRecovery(const std::vector<CheckpointId>& committed, Attempt newest,
                   const std::optional<RestorePoint>& restore_point);

  // Answers of the host.
  void DirectoryMade(CheckpointId id, const absl::Status& status);
  void ReplicasCompared(CheckpointId id, const absl::Status& status);
  void CommitEnded(CheckpointId id, const absl::Status& status);
  // The session is about to be destroyed, its images with it.
  void SessionGone(SessionId session);

  // Releases every committed group that nobody reads. False: there was none.
  bool ReleaseForRoom();
  // What can be given back now is. Called by itself after each event; call it when NeedsRoom()
  // may have changed.
  void Recycle();

  // A sealed group cannot be given back while it is pinned. CHECKs that it is sealed.
  void Pin(CheckpointId id);
  void Unpin(CheckpointId id);

  // Images whose group is not committed yet and can be.
  size_t pending_image_count() const;

  const SaveGroup* Find(CheckpointId id) const;  // nullptr if unknown
  const std::map<CheckpointId, SaveGroup>& groups() const { return groups_; }

  // ImageObserver
  void OnCaptureBegun(ImageId id, Rank rank, CheckpointId checkpoint) override;
  void OnSealed(const SealedImage& image) override;
  void OnDurable(ImageId id, const std::string& path) override;
  void OnVoid(ImageId id, Rank rank, CheckpointId checkpoint, absl::Status why,
              Afterwards afterwards) override;

 private:
  struct AttemptState {
    uint32_t world_size = 0;
    std::map<Rank, std::string> ended;  // why
    std::map<Rank, Step> newest_step;   // that the rank has begun to save
    std::optional<Attempt> fenced_by;
    std::set<Rank> restored;
  };
  SaveGroup* FindMember(ImageId image, SaveGroup::Member** member);
  absl::Status CheckMayBegin(const AttemptState& attempt, Rank rank, CheckpointId id) const;
  // Fails groups of the attempt that wait for a rank that has saved a newer step or has ended.
  void FailSkipped(Attempt attempt);
  // kImages: nothing of it is of use, all images are given back. kStorage: the images can still be
  // (or become) complete in memory.
  enum class Failure { kImages, kStorage };
  void Fail(SaveGroup& group, const absl::Status& why, Failure failure);
  void ReleaseMembers(SaveGroup& group);
  void Unseal(SaveGroup& group);
  void StartFlush(SaveGroup& group, Rank rank);
  void CheckSealed(SaveGroup& group);
  void SetSealed(SaveGroup& group);
  void CommitNext();
  bool MayRelease(const SaveGroup& group, bool needs_room) const;
  bool HasEveryRankItsState(const AttemptState& attempt) const;
  void Forget();

  const std::string job_directory_;
  Host& host_;
  std::map<Attempt, AttemptState> attempts_;
  std::map<CheckpointId, SaveGroup> groups_;
  // The newest attempt whose restore point is decided, and that.
  std::optional<Attempt> settled_by_;
  std::optional<CheckpointId> settled_point_;
  bool recovering_ = false;
  absl::Status abandoned_;  // not OK: why
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_SAVE_GROUPS_H_
