// Goal: a rank that has gone silent is called late once its time-out is over, never before; what is
// in order (a pause that is named, what the engine takes, a watcher that did not look) is never
// called so.
#include "agent/run/silence_watch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace holdfast {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using Engine = SilenceWatch::Engine;
using Said = SilenceWatch::Said;

constexpr absl::Duration kConfigured = absl::Minutes(10);

// Rank 0, looked at once a second.
class Watched {
 public:
  explicit Watched(absl::Duration configured = kConfigured) : watch_({}, configured) {}

  std::vector<Said> After(absl::Duration duration, Engine engine = Engine::kIdle) {
    std::vector<Said> all;
    const absl::Duration end = now_ + duration;
    do {
      now_ = std::min(end, now_ + absl::Seconds(1));
      const std::vector<Said> said = watch_.Look(now_, {{0, beats_, sections_}}, engine, monitor_);
      all.insert(all.end(), said.begin(), said.end());
    } while (now_ < end);
    return all;
  }
  std::vector<Said> BeatAfter(absl::Duration duration) {
    std::vector<Said> all = After(duration - absl::Seconds(1));
    ++beats_;
    const std::vector<Said> said = After(absl::Seconds(1));
    all.insert(all.end(), said.begin(), said.end());
    return all;
  }
  // Enough beats to have learned from, each `apart`.
  void Learn(absl::Duration apart) {
    for (int i = 0; i < 25; ++i) EXPECT_THAT(BeatAfter(apart), IsEmpty());
  }
  void Enter(const std::string& section) { sections_.push_back(section); }
  void Leave() { sections_.pop_back(); }
  // Nobody looks meanwhile.
  void Sleep(absl::Duration duration) { now_ += duration; }

  SilenceWatch watch_;
  absl::Duration now_ = absl::Hours(5);
  uint64_t beats_ = 0;
  std::vector<std::string> sections_;
  SilenceWatch::Monitor monitor_ = SilenceWatch::Monitor::kBlind;
};

Said Late(absl::Duration silent, absl::Duration timeout, const std::string& section = "") {
  return {0, true, section, silent, timeout};
}
const Said kBack = {0, false, "", {}, {}};

TEST(SilenceWatch, LearnsToBeMorePatientFromTheLongestThatEndedByItself) {
  struct Case {
    absl::Duration apart, timeout;
  };
  for (const Case& one : {Case{absl::Seconds(1), kConfigured},           // never less
                          Case{absl::Seconds(90), absl::Minutes(15)},    // busy_factor
                          Case{absl::Minutes(9), absl::Minutes(30)}}) {  // section_timeout
    Watched rank;
    rank.Learn(one.apart);
    EXPECT_THAT(rank.After(one.timeout - absl::Seconds(1)), IsEmpty());
    EXPECT_THAT(rank.After(absl::Minutes(5)), ElementsAre(Late(one.timeout, one.timeout)));
    EXPECT_EQ(rank.watch_.timeouts()[0].is_learned, one.timeout > kConfigured);
    EXPECT_THAT(rank.BeatAfter(absl::Seconds(5)), ElementsAre(kBack));
    // It was none.
    const SilenceWatch::Timeout now = rank.watch_.timeouts()[0];
    EXPECT_TRUE(now.is_learned);
    EXPECT_GT(now.longest, one.timeout);
    EXPECT_EQ(now.timeout, absl::Minutes(30));
  }
  Watched impatient(absl::Seconds(3));
  impatient.Learn(absl::Seconds(1));
  EXPECT_THAT(impatient.After(absl::Minutes(1)),
              ElementsAre(Late(absl::Seconds(10), absl::Seconds(10))));
}

// Which has the same time-out, and says who it is.
TEST(SilenceWatch, TheMonitorIsGivenTheFirstWord) {
  Watched rank;
  rank.monitor_ = SilenceWatch::Monitor::kSees;
  rank.Learn(absl::Seconds(1));
  const absl::Duration timeout = kConfigured + SilenceWatch::kMonitorFirst;
  EXPECT_THAT(rank.After(timeout - absl::Seconds(1)), IsEmpty());
  EXPECT_THAT(rank.After(absl::Seconds(1)), ElementsAre(Late(timeout, timeout)));
  EXPECT_EQ(rank.watch_.timeouts()[0].timeout, timeout);
}

// Three ranks in step, until at second 100 one stands; then the others stop within a step of it.
struct Group {
  SilenceWatch watch{{}, absl::Seconds(10)};
  std::vector<SilenceWatch::Rank> ranks = {{0, 0, {}}, {1, 0, {}}, {2, 0, {}}};

