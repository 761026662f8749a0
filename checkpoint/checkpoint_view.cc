#include "checkpoint/checkpoint_view.h"

#include <algorithm>
#include <memory>
#include <string>
#include <string_view>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "checkpoint/commit.h"
#include "checkpoint/publish.h"
#include "checkpoint/verify.h"
#include "format/tensor_view.h"
#include "io/staged_directory.h"

namespace holdfast {
namespace {

std::string PathOf(const ViewRequest& request) {
  return absl::StrFormat("%s/%s", request.directory, request.name);
}

// In the place of what has the name, if there is something.
absl::Status ReplaceView(FileSystem& file_system, const ViewRequest& request,
                         std::span<const std::byte> bytes) {
  ASSIGN_OR_RETURN(
      const std::unique_ptr<StagedDirectory> staged,
      StagedDirectory::Create(PathOf(request), request.writer, StagedDirectory::Existing::kReplace,
                              StagedDirectory::Result::kFile));
  ASSIGN_OR_RETURN(const std::unique_ptr<WritableFile> file,
                   file_system.CreateNew(absl::StrFormat("%s/%s", staged->path(), request.name)));
  RETURN_IF_ERROR(file->Append(bytes));
  RETURN_IF_ERROR(file->Sync());
  return staged->Publish();
}

}  // namespace

absl::Status CheckViewReplacesNotItsSource(const ViewRequest& request, const std::string& source) {
  if (request.existing == ViewRequest::Existing::kRefuse) return absl::OkStatus();
  const std::string view = PathOf(request);
  if (view != source && !view.starts_with(source + "/")) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrFormat(
      "%s is %s: a view shows what lies there, and replaces nothing of it; choose another place",
      view, view == source ? "the checkpoint" : "in the checkpoint"));
}

absl::Status PublishView(FileSystem& file_system, const ViewRequest& request,
                         std::span<const std::byte> bytes) {
  if (request.existing == ViewRequest::Existing::kReplace) {
    return ReplaceView(file_system, request, bytes);
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const absl::Status published = PublishFile(file_system, request.directory, request.name, text,
                                             {.writer = request.writer,
                                              .on_visible = nullptr,
                                              .on_durable = nullptr,
                                              .is_whole = nullptr,
                                              .bytes_max = kViewBytesMax});
  if (absl::IsAlreadyExists(published)) {
    return absl::AlreadyExistsError(
        absl::StrFormat("%s exists; a view replaces no file without --force", PathOf(request)));
  }
  RETURN_IF_ERROR(published);
  return file_system.SyncDirectory(request.directory);
}

absl::StatusOr<ViewMade> MakeView(FileSystem& file_system, const CatalogEntry& entry,
                                  const ViewRequest& request) {
  RETURN_IF_ERROR(CheckViewReplacesNotItsSource(request, entry.directory));
  // Canonical: one slash in front of each directory.
  const auto depth = static_cast<size_t>(std::ranges::count(request.directory, '/'));
  if (request.paths == ViewRequest::Paths::kAbsolute && depth > kViewDepthMax) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: expected at most %d directories from the root to a view, found %d; "
                        "put it elsewhere, or use relative paths",
                        request.directory, kViewDepthMax, depth));
  }
  ASSIGN_OR_RETURN(const Index index, LoadCommittedIndex(file_system, entry));
  if (const absl::Status there = CheckImageSizes(file_system, entry.directory, *entry.manifest);
      !there.ok()) {
    // The checkpoint is committed, so a file that is not there is damage.
    return absl::IsNotFound(there) ? absl::DataLossError(there.message()) : there;
  }
  if (const absl::Status cover = CheckIndexCover(index); !cover.ok()) {
    return absl::Status(cover.code(), absl::StrFormat("%s: %s", entry.directory, cover.message()));
  }
  const ViewPaths paths = request.paths == ViewRequest::Paths::kRelative
                              ? RelativeViewPaths(entry.directory, request.directory)
                              : AbsoluteViewPaths(entry.directory);
  ASSIGN_OR_RETURN(const TensorView view, BuildTensorView(index, entry.directory, paths));
  RETURN_IF_ERROR(PublishView(file_system, request, view.bytes));
  return ViewMade{view.tensor_count, view.bytes.size(), view.in_parts_count, view.files_of_one_max};
}

}  // namespace holdfast
