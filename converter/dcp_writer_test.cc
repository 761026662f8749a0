// Samples that torch wrote, written as DCP and read back: every tensor is the same, bit for bit.
// That torch itself loads what is written is in tests/interop.
#include "converter/dcp_writer.h"

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/zip_crc32.h"
#include "converter/byte_source.h"
#include "converter/dcp_reader.h"
#include "converter/foreign_testing.h"
#include "converter/format_reader.h"
#include "converter/tensor_archive.h"
#include "converter/torch_file.h"
#include "converter/whole_tensor_reader.h"
#include "converter/zip_reader.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "io/posix_file_system.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast::converter {
namespace {

using absl::StatusCode;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class DcpWriter : public ::testing::Test {
 protected:
  Opened Open(const std::string& path) {
    auto opened = OpenCheckpoint(*file_system_, path);
    EXPECT_THAT(opened, IsOk());
    return *std::move(opened);
  }

  Opened Sample(const std::string& name) {
    return Open(std::string(HOLDFAST_SOURCE_DIR) + "/tests/data/sharded/" + name + "/ckpt");
  }

  // Name, state, dtype, shape and SHA-256 of every tensor state.
  std::vector<std::string> Records(const Opened& opened) {
    std::vector<std::string> records;
    WholeTensorReader reader(*opened.folder, opened.index);
    for (uint32_t i = 0; i < opened.index.tensor_states.size(); ++i) {
      const TensorState& state = opened.index.tensor_states[i];
      records.push_back(Describe(state) + RecordOf(reader, opened.index, i));
    }
    std::sort(records.begin(), records.end());
    return records;
  }

  DcpPlan Write(const Opened& source, const DcpWriteOptions& options, const std::string& out) {
    std::filesystem::create_directory(out);
    ConversionSource input(*source.folder, source.index);
    auto plan = PlanDcp(source.index, options);
    EXPECT_THAT(plan, IsOk());
    uint64_t done = 0;
    uint64_t total = 0;
    EXPECT_THAT(WriteDcp(*file_system_, out, input, *plan,
                         [&](uint64_t bytes, uint64_t of) {
                           done = bytes;
                           total = of;
                           return true;
                         }),
                IsOk());
    EXPECT_EQ(done, plan->bytes);
    EXPECT_EQ(total, plan->bytes);
    return *std::move(plan);
  }

  const std::unique_ptr<FileSystem> file_system_ = NewPosixFileSystem();
  TemporaryDirectory directory_;
};

TEST_F(DcpWriter, WhatIsWrittenReadsTheSame) {
  for (const std::string name : {"dcp_strided", "dcp_rank_metadata"}) {
    SCOPED_TRACE(name);
    const Opened source = Sample(name);
    const std::string out = directory_.Join(name);
    EXPECT_THAT(Write(source, {}, out).left_out, IsEmpty());
    const Opened written = Open(out);
    EXPECT_EQ(written.index.format, "dcp");
    EXPECT_EQ(Records(written), Records(source));
    // Objects of DCP are kept, byte for byte.
    ASSERT_EQ(written.index.blobs.size(), source.index.blobs.size());
    EXPECT_GT(written.index.blobs.size(), 0u);
    EXPECT_EQ(written.index.step, source.index.step);
    for (size_t i = 0; i < written.index.scalars.size(); ++i) {
      EXPECT_THAT(source.index.scalars, Contains(written.index.scalars[i]));
    }
  }
}

TEST_F(DcpWriter, FilesAreCut) {
  const Opened source = Sample("dcp_strided");
  const std::string out = directory_.Join("cut");
  const DcpPlan plan = Write(source, {.file_bytes = 4000}, out);
  EXPECT_GT(plan.files.size(), 3u);
  EXPECT_EQ(Records(Open(out)), Records(source));
}

TEST_F(DcpWriter, RankFilesBecomeDcp) {
  const Opened source = Sample("rank_files_strided");
  const std::string out = directory_.Join("out");
  EXPECT_THAT(Write(source, {}, out).left_out, ElementsAre(HasSubstr("param_groups")));
  EXPECT_EQ(Records(Open(out)).size(), Records(source).size());
}

TEST_F(DcpWriter, TwoTensorsWithOneKeyAreRefused) {
  ForeignIndex index;
  index.AddState({"w", "param", Dtype::kFloat32, {}});
  index.AddState({"w", "buffer", Dtype::kFloat32, {}});
  EXPECT_THAT(PlanDcp(index, {}), StatusIs(StatusCode::kFailedPrecondition, HasSubstr("model.w")));
}

TEST_F(DcpWriter, StopsWhereItIsAskedTo) {
  const Opened source = Sample("dcp_strided");
  ASSERT_OK_AND_ASSIGN(const DcpPlan plan, PlanDcp(source.index, {}));
  ConversionSource input(*source.folder, source.index);
  EXPECT_THAT(WriteDcp(*file_system_, directory_.path(), input, plan,
                       [](uint64_t done, uint64_t) { return done < 5000; }),
              StatusIs(StatusCode::kCancelled));
  EXPECT_FALSE(std::filesystem::exists(directory_.Join(".metadata")));
}

// Archives of every dtype and of odd shapes, read by the strict reader of torch files.
TEST(TensorArchive, IsATorchFileOfThisTensor) {
  for (const std::string_view dtype_name : DtypeNames()) {
    const Dtype dtype = *DtypeFromName(dtype_name);
    for (const std::vector<uint64_t>& shape :
         std::vector<std::vector<uint64_t>>{{}, {5}, {3, 0, 2}, {2, 3, 4}, {70000}}) {
      const TensorArchive archive(dtype, shape);
      const std::string data(archive.data_bytes(), '\x01');
      const uint32_t crc32 = ExtendZipCrc32(0, std::as_bytes(std::span(data)));
      const std::string bytes = archive.head() + data + archive.Tail(crc32);
      ASSERT_EQ(bytes.size(), archive.bytes());
      const MemorySource source("archive", bytes);
      ASSERT_OK_AND_ASSIGN(const ZipDirectory zip, ZipDirectory::Read(source));
      ASSERT_OK_AND_ASSIGN(const std::unique_ptr<TorchFile> torch, TorchFile::Open(source));
      ASSERT_OK_AND_ASSIGN(const TorchTensor* const tensor, torch->root().Tensor());
      EXPECT_EQ(tensor->dtype, dtype) << dtype_name;
      EXPECT_EQ(tensor->shape, shape);
      EXPECT_TRUE(tensor->IsContiguous());
      const TorchStorage& storage = torch->storages()[tensor->storage];
      EXPECT_EQ(storage.offset, archive.head().size());
      EXPECT_EQ(storage.offset % 64, 0u);
      EXPECT_EQ(storage.bytes, data.size());
      EXPECT_THAT(CheckZipCrc32(source, *zip.Find("archive/data/0")), IsOk());
    }
  }
}

}  // namespace
}  // namespace holdfast::converter
