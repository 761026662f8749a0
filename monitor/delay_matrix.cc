#include "monitor/delay_matrix.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <utility>

#include "base/check.h"

namespace holdfast::monitor {
namespace {

constexpr double kShareOfAnEnd = 0.75;
constexpr double kWeightOfNow = 0.5;           // of this window in a cell's cost
constexpr double kDeviationOfNormal = 1.4826;  // standard deviations per median absolute deviation

struct EndCells {
  std::vector<uint32_t> slow;
  uint32_t all = 0;
};

double Median(std::vector<double>& values) {
  const auto middle = values.begin() + static_cast<ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

// What at least `kShareOfAnEnd` of `values`, which are not empty, reach.
double ReachedByMost(std::vector<double> values) {
  const auto below =
      static_cast<ptrdiff_t>((1 - kShareOfAnEnd) * static_cast<double>(values.size()));
  std::nth_element(values.begin(), values.begin() + below, values.end());
  return values[static_cast<size_t>(below)];
}

// The mean of the least `kShareOfAnEnd` of `values`, of one at least: single cells that are slow
// for reasons of their own do not count.
double MeanOfMost(std::vector<double> values) {
  const auto most = std::max(
      ptrdiff_t{1}, static_cast<ptrdiff_t>(kShareOfAnEnd * static_cast<double>(values.size())));
  std::sort(values.begin(), values.end());
  return std::accumulate(values.begin(), values.begin() + most, 0.0) / static_cast<double>(most);
}

// The cells of a row or column that are of one kind.
struct EndValues {
  std::vector<double> us_per_mib;
  std::vector<double> slowdown;  // against its own normal
  std::vector<double> cost;
  std::set<Rank> peers;
};

// One kind of cells.
class KindJudge {
 public:
  KindJudge(const std::vector<CellDelay>& all, std::vector<uint32_t> cells, const Thresholds& t)
      : all_(all), cells_(std::move(cells)), t_(t) {
    std::vector<double> delays;
    for (const uint32_t i : cells_) delays.push_back(all_[i].us_per_mib);
    spread_ = SpreadOf(std::move(delays));
  }

  double median() const { return spread_.median; }
  // The share of the window that the cell waits longer than its peers; may be negative.
  double CostOf(uint32_t i) const {
    return (all_[i].us_per_mib - spread_.median) * all_[i].mib_per_us;
  }
  bool IsSlow(uint32_t i) const {
    return cells_.size() > t_.peers_min && IsAbnormal(all_[i].us_per_mib, spread_, CostOf(i), t_) &&
           SlowdownOf(i) > t_.slow_ratio;
  }
  void JudgeEnds(std::map<std::pair<Rank, End>, bool>& ends) const {
    for (const End end : {End::kSender, End::kReceiver}) {
      std::map<Rank, EndValues> values;
      for (const uint32_t i : cells_) {
        const CellDelay& cell = all_[i];
        EndValues& one = values[end == End::kSender ? cell.from : cell.to];
        one.peers.insert(end == End::kSender ? cell.to : cell.from);
        one.us_per_mib.push_back(cell.us_per_mib);
        one.slowdown.push_back(SlowdownOf(i));
        one.cost.push_back(CostOf(i));
      }
      std::erase_if(values, [](const auto& entry) { return entry.second.peers.size() < 2; });
      if (values.size() <= t_.peers_min) continue;
      std::vector<double> means, reached;
      for (const auto& [rank, one] : values) {
        means.push_back(MeanOfMost(one.us_per_mib));
        reached.push_back(ReachedByMost(one.us_per_mib));
      }
      const Spread spread = SpreadOf(std::move(means));
      const double median_reached = SpreadOf(std::move(reached)).median;
      for (const auto& [rank, one] : values) {
        ends[{rank, end}] |=
            IsAbnormal(MeanOfMost(one.us_per_mib), spread, ReachedByMost(one.cost), t_) &&
            ReachedByMost(one.us_per_mib) > median_reached * t_.slow_ratio &&
            MeanOfMost(one.slowdown) > t_.slow_ratio;
      }
    }
  }

 private:
  double SlowdownOf(uint32_t i) const {
    const CellDelay& cell = all_[i];
    if (cell.normal_us_per_mib == 0) return std::numeric_limits<double>::infinity();
    return cell.us_per_mib / cell.normal_us_per_mib;
  }

  const std::vector<CellDelay>& all_;
  const std::vector<uint32_t> cells_;
  const Thresholds& t_;
  Spread spread_;
};

}  // namespace

WindowJudgement JudgeWindow(const std::vector<CellDelay>& cells, const Thresholds& thresholds) {
  WindowJudgement judgement;
  judgement.slow.resize(cells.size());
  judgement.peers_us_per_mib.resize(cells.size());
  judgement.cost.resize(cells.size());
  std::map<uint32_t, std::vector<uint32_t>> kinds;
  for (uint32_t i = 0; i < cells.size(); ++i) kinds[cells[i].kind].push_back(i);
  std::map<std::pair<Rank, End>, double> costliest;  // of what a rank sends, or receives
  for (const auto& [kind, members] : kinds) {
    const KindJudge judge(cells, members, thresholds);
    judge.JudgeEnds(judgement.ends);
    for (const uint32_t i : members) {
      judgement.peers_us_per_mib[i] = judge.median();
      judgement.slow[i] = judge.IsSlow(i);
      judgement.cost[i] =
          kWeightOfNow * judge.CostOf(i) + (1 - kWeightOfNow) * cells[i].recent_cost;
      for (const auto& key :
           {std::pair(cells[i].from, End::kSender), std::pair(cells[i].to, End::kReceiver)}) {
        double& cost = costliest[key];
        cost = std::max(cost, judgement.cost[i]);
      }
    }
  }
  const auto other_way_costs_more = [&](Rank rank, End end) {
    return costliest[{rank, end == End::kSender ? End::kReceiver : End::kSender}] >
           costliest[{rank, end}];
  };
  for (auto& [key, slow] : judgement.ends) {
    slow = slow && !other_way_costs_more(key.first, key.second);
  }
  const auto is_slow_end = [&](Rank rank, End end) {
    const auto found = judgement.ends.find({rank, end});
    return found != judgement.ends.end() && found->second;
  };
  for (uint32_t i = 0; i < cells.size(); ++i) {
    for (const auto& [rank, end] :
         {std::pair(cells[i].from, End::kSender), std::pair(cells[i].to, End::kReceiver)}) {
      if (is_slow_end(rank, end) || other_way_costs_more(rank, end)) judgement.slow[i] = false;
    }
  }
  return judgement;
}

std::vector<SlowEnd> LocateSlowEnds(const std::vector<MatrixCell>& cells) {
  std::map<std::pair<Rank, End>, EndCells> ends;
  for (uint32_t i = 0; i < cells.size(); ++i) {
    for (const auto& key :
         {std::pair(cells[i].from, End::kSender), std::pair(cells[i].to, End::kReceiver)}) {
      EndCells& end = ends[key];
      ++end.all;
      if (cells[i].slow) end.slow.push_back(i);
    }
  }
  std::vector<bool> explained(cells.size(), false);
  std::vector<SlowEnd> found;
  while (true) {
    const std::pair<const std::pair<Rank, End>, EndCells>* best = nullptr;
    uint32_t best_count = 1;  // one cell accuses no end
    for (const auto& entry : ends) {
      const EndCells& end = entry.second;
      const auto open = static_cast<uint32_t>(std::count_if(
          end.slow.begin(), end.slow.end(), [&](uint32_t i) { return !explained[i]; }));
      if (open > best_count && static_cast<double>(end.slow.size()) >= kShareOfAnEnd * end.all) {
        best = &entry;
        best_count = open;
      }
    }
    if (best == nullptr) break;
    const auto [rank, end] = best->first;
    SlowEnd slow;
    slow.fault = end == End::kSender ? FaultClass::kSenderEnd : FaultClass::kReceiverEnd;
    slow.scope = end == End::kSender ? Scope::kSenderNic : Scope::kReceiverNic;
    slow.suspect = {rank, rank};
    for (const uint32_t i : best->second.slow) {
      if (!explained[i]) slow.cells.push_back(i);
      explained[i] = true;
    }
    found.push_back(std::move(slow));
  }
  for (uint32_t i = 0; i < cells.size(); ++i) {
    if (!cells[i].slow || explained[i]) continue;
    const EndCells& sender = ends[{cells[i].from, End::kSender}];
    const EndCells& receiver = ends[{cells[i].to, End::kReceiver}];
    const bool sender_well = sender.slow.size() < sender.all;
    const bool receiver_well = receiver.slow.size() < receiver.all;
    SlowEnd slow;
    slow.fault = FaultClass::kLink;
    slow.scope = sender_well ? (receiver_well ? Scope::kPath : Scope::kReceiverNicOrPath)
                             : (receiver_well ? Scope::kSenderNicOrPath : Scope::kConnection);
    slow.suspect = {cells[i].from, cells[i].to};
    slow.cells = {i};
    found.push_back(std::move(slow));
  }
  return found;
}

Spread SpreadOf(std::vector<double> values) {
  CHECK(!values.empty());
  Spread spread;
  spread.count = values.size();
  spread.median = Median(values);
  for (double& value : values) value = std::abs(value - spread.median);
  spread.deviation = kDeviationOfNormal * Median(values);
  return spread;
}

bool IsAbnormal(double value, const Spread& peers, double cost, const Thresholds& t) {
  const double deviation = std::max(peers.deviation, t.deviation_floor * peers.median);
  const double deviations =
      peers.count >= t.many_peers ? t.slow_deviations_of_many : t.slow_deviations;
  return value > peers.median * t.slow_ratio && value > peers.median + deviations * deviation &&
         cost > t.slow_cost;
}

}  // namespace holdfast::monitor
