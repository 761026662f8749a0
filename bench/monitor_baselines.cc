#include "bench/monitor_baselines.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "monitor/delay_matrix.h"

namespace holdfast::monitor {
namespace {

constexpr absl::Duration kPoll = absl::Seconds(5);
constexpr int kPollsInARow = 3;

// The newest report of every rank.
class Newest {
 public:
  explicit Newest(const JobShape& shape)
      : reports_(shape.ranks.size()), seen_(shape.ranks.size()) {}
  void Take(const Snapshot& snapshot) {
    for (const NodeSummary& summary : snapshot.arrived) {
      if (summary.sequence <= sequence_[summary.node]) continue;
      sequence_[summary.node] = summary.sequence;
      for (const RankReport& report : summary.ranks) {
        reports_[Value(report.rank)] = report;
        seen_[Value(report.rank)] = true;
        for (const CommunicatorReport& c : report.communicators) {
          members_[c.id][c.index] = report.rank;
        }
      }
    }
  }
  const std::vector<RankReport>& reports() const { return reports_; }
  std::optional<Rank> Member(uint64_t communicator, uint32_t index) const {
    const auto& members = members_.at(communicator);
    const auto found = members.find(index);
    if (found == members.end()) return std::nullopt;
    return found->second;
  }

 private:
  std::vector<RankReport> reports_;
  std::vector<bool> seen_;
  std::map<uint32_t, uint64_t> sequence_;
  std::map<uint64_t, std::map<uint32_t, Rank>> members_;
};

// Alarms of a rule that is asked once a poll, and believed if it says the same several times.
class Polled : public Baseline {
 public:
  explicit Polled(const JobShape& shape) : newest_(shape) {}
  void Step(const Snapshot& snapshot) override {
    newest_.Take(snapshot);
    if (snapshot.elapsed < next_) return;
    next_ = snapshot.elapsed + kPoll;
    std::vector<Rank> suspects = Ask(snapshot.elapsed);
    times_ = !suspects.empty() && suspects == last_ ? times_ + 1 : 1;
    last_ = suspects;
    if (!suspects.empty() && times_ >= polls_needed_)
      alarms_.push_back({snapshot.elapsed, suspects});
  }
  std::optional<Alarm> First(absl::Duration from) const override {
    for (const Alarm& alarm : alarms_) {
      if (alarm.at > from) return alarm;
    }
    return std::nullopt;
  }

 protected:
  virtual std::vector<Rank> Ask(absl::Duration now) = 0;
  Newest newest_;
  int polls_needed_ = kPollsInARow;

 private:
  absl::Duration next_;
  std::vector<Rank> last_;
  int times_ = 0;
  std::vector<Alarm> alarms_;
};

class Watchdog final : public Baseline {
 public:
  explicit Watchdog(const JobShape& shape) : newest_(shape) {}
  std::string name() const override { return "watchdog 600 s"; }
  void Step(const Snapshot& snapshot) override {
    newest_.Take(snapshot);
    now_ = snapshot.elapsed;
  }
  std::optional<Alarm> First(absl::Duration) const override {
    uint64_t open_us = 0;
    for (const RankReport& report : newest_.reports()) {
      for (const CommunicatorReport& c : report.communicators)
        open_us = std::max(open_us, c.open_us);
    }
    // What is open for longer than any operation here takes would still be open after 600 s.
    const absl::Duration open = absl::Microseconds(static_cast<int64_t>(open_us));
    if (open < absl::Seconds(15)) return std::nullopt;
    return Alarm{now_ - open + absl::Seconds(600), {}};
  }

 private:
  Newest newest_;
  absl::Duration now_;
};

class Counts final : public Polled {
 public:
  using Polled::Polled;
  std::string name() const override { return "counts (RAS)"; }

 private:
  std::vector<Rank> Ask(absl::Duration) override {
    std::map<uint64_t, std::map<uint64_t, std::vector<Rank>>> by_count;
    std::vector<uint64_t> all;
    for (const RankReport& report : newest_.reports()) {
      for (const CommunicatorReport& c : report.communicators) {
        by_count[c.id][Collectives(c).enqueued].push_back(report.rank);
        all.push_back(Collectives(c).enqueued);
      }
    }
    const bool changed = std::exchange(before_, all) != all;
    std::vector<Rank> behind;
    for (const auto& [id, counts] : by_count) {
      if (counts.size() < 2) continue;
      behind.insert(behind.end(), counts.begin()->second.begin(), counts.begin()->second.end());
    }
    if (changed) return {};
    std::sort(behind.begin(), behind.end());
    behind.erase(std::unique(behind.begin(), behind.end()), behind.end());
    return behind;
  }
  std::vector<uint64_t> before_;
};

uint64_t Finished(const RankReport& report) {
  uint64_t finished = 0;
  for (const CommunicatorReport& c : report.communicators) finished += Total(c).finished;
  return finished;
}

class LargestZ final : public Polled {
 public:
  using Polled::Polled;
  std::string name() const override { return "largest z"; }

