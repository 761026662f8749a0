#include "agent/save_cost.h"

#include <algorithm>
#include <iterator>

namespace holdfast {
namespace {

constexpr uint64_t kBefore = 1;
constexpr uint64_t kBehind = 2;

}  // namespace

void SaveCost::BeginAttempt() {
  reached_.clear();
  saves_.clear();
}

void SaveCost::Reached(uint64_t step, absl::Duration now) {
  if (!reached_.empty()) {
    const auto [last, last_at] = *reached_.rbegin();
    if (step <= last) return;
    if (step - last > kStepsMax) reached_.clear();
    for (uint64_t between = last + 1; !reached_.empty() && between < step; ++between) {
      reached_[between] = last_at + (now - last_at) * (static_cast<double>(between - last) /
                                                       static_cast<double>(step - last));
    }
  }
  reached_[step] = now;
  while (reached_.size() > kStepsMax) reached_.erase(reached_.begin());
  while (!saves_.empty() && saves_.begin()->first + kBehind < reached_.begin()->first) {
    saves_.erase(saves_.begin());
  }
  Measure();
}

void SaveCost::Due(uint64_t step) {
  saves_.try_emplace(step, State::kDue);
  if (saves_.size() > kStepsMax) saves_.erase(saves_.begin());
}

void SaveCost::Captured(uint64_t step) {
  Due(step);
  const auto save = saves_.find(step);
  if (save != saves_.end() && save->second == State::kDue) save->second = State::kCaptured;
  Measure();
}

bool SaveCost::IsNearSave(uint64_t step) const {
  const auto save = saves_.lower_bound(step - std::min(step, kBehind));
  return save != saves_.end() && save->first <= step;
}

void SaveCost::Measure() {
  const absl::Duration ordinary = step();
  if (ordinary == absl::ZeroDuration()) return;
  for (auto save = saves_.begin(); save != saves_.end(); ++save) {
    if (save->second != State::kCaptured || save->first < kBefore) continue;
    const auto from = reached_.find(save->first - kBefore);
    const auto to = reached_.find(save->first + kBehind);
    if (from == reached_.end() || to == reached_.end()) continue;
    save->second = State::kOver;
    // Where two saves meet it cannot be told what each of them took.
    constexpr uint64_t kApart = kBefore + kBehind;
    const auto next = std::next(save);
    const bool is_alone =
        (save == saves_.begin() || save->first - std::prev(save)->first >= kApart) &&
        (next == saves_.end() || next->first - save->first >= kApart);
    if (!is_alone) continue;
    excesses_.push_back(to->second - from->second - ordinary * static_cast<int64_t>(kApart));
    if (excesses_.size() > kSavesMax) excesses_.pop_front();
  }
}

absl::Duration SaveCost::stall() const {
  if (excesses_.empty()) return absl::ZeroDuration();
  absl::Duration sum;
  for (const absl::Duration excess : excesses_) sum += excess;
  return std::max(absl::ZeroDuration(), sum / static_cast<int64_t>(excesses_.size()));
}

absl::Duration SaveCost::step() const {
  std::vector<absl::Duration> ordinary;
  for (auto one = reached_.begin(); one != reached_.end(); ++one) {
    if (one == reached_.begin() || IsNearSave(one->first)) continue;
    ordinary.push_back(one->second - std::prev(one)->second);
  }
  if (ordinary.size() < kOrdinaryMin) return absl::ZeroDuration();
  const auto middle = ordinary.begin() + static_cast<ptrdiff_t>(ordinary.size() / 2);
  std::nth_element(ordinary.begin(), middle, ordinary.end());
  return *middle;
}

}  // namespace holdfast
