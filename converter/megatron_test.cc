// Goal: whatever the degrees of parallelism, every whole tensor and state of a Megatron checkpoint
// is bit for bit what training held; what cannot be proven is named, and damage is refused by name.
// Method: MegatronSample writes small checkpoints of many configurations from Megatron's rules,
// with the truth beside them; then one thing after the other is wrong in them.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "converter/foreign_folder.h"
#include "converter/format_reader.h"
#include "converter/megatron_sample.h"
#include "converter/prove.h"
#include "converter/whole_tensor_reader.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "io/posix_file_system.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast::converter {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using Key = std::pair<std::string, std::string>;  // tensor, state

std::string Name(const MegatronSampleConfig& config) {
  return absl::StrCat("tp ", config.tp, ", pp ", config.pp, ", vpp ", config.vpp, ", ep ",
                      config.ep, ", etp ", config.etp, ", dp ", config.dp, ", experts ",
                      config.experts, config.gated ? ", gated" : "", config.tied ? ", tied" : "",
                      config.bias ? ", bias" : "",
                      config.weights == Dtype::kFloat32 ? ", float32" : "",
                      config.distributed ? "" : ", ordinary optimizer", ", buckets of ",
                      config.bucket.value_or(0), ", seed ", config.seed);
}

// Every kind of configuration once or more; `vary` gives each its own values.
std::vector<MegatronSampleConfig> Configurations(bool distributed) {
  std::vector<MegatronSampleConfig> configs = {
      {},
      {.gated = false, .bias = true},
      {.tp = 2, .etp = 2, .bias = true},
      {.tp = 4, .etp = 4, .dp = 3, .bucket = 700},
      {.tp = 2, .pp = 2, .etp = 2, .tied = true, .bucket = 300},
      {.pp = 2, .vpp = 2, .layers_per_chunk = 2, .gated = false, .tied = true},
      {.tp = 2, .pp = 2, .vpp = 3, .etp = 2, .dp = 1},
      {.tp = 2, .etp = 2, .weights = Dtype::kFloat32},
      {.ep = 2, .experts = 4, .bucket = 500},
      {.tp = 2, .pp = 2, .ep = 2, .etp = 2, .dp = 4, .experts = 4, .tied = true},
      {.tp = 2, .ep = 2, .etp = 1, .dp = 2, .experts = 4},
      {.tp = 2, .etp = 2, .layers_per_chunk = 3, .experts = 3},
      {.dp = 5, .layers_per_chunk = 12, .bucket = 100},
      {.tp = 2,
       .pp = 2,
       .vpp = 2,
       .etp = 2,
       .layers_per_chunk = 2,
       .tied = true,
       .free_layout = true},
  };
  for (size_t i = 0; i < configs.size(); ++i) {
    configs[i].seed = 100 + i;
    configs[i].distributed = distributed;
  }
  return configs;
}

class MegatronTest : public testing::Test {
 protected:
  // Writes the files and opens the folder.
  void Write(const MegatronSample::Files& files) {
    folder_.reset();
    fs::remove_all(Root());
    for (const auto& [path, bytes] : files) {
      fs::create_directories((Root() / path).parent_path());
      std::ofstream(Root() / path, std::ios::binary) << bytes;
    }
    ASSERT_OK_AND_ASSIGN(folder_, ForeignFolder::Open(*file_system_, Root().string()));
  }
  absl::StatusOr<ForeignIndex> Read(const ReadOptions& options = {}) {
    const absl::StatusOr<const FormatReader*> reader = RecognizeFormat(*folder_);
    if (!reader.ok()) return reader.status();
    if (*reader == nullptr) return absl::NotFoundError("no format");
    EXPECT_EQ((*reader)->name, "megatron");
    return ReadFormat(**reader, *folder_, options);
  }
  absl::StatusOr<ForeignIndex> ReadTag(const std::string& tag) {
    ReadOptions options;
    options.tag = tag;
    return Read(options);
  }
  fs::path Root() const { return fs::path(directory_.path()) / "checkpoint"; }

