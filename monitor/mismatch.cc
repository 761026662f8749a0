// Ranks that call different operations. The n-th collective of a communicator is the n-th on all
// its ranks, so this needs no clock. Where ranks stand inside one, it is held against what every
// other rank has called under that number, whether that rank stands, has gone on, or is somewhere
// else by now: its summary tells its newest collectives. If they do not reach back so far, those
// are compared that stand with the same number of collectives behind them: their counts by kind,
// and the last one. Point to point is not compared, nor the sizes of all-to-all, which may differ
// by right.
#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "monitor/candidates.h"

namespace holdfast::monitor {
namespace {

constexpr std::array<const char*, kOperationKinds> kKindNames = {
    "unknown operation", "AllReduce", "Broadcast", "Reduce", "AllGather", "ReduceScatter",
    "AllToAll",          "Gather",    "Scatter",   "Send",   "Receive",   "Barrier"};

// Ranks stand inside of one operation, or of two that lie side by side. Of more numbers than this
// the higher ones are not looked at.
constexpr size_t kNumbersMax = 16;

struct Call {
  // Of collectives, where they count (CallOf); else 0.
  std::array<uint64_t, kOperationKinds> enqueued{};
  RecentOperation operation;
  auto operator<=>(const Call&) const = default;
};
using Calls = std::map<Call, std::vector<Rank>>;

RecentOperation Comparable(RecentOperation operation) {
  if (operation.kind == OperationKind::kAllToAll) operation.bytes = 0;
  return operation;
}

// All that it has called.
Call CallOf(const CommunicatorReport& report) {
  Call call;
  for (size_t kind = 0; kind < kOperationKinds; ++kind) {
    if (!IsPointToPoint(static_cast<OperationKind>(kind))) {
      call.enqueued[kind] = report.counts[kind].enqueued;
    }
  }
  if (!IsPointToPoint(report.last_kind)) {
    call.operation = Comparable({report.last_kind, report.last_bytes, kNoRoot});
  }
  return call;
}

// Collective `number` of `enqueued`; null: not told (any more).
const RecentOperation* Find(const CommunicatorReport& report, uint64_t enqueued, uint64_t number) {
  const uint64_t back = enqueued - number;  // of the one that was enqueued last: 0
  if (number > enqueued || back >= report.operations.size()) return nullptr;
  return &report.operations[report.operations.size() - 1 - back];
}

std::string Describe(const Call& call) {
  const RecentOperation& operation = call.operation;
  std::string text = absl::StrFormat(
      "%s of %d bytes", kKindNames[static_cast<size_t>(operation.kind)], operation.bytes);
  if (operation.root != kNoRoot) absl::StrAppendFormat(&text, " with root %d", operation.root);
  return text;
}

std::string Count(const std::vector<Rank>& ranks) {
  if (ranks.size() == 1) return absl::StrFormat("rank %d", Value(ranks[0]));
  return absl::StrFormat("%d ranks", ranks.size());
}

Mismatch Judge(uint64_t communicator, uint64_t number, const Calls& calls) {
  Mismatch result;
  result.communicator = communicator;
  const auto most = std::max_element(calls.begin(), calls.end(), [](const auto& a, const auto& b) {
    return a.second.size() < b.second.size();
  });
  result.tie = std::count_if(calls.begin(), calls.end(), [&](const auto& entry) {
                 return entry.second.size() == most->second.size();
               }) > 1;
  auto odd = calls.end();
  for (auto at = calls.begin(); at != calls.end(); ++at) {
    if (!result.tie && at == most) continue;
    if (odd == calls.end() || result.tie) odd = at;
    result.odd.insert(result.odd.end(), at->second.begin(), at->second.end());
  }
  std::sort(result.odd.begin(), result.odd.end());
  const auto right = result.tie ? calls.begin() : most;
  if (odd->first.operation == right->first.operation) {
    result.what =
        absl::StrFormat("of the %d operations of %s those of %s are not those of %s", number,
                        CommunicatorName(communicator), Count(odd->second), Count(right->second));
  } else {
    result.what = absl::StrFormat("%s called %s as operation %d of %s, where %s called %s",
                                  Count(odd->second), Describe(odd->first), number,
                                  CommunicatorName(communicator), Count(right->second),
                                  Describe(right->first));
  }
  return result;
}

// A rank that stands inside a collective.
struct Standing {
  Rank rank{};
  const CommunicatorReport* report = nullptr;
  OperationCounts collectives;
  absl::Duration still;
};

struct Called {
  Calls calls;
  absl::Duration shortest;  // of those that stand
};

struct Compared {
  std::optional<Mismatch> found;
  bool known = true;  // what all call that they stand inside of
};

// By the numbers that somebody stands inside of, the lowest first.
Compared CompareByNumber(const JobState& state, uint64_t communicator,
                         const std::vector<Standing>& standing) {
  Compared result;
  std::map<uint64_t, Called> by_number;
  for (const Standing& one : standing) {
    const uint64_t number = one.collectives.finished + 1;
    result.known &= Find(*one.report, one.collectives.enqueued, number) != nullptr;
    const auto [at, first] = by_number.try_emplace(number, Called{{}, one.still});
    at->second.shortest = std::min(at->second.shortest, one.still);
    if (by_number.size() > kNumbersMax) by_number.erase(std::prev(by_number.end()));
  }
  for (const int64_t member : state.communicators().at(communicator).members) {
    if (member < 0) continue;
    const Rank rank{static_cast<uint32_t>(member)};
    const RankTrack& track = state.ranks()[Value(rank)];
    const CommunicatorTrack* c = track.Find(communicator);
    if (c == nullptr || track.CannotRun() || state.IsSilent(rank)) continue;
    const uint64_t enqueued = Collectives(c->now).enqueued;
    for (auto& [number, called] : by_number) {
      const RecentOperation* operation = Find(c->now, enqueued, number);
      if (operation != nullptr) called.calls[Call{{}, Comparable(*operation)}].push_back(rank);
    }
  }
  for (const auto& [number, called] : by_number) {
    if (called.calls.size() < 2) continue;
    result.found = Judge(communicator, number, called.calls);
    result.found->standing = called.shortest;
    break;
  }
  return result;
}

// Of those that stand with the same number of collectives behind them.
void CompareByCounts(uint64_t communicator, const std::vector<Standing>& standing,
                     std::vector<Mismatch>& found) {
  std::map<uint64_t, Called> by_count;
  for (const Standing& one : standing) {
    const auto [at, first] = by_count.try_emplace(one.collectives.enqueued, Called{{}, one.still});
    at->second.shortest = std::min(at->second.shortest, one.still);
    at->second.calls[CallOf(*one.report)].push_back(one.rank);
  }
  for (const auto& [count, called] : by_count) {
    if (called.calls.size() < 2) continue;
    found.push_back(Judge(communicator, count, called.calls));
    found.back().standing = called.shortest;
  }
}

}  // namespace

std::vector<Mismatch> FindMismatches(const JobState& state) {
  std::map<uint64_t, std::vector<Standing>> standing;  // by communicator
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
      standing[c.now.id].push_back({Rank{r}, &c.now, collectives, still});
    }
  }
  std::vector<Mismatch> found;
  for (const auto& [communicator, ranks] : standing) {
    Compared compared = CompareByNumber(state, communicator, ranks);
    if (compared.found.has_value()) {
      found.push_back(*std::move(compared.found));
    } else if (!compared.known) {
      CompareByCounts(communicator, ranks, found);
    }
  }
  return found;
}

}  // namespace holdfast::monitor
