// LocalServer: one function per request, and one per result of the engine.
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/local_server.h"
#include "agent/log.h"
#include "agent/process.h"
#include "base/kill_point.h"
#include "base/status_macros.h"
#include "checkpoint/restore_selection.h"
#include "checkpoint/shared_mapping.h"

namespace holdfast {
namespace {

absl::Status CheckEventFd(int fd) {
  char target[64] = {};
  const std::string link = absl::StrCat("/proc/self/fd/", fd);
  const ssize_t length = readlink(link.c_str(), target, sizeof(target) - 1);
  if (length > 0 && std::string(target) == "anon_inode:[eventfd]") return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("doorbell: expected an eventfd, found ", length > 0 ? target : "nothing"));
}

std::string RealPath(const std::string& path) {
  const std::unique_ptr<char, decltype(&free)> resolved(realpath(path.c_str(), nullptr), &free);
  return resolved == nullptr ? std::string() : std::string(resolved.get());
}

void AddDuplicate(int fd, std::vector<UniqueFd>& fds) { fds.push_back(Duplicate(fd)); }

absl::Status OutOfDescriptors() {
  return absl::ResourceExhaustedError("the agent is at its limit of open files");
}

// `bytes` 0: everything, and no descriptor.
absl::StatusOr<RestoreSelection> ReadSelection(const Packet& packet, uint64_t bytes) {
  if (packet.fds.size() != (bytes > 0 ? 1 : 0)) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "restore selection of %d bytes: found %d descriptors", bytes, packet.fds.size()));
  }
  if (bytes == 0) return RestoreSelection();
  ASSIGN_OR_RETURN(
      const std::string text,
      ReadSealedMemory("restore selection", packet.fds[0].get(), bytes, kSelectionBytesMax));
  return DecodeSelection(text);
}

bool AllValid(const std::vector<UniqueFd>& fds) {
  for (const UniqueFd& fd : fds) {
    if (!fd) return false;
  }
  return true;
}

}  // namespace

void LocalServer::AnswerPacket(ConnectionId id, Packet packet) {
  Connection* const connection = Find(id);
  if (connection == nullptr) return;
  KillPoint("reply.sending");
  connection->busy = false;
  Send(id, std::move(packet));
}

void LocalServer::AnswerError(ConnectionId id, abi::MessageType request, uint32_t request_id,
                              const absl::Status& status) {
  const abi::MessageType type = ReplyType(request);
  const auto answer = [&](auto reply) {
    reply.status = ToReplyStatus(status);
    Answer(id, request_id, type, reply, {});
  };
  switch (type) {
    case abi::MessageType::kOpenReply:
      return answer(abi::OpenReply{});
    case abi::MessageType::kRegisterReply:
      return answer(abi::RegisterReply{});
    case abi::MessageType::kRestoreReply:
      return answer(abi::RestoreReply{});
    case abi::MessageType::kQueryReply:
      return answer(abi::QueryReply{});
    case abi::MessageType::kMonitorReply:
      return answer(abi::MonitorReply{});
    case abi::MessageType::kRankExitReply:
      return answer(abi::RankExitReply{});
    case abi::MessageType::kWitnessReply:
      return answer(abi::WitnessAsk{});
    default:
      // No request, so there is nothing to answer with.
      Close(id);
  }
}

