// Goal: a block that BlockReader gives out is the one that was committed; any other end names file,
// tensors and offset.
// Method: images with random contents on the simulated disk, every kind of damage to every block;
// on a real disk with threads, direct and through the page cache, more images than may be open.
#include "checkpoint/block_reader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/crc32c.h"
#include "format/checkpoint_names.h"
#include "io/posix_file_system.h"
#include "tests/support/sim_disk.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

constexpr uint64_t kBlock = 4096;
constexpr uint64_t kBlocks = 3;  // of an image

// Of each image: its first block is head, then lie tensor "a<rank>" over blocks 1 and 2 in part,
// and blob "b<rank>" in block 2.
struct Checkpoint {
  Index index;
  std::vector<std::string> files;  // contents
};

Checkpoint MakeCheckpoint(uint32_t images) {
  std::mt19937_64 random(20251125);
  Checkpoint checkpoint;
  for (uint32_t i = 0; i < images; ++i) {
    IndexImage image;
    image.file = ImageFileName(Rank{i});
    image.rank = Rank{i};
    image.block_bytes = kBlock;
    image.bytes = kBlocks * kBlock;
    std::string contents(image.bytes, '\0');
    for (char& byte : contents) byte = static_cast<char>(random());
    for (uint64_t block = 0; block < kBlocks; ++block) {
      image.block_crc32c.push_back(
          Crc32c(std::as_bytes(std::span(contents)).subspan(block * kBlock, kBlock)));
    }
    checkpoint.index.images.push_back(std::move(image));
    checkpoint.index.tensor_states.push_back(
        {absl::StrFormat("a%05d", i), "param", Dtype::kUint8, {kBlock + 100}});
    checkpoint.index.pieces.push_back(
        {.piece = {.tensor_state = i, .box = kWholeTensor, .begin = 0, .end = kBlock + 100},
         .image = i,
         .offset_bytes = kBlock});
    checkpoint.index.blobs.push_back({.scope = BlobScope::kRank,
                                      .rank = Rank{i},
                                      .name = absl::StrFormat("b%05d", i),
                                      .image = i,
                                      .offset_bytes = 2 * kBlock + 200,
                                      .bytes = 8});
    checkpoint.files.push_back(std::move(contents));
  }
  return checkpoint;
}

constexpr char kDirectory[] = "/root/job/s000000000001.a0001";
std::string PathOf(uint32_t image) {
  return absl::StrCat(kDirectory, "/", ImageFileName(Rank{image}));
}

void Put(SimDisk& disk, const Checkpoint& checkpoint) {
  for (uint32_t i = 0; i < checkpoint.files.size(); ++i) {
    if (disk.Contents(PathOf(i)).ok()) disk.RemoveFile(PathOf(i));
    disk.PutFile(PathOf(i), checkpoint.files[i]);
  }
}

bool Holds(std::span<const std::byte> block, const Checkpoint& checkpoint, uint32_t image,
           uint64_t number) {
  const auto expected =
      std::as_bytes(std::span(checkpoint.files[image])).subspan(number * kBlock, kBlock);
  return std::equal(block.begin(), block.end(), expected.begin(), expected.end());
}

class BlockReaderTest : public testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<BlockReader>> Open(Caching caching = Caching::kDirect) {
    return BlockReader::Open(disk_, SimReadAt(disk_), kDirectory, checkpoint_.index, caching);
  }
  absl::Status Read(const BlockReader& reader, uint32_t image, uint64_t block) {
    return reader.Read(image, block, out_);
  }

  SimDisk disk_;
  Checkpoint checkpoint_ = MakeCheckpoint(3);
  BlockMemory memory_ = AllocateBlockMemory(kBlock);
  std::span<std::byte> out_{memory_.get(), kBlock};
};

TEST_F(BlockReaderTest, EveryBlockIsTheOneThatWasCommitted) {
  for (const bool direct_supported : {true, false}) {
    Put(disk_, checkpoint_);
    disk_.SetDirectSupported(direct_supported);
    for (const Caching caching : {Caching::kDirect, Caching::kBuffered}) {
      ASSERT_OK_AND_ASSIGN(const std::unique_ptr<BlockReader> reader, Open(caching));
      for (uint32_t image = 0; image < 3; ++image) {
        for (uint64_t block = 0; block < kBlocks; ++block) {
          ASSERT_OK(Read(*reader, image, block));
          EXPECT_TRUE(Holds(out_, checkpoint_, image, block));
        }
      }
    }
  }
}

