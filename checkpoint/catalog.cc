#include "checkpoint/catalog.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "checkpoint/commit.h"
#include "checkpoint/describe.h"
#include "checkpoint/publish.h"

namespace holdfast {
namespace {

// As a reader of a hostile directory must: a regular file, bounded, under exactly this name.
absl::StatusOr<std::string> ReadRecord(FileSystem& file_system, const std::string& path,
                                       uint64_t bytes_max) {
  ASSIGN_OR_RETURN(const FileInfo info, file_system.Stat(path));
  if (info.kind != FileInfo::Kind::kFile) {
    return absl::DataLossError(absl::StrFormat("%s: expected a regular file", path));
  }
  return file_system.ReadSmallFile(path, bytes_max);
}

// Whether an error says something about the stored bytes rather than about reading them now.
bool IsAboutContents(const absl::Status& status) {
  return status.code() == absl::StatusCode::kDataLoss ||
         status.code() == absl::StatusCode::kResourceExhausted;
}

absl::Status OtherValue(const std::string& where, const char* what, const std::string& expected,
                        const std::string& found) {
  return absl::DataLossError(
      absl::StrFormat("%s: %s: expected %s, found %s", where, what, expected, found));
}

// Why a directory without a manifest has none, for people.
std::string WhyIncomplete(const std::vector<std::string>& names) {
  size_t images = 0;
  bool has_index = false;
  for (const std::string& name : names) {
    images += ParseImageFileName(name).has_value() ? 1 : 0;
    has_index = has_index || name == kIndexFileName;
  }
  return absl::StrFormat("no manifest (%d image files, %s INDEX): being written, or left behind",
                         images, has_index ? "with" : "no");
}

absl::Status ReadMarks(FileSystem& file_system, const std::vector<std::string>& names,
                       const std::string& job_uuid, CatalogEntry& entry) {
  for (const std::string& name : names) {
    const std::optional<uint32_t> number = ParseNumberedName("BAD", name);
    if (!number.has_value()) continue;
    if (entry.bad_marks.size() >= kMarksMax) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("%s: more than %d marks", entry.directory, kMarksMax));
    }
    const std::string path = absl::StrCat(entry.directory, "/", name);
    BadMark mark;
    mark.number = *number;
    mark.checkpoint = entry.id;
    // A mark that cannot be read still says that somebody distrusted the checkpoint.
    absl::StatusOr<std::string> bytes = ReadRecord(file_system, path, kSmallRecordBytesMax);
    absl::StatusOr<BadMark> decoded =
        bytes.ok() ? DecodeBadMark(*bytes, path) : absl::StatusOr<BadMark>(bytes.status());
    if (!decoded.ok()) {
      if (!IsAboutContents(decoded.status())) return decoded.status();
      mark.reason = absl::StrFormat("(a damaged mark: %s)", decoded.status().message());
    } else if (decoded->checkpoint != entry.id ||
               (!job_uuid.empty() && decoded->job_uuid != job_uuid)) {
      mark.reason = absl::StrFormat("(a mark of %s, job %s)", Describe(decoded->checkpoint),
                                    decoded->job_uuid);
    } else {
      mark = *std::move(decoded);
    }
    entry.bad_marks.push_back(std::move(mark));
  }
  return absl::OkStatus();
}

absl::Status CheckManifest(const Manifest& manifest, const std::string& where,
                           const std::string& job, const std::string& job_uuid, CheckpointId id) {
  if (manifest.job != job) return OtherValue(where, "job", job, manifest.job);
  if (!job_uuid.empty() && manifest.job_uuid != job_uuid) {
    return OtherValue(where, "job uuid", job_uuid, manifest.job_uuid);
  }
  if (manifest.checkpoint != id) {
    return OtherValue(where, "checkpoint", Describe(id), Describe(manifest.checkpoint));
  }
  if (manifest.parent.has_value() && *manifest.parent >= id) {
    return OtherValue(where, "parent", absl::StrCat("one older than ", Describe(id)),
                      Describe(*manifest.parent));
  }
  return absl::OkStatus();
}

