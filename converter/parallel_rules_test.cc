#include "converter/parallel_rules.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "converter/shard_testing.h"
#include "tests/support/status_matchers.h"

namespace holdfast::converter {
namespace {

using ::testing::HasSubstr;

// The number in the whole tensor of every element of every rank's shard.
std::vector<std::vector<uint64_t>> Elements(const std::vector<ShardMap>& maps) {
  std::vector<std::vector<uint64_t>> all;
  for (const ShardMap& map : maps) all.push_back(ElementsOf(map));
  return all;
}

ParallelRules RulesOf(ParallelInfo info) {
  absl::StatusOr<ParallelRules> rules = ParallelRules::Create(std::move(info));
  EXPECT_OK(rules);
  return *std::move(rules);
}

constexpr uint64_t kPad = kPaddingElement;
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

TEST(ParallelRulesTest, WhatIsCutIsJoinedByTheSameRules) {
  ParallelInfo info;
  info.vocabulary = {R"(embed\.weight)"};
  info.replicated = {R"(.*norm\.weight)"};
  info.row = {R"(.*\.down\.weight)"};
  info.two_sub_parameters = {R"(.*\.gate_up\.weight)"};
  info.sub_parameters = {
      {.patterns = {R"(.*\.qkv\.weight)"}, .shape = {4, 1}, .sizes = {4, 2, 2}, .dimension = 0},
      {.patterns = {R"(.*\.old\.weight)"}, .shape = {1, 3}, .sizes = {}, .dimension = 1},
      {.patterns = {R"(.*\.huge\.weight)"}, .shape = {INT64_MAX, 1}, .sizes = {}, .dimension = 0}};
  info.original_vocabulary = 3;
  info.rules = {{.pattern = "user", .dimension = 2, .blocks = {}, .equal_blocks = 1, .rows = {}}};
  const ParallelRules rules = RulesOf(info);
  struct Case {
    const char* name;
    Shape whole;
    Shape shard;
    All elements;
  };
  const std::vector<Case> cases = {
      {"x.norm.weight", {2}, {2}, {{0, 1}, {0, 1}}},
      {"x.up.weight", {2, 2}, {1, 2}, {{0, 1}, {2, 3}}},
      {"x.down.weight", {2, 2}, {2, 1}, {{0, 2}, {1, 3}}},
      {"x.gate_up.weight", {4, 1}, {2, 1}, {{0, 2}, {1, 3}}},
      {"x.qkv.weight", {8, 1}, {4, 1}, {{0, 1, 4, 6}, {2, 3, 5, 7}}},
      {"x.old.weight", {1, 6}, {1, 3}, {{0, 2, 4}, {1, 3, 5}}},
      {"embed.weight", {3, 1}, {2, 1}, {{0, 1}, {2, kPad}}},
      {"user", {1, 1, 2}, {1, 1, 1}, {{0}, {1}}},
  };
  for (const Case& each : cases) {
    SCOPED_TRACE(each.name);
    ASSERT_OK_AND_ASSIGN(const ParameterCut cut, rules.Cut(each.name, each.whole, 2));
    EXPECT_EQ(cut.shard_shape, each.shard);
    EXPECT_EQ(Elements(cut.maps), each.elements);
    EXPECT_EQ(cut.vocabulary, std::string(each.name) == "embed.weight");
    // One rank has it whole; a vocabulary of 3 rows needs no padding then.
    ASSERT_OK_AND_ASSIGN(const ParameterCut whole, rules.Cut(each.name, each.whole, 1));
    EXPECT_EQ(whole.shard_shape, each.whole);
  }
  const auto refused = [&rules](const char* name, const Shape& whole, const char* why) {
    EXPECT_THAT(rules.Cut(name, whole, 2),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(why)));
  };
  refused("x.up.weight", {3, 2}, "do not divide the 3 elements of dimension 0");
  refused("x.gate_up.weight", {6, 1}, "do not divide the 3 elements of dimension 0 of one of its");
  refused("x.gate_up.weight", {5, 1}, "2 sub-tensors along dimension 0, which do not divide");
  // Were the number believed, its memory would be asked for.
  refused("x.huge.weight", {0, 1}, "sub-tensors along dimension 0, which do not divide");
  refused("x.huge.weight", {8, 1}, "sub-tensors along dimension 0, which do not divide");
  refused("x.qkv.weight", {6, 1}, "expected sub-tensors of 6 elements together");
  refused("x.down.weight", {4}, "is to be cut along dimension 1, found shape [4]");
  refused("embed.weight", {4, 1}, "expected 3 rows, as it has without padding");
}

TEST(ParallelRulesTest, AVocabularyIsPaddedAsItWas) {
  ParallelInfo info;
  info.vocabulary = {"embed"};
  info.original_vocabulary = 251;
  info.padded_vocabulary = 256;
  const ParallelRules rules = RulesOf(info);
  const std::vector<std::pair<uint64_t, uint64_t>> ranks_and_rows = {{1, 256}, {2, 128}, {3, 84}};
  for (const auto& [ranks, rows] : ranks_and_rows) {
    ASSERT_OK_AND_ASSIGN(const ParameterCut cut, rules.Cut("embed", {251, 2}, ranks));
    EXPECT_EQ(cut.shard_shape, (Shape{rows, 2}));
    EXPECT_EQ(cut.maps.back().shape, (Shape{251, 2}));
  }
}

// A preset names what it cuts: what it does not know is nobody's.
TEST(ParallelRulesTest, WhatNobodyNamesIsNotCut) {
  ASSERT_OK_AND_ASSIGN(const ParallelInfo llama, ParallelPreset("llama"));
  const ParallelRules rules = RulesOf(llama);
  EXPECT_OK(rules.Cut("model.layers.0.mlp.up_proj.weight", {4, 2}, 2));
  EXPECT_THAT(rules.Cut("model.adapter.weight", {4, 2}, 2),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("nothing says how")));
  const std::vector<Shape> shards(2, {2, 2});
  EXPECT_THAT(rules.Resolve("model.adapter.weight", shards),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("preset does not know")));
  // Nor are the fused experts of transformers 5, of which no pattern could say it.
  ASSERT_OK_AND_ASSIGN(const ParallelInfo mixtral, ParallelPreset("mixtral"));
  const ParallelRules of_mixtral = RulesOf(mixtral);
  for (const char* name :
       {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"}) {
    EXPECT_THAT(of_mixtral.Cut(name, {2, 8, 4}, 2),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("nothing says how")));
    EXPECT_THAT(of_mixtral.Resolve(name, std::vector<Shape>(2, {2, 4, 4})),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(name)));
  }
  EXPECT_THAT(RulesOf({}).Cut("model.layers.0.mlp.up_proj.weight", {4, 2}, 2),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("nothing says how")));
  EXPECT_OK(RulesOf({}).Cut("anything", {4, 2}, 1));
  ParallelInfo unsupported;
  unsupported.unsupported = {{"fused", "nobody knows"}};
  EXPECT_THAT(RulesOf(unsupported).Cut("fused", {4}, 2),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("nobody knows")));
}

TEST(ParallelRulesTest, ExactPatternsFitTheirNamesOnly) {
  ParallelInfo info;
  info.replicated = {ExactPattern({"a.b", "c+d"})};
  info.row = {ExactPrefix("e.")};
  const ParallelRules rules = RulesOf(info);
  const auto kind = [&rules](const char* name) { return rules.Cut(name, {2, 2}, 2)->kind; };
  EXPECT_EQ(kind("a.b"), ParameterCut::Kind::kReplicated);
  EXPECT_EQ(kind("c+d"), ParameterCut::Kind::kReplicated);
  EXPECT_EQ(kind("e.x"), ParameterCut::Kind::kJoined);
  for (const char* other : {"axb", "a.bb", "ccd", "a", "ex"}) {
    EXPECT_EQ(rules.Cut(other, {2, 2}, 2)->dimension, 0u) << other;
    EXPECT_EQ(kind(other), ParameterCut::Kind::kJoined) << other;
  }
}

}  // namespace
}  // namespace holdfast::converter
