#include "checkpoint/engine_impl.h"

#include <algorithm>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/time.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "base/random_bits.h"
#include "base/status_macros.h"
#include "base/utf8.h"
#include "checkpoint/describe.h"
#include "format/image.h"
#include "format/layout.h"
#include "format/manifest.h"
#include "hook/abi/messages.h"
#include "hook/abi/shared_memory.h"

namespace holdfast {
namespace {

constexpr absl::Duration kReapRetry = absl::Milliseconds(50);
// Releases take effect in the turns of the loop that follow.
constexpr int kRegisterTries = 3;

// Free blocks of a session's current registration.
class SessionStaging final : public StagingMemory {
 public:
  SessionStaging(RankImages& images, RankMemory& memory)
      : images_(images), memory_(memory), mapping_(memory.mapping()) {}
  std::vector<uint64_t> Take(size_t count) override { return images_.TakeStaging(count); }
  void Return(std::span<const uint64_t> offsets) override {
    if (!offsets.empty()) images_.ReturnStaging(offsets);
  }
  std::span<std::byte> memory() const override { return mapping_->bytes(); }
  uint64_t block_bytes() const override { return memory_.block_bytes(); }
  const SharedMapping* mapping() const override { return mapping_.get(); }

 private:
  RankImages& images_;
  RankMemory& memory_;
  const std::shared_ptr<SharedMapping> mapping_;  // fetches in flight write into it
};

bool IsWriterName(const std::string& writer) {
  return !writer.empty() && writer.size() <= 32 &&
         std::all_of(writer.begin(), writer.end(),
                     [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'); });
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(EngineOptions options, EngineWorld world) {
  if (options.root.empty() || options.scratch_directory.empty()) {
    return absl::InvalidArgumentError("the engine needs a root and a scratch directory");
  }
  RETURN_IF_ERROR(CheckBlockBytes(options.block_bytes));
  if (options.images_per_rank_max < 1 || options.images_per_rank_max > abi::kSlotsMax) {
    return absl::InvalidArgumentError(absl::StrFormat("images per rank: expected 1 to %d, found %d",
                                                      abi::kSlotsMax, options.images_per_rank_max));
  }
  if (options.flush_writes_in_flight_max < 1) {
    return absl::InvalidArgumentError("writes in flight: expected at least 1, found 0");
  }
  if (options.writer.empty()) options.writer = absl::StrFormat("%016x", RandomBits());
  if (!IsWriterName(options.writer)) {
    return absl::InvalidArgumentError(
        absl::StrFormat("writer: expected [a-z0-9]{1,32}, found \"%s\"", options.writer));
  }
  return std::make_unique<EngineImpl>(std::move(options), world);
}

EngineImpl::EngineImpl(EngineOptions options, const EngineWorld& world)
    : options_(std::move(options)),
      world_(world),
      budget_(options_.host_memory_bytes_max),
      memories_({world.ring, world.loop, world.pool, world.keeper, budget_, world.populate}),
      session_world_{.image = {.file_system = world.file_system,
                               .ring = world.ring,
                               .loop = world.loop,
                               .pool = world.pool,
                               .clock = world.clock,
                               .flush_writes_in_flight_max = options_.flush_writes_in_flight_max,
                               .flush_caching = options_.flush_caching},
                     .keeper = world.keeper,
                     .memories = memories_,
                     .layouts = std::make_shared<LayoutCache>(),
                     .scratch_directory = options_.scratch_directory,
                     .block_bytes = options_.block_bytes,
                     .images_per_rank_max = options_.images_per_rank_max,
                     .due_every_steps = options_.due_every_steps},
      // Unlike those of an agent before this one, so that a trainer that outlived it is recognised.
      next_session_id_((uint64_t{Crc32c(std::as_bytes(std::span(options_.writer)))} << 24) + 1) {}

EngineImpl::~EngineImpl() {
  // Before sessions and jobs: a source that ends gives its images back to them.
  for (auto& [id, entry] : sessions_) entry.restores.clear();
}

EngineImpl::Entry* EngineImpl::Find(SessionId id) {
  const auto found = sessions_.find(id);
  return found == sessions_.end() ? nullptr : &found->second;
}

const EngineImpl::Entry* EngineImpl::Find(SessionId id) const {
  const auto found = sessions_.find(id);
  return found == sessions_.end() ? nullptr : &found->second;
}

std::unique_ptr<Job> EngineImpl::NewJob(const std::string& name) const {
  auto job = std::make_unique<Job>(Job::Options{.root = options_.root,
                                                .name = name,
                                                .writer = options_.writer,
                                                .caching = options_.restore_caching,
                                                .blobs_bytes_max = options_.blobs_bytes_max,
                                                .on_warning = options_.on_warning},
                                   world_);
  if (const auto order = restore_orders_.find(name); order != restore_orders_.end()) {
    job->SetRestoreOrder(order->second);
  }
  return job;
}

Job& EngineImpl::JobOf(const std::string& name) {
  std::unique_ptr<Job>& job = jobs_[name];
  if (job == nullptr) job = NewJob(name);
  return *job;
}

EngineImpl::Entry& EngineImpl::AddSession(std::unique_ptr<Session> session, Job& job) {
  const SessionId id = session->identity().session;
  session->set_on_freed([this, id] {
    const Entry* entry = Find(id);
    if (entry == nullptr) return;
    entry->job->groups().Recycle();
    ReapLater(id);
  });
  Entry& entry = sessions_[id];
  entry.session = std::move(session);
  entry.job = &job;
  return entry;
}

// ---- Open ----

void EngineImpl::Warn(std::string text) {
  if (options_.on_warning) options_.on_warning(text);
  warnings_.push_back(std::move(text));
}

absl::Status EngineImpl::CheckServed(const Entry* entry) const {
  if (entry == nullptr || !entry->session->is_open()) {
    return absl::FailedPreconditionError("the session has ended");
  }
  return entry->job->recovery_error();
}

absl::Status EngineImpl::CheckOpen(const OpenParameters& parameters) const {
  RETURN_IF_ERROR(CheckJobName(parameters.job));
  if (parameters.world_size < 1 || parameters.world_size > kWorldSizeMax) {
    return absl::InvalidArgumentError(absl::StrFormat("world size: expected 1 to %d, found %d",
                                                      kWorldSizeMax, parameters.world_size));
  }
  if (Value(parameters.rank) >= parameters.world_size) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "rank: expected 0 to %d, found %d", parameters.world_size - 1, Value(parameters.rank)));
  }
  if (parameters.attempt_key.size() > abi::kAttemptKeyBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrFormat("attempt key: expected at most %d bytes, found %d",
                        abi::kAttemptKeyBytesMax, parameters.attempt_key.size()));
  }
  if (!parameters.root.empty() && parameters.root != options_.root) {
    return absl::FailedPreconditionError(absl::StrFormat("root: this agent writes to %s, not to %s",
                                                         options_.root, parameters.root));
  }
  return CheckRestoreFrom(parameters);
}

absl::Status EngineImpl::CheckRestoreFrom(const OpenParameters& parameters) const {
  const std::string& path = parameters.restore_from;
  if (path.empty()) return absl::OkStatus();
  if (path[0] != '/' || path.size() > abi::kPathBytesMax || !IsUtf8(path)) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "restore_from: expected an absolute path in UTF-8 of at most %d bytes, found "
        "%d bytes: %s",
        abi::kPathBytesMax, path.size(), path));
  }
  if (parameters.user_id == options_.user_id) return absl::OkStatus();
  return absl::PermissionDeniedError(
      absl::StrFormat("restore_from: this agent reads files as user %d, so for no other user; the "
                      "caller is user %d",
                      options_.user_id, parameters.user_id));
}

