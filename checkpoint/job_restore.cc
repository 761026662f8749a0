// Restore points: which checkpoint an attempt starts from, and where its bytes are.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/kill_point.h"
#include "base/status_macros.h"
#include "checkpoint/commit.h"
#include "checkpoint/describe.h"
#include "checkpoint/foreign_checkpoint.h"
#include "checkpoint/job_impl.h"
#include "checkpoint/verify.h"

namespace holdfast {
namespace {

// How often a decision begins anew because an older attempt has committed meanwhile. Each of those
// commits was of one of its last few saves.
constexpr int kDecisionTries = 16;

// Step 2: nothing that is not committed now will be, but `spared`.
absl::Status FenceDirectories(FileSystem& file_system, const std::string& job_directory,
                              const std::string& writer, const Catalog& catalog,
                              const std::optional<CheckpointId>& spared, Attempt fenced_by) {
  for (const CatalogEntry& entry : catalog.entries) {
    if (entry.state != CatalogEntry::State::kIncomplete || entry.id.attempt >= fenced_by ||
        entry.id == spared) {
      continue;
    }
    const absl::Status fenced =
        FenceCheckpoint(file_system, job_directory, writer, entry.id, fenced_by);
    // Committed meanwhile: the second look at the catalog sees it.
    if (!fenced.ok() && fenced.code() != absl::StatusCode::kAlreadyExists) return fenced;
  }
  return absl::OkStatus();
}

}  // namespace

void Job::DecideRestorePoint(Attempt attempt,
                             std::function<void(absl::StatusOr<RestorePoint>)> done) {
  Enqueue([this, attempt, done = std::move(done)](Finish finish) {
    RunDecision(attempt, /*from_nothing=*/false,
                [done, finish = std::move(finish)](absl::StatusOr<RestorePoint> point) {
                  done(std::move(point));
                  finish();
                });
  });
}

void Job::RunDecision(Attempt attempt, bool from_nothing,
                      std::function<void(absl::StatusOr<RestorePoint>)> then) {
  if (abandoned_) {
    then(WasReplaced());
    return;
  }
  // Step 0.
  AfterComparisons([this, attempt, from_nothing, then = std::move(then)] {
    LoadDecision(attempt, from_nothing, then);
  });
}

void Job::LoadDecision(Attempt attempt, bool from_nothing,
                       std::function<void(absl::StatusOr<RestorePoint>)> then) {
  const auto known = attempts_.find(attempt);
  if (known != attempts_.end() && known->second.restore_point.has_value()) {
    then(*known->second.restore_point);
    return;
  }
  if (known == attempts_.end() || attempt != attempts_.rbegin()->first) {
    then(absl::FailedPreconditionError(
        absl::StrFormat("attempt %d of job %s is fenced", Value(attempt), options_.name)));
    return;
  }
  OnPool<absl::StatusOr<RestorePoint>>(
      [file_system = &world_.file_system, store = &world_.store, root = options_.root,
       job = options_.name, uuid = uuid_, attempt]() -> absl::StatusOr<RestorePoint> {
        RETURN_IF_ERROR(CheckSameJob(*file_system, root, job, uuid));
        return store->GetRestorePoint(job, attempt);
      },
      [this, attempt, from_nothing,
       then = std::move(then)](absl::StatusOr<RestorePoint> recorded) mutable {
        if (recorded.ok()) {
          SetRestorePoint(attempt, *recorded);
          then(*recorded);
        } else if (recorded.status().code() == absl::StatusCode::kNotFound) {
          Propose(attempt, from_nothing, kDecisionTries, std::move(then));
        } else {
          then(recorded.status());
        }
      });
}

// Step 1.
void Job::Propose(Attempt attempt, bool from_nothing, int tries_left,
                  std::function<void(absl::StatusOr<RestorePoint>)> then) {
  OnPool<absl::StatusOr<Catalog>>(
      [file_system = &world_.file_system, root = options_.root, job = options_.name] {
        return ReadCatalog(*file_system, root, job);
      },
      [this, attempt, from_nothing, tries_left,
       then = std::move(then)](absl::StatusOr<Catalog> catalog) mutable {
        if (!catalog.ok()) {
          then(catalog.status());
          return;
        }
        if (catalog->job.job_uuid != uuid_) {
          then(WasReplaced());
          return;
        }
        RememberCommitted(*catalog);
        absl::StatusOr<RestorePoint> candidate =
            from_nothing ? RestorePoint{} : Choose(*catalog, attempt);
        if (!candidate.ok()) {
          then(candidate.status());
          return;
        }
        FenceAndRecord(attempt, from_nothing, tries_left, *catalog, *candidate, std::move(then));
      });
}

absl::StatusOr<RestorePoint> Job::Choose(const Catalog& catalog, Attempt attempt) const {
  if (!restore_order_.has_value() ||
      restore_order_->attempt_key != attempts_.at(attempt).record.key) {
    return ChooseNewest(catalog, attempt);
  }
  if (!restore_order_->checkpoint.has_value()) return RestorePoint{};
  return ChooseOrdered(catalog, attempt, *restore_order_->checkpoint);
}

absl::StatusOr<RestorePoint> Job::ChooseOrdered(const Catalog& catalog, Attempt attempt,
                                                CheckpointId ordered) const {
  if (ordered.attempt >= attempt) {
    return absl::FailedPreconditionError(
        absl::StrFormat("attempt %d of job %s cannot begin from %s, which is not older",
                        Value(attempt), options_.name, Describe(ordered)));
  }
  const CatalogEntry* const entry = catalog.Find(ordered);
  if (entry != nullptr && !entry->bad_marks.empty()) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "attempt %d of job %s was to begin from %s, which is marked bad: %s", Value(attempt),
        options_.name, Describe(ordered), entry->bad_marks.back().reason));
  }
  const SaveGroup* const group = groups_.Find(ordered);
  const bool in_memory = group != nullptr && group->sealed;
  if (in_memory || (entry != nullptr && entry->state == CatalogEntry::State::kCommitted)) {
    return RestorePoint{ordered};
  }
  return absl::DataLossError(absl::StrFormat(
      "attempt %d of job %s was to begin from %s, which is neither in memory nor on storage%s",
      Value(attempt), options_.name, Describe(ordered),
      entry == nullptr ? "" : absl::StrCat(": ", entry->why)));
}

