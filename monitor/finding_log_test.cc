#include "monitor/finding_log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "base/json_reader.h"
#include "monitor/finding_record.h"
#include "tests/support/status_matchers.h"

namespace holdfast::monitor {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

Finding MakeFinding(const std::string& id, Grade grade = Grade::kSuspicion,
                    FaultClass fault = FaultClass::kGpuHang, uint32_t rank = 3) {
  Finding finding;
  finding.id = id;
  finding.grade = grade;
  finding.fault = fault;
  finding.suspects = {{Rank{rank}, Rank{rank}}};
  finding.sentence = "Rank " + std::to_string(rank) + " stands.";
  return finding;
}

FindingLog::When At(int seconds) {
  return {absl::Seconds(seconds), absl::FromUnixSeconds(1'000'000'000 + seconds)};
}

std::vector<std::string> Changes(const std::vector<FindingLog::Told>& told) {
  std::vector<std::string> changes;
  for (const auto& one : told) {
    changes.push_back(std::string(Name(one.event.change)) + " " + one.record->finding.id);
  }
  return changes;
}

class FindingLogTest : public ::testing::Test {
 protected:
  std::vector<std::string> Step(int second, const std::vector<Finding>& open,
                                const std::string& key = "run/0") {
    return Changes(log_.Update("job", key, open, At(second)));
  }
  FindingLog log_;
};

TEST_F(FindingLogTest, TellsEachChangeOnce) {
  EXPECT_THAT(Step(1, {}), IsEmpty());
  EXPECT_THAT(Step(2, {MakeFinding("a")}), ElementsAre("suspicion a"));
  EXPECT_THAT(Step(3, {MakeFinding("a")}), IsEmpty());
  EXPECT_THAT(Step(4, {MakeFinding("a", Grade::kVerdict), MakeFinding("b", Grade::kVerdict)}),
              ElementsAre("verdict a", "verdict b"));
  EXPECT_THAT(Step(5, {MakeFinding("a", Grade::kVerdict), MakeFinding("b", Grade::kVerdict)}),
              IsEmpty());
  EXPECT_THAT(Step(6, {MakeFinding("a", Grade::kVerdict)}), ElementsAre("withdrawn b"));
  EXPECT_THAT(Step(7, {MakeFinding("a", Grade::kVerdict), MakeFinding("b", Grade::kVerdict)}),
              ElementsAre("reopened b"));
  EXPECT_THAT(Changes(log_.End("job", At(8))), ElementsAre("ended a", "ended b"));
  EXPECT_THAT(Changes(log_.End("job", At(9))), IsEmpty());
  EXPECT_EQ(log_.size(), 2u);
  EXPECT_EQ(log_.Find("b")->history.size(), 4u);
}

TEST_F(FindingLogTest, AnotherExplanationIsToldButNotEverySecond) {
  Step(0, {MakeFinding("a")});
  int told = 0;
  for (int i = 1; i <= 60; ++i) {
    const auto fault = i % 2 == 0 ? FaultClass::kGpuHang : FaultClass::kNeverEntered;
    told += static_cast<int>(Step(i, {MakeFinding("a", Grade::kSuspicion, fault)}).size());
  }
  EXPECT_GE(told, 3);
  EXPECT_LE(told, 6);
  // The record is as the analysis has it, told or not; a verdict comes at once.
  EXPECT_EQ(log_.Find("a")->finding.fault, FaultClass::kGpuHang);
  EXPECT_THAT(Step(61, {MakeFinding("a", Grade::kVerdict)}), ElementsAre("verdict a"));
  EXPECT_THAT(Step(75, {MakeFinding("a", Grade::kVerdict, FaultClass::kGpuHang, 5)}),
              ElementsAre("changed a"));
}

TEST_F(FindingLogTest, AnIdOfWhatHasEndedIsNotUsedAgain) {
  Step(1, {MakeFinding("a")});
  log_.End("job", At(2));
  EXPECT_THAT(Step(3, {MakeFinding("a")}), ElementsAre("suspicion a-2"));
  EXPECT_THAT(Step(4, {MakeFinding("a", Grade::kVerdict)}), ElementsAre("verdict a-2"));
  log_.End("job", At(5));
  EXPECT_THAT(Step(6, {MakeFinding("a")}), ElementsAre("suspicion a-3"));
}

TEST_F(FindingLogTest, JobsDoNotTouchEachOther) {
  log_.Update("one", "", {MakeFinding("a")}, At(1));
  log_.Update("two", "", {MakeFinding("b")}, At(1));
  EXPECT_THAT(Changes(log_.Update("one", "", {MakeFinding("a")}, At(2))), IsEmpty());
  EXPECT_THAT(Changes(log_.End("one", At(3))), ElementsAre("ended a"));
  EXPECT_EQ(log_.Find("b")->state, FindingState::kOpen);
  EXPECT_EQ(log_.Records("two").size(), 1u);
}

// What the store gives back, as it gives it: through JSON.
FindingRecord ThroughJson(const FindingRecord& record) {
  const auto document = JsonDocument::Parse(OneLine(FindingRecordObject(record)));
  EXPECT_OK(document.status());
  const auto parsed = ParseFindingRecord((*document)->root());
  EXPECT_OK(parsed.status());
  return *parsed;
}

TEST_F(FindingLogTest, ARestartTakesUpWhatItFindsAgainAndWithdrawsTheRest) {
  const Finding b = MakeFinding("b", Grade::kSuspicion, FaultClass::kGpuHang, 4);
  Step(1, {MakeFinding("a", Grade::kVerdict), b, MakeFinding("c")});
  Step(2, {MakeFinding("a", Grade::kVerdict), b});
  FindingLog after;
  for (const FindingRecord* record : log_.Records()) after.Restore(ThroughJson(*record));
  EXPECT_EQ(after.Find("a")->state, FindingState::kUnwatched);
  EXPECT_EQ(after.Find("c")->state, FindingState::kWithdrawn);
  // The first step of the same attempt: nothing ends.
  const std::string key = "run/0";
  EXPECT_THAT(Changes(after.End("job", At(10), &key)), IsEmpty());
  // The analysis counts anew, so the id is another one; it is the same incident, and a verdict.
  EXPECT_THAT(Changes(after.Update("job", key, {MakeFinding("z")}, At(11))),
              ElementsAre("reopened a"));
  EXPECT_EQ(after.Find("a")->finding.grade, Grade::kVerdict);
  EXPECT_THAT(Changes(after.Update("job", key, {MakeFinding("z", Grade::kVerdict)}, At(12))),
              IsEmpty());
  EXPECT_THAT(Changes(after.GiveUpUnwatched("job", At(130))), ElementsAre("withdrawn b"));
  EXPECT_EQ(after.Find("a")->state, FindingState::kOpen);
}

TEST_F(FindingLogTest, ARestartIntoAnotherAttemptEndsWhatWasOpen) {
  Step(1, {MakeFinding("a", Grade::kVerdict)});
  FindingLog after;
  for (const FindingRecord* record : log_.Records()) after.Restore(ThroughJson(*record));
  const std::string key = "run/1";
  EXPECT_THAT(Changes(after.End("job", At(10), &key)), ElementsAre("ended a"));
  EXPECT_THAT(Changes(after.Update("job", key, {MakeFinding("z")}, At(11))),
              ElementsAre("suspicion z"));
}

TEST_F(FindingLogTest, IsBounded) {
  for (size_t i = 0; i < FindingLog::kRecordsMax; ++i) {
    log_.Update("job" + std::to_string(i % 3), "", {MakeFinding(std::to_string(i))},
                At(static_cast<int>(i)));
  }
  // Only the last of each job is open.
  EXPECT_EQ(log_.size(), FindingLog::kRecordsMax);
  Step(5000, {MakeFinding("new")});
  EXPECT_EQ(log_.size(), FindingLog::kRecordsMax);
  EXPECT_EQ(log_.Find("0"), nullptr);
  EXPECT_NE(log_.Find("1"), nullptr);
  EXPECT_EQ(log_.Find("1023")->state, FindingState::kOpen);

  for (int i = 0; i < 200; ++i)
    Step(6000 + i, i % 2 ? std::vector<Finding>{} : std::vector<Finding>{MakeFinding("new")});
  const FindingRecord& record = *log_.Find("new");
  EXPECT_EQ(record.history.size(), FindingLog::kHistoryMax);
  EXPECT_EQ(record.history.front().change, FindingChange::kSuspicion);
  EXPECT_EQ(record.history_left_out + record.history.size(), 200u);
}

TEST_F(FindingLogTest, OldOnesAreForgottenUnlessTheyAreOpen) {
  Step(1, {MakeFinding("a"), MakeFinding("b")});
  Step(2, {MakeFinding("b")});
  log_.Forget(*At(2).wall_time);
  EXPECT_EQ(log_.size(), 2u);
  log_.Forget(*At(3).wall_time);
  EXPECT_EQ(log_.Find("a"), nullptr);
  EXPECT_NE(log_.Find("b"), nullptr);
}

TEST(FindingRecordTest, EveryMemberSurvivesItsJson) {
  for (size_t fault = 0; fault < kFaultClasses; ++fault) {
    FindingRecord record;
    record.job = "a \"job\"\n";
    record.attempt_key = "run/3";
    record.state = static_cast<FindingState>(fault % kFindingStates);
    record.finding = MakeFinding("5965a069", Grade::kVerdict, static_cast<FaultClass>(fault));
    record.finding.scope = static_cast<Scope>(fault % kScopes);
    record.finding.syndrome = static_cast<Syndrome>(fault % kSyndromes);
    record.finding.suspects.push_back({Rank{1}, Rank{2}});
    record.finding.confidence = 0.25;
    record.finding.evidence = {"one", "two"};
    record.finding.changes_mind = "a report";
    record.finding.since = absl::Milliseconds(41'500);
    record.history_left_out = 7;
    record.history = {{FindingChange::kVerdict, absl::Seconds(2), At(2).wall_time, "text"},
                      {FindingChange::kEnded, absl::Seconds(3), std::nullopt, ""}};
    const FindingRecord read = ThroughJson(record);
    EXPECT_EQ(OneLine(FindingRecordObject(read)), OneLine(FindingRecordObject(record)));
    EXPECT_EQ(read.finding.fault, record.finding.fault);
    EXPECT_EQ(read.finding.suspects, record.finding.suspects);
    EXPECT_EQ(read.history[0].wall_time, record.history[0].wall_time);
    EXPECT_FALSE(read.history[1].wall_time.has_value());
  }
}

TEST(FindingRecordTest, EveryMemberIsChecked) {
  FindingRecord record;
  record.finding = MakeFinding("5965a069");
  record.history = {{FindingChange::kVerdict, absl::Seconds(2), At(2).wall_time, "text"}};
  const nlohmann::ordered_json good = FindingRecordObject(record);
  const auto parse = [](const nlohmann::ordered_json& json) {
    const auto document = JsonDocument::Parse(OneLine(json));
    return ParseFindingRecord((*document)->root()).status();
  };
  ASSERT_OK(parse(good));
  const std::set<std::string> ignored = {"scope_in_words"};
  for (const auto& [key, value] : good.items()) {
    nlohmann::ordered_json bad = good;
    bad[key] = {{"neither", "this"}};
    EXPECT_EQ(parse(bad).ok(), ignored.contains(key)) << key;
    bad.erase(key);
    EXPECT_EQ(parse(bad).ok(), ignored.contains(key)) << key;
  }
  nlohmann::ordered_json bad = good;
  bad["fault"] = "plague";
  EXPECT_EQ(parse(bad).code(), absl::StatusCode::kInvalidArgument);
}

TEST(FindingRecordTest, EveryScopeHasWordsOfItsOwn) {
  std::set<std::string_view> words;
  for (size_t i = 0; i < kScopes; ++i) words.insert(InWords(static_cast<Scope>(i)));
  EXPECT_EQ(words.size(), kScopes);
  EXPECT_FALSE(words.contains(""));
}

}  // namespace
}  // namespace holdfast::monitor
