// Goal: blocks are read as seldom as the layouts and the memory allow.
// Method: pairs of cuts for which it is known what one order must read again and another need not.
#include "checkpoint/diff_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/diff.h"
#include "checkpoint/stored_testing.h"
#include "io/posix_file_system.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

constexpr uint64_t kBlock = kStoredBlockBytes;

struct Pair {
  Truths truths;
  StoredCheckpoint a;
  StoredCheckpoint b;
  std::vector<CommonState> common{{{0, 0}}};

  Pair(const Layout& a_layout, const Layout& b_layout, std::mt19937_64& random)
      : truths(RandomTruths(a_layout.tensor_states(), random)),
        a(a_layout, truths, random),
        b(b_layout, truths, random) {
    a.Write();
    b.Write();
  }
  absl::StatusOr<DiffReport> Diff(uint64_t memory) const {
    DiffOptions options;
    options.memory_bytes_max = memory;
    return DiffBytes(*NewPosixFileSystem(), PlainReadAt(), {a.directory(), a.index()},
                     {b.directory(), b.index()}, Caching::kBuffered, options);
  }
  uint64_t Bytes(uint64_t memory, uint32_t lead, DiffPlan::Order order) const {
    return DiffPlan::CreateWith(a.index(), b.index(), common, {.memory_bytes_max = memory}, lead,
                                order)
        .value()
        .schedule()
        .bytes;
  }
};

TEST(DiffPlan, EqualCutsAreReadInTheOrderOfStorageAndNothingTwice) {
  std::mt19937_64 random(1);
  for (const std::string& place : {std::string(), CutOver(0), CutOver(1)}) {
    const auto layout = MatrixLayout(4, 256, 300, place);
    const Pair pair(*layout, *layout, random);
    ASSERT_OK_AND_ASSIGN(const DiffPlan plan, DiffPlan::Create(pair.a.index(), pair.b.index(),
                                                               pair.common, DiffLimits{}));
    const DiffSchedule& schedule = plan.schedule();
    EXPECT_EQ(schedule.bytes, schedule.distinct_bytes);
    EXPECT_GE(schedule.bytes, 2 * 256 * 300 * 2u);
    std::array<std::pair<uint32_t, uint64_t>, 2> last{};
    for (const BlockLoad& load : schedule.loads) {
      EXPECT_LE(last[load.checkpoint], std::pair(load.image, load.block));
      last[load.checkpoint] = {load.image, load.block};
    }
  }
}

TEST(DiffPlan, RowsAgainstColumnsAreReadOnceWhereMemoryAllows) {
  std::mt19937_64 random(2);
  const auto rows = MatrixLayout(8, 512, 512, CutOver(0));
  const auto columns = MatrixLayout(8, 512, 512, CutOver(1));
  for (const bool columns_first : {false, true}) {
    const Pair pair(columns_first ? *columns : *rows, columns_first ? *rows : *columns, random);
    const uint64_t memory = 64 * kBlock;
    ASSERT_OK_AND_ASSIGN(const DiffPlan plan,
                         DiffPlan::Create(pair.a.index(), pair.b.index(), pair.common,
                                          {.memory_bytes_max = memory}));
    EXPECT_EQ(plan.schedule().bytes, plan.schedule().distinct_bytes);
    // Not because any order would do: by the storage of the columns rows are read again and again.
    EXPECT_GT(pair.Bytes(memory, columns_first ? 0 : 1, DiffPlan::Order::kStorage),
              2 * plan.schedule().bytes);
    ASSERT_OK_AND_ASSIGN(const DiffReport report, pair.Diff(memory));
    EXPECT_EQ(report.verdict, DiffReport::Verdict::kEqual);
    EXPECT_EQ(report.bytes_read, plan.schedule().bytes);
    // With less it still ends, and says equal.
    ASSERT_OK_AND_ASSIGN(const DiffReport tight, pair.Diff(0));
    EXPECT_EQ(tight.verdict, DiffReport::Verdict::kEqual);
    EXPECT_GE(tight.bytes_read, report.bytes_read);
  }
}

