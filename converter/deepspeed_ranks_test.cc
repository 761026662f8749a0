// Goal: a model that is written for ranks of tensor and pipeline parallelism is read back the same,
// in the files that DeepSpeed looks for; what nobody says is refused by name.
// Method: a small checkpoint that DeepSpeed wrote, under the names of a pipeline, for several
// degrees, cut by a layout file. That DeepSpeed itself resumes from it is in tests/interop.
#include "converter/deepspeed_ranks.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "converter/deepspeed_writer.h"
#include "converter/foreign_testing.h"
#include "converter/optimizer_groups.h"
#include "converter/parallel_facts.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "io/posix_file_system.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast::converter {
namespace {

namespace fs = std::filesystem;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr char kSample[] = HOLDFAST_SOURCE_DIR "/tests/data/deepspeed/zero1_sgd/ckpt";
// Layer 3 and 6 have no parameters; the embedding is used by layers 0 and 7.
constexpr char kNames[] =
    "name embed.weight tied_modules.embed.weight\n"
    "prefix up.    1.\n"
    "prefix still. 2.\n"
    "prefix down.  4.\n"
    "prefix norm.  5.\n"
    "name scale    5.scale\n";
// Sizes are 5, 7 and 11.
constexpr char kLayout[] = R"({
  "rules": [{"parameters": "1\\.", "cut": 0},
            {"parameters": "[24]\\.weight", "cut": 1},
            {"parameters": "tied_modules\\.embed\\.weight", "cut": 0, "rows": 11},
            {"parameters": "", "cut": "replicated"}],
  "pipeline": {"tied": {"embed": [0, 7]}}})";

// In memory where there is such a place: all files are made durable.
std::string Scratch() {
  constexpr char kMemory[] = "/dev/shm";
  return fs::is_directory(kMemory) ? kMemory : ".";
}

using Records = std::map<std::pair<std::string, std::string>, std::string>;

Records RecordsOf(ConversionSource& source) {
  Records records;
  for (uint32_t i = 0; i < source.index().tensor_states.size(); ++i) {
    const TensorState& state = source.index().tensor_states[i];
    records[{state.tensor, state.state}] = RecordOf(source, source.index(), i);
  }
  return records;
}

class DeepSpeedRanksTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_OK_AND_ASSIGN(Opened opened, OpenCheckpoint(*file_system_, kSample));
    folder_ = std::move(opened.folder);
    ASSERT_OK_AND_ASSIGN(
        Selection selection,
        Select(std::move(opened.index),
               {.only = {"embed.weight", "up.*", "still.*", "down.*", "norm.*", "scale"},
                .rename = kNames}));
    source_.emplace(*folder_, std::move(selection));
    expected_ = RecordsOf(*source_);
  }

  absl::Status Write(ConversionSource& source, const DeepSpeedWriteOptions& options) {
    fs::remove_all(out_);
    fs::create_directory(out_);
    auto plan = PlanDeepSpeed(source, options);
    if (!plan.ok()) return plan.status();
    return WriteTorchFiles(*file_system_, out_, source, *plan, nullptr);
  }

  // Names of the files, without the tag's folder.
  std::set<std::string> Files() const {
    std::set<std::string> files;
    for (const auto& entry : fs::recursive_directory_iterator(out_)) {
      if (entry.is_regular_file()) files.insert(entry.path().filename().string());
    }
    return files;
  }

  absl::Status Refusal(DeepSpeedDegrees degrees) {
    return Write(*source_, {.stage = 1, .dp = 1, .degrees = std::move(degrees)});
  }

  const std::unique_ptr<FileSystem> file_system_ = NewPosixFileSystem();
  TemporaryDirectory directory_{Scratch()};
  const std::string out_ = directory_.Join("out");
  std::unique_ptr<ForeignFolder> folder_;
  std::optional<ConversionSource> source_;
  Records expected_;
};

