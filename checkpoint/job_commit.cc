// What SaveGroups asks of its Job: flushes, directories, commits, reports.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/kill_point.h"
#include "base/status_macros.h"
#include "checkpoint/block_sums.h"
#include "checkpoint/commit.h"
#include "checkpoint/describe.h"
#include "checkpoint/job_impl.h"
#include "checkpoint/publish.h"

namespace holdfast {
namespace {

// More than any chain of attempts that each committed nothing.
constexpr int kAncestorsMax = 1'000'000;

// The checkpoint before `id` on its branch that is committed on storage: of its own attempt, or
// what that attempt started from, or, if that was only ever in memory, what comes before it in
// turn.
absl::StatusOr<std::optional<CheckpointId>> FindParent(CoordinationStore& store,
                                                       const std::string& job,
                                                       const std::set<CheckpointId>& committed,
                                                       CheckpointId id) {
  for (int i = 0; i < kAncestorsMax; ++i) {
    auto before = committed.lower_bound(id);
    if (before != committed.begin() && (--before)->attempt == id.attempt) {
      return std::optional<CheckpointId>(*before);
    }
    const absl::StatusOr<RestorePoint> point = store.GetRestorePoint(job, id.attempt);
    if (point.status().code() == absl::StatusCode::kNotFound) return std::optional<CheckpointId>();
    RETURN_IF_ERROR(point.status());
    if (!point->checkpoint.has_value()) return std::optional<CheckpointId>();
    if (committed.contains(*point->checkpoint)) return point->checkpoint;
    if (point->checkpoint->attempt >= id.attempt) {
      return absl::DataLossError(absl::StrFormat("attempt %d of job %s has started from %s",
                                                 Value(id.attempt), job,
                                                 Describe(*point->checkpoint)));
    }
    id = *point->checkpoint;
  }
  return absl::DataLossError(
      absl::StrFormat("job %s: the chain of restore points has no end", job));
}

}  // namespace

void Job::StartFlush(ImageId image, const std::string& path) {
  if (RankImages* images = FindImages(image)) images->StartFlush(image, path);
}

void Job::Void(ImageId image, const absl::Status& why) {
  if (RankImages* images = FindImages(image)) images->Void(image, why);
}

void Job::Release(ImageId image) {
  if (RankImages* images = FindImages(image)) images->Release(image);
}

void Job::MakeDirectory(CheckpointId id) {
  struct Made {
    absl::Status status;
    Attempt newest{};
  };
  Enqueue([this, id](Finish finish) {
    OnPool<Made>(
        [file_system = &world_.file_system, store = &world_.store, root = options_.root,
         job = options_.name, uuid = uuid_, directory = directory_, id] {
          Made made;
          made.status = CheckSameJob(*file_system, root, job, uuid);
          if (!made.status.ok()) return made;
          made.status = EnsureDirectory(*file_system, directory, CheckpointDirectoryName(id));
          if (!made.status.ok()) return made;
          // After the directory is there, too: one that was there when the job was still this one
          // goes with it if somebody removes it.
          made.status = CheckSameJob(*file_system, root, job, uuid);
          if (!made.status.ok()) return made;
          // After the directory is there: see the order in job.h.
          const absl::StatusOr<AttemptRecord> newest = store->NewestAttempt(job);
          made.status = newest.status();
          if (newest.ok()) made.newest = newest->attempt;
          return made;
        },
        [this, id, finish = std::move(finish)](Made made) {
          if (made.status.ok() && made.newest > attempts_.rbegin()->first) {
            made.status = absl::FailedPreconditionError(absl::StrFormat(
                "%s is fenced: attempt %d has begun elsewhere", Describe(id), Value(made.newest)));
          }
          if (made.status.ok()) KillPoint("commit.directory_created");
          groups_.DirectoryMade(id, made.status);
          finish();
        });
  });
}

absl::Status Job::CheckMembers(const SaveGroup& group) {
  std::shared_ptr<const Registration> first;
  uint64_t blobs_bytes = 0;  // cannot overflow: they are in memory
  for (const auto& [rank, member] : group.members) {
    const Session* session = FindSession(member.image.session);
    const std::shared_ptr<const Registration> registration =
        session == nullptr ? nullptr : session->registration_of(member.image);
    if (registration == nullptr) {
      return absl::InternalError(
          absl::StrFormat("%s: rank %d has no registration", Describe(group.id), Value(rank)));
    }
    if (first == nullptr) first = registration;
    RETURN_IF_ERROR(CheckRegisteredAlike(*first, *registration));
    for (const uint64_t bytes : member.sealed->blob_bytes) {
      if (bytes != kBlobAbsent) blobs_bytes += bytes;
    }
  }
  // Whoever restores gets them all, in memory.
  if (blobs_bytes > options_.blobs_bytes_max) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("%s: the blobs of all ranks have %d bytes together, at most %d can be "
                        "restored",
                        Describe(group.id), blobs_bytes, options_.blobs_bytes_max));
  }
  return absl::OkStatus();
}

