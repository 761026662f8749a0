// What may go wrong with the telemetry changes confidence and scope, and when a verdict comes;
// never whom it accuses. And where nothing is wrong, nothing is said.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "monitor/sim/catalogue.h"
#include "monitor/sim/run.h"
#include "monitor/sim/world.h"

namespace holdfast::monitor::sim {
namespace {

// --- Nothing is wrong.

constexpr absl::Duration kCleanLength = absl::Minutes(20);

TEST(RobustnessTest, CleanWorldsRaiseNothing) {
  absl::Duration total;
  uint64_t iterations = 0;
  for (const NamedWorld& world : CleanWorlds(kCleanLength)) {
    SCOPED_TRACE(world.name);
    const Outcome outcome = Observe(world.options, kCleanLength);
    EXPECT_TRUE(outcome.faults_happened);
    EXPECT_TRUE(outcome.told.empty()) << Describe(outcome);
    EXPECT_GT(outcome.iterations, 500u);
    total += kCleanLength;
    iterations += outcome.iterations;
  }
  std::printf("%.1f simulated hours, %llu iterations without a finding\n",
              absl::ToDoubleHours(total), static_cast<unsigned long long>(iterations));
}

TEST(RobustnessTest, WhatIsInOrderIsANote) {
  WorldOptions options;
  options.faults = {FaultOf(FaultKind::kEvaluation, 2, 30)};
  const Outcome evaluation = Observe(options, absl::Seconds(60));
  ASSERT_EQ(evaluation.notes.size(), 1u) << Describe(evaluation);
  EXPECT_EQ(evaluation.notes[0].reason, WaitNote::Reason::kSection);
  EXPECT_EQ(evaluation.notes[0].rank, Rank{2});
  options.faults = {FaultOf(FaultKind::kEnginePause, 4, 10)};
  const Outcome engine = Observe(options, absl::Seconds(60));
  ASSERT_EQ(engine.notes.size(), 1u) << Describe(engine);
  EXPECT_EQ(engine.notes[0].reason, WaitNote::Reason::kEnginePause);
  options.faults.clear();
  options.data_parallel = 4;
  options.stages = 3;
  options.stage_weight = {1, 1, 1.4};
  const Outcome imbalance = Observe(options, absl::Seconds(60));
  ASSERT_EQ(imbalance.notes.size(), 1u) << Describe(imbalance);
  EXPECT_EQ(imbalance.notes[0].reason, WaitNote::Reason::kImbalance);
  EXPECT_EQ(imbalance.notes[0].rank, Rank{2});
}

// --- The telemetry has holes.

struct Accusation {
  FaultKind kind;
  double factor;
  Traffic traffic;
};

constexpr Accusation kAccusations[] = {
    {FaultKind::kGpuHang, 0, Traffic::kRing},       {FaultKind::kGpuHang, 0, Traffic::kAllToAll},
    {FaultKind::kNeverEnters, 0, Traffic::kRing},   {FaultKind::kKilled, 0, Traffic::kRing},
    {FaultKind::kKilled, 2, Traffic::kRing},        {FaultKind::kStopped, 0, Traffic::kTwoRings},
    {FaultKind::kNodeDies, 0, Traffic::kRing},      {FaultKind::kWrongSize, 0, Traffic::kRing},
    {FaultKind::kStarvedProxy, 0, Traffic::kRing},  {FaultKind::kLink, 0, Traffic::kTwoRings},
    {FaultKind::kSender, 0, Traffic::kTwoRings},    {FaultKind::kReceiver, 0, Traffic::kAllToAll},
    {FaultKind::kSender, 0.5, Traffic::kTwoRings},  {FaultKind::kReceiver, 0.5, Traffic::kAllToAll},
    {FaultKind::kLink, 0.3, Traffic::kTwoRings},    {FaultKind::kSlowGpu, 1.5, Traffic::kRing},
    {FaultKind::kSlowData, 0.5, Traffic::kTwoRings}};

bool Touches(const Finding& finding, uint32_t rank) {
  return std::any_of(finding.suspects.begin(), finding.suspects.end(), [&](const Suspect& s) {
    return s.rank == Rank{rank} || s.peer == Rank{rank};
  });
}

TEST(RobustnessTest, LostLateAndShuffledSummariesNeverTurnAVerdict) {
  int verdicts = 0, runs = 0;
  for (const Accusation& a : kAccusations) {
    for (uint32_t rank = 0; rank < 8; ++rank) {
      SCOPED_TRACE(testing::Message() << "kind " << static_cast<int>(a.kind) << ", rank " << rank);
      WorldOptions options;
      options.seed = 500 + rank;
      options.traffic = a.traffic;
      options.loss = 0.05;
      options.lateness = 0.05;
      options.clock_drift = 1e-3;
      options.faults = {FaultOf(a.kind, rank, a.factor, (rank + 1) % 8)};
      const Outcome outcome = Observe(options, absl::Seconds(110));
      SCOPED_TRACE(Describe(outcome));
      ASSERT_TRUE(outcome.faults_happened);
      ++runs;
      for (const Told& told : outcome.told) {
        EXPECT_TRUE(Touches(told.finding, rank));
        EXPECT_LE(told.finding.suspects.size(), 1u);
        verdicts += told.verdict.has_value() ? 1 : 0;
      }
    }
  }
  EXPECT_EQ(verdicts, runs);
}

// In a pipeline a rank may have stood in one communicator for longer than in the one in which it
// waits for the culprit: until that shows, it seems to wait for nobody.
TEST(RobustnessTest, AVictimThatMovedLaterElsewhereIsNotSuspected) {
  for (uint32_t rank = 0; rank < 12; ++rank) {
    WorldOptions options;
    options.seed = 50'015;
    options.compute_noise = 0.01;
    options.data_parallel = 4;
    options.stages = 3;
    options.loss = 0.01;
    options.lateness = 0.01;
    options.clock_drift = 1e-4;
    options.faults = {FaultOf(FaultKind::kGpuHang, rank, 0)};
    const Outcome outcome = Observe(options, kOnset + absl::Seconds(15));
    SCOPED_TRACE(testing::Message() << "rank " << rank << ": " << Describe(outcome));
    ASSERT_EQ(outcome.told.size(), 1u);
    EXPECT_TRUE(Touches(outcome.told[0].finding, rank));
  }
}

// With a plugin on 80% of the ranks: what is told of the others comes from their agents.
TEST(RobustnessTest, RanksWithoutPluginNeverTurnAVerdict) {
  constexpr uint32_t kSeed = 99;
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  std::mt19937 random(kSeed);
  int visible = 0, named_visible = 0, blind = 0, named_blind = 0;
  for (const Accusation& a : kAccusations) {
    for (uint32_t rank = 0; rank < 10; ++rank) {
      WorldOptions options;
      options.data_parallel = 10;
      options.seed = 600 + rank;
      options.traffic = a.traffic;
      options.faults = {FaultOf(a.kind, rank, a.factor, (rank + 1) % 10)};
      const uint32_t first = random() % 10;
      options.blind = {first, (first + 1 + static_cast<uint32_t>(random() % 9)) % 10};
      const bool hidden = std::count(options.blind.begin(), options.blind.end(), rank) > 0;
      SCOPED_TRACE(testing::Message() << "kind " << static_cast<int>(a.kind) << ", rank " << rank
                                      << ", blind " << options.blind[0] << " " << options.blind[1]);
      const Outcome outcome = Observe(options, absl::Seconds(110));
      SCOPED_TRACE(Describe(outcome));
      bool named = false, guessed = false;
      for (const Told& told : outcome.told) {
        named |= told.verdict.has_value();
        EXPECT_LT(told.finding.confidence, 0.95);
        if (told.finding.scope == Scope::kBehindBlindRank) {
          EXPECT_FALSE(told.verdict.has_value());
          guessed = true;
          continue;
        }
        EXPECT_TRUE(Touches(told.finding, rank));
      }
      // Who is visible and to blame clears those without telemetry.
      EXPECT_FALSE(named && guessed);
      (hidden ? blind : visible) += 1;
      (hidden ? named_blind : named_visible) += named ? 1 : 0;
    }
  }
  std::printf("culprit visible: %d of %d named; culprit without plugin: %d of %d named\n",
              named_visible, visible, named_blind, blind);
  EXPECT_GE(named_visible, visible * 7 / 10);
  EXPECT_GE(named_blind, 1);
}

TEST(RobustnessTest, TheOrderOfArrivalChangesNothing) {
  constexpr uint32_t kSeed = 4;
  for (const Accusation& a : kAccusations) {
    WorldOptions options;
    options.traffic = a.traffic;
    options.lateness = 0.1;
    options.faults = {FaultOf(a.kind, 5, a.factor, 6)};
    const std::string once = Describe(Observe(options, absl::Seconds(100)));
    std::mt19937 random(kSeed);
    const std::string again =
        Describe(Observe(options, absl::Seconds(100), {}, [&](Snapshot& snapshot) {
          std::shuffle(snapshot.arrived.begin(), snapshot.arrived.end(), random);
          // And what has come once comes again.
          if (!snapshot.arrived.empty()) snapshot.arrived.push_back(snapshot.arrived.front());
        }));
    EXPECT_EQ(once, again) << "kind " << static_cast<int>(a.kind);
    EXPECT_NE(once.find("verdict"), std::string::npos) << "kind " << static_cast<int>(a.kind);
  }
}

// --- Two things are wrong at once.

struct Pair {
  FaultKind first;
  double first_factor;
  FaultClass first_class;
  FaultKind second;
  double second_factor;
  FaultClass second_class;
};

constexpr Pair kPairs[] = {
    {FaultKind::kGpuHang, 0, FaultClass::kGpuHang, FaultKind::kKilled, 0, FaultClass::kDead},
    {FaultKind::kGpuHang, 0, FaultClass::kGpuHang, FaultKind::kStopped, 0, FaultClass::kStopped},
    {FaultKind::kKilled, 0, FaultClass::kDead, FaultKind::kStopped, 0, FaultClass::kStopped},
    {FaultKind::kSlowGpu, 1.6, FaultClass::kLateCompute, FaultKind::kSender, 0.5,
     FaultClass::kSenderEnd},
    {FaultKind::kSender, 0.5, FaultClass::kSenderEnd, FaultKind::kReceiver, 0.5,
     FaultClass::kReceiverEnd},
    {FaultKind::kSlowGpu, 1.6, FaultClass::kLateCompute, FaultKind::kSlowGpu, 1.6,
     FaultClass::kLateCompute},
};

TEST(RobustnessTest, TwoFaultsAtOnceAreBothNamed) {
  for (const Pair& pair : kPairs) {
    for (uint32_t rank = 0; rank < 8; ++rank) {
      const uint32_t other = (rank + 3) % 8;
      SCOPED_TRACE(testing::Message()
                   << "kinds " << static_cast<int>(pair.first) << " and "
                   << static_cast<int>(pair.second) << ", ranks " << rank << " and " << other);
      WorldOptions options;
      options.traffic = Traffic::kTwoRings;
      options.seed = 700 + rank;
      options.faults = {FaultOf(pair.first, rank, pair.first_factor),
                        FaultOf(pair.second, other, pair.second_factor)};
      const Outcome outcome = Observe(options, absl::Seconds(110));
      SCOPED_TRACE(Describe(outcome));
      bool first = false, second = false;
      for (const Told& told : outcome.told) {
        const Finding& finding = told.finding;
        const Suspect who = finding.suspects.front();
        const bool is_first = finding.fault == pair.first_class && who.rank == Rank{rank};
        const bool is_second = finding.fault == pair.second_class && who.rank == Rank{other};
        EXPECT_TRUE(is_first || is_second) << Describe(finding);
        first |= is_first && told.verdict.has_value();
        second |= is_second && told.verdict.has_value();
      }
      EXPECT_TRUE(first);
      EXPECT_TRUE(second);
    }
  }
}

// Our own engine holds every rank up for a moment, every other second, and each report says that it
// did: what it held up is taken off, and the rest is judged.
TEST(RobustnessTest, WhoSavesAllTheTimeIsWatchedAllTheSame) {
  WorldOptions options;
  constexpr absl::Duration kLength = absl::Seconds(110);
  for (absl::Duration at; at < kOnset + kLength; at += absl::Seconds(2)) {
    for (uint32_t rank = 0; rank < options.data_parallel; ++rank) {
      Fault save = FaultOf(FaultKind::kEnginePause, rank, 0.1);
      save.onset = at;
      options.faults.push_back(save);
    }
  }
  const Outcome clean = Observe(options, kLength);
  EXPECT_TRUE(clean.told.empty()) << Describe(clean);
  options.faults.push_back(FaultOf(FaultKind::kSlowGpu, 5, 1.6));
  const Outcome slow = Observe(options, kLength);
  SCOPED_TRACE(Describe(slow));
  ASSERT_EQ(slow.told.size(), 1u);
  EXPECT_EQ(slow.told[0].finding.fault, FaultClass::kLateCompute);
  EXPECT_EQ(slow.told[0].finding.suspects.front().rank, Rank{5});
  EXPECT_TRUE(slow.told[0].verdict.has_value());
}

// --- Comings and goings.

TEST(RobustnessTest, WhatHealsIsWithdrawnAndKnownWhenItComesAgain) {
  WorldOptions options;
  Fault first = FaultOf(FaultKind::kStopped, 3, 0);
  first.end = kOnset + absl::Seconds(20);
  Fault second = first;
  second.onset = kOnset + absl::Seconds(60);
  second.end = kOnset + absl::Seconds(80);
  options.faults = {first, second};
  const Outcome outcome = Observe(options, absl::Seconds(140));
  ASSERT_EQ(outcome.told.size(), 1u) << Describe(outcome);
  EXPECT_TRUE(outcome.told[0].verdict.has_value());
  EXPECT_EQ(outcome.told[0].first - kOnset, absl::Seconds(4)) << Describe(outcome);
}

TEST(RobustnessTest, AFlappingLinkIsOneIncident) {
  for (uint32_t rank = 0; rank < 8; ++rank) {
    WorldOptions options;
    options.traffic = Traffic::kTwoRings;
    Fault flap = FaultOf(FaultKind::kLink, rank, 0.15, (rank + 1) % 8);
    flap.period = absl::Seconds(3);
    flap.duty = 0.6;
    options.faults = {flap};
    const Outcome outcome = Observe(options, absl::Seconds(300));
    ASSERT_EQ(outcome.told.size(), 1u) << Describe(outcome);
    EXPECT_EQ(outcome.told[0].finding.fault, FaultClass::kLink);
    EXPECT_EQ(outcome.told[0].finding.scope, Scope::kPath);
    EXPECT_LE(outcome.told[0].history.size(), 2u) << Describe(outcome);
  }
}

TEST(RobustnessTest, WithoutABaselineThereIsNoVerdictButDeath) {
  for (const FaultKind kind : {FaultKind::kGpuHang, FaultKind::kNeverEnters, FaultKind::kKilled}) {
    WorldOptions options;
    options.faults = {FaultOf(kind, 2, 0)};
    options.faults[0].onset = absl::Seconds(3);
    const Outcome outcome = Observe(options, absl::Seconds(300));
    ASSERT_EQ(outcome.told.size(), 1u) << Describe(outcome);
    EXPECT_TRUE(Touches(outcome.told[0].finding, 2));
    EXPECT_EQ(outcome.told[0].verdict.has_value(), kind == FaultKind::kKilled) << Describe(outcome);
    // Until the configured time-out.
    const Outcome later = Observe(options, absl::Seconds(620));
    EXPECT_TRUE(later.told[0].verdict.has_value());
  }
}

}  // namespace
}  // namespace holdfast::monitor::sim
