// Every file of ../shared/fixtures/torch against the truth that its producer wrote down: name,
// state, dtype, shape and sha256 of every whole tensor.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/json_reader.h"
#include "base/sha256.h"
#include "converter/foreign_folder.h"
#include "converter/format_reader.h"
#include "converter/torch_reader.h"
#include "converter/whole_tensor_reader.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "io/posix_file_system.h"

namespace holdfast::converter {
namespace {

const std::string kFixtures = std::string(HOLDFAST_TEST_SHARED) + "/fixtures/torch/";

struct Record {
  std::string dtype;
  std::vector<uint64_t> shape;
  std::string sha256;
  friend bool operator==(const Record&, const Record&) = default;
};
void PrintTo(const Record& record, std::ostream* out) {
  *out << record.dtype << " " << testing::PrintToString(record.shape) << " " << record.sha256;
}
// By name and state.
using Records = std::map<std::pair<std::string, std::string>, Record>;

struct FileRead {
  Records records;
  ForeignIndex index;
  absl::Status status;
};

FileRead ReadFixture(const std::string& path) {
  FileRead read;
  const std::unique_ptr<FileSystem> file_system = NewPosixFileSystem();
  const auto folder = ForeignFolder::Open(*file_system, path);
  EXPECT_TRUE(folder.ok()) << folder.status().ToString();
  const FormatReader reader = {"torch", RecognizesTorch, ReadTorch};
  const auto recognized = RecognizesTorch(**folder);
  EXPECT_TRUE(recognized.ok() && *recognized) << path;
  auto index = ReadFormat(reader, **folder, {});
  read.status = index.status();
  if (!index.ok()) return read;
  read.index = *std::move(index);
  WholeTensorReader tensors(**folder, read.index);
  for (uint32_t i = 0; i < read.index.tensor_states.size(); ++i) {
    const TensorState& state = read.index.tensor_states[i];
    Sha256 sha256;
    const absl::Status status = tensors.Read(i, [&sha256](std::span<const std::byte> bytes) {
      sha256.Add(bytes);
      return absl::OkStatus();
    });
    EXPECT_TRUE(status.ok()) << status.ToString();
    read.records[{state.tensor, state.state}] = {std::string(DtypeName(state.dtype)), state.shape,
                                                 Hex(sha256.Finish())};
  }
  return read;
}

std::string ReadWhole(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string TextOf(const JsonValue& object, std::string_view key) {
  return std::string(*object.Get(key)->String());
}
Record RecordOf(const JsonValue& tensor) {
  Record record{TextOf(tensor, "dtype"), {}, TextOf(tensor, "sha256")};
  const JsonValue shape = *tensor.Get("shape");
  for (size_t i = 0; i < *shape.ArraySize(); ++i) record.shape.push_back(*shape[i].Uint64());
  return record;
}

// What torch wrote for this test (tests/data/torch/make.py): exactly these tensors.
TEST(TorchSamples, AreReadAsTheyWereInMemory) {
  const std::string samples = std::string(HOLDFAST_SOURCE_DIR) + "/tests/data/torch/";
  const auto table = JsonDocument::Parse(ReadWhole(samples + "expected.json"));
  ASSERT_TRUE(table.ok()) << table.status().ToString();
  const std::vector<std::string_view> files = *(*table)->root().Keys();
  EXPECT_EQ(files.size(), 4u);
  for (const std::string_view file : files) {
    SCOPED_TRACE(file);
    const FileRead read = ReadFixture(samples + std::string(file));
    ASSERT_TRUE(read.status.ok()) << read.status.ToString();
    const JsonValue rows = *(*table)->root().Get(file);
    Records expected;
    for (size_t i = 0; i < *rows.ArraySize(); ++i) {
      expected[{TextOf(rows[i], "name"), TextOf(rows[i], "state")}] = RecordOf(rows[i]);
    }
    EXPECT_EQ(read.records, expected);
    if (file == "training.pt") {
      EXPECT_EQ(read.index.step, 2u);
      EXPECT_EQ(read.index.aliases.size(), 1u);
    }
  }
}

// A case's truth; each record with where it stands in the file.
struct Truth {
  std::unique_ptr<JsonDocument> document;
  JsonValue tensors() const { return *document->root().Get("tensors"); }
};
Truth TruthOf(const std::string& name) {
  auto document = JsonDocument::Parse(ReadWhole(kFixtures + name + "/expected.json"));
  EXPECT_TRUE(document.ok()) << document.status().ToString();
  return {*std::move(document)};
}

class TorchFixtures : public testing::Test {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(kFixtures)) GTEST_SKIP() << "no " << kFixtures;
  }
};

// All tensors of the truth, under their names and states, and no others but those that the truth
// lists elsewhere.
void ExpectAll(const std::string& name, const std::string& file, const std::string& only_in = "") {
  SCOPED_TRACE(name + "/" + file);
  const FileRead read = ReadFixture(kFixtures + name + "/ckpt/" + file);
  ASSERT_TRUE(read.status.ok()) << read.status.ToString();
  const Truth truth = TruthOf(name);
  std::map<std::pair<std::string, std::string>, int> seen;
  size_t compared = 0;
  for (size_t i = 0; i < *truth.tensors().ArraySize(); ++i) {
    const JsonValue tensor = truth.tensors()[i];
    const JsonValue path = tensor.Find("path");
    const bool of_a_file = path.present() && path[0].type() == JsonValue::Type::kString &&
                           std::string(*path[0].String()).ends_with(".pt");
    if (of_a_file != !only_in.empty() || (of_a_file && *path[0].String() != only_in)) continue;
    const std::string tensor_name = TextOf(tensor, "name");
    const std::string state = TextOf(tensor, "state");
    // Of two with one joined name, and of keys that are neither text nor integers, the names differ
    // from the truth's description; the bytes do not.
    const auto found = read.records.find({tensor_name, state});
    const bool twice = ++seen[{tensor_name, state}] > 1;
    if (twice || found == read.records.end()) {
      const bool there =
          std::any_of(read.records.begin(), read.records.end(), [&](const auto& record) {
            return record.first.second == state && record.second == RecordOf(tensor);
          });
      EXPECT_TRUE(there) << tensor_name << " " << state;
      EXPECT_TRUE(tensor_name.find('{') != std::string::npos || twice)
          << tensor_name << " " << state;
    } else {
      EXPECT_EQ(found->second, RecordOf(tensor)) << tensor_name << " " << state;
    }
    ++compared;
  }
  EXPECT_EQ(read.records.size(), compared);
  EXPECT_GT(compared, 0u);
}

TEST_F(TorchFixtures, DtypesViewsFlagsAndNames) { ExpectAll("zip_dtypes", "everything.pt"); }

TEST_F(TorchFixtures, BigEndian) { ExpectAll("big_endian", "big.pt"); }

TEST_F(TorchFixtures, EveryProtocol) {
  for (const char* file : {"p1.pt", "p2.pt", "p3.pt", "p4.pt", "p5.pt"}) {
    ExpectAll("pickle_protocols", file);
  }
}

TEST_F(TorchFixtures, BeforeTorch16) {
  ExpectAll("legacy_pre16", "legacy_p2.pt");
  ExpectAll("legacy_pre16", "new_dtypes.pt", "new_dtypes.pt");
  const FileRead bare = ReadFixture(kFixtures + "legacy_pre16/ckpt/bare_tensor.pt");
  ASSERT_EQ(bare.records.size(), 1u);
  const Truth truth = TruthOf("legacy_pre16");
  for (size_t i = 0; i < *truth.tensors().ArraySize(); ++i) {
    const JsonValue tensor = truth.tensors()[i];
    if (TextOf(tensor, "name") != "transposed") continue;
    EXPECT_EQ((bare.records.at({"", "tensor"})), RecordOf(tensor));
  }
  // The module has a buffer that is never saved with it; the truth is the state dict.
  FileRead module = ReadFixture(kFixtures + "legacy_pre16/ckpt/module.pt");
  EXPECT_EQ(module.records.erase({"scratch", "other"}), 1u);
  size_t compared = 0;
  for (size_t i = 0; i < *truth.tensors().ArraySize(); ++i) {
    const JsonValue tensor = truth.tensors()[i];
    const JsonValue path = tensor.Find("path");
    if (*path[0].String() != "module.pt") continue;
    EXPECT_EQ((module.records.at({TextOf(tensor, "name"), TextOf(tensor, "state")})),
              RecordOf(tensor));
    ++compared;
  }
  EXPECT_EQ(compared, module.records.size());
  EXPECT_GT(compared, 0u);
}

TEST_F(TorchFixtures, EveryOptionOfTheWriter) {
  const Truth truth = TruthOf("writer_options");
  const JsonValue files = *truth.document->root().Get("layout")->Get("files");
  size_t read_files = 0;
  const std::vector<std::string_view> names = *files.Keys();
  for (const std::string_view file : names) {
    const std::string values = TextOf(*files.Get(file), "values");
    if (values == "equal") {
      ExpectAll("writer_options", std::string(file));
    } else {  // data that were never written
      const FileRead read = ReadFixture(kFixtures + "writer_options/ckpt/" + std::string(file));
      ASSERT_TRUE(read.status.ok()) << read.status.ToString();
      EXPECT_THAT(read.index.notes, testing::Contains(testing::HasSubstr("never written")));
      EXPECT_EQ(read.records.size(), *truth.tensors().ArraySize());
    }
    ++read_files;
  }
  EXPECT_EQ(read_files, static_cast<size_t>(std::distance(
                            std::filesystem::directory_iterator(kFixtures + "writer_options/ckpt"),
                            std::filesystem::directory_iterator())));
}

// Weights by name; a buffer cannot be told from a parameter. Optimizer states by position, which
// the truth has as `id`.
void ExpectTraining(const std::string& name, const std::string& file) {
  SCOPED_TRACE(name + "/" + file);
  const FileRead read = ReadFixture(kFixtures + name + "/ckpt/" + file);
  ASSERT_TRUE(read.status.ok()) << read.status.ToString();
  const Truth truth = TruthOf(name);
  Records left = read.records;
  for (size_t i = 0; i < *truth.tensors().ArraySize(); ++i) {
    const JsonValue tensor = truth.tensors()[i];
    const JsonValue id = tensor.Find("id");
    const std::string state = id.present() ? TextOf(tensor, "state") : "param";
    const std::string tensor_name =
        id.present() ? std::to_string(*id.Uint64()) : TextOf(tensor, "name");
    const auto found = left.find({tensor_name, state});
    ASSERT_NE(found, left.end()) << tensor_name << " " << state;
    EXPECT_EQ(found->second, RecordOf(tensor)) << tensor_name << " " << state;
    left.erase(found);
    const JsonValue tied = tensor.Find("tied_with");
    if (!tied.present()) continue;
    const auto is_alias = [&](const Alias& alias) {
      const auto& states = read.index.tensor_states;
      const std::set<std::string> names = {states[alias.tensor_state].tensor,
                                           states[alias.of].tensor};
      return names == std::set<std::string>{tensor_name, std::string(*tied.String())};
    };
    EXPECT_TRUE(std::any_of(read.index.aliases.begin(), read.index.aliases.end(), is_alias))
        << tensor_name;
  }
  for (const auto& [key, record] : left) {
    EXPECT_TRUE(key.second == "rng" || key.second == "other") << key.first << " " << key.second;
  }
  EXPECT_EQ(read.index.step, *truth.document->root().Get("step")->Uint64());
}

TEST_F(TorchFixtures, TrainingState) {
  for (const auto& entry : std::filesystem::directory_iterator(kFixtures + "training_state/ckpt")) {
    ExpectTraining("training_state", entry.path().filename().string());
  }
}

TEST_F(TorchFixtures, Lightning) {
  for (const auto& entry : std::filesystem::directory_iterator(kFixtures + "lightning/ckpt")) {
    ExpectTraining("lightning", entry.path().filename().string());
  }
}

// The same weights, wrapped in every way that people have.
TEST_F(TorchFixtures, Conventions) {
  const Truth truth = TruthOf("conventions");
  std::map<std::string, Records> by_kind;
  for (size_t i = 0; i < *truth.tensors().ArraySize(); ++i) {
    const JsonValue tensor = truth.tensors()[i];
    const std::string state = TextOf(tensor, "state");
    const JsonValue id = tensor.Find("id");
    const std::string kind = state == "ema" ? "ema" : id.present() ? "optimizer" : "weights";
    const std::string tensor_name =
        id.present() ? std::to_string(*id.Uint64()) : TextOf(tensor, "name");
    by_kind[kind][{tensor_name, state == "buffer" ? "param" : state}] = RecordOf(tensor);
  }
  const std::map<std::string, std::vector<std::string>> kHolds = {
      {"pytorch_model.bin", {"weights"}},
      {"tutorial.tar", {"weights", "optimizer"}},
      {"imagenet.pth.tar", {"weights", "optimizer"}},
      {"timm.pth", {"weights", "ema"}},
      {"nested.pt", {"weights"}}};
  for (const auto& [file, kinds] : kHolds) {
    SCOPED_TRACE(file);
    FileRead read = ReadFixture(kFixtures + "conventions/ckpt/" + file);
    ASSERT_TRUE(read.status.ok()) << read.status.ToString();
    Records expected;
    for (const std::string& kind : kinds) {
      expected.insert(by_kind[kind].begin(), by_kind[kind].end());
    }
    std::erase_if(read.records, [](const auto& record) { return record.first.second == "other"; });
    EXPECT_EQ(read.records, expected);
  }
  // A user's own dict of tensors has no word for what they are.
  for (const char* file : {"ddp.pt", "compiled.pt"}) {
    SCOPED_TRACE(file);
    const FileRead read = ReadFixture(kFixtures + "conventions/ckpt/" + std::string(file));
    ASSERT_EQ(read.records.size(), by_kind["weights"].size());
    for (const auto& [key, record] : by_kind["weights"]) {
      const std::string prefix = file == std::string("ddp.pt") ? "module." : "_orig_mod.";
      EXPECT_EQ((read.records.at({prefix + key.first, "tensor"})), record);
    }
  }
  const FileRead module = ReadFixture(kFixtures + "conventions/ckpt/whole_module.pt");
  for (const auto& [key, record] : by_kind["weights"]) {
    const std::string state = key.first == "running" ? "buffer" : "param";
    EXPECT_EQ((module.records.at({key.first, state})), record) << key.first;
  }
  const FileRead parameters = ReadFixture(kFixtures + "conventions/ckpt/dict_of_parameters.pt");
  for (const auto& [key, record] : parameters.records) {
    EXPECT_EQ(record, (by_kind["weights"].at({key.first, "param"}))) << key.first;
    EXPECT_EQ(key.second, "param");
  }
  EXPECT_EQ(parameters.records.size(), 4u);
  const FileRead list = ReadFixture(kFixtures + "conventions/ckpt/list.pt");
  EXPECT_EQ((list.records.at({"0", "tensor"})), (by_kind["weights"].at({"w1", "param"})));
  EXPECT_EQ((list.records.at({"1", "tensor"})), (by_kind["weights"].at({"b1", "param"})));
  const FileRead bare = ReadFixture(kFixtures + "conventions/ckpt/bare_tensor.pt");
  EXPECT_EQ((bare.records.at({"", "tensor"})), (by_kind["weights"].at({"w1", "param"})));
  const FileRead modules = ReadFixture(kFixtures + "conventions/ckpt/modules.pt");
  EXPECT_EQ((modules.records.at({"dec.0", "param"})), (by_kind["weights"].at({"w1", "param"})));
  EXPECT_TRUE(modules.records.contains({"enc.1.running_mean", "buffer"}));
  EXPECT_TRUE(modules.records.contains({"enc.0.weight", "param"}));
}

// Never a part for the whole: what has no plain numbers is named, and what stands beside it is
// read.
TEST_F(TorchFixtures, SpecialTensors) {
  const std::map<std::string, std::string> kReasons = {{"coo.pt", "torch.sparse_coo"},
                                                       {"coo_hybrid.pt", "torch.sparse_coo"},
                                                       {"coo_uncoalesced.pt", "sparse_coo"},
                                                       {"csr.pt", "torch.sparse_csr"},
                                                       {"csc.pt", "torch.sparse_csc"},
                                                       {"bsr.pt", "torch.sparse_bsr"},
                                                       {"bsc.pt", "torch.sparse_bsc"},
                                                       {"quantized_per_tensor.pt", "quantised"},
                                                       {"quantized_per_channel.pt", "quantised"},
                                                       {"qint32.pt", "quantised"},
                                                       {"nested_strided.pt", "nested"},
                                                       {"nested_jagged.pt", "nested"},
                                                       {"meta.pt", "meta"},
                                                       {"meta_parameter.pt", "meta"},
                                                       {"lazy_parameter.pt", "not initialised"},
                                                       {"generator.pt", ""},
                                                       {"dense.pt", ""}};
  const Truth truth = TruthOf("special_tensors");
  const Record plain = RecordOf(truth.tensors()[0]);
  size_t read_files = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(kFixtures + "special_tensors/ckpt")) {
    const std::string file = entry.path().filename().string();
    SCOPED_TRACE(file);
    const FileRead read = ReadFixture(entry.path().string());
    ASSERT_TRUE(read.status.ok()) << read.status.ToString();
    EXPECT_EQ((read.records.at({"plain", "tensor"})), plain);
    EXPECT_EQ(read.records.size(), file == "dense.pt" ? 2u : 1u);
    const std::string& reason = kReasons.at(file);
    ASSERT_EQ(read.index.unreadable.size(), reason.empty() ? 0u : 1u);
    if (!reason.empty()) {
      EXPECT_EQ(read.index.unreadable[0].name, "t");
      EXPECT_THAT(read.index.unreadable[0].reason, testing::HasSubstr(reason));
    }
    ++read_files;
  }
  EXPECT_EQ(read_files, kReasons.size());
}

