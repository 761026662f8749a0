// The agent's side of the local socket: accepts connections, checks who and what they are,
// translates requests to Engine calls and their results to replies. It has no memory of its own
// worth keeping: what must outlive the worker is the engine's.
//
// One request per connection is pending at most: the next is not read before the reply is sent.
// A connection's end is not a death: the trainer may be about to resume. Its pidfd is.
#ifndef HOLDFAST_AGENT_LOCAL_SERVER_H_
#define HOLDFAST_AGENT_LOCAL_SERVER_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "agent/monitor/boards.h"
#include "agent/monitor/exits.h"
#include "agent/monitor/service.h"
#include "agent/packet.h"
#include "agent/peer.h"
#include "agent/witness/waiting_processes.h"
#include "base/executor.h"
#include "checkpoint/engine.h"
#include "io/unique_fd.h"

namespace holdfast {

class RunService;
class Sidecar;

// Threads: the event loop's.
// Lifetime: engine, loop and listener outlive it; engine callbacks that come after it is gone are
//   dropped.
class LocalServer {
 public:
  struct Options {
    uint32_t user_id = 0;      // whose processes are served
    std::string root;          // EngineOptions::root
    uint64_t block_bytes = 0;  // EngineOptions::block_bytes
    // At the limit a connection is closed as soon as it is accepted. Sized from RLIMIT_NOFILE: see
    // ConnectionsFor.
    size_t connections_max = 1024 + 128;
    // At the limit kOpen is refused with kResourceExhausted. Sized from RLIMIT_NOFILE: see
    // SessionsFor.
    size_t sessions_max = 1024;
    // Where monitor boards go; outlives the server. Null: every kMonitor is kUnimplemented.
    MonitorBoards* monitor_boards = nullptr;
    // Who answers kMonitorQuery; outlives the server. Null: kUnimplemented.
    MonitorService* monitor_service = nullptr;
    // Who carries out kRun and kRunCommand; outlives the server. Null: kUnimplemented.
    RunService* run_service = nullptr;
    // Who knows what happened to jobs of other launchers; outlives the server. Null: nobody.
    const Sidecar* sidecar = nullptr;
    // Gets what launchers say of ended ranks. Empty: every kRankExit is kUnimplemented.
    std::function<void(RankExit)> take_exit = nullptr;
    // Processes that wait to be asked; outlives the server. Null: every kWitness is kUnimplemented.
    WaitingProcesses* waiting_processes = nullptr;
    // Asks all witnesses now, for QueryKind::kWitnesses: gives the answer, JSON, when they have
    // spoken. Null: kUnimplemented.
    std::function<void(std::function<void(std::string)> done)> ask_witnesses = nullptr;
  };

  // How many sessions a process with this RLIMIT_NOFILE can hold, with all that belongs to them.
  static size_t SessionsFor(uint64_t open_files_max);
  // And how many connections: one of each session, and some of clients that only ask.
  static size_t ConnectionsFor(uint64_t open_files_max);

  // `listener`: a non-blocking listening SEQPACKET socket. `status_text`: the answer to kQuery.
  LocalServer(Options options, int listener, Engine& engine, EventLoop& loop,
              std::function<std::string()> status_text);
  ~LocalServer();
  LocalServer(const LocalServer&) = delete;
  LocalServer& operator=(const LocalServer&) = delete;

  // Watches the engine's recovered sessions and begins to accept. Once, when Recover is done.
  void Start();
  // From now on every kOpen is answered with kUnavailable and this reason.
  void RefuseOpens(std::string reason);

  size_t connection_count() const { return connections_.size(); }
  // Of those, processes that only wait to be asked: they need no agent.
  size_t waiting_count() const;
  // Connections ever served.
  uint64_t accepted_count() const { return next_connection_ - 1; }
  size_t session_count() const { return sessions_.size(); }
  // Times that no descriptor was left for a new connection, since the start. It waits in the
  // listener's queue; accepting pauses for kAcceptPause.
  uint64_t accept_failure_count() const { return accept_failure_count_; }
  // Messages that were none, since the start.
  uint64_t garbage_count() const { return garbage_count_; }

 private:
  using ConnectionId = uint64_t;

