#include "monitor/slow.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace holdfast::monitor {
namespace {

constexpr uint64_t kOperationsPerWindowMin = 4;
constexpr int kWindowStretchMax = 12;
constexpr double kImbalanceRatio = 1.15;
constexpr double kMib = 1 << 20;

const CommunicatorReport* FindReport(const std::vector<CommunicatorReport>& reports, size_t hint,
                                     uint64_t id) {
  if (hint < reports.size() && reports[hint].id == id) return &reports[hint];
  const auto found = std::find_if(reports.begin(), reports.end(),
                                  [&](const CommunicatorReport& r) { return r.id == id; });
  return found == reports.end() ? nullptr : &*found;
}

bool SameConnection(const ConnectionReport& a, const ConnectionReport& b) {
  return a.peer == b.peer && a.direction == b.direction && a.channels == b.channels &&
         (a.channels > 1 || a.channel == b.channel);
}

const ConnectionReport* FindConnection(const CommunicatorReport& report, size_t hint,
                                       const ConnectionReport& like) {
  const auto& all = report.connections;
  if (hint < all.size() && SameConnection(all[hint], like)) return &all[hint];
  const auto found = std::find_if(
      all.begin(), all.end(), [&](const ConnectionReport& c) { return SameConnection(c, like); });
  return found == all.end() ? nullptr : &*found;
}

uint64_t FinishedOf(const RankTrack& track) {
  uint64_t finished = 0;
  for (const CommunicatorTrack& c : track.communicators) finished += Total(c.now).finished;
  return finished;
}

int Percent(double share) { return static_cast<int>(share * 100 + 0.5); }

}  // namespace

void Persistence::Add(bool abnormal, const Thresholds& thresholds) {
  history_ = history_ << 1 | (abnormal ? 1 : 0);
  history_ &= (uint32_t{1} << thresholds.window_memory) - 1;
  calm_ = abnormal ? 0 : calm_ + 1;
  if (calm_ >= thresholds.windows_to_clear) raised_ = lasting_ = false;
}

void Persistence::Judge(const std::vector<Persistence*>& peers, const Thresholds& t) {
  // Of those that are abnormal seldom; who is so in half of the windows has a cause of its own.
  uint32_t sporadic = 0, sporadic_peers = 0;
  const auto is_sporadic = [&](const Persistence& p) {
    return 2 * p.abnormal_windows() < t.window_memory;
  };
  for (const Persistence* peer : peers) {
    if (!is_sporadic(*peer)) continue;
    sporadic += peer->abnormal_windows();
    ++sporadic_peers;
  }
  const double share =
      sporadic_peers == 0 ? 0 : static_cast<double>(sporadic) / (sporadic_peers * t.window_memory);
  for (Persistence* peer : peers) {
    const uint32_t count = peer->abnormal_windows();
    if (count == 0 || ChanceOf(count, t.window_memory, share) > t.chance_max) continue;
    if (count >= t.windows_for_suspicion) peer->raised_ = true;
    if (count >= t.windows_for_verdict) peer->lasting_ = true;
  }
}

double ChanceOf(uint32_t least, uint32_t count, double share) {
  double sum = 0, ways = 1;
  for (uint32_t k = 0; k <= count; ++k) {
    if (k >= least) sum += ways * std::pow(share, k) * std::pow(1 - share, count - k);
    ways = ways * (count - k) / (k + 1);
  }
  return sum;
}

uint32_t Persistence::abnormal_windows() const {
  return static_cast<uint32_t>(std::popcount(history_));
}

bool SlowSearch::RankSlowness::IsByData(const Thresholds& thresholds) const {
  const uint32_t remembered = (uint32_t{1} << thresholds.window_memory) - 1;
  return 2 * static_cast<uint32_t>(std::popcount(by_data & remembered)) > late.abnormal_windows();
}

SlowSearch::SlowSearch(const JobState& state)
    : windows_(state.ranks().size()), ranks_(state.ranks().size()) {}

