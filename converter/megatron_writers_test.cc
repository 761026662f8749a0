// Goal: whatever Megatron checkpoint is written as Megatron's again, every tensor and state is the
// same, bit for bit, under the keys that Megatron itself gives them; what else it held is there,
// class by class; what has no place is refused by name.
// Method: MegatronSample's checkpoints of many configurations, and those that Megatron-LM itself
// wrote (../shared/fixtures/megatron, where they are), written and read back; the keys are compared
// with those of the sample's, and Megatron's, own torch_dist files. That Megatron loads what is
// written is in tests/interop.
#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/sha256.h"
#include "converter/byte_source.h"
#include "converter/conversion_source.h"
#include "converter/dcp_metadata.h"
#include "converter/foreign_testing.h"
#include "converter/format_reader.h"
#include "converter/megatron_dist_writer.h"
#include "converter/megatron_legacy_writer.h"
#include "converter/megatron_sample.h"
#include "converter/optimizer_groups.h"
#include "converter/prove.h"
#include "converter/torch_index.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "io/posix_file_system.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast::converter {
namespace {

namespace fs = std::filesystem;
using absl::StatusCode;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using Key = std::pair<std::string, std::string>;  // tensor, class of state
using Records = std::map<Key, std::string>;

constexpr char kMemory[] = "/dev/shm";
constexpr float kSampleGap = 12345.0F;
constexpr size_t kJsonBytesMax = size_t{1} << 20;

class MegatronWriters : public testing::Test {
 protected:
  std::string Write(const MegatronSample::Files& files) {
    const std::string root = directory_.Join("source");
    fs::remove_all(root);
    for (const auto& [path, bytes] : files) {
      fs::create_directories((fs::path(root) / path).parent_path());
      std::ofstream(fs::path(root) / path, std::ios::binary) << bytes;
    }
    return root;
  }

  absl::StatusOr<Opened> Open(const std::string& path) {
    absl::StatusOr<Opened> opened = OpenCheckpoint(*file_system_, path);
    if (opened.ok()) {
      EXPECT_EQ(opened->index.format, "megatron");
    }
    return opened;
  }

  // Weights count as one; random states are objects in torch_dist.
  static Records RecordsOf(ConversionSource& source) {
    Records records;
    for (uint32_t i = 0; i < source.index().tensor_states.size(); ++i) {
      const TensorState& state = source.index().tensor_states[i];
      if (state.state == "rng") continue;
      records[{state.tensor, IsOptimizerState(state.state) ? state.state : "a tensor"}] =
          RecordOf(source, source.index(), i);
    }
    return records;
  }

  std::string Fresh() {
    const std::string out = directory_.Join("out");
    fs::remove_all(out);
    fs::create_directory(out);
    return out;
  }

