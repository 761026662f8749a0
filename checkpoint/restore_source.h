// The verified blocks of one checkpoint, wherever they are: in the memories of this agent, on
// storage, or both. Knows which image has which block where; knows nothing of who asks for them
// (that is checkpoint/restore.h).
//
// A block of a dead trainer's image is verified where it lies and handed out in place. A block that
// a living trainer could still write (a zombie of an older attempt) is copied first and the copy is
// verified. A block that is bad in memory is taken from storage if the checkpoint is committed
// there; one that is bad on storage too is kDataLoss with file, tensors and offset.
#ifndef HOLDFAST_CHECKPOINT_RESTORE_SOURCE_H_
#define HOLDFAST_CHECKPOINT_RESTORE_SOURCE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/executor.h"
#include "base/ids.h"
#include "checkpoint/image_events.h"
#include "checkpoint/shared_mapping.h"
#include "format/index.h"
#include "io/file_system.h"
#include "io/io_ring.h"
#include "io/unique_fd.h"

namespace holdfast {

// An image of the checkpoint that is sealed in a rank memory of this agent.
struct MemoryImage {
  std::vector<std::span<const std::byte>> blocks;
  std::vector<uint64_t> memory_offsets;  // of the blocks, in the rank memory
  std::shared_ptr<SharedMapping> mapping;
  bool trainer_alive = false;  // its trainer may still write the blocks
};

struct RestoreSourceParts {
  Index index;
  // One per image of the index; empty where it is not in memory.
  std::vector<std::optional<MemoryImage>> memory;
  std::string directory;  // empty: not committed on storage
  // Keeps the images from being recycled; runs at the end of the source's life, on the loop.
  std::function<void()> release;
};

// The bytes of the blobs memfd, without those of the blobs themselves: those of index.blobs[i]
// belong at data_offsets[i].
struct RestoredBlobsFrame {
  std::vector<std::byte> bytes;
  std::vector<uint64_t> data_offsets;
};
RestoredBlobsFrame FrameRestoredBlobs(const Index& index);

// All blobs of a checkpoint (abi::RestoredBlobs), in a memfd that is sealed against every change.
struct SealedBlobs {
  UniqueFd fd;
  uint64_t bytes = 0;
};

// An image is identified by its index in Index::images.

struct RestoreSourceWorld {
  FileSystem& file_system;
  IoRing& ring;
  EventLoop& loop;
  WorkPool& pool;
  Caching caching = Caching::kDirect;
};

// Threads: the event loop's; completions run there, never inside the call.
// Lifetime: shared; what is in flight keeps it, and through `done` whatever that holds.
class RestoreSource : public std::enable_shared_from_this<RestoreSource> {
 public:
  static std::shared_ptr<RestoreSource> Create(RestoreSourceParts parts,
                                               const RestoreSourceWorld& world);
  ~RestoreSource();
  RestoreSource(const RestoreSource&) = delete;
  RestoreSource& operator=(const RestoreSource&) = delete;

  const Index& index() const { return parts_.index; }
  // The mapping in which blocks of this image can be handed out in place; null: none can.
  const SharedMapping* in_place(uint32_t image) const;

  // Verifies a block where it lies. The offset of its bytes in in_place(image). kUnavailable: it is
  // not good there (any more): Fetch() finds it elsewhere. CHECKs in_place(image).
  void VerifyInPlace(uint32_t image, uint64_t block,
                     std::function<void(absl::StatusOr<uint64_t>)> done);

  // Fills `targets`, whose sizes add up to the block's, with a verified copy. They stay valid until
  // `done` runs; for direct I/O each is aligned as io/file_system.h asks.
  enum class From { kMemory, kStorage };
  void Fetch(uint32_t image, uint64_t block, std::vector<std::span<std::byte>> targets,
             std::function<void(absl::StatusOr<From>)> done);

  // The blobs, read and verified at the first call; the same memory for every caller.
  using BlobsDone = std::function<void(absl::StatusOr<std::shared_ptr<const SealedBlobs>>)>;
  void Blobs(BlobsDone done);

  // Whether another rank may use it, too: nothing of it has failed so far.
  bool is_sound() const;
  bool has_storage() const { return !parts_.directory.empty(); }

 private:
  // On the way to SealedBlobs: blocks are fetched one after another.
  struct BlobLoad {
    RestoredBlobsFrame frame;
    std::vector<std::pair<uint32_t, uint64_t>> blocks;  // (image, block), ascending
    size_t next = 0;
    absl::StatusOr<UniqueFd> sealed = absl::UnknownError("not run");
  };
  struct Request {
    uint32_t image = 0;
    uint64_t block = 0;
    std::vector<std::span<std::byte>> targets;
    std::function<void(absl::StatusOr<From>)> done;
    absl::Status memory_error;  // why memory did not serve
    absl::Status read_error;    // the first of the reads
    size_t reads_in_flight = 0;
    uint32_t found_crc32c = 0;
  };
  // An image file, opened when it is first needed.
  struct ImageFile {
    std::shared_ptr<IoFile> file;
    bool opening = false;
    absl::Status error;
    std::vector<std::function<void()>> waiting;
  };

  RestoreSource(RestoreSourceParts parts, const RestoreSourceWorld& world);
  uint32_t ExpectedCrc32c(uint32_t image, uint64_t block) const;
  std::string Path(uint32_t image) const;
  void CopyFromMemory(const std::shared_ptr<Request>& request);
  void FetchFromStorage(const std::shared_ptr<Request>& request);
  void OpenFile(uint32_t image, std::function<void()> opened);
  void ReadParts(const std::shared_ptr<Request>& request);
  void VerifyRead(const std::shared_ptr<Request>& request);
  void LoadBlobs(const std::shared_ptr<BlobLoad>& load);
  void CopyBlobs(BlobLoad& load, std::span<const std::byte> block) const;
  void SealBlobs(const std::shared_ptr<BlobLoad>& load);
  void BlobsEnded(absl::StatusOr<std::shared_ptr<const SealedBlobs>> blobs);
  // kDataLoss with file, tensors and offset.
  absl::Status BadBlock(const Request& request, const std::string& what) const;

  const RestoreSourceParts parts_;
  const RestoreSourceWorld world_;
  std::vector<ImageFile> files_;  // one per image
  std::shared_ptr<const SealedBlobs> blobs_;
  absl::Status blobs_error_;
  std::vector<BlobsDone> blobs_waiting_;
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_RESTORE_SOURCE_H_
