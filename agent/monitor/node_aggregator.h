// What the processes of this node show, once a second, as one report per attempt and node name
// (monitor/summary.h): boards, /proc, and what their starters say of their ends.
//
//   every 100 ms   the sections of every process, and what the engine does for its attempt
//   every second   counters and connections of every board, the kernel's word on every process;
//                  one report per (job, attempt key, node name) to the sink
//
// (Counters and connections need no samples in between: the board itself says since when each
// stands as it does, and how long it waited for what.) Nothing runs while there is no board.
//
// One agent may serve ranks of several node names (network namespaces). The boards of one process
// (NCCL's plugin and the hook API have one each) are one rank. Of several living processes with one
// rank the first that has communicators counts; a dead one counts until there is another.
//
// A dead process is reported as it was last seen, as long as a process of its attempt lives on this
// node and for kEndedAge after. (What its starter said of its end is lost with this worker; what
// the kernel says is not.) A process that takes a rank over begins a new incarnation of the
// report, since its totals begin anew.
//
// It judges nothing (monitor/), and asks no wall clock.
#ifndef HOLDFAST_AGENT_MONITOR_NODE_AGGREGATOR_H_
#define HOLDFAST_AGENT_MONITOR_NODE_AGGREGATOR_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "absl/time/time.h"
#include "agent/monitor/board_reader.h"
#include "agent/monitor/boards.h"
#include "agent/monitor/engine_pause.h"
#include "agent/monitor/exits.h"
#include "agent/monitor/process_witness.h"
#include "agent/monitor/sections.h"
#include "base/clock.h"
#include "base/executor.h"
#include "base/ids.h"
#include "checkpoint/engine.h"
#include "monitor/node_report.h"
#include "monitor/summary.h"

namespace holdfast {

// Threads: the event loop's.
// Lifetime: boards, loop, clock and sink outlive it.
class NodeAggregator {
 public:
  static constexpr absl::Duration kLookEvery = absl::Milliseconds(100);
  static constexpr absl::Duration kReportEvery = absl::Seconds(1);
  // Whoever started a process has the first word on how it ended: what the kernel says counts only
  // after so long.
  static constexpr absl::Duration kToldWithin = absl::Milliseconds(500);
  // Launchers kill who does not heed their TERM: a KILL so long after an end of the same attempt
  // that was not clean counts as theirs, if nobody has told more of it. (torchrun and Slurm wait
  // for 30 s.)
  static constexpr absl::Duration kGivenUpAfter = absl::Seconds(5);
  // How long an attempt is reported whose last process on this node has ended.
  static constexpr absl::Duration kEndedAge = absl::Seconds(60);
  // Attempts and node names at once; what comes beyond is not reported (unreported_count()).
  static constexpr size_t kGroupsMax = 64;
  // Greater ranks and world sizes are not believed.
  static constexpr uint32_t kRanksOfJobMax = RankExit::kRanksMax;
  // Of processes that name no job, or one whose name is none ([A-Za-z0-9._-], no leading dot).
  static constexpr char kUnnamed[] = "unnamed";

  // How reports name the job and the attempt key that a process has given.
  static std::string JobNamed(const std::string& job);
  static std::string KeyNamed(const std::string& key);

  // What the checkpoint engine does for an attempt.
  using ActivityOf =
      std::function<Engine::Activity(const std::string& job, const std::string& key)>;

  // `incarnation`: greater than that of the agent's worker before this one. Each process that takes
  // over a rank adds 1.
  NodeAggregator(MonitorBoards& boards, EventLoop& loop, const Clock& clock, ActivityOf activity_of,
                 uint64_t incarnation, monitor::ReportSink& sink);
  ~NodeAggregator();
  NodeAggregator(const NodeAggregator&) = delete;
  NodeAggregator& operator=(const NodeAggregator&) = delete;

  // A rank has ended, as its starter says. Also of ranks that show no board: they are reported by
  // this alone.
  void TakeExit(RankExit exit);

  // Ranks, attempts and node names beyond the limits, in the last reports.
  size_t unreported_count() const { return unreported_count_; }
  // One object: docs/MONITOR.md.
  std::string StatusJson() const;

