#include "monitor/job_analysis.h"

#include <algorithm>
#include <set>
#include <span>
#include <tuple>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/crc32c.h"

namespace holdfast::monitor {
namespace {

// A rank that no report has shown yet is on a node of its own: it must not count as a neighbour.
// No node of ours has such a number, and none has a name there.
uint32_t UnknownNode(size_t rank) { return UINT32_MAX - static_cast<uint32_t>(rank); }

}  // namespace

absl::Status CheckReport(const NodeReport& report) {
  const auto check = [](const char* what, size_t bytes, size_t min, size_t max) {
    if (bytes >= min && bytes <= max) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrFormat("report: %s: expected %d to %d bytes, found %d", what, min, max, bytes));
  };
  for (const absl::Status& status :
       {check("job", report.job.size(), 1, kJobBytesMax),
        check("attempt key", report.attempt_key.size(), 0, kAttemptKeyBytesMax),
        check("node", report.node.size(), 1, kNodeBytesMax)}) {
    if (!status.ok()) return status;
  }
  if (report.world_size > kWorldSizeMax) {
    return absl::InvalidArgumentError(
        absl::StrFormat("report of node %s: world size: expected at most %d, found %d", report.node,
                        kWorldSizeMax, report.world_size));
  }
  return absl::OkStatus();
}

JobAnalysis::JobAnalysis(const Thresholds& thresholds, std::string job)
    : thresholds_(thresholds), job_(std::move(job)) {}

std::vector<JobAnalysis::Arrived> JobAnalysis::Decode(std::vector<NodeReport> reports) {
  std::vector<Arrived> arrived;
  for (NodeReport& report : reports) {
    absl::Status checked = CheckReport(report);
    absl::StatusOr<NodeSummary> summary =
        checked.ok() ? DecodeSummary(std::as_bytes(std::span(report.summary)))
                     : absl::StatusOr<NodeSummary>(checked);
    if (summary.ok()) {
      const auto beyond =
          std::find_if(summary->ranks.begin(), summary->ranks.end(),
                       [](const RankReport& rank) { return Value(rank.rank) >= kWorldSizeMax; });
      if (beyond != summary->ranks.end()) {
        summary = absl::InvalidArgumentError(
            absl::StrFormat("report of node %s: rank: expected below %d, found %d", report.node,
                            kWorldSizeMax, Value(beyond->rank)));
      }
    }
    if (!summary.ok()) {
      ++refused_.unreadable;
      refused_.why = std::string(summary.status().message());
      continue;
    }
    report.summary.clear();
    arrived.push_back({std::move(report), *std::move(summary)});
  }
  // By name, so that numbers do not depend on who came first within the step; and the newest
  // attempt last.
  std::sort(arrived.begin(), arrived.end(), [](const Arrived& a, const Arrived& b) {
    const auto key = [](const Arrived& one) {
      return std::tie(one.summary.attempt, one.report.attempt_key, one.report.node,
                      one.summary.incarnation, one.summary.sequence, one.report.world_size);
    };
    return key(a) < key(b);
  });
  return arrived;
}

bool JobAnalysis::IsLate(const AttemptName& name, absl::Duration now) {
  std::erase_if(replaced_, [&](const auto& one) { return now - one.second >= kReplacedMemory; });
  // One that does not know the world size yet is late if any attempt of its key is.
  const auto found = std::find_if(replaced_.begin(), replaced_.end(), [&](const auto& one) {
    return one.first.key == name.key &&
           (one.first.world_size == name.world_size || name.world_size == 0);
  });
  if (found == replaced_.end()) return false;
  found->second = now;
  return true;
}