TEST_F(TorchFixtures, ProgramsAreNamed) {
  size_t read_files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kFixtures + "torchscript/ckpt")) {
    const std::string file = entry.path().filename().string();
    SCOPED_TRACE(file);
    const FileRead read = ReadFixture(entry.path().string());
    EXPECT_EQ(read.status.code(), absl::StatusCode::kUnimplemented) << read.status.ToString();
    EXPECT_THAT(std::string(read.status.message()),
                testing::HasSubstr(file.ends_with(".pt2") ? "torch.export" : "TorchScript"));
    ++read_files;
  }
  EXPECT_GT(read_files, 1u);
}

// A rank's file alone: its plain tensors, and the names of what it has a part of.
TEST_F(TorchFixtures, OneRanksFileOfDTensors) {
  const FileRead read = ReadFixture(kFixtures + "dtensor_ranks/ckpt/rank0.pt");
  ASSERT_TRUE(read.status.ok()) << read.status.ToString();
  const Truth truth = TruthOf("dtensor_ranks");
  for (size_t i = 0; i < *truth.tensors().ArraySize(); ++i) {
    const JsonValue tensor = truth.tensors()[i];
    const std::string tensor_name = TextOf(tensor, "name");
    if (tensor_name == "local") {
      EXPECT_EQ((read.records.at({"local", "tensor"})), RecordOf(tensor));
    } else {
      EXPECT_TRUE(std::any_of(read.index.unreadable.begin(), read.index.unreadable.end(),
                              [&](const Unreadable& u) {
                                return u.name == tensor_name &&
                                       u.reason.find("DTensor") != std::string::npos;
                              }))
          << tensor_name;
    }
  }
}

}  // namespace
}  // namespace holdfast::converter
