// A job for tests of the policy: what a supervisor would do with its actions, without processes.
//
// Model: StartRanks makes ranks that start, open, restore and step when the test says so; StopRanks
// ends the ranks that live, at once, unless they are said not to die; evidence and saves are
// answered when the test says so. The clock moves only by `After`. Before every event the history
// goes through its bytes, so that whatever a test shows also holds with a restart there.
// Not modelled: time between an action and its effect, failing actions.
#ifndef HOLDFAST_AGENT_RECOVERY_POLICY_TESTING_H_
#define HOLDFAST_AGENT_RECOVERY_POLICY_TESTING_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "agent/recovery/policy.h"
#include "base/check.h"

namespace holdfast::recovery {

inline std::vector<Gpu> GpusOf(uint32_t count) {
  std::vector<Gpu> gpus;
  for (uint32_t i = 0; i < count; ++i) gpus.push_back({"n1", i, absl::StrCat("GPU-", i)});
  return gpus;
}

inline CheckpointFacts CheckpointAt(uint64_t step, uint32_t attempt = 1) {
  return {{Attempt{attempt}, Step{step}}, false, false, false};
}

class TestJob {
 public:
  explicit TestJob(Settings settings = {}) : settings_(std::move(settings)) {}

  // ---- Time and events.
  void After(absl::Duration duration) { now_ += duration; }
  template <typename What>
  std::vector<Action> Tell(What what) {
    return Put(Event{now_, wall_ + now_, std::move(what)});
  }
  // Ticks whenever the history asks for it, as long as that is within `duration`.
  std::vector<Action> Wait(absl::Duration duration) {
    const absl::Duration end = now_ + duration;
    std::vector<Action> all;
    for (int i = 0; i < 1000 && history_.wake_at.has_value() && *history_.wake_at <= end; ++i) {
      now_ = std::max(now_, *history_.wake_at);
      Append(all, Tell(Tick{}));
    }
    now_ = end;
    Append(all, Tell(Tick{}));
    return all;
  }

  // ---- What usually happens.
  std::vector<Action> Begin(uint32_t ranks = 4, uint32_t gpus = 4, LemonList lemons = {},
                            std::vector<CheckpointFacts> checkpoints = {}) {
    return Tell(
        RunBegun{"llama", ranks, "dp=4", GpusOf(gpus), std::move(lemons), std::move(checkpoints)});
  }
  // All ranks of the launch come to `step`; each phase takes `each`.
  std::vector<Action> ComeUp(uint64_t step, absl::Duration each = absl::Seconds(1)) {
    std::vector<Action> all;
    const Launch launch = history_.launch;
    const auto for_all = [&](auto make) {
      After(each);
      for (uint32_t r = 0; r < history_.ranks.size(); ++r) Append(all, Tell(make(Rank{r})));
    };
    const std::optional<CheckpointId> from = history_.restore_rule.checkpoint;
    for_all([&](Rank r) { return RankStarted{launch, r}; });
    for_all([&](Rank r) { return RankOpened{launch, r, Attempt{Value(launch)}}; });
    for_all([&](Rank r) { return RankRestored{launch, r, from}; });
    for_all([&](Rank r) { return StepDone{launch, r, Step{step}}; });
    return all;
  }
  std::vector<Action> Train(uint64_t step, absl::Duration duration) {
    After(duration);
    std::vector<Action> all;
    for (uint32_t r = 0; r < history_.ranks.size(); ++r) {
      Append(all, Tell(StepDone{history_.launch, Rank{r}, Step{step}}));
    }
    return all;
  }
  std::vector<Action> Commit(uint64_t step) {
    return Tell(
        CheckpointCommitted{history_.launch, CheckpointAt(step, Value(history_.attempt)), now_});
  }
  std::vector<Action> Dies(uint32_t rank, Exit exit = {monitor::ExitKind::kKilled, 9}) {
    return Tell(RankExited{history_.launch, Rank{rank}, exit});
  }
  std::vector<Action> Evidence() { return Tell(EvidenceCollected{history_.incident_count}); }
  // Those that were told to end, and live, do.
  std::vector<Action> AllDie(Exit exit = {monitor::ExitKind::kTerminated, 15}) {
    std::vector<Action> all;
    const Launch launch = history_.launch;
    for (uint32_t r = 0; r < history_.ranks.size() && history_.launch == launch; ++r) {
      if (history_.ranks[r].phase == RankPhase::kEnded) continue;
      Append(all, Tell(RankExited{launch, Rank{r}, exit}));
    }
    return all;
  }
  // From a death to the next attempt, trained up to `step`.
  std::vector<Action> Recover(uint64_t step) {
    std::vector<Action> all = Evidence();
    Append(all, AllDie());
    Append(all, Wait(absl::ZeroDuration()));
    Append(all, ComeUp(step));
    return all;
  }