absl::StatusOr<RestorePoint> Job::ChooseNewest(const Catalog& catalog, Attempt attempt) const {
  // The newest that all ranks of an older attempt have sealed in this agent's memory.
  std::optional<CheckpointId> in_memory;
  for (const auto& [id, group] : groups_.groups()) {
    const CatalogEntry* entry = catalog.Find(id);
    const bool marked_bad = entry != nullptr && !entry->bad_marks.empty();
    const bool abandoned = catalog.head.has_value() && catalog.head->to != id &&
                           id.attempt <= catalog.head->abandons_attempts_up_to;
    if (group.sealed && id.attempt < attempt && !marked_bad && !abandoned) in_memory = id;
  }
  const auto newest_entry =
      std::find_if(catalog.entries.rbegin(), catalog.entries.rend(), [](const CatalogEntry& entry) {
        return entry.state == CatalogEntry::State::kCommitted ||
               entry.state == CatalogEntry::State::kDamaged;
      });
  switch (catalog.outcome) {
    case Lineage::Outcome::kNone:
    case Lineage::Outcome::kAllBad:
    case Lineage::Outcome::kUnknown:
      // Newer than whatever storage holds: no question of branches.
      if (in_memory.has_value() &&
          (newest_entry == catalog.entries.rend() || *in_memory >= newest_entry->id)) {
        return RestorePoint{in_memory};
      }
      if (catalog.outcome == Lineage::Outcome::kNone) return RestorePoint{};
      if (catalog.outcome == Lineage::Outcome::kAllBad) {
        return absl::FailedPreconditionError(absl::StrFormat(
            "job %s: every checkpoint of the current branch is marked bad", options_.name));
      }
      return absl::DataLossError(absl::StrFormat(
          "job %s: which checkpoint is the newest cannot be told: a parent is missing or damaged",
          options_.name));
    case Lineage::Outcome::kFound:
    case Lineage::Outcome::kDamaged:
      break;
  }
  const CatalogEntry& newest = catalog.entries[*catalog.newest];
  if (in_memory.has_value() && *in_memory >= newest.id) return RestorePoint{in_memory};
  if (catalog.outcome == Lineage::Outcome::kDamaged) {
    return absl::DataLossError(absl::StrFormat("the newest checkpoint, %s, is damaged: %s",
                                               Describe(newest.id), newest.why));
  }
  return RestorePoint{newest.id};
}

