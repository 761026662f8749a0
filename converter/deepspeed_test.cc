// Goal: every whole tensor and state of a DeepSpeed or universal checkpoint is bit for bit what
// training held, and a damaged checkpoint is refused by name.
// Method: checkpoints that DeepSpeed itself wrote (tests/data/deepspeed, made by
// tests/interop/deepspeed_make.py; the larger collection where it is there), beside each the truth
// from the live objects; and files of the same form with one thing wrong, with the words that the
// error must have.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "converter/deepspeed_model.h"
#include "converter/foreign_testing.h"
#include "converter/whole_tensor_reader.h"
#include "io/posix_file_system.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast::converter {
namespace {

using ::testing::HasSubstr;
namespace fs = std::filesystem;

std::string ReadText(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

// As the command line does: the first reader that knows it.
absl::StatusOr<ForeignIndex> ReadCheckpoint(const ForeignFolder& folder,
                                            const ReadOptions& options = {}) {
  const absl::StatusOr<const FormatReader*> reader = RecognizeFormat(folder);
  if (!reader.ok()) return reader.status();
  if (*reader == nullptr) return absl::NotFoundError("no format");
  return ReadFormat(**reader, folder, options);
}

using Key = std::pair<std::string, std::string>;  // tensor, state

struct Whole {
  std::string dtype;
  Shape shape;
  std::string sha256;
  bool operator==(const Whole&) const = default;
};
void PrintTo(const Whole& whole, std::ostream* os) {
  *os << whole.dtype << " " << testing::PrintToString(whole.shape) << " " << whole.sha256;
}

absl::StatusOr<std::map<Key, Whole>> Wholes(const ForeignFolder& folder,
                                            const ForeignIndex& index) {
  std::map<Key, Whole> wholes;
  WholeTensorReader reader(folder, index);
  for (uint32_t i = 0; i < index.tensor_states.size(); ++i) {
    const TensorState& state = index.tensor_states[i];
    const absl::StatusOr<std::string> sha256 = Sha256Of(reader, i);
    if (!sha256.ok()) {
      return absl::Status(sha256.status().code(),
                          absl::StrCat(Describe(state), ": ", sha256.status().message()));
    }
    wholes[{state.tensor, state.state}] = {std::string(DtypeName(state.dtype)), state.shape,
                                           *sha256};
  }
  return wholes;
}

std::vector<fs::path> Cases(std::vector<fs::path> roots) {
  std::vector<fs::path> cases;
  for (const fs::path& root : roots) {
    if (!fs::exists(root)) continue;
    for (const auto& entry : fs::directory_iterator(root)) {
      if (fs::exists(entry.path() / "ckpt")) cases.push_back(entry.path());
    }
  }
  std::sort(cases.begin(), cases.end());
  return cases;
}

const fs::path kSource = HOLDFAST_SOURCE_DIR;
const fs::path kShared = kSource / "../shared/fixtures";

void ExpectTruth(const fs::path& at) {
  SCOPED_TRACE(at.string());
  const std::unique_ptr<FileSystem> file_system = NewPosixFileSystem();
  ASSERT_OK_AND_ASSIGN(const auto folder,
                       ForeignFolder::Open(*file_system, (at / "ckpt").string()));
  ASSERT_OK_AND_ASSIGN(const ForeignIndex index, ReadCheckpoint(*folder));
  EXPECT_THAT(index.unreadable, testing::IsEmpty());
  EXPECT_THAT(index.losses, testing::IsEmpty());
  // Damage of round robin is mended, and said; with alignment DeepSpeed's own map is right.
  const std::string name = at.filename().string();
  const bool round_robin =
      (name.find("_rr_") != std::string::npos || name.find("round_robin") != std::string::npos) &&
      name.find("aligned") == std::string::npos;
  EXPECT_EQ(!index.repairs.empty(), round_robin) << testing::PrintToString(index.repairs);
  ASSERT_OK_AND_ASSIGN(const auto found, Wholes(*folder, index));
  const auto expected = nlohmann::json::parse(ReadText(at / "expected.json"));
  std::map<Key, Whole> left = found;
  for (const auto& entry : expected["tensors"]) {
    const Key key = {entry["name"], entry["state"]};
    const Whole whole = {entry["dtype"], entry["shape"].get<Shape>(), entry["sha256"]};
    const auto have = left.find(key);
    if (have == left.end()) {
      ADD_FAILURE() << "missing: " << testing::PrintToString(key);
      continue;
    }
    EXPECT_EQ(have->second, whole) << testing::PrintToString(key);
    left.erase(have);
  }
  // What else is there is the alias of a frozen weight that was not to be saved: DeepSpeed leaves
  // its tensor in the file all the same (foreign-formats 3.2).
  std::set<std::string> frozen;
  if (expected.contains("layout") && expected["layout"].contains("frozen")) {
    frozen = expected["layout"]["frozen"].get<std::set<std::string>>();
  }
  for (const auto& [key, whole] : left) {
    EXPECT_TRUE(frozen.contains(key.first)) << "not expected: " << testing::PrintToString(key);
  }
}

TEST(DeepSpeedTest, SamplesAreWhatTrainingHeld) {
  const std::vector<fs::path> cases = Cases({kSource / "tests/data/deepspeed"});
  EXPECT_GE(cases.size(), 8u);
  for (const fs::path& at : cases) ExpectTruth(at);
}

// The weights of frozen parameters lie alone in their folders, and nobody says of which they are.
TEST(DeepSpeedTest, AUniversalFolderWithoutTheModelsFilesIsWhole) {
  const std::unique_ptr<FileSystem> file_system = NewPosixFileSystem();
  const TemporaryDirectory directory;
  fs::copy(kSource / "tests/data/deepspeed/universal_zero3/ckpt", directory.path(),
           fs::copy_options::recursive);
  std::vector<fs::path> models;
  fs::path frozen;
  for (const auto& entry : fs::recursive_directory_iterator(directory.path())) {
    if (entry.path().filename().string().ends_with("model_states.pt")) models.push_back(entry);
    if (entry.path().filename() == "fp32.pt") frozen = entry.path();
  }
  ASSERT_FALSE(models.empty() || frozen.empty());
  for (const fs::path& path : models) fs::remove(path);
  fs::create_directory(frozen.parent_path().parent_path() / "frozen.weight");
  fs::copy(frozen, frozen.parent_path().parent_path() / "frozen.weight" / "fp32.pt");
  ASSERT_OK_AND_ASSIGN(const auto folder, ForeignFolder::Open(*file_system, directory.path()));
  ASSERT_OK_AND_ASSIGN(const ForeignIndex index, ReadCheckpoint(*folder));
  EXPECT_THAT(index.losses, testing::IsEmpty());
}

TEST(DeepSpeedTest, WhatAUniversalFolderLacksIsLost) {
  const std::unique_ptr<FileSystem> file_system = NewPosixFileSystem();
  const fs::path sample = kSource / "tests/data/deepspeed/universal_zero3/ckpt";
  std::vector<fs::path> files;
  for (const auto& entry : fs::recursive_directory_iterator(sample)) {
    const fs::path path = fs::relative(entry.path(), sample);
    if (entry.is_regular_file() && path.string().find("/zero/") != std::string::npos &&
        path.filename() != "optimizer_state.pt") {
      files.push_back(path);
    }
  }
  ASSERT_GE(files.size(), 4u);
  const auto losses_without = [&](const fs::path& gone) {
    const TemporaryDirectory directory;
    fs::copy(sample, directory.path(), fs::copy_options::recursive);
    fs::remove_all(directory.path() / gone);
    const auto folder = ForeignFolder::Open(*file_system, directory.path());
    EXPECT_THAT(folder, IsOk());
    const auto index = ReadCheckpoint(**folder);
    EXPECT_THAT(index, IsOk());
    return index.ok() ? index->losses : std::vector<std::string>();
  };
  for (const fs::path& file : files) {
    const std::string parameter = "zero/" + file.parent_path().filename().string() + ": ";
    EXPECT_THAT(losses_without(file), testing::ElementsAre(HasSubstr(parameter + "expected " +
                                                                     file.filename().string())));
    EXPECT_THAT(losses_without(file.parent_path()),
                testing::ElementsAre(HasSubstr(parameter + "expected the states")));
  }
}

// An optimizer's options may differ by group, and so may its states.
TEST(DeepSpeedTest, WhatNoParameterOfAGroupHasIsNotLost) {
  const std::unique_ptr<FileSystem> file_system = NewPosixFileSystem();
  const TemporaryDirectory directory;
  fs::copy(kSource / "tests/data/deepspeed/universal_zero3/ckpt", directory.path(),
           fs::copy_options::recursive);
  std::map<std::string, fs::path> files;
  for (const auto& entry : fs::recursive_directory_iterator(directory.path())) {
    if (entry.path().filename() != "exp_avg.pt") continue;
    files[entry.path().parent_path().filename().string()] = entry.path();
  }
  const auto losses_without = [&](const std::vector<std::string>& parameters) {
    for (const std::string& parameter : parameters) EXPECT_TRUE(fs::remove(files.at(parameter)));
    const auto folder = ForeignFolder::Open(*file_system, directory.path());
    EXPECT_THAT(folder, IsOk());
    const auto index = ReadCheckpoint(**folder);
    EXPECT_THAT(index, IsOk());
    return index.ok() ? index->losses : std::vector<std::string>();
  };
  EXPECT_THAT(losses_without({"up.bias", "still.bias", "norm.weight"}), testing::SizeIs(3));
  EXPECT_THAT(losses_without({"norm.bias"}), testing::IsEmpty());  // the last of its group
  // Alone in its group, it is compared with all.
  EXPECT_THAT(losses_without({"down.weight"}),
              testing::ElementsAre(HasSubstr("zero/down.weight: expected exp_avg.pt")));
}

TEST(DeepSpeedTest, FixturesAreWhatTrainingHeld) {
  if (!fs::exists(kShared)) GTEST_SKIP() << "no ../shared/fixtures";
  const std::vector<fs::path> cases = Cases({kShared / "deepspeed", kShared / "ucp"});
  EXPECT_EQ(cases.size(), 28u);
  for (const fs::path& at : cases) ExpectTruth(at);
}

// A copy of a sample, to break.
class BrokenTest : public testing::Test {
 protected:
  fs::path Copy(const std::string& sample) {
    const fs::path at = fs::path(directory_.path()) / sample;
    fs::copy(kSource / "tests/data/deepspeed" / sample / "ckpt", at, fs::copy_options::recursive);
    return at;
  }
  absl::StatusOr<std::map<Key, Whole>> Read(const fs::path& at, const std::string& tag = "") {
    ReadOptions options;
    options.tag = tag;
    absl::StatusOr<std::unique_ptr<ForeignFolder>> folder =
        ForeignFolder::Open(*file_system_, at.string());
    if (!folder.ok()) return folder.status();
    absl::StatusOr<ForeignIndex> index = ReadCheckpoint(**folder, options);
    if (!index.ok()) return index.status();
    return Wholes(**folder, *index);
  }

  TemporaryDirectory directory_;
  const std::unique_ptr<FileSystem> file_system_ = NewPosixFileSystem();
};

TEST_F(BrokenTest, AMissingRankIsNamed) {
  const fs::path at = Copy("zero2_round_robin") / "global_step3";
  fs::remove(at / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt");
  EXPECT_THAT(Read(at), StatusIs(absl::StatusCode::kDataLoss,
                                 HasSubstr("data-parallel rank 1, model-parallel rank 0")));
  fs::rename(at / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt",
             at / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt");
  EXPECT_THAT(Read(at), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("of 3 data-parallel")));
}

TEST_F(BrokenTest, RanksOfUnequalSizeDoNotChangePlaces) {
  // The last rank's partition is shorter: as rank 0's it does not fit.
  const fs::path at = Copy("zero1_sgd") / "global_step3";
  const fs::path first = at / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt";
  const fs::path second = at / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt";
  fs::rename(first, at / "x");
  fs::rename(second, first);
  fs::rename(at / "x", second);
  EXPECT_THAT(Read(at), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("rank 0")));
}

TEST_F(BrokenTest, ModelStatesOfAnotherModelDoNotFit) {
  const fs::path at = Copy("zero2_round_robin") / "global_step3";
  fs::copy_file(
      kSource / "tests/data/deepspeed/zero1_sgd/ckpt/global_step3/mp_rank_00_model_states.pt",
      at / "mp_rank_00_model_states.pt", fs::copy_options::overwrite_existing);
  EXPECT_THAT(Read(at), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("2")));
}

TEST_F(BrokenTest, TagsAreFoundAndNamed) {
  const fs::path at = Copy("zero1_sgd");
  fs::copy(at / "global_step3", at / "global_step12", fs::copy_options::recursive);
  EXPECT_OK(Read(at));
  EXPECT_OK(Read(at, "global_step12"));
  EXPECT_THAT(Read(at, "global_step4"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("global_step12, global_step3")));
  std::ofstream(at / "latest") << "global_step4";
  EXPECT_THAT(Read(at), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("global_step4")));
  fs::remove(at / "latest");
  fs::remove_all(at / "global_step3");
  EXPECT_OK(Read(at));
  EXPECT_OK(Read(at / "global_step12"));
}

