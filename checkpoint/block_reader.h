// The blocks of the images of one committed checkpoint, read from storage and verified: for
// commands that read a checkpoint in another order than it lies there (diff, reshard) and run where
// no agent is. What only reads from front to back and reports all that is wrong is checkpoint/
// verify.h; what the agent reads is checkpoint/restore_source.h.
#ifndef HOLDFAST_CHECKPOINT_BLOCK_READER_H_
#define HOLDFAST_CHECKPOINT_BLOCK_READER_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "checkpoint/verify.h"
#include "format/index.h"
#include "io/file_system.h"

namespace holdfast {

// Image files that a BlockReader keeps open. To open one more it closes the one that it has had
// open for longest, so that a checkpoint of any number of ranks needs few descriptors.
inline constexpr size_t kImagesOpenMax = 256;

// Memory for blocks, aligned for direct reads. Null if there is not as much.
struct FreeBlockMemory {
  void operator()(std::byte* bytes) const;
};
using BlockMemory = std::unique_ptr<std::byte, FreeBlockMemory>;
BlockMemory AllocateBlockMemory(uint64_t bytes);  // a multiple of kBlockBytesMin

// Threads: any; Read may run concurrently, and blocks.
// Lifetime: file system and index outlive it.
class BlockReader {
 public:
  // `index` is what LoadIndex gave for `directory`. Looks at the size of every image; opens none.
  // kDirect is a wish: an image that cannot be read past the page cache (the file system does not
  // do it, or its alignment is above the image's block size) is read through it.
  // Errors: kDataLoss with the file (an image is missing, or too short, which names the tensors
  // that are cut off, or too long) and those of FileSystem::Stat.
  static absl::StatusOr<std::unique_ptr<BlockReader>> Open(FileSystem& file_system, ReadAt read_at,
                                                           std::string directory,
                                                           const Index& index, Caching caching);

  // Fills `out`, which has the size of the block, with block number `block` of image number
  // `image` of the index, and compares the CRC32C with that in INDEX. With kDirect `out` is
  // aligned as io/file_system.h asks for direct I/O. After an error `out` is unspecified.
  // CHECKs image, block and the size of `out`.
  // Errors: kDataLoss with file, offset, tensors, expected and found (another CRC32C, the file is
  // gone or became shorter, the device refused); others, about reading it now, with the file.
  absl::Status Read(uint32_t image, uint64_t block, std::span<std::byte> out) const;

 private:
  struct OpenImage {
    std::unique_ptr<IoFile> file;
    Caching caching = Caching::kBuffered;
  };

  BlockReader(FileSystem& file_system, ReadAt read_at, std::string directory, const Index& index,
              Caching caching);
  std::string Path(uint32_t image) const;
  // The open file, or a new one with `caching`.
  absl::StatusOr<std::shared_ptr<OpenImage>> FileOf(uint32_t image, Caching caching) const
      ABSL_LOCKS_EXCLUDED(mutex_);
  absl::Status ReadFrom(const OpenImage& file, uint32_t image, uint64_t block,
                        std::span<std::byte> out) const;

  FileSystem& file_system_;
  const ReadAt read_at_;
  const std::string directory_;
  const Index& index_;
  const Caching caching_;
  mutable Mutex mutex_;
  // Of each image; null where it is not open.
  mutable std::vector<std::shared_ptr<OpenImage>> files_ ABSL_GUARDED_BY(mutex_);
  // Those that are open, the longest first.
  mutable std::deque<uint32_t> opened_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_BLOCK_READER_H_