OpenResult EngineImpl::ResultOf(Session& session, bool resumed) const {
  OpenResult result;
  result.session = session.identity().session;
  result.attempt = session.identity().attempt;
  result.resumed = resumed;
  result.job_uuid = session.identity().job_uuid;
  result.rank_page_fd = session.reports().fd();
  result.rank_page_bytes = session.reports().bytes();
  return result;
}

void EngineImpl::Open(OpenParameters parameters,
                      std::function<void(absl::StatusOr<OpenResult>)> done) {
  if (absl::Status right = CheckOpen(parameters); !right.ok()) {
    world_.loop.Post([done = std::move(done), right] { done(right); });
    return;
  }
  if (Resume(parameters, done)) return;
  OpenNew(std::move(parameters), std::move(done));
}

bool EngineImpl::Resume(OpenParameters& parameters,
                        const std::function<void(absl::StatusOr<OpenResult>)>& done) {
  if (parameters.resume_attempt == Attempt{0}) return false;
  Entry* entry = Find(parameters.resume_session);
  if (entry == nullptr) return false;
  Session& session = *entry->session;
  const SessionIdentity& identity = session.identity();
  if (identity.job != parameters.job || identity.rank != parameters.rank ||
      identity.attempt != parameters.resume_attempt ||
      identity.process_id != parameters.process_id || !session.is_open()) {
    return false;
  }
  if (absl::Status recovered = entry->job->recovery_error(); !recovered.ok()) {
    world_.loop.Post([done, recovered] { done(recovered); });
    return true;
  }
  if (session.is_fenced()) {
    world_.loop.Post([done, attempt = identity.attempt, job = identity.job] {
      done(absl::FailedPreconditionError(absl::StrFormat(
          "attempt %d of job %s is fenced: a newer one has begun", Value(attempt), job)));
    });
    return true;
  }
  // The trainer maps memory of a registration that is not here any more: it must begin anew.
  if (parameters.resume_registration_id != 0 &&
      !session.Resume(parameters.resume_registration_id)) {
    return false;
  }
  entry->doorbell_fd = std::move(parameters.doorbell_fd);
  // What it was restoring when the connection ended begins anew when it asks again.
  CancelRestores(*entry, absl::AbortedError("the connection was lost"),
                 holdfast::Restore::Report::kNo);
  world_.loop.Post([this, alive = std::weak_ptr<bool>(alive_), id = identity.session, done] {
    if (alive.expired()) return;
    Entry* resumed = Find(id);
    if (resumed == nullptr) {
      done(absl::UnavailableError("the session has ended"));
      return;
    }
    done(ResultOf(*resumed->session, /*resumed=*/true));
    Doorbell(id);  // it may have rung while nobody listened
  });
  return true;
}

