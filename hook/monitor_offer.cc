#include "hook/monitor_offer.h"

#include <cstdio>
#include <cstdlib>

#include "hook/abi/messages.h"
#include "hook/settings.h"
#include "hook/socket.h"

namespace holdfast::hook {

std::string MonitorSocketPath() {
  const char* socket = getenv("HOLDFAST_SOCKET");
  if (socket != nullptr && *socket != '\0') return socket;
  const char* job = getenv("HOLDFAST_JOB");
  if (job == nullptr || *job == '\0') return std::string();
  return RuntimeDirectory() + "/" + JobDirectoryName(job) + "/agent.sock";
}

Error OfferMonitorBoard(const MonitorBoard& board, const std::string& socket_path,
                        Deadline deadline) {
  if (socket_path.empty()) {
    return Error(HF_NOT_FOUND, "neither $HOLDFAST_SOCKET nor $HOLDFAST_JOB is set");
  }
  Result<UniqueFd> socket = ConnectToAgent(socket_path, deadline);
  if (!socket.ok()) return socket.error();
  Channel channel(std::move(socket.value()));
  const abi::BoardHeader& header = board.header();
  abi::MonitorOffer offer = {};
  std::snprintf(offer.job, sizeof(offer.job), "%s", header.job);
  std::snprintf(offer.attempt_key, sizeof(offer.attempt_key), "%s", header.attempt_key);
  std::snprintf(offer.node, sizeof(offer.node), "%s", header.node);
  offer.rank = header.rank;
  offer.process_id = header.process_id;
  offer.board_bytes = abi::kBoardBytes;
  const int fds[] = {board.fd()};
  if (Error error = channel.Send(abi::MessageType::kMonitor, 1, BodyOf(offer), fds, deadline);
      !error.ok()) {
    return error;
  }
  Message reply;
  if (Error error = channel.Receive(&reply, -1, deadline); !error.ok()) return error;
  if (reply.header.type != abi::MessageType::kMonitorReply) {
    return Error(HF_INTERNAL, "offering the monitor board: expected a reply of type %u, found %u",
                 static_cast<unsigned>(abi::MessageType::kMonitorReply),
                 static_cast<unsigned>(reply.header.type));
  }
  abi::MonitorReply body = {};
  if (Error error = reply.Read(&body, 0, "kMonitorReply"); !error.ok()) return error;
  if (body.status.code == 0) return Error();
  body.status.text[sizeof(body.status.text) - 1] = '\0';
  return Error(static_cast<hf_code>(body.status.code), "%s", body.status.text);
}

}  // namespace holdfast::hook