TEST_F(DeepSpeedRanksTest, WhatIsCutIsReadBack) {
  struct Case {
    uint64_t stage, dp, tensor, pipeline;
  };
  const std::vector<Case> cases = {{1, 2, 0, 1}, {1, 1, 0, 2}, {1, 3, 0, 3}, {1, 2, 7, 2},
                                   {1, 1, 1, 3}, {2, 2, 7, 0}, {3, 2, 7, 0}, {3, 5, 1, 0}};
  for (const Case& each : cases) {
    SCOPED_TRACE(absl::StrFormat("zero=%d,dp=%d,tp=%d,pp=%d", each.stage, each.dp, each.tensor,
                                 each.pipeline));
    DeepSpeedWriteOptions options{.stage = each.stage, .dp = each.dp};
    options.degrees.layout = kLayout;
    if (each.tensor > 0) options.degrees.tensor = each.tensor;
    if (each.pipeline > 0) options.degrees.pipeline = each.pipeline;
    ASSERT_OK(Write(*source_, options));
    ASSERT_OK_AND_ASSIGN(Opened back, OpenCheckpoint(*file_system_, out_));
    EXPECT_THAT(back.index.repairs, IsEmpty());
    EXPECT_THAT(back.index.unreadable, IsEmpty());
    const auto degree = [](const char* name, uint64_t number) {
      return Fact{name, absl::StrCat(std::max<uint64_t>(number, 1))};
    };
    EXPECT_THAT(back.index.layout, Contains(degree("dp", each.dp)));
    EXPECT_THAT(back.index.layout, Contains(degree("tp", each.tensor)));
    EXPECT_THAT(back.index.layout, Contains(degree("pp", each.pipeline)));
    ConversionSource again(*back.folder, std::move(back.index));
    EXPECT_EQ(RecordsOf(again), expected_);
  }
}

// Ranks have a part of a vocabulary each, or all of it.
TEST_F(DeepSpeedRanksTest, TheRowsOfAPaddedVocabularyAreReadBack) {
  for (const char* cut : {"0", "\"replicated\""}) {
    SCOPED_TRACE(cut);
    DeepSpeedWriteOptions options{.stage = 1, .dp = 1};
    options.degrees = {
        .tensor = 7,
        .layout = absl::StrReplaceAll(
            kLayout, {{"\"cut\": 0, \"rows\"", absl::StrCat("\"cut\": ", cut, ", \"rows\"")}})};
    ASSERT_OK(Write(*source_, options));
    ASSERT_OK_AND_ASSIGN(Opened back, OpenCheckpoint(*file_system_, out_));
    ASSERT_OK_AND_ASSIGN(const ParallelInfo info, ParallelInfoOf(back.index));
    EXPECT_EQ(info.padded_vocabulary, 14u);
    ConversionSource again(*back.folder, std::move(back.index));
    EXPECT_EQ(RecordsOf(again), expected_);
  }
}

TEST_F(DeepSpeedRanksTest, FilesHaveDeepSpeedsNames) {
  DeepSpeedWriteOptions options{.stage = 1, .dp = 1};
  options.degrees = {.tensor = 1, .pipeline = 2, .layout = kLayout};
  ASSERT_OK(Write(*source_, options));
  EXPECT_EQ(Files(),
            (std::set<std::string>{
                "latest", "mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt",
                "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
                "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt", "layer_00-model_states.pt",
                "layer_01-model_states.pt", "layer_02-model_states.pt", "layer_04-model_states.pt",
                "layer_05-model_states.pt", "layer_07-model_states.pt"}));
  options.degrees.tensor = 7;
  ASSERT_OK(Write(*source_, options));
  EXPECT_EQ(Files().size(), 1u + 7u * (2 + 2 + 6));
  EXPECT_THAT(Files(), Contains("layer_04-model_06-model_states.pt"));
  EXPECT_THAT(Files(), Contains("mp_rank_13_model_states.pt"));
}

