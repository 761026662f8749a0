#include "agent/monitor/queries.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "monitor/wait_edges.h"
#include "monitor/wait_graph.h"

namespace holdfast {
namespace {

using monitor::DelayCell;
using monitor::JobAnalysis;
using monitor::JobState;
using monitor::WaitPicture;
using nlohmann::ordered_json;

std::string IdText(uint64_t communicator) { return absl::StrFormat("%x", communicator); }

const char* NameOf(monitor::WaitReason reason) {
  switch (reason) {
    case monitor::WaitReason::kNotEntered:
      return "not-entered";
    case monitor::WaitReason::kNoData:
      return "no-data";
    case monitor::WaitReason::kNoCredit:
      return "no-credit";
    case monitor::WaitReason::kWire:
      return "wire";
    case monitor::WaitReason::kBlind:
      return "blind";
    case monitor::WaitReason::kOperation:
      return "operation";
  }
  return "unknown";
}

const char* NameOf(monitor::WaitNote::Reason reason) {
  switch (reason) {
    case monitor::WaitNote::Reason::kBusy:
      return "busy";
    case monitor::WaitNote::Reason::kSection:
      return "section";
    case monitor::WaitNote::Reason::kEnginePause:
      return "engine-pause";
    case monitor::WaitNote::Reason::kImbalance:
      return "imbalance";
  }
  return "unknown";
}

ordered_json Header(const JobAnalysis& job) {
  return {{"job", job.job()}, {"attempt_key", job.attempt_key()}, {"world_size", job.world_size()}};
}

ordered_json CommunicatorsOf(const JobState& state) {
  struct Standing {
    absl::Duration longest;
    uint32_t open = 0;  // ranks with an operation open
  };
  std::map<uint64_t, Standing> standing;
  for (uint32_t rank = 0; rank < state.ranks().size(); ++rank) {
    for (const monitor::CommunicatorTrack& track : state.ranks()[rank].communicators) {
      if (!track.IsOpen()) continue;
      Standing& one = standing[track.now.id];
      ++one.open;
      one.longest = std::max(one.longest, state.StillFor(Rank{rank}, track.now.id));
    }
  }
  std::vector<std::pair<uint64_t, const monitor::CommunicatorKnowledge*>> all;
  for (const auto& [id, knowledge] : state.communicators()) all.emplace_back(id, &knowledge);
  // The large ones first; ids decide between equals, so that the order stays.
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) {
    return std::pair(b.second->size, a.first) < std::pair(a.second->size, b.first);
  });
  if (all.size() > kListedCommunicatorsMax) all.resize(kListedCommunicatorsMax);
  ordered_json list = ordered_json::array();
  for (const auto& [id, knowledge] : all) {
    const auto seen = std::count_if(knowledge->members.begin(), knowledge->members.end(),
                                    [](int64_t member) { return member >= 0; });
    const Standing& one = standing[id];
    const monitor::HangTimeout timeout = monitor::HangTimeoutOf(state, id);
    list.push_back({{"id", IdText(id)},
                    {"size", knowledge->size},
                    {"ranks_seen", seen},
                    {"finished", knowledge->finished_max},
                    {"ranks_inside", one.open},
                    {"standing_seconds", absl::ToDoubleSeconds(one.longest)},
                    {"timeout_seconds", absl::ToDoubleSeconds(timeout.timeout)},
                    {"timeout_learned", timeout.is_learned}});
  }
  return list;
}

ordered_json SightOf(const monitor::Sight& sight) {
  return {{"whole", sight.IsWhole()},
          {"ranks", sight.ranks},
          {"ranks_reporting", sight.ranks_reporting},
          {"ranks_with_telemetry", sight.ranks_with_telemetry},
          {"drops", sight.drops},
          {"oldest_report_seconds", absl::ToDoubleSeconds(sight.oldest_report)}};
}

