// LocalServer: what concerns the monitor. Boards come in (kMonitor), windows are opened on them
// (kMonitorWindow), questions are answered (kMonitorQuery), and who follows or records gets what
// happens, as fast as it reads. Launchers say how ranks ended (kRankExit).
#include <sys/wait.h>

#include <utility>

#include "absl/strings/str_format.h"
#include "agent/local_server.h"
#include "agent/process.h"
#include "base/status_macros.h"

namespace holdfast {
namespace {

absl::StatusOr<RankExit> ToRankExit(const abi::RankExit& message) {
  RankExit exit;
  ASSIGN_OR_RETURN(exit.job, TextField("job", message.job));
  ASSIGN_OR_RETURN(exit.attempt_key, TextField("attempt_key", message.attempt_key));
  ASSIGN_OR_RETURN(exit.node, TextField("node", message.node));
  if (message.rank >= RankExit::kRanksMax || message.world_size > RankExit::kRanksMax) {
    return absl::InvalidArgumentError(
        absl::StrFormat("rank exit: expected a rank below %d and a world size up to it, found %d "
                        "and %d",
                        RankExit::kRanksMax, message.rank, message.world_size));
  }
  if (!WIFEXITED(message.wait_status) && !WIFSIGNALED(message.wait_status)) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "rank exit: expected the wait status of a process that has ended, found %#x",
        message.wait_status));
  }
  if (message.was_stopped > 1) {
    return absl::InvalidArgumentError(
        absl::StrFormat("rank exit: was_stopped: expected 0 or 1, found %d", message.was_stopped));
  }
  exit.rank = message.rank;
  exit.world_size = message.world_size;
  exit.process_id = message.process_id;
  exit.wait_status = message.wait_status;
  exit.stopped = message.was_stopped == 1;
  return exit;
}

}  // namespace

absl::Status LocalServer::AdoptBoard(const Connection& connection, Packet& packet) const {
  if (options_.monitor_boards == nullptr) {
    return absl::UnimplementedError("this agent keeps no monitor boards");
  }
  ASSIGN_OR_RETURN(const abi::MonitorOffer offer, BodyAs<abi::MonitorOffer>(packet, 1));
  MonitorBoards::Offer adopted;
  ASSIGN_OR_RETURN(adopted.job, TextField("job", offer.job));
  ASSIGN_OR_RETURN(adopted.attempt_key, TextField("attempt_key", offer.attempt_key));
  ASSIGN_OR_RETURN(adopted.node, TextField("node", offer.node));
  adopted.rank = offer.rank;
  adopted.process_id = connection.peer.process_id;
  adopted.board_bytes = offer.board_bytes;
  adopted.board = std::move(packet.fds[0]);
  adopted.process = Duplicate(connection.peer.pidfd.get());
  return options_.monitor_boards->Adopt(std::move(adopted));
}

void LocalServer::HandleMonitor(ConnectionId id, Packet packet) {
  Connection& connection = *Find(id);
  const absl::Status adopted = AdoptBoard(connection, packet);
  if (!adopted.ok()) {
    AnswerError(id, packet.type, packet.request_id, adopted);
    return;
  }
  Answer(id, packet.request_id, abi::MessageType::kMonitorReply, abi::MonitorReply{}, {});
}

absl::Status LocalServer::OpenWindow(ConnectionId id, const Packet& packet) {
  if (options_.monitor_boards == nullptr) {
    return absl::UnimplementedError("this agent keeps no monitor boards");
  }
  ASSIGN_OR_RETURN(const abi::MonitorWindowRequest request,
                   BodyAs<abi::MonitorWindowRequest>(packet, 0));
  ASSIGN_OR_RETURN(const std::string job, TextField("job", request.job));
  // Who asked may be gone by then: the answer is dropped.
  return options_.monitor_boards->Window(
      job, request.rank, absl::Milliseconds(request.milliseconds),
      [this, id, request_id = packet.request_id](const std::string& lines) {
        AnswerText(id, abi::MessageType::kMonitorWindow, request_id, lines);
      });
}

void LocalServer::HandleMonitorWindow(ConnectionId id, const Packet& packet) {
  const absl::Status opened = OpenWindow(id, packet);
  if (!opened.ok()) return AnswerError(id, packet.type, packet.request_id, opened);
  Find(id)->busy = true;
}

