// Fills the images of a reshard: steps 4 to 6 of reshard.cc. Some threads (the caller is one of
// them) take unit after unit, in the order of the schedule; each reads what it needs, copies,
// checksums and writes one unit at a time, so that while one waits for storage others compute.
// Inside of checkpoint/reshard*.
#ifndef HOLDFAST_CHECKPOINT_RESHARD_WRITER_H_
#define HOLDFAST_CHECKPOINT_RESHARD_WRITER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/ids.h"
#include "base/mutex.h"
#include "checkpoint/reshard.h"
#include "checkpoint/reshard_plan.h"
#include "checkpoint/source_block_cache.h"
#include "format/fingerprint.h"
#include "format/image_fingerprints.h"
#include "io/file_system.h"

namespace holdfast {

// Page-aligned memory, there from the beginning: no page is first touched in a transfer.
//
// Threads: as what is in it. Movable.
class PageBuffer {
 public:
  // Errors: kResourceExhausted.
  static absl::StatusOr<PageBuffer> Create(uint64_t bytes);
  PageBuffer() = default;
  PageBuffer(PageBuffer&& other) noexcept;
  PageBuffer& operator=(PageBuffer&& other) noexcept;
  ~PageBuffer();
  std::span<std::byte> bytes() const { return bytes_; }

 private:
  std::span<std::byte> bytes_;
};

// Threads: the caller's; Run() starts others, which are gone when it returns.
// Lifetime: what it is made with outlives it.
class ReshardWriter {
 public:
  ReshardWriter(const ReshardStorage& storage, const ReshardPlan& plan,
                const ReshardSchedule& schedule, const BlockReader& reader, std::string directory,
                CheckpointId id, const ReshardOptions& options);

  // Once. After OK all images are written and durable under their names, which need not be.
  absl::Status Run();

  // Removes the names of the images that Run() has created, as far as can be.
  void RemoveImages();
  // Frees the buffers and closes the images.
  void Close();

  // After OK. Of each image; of each tensor state of the layout.
  std::vector<std::vector<uint32_t>> TakeChecksums() ABSL_LOCKS_EXCLUDED(mutex_);
  std::vector<Fingerprint> sums() const ABSL_LOCKS_EXCLUDED(mutex_);
  uint64_t bytes_read() const;

 private:
  struct Image {
    std::unique_ptr<IoFile> file;
    std::optional<ImageFingerprints> fingerprints;
    std::vector<std::byte> head_tail;  // bytes [units_begin, head_bytes)
  };
  // What a thread has for itself.
  struct Thread {
    std::span<std::byte> unit;
    std::vector<ReshardPart> parts;
    std::vector<FingerprintPart> sums;
    std::vector<Fingerprint> total;  // of each tensor state
  };

  absl::Status CreateImages();
  absl::Status CreateImage(Rank rank, std::span<std::byte> buffer);
  absl::Status WriteUnits();
  void RunThread(std::span<std::byte> unit, bool reports);
  // The next unit of the schedule; empty: there is none, or something has failed.
  std::optional<size_t> Next() ABSL_LOCKS_EXCLUDED(mutex_);
  absl::Status DoUnit(const ReshardUnit& unit, Thread& thread);
  absl::Status Copy(const ReshardUnit& unit, Thread& thread, std::span<std::byte> out);
  uint64_t BlobBytesIn(const ReshardUnit& unit) const;
  // Adds bytes [begin, begin + bytes.size()) of an image to the checksums of their blocks.
  void AddChecksum(uint32_t image, uint64_t begin, std::span<const std::byte> bytes)
      ABSL_LOCKS_EXCLUDED(mutex_);
  void Fail(const absl::Status& status) ABSL_LOCKS_EXCLUDED(mutex_);

  const ReshardStorage& storage_;
  const ReshardPlan& plan_;
  const ReshardSchedule& schedule_;
  const BlockReader& reader_;
  const std::string directory_;
  const CheckpointId id_;
  const ReshardOptions& options_;
  std::vector<Image> images_;
  std::vector<std::string> created_;
  PageBuffer memory_;
  std::optional<SourceBlockCache> cache_;

  mutable Mutex mutex_;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);  // the first error
  size_t next_unit_ ABSL_GUARDED_BY(mutex_) = 0;
  // The CRC32C of a block is the XOR of those of its parts, each followed by as many zeros as bytes
  // come behind it (CombineCrc32c): so parts may come in any order.
  std::vector<std::vector<uint32_t>> block_crc32c_ ABSL_GUARDED_BY(mutex_);
  uint64_t bytes_done_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<Fingerprint> sums_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_RESHARD_WRITER_H_
