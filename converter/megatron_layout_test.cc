// Goal: what names and arguments of Megatron mean, and where its buffers have what.
// Method: the rules' own words as examples, sizes that a real run recorded, and seeded random
// parameters against what must hold of any layout.
#include "converter/megatron_layout.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "converter/megatron_buffers.h"
#include "converter/megatron_files.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/status_matchers.h"

namespace holdfast::converter {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Optional;
using Kind = MegatronCut::Kind;

std::vector<BufferParameter> Parameters(std::vector<uint64_t> sizes) {
  std::vector<BufferParameter> parameters;
  for (const uint64_t size : sizes) parameters.push_back({.elements = size});
  return parameters;
}

TEST(MegatronBuffers, ARealBufferIsLaidOutAsMegatronRecordedIt) {
  // ../shared/fixtures/megatron/dist-bucket-tp2-dp2: two data-parallel ranks, ddp_bucket_size 2500.
  const std::vector<BufferParameter> parameters =
      Parameters({3072, 24, 432, 864, 24, 576, 288, 24, 432, 864, 24, 576, 288, 24, 3072});
  ASSERT_OK_AND_ASSIGN(const BufferLayout layout,
                       LayOutBuffer(parameters, {.bucket_elements = 2500,
                                                 .end_multiple = BucketEndMultiple(2, false)}));
  EXPECT_THAT(layout.begins, ElementsAre(0, 3072, 3136, 3584, 4480, 4544, 5120, 5440, 5504, 6016,
                                         6912, 6976, 7552, 7872, 7936));
  ASSERT_EQ(layout.buckets.size(), 3);
  EXPECT_EQ(layout.buckets[1].elements, 2864);
  EXPECT_EQ(layout.buckets[1].padded, 2944);
  EXPECT_EQ(layout.padded_elements(), 11008);
  EXPECT_EQ(layout.elements(), 10928);
  EXPECT_EQ(layout.paddings.back(), 80);
}

TEST(MegatronBuffers, ATiedEmbeddingIsAloneInItsBucketAndTheGapBeforeItCounts) {
  // legacy-vpp2-pp2-dp2: the last two parameters of the first stage.
  std::vector<BufferParameter> parameters = Parameters({20, 320, 4320});
  parameters[2].shared_embedding = true;
  ASSERT_OK_AND_ASSIGN(const BufferLayout layout, LayOutBuffer(parameters, {.end_multiple = 128}));
  EXPECT_THAT(layout.begins, ElementsAre(0, 64, 384));
  ASSERT_EQ(layout.buckets.size(), 2);
  EXPECT_EQ(layout.buckets[0].elements, 384);
  EXPECT_EQ(layout.buckets[1].padded, 4352);
}

TEST(MegatronBuffers, AnyLayoutHoldsTheRuleAndIsFoundAgainFromItsBuckets) {
  std::mt19937_64 random(20'261);
  for (int round = 0; round < 2000; ++round) {
    std::vector<BufferParameter> parameters(1 + random() % 12);
    for (BufferParameter& parameter : parameters) parameter.elements = 1 + random() % 400;
    if (random() % 3 == 0) parameters.back().shared_embedding = true;
    if (random() % 3 == 0) parameters.front().shared_embedding = true;
    BufferRule rule{.end_multiple = BucketEndMultiple(1 + random() % 6, false)};
    if (random() % 2 == 0) rule.bucket_elements = 1 + random() % 1500;
    ASSERT_OK_AND_ASSIGN(const BufferLayout layout, LayOutBuffer(parameters, rule));
    std::vector<uint64_t> elements;
    std::vector<uint64_t> padded;
    uint64_t begin = 0;
    for (const BufferLayout::Bucket& bucket : layout.buckets) {
      ASSERT_EQ(bucket.begin, begin) << "round " << round;
      ASSERT_EQ(bucket.padded % rule.end_multiple, 0) << "round " << round;
      ASSERT_LT(bucket.padded - bucket.elements, rule.end_multiple) << "round " << round;
      begin += bucket.padded;
      elements.push_back(bucket.elements);
      padded.push_back(bucket.padded);
    }
    uint64_t end = 0;
    for (size_t i = 0; i < parameters.size(); ++i) {
      const BufferLayout::Bucket& bucket = layout.buckets[layout.bucket_of[i]];
      ASSERT_EQ(layout.begins[i] % 64, 0) << "round " << round;
      ASSERT_GE(layout.begins[i], end) << "round " << round;
      end = layout.begins[i] + parameters[i].elements;
      ASSERT_GE(layout.begins[i], bucket.begin) << "round " << round;
      ASSERT_LE(end, bucket.begin + bucket.elements) << "round " << round;
      uint64_t before = 0;
      for (uint32_t b = 0; b < layout.bucket_of[i]; ++b) before += padded[b] - elements[b];
      ASSERT_EQ(layout.paddings[i], before) << "round " << round;
      // A bucket that was not closed had not enough.
      if (rule.bucket_elements.has_value() && i + 1 < parameters.size() &&
          layout.bucket_of[i + 1] == layout.bucket_of[i]) {
        ASSERT_LT(end - bucket.begin, *rule.bucket_elements) << "round " << round;
      }
    }
    ASSERT_OK_AND_ASSIGN(const BufferLayout again, FitBuffer(parameters, elements, padded));
    EXPECT_EQ(again.begins, layout.begins) << "round " << round;
    EXPECT_EQ(again.paddings, layout.paddings) << "round " << round;
  }
}

TEST(MegatronBuffers, BucketsThatDoNotAddUpAreRefused) {
  const std::vector<BufferParameter> parameters = Parameters({100, 50});
  EXPECT_THAT(FitBuffer(parameters, std::vector<uint64_t>{178}, std::vector<uint64_t>{256}),
              IsOk());
  EXPECT_THAT(FitBuffer(parameters, std::vector<uint64_t>{190}, std::vector<uint64_t>{256}),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("bucket 0")));
  EXPECT_THAT(FitBuffer(parameters, std::vector<uint64_t>{100}, std::vector<uint64_t>{128}),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("expected 2 parameters")));
  EXPECT_THAT(FitBuffer(parameters, std::vector<uint64_t>{178}, std::vector<uint64_t>{128}),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("with padding")));
  EXPECT_THAT(LayOutBuffer(Parameters({uint64_t{1} << 62}), {}),
              StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(LayOutBuffer(parameters, {.end_multiple = 0}),
              StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST(MegatronLayout, NamesSayHowAParameterIsCut) {
  const auto cut = [](std::string_view name, bool gated = false) {
    const auto found = MegatronCutOf(name, gated);
    if (!found.has_value()) return std::string("not told");
    switch (found->kind) {
      case Kind::kReplicated:
        return std::string("replicated");
      case Kind::kGated:
        return "halves " + std::to_string(found->dimension);
      case Kind::kJoined:
        break;
    }
    return std::to_string(found->dimension);
  };
  EXPECT_EQ(cut("decoder.layers.0.self_attention.linear_qkv.weight"), "0");
  EXPECT_EQ(cut("decoder.layers.0.self_attention.linear_qkv.bias"), "0");
  EXPECT_EQ(cut("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"), "replicated");
  EXPECT_EQ(cut("decoder.layers.0.self_attention.linear_proj.weight"), "1");
  EXPECT_EQ(cut("decoder.layers.0.self_attention.linear_proj.bias"), "replicated");
  EXPECT_EQ(cut("decoder.layers.0.self_attention.q_layernorm.weight"), "replicated");
  EXPECT_EQ(cut("decoder.layers.0.mlp.linear_fc1.weight"), "0");
  EXPECT_EQ(cut("decoder.layers.0.mlp.linear_fc1.weight", true), "halves 0");
  EXPECT_EQ(cut("decoder.layers.0.mlp.linear_fc1.bias", true), "halves 0");
  EXPECT_EQ(cut("decoder.layers.0.mlp.linear_fc2.weight", true), "1");
  EXPECT_EQ(cut("decoder.layers.0.mlp.linear_fc2.bias", true), "replicated");
  EXPECT_EQ(cut("decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight", true),
            "halves 0");
  EXPECT_EQ(cut("decoder.layers.0.mlp.experts.linear_fc2.weight12", true), "1");
  EXPECT_EQ(cut("decoder.layers.0.mlp.router.weight"), "replicated");
  EXPECT_EQ(cut("decoder.layers.0.mlp.router.expert_bias"), "replicated");
  EXPECT_EQ(cut("embedding.word_embeddings.weight"), "0");
  EXPECT_EQ(cut("embedding.position_embeddings.weight"), "replicated");
  EXPECT_EQ(cut("output_layer.weight"), "0");
  EXPECT_EQ(cut("mtp.layers.0.eh_proj.weight"), "0");
  EXPECT_EQ(cut("mtp.layers.0.enorm.weight"), "replicated");
  EXPECT_EQ(cut("language_model.encoder.layers.3.attention.dense.weight"), "1");
  EXPECT_EQ(cut("lm_head.dense.weight"), "not told");
  EXPECT_EQ(cut("vision.patch_embed.weight"), "not told");
  EXPECT_EQ(cut("decoder.layers.0.mixer.in_proj.weight"), "not told");
}

TEST(MegatronLayout, GatedShardsAreTwoHalvesEach) {
  // Rows 0..3 of the gate and 4..7 of the other half, over two ranks.
  const std::vector<Shape> shapes = {{4, 3}, {4, 3}};
  ASSERT_OK_AND_ASSIGN(const std::vector<ShardMap> maps,
                       MegatronShards({.kind = Kind::kGated, .dimension = 0}, shapes));
  ASSERT_EQ(maps.size(), 2);
  EXPECT_THAT(maps[1].shape, ElementsAre(8, 3));
  ASSERT_EQ(maps[1].blocks.size(), 2);
  EXPECT_THAT(maps[1].blocks[0].lo, ElementsAre(2, 0));
  EXPECT_THAT(maps[1].blocks[1].lo, ElementsAre(6, 0));
  EXPECT_THAT(MegatronShards({.kind = Kind::kGated, .dimension = 0}, {{3, 3}, {3, 3}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("even sizes")));
  EXPECT_THAT(MegatronShards({.kind = Kind::kReplicated}, {{4, 3}, {4, 2}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("one shape")));
}

TEST(MegatronLayout, ModelsHaveTheirParametersInTheOrderOfTheirModules) {
  const std::vector<std::string> order = {
      "embedding.word_embeddings.weight",
      "embedding.position_embeddings.weight",
      "decoder.layers.2.input_layernorm.weight",
      "decoder.layers.2.input_layernorm.bias",
      "decoder.layers.2.self_attention.linear_proj.weight",
      "decoder.layers.2.self_attention.linear_proj.bias",
      "decoder.layers.2.self_attention.linear_qkv.weight",
      "decoder.layers.2.self_attention.q_layernorm.weight",
      "decoder.layers.2.self_attention.k_layernorm.weight",
      "decoder.layers.2.pre_mlp_layernorm.weight",
      "decoder.layers.2.mlp.router.weight",
      "decoder.layers.2.mlp.experts.local_experts.2.linear_fc1.weight",
      "decoder.layers.2.mlp.experts.local_experts.2.linear_fc2.weight",
      "decoder.layers.2.mlp.experts.local_experts.10.linear_fc1.weight",
      "decoder.layers.2.mlp.shared_experts.gate_weight",
      "decoder.layers.2.mlp.shared_experts.linear_fc1.weight",
      "decoder.layers.2.mlp.shared_experts.linear_fc2.weight",
      "decoder.layers.10.self_attention.linear_proj.weight",
      "decoder.layers.10.self_attention.linear_qkv.layer_norm_weight",
      "decoder.layers.10.self_attention.linear_qkv.weight",
      "decoder.layers.10.mlp.experts.linear_fc1.weight2",
      "decoder.layers.10.mlp.experts.linear_fc1.weight10",
      "decoder.layers.10.mlp.experts.linear_fc2.weight0",
      "decoder.final_layernorm.weight",
      "mtp.layers.0.enorm.weight",
      "mtp.layers.0.hnorm.weight",
      "mtp.layers.0.eh_proj.weight",
      "mtp.layers.0.transformer_layer.input_layernorm.weight",
      "mtp.layers.0.transformer_layer.mlp.linear_fc1.weight",
      "mtp.layers.0.final_layernorm.weight",
      "mtp.layers.1.enorm.weight",
      "output_layer.weight"};
  std::mt19937_64 random(7);
  for (int round = 0; round < 50; ++round) {
    std::vector<std::string> names = order;
    std::ranges::shuffle(names, random);
    std::ranges::sort(names, MegatronModelOrder);
    ASSERT_EQ(names, order);
  }
}

TEST(MegatronLayout, StagesHaveLayersAsTheArgumentsSay) {
  MegatronArguments even{.pipeline_ranks = 2, .virtual_stages = 2};
  EXPECT_THAT(LayersOfStages(even, 8), Optional(ElementsAre(2, 2, 2, 2)));
  EXPECT_EQ(LayersOfStages(even, 6), std::nullopt);
  MegatronArguments first{.pipeline_ranks = 3};
  first.first_stage_layers = 1;
  EXPECT_THAT(LayersOfStages(first, 7), Optional(ElementsAre(1, 3, 3)));
  EXPECT_EQ(LayersOfStages(first, 8), std::nullopt);
  MegatronArguments ends{.pipeline_ranks = 4};
  ends.embedding_counts = ends.loss_counts = true;
  EXPECT_THAT(LayersOfStages(ends, 6), Optional(ElementsAre(1, 2, 2, 1)));
  MegatronArguments free{.pipeline_ranks = 2};
  free.free_layout = true;
  EXPECT_EQ(LayersOfStages(free, 4), std::nullopt);
}

TEST(MegatronLayout, KeysOfTorchDistAreNamesOfModules) {
  MegatronArguments local;
  local.local_modules = true;
  const auto name = [&](std::string_view key, const MegatronArguments& arguments) {
    return MegatronNameOf(ParseMegatronKey(key), 4, 2, arguments);
  };
  EXPECT_EQ(name("decoder.layers.self_attention.linear_qkv.layer_norm_weight", local),
            "decoder.layers.4.input_layernorm.weight");
  EXPECT_EQ(name("decoder.layers.self_attention.linear_qkv.layer_norm_weight", {}),
            "decoder.layers.4.self_attention.linear_qkv.layer_norm_weight");
  EXPECT_EQ(name("decoder.layers.1.mlp.linear_fc1.layer_norm_bias", local),
            "decoder.layers.1.pre_mlp_layernorm.bias");
  EXPECT_EQ(name("decoder.layers.mlp.experts.experts.linear_fc1.weight", local),
            "decoder.layers.4.mlp.experts.local_experts.2.linear_fc1.weight");
  MegatronArguments grouped;
  grouped.grouped_experts = true;
  EXPECT_EQ(name("decoder.layers.1.mlp.experts.experts.linear_fc1.weight", grouped),
            "decoder.layers.1.mlp.experts.linear_fc1.weight2");
  EXPECT_EQ(name("decoder.final_layernorm.weight", local), "decoder.final_layernorm.weight");
}

TEST(MegatronFiles, RanksAreOneToThreeNumbers) {
  EXPECT_THAT(ParseMegatronRank("mp_rank_07"), Optional(ElementsAre(7)));
  EXPECT_THAT(ParseMegatronRank("mp_rank_00_003"), Optional(ElementsAre(0, 3)));
  EXPECT_THAT(ParseMegatronRank("mp_rank_01_002_003"), Optional(ElementsAre(1, 2, 3)));
  for (const char* name : {"mp_rank_", "mp_rank_00_", "mp_rank_0_1_2_3", "mp_rank_a", "rank_00",
                           "mp_rank_00_model_states", "mp_rank_99999999"}) {
    EXPECT_EQ(ParseMegatronRank(name), std::nullopt) << name;
  }
}

}  // namespace
}  // namespace holdfast::converter
