// Goal: a layout file means what docs/CONVERTER_DEEPSPEED.md says of it, and what it does not mean
// is refused by name.
#include "converter/layout_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "converter/shard_testing.h"
#include "tests/support/status_matchers.h"

namespace holdfast::converter {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

absl::StatusOr<ParallelRules> RulesOf(const std::string& json) {
  absl::StatusOr<LayoutFile> layout = ParseLayoutFile(json);
  if (!layout.ok()) return layout.status();
  ParallelInfo info;
  info.rules = std::move(layout->rules);
  info.pipeline_replicated = std::move(layout->pipeline_replicated);
  return ParallelRules::Create(std::move(info));
}

using Values = std::vector<uint64_t>;
constexpr uint64_t kNone = UINT64_MAX;

// The whole tensor as the maps put it together, where element i of rank r's shard is
// shards[r][i]; kNone where no shard has an element.
Values Joined(const std::vector<ShardMap>& maps, const std::vector<Values>& shards) {
  Values whole(Product(maps.front().shape), kNone);
  for (size_t r = 0; r < maps.size(); ++r) {
    EXPECT_EQ(maps[r].shard_elements, shards[r].size());
    const Values numbers = ElementsOf(maps[r]);
    for (size_t i = 0; i < numbers.size(); ++i) {
      if (numbers[i] != kPaddingElement) whole[numbers[i]] = shards[r][i];
    }
  }
  return whole;
}

// The oracle cuts a matrix by the words of the grammar, element by element.
TEST(LayoutFile, WhatWasCutByTheRuleIsJoinedByIt) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  for (int round = 0; round < 300; ++round) {
    const uint64_t ranks = 1 + random() % 4;
    const size_t dimension = random() % 2;
    Values blocks(1 + random() % 3);
    uint64_t size = 0;
    for (uint64_t& block : blocks) {
      block = ranks * (1 + random() % 3);
      size += block;
    }
    const bool equal = random() % 2 == 0;
    if (equal) {
      blocks.assign(blocks.size(), blocks[0]);
      size = blocks[0] * blocks.size();
    }
    const uint64_t other = 1 + random() % 3;
    const Shape shape = dimension == 0 ? Shape{size, other} : Shape{other, size};
    // Which rank has index x along the dimension.
    const auto rank_of = [&](uint64_t x) {
      for (const uint64_t block : blocks) {
        if (x < block) return x / (block / ranks);
        x -= block;
      }
      return kNone;
    };
    std::vector<Values> shards(ranks);
    Values whole;
    for (uint64_t row = 0; row < shape[0]; ++row) {
      for (uint64_t column = 0; column < shape[1]; ++column) {
        whole.push_back(whole.size());
        shards[rank_of(dimension == 0 ? row : column)].push_back(whole.back());
      }
    }
    std::string text = "[";
    for (const uint64_t block : blocks) text += (text == "[" ? "" : ", ") + std::to_string(block);
    text = equal ? std::to_string(blocks.size()) : text + "]";
    ASSERT_OK_AND_ASSIGN(const ParallelRules rules,
                         RulesOf(R"({"rules": [{"parameters": "w", "cut": )" +
                                 std::to_string(dimension) + R"(, "blocks": )" + text + "}]}"));
    Shape of_shard = shape;
    of_shard[dimension] /= ranks;
    ASSERT_OK_AND_ASSIGN(const std::vector<ShardMap> maps,
                         rules.Resolve("w", std::vector<Shape>(ranks, of_shard)));
    ASSERT_EQ(maps.front().shape, shape);
    ASSERT_EQ(Joined(maps, shards), whole) << text << " on " << ranks;
  }
}

TEST(LayoutFile, TheFirstRuleThatMatchesCountsAndComesBeforeWhatOthersSay) {
  ASSERT_OK_AND_ASSIGN(LayoutFile layout, ParseLayoutFile(R"({
      "rules": [{"parameters": "a\\.b", "cut": "replicated"}, {"parameters": "a", "cut": 1},
                {"parameters": "e", "cut": 0, "rows": 3}]})"));
  ParallelInfo info;
  info.replicated = {"a", "norm"};
  info.rules = std::move(layout.rules);
  ASSERT_OK_AND_ASSIGN(const ParallelRules rules, ParallelRules::Create(std::move(info)));
  const auto shape = [&rules](const std::string& name, size_t ranks) {
    const auto maps = rules.Resolve(name, std::vector<Shape>(ranks, {2, 3}));
    EXPECT_OK(maps);
    return maps.ok() ? maps->front().shape : Shape{};
  };
  EXPECT_EQ(shape("a.b", 2), (Shape{2, 3}));
  EXPECT_EQ(shape("a.c", 2), (Shape{2, 6}));
  EXPECT_EQ(shape("a.c", 1), (Shape{2, 3}));
  EXPECT_EQ(shape("e", 2), (Shape{3, 3}));
  EXPECT_EQ(shape("norm", 2), (Shape{2, 3}));
  EXPECT_EQ(shape("other", 2), (Shape{4, 3}));  // DeepSpeed's own rule, as it names others
}