// By a report that is newer than what we know of its node.
bool JobAnalysis::RunsAgain(const Arrived& arrived) const {
  const auto number = node_numbers_.find(arrived.report.node);
  if (analyzer_ == nullptr || number == node_numbers_.end()) return false;
  const Node& node = nodes_[number->second];
  if (std::pair(arrived.summary.incarnation, arrived.summary.sequence) <=
      std::pair(node.incarnation, node.sequence)) {
    return false;
  }
  const std::vector<RankTrack>& tracks = analyzer_->state().ranks();
  return std::any_of(arrived.summary.ranks.begin(), arrived.summary.ranks.end(),
                     [&](const RankReport& rank) {
                       return Value(rank.rank) < tracks.size() && rank.exit == ExitKind::kNone &&
                              rank.process != ProcessState::kGone &&
                              tracks[Value(rank.rank)].report.exit != ExitKind::kNone;
                     });
}

void JobAnalysis::BeginAttempt(const AttemptName& name, absl::Duration now) {
  if (attempt_count_ > 0 && name != attempt_) {
    replaced_[attempt_] = now;
    if (replaced_.size() > kReplacedMax) {
      replaced_.erase(
          std::min_element(replaced_.begin(), replaced_.end(),
                           [](const auto& a, const auto& b) { return a.second < b.second; }));
    }
  }
  attempt_count_ = name == attempt_ ? attempt_count_ + 1 : 1;
  attempt_ = name;
  replaced_.erase(name);
  nodes_.clear();
  node_numbers_.clear();
  roles_.clear();
  shape_ = {};
  analyzer_.reset();
  PlaceRanks(name.world_size);
}

void JobAnalysis::PlaceRanks(size_t rank_count) {
  for (size_t rank = shape_.ranks.size(); rank < rank_count; ++rank) {
    shape_.ranks.emplace_back().node = UnknownNode(rank);
  }
  reshaped_ = true;
}

void JobAnalysis::Place(const Arrived& arrived, absl::Duration now) {
  const auto [at, first] = node_numbers_.try_emplace(arrived.report.node, nodes_.size());
  if (first) {
    nodes_.emplace_back().name = arrived.report.node;
    shape_.node_names.push_back(arrived.report.node);
  }
  Node& node = nodes_[at->second];
  const NodeSummary& summary = arrived.summary;
  node.last_report = now;
  ++node.reports;
  if (std::pair(summary.incarnation, summary.sequence) <
      std::pair(node.incarnation, node.sequence)) {
    return;
  }
  node.incarnation = summary.incarnation;
  node.sequence = summary.sequence;
  node.ranks = static_cast<uint32_t>(summary.ranks.size());
  for (const RankReport& rank : summary.ranks) {
    const uint32_t number = Value(rank.rank);
    if (number >= shape_.ranks.size()) {
      if (attempt_.world_size != 0) continue;  // not of this job
      PlaceRanks(number + 1);
    }
    RankPlace& place = shape_.ranks[number];
    if (place.node == at->second && place.local_rank == rank.local_rank) continue;
    place.node = at->second;
    place.local_rank = rank.local_rank;
    reshaped_ = true;
  }
}

void JobAnalysis::ApplyRoles() {
  if (roles_.size() != shape_.ranks.size()) return;
  for (size_t rank = 0; rank < roles_.size(); ++rank) {
    shape_.ranks[rank].stage = roles_[rank].stage;
    shape_.ranks[rank].tensor_position = roles_[rank].tensor_position;
  }
}

void JobAnalysis::ApplyTopology() {
  if (!topology_.has_value()) return;
  // Who was started without LOCAL_RANK may say 0, as its neighbours do: then nothing is known.
  std::map<std::pair<uint32_t, uint32_t>, int> claims;
  for (const RankPlace& place : shape_.ranks) ++claims[{place.node, place.local_rank}];
  std::map<std::string, uint32_t> kinds, switches;
  const auto number = [](std::map<std::string, uint32_t>& numbers, const std::string& name) {
    return numbers.try_emplace(name, static_cast<uint32_t>(numbers.size())).first->second;
  };
  shape_.topology_known = true;
  for (RankPlace& place : shape_.ranks) {
    const bool certain = place.node < nodes_.size() && claims[{place.node, place.local_rank}] == 1;
    place.port =
        (certain ? topology_->Find(nodes_[place.node].name, place.local_rank) : std::nullopt)
            .value_or(Port());
    place.rail = place.port.rail;
    place.nic_class = number(kinds, place.port.nic_kind);
    place.leaf = number(switches, place.port.switch_name);
    shape_.topology_known &= !place.port.nic.empty();
  }
}