// Ranks that are gone, and nobody has told how.
uint32_t EndedUnseen(const JobAnalysis& job) {
  if (job.analyzer() == nullptr) return 0;
  const std::vector<monitor::RankTrack>& tracks = job.analyzer()->state().ranks();
  return static_cast<uint32_t>(
      std::count_if(tracks.begin(), tracks.end(), [](const monitor::RankTrack& track) {
        return track.seen && track.report.exit == monitor::ExitKind::kUnknown;
      }));
}

// Whether there is a topology file, and whom it says nothing of.
ordered_json TopologyOf(const JobAnalysis& job) {
  uint32_t placed = 0;
  ordered_json left_out = nullptr;  // the first of them
  for (uint32_t rank = 0; rank < job.world_size(); ++rank) {
    if (job.IsPlaced(Rank{rank})) {
      ++placed;
    } else if (left_out.is_null()) {
      left_out = rank;
    }
  }
  return {{"given", job.topology_given()}, {"ranks_placed", placed}, {"first_left_out", left_out}};
}

// What an edge of the graph ends at.
ordered_json EndOf(const WaitPicture& picture, uint32_t node) {
  if (node < picture.rank_count) return {{"kind", "rank"}, {"rank", node}};
  if (const auto link = picture.links.find(node); link != picture.links.end()) {
    return {
        {"kind", "link"}, {"from", Value(link->second.first)}, {"to", Value(link->second.second)}};
  }
  if (const auto one = picture.operations.find(node); one != picture.operations.end()) {
    return {{"kind", "operation"}, {"communicator", IdText(one->second)}};
  }
  if (const auto one = picture.insides.find(node); one != picture.insides.end()) {
    return {{"kind", "inside-of-node"}, {"communicator", IdText(one->second)}};
  }
  if (const auto one = picture.unknown_members.find(node); one != picture.unknown_members.end()) {
    return {{"kind", "unknown-member"},
            {"communicator", IdText(one->second.first)},
            {"index", one->second.second}};
  }
  return {{"kind", "unknown"}};
}

ordered_json CellOf(const DelayCell& cell) {
  return {{"from", Value(cell.from)},
          {"to", Value(cell.to)},
          {"us_per_mib", cell.us_per_mib},
          {"peers_us_per_mib", cell.peers_us_per_mib},
          {"baseline_us_per_mib", cell.baseline_us_per_mib},
          {"windows", cell.windows},
          {"abnormal_windows", cell.persistence.abnormal_windows()},
          {"slow", cell.persistence.raised()}};
}

}  // namespace

ordered_json StatusOf(const JobAnalysis& job, const monitor::Analysis& last, absl::Duration now) {
  ordered_json status = Header(job);
  status["roles_known"] = job.roles_known();
  status["topology"] = TopologyOf(job);
  status["sight"] = SightOf(last.sight);
  status["ranks_ended_unseen"] = EndedUnseen(job);
  status["nodes"] = ordered_json::array();
  for (const JobAnalysis::Node& node : job.nodes()) {
    if (status["nodes"].size() == kListedNodesMax) break;
    status["nodes"].push_back(
        {{"node", node.name},
         {"ranks", node.ranks},
         {"last_report_seconds", absl::ToDoubleSeconds(now - node.last_report)}});
  }
  status["nodes_left_out"] = job.nodes().size() - status["nodes"].size();
  status["communicators"] = ordered_json::array();
  status["communicators_left_out"] = 0;
  if (job.analyzer() != nullptr) {
    const JobState& state = job.analyzer()->state();
    status["communicators"] = CommunicatorsOf(state);
    status["communicators_left_out"] =
        state.communicators().size() - status["communicators"].size();
  }
  status["notes"] = ordered_json::array();
  for (const monitor::WaitNote& note : last.notes) {
    status["notes"].push_back(
        {{"reason", NameOf(note.reason)}, {"rank", Value(note.rank)}, {"sentence", note.sentence}});
  }
  status["witnesses"] = ordered_json::array();
  status["witnesses_left_out"] = 0;
  if (job.analyzer() != nullptr) {
    const std::vector<monitor::WitnessState> witnesses = job.analyzer()->witnesses();
    for (const monitor::WitnessState& witness : witnesses) {
      if (status["witnesses"].size() == kListedNodesMax) break;
      status["witnesses"].push_back({{"source", Name(witness.source)},
                                     {"node", witness.node},
                                     {"heard", witness.heard},
                                     {"why", witness.why}});
    }
    status["witnesses_left_out"] = witnesses.size() - status["witnesses"].size();
  }
  status["reports_late"] = job.refused().late;
  status["reports_refused"] = job.refused().unreadable;
  status["refused_because"] = job.refused().why;
  return status;
}

