// Rename files: what each word does, and that what is wrong is named with its line.
#include "converter/rename_rules.h"

#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/status_matchers.h"

namespace holdfast::converter {
namespace {

using absl::StatusCode;
using ::testing::HasSubstr;

TEST(RenameRules, EachRuleGoesOnFromTheOneAbove) {
  ASSERT_OK_AND_ASSIGN(RenameRules rules, RenameRules::Parse(R"(# of a wrapped model
prefix module. ""
regex  ^transformer\.h\.(\d+)\. layers.\1.   # blocks
suffix .gamma .weight
name   "with blanks" plain
name   layers.0.norm.weight first.norm
)"));
  const std::vector<std::pair<std::string, std::string>> names = {
      {"module.wte.weight", "wte.weight"},
      {"module.transformer.h.17.attn.weight", "layers.17.attn.weight"},
      {"transformer.h.0.norm.gamma", "first.norm"},
      {"with blanks", "plain"},
      {"other.module.x", "other.module.x"},
  };
  EXPECT_THAT(rules.CheckAllUsed(), StatusIs(StatusCode::kInvalidArgument, HasSubstr("line 2")));
  for (const auto& [from, to] : names) EXPECT_EQ(rules.Apply(from), to);
  EXPECT_THAT(rules.CheckAllUsed(), IsOk());
}

TEST(RenameRules, AnEmptyTextRenamesNothing) {
  for (const std::string text : {"", "\n \t\n", "# only\n  # comments"}) {
    ASSERT_OK_AND_ASSIGN(RenameRules rules, RenameRules::Parse(text));
    EXPECT_TRUE(rules.empty());
    EXPECT_EQ(rules.Apply("x"), "x");
    EXPECT_THAT(rules.CheckAllUsed(), IsOk());
  }
}

TEST(RenameRules, WhatIsWrongIsNamed) {
  const std::vector<std::pair<std::string, std::string>> texts = {
      {"prefx a b",
       "line 1: expected name, prefix, suffix or regex, found \"prefx\"; did you mean "
       "\"prefix\""},
      {"\nname a", "line 2: expected name OLD NEW, found fewer words"},
      {"name a b c", "found more words"},
      {"name \"a b", "expected a JSON string"},
      {"name \"\\x\" b", "expected a JSON string"},
      {"regex a( b", "expected an RE2 pattern"},
      {"regex (a) \\2", "line 1: \"\\2\""},
      {"regex \"\" b", "found an empty one"},
      {"name a b\nname c \xff", "line 2: expected UTF-8"},
      {"name a " + std::string(5000, 'b'), "expected words of at most 4096 bytes, found 5000"},
  };
  for (const auto& [text, expected] : texts) {
    EXPECT_THAT(RenameRules::Parse(text).status(),
                StatusIs(StatusCode::kInvalidArgument, HasSubstr(expected)))
        << text;
  }
  std::string many;
  for (size_t i = 0; i <= kRenameRulesMax; ++i) many += "name a b\n";
  EXPECT_THAT(RenameRules::Parse(many).status(),
              StatusIs(StatusCode::kInvalidArgument, HasSubstr("at most")));
}

TEST(RenameRules, NamesDoNotGrowWithoutEnd) {
  std::string text;
  for (int i = 0; i < 200; ++i) text += "regex x xx\n";
  ASSERT_OK_AND_ASSIGN(RenameRules rules, RenameRules::Parse(text));
  EXPECT_LT(rules.Apply("x").size(), 16384u);
}

}  // namespace
}  // namespace holdfast::converter
