#include "checkpoint/save_groups.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/kill_point.h"
#include "checkpoint/describe.h"
#include "format/manifest.h"

namespace holdfast {
namespace {

// Groups of which nothing is left but what became of them: kept for people.
constexpr size_t kFinishedGroupsKept = 64;

bool IsFinal(const SaveGroup& group) {
  return group.phase == SaveGroup::Phase::kCommitted || group.phase == SaveGroup::Phase::kFailed;
}

bool AllDurable(const SaveGroup& group) {
  return group.members.size() == group.world_size &&
         std::all_of(group.members.begin(), group.members.end(), [](const auto& entry) {
           return !entry.second.gone && !entry.second.durable_path.empty();
         });
}

bool HoldsMemory(const SaveGroup& group) {
  return std::any_of(group.members.begin(), group.members.end(),
                     [](const auto& entry) { return !entry.second.gone; });
}

absl::Status WithRank(const absl::Status& status, CheckpointId id, Rank rank) {
  return absl::Status(status.code(), absl::StrFormat("%s: rank %d: %s", Describe(id), Value(rank),
                                                     status.message()));
}

}  // namespace

bool SaveGroup::IsWhole() const {
  return sealed || (comparing && std::none_of(members.begin(), members.end(),
                                              [](const auto& entry) { return entry.second.gone; }));
}

const char* PhaseName(const SaveGroup& group) {
  switch (group.phase) {
    case SaveGroup::Phase::kOpen:
      return group.sealed ? "sealed" : group.comparing ? "comparing" : "open";
    case SaveGroup::Phase::kCommitting:
      return "committing";
    case SaveGroup::Phase::kCommitted:
      return "committed";
    case SaveGroup::Phase::kFailed:
      return "failed";
  }
  CHECK(false);
}

SaveGroups::SaveGroups(std::string job_directory, Host& host)
    : job_directory_(std::move(job_directory)), host_(host) {}

void SaveGroups::AddAttempt(Attempt attempt, uint32_t world_size) {
  const auto [entry, is_new] = attempts_.try_emplace(attempt);
  if (is_new) entry->second.world_size = world_size;
}

void SaveGroups::RankJoined(Attempt attempt, Rank rank) {
  attempts_.at(attempt).ended.erase(rank);
  attempts_.at(attempt).restored.erase(rank);
}

void SaveGroups::RankRestored(Attempt attempt, Rank rank) {
  attempts_.at(attempt).restored.insert(rank);
  Recycle();
}

void SaveGroups::RankEnded(Attempt attempt, Rank rank, const std::string& why) {
  attempts_.at(attempt).ended.try_emplace(rank, why);
  if (!recovering_) FailSkipped(attempt);
}

const SaveGroup* SaveGroups::Find(CheckpointId id) const {
  const auto found = groups_.find(id);
  return found == groups_.end() ? nullptr : &found->second;
}

size_t SaveGroups::pending_image_count() const {
  size_t count = 0;
  for (const auto& [id, group] : groups_) {
    if (IsFinal(group)) continue;
    for (const auto& [rank, member] : group.members) {
      // A durable image whose group waits for another rank needs nothing from this agent.
      const bool is_waiting = !member.durable_path.empty() && !AllDurable(group);
      if (!member.gone && !is_waiting) ++count;
    }
  }
  return count;
}

SaveGroup* SaveGroups::FindMember(ImageId image, SaveGroup::Member** member) {
  // Few groups hold memory at a time; newest first.
  for (auto group = groups_.rbegin(); group != groups_.rend(); ++group) {
    for (auto& [rank, candidate] : group->second.members) {
      if (candidate.image == image) {
        *member = &candidate;
        return &group->second;
      }
    }
  }
  return nullptr;
}

// ---- What images report ----

absl::Status SaveGroups::CheckMayBegin(const AttemptState& attempt, Rank rank,
                                       CheckpointId id) const {
  if (recovering_) return absl::OkStatus();
  if (!abandoned_.ok()) return abandoned_;
  if (attempt.fenced_by.has_value()) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "attempt %d is fenced by attempt %d", Value(id.attempt), Value(*attempt.fenced_by)));
  }
  const auto newest = attempt.newest_step.find(rank);
  if (newest != attempt.newest_step.end() && id.step <= newest->second) {
    return absl::AlreadyExistsError(
        absl::StrFormat("%s was saved or tried already by rank %d, whose newest is step %d: steps "
                        "of an attempt must grow",
                        Describe(id), Value(rank), Value(newest->second)));
  }
  for (const auto& [ended, why] : attempt.ended) {
    return absl::AbortedError(absl::StrFormat("%s cannot be complete: %s", Describe(id), why));
  }
  return absl::OkStatus();
}

