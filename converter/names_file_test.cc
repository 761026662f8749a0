#include "converter/names_file.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace holdfast::converter {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(NamesFile, NoFileHasNoNames) {
  const auto names = ParseNamesFile("");
  ASSERT_TRUE(names.ok());
  EXPECT_TRUE(names->parameters.empty());
  EXPECT_TRUE(names->units.empty());
}

TEST(NamesFile, PiecesFollowEachOtherPaddingAndOffsetsCounted) {
  const auto names = ParseNamesFile(R"({
    "parameters": ["a", "b"], "comment": "ignored",
    "units": [{"unit": "", "pieces": [{"name": "a", "shape": [3, 3], "numel": 9}, {"padding": 3},
                                      {"name": "b", "shape": []}]},
              {"unit": "blocks.0", "numel": 20,
               "pieces": [{"name": "c", "shape": [5], "offset": 0},
                          {"name": "d", "shape": [2, 0], "offset": 8},
                          {"name": "e", "shape": [4], "offset": 8}, {"padding": 8}]}]})");
  ASSERT_TRUE(names.ok()) << names.status().ToString();
  EXPECT_THAT(names->parameters, ElementsAre("a", "b"));
  ASSERT_EQ(names->units.size(), 2u);
  const FlatUnit& root = names->units[0];
  EXPECT_EQ(root.Key(), "_flat_param");
  EXPECT_EQ(root.pieces[1].name, "b");
  EXPECT_EQ(root.pieces[1].offset, 12u);
  EXPECT_EQ(root.pieces[1].count, 1u);
  EXPECT_EQ(root.end, 13u);
  const FlatUnit& block = names->units[1];
  EXPECT_EQ(block.Key(), "blocks.0._flat_param");
  EXPECT_THAT(block.pieces[2].shape, ElementsAre(4));
  EXPECT_EQ(block.pieces[2].offset, 8u);
  EXPECT_EQ(block.end, 12u);
}

TEST(NamesFile, SaysWhereItIsWrong) {
  const auto error = [](const std::string& json) {
    return std::string(ParseNamesFile(json).status().message());
  };
  const auto unit = [&](const std::string& pieces) {
    return error(R"({"units": [{"unit": "u", "pieces": [)" + pieces + "]}]}");
  };
  EXPECT_THAT(error("{"), HasSubstr("expected"));
  EXPECT_THAT(error(R"({"parameters": ["a", "a"]})"), HasSubstr("parameters[1]"));
  EXPECT_THAT(error(R"({"units": [{"pieces": []}]})"), HasSubstr("unit"));
  EXPECT_THAT(unit(R"({"name": "a"})"), HasSubstr("shape"));
  EXPECT_THAT(unit(R"({"name": "a", "shape": [4], "numel": 5})"), HasSubstr("expected 4"));
  EXPECT_THAT(unit(R"({"name": "a", "shape": [4]}, {"name": "b", "shape": [1], "offset": 3})"),
              HasSubstr("at least 4"));
  EXPECT_THAT(unit(R"({"name": "a", "shape": [4]}, {"name": "a", "shape": [1]})"),
              HasSubstr("distinct names"));
  EXPECT_THAT(unit(R"({"name": "a", "shape": [4611686018427387904, 4]})"), HasSubstr("at most"));
  EXPECT_THAT(unit(R"({"padding": 4611686018427387904}, {"padding": 4611686018427387904})"),
              HasSubstr("at most"));
}

}  // namespace
}  // namespace holdfast::converter
