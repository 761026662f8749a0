// The machine of the simulation: ranks, connections, flows and the queue of events. Private to
// sim/.
#ifndef HOLDFAST_MONITOR_SIM_ENGINE_H_
#define HOLDFAST_MONITOR_SIM_ENGINE_H_

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <queue>
#include <random>
#include <utility>
#include <vector>

#include "monitor/sim/world.h"
#include "monitor/summary.h"

namespace holdfast::monitor::sim {

using Nanos = int64_t;
inline constexpr Nanos kNever = INT64_MAX;
inline constexpr uint32_t kNone = UINT32_MAX;
inline constexpr uint64_t kCredits = 8;

// One end's view of the connection, as the board would show it.
struct EndView {
  WaitState state = WaitState::kNone;
  Nanos since = 0;
  Nanos wire_wait = 0;  // without the present state
  uint64_t operation = 0;
  uint64_t base = 0;   // steps of earlier operations
  uint64_t total = 0;  // steps of all operations begun
  uint64_t tag = 0;    // of the operation: kind and size
  uint64_t bytes = 0;
  uint32_t unit = kNone;  // of the rank's GPU that works on it
};

struct Connection {
  uint32_t communicator = 0;
  uint32_t channel = 0;
  uint32_t from = 0, to = 0;  // ranks
  uint32_t from_index = 0, to_index = 0;
  bool shown = true;  // false inside a node
  EndView sender, receiver;
  // Steps ever: made by the GPU, posted, off the wire, seen sent, seen arrived, consumed.
  uint64_t produced = 0, posted = 0, passed = 0, sent = 0, arrived = 0, consumed = 0;
  // Credit as the receiver's proxy gave it last: steps in all, and for which operation.
  uint64_t credit = 0, credit_operation = 0, credit_tag = 0;
  double step_bytes = 0;
  bool flowing = false;
  double left_bytes = 0;
  double rate = 0;  // bytes per nanosecond
  Nanos updated = 0;
  uint32_t generation = 0;
};

// What a GPU does on one ring channel (receives and sends in turn) or one connection.
struct Unit {
  uint32_t receive = kNone, send = kNone;  // connections
  uint64_t actions = 0, done = 0;
  uint64_t per_loop = 1;  // ring: action 0 of a loop only sends, the last only receives
  bool working = false;
};

struct Instruction {
  enum class Kind : uint8_t { kCompute, kPause, kOperation };
  Kind kind{};
  Nanos duration = 0;
  SectionKind section{};
  uint32_t communicator = 0;
  OperationKind operation{};
  uint64_t bytes = 0;
  std::vector<std::pair<uint32_t, Direction>> peers;  // of point to point
};

struct Communicator {
  uint64_t id = 0;
  std::vector<uint32_t> ranks;
  // By member: its connections, in a fixed order.
  std::vector<std::vector<uint32_t>> connections;
};

struct Membership {
  uint32_t communicator = 0;
  uint32_t index = 0;
  std::array<OperationCounts, kOperationKinds> counts{};
  OperationKind last_kind{};
  uint64_t last_bytes = 0;
  uint64_t collectives = 0;
  std::deque<RecentOperation> newest;  // collectives, at most kOperationsMax
  Nanos changed = 0;                   // when one was last enqueued or finished
};

struct RankState {
  std::deque<Instruction> program;
  Instruction now;
  uint64_t iteration = 0;
  bool in_operation = false;
  Nanos opened = 0;
  Nanos operation_time = 0;
  uint32_t operation_number = 0;  // guards events of old operations
  std::vector<Unit> units;
  std::vector<Membership> memberships;
  std::vector<uint32_t> sends;  // connections of the open operation
  // Process.
  bool frozen = false;  // stopped, or its node is dead
  bool parked = false;  // wanted to go on while frozen
  bool hung = false;    // its GPU
  bool starved = false;
  Nanos proxy_delay = 0;
  bool asleep = false, looping = false;
  std::vector<bool> pauses_taken;  // by fault
  ExitKind exit = ExitKind::kNone;
  ProcessState process = ProcessState::kRunning;
  Nanos cpu = 0, run_delay = 0, loading = 0, held = 0, accounted = 0;
  Nanos section_since = 0;
  std::vector<std::pair<uint32_t, bool>> stuck;  // proxy actions: connection, at its receiving end
};

struct Event {
  enum class Kind : uint8_t { kProgram, kUnit, kFlow, kProxy, kFault, kExit };
  Nanos at = 0;
  uint64_t order = 0;
  Kind kind{};
  uint32_t a = 0, b = 0, generation = 0;
  bool operator>(const Event& other) const {
    return at != other.at ? at > other.at : order > other.order;
  }
};

class World::Impl {
 public:
  explicit Impl(WorldOptions options);