ordered_json WaitsOf(const JobAnalysis& job) {
  ordered_json result = Header(job);
  for (const char* list : {"waits", "sinks", "deadlocks"}) result[list] = ordered_json::array();
  result["waits_left_out"] = 0;
  if (job.analyzer() == nullptr) return result;
  WaitPicture picture = monitor::DrawWaits(job.analyzer()->state());
  std::vector<monitor::WaitEdge> edges;
  for (const monitor::ReasonedEdge& edge : picture.edges) edges.push_back(edge.ends);
  const monitor::WaitRoots roots =
      monitor::FindWaitRoots(picture.node_count, picture.rank_count, edges);

  // Several connections and communicators may say the same; the longest speaks for all.
  std::stable_sort(picture.edges.begin(), picture.edges.end(),
                   [](const monitor::ReasonedEdge& a, const monitor::ReasonedEdge& b) {
                     return std::tuple(b.standing, a.ends.waiter, a.ends.awaited) <
                            std::tuple(a.standing, b.ends.waiter, b.ends.awaited);
                   });
  std::map<std::pair<uint32_t, uint32_t>, bool> shown;
  size_t left_out = 0;
  for (const monitor::ReasonedEdge& edge : picture.edges) {
    if (!shown.try_emplace({edge.ends.waiter, edge.ends.awaited}, true).second) continue;
    if (result["waits"].size() == kListedWaitsMax) {
      ++left_out;
      continue;
    }
    result["waits"].push_back({{"who", EndOf(picture, edge.ends.waiter)},
                               {"for", EndOf(picture, edge.ends.awaited)},
                               {"reason", NameOf(edge.reason)},
                               {"communicator", IdText(edge.communicator)},
                               {"seconds", absl::ToDoubleSeconds(edge.standing)}});
  }
  result["waits_left_out"] = left_out;
  for (const monitor::WaitRoots::Sink& sink : roots.sinks) {
    ordered_json one = EndOf(picture, sink.node);
    one["waiters"] = sink.waiters;
    result["sinks"].push_back(std::move(one));
  }
  std::stable_sort(result["sinks"].begin(), result["sinks"].end(),
                   [](const ordered_json& a, const ordered_json& b) {
                     return a["waiters"].get<uint64_t>() > b["waiters"].get<uint64_t>();
                   });
  for (const std::vector<uint32_t>& ring : roots.deadlocks) {
    ordered_json one = ordered_json::array();
    for (const uint32_t node : ring) one.push_back(EndOf(picture, node));
    result["deadlocks"].push_back(std::move(one));
  }
  return result;
}

ordered_json MatrixOf(const JobAnalysis& job, uint64_t communicator) {
  ordered_json result = Header(job);
  result["communicators"] = ordered_json::array();
  size_t cells = 0;
  size_t left_out = 0;
  if (job.analyzer() != nullptr) {
    std::map<uint64_t, ordered_json> matrices;
    for (const auto& [key, cell] : job.analyzer()->delay_cells()) {
      if (communicator != 0 && cell.communicator != communicator) continue;
      if (cells == kListedCellsMax) {
        ++left_out;
        continue;
      }
      ++cells;
      matrices[cell.communicator].push_back(CellOf(cell));
    }
    const auto& known = job.analyzer()->state().communicators();
    for (auto& [id, list] : matrices) {
      const auto found = known.find(id);
      result["communicators"].push_back({{"id", IdText(id)},
                                         {"size", found == known.end() ? 0 : found->second.size},
                                         {"cells", std::move(list)}});
    }
  }
  result["cells_left_out"] = left_out;
  return result;
}

}  // namespace holdfast
