// Ends of processes: which of them are deaths, and whose.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "monitor/job_analysis.h"
#include "monitor/testimony.h"

namespace holdfast::monitor {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr uint32_t kRanks = 4;
constexpr int kLearned =
    30;  // seconds, an operation in each: more than the analysis must have seen

// A job of kRanks ranks, one on each node, whose operations show nothing but counters, as those of
// a library without transfers do.
class Job {
 public:
  struct Options {
    bool communicates = true;
    uint32_t communicator_size = kRanks;
    uint32_t reporting = kRanks;  // the first so many; the others are on nodes that nobody sees
  };
  Job() : Job(Options()) {}
  explicit Job(const Options& options) : communicates_(options.communicates) {
    for (uint32_t r = 0; r < options.reporting; ++r) {
      RankReport& rank = ranks_.emplace_back();
      rank.rank = Rank{r};
      rank.process = ProcessState::kSleeping;
      rank.level = TelemetryLevel::kLight;
      if (!communicates_) continue;
      CommunicatorReport& communicator = rank.communicators.emplace_back();
      communicator.id = 7;
      communicator.size = options.communicator_size;
      communicator.index = r;
      communicator.last_kind = OperationKind::kAllReduce;
      communicator.last_bytes = 64;
    }
  }

  // Everybody lives through a second with an operation that ends.
  void Train(int seconds) {
    for (int i = 0; i < seconds; ++i) {
      for (RankReport& rank : ranks_) {
        Count(rank, 1, 1);
        rank.cpu_us += 500'000;
      }
      Pass(1);
    }
  }
  // Ranks that live enter an operation that does not end.
  void EnterAndStand() {
    for (RankReport& rank : ranks_) {
      if (rank.exit == ExitKind::kNone) Count(rank, 1, 0);
    }
  }
  void End(uint32_t rank, ExitKind exit) {
    ranks_[rank].process = ProcessState::kGone;
    ranks_[rank].exit = exit;
  }
  // Another witness says so in the next second.
  void Say(const Testimony& testimony) { said_ = {EncodeTestimonies(std::span(&testimony, 1))}; }
  void Pass(int seconds) {
    for (int i = 0; i < seconds; ++i) {
      JobStep step{absl::Seconds(++second_), absl::ZeroDuration(), {}, {}, {}};
      step.testimonies = std::exchange(said_, {});
      for (const RankReport& rank : ranks_) {
        NodeSummary summary;
        summary.incarnation = 1;
        summary.sequence = static_cast<uint64_t>(second_);
        summary.clock_us = static_cast<uint64_t>(second_) * 1'000'000;
        summary.ranks = {rank};
        step.reports.push_back({"llama", "run/0", kRanks,
                                "node-" + std::to_string(Value(rank.rank)),
                                EncodeSummary(summary)});
      }
      last_ = analysis_.Step(std::move(step));
      worst_count_ = std::max(worst_count_, findings().size());
    }
  }

  const std::vector<Finding>& findings() const { return last_.analysis.findings; }
  bool ended() const { return last_.ended; }
  size_t worst_count() const { return worst_count_; }  // findings at once, ever

 private:
  void Count(RankReport& rank, uint64_t enqueued, uint64_t finished) const {
    if (!communicates_) return;
    CommunicatorReport& communicator = rank.communicators.front();
    OperationCounts& counts = communicator.counts[static_cast<size_t>(OperationKind::kAllReduce)];
    counts.enqueued += enqueued;
    counts.started = counts.enqueued;
    counts.finished += finished;
    communicator.last_sequence = counts.enqueued;
    communicator.open_us = counts.enqueued > counts.finished ? 1 : 0;
  }

