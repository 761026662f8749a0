#include "monitor/finding.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

#include "base/json_reader.h"
#include "monitor/candidates.h"
#include "monitor/tracker.h"
#include "tests/support/status_matchers.h"

namespace holdfast::monitor {
namespace {

TEST(FindingTest, EveryClassAndScopeHasANameOfItsOwn) {
  std::set<std::string> names;
  for (size_t i = 0; i < kFaultClasses; ++i) names.emplace(Name(static_cast<FaultClass>(i)));
  EXPECT_EQ(names.size(), kFaultClasses);
  names.clear();
  for (size_t i = 0; i < kScopes; ++i) names.emplace(Name(static_cast<Scope>(i)));
  EXPECT_EQ(names.size(), kScopes);
  EXPECT_FALSE(names.contains(""));
}

TEST(FindingTest, ItsJsonIsStrictJsonWhateverTheTrainerCalledItsSections) {
  Finding finding;
  finding.id = "5965a069";
  finding.grade = Grade::kVerdict;
  finding.fault = FaultClass::kLink;
  finding.scope = Scope::kPath;
  finding.suspects = {{Rank{3}, Rank{4}}, {Rank{7}, Rank{7}}};
  finding.confidence = 0.5;
  finding.sentence = "rank 3 is in \"eval\"\n\xff\x01";
  finding.evidence = {"a", "b"};
  finding.since = absl::Seconds(41);
  ASSERT_OK_AND_ASSIGN(const auto document, JsonDocument::Parse(FindingJson(finding)));
  const JsonValue root = document->root();
  EXPECT_THAT(root.Find("schema_version").Uint64(), IsOkAndHolds(1));
  EXPECT_THAT(root.Find("fault").String(), IsOkAndHolds("link"));
  EXPECT_THAT(root.Find("since_seconds").Double(), IsOkAndHolds(41));
  const JsonValue suspects = root.Find("suspects");
  ASSERT_THAT(suspects.ArraySize(), IsOkAndHolds(2));
  EXPECT_THAT(suspects[0].Find("peer").Uint64(), IsOkAndHolds(4));
  EXPECT_FALSE(suspects[1].Find("peer").present());
}

Candidate MakeCandidate(Grade grade, FaultClass fault, uint32_t rank) {
  Candidate candidate;
  candidate.key = "stop:1";
  candidate.finding.grade = grade;
  candidate.finding.fault = fault;
  candidate.finding.suspects = {{Rank{rank}, Rank{rank}}};
  return candidate;
}

TEST(TrackerTest, AVerdictIsNotTakenBackAndYieldsOnlyToWhatKnowsMore) {
  Tracker tracker{Thresholds{}};
  auto open = tracker.Update(absl::Seconds(1),
                             {MakeCandidate(Grade::kSuspicion, FaultClass::kNeverEntered, 1)});
  ASSERT_EQ(open.size(), 1u);
  const std::string id = open[0].id;
  open =
      tracker.Update(absl::Seconds(2), {MakeCandidate(Grade::kVerdict, FaultClass::kGpuHang, 1)});
  EXPECT_EQ(open[0].grade, Grade::kVerdict);
  open = tracker.Update(absl::Seconds(3),
                        {MakeCandidate(Grade::kSuspicion, FaultClass::kNeverEntered, 2)});
  EXPECT_EQ(open[0].grade, Grade::kVerdict);
  EXPECT_EQ(open[0].fault, FaultClass::kGpuHang);
  EXPECT_EQ(open[0].suspects[0].rank, Rank{1});
  open = tracker.Update(absl::Seconds(4), {MakeCandidate(Grade::kSuspicion, FaultClass::kDead, 2)});
  EXPECT_EQ(open[0].grade, Grade::kVerdict);
  EXPECT_EQ(open[0].fault, FaultClass::kDead);
  ASSERT_EQ(open[0].suspects.size(), 2u);
  EXPECT_EQ(open[0].suspects[0].rank, Rank{1});
  EXPECT_EQ(open[0].id, id);
}

TEST(TrackerTest, AnIncidentEndsAfterItsEvidenceAndIsKnownAgainSoonAfter) {
  const Thresholds thresholds;
  Tracker tracker(thresholds);
  const auto seen = [&](absl::Duration at) {
    return tracker.Update(at, {MakeCandidate(Grade::kSuspicion, FaultClass::kGpuHang, 1)});
  };
  const auto quiet = [&](absl::Duration at) { return tracker.Update(at, {}); };
  const std::string id = seen(absl::Seconds(10))[0].id;
  EXPECT_EQ(quiet(absl::Seconds(10) + thresholds.clear_after - absl::Seconds(1)).size(), 1u);
  EXPECT_TRUE(quiet(absl::Seconds(10) + thresholds.clear_after).empty());
  EXPECT_FALSE(tracker.IsStanding());
  EXPECT_EQ(seen(absl::Seconds(9) + thresholds.reopen_within)[0].id, id);
  EXPECT_TRUE(tracker.IsStanding());
  EXPECT_TRUE(quiet(absl::Seconds(200)).empty());
  EXPECT_NE(seen(absl::Seconds(400))[0].id, id);
}

}  // namespace
}  // namespace holdfast::monitor
