// Marks against a checkpoint (BAD.<n> in its directory, format/manifest.h): a marked one is not
// chosen for a restore, whatever agent or attempt comes. They say that somebody distrusts what it
// holds; whether its bytes are as they were written is checkpoint/verify.h's to say.
//
// Blocking calls, for a WorkPool. No state: everything is in the file system.
#ifndef HOLDFAST_CHECKPOINT_BAD_MARKS_H_
#define HOLDFAST_CHECKPOINT_BAD_MARKS_H_

#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "base/ids.h"
#include "io/file_system.h"

namespace holdfast {

struct CheckpointPlace {
  std::string root;
  std::string job;
  CheckpointId checkpoint;
};

struct MarkRequest {
  std::string reason;       // UTF-8, at most kReasonBytesMax
  std::string writer;       // as PublishOptions::writer
  absl::Time created_at{};  // wall clock, for people; in whole seconds there
};

// After OK the mark is durable, contents and name. A mark with this reason that is there already is
// enough. After an error it is there as a whole or not at all. Errors: kNotFound (no such job, or
// no directory of that checkpoint), kInvalidArgument (reason), kResourceExhausted (kMarksMax
// marks), kUnavailable (others mark it all the time), the FileSystem's.
absl::Status MarkBad(FileSystem& file_system, const CheckpointPlace& place,
                     const MarkRequest& request);

// After OK there is no mark against it, durably; OK also if there was none. After an error some may
// be gone, and it counts as marked while there is one. Errors: kNotFound, the FileSystem's.
absl::Status UnmarkBad(FileSystem& file_system, const CheckpointPlace& place);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_BAD_MARKS_H_
