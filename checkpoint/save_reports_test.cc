// What the trainer is told, as it reads it; and a page that a worker left half written.
#include "checkpoint/save_reports.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <ctime>
#include <optional>
#include <string>
#include <vector>

#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

class SaveReportsTest : public testing::Test {
 protected:
  SaveReportsTest() {
    auto created = SaveReports::Create(7, 5);
    EXPECT_OK(created.status());
    reports = *std::move(created);
    auto mapped = SharedMapping::Reopen("page", Duplicate(), sizeof(abi::RankPage));
    EXPECT_OK(mapped.status());
    mapping = *std::move(mapped);
  }
  UniqueFd Duplicate() { return UniqueFd(fcntl(reports->fd(), F_DUPFD_CLOEXEC, 0)); }
  abi::RankPage& page() { return *reinterpret_cast<abi::RankPage*>(mapping->bytes().data()); }
  // The entry of a step; null if there is none.
  abi::SaveReport* Of(uint64_t step) {
    for (abi::SaveReport& report : page().reports) {
      if (report.step.load() == step) return &report;
    }
    return nullptr;
  }
  void Restart() {
    auto reopened = SaveReports::Reopen(7, 5, Duplicate());
    EXPECT_OK(reopened.status());
    reports = *std::move(reopened);
  }
  static constexpr absl::Duration kBegun = absl::Seconds(100);

  std::unique_ptr<SaveReports> reports;
  std::shared_ptr<SharedMapping> mapping;
};

TEST_F(SaveReportsTest, ANewPageIsEmpty) {
  EXPECT_EQ(page().magic, abi::kRankPageMagic);
  EXPECT_EQ(page().session_id, 7u);
  EXPECT_EQ(page().due_every_steps, 5u);
  EXPECT_EQ(page().committed_process_step.load(), abi::kNoStep);
  EXPECT_EQ(page().committed_power_step.load(), abi::kNoStep);
  EXPECT_EQ(Of(0), nullptr);  // step 0 is a step
  EXPECT_EQ(page().fenced_by.load(), 0u);
}

