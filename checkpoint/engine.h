// The checkpoint engine of an agent: all jobs, sessions, images and restores of a node. The agent
// (agent/) only translates between it and sockets.
//
// It is single-threaded: every call and every completion runs on the event loop's thread; work that
// blocks or computes goes to the WorkPool, transfers to the IoRing. So a simulation drives all of
// it from one thread (checkpoint/crash_enumeration_test.cc).
//
// Parts: Registration (document -> layout, template, capture plan), RankImages (slots of one
// session), Flush (one image to one file), Job (attempts, groups, commit), Catalog (what is
// committed in the root), Restore (plan and delivery).
#ifndef HOLDFAST_CHECKPOINT_ENGINE_H_
#define HOLDFAST_CHECKPOINT_ENGINE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "base/executor.h"
#include "base/ids.h"
#include "checkpoint/coordination_store.h"
#include "checkpoint/descriptor_keeper.h"
#include "checkpoint/image_events.h"
#include "checkpoint/populate_memory.h"
#include "checkpoint/restore_selection.h"
#include "format/layout.h"
#include "io/file_system.h"
#include "io/io_ring.h"
#include "io/unique_fd.h"

namespace holdfast {

struct EngineOptions {
  std::string root;                          // directory of all jobs; exists
  std::string scratch_directory;             // for building templates; exists
  uint64_t host_memory_bytes_max = 0;        // of all rank memories together: hard
  uint64_t block_bytes = uint64_t{4} << 20;  // power of two, 4 KiB to 64 MiB
  uint32_t images_per_rank_max = 2;          // 1 to abi::kSlotsMax; fewer where the budget is short
  uint64_t due_every_steps = 0;              // 0: never due by itself
  uint32_t flush_writes_in_flight_max = 8;   // of one image
  Caching flush_caching = Caching::kDirect;  // as probed for the root's mount
  Caching restore_caching = Caching::kDirect;  // the same, for blocks of any size
  // Of all blobs of a checkpoint together, which every rank that restores it is handed. A save with
  // more fails.
  uint64_t blobs_bytes_max = uint64_t{4} << 30;
  // Gets every warning of StatusJson() when it arises, for a log. May be empty.
  std::function<void(const std::string&)> on_warning;
  // Makes names of partial files and numbers of sessions unlike those of every other agent that
  // ever wrote in the root: [a-z0-9]{1,32}. Empty: made up at random.
  std::string writer;
  // This process's: only its own user's restore_from is read (LocalServer admits no other at all).
  uint32_t user_id = 0;
};

// The world. All outlive the engine.
struct EngineWorld {
  FileSystem& file_system;
  IoRing& ring;
  EventLoop& loop;
  WorkPool& pool;
  const Clock& clock;
  CoordinationStore& store;
  DescriptorKeeper& keeper;
  PopulateMemory populate = nullptr;  // nullptr: the kernel's
};

struct OpenParameters {
  std::string job;
  std::string attempt_key;
  std::string root;  // empty, or must equal EngineOptions::root
  // A checkpoint directory, or ROOT/JOB for its newest, of any root: what an attempt starts from
  // whose job has no committed checkpoint of its own. Absolute; empty: nothing.
  std::string restore_from;
  std::string node;
  Rank rank{};
  uint32_t world_size = 0;
  uint32_t local_rank = 0;
  Attempt resume_attempt{};  // 0: a new open
  SessionId resume_session{};
  uint64_t resume_registration_id = 0;
  uint32_t process_id = 0;  // from SO_PEERCRED
  uint32_t user_id = 0;     // from SO_PEERCRED
  UniqueFd process_fd;      // pidfd: readable when the process is dead
  UniqueFd doorbell_fd;     // eventfd of the trainer; the agent watches and reads it
};

struct OpenResult {
  SessionId session{};
  Attempt attempt{};
  bool resumed = false;
  std::string job_uuid;
  int rank_page_fd = -1;  // the engine's; valid until the session ends
  uint64_t rank_page_bytes = 0;
};

struct RegisterResult {
  uint64_t registration_id = 0;
  int memory_fd = -1;  // the engine's, as the next two; valid until the registration is replaced
  int registration_memory_fd = -1;
  int capture_plan_fd = -1;
  uint64_t memory_bytes = 0;
  uint64_t registration_memory_bytes = 0;
  uint64_t capture_plan_bytes = 0;
  uint64_t image_bytes = 0;
};

// What became of OpenParameters::restore_from.
enum class RestoreFrom {
  kNotGiven,
  kUsed,     // the restore point is that checkpoint
  kIgnored,  // the job has a restore point of its own
};

struct RestoreBegun {
  CheckpointId checkpoint;
  uint32_t world_size = 0;  // of the run that saved it: its blobs are of these ranks
  RestoreFrom restore_from = RestoreFrom::kNotGiven;
  uint64_t tensor_states = 0;           // of this rank: will be filled
  uint64_t tensor_states_left_out = 0;  // of this rank: not chosen, stay as they are
  UniqueFd operations_fd;               // sealed: abi::RestoreOp table
  uint64_t operations_bytes = 0;
  uint64_t op_count = 0;
  UniqueFd blobs_fd;  // sealed: abi::RestoredBlobs
  uint64_t blobs_bytes = 0;
  uint64_t bytes = 0;
  // Memories of other ranks' images that entries refer to; map_id = index + 1. Read-only
  // descriptors.
  struct Map {
    UniqueFd fd;
    uint64_t bytes = 0;
  };
  std::vector<Map> maps;
};

// What the attempt of one key begins from, instead of the newest checkpoint.
struct RestoreOrder {
  std::string attempt_key;
  // Of the job itself: this one and no other. Nothing: as if the job had none (a restore_from is
  // what it begins from then).
  std::optional<CheckpointId> checkpoint;
};

struct RestoreEnded {
  uint64_t bytes = 0;
  uint64_t bytes_from_memory = 0;
  // The rank has all that it will ever ask of this checkpoint, as far as its registration says.
  bool is_whole = true;
};

// Threads: the event loop's, all calls. Callbacks run on the loop, never inside the call that took
//   them.
// Lifetime: the destructor abandons what is in flight (as a crash would); call Drain() first.
class Engine {
 public:
  static absl::StatusOr<std::unique_ptr<Engine>> Create(EngineOptions options, EngineWorld world);
  virtual ~Engine() = default;