// ---- Replicas ----

absl::StatusOr<ReplicaHolder> Job::HolderOf(const SaveGroup::Member& member) const {
  const Session* session = FindSession(member.image.session);
  const RankImages* images = FindImages(member.image);
  ReplicaHolder holder;
  holder.registration = session->registration_of(member.image);
  holder.sums = images->ReplicaSums(member.image);
  holder.mapping = session->memory_of(member.image)->mapping();
  for (uint32_t block = 0; block < holder.registration->slot_block_count(); ++block) {
    ASSIGN_OR_RETURN(const RankImages::BlockView view, images->Block(member.image, block));
    holder.blocks.push_back(view.bytes);
    holder.block_crc32c.push_back(view.crc32c);
  }
  return holder;
}

// One comparison of a group's replicas.
struct Job::Vote {
  CheckpointId id;
  // Each is a pool job's while that takes its sums, and all are the vote's afterwards.
  std::vector<ReplicaHolder> holders;
  size_t summing_count = 0;
  // Not OK: an image became void a moment ago, which is about to be reported; or sums cannot be
  // taken.
  absl::Status status;
};

bool Job::CompareReplicas(const SaveGroup& group) {
  const bool has_replicas =
      std::any_of(group.members.begin(), group.members.end(), [this](const auto& entry) {
        const Session* session = FindSession(entry.second.image.session);
        return !session->registration_of(entry.second.image)->replicas().replicas.empty();
      });
  if (!has_replicas) return false;
  const auto vote = std::make_shared<Vote>();
  vote->id = group.id;
  for (const auto& [rank, member] : group.members) {
    absl::StatusOr<ReplicaHolder> holder = HolderOf(member);
    vote->status.Update(holder.status());
    if (holder.ok()) vote->holders.push_back(*std::move(holder));
  }
  ++comparing_count_;
  SumThenVote(vote);
  return true;
}

// What a former worker has captured has no sums: every rank's are taken by a job of its own.
void Job::SumThenVote(const std::shared_ptr<Vote>& vote) {
  std::vector<uint32_t> unknown;
  for (uint32_t rank = 0; vote->status.ok() && rank < vote->holders.size(); ++rank) {
    if (!vote->holders[rank].sums.has_value()) unknown.push_back(rank);
  }
  vote->summing_count = unknown.size();
  for (const uint32_t rank : unknown) {
    OnPool<absl::Status>([vote, rank] { return TakeSums(Rank{rank}, vote->holders[rank]); },
                         [this, vote](const absl::Status& status) {
                           vote->status.Update(status);
                           if (--vote->summing_count == 0) CountVote(vote);
                         });
  }
  if (unknown.empty()) CountVote(vote);
}

void Job::CountVote(const std::shared_ptr<Vote>& vote) {
  OnPool<absl::Status>(
      [vote] { return vote->status.ok() ? VoteOnReplicas(vote->holders) : vote->status; },
      [this, id = vote->id](const absl::Status& status) {
        groups_.ReplicasCompared(id, status);
        if (--comparing_count_ > 0) return;
        for (const auto& then : std::exchange(after_comparisons_, {})) then();
      });
}

void Job::AfterComparisons(std::function<void()> then) {
  if (comparing_count_ == 0) {
    then();
  } else {
    after_comparisons_.push_back(std::move(then));
  }
}

// ---- Commit ----

