// A job as one training process sees it: everything behind the C ABI, in C++.
//
// holdfast.h has the contracts of these calls; here is who does what: Link keeps the session,
// Capture copies, SourceChecker compares, RestoreBuffers restores, Heartbeat beats. This class
// holds them together and remembers the last saves.
#ifndef HOLDFAST_HOOK_JOB_H_
#define HOLDFAST_HOOK_JOB_H_

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>

#include "hook/capture.h"
#include "hook/check_source.h"
#include "hook/error.h"
#include "hook/heartbeat.h"
#include "hook/link.h"
#include "hook/os.h"
#include "hook/restore.h"
#include "hook/save_reports.h"
#include "hook/settings.h"
#include "hook/source_reader.h"

namespace holdfast::hook {

// How long closing a job lets an unfinished capture go on.
inline constexpr int64_t kCloseCaptureNs = 10 * kNsPerSecond;
inline constexpr size_t kSaveRecords = abi::kReportCount;

// Threads: one at a time, but for Heartbeat, BeginSection and EndSection: any.
class Job {
 public:
  // `reader` reads tensors and must outlive the job; `seed` draws the samples of check_source.
  static Result<std::unique_ptr<Job>> Open(const Settings& settings, SourceReader* reader,
                                           uint64_t seed, Deadline deadline);
  ~Job();

  // Lets an unfinished capture go on for kCloseCaptureNs at most, then it is void; ends the
  // session. False: a thread waits for a device that does not answer; the job, and what it was
  // given, must then never be destroyed. Once, and nothing else behind it.
  bool Close();

  Error Register(const char* layout_json, std::span<const hf_buffer> buffers,
                 std::span<const hf_blob_slot> blobs, Deadline deadline);
  bool Due(uint64_t step);
  Error Save(uint64_t step, const hf_save_options& options);
  Error WaitCaptured(int32_t group, Deadline deadline);
  Error WaitCommitted(uint64_t step, uint32_t faults, Deadline deadline);
  Error Restore(const hf_restore_options& options, hf_restore_result* result, Deadline deadline);
  Result<std::span<const std::byte>> RestoredBlob(std::string_view name, int64_t rank) const;
  void GetInfo(hf_info* info) const;
  Error Report(uint64_t step, hf_save_report* report) const;

  void Beat(uint64_t step) { heartbeat_.Beat(link_->page(), step); }
  void BeginSection(const char* name) { heartbeat_.BeginSection(link_->page(), name); }
  void EndSection() { heartbeat_.EndSection(link_->page()); }

 private:
  // What this process knows of one of its saves.
  struct SaveRecord {
    uint64_t step = abi::kNoStep;
    uint64_t session_id = 0;
    hf_save_state state = HF_SAVE_NONE;  // up to CAPTURED, or FAILED
    uint64_t image_bytes = 0;
    uint64_t block_bytes = 1;
    uint64_t blocks = 0;
    uint64_t blocks_captured = 0;  // when the capture ended
    int64_t call_ns = 0;
    int64_t blocked_ns = 0;
    int64_t capture_ns = 0;
    int64_t begun_ns = 0;
    Capture::DeviceCopies device;  // when the capture ended
    Error error;
  };

  Job(const Settings& settings, SourceReader* reader, uint64_t seed)
      : settings_(settings), reader_(reader), checker_(settings.check_source, seed) {}

  // The training loop is held up by a call of ours while this lives.
  class HeldUp {
   public:
    explicit HeldUp(Job* job) : job_(*job) {
      job_.heartbeat_.BeginHeld();
      job_.heartbeat_.WriteHeld(job_.link_->page());
    }
    ~HeldUp() {
      job_.heartbeat_.EndHeld();
      job_.heartbeat_.WriteHeld(job_.link_->page());
    }
    HeldUp(const HeldUp&) = delete;
    HeldUp& operator=(const HeldUp&) = delete;

   private:
    Job& job_;
  };

  // The link's snapshot, taken anew if it has changed.
  const Link::Snapshot& Fresh();
  Error CheckMaySave(uint64_t step);
  Error CheckBlobs(const Registration& registration, uint64_t step,
                   std::span<const hf_blob> blobs) const;
  Error SetPointers(Registration& registration, void* const* pointers) const;
  Result<uint32_t> ClaimGrantedSlot(const Registration& registration, uint64_t step,
                                    Deadline deadline);
  Error WriteBlobs(const Registration& registration, uint32_t slot,
                   std::span<const hf_blob> blobs) const;
  Error CaptureFailed(const Error& error);
  void CaptureSucceeded();
  const SaveRecord* FindRecord(uint64_t step) const;
  SaveRecord& current() { return records_[(record_count_ - 1) % kSaveRecords]; }
  // The outcome of a save if it is decided; nothing while it is not.
  std::optional<Error> Outcome(uint64_t step, bool power) const;

  const Settings settings_;
  SourceReader* const reader_;
  SourceChecker checker_;  // of host memory
  Heartbeat heartbeat_;
  UniqueFd doorbell_;
  // The link's thread calls the capture's Populate: destroyed in reverse order.
  std::unique_ptr<Capture> capture_;
  std::unique_ptr<Link> link_;

  // Of the agent that the job was opened with.
  uint64_t due_every_steps_ = 0;
  uint64_t due_wanted_step_ = 0;   // RankPage::due_step, when it was last come to
  uint64_t due_granted_step_ = 0;  // the step that was due because of it
  Link::Snapshot snapshot_;

  // Of the capture that runs.
  std::shared_ptr<Registration> captured_registration_;
  uint32_t captured_slot_ = 0;
  uint64_t unwaited_groups_ = 0;

  std::array<SaveRecord, kSaveRecords> records_;
  uint64_t record_count_ = 0;
  std::optional<RestoredBlobSet> restored_blobs_;
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_JOB_H_
