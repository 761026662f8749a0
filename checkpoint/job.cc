// Sessions, admission and fencing.
#include "checkpoint/job.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/time.h"
#include "base/check.h"
#include "base/kill_point.h"
#include "base/status_macros.h"
#include "checkpoint/describe.h"
#include "checkpoint/job_impl.h"
#include "checkpoint/publish.h"
#include "hook/abi/messages.h"
#include "hook/abi/shared_memory.h"

namespace holdfast {
namespace {

// Another agent may begin attempts at the same time; each try loses to one of them.
constexpr int kAdmissionTries = 16;
constexpr absl::Duration kRecoverRetry = absl::Seconds(1);
constexpr size_t kWarningsKept = 100;

// What an admission reads before it decides.
struct StoreView {
  absl::Status status;
  std::string uuid;
  std::optional<AttemptRecord> newest;
};

StoreView ReadStore(CoordinationStore& store, const std::string& job) {
  StoreView view;
  absl::StatusOr<std::string> uuid = store.JobUuid(job);
  if (!uuid.ok()) {
    view.status = uuid.status();
    return view;
  }
  view.uuid = *std::move(uuid);
  absl::StatusOr<AttemptRecord> newest = store.NewestAttempt(job);
  if (newest.ok()) {
    view.newest = *std::move(newest);
  } else if (newest.status().code() != absl::StatusCode::kNotFound) {
    view.status = newest.status();
  }
  return view;
}

// Damage that comes later must not pass for a publication that was cut off.
void RemoveStaleMarkers(FileSystem& file_system, const Catalog& catalog) {
  for (const CatalogEntry& entry : catalog.entries) {
    if (!entry.has_stale_marker) continue;
    // Dropped on purpose: whoever looks next tries again.
    RemoveMarkers(file_system, entry.directory, kManifestFileName).IgnoreError();
  }
}

// kAlreadyExists: another agent was faster.
absl::StatusOr<AttemptRecord> BeginInStore(CoordinationStore& store, const std::string& job,
                                           Attempt after, AttemptRecord record) {
  if (Value(after) == UINT32_MAX) {
    return absl::ResourceExhaustedError(absl::StrFormat("job %s has no attempt numbers left", job));
  }
  record.attempt = Attempt{Value(after) + 1};
  RETURN_IF_ERROR(store.BeginAttempt(job, record));
  return record;
}

}  // namespace

Job::Job(Options options, const EngineWorld& world)
    : options_(std::move(options)),
      world_(world),
      directory_(absl::StrCat(options_.root, "/", options_.name)),
      groups_(directory_, *this) {}

Job::~Job() = default;

// ---- The serial queue ----

void Job::Enqueue(std::function<void(Finish)> operation) {
  queue_.push_back(std::move(operation));
  StartNext();
}

void Job::StartNext() {
  if (running_ || queue_.empty()) return;
  running_ = true;
  // From the loop, never inside the call that enqueued.
  world_.loop.Post([this, alive = std::weak_ptr<bool>(alive_)] {
    if (alive.expired()) return;
    const std::function<void(Finish)> operation = std::move(queue_.front());
    queue_.pop_front();
    operation([this] {
      CHECK(running_);
      running_ = false;
      StartNext();
    });
  });
}

void Job::Warn(std::string text) {
  if (options_.on_warning) options_.on_warning(text);
  warnings_.push_back(std::move(text));
  if (warnings_.size() > kWarningsKept) warnings_.pop_front();
}

// ---- Admission ----

void Job::Admit(Applicant applicant, std::function<void(absl::StatusOr<Admission>)> done) {
  if (!recovery_error_.ok()) {
    world_.loop.Post([done = std::move(done), why = recovery_error_] { done(why); });
    return;
  }
  Enqueue([this, applicant = std::move(applicant), done = std::move(done)](Finish finish) {
    TryAdmit(applicant, kAdmissionTries,
             [done, finish = std::move(finish)](absl::StatusOr<Admission> admission) {
               done(std::move(admission));
               finish();
             });
  });
}

bool Job::HasOpenRank(const AttemptState& attempt) const {
  return std::any_of(attempt.sessions.begin(), attempt.sessions.end(), [this](const auto& entry) {
    const Session* session = FindSession(entry.second);
    return session != nullptr && session->is_open();
  });
}

// Whether the applicant is the process that has joined already, and never heard that it did: the
// worker died between the session and the reply. Its session has done nothing yet.
bool Job::AsksAgain(const AttemptState& attempt, const Applicant& applicant) const {
  const Session* session = FindSession(attempt.sessions.at(applicant.rank));
  return session != nullptr && session->is_open() && applicant.process_id != 0 &&
         session->identity().process_id == applicant.process_id &&
         session->current_registration_id() == 0;
}

// Whether the applicant belongs to the newest attempt; false: a next one must begin.
absl::StatusOr<bool> Job::MayJoin(const std::optional<AttemptRecord>& newest,
                                  const Applicant& applicant) const {
  if (applicant.resume_attempt != Attempt{0}) {
    if (!newest.has_value() || newest->attempt != applicant.resume_attempt) {
      return absl::FailedPreconditionError(
          absl::StrFormat("attempt %d of job %s is fenced: the newest is attempt %d",
                          Value(applicant.resume_attempt), options_.name,
                          newest.has_value() ? Value(newest->attempt) : 0));
    }
    if (newest->world_size != applicant.world_size) {
      return absl::InvalidArgumentError(absl::StrFormat("attempt %d of job %s has %d ranks, not %d",
                                                        Value(newest->attempt), options_.name,
                                                        newest->world_size, applicant.world_size));
    }
    return true;
  }
  if (!newest.has_value()) return false;
  const auto same_run = [&](const AttemptState& attempt) {
    return attempt.record.key == applicant.attempt_key &&
           attempt.record.world_size == applicant.world_size && HasOpenRank(attempt) &&
           (!attempt.sessions.contains(applicant.rank) || AsksAgain(attempt, applicant));
  };
  const auto known = attempts_.find(newest->attempt);
  if (known != attempts_.end() && same_run(known->second)) return true;
  // A late rank of a run that a newer one has replaced must not fence that in its turn; but one
  // that has ended here has nothing to lose. (What another agent serves may be alive.)
  if (applicant.attempt_key.empty()) return false;
  if (known != attempts_.end() && !HasOpenRank(known->second)) return false;
  for (const auto& [number, attempt] : attempts_) {
    if (number < newest->attempt && same_run(attempt)) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "attempt %d of job %s (key \"%s\") is fenced: attempt %d has begun", Value(number),
          options_.name, applicant.attempt_key, Value(newest->attempt)));
    }
  }
  return false;
}