void LocalServer::Handle(ConnectionId id, Packet packet) {
  Connection& connection = *Find(id);
  const abi::MessageType type = packet.type;
  const uint32_t request_id = packet.request_id;
  if (!connection.refusal.ok()) {
    connection.closing = true;
    AnswerError(id, type, request_id, connection.refusal);
    return;
  }
  const bool needs_session = type == abi::MessageType::kRegister ||
                             type == abi::MessageType::kRestore ||
                             type == abi::MessageType::kRestoreCancel;
  if (needs_session && !connection.has_session) {
    AnswerError(id, type, request_id,
                absl::FailedPreconditionError("kOpen must have succeeded on this connection"));
    return;
  }
  switch (type) {
    case abi::MessageType::kOpen:
      return HandleOpen(id, std::move(packet));
    case abi::MessageType::kRegister:
      return HandleRegister(id, std::move(packet));
    case abi::MessageType::kRestore:
      return HandleRestore(id, std::move(packet));
    case abi::MessageType::kRestoreCancel:
      return engine_.CancelRestore(connection.session);
    case abi::MessageType::kQuery:
      return HandleQuery(id, std::move(packet));
    case abi::MessageType::kMonitor:
      return HandleMonitor(id, std::move(packet));
    case abi::MessageType::kMonitorWindow:
      return HandleMonitorWindow(id, packet);
    case abi::MessageType::kMonitorQuery:
      return HandleMonitorQuery(id, std::move(packet));
    case abi::MessageType::kRun:
      return HandleRun(id, packet);
    case abi::MessageType::kRunCommand:
      return HandleRunCommand(id, packet);
    case abi::MessageType::kRankExit:
      return HandleRankExit(id, packet);
    case abi::MessageType::kWitness:
      return HandleWitness(id, std::move(packet));
    case abi::MessageType::kClose: {
      const bool has_session = connection.has_session;
      const SessionId session = connection.session;
      Close(id);
      if (has_session) engine_.Close(session);
      return;
    }
    default:
      ++garbage_count_;
      LogWarning(absl::StrFormat("closing the connection of process %d: a message of type %d",
                                 connection.peer.process_id, static_cast<int>(type)));
      Close(id);
  }
}

