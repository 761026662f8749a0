#include "converter/parallel_rules.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/status_matchers.h"

namespace holdfast::converter {
namespace {

using ::testing::HasSubstr;

// The number in the whole tensor of every element of every rank's shard.
std::vector<std::vector<uint64_t>> Elements(const std::vector<ShardMap>& maps) {
  std::vector<std::vector<uint64_t>> all;
  for (const ShardMap& map : maps) {
    const TensorState state{
        .tensor = "t", .state = "param", .dtype = Dtype::kInt8, .shape = map.shape};
    std::vector<uint64_t> elements(map.shard_elements, UINT64_MAX);
    for (const ShardBlock& block : map.blocks) {
      BoxTable boxes;
      const Piece piece{.tensor_state = 0,
                        .box = boxes.Add(block.lo, block.size),
                        .begin = 0,
                        .end = block.ElementCount()};
      for (uint64_t i = 0; i < piece.end; ++i) {
        elements[block.shard_begin + i] = ElementInTensor(piece, boxes, state, i);
      }
    }
    all.push_back(std::move(elements));
  }
  return all;
}

ParallelRules RulesOf(ParallelInfo info) {
  absl::StatusOr<ParallelRules> rules = ParallelRules::Create(std::move(info));
  EXPECT_OK(rules);
  return *std::move(rules);
}

constexpr uint64_t kPad = UINT64_MAX;
using All = std::vector<std::vector<uint64_t>>;

TEST(ParallelRulesTest, EveryClassOfDeepSpeedsLanguage) {
  ParallelInfo info;
  info.version = 0.4;
  info.vocabulary = {R"(embed\.weight)"};
  info.replicated = {R"(.*norm\.weight)"};
  info.row = {R"(.*\.down\.weight)"};
  info.two_sub_parameters = {R"(.*\.gate_up\.weight)"};
  info.sub_parameters = {
      {.patterns = {R"(.*\.qkv\.weight)"}, .shape = {4, 1}, .sizes = {2, 1, 1}, .dimension = 0}};
  info.widths = {{R"(.*\.qkv\.weight)", {{1, 1}, {1, 0}, {0, 1}}}};
  info.original_vocabulary = 3;
  const ParallelRules rules = RulesOf(info);
  const auto resolve = [&rules](const std::string& name, std::vector<Shape> shapes) {
    absl::StatusOr<std::vector<ShardMap>> maps = rules.Resolve(name, shapes);
    EXPECT_OK(maps) << name;
    return maps.ok() ? Elements(*maps) : All{};
  };
  EXPECT_EQ(resolve("embed.weight", {{2, 1}, {2, 1}}), (All{{0, 1}, {2, kPad}}));
  EXPECT_EQ(resolve("h.0.norm.weight", {{2}, {2}}), (All{{0, 1}, {0, 1}}));
  EXPECT_EQ(resolve("h.0.down.weight", {{2, 1}, {2, 2}}), (All{{0, 3}, {1, 2, 4, 5}}));
  EXPECT_EQ(resolve("h.0.gate_up.weight", {{2, 1}, {2, 1}}), (All{{0, 2}, {1, 3}}));
  EXPECT_EQ(resolve("h.0.qkv.weight", {{2, 1}, {2, 1}}), (All{{0, 2}, {1, 3}}));
  // What nobody names is cut along dimension 0; one rank has all; a prefix is enough to match.
  EXPECT_EQ(resolve("h.0.up.weight", {{1, 2}, {2, 2}}), (All{{0, 1}, {2, 3, 4, 5}}));
  EXPECT_EQ(resolve("h.0.down.weight", {{2, 2}}), (All{{0, 1, 2, 3}}));
  EXPECT_EQ(resolve("xembed.weight", {{2, 1}, {2, 1}}), (All{{0, 1}, {2, 3}}));
}

TEST(ParallelRulesTest, BeforeVersion04SubParametersAreCounted) {
  ParallelInfo info;
  info.version = 0.2;
  info.sub_parameters = {{.patterns = {"qkv"}, .shape = {3, -1}, .sizes = {}, .dimension = 0}};
  const ParallelRules rules = RulesOf(info);
  const std::vector<Shape> shapes(2, {3, 2});
  ASSERT_OK_AND_ASSIGN(const std::vector<ShardMap> maps, rules.Resolve("qkv", shapes));
  EXPECT_EQ(maps[0].shape, (Shape{6, 2}));
  EXPECT_EQ(Elements(maps), (All{{0, 1, 4, 5, 8, 9}, {2, 3, 6, 7, 10, 11}}));
  const std::vector<Shape> three(3, {2, 2});
  EXPECT_THAT(rules.Resolve("qkv", three),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("divides")));
}

TEST(ParallelRulesTest, AffineMapsWinOverPatterns) {
  ParallelInfo info;
  info.replicated = {".*"};
  const auto row = [](uint64_t rank) {
    return AffineParameter::OfRank{.rank = rank,
                                   .shard_shape = {2, 1},
                                   .pieces = {{.shape = {2, 1},
                                               .source_offset = rank,
                                               .source_strides = {2, 1},
                                               .dest_offset = 0,
                                               .dest_strides = {1, 1}}}};
  };
  info.affine = {{.pattern = R"(^a\.weight$)", .logical_shape = {2, 2}, .ranks = {row(0), row(1)}}};
  const ParallelRules rules = RulesOf(info);
  const std::vector<Shape> shapes(2, {2, 1});
  ASSERT_OK_AND_ASSIGN(const std::vector<ShardMap> maps, rules.Resolve("a.weight", shapes));
  EXPECT_EQ(Elements(maps), (All{{0, 2}, {1, 3}}));
  const std::vector<Shape> three(3, {2, 1});
  EXPECT_THAT(rules.Resolve("a.weight", three),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("rank 2")));
  const std::vector<Shape> other(2, {3, 1});
  EXPECT_THAT(rules.Resolve("a.weight", other),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("[3, 1]")));
}