// The restore point is decided once for all ranks, so what it may be must be said by all alike.
absl::Status Job::CheckSameOrigin(const AttemptRecord& newest, const Applicant& applicant) const {
  // One that resumes was compared when it joined.
  if (applicant.resume_attempt != Attempt{0} || newest.restore_from == applicant.restore_from) {
    return absl::OkStatus();
  }
  const auto name = [](const std::string& path) { return path.empty() ? "nothing" : path; };
  return absl::InvalidArgumentError(absl::StrFormat(
      "restore_from: attempt %d of job %s was begun with %s, rank %d names %s; all ranks must name "
      "the same",
      Value(newest.attempt), options_.name, name(newest.restore_from), Value(applicant.rank),
      name(applicant.restore_from)));
}

void Job::TryAdmit(Applicant applicant, int tries_left,
                   std::function<void(absl::StatusOr<Admission>)> then) {
  OnPool<StoreView>([store = &world_.store, job = options_.name] { return ReadStore(*store, job); },
                    [this, applicant = std::move(applicant), tries_left,
                     then = std::move(then)](StoreView view) mutable {
                      if (!view.status.ok()) {
                        then(view.status);
                        return;
                      }
                      if (abandoned_ || (!uuid_.empty() && view.uuid != uuid_)) {
                        Abandon();
                        then(absl::AbortedError(WasReplaced().message()));
                        return;
                      }
                      uuid_ = view.uuid;
                      const absl::StatusOr<bool> may_join = MayJoin(view.newest, applicant);
                      if (!may_join.ok()) {
                        then(may_join.status());
                      } else if (*may_join) {
                        const absl::Status same = CheckSameOrigin(*view.newest, applicant);
                        if (!same.ok()) return then(same);
                        JoinNewest(*view.newest, std::move(then));
                      } else {
                        BeginNext(view.newest, std::move(applicant), tries_left, std::move(then));
                      }
                    });
}