  // Takes over what a dead worker left in the keeper: sessions go on where they were, sealed images
  // are flushed and committed. What is damaged is dropped with a warning in StatusJson(). Call
  // once, before anything else. `done` runs when trainers may resume. A job whose storage cannot be
  // read by then is looked at again until it can; its trainers, and who opens it, are refused with
  // kDataLoss (it is damaged) or kUnavailable meanwhile.
  virtual void Recover(std::vector<KeptDescriptor> kept, std::function<void()> done) = 0;

  // Joins the job's current attempt or begins the next (DESIGN section 3). Errors: kInvalidArgument
  // (names, rank, world size; another restore_from than the attempt's other ranks),
  // kFailedPrecondition (fenced resume; other root), kPermissionDenied (restore_from of another
  // user than the agent's: a second lock, whatever let that user in), storage errors.
  virtual void Open(OpenParameters parameters,
                    std::function<void(absl::StatusOr<OpenResult>)> done) = 0;

  // `document` is a sealed memfd of abi::RegistrationDocument. Errors: kInvalidArgument (layout,
  // buffers or blobs, named; another layout than the other ranks' of this attempt, with the first
  // difference), kResourceExhausted (budget: asked, free and the limit).
  virtual void Register(SessionId session, UniqueFd document, uint64_t document_bytes,
                        std::function<void(absl::StatusOr<RegisterResult>)> done) = 0;

  // Decides the attempt's restore point if that is not done yet, plans for this rank's
  // registration, and calls `begun`; after OK delivers pieces through the registration's
  // RestoreRing (advance it at each Doorbell()) and ends with `ended`. kNotFound: there is no
  // checkpoint, and no restore_from was given: one that cannot be used is another error.
  // kInvalidArgument: a pattern of `selection` fits nothing. kFailedPrecondition: what is chosen is
  // not in the checkpoint, or is another tensor there.
  virtual void Restore(SessionId session, uint64_t registration_id, RestoreSelection selection,
                       std::function<void(absl::StatusOr<RestoreBegun>)> begun,
                       std::function<void(absl::StatusOr<RestoreEnded>)> ended) = 0;
  // Counts for restore points that are not decided yet: said before the attempt's first rank opens
  // the job, and to each next worker again (it is not kept). A job has one order at a time, the
  // last; nothing: none any more. An attempt whose order cannot be followed is told so by Restore:
  // kDataLoss (the checkpoint is neither in memory nor on storage), kFailedPrecondition (it is
  // marked bad, or the attempt's own).
  virtual void SetRestoreOrder(const std::string& job, std::optional<RestoreOrder> order) = 0;

