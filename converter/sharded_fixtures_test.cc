// Every checkpoint of tests/data/sharded and ../shared/fixtures/{dcp,fsdp}, which torch itself
// wrote, against the truth that it recorded beside it: each tensor by name, state, dtype, shape and
// the SHA-256 of its whole contiguous bytes, no more and no fewer. Names that are not in the files
// come from the truth's own `layout`, as a user would give them with --names.
//
// Skipped where ../shared/fixtures is not there; tests/data/sharded always is (its maker is
// tests/interop/sharded_make.py).
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "converter/dcp_reader.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "converter/foreign_testing.h"
#include "converter/format_reader.h"
#include "converter/fsdp_reader.h"
#include "converter/whole_tensor_reader.h"
#include "gtest/gtest.h"
#include "io/posix_file_system.h"
#include "nlohmann/json.hpp"
#include "tests/support/status_matchers.h"

namespace holdfast::converter {
namespace {

using nlohmann::json;

// States that the files do not tell apart: what a tensor is to the model.
std::string ClassOf(const std::string& state) {
  static const std::set<std::string> kOneClass = {"param", "buffer", "tensor",
                                                  "other", "rng",    "ema"};
  return kOneClass.contains(state) ? "a tensor" : state;
}

using Record = std::string;                                             // "float32 [2, 3] <sha256>"
using Records = std::map<std::pair<std::string, std::string>, Record>;  // by (name, class)

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
    const absl::StatusOr<std::string> sha256 = Sha256Of(reader, i);
    EXPECT_THAT(sha256, IsOk()) << Describe(state);
    const bool added = records
                           .emplace(std::pair(state.tensor, ClassOf(state.state)),
                                    std::string(DtypeName(state.dtype)) + " " +
                                        json(state.shape).dump() + " " + sha256.value_or(""))
                           .second;
    EXPECT_TRUE(added) << Describe(state);
  }
  return records;
}

std::string NamesFrom(const json& truth) {
  const json& layout = truth["layout"];
  json names = json::object();
  if (layout.contains("units")) names["units"] = layout["units"];
  if (layout.contains("optimizer_index")) {
    names["parameters"] = layout["optimizer_index"];
  } else if (truth["scalars"].contains("param_groups") &&
             truth["scalars"]["param_groups"].is_array()) {
    json parameters = json::array();
    for (const json& group : truth["scalars"]["param_groups"]) {
      for (const json& name : group["params"]) parameters.push_back(name);
    }
    names["parameters"] = parameters;
  }
  return names.dump();
}

std::vector<std::filesystem::path> CasesIn(const std::string& folder) {
  std::vector<std::filesystem::path> cases;
  std::error_code error;
  const std::filesystem::path root = std::filesystem::path(HOLDFAST_SOURCE_DIR) / folder;
  for (const auto& entry : std::filesystem::directory_iterator(root, error)) {
    // Folders of whole tensors, as transformers writes them too.
    if (std::filesystem::exists(entry.path() / "ckpt/model.safetensors.index.json")) continue;
    cases.push_back(entry.path());
  }
  std::sort(cases.begin(), cases.end());
  return cases;
}

void Check(FileSystem& file_system, const std::filesystem::path& path) {
  const json truth = json::parse(std::ifstream(path / "expected.json"));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ForeignFolder> folder,
                       ForeignFolder::Open(file_system, path / "ckpt"));
  ASSERT_OK_AND_ASSIGN(const FormatReader* const reader, RecognizeFormat(*folder));
  ASSERT_NE(reader, nullptr);
  ReadOptions options;
  options.names = NamesFrom(truth);
  ASSERT_OK_AND_ASSIGN(const ForeignIndex index, ReadFormat(*reader, *folder, options));
  Records found = Found(*folder, index);
  // Every rank saved another tensor under this key, and DCP kept any one: not in the truth.
  if (path.filename() == "rank_blobs_w3") found.erase({"same_key_other_value", "a tensor"});
  const Records expected = Expected(truth);
  for (const auto& [key, record] : expected) {
    const auto mine = found.find(key);
    EXPECT_EQ(mine == found.end() ? "not found" : mine->second, record)
        << key.first << " " << key.second;
  }
  for (const auto& [key, record] : found) {
    EXPECT_TRUE(expected.contains(key)) << key.first << " " << key.second << " is not expected";
  }
}

void CheckAll(const std::vector<std::filesystem::path>& cases) {
  const std::unique_ptr<FileSystem> file_system = NewPosixFileSystem();
  for (const std::filesystem::path& path : cases) {
    SCOPED_TRACE(path.string());
    Check(*file_system, path);
  }
}

TEST(ShardedFixtures, EveryTensorOfTheSamplesIsWhatTorchSaysItIs) {
  const std::vector<std::filesystem::path> cases = CasesIn("tests/data/sharded");
  ASSERT_FALSE(cases.empty());
  CheckAll(cases);
}

TEST(ShardedFixtures, EveryTensorOfTheFixturesIsWhatTorchSaysItIs) {
  std::vector<std::filesystem::path> cases = CasesIn("../shared/fixtures/dcp");
  const std::vector<std::filesystem::path> fsdp = CasesIn("../shared/fixtures/fsdp");
  cases.insert(cases.end(), fsdp.begin(), fsdp.end());
  if (cases.empty()) GTEST_SKIP() << "no ../shared/fixtures";
  CheckAll(cases);
}

}  // namespace
}  // namespace holdfast::converter
