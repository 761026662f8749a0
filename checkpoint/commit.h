// The commit of one checkpoint to one root: the protocol by which a directory full of durable
// images becomes a checkpoint, and the one by which a newer attempt makes sure that it never will.
// Both are a link(2) to the same name, MANIFEST.json, which exactly one of them can win (P7).
//
// Blocking calls, for a WorkPool. No state: everything is in the file system.
#ifndef HOLDFAST_CHECKPOINT_COMMIT_H_
#define HOLDFAST_CHECKPOINT_COMMIT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/ids.h"
#include "format/index.h"
#include "format/manifest.h"
#include "format/planner.h"
#include "io/file_system.h"

namespace holdfast {

struct CommitRequest {
  std::string job_directory;  // <root>/<job>
  // Makes names of partial files unique among all processes: [a-z0-9]{1,32}.
  std::string writer;
  std::optional<CheckpointId> parent;
  absl::Time created_at{};
};

// Publishes `index` and a manifest that survives {process, power}. Every image of the index is
// durable under its name's file already; the names need not be.
//
// After OK the checkpoint is committed: everything that a reader needs is durable, and was read
// back and decoded once more (INDEX and MANIFEST; of the images the file sizes). Idempotent: if the
// directory holds the same commit already, OK.
// After any error either nothing is published, or (only where the last SyncDirectory failed) the
// manifest is visible and its durability unknown: the save has failed all the same, loudly, and a
// reader that finds it finds a whole checkpoint.
// Errors: kDataLoss (the pieces do not cover the tensors; read back something else),
// kFailedPrecondition (fenced), kAlreadyExists (another commit under this name), kUnavailable
// (without links: a newer attempt is fencing it), the FileSystem's.
absl::Status CommitCheckpoint(FileSystem& file_system, const CommitRequest& request,
                              const Index& index);

// The proof that CommitCheckpoint demands, apart, because it depends on the registrations only and
// is the costly part: OK if the pieces of `index` hold every element of every tensor exactly once.
absl::Status CheckIndexCover(const Index& index);
// The pieces as the planner asks for them.
std::vector<StoredPiece> StoredPieces(const Index& index);

// Makes sure that checkpoint `id`, whose directory exists, will never be committed, unless it is
// already: publishes a fence under the manifest's name. OK: fenced (by this or an earlier attempt).
// kAlreadyExists: it is committed. kUnavailable: what has the name is neither a manifest nor a
// fence, or another writer is at it: read the catalog again.
absl::Status FenceCheckpoint(FileSystem& file_system, const std::string& job_directory,
                             const std::string& writer, CheckpointId id, Attempt fenced_by);

// A fence as MANIFEST.json: `fenced_by` if `bytes` are one for `id`; kNotFound if they are
// something else; kDataLoss if they are a damaged fence.
absl::StatusOr<Attempt> DecodeFence(std::string_view bytes, CheckpointId id,
                                    const std::string& where);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_COMMIT_H_
