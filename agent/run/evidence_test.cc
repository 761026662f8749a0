// Goal: evidence is bounded whatever ranks have left or say, tells no secret, and says what is
// missing. What a whole run leaves is in cli/run_test.py.
#include "agent/run/evidence.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "agent/run/small_files.h"
#include "checkpoint/shared_mapping.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::StartsWith;

class EvidenceTest : public ::testing::Test {
 protected:
  EvidenceTest() { EXPECT_OK(MakeDirectories(directory())); }
  std::string directory() const { return place_.Join("incidents/40"); }
  std::string Contents(const std::string& name) const {
    const auto contents = ReadFile(directory() + "/" + name, size_t{64} << 20);
    return contents.ok() ? *contents : contents.status().ToString();
  }
  std::set<std::string> Names() const {
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(directory())) {
      names.insert(entry.path().filename().string());
    }
    return names;
  }
  static WaitingProcesses::Part Sealed(const std::string& text) {
    absl::StatusOr<UniqueFd> memory = SealedMemory("part", std::as_bytes(std::span(text)));
    EXPECT_OK(memory.status());
    return {*std::move(memory), text.size()};
  }

  const TemporaryDirectory place_;
};

TEST_F(EvidenceTest, OnlyVariablesOfTheListAreShown) {
  const std::string shown =
      AllowedVariables({"NCCL_DEBUG=INFO", "AWS_SECRET_ACCESS_KEY=s1", "WANDB_API_KEY=s2",
                        "HF_TOKEN=s3", "HOLDFAST_ON_VERDICT=curl https://s4", "HOLDFAST_JOB=llama",
                        "MASTER_ADDR=n1", "SECRET", "NCCL=s5", "=s6", "my_NCCL_DEBUG=s7"});
  EXPECT_EQ(shown,
            "HOLDFAST_JOB=llama\nMASTER_ADDR=n1\nNCCL_DEBUG=INFO\n"
            "# 8 others are left out: they may hold secrets\n");
}

TEST_F(EvidenceTest, OfEachLogTheEndIsKept) {
  Evidence evidence;
  evidence.directory = directory();
  evidence.summary = "Incident 40.\n";
  evidence.kernel_log = place_.Join("kern.log");
  std::ofstream(evidence.kernel_log) << "NVRM: Xid (PCI:0000:3b:00): 79\n";
  for (uint32_t rank : {0u, 1u}) {
    const std::string logs = place_.Join(absl::StrCat("logs-", rank));
    ASSERT_OK(MakeDirectories(logs));
    evidence.ranks.push_back({rank, logs, 0});
  }
  std::ofstream(place_.Join("logs-0/stdout.log"))
      << std::string(Evidence::kLogTailBytes, 'a') << "the end";
  std::ofstream(place_.Join("logs-0/error.json")) << "{}";
  ASSERT_EQ(mkfifo(place_.Join("logs-1/stderr.log").c_str(), 0600), 0);  // nobody writes to it
  EXPECT_THAT(CollectFromNode(evidence), IsEmpty());
  EXPECT_EQ(Contents("rank-0.stdout").size(), Evidence::kLogTailBytes);
  EXPECT_TRUE(Contents("rank-0.stdout").ends_with("athe end"));
  EXPECT_EQ(Contents("rank-0.error.json"), "{}");
  EXPECT_EQ(Contents("rank-1.stderr"), "");
  EXPECT_THAT(Contents("kernel.log"), HasSubstr("Xid"));
  EXPECT_THAT(Names(), Not(Contains("rank-1.error.json")));
}

TEST_F(EvidenceTest, WhatCannotBeHadIsSaid) {
  Evidence evidence;
  evidence.directory = directory();
  evidence.summary = "Incident 40.\n";
  evidence.kernel_log = place_.Join("none");
  const Missing missing = CollectFromNode(evidence);
  EXPECT_THAT(missing, ElementsAre(StartsWith("kernel.log: ")));
  ASSERT_OK(WriteSummary(evidence, missing));
  EXPECT_THAT(Contents(kSummaryFile), StartsWith("Incident 40.\n\nWhat could not be had:\n"));
  EXPECT_THAT(Contents(kSummaryFile), HasSubstr(place_.Join("none")));
}