// An attempt that an agent before this one began: what it has committed is only known to storage.
void Job::JoinNewest(const AttemptRecord& newest,
                     std::function<void(absl::StatusOr<Admission>)> then) {
  if (attempts_.contains(newest.attempt)) {
    AddAttempt(newest);
    then(Admission{newest.attempt, uuid_});
    return;
  }
  OnPool<absl::StatusOr<Catalog>>(
      [file_system = &world_.file_system, root = options_.root, job = options_.name] {
        return ReadCatalog(*file_system, root, job);
      },
      [this, newest, then = std::move(then)](absl::StatusOr<Catalog> catalog) {
        if (!catalog.ok()) {
          then(catalog.status());
          return;
        }
        RememberCommitted(*catalog);
        AddAttempt(newest);
        then(Admission{newest.attempt, uuid_});
      });
}

void Job::BeginNext(const std::optional<AttemptRecord>& newest, Applicant applicant, int tries_left,
                    std::function<void(absl::StatusOr<Admission>)> then) {
  struct Begun {
    absl::StatusOr<Catalog> catalog;
    absl::StatusOr<AttemptRecord> record = absl::UnknownError("not begun");
  };
  const Attempt in_store = newest.has_value() ? newest->attempt : Attempt{0};
  OnPool<Begun>(
      [this_store = &world_.store, file_system = &world_.file_system, root = options_.root,
       job = options_.name, uuid = uuid_, in_store,
       record = AttemptRecord{Attempt{}, applicant.attempt_key, applicant.world_size,
                              applicant.restore_from}] {
        Begun begun{ReadCatalog(*file_system, root, job)};
        if (!begun.catalog.ok()) return begun;
        if (begun.catalog->job.job_uuid != uuid) {
          begun.record = absl::AlreadyExistsError("replaced since it was looked at");
          return begun;
        }
        RemoveStaleMarkers(*file_system, *begun.catalog);
        // A lost store cannot go back: the root knows attempts too.
        begun.record = BeginInStore(*this_store, job,
                                    std::max(in_store, begun.catalog->greatest_attempt), record);
        return begun;
      },
      [this, applicant, tries_left, then = std::move(then)](Begun begun) {
        if (!begun.catalog.ok()) {
          then(begun.catalog.status());
        } else if (begun.record.status().code() == absl::StatusCode::kAlreadyExists &&
                   tries_left > 1) {
          TryAdmit(applicant, tries_left - 1, then);
        } else if (!begun.record.ok()) {
          then(begun.record.status());
        } else {
          KillPoint("open.attempt_begun");
          RememberCommitted(*begun.catalog);
          AddAttempt(*begun.record);
          Fence(begun.record->attempt);
          then(Admission{begun.record->attempt, uuid_});
        }
      });
}

Job::AttemptState& Job::AddAttempt(const AttemptRecord& record) {
  AttemptState& attempt = attempts_[record.attempt];
  attempt.record = record;
  groups_.AddAttempt(record.attempt, record.world_size);
  return attempt;
}

void Job::Fence(Attempt newest) {
  for (const auto& [id, session] : sessions_) {
    if (session->identity().attempt < newest) session->Fence(newest);
  }
  groups_.FenceOlder(newest);
}

absl::Status Job::WasReplaced() const {
  return absl::FailedPreconditionError(
      absl::StrFormat("the directory of job %s was replaced: it is no longer that of the job of "
                      "uuid %s, which publishes nothing more",
                      options_.name, uuid_));
}