TEST(LayoutFile, WhatItDoesNotSayOrSaysWronglyIsRefused) {
  const auto resolve = [](const std::string& rule, std::vector<Shape> shapes) -> absl::Status {
    const absl::StatusOr<ParallelRules> rules = RulesOf(R"({"rules": [)" + rule + "]}");
    if (!rules.ok()) return rules.status();
    return rules->Resolve("w", shapes).status();
  };
  const std::vector<Shape> two(2, {2, 3});
  EXPECT_THAT(resolve(R"({"parameters": "x", "cut": 0})", two),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("\"w\""), HasSubstr("no rule of the layout file"))));
  EXPECT_THAT(resolve(R"({"parameters": "w", "cut": 2, "blocks": 2})", two),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("dimension 2")));
  EXPECT_THAT(resolve(R"({"parameters": "w", "cut": 2})", two),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("\"w\"")));
  EXPECT_THAT(resolve(R"({"parameters": "w", "cut": 0, "blocks": 3})", two),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("3 blocks divide, found 4")));
  EXPECT_THAT(resolve(R"({"parameters": "w", "cut": 0, "blocks": [3, 1]})", two),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("2 ranks divide, found 3")));
  EXPECT_THAT(resolve(R"({"parameters": "w", "cut": 0, "blocks": [2, 4]})", two),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("blocks of 4 together")));
  EXPECT_THAT(resolve(R"({"parameters": "w", "cut": 1, "blocks": 2})", {{2, 3}, {2, 1}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("elements")));
  EXPECT_THAT(resolve(R"({"parameters": "w", "cut": "replicated"})", {{2, 3}, {3, 2}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("equal replicas")));
  EXPECT_THAT(resolve(R"({"parameters": "w", "cut": 0, "rows": 5})", two),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("5")));
  EXPECT_THAT(resolve(R"j({"parameters": "(?=w)w", "cut": 0})j", two),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("layout file")));
}

TEST(LayoutFile, UnknownWordsGetASuggestion) {
  const auto message = [](const std::string& json) {
    return std::string(ParseLayoutFile(json).status().message());
  };
  EXPECT_THAT(message(R"({"rule": []})"), HasSubstr("did you mean \"rules\"?"));
  EXPECT_THAT(message(R"({"rules": [{"parameter": "w", "cut": 0}]})"),
              HasSubstr("did you mean \"parameters\"?"));
  EXPECT_THAT(message(R"({"rules": [{"parameters": "w", "cut": "replicate"}]})"),
              AllOf(HasSubstr("rules[0].cut"), HasSubstr("did you mean \"replicated\"?")));
  EXPECT_THAT(message(R"({"rules": [{"parameters": "w", "cut": 32}]})"), HasSubstr("below 32"));
  EXPECT_THAT(message(R"({"rules": [{"parameters": "w"}]})"), HasSubstr("cut"));
  EXPECT_THAT(message(R"({"rules": [{"parameters": "w", "cut": "replicated", "blocks": 2}]})"),
              HasSubstr("replicated"));
  EXPECT_THAT(message(R"({"rules": [{"parameters": "w", "cut": 0, "blocks": []}]})"),
              HasSubstr("from 1 to"));
  EXPECT_THAT(message(R"({"rules": [{"parameters": "w", "cut": 0, "blocks": 0}]})"),
              HasSubstr("from 1 to"));
  EXPECT_THAT(message("[]"), HasSubstr("object"));
  EXPECT_OK(ParseLayoutFile(""));
}

TEST(LayoutFile, TheExamplesOfItsDocumentsAreSuch) {
  constexpr std::string_view kOpen = "```json layout\n";
  int examples = 0;
  for (const char* name : {"CONVERTER_DEEPSPEED.md", "CONVERTER_WRITING.md"}) {
    std::ifstream file(std::string(HOLDFAST_SOURCE_DIR) + "/docs/" + name);
    std::stringstream text;
    text << file.rdbuf();
    const std::string document = text.str();
    for (size_t at = document.find(kOpen); at != std::string::npos; at = document.find(kOpen, at)) {
      at += kOpen.size();
      const std::string example = document.substr(at, document.find("```", at) - at);
      EXPECT_OK(RulesOf(example)) << example;
      ++examples;
    }
  }
  EXPECT_EQ(examples, 6);
}

}  // namespace
}  // namespace holdfast::converter