TEST_F(BrokenTest, ATruncatedFileIsRefused) {
  const fs::path at = Copy("zero3_sub_groups") / "global_step3";
  const fs::path file = at / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt";
  fs::resize_file(file, fs::file_size(file) / 2);
  EXPECT_FALSE(Read(at).ok());
}

// Each case: files as DeepSpeed names them, one thing wrong in them; error.txt: words of the error.
TEST_F(BrokenTest, HostileCheckpointsAreRefusedByName) {
  const fs::path root = kSource / "tests/data/deepspeed_hostile";
  int count = 0;
  for (const auto& entry : fs::directory_iterator(root)) {
    SCOPED_TRACE(entry.path().string());
    std::string words = ReadText(entry.path() / "error.txt");
    while (!words.empty() && words.back() == '\n') words.pop_back();
    const auto read = Read(entry.path() / "ckpt");
    if (words.empty()) {
      EXPECT_OK(read);
    } else {
      ASSERT_FALSE(read.ok());
      EXPECT_THAT(std::string(read.status().message()), HasSubstr(words));
    }
    ++count;
  }
  EXPECT_GE(count, 12);
}

TEST(DeepSpeedFilesTest, NamesOfAllVersions) {
  using Role = DeepSpeedFileName::Role;
  const auto role = [](const char* name) {
    const auto parsed = ParseDeepSpeedFileName(name);
    return parsed.has_value() ? static_cast<int>(parsed->role) : -1;
  };
  EXPECT_EQ(role("mp_rank_00_model_states.pt"), static_cast<int>(Role::kModel));
  EXPECT_EQ(role("zero_pp_rank_3_mp_rank_01_model_states.pt"),
            static_cast<int>(Role::kPartitionedModel));
  for (const char* name : {"zero_pp_rank_3_mp_rank_01_optim_states.pt",
                           "bf16_zero_pp_rank_3_mp_rank_01_optim_states.pt",
                           "fp16_zero_pp_rank_3_mp_rank_01_optim_states.pt",
                           "zero_pp_rank_3_mp_rank_01optim_states.pt"}) {
    EXPECT_EQ(role(name), static_cast<int>(Role::kOptimizer)) << name;
    EXPECT_EQ(ParseDeepSpeedFileName(name)->dp, 3u);
    EXPECT_EQ(ParseDeepSpeedFileName(name)->mp, 1u);
  }
  EXPECT_EQ(role("layer_07-model_02-model_states.pt"), static_cast<int>(Role::kLayer));
  EXPECT_EQ(role("layer_07-model_states.pt"), static_cast<int>(Role::kLayer));
  EXPECT_EQ(role("layer_1_expert_12_mp_rank_00_model_states.pt"), static_cast<int>(Role::kExpert));
  EXPECT_EQ(role("expert_12_mp_rank_00_model_states.pt"), static_cast<int>(Role::kExpert));
  EXPECT_EQ(role("expp_rank_1_mp_rank_00_optim_states.pt"),
            static_cast<int>(Role::kExpertOptimizer));
  for (const char* name :
       {"", "mp_rank_00", "mp_rank_00_model_states.pt.tmp", "mp_rank__model_states.pt",
        "mp_rank_123456789_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.ptx", "layer_00-model-model_states.pt"}) {
    EXPECT_EQ(role(name), -1) << name;
  }
}

TEST(DeepSpeedFilesTest, ExpertNames) {
  const auto expert = ParseExpertName("h.1.moe.experts.deepspeed_experts.12.up.weight");
  ASSERT_TRUE(expert.has_value());
  EXPECT_EQ(expert->prefix, "h.1.moe.experts.deepspeed_experts.");
  EXPECT_EQ(expert->number, 12u);
  EXPECT_EQ(expert->suffix, ".up.weight");
  for (const char* name : {"h.deepspeed_experts.x.up", "h.deepspeed_experts.1", "h.experts.1.up",
                           "h.mydeepspeed_experts.1.up", "deepspeed_experts.12345678.up"}) {
    EXPECT_FALSE(ParseExpertName(name).has_value()) << name;
  }
}

}  // namespace
}  // namespace holdfast::converter
