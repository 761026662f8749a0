// Faults act on causes: rates, durations, threads that run or do not.
#include <algorithm>
#include <cmath>
#include <utility>

#include "monitor/sim/engine.h"

namespace holdfast::monitor::sim {
namespace {

constexpr double kStarvedShare = 0.95;
constexpr double kDelayedShare = 0.6;

}  // namespace

const Fault* World::Impl::Active(FaultKind kind, uint32_t rank) const {
  for (uint32_t f = 0; f < options.faults.size(); ++f) {
    if (options.faults[f].kind == kind && options.faults[f].rank == rank && on_[f]) {
      return &options.faults[f];
    }
  }
  return nullptr;
}

// CPU time and run delay up to now, in the state that holds since the last call.
void World::Impl::Account(uint32_t rank) {
  RankState& state = ranks[rank];
  const Nanos before = std::exchange(state.accounted, now_);
  const auto span = static_cast<double>(now_ - before);
  if (!state.in_operation) {
    const Nanos end = std::min(now_, agents_[NodeOf(rank)].paused_until);
    state.held += std::max<Nanos>(end - before, 0);
  }
  if (state.exit != ExitKind::kNone || state.frozen) return;
  double share = 0.5;  // launches kernels
  const bool loading = !state.in_operation && state.now.section == SectionKind::kData;
  if (loading) state.loading += static_cast<Nanos>(span);
  if (state.asleep || loading) share = 0;
  if (state.in_operation || state.looping) share = 1;  // spins
  state.cpu += static_cast<Nanos>(span * share);
  if (state.starved) {
    state.run_delay +=
        static_cast<Nanos>(span * (state.proxy_delay == 0 ? kStarvedShare : kDelayedShare));
  }
}

void World::Impl::ApplyFault(uint32_t index, bool on) {
  const Fault& fault = options.faults[index];
  RankState& state = ranks[fault.rank];
  Account(fault.rank);
  on_[index] = on;
  const double left = on ? fault.factor : 1;
  const auto stop = [&](uint32_t rank, bool frozen) {
    Account(rank);
    ranks[rank].frozen = frozen;
    if (!frozen && std::exchange(ranks[rank].parked, false)) {
      Push(now_, Event::Kind::kProgram, rank);
    }
  };
  const auto cause = [&] { happened[index] = true; };
  switch (fault.kind) {
    case FaultKind::kLink:
      link_factor_[{fault.rank, fault.peer}] = left;
      cause();
      break;
    case FaultKind::kSender:
      send_factor_[fault.rank] = left;
      cause();
      break;
    case FaultKind::kReceiver:
      receive_factor_[fault.rank] = left;
      cause();
      break;
    case FaultKind::kSlowGpu:
    case FaultKind::kUnevenSequences:
      cause();
      break;
    case FaultKind::kGpuHang:
      state.hung = on;
      cause();
      break;
    case FaultKind::kKilled:
      state.exit = ExitKind::kKilled;
      state.process = ProcessState::kGone;
      cause();
      if (fault.factor > 0) {
        for (uint32_t r = 0; r < ranks.size(); ++r) {
          if (r != fault.rank) {
            Push(now_ + static_cast<Nanos>(Uniform(0.2, 1.5) * fault.factor * 1e9),
                 Event::Kind::kExit, r);
          }
        }
      }
      break;
    case FaultKind::kStopped:
      stop(fault.rank, on);
      state.process = on ? ProcessState::kStopped : ProcessState::kRunning;
      cause();
      break;
    case FaultKind::kNodeDies:
      for (uint32_t r = 0; r < ranks.size(); ++r) {
        if (NodeOf(r) == NodeOf(fault.rank)) stop(r, true);
      }
      agents_[NodeOf(fault.rank)].dead = true;
      cause();
      break;
    case FaultKind::kStarvedProxy:
      state.starved = on;
      state.proxy_delay = static_cast<Nanos>(fault.factor * 1e6);
      cause();
      break;
    case FaultKind::kLateObserver:
      if (on) {
        agents_[NodeOf(fault.rank)].late_since = now_;
        cause();
      }
      break;
    default:
      break;  // read where they act
  }
  RenewAll();
}

// After a change of causes: rates, and proxies that can run again.
void World::Impl::RenewAll() {
  for (uint32_t r = 0; r < ranks.size(); ++r) Reshare(r, r);
  for (uint32_t r = 0; r < ranks.size(); ++r) {
    RankState& state = ranks[r];
    if (state.frozen || state.starved) continue;
    for (const auto& [connection, receiving] : std::exchange(state.stuck, {})) {
      ProxyAct(connection, receiving);
    }
    for (uint32_t unit = 0; unit < state.units.size(); ++unit) Kick(r, unit);
  }
}

}  // namespace holdfast::monitor::sim