  // Everything that the index has is as in the truth; returns what of the truth it lacks.
  std::vector<Key> Compare(const ForeignIndex& index, const MegatronSample& sample) {
    auto expected = sample.Expected();
    WholeTensorReader reader(*folder_, index);
    for (uint32_t i = 0; i < index.tensor_states.size(); ++i) {
      const TensorState& state = index.tensor_states[i];
      const auto truth = expected.find({state.tensor, state.state});
      if (truth == expected.end()) {
        ADD_FAILURE() << Describe(state) << " is not expected";
        continue;
      }
      EXPECT_EQ(state.dtype, truth->second.dtype) << Describe(state);
      EXPECT_EQ(state.shape, truth->second.shape) << Describe(state);
      std::string bytes;
      EXPECT_THAT(reader.Read(i,
                              [&](std::span<const std::byte> part) {
                                bytes.append(reinterpret_cast<const char*>(part.data()),
                                             part.size());
                                return absl::OkStatus();
                              }),
                  IsOk())
          << Describe(state);
      EXPECT_TRUE(bytes == truth->second.bytes) << Describe(state) << " has other values";
      expected.erase(truth);
    }
    std::vector<Key> lacking;
    for (const auto& [key, truth] : expected) lacking.push_back(key);
    return lacking;
  }
  void ExpectSound(const MegatronSample& sample) {
    ASSERT_OK_AND_ASSIGN(const ForeignIndex index, Read());
    EXPECT_EQ(index.step, 7);
    for (const Unreadable& each : index.unreadable) {
      ADD_FAILURE() << each.name << ": " << each.reason;
    }
    EXPECT_EQ(Compare(index, sample), std::vector<Key>());
    EXPECT_TRUE(index.repairs.empty() && index.losses.empty());
    ASSERT_OK_AND_ASSIGN(const ProofReport proof, Prove(*folder_, index, {}));
    EXPECT_EQ(proof.soundness, Soundness::kGood);
  }

  TemporaryDirectory directory_;
  std::unique_ptr<FileSystem> file_system_ = NewPosixFileSystem();
  std::unique_ptr<ForeignFolder> folder_;
};

TEST_F(MegatronTest, LegacyFoldersOfAnyDegreesAreReadWhole) {
  for (const bool distributed : {true, false}) {
    for (const MegatronSampleConfig& config : Configurations(distributed)) {
      SCOPED_TRACE(Name(config));
      const MegatronSample sample(config);
      Write(sample.Legacy());
      ExpectSound(sample);
    }
  }
}

TEST_F(MegatronTest, TorchDistFoldersOfAnyDegreesAreReadWhole) {
  for (const bool distributed : {true, false}) {
    for (const MegatronSampleConfig& config : Configurations(distributed)) {
      SCOPED_TRACE(Name(config));
      const MegatronSample sample(config);
      Write(sample.TorchDist(MegatronSample::Form::kReshardable));
      ExpectSound(sample);
    }
  }
}

TEST_F(MegatronTest, AnonymousBucketsOfAnyDegreesAreNamed) {
  for (const MegatronSampleConfig& config : Configurations(true)) {
    SCOPED_TRACE(Name(config));
    const MegatronSample sample(config);
    Write(sample.TorchDist(MegatronSample::Form::kBuckets));
    ExpectSound(sample);
  }
}

TEST_F(MegatronTest, BuffersInOneObjectOfEachRankAreTakenApart) {
  for (const MegatronSampleConfig& config : Configurations(true)) {
    SCOPED_TRACE(Name(config));
    const MegatronSample sample(config);
    Write(sample.TorchDist(MegatronSample::Form::kGathered));
    ExpectSound(sample);
    ASSERT_OK_AND_ASSIGN(const ForeignIndex index, Read());
    for (const ForeignBlob& blob : index.blobs) {
      EXPECT_THAT(blob.name, testing::Not(HasSubstr("param_state")));
    }
  }
}

