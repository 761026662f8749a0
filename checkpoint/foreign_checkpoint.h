// A checkpoint of another job as the restore point of a new one (HOLDFAST_RESTORE_FROM): from the
// path that the trainer names to the checkpoint, and from what the store has recorded to its INDEX.
//
// Another job means: another name, uuid, root, layout and world size may be. So nothing of the
// asking job's state is consulted here, and nothing is written. The directory may be anybody's:
// everything is read as strictly as the catalog and DecodeIndex read.
//
// Blocking calls, for a WorkPool.
#ifndef HOLDFAST_CHECKPOINT_FOREIGN_CHECKPOINT_H_
#define HOLDFAST_CHECKPOINT_FOREIGN_CHECKPOINT_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/coordination_store.h"
#include "format/index.h"
#include "io/file_system.h"

namespace holdfast {

// The checkpoint that `path` names: a checkpoint directory, or ROOT/JOB for the newest of that
// job's current branch. Errors say why it cannot be started from, and are never kNotFound, by which
// a restore says that a run begins from nothing: kInvalidArgument (no such directory, or neither a
// job's nor a checkpoint's), kFailedPrecondition (not committed; marked bad), kDataLoss (damaged;
// which is the newest cannot be told), kResourceExhausted and kPermissionDenied and kUnavailable as
// the FileSystem's.
absl::StatusOr<ForeignCheckpoint> FindForeignCheckpoint(FileSystem& file_system,
                                                        const std::string& path);

// Its INDEX, compared with its manifest; every image file is there with its size. kDataLoss: it is
// not there any more, another one is in its place, or it is damaged.
absl::StatusOr<Index> LoadForeignIndex(FileSystem& file_system, const ForeignCheckpoint& foreign);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_FOREIGN_CHECKPOINT_H_