void SlowSearch::Look(const JobState& state, Candidates& out) {
  for (uint32_t r = 0; r < windows_.size(); ++r) {
    const RankTrack& track = state.ranks()[r];
    if (!track.seen || track.IsBlind()) continue;
    RankWindow& window = windows_[r];
    if (!window.begun) Begin(state, Rank{r});
    const std::optional<uint64_t>& held_us = track.report.held_us;
    const bool begins_anew = held_us.has_value() != window.held_us.has_value() ||
                             held_us.value_or(0) < window.held_us.value_or(0);
    window.spoilt |= track.InUntoldPause() || track.observer_late || begins_anew;
  }
  if (IsDue(state)) {
    Close(state);
    window_begun_ = state.now();
    for (uint32_t r = 0; r < windows_.size(); ++r) windows_[r].begun = false;
  }
  out.found.insert(out.found.end(), current_.found.begin(), current_.found.end());
  out.notes.insert(out.notes.end(), current_.notes.begin(), current_.notes.end());
}

void SlowSearch::Begin(const JobState& state, Rank rank) {
  const RankTrack& track = state.ranks()[Value(rank)];
  RankWindow window;
  window.begun = true;
  window.clock_us = track.clock_us;
  window.operation_us = track.report.operation_us;
  window.run_delay_us = track.report.run_delay_us;
  window.data_us = track.report.data_us;
  window.held_us = track.report.held_us;
  window.finished = FinishedOf(track);
  for (const CommunicatorTrack& c : track.communicators) window.communicators.push_back(c.now);
  windows_[Value(rank)] = std::move(window);
}

// Long steps stretch the window until it holds several operations of most ranks.
bool SlowSearch::IsDue(const JobState& state) const {
  const absl::Duration length = state.now() - window_begun_;
  if (length < state.thresholds().window) return false;
  if (length >= state.thresholds().window * kWindowStretchMax) return true;
  std::vector<double> finished;
  for (uint32_t r = 0; r < windows_.size(); ++r) {
    if (!windows_[r].begun) continue;
    finished.push_back(static_cast<double>(FinishedOf(state.ranks()[r]) - windows_[r].finished));
  }
  return !finished.empty() &&
         SpreadOf(std::move(finished)).median >= static_cast<double>(kOperationsPerWindowMin);
}

bool SlowSearch::IsWhole(const JobState& state, Rank rank) const {
  const RankWindow& window = windows_[Value(rank)];
  const RankTrack& track = state.ranks()[Value(rank)];
  if (!window.begun || window.spoilt || state.Age(rank) > state.thresholds().stale) return false;
  const auto half = absl::ToInt64Microseconds(state.thresholds().window) / 2;
  return track.clock_us >= window.clock_us + static_cast<uint64_t>(half) &&
         FinishedOf(track) > window.finished;
}

void SlowSearch::Close(const JobState& state) {
  MeasureCells(state);
  MeasureRanks(state);
  Report(state);
}

void SlowSearch::JudgeRanks(const Thresholds& t, const std::vector<Shares>& group, double* median) {
  std::vector<double> shares;
  for (const Shares& one : group) shares.push_back(one.outside);
  const Spread spread = SpreadOf(std::move(shares));
  *median = spread.median;
  std::vector<Persistence*> peers;
  for (const Shares& one : group) {
    RankSlowness& slowness = ranks_[Value(one.rank)];
    peers.push_back(&slowness.late);
    const double excess = one.outside - spread.median;
    // Who is late because all that it sends or receives is slow is told by that.
    const bool late = IsAbnormal(one.outside, spread, excess, t) && !slow_now_.contains(one.rank);
    slowness.late.Add(late, t);
    const bool by_data = late && one.data > excess / 2;
    slowness.by_data = slowness.by_data << 1 | (by_data ? 1 : 0);
    if (!late) continue;
    slowness.share = one.outside;
    slowness.peers_share = spread.median;
  }
  Persistence::Judge(peers, t);
}