  Settings& settings() { return settings_; }
  History& history() { return history_; }
  const History& history() const { return history_; }
  State state() const { return history_.state; }
  absl::Duration now() const { return now_; }
  absl::Time wall() const { return wall_ + now_; }

  static void Append(std::vector<Action>& all, std::vector<Action> more) {
    for (Action& action : more) all.push_back(std::move(action));
  }

 private:
  std::vector<Action> Put(const Event& event) {
    const std::string bytes = Encode(history_);
    absl::StatusOr<History> decoded = DecodeHistory(std::as_bytes(std::span(bytes)));
    CHECK_OK(decoded.status());
    CHECK(*decoded == history_);
    std::vector<Action> actions = Decide(settings_, event, *decoded);
    history_ = *std::move(decoded);
    return actions;
  }

  Settings settings_;
  History history_;
  absl::Duration now_ = absl::Seconds(1000);
  absl::Time wall_ = absl::FromUnixSeconds(1'764'150'000);
};

template <typename What>
std::vector<What> Only(const std::vector<Action>& actions) {
  std::vector<What> found;
  for (const Action& action : actions) {
    if (const What* const what = std::get_if<What>(&action)) found.push_back(*what);
  }
  return found;
}

inline std::string Text(const std::vector<Action>& actions) {
  return absl::StrJoin(actions, "\n", [](std::string* out, const Action& action) {
    absl::StrAppend(out, Describe(action));
  });
}

inline std::vector<uint32_t> Indices(const Placement& placement) {
  std::vector<uint32_t> indices;
  for (const Gpu& gpu : placement.gpus) indices.push_back(gpu.index);
  return indices;
}

// A job that trains, with a checkpoint of step 100 and at step 150.
inline TestJob Training(Settings settings = {}, uint32_t ranks = 4, uint32_t gpus = 4) {
  TestJob job(std::move(settings));
  job.Begin(ranks, gpus);
  job.ComeUp(1);
  job.Train(100, absl::Minutes(1));
  job.Commit(100);
  job.Train(150, absl::Seconds(30));
  EXPECT_EQ(job.state(), State::kRunning);
  return job;
}

// A verdict with two sources, unless it is told otherwise.
inline FindingTold FindingOf(const History& history, monitor::FaultClass fault,
                             monitor::Syndrome syndrome, std::vector<uint32_t> suspects,
                             monitor::Grade grade = monitor::Grade::kVerdict) {
  FindingTold told;
  told.launch = history.launch;
  told.finding.id = "1f3a5c7d";
  told.finding.grade = grade;
  told.finding.syndrome = syndrome;
  told.finding.fault = fault;
  told.finding.scope = monitor::Scope::kProcess;
  for (const uint32_t rank : suspects) told.finding.suspects.push_back({Rank{rank}, Rank{rank}});
  told.finding.confidence = 0.93;
  told.finding.sentence = "Rank 2 does nothing, and 3 ranks wait for it.";
  told.finding.evidence = {"3 ranks wait for it in dp, for 7 s", "its process has used no CPU"};
  told.group = "dp";
  told.standing = absl::Seconds(7);
  return told;
}

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_POLICY_TESTING_H_