void SaveGroups::OnCaptureBegun(ImageId id, Rank rank, CheckpointId checkpoint) {
  const auto known = attempts_.find(checkpoint.attempt);
  CHECK(known != attempts_.end());  // the Job adds an attempt before a session of it
  AttemptState& attempt = known->second;
  const absl::Status may_begin = CheckMayBegin(attempt, rank, checkpoint);
  Step& newest = attempt.newest_step.try_emplace(rank, checkpoint.step).first->second;
  newest = std::max(newest, checkpoint.step);
  if (!may_begin.ok()) {
    host_.Void(id, may_begin);
    if (!recovering_) FailSkipped(checkpoint.attempt);
    return;
  }

  SaveGroup& group = groups_[checkpoint];
  if (group.members.empty()) {
    group.id = checkpoint;
    group.world_size = attempt.world_size;
  }
  SaveGroup::Member& member = group.members[rank];
  if (member.image != ImageId{} && member.image != id) {
    // A trainer that saves a step twice in spite of the hook's refusal. Images that are void come
    // after those of use here, so that this never gives up a sealed one for a void one.
    host_.Void(id, absl::AlreadyExistsError(absl::StrFormat("rank %d has two images of %s",
                                                            Value(rank), Describe(checkpoint))));
    return;
  }
  member.image = id;
  if (group.phase == SaveGroup::Phase::kFailed) {
    ReleaseMembers(group);  // this one too: without it the others are of no use
  } else if (group.directory == SaveGroup::Directory::kNone) {
    group.directory = SaveGroup::Directory::kMaking;
    host_.MakeDirectory(checkpoint);
  } else if (group.directory == SaveGroup::Directory::kReady) {
    StartFlush(group, rank);
  }
  if (!recovering_) FailSkipped(checkpoint.attempt);
}

void SaveGroups::OnSealed(const SealedImage& image) {
  SaveGroup::Member* member = nullptr;
  SaveGroup* group = FindMember(image.id, &member);
  if (group == nullptr || member->gone) return;
  member->sealed = image;
  CheckSealed(*group);
}

void SaveGroups::CheckSealed(SaveGroup& group) {
  if (group.members.size() != group.world_size) return;
  for (const auto& [rank, member] : group.members) {
    if (member.gone || !member.sealed.has_value()) return;
  }
  if (const absl::Status together = host_.CheckMembers(group); !together.ok()) {
    Fail(group, together, Failure::kImages);
    return;
  }
  group.comparing = host_.CompareReplicas(group);
  if (!group.comparing) SetSealed(group);
}

void SaveGroups::SetSealed(SaveGroup& group) {
  group.sealed = true;
  host_.ReportSealed(group.id);
  Recycle();
}

void SaveGroups::ReplicasCompared(CheckpointId id, const absl::Status& status) {
  SaveGroup& group = groups_.at(id);
  CHECK(group.comparing && !group.sealed);
  const bool was_given_up = !group.IsWhole();
  group.comparing = false;
  if (was_given_up) {
    Recycle();
    return;
  }
  if (status.ok()) {
    SetSealed(group);
    CommitNext();
    return;
  }
  const absl::Status why(
      status.code(), absl::StrFormat("%s was not committed: %s", Describe(id), status.message()));
  if (group.phase == SaveGroup::Phase::kOpen) {
    Fail(group, why, Failure::kImages);
  } else {
    // Its storage has failed before, or is known to hold it: then it is committed, whatever became
    // of the images since. What is in memory is of no use.
    if (group.phase == SaveGroup::Phase::kCommitted) {
      host_.ReportMemoryUnusable(id, status);
    } else {
      host_.ReportFailed(id, why);
    }
    ReleaseMembers(group);
  }
  host_.ReportLost(id);  // a former worker may have called it committed
  Recycle();
  CommitNext();
}