void LocalServer::HandleMonitorQuery(ConnectionId id, Packet packet) {
  const uint32_t request_id = packet.request_id;
  const auto refuse = [&](const absl::Status& why) {
    AnswerError(id, abi::MessageType::kMonitorQuery, request_id, why);
  };
  if (options_.monitor_service == nullptr) {
    return refuse(absl::UnimplementedError("this agent does not analyse"));
  }
  const absl::StatusOr<abi::MonitorQuery> query = BodyAs<abi::MonitorQuery>(packet, 0);
  if (!query.ok()) return refuse(query.status());
  const absl::StatusOr<std::string> job = TextField("job", query->job);
  const absl::StatusOr<std::string> finding = TextField("finding", query->finding);
  if (!job.ok()) return refuse(job.status());
  if (!finding.ok()) return refuse(finding.status());
  const abi::MonitorQueryKind kind = query->kind;
  if (kind == abi::MonitorQueryKind::kFollow || kind == abi::MonitorQueryKind::kRecord) {
    return Subscribe(id, request_id, kind, *job);
  }
  Connection& connection = *Find(id);
  connection.busy = true;
  UpdateWatch(id);
  options_.monitor_service->Ask(
      {kind, *job, *finding, query->communicator}, [this, alive = std::weak_ptr<bool>(alive_), id,
                                                    request_id](absl::StatusOr<std::string> text) {
        if (alive.expired()) return;
        if (!text.ok()) {
          return AnswerError(id, abi::MessageType::kMonitorQuery, request_id, text.status());
        }
        AnswerText(id, abi::MessageType::kMonitorQuery, request_id, *text);
      });
}

// First what is there, then what changes: both are of one moment.
void LocalServer::Subscribe(ConnectionId id, uint32_t request_id, abi::MonitorQueryKind kind,
                            const std::string& job) {
  Connection& connection = *Find(id);
  if (connection.stream != nullptr) {
    return AnswerError(id, abi::MessageType::kMonitorQuery, request_id,
                       absl::FailedPreconditionError("this connection follows or records already"));
  }
  const std::weak_ptr<bool> alive(alive_);
  absl::StatusOr<std::shared_ptr<MonitorStream>> stream =
      options_.monitor_service->Subscribe(kind, job, [this, alive, id] {
        // Not inside whatever has just happened to the findings.
        if (!alive.expired()) {
          loop_.Post([this, alive, id] {
            if (!alive.expired()) SendWaiting(id);
          });
        }
      });
  if (!stream.ok()) {
    return AnswerError(id, abi::MessageType::kMonitorQuery, request_id, stream.status());
  }
  connection.busy = true;
  UpdateWatch(id);
  options_.monitor_service->Ask({kind, job, "", 0}, [this, alive, id, request_id, stream = *stream](
                                                        absl::StatusOr<std::string> text) {
    if (alive.expired()) return;
    if (!text.ok()) {
      return AnswerError(id, abi::MessageType::kMonitorQuery, request_id, text.status());
    }
    AnswerText(id, abi::MessageType::kMonitorQuery, request_id, *text);
    Connection* const answered = Find(id);
    if (answered == nullptr) return;
    answered->stream = stream;
    SendWaiting(id);
  });
}

// One at a time, when the one before is in the socket: what the client does not read waits in the
// stream, which is bounded.
void LocalServer::SendWaiting(ConnectionId id) {
  Connection* const connection = Find(id);
  if (connection == nullptr || connection->stream == nullptr || !connection->outgoing.empty()) {
    return;
  }
  std::optional<MonitorStream::Item> item = connection->stream->Take();
  if (!item.has_value()) return;
  absl::StatusOr<UniqueFd> memory = SealedMemfd("holdfast event", item->text);
  if (!memory.ok()) {
    // Without descriptors nothing can be told: the client sees its connection end, and knows.
    Close(id);
    return;
  }
  abi::MonitorEvent event{};
  event.text_bytes = item->text.size();
  event.lost = item->lost;
  std::vector<UniqueFd> fds;
  fds.push_back(*std::move(memory));
  Send(id, Packet{abi::MessageType::kMonitorEvent, 0, BodyBytes(event), std::move(fds)});
}

void LocalServer::HandleRankExit(ConnectionId id, const Packet& packet) {
  const absl::StatusOr<abi::RankExit> message = BodyAs<abi::RankExit>(packet, 0);
  absl::StatusOr<RankExit> exit =
      message.ok() ? ToRankExit(*message) : absl::StatusOr<RankExit>(message.status());
  if (exit.ok() && !options_.take_exit) {
    exit = absl::UnimplementedError("this agent runs no monitor");
  }
  if (!exit.ok()) {
    AnswerError(id, packet.type, packet.request_id, exit.status());
    return;
  }
  options_.take_exit(*std::move(exit));
  Answer(id, packet.request_id, abi::MessageType::kRankExitReply, abi::RankExitReply{}, {});
}

}  // namespace holdfast
