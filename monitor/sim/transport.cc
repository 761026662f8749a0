// Operations, GPUs, proxy threads and the wire: the causes from which all wait states follow.
#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "monitor/sim/engine.h"

namespace holdfast::monitor::sim {
namespace {

constexpr Nanos kGpuAction = 20'000;      // copy or reduce of a chunk
constexpr double kLatencyBytes = 20'000;  // what 10 us of latency are worth at 2 GB/s
constexpr uint64_t kLoops = 2;            // a large operation goes around that often
constexpr uint64_t kPairSteps = 4;

uint64_t TagOf(OperationKind kind, uint64_t bytes) {
  return bytes * 16 + static_cast<uint64_t>(kind);
}

}  // namespace

void World::Impl::OpenEnd(EndView& end, uint64_t operation, uint64_t steps, uint64_t tag,
                          uint32_t unit) {
  end.operation = operation;
  end.base = end.total;
  end.total += steps;
  end.tag = tag;
  end.unit = unit;
}

// Counts a collective as begun.
void World::Impl::Enqueue(Membership& m, OperationKind kind, uint64_t bytes) {
  OperationCounts& counts = m.counts[static_cast<size_t>(kind)];
  ++counts.enqueued;
  ++counts.started;
  ++m.collectives;
  m.newest.push_back({kind, bytes, kind == OperationKind::kBroadcast ? m.index : kNoRoot});
  if (m.newest.size() > kOperationsMax) m.newest.pop_front();
  m.changed = now_;
}

// Enqueues the operation that `rank` is at, and starts it.
void World::Impl::Open(uint32_t rank) {
  RankState& state = ranks[rank];
  const Instruction& op = state.now;
  Membership& m = MembershipOf(rank, op.communicator);
  const Communicator& c = communicators_[op.communicator];
  state.in_operation = true;
  state.opened = now_;
  ++state.operation_number;
  state.units.clear();
  state.sends.clear();
  const uint64_t tag = TagOf(op.operation, op.bytes);
  if (IsPointToPoint(op.operation)) {
    for (const auto& [peer, direction] : op.peers) {
      const OperationKind kind =
          direction == Direction::kSend ? OperationKind::kSend : OperationKind::kReceive;
      OperationCounts& counts = m.counts[static_cast<size_t>(kind)];
      ++counts.enqueued;
      ++counts.started;
      m.last_kind = kind;
    }
    OpenPairs(rank, m, tag);
  } else {
    Enqueue(m, op.operation, op.bytes);
    m.last_kind = op.operation;
    const uint64_t members = c.ranks.size();
    if (op.operation == OperationKind::kAllToAll) {
      OpenPairs(rank, m, tag);
    } else {
      const uint64_t rounds = op.operation == OperationKind::kAllReduce ? 2 : 1;
      const uint64_t steps = rounds * (members - 1);
      const double chunk =
          static_cast<double>(op.bytes) / static_cast<double>(members * 2 * kLoops);
      OpenRing(rank, m, steps, kLoops, tag, chunk);
    }
  }
  m.last_bytes = op.bytes;
  m.changed = now_;
  for (uint32_t unit = 0; unit < state.units.size(); ++unit) Kick(rank, unit);
  for (const uint32_t id : c.connections[m.index]) {
    Connection& connection = connections_[id];
    // The proxy begins: it gives credit for what comes in, and looks for credit for what goes out.
    ProxyAct(id, connection.to == rank);
    Show(id);
  }
  CloseIfDone(rank);
}

void World::Impl::OpenRing(uint32_t rank, Membership& m, uint64_t steps, uint64_t loops,
                           uint64_t tag, double step_bytes) {
  RankState& state = ranks[rank];
  std::map<uint32_t, Unit> by_channel;
  for (const uint32_t id : communicators_[m.communicator].connections[m.index]) {
    Unit& unit = by_channel[connections_[id].channel];
    (connections_[id].from == rank ? unit.send : unit.receive) = id;
  }
  for (auto& [channel, unit] : by_channel) {
    const auto number = static_cast<uint32_t>(state.units.size());
    unit.per_loop = steps + 1;
    unit.actions = unit.per_loop * loops;
    Connection& out = connections_[unit.send];
    out.step_bytes = step_bytes;
    OpenEnd(out.sender, m.collectives, steps * loops, tag, number);
    OpenEnd(connections_[unit.receive].receiver, m.collectives, steps * loops, tag, number);
    state.sends.push_back(unit.send);
    state.units.push_back(unit);
  }
}

// All-to-all with everybody, or point to point with the peers of the instruction.
void World::Impl::OpenPairs(uint32_t rank, Membership& m, uint64_t tag) {
  RankState& state = ranks[rank];
  const Instruction& op = state.now;
  const Communicator& c = communicators_[m.communicator];
  const bool all = op.operation == OperationKind::kAllToAll;
  for (const uint32_t id : c.connections[m.index]) {
    Connection& connection = connections_[id];
    const Direction direction = connection.from == rank ? Direction::kSend : Direction::kReceive;
    const uint32_t peer =
        direction == Direction::kSend ? connection.to_index : connection.from_index;
    const bool asked = all || std::find(op.peers.begin(), op.peers.end(),
                                        std::pair(peer, direction)) != op.peers.end();
    if (!asked) continue;
    const auto number = static_cast<uint32_t>(state.units.size());
    Unit unit;
    unit.actions = kPairSteps;
    EndView& end = direction == Direction::kSend ? connection.sender : connection.receiver;
    OpenEnd(end, all ? m.collectives : end.operation + 1, kPairSteps, tag, number);
    if (direction == Direction::kSend) {
      unit.send = id;
      const double parts = all ? static_cast<double>(c.ranks.size()) : 1;
      connection.step_bytes = static_cast<double>(op.bytes) / parts / kPairSteps;
      state.sends.push_back(id);
    } else {
      unit.receive = id;
    }
    state.units.push_back(unit);
  }
}

void World::Impl::Kick(uint32_t rank, uint32_t index) {
  RankState& state = ranks[rank];
  if (index >= state.units.size()) return;
  Unit& unit = state.units[index];
  if (unit.working || unit.done == unit.actions || state.hung || state.exit != ExitKind::kNone)
    return;
  const uint64_t place = unit.done % unit.per_loop;
  const bool receives = unit.receive != kNone && (unit.send == kNone || place > 0);
  const bool sends = unit.send != kNone && (unit.receive == kNone || place + 1 < unit.per_loop);
  if (receives && connections_[unit.receive].arrived == connections_[unit.receive].consumed) return;
  if (sends && connections_[unit.send].produced - connections_[unit.send].sent >= kCredits) return;
  unit.working = true;
  Push(now_ + kGpuAction, Event::Kind::kUnit, rank, index, state.operation_number);
}

void World::Impl::FinishAction(uint32_t rank, uint32_t index) {
  RankState& state = ranks[rank];
  Unit& unit = state.units[index];
  unit.working = false;
  if (state.hung || state.exit != ExitKind::kNone) return;
  const uint64_t place = unit.done % unit.per_loop;
  const bool receives = unit.receive != kNone && (unit.send == kNone || place > 0);
  const bool sends = unit.send != kNone && (unit.receive == kNone || place + 1 < unit.per_loop);
  ++unit.done;
  if (receives) {
    ++connections_[unit.receive].consumed;
    ProxyAct(unit.receive, true);  // one more credit to give
    Show(unit.receive);
  }
  if (sends) {
    ++connections_[unit.send].produced;
    ProxyAct(unit.send, false);
    Show(unit.send);
  }
  Kick(rank, index);
  CloseIfDone(rank);
}

void World::Impl::CloseIfDone(uint32_t rank) {
  RankState& state = ranks[rank];
  if (!state.in_operation) return;
  for (const Unit& unit : state.units) {
    if (unit.done < unit.actions) return;
  }
  for (const uint32_t id : state.sends) {
    if (connections_[id].sent < connections_[id].sender.total) return;
  }
  state.in_operation = false;
  state.operation_time += now_ - state.opened;
  Membership& m = MembershipOf(rank, state.now.communicator);
  m.changed = now_;
  if (IsPointToPoint(state.now.operation)) {
    for (const auto& [peer, direction] : state.now.peers) {
      ++m.counts[static_cast<size_t>(direction == Direction::kSend ? OperationKind::kSend
                                                                   : OperationKind::kReceive)]
            .finished;
    }
  } else {
    ++m.counts[static_cast<size_t>(state.now.operation)].finished;
  }
  for (const uint32_t id : communicators_[m.communicator].connections[m.index]) Show(id);
  Push(now_, Event::Kind::kProgram, rank);
}

// Lets the proxy thread of one end act: at once, late, or when it can run again.
void World::Impl::ProxyAct(uint32_t id, bool receiving) {
  const Connection& c = connections_[id];
  RankState& state = ranks[receiving ? c.to : c.from];
  if (state.exit != ExitKind::kNone) return;
  if (state.frozen || (state.starved && state.proxy_delay == 0)) {
    state.stuck.emplace_back(id, receiving);
  } else if (state.starved) {
    Push(now_ + state.proxy_delay, Event::Kind::kProxy, id, receiving ? 1 : 0);
  } else {
    ProxyDo(id, receiving);
  }
}

void World::Impl::ProxyDo(uint32_t id, bool receiving) {
  Connection& c = connections_[id];
  if (receiving) {
    c.receiver.bytes += static_cast<uint64_t>(c.step_bytes) * (c.passed - c.arrived);
    c.arrived = c.passed;
    // Credit: in this operation, for as many steps as there are free slots.
    c.credit = std::min(c.receiver.total, c.consumed + kCredits);
    c.credit_operation = c.receiver.operation;
    c.credit_tag = c.receiver.tag;
    if (c.receiver.unit != kNone && c.consumed < c.receiver.total) Kick(c.to, c.receiver.unit);
    ProxyAct(id, false);
  } else {
    c.sender.bytes += static_cast<uint64_t>(c.step_bytes) * (c.passed - c.sent);
    c.sent = c.passed;
    const bool together = c.sender.operation == c.credit_operation && c.sender.tag == c.credit_tag;
    const uint64_t credit = together ? c.credit : c.posted;
    c.posted = std::max(c.posted, std::min(c.produced, credit));
    if (c.posted > c.passed && !c.flowing) StartFlow(id);
    if (c.sender.unit != kNone) Kick(c.from, c.sender.unit);
    CloseIfDone(c.from);
  }
  Show(id);
}

void World::Impl::ShowEnd(EndView& end, WaitState state) {
  if (end.state == state) return;
  const bool wire = end.state == WaitState::kSendWait || end.state == WaitState::kReceiveWait;
  if (wire) end.wire_wait += now_ - end.since;
  end.state = state;
  end.since = now_;
}

// The board is written by the proxy threads: a board of one that does not run stays as it was.
void World::Impl::Show(uint32_t id) {
  Connection& c = connections_[id];
  const auto writes = [&](uint32_t rank) {
    const RankState& state = ranks[rank];
    return !state.frozen && state.exit == ExitKind::kNone &&
           !(state.starved && state.proxy_delay == 0);
  };
  if (writes(c.from)) {
    WaitState state = WaitState::kSendGpuWait;
    if (c.sent == c.sender.total) {
      state = WaitState::kNone;
    } else if (c.posted > c.sent) {
      state = WaitState::kSendWait;
    } else if (c.produced > c.posted) {
      state = WaitState::kSendPeerWait;
    }
    ShowEnd(c.sender, state);
  }
  if (writes(c.to)) {
    WaitState state = WaitState::kReceiveWait;
    if (c.consumed == c.receiver.total) {
      state = WaitState::kNone;
    } else if (c.arrived > c.consumed) {
      state = WaitState::kReceiveGpuWait;
    }
    ShowEnd(c.receiver, state);
  }
}

void World::Impl::StartFlow(uint32_t id) {
  Connection& c = connections_[id];
  c.flowing = true;
  c.left_bytes = c.step_bytes + kLatencyBytes;
  c.rate = 0;
  c.updated = now_;
  leaving_[c.from].push_back(id);
  entering_[c.to].push_back(id);
  Reshare(c.from, c.to);
}

void World::Impl::FinishFlow(uint32_t id) {
  Connection& c = connections_[id];
  c.flowing = false;
  std::erase(leaving_[c.from], id);
  std::erase(entering_[c.to], id);
  ++c.passed;
  if (c.posted > c.passed) {
    StartFlow(id);
  } else {
    Reshare(c.from, c.to);
  }
  ProxyAct(id, true);
  ProxyAct(id, false);
}

void World::Impl::Reshare(uint32_t from, uint32_t to) {
  for (const uint32_t id : leaving_[from]) SetRate(id);
  for (const uint32_t id : entering_[to]) {
    if (connections_[id].from != from) SetRate(id);
  }
}

void World::Impl::SetRate(uint32_t id) {
  Connection& c = connections_[id];
  const auto pair = link_factor_.find({c.from, c.to});
  const auto same = std::count_if(leaving_[c.from].begin(), leaving_[c.from].end(),
                                  [&](uint32_t other) { return connections_[other].to == c.to; });
  const double narrow = std::min(nic_[c.from], nic_[c.to]);
  const double link = pair == link_factor_.end() ? narrow : narrow * pair->second;
  const double rate =
      std::min({nic_[c.from] * send_factor_[c.from] / static_cast<double>(leaving_[c.from].size()),
                nic_[c.to] * receive_factor_[c.to] / static_cast<double>(entering_[c.to].size()),
                link / static_cast<double>(same)});
  if (rate == c.rate) return;
  c.left_bytes = std::max(0.0, c.left_bytes - c.rate * static_cast<double>(now_ - c.updated));
  c.updated = now_;
  c.rate = rate;
  ++c.generation;
  if (rate <= 0) return;  // cut: nothing will pass
  Push(now_ + static_cast<Nanos>(std::ceil(c.left_bytes / rate)), Event::Kind::kFlow, id, 0,
       c.generation);
}

}  // namespace holdfast::monitor::sim