void Job::Abandon() {
  abandoned_ = true;
  for (const auto& [id, session] : sessions_) session->Fence(Attempt{abi::kJobReplaced});
  groups_.Abandon(WasReplaced());
}

absl::Status CheckSameJob(FileSystem& file_system, const std::string& root, const std::string& job,
                          const std::string& uuid) {
  const absl::StatusOr<JobRecord> record = ReadJobRecord(file_system, root, job);
  if (record.status().code() == absl::StatusCode::kNotFound) {
    return absl::FailedPreconditionError(
        absl::StrFormat("job %s: expected the job of uuid %s in the root, found none", job, uuid));
  }
  RETURN_IF_ERROR(record.status());
  if (record->job_uuid == uuid) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrFormat("job %s: expected the job of uuid %s in the root, found another, of uuid %s",
                      job, uuid, record->job_uuid));
}

void Job::RememberCommitted(const Catalog& catalog) {
  for (const CatalogEntry& entry : catalog.entries) {
    if (entry.state == CatalogEntry::State::kCommitted) committed_.insert(entry.id);
  }
}

// ---- Sessions ----

Session* Job::FindSession(SessionId id) const {
  const auto found = sessions_.find(id);
  return found == sessions_.end() ? nullptr : found->second;
}

RankImages* Job::FindImages(ImageId id) const {
  const Session* session = FindSession(id.session);
  return session == nullptr ? nullptr : session->images_of(id);
}

void Job::RaiseCommitted(Session& session) const {
  // The newest of this attempt.
  auto newest = committed_.upper_bound({session.identity().attempt, Step{UINT64_MAX}});
  if (newest == committed_.begin()) return;
  --newest;
  if (newest->attempt != session.identity().attempt) return;
  session.reports().RaiseCommitted(newest->step, Survives::kProcess);
  session.reports().RaiseCommitted(newest->step, Survives::kPower);
}

// A process that outlived its agent asks for what it saved with the one before.
void Job::ReportEarlierCommits(Session& session) const {
  const Attempt attempt = session.identity().attempt;
  auto first = committed_.lower_bound({attempt, Step{0}});
  const auto end = committed_.upper_bound({attempt, Step{UINT64_MAX}});
  const auto count = std::distance(first, end);
  const auto kept = static_cast<std::ptrdiff_t>(abi::kReportCount);
  if (count > kept) std::advance(first, count - kept);
  for (; first != end; ++first) session.reports().AddCommitted(first->step);
}

void Job::AddSession(Session& session) {
  const SessionIdentity& identity = session.identity();
  sessions_[identity.session] = &session;
  std::map<Rank, SessionId>& ranks = attempts_.at(identity.attempt).sessions;
  // The process does not know its former session in this attempt (AsksAgain, or a resume that could
  // not be): no grants to that one any more.
  if (const auto known = ranks.find(identity.rank); known != ranks.end()) {
    if (Session* former = FindSession(known->second); former != nullptr) former->Close();
  }
  ranks[identity.rank] = identity.session;
  groups_.RankJoined(identity.attempt, identity.rank);
  ReportEarlierCommits(session);
  RaiseCommitted(session);
  session.Start(groups_);
}

void Job::SessionRestored(SessionId id) {
  const Session* session = FindSession(id);
  if (session == nullptr) return;
  groups_.RankRestored(session->identity().attempt, session->identity().rank);
}

void Job::SessionEnded(SessionId id) {
  const Session* session = FindSession(id);
  if (session == nullptr || session->is_open()) return;
  const SessionIdentity& identity = session->identity();
  if (attempts_.at(identity.attempt).sessions.at(identity.rank) != id) return;  // replaced
  groups_.RankEnded(identity.attempt, identity.rank,
                    absl::StrFormat("rank %d %s", Value(identity.rank),
                                    session->is_process_dead() ? "is dead" : "has closed"));
}