TEST_F(MegatronTest, ShiftedStatesAreMendedOrNamedAsLost) {
  std::vector<MegatronSampleConfig> configs = Configurations(true);
  for (const uint32_t tp : {1, 2}) {
    for (const uint64_t bucket : {264, 450, 1000}) {
      configs.push_back(
          {.tp = tp, .etp = tp, .layers_per_chunk = 6, .bucket = bucket, .seed = bucket});
    }
  }
  size_t with_repairs = 0;
  size_t with_losses = 0;
  for (const MegatronSampleConfig& config : configs) {
    SCOPED_TRACE(Name(config));
    const MegatronSample sample(config);
    Write(sample.TorchDist(MegatronSample::Form::kShifted));
    ASSERT_OK_AND_ASSIGN(const ForeignIndex index, Read());
    EXPECT_TRUE(index.unreadable.empty());
    const std::vector<Key> lacking = Compare(index, sample);
    // What is lost is named, and nothing else is missing.
    size_t named = 0;
    for (const auto& [tensor, state] : lacking) {
      const std::string begin = absl::StrCat(tensor, " ", state, ": ");
      for (const std::string& loss : index.losses) named += loss.starts_with(begin) ? 1 : 0;
      // The copy of a tied embedding is lost with it.
      if (config.tied && tensor == "output_layer.weight") ++named;
    }
    EXPECT_EQ(named, lacking.size());
    ASSERT_OK_AND_ASSIGN(const ProofReport proof, Prove(*folder_, index, {}));
    EXPECT_EQ(proof.soundness, !index.losses.empty()    ? Soundness::kLost
                               : !index.repairs.empty() ? Soundness::kRepairable
                                                        : Soundness::kGood);
    with_repairs += index.repairs.empty() ? 0 : 1;
    with_losses += index.losses.empty() ? 0 : 1;
  }
  EXPECT_GE(with_repairs, 4);  // or nothing of this was tested
  EXPECT_GE(with_losses, 4);
}

TEST_F(MegatronTest, SizesOfBucketsThatNoArgumentSaysAreFound) {
  MegatronSampleConfig config{.layers_per_chunk = 3, .bucket = 450};
  const MegatronSample sample(config);
  MegatronSample::Files files = sample.Legacy();
  // As of a run that was given a number of buckets instead.
  std::string& model = files.at("iter_0000007/mp_rank_00/model_optim_rng.pt");
  const std::string key = "ddp_bucket_size";
  ASSERT_NE(model.find(key), std::string::npos);
  model.replace(model.find(key), key.size(), "DDP_bucket_size");
  Write(files);
  ExpectSound(sample);
}

TEST_F(MegatronTest, TheIterationIsWhatTheTagOrTheLatestFileSays) {
  const MegatronSample sample({});
  MegatronSample::Files files = sample.Legacy();
  const MegatronSample other({.gated = false, .seed = 2});
  for (const auto& [path, bytes] : other.Legacy()) {
    if (path.starts_with("iter_")) files["iter_0000009" + path.substr(12)] = bytes;
  }
  Write(files);
  ASSERT_OK_AND_ASSIGN(const ForeignIndex latest, Read());
  EXPECT_TRUE(Compare(latest, sample).empty());
  for (const char* tag : {"iter_0000009", "9"}) {
    ASSERT_OK_AND_ASSIGN(const ForeignIndex tagged, ReadTag(tag));
    EXPECT_TRUE(Compare(tagged, other).empty()) << tag;
  }
  EXPECT_THAT(ReadTag("8"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("iter_0000007, iter_0000009")));
  files["latest_checkpointed_iteration.txt"] = "../8";
  Write(files);
  EXPECT_THAT(Read(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("found \"../8\"")));
  files.erase("latest_checkpointed_iteration.txt");
  Write(files);
  ASSERT_OK_AND_ASSIGN(const ForeignIndex newest, Read());
  EXPECT_TRUE(Compare(newest, other).empty());
}

TEST_F(MegatronTest, AMissingRankIsNamed) {
  const MegatronSample sample({.tp = 2, .pp = 2, .etp = 2});
  const MegatronSample::Files whole = sample.Legacy();
  for (const char* rank : {"mp_rank_01_001", "mp_rank_00_000", "mp_rank_00_001"}) {
    MegatronSample::Files files = whole;
    files.erase(absl::StrCat("iter_0000007/", rank, "/model_optim_rng.pt"));
    Write(files);
    EXPECT_THAT(Read(), StatusIs(absl::StatusCode::kDataLoss,
                                 HasSubstr("expected model_optim_rng.pt of tensor-parallel rank")))
        << rank;
  }
  MegatronSample::Files files = whole;
  std::erase_if(files,
                [](const auto& file) { return file.first.find("_001/") != std::string::npos; });
  Write(files);
  EXPECT_THAT(Read(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("of pipeline stage 1")));
}

