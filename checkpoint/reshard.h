// Writes a committed checkpoint anew in another layout, in bounded memory, without an agent: the
// same tensors, the same bytes, cut and placed as another layout document says. What becomes of it
// is a checkpoint of a job of its own (new uuid, attempt 0, the same step, no parent), in another
// root or under another name; its JOB.json names the source.
//
// The protocol stands in reshard.cc, what goes where in reshard_plan.h.
//
// Blocking calls.
#ifndef HOLDFAST_CHECKPOINT_RESHARD_H_
#define HOLDFAST_CHECKPOINT_RESHARD_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/ids.h"
#include "checkpoint/reshard_plan.h"
#include "checkpoint/verify.h"
#include "format/index.h"
#include "format/manifest.h"
#include "io/file_system.h"

namespace holdfast {

// Writes all of `data` at an offset, blocking; and makes what was written to a file durable, of
// which a failure is final. ReadAt's counterparts.
using WriteAt =
    std::function<absl::Status(IoFile& file, uint64_t offset, std::span<const std::byte> data)>;
using SyncWritten = std::function<absl::Status(IoFile& file)>;

// Where everything is stored. Threads: the functions are called from several at once, unless a
// schedule has one thread. Lifetime: the file system outlives it.
struct ReshardStorage {
  FileSystem& file_system;
  ReadAt read_at;
  WriteAt write_at;
  SyncWritten sync;
};
// A real file system's.
ReshardStorage RealReshardStorage(FileSystem& file_system);

struct ReshardRequest {
  std::string source_directory;  // of the checkpoint
  std::string layout_json;       // a document (not rules)
  std::string root;              // of the target; exists
  std::string job;
  std::string new_job_uuid;         // used unless a run that failed has left one behind
  std::string writer;               // see CommitRequest
  std::string scratch_directory;    // see ImageTemplate::Build
  uint64_t alignment_bytes = 4096;  // see ReshardTarget
  absl::Time created_at{};
};

struct ReshardOptions {
  Caching source_caching = Caching::kBuffered;
  Caching target_caching = Caching::kBuffered;
  // Called on the calling thread, now and then; false stops: kCancelled.
  std::function<bool(uint64_t bytes_done, uint64_t bytes_total)> progress = nullptr;
};

struct ReshardReport {
  std::string directory;  // of the new checkpoint
  std::string job_uuid;
  uint64_t bytes_read = 0;  // of images
  uint64_t bytes_written = 0;
  // Tensor states whose fingerprint is that of the source's INDEX, and those that have none there.
  uint64_t fingerprints_equal = 0;
  uint64_t fingerprints_not_computed = 0;
};

// Looks at the target, and plans. Writes nothing (but scratch files). `source`: what LoadIndex gave
// for the source's directory; it outlives the plan.
// Errors: kAlreadyExists (the root holds such a job; the text says what it is and what to do),
// those of ReshardPlan::Create and of the FileSystem.
absl::StatusOr<std::unique_ptr<const ReshardPlan>> PlanReshard(FileSystem& file_system,
                                                               const ReshardRequest& request,
                                                               const Index& source);

// Carries it out. After OK the new checkpoint is committed. After an error it is not, with the one
// exception of CommitCheckpoint (visible, not known to be durable); otherwise images and INDEX are
// removed as far as can be, and the same call may be made again. They stay where a manifest, or
// what may become one, is beside them: a next run says so.
// Errors: kDataLoss (a block of the source is damaged; a tensor that was written has another
// fingerprint than the source's INDEX says; both named), kResourceExhausted (no room: found before
// anything is written, where the file system knows it), kCancelled, kAlreadyExists as above,
// kFailedPrecondition (an agent has opened the job meanwhile, and fenced it), the storage's.
// Plan and schedule are let go before the commit, whose own memory is that of the target's INDEX:
// decoded twice, and its bytes twice.
absl::StatusOr<ReshardReport> RunReshard(const ReshardStorage& storage,
                                         const ReshardRequest& request,
                                         std::shared_ptr<const ReshardPlan> plan,
                                         ReshardSchedule schedule, const ReshardOptions& options);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_RESHARD_H_