void Job::RemoveSession(SessionId id) {
  groups_.SessionGone(id);
  sessions_.erase(id);
  // An old attempt that nobody is in any more is forgotten.
  std::erase_if(attempts_, [&](const auto& entry) {
    const auto& [number, attempt] = entry;
    return number != attempts_.rbegin()->first &&
           std::none_of(attempt.sessions.begin(), attempt.sessions.end(),
                        [this](const auto& of) { return sessions_.contains(of.second); });
  });
}

absl::Status Job::CheckLayout(SessionId id, std::shared_ptr<const Registration> registration) {
  const Session* session = FindSession(id);
  CHECK(session != nullptr);
  const Rank rank = session->identity().rank;
  AttemptState& attempt = attempts_.at(session->identity().attempt);
  const size_t finished = attempt.rounds_finished[rank];
  if (finished > 0 &&
      CheckRegisteredAlike(*attempt.rounds[finished - 1].first, *registration).ok()) {
    return absl::OkStatus();
  }
  if (finished == attempt.rounds.size()) attempt.rounds.emplace_back();
  AttemptState::Round& round = attempt.rounds[finished];
  round.ranks.erase(rank);
  if (round.ranks.empty()) {
    round.first = std::move(registration);
  } else {
    RETURN_IF_ERROR(CheckRegisteredAlike(*round.first, *registration));
  }
  round.ranks.insert(rank);
  return absl::OkStatus();
}

void Job::RegistrationEnded(Attempt attempt_id, Rank rank, const absl::Status& status) {
  const auto known = attempts_.find(attempt_id);
  if (known == attempts_.end()) return;
  AttemptState& attempt = known->second;
  size_t& finished = attempt.rounds_finished[rank];
  // Of the layout that it had.
  if (finished == attempt.rounds.size() || !attempt.rounds[finished].ranks.contains(rank)) return;
  if (status.ok()) {
    ++finished;
  } else {
    attempt.rounds[finished].ranks.erase(rank);
  }
}

// ---- After a restart ----

void Job::Recover(const std::vector<Session*>& sessions, std::function<void()> looked,
                  std::function<void()> recovered) {
  recovery_error_ =
      absl::UnavailableError(absl::StrFormat("job %s is being recovered", options_.name));
  for (Session* session : sessions) {
    const SessionIdentity& identity = session->identity();
    sessions_[identity.session] = session;
    AttemptState& attempt =
        AddAttempt({identity.attempt, identity.attempt_key, identity.world_size});
    // In the order of their ids: the newest of a rank stays.
    SessionId& newest = attempt.sessions[identity.rank];
    newest = std::max(newest, identity.session);
    uuid_ = identity.job_uuid;
  }
  Enqueue([this, looked = std::move(looked), recovered = std::move(recovered)](Finish finish) {
    TryRecover(looked, [recovered, finish = std::move(finish)] {
      finish();
      recovered();
    });
  });
}

absl::StatusOr<Job::Loaded> Job::Load(const EngineWorld& world, const std::string& root,
                                      const std::string& job, const std::set<Attempt>& attempts) {
  Loaded loaded;
  const StoreView view = ReadStore(world.store, job);
  RETURN_IF_ERROR(view.status);
  loaded.uuid = view.uuid;
  loaded.newest = view.newest;
  ASSIGN_OR_RETURN(loaded.catalog, ReadCatalog(world.file_system, root, job));
  RemoveStaleMarkers(world.file_system, loaded.catalog);
  // Whoever linked the newest manifest of an attempt may have died before its name was durable.
  for (const Attempt attempt : attempts) {
    const auto newest = std::find_if(loaded.catalog.entries.rbegin(), loaded.catalog.entries.rend(),
                                     [attempt](const CatalogEntry& entry) {
                                       return entry.id.attempt == attempt &&
                                              entry.state == CatalogEntry::State::kCommitted;
                                     });
    if (newest == loaded.catalog.entries.rend()) continue;
    RETURN_IF_ERROR(RemoveMarkers(world.file_system, newest->directory, kManifestFileName));
    RETURN_IF_ERROR(world.file_system.SyncDirectory(newest->directory));
  }
  if (!loaded.newest.has_value()) return loaded;
  absl::StatusOr<RestorePoint> point = world.store.GetRestorePoint(job, loaded.newest->attempt);
  if (point.ok()) {
    loaded.restore_point = *std::move(point);
  } else if (point.status().code() != absl::StatusCode::kNotFound) {
    return point.status();
  }
  return loaded;
}