void SaveGroups::OnDurable(ImageId id, const std::string& path) {
  SaveGroup::Member* member = nullptr;
  SaveGroup* group = FindMember(id, &member);
  if (group == nullptr || member->gone) return;
  member->durable_path = path;
  if (!recovering_) CommitNext();
}

void SaveGroups::OnVoid(ImageId id, Rank rank, CheckpointId checkpoint, absl::Status why,
                        Afterwards afterwards) {
  SaveGroup::Member* member = nullptr;
  SaveGroup* group = FindMember(id, &member);
  if (group == nullptr) return;  // it was refused at its beginning, or belongs to no group any more
  if (afterwards == Afterwards::kGone) {
    member->gone = true;
    Unseal(*group);
  }
  const Failure failure = afterwards == Afterwards::kGone ? Failure::kImages : Failure::kStorage;
  if (!IsFinal(*group)) {
    Fail(*group, WithRank(why, checkpoint, rank), failure);
  } else if (group->phase == SaveGroup::Phase::kFailed && failure == Failure::kImages) {
    ReleaseMembers(*group);  // it will never be whole
  }
  Recycle();
  CommitNext();
}

// ---- Failure ----

void SaveGroups::FailSkipped(Attempt attempt_id) {
  const AttemptState& attempt = attempts_.at(attempt_id);
  std::vector<std::pair<SaveGroup*, absl::Status>> failures;
  for (auto& [id, group] : groups_) {
    if (id.attempt != attempt_id || IsFinal(group)) continue;
    for (uint32_t number = 0; number < group.world_size; ++number) {
      const Rank rank{number};
      if (group.members.contains(rank)) continue;
      const auto newest = attempt.newest_step.find(rank);
      const auto ended = attempt.ended.find(rank);
      if (newest != attempt.newest_step.end() && newest->second > id.step) {
        failures.emplace_back(
            &group, absl::AbortedError(
                        absl::StrFormat("%s: rank %d saved step %d without having saved this step",
                                        Describe(id), number, Value(newest->second))));
      } else if (ended != attempt.ended.end()) {
        failures.emplace_back(
            &group, absl::AbortedError(
                        absl::StrFormat("%s cannot be complete: %s", Describe(id), ended->second)));
      } else {
        continue;
      }
      break;
    }
  }
  for (auto& [group, why] : failures) Fail(*group, why, Failure::kImages);
  if (!failures.empty()) {
    Recycle();
    CommitNext();
  }
}

void SaveGroups::Fail(SaveGroup& group, const absl::Status& why, Failure failure) {
  if (IsFinal(group)) return;
  CHECK(group.phase != SaveGroup::Phase::kCommitting);  // CommitEnded decides then
  group.phase = SaveGroup::Phase::kFailed;
  group.failure = why;
  host_.ReportFailed(group.id, why);
  if (failure == Failure::kImages) ReleaseMembers(group);
}

void SaveGroups::ReleaseMembers(SaveGroup& group) {
  for (auto& [rank, member] : group.members) {
    if (member.gone) continue;
    if (member.sealed.has_value()) {
      member.gone = true;
      host_.Release(member.image);
    } else {
      host_.Void(member.image, group.failure);  // OnVoid follows
    }
  }
  Unseal(group);
}

void SaveGroups::Unseal(SaveGroup& group) {
  if (!std::exchange(group.sealed, false)) return;
  if (group.phase != SaveGroup::Phase::kCommitted) host_.ReportLost(group.id);
}

