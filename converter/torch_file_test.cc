// Torch files built here, value by value: what the tree says, and every check of tensors and
// containers. Files that torch wrote are in torch_fixtures_test.cc.
#include "converter/torch_file.h"

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/pickle_writer.h"
#include "converter/test_zip.h"
#include "converter/torch_index.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace holdfast::converter {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Kind = TorchValue::Kind;

// Sixteen bytes: 0, 1, 2, 3 as float32.
const std::string kData("\0\0\0\0\0\0\x80\x3f\0\0\0\x40\0\0\x40\x40", 16);

struct Tensor {
  std::string storage = "FloatStorage";
  std::string key = "0";
  int64_t count = 4;
  int64_t offset = 0;
  std::vector<int64_t> size = {2, 2};
  std::vector<int64_t> strides = {2, 1};
  std::string flag = {};   // a key of the metadata
  std::string dtype = {};  // then _rebuild_tensor_v3
};

void Ints(PickleWriter& writer, const std::vector<int64_t>& values) {
  writer.Mark();
  for (const int64_t value : values) writer.Int(value);
  writer.Tuple();
}

void Write(PickleWriter& writer, const Tensor& tensor) {
  writer.Global("torch._utils", tensor.dtype.empty() ? "_rebuild_tensor_v2" : "_rebuild_tensor_v3");
  writer.Mark();
  writer.Mark();
  writer.String("storage");
  writer.Global(tensor.storage == "UntypedStorage" ? "torch.storage" : "torch", tensor.storage);
  writer.String(tensor.key);
  writer.String("cpu");
  writer.Int(tensor.count);
  writer.Tuple();
  writer.PersistentId();
  writer.Int(tensor.offset);
  Ints(writer, tensor.size);
  Ints(writer, tensor.strides);
  writer.Bool(true);
  writer.Global("collections", "OrderedDict");
  writer.Tuple(0);
  writer.Reduce();
  if (!tensor.dtype.empty()) writer.Global("torch", tensor.dtype);
  if (!tensor.flag.empty()) {
    writer.EmptyDict();
    writer.Mark();
    writer.String(tensor.flag);
    writer.Bool(true);
    writer.SetItems();
  }
  writer.Tuple();
  writer.Reduce();
}

std::string Archive(const std::string& pickle, const std::string& byte_order = "little") {
  TestZip zip;
  zip.entries = {{.name = "x/data.pkl", .data = pickle},
                 {.name = "x/byteorder", .data = byte_order},
                 {.name = "x/data/0", .data = kData},
                 {.name = "x/version", .data = "3\n"}};
  return zip.Bytes();
}

absl::StatusOr<std::unique_ptr<TorchFile>> Open(const std::string& bytes) {
  return TorchFile::Open(MemorySource("x.pt", bytes));
}
absl::StatusOr<std::unique_ptr<TorchFile>> OpenValue(
    const std::function<void(PickleWriter&)>& write) {
  PickleWriter writer;
  write(writer);
  return Open(Archive(std::move(writer).Finish()));
}
absl::StatusOr<std::unique_ptr<TorchFile>> OpenTensor(const Tensor& tensor) {
  return OpenValue([&](PickleWriter& writer) { Write(writer, tensor); });
}

TEST(TorchFile, ATensorKnowsWhereItsBytesLie) {
  const auto file = OpenTensor({.offset = 1, .size = {3}, .strides = {1}});
  ASSERT_TRUE(file.ok()) << file.status().ToString();
  const TorchTensor& tensor = **(*file)->root().Tensor();
  EXPECT_EQ(tensor.dtype, Dtype::kFloat32);
  EXPECT_THAT(tensor.shape, ElementsAre(3));
  EXPECT_EQ(tensor.offset, 1u);
  EXPECT_TRUE(tensor.requires_grad);
  EXPECT_FALSE(tensor.parameter);
  EXPECT_TRUE(tensor.IsContiguous());
  const TorchStorage& storage = (*file)->storages()[tensor.storage];
  EXPECT_EQ(storage.bytes, 16u);
  PickleWriter writer;
  Write(writer, {.offset = 1, .size = {3}, .strides = {1}});
  EXPECT_EQ(Archive(std::move(writer).Finish()).substr(storage.offset, 16), kData);
  EXPECT_FALSE((**(*OpenTensor({.strides = {1, 2}}))->root().Tensor()).IsContiguous());
  EXPECT_EQ((**(*OpenTensor({.size = {0, 5}}))->root().Tensor()).ElementCount(), 0u);
}

