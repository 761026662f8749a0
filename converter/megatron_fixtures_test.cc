// Goal: every whole tensor and state of a Megatron checkpoint is bit for bit what training held,
// but for what Megatron itself has lost, which is named.
// Method: checkpoints that Megatron-LM itself wrote (../shared/fixtures/megatron), beside each the
// truth from the live objects, in `expected.json`: name, state, dtype, shape and SHA-256.
//
// Skipped where they are not there; converter/megatron_test.cc has samples of its own.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "converter/foreign_folder.h"
#include "converter/foreign_testing.h"
#include "converter/format_reader.h"
#include "converter/prove.h"
#include "converter/whole_tensor_reader.h"
#include "gtest/gtest.h"
#include "io/posix_file_system.h"
#include "nlohmann/json.hpp"
#include "tests/support/status_matchers.h"

namespace holdfast::converter {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Key = std::pair<std::string, std::string>;  // tensor, state
using Records = std::map<Key, std::string>;       // "float32 [2,3] <sha256>"

// A buffer is a parameter to the files: the names of modules alone tell.
std::string ClassOf(const std::string& state) { return state == "buffer" ? "param" : state; }

Records Expected(const json& truth) {
  Records records;
  for (const json& tensor : truth["tensors"]) {
    records[{tensor["name"], ClassOf(tensor["state"])}] = tensor["dtype"].get<std::string>() + " " +
                                                          tensor["shape"].dump() + " " +
                                                          tensor["sha256"].get<std::string>();
  }
  return records;
}

Records Found(const ForeignFolder& folder, const ForeignIndex& index) {
  Records records;
  WholeTensorReader reader(folder, index);
  for (uint32_t i = 0; i < index.tensor_states.size(); ++i) {
    const TensorState& state = index.tensor_states[i];
    if (state.state == "rng") continue;  // no tensors of the model: not in the truth
    const absl::StatusOr<std::string> sha256 = Sha256Of(reader, i);
    EXPECT_THAT(sha256, IsOk()) << Describe(state);
    records[{state.tensor, ClassOf(state.state)}] = std::string(DtypeName(state.dtype)) + " " +
                                                    json(state.shape).dump() + " " +
                                                    sha256.value_or("");
  }
  return records;
}

// States that the file holds wrongly and no repair brings back: they are losses, by name.
std::set<Key> LossesOf(const ForeignIndex& index, const Records& expected) {
  std::set<Key> lost;
  for (const auto& [key, record] : expected) {
    const std::string begin = key.first + " " + key.second + ": ";
    for (const std::string& loss : index.losses) {
      if (loss.starts_with(begin)) lost.insert(key);
    }
  }
  return lost;
}

class MegatronFixtures : public testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::path(HOLDFAST_SOURCE_DIR) / "../shared/fixtures/megatron";
    if (!fs::exists(root_)) GTEST_SKIP() << "no ../shared/fixtures";
    for (const auto& entry : fs::directory_iterator(root_)) cases_.push_back(entry.path());
    std::ranges::sort(cases_);
    ASSERT_GE(cases_.size(), 11);
  }

  fs::path root_;
  std::vector<fs::path> cases_;
  std::unique_ptr<FileSystem> file_system_ = NewPosixFileSystem();
};

TEST_F(MegatronFixtures, EveryTensorIsWhatTrainingHeld) {
  for (const fs::path& path : cases_) {
    SCOPED_TRACE(path.filename().string());
    const json truth = json::parse(std::ifstream(path / "expected.json"));
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ForeignFolder> folder,
                         ForeignFolder::Open(*file_system_, path / "ckpt"));
    ASSERT_OK_AND_ASSIGN(const FormatReader* const reader, RecognizeFormat(*folder));
    ASSERT_NE(reader, nullptr);
    EXPECT_EQ(reader->name, "megatron");
    ASSERT_OK_AND_ASSIGN(const ForeignIndex index, ReadFormat(*reader, *folder, {}));
    EXPECT_TRUE(index.has_step);
    EXPECT_EQ(index.step, truth["step"]);
    for (const Unreadable& each : index.unreadable)
      ADD_FAILURE() << each.name << ": " << each.reason;
    const Records expected = Expected(truth);
    const Records found = Found(*folder, index);
    const std::set<Key> lost = LossesOf(index, expected);
    for (const auto& [key, record] : expected) {
      const auto mine = found.find(key);
      if (lost.contains(key)) {
        EXPECT_EQ(mine, found.end()) << key.first << " " << key.second << " is lost";
        continue;
      }
      EXPECT_EQ(mine == found.end() ? "not found" : mine->second, record)
          << key.first << " " << key.second;
    }
    for (const auto& [key, record] : found) {
      EXPECT_TRUE(expected.contains(key)) << key.first << " " << key.second << " is not expected";
    }
    ASSERT_OK_AND_ASSIGN(const ProofReport proof, Prove(*folder, index, {}));
    const bool damaged = path.filename() == "dist-fully-buckets-dp2";
    EXPECT_EQ(proof.soundness, damaged ? Soundness::kLost : Soundness::kGood);
    EXPECT_EQ(lost.size(), damaged ? 9 : 0);
    EXPECT_EQ(index.repairs.size(), damaged ? 1 : 0);
  }
}

}  // namespace
}  // namespace holdfast::converter
