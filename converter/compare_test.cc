// Goal: what one side does not have is a difference only if that side can be believed.
// Method: every choice of what each of two sides has of three tensors, of what it has lost, and of
// what it holds unreadable, judged by a rule that is written another way.
#include "converter/compare.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "io/posix_file_system.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast::converter {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::StartsWith;

constexpr std::array<const char*, 3> kNames = {"a", "b", "c"};

struct Side {
  unsigned has = 0;          // bits of kNames
  bool has_lost = false;     // nobody knows what
  unsigned unreadable = 0;   // bits; of those it does not have
  bool has_strange = false;  // an unreadable one of a name that is nowhere else

  bool Has(unsigned name) const { return ((has >> name) & 1) != 0; }
  bool Hides(unsigned name) const { return ((unreadable >> name) & 1) != 0; }
};

ForeignIndex IndexOf(const Side& side) {
  ForeignIndex index;
  for (unsigned name = 0; name < kNames.size(); ++name) {
    if (side.Has(name)) {
      const uint32_t state = index.AddState(
          {.tensor = kNames[name], .state = "param", .dtype = Dtype::kUint8, .shape = {1}});
      index.AddWholePiece(state, index.AddInline(kNames[name]), 0);
    } else if (side.Hides(name)) {
      index.unreadable.push_back({kNames[name], "is sparse"});
    }
  }
  if (side.has_lost) index.losses.push_back("a shard");
  if (side.has_strange) index.unreadable.push_back({"optimizer", "has no names"});
  EXPECT_OK(Finish(index));
  return index;
}

class CompareTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_OK_AND_ASSIGN(folder_, ForeignFolder::Open(*file_system_, directory_.path()));
  }
  absl::StatusOr<Comparison> CompareSides(const ForeignIndex& a, const ForeignIndex& b) {
    return Compare({*folder_, a}, {*folder_, b}, nullptr);
  }

  const std::unique_ptr<FileSystem> file_system_ = NewPosixFileSystem();
  TemporaryDirectory directory_;
  std::unique_ptr<ForeignFolder> folder_;
};

TEST_F(CompareTest, AbsenceIsADifferenceWhereItIsCertain) {
  unsigned different = 0, unknown = 0;
  const auto each_side = [](const auto& visit) {
    for (unsigned has = 0; has < 8; ++has) {
      for (unsigned unreadable = 0; unreadable < 8; ++unreadable) {
        if ((has & unreadable) != 0) continue;
        for (const bool has_lost : {false, true}) {
          for (const bool has_strange : {false, true}) {
            visit(Side{has, has_lost, unreadable, has_strange});
          }
        }
      }
    }
  };
  each_side([&](const Side& a) {
    const ForeignIndex a_index = IndexOf(a);
    each_side([&](const Side& b) {
      uint64_t equal = 0, only_a = 0, only_b = 0;
      // Whether it may be that `side` has what it does not show.
      const auto may_have = [&](const Side& side, const Side& other, unsigned name) {
        if (side.has_lost || side.Hides(name)) return true;
        if (side.has_strange && !other.has_strange) return true;
        for (unsigned each = 0; each < kNames.size(); ++each) {
          if (side.Hides(each) && !other.Has(each) && !other.Hides(each)) return true;
        }
        return false;
      };
      for (unsigned name = 0; name < kNames.size(); ++name) {
        if (a.Has(name) && b.Has(name)) ++equal;
        if (a.Has(name) && !b.Has(name) && !may_have(b, a, name)) ++only_a;
        if (b.Has(name) && !a.Has(name) && !may_have(a, b, name)) ++only_b;
      }
      const ForeignIndex b_index = IndexOf(b);
      ASSERT_OK_AND_ASSIGN(const Comparison found, CompareSides(a_index, b_index));
      EXPECT_EQ(found.equal_count, equal);
      EXPECT_EQ(found.different_count, only_a + only_b);
      const bool whole = !a.has_lost && !b.has_lost && a.unreadable == 0 && b.unreadable == 0 &&
                         !a.has_strange && !b.has_strange;
      EXPECT_EQ(found.equal(), whole && a.has == b.has);
      if (testing::Test::HasFailure()) {
        FAIL() << absl::StrFormat("A: %d %d %d %d, B: %d %d %d %d", a.has, a.has_lost, a.unreadable,
                                  a.has_strange, b.has, b.has_lost, b.unreadable, b.has_strange);
      }
      ++(found.different() ? different : unknown);
    });
    if (testing::Test::HasFailure()) return;
  });
  EXPECT_GT(different, 100u);
  EXPECT_GT(unknown, 100u);
}

TEST_F(CompareTest, ATensorWithAHoleIsUnknownAndTheOthersAreCompared) {
  const ForeignIndex whole = IndexOf({.has = 7});
  ForeignIndex hole = whole;
  std::erase_if(hole.pieces,
                [](const ForeignPiece& piece) { return piece.piece.tensor_state == 1; });
  EXPECT_OK(Finish(hole));
  ASSERT_OK_AND_ASSIGN(Comparison found, CompareSides(hole, whole));
  EXPECT_EQ(found.equal_count, 2u);
  EXPECT_FALSE(found.different() || found.equal());
  EXPECT_THAT(found.not_compared, ElementsAre(StartsWith("A: tensor \"b\"")));
  ASSERT_OK_AND_ASSIGN(found, CompareSides(whole, hole));
  EXPECT_THAT(found.not_compared, ElementsAre(StartsWith("B: tensor \"b\"")));
}

TEST_F(CompareTest, WhatMayBeAmongTheLostIsNamed) {
  const ForeignIndex whole = IndexOf({.has = 3});
  const ForeignIndex part = IndexOf({.has = 1, .has_lost = true});
  ASSERT_OK_AND_ASSIGN(Comparison found, CompareSides(whole, part));
  EXPECT_THAT(found.not_compared,
              ElementsAre("A: tensor \"b\", state \"param\": not found in B, which has lost "
                          "something",
                          "B: lost: a shard"));
  EXPECT_THAT(found.differences, IsEmpty());
  ASSERT_OK_AND_ASSIGN(found, CompareSides(part, whole));
  EXPECT_THAT(found.not_compared,
              ElementsAre("B: tensor \"b\", state \"param\": not found in A, which has lost "
                          "something",
                          "A: lost: a shard"));
}

}  // namespace
}  // namespace holdfast::converter