// Weights are in the optimizer's files, too, but DeepSpeed does not load what lacks a layer's file.
// A buffer is nowhere else, and without the optimizer's files nothing is.
TEST_F(DeepSpeedRanksTest, EveryLayerFileThatIsMissingIsNamed) {
  for (const uint64_t tensor : {1, 7}) {
    DeepSpeedWriteOptions options{.stage = 1, .dp = 1};
    options.degrees = {.tensor = tensor, .pipeline = 2, .layout = kLayout};
    ASSERT_OK(Write(*source_, options));
    std::vector<fs::path> layers, optimizers;
    for (const auto& entry : fs::recursive_directory_iterator(out_)) {
      const std::string name = entry.path().filename().string();
      if (name.ends_with("_optim_states.pt")) optimizers.push_back(entry.path());
      const bool tied = name.starts_with("layer_00") || name.starts_with("layer_07");
      if (name.starts_with("layer_") && !tied) layers.push_back(entry.path());
    }
    ASSERT_EQ(layers.size(), 4u * tensor);
    const fs::path away = directory_.Join("away");
    for (const fs::path& path : layers) {
      SCOPED_TRACE(path);
      const std::string number = path.filename().string().substr(7, 1);
      fs::rename(path, away);
      ASSERT_OK_AND_ASSIGN(Opened back, OpenCheckpoint(*file_system_, out_));
      // The fifth has a buffer, which another rank's file may have, too.
      Records expected = expected_;
      const bool is_lost = tensor == 1 && expected.erase({number + ".scale", "buffer"}) > 0;
      EXPECT_EQ(is_lost, tensor == 1 && number == "5");
      const auto& [said, unsaid] = is_lost ? std::tie(back.index.losses, back.index.repairs)
                                           : std::tie(back.index.repairs, back.index.losses);
      EXPECT_THAT(said, ElementsAre(HasSubstr(absl::StrCat("layer ", number, ": expected"))));
      EXPECT_THAT(unsaid, IsEmpty());
      ConversionSource again(*back.folder, std::move(back.index));
      EXPECT_EQ(RecordsOf(again), expected);
      fs::rename(away, path);
    }
    for (const fs::path& path : optimizers) fs::remove(path);
    fs::remove(layers[0]);
    ASSERT_OK_AND_ASSIGN(const Opened back, OpenCheckpoint(*file_system_, out_));
    EXPECT_THAT(back.index.losses, ElementsAre(HasSubstr("no file has masters")));
  }
}

TEST_F(DeepSpeedRanksTest, OfAPipelineWithoutAnyLayerFileEachIsNamed) {
  DeepSpeedWriteOptions options{.stage = 1, .dp = 1};
  options.degrees = {.tensor = 1, .pipeline = 2, .layout = kLayout};
  ASSERT_OK(Write(*source_, options));
  for (const auto& entry : fs::recursive_directory_iterator(out_)) {
    if (entry.path().filename().string().starts_with("layer_")) fs::remove(entry.path());
  }
  ASSERT_OK_AND_ASSIGN(const Opened back, OpenCheckpoint(*file_system_, out_));
  EXPECT_THAT(back.index.repairs,
              ElementsAre(HasSubstr("layer 1:"), HasSubstr("layer 2:"), HasSubstr("layer 4:"),
                          HasSubstr("tied_modules.embed: expected a file of its layer")));
  EXPECT_THAT(back.index.losses, ElementsAre(HasSubstr("its buffers are nowhere else: 5.scale")));
}

// What was written says how it was cut: it can be written again, and cut otherwise.
TEST_F(DeepSpeedRanksTest, TheSourceSaysHowItIsCut) {
  DeepSpeedWriteOptions options{.stage = 1, .dp = 2};
  options.degrees = {.tensor = 7, .pipeline = 2, .layout = kLayout};
  ASSERT_OK(Write(*source_, options));
  const std::string first = directory_.Join("first");
  fs::rename(out_, first);
  ASSERT_OK_AND_ASSIGN(Opened back, OpenCheckpoint(*file_system_, first));
  ConversionSource again(*back.folder, std::move(back.index));
  for (const DeepSpeedDegrees& degrees :
       {DeepSpeedDegrees{.tensor = 7}, DeepSpeedDegrees{.tensor = 7, .pipeline = 2},
        DeepSpeedDegrees{.pipeline = 1}}) {
    ASSERT_OK(Write(again, {.stage = 1, .dp = 3, .degrees = degrees}));
    ASSERT_OK_AND_ASSIGN(Opened third, OpenCheckpoint(*file_system_, out_));
    ConversionSource source(*third.folder, std::move(third.index));
    EXPECT_EQ(RecordsOf(source), expected_);
  }
  EXPECT_THAT(Write(again, {.stage = 1, .dp = 1, .degrees = {.tensor = 2}}),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       HasSubstr("2 tensor-parallel ranks do not divide")));
}

