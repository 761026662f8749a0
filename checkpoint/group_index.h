// The Index of a group of sealed images, out of what their ranks have registered: what a commit
// writes to INDEX, and what a restore from memory plans with.
#ifndef HOLDFAST_CHECKPOINT_GROUP_INDEX_H_
#define HOLDFAST_CHECKPOINT_GROUP_INDEX_H_

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "checkpoint/image_events.h"
#include "checkpoint/registration.h"
#include "format/fingerprint.h"
#include "format/index.h"

namespace holdfast {

// One rank's part.
struct GroupPart {
  std::shared_ptr<const Registration> registration;
  SealedImage image;
  std::string file;  // name in the checkpoint's directory
  // What the image adds to the fingerprint of every tensor state of the layout; nothing: unknown.
  std::optional<std::vector<Fingerprint>> fingerprints = std::nullopt;
};

// OK if both have the same layout document and `copies`; else kInvalidArgument that names the ranks
// and the first difference.
absl::Status CheckRegisteredAlike(const Registration& a, const Registration& b);

// `parts` in order of the ranks, all of them. The fingerprint of a tensor state is given if those
// of all images with a piece of it are known. Pure, may take long: for a WorkPool. Errors:
// CheckIndex, CheckRegisteredAlike.
absl::StatusOr<Index> BuildIndex(CheckpointId checkpoint, const std::vector<GroupPart>& parts);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_GROUP_INDEX_H_