void SlowSearch::MeasureRanks(const JobState& state) {
  const Thresholds& t = state.thresholds();
  std::map<std::pair<uint32_t, uint32_t>, std::vector<Shares>> groups;
  std::vector<Persistence*> all;
  for (uint32_t r = 0; r < windows_.size(); ++r) {
    if (!IsWhole(state, Rank{r})) continue;
    const RankWindow& window = windows_[r];
    const RankReport& now = state.ranks()[r].report;
    const auto elapsed = static_cast<double>(state.ranks()[r].clock_us - window.clock_us);
    const auto share = [&](uint64_t before, uint64_t after) {
      return std::clamp(static_cast<double>(after - before) / elapsed, 0.0, 1.0);
    };
    ranks_[r].run_delay_share = share(window.run_delay_us, now.run_delay_us);
    ranks_[r].starved.Add(ranks_[r].run_delay_share > t.starved_share, t);
    all.push_back(&ranks_[r].starved);
    const RankPlace& place = state.shape().ranks[r];
    // In its operations, or held up by ourselves.
    const uint64_t busy_before = window.operation_us + window.held_us.value_or(0);
    const uint64_t busy_now = now.operation_us + now.held_us.value_or(0);
    groups[{place.stage, place.tensor_position}].push_back(
        {Rank{r}, 1 - share(busy_before, busy_now), share(window.data_us, now.data_us)});
  }
  Persistence::Judge(all, t);
  current_.notes.clear();
  std::vector<double> medians;
  std::vector<Rank> firsts;
  for (const auto& [key, group] : groups) {
    if (group.size() <= t.peers_min) continue;
    firsts.push_back(group.front().rank);
    JudgeRanks(t, group, &medians.emplace_back());
  }
  if (medians.size() < 2) return;
  const double middle = SpreadOf(medians).median;
  for (size_t i = 0; i < medians.size(); ++i) {
    if (medians[i] <= middle * kImbalanceRatio || medians[i] - middle <= t.slow_cost) continue;
    const RankPlace& place = state.shape().ranks[Value(firsts[i])];
    current_.notes.push_back(
        {WaitNote::Reason::kImbalance, firsts[i],
         absl::StrFormat(
             "Stage %d, tensor position %d computes for %d%% of the time and the others "
             "for %d%%: an imbalance of the program.",
             place.stage, place.tensor_position, Percent(medians[i]), Percent(middle))});
  }
}

// What is left of the matrix once communicators are gone.
void SlowSearch::ForgetCells(const JobState& state) {
  const size_t gone = std::erase_if(cells_, [&](const auto& entry) {
    return !state.communicators().contains(entry.second.communicator);
  });
  if (gone == 0) return;
  std::map<std::pair<Rank, End>, std::set<Rank>> peers;
  for (const auto& [key, cell] : cells_) {
    peers[{cell.from, End::kSender}].insert(cell.to);
    peers[{cell.to, End::kReceiver}].insert(cell.from);
  }
  std::erase_if(ends_, [&](const auto& entry) { return peers[entry.first].size() < 2; });
}

