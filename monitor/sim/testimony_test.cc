// How other witnesses change what the analysis says: what they agree to comes earlier or with more
// confidence, what they contradict keeps its direction, and where telemetry is blind they speak
// alone. The jobs are simulated; the testimonies are the test's own, of every source and claim.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "monitor/sim/catalogue.h"
#include "monitor/sim/run.h"
#include "monitor/sim/world.h"
#include "monitor/testimony_book.h"

namespace holdfast::monitor::sim {
namespace {

constexpr absl::Duration kLength = absl::Seconds(75);

Testimony Say(Source source, Claim claim, std::vector<Rank> ranks, double certainty = 0.9) {
  Testimony testimony;
  testimony.source = source;
  testimony.claim = claim;
  testimony.ranks = std::move(ranks);
  testimony.certainty = certainty;
  testimony.sentence = "so it is";
  return testimony;
}

// From three seconds after the onset on the testimonies come every second, as if every suspicion
// had asked again.
Outcome Hear(const WorldOptions& options, const std::vector<Testimony>& said) {
  return Observe(options, kLength, {}, [&](Snapshot& snapshot) {
    if (snapshot.elapsed < kOnset + absl::Seconds(3)) return;
    snapshot.testimonies = said;
    for (Testimony& testimony : snapshot.testimonies) {
      testimony.standing = snapshot.elapsed - kOnset;
    }
  });
}

WorldOptions With(FaultKind kind, uint32_t rank, uint32_t peer = 0) {
  WorldOptions options;
  Fault fault;
  fault.kind = kind;
  fault.rank = rank;
  fault.peer = peer;
  fault.onset = kOnset;
  options.faults = {fault};
  return options;
}

// The only thing that was told.
Told Only(const Outcome& outcome) {
  EXPECT_TRUE(outcome.faults_happened);
  EXPECT_EQ(outcome.told.size(), 1u) << Describe(outcome);
  return outcome.told.empty() ? Told() : outcome.told.front();
}

TEST(TestimonyInAnalysisTest, WhoAgreesAddsEvidenceAndConfidence) {
  for (const FaultKind kind : {FaultKind::kGpuHang, FaultKind::kNeverEnters}) {
    const WorldOptions options = With(kind, 3);
    const Told without = Only(Hear(options, {}));
    for (const Source source : {Source::kStacks, Source::kRas, Source::kFlightRecorder}) {
      const Told with = Only(Hear(options, {Say(source, Claim::kOddStack, {Rank{3}})}));
      EXPECT_EQ(with.finding.suspects, without.finding.suspects);
      EXPECT_EQ(with.finding.fault, without.finding.fault);
      EXPECT_GT(with.finding.confidence, without.finding.confidence);
      EXPECT_EQ(with.finding.evidence.size(), without.finding.evidence.size() + 1);
      ASSERT_TRUE(with.verdict.has_value());
      EXPECT_LE(*with.verdict, *without.verdict);
    }
  }
}

// Whatever is said of whomever: the same suspects, the same fault, a verdict at the same time.
TEST(TestimonyInAnalysisTest, WhoContradictsLowersConfidenceAndNothingElse) {
  const WorldOptions options = With(FaultKind::kGpuHang, 3);
  const Told without = Only(Hear(options, {}));
  ASSERT_TRUE(without.verdict.has_value());
  for (size_t claim = 0; claim < kClaims; ++claim) {
    for (const uint32_t rank : {0u, 2u, 7u}) {
      const auto what = static_cast<Claim>(claim);
      if (what == Claim::kGpuFault) continue;  // a second fault: below
      const Told with = Only(Hear(options, {Say(Source::kRas, what, {Rank{rank}})}));
      SCOPED_TRACE(std::string(Name(what)));
      EXPECT_EQ(with.finding.suspects, without.finding.suspects);
      EXPECT_EQ(with.finding.fault, without.finding.fault);
      EXPECT_EQ(with.verdict, without.verdict);
      const bool accuses = what == Claim::kNeverEntered || what == Claim::kBehind ||
                           what == Claim::kDiffers || what == Claim::kMissing ||
                           what == Claim::kOddStack;
      if (accuses) {
        EXPECT_LT(with.finding.confidence, without.finding.confidence);
      } else {
        EXPECT_EQ(with.finding.confidence, without.finding.confidence);
      }
    }
  }
}

// A line of evidence for each source, however many nodes have not heard it; heard again, it is
// gone.
TEST(TestimonyInAnalysisTest, WhoWasNotHeardIsSaidInTheEvidence) {
  const WorldOptions options = With(FaultKind::kGpuHang, 3);
  const Told without = Only(Hear(options, {}));
  const auto state = [](Source source, const std::string& node, bool heard) {
    return ToTestimony({source, node, heard, "of " + node});
  };
  const Told with =
      Only(Hear(options, {state(Source::kRas, "n1", false), state(Source::kRas, "n2", true),
                          state(Source::kRas, "n3", false), state(Source::kNvml, "n1", true),
                          state(Source::kKernelLog, "n2", false)}));
  EXPECT_EQ(Describe(with.finding), Describe(without.finding));
  EXPECT_EQ(with.finding.confidence, without.finding.confidence);
  EXPECT_EQ(with.verdict, without.verdict);
  std::vector<std::string> evidence = without.finding.evidence;
  evidence.push_back("ras was not heard on n1 and 1 more nodes: of n1");
  evidence.push_back("kernel-log was not heard on n2: of n2");
  EXPECT_EQ(with.finding.evidence, evidence);
}

TEST(TestimonyBookTest, TheLastWordAboutASourceCounts) {
  const auto state = [](bool heard, absl::Duration age) {
    Testimony testimony = ToTestimony({Source::kRas, "n1", heard, heard ? "yes" : "no"});
    testimony.age = age;
    return testimony;
  };
  const Thresholds thresholds;
  TestimonyBook book;
  book.Take(absl::Seconds(10), std::vector<Testimony>{state(false, absl::ZeroDuration())},
            thresholds);
  EXPECT_EQ(book.states(), (std::vector<WitnessState>{{Source::kRas, "n1", false, "no"}}));
  book.Take(absl::Seconds(15), std::vector<Testimony>{state(true, absl::ZeroDuration())},
            thresholds);
  EXPECT_EQ(book.states(), (std::vector<WitnessState>{{Source::kRas, "n1", true, "yes"}}));
  // What comes late is not the last word.
  book.Take(absl::Seconds(16), std::vector<Testimony>{state(false, absl::Seconds(5))}, thresholds);
  EXPECT_EQ(book.states(), (std::vector<WitnessState>{{Source::kRas, "n1", true, "yes"}}));
  EXPECT_EQ(book.size(), 0u);  // none of them is about ranks
}

TEST(TestimonyInAnalysisTest, SomebodyWhoDidComeIsLessLikelyOneWhoNeverCame) {
  const WorldOptions options = With(FaultKind::kNeverEnters, 3);
  const Told without = Only(Hear(options, {}));
  const Told with =
      Only(Hear(options, {Say(Source::kFlightRecorder, Claim::kEntered, {Rank{3}, Rank{4}})}));
  EXPECT_LT(with.finding.confidence, without.finding.confidence);
  EXPECT_EQ(with.finding.suspects, without.finding.suspects);
}

TEST(TestimonyInAnalysisTest, ABlindRankIsNamedByWhoSeesIt) {
  for (uint32_t rank = 0; rank < 8; ++rank) {
    WorldOptions options = With(FaultKind::kNeverEnters, rank);
    options.blind = {rank};
    const Told without = Only(Hear(options, {}));
    EXPECT_EQ(without.finding.scope, Scope::kBehindBlindRank);
    EXPECT_FALSE(without.verdict.has_value());

    const Testimony recorder = Say(Source::kFlightRecorder, Claim::kNeverEntered, {Rank{rank}});
    const Told one = Only(Hear(options, {recorder}));
    EXPECT_EQ(one.finding.suspects, (std::vector<Suspect>{{Rank{rank}, Rank{rank}}}));
    EXPECT_EQ(one.finding.fault, FaultClass::kNeverEntered);
    ASSERT_TRUE(one.verdict.has_value());
    EXPECT_GE(*one.verdict - kOnset, absl::Seconds(30));  // the first to name it is alone

    const Told two =
        Only(Hear(options, {recorder, Say(Source::kRas, Claim::kBehind, {Rank{rank}})}));
    ASSERT_TRUE(two.verdict.has_value());
    EXPECT_LE(*two.verdict - kOnset, absl::Seconds(10));
    EXPECT_GT(two.finding.confidence, one.finding.confidence);
    EXPECT_EQ(two.finding.id, one.finding.id);
  }
}

TEST(TestimonyInAnalysisTest, OneOfANodeIsNamedByItsStack) {
  WorldOptions options = With(FaultKind::kGpuHang, 5);
  options.ranks_per_node = 4;
  const Told without = Only(Hear(options, {}));
  ASSERT_EQ(without.finding.scope, Scope::kNode);
  ASSERT_GT(without.finding.suspects.size(), 1u);
  const Told with = Only(Hear(options, {Say(Source::kStacks, Claim::kOddStack, {Rank{5}})}));
  EXPECT_EQ(with.finding.suspects.front(), (Suspect{Rank{5}, Rank{5}}));
  EXPECT_EQ(with.finding.fault, FaultClass::kGpuHang);
}

TEST(TestimonyInAnalysisTest, TheDriversWordSaysWhy) {
  for (const FaultKind kind : {FaultKind::kGpuHang, FaultKind::kNeverEnters}) {
    const Told with =
        Only(Hear(With(kind, 3), {Say(Source::kKernelLog, Claim::kGpuFault, {Rank{3}}, 0.95)}));
    EXPECT_EQ(with.finding.fault, FaultClass::kGpuFault);
    EXPECT_EQ(with.finding.scope, Scope::kGpu);
    EXPECT_EQ(with.finding.suspects, (std::vector<Suspect>{{Rank{3}, Rank{3}}}));
    ASSERT_TRUE(with.verdict.has_value());
    EXPECT_LE(*with.verdict - kOnset, absl::Seconds(5));
  }
  // One that a program causes says nothing by itself.
  const Told program = Only(Hear(With(FaultKind::kGpuHang, 3),
                                 {Say(Source::kKernelLog, Claim::kGpuFault, {Rank{3}}, 0.6)}));
  EXPECT_EQ(program.finding.fault, FaultClass::kGpuHang);
}

TEST(TestimonyInAnalysisTest, AHealthyJobIsNotAccusedByWitnesses) {
  for (size_t source = 0; source < kSources; ++source) {
    for (size_t claim = 0; claim < kClaims; ++claim) {
      if (static_cast<Claim>(claim) == Claim::kGpuFault) continue;
      const Outcome outcome =
          Hear({}, {Say(static_cast<Source>(source), static_cast<Claim>(claim), {Rank{3}})});
      EXPECT_TRUE(outcome.told.empty()) << Describe(outcome);
    }
  }
  // The driver's word needs no telemetry.
  WorldOptions healthy;
  const Outcome lost = Hear(healthy, {Say(Source::kKernelLog, Claim::kGpuFault, {Rank{3}}, 0.95)});
  ASSERT_EQ(lost.told.size(), 1u);
  EXPECT_EQ(Describe(lost.told[0].finding), "verdict gpu-fault gpu 3");
}

TEST(TestimonyInAnalysisTest, ASlowRankWhoseGpuIsThrottledIsAboutItsGpu) {
  WorldOptions options = With(FaultKind::kSlowGpu, 3);
  options.faults[0].factor = 1.5;
  const Told without = Only(Hear(options, {}));
  EXPECT_EQ(without.finding.scope, Scope::kRankLate);
  const Told with = Only(Hear(options, {Say(Source::kNvml, Claim::kGpuImpaired, {Rank{3}})}));
  EXPECT_EQ(with.finding.scope, Scope::kGpu);
  EXPECT_EQ(with.finding.fault, FaultClass::kLateCompute);
  EXPECT_EQ(with.verdict, without.verdict);
}

// A job that nobody's plugin shows: only witnesses speak.
class BlindJobTest : public testing::Test {
 protected:
  struct Process {
    ProcessState state = ProcessState::kRunning;
    bool busy = true;
    bool paused = false;
  };

