#include "converter/pipeline_stages.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/support/status_matchers.h"

namespace holdfast::converter {
namespace {

using ::testing::HasSubstr;

TEST(PipelineStages, NamesOfLayersAndOfTiedModules) {
  const auto layer = ParsePipelineName("14.norm.weight");
  ASSERT_TRUE(layer.has_value());
  EXPECT_EQ(layer->layer, 14u);
  EXPECT_EQ(layer->rest, "norm.weight");
  const auto first = ParsePipelineName("0.weight");
  ASSERT_TRUE(first.has_value());
  EXPECT_EQ(first->layer, 0u);
  const auto tied = ParsePipelineName("tied_modules.embed.word.weight");
  ASSERT_TRUE(tied.has_value());
  EXPECT_FALSE(tied->layer.has_value());
  EXPECT_EQ(tied->tied, "embed");
  EXPECT_EQ(tied->rest, "word.weight");
  for (const char* none :
       {"", ".", "4", "4.", ".weight", "04.weight", "-1.weight", "1e3.weight", "layers.0.weight",
        "10000.weight", "99999999999999999999.weight", "tied_modules.", "tied_modules.embed",
        "tied_modules.embed.", "tied_modules..weight"}) {
    EXPECT_FALSE(ParsePipelineName(none).has_value()) << none;
  }
}

// What DeepSpeed 0.19.8's partition_balanced gives for these: it is no optimum, and of several ways
// its last counts.
TEST(PipelineStages, AreDeepSpeedsOwn) {
  struct Case {
    std::vector<uint64_t> weights;
    uint64_t stages;
    std::vector<uint64_t> first;
  };
  const std::vector<Case> cases = {
      {{5}, 1, {0}},
      {{5}, 3, {0, 1, 1}},
      {{1, 1, 1, 1}, 2, {0, 2}},
      {{6526, 3261, 3261, 3261, 3261, 0, 52, 6526}, 2, {0, 3}},
      {{6526, 3261, 3261, 3261, 3261, 0, 52, 6526}, 3, {0, 2, 6}},
      {{6526, 3261, 3261, 3261, 3261, 0, 52, 6526}, 4, {0, 1, 3, 7}},
      {{0, 0, 7, 0, 0, 7, 0}, 2, {0, 5}},
      {{9, 1, 1, 1, 1, 1, 1, 9}, 3, {0, 1, 7}},
      {{3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5}, 4, {0, 5, 7, 9}},
      {{1, 2, 3, 4, 5, 6, 7}, 5, {0, 3, 4, 5, 6}},
      {{0, 0, 0, 0}, 2, {0, 3}},
      {{50, 8, 8, 8, 8, 8, 8, 8, 8, 50}, 4, {0, 1, 5, 9}},
  };
  for (const Case& each : cases) {
    ASSERT_OK_AND_ASSIGN(const std::vector<uint64_t> first,
                         BalancedStages(each.weights, each.stages));
    EXPECT_EQ(first, each.first) << testing::PrintToString(each.weights);
  }
}

TEST(PipelineStages, ASearchThatWouldNotEndIsRefused) {
  const std::vector<uint64_t> weights(9000, 1);
  EXPECT_THAT(BalancedStages(weights, 4000),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("\"stages\"")));
}

}  // namespace
}  // namespace holdfast::converter