void SlowSearch::MeasureCells(const JobState& state) {
  ForgetCells(state);
  const Thresholds& t = state.thresholds();
  struct Sum {
    uint64_t bytes = 0;
    uint64_t wait_us = 0;
    uint64_t elapsed_us = 0;
  };
  std::map<std::tuple<uint64_t, Rank, Rank>, Sum> sums;
  for (uint32_t r = 0; r < windows_.size(); ++r) {
    if (!IsWhole(state, Rank{r})) continue;
    const RankTrack& track = state.ranks()[r];
    for (size_t i = 0; i < track.communicators.size(); ++i) {
      const CommunicatorReport& now = track.communicators[i].now;
      const CommunicatorReport* then = FindReport(windows_[r].communicators, i, now.id);
      if (then == nullptr) continue;
      const std::vector<int64_t>& members = state.communicators().at(now.id).members;
      for (size_t k = 0; k < now.connections.size(); ++k) {
        const ConnectionReport& c = now.connections[k];
        if (c.direction != Direction::kSend || c.peer >= members.size() || members[c.peer] < 0) {
          continue;
        }
        const Rank to{static_cast<uint32_t>(members[c.peer])};
        if (state.shape().ranks[r].node == state.shape().ranks[Value(to)].node) continue;
        const ConnectionReport* before = FindConnection(*then, k, c);
        if (before == nullptr || before->bytes > c.bytes) continue;
        Sum& sum = sums[{now.id, Rank{r}, to}];
        sum.bytes += c.bytes - before->bytes;
        sum.wait_us += c.wire_wait_us - std::min(c.wire_wait_us, before->wire_wait_us);
        sum.elapsed_us = track.clock_us - windows_[r].clock_us;
      }
    }
  }
  std::vector<Measured> measured;
  const std::map<uint64_t, int> size_classes = SizeClasses(state);
  for (const auto& [key, sum] : sums) {
    if (sum.bytes < t.connection_bytes_min ||
        absl::Microseconds(static_cast<int64_t>(sum.wait_us)) < t.connection_wait_min) {
      continue;
    }
    DelayCell& cell = cells_[key];
    std::tie(cell.communicator, cell.from, cell.to) = key;
    const double mib = static_cast<double>(sum.bytes) / kMib;
    cell.us_per_mib = static_cast<double>(sum.wait_us) / mib;
    measured.push_back(
        {&cell, mib / static_cast<double>(sum.elapsed_us), size_classes.at(cell.communicator)});
  }
  JudgeCells(state, measured);
}

// Small messages pay the latency more often: communicators are compared with those whose operations
// move about as much (within a factor of 4).
std::map<uint64_t, int> SlowSearch::SizeClasses(const JobState& state) const {
  std::map<uint64_t, std::pair<double, double>> totals;  // bytes, operations
  for (uint32_t r = 0; r < windows_.size(); ++r) {
    if (!windows_[r].begun) continue;
    const RankTrack& track = state.ranks()[r];
    for (size_t i = 0; i < track.communicators.size(); ++i) {
      const CommunicatorReport& now = track.communicators[i].now;
      const CommunicatorReport* then = FindReport(windows_[r].communicators, i, now.id);
      if (then == nullptr) continue;
      auto& [bytes, operations] = totals[now.id];
      operations += static_cast<double>(Total(now).finished - Total(*then).finished);
      for (size_t k = 0; k < now.connections.size(); ++k) {
        const ConnectionReport* before = FindConnection(*then, k, now.connections[k]);
        if (before == nullptr || before->bytes > now.connections[k].bytes) continue;
        bytes += static_cast<double>(now.connections[k].bytes - before->bytes);
      }
    }
  }
  std::map<uint64_t, int> classes;
  for (const auto& [id, total] : totals) {
    classes[id] =
        static_cast<int>(std::lround(std::log2(1 + total.first / (1 + total.second)) / 2));
  }
  return classes;
}

