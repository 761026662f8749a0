// Goal: a pinned block stays what it is, a block that is there is not read again, and errors are
// not kept. Method: a checkpoint on the simulated disk and one thread; threads on a real disk.
#include "checkpoint/source_block_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/crc32c.h"
#include "checkpoint/engine_testing.h"
#include "checkpoint/readback_testing.h"
#include "checkpoint/reshard_testing.h"
#include "io/posix_file_system.h"
#include "tests/support/sim_disk.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

constexpr uint64_t kBlock = 4096;

bool IsBlock(const SourceBlockCache::Pin& pin, const Index& index, uint32_t image, uint64_t block) {
  return Crc32c(pin.bytes()) == index.images[image].block_crc32c[block];
}

TEST(SourceBlockCache, KeepsWhatIsPinnedAndWhatWasUsedLast) {
  SimDisk disk;
  ASSERT_OK(disk.CreateDirectory("/src"));
  ASSERT_OK(WriteTestCheckpoint(disk, SmallLayout(2), {}));
  ASSERT_OK_AND_ASSIGN(const Found source, FindNewest(disk, "/src", "job"));
  ASSERT_OK_AND_ASSIGN(const auto reader,
                       BlockReader::Open(disk, SimReadAt(disk), source.entry.directory,
                                         source.index, Caching::kBuffered));
  std::vector<std::byte> memory(3 * kBlock);
  SourceBlockCache cache(*reader, source.index, memory, kBlock);
  ASSERT_OK_AND_ASSIGN(const SourceBlockCache::Pin pinned, cache.Get(0, 0));
  ASSERT_OK(cache.Get(0, 1).status());
  ASSERT_OK(cache.Get(0, 2).status());
  ASSERT_OK(cache.Get(0, 1).status());  // is there
  EXPECT_EQ(cache.bytes_read(), 3 * kBlock);
  ASSERT_OK(cache.Get(1, 0).status());  // in the place of (0, 2): (0, 0), which is older, is pinned
  ASSERT_OK(cache.Get(0, 1).status());
  EXPECT_EQ(cache.bytes_read(), 4 * kBlock);
  ASSERT_OK_AND_ASSIGN(const SourceBlockCache::Pin again, cache.Get(0, 2));
  EXPECT_EQ(cache.bytes_read(), 5 * kBlock);
  EXPECT_TRUE(IsBlock(pinned, source.index, 0, 0));
  EXPECT_TRUE(IsBlock(again, source.index, 0, 2));
}

TEST(SourceBlockCache, AnErrorIsReportedAndTheNextReadTriesAgain) {
  SimDisk disk;
  ASSERT_OK(disk.CreateDirectory("/src"));
  ASSERT_OK(WriteTestCheckpoint(disk, SmallLayout(2), {}));
  ASSERT_OK_AND_ASSIGN(const Found source, FindNewest(disk, "/src", "job"));
  ASSERT_OK_AND_ASSIGN(const auto reader,
                       BlockReader::Open(disk, SimReadAt(disk), source.entry.directory,
                                         source.index, Caching::kBuffered));
  std::vector<std::byte> memory(kBlock);
  SourceBlockCache cache(*reader, source.index, memory, kBlock);
  for (const uint64_t block : {0, 1, 2}) {
    disk.FailOperation(SimDisk::Operation::kRingRead, 0, absl::UnavailableError("not now"));
    EXPECT_THAT(cache.Get(0, block).status(), StatusIs(absl::StatusCode::kUnavailable));
    ASSERT_OK_AND_ASSIGN(const SourceBlockCache::Pin pin, cache.Get(0, block));
    EXPECT_TRUE(IsBlock(pin, source.index, 0, block));
  }
  EXPECT_EQ(disk.fault_count(), 3u);
}

TEST(SourceBlockCache, ThreadsThatShareFewSlotsAllSeeTheirBlocks) {
  const std::unique_ptr<FileSystem> file_system = NewPosixFileSystem();
  const TemporaryDirectory directory;
  ASSERT_OK(WriteTestCheckpoint(*file_system, SmallLayout(2), {.root = directory.path()}));
  ASSERT_OK_AND_ASSIGN(const Found source, FindNewest(*file_system, directory.path(), "job"));
  ASSERT_OK_AND_ASSIGN(const auto reader,
                       BlockReader::Open(*file_system, PlainReadAt(), source.entry.directory,
                                         source.index, Caching::kBuffered));
  constexpr uint32_t kThreads = 4;
  std::vector<std::byte> memory(kThreads * kBlock);
  SourceBlockCache cache(*reader, source.index, memory, kBlock);
  std::vector<std::thread> threads;
  for (uint32_t thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      std::mt19937_64 random(thread);
      for (int i = 0; i < 2000; ++i) {
        const auto image = static_cast<uint32_t>(random() % 2);
        const uint64_t block = random() % source.index.images[image].block_crc32c.size();
        const absl::StatusOr<SourceBlockCache::Pin> pin = cache.Get(image, block);
        ASSERT_OK(pin.status());
        ASSERT_TRUE(IsBlock(*pin, source.index, image, block));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  // Blocks were given up and read again: there are fewer slots than blocks.
  uint64_t block_count = 0;
  for (const IndexImage& image : source.index.images) block_count += image.block_crc32c.size();
  EXPECT_GT(block_count, kThreads);
  EXPECT_GT(cache.bytes_read(), block_count * kBlock);
}

}  // namespace
}  // namespace holdfast