 private:
  std::vector<Rank> Ask(absl::Duration) override {
    std::vector<std::pair<double, Rank>> means;
    std::vector<std::pair<uint64_t, uint64_t>> now;
    for (const RankReport& report : newest_.reports()) {
      now.emplace_back(report.operation_us, Finished(report));
      if (now.size() > before_.size()) continue;
      const auto [time, count] = before_[now.size() - 1];
      if (now.back().second <= count) continue;
      means.emplace_back(static_cast<double>(now.back().first - time) /
                             static_cast<double>(now.back().second - count),
                         report.rank);
    }
    before_ = std::move(now);
    if (means.size() < 3) return {};
    double sum = 0, squares = 0;
    for (const auto& [mean, rank] : means) sum += mean;
    const double middle = sum / static_cast<double>(means.size());
    for (const auto& [mean, rank] : means) squares += (mean - middle) * (mean - middle);
    const double deviation = std::sqrt(squares / static_cast<double>(means.size()));
    const auto [largest, rank] = *std::max_element(means.begin(), means.end());
    if (deviation <= 0 || (largest - middle) / deviation < 2) return {};
    return {rank};
  }
  std::vector<std::pair<uint64_t, uint64_t>> before_;
};

class C4Rules final : public Polled {
 public:
  explicit C4Rules(const JobShape& shape) : Polled(shape) { polls_needed_ = 1; }
  std::string name() const override { return "C4 rules"; }

 private:
  std::vector<Rank> Ask(absl::Duration) override {
    std::vector<uint64_t> progress;
    bool open = false;
    for (const RankReport& report : newest_.reports()) {
      uint64_t sum = 0;
      for (const CommunicatorReport& c : report.communicators) {
        const OperationCounts total = Total(c);
        open |= total.enqueued > total.finished;
        sum += total.enqueued + total.finished;
        for (const ConnectionReport& connection : c.connections) sum += connection.bytes;
      }
      progress.push_back(sum);
    }
    still_ = progress == progress_ ? still_ + 1 : 0;
    progress_ = std::move(progress);
    if (open && still_ >= 2) return Hang();
    if (still_ > 0) return {};
    const std::vector<Rank> slow = Slow();
    same_ = !slow.empty() && slow == slow_ ? same_ + 1 : 1;
    slow_ = slow;
    return same_ >= kPollsInARow ? slow : std::vector<Rank>{};
  }

  std::vector<Rank> Hang() const {
    std::map<uint64_t, std::vector<std::pair<uint64_t, Rank>>> enqueued, steps;
    for (const RankReport& report : newest_.reports()) {
      for (const CommunicatorReport& c : report.communicators) {
        // Not point to point, which ranks call differently by right.
        const OperationCounts collectives = Collectives(c);
        enqueued[c.id].emplace_back(collectives.enqueued, report.rank);
        uint64_t done = 0;
        for (const ConnectionReport& connection : c.connections) done += connection.steps_done;
        if (Total(c).enqueued > Total(c).finished) steps[c.id].emplace_back(done, report.rank);
      }
    }
    for (auto* candidates : {&enqueued, &steps}) {
      for (auto& [id, ranks] : *candidates) {
        const auto [low, high] = std::minmax_element(ranks.begin(), ranks.end());
        if (ranks.size() > 1 && low->first < high->first) return {low->second};
      }
    }
    return {};
  }

  std::vector<Rank> Slow() {
    std::map<std::pair<Rank, Rank>, std::pair<uint64_t, uint64_t>> now;  // bytes, wait
    std::vector<uint64_t> waits;
    for (const RankReport& report : newest_.reports()) {
      uint64_t wait = 0;
      for (const CommunicatorReport& c : report.communicators) {
        for (const ConnectionReport& connection : c.connections) {
          const std::optional<Rank> peer = newest_.Member(c.id, connection.peer);
          if (connection.direction == Direction::kReceive) {
            wait += connection.wire_wait_us;
          } else if (peer.has_value()) {
            auto& [bytes, time] = now[{report.rank, *peer}];
            bytes += connection.bytes;
            time += connection.wire_wait_us;
          }
        }
      }
      waits.push_back(wait);
    }
    std::vector<MatrixCell> cells;
    std::vector<double> delays, waited;
    for (const auto& [pair, value] : now) {
      const auto before = cells_.find(pair);
      if (before == cells_.end() || value.first <= before->second.first) continue;
      cells.push_back({pair.first, pair.second, false});
      delays.push_back(static_cast<double>(value.second - before->second.second) /
                       static_cast<double>(value.first - before->second.first));
    }
    for (size_t r = 0; r < waits.size() && r < waits_.size(); ++r) {
      waited.push_back(static_cast<double>(waits[r] - std::min(waits[r], waits_[r])));
    }
    cells_ = std::move(now);
    waits_ = std::move(waits);
    if (!delays.empty()) {
      const double median = SpreadOf(delays).median;
      for (size_t i = 0; i < cells.size(); ++i) cells[i].slow = delays[i] > 1.5 * median;
      const std::vector<SlowEnd> ends = LocateSlowEnds(cells);
      if (!ends.empty()) return {ends[0].suspect.rank};
    }
    if (waited.empty()) return {};
    const auto least = std::min_element(waited.begin(), waited.end());
    if (*least >= SpreadOf(waited).median * 0.75) return {};
    return {Rank{static_cast<uint32_t>(least - waited.begin())}};
  }

  std::vector<uint64_t> progress_, waits_;
  std::map<std::pair<Rank, Rank>, std::pair<uint64_t, uint64_t>> cells_;
  int still_ = 0, same_ = 0;
  std::vector<Rank> slow_;
};

}  // namespace

std::vector<std::unique_ptr<Baseline>> MakeBaselines(const JobShape& shape) {
  std::vector<std::unique_ptr<Baseline>> all;
  all.push_back(std::make_unique<Watchdog>(shape));
  all.push_back(std::make_unique<Counts>(shape));
  all.push_back(std::make_unique<LargestZ>(shape));
  all.push_back(std::make_unique<C4Rules>(shape));
  return all;
}

}  // namespace holdfast::monitor