absl::Status LocalServer::CheckRoot(std::string& root) const {
  if (root.empty() || root == options_.root) {
    root.clear();
    return absl::OkStatus();
  }
  // Another spelling of the same directory?
  if (RealPath(root) == options_.root) {
    root.clear();
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(
      absl::StrFormat("root: the agent writes to %s, asked for %s", options_.root, root));
}

absl::StatusOr<OpenParameters> LocalServer::ToParameters(const Connection& connection,
                                                         const abi::OpenRequest& request) const {
  OpenParameters parameters;
  ASSIGN_OR_RETURN(parameters.job, TextField("job", request.job));
  ASSIGN_OR_RETURN(parameters.attempt_key, TextField("attempt_key", request.attempt_key));
  ASSIGN_OR_RETURN(parameters.root, TextField("root", request.root));
  ASSIGN_OR_RETURN(parameters.node, TextField("node", request.node));
  ASSIGN_OR_RETURN(parameters.restore_from, TextField("restore_from", request.restore_from));
  RETURN_IF_ERROR(CheckRoot(parameters.root));
  parameters.rank = Rank{request.rank};
  parameters.world_size = request.world_size;
  parameters.local_rank = request.local_rank;
  parameters.resume_attempt = Attempt{request.resume_attempt};
  parameters.resume_session = SessionId{request.resume_session_id};
  parameters.resume_registration_id = request.resume_registration_id;
  parameters.process_id = connection.peer.process_id;
  parameters.user_id = connection.peer.user_id;
  parameters.process_fd = Duplicate(connection.peer.pidfd.get());
  if (!parameters.process_fd) return OutOfDescriptors();
  return parameters;
}

void LocalServer::HandleOpen(ConnectionId id, Packet packet) {
  Connection& connection = *Find(id);
  const auto refuse = [&](const absl::Status& why) {
    AnswerError(id, packet.type, packet.request_id, why);
  };
  if (!open_refusal_.ok()) return refuse(open_refusal_);
  if (connection.has_session) {
    return refuse(absl::FailedPreconditionError("a session is open on this connection already"));
  }
  const absl::StatusOr<abi::OpenRequest> request = BodyAs<abi::OpenRequest>(packet, 1);
  if (!request.ok()) return refuse(request.status());
  if (absl::Status checked = CheckEventFd(packet.fds[0].get()); !checked.ok()) {
    return refuse(checked);
  }
  absl::StatusOr<OpenParameters> parameters = ToParameters(connection, *request);
  if (!parameters.ok()) return refuse(parameters.status());
  if (parameters->resume_session == SessionId{} && sessions_.size() >= options_.sessions_max) {
    return refuse(absl::ResourceExhaustedError(
        absl::StrFormat("%d sessions are there already, the limit is %d", sessions_.size(),
                        options_.sessions_max)));
  }
  // The engine takes the doorbell, the watch another descriptor of it.
  auto doorbell = std::make_shared<UniqueFd>(Duplicate(packet.fds[0].get()));
  if (!*doorbell) return refuse(OutOfDescriptors());
  parameters->doorbell_fd = std::move(packet.fds[0]);
  KillPoint("request.received");
  connection.busy = true;
  UpdateWatch(id);
  const uint32_t request_id = packet.request_id;
  engine_.Open(*std::move(parameters), [this, alive = std::weak_ptr<bool>(alive_), id, request_id,
                                        doorbell](absl::StatusOr<OpenResult> result) {
    if (alive.expired()) return;
    OpenDone(id, request_id, std::move(result), std::move(*doorbell));
  });
}

void LocalServer::OpenDone(ConnectionId id, uint32_t request_id, absl::StatusOr<OpenResult> result,
                           UniqueFd doorbell) {
  if (!result.ok()) {
    AnswerError(id, abi::MessageType::kOpen, request_id, result.status());
    return;
  }
  // Also if the connection has gone meanwhile: the session's life hangs on the process.
  if (const int process = engine_.process_fd(result->session); process >= 0) {
    WatchSession(result->session, Duplicate(process), std::move(doorbell));
  }
  Connection* const connection = Find(id);
  if (connection == nullptr) return;
  connection->has_session = true;
  connection->session = result->session;
  if (const auto watch = sessions_.find(result->session); watch != sessions_.end()) {
    watch->second.connection = id;
  }
  abi::OpenReply reply{};
  reply.session_id = static_cast<uint64_t>(result->session);
  reply.attempt = Value(result->attempt);
  reply.resumed = result->resumed ? 1 : 0;
  reply.block_bytes = options_.block_bytes;
  reply.rank_page_bytes = result->rank_page_bytes;
  result->job_uuid.copy(reply.job_uuid, sizeof(reply.job_uuid) - 1);
  std::vector<UniqueFd> fds;
  if (!result->resumed) AddDuplicate(result->rank_page_fd, fds);
  if (!AllValid(fds)) {
    AnswerError(id, abi::MessageType::kOpen, request_id, OutOfDescriptors());
    return;
  }
  Answer(id, request_id, abi::MessageType::kOpenReply, reply, std::move(fds));
  // It may have rung while nobody listened.
  engine_.Doorbell(result->session);
}

void LocalServer::HandleRegister(ConnectionId id, Packet packet) {
  Connection& connection = *Find(id);
  const absl::StatusOr<abi::RegisterRequest> request = BodyAs<abi::RegisterRequest>(packet, 1);
  if (!request.ok()) {
    AnswerError(id, packet.type, packet.request_id, request.status());
    return;
  }
  KillPoint("request.received");
  connection.busy = true;
  UpdateWatch(id);
  const uint32_t request_id = packet.request_id;
  engine_.Register(connection.session, std::move(packet.fds[0]), request->document_bytes,
                   [this, alive = std::weak_ptr<bool>(alive_), id,
                    request_id](absl::StatusOr<RegisterResult> result) {
                     if (!alive.expired()) RegisterDone(id, request_id, std::move(result));
                   });
}

void LocalServer::RegisterDone(ConnectionId id, uint32_t request_id,
                               absl::StatusOr<RegisterResult> result) {
  if (!result.ok()) {
    AnswerError(id, abi::MessageType::kRegister, request_id, result.status());
    return;
  }
  abi::RegisterReply reply{};
  reply.registration_id = result->registration_id;
  reply.memory_bytes = result->memory_bytes;
  reply.registration_memory_bytes = result->registration_memory_bytes;
  reply.capture_plan_bytes = result->capture_plan_bytes;
  reply.image_bytes = result->image_bytes;
  reply.block_bytes = options_.block_bytes;
  std::vector<UniqueFd> fds;
  for (const int fd :
       {result->memory_fd, result->registration_memory_fd, result->capture_plan_fd}) {
    AddDuplicate(fd, fds);
  }
  if (!AllValid(fds)) {
    AnswerError(id, abi::MessageType::kRegister, request_id, OutOfDescriptors());
    return;
  }
  Answer(id, request_id, abi::MessageType::kRegisterReply, reply, std::move(fds));
}

void LocalServer::HandleRestore(ConnectionId id, Packet packet) {
  Connection& connection = *Find(id);
  const absl::StatusOr<abi::RestoreRequest> request =
      BodyAs<abi::RestoreRequest>(packet, packet.fds.empty() ? 0 : 1);
  absl::StatusOr<RestoreSelection> selection =
      request.ok() ? ReadSelection(packet, request->selection_bytes)
                   : absl::StatusOr<RestoreSelection>(request.status());
  if (!selection.ok()) {
    AnswerError(id, packet.type, packet.request_id, selection.status());
    return;
  }
  KillPoint("request.received");
  connection.busy = true;
  UpdateWatch(id);
  const uint32_t request_id = packet.request_id;
  const SessionId session = connection.session;
  const std::weak_ptr<bool> alive(alive_);
  engine_.Restore(
      session, request->registration_id, *std::move(selection),
      [this, alive, id, request_id](absl::StatusOr<RestoreBegun> begun) {
        if (!alive.expired()) RestoreBegunDone(id, request_id, std::move(begun));
      },
      [this, alive, session](absl::StatusOr<RestoreEnded> ended) {
        if (!alive.expired()) RestoreEndedDone(session, std::move(ended));
      });
}

void LocalServer::RestoreBegunDone(ConnectionId id, uint32_t request_id,
                                   absl::StatusOr<RestoreBegun> begun) {
  if (!begun.ok()) {
    AnswerError(id, abi::MessageType::kRestore, request_id, begun.status());
    return;
  }
  uint32_t map_id = 1;
  for (RestoreBegun::Map& map : begun->maps) {
    abi::ImageMap body{};
    body.map_id = map_id++;
    body.bytes = map.bytes;
    std::vector<UniqueFd> fds;
    fds.push_back(std::move(map.fd));
    Send(id, Packet{abi::MessageType::kImageMap, 0, BodyBytes(body), std::move(fds)});
  }
  abi::RestoreReply reply{};
  reply.step = Value(begun->checkpoint.step);
  reply.attempt = Value(begun->checkpoint.attempt);
  reply.world_size = begun->world_size;
  reply.op_count = begun->op_count;
  reply.operations_bytes = begun->operations_bytes;
  reply.blobs_bytes = begun->blobs_bytes;
  reply.bytes = begun->bytes;
  reply.tensor_states = begun->tensor_states;
  reply.tensor_states_left_out = begun->tensor_states_left_out;
  reply.restore_from = static_cast<uint32_t>(begun->restore_from);
  std::vector<UniqueFd> fds;
  fds.push_back(std::move(begun->operations_fd));
  fds.push_back(std::move(begun->blobs_fd));
  Answer(id, request_id, abi::MessageType::kRestoreReply, reply, std::move(fds));
}

void LocalServer::RestoreEndedDone(SessionId session, absl::StatusOr<RestoreEnded> ended) {
  const auto watch = sessions_.find(session);
  if (watch == sessions_.end() || watch->second.connection == 0) return;
  abi::RestoreDone body{};
  if (ended.ok()) {
    body.bytes = ended->bytes;
    body.bytes_from_memory = ended->bytes_from_memory;
  } else {
    body.status = ToReplyStatus(ended.status());
  }
  Send(watch->second.connection, Packet{abi::MessageType::kRestoreDone, 0, BodyBytes(body), {}});
}

void LocalServer::AnswerText(ConnectionId id, abi::MessageType request, uint32_t request_id,
                             const std::string& text) {
  absl::StatusOr<UniqueFd> memory = SealedMemfd("holdfast answer", text);
  if (!memory.ok()) {
    AnswerError(id, request, request_id, memory.status());
    return;
  }
  abi::QueryReply reply{};
  reply.text_bytes = text.size();
  std::vector<UniqueFd> fds;
  fds.push_back(*std::move(memory));
  Answer(id, request_id, abi::MessageType::kQueryReply, reply, std::move(fds));
}

void LocalServer::HandleQuery(ConnectionId id, Packet packet) {
  const absl::StatusOr<abi::QueryRequest> request = BodyAs<abi::QueryRequest>(packet, 0);
  absl::Status problem = request.status();
  if (request.ok() && request->kind == abi::QueryKind::kWitnesses) {
    return HandleWitnessQuery(id, packet.request_id);
  }
  if (request.ok() && request->kind != abi::QueryKind::kStatus) {
    problem = absl::InvalidArgumentError(
        absl::StrFormat("query of kind %d: expected 1 (status) or 16 (witnesses)",
                        static_cast<uint32_t>(request->kind)));
  }
  if (!problem.ok()) {
    AnswerError(id, packet.type, packet.request_id, problem);
    return;
  }
  AnswerText(id, packet.type, packet.request_id, status_text_());
}

}  // namespace holdfast