TEST_F(SaveReportsTest, TheTimeThatCallsTakeIsASumAndTheOneThatIsOpen) {
  EXPECT_EQ(reports->held(), std::nullopt);
  timespec now = {};
  clock_gettime(CLOCK_MONOTONIC, &now);
  page().held_since_ns.store((now.tv_sec - 5) * 1'000'000'000);
  const absl::Duration open = reports->held().value();
  EXPECT_GE(open, absl::Seconds(5));
  page().held_ns.store(2'000'000'000);
  EXPECT_GE(reports->held().value(), open + absl::Seconds(2));
  page().held_since_ns.store(0);
  EXPECT_EQ(reports->held(), absl::Seconds(2));
  // A trainer may write what it likes.
  page().held_since_ns.store(INT64_MAX);
  EXPECT_EQ(reports->held(), absl::Seconds(2));
  page().held_ns.store(UINT64_MAX);
  EXPECT_EQ(reports->held(), absl::Nanoseconds(INT64_MAX));
  page().held_since_ns.store(INT64_MIN);
  EXPECT_GT(reports->held(), absl::Nanoseconds(INT64_MAX));
}

TEST_F(SaveReportsTest, SectionsAreTextWhateverTheTrainerWrites) {
  EXPECT_THAT(reports->sections(), testing::IsEmpty());
  strcpy(page().section_names[0], "step");
  strcpy(page().section_names[1], "data");
  page().section_depth.store(2);
  EXPECT_THAT(reports->sections(), testing::ElementsAre("step", "data"));
  memset(page().section_names, 'x', sizeof(page().section_names));  // no NUL anywhere
  page().section_names[1][0] = '\xff';
  page().section_depth.store(UINT32_MAX);
  const std::vector<std::string> sections = reports->sections();
  ASSERT_EQ(sections.size(), abi::kSectionDepthMax);
  EXPECT_EQ(sections[0], std::string(abi::kSectionNameBytes, 'x'));
  EXPECT_EQ(sections[1], "?");
}

TEST_F(SaveReportsTest, TheLastSixteenSavesAreKept) {
  for (uint64_t step = 0; step < 20; ++step) {
    reports->Begin(Step{step}, step + 1, kBegun);
    EXPECT_EQ(page().next_report_index.load(), (step + 1) % 16);
  }
  EXPECT_EQ(Of(3), nullptr);
  for (uint64_t step = 4; step < 20; ++step) {
    ASSERT_NE(Of(step), nullptr);
    EXPECT_EQ(Of(step)->block_count.load(), step + 1);
    EXPECT_EQ(Of(step)->sequence.load() % 2, 0u);
  }
  reports->SetFailed(Step{3}, absl::AbortedError("too old to be told"));  // ignored
  EXPECT_EQ(Of(3), nullptr);
}

TEST_F(SaveReportsTest, AFailureHasItsCodeAndText) {
  reports->Begin(Step{3}, 8, kBegun);
  const uint32_t sequence = Of(3)->sequence.load();
  const uint32_t events = page().agent_events.load();
  reports->SetFailed(Step{3}, absl::ResourceExhaustedError(std::string(600, 'x')));
  EXPECT_EQ(Of(3)->state.load(), static_cast<uint32_t>(SaveState::kFailed));
  EXPECT_EQ(Of(3)->code.load(), 8);
  EXPECT_EQ(std::string(Of(3)->text), std::string(sizeof(Of(3)->text) - 1, 'x'));
  EXPECT_GT(Of(3)->sequence.load(), sequence);
  EXPECT_GT(page().agent_events.load(), events);
  // A shorter text leaves nothing of the longer one behind.
  reports->SetFailed(Step{3}, absl::AbortedError("short"));
  EXPECT_STREQ(Of(3)->text, "short");
  EXPECT_EQ(Of(3)->text[6], '\0');
}

TEST_F(SaveReportsTest, ACommitOnStorageIsFinal) {
  reports->Begin(Step{3}, 8, kBegun);
  reports->SetCaptured(Step{3}, absl::Milliseconds(2));
  reports->SetCommitted(Step{3}, Survives::kProcess, kBegun + absl::Seconds(1));
  EXPECT_EQ(Of(3)->state.load(), static_cast<uint32_t>(SaveState::kCommittedProcess));
  EXPECT_EQ(page().committed_process_step.load(), 3u);
  EXPECT_EQ(page().committed_power_step.load(), abi::kNoStep);
  EXPECT_EQ(Of(3)->commit_ns.load(), 0);  // not yet
  reports->SetCommitted(Step{3}, Survives::kPower, kBegun + absl::Seconds(2));
  EXPECT_EQ(Of(3)->state.load(), static_cast<uint32_t>(SaveState::kCommittedPower));
  EXPECT_EQ(page().committed_power_step.load(), 3u);
  EXPECT_EQ(Of(3)->commit_ns.load(), 2'000'000'000);
  EXPECT_EQ(Of(3)->capture_ns.load(), 2'000'000);
  reports->SetFailed(Step{3}, absl::AbortedError("too late"));
  reports->SetCommitted(Step{3}, Survives::kProcess, kBegun + absl::Seconds(3));
  EXPECT_EQ(Of(3)->state.load(), static_cast<uint32_t>(SaveState::kCommittedPower));
  // Older commits do not take newer ones back.
  reports->RaiseCommitted(Step{2}, Survives::kPower);
  EXPECT_EQ(page().committed_power_step.load(), 3u);
  EXPECT_EQ(page().committed_process_step.load(), 3u);
}

TEST_F(SaveReportsTest, ANewWorkerGoesOnWithTheSameEntries) {
  for (uint64_t step = 1; step <= 3; ++step) reports->Begin(Step{step}, 8, kBegun);
  reports->SetCommitted(Step{1}, Survives::kPower, kBegun);
  const size_t index = static_cast<size_t>(Of(2) - page().reports);
  // The worker died in the middle of writing entry 3.
  Of(3)->sequence.fetch_add(1);
  page().due_every_steps = 99;  // garbage of the trainer's
  Restart();
  EXPECT_EQ(page().due_every_steps, 5u);
  EXPECT_EQ(Of(3), nullptr);
  for (const abi::SaveReport& report : page().reports) EXPECT_EQ(report.sequence.load() % 2, 0u);
  reports->SetFailed(Step{2}, absl::AbortedError("after the restart"));
  EXPECT_EQ(Of(2), &page().reports[index]);
  EXPECT_STREQ(Of(2)->text, "after the restart");
  EXPECT_EQ(Of(1)->state.load(), static_cast<uint32_t>(SaveState::kCommittedPower));
  reports->Begin(Step{4}, 8, kBegun);
  EXPECT_EQ(Of(4), &page().reports[3]);
}

// Any bytes in the page: a new worker takes it over, and what it writes is right.
TEST_F(SaveReportsTest, GarbageInThePageIsNoObstacle) {
  for (const int fill : {0x00, 0xff, 0x5a}) {
    std::memset(mapping->bytes().data(), fill, mapping->bytes().size());
    Restart();
    EXPECT_EQ(page().magic, abi::kRankPageMagic);
    for (uint64_t step = 100; step < 120; ++step) {
      reports->Begin(Step{step}, 8, kBegun);
      ASSERT_NE(Of(step), nullptr);
      EXPECT_EQ(Of(step)->sequence.load() % 2, 0u);
    }
  }
}

}  // namespace
}  // namespace holdfast