// Fills state, why and manifest from the bytes under the manifest's name.
void Judge(const std::string& bytes, const std::string& where, const std::string& job,
           const std::string& job_uuid, CatalogEntry& entry) {
  const absl::StatusOr<Attempt> fence = DecodeFence(bytes, entry.id, where);
  if (fence.ok()) {
    entry.state = CatalogEntry::State::kFenced;
    entry.why = absl::StrFormat("never committed: attempt %d began before it was", Value(*fence));
    return;
  }
  entry.state = CatalogEntry::State::kDamaged;
  if (fence.status().code() != absl::StatusCode::kNotFound) {
    entry.why = std::string(fence.status().message());
    return;
  }
  absl::StatusOr<Manifest> manifest = DecodeManifest(bytes, where);
  if (!manifest.ok()) {
    entry.why = std::string(manifest.status().message());
    return;
  }
  const absl::Status right = CheckManifest(*manifest, where, job, job_uuid, entry.id);
  if (!right.ok()) {
    entry.why = std::string(right.message());
    return;
  }
  entry.state = CatalogEntry::State::kCommitted;
  entry.manifest = *std::move(manifest);
}

absl::StatusOr<std::optional<Head>> ReadHead(FileSystem& file_system, const std::string& directory,
                                             const std::vector<std::string>& names,
                                             const std::string& job_uuid) {
  std::optional<uint32_t> newest;
  for (const std::string& name : names) {
    newest = std::max(newest, ParseNumberedName("HEAD", name));
  }
  if (!newest.has_value()) return std::optional<Head>();
  const std::string path = absl::StrCat(directory, "/", HeadFileName(*newest));
  ASSIGN_OR_RETURN(const std::string bytes, ReadRecord(file_system, path, kSmallRecordBytesMax));
  ASSIGN_OR_RETURN(Head head, DecodeHead(bytes, path));
  if (head.number != *newest) {
    return OtherValue(path, "number", absl::StrCat(*newest), absl::StrCat(head.number));
  }
  if (head.job_uuid != job_uuid) return OtherValue(path, "job uuid", job_uuid, head.job_uuid);
  return std::optional<Head>(std::move(head));
}

void ApplyLineage(Catalog& catalog) {
  std::vector<LineageNode> nodes;
  std::vector<size_t> entry_of_node;
  for (size_t i = 0; i < catalog.entries.size(); ++i) {
    const CatalogEntry& entry = catalog.entries[i];
    if (entry.state != CatalogEntry::State::kCommitted &&
        entry.state != CatalogEntry::State::kDamaged) {
      continue;
    }
    nodes.push_back({.id = entry.id,
                     .parent = entry.manifest.has_value() ? entry.manifest->parent : std::nullopt,
                     .damaged = entry.state == CatalogEntry::State::kDamaged,
                     .marked_bad = !entry.bad_marks.empty()});
    entry_of_node.push_back(i);
  }
  const Lineage lineage = FindLineage(nodes, catalog.head);
  for (size_t i = 0; i < nodes.size(); ++i) {
    catalog.entries[entry_of_node[i]].branch = lineage.branch[i];
  }
  catalog.outcome = lineage.outcome;
  if (lineage.newest.has_value()) catalog.newest = entry_of_node[*lineage.newest];
}

}  // namespace

const CatalogEntry* Catalog::Find(CheckpointId id) const {
  const auto found =
      std::lower_bound(entries.begin(), entries.end(), id,
                       [](const CatalogEntry& entry, CheckpointId key) { return entry.id < key; });
  return found != entries.end() && found->id == id ? &*found : nullptr;
}

absl::StatusOr<std::vector<std::string>> ListJobs(FileSystem& file_system,
                                                  const std::string& root) {
  ASSIGN_OR_RETURN(const std::vector<std::string> names, file_system.List(root, kJobsMax));
  std::vector<std::string> jobs;
  for (const std::string& name : names) {
    if (!CheckJobName(name).ok()) continue;
    const absl::StatusOr<FileInfo> info =
        file_system.Stat(absl::StrCat(root, "/", name, "/", kJobFileName));
    if (info.ok() && info->kind == FileInfo::Kind::kFile) jobs.push_back(name);
  }
  return jobs;
}

absl::StatusOr<JobRecord> ReadJobRecord(FileSystem& file_system, const std::string& root,
                                        const std::string& job) {
  const std::string path = absl::StrCat(root, "/", job, "/", kJobFileName);
  ASSIGN_OR_RETURN(const std::string bytes, ReadRecord(file_system, path, kSmallRecordBytesMax));
  ASSIGN_OR_RETURN(JobRecord record, DecodeJobRecord(bytes, path));
  if (record.job != job) return OtherValue(path, "job", job, record.job);
  return record;
}

