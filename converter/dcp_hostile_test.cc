// DCP folders that lie: a sample that torch wrote (tests/data/sharded), its metadata changed in one
// thing. Whatever it says, the reader names it, and reads nothing outside of the folder.
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <string>

#include "converter/dcp_encoding.h"
#include "converter/dcp_metadata.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "converter/format_reader.h"
#include "converter/prove.h"
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
namespace fs = std::filesystem;

std::string ReadFile(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void WriteFile(const fs::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

class DcpHostile : public ::testing::Test {
 protected:
  void SetUp() override {
    fs::copy(fs::path(HOLDFAST_SOURCE_DIR) / "tests/data/sharded/dcp_strided/ckpt", path());
    auto metadata = ParseDcpMetadata(ReadFile(path() / ".metadata"), ".metadata");
    ASSERT_THAT(metadata, IsOk());
    metadata_ = *std::move(metadata);
  }

  fs::path path() const { return directory_.Join("ckpt"); }

  // The index after the metadata was changed so.
  absl::StatusOr<ForeignIndex> Read(const std::function<void(DcpMetadata&)>& change) {
    change(metadata_);
    WriteFile(path() / ".metadata", EncodeDcpMetadata(metadata_));
    auto folder = ForeignFolder::Open(*file_system_, path());
    if (!folder.ok()) return folder.status();
    folder_ = *std::move(folder);
    const auto reader = RecognizeFormat(*folder_);
    if (!reader.ok()) return reader.status();
    EXPECT_EQ((*reader)->name, "dcp");
    return ReadFormat(**reader, *folder_, {});
  }

  // What verify says of it.
  std::string Findings(const ForeignIndex& index) {
    const auto report = Prove(*folder_, index, {});
    EXPECT_THAT(report, IsOk());
    std::string text;
    for (const ProofFinding& finding : report->findings) text += finding.text + "\n";
    return text;
  }

  // The item of the first chunk with elements.
  DcpItem& FirstItem(DcpMetadata& metadata) {
    return metadata.items[metadata.chunks[metadata.tensors[0].chunks_begin].item];
  }

  const std::unique_ptr<FileSystem> file_system_ = NewPosixFileSystem();
  TemporaryDirectory directory_;
  std::unique_ptr<ForeignFolder> folder_;
  DcpMetadata metadata_;
};

TEST_F(DcpHostile, UnchangedItIsWhole) {
  ASSERT_OK_AND_ASSIGN(const ForeignIndex index, Read([](DcpMetadata&) {}));
  EXPECT_EQ(Findings(index), "");
  EXPECT_TRUE(index.has_step);
  EXPECT_EQ(index.step, 2u);
}

TEST_F(DcpHostile, PathsOutOfTheFolderAreRefused) {
  WriteFile(directory_.Join("outside"), ReadFile(path() / "__0_0.distcp"));
  for (const std::string& name : {std::string("../outside"), directory_.Join("outside"),
                                  std::string("x/../../outside"), std::string("/etc/passwd")}) {
    const auto index = Read([&](DcpMetadata& metadata) { metadata.files[0] = name; });
    EXPECT_THAT(index, StatusIs(StatusCode::kPermissionDenied, HasSubstr(".metadata"))) << name;
  }
}

TEST_F(DcpHostile, ALinkOutOfTheFolderIsRefused) {
  WriteFile(directory_.Join("outside"), ReadFile(path() / "__0_0.distcp"));
  fs::remove(path() / "__0_0.distcp");
  fs::create_symlink("../outside", path() / "__0_0.distcp");
  EXPECT_THAT(Read([](DcpMetadata&) {}),
              StatusIs(StatusCode::kPermissionDenied, HasSubstr("__0_0.distcp")));
}

TEST_F(DcpHostile, AMissingShardIsNamedAndTheRestIsRead) {
  fs::remove(path() / "__3_0.distcp");
  ASSERT_OK_AND_ASSIGN(const ForeignIndex index, Read([](DcpMetadata&) {}));
  EXPECT_THAT(index.notes, Contains(HasSubstr("__3_0.distcp")));
  const auto report = Prove(*folder_, index, {});
  ASSERT_THAT(report, IsOk());
  EXPECT_EQ(report->soundness, Soundness::kLost);
}

TEST_F(DcpHostile, AnObjectThatIsNotThereIsLost) {
  for (const bool has_item : {true, false}) {
    ASSERT_OK_AND_ASSIGN(
        const ForeignIndex index, Read([&](DcpMetadata& metadata) {
          ASSERT_FALSE(metadata.objects.empty());
          metadata.files.emplace_back("__9_0.distcp");
          metadata.items.push_back(metadata.items[metadata.objects[0].item]);
          metadata.items.back().file = static_cast<uint32_t>(metadata.files.size() - 1);
          metadata.objects[0].item =
              has_item ? static_cast<uint32_t>(metadata.items.size() - 1) : kNoItem;
        }));
    const std::string name = "the object " + metadata_.objects[0].key + ": ";
    EXPECT_THAT(index.losses, ElementsAre(HasSubstr(name + (has_item ? "the file \"__9_0.distcp\""
                                                                     : ".metadata does not say"))));
    const auto report = Prove(*folder_, index, {});
    ASSERT_THAT(report, IsOk());
    EXPECT_EQ(report->soundness, Soundness::kLost);
  }
}

TEST_F(DcpHostile, APartWithoutMetadataIsLost) {
  fs::create_directory(directory_.Join("whole"));
  fs::copy(path(), directory_.Join("whole/pytorch_model_fsdp_0"));
  fs::copy(path(), directory_.Join("whole/optimizer_0"));
  fs::remove(directory_.Join("whole/optimizer_0/.metadata"));
  fs::create_directory(directory_.Join("whole/optimizer_notes"));
  ASSERT_OK_AND_ASSIGN(folder_, ForeignFolder::Open(*file_system_, directory_.Join("whole")));
  ASSERT_OK_AND_ASSIGN(const FormatReader* const reader, RecognizeFormat(*folder_));
  ASSERT_NE(reader, nullptr);
  ASSERT_OK_AND_ASSIGN(const ForeignIndex index, ReadFormat(*reader, *folder_, {}));
  EXPECT_THAT(index.losses, ElementsAre(HasSubstr("optimizer_0: expected .metadata")));
}

TEST_F(DcpHostile, ItemsBehindTheEndAreNamed) {
  const auto expect_past_end = [&](uint64_t offset, uint64_t length) {
    const auto index = Read([&](DcpMetadata& metadata) {
      FirstItem(metadata).offset_bytes = offset;
      FirstItem(metadata).stored_bytes = length;
    });
    EXPECT_THAT(index, StatusIs(StatusCode::kDataLoss, HasSubstr("found the end at")));
  };
  expect_past_end(uint64_t{1} << 40, 1500);
  expect_past_end(0, INT64_MAX);
  expect_past_end(INT64_MAX, INT64_MAX);
}

TEST_F(DcpHostile, AnItemThatIsCutShortIsNoTorchFile) {
  const auto index = Read([&](DcpMetadata& metadata) { FirstItem(metadata).stored_bytes -= 1; });
  EXPECT_FALSE(index.ok());
  EXPECT_THAT(std::string(index.status().message()), HasSubstr(".distcp"));
}

// The tensor's storage is shorter than the box that it is said to fill.
TEST_F(DcpHostile, AnItemOfAnotherShapeIsDamage) {
  const auto index = Read([&](DcpMetadata& metadata) {
    for (DcpTensor& tensor : metadata.tensors) {
      if (tensor.key != "model.counts") continue;
      tensor.shape[0] = 500;
      metadata.numbers[metadata.chunks[tensor.chunks_begin].offsets + 1] = 500;
    }
  });
  EXPECT_THAT(index, StatusIs(StatusCode::kDataLoss,
                              HasSubstr("expected a part of shape [500], found [5]")));
}

TEST_F(DcpHostile, AnItemOfAnotherDtypeIsDamage) {
  const auto index = Read([](DcpMetadata& metadata) { metadata.tensors[0].dtype = "int16"; });
  EXPECT_THAT(index, StatusIs(StatusCode::kDataLoss, HasSubstr("expected dtype int16, found")));
}

TEST_F(DcpHostile, AHoleIsFound) {
  ASSERT_EQ(metadata_.tensors[0].key, "model.counts");
  ASSERT_OK_AND_ASSIGN(const ForeignIndex index, Read([](DcpMetadata& metadata) {
                         metadata.chunks[metadata.tensors[0].chunks_begin].item = kNoItem;
                       }));
  EXPECT_THAT(Findings(index), HasSubstr("expected elements [0, 5) of 5"));
}

// A chunk lies on half of another one: both are stored, which one counts nobody knows.
TEST_F(DcpHostile, AnOverlapIsFound) {
  ASSERT_OK_AND_ASSIGN(const ForeignIndex index, Read([](DcpMetadata& metadata) {
                         for (const DcpTensor& tensor : metadata.tensors) {
                           const size_t count = tensor.chunks_end - tensor.chunks_begin;
                           if (count < 2 || tensor.shape.empty()) continue;
                           uint64_t& offset =
                               metadata.numbers[metadata.chunks[tensor.chunks_begin + 1].offsets];
                           if (offset == 0) continue;
                           --offset;
                           return;
                         }
                         FAIL() << "no tensor of two chunks";
                       }));
  EXPECT_THAT(Findings(index), HasSubstr("overlap"));
}

TEST_F(DcpHostile, UnknownTransformsAreRefusedByName) {
  const auto index = Read([&](DcpMetadata& metadata) {
    metadata.transforms.push_back({"stream.rot13/1"});
    FirstItem(metadata).transforms = 1;
  });
  EXPECT_THAT(index, StatusIs(StatusCode::kUnimplemented, HasSubstr("stream.rot13/1")));
}

TEST_F(DcpHostile, WhatIsSaidToBeZstdAndIsNotIsDamage) {
  const auto index = Read([&](DcpMetadata& metadata) {
    metadata.transforms.push_back({"stream.zstd/1"});
    FirstItem(metadata).transforms = 1;
  });
  EXPECT_THAT(index, StatusIs(StatusCode::kDataLoss, HasSubstr("zstd")));
}

TEST_F(DcpHostile, AShapeOfMoreThanAllBytesIsDamage) {
  const auto index = Read([](DcpMetadata& metadata) {
    metadata.tensors[0].shape.assign(4, uint64_t{1} << 62);
    metadata.tensors[0].chunks_end = metadata.tensors[0].chunks_begin;
  });
  EXPECT_THAT(index, StatusIs(StatusCode::kDataLoss, HasSubstr("bytes")));
}

}  // namespace
}  // namespace holdfast::converter