// Each of these reaches further than the storage, by an element, a byte or by wrapping around.
TEST(TorchFile, ATensorMustLieInItsStorage) {
  const int64_t large = int64_t{1} << 62;
  const std::vector<Tensor> kBad = {
      {.offset = 1},
      {.strides = {3, 1}},
      {.strides = {large, 1}},
      {.strides = {INT64_MAX, INT64_MAX}},
      {.offset = INT64_MAX},
      {.offset = INT64_MAX, .size = {1}, .strides = {1}},
      {.offset = large, .size = {3, 3}, .strides = {large, large}},
      {.size = {5}, .strides = {1}},
      {.size = {int64_t{1} << 32, int64_t{1} << 32}, .strides = {0, 0}},
      {.size = {int64_t{1} << 40, int64_t{1} << 40}, .strides = {0, 0}},
      {.size = {INT64_MAX}, .strides = {1}},
      {.size = {-2, 2}},
      {.strides = {2, -1}},
      {.offset = -1},
      {.size = {4}, .strides = {2, 1}},
      {.count = 5},
      {.count = 3},
      {.count = -1},
      {.count = (int64_t{1} << 62) + 1},
      {.storage = "LongStorage", .count = 4},
      {.key = "1"},
      {.key = "../data.pkl"},
      {.key = ""},
      {.storage = "UntypedStorage", .count = 16},
      {.storage = "UntypedStorage", .count = 16, .size = {3}, .strides = {1}, .dtype = "uint64"},
      {.storage = "QInt8Storage", .count = 16},
      {.flag = "conj"},
      {.flag = "rotate"},
      {.size = std::vector<int64_t>(65, 1), .strides = std::vector<int64_t>(65, 1)},
  };
  for (const Tensor& tensor : kBad) {
    const auto file = OpenTensor(tensor);
    ASSERT_FALSE(file.ok()) << &tensor - kBad.data();
    EXPECT_TRUE(file.status().code() == absl::StatusCode::kDataLoss ||
                file.status().code() == absl::StatusCode::kUnimplemented)
        << file.status().ToString();
    EXPECT_THAT(file.status().ToString(), HasSubstr("x.pt: "));
  }
  const auto unknown = OpenTensor({.storage = "QuaternionStorage"});
  EXPECT_EQ(unknown.status().code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(unknown.status().ToString(), HasSubstr("torch.QuaternionStorage"));
}

TEST(TorchFile, DtypesFlagsAndViewsAreKept) {
  const auto wide = OpenTensor(
      {.storage = "UntypedStorage", .count = 16, .size = {2}, .strides = {1}, .dtype = "uint64"});
  ASSERT_TRUE(wide.ok()) << wide.status().ToString();
  EXPECT_EQ((**(*wide)->root().Tensor()).dtype, Dtype::kUint64);
  const auto conjugated = OpenTensor(
      {.storage = "ComplexFloatStorage", .count = 2, .size = {2}, .strides = {1}, .flag = "conj"});
  ASSERT_TRUE(conjugated.ok()) << conjugated.status().ToString();
  EXPECT_TRUE((**(*conjugated)->root().Tensor()).conj);
  EXPECT_TRUE(OpenTensor({.size = {1 << 20, 1 << 20}, .strides = {0, 0}}).ok());
  EXPECT_TRUE(OpenTensor({.offset = 4, .size = {0}, .strides = {1}}).ok());
}

TEST(TorchFile, ParametersAndAttributesAreTensors) {
  const auto file = OpenValue([](PickleWriter& writer) {
    writer.Global("torch._utils", "_rebuild_parameter");
    Write(writer, {});
    writer.Bool(false);
    writer.None();
    writer.Tuple(3);
    writer.Reduce();
  });
  ASSERT_TRUE(file.ok()) << file.status().ToString();
  EXPECT_TRUE((*file)->root().IsParameter());
  EXPECT_FALSE((**(*file)->root().Tensor()).requires_grad);
}

TEST(TorchFile, TheTreeOfPythonsContainers) {
  const auto file = OpenValue([](PickleWriter& writer) {
    writer.EmptyDict();
    writer.Mark();
    writer.String("ordered");
    writer.Global("collections", "OrderedDict");
    writer.Tuple(0);
    writer.Reduce();
    writer.Mark();
    writer.String("k");
    writer.Int(5);
    writer.SetItems();
    writer.String("size");
    writer.Global("torch", "Size");
    Ints(writer, {7, 8});
    writer.Tuple(1);
    writer.Reduce();
    writer.String("bytes");
    writer.Bytes("\xff\x01");
    writer.String("dtype");
    writer.Global("torch", "bfloat16");
    writer.String("namespace");
    writer.Global("argparse", "Namespace");
    writer.Tuple(0);
    writer.NewObject();
    writer.EmptyDict();
    writer.Mark();
    writer.String("lr");
    writer.Float(0.5);
    writer.SetItems();
    writer.Build();
    writer.String("enum");
    writer.Global("signal", "Signals");
    writer.Int(15);
    writer.Tuple(1);
    writer.Reduce();
    writer.String("named");
    writer.Global("__builtin__", "getattr");
    writer.Global("m", "Colour");
    writer.String("RED");
    writer.Tuple(2);
    writer.Reduce();
    writer.String("bad");
    writer.Global("os", "system");
    writer.String("x");
    writer.Tuple(1);
    writer.Reduce();
    writer.SetItems();
  });
  ASSERT_TRUE(file.ok()) << file.status().ToString();
  const TorchValue root = (*file)->root();
  EXPECT_EQ(root.Find("ordered").kind(), Kind::kDict);
  EXPECT_EQ(*root.Find("ordered").Find("k").Int64(), 5);
  EXPECT_THAT(*root.Find("size").Uint64s(), ElementsAre(7, 8));
  EXPECT_EQ(*root.Find("bytes").Bytes(), "\xff\x01");
  EXPECT_EQ(*root.Find("dtype").ElementType(), Dtype::kBfloat16);
  const TorchValue space = root.Find("namespace");
  EXPECT_EQ(space.ClassName(), "argparse.Namespace");
  EXPECT_TRUE(space.IsObject("argparse", "Namespace"));
  EXPECT_EQ(*space.Find("lr").Double(), 0.5);
  EXPECT_EQ(*root.Find("enum").EnumMember().Int64(), 15);
  EXPECT_EQ(*root.Find("named").EnumMember().String(), "RED");
  EXPECT_TRUE(root.Find("named").IsObject("m", "Colour"));
  // Content that is needed and not understood: exit code 6, and whose it is.
  const absl::Status needed = root.Find("bad").Uint64s().status();
  EXPECT_EQ(needed.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(needed.ToString(), HasSubstr("os.system"));
  EXPECT_EQ(root.Find("size").Bool().status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(root.Get("absent").status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ((*file)->OpaqueClasses().at("os.system"), 1u);
  EXPECT_EQ(TorchJson(root.Find("namespace"), 100), R"({"lr":0.5})");
  EXPECT_EQ(TorchJson(root.Find("ordered"), 100), R"({"k":5})");
  EXPECT_LE(TorchJson(root, 50).size(), 200u);
}

TEST(TorchFile, ContainersThatAreNotOnesOfTorchSaveAreNamed) {
  PickleWriter writer;
  Write(writer, {});
  const std::string pickle = std::move(writer).Finish();
  EXPECT_TRUE(Open("20 bytes before it..." + Archive(pickle)).ok());
  EXPECT_TRUE((*Open(Archive(pickle, "big")))->big_endian());
  EXPECT_THAT(Open(Archive(pickle, "middle")).status().ToString(), HasSubstr("little or big"));
  TestZip zip;
  zip.entries = {{.name = "word/document.xml", .data = "<a/>"}};
  EXPECT_THAT(Open(zip.Bytes()).status().ToString(), HasSubstr("data.pkl"));
  zip.entries = {{.name = "x/constants.pkl", .data = ""}, {.name = "x/data.pkl", .data = ""}};
  EXPECT_THAT(Open(zip.Bytes()).status().ToString(), HasSubstr("TorchScript"));
  zip.entries = {{.name = "x/archive_format", .data = "pt2"}};
  EXPECT_THAT(Open(zip.Bytes()).status().ToString(), HasSubstr("torch.export"));
  zip.entries = {{.name = "x/data.pkl", .data = pickle}, {.name = "y/data.pkl", .data = pickle}};
  EXPECT_THAT(Open(zip.Bytes()).status().ToString(), HasSubstr("two archives"));
  std::string tar(512, '\0');
  tar.replace(257, 5, "ustar");
  EXPECT_THAT(Open(tar).status().ToString(), HasSubstr("torch 0.1"));
  EXPECT_FALSE(Open("").ok());
  EXPECT_FALSE(Open("hello world\n").ok());
}

TEST(TorchFile, ABrokenPickleIsABrokenFile) {
  EXPECT_EQ(Open(Archive("\x80\x02N")).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(Open(Archive("\x80\x02\x97.")).status().code(), absl::StatusCode::kPermissionDenied);
  const auto bare = TorchFile::OpenPickle("m", "\x80\x04]K\x07\x61.");
  ASSERT_TRUE(bare.ok());
  EXPECT_EQ(*(*bare)->root()[0].Int64(), 7);
}

}  // namespace
}  // namespace holdfast::converter
