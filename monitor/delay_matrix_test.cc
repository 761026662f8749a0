#include "monitor/delay_matrix.h"

#include <gtest/gtest.h>

#include <cstdint>
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

TEST(DelayMatrixTest, TheSpreadIsThatOfTheMiddle) {
  EXPECT_EQ(SpreadOf({5}).median, 5);
  EXPECT_EQ(SpreadOf({1, 2, 3, 1000}).median, 2.5);
  EXPECT_EQ(SpreadOf({1, 2, 3, 4, 1000}).deviation, 1.4826);
  EXPECT_EQ(SpreadOf({7, 7, 7, 7, 9}).deviation, 0);
}

}  // namespace
}  // namespace holdfast::monitor
