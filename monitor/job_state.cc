#include "monitor/job_state.h"

#include <algorithm>
#include <iterator>
#include <tuple>
#include <unordered_set>
#include <utility>

#include "base/check.h"

namespace holdfast::monitor {
namespace {

constexpr uint64_t kTicksToForget = 64;

// Changes with everything that a communicator can do; monotonic within an incarnation.
uint64_t Progress(const CommunicatorReport& report) {
  const OperationCounts total = Total(report);
  uint64_t progress = total.enqueued + total.started + total.finished;
  for (const ConnectionReport& c : report.connections) {
    progress += c.bytes + c.steps_done + uint64_t{1'000'000} * c.operation;
  }
  return progress;
}

double Share(uint64_t part_before, uint64_t part_now, uint64_t elapsed_us) {
  if (elapsed_us == 0 || part_now < part_before) return 0;
  return static_cast<double>(part_now - part_before) / static_cast<double>(elapsed_us);
}

absl::Duration Micros(uint64_t us) { return absl::Microseconds(static_cast<int64_t>(us)); }

}  // namespace

bool CommunicatorTrack::IsOpen() const {
  const OperationCounts total = Total(now);
  return total.enqueued > total.finished;
}

bool RankTrack::CannotRun() const {
  return report.process == ProcessState::kStopped || report.process == ProcessState::kGone ||
         report.exit != ExitKind::kNone;
}

const Section* RankTrack::InnermostSection() const {
  return report.sections.empty() ? nullptr : &report.sections.back();
}

static bool InNamedPause(const RankReport& report) {
  return std::any_of(report.sections.begin(), report.sections.end(), [](const Section& s) {
    return s.kind != SectionKind::kCompute && s.kind != SectionKind::kData;
  });
}

bool RankTrack::InPause() const { return paused || InNamedPause(report); }

bool RankTrack::InUntoldPause() const {
  return (paused && !report.held_us.has_value()) || InNamedPause(report);
}

const CommunicatorTrack* RankTrack::Find(uint64_t communicator) const {
  for (const CommunicatorTrack& track : communicators) {
    if (track.now.id == communicator) return &track;
  }
  return nullptr;
}

JobState::JobState(const Thresholds& thresholds, JobShape shape)
    : thresholds_(thresholds), ranks_(shape.ranks.size()) {
  Reshape(std::move(shape));
}

void JobState::Reshape(JobShape shape) {
  CHECK(shape.ranks.size() == ranks_.size());
  shape_ = std::move(shape);
  for (const RankPlace& place : shape_.ranks) agents_.try_emplace(place.node);
}

void JobState::Ingest(const Snapshot& snapshot, bool learn) {
  ++tick_;
  now_ = snapshot.elapsed;
  if (snapshot.receiver_gap > thresholds_.receiver_gap_max) {
    // We were not scheduled: what looks old may lie in our own queue.
    for (RankTrack& track : ranks_) track.arrived = now_;
  }
  std::vector<const NodeSummary*> order;
  for (const NodeSummary& summary : snapshot.arrived) order.push_back(&summary);
  std::sort(order.begin(), order.end(), [](const NodeSummary* a, const NodeSummary* b) {
    return std::tie(a->node, a->incarnation, a->sequence) <
           std::tie(b->node, b->incarnation, b->sequence);
  });
  for (const NodeSummary* summary : order) Take(*summary, learn);
  if (tick_ % kTicksToForget == 0) ForgetCommunicators();
}

// A job that makes communicators anew for months must not make us grow.
void JobState::ForgetCommunicators() {
  std::unordered_set<uint64_t> used;
  for (const RankTrack& track : ranks_) {
    for (const CommunicatorTrack& c : track.communicators) used.insert(c.now.id);
  }
  std::erase_if(communicators_, [&](const auto& entry) { return !used.contains(entry.first); });
}

void JobState::Take(const NodeSummary& summary, bool learn) {
  const auto found = agents_.find(summary.node);
  if (found == agents_.end()) return;
  Agent& agent = found->second;
  const auto number = std::make_pair(summary.incarnation, summary.sequence);
  if (agent.seen && number <= std::make_pair(agent.incarnation, agent.sequence)) return;
  const bool restarted = agent.seen && summary.incarnation != agent.incarnation;
  agent = {summary.incarnation, summary.sequence, true};
  first_report_ = std::min(first_report_, now_);

  for (const RankReport& report : summary.ranks) {
    if (Value(report.rank) >= ranks_.size()) continue;  // not of this job
    RankTrack& track = ranks_[Value(report.rank)];
    const uint64_t elapsed_us = summary.clock_us - track.clock_us;
    const bool first = !track.seen || restarted;
    track.observer_late = Micros(summary.observer_gap_us) > thresholds_.observer_gap_max;
    // An observer that was late saw one instant twice: its window says nothing about standing
    // still.
    if (first || track.observer_late) {
      if (first) track.receipts.clear();
      for (CommunicatorTrack& c : track.communicators) {
        c.still_since_us = summary.clock_us;
        c.still_since_tick = tick_;
        c.stood_open = false;
      }
      track.idle_since_us = summary.clock_us;
    }
    track.cpu_share = first ? 0 : Share(track.report.cpu_us, report.cpu_us, elapsed_us);
    track.run_delay_share =
        first ? 0 : Share(track.report.run_delay_us, report.run_delay_us, elapsed_us);
    if (track.cpu_share > thresholds_.busy_cpu_share) track.idle_since_us = summary.clock_us;
    if (report.exit != ExitKind::kNone && track.report.exit == ExitKind::kNone) {
      track.ended_at = now_;
    }
    track.seen = true;
    track.paused = summary.engine_paused;
    track.tick = tick_;
    track.arrived = now_;
    track.clock_us = summary.clock_us;
    track.receipts.push_back({tick_, summary.clock_us});
    if (track.receipts.size() > kReceiptsMax) track.receipts.erase(track.receipts.begin());
    TakeCommunicators(track, report.communicators, learn);
    track.report = report;
    track.report.communicators.clear();
    if (track.InPause()) track.last_pause_us = track.clock_us;
  }
}

void JobState::TakeCommunicators(RankTrack& track, const std::vector<CommunicatorReport>& reports,
                                 bool learn) {
  std::vector<CommunicatorTrack> before = std::move(track.communicators);
  track.communicators.clear();
  track.communicators.reserve(reports.size());
  for (size_t i = 0; i < reports.size(); ++i) {
    const CommunicatorReport& report = reports[i];
    if (report.size > ranks_.size()) continue;  // more than the job has: garbage, and costly
    // Nearly always in the same place as last time.
    size_t at = i;
    if (at >= before.size() || before[at].now.id != report.id) {
      at = 0;
      while (at < before.size() && before[at].now.id != report.id) ++at;
    }
    const bool known = at < before.size();
    CommunicatorTrack next;
    if (known) next = std::move(before[at]);
    const bool moved = !known || Progress(next.now) != Progress(report);
    CommunicatorKnowledge& knowledge = communicators_[report.id];
    if (knowledge.members.size() < report.size) {
      if (knowledge.members.empty()) knowledge.first_seen = now_;
      knowledge.size = report.size;
      knowledge.members.resize(report.size, -1);
    }
    if (!known) knowledge.members[report.index] = &track - ranks_.data();
    if (moved) {
      if (known && next.stood_open && learn) {
        // Of the report before this one: we know that it stood until then.
        const uint64_t last = track.receipts.size() < 2
                                  ? next.still_since_us
                                  : track.receipts[track.receipts.size() - 2].clock_us;
        knowledge.longest_standstill_us =
            std::max(knowledge.longest_standstill_us, last - std::min(last, next.still_since_us));
      }
      next.still_since_us = track.clock_us;
      next.still_since_tick = tick_;
    }
    next.now = report;
    if (moved) next.stood_open = next.IsOpen();
    knowledge.finished_max = std::max(knowledge.finished_max, Total(report).finished);
    track.communicators.push_back(std::move(next));
  }
}

bool JobState::IsSilent(Rank rank) const {
  return ranks_[Value(rank)].seen && Age(rank) >= thresholds_.node_silent;
}

absl::Duration JobState::StillFor(Rank rank, uint64_t communicator) const {
  const RankTrack& track = ranks_[Value(rank)];
  const CommunicatorTrack* c = track.Find(communicator);
  return c == nullptr ? absl::ZeroDuration() : Micros(track.clock_us - c->still_since_us);
}

absl::Duration JobState::StillSince(Rank rank, uint64_t communicator, uint64_t tick) const {
  const RankTrack& track = ranks_[Value(rank)];
  const CommunicatorTrack* c = track.Find(communicator);
  // If neither report is kept any more, the oldest kept one.
  auto first = std::find_if(track.receipts.begin(), track.receipts.end(),
                            [&](const RankTrack::Receipt& receipt) { return receipt.tick > tick; });
  if (first != track.receipts.begin() && std::prev(first)->tick == tick) --first;
  uint64_t begin_us = first == track.receipts.end() ? track.clock_us : first->clock_us;
  if (c != nullptr) begin_us = std::max(begin_us, c->still_since_us);
  return Micros(track.clock_us - std::min(track.clock_us, begin_us));
}

std::optional<absl::Duration> JobState::NormalStandstill(uint64_t communicator) const {
  const auto found = communicators_.find(communicator);
  if (found == communicators_.end() ||
      found->second.finished_max < thresholds_.learn_operations_min) {
    return std::nullopt;
  }
  return Micros(found->second.longest_standstill_us);
}

}  // namespace holdfast::monitor