  const bool communicates_;
  std::vector<RankReport> ranks_;
  std::vector<std::string> said_;
  JobAnalysis analysis_{Thresholds{}, "llama"};
  JobAnalysis::Result last_;
  int second_ = 0;
  size_t worst_count_ = 0;
};

// torchrun tells nobody how its ranks ended: a job that is done must not look like one that died.
TEST(EndedTest, AJobWhoseRanksEndUnseenOneAfterAnotherHasNoFindingAndIsOver) {
  for (const bool communicates : {true, false}) {
    Job job({.communicates = communicates});
    job.Train(kLearned);
    for (uint32_t rank = kRanks; rank-- > 0;) {
      EXPECT_FALSE(job.ended());
      job.End(rank, ExitKind::kUnknown);
      job.Pass(1);
    }
    EXPECT_TRUE(job.ended());
    job.Pass(60);
    EXPECT_EQ(job.worst_count(), 0u) << job.findings()[0].sentence;
  }
}

// Rank 0 may be busy for long after the others, writing the last checkpoint.
TEST(EndedTest, WhoEndsUnseenIsNotMissedByAnybodyWhoNeverAsksForIt) {
  Job job;
  job.Train(kLearned);
  for (uint32_t rank = 1; rank < kRanks; ++rank) job.End(rank, ExitKind::kUnknown);
  job.Pass(300);
  EXPECT_EQ(job.worst_count(), 0u) << job.findings()[0].sentence;
  EXPECT_FALSE(job.ended());
}

TEST(EndedTest, WhoEndsUnseenAndIsWaitedForIsDead) {
  Job job;
  job.Train(kLearned);
  job.End(2, ExitKind::kUnknown);
  job.EnterAndStand();
  job.Pass(5);
  ASSERT_THAT(job.findings(), SizeIs(1));
  EXPECT_EQ(job.findings()[0].grade, Grade::kSuspicion);
  job.Pass(5);
  ASSERT_THAT(job.findings(), SizeIs(1));
  const Finding& finding = job.findings()[0];
  EXPECT_EQ(finding.grade, Grade::kVerdict);
  EXPECT_EQ(finding.fault, FaultClass::kDead);
  EXPECT_EQ(finding.scope, Scope::kProcess);
  EXPECT_EQ(finding.suspects, (std::vector<Suspect>{{Rank{2}, Rank{2}}}));
  EXPECT_THAT(finding.evidence, ::testing::Contains(HasSubstr("nobody saw how")));
}

TEST(EndedTest, OfSeveralWhoEndUnseenAndAreWaitedForEachIsDead) {
  Job job;
  job.Train(kLearned);
  job.End(0, ExitKind::kUnknown);
  job.End(2, ExitKind::kUnknown);
  job.EnterAndStand();
  job.Pass(10);
  std::vector<Suspect> named;
  for (const Finding& finding : job.findings()) {
    EXPECT_EQ(finding.fault, FaultClass::kDead);
    EXPECT_EQ(finding.grade, Grade::kVerdict);
    named.insert(named.end(), finding.suspects.begin(), finding.suspects.end());
  }
  EXPECT_THAT(
      named, ::testing::UnorderedElementsAre(Suspect{Rank{0}, Rank{0}}, Suspect{Rank{2}, Rank{2}}));
}

// torchrun ends the others when a rank dies: nobody waits any more, but the last that is known of
// them is kept. How it ended is not known, nor whether somebody meant it: never more than a
// suspicion.
TEST(EndedTest, WhoWasMissedWhenTheWholeJobEndedUnseenIsSuspected) {
  Job job;
  job.Train(kLearned);
  job.End(2, ExitKind::kUnknown);
  job.EnterAndStand();
  for (const uint32_t rank : {0, 1, 3}) job.End(rank, ExitKind::kUnknown);
  job.Pass(1);
  EXPECT_FALSE(job.ended());
  EXPECT_THAT(job.findings(), IsEmpty()) << "how it ended may be told yet";
  for (const int seconds : {5, 60}) {
    job.Pass(seconds);
    ASSERT_THAT(job.findings(), SizeIs(1));
    const Finding& finding = job.findings()[0];
    EXPECT_EQ(finding.grade, Grade::kSuspicion);
    EXPECT_EQ(finding.fault, FaultClass::kDead);
    EXPECT_EQ(finding.scope, Scope::kProcess);
    EXPECT_EQ(finding.suspects, (std::vector<Suspect>{{Rank{2}, Rank{2}}}));
    EXPECT_THAT(finding.evidence[0],
                HasSubstr("3 ranks were inside an operation of communicator 7"));
    EXPECT_FALSE(job.ended());
  }
}

// Where all were inside, or nobody was, nothing tells a good end from a bad one.
TEST(EndedTest, AJobThatEndedUnseenWithNobodyMissedIsOver) {
  Job job;
  job.Train(kLearned);
  job.EnterAndStand();
  for (uint32_t rank = 0; rank < kRanks; ++rank) job.End(rank, ExitKind::kUnknown);
  job.Pass(60);
  EXPECT_EQ(job.worst_count(), 0u) << job.findings()[0].sentence;
  EXPECT_TRUE(job.ended());
}

// The same where the kernel tells how they ended: a verdict at once, as nothing stronger can come.
TEST(EndedTest, ADeathThatTheLauncherEndedTheJobForIsAVerdictAtOnce) {
  Job job;
  job.Train(kLearned);
  job.End(2, ExitKind::kUnknown);
  job.EnterAndStand();
  for (const uint32_t rank : {0, 1, 3}) job.End(rank, ExitKind::kUnknown);
  job.Pass(1);
  job.End(2, ExitKind::kKilled);
  for (const uint32_t rank : {0, 1}) job.End(rank, ExitKind::kTerminated);
  job.End(3, ExitKind::kError);  // lost its peer before it was told to end
  job.Pass(1);
  ASSERT_THAT(job.findings(), SizeIs(1));
  EXPECT_EQ(job.findings()[0].grade, Grade::kVerdict);
  EXPECT_EQ(job.findings()[0].fault, FaultClass::kDead);
  EXPECT_EQ(job.findings()[0].suspects, (std::vector<Suspect>{{Rank{2}, Rank{2}}}));
  EXPECT_THAT(job.findings()[0].sentence,
              HasSubstr("1 others ended more mildly, as ranks do that lost a peer, 2 were told to "
                        "end, as a launcher does that ends its job"));
  EXPECT_THAT(job.findings()[0].evidence,
              ::testing::Contains(HasSubstr("3 ranks were inside an operation of communicator 7")));
  job.Pass(60);
  EXPECT_EQ(job.worst_count(), 1u);
  EXPECT_FALSE(job.ended());
}

// A person stops the job.
TEST(EndedTest, AJobThatIsToldToEndHasNoDeath) {
  Job job;
  job.Train(kLearned);
  job.EnterAndStand();
  for (uint32_t rank = 0; rank < kRanks; ++rank) job.End(rank, ExitKind::kTerminated);
  job.Pass(60);
  EXPECT_EQ(job.worst_count(), 0u) << job.findings()[0].sentence;
}

// Nothing shows whether anybody waits: somebody shall look, and nothing may act on it.
TEST(EndedTest, WithoutCommunicationAnUnseenEndIsASuspicionWhileOthersLive) {
  Job job({.communicates = false});
  job.Train(kLearned);
  job.End(2, ExitKind::kUnknown);
  job.Pass(2);
  EXPECT_THAT(job.findings(), IsEmpty());
  job.Pass(100);
  ASSERT_THAT(job.findings(), SizeIs(1));
  EXPECT_EQ(job.findings()[0].grade, Grade::kSuspicion);
  EXPECT_EQ(job.findings()[0].fault, FaultClass::kDead);
  EXPECT_EQ(job.findings()[0].suspects, (std::vector<Suspect>{{Rank{2}, Rank{2}}}));
}

// The Flight Recorder of a job without telemetry shows that the others wait.
TEST(EndedTest, WithoutCommunicationAWitnessOfTheOthersWaitMakesItAVerdict) {
  Job job({.communicates = false});
  job.Train(kLearned);
  job.End(2, ExitKind::kUnknown);
  Testimony testimony;
  testimony.source = Source::kFlightRecorder;
  testimony.claim = Claim::kEntered;
  testimony.ranks = {Rank{0}, Rank{1}, Rank{3}};
  testimony.certainty = 0.8;
  testimony.sentence = "ranks 0, 1, 3 entered an all-reduce, and it does not end";
  for (int second = 1; second <= 10; ++second) {
    testimony.standing = absl::Seconds(second);
    job.Say(testimony);
    job.Pass(1);
  }
  const auto dead = std::find_if(job.findings().begin(), job.findings().end(),
                                 [](const Finding& f) { return f.fault == FaultClass::kDead; });
  ASSERT_NE(dead, job.findings().end());
  EXPECT_EQ(dead->grade, Grade::kVerdict);
  EXPECT_EQ(dead->suspects, (std::vector<Suspect>{{Rank{2}, Rank{2}}}));
  EXPECT_THAT(dead->evidence, ::testing::Contains(HasSubstr("flight-recorder: ranks 0, 1, 3")));
}

// What was told is known at once, whether anybody waits or not; beside it an unseen end may be the
// cause or the consequence, by the order of kinds.
TEST(EndedTest, AToldDeathIsFoundAtOnceAndRanksUnseenOnesBesideIt) {
  struct Case {
    ExitKind told;
    uint32_t cause;
  };
  for (const Case& one : {Case{ExitKind::kAborted, 2}, Case{ExitKind::kError, 1},
                          Case{ExitKind::kKilled, 1}, Case{ExitKind::kFault, 1}}) {
    Job job;
    job.Train(kLearned);
    job.End(1, one.told);
    job.End(2, ExitKind::kUnknown);
    job.EnterAndStand();
    job.Pass(1);
    ASSERT_THAT(job.findings(), SizeIs(1));
    job.Pass(10);
    ASSERT_THAT(job.findings(), SizeIs(1)) << "the unseen one is in the same cascade";
    EXPECT_EQ(job.findings()[0].grade, Grade::kVerdict);
    EXPECT_EQ(job.findings()[0].suspects,
              (std::vector<Suspect>{{Rank{one.cause}, Rank{one.cause}}}));
    EXPECT_FALSE(job.ended());
  }
}

// A job on two nodes of which one is seen, or one that tells of small communicators only: it
// trains, so nobody is missing. Before that nothing tells an agent that is not there from a rank
// that is not.
TEST(NeverJoinedTest, IsSaidOfAJobThatStartsAndNotOfOneThatTrains) {
  Job trains({.communicator_size = 2, .reporting = 2});
  trains.Train(300);
  EXPECT_EQ(trains.worst_count(), 0u) << trains.findings()[0].sentence;

  Job starts({.communicator_size = 2, .reporting = 2});
  starts.Train(10);
  starts.Pass(290);
  ASSERT_THAT(starts.findings(), SizeIs(1));
  EXPECT_EQ(starts.findings()[0].fault, FaultClass::kNeverJoined);
  EXPECT_EQ(starts.findings()[0].grade, Grade::kVerdict);
  EXPECT_EQ(starts.findings()[0].suspects,
            (std::vector<Suspect>{{Rank{2}, Rank{2}}, {Rank{3}, Rank{3}}}));
}

}  // namespace
}  // namespace holdfast::monitor