TEST(DiffPlan, ColumnsAgainstOtherColumnsAreReadOnceInTheOrderOfElements) {
  std::mt19937_64 random(3);
  const Pair pair(*MatrixLayout(2, 512, 1536, CutOver(1)), *MatrixLayout(3, 512, 1536, CutOver(1)),
                  random);
  const uint64_t memory = 64 * kBlock;
  ASSERT_OK_AND_ASSIGN(
      const DiffPlan plan,
      DiffPlan::Create(pair.a.index(), pair.b.index(), pair.common, {.memory_bytes_max = memory}));
  EXPECT_EQ(plan.schedule().bytes, plan.schedule().distinct_bytes);
  for (const uint32_t lead : {0, 1}) {
    EXPECT_GT(pair.Bytes(memory, lead, DiffPlan::Order::kStorage), plan.schedule().bytes);
  }
}

// Of rows of two blocks each, of which a column touches one: the other is not read.
TEST(DiffPlan, AColumnOfLongRowsReadsOnlyTheBlocksThatItTouches) {
  std::mt19937_64 random(4);
  const Pair pair(*MatrixLayout(8, 64, 4096, CutOver(1)), *MatrixLayout(1, 64, 4096, ""), random);
  ASSERT_OK_AND_ASSIGN(
      const DiffPlan plan,
      DiffPlan::CreateWith(pair.a.index(), pair.b.index(), pair.common,
                           {.memory_bytes_max = 64 * kBlock}, 0, DiffPlan::Order::kStorage));
  uint64_t loads = 0;
  for (const BlockLoad& load : plan.schedule().loads) loads += load.checkpoint;
  EXPECT_GE(loads, 8 * 64u);
  EXPECT_LE(loads, 10 * 64u);  // one run in four may lie in two blocks
}

TEST(DiffPlan, MoreWindowsThanTheLimitAreRefused) {
  std::mt19937_64 random(5);
  const auto layout = MatrixLayout(4, 256, 300, CutOver(0));
  const Pair pair(*layout, *layout, random);
  const auto create = [&](uint64_t windows_max) {
    return DiffPlan::Create(pair.a.index(), pair.b.index(), pair.common,
                            {.windows_max = windows_max});
  };
  ASSERT_OK_AND_ASSIGN(const DiffPlan plan, create(kDiffWindowsMax));
  const uint64_t windows = plan.schedule().windows.size();
  EXPECT_GT(windows, 30u);
  EXPECT_OK(create(windows).status());
  EXPECT_THAT(create(windows - 1).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, testing::HasSubstr("parts")));
}

TEST(DiffPlan, OneScheduleOfTooManyWindowsDoesNotRefuseTheOthers) {
  std::mt19937_64 random(6);
  const auto whole = MatrixLayout(1, 256, 300, "");
  const auto columns = MatrixLayout(64, 256, 300, CutOver(1));
  for (const bool columns_first : {false, true}) {
    const Pair pair(columns_first ? *columns : *whole, columns_first ? *whole : *columns, random);
    uint64_t least = UINT64_MAX;
    uint64_t most = 0;
    for (const DiffPlan::Order order : {DiffPlan::Order::kStorage, DiffPlan::Order::kElements}) {
      for (const uint32_t lead : {0, 1}) {
        ASSERT_OK_AND_ASSIGN(const DiffPlan plan,
                             DiffPlan::CreateWith(pair.a.index(), pair.b.index(), pair.common,
                                                  DiffLimits{}, lead, order));
        least = std::min<uint64_t>(least, plan.schedule().windows.size());
        most = std::max<uint64_t>(most, plan.schedule().windows.size());
      }
    }
    ASSERT_LT(least, most);
    ASSERT_OK_AND_ASSIGN(
        const DiffPlan plan,
        DiffPlan::Create(pair.a.index(), pair.b.index(), pair.common, {.windows_max = least}));
    EXPECT_EQ(plan.schedule().windows.size(), least);
    EXPECT_THAT(
        DiffPlan::Create(pair.a.index(), pair.b.index(), pair.common, {.windows_max = least - 1})
            .status(),
        StatusIs(absl::StatusCode::kInvalidArgument));
  }
}

}  // namespace
}  // namespace holdfast