void SlowSearch::JudgeCells(const JobState& state, const std::vector<Measured>& measured) {
  const Thresholds& t = state.thresholds();
  std::map<Kind, uint32_t> kinds;
  std::vector<CellDelay> delays;
  for (const Measured& one : measured) {
    const RankPlace& from = state.shape().ranks[Value(one.cell->from)];
    const RankPlace& to = state.shape().ranks[Value(one.cell->to)];
    const Kind kind{state.communicators().at(one.cell->communicator).size,
                    one.size_class,
                    from.leaf == to.leaf,
                    from.rail,
                    std::min(from.nic_class, to.nic_class),
                    std::max(from.nic_class, to.nic_class)};
    // Who is always slow may have a slower kind of NIC, if nobody told us the kinds.
    const double normal = state.shape().topology_known ? 0
                          : one.cell->windows < t.baseline_windows
                              ? std::numeric_limits<double>::infinity()
                              : one.cell->baseline_us_per_mib;
    delays.push_back({one.cell->from, one.cell->to,
                      kinds.try_emplace(kind, static_cast<uint32_t>(kinds.size())).first->second,
                      one.cell->us_per_mib, one.mib_per_us, normal, one.cell->cost});
  }
  const WindowJudgement judged = JudgeWindow(delays, t);
  std::map<uint32_t, std::vector<Persistence*>> peers;
  for (size_t i = 0; i < measured.size(); ++i) {
    DelayCell& cell = *measured[i].cell;
    cell.peers_us_per_mib = judged.peers_us_per_mib[i];
    cell.cost = judged.cost[i];
    if (cell.windows < t.baseline_windows) {
      cell.baseline_us_per_mib =
          (cell.baseline_us_per_mib * cell.windows + cell.us_per_mib) / (cell.windows + 1);
    }
    ++cell.windows;
    cell.persistence.Add(judged.slow[i], t);
    peers[delays[i].kind].push_back(&cell.persistence);
  }
  for (const auto& [kind, all] : peers) Persistence::Judge(all, t);
  slow_now_.clear();
  std::vector<Persistence*> end_peers;
  for (const auto& [end, slow] : judged.ends) {
    ends_[end].Add(slow, t);
    end_peers.push_back(&ends_[end]);
    if (slow) slow_now_.insert(end.first);
  }
  Persistence::Judge(end_peers, t);
}

void SlowSearch::Report(const JobState& state) {
  current_.found.clear();
  ReportRanks(state);
  ReportCells(state);
}

void SlowSearch::ReportRanks(const JobState& state) {
  for (uint32_t r = 0; r < ranks_.size(); ++r) {
    const RankSlowness& slowness = ranks_[r];
    const bool by_data = slowness.IsByData(state.thresholds());
    const bool starved = slowness.starved.raised();
    if (!starved && !slowness.late.raised()) continue;
    const Persistence& persistence = starved ? slowness.starved : slowness.late;
    const std::string name = RankName(state, Rank{r});
    Finding finding;
    finding.grade = persistence.lasting() ? Grade::kVerdict : Grade::kSuspicion;
    finding.suspects = {{Rank{r}, Rank{r}}};
    finding.confidence = 0.85;
    if (starved) {
      finding.syndrome = Syndrome::kCommunicationSlow;
      finding.fault = FaultClass::kStarvedProxy;
      finding.scope = Scope::kHost;
      finding.sentence = absl::StrFormat(
          "The proxy threads of %s wait for a CPU %d%% of the time, and slow all down.", name,
          Percent(slowness.run_delay_share));
      finding.changes_mind = "The same delay on all nodes: then it is how the job is set up.";
    } else {
      finding.syndrome = Syndrome::kNonCommunicationSlow;
      finding.fault = by_data ? FaultClass::kLateData : FaultClass::kLateCompute;
      finding.scope = Scope::kRankLate;
      finding.sentence = absl::StrFormat(
          "%s comes late to its collectives: it spends %d%% of the time outside of them, its peers "
          "%d%%%s.",
          name, Percent(slowness.share), Percent(slowness.peers_share),
          by_data ? ", and waits for its data" : "");
      finding.changes_mind =
          "Clocks, throttling or an Xid would make it the GPU; more work given to it, the program.";
    }
    finding.evidence = {absl::StrFormat("abnormal in %d of the last %d windows",
                                        persistence.abnormal_windows(),
                                        state.thresholds().window_memory)};
    current_.found.push_back({absl::StrCat("slow:", r), std::move(finding)});
  }
}

const Persistence* SlowSearch::RaisedEnd(Rank rank, End end) const {
  const auto found = ends_.find({rank, end});
  return found != ends_.end() && found->second.raised() ? &found->second : nullptr;
}

