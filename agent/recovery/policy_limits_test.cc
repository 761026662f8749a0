// Modes, people, the circuit breaker, checkpoints, and restarts of the agent.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

#include "agent/recovery/policy_testing.h"
#include "agent/recovery/screen.h"

namespace holdfast::recovery {
namespace {

using monitor::ExitKind;
using monitor::FaultClass;
using monitor::Syndrome;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

struct Fault {
  const char* name;
  std::function<std::vector<Action>(TestJob&)> happen;
};
std::vector<Fault> Faults() {
  return {
      {"death", [](TestJob& job) { return job.Dies(2); }},
      {"xid",
       [](TestJob& job) {
         return job.Tell(XidSeen{GpusOf(5)[2], 79});
       }},
      {"node", [](TestJob& job) { return job.Tell(NodeGone{"n1"}); }},
      {"hang",
       [](TestJob& job) {
         return job.Tell(
             FindingOf(job.history(), FaultClass::kGpuHang, Syndrome::kCommunicationHang, {2}));
       }},
      {"mismatch",
       [](TestJob& job) {
         return job.Tell(
             FindingOf(job.history(), FaultClass::kMismatch, Syndrome::kCommunicationHang, {2}));
       }},
      {"heartbeat",
       [](TestJob& job) {
         return job.Tell(
             RankTimedOut{job.history().launch, Rank{1}, "", absl::Minutes(1), absl::Minutes(1)});
       }},
      {"slow",
       [](TestJob& job) {
         FindingTold told =
             FindingOf(job.history(), FaultClass::kLink, Syndrome::kCommunicationSlow, {2});
         told.slow_permille = 3000;
         return job.Tell(told);
       }},
  };
}

// ---- Modes.

TEST(PolicyModes, ObserveCollectsEvidenceAndDoesNothingElse) {
  for (const Fault& fault : Faults()) {
    SCOPED_TRACE(fault.name);
    Settings settings;
    settings.mode = Mode::kObserve;
    settings.slow = SlowPolicy::kReplaceAtCheckpoint;
    TestJob job = Training(settings, 4, 5);
    auto actions = fault.happen(job);
    TestJob::Append(actions, job.Evidence());
    TestJob::Append(actions, job.Wait(absl::Hours(1)));
    for (const Action& action : actions) {
      EXPECT_TRUE(std::holds_alternative<CollectEvidence>(action) ||
                  std::holds_alternative<Notice>(action))
          << Describe(action);
    }
    // The job ends by itself, or goes on; nothing is started in its place.
    const auto ended = job.AllDie();
    EXPECT_THAT(Only<StartRanks>(ended), IsEmpty());
    TestJob::Append(actions, ended);
    TestJob::Append(actions, job.Evidence());
    TestJob::Append(actions, job.Wait(absl::Hours(1)));
    EXPECT_THAT(Only<ExitJob>(actions), SizeIs(1));
    EXPECT_EQ(job.history().exit_code, 1);
  }
}

TEST(PolicyModes, AskDoesNothingBeforeItIsApprovedAndThenWhatWasApproved) {
  for (const Fault& fault : Faults()) {
    SCOPED_TRACE(fault.name);
    Settings settings;
    settings.mode = Mode::kAsk;
    settings.slow = SlowPolicy::kReplaceAtCheckpoint;
    settings.layouts = {{3, "dp=3", {}}};
    TestJob job = Training(settings, 4, 5);
    auto actions = fault.happen(job);
    TestJob::Append(actions, job.Evidence());
    TestJob::Append(actions, job.Wait(absl::Hours(10)));
    ASSERT_THAT(Only<Ask>(actions), SizeIs(1)) << Text(actions);
    EXPECT_THAT(Only<StopRanks>(actions), IsEmpty());
    EXPECT_THAT(Only<RequestSave>(actions), IsEmpty());
    EXPECT_EQ(job.state(), State::kWaitingForApproval);
    const std::string id = Only<Ask>(actions)[0].id;
    EXPECT_EQ(HumanStep(job.settings(), job.history()), "holdfast approve " + id + " --job llama");
    EXPECT_THAT(Only<Notice>(job.Tell(Approve{"p99"})), SizeIs(1));
    EXPECT_EQ(job.state(), State::kWaitingForApproval);
    auto approved = job.Tell(Approve{id});
    if (job.state() == State::kSaving) {
      TestJob::Append(approved, job.Wait(settings.save_wait));
    }
    if (std::string_view(fault.name) == "node") {  // nobody is left there to be stopped
      EXPECT_EQ(job.state(), State::kWaitingForCapacity);
      continue;
    }
    EXPECT_THAT(Only<StopRanks>(approved), SizeIs(1)) << Text(approved);
    auto ended = job.AllDie();
    EXPECT_THAT(Only<Ask>(ended), IsEmpty()) << "asked twice";
    EXPECT_THAT(Only<StartRanks>(ended), SizeIs(1));
  }
}

TEST(PolicyModes, AskSaysSoWhereTheAnswerIsTheEnd) {
  Settings settings;
  settings.mode = Mode::kAsk;
  settings.max_restarts = 0;
  TestJob job = Training(settings);
  job.Dies(2);
  EXPECT_THAT(Only<Ask>(job.Evidence()).at(0).question,
              HasSubstr("End with 1: all 0 restarts are used up?"));
  TestJob usage = Training(settings);
  usage.Dies(2, {ExitKind::kError, 2});
  const auto asked = Only<Ask>(usage.Evidence());
  EXPECT_THAT(asked.at(0).question, HasSubstr("End with 93: a restart cannot help?"));
  EXPECT_THAT(Only<StopRanks>(usage.Tell(Approve{asked[0].id})), SizeIs(1));
  EXPECT_EQ(Only<ExitJob>(usage.AllDie()).at(0).code, 93);
}

TEST(PolicyModes, AVetoHoldsForThatAndAnotherFaultIsAskedAnew) {
  Settings settings;
  settings.mode = Mode::kAsk;
  TestJob job = Training(settings);
  job.Tell(RankTimedOut{Launch{1}, Rank{1}, "", absl::Minutes(1), absl::Minutes(1)});
  const auto asked = Only<Ask>(job.Evidence());
  ASSERT_THAT(asked, SizeIs(1));
  job.Tell(Veto{asked[0].id});
  EXPECT_EQ(job.state(), State::kStalled);
  EXPECT_THAT(job.Wait(absl::Hours(1)), IsEmpty());
  EXPECT_EQ(HumanStep(job.settings(), job.history()), "holdfast stop --job llama");
  const auto again = Only<Ask>(job.Dies(2));
  ASSERT_THAT(again, SizeIs(1));
  EXPECT_NE(again[0].id, asked[0].id);
}

TEST(PolicyModes, AnApprovalIsForOnePlanOnly) {
  Settings settings;
  settings.mode = Mode::kAsk;
  settings.hangs_to_exclude = 1;
  TestJob job = Training(settings, 4, 5);
  job.Dies(2);
  const auto first = Only<Ask>(job.Evidence());
  ASSERT_THAT(first, SizeIs(1));
  EXPECT_THAT(first[0].question, HasSubstr("Restart in place?"));
  // The kernel explains the death: the plan is another one now.
  const auto second = Only<Ask>(job.Tell(XidSeen{GpusOf(5)[2], 79}));
  ASSERT_THAT(second, SizeIs(1));
  EXPECT_THAT(second[0].question, HasSubstr("Restart without GPU 2?"));
  EXPECT_THAT(Only<StopRanks>(job.Tell(Approve{first[0].id})), IsEmpty());
  EXPECT_THAT(Only<StopRanks>(job.Tell(Approve{second[0].id})), SizeIs(1));
}

// ---- People and signals.

TEST(PolicyPeople, AHoldHoldsUntilItsEnd) {
  TestJob job = Training();
  job.Tell(Hold{absl::Hours(2), "debugging"});
  job.Dies(2);
  EXPECT_THAT(Only<StopRanks>(job.Evidence()), IsEmpty());
  EXPECT_EQ(job.state(), State::kHolding);
  EXPECT_EQ(HumanStep(job.settings(), job.history()), "holdfast hold 0 --job llama");
  EXPECT_THAT(Only<StopRanks>(job.Wait(absl::Hours(2) - absl::Seconds(1))), IsEmpty());
  EXPECT_THAT(Only<StopRanks>(job.Wait(absl::Seconds(1))), SizeIs(1));
  // And while no rank lives.
  job.Tell(Hold{absl::Hours(2), "debugging"});
  EXPECT_THAT(Only<StartRanks>(job.AllDie()), IsEmpty());
  EXPECT_EQ(job.state(), State::kHolding);
  EXPECT_THAT(Only<StartRanks>(job.Tell(Hold{absl::ZeroDuration(), ""})), SizeIs(1));
}

TEST(PolicyPeople, ASignalMeansALastSaveThenStopThen75) {
  for (const Mode mode : {Mode::kAct, Mode::kAsk, Mode::kObserve}) {
    for (const EndSignal signal :
         {EndSignal::kInterrupt, EndSignal::kTerminate, EndSignal::kAllocationEnds}) {
      Settings settings;
      settings.mode = mode;
      TestJob job = Training(settings);
      const auto saves = Only<RequestSave>(job.Tell(SignalCame{signal}));
      ASSERT_THAT(saves, SizeIs(1));
      EXPECT_EQ(saves[0].deadline, job.now() + settings.save_wait);
      job.After(absl::Seconds(1));
      EXPECT_THAT(Only<StopRanks>(job.Commit(151)), SizeIs(1));
      const auto exits = Only<ExitJob>(job.AllDie());
      ASSERT_THAT(exits, SizeIs(1));
      EXPECT_EQ(exits[0].code, 75);
    }
  }
}

TEST(PolicyPeople, ALastSaveIsWaitedForOnlySoLong) {
  TestJob job = Training();
  job.Tell(SignalCame{EndSignal::kTerminate});
  EXPECT_THAT(Only<StopRanks>(job.Wait(job.settings().save_wait)), SizeIs(1));
  TestJob failed = Training();
  failed.Tell(SignalCame{EndSignal::kTerminate});
  EXPECT_THAT(Only<StopRanks>(failed.Tell(SaveFailed{Launch{1}})), SizeIs(1));
}

TEST(PolicyPeople, WhoSignalsAgainDoesNotWait) {
  TestJob job = Training();
  job.Tell(SignalCame{EndSignal::kInterrupt});
  EXPECT_THAT(Only<StopRanks>(job.Tell(SignalCame{EndSignal::kInterrupt})), SizeIs(1));
  job.After(absl::Seconds(1));
  const auto kill = Only<StopRanks>(job.Tell(SignalCame{EndSignal::kInterrupt}));
  ASSERT_THAT(kill, SizeIs(1));
  EXPECT_EQ(kill[0].kill_at, job.now());
}

TEST(PolicyPeople, AJobThatFinishesWhileItIsSavedIsDone) {
  TestJob job = Training();
  job.Tell(SignalCame{EndSignal::kTerminate});
  const auto exits = Only<ExitJob>(job.AllDie({ExitKind::kClean, 0}));
  ASSERT_THAT(exits, SizeIs(1));
  EXPECT_EQ(exits[0].code, 0);
}

TEST(PolicyPeople, StopEndsWith75AndASickJobIsNotSavedFirst) {
  TestJob job = Training();
  EXPECT_THAT(Only<RequestSave>(job.Tell(Stop{})), SizeIs(1));
  job.Wait(job.settings().save_wait);
  EXPECT_EQ(Only<ExitJob>(job.AllDie())[0].code, 75);
  TestJob sick = Training();
  sick.Tell(RankTimedOut{Launch{1}, Rank{1}, "", absl::Minutes(1), absl::Minutes(1)});
  EXPECT_THAT(Only<StopRanks>(sick.Tell(Stop{})), SizeIs(1));
}

TEST(PolicyPeople, NobodyWhoAnswersEndsTheWaitWith75) {
  Settings settings;
  settings.mode = Mode::kAsk;
  TestJob job = Training(settings);
  job.Dies(2);
  job.Evidence();
  job.AllDie();
  EXPECT_EQ(job.state(), State::kWaitingForApproval);
  EXPECT_EQ(Only<ExitJob>(job.Wait(settings.approval_wait)).at(0).code, 75);
}

TEST(PolicyPeople, SaveAsksForASaveAndNothingElse) {
  TestJob job = Training();
  const auto actions = job.Tell(Save{});
  ASSERT_THAT(actions, SizeIs(1));
  EXPECT_THAT(Only<RequestSave>(actions), SizeIs(1));
  EXPECT_EQ(job.state(), State::kRunning);
}

// ---- The circuit breaker.

// Dies and comes up again; the pause before the start.
absl::Duration PauseOf(TestJob& job) {
  job.Dies(0);
  job.Evidence();
  const absl::Duration before = job.now();
  auto actions = job.AllDie();
  while (Only<StartRanks>(actions).empty() && job.state() == State::kDeciding) {
    TestJob::Append(actions, job.Wait(absl::Seconds(1)));
  }
  const absl::Duration pause = job.now() - before;
  if (job.state() == State::kStarting) job.ComeUp(101);
  return pause;
}

TEST(PolicyBreaker, ThePauseGrowsAndAHealthyAttemptEndsIt) {
  Settings settings;
  settings.max_restarts = 100;
  settings.restarts_in_window = 64;
  settings.checkpoint_tries = 100;
  TestJob job = Training(settings);
  for (const int64_t seconds : {0, 5, 10, 20, 40, 80, 160, 300, 300}) {
    EXPECT_EQ(PauseOf(job), absl::Seconds(seconds));
  }
  job.After(settings.healthy_after);
  EXPECT_EQ(PauseOf(job), absl::ZeroDuration());
  EXPECT_EQ(PauseOf(job), absl::Seconds(5));
}

TEST(PolicyBreaker, RestartsAfterHealthyAttemptsAreFree) {
  Settings settings;
  settings.max_restarts = 0;
  TestJob job = Training(settings);
  for (int i = 0; i < 10; ++i) {
    job.After(settings.healthy_after);
    EXPECT_EQ(PauseOf(job), absl::ZeroDuration());
    EXPECT_EQ(job.state(), State::kRunning);
  }
  PauseOf(job);
  EXPECT_EQ(job.state(), State::kGivenUp);
}

TEST(PolicyBreaker, TooManyRestartsWithinTheWindowWait) {
  Settings settings;
  settings.pause_first = absl::ZeroDuration();
  settings.checkpoint_tries = 100;
  TestJob job = Training(settings);
  const absl::Duration first = job.now();
  for (int i = 0; i < 3; ++i) EXPECT_EQ(PauseOf(job), absl::ZeroDuration());
  PauseOf(job);
  EXPECT_GE(job.now() - first, settings.restart_window);
  EXPECT_LE(job.now() - first, settings.restart_window + absl::Seconds(10));
}

// ---- Checkpoints.

TEST(PolicyCheckpoints, OneThatCrashedTwiceIsNotTriedAThirdTime) {
  Settings settings;
  TestJob job = Training(settings);
  job.Train(200, absl::Minutes(1));
  job.Commit(200);
  std::vector<uint64_t> steps;
  for (int i = 0; i < 4; ++i) {
    PauseOf(job);
    steps.push_back(Value(job.history().restore_rule.checkpoint->step));
  }
  // The first death is of the attempt that made it; the next two are those that restored it.
  EXPECT_THAT(steps, ElementsAre(200, 200, 100, 100));
  EXPECT_EQ(job.history().restore_rule.kind, RestoreRule::Kind::kExactly);
}

TEST(PolicyCheckpoints, ADeathAfterTheNextCommitIsNotTheCheckpointsDoing) {
  TestJob job = Training();
  for (int i = 0; i < 4; ++i) {
    PauseOf(job);
    job.Commit(101);
    job.history().checkpoints.pop_back();  // as if retention had removed it
  }
  EXPECT_EQ(job.history().restore_rule.checkpoint->step, Step{100});
  EXPECT_EQ(job.history().checkpoints.back().crashes, 0);
}

TEST(PolicyCheckpoints, WhatTheHardwareEndedIsNotTheCheckpointsDoing) {
  TestJob job = Training({}, 4, 8);
  for (uint32_t i = 0; i < 3; ++i) {
    job.Tell(XidSeen{GpusOf(8)[i], 79});
    job.Recover(101);
    job.Wait(absl::Minutes(1));
    if (job.state() == State::kStarting) job.ComeUp(101);
  }
  EXPECT_EQ(job.history().checkpoints.back().crashes, 0);
}

TEST(PolicyCheckpoints, ABadOneIsNeverChosen) {
  for (const bool non_finite : {false, true}) {
    TestJob job = Training();
    CheckpointFacts facts = CheckpointAt(140);
    facts.marked_bad = !non_finite;
    facts.non_finite = non_finite;
    job.Tell(CheckpointCommitted{Launch{1}, facts, job.now()});
    job.Dies(0);
    job.Evidence();
    const auto starts = Only<StartRanks>(job.AllDie());
    ASSERT_THAT(starts, SizeIs(1));
    EXPECT_EQ(starts[0].restore, (RestoreRule{RestoreRule::Kind::kExactly, CheckpointAt(100).id}));
  }
}

TEST(PolicyCheckpoints, AMarkCountsWhileItIsOnStorage) {
  CheckpointFacts bad = CheckpointAt(200);
  bad.marked_bad = true;
  const std::vector<CheckpointFacts> clean = {CheckpointAt(100), CheckpointAt(200)};
  const std::vector<CheckpointFacts> marked = {CheckpointAt(100), bad};
  TestJob job = Training();
  job.Train(200, absl::Minutes(1));
  job.Commit(200);
  const auto is_marked = [&] { return job.history().checkpoints.back().facts.marked_bad; };
  job.Tell(CheckpointsRead{marked});
  EXPECT_TRUE(is_marked());
  job.Tell(CheckpointsRead{clean});
  EXPECT_FALSE(is_marked());
  job.Tell(CheckpointsRead{marked});
  PauseOf(job);
  EXPECT_EQ(job.history().restore_rule,
            (RestoreRule{RestoreRule::Kind::kExactly, CheckpointAt(100).id}));
  job.Begin(4, 4, {}, marked);
  EXPECT_EQ(job.history().restore_rule,
            (RestoreRule{RestoreRule::Kind::kExactly, CheckpointAt(100).id}));
  job.Begin(4, 4, {}, clean);
  EXPECT_EQ(job.history().restore_rule,
            (RestoreRule{RestoreRule::Kind::kNewest, CheckpointAt(200).id}));
}

TEST(PolicyCheckpoints, OneThatWasCapturedUnderAnAnomalyIsUsedOnlyIfAPersonSaysSo) {
  for (const bool older : {true, false}) {
    TestJob job;
    job.Begin(4, 8);
    job.ComeUp(1);
    if (older) job.Commit(50);
    job.After(absl::Seconds(1));
    // The kernel reports a fault; a capture was under way and is committed.
    job.Tell(XidSeen{GpusOf(8)[1], 79});
    job.After(absl::Seconds(1));
    job.Commit(60);
    job.Evidence();
    const auto down = job.AllDie();
    EXPECT_TRUE(job.history().checkpoints.back().facts.under_anomaly);
    if (older) {
      ASSERT_THAT(Only<StartRanks>(down), SizeIs(1));
      EXPECT_EQ(Only<StartRanks>(down)[0].restore.checkpoint->step, Step{50});
      continue;
    }
    const auto asked = Only<Ask>(down);
    ASSERT_THAT(asked, SizeIs(1));
    EXPECT_EQ(job.state(), State::kWaitingForApproval);
    TestJob vetoed = job;
    EXPECT_EQ(Only<ExitJob>(vetoed.Tell(Veto{asked[0].id})).at(0).code, 93);
    const auto starts = Only<StartRanks>(job.Tell(Approve{asked[0].id}));
    ASSERT_THAT(starts, SizeIs(1));
    EXPECT_EQ(starts[0].restore.checkpoint->step, Step{60});
  }
}

TEST(PolicyCheckpoints, ToBeginFromNothingAPersonIsAsked) {
  CheckpointFacts bad = CheckpointAt(100);
  bad.marked_bad = true;
  TestJob job;
  const auto asked = Only<Ask>(job.Begin(4, 4, {}, {bad}));
  ASSERT_THAT(asked, SizeIs(1));
  EXPECT_THAT(asked[0].question, HasSubstr("Begin from nothing?"));
  const auto starts = Only<StartRanks>(job.Tell(Approve{asked[0].id}));
  ASSERT_THAT(starts, SizeIs(1));
  EXPECT_EQ(starts[0].restore.kind, RestoreRule::Kind::kNothing);
}

TEST(PolicyCheckpoints, CrashesAndMarksOutliveARunAndAReadCatalog) {
  TestJob job = Training();
  PauseOf(job);
  PauseOf(job);  // the first crash of step 100
  job.Tell(CheckpointsRead{{CheckpointAt(50), CheckpointAt(100)}});
  EXPECT_EQ(job.history().checkpoints.back().crashes, 1);
  job.Begin(4, 4, {}, {CheckpointAt(50), CheckpointAt(100)});
  EXPECT_EQ(job.history().checkpoints.back().crashes, 1);
  EXPECT_EQ(job.history().restarts_charged, 0);
  EXPECT_GT(job.history().launch, Launch{3});
  EXPECT_EQ(job.history().past.back().outcome, Outcome::kResumed);
}

// ---- Lemons and stuck processes.

TEST(PolicyLemons, WhatAnEarlierJobExcludedIsLeftOutOrAskedOrIgnored) {
  LemonList lemons;
  lemons.Exclude(GpusOf(4)[1], {absl::FromUnixSeconds(1'764'150'000),
                                absl::FromUnixSeconds(1'764'150'000) + absl::Hours(1), "Xid 79"});
  Settings settings;
  TestJob spare(settings);
  EXPECT_THAT(Indices(Only<StartRanks>(spare.Begin(4, 5, lemons)).at(0).placement),
              ElementsAre(0, 2, 3, 4));
  TestJob none(settings);
  EXPECT_THAT(Only<StartRanks>(none.Begin(4, 4, lemons)), IsEmpty());
  EXPECT_EQ(none.state(), State::kWaitingForCapacity);
  EXPECT_EQ(HumanStep(settings, none.history()), "holdfast readmit 1 --job llama");
  EXPECT_THAT(Only<StartRanks>(none.Tell(Readmit{GpusOf(4)[1]})), SizeIs(1));

  settings.lemons = LemonPolicy::kIgnore;
  TestJob ignored(settings);
  EXPECT_THAT(Only<StartRanks>(ignored.Begin(4, 4, lemons)), SizeIs(1));

  settings.lemons = LemonPolicy::kAsk;
  TestJob asked(settings);
  const auto question = Only<Ask>(asked.Begin(4, 4, lemons));
  ASSERT_THAT(question, SizeIs(1));
  TestJob vetoed = asked;
  EXPECT_THAT(Only<StartRanks>(asked.Tell(Approve{question[0].id})), SizeIs(1));
  EXPECT_THAT(Only<StartRanks>(vetoed.Tell(Veto{question[0].id})), IsEmpty());
  EXPECT_EQ(vetoed.state(), State::kWaitingForCapacity);

  TestJob later(Settings{});
  later.After(absl::Hours(2));
  EXPECT_THAT(Only<StartRanks>(later.Begin(4, 4, lemons)), SizeIs(1)) << "it has expired";
}

TEST(PolicyStuck, AProcessThatKillDoesNotEndTakesItsGpuWithIt) {
  Settings settings;
  settings.layouts = {{3, "dp=3", {}}};
  TestJob job = Training(settings);
  job.Dies(2);
  job.Evidence();
  for (const uint32_t rank : {0, 3}) job.Dies(rank, {ExitKind::kTerminated, 15});
  EXPECT_EQ(job.state(), State::kStopping);
  const auto starts = Only<StartRanks>(job.Wait(settings.stop_wait + settings.kill_wait));
  ASSERT_THAT(starts, SizeIs(1));
  EXPECT_THAT(Indices(starts[0].placement), ElementsAre(0, 2, 3));
  // It dies after all, and that is no new death.
  job.ComeUp(101);
  job.Tell(RankExited{Launch{1}, Rank{1}, {ExitKind::kKilled, 9}});
  EXPECT_THAT(job.history().stuck_ranks, IsEmpty());
  EXPECT_EQ(job.state(), State::kSaving) << "its GPU is there again: the job grows";
  EXPECT_EQ(job.history().incident->cause, Cause::kGrow);
}

TEST(PolicyStuck, OneThatDiesWhileGpusAreWaitedForGivesItsBack) {
  TestJob job = Training();
  job.Dies(2);
  job.Evidence();
  EXPECT_THAT(Only<StartRanks>(job.Wait(absl::Seconds(35))), IsEmpty());
  EXPECT_EQ(job.state(), State::kWaitingForCapacity);
  EXPECT_THAT(Only<StartRanks>(job.AllDie()), SizeIs(1));
  EXPECT_EQ(job.history().past.back().cause, Cause::kProcessDead);
}

// ---- Restarts of the agent.

AgentRestarted Found(const TestJob& job, bool same_clock = true) {
  AgentRestarted restarted;
  restarted.same_clock = same_clock;
  for (uint32_t r = 0; r < job.history().ranks.size(); ++r) {
    restarted.ranks.push_back({job.history().launch, Rank{r}, job.history().ranks[r].exit});
  }
  return restarted;
}

TEST(PolicyRestart, WhatIsUnderWayIsAskedForAgainInEveryPhase) {
  // Just started: nobody knows whether a rank was.
  TestJob job;
  const auto start = Only<StartRanks>(job.Begin());
  const auto again = Only<StartRanks>(job.Tell(AgentRestarted{true, {}}));
  ASSERT_THAT(again, SizeIs(1));
  EXPECT_EQ(Describe(again[0]), Describe(start[0]));
  EXPECT_EQ(again[0].launch, Launch{1});
  // Half of them were.
  const auto rest =
      job.Tell(AgentRestarted{true, {{Launch{1}, Rank{0}, {}}, {Launch{1}, Rank{1}, {}}}});
  EXPECT_THAT(Only<StartRanks>(rest), SizeIs(1));
  job.ComeUp(1);
  EXPECT_THAT(job.Tell(Found(job)), IsEmpty());

  job.Dies(2);
  EXPECT_THAT(Only<CollectEvidence>(job.Tell(Found(job))), SizeIs(1));
  const auto stop = Only<StopRanks>(job.Evidence());
  const auto stop_again = Only<StopRanks>(job.Tell(Found(job)));
  ASSERT_THAT(stop_again, SizeIs(1));
  EXPECT_EQ(stop_again[0].kill_at, stop[0].kill_at);
  EXPECT_THAT(Only<StartRanks>(job.AllDie()), SizeIs(1));
  job.ComeUp(2);

  job.Tell(SignalCame{EndSignal::kTerminate});
  EXPECT_THAT(Only<RequestSave>(job.Tell(Found(job))), SizeIs(1));
  job.Tell(SaveFailed{job.history().launch});
  job.AllDie();
  EXPECT_THAT(Only<ExitJob>(job.Tell(Found(job))), SizeIs(1));
}

TEST(PolicyRestart, ARankThatIsNotFoundIsDead) {
  TestJob job = Training();
  AgentRestarted found = Found(job);
  found.ranks.erase(found.ranks.begin() + 2);
  EXPECT_THAT(Only<CollectEvidence>(job.Tell(found)), SizeIs(1));
  EXPECT_EQ(job.history().ranks[2].exit.kind, ExitKind::kUnknown);
}

TEST(PolicyRestart, AfterABootEveryRankIsGoneAndTheJobGoesOn) {
  TestJob job = Training();
  job.After(-absl::Seconds(900));  // another boot's clock
  const auto actions = job.Tell(AgentRestarted{false, {}});
  EXPECT_THAT(Only<CollectEvidence>(actions), SizeIs(1));
  // Deadlines are on the clock of the new boot.
  EXPECT_EQ(Only<CollectEvidence>(actions)[0].deadline, job.now() + job.settings().evidence_wait);
  EXPECT_EQ(job.history().wake_at, job.now() + job.settings().evidence_wait);
  EXPECT_THAT(Only<StartRanks>(job.Wait(job.settings().evidence_wait)), SizeIs(1));
}

TEST(PolicyRestart, AnOpenQuestionIsAskedAgainWithTheSameId) {
  Settings settings;
  settings.mode = Mode::kAsk;
  TestJob job = Training(settings);
  job.Dies(2);
  const auto asked = Only<Ask>(job.Evidence());
  const auto again = Only<Ask>(job.Tell(Found(job)));
  ASSERT_THAT(again, SizeIs(1));
  EXPECT_EQ(again[0].id, asked.at(0).id);
}

TEST(PolicyRestart, RanksOfAnotherLaunchAreStoppedAndItsNumberIsNotUsedAgain) {
  TestJob job = Training();
  AgentRestarted found = Found(job);
  found.ranks.push_back({Launch{7}, Rank{0}, {}});
  const auto stops = Only<StopRanks>(job.Tell(found));
  ASSERT_THAT(stops, SizeIs(1));
  EXPECT_EQ(stops[0].launch, Launch{7});
  PauseOf(job);
  EXPECT_EQ(job.history().launch, Launch{8});
}

}  // namespace
}  // namespace holdfast::recovery
