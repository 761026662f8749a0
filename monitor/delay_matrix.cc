#include "monitor/delay_matrix.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "base/check.h"

namespace holdfast::monitor {
namespace {

constexpr double kShareOfAnEnd = 0.75;
constexpr double kDeviationOfNormal = 1.4826;  // standard deviations per median absolute deviation

enum class End { kSender, kReceiver };

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

}  // namespace

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
  spread.median = Median(values);
  for (double& value : values) value = std::abs(value - spread.median);
  spread.deviation = kDeviationOfNormal * Median(values);
  return spread;
}

}  // namespace holdfast::monitor