void EngineImpl::OpenNew(OpenParameters parameters,
                         std::function<void(absl::StatusOr<OpenResult>)> done) {
  // std::function wants a copyable closure.
  Admit(std::make_shared<OpenParameters>(std::move(parameters)), std::move(done));
}

void EngineImpl::Admit(const std::shared_ptr<OpenParameters>& parameters,
                       std::function<void(absl::StatusOr<OpenResult>)> done) {
  Job& job = JobOf(parameters->job);
  const Job::Applicant applicant{.rank = parameters->rank,
                                 .world_size = parameters->world_size,
                                 .attempt_key = parameters->attempt_key,
                                 .restore_from = parameters->restore_from,
                                 .resume_attempt = parameters->resume_attempt,
                                 .process_id = parameters->process_id};
  job.Admit(applicant, [this, &job, parameters,
                        done = std::move(done)](absl::StatusOr<Job::Admission> admission) {
    if (admission.ok()) {
      done(MakeSession(*parameters, job, *admission));
      return;
    }
    const auto current = jobs_.find(parameters->job);
    if (admission.status().code() == absl::StatusCode::kAborted && current != jobs_.end() &&
        current->second.get() == &job) {
      // It stays until its sessions are gone.
      Warn(std::string(admission.status().message()));
      orphaned_jobs_.push_back(std::move(current->second));
      jobs_.erase(current);
    }
    if (admission.status().code() == absl::StatusCode::kAborted) {
      Admit(parameters, done);
    } else {
      done(admission.status());
    }
  });
}

absl::StatusOr<OpenResult> EngineImpl::MakeSession(OpenParameters& parameters, Job& job,
                                                   const Job::Admission& admission) {
  SessionIdentity identity;
  identity.session = SessionId{next_session_id_++};
  identity.job = parameters.job;
  identity.job_uuid = admission.job_uuid;
  identity.attempt_key = parameters.attempt_key;
  identity.node = parameters.node;
  identity.attempt = admission.attempt;
  identity.rank = parameters.rank;
  identity.world_size = parameters.world_size;
  identity.local_rank = parameters.local_rank;
  identity.process_id = parameters.process_id;
  identity.user_id = parameters.user_id;
  ASSIGN_OR_RETURN(
      std::unique_ptr<Session> session,
      Session::Create(std::move(identity), std::move(parameters.process_fd), session_world_));
  Entry& entry = AddSession(std::move(session), job);
  entry.doorbell_fd = std::move(parameters.doorbell_fd);
  job.AddSession(*entry.session);
  return ResultOf(*entry.session, /*resumed=*/false);
}

// ---- Register ----