TEST_F(BlockReaderTest, AFlippedBitIsNamedByFileOffsetAndTensors) {
  Put(disk_, checkpoint_);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<BlockReader> reader, Open());
  const char* const lies[kBlocks] = {"no tensor", "a00001 (param)", "a00001 (param), blob b00001"};
  for (uint64_t offset = 0; offset < kBlocks * kBlock; offset += 97) {
    disk_.FlipBit(PathOf(1), offset, static_cast<int>(offset % 8));
    for (uint64_t block = 0; block < kBlocks; ++block) {
      const absl::Status status = Read(*reader, 1, block);
      if (block != offset / kBlock) {
        EXPECT_OK(status);
        continue;
      }
      EXPECT_THAT(
          status,
          StatusIs(absl::StatusCode::kDataLoss,
                   AllOf(HasSubstr(PathOf(1)),
                         HasSubstr(absl::StrFormat("block %d, bytes [%d, %d): expected CRC32C",
                                                   block, block * kBlock, (block + 1) * kBlock)),
                         HasSubstr(absl::StrCat("; there lies: ", lies[block])))));
    }
    disk_.FlipBit(PathOf(1), offset, static_cast<int>(offset % 8));
  }
}

TEST_F(BlockReaderTest, AFileOfAnotherSizeOrNoneIsFoundBeforeAnythingIsRead) {
  Put(disk_, checkpoint_);
  disk_.TruncateFile(PathOf(2), 2 * kBlock + 300);
  EXPECT_THAT(Open().status(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("lies: no tensor")));
  disk_.TruncateFile(PathOf(2), 2 * kBlock + 10);
  EXPECT_THAT(Open().status(),
              StatusIs(absl::StatusCode::kDataLoss,
                       AllOf(HasSubstr(PathOf(2)), HasSubstr("expected 12288 bytes, found 8202"),
                             HasSubstr("from offset 8202 on lies: a00002 (param), blob b00002"))));
  disk_.RemoveFile(PathOf(2));
  EXPECT_THAT(Open().status(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(PathOf(2))));
  disk_.PutFile(PathOf(2), checkpoint_.files[2] + "x");
  EXPECT_THAT(Open().status(), StatusIs(absl::StatusCode::kDataLoss,
                                        HasSubstr("expected 12288 bytes, found 12289")));
  disk_.RemoveFile(PathOf(2));
  disk_.PutFile(PathOf(2) + "/file", "x");
  EXPECT_THAT(Open().status(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("no regular file")));
}

TEST_F(BlockReaderTest, AFileThatShrinksOrGoesWhileItIsReadIsNamed) {
  Put(disk_, checkpoint_);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<BlockReader> reader, Open());
  ASSERT_OK(Read(*reader, 0, 2));
  disk_.TruncateFile(PathOf(0), 2 * kBlock);
  EXPECT_OK(Read(*reader, 0, 1));
  EXPECT_THAT(Read(*reader, 0, 2),
              StatusIs(absl::StatusCode::kDataLoss,
                       AllOf(HasSubstr(PathOf(0)), HasSubstr("block 2, bytes [8192, 12288)"),
                             HasSubstr("a00000 (param), blob b00000"))));
  disk_.RemoveFile(PathOf(1));
  EXPECT_THAT(Read(*reader, 1, 1),
              StatusIs(absl::StatusCode::kDataLoss,
                       AllOf(HasSubstr(PathOf(1)), HasSubstr("a00001 (param)"))));
}

TEST_F(BlockReaderTest, SwappedFilesAreFoundInEveryBlock) {
  std::swap(checkpoint_.files[0], checkpoint_.files[2]);
  Put(disk_, checkpoint_);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<BlockReader> reader, Open());
  for (const uint32_t image : {0, 2}) {
    for (uint64_t block = 0; block < kBlocks; ++block) {
      EXPECT_THAT(Read(*reader, image, block),
                  StatusIs(absl::StatusCode::kDataLoss,
                           AllOf(HasSubstr(PathOf(image)), HasSubstr(absl::StrCat("block ", block)),
                                 HasSubstr("expected CRC32C"))));
    }
  }
  EXPECT_OK(Read(*reader, 1, 0));
}

