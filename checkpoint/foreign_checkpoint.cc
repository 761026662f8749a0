#include "checkpoint/foreign_checkpoint.h"

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "checkpoint/catalog.h"
#include "checkpoint/describe.h"
#include "checkpoint/verify.h"
#include "format/checkpoint_names.h"

namespace holdfast {
namespace {

// Of "/root/job": "/root" and "job"; of "/job": "/" and "job".
struct SplitPath {
  std::string directory;
  std::string name;
};

SplitPath Split(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return {".", path};
  if (slash == 0) return {"/", path.substr(1)};
  return {path.substr(0, slash), path.substr(slash + 1)};
}

absl::Status NoneHere(const std::string& path, const std::string& why) {
  return absl::InvalidArgumentError(absl::StrFormat(
      "restore from %s: expected a checkpoint's directory, or ROOT/JOB: %s", path, why));
}

// kNotFound means "begin from nothing" to whoever restores.
absl::Status ForPath(const std::string& path, const absl::Status& status) {
  if (status.code() == absl::StatusCode::kNotFound)
    return NoneHere(path, std::string(status.message()));
  return absl::Status(status.code(),
                      absl::StrFormat("restore from %s: %s", path, status.message()));
}

absl::Status CheckUsable(const std::string& path, const CatalogEntry& entry) {
  if (entry.state == CatalogEntry::State::kDamaged) {
    return absl::DataLossError(
        absl::StrFormat("restore from %s: %s is damaged: %s", path, Describe(entry.id), entry.why));
  }
  if (entry.state != CatalogEntry::State::kCommitted) {
    return absl::FailedPreconditionError(absl::StrFormat("restore from %s: %s is not committed: %s",
                                                         path, Describe(entry.id), entry.why));
  }
  if (!entry.bad_marks.empty()) {
    return absl::FailedPreconditionError(absl::StrFormat("restore from %s: %s is marked bad: %s",
                                                         path, Describe(entry.id),
                                                         entry.bad_marks.back().reason));
  }
  return absl::OkStatus();
}

ForeignCheckpoint ToForeign(const CatalogEntry& entry) {
  return {entry.directory, entry.manifest->job, entry.manifest->job_uuid, entry.id};
}

absl::StatusOr<ForeignCheckpoint> FindNewest(FileSystem& file_system, const std::string& path,
                                             const SplitPath& job) {
  const absl::StatusOr<Catalog> catalog = ReadCatalog(file_system, job.directory, job.name);
  if (!catalog.ok()) return ForPath(path, catalog.status());
  switch (catalog->outcome) {
    case Lineage::Outcome::kFound:
    case Lineage::Outcome::kDamaged:
      break;
    case Lineage::Outcome::kNone:
      return absl::FailedPreconditionError(absl::StrFormat(
          "restore from %s: the job has no committed checkpoint on its current branch", path));
    case Lineage::Outcome::kAllBad:
      return absl::FailedPreconditionError(absl::StrFormat(
          "restore from %s: every checkpoint of the job's current branch is marked bad", path));
    case Lineage::Outcome::kUnknown:
      return absl::DataLossError(absl::StrFormat(
          "restore from %s: which checkpoint is the newest cannot be told: a parent "
          "is missing or damaged; name one of them",
          path));
  }
  const CatalogEntry& newest = catalog->entries[*catalog->newest];
  RETURN_IF_ERROR(CheckUsable(path, newest));
  return ToForeign(newest);
}

absl::StatusOr<CatalogEntry> ReadEntry(FileSystem& file_system, const std::string& directory,
                                       CheckpointId id) {
  const SplitPath job = Split(Split(directory).directory);
  ASSIGN_OR_RETURN(const JobRecord record, ReadJobRecord(file_system, job.directory, job.name));
  return ReadCatalogEntry(file_system, Split(directory).directory, record.job, record.job_uuid, id);
}

}  // namespace

absl::StatusOr<ForeignCheckpoint> FindForeignCheckpoint(FileSystem& file_system,
                                                        const std::string& path) {
  std::string trimmed = path;
  while (trimmed.size() > 1 && trimmed.back() == '/') trimmed.pop_back();
  const SplitPath last = Split(trimmed);
  const std::optional<CheckpointId> id = ParseCheckpointDirectoryName(last.name);
  if (!id.has_value()) {
    if (const absl::Status legal = CheckJobName(last.name); !legal.ok()) {
      return NoneHere(path, std::string(legal.message()));
    }
    return FindNewest(file_system, path, last);
  }
  const absl::StatusOr<CatalogEntry> entry = ReadEntry(file_system, trimmed, *id);
  if (!entry.ok()) return ForPath(path, entry.status());
  RETURN_IF_ERROR(CheckUsable(path, *entry));
  return ToForeign(*entry);
}

absl::StatusOr<Index> LoadForeignIndex(FileSystem& file_system, const ForeignCheckpoint& foreign) {
  const auto load = [&]() -> absl::StatusOr<Index> {
    ASSIGN_OR_RETURN(const CatalogEntry entry,
                     ReadEntry(file_system, foreign.directory, foreign.checkpoint));
    if (!entry.manifest.has_value()) {
      return absl::DataLossError(absl::StrFormat("%s: %s", entry.directory, entry.why));
    }
    if (entry.manifest->job_uuid != foreign.job_uuid) {
      return absl::DataLossError(absl::StrFormat("%s: expected the job of uuid %s, found %s",
                                                 entry.directory, foreign.job_uuid,
                                                 entry.manifest->job_uuid));
    }
    ASSIGN_OR_RETURN(Index index, LoadIndex(file_system, entry.directory, *entry.manifest));
    RETURN_IF_ERROR(CheckImageSizes(file_system, entry.directory, *entry.manifest));
    return index;
  };
  absl::StatusOr<Index> index = load();
  if (index.ok()) return index;
  const absl::StatusCode code = index.status().code();
  return absl::Status(code == absl::StatusCode::kNotFound ? absl::StatusCode::kDataLoss : code,
                      absl::StrFormat("the restore point, %s of job %s in %s, can no longer be "
                                      "read: %s",
                                      Describe(foreign.checkpoint), foreign.job, foreign.directory,
                                      index.status().message()));
}

}  // namespace holdfast
