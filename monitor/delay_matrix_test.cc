#include "monitor/delay_matrix.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <utility>
#include <vector>

namespace holdfast::monitor {
namespace {

// Each pair once; slow if `slow(from, to)`.
template <typename Slow>
std::vector<MatrixCell> AllToAll(uint32_t ranks, Slow slow) {
  std::vector<MatrixCell> cells;
  for (uint32_t i = 0; i < ranks; ++i) {
    for (uint32_t j = 0; j < ranks; ++j) {
      if (i != j) cells.push_back({Rank{i}, Rank{j}, slow(i, j)});
    }
  }
  return cells;
}

void ExpectOne(const std::vector<MatrixCell>& cells, FaultClass fault, Scope scope,
               const Suspect& suspect) {
  const std::vector<SlowEnd> ends = LocateSlowEnds(cells);
  ASSERT_EQ(ends.size(), 1u);
  EXPECT_EQ(ends[0].fault, fault);
  EXPECT_EQ(ends[0].scope, scope);
  EXPECT_EQ(ends[0].suspect, suspect);
}

TEST(DelayMatrixTest, EveryRowColumnAndPointOfAnAllToAllIsTold) {
  for (uint32_t ranks = 3; ranks <= 8; ++ranks) {
    EXPECT_TRUE(LocateSlowEnds(AllToAll(ranks, [](uint32_t, uint32_t) { return false; })).empty());
    for (uint32_t a = 0; a < ranks; ++a) {
      SCOPED_TRACE(testing::Message() << "rank " << a << " of " << ranks);
      ExpectOne(AllToAll(ranks, [&](uint32_t i, uint32_t) { return i == a; }),
                FaultClass::kSenderEnd, Scope::kSenderNic, {Rank{a}, Rank{a}});
      ExpectOne(AllToAll(ranks, [&](uint32_t, uint32_t j) { return j == a; }),
                FaultClass::kReceiverEnd, Scope::kReceiverNic, {Rank{a}, Rank{a}});
      for (uint32_t b = 0; b < ranks; ++b) {
        if (a == b) continue;
        ExpectOne(AllToAll(ranks, [&](uint32_t i, uint32_t j) { return i == a && j == b; }),
                  FaultClass::kLink, Scope::kPath, {Rank{a}, Rank{b}});
      }
    }
  }
}

TEST(DelayMatrixTest, ARowAndAColumnAtOnceAreTwoEnds) {
  for (uint32_t a = 0; a < 6; ++a) {
    for (uint32_t b = 0; b < 6; ++b) {
      const auto ends =
          LocateSlowEnds(AllToAll(6, [&](uint32_t i, uint32_t j) { return i == a || j == b; }));
      ASSERT_EQ(ends.size(), 2u) << a << " " << b;
      bool row = false, column = false;
      for (const SlowEnd& end : ends) {
        row |= end.fault == FaultClass::kSenderEnd && end.suspect.rank == Rank{a};
        column |= end.fault == FaultClass::kReceiverEnd && end.suspect.rank == Rank{b};
      }
      EXPECT_TRUE(row && column) << a << " " << b;
    }
  }
}

TEST(DelayMatrixTest, OneRingCannotTellTheEndsFromThePath) {
  for (uint32_t slow = 0; slow < 8; ++slow) {
    std::vector<MatrixCell> ring;
    for (uint32_t i = 0; i < 8; ++i) ring.push_back({Rank{i}, Rank{(i + 1) % 8}, i == slow});
    ExpectOne(ring, FaultClass::kLink, Scope::kConnection, {Rank{slow}, Rank{(slow + 1) % 8}});
  }
}

TEST(DelayMatrixTest, TwoRingsOfDifferentOrderTellThem) {
  const auto rings = [](auto slow) {
    std::vector<MatrixCell> cells;
    for (uint32_t i = 0; i < 8; ++i) {
      for (const uint32_t hop : {1u, 3u}) {
        cells.push_back({Rank{i}, Rank{(i + hop) % 8}, slow(i, (i + hop) % 8)});
      }
    }
    return cells;
  };
  for (uint32_t a = 0; a < 8; ++a) {
    ExpectOne(rings([&](uint32_t i, uint32_t) { return i == a; }), FaultClass::kSenderEnd,
              Scope::kSenderNic, {Rank{a}, Rank{a}});
    ExpectOne(rings([&](uint32_t, uint32_t j) { return j == a; }), FaultClass::kReceiverEnd,
              Scope::kReceiverNic, {Rank{a}, Rank{a}});
    const uint32_t b = (a + 3) % 8;
    ExpectOne(rings([&](uint32_t i, uint32_t j) { return i == a && j == b; }), FaultClass::kLink,
              Scope::kPath, {Rank{a}, Rank{b}});
  }
}

// --- One window. Delays in us/MiB; each cell carries 1 MiB in 5 s, healthy ones wait 1 s for it.

using Pairs = std::vector<std::pair<uint32_t, uint32_t>>;

Pairs RingsOf(uint32_t ranks, const std::vector<uint32_t>& hops) {
  Pairs pairs;
  for (uint32_t i = 0; i < ranks; ++i) {
    for (const uint32_t hop : hops) pairs.push_back({i, (i + hop) % ranks});
  }
  return pairs;
}

Pairs AllPairs(uint32_t ranks) {
  std::vector<uint32_t> hops;
  for (uint32_t hop = 1; hop < ranks; ++hop) hops.push_back(hop);
  return RingsOf(ranks, hops);
}

constexpr double kHealthy = 1e6;

std::vector<CellDelay> Window(const Pairs& pairs, const std::function<double(Rank, Rank)>& times) {
  std::vector<CellDelay> cells;
  for (const auto& [from, to] : pairs) {
    CellDelay cell;
    cell.from = Rank{from};
    cell.to = Rank{to};
    cell.us_per_mib = kHealthy * times(cell.from, cell.to);
    cell.mib_per_us = 1.0 / 5e6;
    cell.normal_us_per_mib = kHealthy;
    cells.push_back(cell);
  }
  return cells;
}

// What is slow: pairs of ranks for cells, (rank, end) for rows and columns.
struct Slow {
  Pairs cells;
  std::vector<std::pair<Rank, End>> ends;
  bool operator==(const Slow&) const = default;
};

Slow SlowOf(const std::vector<CellDelay>& cells) {
  const WindowJudgement judged = JudgeWindow(cells, Thresholds());
  Slow slow;
  for (size_t i = 0; i < cells.size(); ++i) {
    if (judged.slow[i]) slow.cells.push_back({Value(cells[i].from), Value(cells[i].to)});
  }
  for (const auto& [end, is_slow] : judged.ends) {
    if (is_slow) slow.ends.push_back(end);
  }
  return slow;
}

// What goes the other way waits for acknowledgements that pass the slow end, half as long.
double RowAndAcknowledgements(Rank from, Rank to, Rank slow, double factor) {
  return from == slow ? factor : to == slow ? 1 + (factor - 1) / 2 : 1;
}

TEST(WindowTest, OneRowColumnOrPointIsToldWhateverWaitsForItsAcknowledgements) {
  for (const Pairs& pairs : {RingsOf(8, {1, 3}), AllPairs(8), AllPairs(5)}) {
    EXPECT_EQ(SlowOf(Window(pairs, [](Rank, Rank) { return 1; })), Slow());
    for (uint32_t a = 0; a < 5; ++a) {
      SCOPED_TRACE(testing::Message() << pairs.size() << " cells, rank " << a);
      const Rank bad{a};
      EXPECT_EQ(
          SlowOf(Window(
              pairs, [&](Rank from, Rank to) { return RowAndAcknowledgements(from, to, bad, 2); })),
          (Slow{{}, {{bad, End::kSender}}}));
      EXPECT_EQ(
          SlowOf(Window(
              pairs, [&](Rank from, Rank to) { return RowAndAcknowledgements(to, from, bad, 2); })),
          (Slow{{}, {{bad, End::kReceiver}}}));
    }
    for (const auto& [a, b] : pairs) {
      const auto times = [from = Rank{a}, to = Rank{b}](Rank i, Rank j) {
        return i == from && j == to ? 3.0 : i == to && j == from ? 2.5 : 1.0;
      };
      EXPECT_EQ(SlowOf(Window(pairs, times)), (Slow{{{a, b}}, {}})) << a << " " << b;
    }
  }
}

// One cell a row is no row.
TEST(WindowTest, InOneRingTheConnectionIsTold) {
  for (uint32_t a = 0; a < 8; ++a) {
    const auto times = [&](Rank from, Rank to) {
      return RowAndAcknowledgements(from, to, Rank{a}, 2);
    };
    EXPECT_EQ(SlowOf(Window(RingsOf(8, {1}), times)), (Slow{{{a, (a + 1) % 8}}, {}}));
  }
}

// What all-to-all looks like where receivers' queues are full: healthy cells between 0.4 and 1.6,
// and a row that is 2.6 times slower. Three quarters of its cells are outliers in hardly any
// window.
TEST(WindowTest, ARowStandsOutOfTheNoiseInWhichItsCellsDoNot) {
  constexpr uint32_t kSeed = 20;
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  std::mt19937 random(kSeed);
  std::uniform_real_distribution<double> noise(0.4, 1.6);
  constexpr int kRuns = 400;
  int found = 0, found_by_cells = 0, alarms = 0;
  for (int run = 0; run < kRuns; ++run) {
    const Rank bad{static_cast<uint32_t>(run) % 8};
    const std::vector<CellDelay> cells = Window(
        AllPairs(8), [&](Rank from, Rank) { return noise(random) * (from == bad ? 2.6 : 1); });
    const Slow slow = SlowOf(cells);
    found += slow.ends == Slow{{}, {{bad, End::kSender}}}.ends ? 1 : 0;
    std::vector<double> delays;
    for (const CellDelay& cell : cells) delays.push_back(cell.us_per_mib);
    const Spread spread = SpreadOf(delays);
    const auto outliers = std::count_if(cells.begin(), cells.end(), [&](const CellDelay& cell) {
      return cell.from == bad && IsAbnormal(cell.us_per_mib, spread, 1, Thresholds());
    });
    found_by_cells += outliers >= 6 ? 1 : 0;
    // And without a fault next to nothing is.
    alarms += SlowOf(Window(AllPairs(8), [&](Rank, Rank) { return noise(random); })) != Slow();
  }
  EXPECT_GT(found, kRuns * 6 / 10);
  EXPECT_LT(found_by_cells, kRuns / 10);
  EXPECT_LT(alarms, kRuns / 20);
}

TEST(WindowTest, ThreeQuartersOfARowMakeIt) {
  for (uint32_t slow_cells = 0; slow_cells <= 7; ++slow_cells) {
    const auto times = [&](Rank from, Rank to) {
      return from == Rank{0} && Value(to) <= slow_cells ? 3.0 : 1.0;
    };
    const Slow slow = SlowOf(Window(AllPairs(8), times));
    EXPECT_EQ(slow.ends.size(), slow_cells >= 6 ? 1u : 0u) << slow_cells;
    EXPECT_EQ(slow.cells.size(), slow_cells >= 6 ? 0u : slow_cells) << slow_cells;
  }
}

// Two that are slow at once, and do not meet.
TEST(WindowTest, ARowAndAPointElsewhereAreBothTold) {
  const auto times = [](Rank from, Rank to) {
    return from == Rank{1} ? 2.0 : from == Rank{5} && to == Rank{6} ? 3.0 : 1.0;
  };
  EXPECT_EQ(SlowOf(Window(AllPairs(8), times)), (Slow{{{5, 6}}, {{Rank{1}, End::kSender}}}));
}

// Which direction costs more is decided by more than one window.
TEST(WindowTest, WhatCostSoFarCounts) {
  const auto times = [](Rank from, Rank to) {
    return from == Rank{2} && to == Rank{3} ? 2.9 : from == Rank{3} && to == Rank{2} ? 3.1 : 1.0;
  };
  std::vector<CellDelay> cells = Window(AllPairs(8), times);
  EXPECT_EQ(SlowOf(cells).cells, (Pairs{{3, 2}}));
  for (CellDelay& cell : cells) {
    if (cell.from == Rank{2} && cell.to == Rank{3}) cell.recent_cost = 0.4;
    if (cell.from == Rank{3} && cell.to == Rank{2}) cell.recent_cost = 0.3;
  }
  EXPECT_EQ(SlowOf(cells).cells, (Pairs{{2, 3}}));
}

TEST(WindowTest, WhoIsAsSlowAsEverIsNotSlow) {
  const auto row = [](Rank from, Rank) { return from == Rank{4} ? 2.0 : 1.0; };
  std::vector<CellDelay> cells = Window(AllPairs(8), row);
  EXPECT_EQ(SlowOf(cells).ends.size(), 1u);
  for (CellDelay& cell : cells) {
    if (cell.from == Rank{4}) cell.normal_us_per_mib = 2 * kHealthy;
  }
  EXPECT_EQ(SlowOf(cells), Slow());
  for (CellDelay& cell : cells) {
    cell.normal_us_per_mib = std::numeric_limits<double>::infinity();  // not known yet
  }
  EXPECT_EQ(SlowOf(cells), Slow());
  for (CellDelay& cell : cells) cell.normal_us_per_mib = 0;  // the kinds of NICs are known
  EXPECT_EQ(SlowOf(cells).ends.size(), 1u);
}

TEST(DelayMatrixTest, TheSpreadIsThatOfTheMiddle) {
  EXPECT_EQ(SpreadOf({5}).median, 5);
  EXPECT_EQ(SpreadOf({1, 2, 3, 1000}).median, 2.5);
  EXPECT_EQ(SpreadOf({1, 2, 3, 4, 1000}).deviation, 1.4826);
  EXPECT_EQ(SpreadOf({7, 7, 7, 7, 9}).deviation, 0);
}

}  // namespace
}  // namespace holdfast::monitor