  struct Connection {
    UniqueFd socket;
    Peer peer;
    absl::Status refusal;      // not OK: every request is answered with it
    bool has_session = false;  // kOpen succeeded
    SessionId session{};
    bool busy = false;     // a request is pending: nothing is read
    bool waits = false;    // to be asked (kWitness): read on, so that its end is seen
    bool closing = false;  // to be closed when `outgoing` is sent
    std::deque<Packet> outgoing;
    std::shared_ptr<MonitorStream> stream;  // of a client that follows or records
    bool watched = false;
    EventLoop::FdEvents watched_events{};
  };

  // Own duplicates: the engine may close its descriptors at any time.
  struct SessionWatch {
    UniqueFd process;
    UniqueFd doorbell;            // none until a recovered session's trainer has resumed it
    ConnectionId connection = 0;  // 0: none now
  };

  void Accept();
  void PauseAccepting(int error);
  void ResumeAccepting();
  Connection* Find(ConnectionId id);
  void UpdateWatch(ConnectionId id);
  void OnReady(ConnectionId id);
  void ReadOne(ConnectionId id);
  void Close(ConnectionId id);

  void Handle(ConnectionId id, Packet packet);
  void HandleOpen(ConnectionId id, Packet packet);
  void HandleRegister(ConnectionId id, Packet packet);
  void HandleRestore(ConnectionId id, Packet packet);
  void HandleQuery(ConnectionId id, Packet packet);
  // With kQueryReply.
  void AnswerText(ConnectionId id, abi::MessageType request, uint32_t request_id,
                  const std::string& text);
  void HandleMonitor(ConnectionId id, Packet packet);
  void HandleMonitorWindow(ConnectionId id, const Packet& packet);
  absl::Status OpenWindow(ConnectionId id, const Packet& packet);
  void HandleMonitorQuery(ConnectionId id, Packet packet);
  void Subscribe(ConnectionId id, uint32_t request_id, abi::MonitorQueryKind kind,
                 const std::string& job);
  void SendWaiting(ConnectionId id);
  absl::Status AdoptBoard(const Connection& connection, Packet& packet) const;
  void HandleRun(ConnectionId id, const Packet& packet);
  absl::StatusOr<std::string> BeginRun(ConnectionId id, const Packet& packet);
  void HandleRunCommand(ConnectionId id, const Packet& packet);
  void HandleRankExit(ConnectionId id, const Packet& packet);
  void HandleWitness(ConnectionId id, Packet packet);
  void HandleWitnessQuery(ConnectionId id, uint32_t request_id);

  void OpenDone(ConnectionId id, uint32_t request_id, absl::StatusOr<OpenResult> result,
                UniqueFd doorbell);
  void RegisterDone(ConnectionId id, uint32_t request_id, absl::StatusOr<RegisterResult> result);
  void RestoreBegunDone(ConnectionId id, uint32_t request_id, absl::StatusOr<RestoreBegun> begun);
  void RestoreEndedDone(SessionId session, absl::StatusOr<RestoreEnded> ended);

  absl::StatusOr<OpenParameters> ToParameters(const Connection& connection,
                                              const abi::OpenRequest& request) const;
  absl::Status CheckRoot(std::string& root) const;

  // The pending request is answered: the next one is read.
  void AnswerPacket(ConnectionId id, Packet packet);
  template <typename Reply>
  void Answer(ConnectionId id, uint32_t request_id, abi::MessageType type, const Reply& reply,
              std::vector<UniqueFd> fds) {
    AnswerPacket(id, Packet{type, request_id, BodyBytes(reply), std::move(fds)});
  }
  void AnswerError(ConnectionId id, abi::MessageType request, uint32_t request_id,
                   const absl::Status& status);
  void Send(ConnectionId id, Packet packet);
  void Flush(ConnectionId id);

  void WatchSession(SessionId session, UniqueFd process, UniqueFd doorbell);
  void UnwatchSession(SessionId session);
  void OnDoorbell(SessionId session);
  void OnProcessDead(SessionId session);

  const Options options_;
  const int listener_;
  Engine& engine_;
  EventLoop& loop_;
  const std::function<std::string()> status_text_;
  bool started_ = false;
  EventLoop::TimerId resume_timer_ = 0;  // 0: none; else the listener is not watched
  bool accept_failed_ = false;           // and nothing was accepted since
  uint64_t accept_failure_count_ = 0;
  absl::Status open_refusal_;
  ConnectionId next_connection_ = 1;
  std::map<ConnectionId, std::unique_ptr<Connection>> connections_;
  std::map<SessionId, SessionWatch> sessions_;
  uint64_t garbage_count_ = 0;
  // Engine callbacks hold a weak reference: they may come after this object.
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_LOCAL_SERVER_H_