absl::Status Job::CheckMayCommit(CheckpointId id) const {
  if (abandoned_) return WasReplaced();
  const auto& [newest, attempt] = *attempts_.rbegin();
  // Until the newest attempt has decided where it starts, what the older ones have sealed may
  // still become that.
  if (id.attempt == newest || !attempt.restore_point.has_value() ||
      attempt.restore_point->checkpoint == id) {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(
      absl::StrFormat("attempt %d has begun from another checkpoint", Value(newest)));
}

void Job::Commit(CheckpointId id) {
  Enqueue([this, id](Finish finish) {
    if (absl::Status may = CheckMayCommit(id); !may.ok()) {
      groups_.CommitEnded(id, may);
      finish();
      return;
    }
    const auto& [newest, attempt] = *attempts_.rbegin();
    if (id.attempt != newest || attempt.restore_point.has_value()) {
      RunCommit(id, std::move(finish));
      return;
    }
    // Its ranks have saved without ever having asked for a checkpoint: it began from nothing.
    RunDecision(newest, /*from_nothing=*/true,
                [this, id, finish = std::move(finish)](absl::StatusOr<RestorePoint> point) {
                  if (point.ok()) {
                    RunCommit(id, finish);
                    return;
                  }
                  groups_.CommitEnded(id, point.status());
                  finish();
                });
  });
}

void Job::AddFingerprints(const SaveGroup& group, std::vector<GroupPart>& parts) const {
  size_t i = 0;
  for (const auto& [rank, member] : group.members) {
    if (const RankImages* images = FindImages(member.image)) {
      parts[i].fingerprints = images->Fingerprints(member.image);
    }
    ++i;
  }
}

void Job::RunCommit(CheckpointId id, Finish finish) {
  const SaveGroup& group = *groups_.Find(id);
  std::vector<GroupPart> parts = PartsOf(group);
  AddFingerprints(group, parts);
  // What became durable under a former worker is summed from memory.
  std::vector<std::optional<MemoryImage>> memory(parts.size());
  if (std::any_of(parts.begin(), parts.end(),
                  [](const GroupPart& part) { return !part.fingerprints.has_value(); })) {
    memory = MemoryOf(group);
  }
  std::vector<std::shared_ptr<const Registration>> registrations;
  for (const GroupPart& part : parts) registrations.push_back(part.registration);
  const bool is_covered = registrations == covered_;
  CommitRequest request;
  request.job_directory = directory_;
  request.writer = options_.writer;
  request.created_at = absl::FromUnixSeconds(absl::ToUnixSeconds(world_.clock.WallTime()));
  OnPool<absl::Status>(
      [file_system = &world_.file_system, store = &world_.store, root = options_.root,
       job = options_.name, uuid = uuid_, committed = committed_, id, parts,
       memory = std::move(memory), is_covered, request]() mutable -> absl::Status {
        RETURN_IF_ERROR(CheckSameJob(*file_system, root, job, uuid));
        ASSIGN_OR_RETURN(request.parent, FindParent(*store, job, committed, id));
        for (size_t i = 0; i < parts.size(); ++i) {
          if (parts[i].fingerprints.has_value() || !memory[i].has_value()) continue;
          parts[i].fingerprints =
              SumImage(*parts[i].registration, memory[i]->blocks, parts[i].image.block_crc32c);
        }
        ASSIGN_OR_RETURN(const Index index, BuildIndex(id, parts));
        if (!is_covered) RETURN_IF_ERROR(CheckIndexCover(index));
        return CommitCheckpoint(*file_system, request, index);
      },
      [this, id, registrations = std::move(registrations),
       finish = std::move(finish)](absl::Status status) {
        if (status.ok()) {
          covered_ = registrations;
          committed_.insert(id);
        }
        groups_.CommitEnded(id, status);
        finish();
      });
}

// ---- Reports ----

void Job::ForEachSession(Attempt attempt, const std::function<void(Session&)>& action) const {
  const auto known = attempts_.find(attempt);
  if (known == attempts_.end()) return;  // nobody is in it any more
  for (const auto& [rank, id] : known->second.sessions) {
    Session* session = FindSession(id);
    if (session != nullptr) action(*session);
  }
}

void Job::ReportSealed(CheckpointId id) {
  ForEachSession(id.attempt, [&](Session& session) {
    session.reports().SetCommitted(id.step, Survives::kProcess, world_.clock.Elapsed());
  });
}

void Job::ReportCommitted(CheckpointId id) {
  ForEachSession(id.attempt, [&](Session& session) {
    session.reports().SetCommitted(id.step, Survives::kProcess, world_.clock.Elapsed());
    session.reports().SetCommitted(id.step, Survives::kPower, world_.clock.Elapsed());
  });
}

void Job::ReportFailed(CheckpointId id, const absl::Status& why) {
  Warn(std::string(why.message()));
  ForEachSession(id.attempt, [&](Session& session) { session.reports().SetFailed(id.step, why); });
}

void Job::ReportMemoryUnusable(CheckpointId id, const absl::Status& why) {
  Warn(absl::StrFormat("the copies in memory of %s, which is committed, are given back: %s",
                       Describe(id), why.message()));
}

void Job::LowerCommitted(Attempt attempt) const {
  std::optional<Step> newest;
  for (const CheckpointId id : committed_) {
    if (id.attempt == attempt) newest = std::max(newest, std::optional(id.step));
  }
  for (const auto& [id, group] : groups_.groups()) {
    if (id.attempt == attempt && group.sealed) newest = std::max(newest, std::optional(id.step));
  }
  ForEachSession(attempt, [&](Session& session) { session.reports().LowerCommitted(newest); });
}

bool Job::NeedsRoom() {
  if (attempts_.empty()) return false;
  bool needs_room = false;
  ForEachSession(attempts_.rbegin()->first, [&](Session& session) {
    const RankImages* images = session.current_images();
    if (!session.is_open() || images == nullptr || !images->IsStarved()) return;
    for (const RankImages::Counters& image : images->counters()) {
      if (image.state == "granted" || image.state == "capturing") return;
    }
    // Blocks that are lent to a restore come back.
    const RankMemory* memory = session.memory(session.current_registration_id());
    if (memory->pool().count(BlockState::kStaging) == 0) needs_room = true;
  });
  return needs_room;
}

}  // namespace holdfast
