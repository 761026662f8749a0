// The agent's part of a RankPage: what became of each save, the newest commits, and who fenced this
// session. Nothing is ever read back from the page but at a restart, and then with suspicion: the
// trainer can write it too.
#ifndef HOLDFAST_CHECKPOINT_SAVE_REPORTS_H_
#define HOLDFAST_CHECKPOINT_SAVE_REPORTS_H_

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/ids.h"
#include "checkpoint/shared_mapping.h"
#include "hook/abi/shared_memory.h"

namespace holdfast {

// As hf_save_state, which this room may not include.
enum class SaveState : uint32_t {
  kNone = 0,
  kCapturing = 1,
  kCaptured = 2,
  kCommittedProcess = 3,
  kCommittedPower = 4,
  kFailed = 5,
};

// Which promises a commit makes (hf: HF_SURVIVE_*).
enum class Survives : uint32_t { kProcess, kPower };

// Threads: the event loop's. Lifetime: owns its mapping.
class SaveReports {
 public:
  // A new page. Errors: kResourceExhausted.
  static absl::StatusOr<std::unique_ptr<SaveReports>> Create(uint64_t session_id,
                                                             uint64_t due_every_steps);
  // The page of a session that a former worker served. Constant fields are written anew; what the
  // entries say is kept, because it is only ever told to the trainer that could have changed it.
  static absl::StatusOr<std::unique_ptr<SaveReports>> Reopen(uint64_t session_id,
                                                             uint64_t due_every_steps, UniqueFd fd);

  int fd() const { return mapping_->fd(); }
  uint64_t bytes() const { return mapping_->bytes().size(); }

  // The save of `step` has begun: takes the next of the kReportCount entries. `begun` is the
  // agent's clock, for CommittedAfter. A step that has an entry already gets it again, from anew.
  void Begin(Step step, uint64_t block_count, absl::Duration begun);
  // Of the save of `step`; ignored if its entry was taken by a newer save. Counters alone do not
  // wake anybody.
  void SetCounters(Step step, uint64_t blocks_captured, uint64_t blocks_flushed);
  void SetCaptured(Step step, absl::Duration capture_time);
  void SetFlushed(Step step, absl::Duration flush_time);
  // The checkpoint of `step` is committed, for all ranks; `now` as in Begin. Also raises the page's
  // committed_*_step.
  void SetCommitted(Step step, Survives survives, absl::Duration now);
  // Of a step that was committed, surviving power, before this page was made (the agent is new, the
  // attempt is not): takes the next entry. Ignored if the step has one.
  void AddCommitted(Step step);
  // Final, but for a step that is committed surviving power already (then ignored). `why` not OK.
  void SetFailed(Step step, const absl::Status& why);
  // The newest committed step of this attempt without an entry of its own (after a restart, or a
  // newly opened session).
  void RaiseCommitted(Step step, Survives survives);

  // An image that was committed for `process` alone is lost: `newest` is the newest of this attempt
  // that still is (what survives power counts anyway).
  void LowerCommitted(std::optional<Step> newest);
  void SetFencedBy(Attempt attempt);

  // The last step that the trainer has asked for (hf_due), which it may write as it likes; 0: none.
  uint64_t asked_step() const;
  // A save is due at the first step that is asked for and not below this one.
  void SetDueStep(uint64_t step);
  // The last heartbeat, as the trainer says.
  struct Heartbeat {
    uint64_t count = 0;
    uint64_t step = 0;
  };
  Heartbeat heartbeat() const;
  // For how long calls of the library have held the training loop up, in total, as the trainer
  // says; nothing before the first. It may fall by the length of a call that is just ending.
  std::optional<absl::Duration> held() const;
  // The sections that it says it is in, outermost first, as text whatever the bytes are.
  std::vector<std::string> sections() const;
  // The newest step that is committed; `begun` of its save, if that is still known.
  struct Committed {
    Step step{};
    std::optional<absl::Duration> begun;
  };
  std::optional<Committed> committed(Survives survives) const;

  // A slot was granted, or something else that a trainer may sleep for.
  void Wake();

 private:
  struct Entry {
    std::optional<Step> step;
    SaveState state = SaveState::kNone;
    absl::Duration begun;
    // As last written to the page.
    uint64_t block_count = 0;
    uint64_t blocks_captured = 0;
    uint64_t blocks_flushed = 0;
    int64_t capture_ns = 0;
    int64_t flush_ns = 0;
    int64_t commit_ns = 0;
    int32_t code = 0;
    std::string text;
  };

  SaveReports(std::shared_ptr<SharedMapping> mapping, uint64_t session_id,
              uint64_t due_every_steps);
  abi::RankPage& page();
  const abi::RankPage& page() const;
  void LoadEntries();
  Entry* Find(Step step);
  void Publish(const Entry& entry);

  std::shared_ptr<SharedMapping> mapping_;
  std::array<Entry, abi::kReportCount> entries_;
  uint32_t next_entry_ = 0;
  uint32_t sequence_ = 0;                         // of the seqlocks; even
  std::array<std::optional<Step>, 2> committed_;  // by Survives
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_SAVE_REPORTS_H_
