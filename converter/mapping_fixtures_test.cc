// Goal: checkpoints that Megatron-LM and transformers wrote, mapped to the other's names and back,
// are bit for bit what they were, in every state; and one model that transformers wrote in two
// namings is one model.
//
// Skipped where ../shared/fixtures is not there; tests/interop/mapping_test.py lets Megatron-Core
// and transformers compute with what is mapped.
#include <algorithm>
#include <array>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "converter/foreign_testing.h"
#include "converter/format_reader.h"
#include "converter/model_families.h"
#include "converter/optimizer_groups.h"
#include "converter/whole_tensor_reader.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "io/posix_file_system.h"
#include "tests/support/status_matchers.h"

namespace holdfast::converter {
namespace {

namespace fs = std::filesystem;
using absl::StatusCode;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Records = std::map<std::pair<std::string, std::string>, std::string>;

Opened MustOpen(FileSystem& file_system, const fs::path& path) {
  auto opened = OpenCheckpoint(file_system, path);
  EXPECT_THAT(opened, IsOk()) << path;
  return *std::move(opened);
}

// Of everything but random states.
Records RecordsOf(const Opened& opened) {
  Records records;
  WholeTensorReader reader(*opened.folder, opened.index);
  for (uint32_t i = 0; i < opened.index.tensor_states.size(); ++i) {
    const TensorState& state = opened.index.tensor_states[i];
    if (state.state == "rng") continue;
    records[{state.tensor, state.state}] = RecordOf(reader, opened.index, i);
  }
  return records;
}

std::string ArgumentsOf(const ForeignIndex& index) {
  for (const Fact& fact : index.scalars) {
    if (fact.name == "args") return fact.json;
  }
  return "";
}

std::string ConfigOf(const ForeignFolder& folder) {
  const auto file = folder.Find("config.json");
  if (!file.has_value()) return "";
  auto text = folder.ReadAll(*file, 1 << 20);
  EXPECT_THAT(text, IsOk());
  return *text;
}

absl::Status Map(const std::string& option, ModelNumbers& numbers, Opened& opened) {
  const std::array<MapOption, 1> options = {MapOption{.text = option}};
  std::vector<std::string> left_out;
  const absl::Status status =
      MapIndex(options, "hf", *opened.folder, numbers, Unmapped::kLeaveOut, opened.index, left_out);
  for (const std::string& each : left_out)
    EXPECT_THAT(each, AnyOf(HasSubstr("rng_state"), HasSubstr("rows of padding")));
  return status;
}

// What one has and the other has not.
std::vector<std::string> Differing(const Records& a, const Records& b) {
  std::vector<std::string> texts;
  for (const auto& [these, those] : {std::pair(&a, &b), std::pair(&b, &a)}) {
    for (const auto& [key, text] : *these) {
      const auto other = those->find(key);
      if (other == those->end() || other->second != text) {
        texts.push_back(key.first + " " + key.second + " " + text);
      }
    }
  }
  return texts;
}

bool Has(const Records& records, const std::string& part) {
  return std::any_of(records.begin(), records.end(), [&](const auto& record) {
    return record.first.first.find(part) != std::string::npos;
  });
}

TEST(MappingFixtures, MegatronsCheckpointsGoToHuggingFacesNamesAndBack) {
  const fs::path fixtures = fs::path(HOLDFAST_TEST_SHARED) / "fixtures" / "megatron";
  if (!fs::exists(fixtures)) GTEST_SKIP() << fixtures << " is not there";
  const auto file_system = NewPosixFileSystem();
  std::set<std::string> families;
  for (const auto& entry : fs::directory_iterator(fixtures)) {
    SCOPED_TRACE(entry.path().filename().string());
    Opened opened = MustOpen(*file_system, entry.path() / "ckpt");
    const Records before = RecordsOf(opened);
    const std::string family = Has(before, ".experts.")             ? "mixtral"
                               : Has(before, "position_embeddings") ? "gpt2"
                                                                    : "llama";
    if (Has(before, "shared_experts")) continue;  // nothing that Mixtral has
    families.insert(family);
    // Padding is compared too.
    const auto words = std::find_if(opened.index.tensor_states.begin(),
                                    opened.index.tensor_states.end(), [](const TensorState& state) {
                                      return state.tensor == "embedding.word_embeddings.weight";
                                    });
    const uint64_t rows = words->shape[0];
    const std::vector<std::string> set = {"vocab=" + std::to_string(rows),
                                          "padded_vocab=" + std::to_string(rows)};
    const auto numbers = [&] {
      auto made = ModelNumbers::Create({.set = set, .arguments = ArgumentsOf(opened.index)});
      EXPECT_THAT(made, IsOk());
      return *std::move(made);
    };
    ModelNumbers there = numbers();
    // To Hugging Face's names nobody asks for the padding.
    EXPECT_THAT(Map(family + ":hf", there, opened),
                StatusIs(StatusCode::kInvalidArgument, HasSubstr("padded_vocab")));
    const Records mapped = RecordsOf(opened);
    EXPECT_FALSE(Has(mapped, "linear_qkv"));
    EXPECT_TRUE(Has(mapped, family == "gpt2" ? "attn.c_attn" : "self_attn.k_proj"));
    EXPECT_THAT(OptimizerGroupsOf(opened.index), IsOk());
    ModelNumbers back = numbers();
    ASSERT_THAT(Map(family + ":megatron-local", back, opened), IsOk());
    EXPECT_THAT(Differing(RecordsOf(opened), before), IsEmpty());
  }
  EXPECT_EQ(families, (std::set<std::string>{"gpt2", "llama", "mixtral"}));
}

TEST(MappingFixtures, HuggingFacesCheckpointsGoToMegatronsNamesAndBack) {
  const fs::path fixtures = fs::path(HOLDFAST_TEST_SHARED) / "fixtures" / "hf";
  if (!fs::exists(fixtures)) GTEST_SKIP() << fixtures << " is not there";
  const auto file_system = NewPosixFileSystem();
  const auto records_of = [&](const std::string& name, const std::vector<std::string>& options) {
    Opened opened = MustOpen(*file_system, fixtures / name / "ckpt");
    for (const std::string& option : options) {
      auto numbers = ModelNumbers::Create({.config = ConfigOf(*opened.folder)});
      EXPECT_THAT(numbers, IsOk());
      EXPECT_THAT(Map(option, *numbers, opened), IsOk()) << name << " " << option;
    }
    return RecordsOf(opened);
  };
  for (const auto& [name, family] :
       std::vector<std::pair<std::string, std::string>>{{"gpt2", "gpt2"},
                                                        {"gpt2_bin_sharded", "gpt2"},
                                                        {"llama_bf16", "llama"},
                                                        {"llama_sharded", "llama"},
                                                        {"mixtral", "mixtral"}}) {
    const Records before = records_of(name, {});
    for (const std::string_view naming : NamingsOf(family)) {
      if (naming == "hf") continue;
      EXPECT_THAT(Differing(records_of(name, {family + ":" + std::string(naming), family}), before),
                  IsEmpty())
          << name << " " << naming;
    }
  }
  // Two folders of one model.
  EXPECT_THAT(Differing(records_of("mixtral_fused", {"mixtral:hf"}), records_of("mixtral", {})),
              IsEmpty());
  EXPECT_THAT(
      Differing(records_of("mixtral_fused", {"mixtral:megatron-grouped", "mixtral:hf-fused"}),
                records_of("mixtral_fused", {})),
      IsEmpty());
}

}  // namespace
}  // namespace holdfast::converter