void SaveGroups::FenceOlder(Attempt newest) {
  for (auto& [id, attempt] : attempts_) {
    if (id < newest && !attempt.fenced_by.has_value()) attempt.fenced_by = newest;
  }
  for (auto& [id, group] : groups_) {
    // What is being compared may be sealed in a moment: a decision waits for it.
    if (id.attempt >= newest || group.IsWhole() || IsFinal(group) ||
        group.phase == SaveGroup::Phase::kCommitting) {
      continue;
    }
    Fail(group,
         absl::FailedPreconditionError(
             absl::StrFormat("%s is fenced: attempt %d has begun", Describe(id), Value(newest))),
         Failure::kImages);
  }
  Recycle();
  CommitNext();
}

void SaveGroups::SettleFence(Attempt newest, std::optional<CheckpointId> restore_point) {
  settled_by_ = newest;
  settled_point_ = restore_point;
  for (auto& [id, group] : groups_) {
    // One that is committing waits in the host's queue, and is judged there.
    if (id.attempt >= newest || id == restore_point || IsFinal(group) ||
        group.phase == SaveGroup::Phase::kCommitting) {
      continue;
    }
    Fail(group,
         absl::FailedPreconditionError(
             absl::StrFormat("%s is fenced: attempt %d has begun from another checkpoint",
                             Describe(id), Value(newest))),
         group.reader_count == 0 ? Failure::kImages : Failure::kStorage);
  }
  Recycle();
  CommitNext();
}

void SaveGroups::Abandon(const absl::Status& why) {
  CHECK(!why.ok());
  abandoned_ = why;
  for (auto& [id, group] : groups_) {
    if (group.phase != SaveGroup::Phase::kOpen) continue;
    Fail(group, absl::Status(why.code(), absl::StrCat(Describe(id), ": ", why.message())),
         group.reader_count == 0 ? Failure::kImages : Failure::kStorage);
  }
  Recycle();
}

// ---- Storage ----

void SaveGroups::StartFlush(SaveGroup& group, Rank rank) {
  const SaveGroup::Member& member = group.members.at(rank);
  if (member.gone || !member.durable_path.empty()) return;
  host_.StartFlush(member.image,
                   absl::StrCat(job_directory_, "/", CheckpointDirectoryName(group.id), "/",
                                ImageFileName(rank)));
}

void SaveGroups::DirectoryMade(CheckpointId id, const absl::Status& status) {
  SaveGroup& group = groups_.at(id);
  if (!status.ok()) {
    group.directory = SaveGroup::Directory::kNone;
    // No image of it will be flushed, so those that are not sealed now are not waited for.
    Fail(group, status, group.IsWhole() ? Failure::kStorage : Failure::kImages);
    Recycle();
    CommitNext();
    return;
  }
  group.directory = SaveGroup::Directory::kReady;
  if (group.phase == SaveGroup::Phase::kFailed) return;
  for (const auto& [rank, member] : group.members) StartFlush(group, rank);
}

void SaveGroups::CommitNext() {
  if (recovering_) return;
  for (auto& [id, group] : groups_) {
    if (IsFinal(group)) continue;
    // The oldest that can still be committed; if it is not ready, newer ones wait.
    if (group.phase == SaveGroup::Phase::kOpen && group.sealed && AllDurable(group)) {
      group.phase = SaveGroup::Phase::kCommitting;
      host_.Commit(id);
    }
    return;
  }
}

void SaveGroups::CommitEnded(CheckpointId id, const absl::Status& status) {
  SaveGroup& group = groups_.at(id);
  CHECK(group.phase == SaveGroup::Phase::kCommitting);
  if (status.ok()) {
    group.phase = SaveGroup::Phase::kCommitted;
    host_.ReportCommitted(id);
    KillPoint("commit.reported");
  } else {
    group.phase = SaveGroup::Phase::kOpen;
    Fail(group,
         absl::Status(status.code(),
                      absl::StrFormat("%s was not committed: %s", Describe(id), status.message())),
         Failure::kStorage);
  }
  Recycle();
  CommitNext();
}

