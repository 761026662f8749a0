#include "checkpoint/checkpoint_view.h"

#include <algorithm>
#include <string_view>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "checkpoint/commit.h"
#include "checkpoint/publish.h"
#include "checkpoint/verify.h"
#include "format/tensor_view.h"

namespace holdfast {

absl::Status PublishView(FileSystem& file_system, const ViewRequest& request,
                         std::span<const std::byte> bytes) {
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const absl::Status published = PublishFile(file_system, request.directory, request.name, text,
                                             {.writer = request.writer,
                                              .on_visible = nullptr,
                                              .on_durable = nullptr,
                                              .is_whole = nullptr,
                                              .bytes_max = kViewBytesMax});
  if (absl::IsAlreadyExists(published)) {
    return absl::AlreadyExistsError(absl::StrFormat(
        "%s/%s exists; a view replaces no file: remove it first", request.directory, request.name));
  }
  RETURN_IF_ERROR(published);
  return file_system.SyncDirectory(request.directory);
}

absl::StatusOr<ViewMade> MakeView(FileSystem& file_system, const CatalogEntry& entry,
                                  const ViewRequest& request) {
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
