#include "converter/foreign_source.h"

#include <vector>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "converter/dcp_names.h"

namespace holdfast::converter {
namespace {

// Empty if no reader knows the folder.
absl::StatusOr<std::string> ReadAndEncode(const ForeignFolder& folder, const ReadOptions& options) {
  ASSIGN_OR_RETURN(const FormatReader* const reader, RecognizeFormat(folder));
  if (reader == nullptr) return std::string();
  ASSIGN_OR_RETURN(ForeignIndex index, ReadFormat(*reader, folder, options));
  return EncodeForeignIndex(index);
}

absl::Status Named(const std::string& path, const absl::Status& status) {
  absl::Status named(status.code(), absl::StrCat(path, ": ", status.message()));
  status.ForEachPayload(
      [&](absl::string_view type, const absl::Cord& payload) { named.SetPayload(type, payload); });
  return named;
}

}  // namespace

absl::StatusOr<ForeignSource> OpenForeignSource(FileSystem& file_system, const std::string& path,
                                                const ReadOptions& options,
                                                const SandboxLimits& limits) {
  ForeignSource source;
  ASSIGN_OR_RETURN(source.folder, ForeignFolder::Open(file_system, path));
  const ForeignFolder& folder = *source.folder;
  const absl::StatusOr<std::string> encoded = RunSandboxed(
      folder.root(), limits, [&] { return ReadAndEncode(folder, options); }, &source.sandbox);
  if (!encoded.ok()) return Named(path, encoded.status());
  if (encoded->empty()) return source;
  absl::StatusOr<ForeignIndex> index =
      DecodeForeignIndex(std::as_bytes(std::span(encoded->data(), encoded->size())));
  if (!index.ok()) return Named(path, absl::DataLossError(index.status().message()));
  source.index = *std::move(index);
  source.recognized = true;
  if (absl::Status files = CheckFiles(source.index, folder); !files.ok()) {
    return Named(path, files);
  }
  return source;
}

absl::Status NotRecognized(const std::string& path, const ForeignSource& source) {
  const ForeignFolder& folder = *source.folder;
  for (const FolderFile& file : folder.files()) {
    if (folder.single_file() || !file.path.ends_with(".distcp")) continue;
    return absl::DataLossError(
        absl::StrFormat("%s: expected %s beside %s, without which nobody knows what is in it, "
                        "found none",
                        path, std::string(kDcpMetadataName), file.path));
  }
  if (folder.files().empty() && !folder.refused().empty()) {
    return absl::PermissionDeniedError(absl::StrFormat(
        "%s: found nothing in it that may be read; %s", path, folder.refused().front()));
  }
  std::vector<std::string> names;
  for (const FormatReader& each : FormatReaders()) names.emplace_back(each.name);
  return absl::NotFoundError(absl::StrFormat(
      "%s: expected a checkpoint's directory, or ROOT/JOB, or a checkpoint of one of the formats "
      "%s; found %d files of none of them%s",
      path, absl::StrJoin(names, ", "), folder.files().size(),
      folder.refused().empty() ? "" : absl::StrCat(", and ", folder.refused().front())));
}

}  // namespace holdfast::converter