TEST_F(BlockReaderTest, WhatTheDeviceRefusesIsDamageAndABusyOneIsNot) {
  Put(disk_, checkpoint_);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<BlockReader> reader, Open());
  disk_.FailOperation(SimDisk::Operation::kRingRead, 0, absl::DataLossError("EIO"));
  EXPECT_THAT(Read(*reader, 1, 1),
              StatusIs(absl::StatusCode::kDataLoss,
                       AllOf(HasSubstr(PathOf(1)), HasSubstr("bytes [4096, 8192): "),
                             HasSubstr("EIO; there"), HasSubstr("a00001 (param)"))));
  disk_.FailOperation(SimDisk::Operation::kRingRead, 0, absl::UnavailableError("later"));
  EXPECT_THAT(Read(*reader, 1, 1), StatusIs(absl::StatusCode::kUnavailable,
                                            AllOf(HasSubstr(PathOf(1)), HasSubstr("later"),
                                                  Not(HasSubstr("there lies")))));
  EXPECT_OK(Read(*reader, 1, 1));
  disk_.FailOperation(SimDisk::Operation::kStat, 0, absl::UnavailableError("later"));
  EXPECT_THAT(Open().status(), StatusIs(absl::StatusCode::kUnavailable));
}

// Direct transfers that the device's alignment forbids: the disk opens the file all the same.
TEST(BlockReader, BlocksBelowTheDevicesAlignmentAreReadThroughThePageCache) {
  SimDisk disk(SimDisk::Options{.direct_alignment_bytes = 2 * kBlock});
  const Checkpoint checkpoint = MakeCheckpoint(2);
  Put(disk, checkpoint);
  const BlockMemory memory = AllocateBlockMemory(kBlock);
  const std::span<std::byte> out(memory.get(), kBlock);
  ASSERT_OK_AND_ASSIGN(const auto reader, BlockReader::Open(disk, SimReadAt(disk), kDirectory,
                                                            checkpoint.index, Caching::kDirect));
  for (uint64_t block = 0; block < kBlocks; ++block) {
    ASSERT_OK(reader->Read(1, block, out));
    EXPECT_TRUE(Holds(out, checkpoint, 1, block));
  }
}

TEST(BlockReader, ManyThreadsReadMoreImagesThanMayBeOpen) {
  const uint32_t images = kImagesOpenMax + 40;
  const Checkpoint checkpoint = MakeCheckpoint(images);
  const TemporaryDirectory directory;
  const std::unique_ptr<FileSystem> files = NewPosixFileSystem();
  for (uint32_t i = 0; i < images; ++i) {
    const auto file = files->CreateNew(directory.Join(ImageFileName(Rank{i})));
    ASSERT_OK(file);
    ASSERT_OK((*file)->Append(std::as_bytes(std::span(checkpoint.files[i]))));
    ASSERT_OK((*file)->Sync());
  }
  for (const Caching caching : {Caching::kDirect, Caching::kBuffered}) {
    ASSERT_OK_AND_ASSIGN(
        const auto reader,
        BlockReader::Open(*files, PlainReadAt(), directory.path(), checkpoint.index, caching));
    std::vector<int> failures(4);
    {
      std::vector<std::jthread> threads;
      for (size_t thread = 0; thread < failures.size(); ++thread) {
        threads.emplace_back([&, thread] {
          const BlockMemory memory = AllocateBlockMemory(kBlock);
          const std::span<std::byte> out(memory.get(), kBlock);
          std::mt19937_64 random(thread);
          for (int round = 0; round < 1500; ++round) {
            const auto image = static_cast<uint32_t>(random() % images);
            const uint64_t block = random() % kBlocks;
            if (!reader->Read(image, block, out).ok() || !Holds(out, checkpoint, image, block)) {
              ++failures[thread];
            }
          }
        });
      }
    }
    EXPECT_THAT(failures, testing::Each(0));
  }
}

}  // namespace
}  // namespace holdfast
