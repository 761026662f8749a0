// Rebuilding sessions out of what the keeper held:
//   1. Descriptors are sorted by session and registration. What a crash left incomplete (the
//      identity of a session and the record of a registration are kept last) is dropped.
//   2. Identities, pages and records are read; documents are understood anew, on the pool.
//   3. When all are: memories are mapped, and each registration's images claim their blocks. What
//      cannot be believed is dropped with a warning, alone.
//   4. Memories that nobody uses are dropped; in the others, blocks that nobody claimed become
//   free.
#include <poll.h>

#include <atomic>
#include <map>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "checkpoint/image_record.h"
#include "checkpoint/session_impl.h"
#include "checkpoint/shared_slots.h"

namespace holdfast {
namespace {

// 16 hexadecimal digits.
std::optional<uint64_t> ParseId(const std::string& text) {
  uint64_t id = 0;
  if (text.size() != 16 || !absl::SimpleHexAtoi(text, &id)) return std::nullopt;
  return id;
}

// A pidfd is readable once the process has ended.
bool IsProcessDead(int process_fd) {
  pollfd poll_fd = {process_fd, POLLIN, 0};
  return poll(&poll_fd, 1, 0) > 0;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Session>> Session::Reopen(Found& found, const SessionWorld& world) {
  ASSIGN_OR_RETURN(std::shared_ptr<SharedMapping> memory,
                   SharedMapping::Reopen("session identity", std::move(found.fds.at("identity")),
                                         sizeof(IdentityBytes)));
  const auto& bytes = *reinterpret_cast<const IdentityBytes*>(memory->bytes().data());
  ASSIGN_OR_RETURN(SessionIdentity identity, DecodeIdentity(bytes));
  if (static_cast<uint64_t>(identity.session) != found.id) {
    return absl::DataLossError(absl::StrFormat("session identity: expected session %d, found %d",
                                               found.id, static_cast<uint64_t>(identity.session)));
  }
  ASSIGN_OR_RETURN(
      std::unique_ptr<SaveReports> reports,
      SaveReports::Reopen(found.id, world.due_every_steps, std::move(found.fds.at("page"))));
  const bool closed = bytes.closed != 0;
  const bool fenced = bytes.fenced != 0;
  std::unique_ptr<Session> session(new Session(std::move(identity), std::move(reports),
                                               std::move(memory),
                                               std::move(found.fds.at("process")), world));
  session->resumed_ = false;
  session->closed_ = closed;
  session->fenced_ = fenced;
  session->process_dead_ = IsProcessDead(session->process_fd());
  return session;
}

// One run of Session::Recover; owned by the completions of its work on the pool.
class SessionRecovery : public std::enable_shared_from_this<SessionRecovery> {
 public:
  SessionRecovery(const SessionWorld& world, std::function<void(Session::Recovered)> done)
      : world_(world), done_(std::move(done)) {}

  void Begin(std::vector<KeptDescriptor> kept) {
    Sort(std::move(kept));
    for (auto& [id, found] : found_) OpenSession(found);
    // One of its own, so that this function is over before Finish.
    ++documents_left_;
    for (const std::unique_ptr<Part>& part : parts_) ReadDocument(*part);
    world_.image.loop.Post([self = shared_from_this()] { self->DocumentRead(); });
  }

 private:
  // A registration on its way.
  struct Part {
    Session* session = nullptr;
    uint64_t id = 0;
    UniqueFd shared;
    std::unique_ptr<ImageRecord> record;
    std::unique_ptr<Session::Registered> registered = std::make_unique<Session::Registered>();
    absl::StatusOr<std::shared_ptr<const Registration>> registration =
        absl::UnknownError("not run");
  };

  void Sort(std::vector<KeptDescriptor> kept) {
    for (KeptDescriptor& descriptor : kept) {
      const std::vector<std::string> parts =
          absl::StrSplit(descriptor.name, absl::MaxSplits('/', 2));
      const std::optional<uint64_t> id =
          parts.size() > 1 ? ParseId(parts[1]) : std::optional<uint64_t>();
      if (id && parts.size() == 3 && parts[0] == "session") {
        found_[*id].id = *id;
        found_[*id].fds[parts[2]] = std::move(descriptor.fd);
      } else if (id && parts.size() == 2 && parts[0] == "memory") {
        memory_fds_[*id] = std::move(descriptor.fd);
      } else {
        result_.others.push_back(std::move(descriptor));
      }
    }
  }

  void Drop(uint64_t session, const std::string& part) {
    world_.keeper.Drop(SessionPrefix(SessionId{session}) + part);
  }

  void OpenSession(Session::Found& found) {
    std::vector<std::string> names;
    for (const auto& [name, fd] : found.fds) names.push_back(name);
    const auto has = [&](const std::string& name) { return found.fds.count(name) > 0; };
    const bool is_whole = has("identity") && has("page") && has("process");
    absl::StatusOr<std::unique_ptr<Session>> session =
        is_whole ? Session::Reopen(found, world_)
                 : absl::StatusOr<std::unique_ptr<Session>>(absl::NotFoundError("incomplete"));
    if (!session.ok()) {
      for (const std::string& name : names) Drop(found.id, name);
      // Incomplete: its trainer has never heard of it.
      if (is_whole) {
        result_.warnings.push_back(absl::StrFormat("session %d was dropped: %s", found.id,
                                                   std::string(session.status().message())));
      }
      return;
    }
    result_.sessions.push_back(*std::move(session));
    OpenRegistrations(*result_.sessions.back(), found);
  }

  void OpenRegistrations(Session& session, Session::Found& found) {
    std::map<uint64_t, std::map<std::string, UniqueFd>> by_registration;
    for (auto& [name, fd] : found.fds) {
      const std::vector<std::string> parts = absl::StrSplit(name, '/');
      uint64_t id = 0;
      if (parts.size() != 2 || !absl::SimpleAtoi(parts[0], &id)) continue;
      by_registration[id][parts[1]] = std::move(fd);
    }
    for (auto& [id, fds] : by_registration) {
      if (fds.count("record") == 0 || fds.count("memory") == 0 || fds.count("document") == 0) {
        for (const auto& [name, fd] : fds) Drop(found.id, absl::StrCat(id, "/", name));
        continue;
      }
      auto part = std::make_unique<Part>();
      part->session = &session;
      part->id = id;
      part->shared = std::move(fds["memory"]);
      part->registered->document = std::move(fds["document"]);
      absl::StatusOr<std::unique_ptr<ImageRecord>> record =
          ImageRecord::Reopen(std::move(fds["record"]));
      if (record.ok() && ((*record)->header().session_id != found.id ||
                          (*record)->header().registration_id != id)) {
        record = absl::DataLossError("image record: of another session or registration");
      }
      if (!record.ok()) {
        DropRegistration(*part, record.status());
        continue;
      }
      part->record = *std::move(record);
      parts_.push_back(std::move(part));
    }
  }

  void ReadDocument(Part& part) {
    const SessionIdentity& identity = part.session->identity();
    const RecordHeader& header = part.record->header();
    RegistrationOwner owner;
    owner.job = identity.job;
    owner.job_uuid = identity.job_uuid;
    owner.rank = identity.rank;
    owner.world_size = identity.world_size;
    owner.block_bytes = header.block_bytes;
    ++documents_left_;
    // Parts live as long as this object, which the work holds.
    world_.image.pool.Run(
        [self = shared_from_this(), &part, owner, bytes = header.document_bytes,
         scratch = world_.scratch_directory, layouts = world_.layouts] {
          absl::StatusOr<std::string> text = ReadSealedMemory(
              "registration document", part.registered->document.get(), bytes, kDocumentBytesMax);
          part.registration =
              text.ok() ? Registration::Build(*std::move(text), owner, scratch, layouts.get())
                        : absl::StatusOr<std::shared_ptr<const Registration>>(text.status());
        },
        [self = shared_from_this()] { self->DocumentRead(); });
  }

  void DocumentRead() {
    if (--documents_left_ == 0) Finish();
  }

  void Finish() {
    for (const std::unique_ptr<Part>& part : parts_) {
      if (absl::Status opened = OpenPart(*part); !opened.ok()) DropRegistration(*part, opened);
    }
    // A trainer may still write where a dropped registration had its blocks.
    for (const auto& [session, why] : damaged_) {
      if (session->is_process_dead()) continue;
      for (const auto& [id, registered] : session->registered_) registered->memory->Distrust(why);
    }
    for (const auto& [id, fd] : memory_fds_) {
      if (memories_.count(id) == 0) world_.keeper.Drop(MemoryName(MemoryId{id}));
    }
    for (const auto& [id, memory] : memories_) {
      memory->DropIfUnused();
      if (memory->user_count() > 0) memory->Prefault();
    }
    done_(std::move(result_));
  }

  absl::StatusOr<std::shared_ptr<RankMemory>> OpenMemory(const SessionIdentity& identity,
                                                         const RecordHeader& header) {
    if (const auto open = memories_.find(header.memory_id); open != memories_.end()) {
      return open->second;
    }
    const auto fd = memory_fds_.find(header.memory_id);
    const MemoryId id{header.memory_id};
    if (fd == memory_fds_.end() || !fd->second) {
      return absl::DataLossError(MemoryName(id) + ": the keeper does not have it");
    }
    ASSIGN_OR_RETURN(
        std::shared_ptr<RankMemory> memory,
        RankMemory::Reopen(id, std::move(fd->second), header.block_bytes, world_.memories.world()));
    world_.memories.Adopt(identity.job_uuid, identity.rank, memory);
    memories_.emplace(header.memory_id, memory);
    return memory;
  }

  absl::Status OpenPart(Part& part) {
    ASSIGN_OR_RETURN(part.registered->registration, std::move(part.registration));
    const Registration& registration = *part.registered->registration;
    const RecordHeader header = part.record->header();
    if (header.block_count != registration.slot_block_count() ||
        header.blob_count != registration.blobs().size() || header.slot_count > abi::kSlotsMax) {
      return absl::DataLossError(absl::StrFormat(
          "image record: expected %d blocks and %d blobs, found %d and %d, in %d slots",
          registration.slot_block_count(), registration.blobs().size(), header.block_count,
          header.blob_count, header.slot_count));
    }
    SlotSizes sizes;
    sizes.registration_id = part.id;
    sizes.slot_count = header.slot_count;
    sizes.block_count = header.block_count;
    sizes.blob_count = header.blob_count;
    sizes.block_bytes = header.block_bytes;
    ASSIGN_OR_RETURN(part.registered->shared,
                     SharedMapping::Reopen("registration memory", std::move(part.shared),
                                           SharedSlots::MemoryBytes(sizes)));
    ASSIGN_OR_RETURN(part.registered->capture_plan,
                     SealedMemory("holdfast-capture-plan", registration.capture_plan()));
    const SessionIdentity& identity = part.session->identity();
    ASSIGN_OR_RETURN(part.registered->memory, OpenMemory(identity, header));
    if (part.registered->memory->block_bytes() != header.block_bytes) {
      return absl::DataLossError(
          absl::StrFormat("image record: blocks of %d bytes in a memory with blocks of %d",
                          header.block_bytes, part.registered->memory->block_bytes()));
    }

    RankImages::Parts parts;
    parts.session = identity.session;
    parts.rank = identity.rank;
    parts.attempt = identity.attempt;
    parts.registration_id = part.id;
    parts.registration = part.registered->registration;
    parts.memory = part.registered->memory;
    parts.record = std::move(part.record);
    parts.registration_memory = part.registered->shared;
    parts.reports = part.session->reports_.get();
    part.registered->images = RankImages::Create(std::move(parts), world_.image, result_.warnings);
    Session& session = *part.session;
    session.AddRegistered(part.id, std::move(part.registered));
    session.current_registration_id_ = std::max(session.current_registration_id_, part.id);
    return absl::OkStatus();
  }

  void DropRegistration(const Part& part, const absl::Status& why) {
    const auto session_id = static_cast<uint64_t>(part.session->identity().session);
    for (const char* name : {"record", "memory", "document"}) {
      Drop(session_id, absl::StrCat(part.id, "/", name));
    }
    part.session->last_registration_id_ = std::max(part.session->last_registration_id_, part.id);
    damaged_.emplace_back(part.session, why);
    result_.warnings.push_back(absl::StrFormat("session %d: registration %d was dropped: %s",
                                               session_id, part.id, std::string(why.message())));
  }

  const SessionWorld world_;
  std::function<void(Session::Recovered)> done_;
  Session::Recovered result_;
  std::map<uint64_t, Session::Found> found_;
  std::map<uint64_t, UniqueFd> memory_fds_;
  std::map<uint64_t, std::shared_ptr<RankMemory>> memories_;
  std::vector<std::unique_ptr<Part>> parts_;
  std::vector<std::pair<Session*, absl::Status>> damaged_;
  size_t documents_left_ = 0;
};

void Session::Recover(std::vector<KeptDescriptor> kept, const SessionWorld& world,
                      std::function<void(Recovered)> done) {
  std::make_shared<SessionRecovery>(world, std::move(done))->Begin(std::move(kept));
}

}  // namespace holdfast