  // `beats`: whether a rank gives a sign of life in that second. Returns what was said, and leaves
  // the time at the first thing that was.
  template <typename Beats>
  std::vector<Said> Until(int end, Beats beats) {
    for (; second < end; ++second) {
      for (SilenceWatch::Rank& rank : ranks) rank.heartbeat_count += beats(rank.rank, second);
      std::vector<Said> said =
          watch.Look(absl::Seconds(second), ranks, Engine::kIdle, SilenceWatch::Monitor::kBlind);
      if (!said.empty()) return said;
    }
    return {};
  }
  int second = 0;
};

TEST(SilenceWatch, WhenAllFallSilentNobodyIsLateFirst) {
  // Whoever stands, and however its last heartbeat lies before those of the others.
  for (const uint32_t stands : {0u, 1u, 2u}) {
    for (const int ahead : {0, 1, 3}) {
      Group group;
      const std::vector<Said> said = group.Until(200, [&](uint32_t rank, int second) {
        return second < (rank == stands ? 100 : 100 + ahead);
      });
      ASSERT_THAT(said, testing::SizeIs(1));
      EXPECT_EQ(said[0].rank, ahead == 0 ? 0 : stands);
      std::vector<uint32_t> others = {0, 1, 2};
      std::erase(others, said[0].rank);
      EXPECT_EQ(said[0].with, others);
      // No further word, until they are there again: each of them.
      ++group.second;
      EXPECT_THAT(group.Until(500, [](uint32_t, int) { return false; }), IsEmpty());
      const std::vector<Said> back = group.Until(501, [](uint32_t, int) { return true; });
      EXPECT_EQ(back, (std::vector<Said>{
                          {0, false, "", {}, {}}, {1, false, "", {}, {}}, {2, false, "", {}, {}}}));
    }
  }
}

TEST(SilenceWatch, WhoIsSilentWhileTheOthersGoOnIsLateAlone) {
  Group group;
  const std::vector<Said> said =
      group.Until(200, [](uint32_t rank, int second) { return rank != 1 || second < 100; });
  EXPECT_EQ(said, (std::vector<Said>{{1, true, "", absl::Seconds(10), absl::Seconds(10)}}));
  EXPECT_EQ(SentenceOf(said.at(0)), "rank 1 has been silent for 10 s, beyond the time-out of 10 s");
}

// Of ranks that never tell a heartbeat nobody knows whether they go on.
TEST(SilenceWatch, TheOnlyOneThatTellsHeartbeatsIsNotTheOne) {
  Group group;
  const std::vector<Said> said =
      group.Until(200, [](uint32_t rank, int second) { return rank == 0 && second < 100; });
  ASSERT_THAT(said, testing::SizeIs(1));
  EXPECT_THAT(said[0].with, ElementsAre(1, 2));
  EXPECT_EQ(SentenceOf(said[0]),
            "rank 0 has been silent for 10 s, beyond the time-out of 10 s, and as long ranks 1, 2");
}

// Who was late only with one that has come back is told to be there, too, though it never says so.
TEST(SilenceWatch, WhoWasLateWithOneThatComesBackIsNotLeftBehind) {
  Group group;
  ASSERT_THAT(group.Until(200, [](uint32_t rank, int second) { return rank == 0 && second < 100; }),
              testing::SizeIs(1));
  ++group.second;
  EXPECT_EQ(
      group.Until(300, [](uint32_t rank, int) { return rank == 0; }),
      (std::vector<Said>{{0, false, "", {}, {}}, {1, false, "", {}, {}}, {2, false, "", {}, {}}}));
  // Who is late by itself stays so. (The end of a pause is a sign of life of which no patience with
  // heartbeats is learned.)
  Group other;
  ASSERT_THAT(other.Until(100, [](uint32_t, int) { return true; }), IsEmpty());
  other.ranks[2].sections = {"evaluation"};
  ASSERT_THAT(other.Until(150, [](uint32_t, int) { return false; }), testing::SizeIs(1));
  ++other.second;
  other.ranks[2].sections.clear();
  EXPECT_EQ(other.Until(120, [](uint32_t, int) { return false; }),
            (std::vector<Said>{{2, false, "", {}, {}}}));
}

// It has a longer time-out of its own, and the others wait for it.
TEST(SilenceWatch, WhoIsInAPauseIsNoReasonToNameWhoWaits) {
  Group group;
  EXPECT_THAT(group.Until(100, [](uint32_t, int) { return true; }), IsEmpty());
  group.ranks[2].sections = {"evaluation"};
  const std::vector<Said> said = group.Until(200, [](uint32_t, int) { return false; });
  ASSERT_THAT(said, testing::SizeIs(1));
  EXPECT_THAT(said[0].with, ElementsAre(1, 2));
  // But a sign of life in time is one.
  Group other;
  EXPECT_THAT(other.Until(100, [](uint32_t, int) { return true; }), IsEmpty());
  EXPECT_THAT(other.Until(107, [](uint32_t, int) { return false; }), IsEmpty());
  other.ranks[2].sections = {"evaluation"};
  EXPECT_THAT(other.Until(200, [](uint32_t, int) { return false; }).at(0).with, ElementsAre(1));
}