absl::StatusOr<CatalogEntry> ReadCatalogEntry(FileSystem& file_system,
                                              const std::string& job_directory,
                                              const std::string& job, const std::string& job_uuid,
                                              CheckpointId id) {
  CatalogEntry entry;
  entry.id = id;
  entry.directory = absl::StrCat(job_directory, "/", CheckpointDirectoryName(id));
  ASSIGN_OR_RETURN(const FileInfo info, file_system.Stat(entry.directory));
  if (info.kind != FileInfo::Kind::kDirectory) {
    return absl::NotFoundError(absl::StrFormat("%s: expected a directory", entry.directory));
  }
  ASSIGN_OR_RETURN(const std::vector<std::string> names,
                   file_system.List(entry.directory, kCheckpointFilesMax));
  RETURN_IF_ERROR(ReadMarks(file_system, names, job_uuid, entry));

  const std::string path = absl::StrCat(entry.directory, "/", kManifestFileName);
  absl::StatusOr<std::string> bytes = ReadRecord(file_system, path, kManifestBytesMax);
  if (bytes.ok()) {
    Judge(*bytes, path, job, job_uuid, entry);
    const bool was_cut_off = PublicationWasCutOff(names, kManifestFileName);
    entry.has_stale_marker = was_cut_off && entry.state == CatalogEntry::State::kCommitted;
    if (entry.state == CatalogEntry::State::kDamaged && was_cut_off) {
      entry.state = CatalogEntry::State::kIncomplete;
      entry.why = absl::StrCat("torn while it was published: ", entry.why);
    }
  } else if (bytes.status().code() == absl::StatusCode::kNotFound) {
    entry.state = CatalogEntry::State::kIncomplete;
    entry.why = WhyIncomplete(names);
  } else if (IsAboutContents(bytes.status())) {
    entry.state = CatalogEntry::State::kDamaged;
    entry.why = std::string(bytes.status().message());
  } else {
    return bytes.status();
  }
  return entry;
}

absl::StatusOr<Catalog> ReadCatalog(FileSystem& file_system, const std::string& root,
                                    const std::string& job) {
  RETURN_IF_ERROR(CheckJobName(job));
  const std::string directory = absl::StrCat(root, "/", job);
  Catalog catalog;
  absl::StatusOr<JobRecord> job_record = ReadJobRecord(file_system, root, job);
  if (!job_record.ok() && job_record.status().code() != absl::StatusCode::kDataLoss) {
    return job_record.status();
  }
  ASSIGN_OR_RETURN(const std::vector<std::string> names,
                   file_system.List(directory, 2 * kCheckpointsMax));
  if (!job_record.ok() && PublicationWasCutOff(names, kJobFileName)) {
    return absl::NotFoundError(
        absl::StrFormat("torn while it was published: %s", job_record.status().message()));
  }
  RETURN_IF_ERROR(job_record.status());
  catalog.job = *std::move(job_record);
  ASSIGN_OR_RETURN(catalog.head, ReadHead(file_system, directory, names, catalog.job.job_uuid));
  for (const std::string& name : names) {
    const std::optional<CheckpointId> id = ParseCheckpointDirectoryName(name);
    if (!id.has_value()) continue;
    if (catalog.entries.size() >= kCheckpointsMax) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("%s: more than %d checkpoints", directory, kCheckpointsMax));
    }
    absl::StatusOr<CatalogEntry> entry =
        ReadCatalogEntry(file_system, directory, job, catalog.job.job_uuid, *id);
    if (entry.status().code() == absl::StatusCode::kNotFound) {
      catalog.warnings.push_back(std::string(entry.status().message()));
      continue;
    }
    if (!entry.ok()) return entry.status();
    catalog.greatest_attempt = std::max(catalog.greatest_attempt, id->attempt);
    catalog.entries.push_back(*std::move(entry));
  }
  std::sort(catalog.entries.begin(), catalog.entries.end(),
            [](const CatalogEntry& a, const CatalogEntry& b) { return a.id < b.id; });
  ApplyLineage(catalog);
  return catalog;
}

}  // namespace holdfast