// Each pair once, and of each the cell that was abnormal most often. By communicator kind does not
// matter here: an end is slow for all that goes through it.
std::vector<MatrixCell> SlowSearch::Matrix(std::vector<const DelayCell*>& worst) const {
  std::vector<MatrixCell> matrix;
  std::map<std::pair<Rank, Rank>, size_t> places;
  for (const auto& [key, cell] : cells_) {
    const auto [at, first] = places.try_emplace({cell.from, cell.to}, matrix.size());
    if (first) {
      matrix.push_back({cell.from, cell.to, false});
      worst.push_back(&cell);
    }
    // Once one is raised, its neighbours need less: else a row would begin as a point.
    matrix[at->second].slow |= cell.persistence.raised() ||
                               cell.persistence.abnormal_windows() >= 2 ||
                               RaisedEnd(cell.from, End::kSender) != nullptr ||
                               RaisedEnd(cell.to, End::kReceiver) != nullptr;
    if (cell.persistence.abnormal_windows() > worst[at->second]->persistence.abnormal_windows()) {
      worst[at->second] = &cell;
    }
  }
  return matrix;
}

void SlowSearch::ReportCells(const JobState& state) {
  bool any = false;
  for (const auto& [key, cell] : cells_) any |= cell.persistence.raised();
  for (const auto& [key, end] : ends_) any |= end.raised();
  if (!any) return;
  std::vector<const DelayCell*> worst;
  const std::vector<MatrixCell> matrix = Matrix(worst);
  for (const SlowEnd& end : LocateSlowEnds(matrix)) {
    const DelayCell* cell = worst[end.cells.front()];
    bool lasting = false, raised = false;
    uint32_t windows = 0;
    const auto take = [&](const Persistence& persistence) {
      lasting |= persistence.lasting();
      raised |= persistence.raised();
      windows = std::max(windows, persistence.abnormal_windows());
    };
    for (const uint32_t i : end.cells) {
      take(worst[i]->persistence);
      if (worst[i]->us_per_mib > cell->us_per_mib) cell = worst[i];
    }
    if (end.fault != FaultClass::kLink) {
      const End which = end.fault == FaultClass::kSenderEnd ? End::kSender : End::kReceiver;
      if (const Persistence* whole = RaisedEnd(end.suspect.rank, which)) take(*whole);
    }
    // Who gets no CPU is late at both ends of all its connections: that is told already.
    const bool starved = ranks_[Value(end.suspect.rank)].starved.raised() ||
                         ranks_[Value(end.suspect.peer)].starved.raised();
    if (!raised || starved) continue;
    const std::string from = RankName(state, end.suspect.rank);
    const std::string to = RankName(state, end.suspect.peer);
    Finding finding;
    finding.grade = lasting ? Grade::kVerdict : Grade::kSuspicion;
    finding.syndrome = Syndrome::kCommunicationSlow;
    finding.fault = end.fault;
    finding.scope = end.scope;
    finding.suspects = {end.suspect};
    finding.confidence = end.scope == Scope::kConnection ? 0.7 : 0.85;
    const std::string figures = absl::StrFormat("%.0f us/MiB where the median is %.0f",
                                                cell->us_per_mib, cell->peers_us_per_mib);
    const std::string who =
        end.fault == FaultClass::kSenderEnd ? absl::StrCat("All that ", from, " sends is slow: ")
        : end.fault == FaultClass::kReceiverEnd
            ? absl::StrCat("All that ", from, " receives is slow: ")
            : absl::StrCat("The connection from ", from, " to ", to, " is slow: ");
    const std::string nics = NicsName(state, end.scope, end.suspect);
    finding.sentence = absl::StrFormat("%s%s (%s; %s).", who, figures, Name(end.scope),
                                       nics.empty() ? "NIC unknown" : nics);
    finding.evidence = {absl::StrFormat("%d slow cells of the delay matrix; abnormal in %d windows",
                                        end.cells.size(), windows)};
    if (!nics.empty()) finding.evidence.push_back(PortsText(state, end.scope, end.suspect));
    finding.changes_mind = "A second ring of another order, or all-to-all: it fills more cells.";
    const std::string key =
        end.fault == FaultClass::kLink
            ? absl::StrCat("slow:", Value(end.suspect.rank), ">", Value(end.suspect.peer))
            : absl::StrCat("slow:", Value(end.suspect.rank));
    current_.found.push_back({key, std::move(finding)});
  }
}

}  // namespace holdfast::monitor
