// Checkpoints that the frameworks wrote, written in every other format that can hold them and read
// back: every tensor and state is the same, bit for bit. Which format cannot hold which sample is a
// table here, with the reason. That the frameworks themselves load what is written is in
// tests/interop.
//
// The samples are those of tests/data, and what lies beside the repository where it is there.
#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "converter/conversion_source.h"
#include "converter/dcp_writer.h"
#include "converter/deepspeed_writer.h"
#include "converter/foreign_testing.h"
#include "converter/format_reader.h"
#include "converter/fsdp_writer.h"
#include "converter/optimizer_groups.h"
#include "converter/torch_writer.h"
#include "converter/ucp_writer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "io/posix_file_system.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast::converter {
namespace {

namespace fs = std::filesystem;

constexpr char kFile[] = "checkpoint.pt";
constexpr char kMemory[] = "/dev/shm";
// The SHA-256 of no bytes.
constexpr char kNothing[] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
constexpr uint64_t kBytesMax = uint64_t{64} << 20;

// (name, class of state) -> dtype, shape and SHA-256. The states of a model count as one: not every
// format says which of them a tensor is.
using Records = std::map<std::pair<std::string, std::string>, std::string>;

Records RecordsOf(ConversionSource& source) {
  Records records;
  for (uint32_t i = 0; i < source.index().tensor_states.size(); ++i) {
    const TensorState& state = source.index().tensor_states[i];
    const std::string kind = IsOptimizerState(state.state) ? state.state : "a tensor";
    records[{state.tensor, kind}] = RecordOf(source, source.index(), i);
  }
  return records;
}

struct Format {
  std::string name;
  uint64_t zero = 1;
  uint64_t ranks = 1;
  uint64_t tensor = 0;    // 0: not said
  uint64_t pipeline = 0;  // 0: not said
  uint64_t expert = 1;