TEST_F(MegatronTest, WhatTorchDistLacksBesideItsTensorsIsNamed) {
  const MegatronSample sample({.tp = 2, .etp = 2});
  const MegatronSample::Files whole = sample.TorchDist(MegatronSample::Form::kReshardable);
  const auto soundness = [this] {
    const absl::StatusOr<ForeignIndex> index = Read();
    EXPECT_THAT(index, IsOk());
    const auto proof = Prove(*folder_, *index, {});
    EXPECT_THAT(proof, IsOk());
    return std::pair(proof->soundness, index->losses.empty() ? index->repairs : index->losses);
  };
  MegatronSample::Files files = whole;
  files.erase("iter_0000007/common.pt");
  Write(files);
  EXPECT_THAT(soundness(), testing::Pair(Soundness::kLost,
                                         testing::Contains(HasSubstr("common.pt: expected it"))));
  files = whole;
  files.erase("iter_0000007/metadata.json");
  Write(files);
  EXPECT_THAT(soundness(), testing::Pair(Soundness::kRepairable,
                                         testing::ElementsAre(HasSubstr("metadata.json: exp"))));
  ASSERT_OK_AND_ASSIGN(const ForeignIndex index, Read());
  EXPECT_TRUE(Compare(index, sample).empty());
  files = sample.TorchDist(MegatronSample::Form::kGathered);
  files.erase("iter_0000007/__0_0.distcp");
  Write(files);
  EXPECT_THAT(soundness(), testing::Pair(Soundness::kLost,
                                         testing::Contains(HasSubstr("the object optimizer."))));
}

TEST_F(MegatronTest, OptimizersThatAreNotOfTheseWeightsAreUnreadableAndTheWeightsAreNot) {
  const MegatronSampleConfig config{.tp = 2, .etp = 2};
  const MegatronSample sample(config);
  MegatronSampleConfig stranger = config;
  stranger.seed = 999;
  for (const bool legacy : {true, false}) {
    SCOPED_TRACE(legacy ? "legacy" : "dp_reshardable");
    MegatronSample::Files files =
        legacy ? sample.Legacy() : sample.TorchDist(MegatronSample::Form::kBuckets);
    const MegatronSample other(stranger);
    if (legacy) {
      const std::string path = "iter_0000007/mp_rank_01/distrib_optim.pt";
      files[path] = other.Legacy().at(path);
    } else {
      // The other run's weights above these buckets.
      MegatronSample::Files mixed = other.TorchDist(MegatronSample::Form::kBuckets);
      const std::string path = "iter_0000007/__0_0.distcp";
      ASSERT_EQ(files.at(path).size(), mixed.at(path).size());
      // The first item is the embedding's.
      files[path].replace(0, 1024, mixed.at(path).substr(0, 1024));
    }
    Write(files);
    ASSERT_OK_AND_ASSIGN(const ForeignIndex index, Read());
    ASSERT_FALSE(index.unreadable.empty());
    EXPECT_THAT(index.unreadable.front().reason,
                HasSubstr(legacy ? "are the masters in it" : "masters that are not its weights"));
    size_t weights = 0;
    for (const TensorState& state : index.tensor_states) weights += state.state == "param" ? 1 : 0;
    EXPECT_EQ(weights, 9);
  }
}

TEST_F(MegatronTest, ParametersOfWhichNobodySaysHowTheyWereCutAreUnreadable) {
  const MegatronSample sample({.tp = 2, .etp = 2});
  MegatronSample::Files files = sample.Legacy();
  for (const char* rank : {"00", "01"}) {
    std::string& file =
        files.at(absl::StrCat("iter_0000007/mp_rank_", rank, "/model_optim_rng.pt"));
    const std::string name = "decoder.layers.0.mlp.linear_fc2.weight";
    file.replace(file.find(name), name.size(), "decoder.layers.0.mlp.linear_xyz.weight");
  }
  Write(files);
  ASSERT_OK_AND_ASSIGN(const ForeignIndex index, Read());
  ASSERT_EQ(index.unreadable.size(), 1);
  EXPECT_EQ(index.unreadable[0].name, "decoder.layers.0.mlp.linear_xyz.weight");
  EXPECT_THAT(index.unreadable[0].reason, HasSubstr("neither the files nor Megatron's names"));
}