void EngineImpl::Register(SessionId id, UniqueFd document, uint64_t document_bytes,
                          std::function<void(absl::StatusOr<RegisterResult>)> done) {
  Entry* entry = Find(id);
  if (absl::Status served = CheckServed(entry); !served.ok()) {
    world_.loop.Post([done = std::move(done), served] { done(served); });
    return;
  }
  // Its staging blocks belong to the registration that will be replaced.
  CancelRestores(*entry, absl::AbortedError("replaced by a new registration"),
                 holdfast::Restore::Report::kYes);
  entry->session->Prepare(
      std::move(document), document_bytes,
      [this, alive = std::weak_ptr<bool>(alive_), id,
       done = std::move(done)](absl::StatusOr<std::shared_ptr<const Registration>> registration) {
        if (alive.expired()) return;
        if (!registration.ok()) {
          done(registration.status());
          return;
        }
        Entry& prepared = *Find(id);  // or Prepare would not have answered
        if (absl::Status same = prepared.job->CheckLayout(id, *registration); !same.ok()) {
          done(same);
          return;
        }
        MakeRegistration(id, kRegisterTries,
                         [job = prepared.job, attempt = prepared.session->identity().attempt,
                          rank = prepared.session->identity().rank,
                          done](absl::StatusOr<RegisterResult> result) {
                           job->RegistrationEnded(attempt, rank, result.status());
                           done(std::move(result));
                         });
      });
}

void EngineImpl::MakeRegistration(SessionId id, int tries_left,
                                  std::function<void(absl::StatusOr<RegisterResult>)> done) {
  Find(id)->session->Register([this, alive = std::weak_ptr<bool>(alive_), id, tries_left,
                               done = std::move(done)](absl::StatusOr<RegisterResult> result) {
    if (alive.expired()) return;
    if (result.status().code() != absl::StatusCode::kResourceExhausted || tries_left <= 1) {
      done(std::move(result));
      return;
    }
    // Room is what durable images of any job hold that nobody reads.
    bool released = false;
    for (const auto& [name, job] : jobs_) released = job->groups().ReleaseForRoom() || released;
    if (!released && tries_left == kRegisterTries) {
      done(std::move(result));
      return;
    }
    world_.loop.RunAfter(kReapRetry, [this, alive, id, tries_left, done] {
      if (alive.expired()) return;
      for (auto next = sessions_.begin(); next != sessions_.end();) {
        const SessionId other = (next++)->first;
        Reap(other);
      }
      const Entry* entry = Find(id);
      if (entry == nullptr || !entry->session->is_open()) {
        done(absl::FailedPreconditionError("the session has ended"));
        return;
      }
      MakeRegistration(id, tries_left - 1, done);
    });
  });
}

// ---- Restore ----

void EngineImpl::Restore(SessionId id, uint64_t registration_id, RestoreSelection selection,
                         Begun begun, Ended ended) {
  Entry* entry = Find(id);
  absl::Status refused = CheckServed(entry);
  if (!refused.ok()) {
    // Nothing more to ask.
  } else if (registration_id == 0 || registration_id != entry->session->current_registration_id()) {
    refused = absl::FailedPreconditionError(
        absl::StrFormat("registration: expected %d, the current one, found %d",
                        entry->session->current_registration_id(), registration_id));
  }
  if (!refused.ok()) {
    world_.loop.Post([begun = std::move(begun), refused] { begun(refused); });
    return;
  }
  CancelRestores(*entry, absl::AbortedError("replaced by a newer restore"),
                 holdfast::Restore::Report::kYes);
  const Opening opening = {id, registration_id, entry->restore_number, std::move(selection)};
  entry->job->DecideRestorePoint(
      entry->session->identity().attempt,
      [this, opening, begun = std::move(begun),
       ended = std::move(ended)](absl::StatusOr<RestorePoint> point) mutable {
        const Entry* decided = FindOpening(opening, begun);
        if (decided == nullptr) return;
        if (point.ok() && !point->is_beginning()) {
          OpenSource(opening, *point, std::move(begun), std::move(ended));
        } else {
          begun(point.ok() ? NothingToRestore(*decided) : NotTheBeginning(point.status()));
        }
      });
}

// Whoever names a checkpoint to start from never hears that there is none.
absl::Status EngineImpl::NothingToRestore(const Entry& entry) {
  const Attempt attempt = entry.session->identity().attempt;
  const std::string restore_from = entry.job->restore_from(attempt);
  if (restore_from.empty()) {
    return absl::NotFoundError(
        absl::StrFormat("job %s has no checkpoint to start from", entry.job->name()));
  }
  return absl::FailedPreconditionError(absl::StrFormat(
      "attempt %d of job %s began from nothing, because it saved before it restored: "
      "%s was not used",
      Value(attempt), entry.job->name(), restore_from));
}

