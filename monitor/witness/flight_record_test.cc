// Dumps that real torch wrote (tests/data/flight), and groups made by hand: every assignment of
// three ranks to outside, inside and done.
#include "monitor/witness/flight_record.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace holdfast::monitor {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr uint64_t kLearn = 20;

std::string ReadFile(const std::string& name) {
  std::ifstream file(absl::StrCat(HOLDFAST_SOURCE_DIR, "/tests/data/flight/", name),
                     std::ios::binary);
  EXPECT_TRUE(file.good()) << name;
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

std::vector<FlightRecord> Dumps(const std::string& name, const std::string& form = "pickle",
                                std::vector<uint32_t> ranks = {0, 1, 2, 3}) {
  std::vector<FlightRecord> records;
  for (const uint32_t rank : ranks) {
    auto record = ParseFlightRecord(Rank{rank}, ReadFile(absl::StrCat(name, ".", rank, ".", form)));
    EXPECT_TRUE(record.ok()) << record.status().ToString();
    if (record.ok()) records.push_back(*std::move(record));
  }
  return records;
}

std::vector<Testimony> Said(const std::vector<FlightRecord>& records) {
  FlightHistory history;
  return history.Testify(absl::Seconds(100), 4, records, kLearn);
}

const Testimony* Find(const std::vector<Testimony>& said, Claim claim) {
  for (const Testimony& testimony : said) {
    if (testimony.claim == claim) return &testimony;
  }
  return nullptr;
}

TEST(FlightRecordTest, WhatTorchWroteIsRead) {
  for (const char* form : {"pickle", "json"}) {
    const std::vector<FlightRecord> records = Dumps("never-entered", form);
    ASSERT_EQ(records.size(), 4u);
    ASSERT_EQ(records[0].groups.size(), 1u);
    const FlightGroup& group = records[0].groups[0];
    EXPECT_EQ(group.name, "0");
    EXPECT_EQ(group.description, "default_pg");
    EXPECT_EQ(group.enqueued, 5u);
    EXPECT_EQ(group.retired, 4u);
    ASSERT_EQ(group.operations.size(), 5u);
    EXPECT_EQ(group.operations[3].call, "barrier");
    EXPECT_EQ(group.operations[4].call, "all_reduce");
    EXPECT_EQ(group.operations[4].shape, "[10, 4] Float");
    EXPECT_FALSE(group.operations[4].retired);
    EXPECT_GT(group.longest_gap, absl::ZeroDuration());
  }
}

TEST(FlightRecordTest, AllDoneSaysNothing) { EXPECT_THAT(Said(Dumps("clean")), IsEmpty()); }

TEST(FlightRecordTest, WhoNeverEnteredIsNamed) {
  const std::vector<Testimony> said = Said(Dumps("never-entered"));
  const Testimony* const outside = Find(said, Claim::kNeverEntered);
  ASSERT_NE(outside, nullptr);
  EXPECT_THAT(outside->ranks, ElementsAre(Rank{2}));
  EXPECT_EQ(outside->operation, 5u);
  EXPECT_EQ(outside->source, Source::kFlightRecorder);
  EXPECT_EQ(
      outside->sentence,
      "rank 2 never entered all_reduce of [10, 4] Float 5 of process group 0 (default_pg), in "
      "which 3 others wait");
  const Testimony* const inside = Find(said, Claim::kEntered);
  ASSERT_NE(inside, nullptr);
  EXPECT_THAT(inside->ranks, ElementsAre(Rank{0}, Rank{1}, Rank{3}));
  EXPECT_EQ(said.size(), 2u);
}

TEST(FlightRecordTest, WhoCallsSomethingElseIsNamed) {
  const std::vector<Testimony> size = Said(Dumps("size"));
  ASSERT_EQ(size.size(), 1u);
  EXPECT_EQ(size[0].claim, Claim::kDiffers);
  EXPECT_THAT(size[0].ranks, ElementsAre(Rank{1}));
  EXPECT_THAT(size[0].sentence, HasSubstr("[3, 4] Float by rank 1"));
  EXPECT_GT(size[0].certainty, 0.9);
  const std::vector<Testimony> kind = Said(Dumps("kind"));
  ASSERT_EQ(kind.size(), 1u);
  EXPECT_EQ(kind[0].claim, Claim::kDiffers);
  EXPECT_THAT(kind[0].ranks, ElementsAre(Rank{3}));
  // Two against two: nobody knows who is right.
  const std::vector<Testimony> tie = Said(Dumps("kind", "pickle", {0, 3}));
  ASSERT_EQ(tie.size(), 1u);
  EXPECT_THAT(tie[0].ranks, ElementsAre(Rank{0}, Rank{3}));
  EXPECT_LE(tie[0].certainty, 0.5);
}

TEST(FlightRecordTest, AGroupOfSomeRanksIsComparedAmongThem) {
  const std::vector<Testimony> said = Said(Dumps("subgroup"));
  const Testimony* const outside = Find(said, Claim::kNeverEntered);
  ASSERT_NE(outside, nullptr);
  EXPECT_THAT(outside->ranks, ElementsAre(Rank{2}));
  EXPECT_EQ(outside->operation, 2u);
  EXPECT_EQ(said.size(), 2u);
}

TEST(FlightRecordTest, OfARankWithoutDumpNothingIsSaid) {
  const std::vector<Testimony> said = Said(Dumps("never-entered", "pickle", {0, 1, 3}));
  ASSERT_EQ(said.size(), 1u);
  EXPECT_EQ(said[0].claim, Claim::kEntered);
}

FlightRecord Made(uint32_t rank, uint64_t enqueued, uint64_t retired) {
  FlightRecord record;
  record.rank = Rank{rank};
  FlightGroup group;
  group.name = "0";
  group.description = "default_pg";
  group.enqueued = enqueued;
  group.retired = retired;
  for (uint64_t i = 1; i <= enqueued; ++i) {
    group.operations.push_back({i, "all_reduce", "[1] Float", i <= retired});
  }
  group.longest_gap = absl::Seconds(2);
  if (enqueued > 0) record.groups.push_back(group);
  return record;
}

// Each of three ranks has (enqueued, retired) of operation 5: (4, 4), (5, 4) or (5, 5).
TEST(FlightRecordTest, EveryAssignmentOfThreeRanks) {
  for (int code = 0; code < 27; ++code) {
    std::vector<FlightRecord> records;
    std::vector<Rank> outside, inside, done;
    for (uint32_t rank = 0, rest = static_cast<uint32_t>(code); rank < 3; ++rank, rest /= 3) {
      const uint64_t enqueued = rest % 3 == 0 ? 4 : 5, retired = rest % 3 == 2 ? 5 : 4;
      records.push_back(Made(rank, enqueued, retired));
      (rest % 3 == 0 ? outside : rest % 3 == 1 ? inside : done).push_back(Rank{rank});
    }
    const std::vector<Testimony> said = Said(records);
    SCOPED_TRACE(code);
    if (inside.empty()) {
      EXPECT_THAT(said, IsEmpty());
      continue;
    }
    const Testimony* const never = Find(said, Claim::kNeverEntered);
    EXPECT_EQ(never != nullptr, !outside.empty());
    if (never != nullptr) {
      EXPECT_EQ(never->ranks, outside);
    }
    const Testimony* const entered = Find(said, Claim::kEntered);
    ASSERT_NE(entered, nullptr);
    EXPECT_EQ(entered->ranks, inside);
    const Testimony* const completed = Find(said, Claim::kCompleted);
    EXPECT_EQ(completed != nullptr, outside.empty() && !done.empty());
  }
}

TEST(FlightRecordTest, StandingIsHowLongNobodyHasMoved) {
  FlightHistory history;
  const auto look = [&](int second, uint64_t of_rank_1) {
    const std::vector<FlightRecord> records = {Made(0, 5, 4), Made(1, of_rank_1, of_rank_1),
                                               Made(2, 5, 4)};
    const std::vector<Testimony> said =
        history.Testify(absl::Seconds(second), 3, records, /*learn_operations_min=*/4);
    const Testimony* const outside = Find(said, Claim::kNeverEntered);
    EXPECT_NE(outside, nullptr);
    return outside == nullptr ? Testimony() : *outside;
  };
  EXPECT_EQ(look(100, 3).standing, absl::ZeroDuration());
  EXPECT_EQ(look(110, 3).standing, absl::Seconds(10));
  EXPECT_EQ(look(115, 4).standing, absl::ZeroDuration());  // the one outside has moved
  EXPECT_EQ(look(122, 4).standing, absl::Seconds(7));
  EXPECT_EQ(look(123, 4).normal, absl::Seconds(2));
  // Too few have ended for a baseline.
  FlightHistory young;
  const std::vector<Testimony> said = young.Testify(
      absl::Seconds(1), 3, std::vector<FlightRecord>{Made(0, 5, 4), Made(1, 4, 4)}, kLearn);
  EXPECT_FALSE(said.at(0).normal.has_value());
}

TEST(FlightRecordTest, ARankThatNeverUsedTheDefaultGroupIsOutside) {
  const std::vector<FlightRecord> records = {Made(0, 1, 0), Made(1, 1, 0), Made(2, 0, 0)};
  const std::vector<Testimony> said = Said(records);
  const Testimony* const outside = Find(said, Claim::kNeverEntered);
  ASSERT_NE(outside, nullptr);
  EXPECT_THAT(outside->ranks, ElementsAre(Rank{2}));
}

TEST(FlightRecordTest, WhatIsNoDumpIsRefused) {
  for (const std::string text : {"", "{", "{}", "[]", R"({"entries":[{}]})", R"({"entries":7})",
                                 R"({"version":"2","entries":[{"process_group":[]}]})"}) {
    EXPECT_FALSE(ParseFlightRecord(Rank{0}, text).ok()) << text;
  }
  const auto empty = ParseFlightRecord(Rank{0}, R"({"version":"2.10"})");
  ASSERT_TRUE(empty.ok());
  EXPECT_THAT(empty->groups, IsEmpty());
  EXPECT_EQ(ParseFlightRecord(Rank{0},
                              "\x80\x02"
                              "cos\nsystem\n.")
                .status()
                .code(),
            absl::StatusCode::kPermissionDenied);
}

}  // namespace
}  // namespace holdfast::monitor
