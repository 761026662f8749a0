// From a path that a person typed to the checkpoint that it means.

#include <cstdio>
#include <filesystem>
#include <system_error>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "cli/output.h"
#include "cli/verb.h"
#include "format/manifest.h"

namespace holdfast::cli {

ExitCode Report(const absl::Status& status) {
  if (!status.ok()) {
    std::fprintf(stderr, "holdfast: %s\n", Printable(std::string(status.message())).c_str());
  }
  return ExitCodeOf(status);
}

absl::StatusOr<JobPath> SplitJobPath(const std::string& path) {
  std::error_code error;
  const std::filesystem::path whole = std::filesystem::canonical(path, error);
  if (error) {
    return absl::NotFoundError(absl::StrFormat("%s: %s", path, error.message()));
  }
  JobPath result{whole.parent_path().string(), whole.filename().string()};
  if (const absl::Status legal = CheckJobName(result.job); !legal.ok()) {
    return absl::NotFoundError(
        absl::StrFormat("%s is no job: %s", path, std::string(legal.message())));
  }
  return result;
}

absl::StatusOr<CatalogEntry> Locate(FileSystem& file_system, const std::string& path) {
  std::error_code error;
  const std::filesystem::path whole = std::filesystem::canonical(path, error);
  if (error) {
    return absl::NotFoundError(absl::StrFormat("%s: %s", path, error.message()));
  }
  const std::optional<CheckpointId> id = ParseCheckpointDirectoryName(whole.filename().string());
  ASSIGN_OR_RETURN(const JobPath job,
                   SplitJobPath(id.has_value() ? whole.parent_path().string() : path));
  absl::StatusOr<Catalog> catalog = ReadCatalog(file_system, job.root, job.job);
  if (absl::IsNotFound(catalog.status())) {
    return absl::NotFoundError(
        absl::StrFormat("%s: expected a checkpoint's directory, or ROOT/JOB: %s", path,
                        catalog.status().message()));
  }
  RETURN_IF_ERROR(catalog.status());
  if (id.has_value()) {
    const CatalogEntry* entry = catalog->Find(*id);
    if (entry == nullptr) {
      return absl::NotFoundError(absl::StrFormat("%s holds no checkpoint", path));
    }
    return *entry;
  }
  if (!catalog->newest.has_value()) {
    return absl::NotFoundError(absl::StrFormat(
        "job %s in %s has no committed checkpoint on its current branch", job.job, job.root));
  }
  return catalog->entries[*catalog->newest];
}

absl::StatusOr<std::string> DirectoryOf(const std::string& path) {
  const std::filesystem::path parent = std::filesystem::path(path).parent_path();
  std::error_code error;
  const std::filesystem::path directory =
      std::filesystem::canonical(parent.empty() ? "." : parent, error);
  if (error) {
    return absl::NotFoundError(absl::StrFormat("directory of %s: %s", path, error.message()));
  }
  return directory.string();
}

std::string StateText(const CatalogEntry& entry) {
  std::string text;
  switch (entry.state) {
    case CatalogEntry::State::kCommitted:
      text = "committed";
      break;
    case CatalogEntry::State::kIncomplete:
      text = "incomplete";
      break;
    case CatalogEntry::State::kFenced:
      text = "fenced";
      break;
    case CatalogEntry::State::kDamaged:
      text = "damaged";
      break;
  }
  if (!entry.bad_marks.empty()) text += " (bad)";
  if (entry.manifest.has_value() && entry.branch == Branch::kAbandoned) text += " (abandoned)";
  return text;
}

absl::StatusOr<uint64_t> DirectoryBytes(FileSystem& file_system, const std::string& directory) {
  ASSIGN_OR_RETURN(const std::vector<std::string> names,
                   file_system.List(directory, kCheckpointFilesMax));
  uint64_t bytes = 0;
  for (const std::string& name : names) {
    const absl::StatusOr<FileInfo> info =
        file_system.Stat(absl::StrFormat("%s/%s", directory, name));
    // A file may go between List and Stat while the agent works here.
    if (absl::IsNotFound(info.status())) continue;
    RETURN_IF_ERROR(info.status());
    if (info->kind == FileInfo::Kind::kFile) bytes += info->size_bytes;
  }
  return bytes;
}

}  // namespace holdfast::cli
