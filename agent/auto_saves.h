// `every = "auto"`: saves as often as pays. Measures what saves and steps take, counts failures,
// asks recovery/interval.h once a second, and makes the next step due when that time has passed
// since the last save began.
//
// In time, not in steps: the agent decides between steps, so that all ranks get one answer
// (Engine::MakeDue), and steps may become slower or faster. Failures are those of the run's
// history; of a job that another launcher has started, each attempt after the first one that this
// worker has seen is one.
#ifndef HOLDFAST_AGENT_AUTO_SAVES_H_
#define HOLDFAST_AGENT_AUTO_SAVES_H_

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "agent/job_snapshots.h"
#include "agent/recovery/interval.h"
#include "agent/save_cost.h"
#include "base/clock.h"
#include "base/executor.h"
#include "base/ids.h"
#include "checkpoint/engine.h"

namespace holdfast {

// Threads: the event loop's. Lifetime: the world outlives it.
class AutoSaves {
 public:
  static constexpr absl::Duration kLookEvery = absl::Seconds(1);
  // How exactly it is seen when a step was told.
  static constexpr absl::Duration kPollEvery = absl::Milliseconds(20);
  // No save begins while storage has the last one not yet; what it has not by then it may never
  // have.
  static constexpr absl::Duration kCommitPatience = absl::Minutes(10);

  struct World {
    EventLoop& loop;
    const Clock& clock;
    std::function<std::vector<JobSnapshot>()> jobs;
    // Engine::ProgressOf and Engine::MakeDue.
    std::function<std::vector<Engine::RankProgress>(const std::string& job,
                                                    const std::string& attempt_key)>
        progress;
    std::function<absl::StatusOr<Step>(const std::string& job, const std::string& attempt_key)>
        make_due;
  };
  explicit AutoSaves(World world);
  ~AutoSaves();
  AutoSaves(const AutoSaves&) = delete;
  AutoSaves& operator=(const AutoSaves&) = delete;

  // Without it nothing is ever made due, and nothing said.
  void Start();

  // The interval of a job and why, in one sentence; empty before its ranks make steps.
  std::string SentenceOf(const std::string& job) const;

 private:
  // What was seen of a job.
  struct Known {
    std::string attempt_key;  // of the newest attempt
    uint32_t attempts = 0;
    bool is_open = false;         // ranks of it are
    absl::Duration alive_before;  // of the attempts before
    absl::Duration first_seen;    // this attempt
    absl::Duration last_seen;
    SaveCost cost;
    std::optional<absl::Duration> last_save;  // when it began, or the attempt's first step
    std::optional<Step> captured;             // the newest save that was
    absl::Duration captured_begun;            // when that one began
    std::optional<Step> committed;            // the newest save that storage was seen to have
    absl::Duration commit;  // from its begin to that, looked at once a second; zero: none yet
    std::string sentence;
  };

  void Poll();
  void Look();
  void TakeProgress(Known& known, std::span<const Engine::RankProgress> ranks, absl::Duration now);
  void LookAt(const JobSnapshot& job, absl::Duration now);
  static recovery::IntervalInput InputOf(const JobSnapshot& job, const Known& known,
                                         absl::Duration now);

  const World world_;
  std::map<std::string, Known> jobs_;  // as many as the engine knows
  absl::Duration next_look_;
  EventLoop::TimerId timer_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_AUTO_SAVES_H_