TEST_F(EvidenceTest, TheNewestIncidentsAreKept) {
  for (int i = 1; i < 40; ++i) {
    ASSERT_OK(MakeDirectories(place_.Join(absl::StrCat("incidents/", i, "/deep"))));
  }
  ASSERT_OK(MakeDirectories(place_.Join("incidents/notes")));
  Evidence evidence;
  evidence.directory = directory();
  EXPECT_THAT(CollectFromNode(evidence), IsEmpty());
  for (int i = 1; i <= 40; ++i) {
    EXPECT_EQ(std::filesystem::exists(place_.Join(absl::StrCat("incidents/", i))), i > 8) << i;
  }
  EXPECT_TRUE(std::filesystem::exists(place_.Join("incidents/notes")));
  EXPECT_EQ(NewestIncident(place_.Join("incidents")), 40u);
  EXPECT_EQ(NewestIncident(place_.Join("none")), 0u);
}

TEST_F(EvidenceTest, AnswersOfProcessesAreReadWithBounds) {
  const auto dump =
      ReadFile(HOLDFAST_SOURCE_DIR "/tests/data/flight/never-entered.0.pickle", 1 << 20);
  ASSERT_OK(dump.status());
  WaitingProcesses::Round round;
  for (uint32_t rank = 0; rank < 4; ++rank) {
    WaitingProcesses::Answer answer;
    answer.process.rank = rank;
    round.answers.push_back(std::move(answer));
  }
  round.answers[0].flight_record = Sealed(*dump);
  round.answers[0].python_stacks = Sealed("Thread 0x1 (most recent call first):\n");
  round.answers[1].flight_record = Sealed("cos\nsystem\n(S'true'\ntR.");
  round.answers[2].flight_record = Sealed(std::string(Evidence::kFlightBytesMax + 1, 'x'));
  round.answers[2].python_stacks = Sealed("short");
  round.answers[2].python_stacks.bytes = 1 << 30;  // it lies
  round.answers[3].trouble = "no torch";
  WaitingProcesses::Process silent;
  silent.rank = UINT32_MAX;
  silent.process_id = 4711;
  round.silent.push_back(silent);
  const Missing missing = CollectAnswers(directory(), std::move(round));
  EXPECT_EQ(Contents("rank-0.flight"), *dump);
  EXPECT_THAT(Contents("rank-0.flight.txt"),
              HasSubstr("5 all_reduce [10, 4] Float  (has not ended)"));
  EXPECT_THAT(Contents("rank-0.python-stacks"), StartsWith("Thread 0x1"));
  EXPECT_THAT(Names(), Contains("rank-1.flight"));  // kept as it is, and never run
  EXPECT_THAT(
      missing,
      ElementsAre(StartsWith("rank-1.flight.txt: "), StartsWith("rank-2.python-stacks: "),
                  StartsWith("rank-2.flight: "), "rank-3: no torch", StartsWith("process-4711: ")));
}

TEST_F(EvidenceTest, WhatIsWrittenHasALimit) {
  WaitingProcesses::Round round;
  const std::string dump(Evidence::kFlightBytesMax, 'x');
  const size_t fit = Evidence::kFilesBytesMax / dump.size();
  for (uint32_t rank = 0; rank < fit + 1; ++rank) {
    WaitingProcesses::Answer answer;
    answer.process.rank = rank;
    answer.flight_record = Sealed(dump);
    round.answers.push_back(std::move(answer));
  }
  const Missing missing = CollectAnswers(directory(), std::move(round));
  EXPECT_THAT(missing, Contains(StartsWith(absl::StrCat("rank-", fit, ".flight: "))));
  uint64_t bytes = 0;
  for (const std::string& name : Names()) {
    bytes += std::filesystem::file_size(directory() + "/" + name);
  }
  EXPECT_LE(bytes, Evidence::kFilesBytesMax);
}

}  // namespace
}  // namespace holdfast