EngineImpl::Entry* EngineImpl::FindOpening(const Opening& opening, Begun& begun) {
  Entry* entry = Find(opening.session);
  if (entry == nullptr) return nullptr;  // reaped: nobody waits for the answer any more
  if (entry->restore_number == opening.number) return entry;
  begun(absl::AbortedError("the restore was left, or a newer one has replaced it"));
  return nullptr;
}

void EngineImpl::OpenSource(Opening opening, const RestorePoint& point, Begun begun, Ended ended) {
  const Entry& entry = *Find(opening.session);
  if (!entry.job->restore_from(entry.session->identity().attempt).empty()) {
    opening.restore_from = point.foreign.has_value() ? RestoreFrom::kUsed : RestoreFrom::kIgnored;
  }
  entry.job->OpenSource(point, [this, opening, begun = std::move(begun), ended = std::move(ended)](
                                   absl::StatusOr<std::shared_ptr<RestoreSource>> source) mutable {
    StartRestore(opening, std::move(source), std::move(begun), std::move(ended));
  });
}

void EngineImpl::StartRestore(Opening opening,
                              absl::StatusOr<std::shared_ptr<RestoreSource>> source, Begun begun,
                              Ended ended) {
  Entry* entry = FindOpening(opening, begun);
  if (entry == nullptr) return;
  const uint64_t registration_id = opening.registration_id;
  if (!source.ok()) {
    begun(NotTheBeginning(source.status()));
    return;
  }
  Session& session = *entry->session;
  if (!session.is_open() || session.current_registration_id() != registration_id) {
    begun(absl::AbortedError("the registration was replaced, or the session has ended"));
    return;
  }
  auto staging = std::make_shared<SessionStaging>(*session.images(registration_id),
                                                  *session.memory(registration_id));
  entry->restores.push_back(std::make_unique<holdfast::Restore>(
      *std::move(source), session.registration(registration_id), std::move(staging),
      session.registration_memory(registration_id)->restore, world_.loop, world_.pool,
      holdfast::Restore::Options{.restore_from = opening.restore_from,
                                 .selection = std::move(opening.selection)},
      std::move(begun),
      [this, alive = std::weak_ptr<bool>(alive_), id = opening.session,
       ended = std::move(ended)](absl::StatusOr<RestoreEnded> result) {
        const bool restored = result.ok() && result->is_whole;
        ended(std::move(result));
        if (alive.expired()) return;
        const Entry* restoring = Find(id);
        if (restored && restoring != nullptr) restoring->job->SessionRestored(id);
        ReapLater(id);
      }));
}

void EngineImpl::CancelRestores(Entry& entry, const absl::Status& why,
                                holdfast::Restore::Report report) {
  ++entry.restore_number;
  for (const std::unique_ptr<holdfast::Restore>& restore : entry.restores) {
    restore->Cancel(why, report);
  }
  std::erase_if(entry.restores, [](const auto& restore) { return restore->idle(); });
}

void EngineImpl::CancelRestore(SessionId id) {
  Entry* entry = Find(id);
  if (entry == nullptr) return;
  CancelRestores(*entry, absl::AbortedError("the trainer has left the restore"),
                 holdfast::Restore::Report::kYes);
  ReapLater(id);
}

// ---- What trainers do ----

void EngineImpl::Doorbell(SessionId id) {
  Entry* entry = Find(id);
  if (entry == nullptr) return;
  entry->session->Advance();
  if (entry->restores.empty()) return;
  // It does one thing at a time: who saves has left the restore.
  const RankImages* images = entry->session->current_images();
  if (images != nullptr && images->IsTrainerCapturing()) {
    CancelRestore(id);
  } else {
    entry->restores.back()->Advance();
  }
}

void EngineImpl::Close(SessionId id) {
  Entry* entry = Find(id);
  if (entry == nullptr || !entry->job->recovery_error().ok()) return;
  CancelRestores(*entry, absl::AbortedError("the session was closed"),
                 holdfast::Restore::Report::kNo);
  entry->session->Close();
  SessionEnded(id);
}

void EngineImpl::ProcessDied(SessionId id) {
  Entry* entry = Find(id);
  if (entry == nullptr) return;
  if (!entry->job->recovery_error().ok()) {
    entry->died_unseen = true;
    return;
  }
  CancelRestores(*entry, absl::AbortedError("the training process died"),
                 holdfast::Restore::Report::kNo);
  entry->session->ProcessDied();
  SessionEnded(id);
}

