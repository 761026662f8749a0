// The analysis as a service of the agent: takes the reports of nodes, steps the analysis of each
// job once a second, keeps what it finds, and tells whoever wants to know. Observes only: it never
// acts on a job (recovery will).
//
// Steps and questions about a job run on the worker's pool, one at a time and in order for each
// job: an analysis of 10,000 ranks takes tens of milliseconds, which the event loop does not have.
// Where a step takes longer than a second, seconds are joined and count as a late receiver.
//
// Not here: the reports themselves (boards, /proc), the analysis (monitor/), what a CLI prints.
#ifndef HOLDFAST_AGENT_MONITOR_SERVICE_H_
#define HOLDFAST_AGENT_MONITOR_SERVICE_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "agent/monitor/verdict_command.h"
#include "agent/monitor/verdict_store.h"
#include "base/clock.h"
#include "base/executor.h"
#include "format/layout.h"
#include "hook/abi/messages.h"
#include "io/file_system.h"
#include "monitor/finding_log.h"
#include "monitor/job_analysis.h"
#include "monitor/node_report.h"
#include "monitor/recording.h"
#include "monitor/testimony.h"
#include "monitor/thresholds.h"

namespace holdfast {

// The stages and tensor positions that a mesh gives its ranks: by the coordinates of the axes that
// are called pp, pipeline, stage or pipe, and tp, tensor or model (case ignored). Empty if it has
// neither, or is not of `world_size` ranks: then all ranks are peers.
std::vector<monitor::RankRole> RolesFromMesh(const std::vector<MeshAxis>& mesh,
                                             uint32_t world_size);

// What a mesh calls the ranks that a communicator joins: the axes along which they differ, if they
// are all that differ along these ("dp", "dp+tp"). Empty: it has no such name, or not all members
// (-1) are known.
std::string GroupFromMesh(const std::vector<MeshAxis>& mesh, const std::vector<int64_t>& members);

// What a subscriber has not taken yet. Filled by the service, emptied by whoever asked for it.
//
// Threads: the event loop's.
class MonitorStream {
 public:
  // Beyond either, the newest is lost and counted: a slow subscriber holds nobody up.
  static constexpr size_t kWaitingMax = 256;
  static constexpr size_t kWaitingBytesMax = size_t{64} << 20;

  struct Item {
    std::string text;
    uint64_t lost = 0;  // before this one, since the one before it
  };
  std::optional<Item> Take();

 private:
  friend class MonitorService;
  friend class RunService;
  enum class Kind { kFindings, kSteps };
  bool Push(std::string text);

  Kind kind_{};
  std::string job_;  // empty: all
  std::function<void()> wake_;
  std::set<std::string> begun_;  // of kSteps: jobs whose roles it has got
  std::deque<Item> waiting_;
  size_t waiting_bytes_ = 0;
  uint64_t lost_ = 0;
};

// Threads: the event loop's. Lifetime: the world outlives it. A step that is on the pool when it
//   goes ends for itself and is told nobody.
class MonitorService final : public monitor::ReportSink {
 public:
  // Jobs at once; beyond, the one that has been silent longest goes, if it has been silent at all.
  static constexpr size_t kJobsMax = 32;
  // A job of which nothing has come for so long is over.
  static constexpr absl::Duration kSilentJob = absl::Minutes(10);
  static constexpr absl::Duration kStepEvery = absl::Seconds(1);
  // Of one job between two steps; beyond, reports are dropped and counted.
  static constexpr size_t kPendingReportsMax = monitor::kReportsPerStepMax;
  static constexpr size_t kPendingBytesMax = size_t{48} << 20;
  static constexpr size_t kTasksMax = 64;    // questions about one job at once
  static constexpr size_t kStreamsMax = 32;  // subscribers
  // Findings of an earlier worker that the analysis has not found again by then are withdrawn.
  static constexpr absl::Duration kUnwatchedFor = absl::Minutes(2);

  struct Options {
    std::string directory;  // of the findings (VerdictStore)
    absl::Duration verdicts_keep = absl::Hours(24 * 30);
    std::string on_verdict;  // for /bin/sh -c; empty: none
    monitor::Thresholds thresholds;
    std::string topology;  // a document (monitor/topology.h) that was parsed before; empty: none
    // The mesh of the layout that the job's ranks have registered; empty: none. May be null.
    std::function<std::vector<MeshAxis>(const std::string& job)> mesh_of;
    // One line per suspicion, verdict and withdrawal.
    std::function<void(const std::string&)> log;
    std::function<void(const std::string&)> warn;
    // A finding was opened, is open again, or became a verdict: witnesses that cost nothing may be
    // asked now. May be null.
    std::function<void(const monitor::FindingRecord&)> on_finding;
    // Every change of a finding: whoever acts on them. May be null.
    std::function<void(const monitor::FindingRecord&, monitor::FindingChange)> on_change;
    // How much of the job is seen, with each step. May be null.
    std::function<void(const std::string& job, const std::string& attempt_key,
                       const monitor::Sight& sight)>
        on_sight;
  };

