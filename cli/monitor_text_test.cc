#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_split.h"
#include "cli/monitor_verbs.h"

namespace holdfast::cli {
namespace {

using nlohmann::ordered_json;
using ::testing::HasSubstr;
using ::testing::Not;

ordered_json Cell(int from, int to, double us_per_mib, bool slow = false) {
  return {{"from", from},
          {"to", to},
          {"us_per_mib", us_per_mib},
          {"peers_us_per_mib", 100.0},
          {"baseline_us_per_mib", 90.0},
          {"slow", slow}};
}

// Whose row and column it is can be read without colour; what was not measured is empty.
TEST(MatrixTextTest, HasARowForEachSenderAndAColumnForEachReceiver) {
  ordered_json communicator;
  communicator["cells"] = {Cell(0, 1, 100), Cell(1, 2, 126), Cell(2, 10, 310, true),
                           Cell(10, 0, 115)};
  EXPECT_EQ(MatrixText(communicator, Colour::kNever, 80),
            "  from  0  1  2 10  <- to\n"
            "     0    .       \n"
            "     1       -    \n"
            "     2          #!\n"
            "    10 :          \n"
            "slow: rank 2 -> rank 10 takes 310 us per MiB, its peers 100\n");
}

TEST(MatrixTextTest, ColourChangesNoSign) {
  ordered_json communicator;
  communicator["cells"] = {Cell(0, 1, 100), Cell(1, 0, 250, true)};
  std::string text = MatrixText(communicator, Colour::kAlways, 80);
  EXPECT_THAT(text, HasSubstr("\033[48;5;"));
  for (size_t at = text.find('\033'); at != std::string::npos; at = text.find('\033')) {
    text.erase(at, text.find('m', at) + 1 - at);
  }
  EXPECT_EQ(text, MatrixText(communicator, Colour::kNever, 80));
}

TEST(MatrixTextTest, WhatDoesNotFitIsJoinedAndTheWorstIsShown) {
  ordered_json communicator;
  communicator["cells"] = ordered_json::array();
  constexpr int kRanks = 100;
  for (int rank = 0; rank < kRanks; ++rank) {
    communicator["cells"].push_back(
        Cell(rank, (rank + 1) % kRanks, rank == 57 ? 400 : 100, rank == 57));
  }
  for (const int columns : {20, 40, 80, 200, 400}) {
    const std::string text = MatrixText(communicator, Colour::kNever, columns);
    const std::vector<std::string> lines = absl::StrSplit(text, '\n');
    for (const std::string& line : lines) {
      const bool is_row = !line.empty() && line[0] == ' ' && line.find("<-") == std::string::npos;
      EXPECT_LE(is_row ? line.size() : 0, static_cast<size_t>(columns)) << line;
    }
    EXPECT_EQ(std::count(text.begin(), text.end(), '!'), 1) << columns;
    EXPECT_THAT(text, HasSubstr("slow: rank 57 -> rank 58"));
    EXPECT_EQ(text.find("the worst of") != std::string::npos, columns < 306) << columns;
  }
}

TEST(MatrixTextTest, NothingMeasuredIsNothingShown) {
  ordered_json communicator;
  communicator["cells"] = ordered_json::array();
  EXPECT_EQ(MatrixText(communicator, Colour::kNever, 80), "  from  <- to\n");
}

// Names of nodes, jobs and sections are a stranger's text.
TEST(FindingTextTest, ControlsNoTerminal) {
  const ordered_json finding = {{"id", "1a"},
                                {"grade", "verdict"},
                                {"fault", "dead"},
                                {"syndrome", "ended"},
                                {"scope", "process"},
                                {"scope_in_words", "the process"},
                                {"state", "open"},
                                {"job", "a\nb\x1b[2J"},
                                {"suspects", {{{"rank", 3}, {"peer", 4}}, {{"rank", 7}}}},
                                {"confidence", 0.5},
                                {"sentence", "Rank 3\r is gone"},
                                {"evidence", {"one\x07", "two"}},
                                {"changes_mind", "a report"},
                                {"history",
                                 {{{"change", "verdict"},
                                   {"at_seconds", 41.0},
                                   {"wall_time", nullptr},
                                   {"text", "Rank\t3"}}}},
                                {"history_left_out", 2}};
  for (const std::string& text : {FindingText(finding), FindingLine(finding)}) {
    for (const char* control : {"\x1b", "\r", "\x07", "\t", "a\nb"}) {
      EXPECT_THAT(text, Not(HasSubstr(control)));
    }
  }
  const std::string text = FindingText(finding);
  for (const char* part : {"rank 3 -> rank 4, rank 7 (the likeliest first)", "50%", "41 s  verdict",
                           "(2 more)", "process: the process", "wrong if      a report"}) {
    EXPECT_THAT(text, HasSubstr(part));
  }
}

TEST(SecondsTextTest, HasAUnitThatFits) {
  EXPECT_EQ(SecondsText(0.44), "0.4 s");
  EXPECT_EQ(SecondsText(21.2), "21 s");
  EXPECT_EQ(SecondsText(600), "10 min");
  EXPECT_EQ(SecondsText(36'000), "10 h");
}

}  // namespace
}  // namespace holdfast::cli
