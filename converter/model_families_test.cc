// The built-in tables: every naming of a family holds all of a model and nothing twice, in models
// of several shapes; and from every naming to every other one and back is the same, bit by bit.
#include "converter/model_families.h"

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "converter/mapping_sample.h"

namespace holdfast::converter {
namespace {

using absl::StatusCode;
using ::testing::HasSubstr;

struct Model {
  uint64_t layers = 2;
  uint64_t experts = 2;
  uint64_t heads = 4;
  uint64_t groups = 2;
  uint64_t head_rows = 2;
  uint64_t ffn = 3;
  bool tied = false;
  bool biases = false;
};

std::map<std::string, uint64_t> SizesOf(const Model& model) {
  return {{"hidden", 5},
          {"vocab", 7},
          {"positions", 6},
          {"experts", model.experts},
          {"ffn", model.ffn},
          {"rows", model.heads * model.head_rows},
          {"kv_rows", model.groups * model.head_rows}};
}

// All names of the family with their shapes, as this model has them.
std::vector<std::pair<std::string, std::vector<uint64_t>>> TensorsOf(const std::string& family,
                                                                     const Model& model) {
  const std::map<std::string, uint64_t> sizes = SizesOf(model);
  auto rules = ParseMappingRules(FamilyTable(family, "hf"), family);
  EXPECT_THAT(rules, IsOk());
  std::vector<std::pair<std::string, std::vector<uint64_t>>> tensors;
  for (const MappingShape& shape : rules->shapes) {
    const std::string& text = shape.name.text();
    if (model.tied && text == "lm_head.weight") continue;
    // Norms of GPT-2 always have biases.
    if (!model.biases && text.ends_with(".bias") && text.find("ln_") == std::string::npos) continue;
    std::vector<uint64_t> dims;
    for (const std::string& word : shape.words) dims.push_back(sizes.at(word));
    const bool layered = shape.name.captures().contains("n");
    const bool of_expert = shape.name.captures().contains("e");
    for (uint64_t layer = 0; layer < (layered ? model.layers : 1); ++layer) {
      for (uint64_t expert = 0; expert < (of_expert ? model.experts : 1); ++expert) {
        tensors.emplace_back(shape.name.Name({{"n", layer}, {"e", expert}}), dims);
      }
    }
  }
  return tensors;
}

class FamiliesTest : public testing::Test {
 protected:
  absl::Status Map(const std::string& option, const Model& model, MappingSample& sample,
                   std::vector<std::string>* said = nullptr) {
    const std::vector<std::string> set = {absl::StrCat("heads=", model.heads),
                                          absl::StrCat("groups=", model.groups), "vocab=7",
                                          "padded_vocab=9"};
    auto numbers = ModelNumbers::Create({.set = set});
    EXPECT_THAT(numbers, IsOk());
    std::vector<std::string> left_out;
    const std::vector<MapOption> options = {{.text = option}};
    // Not every naming asks for every number.
    const absl::Status status = MapIndex(options, "hf", sample.folder(), *numbers,
                                         Unmapped::kRefuse, sample.index, left_out);
    if (said != nullptr) *said = left_out;
    if (absl::IsInvalidArgument(status) && status.message().find("--set") != std::string::npos) {
      return absl::OkStatus();
    }
    return status;
  }
};

TEST_F(FamiliesTest, EveryNamingHoldsTheWholeModelAndGivesItBack) {
  const std::vector<Model> models = {
      {},
      {.layers = 1, .heads = 2, .groups = 2, .tied = true},
      {.layers = 11, .experts = 3, .heads = 6, .groups = 2, .head_rows = 4, .ffn = 5},
      {.experts = 1, .heads = 3, .groups = 1, .tied = true, .biases = true},
  };
  size_t count = 0;
  for (const std::string_view family_view : FamilyNames()) {
    const std::string family(family_view);
    for (Model model : models) {
      if (family == "gpt2") {  // no groups, always biases
        model.groups = model.heads;
        model.biases = true;
      }
      for (const std::string_view from : NamingsOf(family)) {
        for (const std::string_view to : NamingsOf(family)) {
          Model here = model;
          if (from == "titan" || to == "titan") here.biases = false;
          MappingSample sample;
          uint32_t first = 0;
          std::map<std::string, Dense> truth;
          for (const auto& [name, shape] : TensorsOf(family, here)) {
            const Dense tensor = Dense::Of(shape, first);
            first += static_cast<uint32_t>(tensor.values.size());
            truth[name] = tensor;
            sample.Add(name, "param", tensor, Cut::kRange);
            sample.Add(name, "exp_avg", tensor);
          }
          sample.Finished();
          // The family's own names are Hugging Face's, but for GPT-2.
          auto rules = ParseMappingRules(FamilyTable(family, from), "test");
          ASSERT_THAT(rules, IsOk());
          const std::vector<std::string> set = {absl::StrCat("heads=", here.heads),
                                                absl::StrCat("groups=", here.groups), "vocab=7",
                                                "padded_vocab=9"};
          ASSERT_OK_AND_ASSIGN(ModelNumbers numbers, ModelNumbers::Create({.set = set}));
          std::vector<std::string> left_out;
          ASSERT_THAT(
              ApplyMapping(
                  {.rules = *rules, .direction = MappingDirection::kRightToLeft, .where = "test"},
                  sample.folder(), numbers, sample.index, left_out),
              IsOk())
              << family << " " << from;
          ASSERT_THAT(Map(family + ":" + std::string(to), here, sample), IsOk())
              << family << " " << from << " " << to;
          rules = ParseMappingRules(FamilyTable(family, to), "test");
          ASSERT_THAT(rules, IsOk());
          ASSERT_THAT(
              ApplyMapping(
                  {.rules = *rules, .direction = MappingDirection::kLeftToRight, .where = "test"},
                  sample.folder(), numbers, sample.index, left_out),
              IsOk());
          EXPECT_EQ(sample.index.tensor_states.size(), 2 * truth.size());
          for (const auto& [name, tensor] : truth) {
            for (const char* state : {"param", "exp_avg"}) {
              ASSERT_EQ(sample.Read(sample.index, name, state), tensor)
                  << family << " " << from << " " << to << " " << name;
              ++count;
            }
          }
        }
      }
    }
  }
  EXPECT_GT(count, 10'000u);
}

// What Megatron's own order of rows is: view(groups, heads / groups + 2, rows of a head, hidden).
TEST_F(FamiliesTest, MegatronsAttentionIsInGroups) {
  const Model model;
  MappingSample sample;
  for (const auto& [name, shape] : TensorsOf("llama", model)) {
    uint32_t first = 0;
    if (name.find("k_proj") != std::string::npos) first = 1000;
    if (name.find("v_proj") != std::string::npos) first = 2000;
    sample.Add(name, "param", Dense::Of(shape, first));
  }
  sample.Finished();
  ASSERT_THAT(Map("llama:megatron", model, sample), IsOk());
  const Dense qkv =
      sample.Read(sample.index, "decoder.layers.1.self_attention.linear_qkv.weight", "param");
  ASSERT_EQ(qkv.shape, (std::vector<uint64_t>{16, 5}));
  std::vector<uint32_t> first_of_rows;
  for (uint64_t row = 0; row < 16; ++row) first_of_rows.push_back(qkv.values[row * 5]);
  // Each head has two rows; each group two heads of queries, one of keys, one of values.
  EXPECT_THAT(first_of_rows, testing::ElementsAre(0, 5, 10, 15, 1000, 1005, 2000, 2005,  //
                                                  20, 25, 30, 35, 1010, 1015, 2010, 2015));
  EXPECT_EQ(sample.Read(sample.index, "embedding.word_embeddings.weight", "param").shape[0], 9u);
  EXPECT_EQ(sample.Read(sample.index, "decoder.layers.0.mlp.linear_fc1.weight", "param").shape[0],
            6u);
}

TEST_F(FamiliesTest, SaysWhatItDoesNotKnow) {
  const auto check = [](const std::string& text) { return CheckMap({.text = text}); };
  EXPECT_THAT(check("llama"), IsOk());
  EXPECT_THAT(check("mixtral:hf-fused"), IsOk());
  EXPECT_THAT(check("lama"), StatusIs(StatusCode::kInvalidArgument,
                                      HasSubstr("(gpt2, llama, mixtral) or a file, found neither; "
                                                "did you mean \"llama\"?")));
  EXPECT_THAT(check("llama:megatrn"),
              StatusIs(StatusCode::kInvalidArgument, HasSubstr("did you mean \"megatron\"?")));
  EXPECT_THAT(CheckMap({.text = "x.map", .contents = "a == b"}),
              StatusIs(StatusCode::kInvalidArgument, HasSubstr("--map x.map: line 1:")));
  MappingSample sample;
  sample.Add("h.0.qkv", "param", Dense::Of({2}, 0));
  sample.Finished();
  EXPECT_THAT(Map("llama", {}, sample),
              StatusIs(StatusCode::kFailedPrecondition,
                       HasSubstr("expected names of llama (hf, megatron, megatron-local, "
                                 "megatron-deepspeed, titan), found none; --rename")));
}

// Heads that are wrong are seen by the shapes of other tensors.
TEST_F(FamiliesTest, WrongHeadsAreRefused) {
  MappingSample sample;
  for (const auto& [name, shape] : TensorsOf("llama", {}))
    sample.Add(name, "param", Dense::Of(shape, 0));
  sample.Finished();
  ASSERT_THAT(Map("llama:megatron", {}, sample), IsOk());
  EXPECT_THAT(Map("llama:hf", {.heads = 12}, sample),
              StatusIs(StatusCode::kFailedPrecondition, HasSubstr("o_proj")));
}

// A file of one's own names, before and after a family.
TEST_F(FamiliesTest, FilesAndFamiliesFollowEachOther) {
  MappingSample sample;
  const Model model{.layers = 1, .tied = true};
  std::string file;
  std::map<std::string, Dense> truth;
  for (const auto& [name, shape] : TensorsOf("llama", model)) {
    truth["my." + name] = Dense::Of(shape, static_cast<uint32_t>(truth.size() * 100));
    sample.Add("my." + name, "param", truth["my." + name]);
    file += "my." + name + " = " + name + "\n";
  }
  sample.Finished();
  const std::vector<std::string> set = {"heads=4", "groups=2", "vocab=7"};
  ASSERT_OK_AND_ASSIGN(ModelNumbers numbers, ModelNumbers::Create({.set = set}));
  std::vector<std::string> left_out;
  std::vector<MapOption> options = {{.text = "f", .contents = file}, {.text = "llama:megatron"}};
  ASSERT_THAT(
      MapIndex(options, "hf", sample.folder(), numbers, Unmapped::kRefuse, sample.index, left_out),
      IsOk());
  EXPECT_EQ(sample.Read(sample.index, "decoder.final_layernorm.weight", "param"),
            truth["my.model.norm.weight"]);
  options = {{.text = "llama"}, {.text = "f", .contents = file}};
  ASSERT_THAT(
      MapIndex(options, "hf", sample.folder(), numbers, Unmapped::kRefuse, sample.index, left_out),
      IsOk());
  EXPECT_EQ(sample.index.tensor_states.size(), truth.size());
  for (const auto& [name, tensor] : truth) {
    EXPECT_EQ(sample.Read(sample.index, name, "param"), tensor);
  }
}

}  // namespace
}  // namespace holdfast::converter
