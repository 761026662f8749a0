// The supervisor of one job of `holdfast run`: tells the recovery policy what happens to the job's
// ranks, and does what it decides. It decides nothing itself.
//
// For each event the protocol of recovery/policy.h: decide, write the history, carry out. The
// history is written by a temporary name and rename, without fsync: it must outlive any process,
// not a power cut, which ends the ranks too. What the policy is told again after a restart (how far
// ranks are) is not written for its own sake.
//
// On disk, for whoever comes after:
//   STATE/history          recovery::Encode, of all runs of the job
//   RUNTIME/run            RunSpec of the run that is under way
//   RUNTIME/launch-N/      RankGroup of the n-th launch, and its `port`
// RUNTIME is removed when the run is over.
//
// The owner is the process that asked for the run (`holdfast run`). If it dies without a word, the
// job gets a last save and is stopped, as after a TERM: its exit code has nobody to go to, and
// ranks that go on outside of what their scheduler knows of would be worse. A restarted worker
// gives it kOwnerDeadline to come back.
#ifndef HOLDFAST_AGENT_RUN_JOB_SUPERVISOR_H_
#define HOLDFAST_AGENT_RUN_JOB_SUPERVISOR_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "agent/monitor/engine_pause.h"
#include "agent/monitor/exits.h"
#include "agent/recovery/actions.h"
#include "agent/recovery/events.h"
#include "agent/recovery/history.h"
#include "agent/recovery/settings.h"
#include "agent/run/evidence_collector.h"
#include "agent/run/progress_watch.h"
#include "agent/run/rank_group.h"
#include "agent/run/run_spec.h"
#include "agent/run/silence_watch.h"
#include "agent/witness/witnesses.h"
#include "base/clock.h"
#include "base/executor.h"
#include "checkpoint/engine.h"
#include "io/unique_fd.h"
#include "monitor/analyzer.h"

namespace holdfast {

// Threads: the event loop's. Lifetime: the world outlives it. The destructor leaves the ranks as
// they
//   are: the next supervisor finds them.
class JobSupervisor {
 public:
  struct Options {
    std::string state_directory;    // of this job; exists
    std::string runtime_directory;  // of this job; exists, and is only ours
    std::string lemons_path;        // the list of GPUs that made trouble, of all jobs
    std::string socket;             // of the agent, for the ranks
    std::string shim_program;
  };
  struct World {
    EventLoop& loop;
    WorkPool& pool;
    const Clock& clock;
    Engine& engine;
    std::function<void(RankExit)> take_exit;  // of the monitor; may be null
    EvidenceWorld evidence;
  };

  static constexpr absl::Duration kOwnerDeadline = absl::Seconds(30);
  // How long the last processes of a launch may take to be gone after KILL, before the next launch
  // is started, or the job ends, without them.
  static constexpr absl::Duration kGoneDeadline = absl::Seconds(10);
  // How long a run waits to be told what the job has on storage; then it begins with what is known
  // from earlier runs.
  static constexpr absl::Duration kCatalogDeadline = absl::Seconds(30);
  // Lines for people that are kept.
  static constexpr size_t kLinesMax = 256;

  // A new run of the job. `on_change`: View has changed; comes from the loop. Errors:
  // kInvalidArgument (its [recovery]), of the disk.
  static absl::StatusOr<std::unique_ptr<JobSupervisor>> Begin(Options options, World world,
                                                              RunSpec spec,
                                                              std::function<void()> on_change);
  // The run that a former worker has left in `state_directory`. kNotFound: there is none.
  static absl::StatusOr<std::unique_ptr<JobSupervisor>> Recover(Options options, World world,
                                                                std::function<void()> on_change);
  ~JobSupervisor();
  JobSupervisor(const JobSupervisor&) = delete;
  JobSupervisor& operator=(const JobSupervisor&) = delete;

  // `pidfd` of the owner. It replaces the one before.
  void SetOwner(UniqueFd pidfd);
  bool has_owner() const { return static_cast<bool>(owner_); }
  void OwnerDied();
  // KILL to all ranks, whatever the policy says: the agent ends.
  void Kill();

  // Of people, signals and the monitor. What the policy says of it is in View, or in the next
  // lines.
  template <typename What>
  void Take(What what) {
    Push({world_.clock.Elapsed(), world_.clock.WallTime(), std::move(what)});
  }

  // Of the ranks of the newest launch. The policy is told of changes only.
  void TakeSight(const monitor::Sight& sight);
  // Told to the policy if it concerns a GPU of the job: by its number, or because the process that
  // it names is a rank or was started by one.
  void TakeXid(const XidSighting& sighting);