TEST(SilenceWatch, WhoHasNotBeatenTwiceIsNeverLate) {
  Watched rank;
  EXPECT_THAT(rank.After(absl::Hours(24)), IsEmpty());
  EXPECT_THAT(rank.BeatAfter(absl::Seconds(1)), IsEmpty());
  EXPECT_THAT(rank.After(absl::Hours(24)), IsEmpty());
  // Nor is the time until the second one something to learn from.
  rank.BeatAfter(absl::Seconds(1));
  EXPECT_EQ(rank.watch_.timeouts()[0].seen, 0u);
  rank.watch_.BeginLaunch();
  rank.beats_ = 1;
  EXPECT_THAT(rank.After(absl::Hours(24)), IsEmpty());
}

TEST(SilenceWatch, APauseThatIsNamedHasATimeoutOfItsOwn) {
  Watched rank;
  rank.Learn(absl::Seconds(1));
  // Its first is given half an hour.
  rank.Enter("evaluation");
  EXPECT_THAT(rank.After(absl::Minutes(20)), IsEmpty());
  rank.Leave();
  rank.Learn(absl::Seconds(1));
  // From then on, ten times as much as it took; here that is more than half an hour.
  rank.Enter("evaluation");
  EXPECT_THAT(rank.After(absl::Minutes(31)),
              ElementsAre(Late(absl::Minutes(30), absl::Minutes(30), "evaluation")));
  rank.Leave();
  EXPECT_THAT(rank.After(absl::Seconds(1)), ElementsAre(kBack));
  rank.BeatAfter(absl::Seconds(1));
  // The pauses were no silence to learn from.
  EXPECT_EQ(rank.watch_.timeouts()[0].timeout, kConfigured);
  EXPECT_EQ(rank.watch_.timeouts().size(), 2u);
}

TEST(SilenceWatch, WhatAPauseOfThatNameTookIsItsMeasure) {
  for (const auto& [took, timeout] : {std::pair{absl::Seconds(12), kConfigured},
                                      std::pair{absl::Seconds(121), absl::Minutes(20)}}) {
    Watched rank;
    rank.Learn(absl::Seconds(1));
    rank.Enter("compile");
    EXPECT_THAT(rank.After(took), IsEmpty());
    rank.Leave();
    rank.BeatAfter(absl::Seconds(1));
    rank.Enter("compile");
    // It was seen for a second less, from one look to another; and this one is from the next look.
    EXPECT_THAT(rank.After(timeout), IsEmpty());
    EXPECT_THAT(rank.After(absl::Seconds(1)), ElementsAre(Late(timeout, timeout, "compile")));
  }
}

TEST(SilenceWatch, WhoBeatsInsideOfAPauseIsAlive) {
  Watched rank;
  rank.Learn(absl::Seconds(1));
  rank.Enter("evaluation");
  for (int i = 0; i < 10; ++i) EXPECT_THAT(rank.BeatAfter(absl::Minutes(9)), IsEmpty());
}

TEST(SilenceWatch, OtherSectionsArePartOfTheStep) {
  Watched rank;
  rank.Learn(absl::Seconds(1));
  rank.Enter("data");
  rank.Enter("forward");
  EXPECT_THAT(rank.After(absl::Minutes(11)), ElementsAre(Late(kConfigured, kConfigured)));
  EXPECT_EQ(rank.watch_.timeouts().size(), 1u);
}

TEST(SilenceWatch, WhatTheEngineTakesAndWhatNobodyLookedAtIsNoSilence) {
  for (const bool engine : {true, false}) {
    Watched rank;
    rank.Learn(absl::Seconds(1));
    rank.After(absl::Minutes(9));
    if (engine) {
      EXPECT_THAT(rank.After(absl::Hours(1), Engine::kWorks), IsEmpty());
    } else {
      rank.Sleep(absl::Hours(1));  // the agent was stopped, or the machine slept
    }
    EXPECT_THAT(rank.After(absl::Seconds(50)), IsEmpty());
    EXPECT_THAT(rank.After(absl::Seconds(20)), testing::SizeIs(1));
  }
}

TEST(SilenceWatch, NamesBeyondTheLimitHaveWhatIsConfigured) {
  Watched rank;
  rank.Learn(absl::Seconds(1));
  for (size_t i = 0; i < SilenceWatch::kNamesMax + 10; ++i) {
    rank.Enter("eval " + std::to_string(i));
    rank.After(absl::Seconds(1));
    rank.Leave();
    rank.After(absl::Seconds(1));
  }
  EXPECT_EQ(rank.watch_.timeouts().size(), SilenceWatch::kNamesMax + 1);
}

}  // namespace
}  // namespace holdfast