void SaveGroups::EndRecovery(const std::vector<CheckpointId>& committed, Attempt newest,
                             const std::optional<RestorePoint>& restore_point) {
  for (const CheckpointId id : committed) {
    const auto found = groups_.find(id);
    if (found == groups_.end()) continue;
    SaveGroup& group = found->second;
    if (group.phase != SaveGroup::Phase::kOpen) continue;
    group.phase = SaveGroup::Phase::kCommitted;
    host_.ReportCommitted(id);
    // Some ranks' images may have been given back already.
    if (!group.IsWhole()) ReleaseMembers(group);
  }
  FenceOlder(newest);
  if (restore_point.has_value()) SettleFence(newest, restore_point->checkpoint);
  recovering_ = false;
  std::vector<Attempt> attempts;
  for (const auto& [attempt, state] : attempts_) attempts.push_back(attempt);
  for (const Attempt attempt : attempts) FailSkipped(attempt);
  Recycle();
  CommitNext();
}

// ---- Recycling ----

bool SaveGroups::MayRelease(const SaveGroup& group, bool needs_room) const {
  if (!IsFinal(group) || group.reader_count > 0 || !HoldsMemory(group)) return false;
  if (!abandoned_.ok()) return true;
  const bool is_settled = settled_by_.has_value() && group.id.attempt < *settled_by_;
  // Nobody will ever start from it.
  if (is_settled && group.id != settled_point_) return true;
  // Only in memory, and all that there is of that state but the ranks' own: they save the next one.
  if (is_settled && needs_room && HasEveryRankItsState(attempts_.at(*settled_by_))) return true;
  // What is not on storage may be what the newest attempt is about to restore: it makes room only
  // for later saves of its own attempt.
  if (needs_room && (group.phase == SaveGroup::Phase::kCommitted ||
                     group.id.attempt == attempts_.rbegin()->first)) {
    return true;
  }
  for (auto newer = groups_.upper_bound(group.id); newer != groups_.end(); ++newer) {
    if (newer->second.sealed || newer->second.phase == SaveGroup::Phase::kCommitted) return true;
  }
  return false;
}

// Who saves has restored, or did not want to.
bool SaveGroups::HasEveryRankItsState(const AttemptState& attempt) const {
  for (uint32_t number = 0; number < attempt.world_size; ++number) {
    if (!attempt.restored.contains(Rank{number}) && !attempt.newest_step.contains(Rank{number})) {
      return false;
    }
  }
  return true;
}

void SaveGroups::Recycle() {
  if (recovering_) return;
  const bool needs_room = host_.NeedsRoom();
  for (auto& [id, group] : groups_) {
    if (!MayRelease(group, needs_room)) continue;
    ReleaseMembers(group);
  }
  Forget();
}

bool SaveGroups::ReleaseForRoom() {
  bool released = false;
  for (auto& [id, group] : groups_) {
    if (group.phase != SaveGroup::Phase::kCommitted || group.reader_count > 0 ||
        !HoldsMemory(group)) {
      continue;
    }
    ReleaseMembers(group);
    released = true;
  }
  return released;
}

void SaveGroups::Pin(CheckpointId id) {
  SaveGroup& group = groups_.at(id);
  CHECK(group.sealed);
  ++group.reader_count;
}

void SaveGroups::Unpin(CheckpointId id) {
  SaveGroup& group = groups_.at(id);
  CHECK(group.reader_count > 0);
  --group.reader_count;
  Recycle();
}

void SaveGroups::SessionGone(SessionId session) {
  bool failed = false;
  for (auto& [id, group] : groups_) {
    for (auto& [rank, member] : group.members) {
      if (member.image.session != session || member.gone) continue;
      member.gone = true;
      Unseal(group);
      if (IsFinal(group)) continue;
      Fail(group,
           absl::AbortedError(absl::StrFormat("%s: rank %d is gone", Describe(id), Value(rank))),
           Failure::kImages);
      failed = true;
    }
  }
  if (!failed) return;
  Recycle();
  CommitNext();
}

void SaveGroups::Forget() {
  size_t finished = 0;
  for (auto group = groups_.end(); group != groups_.begin();) {
    --group;
    const bool is_finished = IsFinal(group->second) && !HoldsMemory(group->second) &&
                             group->second.reader_count == 0 && !group->second.comparing &&
                             group->second.directory != SaveGroup::Directory::kMaking;
    if (is_finished && ++finished > kFinishedGroupsKept) group = groups_.erase(group);
  }
}

}  // namespace holdfast