TEST_F(DeepSpeedRanksTest, WhatNobodySaysIsRefusedByName) {
  const auto refused = [](const char* why) {
    return StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(why));
  };
  EXPECT_THAT(Refusal({.tensor = 7}), refused("nothing says how tensor-parallel ranks cut it"));
  EXPECT_THAT(Refusal({.pipeline = 2}), refused("the tied module \"embed\""));
  EXPECT_THAT(Refusal({.pipeline = 1}), refused("\"tied_modules.embed.weight\""));
  EXPECT_THAT(Refusal({.pipeline = 9, .layout = kLayout}), refused("would have no parameters"));
  const auto pipeline = [](const std::string& json) { return R"({"pipeline": )" + json + "}"; };
  EXPECT_THAT(Refusal({.pipeline = 2, .layout = pipeline(R"({"stages": [0, 2, 4]})")}),
              refused("expected as many first layers in the layout file's \"stages\", found 3"));
  EXPECT_THAT(Refusal({.pipeline = 1, .layout = pipeline(R"({"tied": {"embed": [0, 2]}})")}),
              refused("layer 2 is said to be a tied module's, and has parameters of its own"));
  EXPECT_THAT(Refusal({.tensor = 2, .preset = "lama"}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("did you mean \"llama\"")));
  for (const auto& [json, why] : std::vector<std::pair<std::string, std::string>>{
           {R"({"stages": [1]})", "0, the first layer of all"},
           {R"({"stages": [0, 3, 3]})", "layers in ascending order"},
           {R"({"tied": {"embed": []}})", "at least one layer"},
           {R"({"stage": [0]})", "did you mean \"stages\""}}) {
    EXPECT_THAT(Refusal({.pipeline = 1, .layout = pipeline(json)}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(why)));
  }
}

// ---------------------------------------------------------------- experts, Muon

// A checkpoint in memory: states of one element after the other, 1, 2, 3, ... through all of them.
class MadeCheckpoint {
 public:
  void Add(const std::string& name, const std::string& state, const Shape& shape) {
    const uint32_t number =
        index_.AddState({.tensor = name, .state = state, .dtype = Dtype::kFloat32, .shape = shape});
    const uint64_t elements = index_.tensor_states[number].ElementCount();
    std::string bytes;
    for (uint64_t i = 0; i < elements; ++i) {
      const auto value = static_cast<float>(++last_);
      bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
    }
    index_.AddWholePiece(number, index_.AddInline(bytes), 0);
  }
  void Say(const std::string& name, const std::string& json) {
    index_.scalars.push_back({name, json});
  }
  ForeignIndex Take() {
    EXPECT_OK(Finish(index_));
    return std::move(index_);
  }

 private:
  ForeignIndex index_;
  uint32_t last_ = 0;
};

