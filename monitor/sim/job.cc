// What the ranks do: communicators, iterations, pauses, and the faults of programs.
#include <algorithm>
#include <numeric>
#include <set>

#include "absl/time/time.h"
#include "monitor/sim/engine.h"

namespace holdfast::monitor::sim {
namespace {

constexpr Nanos kLoadTime = 5'000'000;
constexpr uint64_t kTensorBytes = uint64_t{16} << 20;
constexpr uint64_t kActivationBytes = uint64_t{8} << 20;
constexpr uint64_t kLossBytes = uint64_t{1} << 20;
constexpr int kLayers = 4;  // tensor-parallel operations of an iteration

Instruction Computing(Nanos duration, SectionKind section = SectionKind::kCompute) {
  Instruction result;
  result.duration = duration;
  result.section = section;
  return result;
}

Instruction Operation(uint32_t communicator, OperationKind kind, uint64_t bytes) {
  Instruction result;
  result.kind = Instruction::Kind::kOperation;
  result.communicator = communicator;
  result.operation = kind;
  result.bytes = bytes;
  return result;
}

Nanos Seconds(double seconds) { return static_cast<Nanos>(seconds * 1e9); }

}  // namespace

void World::Impl::AddConnection(uint32_t communicator, uint32_t channel, uint32_t from,
                                uint32_t to) {
  Communicator& c = communicators_[communicator];
  Connection connection;
  connection.communicator = communicator;
  connection.channel = channel;
  connection.from = c.ranks[from];
  connection.to = c.ranks[to];
  connection.from_index = from;
  connection.to_index = to;
  connection.shown = NodeOf(connection.from) != NodeOf(connection.to);
  const auto id = static_cast<uint32_t>(connections_.size());
  c.connections[from].push_back(id);
  c.connections[to].push_back(id);
  connections_.push_back(connection);
}

uint32_t World::Impl::AddCommunicator(const std::vector<uint32_t>& members, Wiring wiring) {
  const auto id = static_cast<uint32_t>(communicators_.size());
  const auto n = static_cast<uint32_t>(members.size());
  Communicator c;
  c.id = 0x1000 + uint64_t{id} * 7;
  c.ranks = members;
  c.connections.resize(n);
  communicators_.push_back(c);
  for (uint32_t i = 0; i < n; ++i) {
    Membership membership;
    membership.communicator = id;
    membership.index = i;
    ranks[members[i]].memberships.push_back(membership);
    switch (wiring) {
      case Wiring::kRing:
      case Wiring::kTwoRings:
        AddConnection(id, 0, i, (i + 1) % n);
        AddConnection(id, 1, i, (wiring == Wiring::kRing ? i + 1 : i + n - 1) % n);
        break;
      case Wiring::kAll:
        for (uint32_t j = 0; j < n; ++j) {
          if (i != j) AddConnection(id, 0, i, j);
        }
        break;
      case Wiring::kLine:
        if (i + 1 < n) {
          AddConnection(id, 0, i, i + 1);
          AddConnection(id, 0, i + 1, i);
        }
        break;
    }
  }
  return id;
}

// Rank (d * stages + s) * tensor + t.
void World::Impl::MakeCommunicators() {
  const uint32_t dp = options.data_parallel, pp = options.stages, tp = options.tensor;
  const uint32_t count = dp * pp * tp;
  data_group_.assign(count, kNone);
  tensor_group_.assign(count, kNone);
  pipeline_group_.assign(count, kNone);
  const auto rank = [&](uint32_t d, uint32_t s, uint32_t t) { return (d * pp + s) * tp + t; };
  const auto make = [&](std::vector<uint32_t>& groups, std::vector<uint32_t> members,
                        Wiring wiring) {
    if (members.size() < 2) return;
    const uint32_t id = AddCommunicator(members, wiring);
    for (const uint32_t member : members) groups[member] = id;
  };
  const Wiring data = options.traffic == Traffic::kRing       ? Wiring::kRing
                      : options.traffic == Traffic::kTwoRings ? Wiring::kTwoRings
                                                              : Wiring::kAll;
  for (uint32_t s = 0; s < pp; ++s) {
    for (uint32_t t = 0; t < tp; ++t) {
      std::vector<uint32_t> members;
      for (uint32_t d = 0; d < dp; ++d) members.push_back(rank(d, s, t));
      make(data_group_, members, data);
    }
  }
  for (uint32_t d = 0; d < dp; ++d) {
    for (uint32_t s = 0; s < pp; ++s) {
      std::vector<uint32_t> members;
      for (uint32_t t = 0; t < tp; ++t) members.push_back(rank(d, s, t));
      make(tensor_group_, members, Wiring::kRing);
    }
    for (uint32_t t = 0; t < tp; ++t) {
      std::vector<uint32_t> members;
      for (uint32_t s = 0; s < pp; ++s) members.push_back(rank(d, s, t));
      make(pipeline_group_, members, Wiring::kLine);
    }
  }
  std::vector<uint32_t> all(count);
  std::iota(all.begin(), all.end(), 0);
  world_ = AddCommunicator(all, Wiring::kRing);
}

Membership& World::Impl::MembershipOf(uint32_t rank, uint32_t communicator) {
  return *std::find_if(ranks[rank].memberships.begin(), ranks[rank].memberships.end(),
                       [&](const Membership& m) { return m.communicator == communicator; });
}

Nanos World::Impl::ComputeTime(uint32_t rank) {
  const uint32_t stage = rank / options.tensor % options.stages;
  double factor = options.stage_weight.empty() ? 1 : options.stage_weight[stage];
  std::normal_distribution<double> noise(1, options.compute_noise);
  factor *= std::clamp(noise(random_), 0.5, 1.5);
  if (const Fault* slow = Active(FaultKind::kSlowGpu, rank)) factor *= slow->factor;
  for (uint32_t f = 0; f < options.faults.size(); ++f) {
    if (options.faults[f].kind == FaultKind::kUnevenSequences && IsOn(f)) {
      factor *= Uniform(1, options.faults[f].factor);
    }
  }
  return static_cast<Nanos>(factor * absl::ToDoubleNanoseconds(options.compute));
}

void World::Impl::WritePauses(uint32_t rank) {
  RankState& state = ranks[rank];
  state.pauses_taken.resize(options.faults.size());
  for (uint32_t f = 0; f < options.faults.size(); ++f) {
    const Fault& fault = options.faults[f];
    if (!IsOn(f)) continue;
    if (fault.kind == FaultKind::kCollections) {
      if (Uniform(0, 1) > 0.1) continue;
      state.program.push_back(Computing(Seconds(Uniform(0, fault.factor))));
      happened[f] = true;
      continue;
    }
    if (state.pauses_taken[f]) continue;
    const bool mine = fault.kind == FaultKind::kCheckpoint ||
                      (fault.kind == FaultKind::kEvaluation && fault.rank == rank) ||
                      (fault.kind == FaultKind::kEnginePause && NodeOf(fault.rank) == NodeOf(rank));
    if (!mine) continue;
    state.pauses_taken[f] = happened[f] = true;
    const SectionKind section = fault.kind == FaultKind::kCheckpoint   ? SectionKind::kCheckpoint
                                : fault.kind == FaultKind::kEvaluation ? SectionKind::kEvaluation
                                                                       : SectionKind::kCompute;
    state.program.push_back(Computing(Seconds(fault.factor), section));
    if (fault.kind == FaultKind::kEnginePause) {
      agents_[NodeOf(rank)].paused_until = now_ + Seconds(fault.factor);
    }
  }
}

void World::Impl::WriteIteration(uint32_t rank) {
  RankState& state = ranks[rank];
  WritePauses(rank);
  Nanos load = kLoadTime;
  for (uint32_t f = 0; f < options.faults.size(); ++f) {
    const Fault& fault = options.faults[f];
    if (fault.kind == FaultKind::kSlowData && fault.rank == rank && IsOn(f)) {
      load = static_cast<Nanos>(fault.factor * absl::ToDoubleNanoseconds(options.compute));
      happened[f] = true;
    }
    if (fault.kind == FaultKind::kSlowCompile && state.iteration == 0) {
      state.program.push_back(Computing(Seconds(Uniform(0.3, 1) * fault.factor)));
      happened[f] = true;
    }
  }
  state.program.push_back(Computing(load, SectionKind::kData));
  const Nanos compute = ComputeTime(rank);
  if (pipeline_group_[rank] != kNone) {
    WritePipeline(rank, compute);
  } else if (tensor_group_[rank] != kNone) {
    for (int layer = 0; layer < kLayers; ++layer) {
      state.program.push_back(Computing(compute / kLayers));
      state.program.push_back(
          Operation(tensor_group_[rank], OperationKind::kAllReduce, kTensorBytes));
    }
  } else {
    state.program.push_back(Computing(compute));
  }
  if (data_group_[rank] != kNone) {
    const OperationKind kind = options.traffic == Traffic::kAllToAll ? OperationKind::kAllToAll
                                                                     : OperationKind::kAllReduce;
    state.program.push_back(Operation(data_group_[rank], kind, options.gradient_bytes));
  }
  state.program.push_back(Operation(world_, OperationKind::kAllReduce, kLossBytes));
  ++state.iteration;
}

// One forward, one backward (1F1B), with the paired exchanges of Megatron-LM.
void World::Impl::WritePipeline(uint32_t rank, Nanos compute) {
  RankState& state = ranks[rank];
  const uint32_t stages = options.stages, stage = rank / options.tensor % stages;
  const uint32_t count = options.micro_batches;
  const uint32_t warm = std::min(stages - stage - 1, count);
  const Nanos forward = compute / (3 * count);
  const bool first = stage == 0, last = stage + 1 == stages;
  using Peers = std::vector<std::pair<uint32_t, Direction>>;
  const auto exchange = [&](const Peers& peers) {
    if (peers.empty()) return;
    Instruction op = Operation(pipeline_group_[rank], OperationKind::kSend, kActivationBytes);
    op.peers = peers;
    state.program.push_back(op);
  };
  const Peers receive_forward = first ? Peers{} : Peers{{stage - 1, Direction::kReceive}};
  const Peers send_forward = last ? Peers{} : Peers{{stage + 1, Direction::kSend}};
  const Peers receive_backward = last ? Peers{} : Peers{{stage + 1, Direction::kReceive}};
  const Peers send_backward = first ? Peers{} : Peers{{stage - 1, Direction::kSend}};
  const auto both = [](Peers a, const Peers& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
  };
  for (uint32_t i = 0; i < warm; ++i) {
    exchange(receive_forward);
    state.program.push_back(Computing(forward));
    exchange(send_forward);
  }
  const uint32_t steady = count - warm;
  if (steady > 0) exchange(receive_forward);
  for (uint32_t i = 0; i < steady; ++i) {
    state.program.push_back(Computing(forward));
    exchange(both(send_forward, receive_backward));
    state.program.push_back(Computing(2 * forward));
    exchange(i + 1 == steady ? send_backward : both(send_backward, receive_forward));
  }
  for (uint32_t i = 0; i < warm; ++i) {
    exchange(receive_backward);
    state.program.push_back(Computing(2 * forward));
    exchange(send_backward);
  }
}

void World::Impl::Advance(uint32_t rank) {
  RankState& state = ranks[rank];
  if (state.exit != ExitKind::kNone || !joined_) return;
  if (state.frozen) {
    state.parked = true;
    return;
  }
  Account(rank);
  if (state.program.empty()) WriteIteration(rank);
  state.now = std::move(state.program.front());
  state.program.pop_front();
  state.section_since = now_;
  if (state.now.kind == Instruction::Kind::kOperation) {
    if (Distort(rank)) Open(rank);
  } else {
    Push(now_ + state.now.duration, Event::Kind::kProgram, rank);
  }
}

// Faults of the program at an operation. Whether the rank enters it.
bool World::Impl::Distort(uint32_t rank) {
  RankState& state = ranks[rank];
  for (uint32_t f = 0; f < options.faults.size(); ++f) {
    const Fault& fault = options.faults[f];
    if (fault.rank != rank || !IsOn(f) || happened[f]) continue;
    const bool reduces = state.now.operation == OperationKind::kAllReduce;
    switch (fault.kind) {
      case FaultKind::kNeverEnters:
      case FaultKind::kEndlessLoop:
        happened[f] = true;
        (fault.kind == FaultKind::kNeverEnters ? state.asleep : state.looping) = true;
        return false;
      case FaultKind::kWrongSize:
        if (reduces) state.now.bytes *= 2;
        happened[f] = reduces;
        break;
      case FaultKind::kWrongKind:
        if (reduces) state.now.operation = OperationKind::kReduceScatter;
        happened[f] = reduces;
        break;
      case FaultKind::kExtraBroadcast:
        if (reduces) {
          // What it sends lies in its own buffers, so that for it the operation is over.
          Membership& m = MembershipOf(rank, state.now.communicator);
          Enqueue(m, OperationKind::kBroadcast, kLossBytes);
          ++m.counts[static_cast<size_t>(OperationKind::kBroadcast)].finished;
        }
        happened[f] = reduces;
        break;
      case FaultKind::kSwappedOrder:
        if (!state.program.empty() && state.now.communicator != world_ &&
            state.program.front().kind == Instruction::Kind::kOperation &&
            state.program.front().communicator == world_) {
          std::swap(state.now, state.program.front());
          happened[f] = true;
        }
        break;
      default:
        break;
    }
  }
  return true;
}

}  // namespace holdfast::monitor::sim
