#include "monitor/sim/world.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "monitor/sim/engine.h"

namespace holdfast::monitor::sim {

World::Impl::Impl(WorldOptions given)
    : options(std::move(given)),
      ranks(options.data_parallel * options.stages * options.tensor),
      happened(options.faults.size(), false),
      random_(options.seed),
      leaving_(ranks.size()),
      entering_(ranks.size()),
      send_factor_(ranks.size(), 1),
      receive_factor_(ranks.size(), 1),
      on_(options.faults.size(), false) {
  CHECK(ranks.size() % options.ranks_per_node == 0);
  agents_.resize(ranks.size() / options.ranks_per_node);
  for (uint32_t r = 0; r < ranks.size(); ++r) {
    const double relative = options.node_rate.empty() ? 1 : options.node_rate[NodeOf(r)];
    nic_.push_back(options.bytes_per_second * relative / 1e9);
  }
  for (Agent& agent : agents_) {
    agent.rate = 1 + Uniform(-options.clock_drift, options.clock_drift);
    agent.offset = static_cast<Nanos>(Uniform(0, 1e15));
  }
  MakeCommunicators();
  for (uint32_t f = 0; f < options.faults.size(); ++f) {
    const Fault& fault = options.faults[f];
    CHECK(fault.rank < ranks.size() && fault.peer < ranks.size());
    if (fault.kind == FaultKind::kNeverJoins) {
      on_[f] = happened[f] = true;
      joined_ = false;
    } else if (fault.onset == absl::ZeroDuration() && fault.kind == FaultKind::kSlowCompile) {
      on_[f] = true;
    } else {
      Push(absl::ToInt64Nanoseconds(fault.onset), Event::Kind::kFault, f, 1);
    }
  }
  for (uint32_t r = 0; r < ranks.size(); ++r) Push(0, Event::Kind::kProgram, r);
}

void World::Impl::Push(Nanos at, Event::Kind kind, uint32_t a, uint32_t b, uint32_t generation) {
  static_assert(sizeof(Event) <= 40);
  queue_.push({at, order_++, kind, a, b, generation});
}

double World::Impl::Uniform(double low, double high) {
  // Not std::uniform_real_distribution: its results are the library's, and runs are to be
  // repeatable.
  return low + (high - low) * static_cast<double>(random_() >> 11) * 0x1p-53;
}

void World::Impl::Handle(const Event& event) {
  switch (event.kind) {
    case Event::Kind::kProgram:
      return Advance(event.a);
    case Event::Kind::kUnit:
      if (event.generation == ranks[event.a].operation_number) FinishAction(event.a, event.b);
      return;
    case Event::Kind::kFlow:
      if (event.generation == connections_[event.a].generation && connections_[event.a].flowing) {
        FinishFlow(event.a);
      }
      return;
    case Event::Kind::kProxy:
      return ProxyDo(event.a, event.b == 1);
    case Event::Kind::kExit:
      if (ranks[event.a].exit == ExitKind::kNone) {
        Account(event.a);
        ranks[event.a].exit = (random_() & 1) == 0 ? ExitKind::kError : ExitKind::kAborted;
        ranks[event.a].process = ProcessState::kGone;
      }
      return;
    case Event::Kind::kFault: {
      const Fault& fault = options.faults[event.a];
      const Nanos end =
          fault.end == absl::InfiniteDuration() ? kNever : absl::ToInt64Nanoseconds(fault.end);
      const bool on = event.b == 1 && now_ < end;
      ApplyFault(event.a, on);
      if (now_ >= end) return;
      Nanos next = end;
      if (fault.period > absl::ZeroDuration()) {
        const double share = on ? fault.duty : 1 - fault.duty;
        next = std::min(end,
                        now_ + static_cast<Nanos>(share * absl::ToDoubleNanoseconds(fault.period)));
      }
      if (next != kNever) Push(next, Event::Kind::kFault, event.a, on ? 0 : 1);
      return;
    }
  }
}

JobShape World::Impl::Shape() const {
  JobShape shape;
  shape.topology_known = options.topology_known;
  for (uint32_t r = 0; r < ranks.size(); ++r) {
    RankPlace place;
    place.node = NodeOf(r);
    place.stage = r / options.tensor % options.stages;
    place.tensor_position = r % options.tensor;
    if (options.topology_known && !options.node_rate.empty()) {
      place.nic_class = static_cast<uint32_t>(options.node_rate[place.node] * 100);
    }
    shape.ranks.push_back(place);
  }
  return shape;
}

World::World(WorldOptions options) : impl_(std::make_unique<Impl>(std::move(options))) {}
World::~World() = default;
JobShape World::shape() const { return impl_->Shape(); }
Snapshot World::Tick() { return impl_->Tick(); }
uint64_t World::iterations() const {
  return impl_->ranks[0].iteration == 0 ? 0 : impl_->ranks[0].iteration - 1;
}
uint64_t World::events() const { return impl_->event_count; }
bool World::faults_happened() const {
  return std::all_of(impl_->happened.begin(), impl_->happened.end(), [](bool b) { return b; });
}

}  // namespace holdfast::monitor::sim