// Written for `options`, and read back: the same, and nothing else.
void ExpectRoundTrip(ForeignIndex index, const DeepSpeedWriteOptions& options) {
  const std::unique_ptr<FileSystem> file_system = NewPosixFileSystem();
  TemporaryDirectory directory{Scratch()};
  const std::string empty = directory.Join("empty"), out = directory.Join("out");
  fs::create_directory(empty);
  fs::create_directory(out);
  ASSERT_OK_AND_ASSIGN(const auto folder, ForeignFolder::Open(*file_system, empty));
  ConversionSource source(*folder, std::move(index));
  ASSERT_OK_AND_ASSIGN(const TorchFilesPlan plan, PlanDeepSpeed(source, options));
  EXPECT_THAT(plan.left_out, IsEmpty());
  ASSERT_OK(WriteTorchFiles(*file_system, out, source, plan, nullptr));
  ASSERT_OK_AND_ASSIGN(Opened back, OpenCheckpoint(*file_system, out));
  EXPECT_THAT(back.index.unreadable, IsEmpty());
  EXPECT_THAT(back.index.repairs, IsEmpty());
  ConversionSource again(*back.folder, std::move(back.index));
  EXPECT_EQ(RecordsOf(again), RecordsOf(source));
  // In the same order, whatever the ranks: flat buffers have no names.
  ASSERT_OK_AND_ASSIGN(const auto expected, OptimizerGroupsOf(source.index()));
  ASSERT_OK_AND_ASSIGN(const auto found, OptimizerGroupsOf(again.index()));
  ASSERT_EQ(found.size(), expected.size());
  for (size_t g = 0; g < found.size(); ++g) {
    EXPECT_EQ(found[g].parameters, expected[g].parameters);
  }
}

ForeignIndex Experts(bool data_first) {
  MadeCheckpoint made;
  std::string experts;
  made.Add("embed", "param", {5, 3});
  made.Add("embed", "exp_avg", {5, 3});
  for (const std::string layer : {"blocks.0", "blocks.10"}) {
    for (int expert = 0; expert < 4; ++expert) {
      for (const auto& [part, shape] :
           {std::pair<std::string, Shape>{"up", {3, 2}}, {"down", {7}}}) {
        const std::string name =
            absl::StrCat(layer, ".moe.experts.deepspeed_experts.", expert, ".", part);
        made.Add(name, "param", shape);
        made.Add(name, "exp_avg", shape);
        absl::StrAppend(&experts, experts.empty() ? "" : ", ", "\"", name, "\"");
      }
    }
  }
  made.Say("param_groups", absl::StrFormat(R"([{"name": "dense", "params": ["embed"]},
                                                {"name": "ep_size_9", "moe": true, "params": [%s]}])",
                                           experts));
  made.Say("ds_config", absl::StrFormat(R"({"use_data_before_expert_parallelism": %s})",
                                        data_first ? "true" : "false"));
  return made.Take();
}

TEST(DeepSpeedExpertsTest, AreSharedByTheirRanks) {
  for (const bool data_first : {false, true}) {
    for (const auto& [dp, ep] : std::vector<std::pair<uint64_t, uint64_t>>{
             {1, 1}, {3, 1}, {2, 2}, {4, 2}, {4, 4}, {8, 4}}) {
      for (const uint64_t stage : {1, 2}) {
        SCOPED_TRACE(absl::StrFormat("zero=%d,dp=%d,ep=%d,%d", stage, dp, ep, data_first));
        ExpectRoundTrip(Experts(data_first), {.stage = stage, .dp = dp, .ep = ep});
      }
    }
  }
}

// Writes a checkpoint with experts, to be broken.
class ExpertFilesTest : public ::testing::Test {
 protected:
  void Write(ForeignIndex index, const DeepSpeedWriteOptions& options) {
    const std::string empty = directory_.Join("empty");
    fs::create_directories(empty);
    fs::remove_all(out_);
    fs::create_directory(out_);
    ASSERT_OK_AND_ASSIGN(const auto folder, ForeignFolder::Open(*file_system_, empty));
    ConversionSource source(*folder, std::move(index));
    ASSERT_OK_AND_ASSIGN(const TorchFilesPlan plan, PlanDeepSpeed(source, options));
    ASSERT_OK(WriteTorchFiles(*file_system_, out_, source, plan, nullptr));
    expected_ = RecordsOf(source);
  }
  // Those whose names have this in them, in order.
  std::vector<fs::path> Files(const std::string& part) const {
    std::vector<fs::path> files;
    for (const auto& entry : fs::recursive_directory_iterator(out_)) {
      if (entry.path().filename().string().find(part) != std::string::npos) files.push_back(entry);
    }
    std::ranges::sort(files);
    return files;
  }

