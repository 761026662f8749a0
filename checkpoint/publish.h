// How a file of a root appears: whole, under a name that it alone can have, or not at all.
//
//   1. `<name>.partial.<writer>` is created, filled and synced.
//   2. It is linked to its final name; that fails if the name exists, which is the compare-and-set
//      that commits, fences and attempts are made of.
//   3. The partial name is removed.
//
// Where the file system has no links:
//   1. A marker, `<name>.exclusive.<writer>`, is created, filled and synced, and its name too.
//   2. The final name is created O_EXCL, filled and synced, and its name too.
//   3. The marker is removed. ONLY WHO REMOVES HIS OWN MARKER HAS PUBLISHED.
// So a file that is broken while its marker is there was torn by a crash, or is being written: it
// is void. Without a marker it is damaged.
//
// A torn file makes room for another writer, which has its own marker by then:
//   a. It removes the others' markers. If one is gone already, its owner has published: look again.
//   b. The file is read once more; if it is whole now, the name is taken.
//   c. It removes the file and begins at 2. An owner who lives on cannot remove his marker any
//      more, and so learns that he has published nothing.
//
// Neither makes the NAME durable in step 2 of links: the caller syncs the directory when it needs
// that.
#ifndef HOLDFAST_CHECKPOINT_PUBLISH_H_
#define HOLDFAST_CHECKPOINT_PUBLISH_H_

#include <cstdint>
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
  // Tells a whole file of this name, of at most `bytes_max` bytes, from a torn one. Unset: what is
  // torn takes the name.
  std::function<bool(const std::string& bytes)> is_whole = nullptr;
  uint64_t bytes_max = 0;
};

// After OK the file is visible and its contents are durable. Errors: kAlreadyExists: the name is
// taken, by a whole file, which is durable, or a damaged one (nothing was changed); kUnavailable
// (without links): another writer is at the same name: look what is there now; the FileSystem's:
// the name does not exist, or (without links) is torn, or whole and not known to be durable.
absl::Status PublishFile(FileSystem& file_system, const std::string& directory,
                         const std::string& name, std::string_view bytes,
                         const PublishOptions& options);

// Whether the marker of a publication without links is among the names of the directory.
bool PublicationWasCutOff(const std::vector<std::string>& names, std::string_view name);

// The same, reading the directory.
absl::StatusOr<bool> PublicationWasCutOff(FileSystem& file_system, const std::string& directory,
                                          std::string_view name);

// For a file that is whole: makes it durable, because its writer may have died before he did, and
// removes the markers of such writers, so that damage that comes later is not taken for theirs.
absl::Status RemoveMarkers(FileSystem& file_system, const std::string& directory,
                           std::string_view name);

// Creates a directory if it is not there, and makes its name durable in any case.
absl::Status EnsureDirectory(FileSystem& file_system, const std::string& parent,
                             const std::string& name);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_PUBLISH_H_