void Job::TryRecover(std::function<void()> looked, std::function<void()> recovered) {
  std::set<Attempt> attempts;
  for (const auto& [attempt, state] : attempts_) attempts.insert(attempt);
  OnPool<absl::StatusOr<Loaded>>(
      [world = world_, root = options_.root, job = options_.name, attempts] {
        return Load(world, root, job, attempts);
      },
      [this, looked = std::move(looked),
       recovered = std::move(recovered)](absl::StatusOr<Loaded> loaded) mutable {
        if (loaded.ok()) {
          StartRecovered(*loaded, [this, looked, recovered] {
            recovery_error_ = absl::OkStatus();
            recovered();
            if (looked) looked();
          });
          return;
        }
        const absl::Status why(loaded.status().code() == absl::StatusCode::kDataLoss
                                   ? absl::StatusCode::kDataLoss
                                   : absl::StatusCode::kUnavailable,
                               absl::StrFormat("job %s is not recovered yet: %s", options_.name,
                                               loaded.status().message()));
        if (why != recovery_error_) Warn(std::string(why.message()));
        recovery_error_ = why;
        if (looked) looked();
        world_.loop.RunAfter(kRecoverRetry, [this, alive = std::weak_ptr<bool>(alive_),
                                             recovered = std::move(recovered)] {
          if (!alive.expired()) TryRecover(nullptr, recovered);
        });
      });
}

void Job::StartRecovered(const Loaded& loaded, std::function<void()> then) {
  Attempt newest{UINT32_MAX};
  const bool replaced = abandoned_ || loaded.uuid != uuid_;
  if (replaced) {
    Warn(
        absl::StrFormat("job %s: the root holds a job of uuid %s, the images in memory are of %s: "
                        "they will not be published",
                        options_.name, loaded.uuid, uuid_));
  } else if (loaded.newest.has_value()) {
    newest = loaded.newest->attempt;
    RememberCommitted(loaded.catalog);
    AddAttempt(*loaded.newest).restore_point = loaded.restore_point;
  }
  groups_.BeginRecovery();
  for (const auto& [id, session] : sessions_) {
    RaiseCommitted(*session);
    session->Start(groups_);
  }
  // What the sessions report now comes before this.
  world_.loop.Post([this, alive = std::weak_ptr<bool>(alive_), newest, replaced,
                    point = loaded.restore_point, then = std::move(then)] {
    if (alive.expired()) return;
    groups_.EndRecovery({committed_.begin(), committed_.end()}, newest, point);
    for (const auto& [id, session] : sessions_) {
      if (session->identity().attempt < newest && !session->is_fenced()) session->Fence(newest);
      SessionEnded(id);
    }
    // What the former worker said of an image that was lost with it.
    AfterComparisons([this] {
      for (const auto& [attempt, state] : attempts_) LowerCommitted(attempt);
    });
    if (replaced) Abandon();
    then();
  });
}

size_t Job::pending_image_count() const {
  if (recovery_error_.ok()) return groups_.pending_image_count();
  // Nobody knows yet what became of them.
  size_t count = 0;
  for (const auto& [id, session] : sessions_) {
    for (const RankImages::Counters& image : session->counters()) {
      count += image.state == "capturing" || image.state == "sealed" ? 1 : 0;
    }
  }
  return count;
}

std::vector<Job::AttemptView> Job::attempts() const {
  std::vector<AttemptView> views;
  for (const auto& [number, attempt] : attempts_) {
    views.push_back({.record = attempt.record,
                     .newest = number == attempts_.rbegin()->first,
                     .restore_point = attempt.restore_point,
                     .sessions = attempt.sessions});
  }
  return views;
}

}  // namespace holdfast