  // `length` seconds, in which from `onset` on `said` is said every five.
  void Watch(int length, int onset, const std::vector<Testimony>& said) {
    for (int end = second_ + length; second_ < end; ++second_) {
      Snapshot snapshot;
      snapshot.elapsed = absl::Seconds(second_);
      NodeSummary node;
      node.incarnation = 1;
      node.sequence = static_cast<uint64_t>(second_);
      node.clock_us = static_cast<uint64_t>(second_) * 1'000'000;
      node.engine_paused = process_.paused;
      for (uint32_t r = 0; r < 4; ++r) {
        RankReport report;
        report.rank = Rank{r};
        report.process = r == 2 ? process_.state : ProcessState::kRunning;
        if (r != 2 || process_.busy) cpu_us_[r] += 500'000;
        report.cpu_us = cpu_us_[r];
        node.ranks.push_back(report);
      }
      snapshot.arrived = {node};
      if (second_ >= onset && (second_ - onset) % 5 == 0) {
        snapshot.testimonies = said;
        for (Testimony& testimony : snapshot.testimonies) {
          testimony.standing = absl::Seconds(second_ - onset);
        }
      }
      for (const Finding& finding : analyzer_.Step(snapshot).findings) {
        if (finding_.id.empty()) suspected_ = second_ - onset;
        if (finding.grade == Grade::kVerdict && decided_ < 0) decided_ = second_ - onset;
        EXPECT_TRUE(finding_.id.empty() || finding_.id == finding.id);
        finding_ = finding;
      }
    }
  }

