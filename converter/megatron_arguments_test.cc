// Goal: a model that Megatron has not trained gets the arguments that Megatron reads from a
// checkpoint, as far as its tensors and config.json tell them, and legacy files of any degrees; a
// configuration that contradicts the tensors is refused.
// Method: MegatronSample's model without its arguments, with configurations as transformers writes
// them; the files are read back.
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "converter/conversion_source.h"
#include "converter/foreign_testing.h"
#include "converter/megatron_dist_writer.h"
#include "converter/megatron_legacy_writer.h"
#include "converter/megatron_sample.h"
#include "converter/selection.h"
#include "converter/torch_output.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "io/posix_file_system.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast::converter {
namespace {

namespace fs = std::filesystem;
using absl::StatusCode;
using ::testing::HasSubstr;
using Json = nlohmann::json;

constexpr char kMemory[] = "/dev/shm";
constexpr char kLlama[] = R"({"num_attention_heads": 8, "num_key_value_heads": 2,
  "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
  "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}})";

class MegatronArgumentsTest : public testing::Test {
 protected:
  absl::StatusOr<Opened> Open(const MegatronSampleConfig& sample) {
    const std::string root = directory_.Join("source");
    fs::remove_all(root);
    for (const auto& [path, bytes] : MegatronSample(sample).Legacy()) {
      fs::create_directories((fs::path(root) / path).parent_path());
      std::ofstream(fs::path(root) / path, std::ios::binary) << bytes;
    }
    return OpenCheckpoint(*file_system_, root);
  }

  // Writes the sample, without its arguments, as a checkpoint of these degrees.
  absl::Status Convert(const MegatronSampleConfig& sample, const MegatronDegrees& degrees,
                       const std::string& config) {
    absl::StatusOr<Opened> opened = Open(sample);
    if (!opened.ok()) return opened.status();
    opened->index.blobs.clear();
    opened->index.scalars.clear();
    ConversionSource source(*opened->folder, std::move(opened->index));
    const auto plan = PlanMegatronLegacy(source, degrees, config);
    if (!plan.ok()) return plan.status();
    fs::remove_all(Out());
    fs::create_directory(Out());
    return WriteTorchFiles(*file_system_, Out(), source, *plan, nullptr);
  }

  std::string Out() const { return directory_.Join("out"); }

  // `args` of what was written; null without them.
  Json Arguments() {
    const absl::StatusOr<Opened> opened = OpenCheckpoint(*file_system_, Out());
    EXPECT_THAT(opened, IsOk());
    if (!opened.ok()) return nullptr;
    EXPECT_TRUE(opened->index.unreadable.empty());
    for (const Fact& fact : opened->index.scalars) {
      if (fact.name == "args") return Json::parse(fact.json);
    }
    return nullptr;
  }