  bool IsModelParallel() const { return tensor + pipeline > 0; }
  std::string Label() const {
    return name + " zero=" + std::to_string(zero) + " ranks=" + std::to_string(ranks) +
           (tensor > 0 ? " tp=" + std::to_string(tensor) : "") +
           (pipeline > 0 ? " pp=" + std::to_string(pipeline) : "") +
           (expert > 1 ? " ep=" + std::to_string(expert) : "");
  }
};

// Why a checkpoint cannot be cut for ranks of model parallelism.
const std::vector<std::string> kNotCut = {
    "nothing says how tensor-parallel ranks cut it", "tensor-parallel ranks do not divide",
    "a pipeline's tensors are called", "which layers use the tied module",
    "which layers use this tied module"};

const std::vector<Format>& Formats() {
  static const std::vector<Format> formats = {{"torch"},
                                              {"dcp"},
                                              {"ucp", 1},
                                              {"ucp", 3},
                                              {"deepspeed", 1, 1},
                                              {"deepspeed", 2, 3},
                                              {"deepspeed", 3, 1},
                                              {"deepspeed", 3, 4},
                                              {"fsdp", 1, 1},
                                              {"fsdp", 1, 3},
                                              {"deepspeed", 1, 2, 2},
                                              {"deepspeed", 2, 3, 2},
                                              {"deepspeed", 3, 3, 2},
                                              {"deepspeed", 1, 1, 4},
                                              {"deepspeed", 1, 3, 0, 1},
                                              {"deepspeed", 1, 2, 0, 2},
                                              {"deepspeed", 1, 2, 1, 3},
                                              {"deepspeed", 2, 4, 0, 0, 2},
                                              {"deepspeed", 1, 4, 0, 0, 4}};
  return formats;
}

DeepSpeedWriteOptions Options(const Format& format) {
  DeepSpeedWriteOptions options{.stage = format.zero, .dp = format.ranks, .ep = format.expert};
  if (format.tensor > 0) options.degrees.tensor = format.tensor;
  if (format.pipeline > 0) options.degrees.pipeline = format.pipeline;
  return options;
}

absl::Status Write(FileSystem& file_system, const Format& format, ConversionSource& source,
                   const std::string& out) {
  if (format.name == "dcp") {
    auto plan = PlanDcp(source.index(), {});
    if (!plan.ok()) return plan.status();
    return WriteDcp(file_system, out, source, *plan, nullptr);
  }
  if (format.zero == 3) {
    if (auto status = CheckWeightsAreMasters(source); !status.ok()) return status;
  }
  absl::StatusOr<TorchFilesPlan> plan =
      format.name == "torch"  ? PlanTorch(source.index(), kFile)
      : format.name == "fsdp" ? PlanFsdp(source.index(), format.ranks)
      : format.name == "ucp"  ? PlanUniversal(source.index(), {.stage = format.zero})
                              : PlanDeepSpeed(source, Options(format));
  if (!plan.ok()) return plan.status();
  uint64_t done = 0;
  auto status = WriteTorchFiles(file_system, out, source, *plan, [&](uint64_t now, uint64_t of) {
    EXPECT_EQ(of, plan->bytes);
    done = now;
    return true;
  });
  if (!status.ok()) return status;
  EXPECT_EQ(done, plan->bytes);
  uint64_t on_disk = 0;
  for (const auto& entry : fs::recursive_directory_iterator(out)) {
    if (entry.is_regular_file()) on_disk += entry.file_size();
  }
  EXPECT_EQ(on_disk, plan->bytes);
  return status;
}

class RoundTrip : public ::testing::Test {
 protected:
  // Writes the sample in all formats; gives those that refuse, with their reasons.
  std::map<std::string, std::string> Try(const std::string& path) {
    std::map<std::string, std::string> refused;
    auto opened = OpenCheckpoint(*file_system_, path);
    if (!opened.ok()) return refused;  // what its reader refuses has tests of its own
    SelectionRequest request;
    if (!opened->index.unreadable.empty()) request.drop = {kDropUnreadable};
    if (!opened->index.losses.empty()) request.drop.push_back(kDropLost);
    auto selection = Select(std::move(opened->index), request);
    EXPECT_THAT(selection, IsOk());
    ConversionSource source(*opened->folder, *std::move(selection));
    const Records expected = RecordsOf(source);
    for (const Format& format : Formats()) {
      SCOPED_TRACE(format.Label());
      const std::string out = directory_.Join("out");
      fs::remove_all(out);
      fs::create_directory(out);
      const absl::Status status = Write(*file_system_, format, source, out);
      if (absl::IsFailedPrecondition(status)) {
        EXPECT_TRUE(fs::is_empty(out));
        const std::string why(status.message());
        if (format.expert > 1 && why.find("the model has no experts") != std::string::npos)
          continue;
        const bool not_cut = format.IsModelParallel() &&
                             std::any_of(kNotCut.begin(), kNotCut.end(),
                                         [&](auto& r) { return why.find(r) != std::string::npos; });
        if (!not_cut) refused[format.Label()] = why;
        continue;
      }
      EXPECT_THAT(status, IsOk());
      if (!status.ok()) continue;
      auto back = OpenCheckpoint(*file_system_, format.name == "torch" ? out + "/" + kFile : out);
      EXPECT_THAT(back, IsOk());
      if (!back.ok()) continue;
      EXPECT_EQ(back->index.format, format.name);
      EXPECT_THAT(back->index.unreadable, testing::IsEmpty());
      EXPECT_THAT(back->index.losses, testing::IsEmpty());
      EXPECT_THAT(back->index.repairs, testing::IsEmpty());
      if (format.name != "fsdp" && format.name != "dcp" && source.index().has_step) {
        EXPECT_EQ(back->index.step, source.index().step);
      }
      ConversionSource again(*back->folder, std::move(back->index));
      Compare(format, expected, RecordsOf(again));
      ++written_;
      if (format.IsModelParallel()) ++cut_;
    }
    return refused;
  }

  void Compare(const Format& format, const Records& expected, Records found) {
    for (const auto& [key, record] : expected) {
      const auto at = found.find(key);
      // DeepSpeed's flat buffers have nothing of parameters without elements.
      if (at == found.end() && format.name == "deepspeed" && key.second != "a tensor" &&
          expected.at({key.first, "a tensor"}).find(kNothing) != std::string::npos) {
        continue;
      }
      if (at == found.end()) {
        ADD_FAILURE() << "missing: " << key.first << ", " << key.second;
        continue;
      }
      EXPECT_EQ(at->second, record) << key.first << ", " << key.second;
      found.erase(at);
    }
    for (const auto& [key, record] : found) {
      // DeepSpeed has masters of every optimized parameter; where there were none they are the
      // weights, in float32.
      const bool made =
          key.second == "fp32" && (format.name == "ucp" || format.name == "deepspeed");
      EXPECT_TRUE(made) << "not expected: " << key.first << ", " << key.second;
    }
  }

