#include "checkpoint/session.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "base/kill_point.h"
#include "base/status_macros.h"
#include "checkpoint/image_record.h"
#include "checkpoint/session_impl.h"
#include "checkpoint/shared_slots.h"
#include "hook/abi/messages.h"

namespace holdfast {
namespace {

constexpr uint64_t kIdentityMagic = 0x3144495344464c48;  // "HLFDSID1" in memory
constexpr uint32_t kIdentityVersion = 1;

template <size_t kBytes>
void Encode(const std::string& text, char (&field)[kBytes]) {
  std::memcpy(field, text.data(), std::min(text.size(), kBytes - 1));
}

template <size_t kBytes>
std::string Decode(const char (&field)[kBytes]) {
  return std::string(field, strnlen(field, kBytes));
}

uint32_t ChecksumOf(const IdentityBytes& bytes) {
  return Crc32c(std::as_bytes(std::span(&bytes, 1)).first(offsetof(IdentityBytes, crc32c)));
}

IdentityBytes& BytesIn(const SharedMapping& memory) {
  return *reinterpret_cast<IdentityBytes*>(memory.bytes().data());
}

}  // namespace

void EncodeIdentity(const SessionIdentity& identity, IdentityBytes& bytes) {
  bytes = {};
  bytes.magic = kIdentityMagic;
  bytes.version = kIdentityVersion;
  bytes.attempt = Value(identity.attempt);
  bytes.session_id = static_cast<uint64_t>(identity.session);
  bytes.rank = Value(identity.rank);
  bytes.world_size = identity.world_size;
  bytes.local_rank = identity.local_rank;
  bytes.process_id = identity.process_id;
  bytes.user_id = identity.user_id;
  Encode(identity.job, bytes.job);
  Encode(identity.job_uuid, bytes.job_uuid);
  Encode(identity.attempt_key, bytes.attempt_key);
  Encode(identity.node, bytes.node);
  bytes.crc32c = ChecksumOf(bytes);
}

absl::StatusOr<SessionIdentity> DecodeIdentity(const IdentityBytes& bytes) {
  if (bytes.magic != kIdentityMagic || bytes.crc32c != ChecksumOf(bytes)) {
    return absl::DataLossError(absl::StrFormat(
        "session identity: expected magic 0x%x and checksum 0x%08x, found 0x%x and 0x%08x",
        kIdentityMagic, ChecksumOf(bytes), bytes.magic, bytes.crc32c));
  }
  if (bytes.version != kIdentityVersion) {
    return absl::FailedPreconditionError(
        absl::StrFormat("session identity: this agent knows version %d, found version %d",
                        kIdentityVersion, bytes.version));
  }
  SessionIdentity identity;
  identity.session = SessionId{bytes.session_id};
  identity.attempt = Attempt{bytes.attempt};
  identity.rank = Rank{bytes.rank};
  identity.world_size = bytes.world_size;
  identity.local_rank = bytes.local_rank;
  identity.process_id = bytes.process_id;
  identity.user_id = bytes.user_id;
  identity.job = Decode(bytes.job);
  identity.job_uuid = Decode(bytes.job_uuid);
  identity.attempt_key = Decode(bytes.attempt_key);
  identity.node = Decode(bytes.node);
  return identity;
}

std::string SessionPrefix(SessionId session) {
  return absl::StrFormat("session/%016x/", static_cast<uint64_t>(session));
}

Session::Registered::~Registered() {
  if (listener != 0) memory->RemoveListener(listener);
}

Session::Session(SessionIdentity identity, std::unique_ptr<SaveReports> reports,
                 std::shared_ptr<SharedMapping> identity_memory, UniqueFd process_fd,
                 const SessionWorld& world)
    : identity_(std::move(identity)),
      world_(world),
      reports_(std::move(reports)),
      identity_memory_(std::move(identity_memory)),
      process_fd_(std::move(process_fd)) {}

Session::~Session() = default;

std::string Session::Name(const std::string& part) const {
  return SessionPrefix(identity_.session) + part;
}

std::string Session::Name(uint64_t registration_id, const std::string& part) const {
  return absl::StrCat(SessionPrefix(identity_.session), registration_id, "/", part);
}

absl::StatusOr<std::unique_ptr<Session>> Session::Create(SessionIdentity identity,
                                                         UniqueFd process_fd,
                                                         const SessionWorld& world) {
  ASSIGN_OR_RETURN(
      std::unique_ptr<SaveReports> reports,
      SaveReports::Create(static_cast<uint64_t>(identity.session), world.due_every_steps));
  ASSIGN_OR_RETURN(std::shared_ptr<SharedMapping> memory,
                   SharedMapping::Create("holdfast-session", sizeof(IdentityBytes)));
  EncodeIdentity(identity, BytesIn(*memory));
  std::unique_ptr<Session> session(new Session(std::move(identity), std::move(reports),
                                               std::move(memory), std::move(process_fd), world));
  DescriptorKeeper& keeper = world.keeper;
  keeper.Keep(session->Name("page"), session->reports_->fd());
  keeper.Keep(session->Name("process"), session->process_fd_.get());
  // Last: it makes the session whole.
  keeper.Keep(session->Name("identity"), session->identity_memory_->fd());
  KillPoint("open.session_made");
  return session;
}

void Session::Start(ImageObserver& observer) {
  CHECK(observer_ == nullptr);
  observer_ = &observer;
  const RankImages::Trainer trainer =
      process_dead_ ? RankImages::Trainer::kDead : RankImages::Trainer::kAlive;
  for (const auto& [id, registered] : registered_) {
    if (closed_) {
      registered->images->StopGranting(RankImages::UnusedGrant::kTakeBack);
    } else if (fenced_) {
      registered->images->StopGranting(RankImages::UnusedGrant::kLeave);
    }
    registered->images->Start(observer, trainer);
  }
}

void Session::Prepare(
    UniqueFd document, uint64_t document_bytes,
    std::function<void(absl::StatusOr<std::shared_ptr<const Registration>>)> done) {
  struct Work {
    UniqueFd document;
    absl::StatusOr<std::shared_ptr<const Registration>> result = absl::UnknownError("not run");
  };
  auto work = std::make_shared<Work>();
  work->document = std::move(document);
  RegistrationOwner owner;
  owner.job = identity_.job;
  owner.job_uuid = identity_.job_uuid;
  owner.rank = identity_.rank;
  owner.world_size = identity_.world_size;
  owner.block_bytes = world_.block_bytes;
  world_.image.pool.Run(
      [work, document_bytes, owner, scratch = world_.scratch_directory, layouts = world_.layouts] {
        absl::StatusOr<std::string> text = ReadSealedMemory(
            "registration document", work->document.get(), document_bytes, kDocumentBytesMax);
        work->result = text.ok()
                           ? Registration::Build(*std::move(text), owner, scratch, layouts.get())
                           : absl::StatusOr<std::shared_ptr<const Registration>>(text.status());
      },
      [this, alive = std::weak_ptr<bool>(alive_), work, document_bytes, done = std::move(done)] {
        if (alive.expired()) return;
        if (work->result.ok()) {
          prepared_ = *work->result;
          prepared_document_ = std::move(work->document);
          prepared_document_bytes_ = document_bytes;
        }
        done(std::move(work->result));
      });
}

absl::StatusOr<Session::Registered*> Session::MakeRegistered() {
  const RankMemory* own = memory(current_registration_id_);
  uint32_t own_writer_count = 0;
  for (const auto& [other_id, other] : registered_) {
    if (other->memory.get() == own && other->is_writer) ++own_writer_count;
  }
  absl::StatusOr<std::shared_ptr<RankMemory>> obtained = world_.memories.Obtain(
      identity_.job_uuid, identity_.rank, world_.block_bytes, prepared_->slot_block_count(),
      world_.images_per_rank_max, own, own_writer_count);
  if (!obtained.ok() && prepared_->slot_block_count() > prepared_->block_count()) {
    return absl::Status(
        obtained.status().code(),
        absl::StrFormat("%s; of the %d blocks that one save takes, %d are extra copies (copies = "
                        "all)",
                        obtained.status().message(), prepared_->slot_block_count(),
                        prepared_->slot_block_count() - prepared_->block_count()));
  }
  RETURN_IF_ERROR(obtained.status());
  const std::shared_ptr<RankMemory> memory = *std::move(obtained);
  absl::StatusOr<Registered*> made = MakeRegisteredIn(memory);
  if (!made.ok()) memory->DropIfUnused();
  return made;
}

// After an error `prepared_` is as it was.
absl::StatusOr<Session::Registered*> Session::MakeRegisteredIn(
    const std::shared_ptr<RankMemory>& memory) {
  const uint64_t id = last_registration_id_ + 1;
  auto registered = std::make_unique<Registered>();
  registered->memory = memory;
  const auto slot_count = static_cast<uint32_t>(std::min<uint64_t>(
      {world_.images_per_rank_max, abi::kSlotsMax,
       registered->memory->pool().block_count() / prepared_->slot_block_count()}));
  SlotSizes sizes;
  sizes.registration_id = id;
  sizes.slot_count = slot_count;
  sizes.block_count = prepared_->slot_block_count();
  sizes.blob_count = static_cast<uint32_t>(prepared_->blobs().size());
  sizes.block_bytes = world_.block_bytes;
  ASSIGN_OR_RETURN(registered->shared,
                   SharedMapping::Create("holdfast-registration", SharedSlots::MemoryBytes(sizes)));
  RecordHeader header;
  header.session_id = static_cast<uint64_t>(identity_.session);
  header.registration_id = id;
  header.memory_id = static_cast<uint64_t>(registered->memory->id());
  header.block_bytes = world_.block_bytes;
  header.document_bytes = prepared_document_bytes_;
  header.slot_count = slot_count;
  header.block_count = sizes.block_count;
  header.blob_count = sizes.blob_count;
  ASSIGN_OR_RETURN(std::unique_ptr<ImageRecord> record, ImageRecord::Create(header));
  ASSIGN_OR_RETURN(registered->capture_plan,
                   SealedMemory("holdfast-capture-plan", prepared_->capture_plan()));

  registered->registration = std::move(prepared_);
  registered->document = std::move(prepared_document_);
  DescriptorKeeper& keeper = world_.keeper;
  keeper.Keep(Name(id, "document"), registered->document.get());
  keeper.Keep(Name(id, "memory"), registered->shared->fd());
  // Last: it makes the registration whole.
  keeper.Keep(Name(id, "record"), record->fd());
  KillPoint("register.memory_made");

  RankImages::Parts parts;
  parts.session = identity_.session;
  parts.rank = identity_.rank;
  parts.attempt = identity_.attempt;
  parts.registration_id = id;
  parts.registration = registered->registration;
  parts.memory = registered->memory;
  parts.record = std::move(record);
  parts.registration_memory = registered->shared;
  parts.reports = reports_.get();
  std::vector<std::string> warnings;
  registered->images = RankImages::Create(std::move(parts), world_.image, warnings);
  CHECK(warnings.empty());  // a new record holds nothing
  Registered* result = registered.get();
  AddRegistered(id, std::move(registered));
  return result;
}

void Session::AddRegistered(uint64_t registration_id, std::unique_ptr<Registered> registered) {
  registered->memory->AddUser();
  if (!process_dead_) {
    registered->memory->AddWriter();
    registered->is_writer = true;
  }
  registered->listener = registered->memory->AddListener([this] { BlocksFreed(); });
  registered_.emplace(registration_id, std::move(registered));
  last_registration_id_ = std::max(last_registration_id_, registration_id);
}

void Session::Register(std::function<void(absl::StatusOr<RegisterResult>)> done) {
  CHECK(prepared_ != nullptr && observer_ != nullptr);
  const auto refuse = [&](const absl::Status& why) {
    world_.image.loop.Post([done = std::move(done), why] { done(why); });
  };
  if (!is_open() || register_done_ != nullptr) {
    refuse(absl::FailedPreconditionError(
        is_open() ? "another registration of this process is under way" : "the session has ended"));
    return;
  }
  absl::StatusOr<Registered*> made = MakeRegistered();
  if (!made.ok()) {
    refuse(made.status());
    return;
  }
  resumed_ = true;
  current_registration_id_ = last_registration_id_;
  for (const auto& [id, registered] : registered_) {
    if (id == current_registration_id_) continue;
    registered->images->StopGranting(RankImages::UnusedGrant::kTakeBack);
  }
  register_done_ = std::move(done);
  (*made)->images->Start(*observer_, RankImages::Trainer::kAlive);
  if (fenced_) (*made)->images->StopGranting(RankImages::UnusedGrant::kLeave);
  (*made)->memory->Prefault();
  // Answered from the loop: by BlocksFreed, once there is memory.
  (*made)->memory->NotifyBlocksFree();
}

void Session::BlocksFreed() {
  // Behind this turn, in which the images grant: who is answered has a grant, if there will be one.
  if (register_done_ != nullptr) {
    world_.image.loop.Post([this, alive = std::weak_ptr<bool>(alive_)] {
      if (!alive.expired()) AnswerRegister();
    });
  }
  std::vector<uint64_t> finished;
  for (const auto& [id, registered] : registered_) {
    if (!resumed_ && !process_dead_) break;
    if (id != current_registration_id_ && registered->images->held_image_count() == 0) {
      finished.push_back(id);
    }
  }
  for (const uint64_t id : finished) DropRegistered(id);
  // Last, and a copy: it may destroy this session.
  if (const std::function<void()> on_freed = on_freed_; on_freed) on_freed();
}

// The first image's memory must be there, or all that there will be.
void Session::AnswerRegister() {
  if (register_done_ == nullptr) return;
  const Registered& current = *registered_.at(current_registration_id_);
  const BlockPool& pool = current.memory->pool();
  const bool has_grant = pool.count(BlockState::kGranted) > 0;
  if (!has_grant && current.memory->prefault_running()) return;
  const auto done = std::exchange(register_done_, nullptr);
  if (!current.memory->prefault_status().ok() && !has_grant) {
    const absl::Status why = current.memory->prefault_status();
    current.images->StopGranting(RankImages::UnusedGrant::kTakeBack);
    // What was prepared is good: it may be asked for again.
    Registered& refused = *registered_.at(current_registration_id_);
    prepared_ = refused.registration;
    prepared_document_ = std::move(refused.document);
    DropRegistered(current_registration_id_);
    current_registration_id_ = 0;
    done(why);
    return;
  }
  done(ResultOf(current_registration_id_, current));
}

RegisterResult Session::ResultOf(uint64_t registration_id, const Registered& registered) const {
  RegisterResult result;
  result.registration_id = registration_id;
  result.memory_fd = registered.memory->fd();
  result.registration_memory_fd = registered.shared->fd();
  result.capture_plan_fd = registered.capture_plan.get();
  result.memory_bytes = registered.memory->bytes().size();
  result.registration_memory_bytes = registered.shared->bytes().size();
  result.capture_plan_bytes = registered.registration->capture_plan().size();
  result.image_bytes = registered.registration->image_bytes();
  return result;
}

void Session::Advance() {
  for (const auto& [id, registered] : registered_) registered->images->Advance();
}

bool Session::Resume(uint64_t registration_id) {
  RankImages* resumed = images(registration_id);
  if (resumed == nullptr) return false;
  resumed_ = true;
  current_registration_id_ = registration_id;
  for (const auto& [id, registered] : registered_) {
    if (id != registration_id) {
      registered->images->StopGranting(RankImages::UnusedGrant::kTakeBack);
    }
    registered->memory->NotifyBlocksFree();
  }
  if (!closed_ && !fenced_) resumed->ResumeGranting();
  return true;
}

void Session::Close() {
  if (closed_) return;
  closed_ = true;
  std::atomic_ref<uint32_t>(BytesIn(*identity_memory_).closed).store(1);
  Advance();
  for (const auto& [id, registered] : registered_) {
    registered->images->StopGranting(RankImages::UnusedGrant::kTakeBack);
  }
}

void Session::ProcessDied() {
  if (process_dead_) return;
  process_dead_ = true;
  for (const auto& [id, registered] : registered_) registered->images->TrainerGone();
  MarkWritersGone();
  if (register_done_ != nullptr) {
    const auto done = std::exchange(register_done_, nullptr);
    world_.image.loop.Post(
        [done] { done(absl::FailedPreconditionError("the training process died")); });
  }
}

void Session::MarkWritersGone() {
  for (const auto& [id, registered] : registered_) {
    if (!registered->is_writer) continue;
    registered->is_writer = false;
    registered->memory->RemoveWriter();
    registered->memory->NotifyBlocksFree();
  }
}

void Session::Fence(Attempt by) {
  if (!fenced_) {
    fenced_ = true;
    std::atomic_ref<uint32_t>(BytesIn(*identity_memory_).fenced).store(1);
  }
  reports_->SetFencedBy(by);
  const std::string reason =
      Value(by) == abi::kJobReplaced
          ? absl::StrFormat("the directory of job %s was replaced", identity_.job)
          : absl::StrFormat("attempt %d of job %s has begun", Value(by), identity_.job);
  const absl::Status why = absl::FailedPreconditionError(
      absl::StrFormat("attempt %d was fenced: %s", Value(identity_.attempt), reason));
  for (const auto& [id, registered] : registered_) {
    registered->images->StopGranting(RankImages::UnusedGrant::kLeave);
    registered->images->Advance();
    for (const RankImages::Counters& image : registered->images->counters()) {
      if (image.state == "capturing") registered->images->Void(image.id, why);
    }
  }
}

RankImages* Session::images(uint64_t registration_id) const {
  const auto found = registered_.find(registration_id);
  return found == registered_.end() ? nullptr : found->second->images.get();
}

RankImages* Session::images_of(ImageId id) const {
  return id.session == identity_.session ? images(RegistrationOf(id)) : nullptr;
}

RankImages* Session::current_images() const { return images(current_registration_id_); }

std::shared_ptr<const Registration> Session::registration(uint64_t registration_id) const {
  const auto found = registered_.find(registration_id);
  return found == registered_.end() ? nullptr : found->second->registration;
}

std::shared_ptr<const Registration> Session::registration_of(ImageId id) const {
  return id.session == identity_.session ? registration(RegistrationOf(id)) : nullptr;
}

abi::RegistrationMemory* Session::registration_memory(uint64_t registration_id) const {
  const auto found = registered_.find(registration_id);
  if (found == registered_.end()) return nullptr;
  return reinterpret_cast<abi::RegistrationMemory*>(found->second->shared->bytes().data());
}

RankMemory* Session::memory_of(ImageId id) const {
  return id.session == identity_.session ? memory(RegistrationOf(id)) : nullptr;
}

RankMemory* Session::memory(uint64_t registration_id) const {
  const auto found = registered_.find(registration_id);
  return found == registered_.end() ? nullptr : found->second->memory.get();
}

std::vector<RankImages::Counters> Session::counters() const {
  std::vector<RankImages::Counters> all;
  for (const auto& [id, registered] : registered_) {
    for (RankImages::Counters& counters : registered->images->counters()) {
      all.push_back(std::move(counters));
    }
  }
  return all;
}

bool Session::IsFinished() const {
  if (!process_dead_) return false;
  for (const auto& [id, registered] : registered_) {
    if (registered->images->held_image_count() > 0) return false;
  }
  return true;
}

// The record goes first: without it the rest is nothing.
void Session::DropRegistered(uint64_t registration_id) {
  const auto found = registered_.find(registration_id);
  CHECK(found != registered_.end());
  DescriptorKeeper& keeper = world_.keeper;
  keeper.Drop(Name(registration_id, "record"));
  keeper.Drop(Name(registration_id, "memory"));
  keeper.Drop(Name(registration_id, "document"));
  const std::unique_ptr<Registered> registered = std::move(found->second);
  registered_.erase(found);
  if (registered->is_writer) registered->memory->RemoveWriter();
  registered->memory->RemoveUser();
}

void Session::Forget() {
  while (!registered_.empty()) DropRegistered(registered_.begin()->first);
  world_.keeper.Drop(Name("identity"));
  world_.keeper.Drop(Name("process"));
  world_.keeper.Drop(Name("page"));
}

}  // namespace holdfast
