// A session: one process of a rank, from hf_open until nothing of it is left. It owns the rank
// page, the registrations with their images, and everything of them that must outlive this worker:
//
//   name in the keeper               what
//   session/<id>/identity            SessionIdentity, written once, checksummed; flag `closed`
//   session/<id>/page                the RankPage
//   session/<id>/process             pidfd of the trainer
//   session/<id>/<n>/document        registration n: the document (sealed by the trainer)
//   session/<id>/<n>/memory          registration n: its RegistrationMemory
//   session/<id>/<n>/record          registration n: image_record.h, the agent's truth
//   memory/<id>                      a rank memory (rank_memory.h)
//
// <id> is 16 hexadecimal digits, <n> decimal. The identity is kept last when a session is made, the
// record last when a registration is made: what a crash left incomplete has no such descriptor and
// is dropped. They are dropped first.
//
// What it deliberately does not know: groups, commits, roots. Its Job (an ImageObserver) does.
#ifndef HOLDFAST_CHECKPOINT_SESSION_H_
#define HOLDFAST_CHECKPOINT_SESSION_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "base/executor.h"
#include "base/ids.h"
#include "checkpoint/descriptor_keeper.h"
#include "checkpoint/engine.h"
#include "checkpoint/image_events.h"
#include "checkpoint/layout_cache.h"
#include "checkpoint/rank_images.h"
#include "checkpoint/rank_memory.h"
#include "checkpoint/registration.h"
#include "checkpoint/save_reports.h"
#include "checkpoint/shared_mapping.h"
#include "io/file_system.h"
#include "io/io_ring.h"
#include "io/unique_fd.h"

namespace holdfast {

struct SessionIdentity {
  SessionId session{};
  std::string job;
  std::string job_uuid;
  std::string attempt_key;
  std::string node;
  Attempt attempt{};
  Rank rank{};
  uint32_t world_size = 0;
  uint32_t local_rank = 0;
  uint32_t process_id = 0;
  uint32_t user_id = 0;
  friend bool operator==(const SessionIdentity&, const SessionIdentity&) = default;
};

// What sessions need of the world and of the configuration. All outlive them.
struct SessionWorld {
  ImageWorld image;
  DescriptorKeeper& keeper;
  RankMemories& memories;
  std::shared_ptr<LayoutCache> layouts;  // shared with work on the pool, which may outlive all this
  std::string scratch_directory;
  uint64_t block_bytes = 0;
  uint32_t images_per_rank_max = 2;
  uint64_t due_every_steps = 0;
};

// Threads: the event loop's, all calls; callbacks run on the loop, never inside the call that took
//   them.
// Lifetime: the world and the observer outlive it. The destructor abandons what is in flight, as a
//   crash would, and drops nothing from the keeper: see Forget().
class Session {
 public:
  // A new session; its descriptors are in the keeper when it returns. Errors: kResourceExhausted.
  static absl::StatusOr<std::unique_ptr<Session>> Create(SessionIdentity identity,
                                                         UniqueFd process_fd,
                                                         const SessionWorld& world);

  // Rebuilds all sessions out of what the keeper held. `done` gets those that could be rebuilt, in
  // the order of their ids, not started yet; warnings about what was damaged and therefore dropped
  // (from the keeper too); and the descriptors that are none of ours.
  struct Recovered {
    std::vector<std::unique_ptr<Session>> sessions;
    std::vector<std::string> warnings;
    std::vector<KeptDescriptor> others;
  };
  static void Recover(std::vector<KeptDescriptor> kept, const SessionWorld& world,
                      std::function<void(Recovered)> done);

  ~Session();

  // Gives the session its observer; of a recovered session every image is reported as it stands
  // (OnCaptureBegun, then OnSealed, OnDurable if they hold), from the loop. Call once.
  void Start(ImageObserver& observer);

  // Reads and understands a registration document on the pool. Errors: Registration::Build, and
  // ReadSealedMemory.
  void Prepare(UniqueFd document, uint64_t document_bytes,
               std::function<void(absl::StatusOr<std::shared_ptr<const Registration>>)> done);
  // Makes `registration` (the last one Prepared) the current one: memory, record, grants. The
  // former one's images go on; its unused grants are taken back. `done` when at least one image's
  // memory is there. Errors: kResourceExhausted: over the budget (the former registration still
  // holds), or the machine could not give what the budget allows (then no registration is current).
  // In both cases the call may be repeated when memory was released.
  void Register(std::function<void(absl::StatusOr<RegisterResult>)> done);