// Steps 2 to 4.
void Job::FenceAndRecord(Attempt attempt, bool from_nothing, int tries_left, const Catalog& catalog,
                         const RestorePoint& candidate,
                         std::function<void(absl::StatusOr<RestorePoint>)> then) {
  struct Decided {
    absl::StatusOr<RestorePoint> point = absl::UnknownError("not decided");
    bool again = false;
  };
  OnPool<Decided>(
      [file_system = &world_.file_system, store = &world_.store, root = options_.root,
       job = options_.name, uuid = uuid_, directory = directory_, writer = options_.writer, attempt,
       restore_from = from_nothing ? std::string() : restore_from(attempt), catalog,
       candidate = RestorePoint(candidate)]() mutable {
        Decided decided;
        if (candidate.is_beginning() && !restore_from.empty()) {
          absl::StatusOr<ForeignCheckpoint> foreign =
              FindForeignCheckpoint(*file_system, restore_from);
          if (!foreign.ok()) {
            decided.point = foreign.status();
            return decided;
          }
          candidate.foreign = *std::move(foreign);
        }
        const absl::Status fenced = FenceDirectories(*file_system, directory, writer, catalog,
                                                     candidate.checkpoint, attempt);
        if (!fenced.ok()) {
          decided.point = fenced;
          // Somebody is at that very name.
          decided.again = fenced.code() == absl::StatusCode::kUnavailable;
          return decided;
        }
        const absl::StatusOr<Catalog> second = ReadCatalog(*file_system, root, job);
        if (!second.ok()) {
          decided.point = second.status();
          return decided;
        }
        const auto newest_of = [](const Catalog& of) {
          return of.newest.has_value() ? std::optional(of.entries[*of.newest].id) : std::nullopt;
        };
        if (second->job.job_uuid != uuid) {
          decided.point = CheckSameJob(*file_system, root, job, uuid);
          return decided;
        }
        decided.again = newest_of(*second) != newest_of(catalog);
        if (!decided.again) decided.point = store->DecideRestorePoint(job, attempt, candidate);
        return decided;
      },
      [this, attempt, from_nothing, tries_left, then = std::move(then)](Decided decided) mutable {
        if (decided.again && tries_left > 1) {
          Propose(attempt, from_nothing, tries_left - 1, std::move(then));
          return;
        }
        if (decided.point.ok()) {
          KillPoint("restore.point_decided");
          SetRestorePoint(attempt, *decided.point);
        }
        then(std::move(decided.point));
      });
}

// Step 5.
void Job::SetRestorePoint(Attempt attempt, const RestorePoint& point) {
  attempts_.at(attempt).restore_point = point;
  if (attempt == attempts_.rbegin()->first) groups_.SettleFence(attempt, point.checkpoint);
}

// ---- Sources ----

std::vector<GroupPart> Job::PartsOf(const SaveGroup& group) const {
  std::vector<GroupPart> parts;
  for (const auto& [rank, member] : group.members) {
    CHECK(!member.gone && member.sealed.has_value());
    const size_t slash = member.durable_path.rfind('/');
    parts.push_back(
        {.registration = FindSession(member.image.session)->registration_of(member.image),
         .image = *member.sealed,
         .file = slash == std::string::npos ? ImageFileName(rank)
                                            : member.durable_path.substr(slash + 1)});
  }
  return parts;
}

std::vector<std::optional<MemoryImage>> Job::MemoryOf(const SaveGroup& group) const {
  std::vector<std::optional<MemoryImage>> memory;
  for (const auto& [rank, member] : group.members) {
    const Session* session = FindSession(member.image.session);
    const RankImages* images = FindImages(member.image);
    MemoryImage image;
    image.mapping = session->memory_of(member.image)->mapping();
    image.trainer_alive = !session->is_process_dead();
    bool whole = true;
    for (uint64_t block = 0; block < member.sealed->block_crc32c.size(); ++block) {
      const absl::StatusOr<RankImages::BlockView> view = images->Block(member.image, block);
      if (!view.ok()) {
        whole = false;
        break;
      }
      image.blocks.push_back(view->bytes);
      image.memory_offsets.push_back(view->memory_offset);
    }
    memory.push_back(whole ? std::optional(std::move(image)) : std::nullopt);
  }
  return memory;
}