  JobShape Shape() const;
  Snapshot Tick();

  const WorldOptions options;
  uint64_t event_count = 0;
  std::vector<RankState> ranks;
  std::vector<bool> happened;  // by fault

 private:
  struct Outgoing {
    Nanos at = 0;
    NodeSummary summary;
  };
  struct Agent {
    double rate = 1;  // of its clock
    Nanos offset = 0;
    uint64_t sequence = 0;
    Nanos late_since = kNever;
    bool dead = false;
    Nanos paused_until = 0;  // and told for a second more
  };

  // job.cc: the programs.
  void MakeCommunicators();
  enum class Wiring : uint8_t { kRing, kTwoRings, kAll, kLine };
  uint32_t AddCommunicator(const std::vector<uint32_t>& members, Wiring wiring);
  void AddConnection(uint32_t communicator, uint32_t channel, uint32_t from, uint32_t to);
  void Advance(uint32_t rank);
  void Execute(uint32_t rank);
  void WriteIteration(uint32_t rank);
  void WritePipeline(uint32_t rank, Nanos compute);
  void WritePauses(uint32_t rank);
  bool Distort(uint32_t rank);
  Nanos ComputeTime(uint32_t rank);
  Membership& MembershipOf(uint32_t rank, uint32_t communicator);

  // transport.cc: operations, GPUs, proxies, wire.
  void Open(uint32_t rank);
  void Enqueue(Membership& m, OperationKind kind, uint64_t bytes);
  void OpenEnd(EndView& end, uint64_t operation, uint64_t steps, uint64_t tag, uint32_t unit);
  void OpenRing(uint32_t rank, Membership& m, uint64_t steps, uint64_t loops, uint64_t tag,
                double step_bytes);
  void OpenPairs(uint32_t rank, Membership& m, uint64_t tag);
  void Kick(uint32_t rank, uint32_t unit);
  void FinishAction(uint32_t rank, uint32_t unit);
  void CloseIfDone(uint32_t rank);
  void ProxyAct(uint32_t connection, bool receiving);
  void ProxyDo(uint32_t connection, bool receiving);
  void Show(uint32_t connection);
  void ShowEnd(EndView& end, WaitState state);
  void StartFlow(uint32_t connection);
  void FinishFlow(uint32_t connection);
  void Reshare(uint32_t from, uint32_t to);
  void SetRate(uint32_t connection);

  // faults.cc.
  void ApplyFault(uint32_t index, bool on);
  void RenewAll();
  void Account(uint32_t rank);
  const Fault* Active(FaultKind kind, uint32_t rank) const;
  bool IsOn(uint32_t fault) const { return on_[fault]; }

  // emission.cc: what the agents say.
  NodeSummary Summarize(uint32_t node);
  RankReport ReportRank(uint32_t rank, const Agent& agent);
  CommunicatorReport ReportCommunicator(uint32_t rank, const Membership& m, const Agent& agent);
  uint64_t Micros(Nanos span, const Agent& agent) const;
  void Emit();

  void Push(Nanos at, Event::Kind kind, uint32_t a, uint32_t b = 0, uint32_t generation = 0);
  void Handle(const Event& event);
  double Uniform(double low, double high);
  uint32_t NodeOf(uint32_t rank) const { return rank / options.ranks_per_node; }

  Nanos now_ = 0;
  uint64_t order_ = 0;
  std::mt19937_64 random_;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> queue_;
  std::vector<Communicator> communicators_;
  std::vector<Connection> connections_;
  std::vector<std::vector<uint32_t>> leaving_, entering_;  // connections that flow, by rank
  std::vector<double> send_factor_, receive_factor_, nic_;
  std::map<std::pair<uint32_t, uint32_t>, double> link_factor_;
  std::vector<bool> on_;  // by fault
  std::vector<Agent> agents_;
  std::vector<Outgoing> under_way_;
  Nanos last_tick_ = 0;
  uint32_t world_ = kNone;                                            // communicators
  std::vector<uint32_t> data_group_, tensor_group_, pipeline_group_;  // by rank
  bool joined_ = true;
};

}  // namespace holdfast::monitor::sim

#endif  // HOLDFAST_MONITOR_SIM_ENGINE_H_
