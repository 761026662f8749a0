#include "agent/monitor/node_aggregator.h"

#include <signal.h>
#include <sys/wait.h>

#include <algorithm>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>

#include "agent/monitor/grid.h"
#include "base/check.h"
#include "base/utf8.h"
#include "format/checkpoint_names.h"

namespace holdfast {
namespace {

using monitor::CommunicatorReport;
using monitor::ConnectionReport;
using monitor::NodeSummary;
using monitor::OperationCounts;
using monitor::RankReport;

std::string NodeNamed(const std::string& node) {
  return node.empty() || !IsUtf8(node) ? NodeAggregator::kUnnamed : node;
}

bool IsHooks(const MonitorBoards::Board& board) {
  return board.mapped->view().header->writer != abi::BoardWriter::kProfilerPlugin;
}

// The board of another process does not know which operation its connection serves: point to point
// it is taken for the newest with that peer, else for the oldest collective that is not over.
uint64_t AssumedOperation(const CommunicatorReport& communicator,
                          const std::vector<BoardReport::PeerCount>& peers,
                          const ConnectionReport& connection) {
  for (const BoardReport::PeerCount& count : peers) {
    if (count.peer == connection.peer && count.direction == connection.direction) {
      return count.enqueued;
    }
  }
  const OperationCounts collectives = monitor::Collectives(communicator);
  const uint64_t open = connection.state == monitor::WaitState::kNone ? 0 : 1;
  return std::min(collectives.enqueued, collectives.finished + open);
}

// The budget is one of 80 memberships in communicators; who has more may send more, to a limit.
size_t BudgetOf(const NodeSummary& summary) {
  constexpr size_t kMembershipBytes = monitor::kSummaryBytesBudget / 80;
  size_t memberships = 0;
  for (const RankReport& rank : summary.ranks) memberships += rank.communicators.size();
  return std::clamp(memberships * kMembershipBytes, monitor::kSummaryBytesBudget,
                    10 * monitor::kSummaryBytesBudget);
}

}  // namespace

NodeAggregator::NodeAggregator(MonitorBoards& boards, EventLoop& loop, const Clock& clock,
                               ActivityOf activity_of, uint64_t incarnation,
                               monitor::ReportSink& sink)
    : boards_(boards),
      loop_(loop),
      clock_(clock),
      activity_of_(std::move(activity_of)),
      incarnation_(incarnation),
      sink_(sink) {
  boards_.Listen([this] { Wake(); });
  if (!boards_.boards().empty()) Wake();
}

NodeAggregator::~NodeAggregator() {
  boards_.Listen({});
  if (timer_ != 0) loop_.CancelTimer(timer_);
}

void NodeAggregator::TakeExit(RankExit exit) {
  CHECK(exit.rank < kRanksOfJobMax && exit.world_size <= kRanksOfJobMax);
  exit.job = JobNamed(exit.job);
  exit.attempt_key = KeyNamed(exit.attempt_key);
  exit.node = NodeNamed(exit.node);
  if (exit.job == kUnnamed && exit.process_id != 0) {
    // One of several jobs without a name (MonitorBoards): which of them, its process tells.
    const auto found = std::find_if(processes_.begin(), processes_.end(), [&](const auto& entry) {
      const Process& process = *entry.second;
      return process.rank == exit.rank && std::get<0>(process.key).starts_with(kUnnamed) &&
             (process.process_id == exit.process_id || process.own_process_id == exit.process_id);
    });
    if (found != processes_.end()) exit.job = std::get<0>(found->second->key);
  }
  const absl::Duration now = clock_.Elapsed();
  const auto group = groups_.find(KeyOf(exit));
  if (group != groups_.end()) group->second.last_alive = now;
  exits_.Add(std::move(exit), ++serial_, now);
  Wake();
}

// ---- Time

void NodeAggregator::Wake() {
  if (timer_ != 0) return;
  last_look_ = clock_.Elapsed();
  due_ = NextOnGrid(last_look_, kLookEvery, kReportLead);
  report_due_ = NextOnGrid(last_look_, kReportEvery, kReportLead);
  late_ = absl::ZeroDuration();
  timer_ = loop_.RunAfter(due_ - last_look_, [this] { Look(); });
}

void NodeAggregator::Look() {
  timer_ = 0;
  const absl::Duration now = clock_.Elapsed();
  late_ = std::max(late_, now - due_);
  SyncBoards();
  const absl::Duration passed = now - std::exchange(last_look_, now);
  for (const auto& [id, process] : processes_) {
    if (!process->alive) continue;
    for (const Source& source : process->sources) {
      if (IsHooks(*source.board))
        process->sections.Sample(*source.board->mapped->view().header, passed);
    }
  }
  for (auto& [key, group] : groups_) SampleEngine(key, group, now);
  if (now >= report_due_) {
    Report();
    late_ = absl::ZeroDuration();
    report_due_ += kReportEvery;
    if (report_due_ <= now) report_due_ = NextOnGrid(now, kReportEvery, kReportLead);
  }
  if (processes_.empty() && groups_.empty() && exits_.entries().empty()) return;
  due_ += kLookEvery;
  if (due_ <= now) due_ = NextOnGrid(now, kLookEvery, kReportLead);
  timer_ = loop_.RunAfter(due_ - now, [this] { Look(); });
}

void NodeAggregator::SampleEngine(const GroupKey& key, Group& group, absl::Duration now) {
  Engine::Activity activity = activity_of_(std::get<0>(key), std::get<1>(key));
  group.attempt = std::max(group.attempt, activity.attempt);
  group.engine_paused |= group.engine_pause.Holds(activity, now);
  group.held = std::move(activity.held);
}

// ---- Boards and processes

void NodeAggregator::SyncBoards() {
  if (boards_.changes() == boards_changes_) return;
  boards_changes_ = boards_.changes();
  std::map<uint64_t, const MonitorBoards::Board*> here;
  for (const auto& board : boards_.boards()) here.emplace(board->id, board.get());
  for (auto at = processes_.begin(); at != processes_.end();) {
    Process& process = *at->second;
    std::erase_if(process.sources,
                  [&](const Source& source) { return !here.contains(source.board_id); });
    bool alive = false;
    for (Source& source : process.sources) {
      source.board = here.at(source.board_id);
      alive |= source.board->alive;
      process.died = std::max(process.died, source.board->died);
    }
    process.alive = alive;
    // By its first board; a dead process that was read has no sources any more.
    const auto first = here.find(at->first);
    if (first != here.end() && first->second->wait_status.has_value()) {
      process.wait_status = first->second->wait_status;
    }
    // What was read of a dead one goes on being told without its board.
    const bool lost = process.sources.empty() && !process.is_read_dead;
    at = lost ? processes_.erase(at) : std::next(at);
  }
  std::erase_if(known_boards_, [&](uint64_t id) { return !here.contains(id); });
  std::vector<const MonitorBoards::Board*> dead;
  for (const auto& [id, board] : here) {
    if (!known_boards_.insert(id).second) continue;
    if (board->alive) {
      Attach(*board);
    } else {
      dead.push_back(board);
    }
  }
  // Of processes that were dead when they were first seen (a former worker's, or one that died at
  // once) only those count whose attempt lives: nobody shall hear of an end of long ago.
  for (const MonitorBoards::Board* const board : dead) {
    if (HasLiving(KeyOf(board->offer))) Attach(*board);
  }
}

NodeAggregator::Process* NodeAggregator::FindLiving(const MonitorBoards::Board& board) {
  if (!board.alive) return nullptr;
  for (const auto& [id, process] : processes_) {
    if (!process->alive || process->process_id != board.offer.process_id) continue;
    // Without a number here, by all that it says of itself.
    const bool numbered = process->process_id != 0;
    const bool same = process->own_process_id == board.mapped->view().header->process_id &&
                      process->rank == board.offer.rank &&
                      std::get<0>(process->key) == JobNamed(board.offer.job);
    if (numbered || same) return process.get();
  }
  return nullptr;
}

void NodeAggregator::Attach(const MonitorBoards::Board& board) {
  const MonitorBoards::Offer& offer = board.offer;
  if (offer.rank >= kRanksOfJobMax) return;  // it names no rank
  const GroupKey key = KeyOf(offer);
  Source source{board.id, &board, BoardReader(board.mapped->view())};
  if (Process* const process = FindLiving(board); process != nullptr) {
    if (IsHooks(board)) {
      // A job that was opened is named better than the environment does.
      process->key = key;
      process->rank = offer.rank;
      process->sources.push_back(std::move(source));
    } else {
      process->sources.insert(process->sources.begin(), std::move(source));
    }
    return;
  }
  BeginAnew(key, offer.rank);
  auto process = std::make_unique<Process>();
  process->key = key;
  process->rank = offer.rank;
  process->process_id = offer.process_id;
  process->own_process_id = board.mapped->view().header->process_id;
  process->seen_serial = ++serial_;
  process->alive = board.alive;
  process->died = board.died;
  process->wait_status = board.wait_status;
  if (board.alive) {
    process->witness =
        std::make_unique<ProcessWitness>(offer.process.get(), process->own_process_id);
  }
  process->sources.push_back(std::move(source));
  processes_.emplace(board.id, std::move(process));
}

// A new run under the names of one that is over: a rank of it comes again, and nobody of it lives.
// What it left is not the new one's.
void NodeAggregator::BeginAnew(const GroupKey& key, uint32_t rank) {
  const auto group = groups_.find(key);
  if (group == groups_.end() || HasLiving(key) || !group->second.of.contains(rank)) return;
  std::erase_if(processes_, [&](const auto& entry) { return entry.second->key == key; });
  exits_.EraseIf([&](const Exits::Entry& entry) { return KeyOf(entry.exit) == key; });
  group->second.of.clear();
  ++group->second.incarnation;
  group->second.world_size = 0;
  group->second.attempt = Attempt{};
}

std::string NodeAggregator::JobNamed(const std::string& job) {
  return CheckJobName(job).ok() ? job : kUnnamed;
}

std::string NodeAggregator::KeyNamed(const std::string& key) {
  return IsUtf8(key) ? key : std::string();
}

NodeAggregator::GroupKey NodeAggregator::KeyOf(const MonitorBoards::Offer& offer) {
  return {JobNamed(offer.job), KeyNamed(offer.attempt_key), NodeNamed(offer.node)};
}

NodeAggregator::GroupKey NodeAggregator::KeyOf(const RankExit& exit) {
  return {exit.job, exit.attempt_key, exit.node};
}

bool NodeAggregator::HasLiving(const GroupKey& key) const {
  return std::any_of(processes_.begin(), processes_.end(), [&](const auto& entry) {
    return entry.second->alive && entry.second->key == key;
  });
}

NodeAggregator::Group* NodeAggregator::GroupOf(const GroupKey& key, absl::Duration now) {
  const auto found = groups_.find(key);
  if (found != groups_.end()) return &found->second;
  if (groups_.size() == kGroupsMax) return nullptr;
  Group& group = groups_[key];
  group.incarnation = incarnation_;
  group.last_alive = now;
  return &group;
}

// The process that counts, of each rank, in the order of ranks.
std::vector<NodeAggregator::Process*> NodeAggregator::Choose(const GroupKey& key, Group& group) {
  // Alive; with communicators; chosen before; died last; came first.
  using Merit = std::tuple<bool, bool, bool, absl::Duration, uint64_t>;
  struct Best {
    Merit merit;
    uint64_t id = 0;
    Process* process = nullptr;
  };
  std::map<uint32_t, Best> by_rank;
  for (const auto& [id, process] : processes_) {
    if (process->key != key) continue;
    const auto before = group.of.find(process->rank);
    const bool communicates =
        std::any_of(process->sources.begin(), process->sources.end(),
                    [](const Source& source) { return source.reader.HasCommunicators(); });
    const Merit merit{process->alive, process->alive && communicates,
                      process->alive && before != group.of.end() && before->second == id,
                      process->died, UINT64_MAX - id};
    Best& best = by_rank[process->rank];
    if (best.process == nullptr || merit > best.merit) best = {merit, id, process.get()};
  }
  std::vector<Process*> chosen;
  for (const auto& [rank, best] : by_rank) {
    const auto [before, first] = group.of.try_emplace(rank, best.id);
    if (!first && std::exchange(before->second, best.id) != best.id) ++group.incarnation;
    chosen.push_back(best.process);
  }
  return chosen;
}

// ---- Reports

void NodeAggregator::Report() {
  const absl::Duration now = clock_.Elapsed();
  size_t unreported = 0;
  for (const auto& [id, process] : processes_) {
    if (GroupOf(process->key, now) == nullptr) ++unreported;
  }
  for (const Exits::Entry& entry : exits_.entries()) {
    const RankExit& exit = entry.exit;
    if (HasProcess(exit)) continue;
    if (GroupOf(KeyOf(exit), now) == nullptr) ++unreported;
  }
  for (auto& [key, group] : groups_) unreported += ReportGroup(key, group, now);
  unreported_count_ = unreported;
  DropEnded(now);
}

// The total may fall by a call that is just ending, which is not told; by much more with a session
// that is a new one, of the same process.
void NodeAggregator::TakeHeld(const Group& group, RankReport& report) {
  const auto found = std::find_if(group.held.begin(), group.held.end(),
                                  [&](const auto& one) { return one.first == report.rank; });
  if (found == group.held.end()) return;
  const auto held_us = static_cast<uint64_t>(absl::ToInt64Microseconds(found->second));
  if (report.held_us.has_value() && held_us < *report.held_us / 2) report.held_us.reset();
  report.held_us = std::max(report.held_us.value_or(0), held_us);
}

bool NodeAggregator::HasProcess(const RankExit& exit) const {
  return std::any_of(processes_.begin(), processes_.end(), [&](const auto& entry) {
    const Process& process = *entry.second;
    return process.rank == exit.rank && std::get<0>(process.key) == exit.job &&
           std::get<1>(process.key) == exit.attempt_key;
  });
}

size_t NodeAggregator::ReportGroup(const GroupKey& key, Group& group, absl::Duration now) {
  std::vector<Process*> processes = Choose(key, group);
  size_t unreported = processes.size();
  if (processes.size() > monitor::kRanksMax) processes.resize(monitor::kRanksMax);
  unreported -= processes.size();
  NodeSummary summary;
  summary.attempt = group.attempt;
  summary.incarnation = group.incarnation;
  summary.sequence = ++group.sequence;
  summary.clock_us = static_cast<uint64_t>(absl::ToInt64Microseconds(now));
  summary.observer_gap_us = static_cast<uint64_t>(absl::ToInt64Microseconds(late_));
  summary.engine_paused = std::exchange(group.engine_paused, false);
  for (Process* const process : processes) {
    ReadProcess(*process, now);
    const ExitOutcome outcome = OutcomeOfProcess(*process, now);
    process->report.exit = outcome.kind;
    process->report.exit_value = outcome.value;
    TakeHeld(group, process->report);
    group.world_size = std::max(group.world_size, process->world_size);
    summary.ranks.push_back(process->report);
  }
  JoinForeign(processes, summary.ranks);
  for (const Exits::Entry& entry : exits_.entries()) {
    const RankExit& exit = entry.exit;
    if (KeyOf(exit) != key || HasProcess(exit)) continue;
    if (summary.ranks.size() == monitor::kRanksMax) {
      ++unreported;
      continue;
    }
    const ExitOutcome outcome = OutcomeOf(exit);
    RankReport& report = summary.ranks.emplace_back();
    report.rank = Rank{exit.rank};
    report.process = monitor::ProcessState::kGone;
    report.exit = outcome.kind;
    report.exit_value = outcome.value;
    group.world_size = std::max(group.world_size, exit.world_size);
  }
  if (HasLiving(key)) group.last_alive = now;
  group.rank_count = summary.ranks.size();
  if (summary.ranks.empty()) return unreported;  // its only process is named otherwise by now
  monitor::FitToBudget(summary, BudgetOf(summary));
  monitor::NodeReport report{std::get<0>(key), std::get<1>(key), group.world_size, std::get<2>(key),
                             monitor::EncodeSummary(summary)};
  group.report_bytes = report.summary.size();
  sink_.Deliver(std::move(report));
  return unreported;
}

void NodeAggregator::ReadProcess(Process& process, absl::Duration now) {
  if (process.is_read_dead) return;
  RankReport& report = process.report;
  report.rank = Rank{process.rank};
  ReadBoards(process);
  if (!process.alive) {
    report.process = monitor::ProcessState::kGone;
    process.is_read_dead = true;
    // All that there is to know is known; its place in /proc is a descriptor.
    process.sources.clear();
    process.witness.reset();
    return;
  }
  const ProcessTestimony testimony = process.witness->Look(process.proxy_threads, now);
  report.process = testimony.state;
  report.cpu_us = std::max(report.cpu_us, testimony.cpu_us);
  report.run_delay_us = testimony.run_delay_us;
}

void NodeAggregator::ReadBoards(Process& process) {
  RankReport& report = process.report;
  report.level = monitor::TelemetryLevel::kNone;
  report.drops = report.operation_us = 0;
  report.communicators.clear();
  report.sections.clear();
  process.tokens.clear();
  process.peers.clear();
  process.foreign.clear();
  process.proxy_threads.clear();
  for (Source& source : process.sources) {
    const abi::BoardHeader& header = *source.board->mapped->view().header;
    const TickInstant now = ticks_.Now(header);
    BoardReport found = source.reader.Read(now);
    report.level = std::max(report.level, found.level);
    report.drops += found.drops;
    report.operation_us += found.operation_us;
    for (size_t i = 0; i < found.communicators.size(); ++i) {
      const uint64_t id = found.communicators[i].id;
      const bool told =
          std::any_of(report.communicators.begin(), report.communicators.end(),
                      [&](const auto& communicator) { return communicator.id == id; });
      if (told || report.communicators.size() == monitor::kCommunicatorsMax) continue;
      report.communicators.push_back(std::move(found.communicators[i]));
      process.tokens.push_back(IsHooks(*source.board) ? 0 : found.tokens[i]);
      process.peers.push_back(std::move(found.peers[i]));
    }
    std::move(found.foreign.begin(), found.foreign.end(), std::back_inserter(process.foreign));
    process.proxy_threads.insert(process.proxy_threads.end(), found.proxy_threads.begin(),
                                 found.proxy_threads.end());
    if (IsHooks(*source.board)) report.sections = process.sections.Open(now);
    if (header.local_rank <= monitor::kLocalRankMax) report.local_rank = header.local_rank;
    if (header.world_size <= kRanksOfJobMax) {
      process.world_size = std::max(process.world_size, header.world_size);
    }
  }
  report.data_us = process.sections.data_us();
}

// Null: its starter has said nothing.
const Exits::Entry* NodeAggregator::ToldOf(const Process& process) const {
  return exits_.Find({std::get<0>(process.key), std::get<1>(process.key), process.rank,
                      process.process_id, process.own_process_id, process.seen_serial});
}

ExitOutcome NodeAggregator::OutcomeOfProcess(const Process& process, absl::Duration now) const {
  if (process.alive) return {monitor::ExitKind::kNone, 0};
  const Exits::Entry* const told = ToldOf(process);
  if (told != nullptr) return OutcomeOf(told->exit);
  if (!process.wait_status.has_value() || now - process.died < kToldWithin) {
    return {monitor::ExitKind::kUnknown, 0};
  }
  RankExit seen;
  seen.wait_status = *process.wait_status;
  seen.stopped = IsGivenUp(process);
  return OutcomeOf(seen);
}

// Whether it was killed as by a launcher that had told it to end before.
bool NodeAggregator::IsGivenUp(const Process& process) const {
  if (!WIFSIGNALED(*process.wait_status) || WTERMSIG(*process.wait_status) != SIGKILL) return false;
  return std::any_of(processes_.begin(), processes_.end(), [&](const auto& entry) {
    const Process& other = *entry.second;
    if (other.alive || other.died + kGivenUpAfter > process.died ||
        std::get<0>(other.key) != std::get<0>(process.key) ||
        std::get<1>(other.key) != std::get<1>(process.key)) {
      return false;
    }
    const Exits::Entry* const told = ToldOf(other);
    return told != nullptr ? told->exit.wait_status != 0 : other.wait_status.value_or(0) != 0;
  });
}

// Connections that a process serves for another one's communicator (PXN) belong to that one's rank.
void NodeAggregator::JoinForeign(const std::vector<Process*>& processes,
                                 std::vector<RankReport>& ranks) {
  for (const Process* const server : processes) {
    for (const BoardReport::Foreign& foreign : server->foreign) {
      for (size_t r = 0; r < processes.size(); ++r) {
        const std::vector<uint64_t>& tokens = processes[r]->tokens;
        const auto found = std::find(tokens.begin(), tokens.end(), foreign.token);
        if (found == tokens.end() || foreign.token == 0) continue;
        const size_t at = static_cast<size_t>(found - tokens.begin());
        CommunicatorReport& owner = ranks[r].communicators[at];
        bool open = false;
        for (ConnectionReport connection : foreign.connections) {
          if (connection.peer >= owner.size ||
              owner.connections.size() >= monitor::kConnectionsMax) {
            continue;
          }
          connection.operation = AssumedOperation(owner, processes[r]->peers[at], connection);
          open |= connection.state != monitor::WaitState::kNone;
          owner.connections.push_back(connection);
        }
        // The owner, who saw nothing of its operation, took it for over.
        const OperationCounts total = monitor::Total(owner);
        OperationCounts& last = owner.counts[static_cast<size_t>(owner.last_kind)];
        if (open && total.enqueued == total.finished && last.finished > 0) --last.finished;
        break;
      }
    }
  }
}

void NodeAggregator::DropEnded(absl::Duration now) {
  for (auto at = groups_.begin(); at != groups_.end();) {
    const GroupKey& key = at->first;
    const Group& group = at->second;
    if (HasLiving(key) || (group.rank_count > 0 && now - group.last_alive < kEndedAge)) {
      ++at;
      continue;
    }
    std::erase_if(processes_, [&](const auto& entry) { return entry.second->key == key; });
    at = groups_.erase(at);
  }
  exits_.EraseIf([&](const Exits::Entry& entry) {
    return now - entry.received >= kEndedAge && !HasProcess(entry.exit) &&
           !groups_.contains(KeyOf(entry.exit));
  });
}

std::string NodeAggregator::StatusJson() const {
  using nlohmann::json;
  json groups = json::array();
  for (const auto& [key, group] : groups_) {
    groups.push_back({{"job", std::get<0>(key)},
                      {"attempt_key", std::get<1>(key)},
                      {"node", std::get<2>(key)},
                      {"attempt", Value(group.attempt)},
                      {"world_size", group.world_size},
                      {"ranks", group.rank_count},
                      {"reports", group.sequence},
                      {"report_bytes", group.report_bytes}});
  }
  const json status = {{"groups", std::move(groups)}, {"not_reported", unreported_count_}};
  return status.dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace holdfast