  MonitorService(Options options, FileSystem& file_system, EventLoop& loop, WorkPool& pool,
                 const Clock& clock);
  ~MonitorService() override;
  MonitorService(const MonitorService&) = delete;
  MonitorService& operator=(const MonitorService&) = delete;

  // Reads the stored findings (blocks) and begins to step.
  void Start();

  // Analysed with the next step of its job.
  void Deliver(monitor::NodeReport report) override;
  // What a witness other than the reports says about the job. Ignored if no node has reported the
  // job; beyond what one step can have (kTestimoniesPerStepMax batches of kTestimoniesMax) dropped
  // and counted.
  void Deliver(const std::string& job, std::span<const monitor::Testimony> testimonies);

  // Of kStatus, kWaits, kMatrix, kFindings and kExplain. `job` empty: all. The answer is JSON, and
  // comes from the loop, never inside the call. kNotFound: no such job or finding.
  struct Question {
    abi::MonitorQueryKind kind{};
    std::string job;
    std::string finding;
    uint64_t communicator = 0;
  };
  void Ask(Question question, std::function<void(absl::StatusOr<std::string>)> answer);

  // The same findings as lines of JSON when they change (kFollow), or the steps as recording.h has
  // them (kRecord). `wake` is called when something waits in the stream. It ends when the last
  // reference to it goes. kResourceExhausted: too many.
  absl::StatusOr<std::shared_ptr<MonitorStream>> Subscribe(abi::MonitorQueryKind kind,
                                                           const std::string& job,
                                                           std::function<void()> wake);

  size_t job_count() const { return jobs_.size(); }
  const monitor::FindingLog& findings() const { return log_; }
  // How long the last and the slowest step took on the pool.
  absl::Duration last_step() const { return last_step_; }
  absl::Duration slowest_step() const { return slowest_step_; }

 private:
  struct Job;
  struct Gathering;

  std::string SilentestJob() const;
  void StepAll();
  void StepJob(const std::shared_ptr<Job>& job, absl::Duration now);
  void StepDone(const std::shared_ptr<Job>& job, monitor::JobAnalysis::Result result,
                absl::Duration now);
  void RunNext(const std::shared_ptr<Job>& job);
  void UpdateRoles(Job& job, monitor::JobStep& step);
  void NameGroups(const Job& job, std::vector<monitor::Finding>& findings) const;
  void Record(const Job& job, const monitor::JobStep& step);
  void GiveUpUnheard(absl::Duration now);
  void EndJob(const std::shared_ptr<Job>& job, absl::Duration now);
  void Tell(const std::vector<monitor::FindingLog::Told>& told);
  void ForEachStream(MonitorStream::Kind kind, const std::string& job,
                     const std::function<void(MonitorStream&)>& visit);
  monitor::FindingLog::When Now(absl::Duration elapsed) const;
  absl::StatusOr<std::string> FindingsJson(const std::string& job) const;
  absl::StatusOr<std::string> ExplainJson(const std::string& finding, const std::string& job) const;
  void Gather(const Question& question, std::function<void(absl::StatusOr<std::string>)> answer);
  std::string GatheredText(const Gathering& gathering) const;

  const Options options_;
  EventLoop& loop_;
  WorkPool& pool_;
  const Clock& clock_;
  monitor::FindingLog log_;
  VerdictStore store_;
  std::unique_ptr<VerdictCommand> command_;  // null without on_verdict
  std::map<std::string, std::shared_ptr<Job>> jobs_;
  std::vector<std::weak_ptr<MonitorStream>> streams_;
  EventLoop::TimerId timer_ = 0;
  absl::Duration next_step_;
  absl::Duration forgotten_;  // when old findings last were
  absl::Duration last_step_;
  absl::Duration slowest_step_;
  uint64_t reports_dropped_ = 0;  // beyond the limits
  uint64_t lost_ = 0;             // by subscribers
  bool jobs_full_ = false;        // and said
  // Work and wakes hold a weak reference: they may come after this object.
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_SERVICE_H_