  const std::unique_ptr<FileSystem> file_system_ = NewPosixFileSystem();
  // In memory where there is such a place: thousands of files are made durable.
  TemporaryDirectory directory_{fs::is_directory(kMemory) ? kMemory : "."};
  int written_ = 0;
  int cut_ = 0;  // of those for ranks of model parallelism
};

// Every folder below `root` that has a `ckpt` and is small enough, with what refuses it.
std::vector<std::string> SamplesBelow(const std::string& root) {
  std::vector<std::string> samples;
  for (const auto& entry : fs::directory_iterator(root)) {
    const fs::path checkpoint = entry.path() / "ckpt";
    if (!fs::is_directory(checkpoint)) continue;
    uint64_t bytes = 0;
    for (const auto& file : fs::recursive_directory_iterator(checkpoint)) {
      if (file.is_regular_file()) bytes += file.file_size();
    }
    if (bytes <= kBytesMax) samples.push_back(checkpoint.string());
  }
  std::sort(samples.begin(), samples.end());
  return samples;
}

// Sample -> the begin of a format's label -> a part of the reason for which it refuses.
using Refusals = std::map<std::string, std::map<std::string, std::string>>;

const Refusals& RefusalsOfTheRepository() {
  static const Refusals refusals = {
      {"sharded/dcp_flat",
       {{"ucp", "no optimizer states"}, {"deepspeed zero=3", "no optimizer states"}}},
      // The names of the optimizer's parameters are not in these files.
      {"sharded/flat", {{"ucp", "--names"}, {"deepspeed", "--names"}, {"fsdp", "--names"}}},
      {"sharded/rank_files_strided",
       {{"ucp", "--names"}, {"deepspeed", "--names"}, {"fsdp", "--names"}}},
  };
  return refusals;
}

TEST_F(RoundTrip, OfTheSamplesOfTheRepository) {
  const std::string data = std::string(HOLDFAST_SOURCE_DIR) + "/tests/data/";
  size_t samples = 0;
  for (const std::string family : {"deepspeed", "sharded"}) {
    for (const std::string& sample : SamplesBelow(data + family)) {
      const std::string name = family + "/" + fs::path(sample).parent_path().filename().string();
      SCOPED_TRACE(name);
      ++samples;
      const auto table = RefusalsOfTheRepository().find(name);
      std::map<std::string, std::string> expected;
      if (table != RefusalsOfTheRepository().end()) expected = table->second;
      std::set<std::string> met;
      for (const auto& [format, reason] : Try(sample)) {
        const auto entry = std::find_if(
            expected.begin(), expected.end(),
            [label = format](const auto& each) { return label.starts_with(each.first); });
        ASSERT_NE(entry, expected.end()) << format << ": " << reason;
        EXPECT_THAT(reason, testing::HasSubstr(entry->second));
        met.insert(entry->first);
      }
      EXPECT_EQ(met.size(), expected.size());
    }
  }
  EXPECT_GE(samples, 14u);
  EXPECT_GE(written_, 100);
  EXPECT_GE(cut_, 3);
}

TEST_F(RoundTrip, OfWhatLiesBesideTheRepository) {
  const std::string shared = HOLDFAST_TEST_SHARED "/fixtures/";
  if (!fs::exists(shared)) GTEST_SKIP() << shared << " is not there";
  const std::vector<std::string> reasons = {
      "--names FILE",              // the optimizer's names are not in the files
      "has no optimizer states",   // weights alone
      "Muon",                      // DeepSpeed's momentum of whole parameters
      "experts of DeepSpeed's",    // files of their own, of stages 1 and 2
      "FSDP2 shards dimension 0",  // a parameter without dimensions
  };
  for (const std::string family : {"deepspeed", "ucp", "dcp", "fsdp", "hf"}) {
    for (const std::string& sample : SamplesBelow(shared + family)) {
      SCOPED_TRACE(sample);
      for (const auto& [format, reason] : Try(sample)) {
        const bool known = std::any_of(
            reasons.begin(), reasons.end(),
            [text = reason](const auto& r) { return text.find(r) != std::string::npos; });
        EXPECT_TRUE(known) << format << ": " << reason;
      }
    }
  }
  EXPECT_GE(written_, 400);
  EXPECT_GE(cut_, 14);
}

}  // namespace
}  // namespace holdfast::converter
