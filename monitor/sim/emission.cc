// What the agents say, in the fields that a board and /proc can fill, through the bytes of the
// wire.
#include <algorithm>
#include <cmath>
#include <span>
#include <utility>

#include "base/check.h"
#include "monitor/sim/engine.h"

namespace holdfast::monitor::sim {
namespace {

constexpr Nanos kSecond = 1'000'000'000;

}  // namespace

// A span as the node's own clock measures it.
uint64_t World::Impl::Micros(Nanos span, const Agent& agent) const {
  return static_cast<uint64_t>(static_cast<double>(span) * agent.rate / 1000);
}

CommunicatorReport World::Impl::ReportCommunicator(uint32_t rank, const Membership& m,
                                                   const Agent& agent) {
  const Communicator& c = communicators_[m.communicator];
  CommunicatorReport report;
  report.id = c.id;
  report.size = static_cast<uint32_t>(c.ranks.size());
  report.index = m.index;
  report.counts = m.counts;
  report.last_kind = m.last_kind;
  report.last_bytes = m.last_bytes;
  report.last_sequence = m.counts[static_cast<size_t>(m.last_kind)].enqueued;
  if (Micros(now_ - m.changed, agent) >= kOperationsToldAfterUs) {
    report.operations.assign(m.newest.begin(), m.newest.end());
  }
  const RankState& state = ranks[rank];
  if (state.in_operation && state.now.communicator == m.communicator) {
    report.open_us = Micros(now_ - state.opened, agent);
  }
  for (const uint32_t id : c.connections[m.index]) {
    const Connection& connection = connections_[id];
    if (!connection.shown) continue;
    const bool sends = connection.from == rank;
    const EndView& end = sends ? connection.sender : connection.receiver;
    ConnectionReport one;
    one.channel = static_cast<uint16_t>(connection.channel);
    one.peer = sends ? connection.to_index : connection.from_index;
    one.direction = sends ? Direction::kSend : Direction::kReceive;
    one.state = end.state;
    one.operation = end.operation;
    const uint64_t done = sends ? connection.sent : connection.consumed;
    one.steps_done = static_cast<uint32_t>(done - std::min(done, end.base));
    one.steps_total = static_cast<uint32_t>(end.total - end.base);
    one.waiting_us = Micros(now_ - end.since, agent);
    one.bytes = end.bytes;
    Nanos wire = end.wire_wait;
    if (end.state == WaitState::kSendWait || end.state == WaitState::kReceiveWait) {
      wire += now_ - end.since;
    }
    one.wire_wait_us = Micros(wire, agent);
    report.connections.push_back(one);
  }
  return report;
}

RankReport World::Impl::ReportRank(uint32_t rank, const Agent& agent) {
  Account(rank);
  const RankState& state = ranks[rank];
  RankReport report;
  report.rank = Rank{rank};
  report.local_rank = rank % options.ranks_per_node;
  report.process = state.process;
  if (state.process == ProcessState::kRunning &&
      (state.asleep || (!state.in_operation && state.now.section == SectionKind::kData))) {
    report.process = ProcessState::kSleeping;
  }
  report.exit = state.exit;
  report.exit_value = state.exit == ExitKind::kKilled ? 9 : state.exit == ExitKind::kError ? 1 : 0;
  report.cpu_us = Micros(state.cpu, agent);
  report.data_us = Micros(state.loading, agent);
  report.held_us = Micros(state.held, agent);
  report.run_delay_us = Micros(state.run_delay, agent);
  Nanos inside = state.operation_time;
  if (state.in_operation) inside += now_ - state.opened;
  report.operation_us = Micros(inside, agent);
  const bool blind =
      std::find(options.blind.begin(), options.blind.end(), rank) != options.blind.end();
  if (blind) return report;
  report.level = TelemetryLevel::kLight;
  if (!joined_) return report;
  if (!state.in_operation && state.now.section != SectionKind::kCompute) {
    constexpr const char* kNames[] = {"compute",    "data",    "checkpoint",
                                      "evaluation", "compile", "gc"};
    report.sections.push_back({state.now.section, Micros(now_ - state.section_since, agent),
                               kNames[static_cast<size_t>(state.now.section)]});
  }
  for (const Membership& m : state.memberships) {
    report.communicators.push_back(ReportCommunicator(rank, m, agent));
  }
  return report;
}

NodeSummary World::Impl::Summarize(uint32_t node) {
  Agent& agent = agents_[node];
  NodeSummary summary;
  summary.node = node;
  summary.attempt = Attempt{1};
  summary.incarnation = 1;
  summary.sequence = ++agent.sequence;
  summary.clock_us = Micros(now_, agent) + static_cast<uint64_t>(agent.offset / 1000);
  summary.engine_paused = now_ < agent.paused_until + kSecond;
  for (uint32_t r = 0; r < ranks.size(); ++r) {
    if (NodeOf(r) != node) continue;
    if (Active(FaultKind::kNeverJoins, r) != nullptr) continue;
    summary.ranks.push_back(ReportRank(r, agent));
  }
  return summary;
}

void World::Impl::Emit() {
  for (uint32_t node = 0; node < agents_.size(); ++node) {
    Agent& agent = agents_[node];
    if (agent.dead) continue;
    Nanos gap = 0;
    if (agent.late_since != kNever) {
      double seconds = 0;
      for (const Fault& fault : options.faults) {
        if (fault.kind == FaultKind::kLateObserver && NodeOf(fault.rank) == node) {
          seconds = fault.factor;
        }
      }
      if (now_ < agent.late_since + static_cast<Nanos>(seconds * 1e9)) continue;
      gap = now_ - std::exchange(agent.late_since, kNever);
    }
    NodeSummary summary = Summarize(node);
    summary.observer_gap_us = Micros(gap, agent);
    const bool lost = Uniform(0, 1) < options.loss;
    const bool late = Uniform(0, 1) < options.lateness;
    if (lost) continue;
    const Nanos delay = late ? kSecond * static_cast<Nanos>(1 + (random_() & 1)) : 0;
    under_way_.push_back({now_ + delay, std::move(summary)});
  }
}

Snapshot World::Impl::Tick() {
  last_tick_ += kSecond;
  while (!queue_.empty() && queue_.top().at <= last_tick_) {
    const Event event = queue_.top();
    queue_.pop();
    now_ = event.at;
    ++event_count;
    Handle(event);
  }
  now_ = last_tick_;
  Emit();
  Snapshot snapshot;
  snapshot.elapsed = absl::Nanoseconds(now_);
  std::vector<Outgoing> later;
  for (Outgoing& outgoing : under_way_) {
    if (outgoing.at > now_) {
      later.push_back(std::move(outgoing));
      continue;
    }
    // Nothing reaches the analysis that does not survive the wire.
    const std::string bytes = EncodeSummary(outgoing.summary);
    auto decoded = DecodeSummary(std::as_bytes(std::span(bytes)));
    CHECK_OK(decoded.status());
    snapshot.arrived.push_back(*std::move(decoded));
  }
  under_way_ = std::move(later);
  std::shuffle(snapshot.arrived.begin(), snapshot.arrived.end(), random_);
  return snapshot;
}

}  // namespace holdfast::monitor::sim