// Each expert-parallel rank has other experts under this name: they are no copies of one tensor.
TEST_F(MegatronTest, ExpertsWithoutNumbersOnSeveralRanksAreUnreadable) {
  const std::string numbered = "mlp.experts.local_experts.0.linear_fc1.weight";
  const std::string plain = "mlp.experts.local_experts_0.linear_fc1.weight";
  for (const uint32_t ranks : {1, 2}) {
    MegatronSample::Files files = MegatronSample({.ep = ranks, .experts = 2}).Legacy();
    for (auto& [path, bytes] : files) {
      const size_t at = bytes.find(numbered);
      if (at != std::string::npos) bytes.replace(at, numbered.size(), plain);
    }
    Write(files);
    ASSERT_OK_AND_ASSIGN(const ForeignIndex index, Read());
    const auto named = std::ranges::find_if(index.unreadable, [&](const Unreadable& each) {
      return each.name.ends_with(plain) &&
             each.reason.find("of which experts") != std::string::npos;
    });
    EXPECT_EQ(named != index.unreadable.end(), ranks > 1);
    const bool is_read = std::ranges::any_of(index.tensor_states, [&](const TensorState& state) {
      return state.tensor.ends_with(plain) && state.state == "param";
    });
    EXPECT_EQ(is_read, ranks == 1);
  }
}

TEST_F(MegatronTest, TheOrderOfParametersCanBeGiven) {
  // An order that is none of Megatron's: the names file says it.
  const MegatronSample sample({});
  MegatronSample::Files files = sample.TorchDist(MegatronSample::Form::kBuckets);
  Write(files);
  std::string names = "{\"parameters\": [";
  for (const char* name :
       {"decoder.layers.0.input_layernorm.weight", "embedding.word_embeddings.weight",
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.0.pre_mlp_layernorm.weight", "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc2.weight", "decoder.final_layernorm.weight"}) {
    absl::StrAppend(&names, "\"", name, "\", ");
  }
  names += "\"output_layer.weight\"]}";
  ReadOptions options;
  options.names = names;
  ASSERT_OK_AND_ASSIGN(const ForeignIndex index, Read(options));
  // It is wrong here, and so it is not believed.
  ASSERT_EQ(index.unreadable.size(), 1);
  EXPECT_THAT(index.unreadable[0].reason, HasSubstr("--names FILE"));
}

TEST_F(MegatronTest, DamagedFilesAreErrorsThatNameThem) {
  const MegatronSample sample({.tp = 2, .etp = 2});
  const MegatronSample::Files whole = sample.Legacy();
  for (const char* path :
       {"iter_0000007/mp_rank_01/model_optim_rng.pt", "iter_0000007/mp_rank_00/distrib_optim.pt"}) {
    for (const double part : {0.0, 0.3, 0.9}) {
      MegatronSample::Files files = whole;
      std::string& bytes = files.at(path);
      bytes.resize(static_cast<size_t>(part * static_cast<double>(bytes.size())));
      Write(files);
      EXPECT_THAT(Read(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(path))) << part;
    }
  }
}

// Any single byte of the files may be another one: an error, or a checkpoint, but no crash and no
// hang. (What values are is for checksums.)
TEST_F(MegatronTest, NoByteCrashesTheReader) {
  std::mt19937_64 random(41);
  for (const bool legacy : {true, false}) {
    const MegatronSample sample({.tp = 2, .ep = 2, .etp = 2, .experts = 2, .bucket = 300});
    const MegatronSample::Files whole =
        legacy ? sample.Legacy() : sample.TorchDist(MegatronSample::Form::kBuckets);
    for (int round = 0; round < 30; ++round) {
      MegatronSample::Files files = whole;
      auto file = files.begin();
      std::advance(file, random() % files.size());
      for (int change = 0; change < 4 && !file->second.empty(); ++change) {
        file->second[random() % file->second.size()] = static_cast<char>(random());
      }
      Write(files);
      const absl::StatusOr<const FormatReader*> reader = RecognizeFormat(*folder_);
      if (!reader.ok() || *reader == nullptr) continue;
      const absl::StatusOr<ForeignIndex> index = ReadFormat(**reader, *folder_, {});
      if (index.ok()) continue;
      EXPECT_FALSE(index.status().message().empty()) << "round " << round;
    }
  }
}

}  // namespace
}  // namespace holdfast::converter