  const std::unique_ptr<FileSystem> file_system_ = NewPosixFileSystem();
  TemporaryDirectory directory_{Scratch()};
  const std::string out_ = directory_.Join("out");
  Records expected_;
};

// What an expert's file has is in the masters, too; DeepSpeed looks for the file all the same.
TEST_F(ExpertFilesTest, EachThatIsMissingIsNamed) {
  Write(Experts(false), {.stage = 1, .dp = 4, .ep = 2});
  ASSERT_EQ(Files("_expert_").size(), 8u);
  const fs::path away = directory_.Join("away");
  for (const fs::path& path : Files("_expert_")) {
    SCOPED_TRACE(path);
    const std::string name = path.filename().string();
    const std::string words = absl::StrCat("layer ", name.substr(6, 1),
                                           " with experts: expected a "
                                           "file of each of its 4, found none of expert ",
                                           name.substr(15, 1), ";");
    fs::rename(path, away);
    ASSERT_OK_AND_ASSIGN(Opened back, OpenCheckpoint(*file_system_, out_));
    EXPECT_THAT(back.index.repairs, ElementsAre(HasSubstr(words)));
    EXPECT_THAT(back.index.losses, IsEmpty());
    ConversionSource again(*back.folder, std::move(back.index));
    EXPECT_EQ(RecordsOf(again), expected_);
    fs::rename(away, path);
  }
  for (const fs::path& path : Files("_expert_")) fs::remove(path);
  ASSERT_OK_AND_ASSIGN(Opened back, OpenCheckpoint(*file_system_, out_));
  EXPECT_THAT(back.index.repairs, ElementsAre(HasSubstr("none of expert 0 and 3 others"),
                                              HasSubstr("none of expert 0 and 3 others")));
  ASSERT_OK_AND_ASSIGN(const auto groups, OptimizerGroupsOf(back.index));
  EXPECT_EQ(groups.back().parameters.size(), 16u);
  for (const fs::path& path : Files("optim_states")) fs::remove(path);
  ASSERT_OK_AND_ASSIGN(const Opened bare, OpenCheckpoint(*file_system_, out_));
  EXPECT_THAT(bare.index.losses,
              ElementsAre(HasSubstr("layer 0 with experts"), HasSubstr("no file has masters")));
}

TEST_F(ExpertFilesTest, NumbersThatCannotBeAreRefused) {
  Write(Experts(false), {.stage = 1, .dp = 2, .ep = 2});
  const fs::path last = Files("layer_1_expert_3_").front();
  for (const char* name : {"layer_1_expert_4_mp_rank_00_model_states.pt",
                           "layer_1_expert_9999999_mp_rank_00_model_states.pt",
                           "layer_2_expert_0_mp_rank_00_model_states.pt",
                           "layer_9999999_expert_0_mp_rank_00_model_states.pt",
                           "layer_1_expert_3_mp_rank_01_model_states.pt"}) {
    const fs::path other = last.parent_path() / name;
    fs::rename(last, other);
    EXPECT_THAT(OpenCheckpoint(*file_system_, out_),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr(name)));
    fs::rename(other, last);
  }
  // Whose contents are another expert's.
  const fs::path first = Files("layer_1_expert_0_").front();
  fs::copy_file(first, last, fs::copy_options::overwrite_existing);
  EXPECT_THAT(OpenCheckpoint(*file_system_, out_),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("expected tensors of expert 3")));
}

// Layers of different numbers of experts have the order of the modules.
ForeignIndex Pyramid(const std::vector<std::pair<std::string, int>>& layers) {
  MadeCheckpoint made;
  for (const auto& [layer, experts] : layers) {
    for (int expert = 0; expert < experts; ++expert) {
      made.Add(absl::StrCat(layer, ".deepspeed_experts.", expert, ".up"), "param", {2});
    }
  }
  return made.Take();
}