std::string Job::restore_from(Attempt attempt) const {
  const auto known = attempts_.find(attempt);
  return known == attempts_.end() ? std::string() : known->second.record.restore_from;
}

std::optional<RestorePoint> Job::restore_point(Attempt attempt) const {
  const auto known = attempts_.find(attempt);
  return known == attempts_.end() ? std::nullopt : known->second.restore_point;
}

void Job::OpenSource(const RestorePoint& point,
                     std::function<void(absl::StatusOr<std::shared_ptr<RestoreSource>>)> done) {
  CHECK(!point.is_beginning());
  if (std::shared_ptr<RestoreSource> shared = SharedSource(point)) {
    world_.loop.Post([done = std::move(done), shared = std::move(shared)] { done(shared); });
  } else if (point.foreign.has_value()) {
    OpenForeignSource(*point.foreign, std::move(done));
  } else {
    OpenOwnSource(*point.checkpoint, std::move(done));
  }
}

void Job::OpenOwnSource(CheckpointId id,
                        std::function<void(absl::StatusOr<std::shared_ptr<RestoreSource>>)> done) {
  struct Opened {
    absl::StatusOr<Index> index = absl::UnknownError("not read");
    std::string directory;  // empty: not usable on storage
  };
  const SaveGroup* group = groups_.Find(id);
  const bool in_memory = group != nullptr && group->sealed;
  std::vector<GroupPart> parts;
  if (in_memory) {
    groups_.Pin(id);
    parts = PartsOf(*group);
  }
  OnPool<Opened>(
      [file_system = &world_.file_system, directory = directory_, job = options_.name, uuid = uuid_,
       id, in_memory, parts] {
        Opened opened;
        const auto from_storage = [&]() -> absl::StatusOr<Index> {
          ASSIGN_OR_RETURN(const CatalogEntry entry,
                           ReadCatalogEntry(*file_system, directory, job, uuid, id));
          if (!entry.manifest.has_value()) {
            return absl::DataLossError(absl::StrFormat("%s: %s", entry.directory, entry.why));
          }
          ASSIGN_OR_RETURN(Index index, LoadIndex(*file_system, entry.directory, *entry.manifest));
          RETURN_IF_ERROR(CheckImageSizes(*file_system, entry.directory, *entry.manifest));
          opened.directory = entry.directory;
          return index;
        };
        opened.index = from_storage();
        // What is in memory needs no storage; storage that says otherwise is not asked then.
        if (in_memory) {
          absl::StatusOr<Index> from_memory = BuildIndex(id, parts);
          const bool same =
              opened.index.ok() && from_memory.ok() &&
              std::equal(opened.index->images.begin(), opened.index->images.end(),
                         from_memory->images.begin(), from_memory->images.end(),
                         [](const IndexImage& a, const IndexImage& b) {
                           return a.file == b.file && a.block_crc32c == b.block_crc32c;
                         });
          if (!same && from_memory.ok()) opened.directory.clear();
          if (from_memory.ok()) opened.index = std::move(from_memory);
        }
        return opened;
      },
      [this, id, in_memory, done = std::move(done)](Opened opened) mutable {
        if (!opened.index.ok() && !in_memory) {
          done(absl::Status(opened.index.status().code() == absl::StatusCode::kNotFound
                                ? absl::StatusCode::kDataLoss
                                : opened.index.status().code(),
                            absl::StrFormat("the restore point, %s, can no longer be read: %s",
                                            Describe(id), opened.index.status().message())));
          return;
        }
        MakeSource(id, in_memory, std::move(opened.index), std::move(opened.directory),
                   std::move(done));
      });
}