  static JobShape Shape() {
    JobShape shape;
    shape.ranks.resize(4);
    return shape;
  }

  Process process_;
  Finding finding_;
  int suspected_ = -1, decided_ = -1;

 private:
  Analyzer analyzer_{Thresholds(), Shape()};
  uint64_t cpu_us_[4] = {};
  int second_ = 1;
};

const Testimony kNeverEnteredBy2 = Say(Source::kFlightRecorder, Claim::kNeverEntered, {Rank{2}});

TEST_F(BlindJobTest, OneWitnessAndAnIdleProcessAreTwo) {
  process_.busy = false;
  Watch(100, 20, {kNeverEnteredBy2});
  EXPECT_EQ(finding_.fault, FaultClass::kNeverEntered);
  EXPECT_EQ(finding_.suspects, (std::vector<Suspect>{{Rank{2}, Rank{2}}}));
  EXPECT_GE(suspected_, 3);
  EXPECT_LE(suspected_, 6);
  EXPECT_GE(decided_, 30);
  EXPECT_LE(decided_, 36);
}

TEST_F(BlindJobTest, WithABaselineTheVerdictComesSooner) {
  process_.busy = false;
  Testimony said = kNeverEnteredBy2;
  said.normal = absl::Seconds(1);
  Watch(60, 20, {said});
  EXPECT_LE(decided_, 10);
  EXPECT_GE(decided_, 6);
}

TEST_F(BlindJobTest, AStandstillThatIsNormalIsNone) {
  process_.busy = false;
  Testimony said = kNeverEnteredBy2;
  said.normal = absl::Seconds(40);
  Watch(100, 20, {said});  // less than three times that
  EXPECT_EQ(suspected_, -1);
}

TEST_F(BlindJobTest, ABusyRankIsLeftAloneUntilTheTimeOut) {
  Watch(300, 20, {kNeverEnteredBy2});
  EXPECT_EQ(suspected_, -1);
  Watch(400, 20, {kNeverEnteredBy2});
  EXPECT_GE(decided_, 600);
}

TEST_F(BlindJobTest, APauseOfOurOwnIsNoFault) {
  process_.busy = false;
  process_.paused = true;
  Watch(200, 20, {kNeverEnteredBy2});
  EXPECT_EQ(suspected_, -1);
}

TEST_F(BlindJobTest, AStoppedProcessIsCalledSo) {
  process_.busy = false;
  process_.state = ProcessState::kStopped;
  Watch(60, 20, {kNeverEnteredBy2});
  EXPECT_EQ(finding_.fault, FaultClass::kStopped);
  EXPECT_GE(decided_, 30);
}

TEST_F(BlindJobTest, AllInsideOneOperationNameNobodyBeforeTheTimeOut) {
  const Testimony inside =
      Say(Source::kFlightRecorder, Claim::kEntered, {Rank{0}, Rank{1}, Rank{2}, Rank{3}}, 0.8);
  Watch(300, 20, {inside});
  EXPECT_EQ(finding_.fault, FaultClass::kUnknown);
  EXPECT_EQ(finding_.scope, Scope::kCommunicator);
  EXPECT_LE(suspected_, 6);
  EXPECT_EQ(decided_, -1);
}

TEST_F(BlindJobTest, WhatEndsIsWithdrawn) {
  process_.busy = false;
  Watch(60, 20, {kNeverEnteredBy2});
  ASSERT_GE(decided_, 30);
  finding_ = {};
  suspected_ = -1;
  Watch(60, 1000, {});
  EXPECT_NE(finding_.id, "");  // for as long as the last word is fresh
  finding_ = {};
  Watch(20, 1000, {});
  EXPECT_EQ(finding_.id, "");
}

TEST_F(BlindJobTest, StacksAloneAccuseNobody) {
  Watch(120, 20, {Say(Source::kStacks, Claim::kOddStack, {Rank{2}})});
  EXPECT_EQ(suspected_, -1);
}

}  // namespace
}  // namespace holdfast::monitor::sim
