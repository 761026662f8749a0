// LocalServer: what concerns other witnesses. Processes wait to be asked (kWitness), and a client
// may have all witnesses asked now (QueryKind::kWitnesses).
#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_format.h"
#include "agent/local_server.h"
#include "agent/monitor/node_aggregator.h"
#include "base/status_macros.h"

namespace holdfast {
namespace {

absl::StatusOr<WaitingProcesses::Process> ToProcess(const abi::WitnessWait& wait,
                                                    uint32_t process_id) {
  WaitingProcesses::Process process;
  ASSIGN_OR_RETURN(const std::string job, TextField("job", wait.job));
  ASSIGN_OR_RETURN(const std::string attempt_key, TextField("attempt_key", wait.attempt_key));
  process.job = NodeAggregator::JobNamed(job);
  process.attempt_key = NodeAggregator::KeyNamed(attempt_key);
  if (wait.rank >= RankExit::kRanksMax || wait.world_size > RankExit::kRanksMax) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "witness: expected a rank below %d and a world size up to it, found %d and %d",
        RankExit::kRanksMax, wait.rank, wait.world_size));
  }
  process.rank = wait.rank;
  process.world_size = wait.world_size;
  process.process_id = process_id;
  return process;
}

}  // namespace

size_t LocalServer::waiting_count() const {
  return static_cast<size_t>(std::count_if(connections_.begin(), connections_.end(),
                                           [](const auto& one) { return one.second->waits; }));
}

// It is answered when the agent asks something, if ever. Nothing is pending meanwhile: the next
// message of the process is its answer, with its next wait.
void LocalServer::HandleWitness(ConnectionId id, Packet packet) {
  Connection& connection = *Find(id);
  const uint32_t request_id = packet.request_id;
  const auto arrive = [&]() -> absl::Status {
    if (options_.waiting_processes == nullptr) {
      return absl::UnimplementedError("this agent asks no processes");
    }
    ASSIGN_OR_RETURN(const abi::WitnessWait wait,
                     BodyAs<abi::WitnessWait>(packet, packet.fds.size()));
    ASSIGN_OR_RETURN(WaitingProcesses::Process process,
                     ToProcess(wait, connection.peer.process_id));
    return options_.waiting_processes->Arrive(
        id, std::move(process), wait, std::move(packet.fds),
        [this, alive = std::weak_ptr<bool>(alive_), id, request_id](const abi::WitnessAsk& ask) {
          if (!alive.expired()) Answer(id, request_id, abi::MessageType::kWitnessReply, ask, {});
        });
  };
  if (absl::Status arrived = arrive(); !arrived.ok()) {
    AnswerError(id, abi::MessageType::kWitness, request_id, arrived);
    return;
  }
  connection.waits = true;
}

void LocalServer::HandleWitnessQuery(ConnectionId id, uint32_t request_id) {
  if (options_.ask_witnesses == nullptr) {
    AnswerError(id, abi::MessageType::kQuery, request_id,
                absl::UnimplementedError("this agent asks no witnesses"));
    return;
  }
  Find(id)->busy = true;
  UpdateWatch(id);
  options_.ask_witnesses(
      [this, alive = std::weak_ptr<bool>(alive_), id, request_id](const std::string& text) {
        if (!alive.expired()) AnswerText(id, abi::MessageType::kQuery, request_id, text);
      });
}

}  // namespace holdfast