TEST(ParallelRulesTest, NothingIsGuessed) {
  const std::vector<Shape> two(2, {2, 1});
  EXPECT_THAT(RulesOf({}).Resolve("a", two),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("\"a\"")));
  ParallelInfo info;
  info.unsupported = {{"a", "a fused layout"}};
  info.replicated = {"b"};
  const ParallelRules rules = RulesOf(info);
  EXPECT_THAT(rules.Resolve("a", two),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("a fused layout")));
  const std::vector<Shape> unequal = {{2, 1}, {3, 1}};
  EXPECT_THAT(rules.Resolve("b", unequal),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("[3, 1]")));
  ParallelInfo bad;
  bad.row = {"(?=x)"};
  EXPECT_THAT(ParallelRules::Create(bad),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("(?=x)")));
  EXPECT_THAT(ParallelPreset("lama"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("did you mean \"llama\"")));
}

TEST(ParallelRulesTest, PresetsCutWhatTheFamiliesCut) {
  ASSERT_OK_AND_ASSIGN(ParallelInfo llama, ParallelPreset("llama"));
  const ParallelRules rules = RulesOf(llama);
  const auto whole = [&rules](const std::string& name, const Shape& shard) {
    const std::vector<Shape> shapes(2, shard);
    absl::StatusOr<std::vector<ShardMap>> maps = rules.Resolve(name, shapes);
    EXPECT_OK(maps);
    return maps.ok() ? (*maps)[1].shape : Shape{};
  };
  EXPECT_EQ(whole("model.layers.0.self_attn.q_proj.weight", {2, 8}), (Shape{4, 8}));
  EXPECT_EQ(whole("model.layers.0.self_attn.o_proj.weight", {8, 2}), (Shape{8, 4}));
  EXPECT_EQ(whole("model.layers.0.mlp.down_proj.weight", {8, 3}), (Shape{8, 6}));
  EXPECT_EQ(whole("model.layers.0.input_layernorm.weight", {8}), (Shape{8}));
  EXPECT_EQ(whole("model.norm.weight", {8}), (Shape{8}));
  EXPECT_EQ(whole("lm_head.weight", {5, 8}), (Shape{10, 8}));

  ASSERT_OK_AND_ASSIGN(ParallelInfo gpt2, ParallelPreset("gpt2"));
  const ParallelRules conv = RulesOf(gpt2);
  const std::vector<Shape> qkv(2, {1, 3});  // [in, out], out = q, k and v of one half
  ASSERT_OK_AND_ASSIGN(const std::vector<ShardMap> maps,
                       conv.Resolve("transformer.h.0.attn.c_attn.weight", qkv));
  EXPECT_EQ(Elements(maps), (All{{0, 2, 4}, {1, 3, 5}}));
}

}  // namespace
}  // namespace holdfast::converter