  absl::Status WriteDist(ConversionSource& source, const std::string& out) {
    const auto plan = PlanMegatronDist(source, {.file_bytes = 20'000}, config_);
    if (!plan.ok()) return plan.status();
    uint64_t done = 0;
    const auto status =
        WriteMegatronDist(*file_system_, out, source, *plan, [&](uint64_t now, uint64_t of) {
          EXPECT_EQ(of, plan->bytes());
          done = now;
          return true;
        });
    if (!status.ok()) return status;
    EXPECT_EQ(done, plan->bytes());
    uint64_t on_disk = 0;
    for (const auto& entry : fs::recursive_directory_iterator(out)) {
      if (entry.is_regular_file()) on_disk += entry.file_size();
    }
    EXPECT_EQ(on_disk, plan->bytes());
    return absl::OkStatus();
  }

  absl::Status WriteLegacy(ConversionSource& source, const MegatronDegrees& degrees,
                           const std::string& out) {
    const auto plan = PlanMegatronLegacy(source, degrees, config_);
    if (!plan.ok()) return plan.status();
    return WriteTorchFiles(*file_system_, out, source, *plan, nullptr);
  }

  // A tied embedding's copy is listed where some stage has one.
  static void LeaveOutCopies(Records& records) {
    const auto embedding = records.find({"embedding.word_embeddings.weight", "a tensor"});
    const auto output = records.find({"output_layer.weight", "a tensor"});
    if (embedding == records.end() || output == records.end()) return;
    if (embedding->second != output->second) return;
    std::erase_if(records,
                  [](const auto& each) { return each.first.first == "output_layer.weight"; });
  }

  // Writes it, reads it back, and compares. Of legacy files these degrees; `masters`: the source
  // has them. False: refused, because the degrees do not divide it.
  bool RoundTrip(const std::string& path, std::optional<MegatronDegrees> legacy, bool masters) {
    auto opened = Open(path);
    EXPECT_THAT(opened, IsOk());
    if (!opened.ok()) return false;
    EXPECT_TRUE(opened->index.unreadable.empty());
    const uint64_t step = opened->index.step;
    ConversionSource source(*opened->folder, std::move(opened->index));
    Records expected = RecordsOf(source);
    const std::string out = Fresh();
    const absl::Status written =
        legacy.has_value() ? WriteLegacy(source, *legacy, out) : WriteDist(source, out);
    if (legacy.has_value() && absl::IsFailedPrecondition(written)) {
      EXPECT_THAT(written.message(),
                  AnyOf(HasSubstr("expected a divisor of"), HasSubstr("expected experts"),
                        HasSubstr("share equally")));
      EXPECT_TRUE(fs::is_empty(out));
      return false;
    }
    EXPECT_THAT(written, IsOk());
    auto back = Open(out);
    EXPECT_THAT(back, IsOk());
    if (!back.ok()) return false;
    EXPECT_EQ(back->index.step, step);
    EXPECT_EQ(back->index.variant == "torch_dist", !legacy.has_value());
    for (const Unreadable& each : back->index.unreadable) {
      ADD_FAILURE() << each.name << ": " << each.reason;
    }
    EXPECT_TRUE(back->index.losses.empty() && back->index.repairs.empty());
    const auto proof = Prove(*back->folder, back->index, {});
    EXPECT_THAT(proof, IsOk());
    EXPECT_TRUE(proof.ok() && proof->soundness == Soundness::kGood);
    ConversionSource again(*back->folder, std::move(back->index));
    Records found = RecordsOf(again);
    LeaveOutCopies(expected);
    LeaveOutCopies(found);
    for (const auto& [key, record] : expected) {
      const auto at = found.find(key);
      // A step of states that Megatron has lost.
      const auto of = expected.lower_bound({key.first, "exp_avg"});
      if (key.second == "step" &&
          (of == expected.end() || of->first.second != "exp_avg" || of->first.first != key.first)) {
        continue;
      }
      EXPECT_EQ(at == found.end() ? "missing" : at->second, record)
          << key.first << ", " << key.second;
      if (at != found.end()) found.erase(at);
    }
    for (const auto& [key, record] : found) {
      // Where there were no masters they are the weights.
      EXPECT_TRUE(!masters && key.second == "fp32")
          << "not expected: " << key.first << ", " << key.second;
    }
    return true;
  }

  // What a torch file has: "float32 2,3 at 64 of 512 <sha256>" of every tensor below `key` ("" for
  // the whole), by its name there or its number.
  std::map<std::string, std::string> TensorsOf(const std::string& path, const std::string& key) {
    std::map<std::string, std::string> found;
    const auto folder = ForeignFolder::Open(*file_system_, path);
    EXPECT_THAT(folder, IsOk());
    const FolderSource bytes(**folder, 0);
    const auto torch = TorchFile::Open(bytes);
    EXPECT_THAT(torch, IsOk());
    if (!torch.ok()) return found;
    const auto describe = [&](const TorchTensor& tensor) {
      const TorchStorage& storage = (*torch)->storages()[tensor.storage];
      const auto text = bytes.ReadText(storage.offset + tensor.offset * ElementBytes(tensor.dtype),
                                       tensor.Bytes());
      EXPECT_THAT(text, IsOk());
      std::string content = *text;
      // Gaps of the sample's buffers; ours, and Megatron's, are zero.
      for (size_t at = 0; tensor.dtype == Dtype::kFloat32 && at < content.size(); at += 4) {
        if (std::memcmp(&content[at], &kSampleGap, 4) == 0) content.replace(at, 4, 4, '\0');
      }
      Sha256 hash;
      hash.Add(std::as_bytes(std::span(content)));
      return absl::StrCat(std::string(DtypeName(tensor.dtype)), " ",
                          absl::StrJoin(tensor.shape, ","), " at ", tensor.offset, " of ",
                          storage.bytes, " ", Hex(hash.Finish()));
    };
    if (key.empty()) {
      for (size_t i = 0; i < (*torch)->tensors().size(); ++i) {
        found[absl::StrCat(i)] = describe((*torch)->tensors()[i]);
      }
      return found;
    }
    const TorchValue dict = (*torch)->root().Find(key);
    if (!dict.present()) return found;
    for (size_t i = 0; i < *dict.EntryCount(); ++i) {
      if (!dict.Entry(i).Is(TorchValue::Kind::kTensor)) continue;
      found[std::string(*dict.Key(i).String())] = describe(**dict.Entry(i).Tensor());
    }
    return found;
  }

  // The groups in a rank's model_optim_rng.pt, as JSON text.
  std::string OptimizerOf(const std::string& rank) {
    const auto folder = ForeignFolder::Open(*file_system_, rank);
    EXPECT_THAT(folder, IsOk());
    const auto file = (*folder)->Find("model_optim_rng.pt");
    EXPECT_TRUE(file.has_value());
    const auto torch = TorchFile::Open(FolderSource(**folder, *file));
    EXPECT_THAT(torch, IsOk());
    return torch.ok() ? TorchJson((*torch)->root().Find("optimizer"), kJsonBytesMax) : "";
  }

  // How the optimizers and their buffers stand in a rank's distrib_optim.pt: "[None, {0: ..}]".
  std::string StructureOf(const std::string& rank) {
    const auto folder = ForeignFolder::Open(*file_system_, rank);
    EXPECT_THAT(folder, IsOk());
    const auto file = (*folder)->Find("distrib_optim.pt");
    EXPECT_TRUE(file.has_value());
    const auto torch = TorchFile::Open(FolderSource(**folder, *file));
    EXPECT_THAT(torch, IsOk());
    if (!torch.ok()) return "";
    const auto of_optimizer = [](const TorchValue& value) {
      if (!value.Is(TorchValue::Kind::kDict)) return std::string("None");
      std::string text = "{";
      for (size_t i = 0; i < *value.EntryCount(); ++i) {
        if (!value.Key(i).Is(TorchValue::Kind::kInteger)) continue;
        const TorchValue buffer = value.Entry(i).Entry(0);
        absl::StrAppend(&text, *value.Key(i).Int64(), ": ", *buffer.Find("numel_unpadded").Int64(),
                        " ");
      }
      return text + "}";
    };
    const TorchValue root = (*torch)->root();
    if (!root.Is(TorchValue::Kind::kList)) return of_optimizer(root);
    std::string text;
    for (size_t i = 0; i < *root.ArraySize(); ++i) absl::StrAppend(&text, of_optimizer(root[i]));
    return text;
  }

  void ExpectSameFiles(const std::string& path, const std::string& iteration,
                       const MegatronDegrees& degrees) {
    ASSERT_OK_AND_ASSIGN(Opened opened, Open(path));
    ConversionSource source(*opened.folder, std::move(opened.index));
    const std::string out = Fresh();
    ASSERT_THAT(WriteLegacy(source, degrees, out), IsOk());
    size_t ranks = 0;
    for (const auto& entry : fs::directory_iterator(fs::path(path) / iteration)) {
      ++ranks;
      const std::string rank = "/" + iteration + "/" + entry.path().filename().string();
      SCOPED_TRACE(rank);
      std::vector<std::string> models = {"model"};
      if (degrees.virtual_stages > 1) models = {"model0", "model1"};
      ASSERT_LE(degrees.virtual_stages, 2);
      const auto expect_same = [&](const std::string& file, const std::string& key) {
        const auto expected = TensorsOf(path + rank + file, key);
        EXPECT_FALSE(expected.empty());
        EXPECT_EQ(TensorsOf(out + rank + file, key), expected) << file << " " << key;
      };
      expect_same("/distrib_optim.pt", "");
      for (const std::string& model : models) expect_same("/model_optim_rng.pt", model);
      EXPECT_EQ(OptimizerOf(out + rank), OptimizerOf(path + rank));
      EXPECT_EQ(StructureOf(out + rank), StructureOf(path + rank));
    }
    size_t written = 0;
    for (const auto& entry : fs::directory_iterator(fs::path(out) / iteration)) {
      written += entry.is_directory() ? 1 : 0;
    }
    EXPECT_EQ(written, ranks);
  }

  // "key float32 [2,3]" of tensors, "key" of objects; sorted.
  static std::vector<std::string> KeysIn(const fs::path& metadata_file) {
    std::ifstream file(metadata_file, std::ios::binary);
    std::string bytes(std::istreambuf_iterator<char>(file), {});
    const auto metadata = ParseDcpMetadata(std::move(bytes), metadata_file.string());
    EXPECT_THAT(metadata, IsOk());
    std::vector<std::string> keys;
    if (!metadata.ok()) return keys;
    for (const DcpTensor& tensor : metadata->tensors) {
      keys.push_back(
          absl::StrCat(tensor.key, " ", tensor.dtype, " [", absl::StrJoin(tensor.shape, ","), "]"));
    }
    for (const DcpObject& object : metadata->objects) keys.push_back(object.key);
    std::ranges::sort(keys);
    return keys;
  }

  static std::vector<std::string> OnlyTensors(std::vector<std::string> keys) {
    std::erase_if(keys, [](const std::string& key) { return !key.ends_with(']'); });
    EXPECT_GE(keys.size(), 30);
    return keys;
  }

  // What common.pt says, as JSON text, by key.
  std::map<std::string, std::string> CommonOf(const std::string& path) {
    std::map<std::string, std::string> common;
    const auto folder = ForeignFolder::Open(*file_system_, fs::path(path).parent_path().string());
    EXPECT_THAT(folder, IsOk());
    const auto file = (*folder)->Find("common.pt");
    EXPECT_TRUE(file.has_value());
    const auto torch = TorchFile::Open(FolderSource(**folder, *file));
    EXPECT_THAT(torch, IsOk());
    if (!torch.ok()) return common;
    const TorchValue root = (*torch)->root();
    for (size_t i = 0; i < *root.EntryCount(); ++i) {
      const TorchValue value = root.Entry(i);
      const TorchValue attributes = value.attributes();
      common[std::string(*root.Key(i).String())] =
          TorchJson(attributes.present() ? attributes : value, kJsonBytesMax);
    }
    return common;
  }

  const std::unique_ptr<FileSystem> file_system_ = NewPosixFileSystem();
  std::string config_;  // config.json of the model
  TemporaryDirectory directory_{fs::is_directory(kMemory) ? kMemory : "."};
};

std::vector<MegatronSampleConfig> Configurations() {
  std::vector<MegatronSampleConfig> configs = {
      {},
      {.gated = false, .bias = true},
      {.tp = 2, .etp = 2, .bias = true},
      {.tp = 2, .pp = 2, .etp = 2, .tied = true, .bucket = 300},
      {.pp = 2, .vpp = 2, .layers_per_chunk = 2, .gated = false, .tied = true},
      {.tp = 2, .etp = 2, .weights = Dtype::kFloat32},
      {.ep = 2, .experts = 4, .bucket = 500},
      {.tp = 2, .pp = 2, .ep = 2, .etp = 2, .dp = 4, .experts = 4, .tied = true},
      {.tp = 2, .etp = 2, .layers_per_chunk = 3, .experts = 3},
      {.pp = 2, .vpp = 2, .ep = 2, .dp = 4, .layers_per_chunk = 1, .experts = 2, .bias = true},
      {.tp = 2, .ep = 2, .etp = 1, .dp = 3, .experts = 2, .bucket = 400},
      {.pp = 3, .layers_per_chunk = 2, .first = 1, .last = 3, .tied = true},
      {.pp = 2, .vpp = 2, .first = 4, .last = 2},
  };
  for (size_t i = 0; i < configs.size(); ++i) configs[i].seed = 300 + i;
  return configs;
}

// Whether a job of these degrees can have the sample's model.
bool Divides(const MegatronSampleConfig& config, const MegatronDegrees& degrees) {
  const uint64_t layers = MegatronSample(config).Layers();
  if (degrees.expert > 1 && (config.experts == 0 || config.experts % degrees.expert != 0)) {
    return false;
  }
  if (!degrees.IsUneven()) return layers % (degrees.pipeline * degrees.virtual_stages) == 0;
  return layers >= *degrees.first_layers + *degrees.last_layers;  // one stage has the others
}

TEST_F(MegatronWriters, EveryTensorIsTheSameFromEveryForm) {
  const std::vector<std::optional<MegatronDegrees>> targets = {
      std::nullopt,
      MegatronDegrees{},
      MegatronDegrees{.tensor = 2},
      MegatronDegrees{.tensor = 2, .pipeline = 2},
      MegatronDegrees{.tensor = 4, .pipeline = 3},
      MegatronDegrees{.pipeline = 2, .virtual_stages = 2},
      MegatronDegrees{.pipeline = 2, .expert = 2},
      MegatronDegrees{.tensor = 2, .expert = 2},
      MegatronDegrees{.tensor = 2, .expert = 2, .expert_tensor = 1},
      MegatronDegrees{.pipeline = 3, .first_layers = 1, .last_layers = 2}};
  size_t written = 0;
  for (const MegatronSampleConfig& config : Configurations()) {
    for (const bool distributed : {true, false}) {
      MegatronSampleConfig each = config;
      each.distributed = distributed;
      const MegatronSample sample(each);
      const bool masters = distributed || config.weights != Dtype::kFloat32;
      for (const auto& target : targets) {
        SCOPED_TRACE(absl::StrCat(
            "seed ", config.seed, distributed ? "" : ", ordinary optimizer",
            target.has_value()
                ? absl::StrCat(", tp ", target->tensor, ", pp ", target->pipeline, ", vpp ",
                               target->virtual_stages, ", ep ", target->expert)
                : ""));
        const bool divides = !target.has_value() || Divides(config, *target);
        EXPECT_EQ(RoundTrip(Write(sample.Legacy()), target, masters), divides);
        written += divides ? 1 : 0;
        if (!distributed) continue;
        EXPECT_EQ(
            RoundTrip(Write(sample.TorchDist(MegatronSample::Form::kReshardable)), target, masters),
            divides);
        if (target.has_value()) continue;
        RoundTrip(Write(sample.TorchDist(MegatronSample::Form::kBuckets)), target, masters);
      }
    }
  }
  EXPECT_GE(written, 100);
}

// Written for the degrees that they had, they are the files that they were.
TEST_F(MegatronWriters, LegacyFilesOfTheSameDegreesAreTheSame) {
  for (const MegatronSampleConfig& config : Configurations()) {
    SCOPED_TRACE(config.seed);
    const std::string source_path = Write(MegatronSample(config).Legacy());
    MegatronDegrees degrees = {.tensor = config.tp,
                               .pipeline = config.pp,
                               .virtual_stages = config.vpp,
                               .expert = config.ep,
                               .expert_tensor = config.etp};
    if (config.first.has_value()) degrees.first_layers = *config.first;
    if (config.last.has_value()) degrees.last_layers = *config.last;
    ExpectSameFiles(source_path, "iter_0000007", degrees);
  }
  const fs::path own = fs::path(HOLDFAST_SOURCE_DIR) / "../shared/fixtures/megatron";
  if (!fs::exists(own)) GTEST_SKIP() << "no ../shared/fixtures";
  for (const auto& [name, degrees] :
       {std::pair<const char*, MegatronDegrees>{"legacy-distopt-tp2-dp2", {.tensor = 2}},
        {"legacy-vpp2-pp2-dp2", {.pipeline = 2, .virtual_stages = 2}},
        {"legacy-moe-pp2-ep2", {.pipeline = 2, .expert = 2}}}) {
    SCOPED_TRACE(name);
    ExpectSameFiles((own / name / "ckpt").string(), "iter_0000003", degrees);
  }
}

// Weights that a conversion casts are no longer their masters, rounded once; the places of masters
// and moments are proven all the same.
TEST_F(MegatronWriters, CastWeightsAreReadWithTheirStates) {
  MegatronSampleConfig config = {.tp = 2, .pp = 2, .etp = 2, .tied = true, .bucket = 300};
  config.seed = 340;
  const std::string path = Write(MegatronSample(config).Legacy());
  for (const char* dtype : {"float16", "float32", "float64"}) {
    for (const bool legacy : {false, true}) {
      SCOPED_TRACE(absl::StrCat(dtype, legacy ? ", legacy" : ""));
      ASSERT_OK_AND_ASSIGN(Opened opened, Open(path));
      ASSERT_OK_AND_ASSIGN(Selection selection,
                           Select(std::move(opened.index), {.dtypes = {dtype}}));
      ConversionSource source(*opened.folder, std::move(selection));
      const std::string out = Fresh();
      ASSERT_THAT(
          legacy ? WriteLegacy(source, {.tensor = 2, .pipeline = 2}, out) : WriteDist(source, out),
          IsOk());
      ASSERT_OK_AND_ASSIGN(Opened back, Open(out));
      EXPECT_THAT(back.index.unreadable, testing::IsEmpty());
      EXPECT_THAT(back.index.losses, testing::IsEmpty());
      EXPECT_THAT(back.index.repairs, testing::IsEmpty());
      ConversionSource again(*back.folder, std::move(back.index));
      Records found = RecordsOf(again);
      ASSERT_OK_AND_ASSIGN(Opened original, Open(path));
      ConversionSource first(*original.folder, std::move(original.index));
      for (const auto& [key, record] : RecordsOf(first)) {
        if (key.second != "a tensor") {
          EXPECT_EQ(found[key], record) << key.first << " " << key.second;
        }
      }
    }
  }
}

TEST_F(MegatronWriters, KeysAreThoseThatMegatronGives) {
  for (const MegatronSampleConfig& config : Configurations()) {
    SCOPED_TRACE(config.seed);
    const MegatronSample sample(config);
    const std::string own = Write(sample.TorchDist(MegatronSample::Form::kReshardable));
    const std::vector<std::string> expected = OnlyTensors(KeysIn(own + "/iter_0000007/.metadata"));
    ASSERT_OK_AND_ASSIGN(Opened opened, Open(Write(sample.Legacy())));
    ConversionSource source(*opened.folder, std::move(opened.index));
    const std::string out = Fresh();
    ASSERT_THAT(WriteDist(source, out), IsOk());
    EXPECT_EQ(OnlyTensors(KeysIn(out + "/iter_0000007/.metadata")), expected);
  }
}

TEST_F(MegatronWriters, WhatMegatronItselfWroteIsWrittenWithItsKeysAndState) {
  const fs::path root = fs::path(HOLDFAST_SOURCE_DIR) / "../shared/fixtures/megatron";
  if (!fs::exists(root)) GTEST_SKIP() << "no ../shared/fixtures";
  size_t count = 0;
  for (const auto& entry : fs::directory_iterator(root)) {
    const std::string name = entry.path().filename().string();
    SCOPED_TRACE(name);
    ++count;
    const std::string from = entry.path() / "ckpt";
    const bool masters = name != "fsdp-dtensor-dp2";
    // Layers of unequal stages do not divide, whatever the degrees were.
    EXPECT_TRUE(RoundTrip(from, MegatronDegrees{}, masters));
    EXPECT_TRUE(RoundTrip(from, MegatronDegrees{.tensor = 2}, masters));
    RoundTrip(from, MegatronDegrees{.tensor = 2, .pipeline = 2}, masters);
    EXPECT_TRUE(RoundTrip(from, std::nullopt, masters));
    const std::string out = directory_.Join("out/iter_0000003/.metadata");
    const std::string own = from + "/iter_0000003/.metadata";
    if (name.starts_with("dist-fully-tp2") || name == "moe-dist-ep2" ||
        name == "dist-async-vpp2-pp2-dp2") {
      EXPECT_EQ(KeysIn(out), KeysIn(own));
    }
    if (!fs::exists(from + "/iter_0000003/common.pt")) continue;
    const auto expected = CommonOf(own);
    const auto found = CommonOf(out);
    ASSERT_GE(expected.size(), 6);
    for (const auto& [key, json] : expected) {
      // Another form of the optimizer's states.
      const bool another = name == "dist-tp2-pp2-bf16" || name == "dist-bucket-tp2-dp2";
      if (another && (key == "optimizer" || key == "content_metadata")) continue;
      EXPECT_EQ(found.contains(key) ? found.at(key) : "missing", json) << key;
    }
  }
  EXPECT_GE(count, 11);
}

// Of the legacy files of a real job: what each rank and module had besides.
TEST_F(MegatronWriters, RandomAndExtraStatesOfLegacyFilesBecomeObjects) {
  const fs::path from =
      fs::path(HOLDFAST_SOURCE_DIR) / "../shared/fixtures/megatron/legacy-moe-pp2-ep2/ckpt";
  if (!fs::exists(from)) GTEST_SKIP() << "no ../shared/fixtures";
  ASSERT_OK_AND_ASSIGN(Opened opened, Open(from.string()));
  ConversionSource source(*opened.folder, std::move(opened.index));
  const std::string out = Fresh();
  ASSERT_THAT(WriteDist(source, out), IsOk());
  const std::vector<std::string> keys = KeysIn(out + "/iter_0000003/.metadata");
  for (const char* key :
       {"rng_state/shard_1.0.1_2.1.2",
        "decoder.layers.self_attention.linear_qkv._extra_state/shard_1_2",
        "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_1.3_2.4"}) {
    EXPECT_THAT(keys, testing::Contains(key));
  }
  // Each opens, and holds what the rank's file does.
  ASSERT_OK_AND_ASSIGN(const Opened back, Open(out));
  size_t objects = 0;
  for (const Fact& fact : back.index.scalars) {
    if (!fact.name.starts_with("rng_state/shard_")) continue;
    ++objects;
    EXPECT_THAT(fact.json, HasSubstr("random_rng_state"));
  }
  EXPECT_EQ(objects, 4);
}

class Refusals : public MegatronWriters {
 protected:
  // The message with which a sample is refused of which `change` has changed the index.
  template <typename Change>
  void ExpectRefused(const MegatronSampleConfig& config, Change change, const std::string& words) {
    SCOPED_TRACE(words);
    ASSERT_OK_AND_ASSIGN(Opened opened, Open(Write(MegatronSample(config).Legacy())));
    change(opened.index);
    ConversionSource source(*opened.folder, std::move(opened.index));
    const std::string out = Fresh();
    EXPECT_THAT(WriteDist(source, out),
                StatusIs(StatusCode::kFailedPrecondition, HasSubstr(words)));
    EXPECT_TRUE(fs::is_empty(out));
  }

  static TensorState& Find(ForeignIndex& index, std::string_view tensor, std::string_view state) {
    const auto found = std::ranges::find_if(index.tensor_states, [&](const TensorState& each) {
      return each.tensor == tensor && each.state == state;
    });
    EXPECT_NE(found, index.tensor_states.end()) << tensor << " " << state;
    return *found;
  }
};

TEST_F(Refusals, NameWhatHasNoPlace) {
  const std::string norm = "decoder.final_layernorm.weight";
  ExpectRefused(
      {}, [&](ForeignIndex& i) { Find(i, norm, "exp_avg").state = "ema"; },
      "no place for it; --drop ema");
  ExpectRefused(
      {}, [&](ForeignIndex& i) { Find(i, norm, "exp_avg").state = "some.thing"; },
      "end a state's name at a dot");
  ExpectRefused(
      {}, [&](ForeignIndex& i) { Find(i, norm, "exp_avg").state = "buffer"; },
      "two tensors of this name");
  ExpectRefused(
      {}, [&](ForeignIndex& i) { Find(i, norm, "param").tensor = "another"; },
      "has optimizer states and no weights");
  ExpectRefused(
      {},
      [&](ForeignIndex& i) {
        TensorState& state = Find(i, norm, "exp_avg");
        state.shape.insert(state.shape.begin(), 1);
      },
      "of their weights' shape only; --drop exp_avg");
  ExpectRefused(
      {}, [&](ForeignIndex& i) { Find(i, norm, "exp_avg_sq").state = "step"; },
      "expected one number");
  ExpectRefused(
      {.experts = 2},
      [&](ForeignIndex& i) {
        for (TensorState& state : i.tensor_states) {
          const size_t at = state.tensor.find("local_experts.1.");
          if (at != std::string::npos) state.tensor[at + 14] = '2';
        }
      },
      "expected all of 3 experts");
  ExpectRefused(
      {.pp = 2, .tied = true},
      [&](ForeignIndex& i) {
        std::swap(Find(i, "output_layer.weight", "exp_avg").state,
                  Find(i, "output_layer.weight", "exp_avg_sq").state);
      },
      "args say that it is tied");
}

TEST_F(Refusals, OfLegacyFilesNameWhatDegreesDoNotDivide) {
  const auto refused = [&](const MegatronDegrees& degrees, auto change) {
    auto opened = Open(Write(MegatronSample({.layers_per_chunk = 3}).Legacy()));
    EXPECT_THAT(opened, IsOk());
    change(opened->index);
    ConversionSource source(*opened->folder, std::move(opened->index));
    return WriteLegacy(source, degrees, Fresh());
  };
  const auto nothing = [](ForeignIndex&) {};
  const auto without = [](ForeignIndex& index) {  // what is no tensor
    index.blobs.clear();
    index.scalars.clear();
  };
  EXPECT_THAT(refused({.pipeline = 2}, nothing),
              StatusIs(StatusCode::kFailedPrecondition, HasSubstr("a divisor of the 3 layers")));
  EXPECT_THAT(refused({.tensor = 3}, nothing),
              StatusIs(StatusCode::kFailedPrecondition, HasSubstr("4 groups of attention heads")));
  // Of multi-latent attention and of cross attention, too.
  for (const char* module :
       {"linear_q_up_proj", "linear_kv_up_proj", "linear_q_proj", "linear_q", "linear_kv"}) {
    EXPECT_THAT(refused({.tensor = 3},
                        [&](ForeignIndex& index) {
                          for (TensorState& state : index.tensor_states) {
                            const size_t at = state.tensor.find("linear_qkv");
                            if (at != std::string::npos) state.tensor.replace(at, 10, module);
                          }
                        }),
                StatusIs(StatusCode::kFailedPrecondition, HasSubstr("4 groups of attention heads")))
        << module;
  }
  EXPECT_THAT(refused({.tensor = 2},
                      [](ForeignIndex& index) {
                        for (TensorState& state : index.tensor_states) {
                          const size_t at = state.tensor.find("linear_proj");
                          if (at != std::string::npos) state.tensor.replace(at, 11, "linear_else");
                        }
                      }),
              StatusIs(StatusCode::kFailedPrecondition, HasSubstr("do not say how it is cut")));
  EXPECT_THAT(refused({.tensor = 2},
                      [](ForeignIndex& index) {
                        Find(index, "decoder.final_layernorm.weight", "exp_avg").state = "momentum";
                      }),
              StatusIs(StatusCode::kFailedPrecondition, HasSubstr("--drop momentum")));
  EXPECT_THAT(refused({}, without), IsOk());
  EXPECT_THAT(refused({.tensor = 2}, without),
              StatusIs(StatusCode::kFailedPrecondition, HasSubstr("how many attention heads")));
}

TEST_F(Refusals, StepsThatDifferAreNoneOfMegatrons) {
  ASSERT_OK_AND_ASSIGN(Opened opened, Open(Write(MegatronSample({}).Legacy())));
  ForeignIndex& index = opened.index;
  // One parameter has another step.
  const auto last = std::ranges::find_if(index.tensor_states,
                                         [](const TensorState& s) { return s.state == "step"; });
  ASSERT_NE(last, index.tensor_states.end());
  const auto number = static_cast<uint32_t>(last - index.tensor_states.begin());
  const float other = 99;
  const uint32_t extent = index.AddInline({reinterpret_cast<const char*>(&other), sizeof other});
  for (ForeignPiece& piece : index.pieces) {
    if (piece.piece.tensor_state != number) continue;
    piece.extent = extent;
    piece.offset_bytes = 0;
  }
  ConversionSource source(*opened.folder, std::move(opened.index));
  EXPECT_THAT(WriteDist(source, Fresh()),
              StatusIs(StatusCode::kFailedPrecondition, HasSubstr("one step for all parameters")));
}

}  // namespace
}  // namespace holdfast::converter
