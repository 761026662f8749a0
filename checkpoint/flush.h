// One image into one file, block by block, while it is still being captured.
//
// Protocol of one try:
//   1. The name is told to the listener, which records it: whatever is under it from now on is ours
//      to remove.
//   2. The file is created with its whole size (on the pool): a full disk is known now.
//   3. Blocks that are ready are written, each at block index * block size, a few at a time.
//   4. When every block's write has completed: sync, once.
// Any error ends the try: the rest is not written, what is in flight is waited for, the file is
// closed and removed, and the next try writes everything anew from memory under the next name. A
// failed sync is never repeated on the same file: the kernel may have dropped the pages and
// forgotten the error. After kFlushTriesMax tries storage is given up for this image.
#ifndef HOLDFAST_CHECKPOINT_FLUSH_H_
#define HOLDFAST_CHECKPOINT_FLUSH_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "checkpoint/rank_images.h"
#include "checkpoint/shared_mapping.h"

namespace holdfast {

inline constexpr int kFlushTriesMax = 3;
// Names that exist already are passed over; more than so many in a row are an error of a try.
inline constexpr int kFlushNamesSkippedMax = 16;

// "dir/rank-00003.h5" for 0, "dir/rank-00003.r2.h5" for 2: of the name of an image the one that
// ImageFileName gives.
std::string NumberedFileName(const std::string& path, uint32_t number);

// Removes an unpublished file that may not exist, on the pool, then calls `done` on the loop.
void RemoveUnpublished(const ImageWorld& world, const std::string& path,
                       std::function<void()> done);

// Threads: the event loop's. Lifetime: destroying it abandons what is in flight, as a crash would:
//   the file stays. Buffers and file live until the transfers in flight are done.
class ImageFlush {
 public:
  // Calls come from the loop, never inside a call made here.
  class Listener {
   public:
    virtual ~Listener() = default;
    // Before `path` is created. Must be recorded when it returns.
    virtual void OnFileNamed(const std::string& path, uint32_t number) = 0;
    // Block `block`'s write of this try has completed.
    virtual void OnBlockWritten(uint32_t block) = 0;
    // The try has failed, its file is removed; the next one begins, and will write every block.
    virtual void OnRetry(const absl::Status& why) = 0;
    // The whole file is durable (its name is the directory's affair). Last call.
    virtual void OnFlushed(const std::string& path, absl::Duration flush_time) = 0;
    // All tries failed; no file is left. `why` has the errors of all tries. Last call.
    virtual void OnFlushFailed(const absl::Status& why) = 0;
  };

  struct Image {
    std::shared_ptr<SharedMapping> memory;
    std::vector<uint32_t> block_table;  // where each block of the image lies in the memory
    uint64_t block_bytes = 0;
  };

  // `first_number`: of the first name to try. The listener outlives the flush.
  static std::unique_ptr<ImageFlush> Start(Image image, const std::string& path,
                                           uint32_t first_number, Listener& listener,
                                           const ImageWorld& world);
  ~ImageFlush();

  // The block's bytes are complete: it may be written. Once per block.
  void BlockReady(uint32_t block);

  // Stops, removes the file, then calls `done`, once: nothing of the image is in flight then. The
  // listener is not called any more. May be called at any time before the last call.
  void Abandon(std::function<void()> done);

  uint32_t blocks_written() const;  // of this try

 private:
  class State;
  explicit ImageFlush(std::shared_ptr<State> state) : state_(std::move(state)) {}
  std::shared_ptr<State> state_;
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_FLUSH_H_
