// Writes a committed checkpoint of one rank from whole tensors that somebody else reads, in one
// pass and in bounded memory: what was imported from another framework. From there `holdfast
// reshard` brings it into any layout.
//
// Blocking calls.
#ifndef HOLDFAST_CHECKPOINT_SINGLE_IMAGE_H_
#define HOLDFAST_CHECKPOINT_SINGLE_IMAGE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/ids.h"
#include "format/tensor_piece.h"
#include "io/file_system.h"

namespace holdfast {

struct SingleImageBlob {
  std::string name;
  std::string bytes;
};

// Where the tensors come from.
struct TensorSource {
  std::vector<TensorState> states;  // (tensor, state) distinct; CheckTensorState holds
  // Gives all bytes of states[number] to the sink, in order (row-major, little-endian).
  using Sink = std::function<absl::Status(std::span<const std::byte> bytes)>;
  std::function<absl::Status(size_t number, const Sink& sink)> read;
};

struct SingleImageRequest {
  // Exists and is empty. It may have another name than the job until its maker renames it: nothing
  // in a job's directory says where that is.
  std::string job_directory;
  std::string job;
  std::string job_uuid;
  Step step{};
  std::string writer;             // see CommitRequest
  std::string scratch_directory;  // see ImageTemplate::Build
  absl::Time created_at{};
  std::vector<SingleImageBlob> blobs;  // of global scope
};

struct SingleImageReport {
  std::string directory;  // of the new checkpoint
  uint64_t bytes_written = 0;
};

// Everything about the image that can be said before a byte is written, its head included.
//
// Threads: one. Lifetime: owns everything.
class SingleImagePlan {
 public:
  // Writes nothing but scratch files. Errors: kInvalidArgument (names, shapes), those of
  // ImageTemplate::Build.
  static absl::StatusOr<SingleImagePlan> Create(const TensorSource& source,
                                                const SingleImageRequest& request);
  ~SingleImagePlan();
  SingleImagePlan(SingleImagePlan&&) noexcept;
  SingleImagePlan& operator=(SingleImagePlan&&) noexcept;

  uint64_t image_bytes() const;
  // The most memory that writing it takes besides the plan: INDEX, in all forms in which a commit
  // has it at a time. An upper bound that was measured.
  uint64_t write_memory_bytes() const;

  struct Contents;  // of single_image.cc

 private:
  friend absl::StatusOr<SingleImageReport> WriteSingleImage(FileSystem& file_system,
                                                            const TensorSource& source,
                                                            const SingleImageRequest& request,
                                                            SingleImagePlan plan);
  explicit SingleImagePlan(std::unique_ptr<Contents> contents);

  std::unique_ptr<Contents> contents_;
};

// `plan`: of the same source and request.
// After OK the checkpoint is committed: step `step` of attempt 0 of a new job. After an error it is
// not, with the one exception of CommitCheckpoint; whoever made the directory removes it.
// Errors: kAlreadyExists (the directory has a JOB.json), kInvalidArgument (names, shapes, a source
// that gives too few or too many bytes), those of the source, of CommitCheckpoint and of the
// FileSystem.
absl::StatusOr<SingleImageReport> WriteSingleImage(FileSystem& file_system,
                                                   const TensorSource& source,
                                                   const SingleImageRequest& request,
                                                   SingleImagePlan plan);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_SINGLE_IMAGE_H_
