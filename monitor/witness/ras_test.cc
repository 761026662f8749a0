// Both forms of NCCL's answer, as src/ras/client_support.cc of NCCL 2.30.7 prints them, for the
// same state of a job: rank 3 has launched one all-reduce less, and the process of member 5 is
// silent.
#include "monitor/witness/ras.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace holdfast::monitor {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// Eight ranks; `counts` are their all-reduces, -1: it gives no answer.
std::string Json(const std::vector<int>& counts, bool dead = false) {
  std::string ranks, missing;
  int missing_count = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    const std::string head = absl::StrFormat(
        R"({"rank": %d, "host": "10.0.0.%d", "pid": %d, "cuda_dev": %d, "nvml_dev": %d, )", i,
        i / 4, 1000 + i, i % 4, i % 4);
    if (counts[i] < 0) {
      absl::StrAppend(&missing, missing.empty() ? "" : ",\n", head,
                      R"("status": {"unresponsive": true, "considered_dead": )",
                      dead ? "true" : "false", "}}");
      ++missing_count;
    } else {
      absl::StrAppend(
          &ranks, ranks.empty() ? "" : ",\n", head,
          R"("status": {"init_state": 0, "async_error": 0, "finalize_called": false, )",
          R"("destroy_flag": false, "abort_flag": false}, "collective_counts": {"Broadcast": 3, )",
          R"("Reduce": 0, "AllGather": 0, "ReduceScatter": 0, "AllReduce": )", counts[i], "}}");
    }
  }
  return absl::StrFormat(R"({"nccl_version": "2.30.7", "cuda_runtime_version": 13000,
"cuda_driver_version": 13000, "timestamp": "2026-06-11 10:00:00", "communicators_count": 1,
"communicators": [{"hash": "0xa1b2c3d4e5f60718", "secondary_hash": "0x1:0x2", "size": %d,
"ranks_count": %d, "missing_ranks_count": %d, "ranks": [%s], "missing_ranks": [%s]}],
"ras": {"collection_time_sec": 0.002, "timeouts_count": 0}}
)",
                         counts.size(), counts.size() - missing_count, missing_count, ranks,
                         missing);
}

constexpr char kText[] = R"(NCCL version 2.30.7 compiled with CUDA 13.0
CUDA runtime version 13000, driver version 13000

Job summary
===========

  Nodes  Processes         GPUs  Processes     GPUs
(total)   per node  per process    (total)  (total)
      2          4            1          8        8

Communicators... (0.00s)
=============

Group     Comms     Nodes     Ranks     Ranks     Ranks    Status  Errors
    #  in group  per comm  per node  per comm  in group
    0         1         2         4         8         7   RUNNING  MISMATCH,INCOMPLETE

Errors
======

INCOMPLETE
  Missing communicator data from 1 job process
  Process 1005 on node 10.0.0.1 managing GPU 1

#0-0 (a1b2c3d4e5f60718) INCOMPLETE
  Missing communicator data from 1 rank
  Rank 5 -- GPU 1 managed by process 1005 on node 10.0.0.1

Warnings
========

#0-0 (a1b2c3d4e5f60718) MISMATCH
  Communicator ranks have different AllReduce operation counts
  6 ranks have launched up to operation 51
  Rank 3 has launched up to operation 50 -- GPU 3 managed by process 1003 on node 10.0.0.0

)";

constexpr char kDeadText[] = R"(NCCL version 2.30.7 compiled with CUDA 13.0

Errors
======

DEAD
  1 job process is considered dead (unreachable via the RAS network)
  Process 1005 on node 10.0.0.1 managing GPU 1 (NVML 2)

Warnings
========

)";

// Member i is global rank 10 + i; of member 7 nothing is known.
std::optional<Rank> RankOf(const RasCommunicator&, const RasRank& rank) {
  if (rank.process < 1000 || rank.process >= 1007) return std::nullopt;
  return Rank{static_cast<uint32_t>(rank.process - 990)};
}

RasReport Parsed(std::string answer) {
  auto report = ParseRasReport(std::move(answer));
  EXPECT_TRUE(report.ok()) << report.status().ToString();
  return report.ok() ? *std::move(report) : RasReport();
}

std::vector<Testimony> Said(const std::string& first, const std::string& second) {
  return TestifyRas(Parsed(first), Parsed(second), absl::Seconds(2), RankOf);
}

const std::vector<int> kHealthy = {51, 51, 51, 51, 51, 51, 51, 51};
const std::vector<int> kFaulty = {51, 51, 51, 50, 51, -1, 51, 51};

TEST(RasTest, BothFormsSayTheSame) {
  for (const std::string& answer : {Json(kFaulty), std::string(kText)}) {
    const std::vector<Testimony> said = Said(answer, answer);
    ASSERT_EQ(said.size(), 2u);
    const Testimony& behind = said[said[0].claim == Claim::kBehind ? 0 : 1];
    const Testimony& missing = said[said[0].claim == Claim::kBehind ? 1 : 0];
    EXPECT_EQ(behind.claim, Claim::kBehind);
    EXPECT_THAT(behind.ranks, ElementsAre(Rank{13}));
    EXPECT_EQ(behind.communicator, 0xa1b2c3d4e5f60718u);
    EXPECT_EQ(behind.standing, absl::Seconds(2));
    EXPECT_EQ(behind.sentence, "rank 13 has launched 50 of AllReduce where most have 51");
    EXPECT_EQ(missing.claim, Claim::kMissing);
    EXPECT_THAT(missing.ranks, ElementsAre(Rank{15}));
    EXPECT_EQ(missing.sentence, "rank 15 does not answer RAS");
  }
}