// From storage, also where this agent holds the other job's images in memory: that job may give
// them back at any time.
void Job::OpenForeignSource(
    const ForeignCheckpoint& foreign,
    std::function<void(absl::StatusOr<std::shared_ptr<RestoreSource>>)> done) {
  OnPool<absl::StatusOr<Index>>(
      [file_system = &world_.file_system, foreign,
       blobs_bytes_max = options_.blobs_bytes_max]() -> absl::StatusOr<Index> {
        ASSIGN_OR_RETURN(Index index, LoadForeignIndex(*file_system, foreign));
        // Whoever wrote it may have had another limit, or none.
        uint64_t bytes_left = blobs_bytes_max;
        for (const IndexBlob& blob : index.blobs) {
          if (blob.bytes > bytes_left) {
            return absl::ResourceExhaustedError(absl::StrFormat(
                "%s: the blobs of all ranks have more than the %d bytes that can be restored",
                foreign.directory, blobs_bytes_max));
          }
          bytes_left -= blob.bytes;
        }
        return index;
      },
      [this, foreign, done = std::move(done)](absl::StatusOr<Index> index) {
        if (!index.ok()) {
          done(index.status());
          return;
        }
        const RestorePoint point{std::nullopt, foreign};
        // Another rank may have been faster.
        if (std::shared_ptr<RestoreSource> shared = SharedSource(point)) {
          done(std::move(shared));
          return;
        }
        RestoreSourceParts parts;
        parts.memory.resize(index->images.size());
        parts.index = *std::move(index);
        parts.directory = foreign.directory;
        // Another mount, of which nobody knows what direct transfers it takes.
        std::shared_ptr<RestoreSource> source = RestoreSource::Create(
            std::move(parts),
            {world_.file_system, world_.ring, world_.loop, world_.pool, Caching::kBuffered});
        ShareSource(point, source);
        done(std::move(source));
      });
}

std::shared_ptr<RestoreSource> Job::SharedSource(const RestorePoint& point) const {
  const auto known = sources_.find(point);
  std::shared_ptr<RestoreSource> source = known == sources_.end() ? nullptr : known->second.lock();
  if (source == nullptr || !source->is_sound()) return nullptr;
  // One from before the commit knows no second place for a block that is bad in memory.
  const bool may_lack = !point.checkpoint.has_value() || !committed_.contains(*point.checkpoint);
  return source->has_storage() || may_lack ? source : nullptr;
}

void Job::ShareSource(const RestorePoint& point, const std::shared_ptr<RestoreSource>& source) {
  std::erase_if(sources_, [](const auto& entry) { return entry.second.expired(); });
  sources_[point] = source;
}

void Job::MakeSource(CheckpointId id, bool in_memory, absl::StatusOr<Index> index,
                     std::string directory,
                     std::function<void(absl::StatusOr<std::shared_ptr<RestoreSource>>)> done) {
  RestoreSourceParts parts;
  if (in_memory) {
    parts.release = [this, alive = std::weak_ptr<bool>(alive_), id] {
      if (!alive.expired()) groups_.Unpin(id);
    };
  }
  const RestoreSourceWorld world{world_.file_system, world_.ring, world_.loop, world_.pool,
                                 options_.caching};
  if (!index.ok()) {
    if (parts.release) parts.release();
    done(index.status());
    return;
  }
  // Another rank may have been faster.
  if (std::shared_ptr<RestoreSource> shared = SharedSource({id})) {
    if (parts.release) parts.release();
    done(std::move(shared));
    return;
  }
  parts.index = *std::move(index);
  parts.directory = std::move(directory);
  const SaveGroup* group = groups_.Find(id);
  if (in_memory && group->sealed) {
    parts.memory = MemoryOf(*group);
  } else {
    parts.memory.resize(parts.index.images.size());
  }
  const bool complete =
      !parts.directory.empty() ||
      std::all_of(parts.memory.begin(), parts.memory.end(),
                  [](const std::optional<MemoryImage>& image) { return image.has_value(); });
  if (!complete) {
    if (parts.release) parts.release();
    done(absl::DataLossError(absl::StrFormat(
        "the restore point, %s, was only in memory and is there no longer", Describe(id))));
    return;
  }
  std::shared_ptr<RestoreSource> source = RestoreSource::Create(std::move(parts), world);
  ShareSource({id}, source);
  done(std::move(source));
}

}  // namespace holdfast
