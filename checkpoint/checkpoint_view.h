// `holdfast view`: from a committed checkpoint to the file of its view.
#ifndef HOLDFAST_CHECKPOINT_CHECKPOINT_VIEW_H_
#define HOLDFAST_CHECKPOINT_CHECKPOINT_VIEW_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/catalog.h"
#include "io/file_system.h"

namespace holdfast {

struct ViewRequest {
  std::string directory;  // where the view shall lie: absolute, without links
  std::string name;
  enum class Paths { kAbsolute, kRelative } paths = Paths::kAbsolute;
  std::string writer;  // as PublishOptions::writer
  // Of a file that has the name: kReplace is for files only, and at no time is neither there.
  enum class Existing { kRefuse, kReplace } existing = Existing::kRefuse;
};

struct ViewMade {
  uint64_t tensor_count = 0;
  uint64_t bytes = 0;
  uint64_t in_parts_count = 0;    // as TensorView
  uint64_t files_of_one_max = 0;  // as TensorView
};

// Blocking. After OK the view is visible, whole and durable. After an error there is no file of the
// name, or what was there before; or, if the directory could not be synced, the view: visible and
// whole, its name not known to be durable. `entry` was read from an absolute path without links.
// Errors: kNotFound (not committed), kDataLoss (INDEX, a cover with gaps or overlaps, an image that
// is missing or has another size: named), kInvalidArgument (absolute paths, and a directory deeper
// than kViewDepthMax), kAlreadyExists, kFailedPrecondition (kReplace, and the name is that of the
// checkpoint or in it), those of BuildTensorView, the FileSystem's.
absl::StatusOr<ViewMade> MakeView(FileSystem& file_system, const CatalogEntry& entry,
                                  const ViewRequest& request);

// kFailedPrecondition if the view would replace `source`, an absolute path without links, or what
// is in it: what it shall show.
absl::Status CheckViewReplacesNotItsSource(const ViewRequest& request, const std::string& source);

// The last step of it alone, for bytes that somebody else has made (converter/foreign_view.h); all
// that is said of the file after OK and after an error holds here too.
absl::Status PublishView(FileSystem& file_system, const ViewRequest& request,
                         std::span<const std::byte> bytes);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_CHECKPOINT_VIEW_H_