  // A trainer that has reconnected uses this registration: a newer one, whose reply it never got,
  // is not the current one any more. False if it is unknown (or 0).
  bool Resume(uint64_t registration_id);

  // The trainer rang.
  void Advance();
  // hf_close: no grants any more; images go on.
  void Close();
  // The process is dead.
  void ProcessDied();
  // A newer attempt runs (abi::kJobReplaced: another job does, in the same directory): no grants
  // any more, what is being captured is void, the page says so. A save that the trainer begins all
  // the same is reported to the observer, which voids it.
  void Fence(Attempt by);

  // The images of a registration of this session; nullptr if unknown.
  RankImages* images(uint64_t registration_id) const;
  RankImages* images_of(ImageId id) const;
  RankImages* current_images() const;  // nullptr before Register
  // Shared, because plans and commits read them on pool threads while the session may end.
  std::shared_ptr<const Registration> registration(uint64_t registration_id) const;
  std::shared_ptr<const Registration> registration_of(ImageId id) const;
  uint64_t current_registration_id() const { return current_registration_id_; }
  // For a resumed trainer, and for the restore ring.
  abi::RegistrationMemory* registration_memory(uint64_t registration_id) const;
  RankMemory* memory(uint64_t registration_id) const;
  RankMemory* memory_of(ImageId id) const;             // nullptr if unknown
  std::vector<RankImages::Counters> counters() const;  // of all registrations

  const SessionIdentity& identity() const { return identity_; }
  SaveReports& reports() { return *reports_; }
  int process_fd() const { return process_fd_.get(); }
  bool is_open() const { return !closed_ && !process_dead_; }
  bool is_closed() const { return closed_; }
  bool is_process_dead() const { return process_dead_; }
  bool is_fenced() const { return fenced_; }

  // Nothing is left: the process is dead and no image is held or in flight. The engine may
  // Forget() and destroy it.
  bool IsFinished() const;
  // Called from the loop whenever blocks were freed: IsFinished() may have changed.
  void set_on_freed(std::function<void()> on_freed) { on_freed_ = std::move(on_freed); }
  // Drops everything of this session from the keeper (its rank memory goes with its last session).
  void Forget();

 private:
  struct Registered;
  struct Found;

  Session(SessionIdentity identity, std::unique_ptr<SaveReports> reports,
          std::shared_ptr<SharedMapping> identity_memory, UniqueFd process_fd,
          const SessionWorld& world);
  std::string Name(const std::string& part) const;
  std::string Name(uint64_t registration_id, const std::string& part) const;
  absl::StatusOr<Registered*> MakeRegistered();
  absl::StatusOr<Registered*> MakeRegisteredIn(const std::shared_ptr<RankMemory>& memory);
  void AddRegistered(uint64_t registration_id, std::unique_ptr<Registered> registered);
  void AnswerRegister();
  RegisterResult ResultOf(uint64_t registration_id, const Registered& registered) const;
  void DropRegistered(uint64_t registration_id);
  void BlocksFreed();
  void MarkWritersGone();

  // session_recovery.cc
  static absl::StatusOr<std::unique_ptr<Session>> Reopen(Found& found, const SessionWorld& world);
  friend class SessionRecovery;

  const SessionIdentity identity_;
  const SessionWorld world_;
  std::unique_ptr<SaveReports> reports_;
  std::shared_ptr<SharedMapping> identity_memory_;
  UniqueFd process_fd_;
  ImageObserver* observer_ = nullptr;
  std::function<void()> on_freed_;
  bool closed_ = false;
  bool process_dead_ = false;
  bool fenced_ = false;
  // False after a recovery, until the trainer says which registration it uses: until then none is
  // dropped, and each may be granted.
  bool resumed_ = true;
  // Prepared and not registered yet.
  UniqueFd prepared_document_;
  uint64_t prepared_document_bytes_ = 0;
  std::shared_ptr<const Registration> prepared_;
  // The registration whose memory is being made present.
  std::function<void(absl::StatusOr<RegisterResult>)> register_done_;
  std::map<uint64_t, std::unique_ptr<Registered>> registered_;
  uint64_t current_registration_id_ = 0;
  uint64_t last_registration_id_ = 0;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_SESSION_H_