TEST(RasTest, WhoStillMovesIsNotBehind) {
  std::vector<int> later = kFaulty;
  for (int& count : later) count += count < 0 ? 0 : 1;
  const std::vector<Testimony> said = Said(Json(kFaulty), Json(later));
  ASSERT_EQ(said.size(), 1u);
  EXPECT_EQ(said[0].claim, Claim::kMissing);
}

TEST(RasTest, WhoIsAheadAloneMakesNobodyBehind) {
  std::vector<int> ahead = kHealthy;
  ahead[2] = 52;
  EXPECT_THAT(Said(Json(ahead), Json(ahead)), IsEmpty());
  EXPECT_THAT(Said(Json(kHealthy), Json(kHealthy)), IsEmpty());
}

TEST(RasTest, EveryMinorityThatIsBehindIsNamed) {
  for (unsigned mask = 1; mask < 256; ++mask) {
    std::vector<int> counts = kHealthy;
    std::vector<uint32_t> expected;
    for (unsigned i = 0; i < 8; ++i) {
      if ((mask >> i & 1) == 0) continue;
      counts[i] = 49;
      expected.push_back(i);
    }
    if (expected.size() > 4) expected.clear();  // then most have 49, and nobody is behind
    const std::string answer = Json(counts);
    std::vector<uint32_t> named;
    for (const Testimony& testimony : Said(answer, answer)) {
      EXPECT_EQ(testimony.claim, Claim::kBehind);
      named.push_back(testimony.ranks.empty() ? 7 : Value(testimony.ranks[0]) - 10);
    }
    EXPECT_EQ(named, expected) << mask;
  }
}

TEST(RasTest, BehindInOneAndAheadInAnotherIsSomethingElse) {
  std::string answer = Json(kFaulty);
  // Member 3's Broadcast is one more.
  const size_t member = answer.find(R"({"rank": 3)");
  const size_t at = answer.find(R"("Broadcast": 3)", member);
  answer.replace(at, 14, R"("Broadcast": 4)");
  const std::vector<Testimony> said = Said(answer, answer);
  ASSERT_EQ(said.size(), 2u);
  EXPECT_EQ(said[0].claim, Claim::kDiffers);
  EXPECT_THAT(said[0].sentence, HasSubstr("4 of Broadcast where most have 3"));
}

TEST(RasTest, TheDeadAreSurer) {
  for (const auto& answer : {Json(kFaulty, /*dead=*/true)}) {
    const std::vector<Testimony> said = Said(answer, answer);
    const Testimony& missing = said[said[0].claim == Claim::kMissing ? 0 : 1];
    EXPECT_GE(missing.certainty, 0.9);
    EXPECT_THAT(missing.sentence, HasSubstr("for dead"));
  }
  const std::vector<Testimony> text = Said(kDeadText, kDeadText);
  ASSERT_EQ(text.size(), 1u);
  EXPECT_THAT(text[0].ranks, ElementsAre(Rank{15}));
  EXPECT_GE(text[0].certainty, 0.9);
}

TEST(RasTest, AnUnknownRankIsNamedInWords) {
  std::vector<int> counts = kHealthy;
  counts[7] = 20;
  const std::vector<Testimony> said = Said(Json(counts), Json(counts));
  ASSERT_EQ(said.size(), 1u);
  EXPECT_THAT(said[0].ranks, IsEmpty());
  EXPECT_THAT(said[0].sentence, HasSubstr("member 7 of communicator a1b2c3d4e5f60718"));
}

TEST(RasTest, WhatIsNoReportIsRefused) {
  for (const std::string answer : {"", "ERROR: unknown command", "HTTP/1.1 400 Bad Request\r\n\r\n",
                                   "{}", R"({"communicators": 7})", R"({"communicators": [{}]})",
                                   R"({"communicators": [{"hash": "zz", "size": 1}]})"}) {
    EXPECT_FALSE(ParseRasReport(answer).ok()) << answer;
  }
}

// Cut off anywhere the text is read as far as it goes, and the JSON is refused.
TEST(RasTest, EveryCutIsHarmless) {
  const std::string text = kText, json = Json(kFaulty);
  for (size_t size = 0; size < text.size(); ++size) {
    const auto report = ParseRasReport(text.substr(0, size));
    if (report.ok()) {
      EXPECT_LE(report->communicators.size(), 1u);
    }
  }
  for (size_t size = 0; size + 2 < json.size(); ++size) {
    EXPECT_FALSE(ParseRasReport(json.substr(0, size)).ok()) << size;
  }
}

}  // namespace
}  // namespace holdfast::monitor