  struct Line {
    uint64_t number = 0;  // from 1, of this agent's process
    std::string text;
  };
  struct View {
    const RunSpec& spec;
    const recovery::Settings& settings;
    const recovery::History& history;
    const std::deque<Line>& lines;
    uint32_t port = 0;
    bool is_over = false;
    int exit_code = 0;
    std::vector<SilenceWatch::Timeout> timeouts;
  };
  View view() const;
  bool is_over() const { return is_over_; }
  const std::string& node() const { return node_; }
  // The launch that an attempt key is of, while it is the newest; nothing otherwise.
  std::optional<recovery::Launch> LaunchOf(const std::string& attempt_key) const;

 private:
  JobSupervisor(Options options, World world, RunSpec spec, recovery::Settings settings,
                std::function<void()> on_change);
  void Push(recovery::Event event);
  void Pump();
  void Decided(const std::vector<recovery::Action>& actions);
  void TellResumed();
  void ArmTimer();
  void OnTimer();

  // job_evidence.cc
  void CarryOut(const recovery::CollectEvidence& action);
  std::string IncidentDirectory(uint32_t number) const;
  std::string SummaryOf(const recovery::CollectEvidence& action) const;
  void WriteIncident(const recovery::Incident& incident);
  void CarryOut(const recovery::RequestSave& action);
  void CarryOut(const recovery::StopRanks& action);
  void CarryOut(const recovery::StartRanks& action);
  void CarryOut(const recovery::ExitJob& action);
  void CarryOut(const recovery::Ask& action);
  void CarryOut(const recovery::Notice& action);
  void CarryOut(const recovery::RecordLemon& action);
  void CarryOut(const recovery::ForgetLemon& action);
  void ChangeLemons(const std::function<void(recovery::LemonList&)>& change);

  // Runs `then` when nothing of the group is left, or after kGoneDeadline.
  void WhenGone(std::function<void()> then);
  void GroupGone();
  void ReleaseGroup();
  void StartGroup(const recovery::StartRanks& action);
  absl::StatusOr<uint32_t> PortOf(const std::string& launch_directory) const;
  std::unique_ptr<RankGroup> MakeGroup(recovery::Launch launch);
  void RankStarted(recovery::Launch launch, uint32_t rank, int32_t process_id);
  void RankEnded(recovery::Launch launch, uint32_t rank, const RankEnd& end);
  void TellMonitor(uint32_t rank, const RankEnd& end);
  void EndRecovery();
  void Finish();

  void BeginRun();
  void ReadCheckpoints();
  void CatalogRead(absl::StatusOr<std::vector<Engine::KnownCheckpoint>> known);
  void OrderRestore(recovery::Launch launch, const recovery::RestoreRule& rule);
  void TellIfOlder(std::optional<CheckpointId> restored);

  void Poll();
  void TakeProgress(const Engine::RankProgress& progress, absl::Duration now);
  void LookForSilence(const std::vector<Engine::RankProgress>& ranks, absl::Duration now);
  absl::Duration PollEvery() const;

  bool FindOwner();
  void Say(std::string text);
  std::string LaunchDirectory(recovery::Launch launch) const;
  std::string Describe(const RankEnd& end) const;

  const Options options_;
  const World world_;
  const RunSpec spec_;
  const std::string node_;
  const recovery::Settings settings_;
  const std::function<void()> on_change_;

  recovery::History history_;
  std::deque<recovery::Event> events_;
  bool pumping_ = false;
  bool writing_ = false;  // the history, on the pool
  EventLoop::TimerId timer_ = 0;

  std::unique_ptr<RankGroup> group_;
  recovery::Launch group_launch_{};
  uint32_t port_ = 0;
  absl::Duration started_{};  // the group, by this worker
  bool stops_ = false;        // the group was told to end
  std::function<void()> when_gone_;
  EventLoop::TimerId gone_timer_ = 0;
  EventLoop::TimerId kill_timer_ = 0;

  // Of the ranks of group_launch_.
  ProgressWatch progress_;
  std::map<uint32_t, int32_t> started_processes_;  // by rank: also those that have ended
  std::map<uint32_t, int32_t> processes_;          // by rank: those that live
  SilenceWatch silence_;
  EnginePause engine_pause_;
  std::optional<recovery::Sight> sight_;  // as last told
  bool any_restored_ = false;
  EventLoop::TimerId poll_timer_ = 0;

  // Until the policy was told of the run.
  std::optional<recovery::RunBegun> begun_;
  EventLoop::TimerId begin_timer_ = 0;
  bool reading_ = false;  // the catalog
  bool read_again_ = false;

  // While a former worker's ranks are being found.
  bool recovering_ = false;
  std::map<uint32_t, recovery::Exit> recovered_;

  UniqueFd owner_;
  EventLoop::TimerId owner_timer_ = 0;
  bool owner_lost_ = false;

  uint32_t told_incident_ = 0;  // the last one whose end was told
  EvidenceCollector collector_;
  std::deque<Line> lines_;
  uint64_t next_line_ = 1;
  bool is_over_ = false;
  bool finishing_ = false;
  int exit_code_ = 0;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_JOB_SUPERVISOR_H_