TEST_F(ExpertFilesTest, LayersAreNumberedByTheirNamesOrAsTheSourceHadThem) {
  const auto counts = [&] {
    std::vector<size_t> found;
    for (const char* layer : {"layer_0_", "layer_1_", "layer_2_"}) {
      found.push_back(Files(layer).size());
    }
    return found;
  };
  Write(Pyramid({{"h.10.moe", 8}, {"h.2.moe", 2}, {"h.9.moe", 4}}), {.stage = 1, .dp = 1});
  EXPECT_THAT(counts(), ElementsAre(2u, 4u, 8u));
  ASSERT_OK_AND_ASSIGN(Opened back, OpenCheckpoint(*file_system_, out_));
  EXPECT_THAT(back.index.losses, IsEmpty());
  ForeignIndex mixed = Pyramid({{"encoder.moe", 4}, {"decoder.moe", 2}, {"end.moe", 1}});
  ForeignIndex said = mixed;
  said.scalars.push_back({"num_experts", "[4, 2, 1]"});
  Write(std::move(said), {.stage = 1, .dp = 1});
  EXPECT_THAT(counts(), ElementsAre(4u, 2u, 1u));
  ASSERT_OK_AND_ASSIGN(const auto folder, ForeignFolder::Open(*file_system_, out_));
  ConversionSource source(*folder, std::move(mixed));
  EXPECT_THAT(PlanDeepSpeed(source, {.stage = 1, .dp = 1}),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       HasSubstr("in the order of the model's modules")));
}

TEST(DeepSpeedExpertsTest, WhatDoesNotFitIsRefused) {
  const std::unique_ptr<FileSystem> file_system = NewPosixFileSystem();
  TemporaryDirectory directory{Scratch()};
  ASSERT_OK_AND_ASSIGN(const auto folder, ForeignFolder::Open(*file_system, directory.path()));
  const auto refusal = [&](ForeignIndex index, const DeepSpeedWriteOptions& options) {
    ConversionSource source(*folder, std::move(index));
    return PlanDeepSpeed(source, options).status();
  };
  const auto refused = [](const char* why) {
    return StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(why));
  };
  EXPECT_THAT(refusal(Experts(false), {.stage = 1, .dp = 3, .ep = 3}),
              refused("a number of experts that 3 ranks divide, found 4"));
  EXPECT_THAT(refusal(Experts(false), {.stage = 3, .dp = 1}), refused("without tp and pp"));
  DeepSpeedWriteOptions tensor{.stage = 1, .dp = 1};
  tensor.degrees.tensor = 1;
  EXPECT_THAT(refusal(Experts(false), tensor), refused("without tp and pp"));
  ForeignIndex together = Experts(false);
  for (Fact& fact : together.scalars) {
    if (fact.name == "param_groups") fact.json = R"([{"params": []}])";
  }
  EXPECT_THAT(refusal(std::move(together), {.stage = 1, .dp = 1}), refused("marked \"moe\""));
}

// Each rank holds the momentum of every parameter that its partition touches, whole.
TEST(DeepSpeedMuonTest, MomentumIsReadBack) {
  for (uint64_t dp = 1; dp <= 9; ++dp) {
    for (const uint64_t stage : {1, 2}) {
      SCOPED_TRACE(absl::StrFormat("zero=%d,dp=%d", stage, dp));
      MadeCheckpoint made;
      for (const auto& [name, shape] :
           {std::pair<std::string, Shape>{"a", {3, 2}}, {"b", {1, 5}}, {"c", {2, 2}}}) {
        made.Add(name, "param", shape);
        made.Add(name, "momentum_buffer", shape);
      }
      made.Add("norm", "param", {3});
      made.Add("norm", "exp_avg", {3});
      made.Say("param_groups", R"([{"use_muon": true, "params": ["c", "a", "b"]},
                                    {"use_muon": false, "params": ["norm"]}])");
      ExpectRoundTrip(made.Take(), {.stage = stage, .dp = dp});
    }
  }
}

}  // namespace
}  // namespace holdfast::converter
