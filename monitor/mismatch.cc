// Ranks that call different operations: their communicator stands, the same number of collectives
// was enqueued by several of them, and what they enqueued is not the same. The n-th collective of a
// communicator is the n-th on all its ranks, so this needs no clock. Point to point is not
// compared, nor the sizes of all-to-all, which may differ by right.
#include <algorithm>
#include <array>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "monitor/candidates.h"

namespace holdfast::monitor {
namespace {

constexpr std::array<const char*, kOperationKinds> kKindNames = {
    "unknown operation", "AllReduce", "Broadcast", "Reduce", "AllGather", "ReduceScatter",
    "AllToAll",          "Gather",    "Scatter",   "Send",   "Receive",   "Barrier"};

struct Call {
  std::array<uint64_t, kOperationKinds> enqueued{};  // collectives only
  OperationKind last{};
  uint64_t bytes = 0;
  auto operator<=>(const Call&) const = default;
};

Call CallOf(const CommunicatorReport& report) {
  Call call;
  for (size_t kind = 0; kind < kOperationKinds; ++kind) {
    if (!IsPointToPoint(static_cast<OperationKind>(kind))) {
      call.enqueued[kind] = report.counts[kind].enqueued;
    }
  }
  if (IsPointToPoint(report.last_kind)) return call;
  call.last = report.last_kind;
  if (report.last_kind != OperationKind::kAllToAll) call.bytes = report.last_bytes;
  return call;
}

std::string Describe(const Call& call) {
  return absl::StrFormat("%s of %d bytes", kKindNames[static_cast<size_t>(call.last)], call.bytes);
}

using Calls = std::map<Call, std::vector<Rank>>;

Mismatch Judge(uint64_t communicator, uint64_t number, const Calls& calls) {
  Mismatch result;
  result.communicator = communicator;
  const auto most = std::max_element(calls.begin(), calls.end(), [](const auto& a, const auto& b) {
    return a.second.size() < b.second.size();
  });
  result.tie = std::count_if(calls.begin(), calls.end(), [&](const auto& entry) {
                 return entry.second.size() == most->second.size();
               }) > 1;
  const Call* odd = nullptr;
  for (const auto& [call, ranks] : calls) {
    if (!result.tie && &call == &most->first) continue;
    if (odd == nullptr || result.tie) odd = &call;
    result.odd.insert(result.odd.end(), ranks.begin(), ranks.end());
  }
  std::sort(result.odd.begin(), result.odd.end());
  const Call& right = result.tie ? calls.begin()->first : most->first;
  result.what = absl::StrFormat("operation %d of %s: %s on one side, %s on the other", number,
                                CommunicatorName(communicator), Describe(*odd), Describe(right));
  return result;
}

}  // namespace

std::vector<Mismatch> FindMismatches(const JobState& state) {
  // By communicator and number of collectives, of ranks that stand inside one.
  std::map<std::pair<uint64_t, uint64_t>, std::pair<Calls, absl::Duration>> standing;
  for (uint32_t r = 0; r < state.ranks().size(); ++r) {
    const RankTrack& track = state.ranks()[r];
    if (track.CannotRun() || state.IsSilent(Rank{r})) continue;
    for (const CommunicatorTrack& c : track.communicators) {
      const OperationCounts collectives = Collectives(c.now);
      const absl::Duration still = state.StillFor(Rank{r}, c.now.id);
      if (collectives.enqueued == collectives.finished ||
          still < state.thresholds().hang_suspicion) {
        continue;
      }
      auto& [calls, shortest] = standing[{c.now.id, collectives.enqueued}];
      shortest = calls.empty() ? still : std::min(shortest, still);
      calls[CallOf(c.now)].push_back(Rank{r});
    }
  }
  std::vector<Mismatch> found;
  for (const auto& [key, value] : standing) {
    if (value.first.size() < 2) continue;
    found.push_back(Judge(key.first, key.second, value.first));
    found.back().standing = value.second;
  }
  return found;
}

}  // namespace holdfast::monitor