  const std::unique_ptr<FileSystem> file_system_ = NewPosixFileSystem();
  TemporaryDirectory directory_{fs::is_directory(kMemory) ? kMemory : "."};
};

TEST_F(MegatronArgumentsTest, ComeFromTensorsAndConfiguration) {
  ASSERT_THAT(Convert({.pp = 2}, {.tensor = 2, .pipeline = 2}, kLlama), IsOk());
  const Json expected = {{"num_layers", 2},
                         {"hidden_size", 8},
                         {"num_attention_heads", 8},
                         {"group_query_attention", true},
                         {"num_query_groups", 2},
                         {"kv_channels", 2},
                         {"padded_vocab_size", 32},
                         {"untie_embeddings_and_output_weights", true},
                         {"add_position_embedding", true},
                         {"max_position_embeddings", 64},
                         {"position_embedding_type", "rope"},
                         {"rotary_interleaved", false},
                         {"rotary_base", 500000},
                         {"rotary_percent", 1.0},
                         {"normalization", "RMSNorm"},
                         {"norm_epsilon", 1e-6},
                         {"ffn_hidden_size", 16},
                         {"swiglu", true},
                         {"add_bias_linear", false},
                         {"add_qkv_bias", false},
                         {"transformer_impl", "local"},
                         {"use_distributed_optimizer", true},
                         {"no_save_optim", false},
                         {"no_save_rng", true},
                         {"ckpt_format", "torch"},
                         {"tensor_model_parallel_size", 2},
                         {"pipeline_model_parallel_size", 2},
                         {"virtual_pipeline_model_parallel_size", nullptr},
                         {"num_virtual_stages_per_pipeline_rank", nullptr},
                         {"num_layers_per_virtual_pipeline_stage", nullptr},
                         {"decoder_first_pipeline_num_layers", nullptr},
                         {"decoder_last_pipeline_num_layers", nullptr},
                         {"pipeline_model_parallel_layout", nullptr},
                         {"expert_model_parallel_size", 1},
                         {"expert_tensor_parallel_size", 2}};
  EXPECT_EQ(Arguments(), expected);
}

TEST_F(MegatronArgumentsTest, SayWhichLayersHaveExpertsAndWhatHasABias) {
  ASSERT_THAT(Convert({.experts = 4, .bias = true}, {.expert = 2},
                      R"({"n_head": 4, "num_experts_per_tok": 2})"),
              IsOk());
  const Json found = Arguments();
  EXPECT_EQ(found["num_experts"], 4);
  EXPECT_EQ(found["moe_ffn_hidden_size"], 16);
  EXPECT_EQ(found["moe_router_topk"], 2);
  EXPECT_EQ(found["moe_layer_freq"], 1);
  EXPECT_EQ(found["moe_grouped_gemm"], false);
  EXPECT_EQ(found["add_bias_linear"], true);
  EXPECT_EQ(found["group_query_attention"], false);
  // The configuration does not say which activation the gate has, or where positions come from.
  EXPECT_FALSE(found.contains("swiglu"));
  EXPECT_FALSE(found.contains("position_embedding_type"));
  EXPECT_FALSE(found.contains("norm_epsilon"));
}

TEST_F(MegatronArgumentsTest, OfAContradictingConfigurationAreRefused) {
  EXPECT_THAT(Convert({}, {.tensor = 2}, R"({"num_attention_heads": 5})"),
              StatusIs(StatusCode::kFailedPrecondition, HasSubstr("divide the 24 rows")));
  EXPECT_THAT(Convert({}, {.tensor = 2}, R"({"n_head": 8, "num_key_value_heads": 3})"),
              StatusIs(StatusCode::kFailedPrecondition, HasSubstr("8 heads in 3 groups")));
  EXPECT_THAT(Convert({}, {.tensor = 4}, kLlama),
              StatusIs(StatusCode::kFailedPrecondition, HasSubstr("a divisor of the 2 groups")));
  EXPECT_THAT(Convert({}, {.tensor = 2}, "[1]"),
              StatusIs(StatusCode::kInvalidArgument, HasSubstr("expected an object")));
}

TEST_F(MegatronArgumentsTest, AreNoneWhereNothingSaysHowManyHeadsThereAre) {
  for (const char* config : {"", "{}"}) {
    ASSERT_THAT(Convert({}, {}, config), IsOk());
    EXPECT_EQ(Arguments(), nullptr);
    EXPECT_THAT(Convert({}, {.tensor = 2}, config),
                StatusIs(StatusCode::kFailedPrecondition, HasSubstr("or --model DIR")));
  }
}

// Megatron-LM ends where it is to load an optimizer and finds no schedule of learning rates.
TEST_F(MegatronArgumentsTest, AScheduleThatIsNotThereIsMissedAloud) {
  for (const bool has_schedule : {false, true}) {
    for (const bool has_states : {false, true}) {
      ASSERT_OK_AND_ASSIGN(Opened opened, Open({}));
      SelectionRequest request;
      if (!has_states) request.drop = {"fp32", "exp_avg", "exp_avg_sq", "step"};
      ASSERT_OK_AND_ASSIGN(Selection selection, Select(std::move(opened.index), request));
      if (!has_schedule) selection.index.blobs.clear();
      ConversionSource source(*opened.folder, std::move(selection));
      const auto expect = [&](const std::vector<std::string>& notes) {
        EXPECT_EQ(notes.size(), has_states && !has_schedule ? 1u : 0u);
        for (const std::string& note : notes) EXPECT_THAT(note, HasSubstr("opt_param_scheduler"));
      };
      ASSERT_OK_AND_ASSIGN(const TorchFilesPlan legacy, PlanMegatronLegacy(source, {}, ""));
      expect(legacy.notes);
      ASSERT_OK_AND_ASSIGN(const MegatronDistPlan dist, PlanMegatronDist(source, {}, ""));
      expect(dist.others.notes);
    }
  }
}

}  // namespace
}  // namespace holdfast::converter
