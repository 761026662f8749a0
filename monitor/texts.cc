// How the analyses call ranks, nodes, NICs and times.
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "monitor/candidates.h"

namespace holdfast::monitor {
namespace {

// The ranks whose NICs `scope` is about: none, one, or both ends of a connection.
std::vector<Rank> EndsOf(Scope scope, const Suspect& suspect) {
  switch (scope) {
    case Scope::kSenderNic:
    case Scope::kReceiverNic:
      return {suspect.rank};
    case Scope::kPath:
    case Scope::kSenderNicOrPath:
    case Scope::kReceiverNicOrPath:
    case Scope::kConnection:
      return {suspect.rank, suspect.peer};
    case Scope::kProcess:
    case Scope::kGpu:
    case Scope::kHost:
    case Scope::kRankLate:
    case Scope::kNode:
    case Scope::kProgram:
    case Scope::kBehindBlindRank:
    case Scope::kCommunicator:
      return {};
  }
  return {};
}

// Of those ends; empty if one of them is not known.
std::vector<const RankPlace*> PlacesOf(const JobState& state, Scope scope, const Suspect& suspect) {
  std::vector<const RankPlace*> places;
  for (const Rank rank : EndsOf(scope, suspect)) {
    const RankPlace& place = state.shape().ranks[Value(rank)];
    if (place.port.nic.empty()) return {};
    places.push_back(&place);
  }
  return places;
}

std::string NicName(const JobState& state, const RankPlace& place) {
  return absl::StrCat("NIC ", place.port.nic, " of node ", NodeName(state, place.node));
}

std::string SwitchName(const Port& port) {
  return port.switch_name.empty() ? "a switch that is not told"
                                  : absl::StrCat("switch ", port.switch_name);
}

}  // namespace

std::string RankName(const JobState& state, Rank rank) {
  const std::string node = NodeName(state, state.shape().ranks[Value(rank)].node);
  if (node.empty()) return absl::StrFormat("rank %d", Value(rank));
  return absl::StrFormat("rank %d (node %s)", Value(rank), node);
}

std::string NodeName(const JobState& state, uint32_t node) {
  const std::vector<std::string>& names = state.shape().node_names;
  if (names.empty()) return absl::StrCat(node);
  return node < names.size() ? names[node] : "";
}

std::string CommunicatorName(uint64_t id) { return absl::StrFormat("communicator %x", id); }

std::string SecondsText(absl::Duration duration) {
  return absl::StrFormat("%.0f s", absl::ToDoubleSeconds(duration));
}

std::string NicsName(const JobState& state, Scope scope, const Suspect& suspect) {
  const std::vector<const RankPlace*> places = PlacesOf(state, scope, suspect);
  if (places.empty()) return "";
  if (places.size() == 1) return NicName(state, *places[0]);
  return absl::StrCat("from ", NicName(state, *places[0]), " to ", NicName(state, *places[1]));
}

std::string PortsText(const JobState& state, Scope scope, const Suspect& suspect) {
  const std::vector<const RankPlace*> places = PlacesOf(state, scope, suspect);
  if (places.empty()) return "";
  const Port& from = places.front()->port;
  const Port& to = places.back()->port;
  std::string text = absl::StrCat("rail ", from.rail);
  if (to.rail != from.rail) absl::StrAppend(&text, " to rail ", to.rail);
  absl::StrAppend(&text, ", ", SwitchName(from));
  if (to.switch_name != from.switch_name) absl::StrAppend(&text, " to ", SwitchName(to));
  return text;
}

}  // namespace holdfast::monitor
