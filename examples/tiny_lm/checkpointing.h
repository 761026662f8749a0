// All that tiny_lm does with Holdfast: the one file to read for how a training loop uses it.
//
// A failure of Holdfast is printed as an event and never stops the training. The exception is a
// restore that fails in its middle: then the buffers' contents are unspecified, and the caller
// ends.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_CHECKPOINTING_H_
#define HOLDFAST_EXAMPLES_TINY_LM_CHECKPOINTING_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "examples/tiny_lm/events.h"
#include "examples/tiny_lm/options.h"
#include "examples/tiny_lm/state.h"
#include "hook/holdfast.h"

namespace tiny_lm {

struct Blob {
  std::string name;
  std::string bytes;
};

struct BlobSlot {
  std::string name;
  bool per_rank = false;
  uint64_t capacity_bytes = 0;
};

enum class RestoreOutcome : int64_t {
  kNoHoldfast = 0,  // not available: train without it
  kNothing = 1,     // there is no checkpoint: train from the beginning
  kRestored = 2,
  kFailed = 3,  // the buffers' contents are unspecified
};

// Threads: one at a time.
// Lifetime: the buffers that were registered, the stream and the log must outlive it.
class Checkpointing {
 public:
  // Joins the job of the environment ($HOLDFAST_JOB). Does not fail: without an
  // agent every later call is a cheap no. `stream`: the CUstream behind whose work tensors in
  // device memory are captured and restored; null without any.
  Checkpointing(const CheckpointingOptions& options, void* stream, EventLog& log);
  ~Checkpointing();
  Checkpointing(const Checkpointing&) = delete;
  Checkpointing& operator=(const Checkpointing&) = delete;

  // 0 without Holdfast.
  uint32_t attempt() const;
  // Null without Holdfast.
  hf_job* job() const { return job_; }

  // Registers, and fills the buffers from the newest safe checkpoint, whatever its layout. `step`
  // is set on kRestored.
  RestoreOutcome RegisterAndRestore(const std::string& layout_document,
                                    const std::vector<StateBuffer>& tensors,
                                    const std::vector<BlobSlot>& blobs, uint64_t& step);
  // A blob of the restored checkpoint; `old_rank` for a blob per rank, else -1.
  absl::StatusOr<std::string> RestoredBlob(const std::string& name, int64_t old_rank);
  uint32_t restored_world_size() const { return restored_world_size_; }

  bool Due(uint64_t step);
  // After the optimizer step. True: a save of `step` has begun.
  bool Save(uint64_t step, const std::vector<Blob>& blobs);
  // Before the next optimizer step.
  void WaitCaptured();
  // Prints a line for each save that has ended since the last call.
  void PrintReports();
  // Before leaving: saves `step` if it has not been, and waits until it survives the loss of power.
  void CommitLast(uint64_t step, const std::vector<Blob>& blobs);

 private:
  void PrintError(const std::string& call, const hf_error& error) const;
  bool SaveWithin(uint64_t step, const std::vector<Blob>& blobs, int64_t wait_ns);
  // False: the save goes on.
  bool PrintReport(uint64_t step) const;

  const CheckpointingOptions options_;
  void* const stream_;
  EventLog& log_;
  hf_job* job_ = nullptr;
  bool registered_ = false;
  uint32_t restored_world_size_ = 0;
  uint64_t last_saved_step_ = UINT64_MAX;
  std::deque<uint64_t> unreported_;
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_CHECKPOINTING_H_
