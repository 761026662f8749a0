// Every row of the default table (docs/RECOVERY.md), each mode, and what limits them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/recovery/policy_testing.h"

namespace holdfast::recovery {
namespace {

using monitor::ExitKind;
using monitor::FaultClass;
using monitor::Grade;
using monitor::Syndrome;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

TEST(PolicyTable, ARunBeginsWithOneStart) {
  TestJob job;
  const auto starts = Only<StartRanks>(job.Begin());
  ASSERT_THAT(starts, SizeIs(1));
  EXPECT_EQ(starts[0].launch, Launch{1});
  EXPECT_EQ(starts[0].restart_count, 0);
  EXPECT_THAT(Indices(starts[0].placement), ElementsAre(0, 1, 2, 3));
  EXPECT_EQ(starts[0].restore.kind, RestoreRule::Kind::kNewest);
  EXPECT_EQ(job.state(), State::kStarting);
  job.ComeUp(1);
  EXPECT_EQ(job.state(), State::kRunning);
}

TEST(PolicyTable, ADeadProcessIsRestartedAtOnce) {
  TestJob job = Training();
  const auto died = job.Dies(2);
  EXPECT_THAT(Only<CollectEvidence>(died), SizeIs(1));
  EXPECT_THAT(Only<StopRanks>(died), IsEmpty());
  EXPECT_EQ(job.state(), State::kCollecting);
  const auto stop = Only<StopRanks>(job.Evidence());
  ASSERT_THAT(stop, SizeIs(1));
  EXPECT_EQ(stop[0].kill_at, job.now() + job.settings().stop_wait);
  EXPECT_EQ(job.state(), State::kStopping);
  const auto starts = Only<StartRanks>(job.AllDie());
  ASSERT_THAT(starts, SizeIs(1));
  EXPECT_EQ(starts[0].launch, Launch{2});
  EXPECT_EQ(starts[0].restart_count, 1);
  EXPECT_EQ(starts[0].restore.checkpoint, CheckpointAt(100).id);
  EXPECT_THAT(Indices(starts[0].placement), ElementsAre(0, 1, 2, 3));
  job.ComeUp(101);
  ASSERT_THAT(job.history().past, SizeIs(1));
  EXPECT_EQ(job.history().past[0].outcome, Outcome::kResumed);
  EXPECT_EQ(job.history().past[0].lost_steps, 50);
  EXPECT_EQ(job.history().past[0].lost_work, absl::Seconds(30));
}

TEST(PolicyTable, EvidenceThatDoesNotComeIsWaitedForOnlySoLong) {
  TestJob job = Training();
  job.Dies(2);
  EXPECT_THAT(Only<StopRanks>(job.Wait(job.settings().evidence_wait - absl::Milliseconds(1))),
              IsEmpty());
  EXPECT_THAT(Only<StopRanks>(job.Wait(absl::Milliseconds(1))), SizeIs(1));
}

TEST(PolicyTable, WhenAllRestartsAreUsedUpItEndsWithOne) {
  Settings settings;
  settings.max_restarts = 2;
  TestJob job = Training(settings);
  for (int i = 0; i < 2; ++i) {
    job.Dies(0);
    job.Evidence();
    job.AllDie();
    job.Wait(absl::Minutes(1));
    job.ComeUp(101);
  }
  job.Dies(0);
  job.Evidence();
  const auto exits = Only<ExitJob>(job.AllDie());
  ASSERT_THAT(exits, SizeIs(1));
  EXPECT_EQ(exits[0].code, 1);
  EXPECT_EQ(job.state(), State::kGivenUp);
}

TEST(PolicyTable, AJobWhoseRanksAllEndWithZeroIsDone) {
  TestJob job = Training();
  const auto exits = Only<ExitJob>(job.AllDie({ExitKind::kClean, 0}));
  ASSERT_THAT(exits, SizeIs(1));
  EXPECT_EQ(exits[0].code, 0);
  EXPECT_EQ(job.state(), State::kDone);
}

TEST(PolicyTable, AGpuOfAnXidOfTheDrainSetIsExcludedAtOnceAndASpareTakesItsPlace) {
  TestJob job = Training({}, 4, 5);
  const auto seen = job.Tell(XidSeen{GpusOf(5)[1], 79});
  ASSERT_THAT(Only<RecordLemon>(seen), SizeIs(1));
  EXPECT_TRUE(Only<RecordLemon>(seen)[0].lemon.excluded.has_value());
  EXPECT_THAT(Only<CollectEvidence>(seen), SizeIs(1));
  EXPECT_EQ(job.history().incident->action, "restart without GPU 1");
  job.Evidence();
  const auto starts = Only<StartRanks>(job.AllDie());
  ASSERT_THAT(starts, SizeIs(1));
  EXPECT_THAT(Indices(starts[0].placement), ElementsAre(0, 2, 3, 4));
  EXPECT_EQ(starts[0].placement.layout, "dp=4");
}

TEST(PolicyTable, WithoutASpareAndALayoutItWaitsForGpusAndEndsWith75) {
  TestJob job = Training();
  job.Tell(XidSeen{GpusOf(4)[1], 79});
  job.Evidence();
  EXPECT_THAT(Only<StartRanks>(job.AllDie()), IsEmpty());
  EXPECT_EQ(job.state(), State::kWaitingForCapacity);
  const auto exits = Only<ExitJob>(job.Wait(job.settings().capacity_wait));
  ASSERT_THAT(exits, SizeIs(1));
  EXPECT_EQ(exits[0].code, 75);
}

TEST(PolicyTable, ADeclaredLayoutShrinksTheJobAndReadmittingGrowsItAtTheNextCheckpoint) {
  Settings settings;
  settings.layouts = {{2, "dp=2", 10}, {3, "dp=3", 10}};
  TestJob job = Training(settings);
  job.Tell(XidSeen{GpusOf(4)[3], 79});
  job.Dies(3, {ExitKind::kError, 1});
  job.Evidence();
  auto starts = Only<StartRanks>(job.AllDie());
  ASSERT_THAT(starts, SizeIs(1));
  EXPECT_THAT(Indices(starts[0].placement), ElementsAre(0, 1, 2));
  EXPECT_EQ(starts[0].placement.layout, "dp=3");
  job.ComeUp(101);
  EXPECT_EQ(job.state(), State::kRunning);

  const auto readmitted = job.Tell(Readmit{GpusOf(4)[3]});
  EXPECT_THAT(Only<ForgetLemon>(readmitted), SizeIs(1));
  EXPECT_THAT(Only<RequestSave>(readmitted), SizeIs(1));
  EXPECT_THAT(Only<StopRanks>(readmitted), IsEmpty());
  EXPECT_EQ(job.state(), State::kSaving);
  job.After(absl::Seconds(1));
  EXPECT_THAT(Only<StopRanks>(job.Commit(110)), SizeIs(1));
  starts = Only<StartRanks>(job.AllDie());
  ASSERT_THAT(starts, SizeIs(1));
  EXPECT_THAT(Indices(starts[0].placement), ElementsAre(0, 1, 2, 3));
  EXPECT_EQ(starts[0].placement.layout, "dp=4");
  EXPECT_EQ(starts[0].restore.checkpoint->step, Step{110});
  EXPECT_EQ(job.history().restarts_charged, 1);  // growing is free
}

TEST(PolicyTable, ALayoutThatDoesNotFitIsNotUsed) {
  Settings settings;
  settings.layouts = {{2, "dp=2", 90}, {3, "dp=3", 120}};
  settings.rank_bytes_max = 100;
  TestJob job = Training(settings);
  job.Tell(XidSeen{GpusOf(4)[3], 79});
  job.Evidence();
  const auto starts = Only<StartRanks>(job.AllDie());
  ASSERT_THAT(starts, SizeIs(1));
  EXPECT_THAT(Indices(starts[0].placement), ElementsAre(0, 1));
}

TEST(PolicyTable, AnXidThatAsksForAResetIsASignOfTheHardwareForTheNextHang) {
  TestJob job = Training({}, 4, 5);
  const auto seen = job.Tell(XidSeen{GpusOf(5)[2], 119});
  EXPECT_THAT(Only<CollectEvidence>(seen), IsEmpty());
  EXPECT_EQ(job.state(), State::kRunning);
  job.Tell(FindingOf(job.history(), FaultClass::kGpuHang, Syndrome::kCommunicationHang, {2}));
  job.Evidence();
  const auto starts = Only<StartRanks>(job.AllDie());
  ASSERT_THAT(starts, SizeIs(1));
  EXPECT_THAT(Indices(starts[0].placement), ElementsAre(0, 1, 3, 4));
}

TEST(PolicyTable, AnXidOfTheProgramDoesNothing) {
  TestJob job = Training();
  for (const int32_t code : {13, 31, 43, 45, 63, 9999}) {
    EXPECT_THAT(job.Tell(XidSeen{GpusOf(4)[2], code}), IsEmpty()) << code;
  }
  EXPECT_THAT(job.Tell(XidSeen{{"n9", 2, "GPU-other"}, 79}), IsEmpty()) << "another job's GPU";
}

TEST(PolicyTable, ANodeThatIsGoneIsLeftOut) {
  Settings settings;
  settings.layouts = {{2, "dp=2", {}}};
  TestJob job(settings);
  std::vector<Gpu> gpus = {{"n1", 0, ""}, {"n1", 1, ""}, {"n2", 0, ""}, {"n2", 1, ""}};
  job.Tell(RunBegun{"llama", 4, "dp=4", gpus, {}, {}});
  job.ComeUp(1);
  job.Tell(NodeGone{"n2"});
  job.Evidence();
  // Only the ranks that somebody can stop are waited for.
  job.Tell(RankExited{Launch{1}, Rank{0}, {ExitKind::kTerminated, 15}});
  const auto starts = Only<StartRanks>(job.Tell(RankExited{Launch{1}, Rank{1}, {}}));
  ASSERT_THAT(starts, SizeIs(1));
  EXPECT_EQ(starts[0].placement.gpus, (std::vector<Gpu>{gpus[0], gpus[1]}));
  job.ComeUp(2);
  // Whoever lives there still is stopped before its GPU is used.
  EXPECT_THAT(Only<StopRanks>(job.Tell(NodeBack{"n2"})), SizeIs(1));
  EXPECT_THAT(job.Tell(RankExited{Launch{1}, Rank{2}, {ExitKind::kKilled, 9}}), IsEmpty());
  EXPECT_THAT(Only<RequestSave>(job.Tell(RankExited{Launch{1}, Rank{3}, {ExitKind::kKilled, 9}})),
              SizeIs(1));
}

// ---- Hangs.

TEST(PolicyTable, AHangWithANamedCulpritIsRestartedInPlaceAndTheSecondTimeItsGpuIsExcluded) {
  TestJob job = Training({}, 4, 5);
  for (int time = 1; time <= 2; ++time) {
    const auto told =
        job.Tell(FindingOf(job.history(), FaultClass::kGpuHang, Syndrome::kCommunicationHang, {2}));
    ASSERT_THAT(Only<CollectEvidence>(told), SizeIs(1));
    EXPECT_THAT(Only<CollectEvidence>(told)[0].suspects, ElementsAre(Rank{2}));
    EXPECT_THAT(Only<StopRanks>(job.Evidence()), SizeIs(1));
    auto actions = job.AllDie();
    TestJob::Append(actions, job.Wait(absl::Minutes(1)));
    const auto starts = Only<StartRanks>(actions);
    ASSERT_THAT(starts, SizeIs(1));
    if (time == 1) {
      EXPECT_THAT(Indices(starts[0].placement), ElementsAre(0, 1, 2, 3));
    } else {
      EXPECT_THAT(Indices(starts[0].placement), ElementsAre(0, 1, 3, 4));
    }
    job.ComeUp(101);
  }
}

TEST(PolicyTable, HangsOfOneGpuCountAcrossJobs) {
  LemonList lemons;
  lemons.Mark(GpusOf(5)[2], {absl::FromUnixSeconds(1'764'150'000), "another", "comm hang", false});
  TestJob job;
  job.Begin(4, 5, lemons);
  job.ComeUp(1);
  job.Tell(FindingOf(job.history(), FaultClass::kGpuHang, Syndrome::kCommunicationHang, {2}));
  job.Evidence();
  const auto starts = Only<StartRanks>(job.AllDie());
  ASSERT_THAT(starts, SizeIs(1));
  EXPECT_THAT(Indices(starts[0].placement), ElementsAre(0, 1, 3, 4));
}

TEST(PolicyTable, AStoppedProcessSaysNothingAboutItsGpu) {
  Settings settings;
  settings.hangs_to_exclude = 1;
  TestJob job = Training(settings, 4, 5);
  job.Tell(FindingOf(job.history(), FaultClass::kStopped, Syndrome::kNonCommunicationHang, {2}));
  job.Evidence();
  const auto starts = Only<StartRanks>(job.AllDie());
  ASSERT_THAT(starts, SizeIs(1));
  EXPECT_THAT(Indices(starts[0].placement), ElementsAre(0, 1, 2, 3));
}

TEST(PolicyTable, ExclusionsWithoutASignOfTheHardwareAreLimited) {
  Settings settings;
  settings.hangs_to_exclude = 1;
  settings.exclusions_max = 1;
  TestJob job = Training(settings, 4, 8);
  for (const uint32_t rank : {1, 2}) {
    job.Tell(FindingOf(job.history(), FaultClass::kGpuHang, Syndrome::kCommunicationHang, {rank}));
    job.Recover(101);
    job.Wait(absl::Minutes(2));
    if (job.state() == State::kStarting) job.ComeUp(101);
  }
  EXPECT_THAT(Indices(job.history().placement), ElementsAre(0, 2, 3, 4));
}

// A hang that nobody is named for, one source only, or a busy suspect: evidence at once, action at
// the time-out.
TEST(PolicyTable, WhatMayPassIsActedOnAtTheTimeoutOnly) {
  struct Case {
    const char* name;
    FaultClass fault;
    monitor::Scope scope;
    std::vector<uint32_t> suspects;
    size_t sources;
  };
  for (const Case& c :
       {Case{"nobody", FaultClass::kUnknown, monitor::Scope::kCommunicator, {}, 2},
        Case{"one source", FaultClass::kLink, monitor::Scope::kConnection, {2}, 1},
        Case{"data", FaultClass::kLateData, monitor::Scope::kRankLate, {2}, 2},
        Case{"computes", FaultClass::kLateCompute, monitor::Scope::kRankLate, {2}, 2},
        Case{"pause", FaultClass::kPauseOverdue, monitor::Scope::kRankLate, {2}, 2},
        Case{"busy", FaultClass::kNeverEntered, monitor::Scope::kRankLate, {2}, 2},
        Case{"silent node", FaultClass::kNodeSilent, monitor::Scope::kNode, {2}, 2}}) {
    for (const std::optional<absl::Duration> learned :
         {std::optional<absl::Duration>(absl::Seconds(90)), std::optional<absl::Duration>()}) {
      SCOPED_TRACE(c.name);
      TestJob job = Training();
      FindingTold told =
          FindingOf(job.history(), c.fault, Syndrome::kNonCommunicationHang, c.suspects);
      told.finding.scope = c.scope;
      told.finding.evidence.resize(c.sources);
      told.timeout = learned;
      // A verdict of a busy suspect, or of nobody, comes at the monitor's own time-out.
      const bool is_timeout = c.fault != FaultClass::kLink && c.fault != FaultClass::kNodeSilent;
      const absl::Duration timeout =
          learned.value_or(is_timeout ? told.standing : job.settings().hang_timeout);
      EXPECT_THAT(Only<CollectEvidence>(job.Tell(told)), SizeIs(1));
      const absl::Duration left = timeout - told.standing;
      if (left == absl::ZeroDuration()) {
        EXPECT_THAT(Only<StopRanks>(job.Evidence()), SizeIs(1));
        continue;
      }
      EXPECT_EQ(job.state(), State::kStalled);
      job.Evidence();
      EXPECT_THAT(Only<StopRanks>(job.Wait(left - absl::Milliseconds(1))), IsEmpty());
      EXPECT_EQ(job.state(), State::kStalled);
      EXPECT_THAT(Only<StopRanks>(job.Wait(absl::Milliseconds(1))), SizeIs(1));
      EXPECT_THAT(Indices(Only<StartRanks>(job.AllDie())[0].placement), ElementsAre(0, 1, 2, 3));
    }
  }
}

TEST(PolicyTable, AHeartbeatBeyondItsTimeoutNeedsNoMonitor) {
  TestJob job = Training();
  job.Tell(SightChanged{Sight::kBlind});
  EXPECT_EQ(job.state(), State::kRunning);
  job.Tell(RankTimedOut{Launch{1}, Rank{3}, "step", absl::Seconds(60), absl::Seconds(60)});
  EXPECT_EQ(job.state(), State::kCollecting);
  EXPECT_EQ(job.history().incident->onset, job.history().now - absl::Seconds(60));
  EXPECT_THAT(Only<StopRanks>(job.Evidence()), SizeIs(1));
}

// Told in one event, or one after the other.
TEST(PolicyTable, WhenAllRanksAreSilentNobodyIsNamedAndNoGpuIsBlamed) {
  for (const bool at_once : {true, false}) {
    SCOPED_TRACE(at_once);
    TestJob job = Training();
    for (int again = 0; again < 2; ++again) {
      const Launch launch = job.history().launch;
      std::vector<Action> actions;
      RankTimedOut late{launch, Rank{0}, "", absl::Seconds(60), absl::Seconds(60), {}};
      if (at_once) {
        late.with = {Rank{1}, Rank{2}, Rank{3}};
        actions = job.Tell(late);
        const std::vector<CollectEvidence> asked = Only<CollectEvidence>(actions);
        ASSERT_THAT(asked, SizeIs(1));
        EXPECT_THAT(asked[0].suspects, IsEmpty());
      } else {
        for (uint32_t r = 0; r < 4; ++r) {
          late.rank = Rank{r};
          TestJob::Append(actions, job.Tell(late));
        }
      }
      ASSERT_TRUE(job.history().incident.has_value());
      const Incident& incident = *job.history().incident;
      EXPECT_EQ(incident.cause, Cause::kHang);
      EXPECT_THAT(incident.suspects, IsEmpty());
      EXPECT_EQ(incident.what, "all ranks silent");
      EXPECT_EQ(incident.sentence,
                "All ranks are silent: no sign of life from any of 4 within the time-out.");
      EXPECT_EQ(incident.confidence_permille, 0);
      EXPECT_EQ(incident.action, "restart in place");
      // However often it happens.
      TestJob::Append(actions, job.Evidence());
      TestJob::Append(actions, job.AllDie());
      TestJob::Append(actions, job.Wait(absl::Minutes(10)));
      EXPECT_THAT(Only<RecordLemon>(actions), IsEmpty());
      const std::vector<StartRanks> starts = Only<StartRanks>(actions);
      ASSERT_THAT(starts, SizeIs(1));
      EXPECT_THAT(Indices(starts[0].placement), ElementsAre(0, 1, 2, 3));
      job.ComeUp(200);
    }
  }
}

TEST(PolicyTable, OneRankThatIsSilentWhileTheOthersGoOnIsTheOne) {
  TestJob job = Training();
  job.Tell(RankTimedOut{Launch{1}, Rank{2}, "", absl::Seconds(60), absl::Seconds(60), {}});
  ASSERT_THAT(job.history().incident->suspects, SizeIs(1));
  EXPECT_EQ(job.history().incident->suspects[0].rank, Rank{2});
  // With a second one it is neither.
  job.Tell(RankTimedOut{Launch{1}, Rank{0}, "", absl::Seconds(60), absl::Seconds(60), {}});
  EXPECT_THAT(job.history().incident->suspects, IsEmpty());
  EXPECT_EQ(job.history().incident->sentence,
            "No sign of life from ranks 0, 2 within the time-out.");
}

// Beside another launcher (agent/run/sidecar.h).
TEST(PolicyTable, OfAnotherLaunchersJobNeitherGpuNorCheckpointIsChosen) {
  Settings settings;
  settings.launcher = Launcher::kOther;
  TestJob job = Training(settings);
  job.history().checkpoints.back().facts.marked_bad = true;
  for (int again = 0; again < 4; ++again) {
    std::vector<Action> actions = job.Tell(
        FindingOf(job.history(), FaultClass::kGpuFault, Syndrome::kNonCommunicationHang, {2}));
    EXPECT_EQ(job.history().incident->action, "restart in place");
    TestJob::Append(actions, job.Evidence());
    // Its ranks are never given up, and the next attempt waits for nothing else.
    TestJob::Append(actions, job.Wait(absl::Hours(1)));
    EXPECT_EQ(job.state(), State::kStopping);
    TestJob::Append(actions, job.AllDie());
    const std::vector<StartRanks> starts = Only<StartRanks>(actions);
    ASSERT_THAT(starts, SizeIs(1));
    EXPECT_THAT(Indices(starts[0].placement), ElementsAre(0, 1, 2, 3));
    EXPECT_EQ(starts[0].restore.kind, RestoreRule::Kind::kNewest);
    EXPECT_THAT(Only<RecordLemon>(actions), IsEmpty());
    EXPECT_FALSE(job.history().proposal.has_value());
    job.ComeUp(101);
    EXPECT_EQ(job.history().past.back().outcome, Outcome::kResumed);
  }
}

TEST(PolicyTable, AHeartbeatThatComesAfterAllEndsTheIncident) {
  TestJob job = Training();
  job.Tell(RankTimedOut{Launch{1}, Rank{3}, "", absl::Seconds(60), absl::Seconds(60)});
  job.Tell(RankBeats{Launch{1}, Rank{3}});
  EXPECT_EQ(job.state(), State::kRunning);
  EXPECT_THAT(Only<StopRanks>(job.Evidence()), IsEmpty());
  EXPECT_EQ(job.history().past.back().outcome, Outcome::kWithdrawn);
}

TEST(PolicyTable, AStartThatNeverComesToAStepIsRestartedIfTheJobIsKnownToTellItsSteps) {
  TestJob job = Training();
  job.Dies(1);
  job.Evidence();
  job.AllDie();
  EXPECT_EQ(job.state(), State::kStarting);
  EXPECT_THAT(Only<CollectEvidence>(job.Wait(job.settings().start_wait)), SizeIs(1));
  // A first attempt that tells nothing is left alone, however long it takes.
  TestJob silent;
  silent.Begin();
  for (uint32_t r = 0; r < 4; ++r) silent.Tell(RankStarted{Launch{1}, Rank{r}});
  EXPECT_THAT(silent.Wait(absl::Hours(100)), IsEmpty());
  EXPECT_EQ(silent.state(), State::kRunning);
}

// ---- The program.

TEST(PolicyTable, AMismatchIsRestartedOnceAndTheSameAgainEndsWith93) {
  for (const FaultClass fault : {FaultClass::kMismatch, FaultClass::kDeadlock}) {
    TestJob job = Training();
    FindingTold told = FindingOf(job.history(), fault, Syndrome::kCommunicationHang, {2});
    told.finding.sentence = "Rank 2 calls all-reduce of 10 elements as number 4711.";
    EXPECT_THAT(Only<CollectEvidence>(job.Tell(told)), SizeIs(1));
    job.Recover(101);
    EXPECT_EQ(job.state(), State::kRunning);
    told.launch = job.history().launch;
    told.finding.sentence = "Rank 3 calls all-reduce of 10 elements as number 9.";
    job.Tell(told);
    job.Evidence();
    const auto exits = Only<ExitJob>(job.AllDie());
    ASSERT_THAT(exits, SizeIs(1));
    EXPECT_EQ(exits[0].code, 93);
  }
}

TEST(PolicyTable, AnotherMismatchIsAnotherOne) {
  TestJob job = Training();
  for (const char* const sentence : {"Rank 2 calls broadcast.", "Rank 2 calls all-to-all."}) {
    FindingTold told =
        FindingOf(job.history(), FaultClass::kMismatch, Syndrome::kCommunicationHang, {2});
    told.finding.sentence = sentence;
    job.Tell(told);
    job.Evidence();
    job.AllDie();
    job.Wait(absl::Minutes(1));
    EXPECT_EQ(job.state(), State::kStarting);
    job.ComeUp(101);
  }
}

TEST(PolicyTable, AnExitCodeThatMeansUsageEndsWith93) {
  for (const int32_t code : Settings().no_restart_codes) {
    TestJob job = Training();
    job.Dies(0, {ExitKind::kError, 1});
    job.Dies(1, {ExitKind::kError, code});
    job.Evidence();
    const auto exits = Only<ExitJob>(job.AllDie());
    ASSERT_THAT(exits, SizeIs(1));
    EXPECT_EQ(exits[0].code, 93);
    EXPECT_THAT(exits[0].why, HasSubstr(absl::StrCat("rank 1 exited with status ", code)));
  }
}

// ---- Slowness.

TEST(PolicyTable, SlownessIsReportedOrReplacedIfThatPays) {
  struct Case {
    SlowPolicy policy;
    uint32_t gpus;
    uint32_t slow_permille;
    absl::Duration horizon;
    bool acts;
  };
  for (const Case& c :
       {Case{SlowPolicy::kReport, 5, 2000, absl::Hours(24), false},
        Case{SlowPolicy::kReplaceAtCheckpoint, 5, 2000, absl::Hours(24), true},
        Case{SlowPolicy::kReplaceAtCheckpoint, 5, 2000, absl::Seconds(17), false},  // 8.5 s < 9 s
        Case{SlowPolicy::kReplaceAtCheckpoint, 5, 2000, absl::Seconds(19), true},   // 9.5 s > 9 s
        Case{SlowPolicy::kReplaceAtCheckpoint, 5, 1000, absl::Hours(24), false},
        Case{SlowPolicy::kReplaceAtCheckpoint, 5, 0, absl::Hours(24), false},  // not measured
        // Without a spare: three of four ranks, 0.75 of the speed, against 1/1.25 and 1/1.5.
        Case{SlowPolicy::kReplaceAtCheckpoint, 4, 1250, absl::Hours(24), false},
        Case{SlowPolicy::kReplaceAtCheckpoint, 4, 1500, absl::Hours(24), true}}) {
    SCOPED_TRACE(absl::StrCat(c.gpus, " ", c.slow_permille, " ", absl::FormatDuration(c.horizon)));
    Settings settings;
    settings.slow = c.policy;
    settings.slow_horizon = c.horizon;
    settings.layouts = {{3, "dp=3", {}}};
    TestJob job = Training(settings, 4, c.gpus);  // a start takes 4 s, stop_wait is 5 s
    FindingTold told =
        FindingOf(job.history(), FaultClass::kLink, Syndrome::kCommunicationSlow, {2});
    told.slow_permille = c.slow_permille;
    const auto actions = job.Tell(told);
    EXPECT_THAT(Only<StopRanks>(actions), IsEmpty());
    EXPECT_THAT(Only<RequestSave>(actions), SizeIs(c.acts ? 1 : 0));
    if (!c.acts) {
      EXPECT_EQ(job.state(), State::kSuspected);
      continue;
    }
    job.After(absl::Seconds(1));
    EXPECT_THAT(Only<StopRanks>(job.Commit(160)), SizeIs(1));
    const auto starts = Only<StartRanks>(job.AllDie());
    ASSERT_THAT(starts, SizeIs(1));
    EXPECT_EQ(starts[0].placement.world_size(), c.gpus - 1);
    EXPECT_THAT(Indices(starts[0].placement), testing::Not(testing::Contains(2)));
  }
}

// ---- What never stops anything.

TEST(PolicyTable, AWithdrawnFindingIsNeverActedOn) {
  // Withdrawn in each state that comes before stopping.
  for (const bool evidence : {false, true}) {
    for (const Mode mode : {Mode::kAct, Mode::kAsk, Mode::kObserve}) {
      for (const uint32_t sources : {1, 2}) {
        Settings settings;
        settings.mode = mode;
        TestJob job = Training(settings);
        FindingTold told =
            FindingOf(job.history(), FaultClass::kGpuHang, Syndrome::kCommunicationHang, {2});
        told.finding.evidence.resize(sources);
        job.Tell(told);
        if (evidence && (mode != Mode::kAct || sources == 1)) job.Evidence();
        EXPECT_NE(job.state(), State::kRunning);
        const auto withdrawn = job.Tell(FindingWithdrawn{told.finding.id});
        EXPECT_EQ(job.state(), State::kRunning);
        EXPECT_FALSE(job.history().proposal.has_value());
        EXPECT_THAT(withdrawn, IsEmpty());
        EXPECT_THAT(job.Wait(absl::Hours(1)), IsEmpty());
      }
    }
  }
}

TEST(PolicyTable, ASuspicionIsOnlyShown) {
  for (size_t fault = 0; fault < monitor::kFaultClasses; ++fault) {
    TestJob job = Training();
    const auto told = job.Tell(FindingOf(job.history(), static_cast<FaultClass>(fault),
                                         Syndrome::kCommunicationHang, {2}, Grade::kSuspicion));
    EXPECT_THAT(told, IsEmpty());
    EXPECT_EQ(job.state(), State::kSuspected);
    EXPECT_THAT(job.Wait(absl::Hours(10)), IsEmpty());
  }
}

TEST(PolicyTable, AVerdictAboutAnEarlierLaunchChangesNothing) {
  TestJob job = Training();
  FindingTold told =
      FindingOf(job.history(), FaultClass::kGpuHang, Syndrome::kCommunicationHang, {2});
  job.Dies(2);
  job.Recover(101);
  EXPECT_THAT(job.Tell(told), IsEmpty());
  EXPECT_THAT(job.Tell(RankExited{Launch{1}, Rank{0}, {ExitKind::kKilled, 9}}), IsEmpty());
  EXPECT_THAT(job.Tell(RankTimedOut{Launch{1}, Rank{0}, "", absl::Hours(1), absl::Minutes(1)}),
              IsEmpty());
  EXPECT_EQ(job.state(), State::kRunning);
}

}  // namespace
}  // namespace holdfast::recovery
