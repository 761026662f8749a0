// LocalServer: what concerns `holdfast run`. The command hands over what to run (kRun), hears of it
// until it is over, and any client of the user asks and orders (kRunCommand).
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/local_server.h"
#include "agent/process.h"
#include "agent/run/fields.h"
#include "agent/run/run_service.h"
#include "agent/run/sidecar.h"
#include "base/status_macros.h"
#include "checkpoint/shared_mapping.h"

namespace holdfast {

absl::StatusOr<std::string> LocalServer::BeginRun(ConnectionId id, const Packet& packet) {
  Connection& connection = *Find(id);
  if (options_.run_service == nullptr) {
    return absl::UnimplementedError("this agent runs no jobs");
  }
  if (connection.stream != nullptr) {
    return absl::FailedPreconditionError("this connection follows something already");
  }
  if (!open_refusal_.ok()) return open_refusal_;
  ASSIGN_OR_RETURN(const abi::RunRequest request, BodyAs<abi::RunRequest>(packet, 1));
  ASSIGN_OR_RETURN(
      const std::string bytes,
      ReadSealedMemory("run", packet.fds[0].get(), request.spec_bytes, Fields::kBytesMax));
  RunService::Owner owner{connection.peer.process_id, Duplicate(connection.peer.pidfd.get())};
  ASSIGN_OR_RETURN(RunService::Begun begun,
                   options_.run_service->Begin(bytes, std::move(owner),
                                               [this, alive = std::weak_ptr<bool>(alive_), id] {
                                                 if (!alive.expired()) SendWaiting(id);
                                               }));
  connection.stream = std::move(begun.stream);
  return std::move(begun.state);
}

void LocalServer::HandleRun(ConnectionId id, const Packet& packet) {
  const absl::StatusOr<std::string> state = BeginRun(id, packet);
  if (!state.ok()) return AnswerError(id, packet.type, packet.request_id, state.status());
  AnswerText(id, packet.type, packet.request_id, *state);
}

void LocalServer::HandleRunCommand(ConnectionId id, const Packet& packet) {
  const auto answer = [&]() -> absl::StatusOr<std::string> {
    if (options_.run_service == nullptr) {
      return absl::UnimplementedError("this agent runs no jobs");
    }
    ASSIGN_OR_RETURN(const abi::RunCommand command, BodyAs<abi::RunCommand>(packet, 0));
    ASSIGN_OR_RETURN(const std::string job, TextField("job", command.job));
    ASSIGN_OR_RETURN(const std::string text, TextField("text", command.text));
    absl::StatusOr<std::string> state =
        options_.run_service->Command(command.kind, job, command.number, text);
    if (!absl::IsNotFound(state.status()) || options_.sidecar == nullptr) return state;
    const Attempt of{static_cast<uint32_t>(std::min<uint64_t>(command.number, UINT32_MAX))};
    absl::StatusOr<std::string> watched = options_.sidecar->WhyJson(job, of);
    if (absl::IsNotFound(watched.status())) return state;
    if (!watched.ok() || command.kind == abi::RunCommandKind::kView) return watched;
    return absl::FailedPreconditionError(
        absl::StrFormat("%s was started by another launcher, which alone starts and stops it",
                        job.empty() ? "the job" : absl::StrCat("job ", job)));
  }();
  if (!answer.ok()) return AnswerError(id, packet.type, packet.request_id, answer.status());
  AnswerText(id, packet.type, packet.request_id, *answer);
}

}  // namespace holdfast