  // What a job has to begin from: the checkpoints of its current branch on storage, and those that
  // all ranks have sealed in this agent's memory.
  struct KnownCheckpoint {
    CheckpointId id;
    bool in_memory = false;
    bool on_storage = false;  // committed
    bool marked_bad = false;
    friend bool operator==(const KnownCheckpoint&, const KnownCheckpoint&) = default;
  };
  static constexpr size_t kKnownCheckpointsMax = 64;
  // The newest kKnownCheckpointsMax, ascending; none of a job that there is not. Errors:
  // ReadCatalog's.
  virtual void ReadCheckpoints(
      const std::string& job,
      std::function<void(absl::StatusOr<std::vector<KnownCheckpoint>>)> done) = 0;

  // The trainer waits for no restore any more: what it held is free again, `begun` or `ended` says
  // kAborted. One that a trainer has left without a word is ended when it begins a save.
  virtual void CancelRestore(SessionId session) = 0;

  // The trainer has changed its shared memory. Cheap; may be called for nothing.
  virtual void Doorbell(SessionId session) = 0;
  // hf_close: the session takes no more calls; its images go on.
  virtual void Close(SessionId session) = 0;
  // The trainer is dead (its pidfd says so): unfinished images are void, blocks may be recycled.
  virtual void ProcessDied(SessionId session) = 0;
  // For the agent's watches: -1 if the session is unknown.
  virtual int process_fd(SessionId session) const = 0;
  virtual int doorbell_fd(SessionId session) const = 0;
  virtual std::vector<SessionId> sessions() const = 0;

  // The mesh of the layout that the ranks of the job's newest attempt have registered; empty: none
  // has, or there is no such job.
  virtual std::vector<MeshAxis> MeshOf(const std::string& job) const = 0;

  // Sessions that are open (neither closed nor dead), and images not yet durable that can become
  // so.
  virtual size_t open_session_count() const = 0;
  // Whose they are, by the names that they were opened with. Cheap.
  struct OpenSession {
    std::string job;
    std::string attempt_key;
    Rank rank{};
    uint32_t world_size = 0;
    uint32_t process_id = 0;
  };
  virtual std::vector<OpenSession> open_sessions() const = 0;
  virtual size_t pending_image_count() const = 0;
  // Saves that are captured, or being captured, and not committed on storage: what they hold ends
  // with the agent. Also such as storage has refused, which can be restored from memory until then.
  struct UncommittedSave {
    std::string job;
    CheckpointId checkpoint;
  };
  virtual std::vector<UncommittedSave> uncommitted_saves() const = 0;

  // What is under way for the ranks of one attempt on this node, which it may hold up.
  struct Activity {
    Attempt attempt{};       // 0: no session was opened with these names
    bool capturing = false;  // a save has begun, and its blocks are not all captured
    bool flushing = false;   // images of the job are on their way to storage
    bool restoring = false;
    // For how long calls of the library have held up the training loop of each rank that has an
    // open session and says so, in total. It begins anew with a session.
    std::vector<std::pair<Rank, absl::Duration>> held;
  };
  // By the names that its sessions were opened with. Cheap enough for every 100 ms.
  virtual Activity ActivityOf(const std::string& job, const std::string& attempt_key) const = 0;

  // How far the ranks of one attempt have come, by the same names. Cheap, too.
  struct RankProgress {
    Rank rank{};
    Attempt attempt{};
    bool is_restored = false;  // it has asked for a restore, which is over
    std::optional<CheckpointId>
        restored_from;  // of the job itself; nothing: from elsewhere, or nowhere
    bool is_open = false;
    uint64_t heartbeat_count = 0;
    Step step{};                        // of the last heartbeat
    std::vector<std::string> sections;  // that it says it is in, outermost first
    // The newest save of this attempt that survives the death of any process, if there is one.
    std::optional<Step> committed;
    std::optional<absl::Duration> committed_begun;  // when it was captured, on the engine's clock
  };
  virtual std::vector<RankProgress> ProgressOf(const std::string& job,
                                               const std::string& attempt_key) const = 0;

  // Makes a save due on all ranks of the attempt, at the first step that none of them has asked for
  // yet, and returns that step. kFailedPrecondition: not all ranks are open, or one never asks
  // whether a save is due (its training loop decides that by itself). kUnavailable: they went on
  // too fast to be caught.
  virtual absl::StatusOr<Step> MakeDue(const std::string& job, const std::string& attempt_key) = 0;

  // For `holdfast` and the tests: one JSON object, keys documented in docs/OPERATING.md: jobs,
  // attempts, sessions, images (state, blocks captured, checksummed, flushed, void reason), memory,
  // commits, warnings.
  virtual std::string StatusJson() const = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_ENGINE_H_