void EngineImpl::SessionEnded(SessionId id) {
  // After the reports of what it had begun.
  world_.loop.Post([this, alive = std::weak_ptr<bool>(alive_), id] {
    if (alive.expired()) return;
    Entry* entry = Find(id);
    if (entry == nullptr) return;
    entry->job->SessionEnded(id);
    Reap(id);
  });
}

void EngineImpl::ReapLater(SessionId id) {
  world_.loop.Post([this, alive = std::weak_ptr<bool>(alive_), id] {
    if (!alive.expired()) Reap(id);
  });
}

void EngineImpl::Reap(SessionId id) {
  Entry* entry = Find(id);
  if (entry == nullptr) return;
  if (entry->restores.size() > 1 ||
      (!entry->restores.empty() && entry->restores.back()->is_over())) {
    std::erase_if(entry->restores, [](const auto& restore) { return restore->idle(); });
  }
  if (!entry->restores.empty() && entry->restores.back()->is_over()) {
    // Reads into its memory are in flight. Until they are back it also keeps what it read from.
    world_.loop.RunAfter(kReapRetry, [this, alive = std::weak_ptr<bool>(alive_), id] {
      if (!alive.expired()) Reap(id);
    });
    return;
  }
  if (!entry->session->IsFinished()) return;
  entry->job->RemoveSession(id);
  entry->session->Forget();
  sessions_.erase(id);
}

// ---- For the agent ----

int EngineImpl::process_fd(SessionId id) const {
  const Entry* entry = Find(id);
  return entry == nullptr ? -1 : entry->session->process_fd();
}

int EngineImpl::doorbell_fd(SessionId id) const {
  const Entry* entry = Find(id);
  return entry == nullptr ? -1 : entry->doorbell_fd.get();
}

std::vector<SessionId> EngineImpl::sessions() const {
  std::vector<SessionId> ids;
  for (const auto& [id, entry] : sessions_) ids.push_back(id);
  return ids;
}

std::vector<MeshAxis> EngineImpl::MeshOf(const std::string& job) const {
  const Session* newest = nullptr;
  std::shared_ptr<const Registration> registration;
  for (const auto& [id, entry] : sessions_) {
    const Session& session = *entry.session;
    if (entry.job->name() != job ||
        (newest != nullptr && session.identity().attempt < newest->identity().attempt)) {
      continue;
    }
    auto current = session.registration(session.current_registration_id());
    if (current == nullptr) continue;
    newest = &session;
    registration = std::move(current);
  }
  return registration == nullptr ? std::vector<MeshAxis>() : registration->layout().mesh();
}

size_t EngineImpl::open_session_count() const {
  return static_cast<size_t>(
      std::count_if(sessions_.begin(), sessions_.end(), [](const auto& entry) {
        return entry.second.session->is_open() && !entry.second.died_unseen;
      }));
}

size_t EngineImpl::pending_image_count() const {
  size_t count = 0;
  for (const auto& [name, job] : jobs_) count += job->pending_image_count();
  return count;
}

std::vector<Engine::UncommittedSave> EngineImpl::uncommitted_saves() const {
  std::vector<UncommittedSave> saves;
  const auto add = [&](const Job& job) {
    for (const auto& [id, group] : job.groups().groups()) {
      const bool can_be_committed =
          group.phase == SaveGroup::Phase::kOpen || group.phase == SaveGroup::Phase::kCommitting;
      const bool is_only_in_memory = group.phase == SaveGroup::Phase::kFailed && group.sealed;
      if (can_be_committed || is_only_in_memory) saves.push_back({job.name(), id});
    }
  };
  for (const auto& [name, job] : jobs_) add(*job);
  return saves;
}

Engine::Activity EngineImpl::ActivityOf(const std::string& job,
                                        const std::string& attempt_key) const {
  Activity activity;
  for (const auto& [id, entry] : sessions_) {
    const SessionIdentity& identity = entry.session->identity();
    if (identity.job != job || identity.attempt_key != attempt_key) continue;
    activity.attempt = std::max(activity.attempt, identity.attempt);
    const RankImages* const images = entry.session->current_images();
    activity.capturing |=
        entry.session->is_open() && images != nullptr && images->IsTrainerCapturing();
    activity.restoring |= !entry.restores.empty() && !entry.restores.back()->is_over();
    activity.flushing |= entry.job != nullptr && entry.job->pending_image_count() > 0;
    const std::optional<absl::Duration> held = entry.session->reports().held();
    if (entry.session->is_open() && held.has_value()) {
      activity.held.emplace_back(identity.rank, *held);
    }
  }
  return activity;
}

}  // namespace holdfast