 private:
  // Job, attempt key, node name.
  using GroupKey = std::tuple<std::string, std::string, std::string>;

  // A board of a process.
  struct Source {
    uint64_t board_id = 0;
    const MonitorBoards::Board* board = nullptr;
    BoardReader reader;
  };

  // A process with boards. What is read of it when it is dead is kept, and not read again.
  struct Process {
    GroupKey key;
    uint32_t rank = 0;
    uint32_t process_id = 0;      // as the kernel says to us; 0: not visible
    uint32_t own_process_id = 0;  // as it sees itself
    uint64_t seen_serial = 0;
    bool alive = true;
    absl::Duration died{};
    std::optional<int> wait_status;  // as the kernel says
    std::vector<Source> sources;
    std::unique_ptr<ProcessWitness> witness;
    std::vector<uint32_t> proxy_threads;
    SectionTracker sections;
    bool is_read_dead = false;
    monitor::RankReport report;  // as last read
    // Of each communicator in it: its token, 0 if it is not the plugin's; and its peers.
    std::vector<uint64_t> tokens;
    std::vector<std::vector<BoardReport::PeerCount>> peers;
    std::vector<BoardReport::Foreign> foreign;
    uint32_t world_size = 0;
  };

  struct Group {
    uint64_t incarnation = 0;
    uint64_t sequence = 0;
    absl::Duration last_alive{};      // or the last word of an end
    std::map<uint32_t, uint64_t> of;  // by rank: first board of the process that counts
    bool engine_paused = false;       // in this window
    std::vector<std::pair<Rank, absl::Duration>> held;  // Engine::Activity::held, of the last look
    EnginePause engine_pause;
    Attempt attempt{};
    uint32_t world_size = 0;
    size_t report_bytes = 0;
    size_t rank_count = 0;
  };

  void Wake();
  void Look();
  void SampleEngine(const GroupKey& key, Group& group, absl::Duration now);
  void SyncBoards();
  void Attach(const MonitorBoards::Board& board);
  Process* FindLiving(const MonitorBoards::Board& board);
  static GroupKey KeyOf(const MonitorBoards::Offer& offer);
  static GroupKey KeyOf(const RankExit& exit);
  // Made if it is not there. Null: no room.
  Group* GroupOf(const GroupKey& key, absl::Duration now);
  bool HasLiving(const GroupKey& key) const;
  bool HasProcess(const RankExit& exit) const;
  void BeginAnew(const GroupKey& key, uint32_t rank);

  void Report();
  // How many ranks there was no room for.
  size_t ReportGroup(const GroupKey& key, Group& group, absl::Duration now);
  std::vector<Process*> Choose(const GroupKey& key, Group& group);
  static void TakeHeld(const Group& group, monitor::RankReport& report);
  void ReadProcess(Process& process, absl::Duration now);
  void ReadBoards(Process& process);
  const Exits::Entry* ToldOf(const Process& process) const;
  ExitOutcome OutcomeOfProcess(const Process& process, absl::Duration now) const;
  bool IsGivenUp(const Process& process) const;
  static void JoinForeign(const std::vector<Process*>& processes,
                          std::vector<monitor::RankReport>& ranks);
  void DropEnded(absl::Duration now);

  MonitorBoards& boards_;
  EventLoop& loop_;
  const Clock& clock_;
  const ActivityOf activity_of_;
  const uint64_t incarnation_;
  monitor::ReportSink& sink_;
  const TickClock ticks_;

  uint64_t boards_changes_ = UINT64_MAX;
  uint64_t serial_ = 0;
  std::map<uint64_t, std::unique_ptr<Process>> processes_;  // by their first board
  std::set<uint64_t> known_boards_;                         // of processes that are here or over
  std::map<GroupKey, Group> groups_;
  Exits exits_;

  EventLoop::TimerId timer_ = 0;  // 0: asleep
  absl::Duration due_{};          // of the next look, meaningful while the timer runs, as the next
  absl::Duration report_due_{};
  absl::Duration last_look_{};
  absl::Duration late_{};  // the most that a look of this window was late by
  size_t unreported_count_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_NODE_AGGREGATOR_H_
