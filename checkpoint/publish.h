// How a file of a root appears: whole, under a name that it alone can have, or not at all.
//
//   1. `<name>.partial.<writer>` is created, filled and synced.
//   2. It is linked to its final name; that fails if the name exists, which is the compare-and-set
//      that commits, fences and attempts are made of.
//   3. The partial name is removed.
//
// Where the file system has no links: 1. as `<name>.exclusive.<writer>`; 2. the final name is
// created O_EXCL, filled and synced; 3. the directory is synced, the marker removed, the directory
// synced again. So a file that is broken while its marker is there was torn by a crash and was
// never published: it is void. Without a marker it is damaged.
//
// Neither makes the NAME durable in step 2: the caller syncs the directory when it needs that.
#ifndef HOLDFAST_CHECKPOINT_PUBLISH_H_
#define HOLDFAST_CHECKPOINT_PUBLISH_H_

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "io/file_system.h"

namespace holdfast {

struct PublishOptions {
  // Makes the partial name unique among all processes that ever wrote in the root: [a-z0-9]{1,32}.
  std::string writer;
  // For crash drills. Called, if set, when the contents are visible under the partial name, and
  // when they are durable.
  std::function<void()> on_visible;
  std::function<void()> on_durable;
};

// After OK the file is visible and its contents are durable. Errors: kAlreadyExists: the name is
// taken (nothing was changed); the FileSystem's: the name does not exist, or (without links) is
// torn.
absl::Status PublishFile(FileSystem& file_system, const std::string& directory,
                         const std::string& name, std::string_view bytes,
                         const PublishOptions& options);

// Whether the marker of a publication without links is among the names of the directory.
bool PublicationWasCutOff(const std::vector<std::string>& names, std::string_view name);

// The same, reading the directory.
absl::StatusOr<bool> PublicationWasCutOff(FileSystem& file_system, const std::string& directory,
                                          std::string_view name, size_t names_max);

// Creates a directory if it is not there, and makes its name durable in any case.
absl::Status EnsureDirectory(FileSystem& file_system, const std::string& parent,
                             const std::string& name);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_PUBLISH_H_