JobAnalysis::Result JobAnalysis::Step(JobStep step) {
  Result result;
  std::vector<Arrived> all = Decode(std::move(step.reports));
  // The attempt that is the newest after this step: the last of those that are new in it.
  std::set<AttemptName> begun;
  for (const Arrived& arrived : all) {
    AttemptName name{arrived.report.attempt_key, arrived.report.world_size};
    // Until somebody has said its world size an attempt goes by its key.
    const bool ours = attempt_count_ > 0 && name.key == attempt_.key &&
                      (name.world_size == attempt_.world_size || name.world_size == 0);
    if (ours) name = attempt_;
    if (begun.contains(name) || (ours ? !RunsAgain(arrived) : IsLate(name, step.elapsed))) continue;
    begun.insert(name);
    result.new_attempt = true;
    BeginAttempt(name, step.elapsed);
  }
  Snapshot snapshot;
  snapshot.elapsed = step.elapsed;
  snapshot.receiver_gap = step.receiver_gap;
  for (const std::string& batch : step.testimonies) {
    absl::StatusOr<std::vector<Testimony>> said =
        DecodeTestimonies(std::as_bytes(std::span(batch)));
    if (!said.ok()) {
      ++refused_.unreadable;
      refused_.why = std::string(said.status().message());
      continue;
    }
    snapshot.testimonies.insert(snapshot.testimonies.end(), said->begin(), said->end());
  }
  if (!step.roles.empty()) {
    roles_ = std::move(step.roles);
    reshaped_ = true;
  }
  if (!step.topology.empty()) {
    absl::StatusOr<Topology> topology = Topology::Parse(std::move(step.topology));
    if (topology.ok()) {
      topology_ = *std::move(topology);
      reshaped_ = true;
    } else {
      ++refused_.unreadable;
      refused_.why = absl::StrCat("topology: ", std::string(topology.status().message()));
    }
  }
  for (Arrived& arrived : all) {
    const NodeReport& report = arrived.report;
    if (report.attempt_key != attempt_.key ||
        (report.world_size != attempt_.world_size && report.world_size != 0)) {
      ++refused_.late;
      continue;
    }
    Place(arrived, step.elapsed);
    arrived.summary.node = node_numbers_.at(report.node);
    snapshot.arrived.push_back(std::move(arrived.summary));
  }
  if (shape_.ranks.empty()) return result;
  if (reshaped_) {
    ApplyRoles();
    ApplyTopology();
  }
  if (analyzer_ == nullptr || analyzer_->state().ranks().size() != shape_.ranks.size()) {
    result.new_attempt = true;
    analyzer_ = std::make_unique<Analyzer>(thresholds_, shape_);
  } else if (reshaped_) {
    analyzer_->Reshape(shape_);
  }
  reshaped_ = false;
  result.analysis = analyzer_->Step(snapshot);
  for (Finding& finding : result.analysis.findings) {
    const std::string name = absl::StrFormat("%s\n%s\n%d\n%d\n%s", job_, attempt_.key,
                                             attempt_.world_size, attempt_count_, finding.id);
    finding.id = absl::StrFormat("%08x", Crc32c(std::as_bytes(std::span(name))));
  }
  result.ended = !result.analysis.ended_amid && EveryRankEndedCleanly();
  return result;
}

// With status 0, or so that nobody saw how.
bool JobAnalysis::EveryRankEndedCleanly() const {
  const std::vector<RankTrack>& tracks = analyzer_->state().ranks();
  return std::all_of(tracks.begin(), tracks.end(), [](const RankTrack& track) {
    const ExitKind exit = track.report.exit;
    return track.seen && (exit == ExitKind::kClean || exit == ExitKind::kUnknown);
  });
}

}  // namespace holdfast::monitor
